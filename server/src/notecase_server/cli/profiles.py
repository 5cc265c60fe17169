"""`notecase profiles`: named servers with their addresses, tokens and CA certificates."""

import os
import sys
from dataclasses import replace

import click

from notecase_server.cli import ids, profiles_file
from notecase_server.cli.ask import limited
from notecase_server.cli.connection import Exit, Refusal
from notecase_server.cli.options import DEFAULT_ADDRESS, OUTPUT, address, filled
from notecase_server.cli.profiles_file import Profile, Profiles, ProfilesError

NAME = click.argument("name", callback=filled, shell_complete=ids.profiles)


@click.group()
def profiles() -> None:
    """List, set, choose and delete profiles: named servers with their tokens and CA certificates.

    Profiles are in one file, whose path `profiles list` prints. Commands use the profile of --profile or
    NOTECASE_PROFILE, or else the one chosen with `profiles use`. Other options take precedence over it, and
    NOTECASE_ADDRESS, NOTECASE_TOKEN and NOTECASE_CA over a profile that --profile does not name. A profile's token is
    sent only to its own server.
    """


@profiles.command("list")
@click.option("--profile", default="", envvar="NOTECASE_PROFILE", hidden=True, help="The one that is used.")
@OUTPUT
def list_profiles(profile: str, form: str) -> None:
    """List profiles, without tokens."""
    from notecase_server.cli import output  # noqa: PLC0415  # imports the client, which no other of these needs

    held = _read()
    used = profile or held.current
    if form != "table":
        shown = [
            {"name": name, "current": name == used, "address": one.address, "token": _source(one), "ca": one.ca}
            for name, one in sorted(held.profiles.items())
        ]
        output.print_data(shown, form)
        return
    rows = [
        ("*" if name == used else "", name, one.address, _source(one), one.ca)
        for name, one in sorted(held.profiles.items())
    ]
    click.echo(output.table(("", "PROFILE", "SERVER", "TOKEN", "CA FILE"), rows))
    click.secho(f"In {profiles_file.path()}.", err=True, dim=True)


@profiles.command("set")
@NAME
@click.option(
    "--server",
    metavar="HOST:PORT",
    callback=lambda *args: address(*args) if args[2] else None,
    help="The server's address.",
)
@click.option("--token", metavar="TOKEN", help="A token to store in the file; - reads standard input.")
@click.option(
    "--token-file", metavar="FILE", help="A file with the token, read when a call needs it; only you may have access."
)
@click.option(
    "--token-command", metavar="COMMAND", help="A shell command that prints the token, run when a call needs it."
)
@click.option("--ca", metavar="FILE", help="CA certificates for the server's certificate: PEM.")
@click.option("--plaintext/--no-plaintext", default=None, help="Connect to other machines without TLS.")
def set_profile(
    name: str,
    server: str | None,
    token: str | None,
    token_file: str | None,
    token_command: str | None,
    ca: str | None,
    plaintext: bool | None,
) -> None:
    """Create a profile, or change the given options of one.

    The first profile becomes the current one. Only you can read the file.
    """
    tokens = {"token": token, "token_file": token_file, "token_command": token_command}
    if sum(one is not None for one in tokens.values()) > 1:
        raise click.UsageError("Give only one of --token, --token-file and --token-command.")
    if token_file:
        _refuse_readable(_absolute(token_file))
    held = _read(strict=False)
    one = held.profiles.get(name, Profile(DEFAULT_ADDRESS))
    if any(given is not None for given in tokens.values()):
        tokens["token"] = limited(sys.stdin).strip() if token == "-" else token
        one = replace(
            one, token=tokens["token"] or "", token_file=_absolute(token_file), token_command=token_command or ""
        )
    held.profiles[name] = replace(
        one,
        address=server or one.address,
        ca=one.ca if ca is None else _absolute(ca),
        plaintext=one.plaintext if plaintext is None else plaintext,
    )
    held.current = held.current or name
    _write(held)


@profiles.command("use")
@click.argument("name", required=False, default="", shell_complete=ids.profiles)
def use_profile(name: str) -> None:
    """Choose the profile for commands without --profile; without NAME, use none."""
    held = _read()
    try:
        if name:
            held.chosen(name)
    except ProfilesError as error:
        raise Refusal(str(error), Exit.USAGE) from None
    held.current = name
    _write(held)


@profiles.command("delete")
@NAME
def delete_profile(name: str) -> None:
    """Delete a profile and its stored token."""
    held = _read(strict=False)
    if held.profiles.pop(name, None) is None:
        raise Refusal(f"There is no profile {name!r}.", Exit.USAGE)
    held.current = "" if held.current == name else held.current
    _write(held)


def _absolute(file: str | None) -> str:
    """Returns a file's path for commands in other directories; empty for none."""
    return os.path.abspath(os.path.expanduser(file)) if file else ""


def _refuse_readable(token_file: str) -> None:
    try:
        profiles_file.refuse_readable(token_file)
    except ProfilesError as error:
        raise Refusal(str(error), Exit.USAGE) from None


def _source(one: Profile) -> str:
    """Returns where a profile's token is, without the token."""
    if one.token:
        return "kept"
    return f"file {one.token_file}" if one.token_file else f"command {one.token_command}" if one.token_command else ""


def _read(strict: bool = True) -> Profiles:
    try:
        return profiles_file.read(strict)
    except ProfilesError as error:
        raise Refusal(str(error), Exit.USAGE) from None


def _write(held: Profiles) -> None:
    try:
        profiles_file.write(held)
    except ProfilesError as error:
        raise Refusal(str(error), Exit.FAILED) from None

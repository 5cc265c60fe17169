"""`notecase profiles`: servers by name, and how each is called."""

import os
import sys
from dataclasses import replace

import click

from notecase_server.cli import ids, profiles_file
from notecase_server.cli.connection import Exit, Refusal
from notecase_server.cli.options import DEFAULT_ADDRESS, OUTPUT, address
from notecase_server.cli.profiles_file import Profile, Profiles, ProfilesError

NAME = click.argument("name", shell_complete=ids.profiles)


@click.group()
def profiles() -> None:
    """List, set, choose and delete profiles: servers by name, each with its token and authorities.

    They are in one file, which `profiles list` names. Commands take the profile of --profile or NOTECASE_PROFILE, or
    else the one that `profiles use` chose. Other options win over it, and NOTECASE_ADDRESS, NOTECASE_TOKEN and
    NOTECASE_CA over a profile that --profile does not name. A profile's token goes to its own server only.
    """


@profiles.command("list")
@click.option("--profile", default="", envvar="NOTECASE_PROFILE", hidden=True, help="The one that is used.")
@OUTPUT
def list_profiles(profile: str, form: str) -> None:
    """List profiles; no token is shown."""
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
    click.echo(output.table(("", "PROFILE", "SERVER", "TOKEN", "AUTHORITIES"), rows))
    click.secho(f"In {profiles_file.path()}.", err=True, dim=True)


@profiles.command("set")
@NAME
@click.option(
    "--server", metavar="HOST:PORT", callback=lambda *args: address(*args) if args[2] else None, help="Its address."
)
@click.option("--token", metavar="TOKEN", help="Kept in the file; - reads it from standard input.")
@click.option("--token-file", metavar="FILE", help="Read when a call needs the token; for you alone to read.")
@click.option("--token-command", metavar="COMMAND", help="Run by a shell when a call needs the token, which it prints.")
@click.option("--ca", metavar="FILE", help="The authorities that its certificate may be of: PEM.")
@click.option("--plaintext/--no-plaintext", default=None, help="Talk without TLS beyond this machine, too.")
def set_profile(
    name: str,
    server: str | None,
    token: str | None,
    token_file: str | None,
    token_command: str | None,
    ca: str | None,
    plaintext: bool | None,
) -> None:
    """Make a profile, or change what the options say of it.

    The first profile is used from then on. The file can be read by you alone.
    """
    tokens = {"token": token, "token_file": token_file, "token_command": token_command}
    if sum(one is not None for one in tokens.values()) > 1:
        raise click.UsageError("Say one of --token, --token-file and --token-command.")
    if token_file:
        _refuse_readable(_absolute(token_file))
    held = _read(strict=False)
    one = held.profiles.get(name, Profile(DEFAULT_ADDRESS))
    if any(given is not None for given in tokens.values()):
        tokens["token"] = sys.stdin.read().strip() if token == "-" else token
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
    """Have commands use a profile that name none; without NAME, have them use no profile."""
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
    """Remove a profile and the token that is kept with it."""
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

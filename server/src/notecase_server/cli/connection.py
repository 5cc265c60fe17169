"""Which server a command talks to, and with what code it exits."""

import re
from enum import IntEnum
from pathlib import Path
from typing import Any

import click

from notecase_server.cli import profiles_file
from notecase_server.cli.options import DEFAULT_ADDRESS, given_connection

_TLS = ("andshake", "ertificate", "Hostname Verification", "Socket closed", "reset by peer")
"""What gRPC says when TLS fails, or when one side speaks it and the other does not."""


class Exit(IntEnum):
    """The exit codes of commands."""

    OK = 0
    FAILED = 1
    """The service refused, a run failed or was cancelled, or something that was named is not there."""
    USAGE = 2
    """The command line, or a file that it names, is wrong; nothing was asked of the server."""
    WAITING = 3
    """A run waits for a person or for a caller's tool, and there was no terminal to answer at."""
    UNREACHABLE = 4
    """No server answers at that address, or not as a notecase server does."""
    DIFFERENT = 5
    """What was compared differs."""
    INTERRUPTED = 130
    """Ctrl-C, as shells have it."""


class Refusal(click.ClickException):
    """Ends a command with a sentence and another exit code than ClickException's 1."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.code = code

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # a constant of click's class
        return self.code


def connection() -> tuple[str, dict[str, Any]]:
    """Returns the address and the further arguments of Client: what options say, then a profile that --profile names,
    then variables, and then any other profile.

    A profile's token and authorities go to no other server than its own. Raises Refusal for a profile that is not
    there or cannot be read, and for a file of authorities that cannot be read or has none."""
    options, variables = map(dict, given_connection(click.get_current_context()))
    named = options.pop("profile", "")
    try:
        found = profiles_file.read().chosen(named or variables.pop("profile", ""))
    except profiles_file.ProfilesError as error:
        raise Refusal(str(error), Exit.USAGE) from None
    own = {} if found is None else {"server": found.address, **found.arguments()}
    given: dict[str, Any] = {}
    for layer in (variables, own, options) if named else (own, variables, options):
        if layer.get("ca"):
            given.pop("plaintext", None)  # a token is not sent unencrypted if TLS was requested
        given.update(layer)
    server = given.pop("server", "") or DEFAULT_ADDRESS
    if found is not None and server != found.address:
        given = {**variables, **options}
        given.pop("server", None)
    if given.get("plaintext"):
        given.pop("ca", None)
    if ca := given.get("ca"):
        problem = f"The CA certificates of --ca, NOTECASE_CA or the profile cannot be read: {ca}:"
        try:
            with Path(ca).open("rb") as opened:  # what a pipe has is left to the client: it can be read once
                is_empty = Path(ca).is_file() and b"CERTIFICATE-----" not in opened.read()
            if is_empty:
                raise Refusal(f"{problem} it has no certificate in PEM.", Exit.USAGE)
        except OSError as error:
            raise Refusal(f"{problem} {error.strerror}.", Exit.USAGE) from None
    return server, given


def renews_token() -> bool:
    """Whether a call that is repeated may have another token."""
    return callable(connection()[1].get("token"))


def unreachable(server: str, details: str) -> str:
    """Returns what to say of a server that cannot be reached. `details` are gRPC's words, which end with the cause."""
    if "Failed parsing HTTP/2" in details or "is not a gRPC server" in details:
        return f"The server at {server} is not a gRPC server, for example one of HTTP/1; see --server."
    cause = re.split("last error: |cannot be reached: ", details)[-1]
    cause = re.sub(r"^[A-Z_]+: |(ipv4|ipv6|unix):\S+: ", "", cause).strip().rstrip(".")
    if "WRONG_VERSION_NUMBER" in cause:
        advice = "The server has no TLS, which --ca, NOTECASE_CA or an address on another machine requires."
    elif any(word in cause for word in _TLS):
        advice = "For a server with TLS, set --ca or NOTECASE_CA, and use a host name that is in its certificate."
    else:
        advice = "Start one with `notecase serve`, or name another with --server."
    return f"No server can be reached at {server}: {cause}. {advice}"

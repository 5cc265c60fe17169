"""Which server a command talks to, and with what code it exits."""

from enum import IntEnum
from typing import Any

import click

from notecase_server.cli import profiles_file
from notecase_server.cli.options import CONNECTION, DEFAULT_ADDRESS


class Exit(IntEnum):
    """The exit codes of commands."""

    OK = 0
    FAILED = 1
    """The service refused, a run failed or was cancelled, or something that was named is not there."""
    USAGE = 2
    """The command line, or a file that it names, is wrong; nothing was asked of the server."""
    WAITING = 3
    """A run waits for a person or for a caller's tool, and nobody here could answer."""
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
    """Returns the address and the further arguments of Client: what options and variables say, and then the profile.

    A profile's token and authorities go to no other server than its own. Raises Refusal for a profile that is not
    there or cannot be read."""
    given = dict(click.get_current_context().meta.get(CONNECTION, {}))
    server, name = given.pop("server", ""), given.pop("profile", "")
    try:
        found = profiles_file.read().chosen(name)
    except profiles_file.ProfilesError as error:
        raise Refusal(str(error), Exit.USAGE) from None
    if found is not None and server in {"", found.address}:
        server = found.address
        given = {**found.arguments(), **given}
    if given.get("plaintext"):
        given.pop("ca", None)
    return server or DEFAULT_ADDRESS, given

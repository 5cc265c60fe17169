"""How a command talks to a server, and how it ends."""

import asyncio
import io
import sys
from collections.abc import Awaitable, Callable

import click
from notecase import Client, NotecaseError

from notecase_server.cli import screen
from notecase_server.cli.options import connection

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""


def ask(server: str, conversation: Callable[[Client], Awaitable[int | None]]) -> None:
    """Talks to a server and exits with the code that the conversation returns. Raises ClickException, whose exit code
    is 1, with a sentence for what went wrong."""

    given = connection()

    async def talk() -> int | None:
        try:
            client = Client(server, **given)
        except (ValueError, OSError) as error:  # a token that cannot be sent, a file that cannot be read
            raise click.ClickException(f"{server} cannot be called: {error}.") from None
        async with client:
            return await conversation(client)

    replace_unknown()
    try:
        sys.exit(asyncio.run(talk()))
    except NotecaseError as error:
        raise click.ClickException(screen.sentence(error, server)) from None
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def replace_unknown() -> None:
    """Has the standard streams replace characters that they do not know. Called before anything is read from them:
    afterwards Python refuses the change."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "replace":
            stream.reconfigure(errors="replace")


def name_of(collection: str, given: str) -> str:
    """Returns the resource name for an id, or for what is a name already."""
    return given if given.startswith(f"{collection}/") else f"{collection}/{given}"

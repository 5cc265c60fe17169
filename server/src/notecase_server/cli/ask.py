"""Connects a command to its server, and ends it with the right exit code."""

import asyncio
import io
import sys
from collections.abc import Awaitable, Callable
from typing import TextIO

import click
from notecase import Client, NotecaseError

from notecase_server.cli import screen
from notecase_server.cli.connection import Exit, Refusal, connection

MOST_TEXT = 32 << 20
"""Characters of a file or of standard input that are read as text: more than one request can have."""


def ask(conversation: Callable[[Client], Awaitable[int | None]]) -> None:
    """Talks to the server that the options of SERVER name, and exits with the code that the conversation returns.
    Raises Refusal with a sentence for what went wrong."""
    server, given = connection()

    async def talk() -> int | None:
        try:
            client = Client(server, **given)
        except (ValueError, OSError) as error:  # a token that cannot be sent, a file that cannot be read
            raise Refusal(f"{server} cannot be called: {error}.", Exit.USAGE) from None
        async with client:
            return await conversation(client)

    replace_unknown()
    try:
        sys.exit(asyncio.run(talk()))
    except NotecaseError as error:
        raise Refusal(screen.sentence(error, server), failure_code(error)) from None
    except UnicodeError:  # of bytes that are not UTF-8, Python makes text that no message of the API can hold
        raise Refusal("An argument, or the content of a file that it names, is not UTF-8.", Exit.USAGE) from None
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)


def failure_code(error: NotecaseError) -> Exit:
    """Returns the exit code for an error of the service, or of a server that is none."""
    return Exit.FAILED if error.reason else Exit.UNREACHABLE


def replace_unknown() -> None:
    """Has the standard streams replace characters that they do not know. Called before anything is read from them:
    afterwards Python refuses the change."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "replace":
            stream.reconfigure(errors="replace")


def confirm(question: str, yes: bool) -> None:
    """Returns if the user agrees, or has done so with --yes. Raises Abort otherwise, and UsageError where there is no
    terminal to ask at."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{screen.harmless(question)} There is no terminal to ask for confirmation; add --yes.")
    replace_unknown()
    click.confirm(screen.harmless(question), abort=True, err=True)


def name_of(collection: str, given: str) -> str:
    """Returns the resource name for an id; a name unchanged."""
    return given if given.startswith(f"{collection}/") else f"{collection}/{given}"


def run_of(given: str) -> tuple[str, str]:
    """Returns the session's name and the run's of sessions/S/runs/R, of S/R, of sessions/S and of S; the run's is empty
    where only a session is named."""
    session, _, run = given.removeprefix("sessions/").partition("/")
    session, run = f"sessions/{session}", run.removeprefix("runs/")
    return session, f"{session}/runs/{run}" if run else ""


def read_text(given: str) -> str:
    """Returns the words of an argument, or all of standard input for `-`. Raises Refusal for more than MOST_TEXT."""
    if given != "-":
        return given
    replace_unknown()
    return limited(sys.stdin) if sys.stdin is not None else ""


def limited(opened: TextIO) -> str:
    """Returns the rest of a file. Raises Refusal for more than MOST_TEXT."""
    text = opened.read(MOST_TEXT + 1)
    if len(text) > MOST_TEXT:
        what = "Standard input" if opened is sys.stdin else screen.one_line(str(opened.name), 400)
        raise Refusal(f"{what} has more than {MOST_TEXT} characters, the most that can be read as text.", Exit.USAGE)
    return text

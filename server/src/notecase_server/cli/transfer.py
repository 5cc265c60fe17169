"""`notecase export` and `notecase import`: a session as a file."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import click
from notecase import Client

from notecase_server.cli.ask import ask, name_of
from notecase_server.cli.options import SERVER

IMPORT_PIECE = 256 << 10
"""Bytes of a file that are read, and sent, at a time."""


@click.command("export")
@click.argument("session", metavar="ID")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@SERVER
def export_session(session: str, file: Path, server: str) -> None:
    """Write a session to a file, to be imported here or elsewhere.

    An existing file is replaced once the new one is whole.
    """

    async def save(client: Client) -> None:
        with _beside(file) as part:
            async for piece in client.export_session(name_of("sessions", session)):
                part.write(piece)

    with on_disk(file):
        ask(server, save)


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--session", default="", show_default=False, metavar="ID", help="The id of the new session.")
@SERVER
def import_session(file: Path, session: str, server: str) -> None:
    """Make a new session of an exported one."""

    async def load(client: Client) -> None:
        with file.open("rb") as whole:
            pieces = iter(lambda: whole.read(IMPORT_PIECE), b"")
            made = await client.import_session(pieces, session_id=session.removeprefix("sessions/"))
        click.echo(f"{made.name}, {made.last_sequence} events")

    with on_disk(file):
        ask(server, load)


@contextmanager
def _beside(file: Path) -> Iterator[IO[bytes]]:
    """Opens a new file that replaces `file` once the block has ended well, so that nobody ever finds half of one."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as part:
        try:
            yield part
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).replace(file)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


@contextmanager
def on_disk(file: Path) -> Iterator[None]:
    """Raises ClickException for what the disk refuses during the block."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}.") from None

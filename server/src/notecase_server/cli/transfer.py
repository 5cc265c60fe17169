"""Reads and writes files in pieces, and standard input and output for `-`."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from notecase_server.cli.connection import Exit, Refusal

PIECE = 256 << 10
"""Bytes that are read, and sent, at a time."""


@contextmanager
def destination(file: str, force: bool) -> Iterator[Callable[[bytes], object]]:
    """Provides a function that writes a piece. A new file replaces `file` when the block has ended without an error, so
    that no half-written file appears; a device or a pipe is written to directly. Raises Refusal for errors of the disk,
    and for a file that exists unless `force` is set."""
    if file == "-":
        yield sys.stdout.buffer.write
        sys.stdout.buffer.flush()
        return
    target = Path(file)
    if target.exists() and not target.is_file():
        with on_disk(file), target.open("wb") as opened:
            yield opened.write
        return
    if target.exists() and not force:
        raise Refusal(f"{file} exists; --force replaces it.", Exit.USAGE)
    with (
        on_disk(file),
        tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}-", delete=False) as part,
    ):
        try:
            yield part.write
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).replace(target)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


@contextmanager
def source(file: str) -> Iterator[Iterator[bytes]]:
    """Hands out the pieces of a file. Raises Refusal for one that cannot be read."""
    if file == "-":
        yield iter(lambda: sys.stdin.buffer.read(PIECE), b"")
        return
    with on_disk(file), Path(file).open("rb") as whole:
        yield iter(lambda: whole.read(PIECE), b"")


@contextmanager
def on_disk(file: str | Path) -> Iterator[None]:
    """Raises Refusal for errors of the disk in the block."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"{file}: {error.strerror}.", Exit.USAGE) from None

"""Receives files of sessions to import: keeps them on this machine's disk until they are complete, and checks each
record.

A mistake that one record shows is reported when the record arrives, so that invalid files take neither disk nor time.
Whether the log is consistent is checked afterwards, by `transfer.read`.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import BinaryIO, cast

import structlog
from google.protobuf.message import DecodeError, Message
from notecase import v1

from notecase_server import errors
from notecase_server.engine import transfer
from notecase_server.errors import NotecaseError

log = structlog.get_logger()

MOST_WITHIN = 20_000
"""Messages within one record, and other items of its lists and maps: twice as many as in the largest result of a tool.
Those in values of state do not count, since their bytes are limited."""

VALUE = v1.Value.DESCRIPTOR.full_name


class Arrivals:
    """Bounds the files that arrive at one process: how many there are, and how large they are together."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._files = 0
        self.size = 0
        """Bytes of all of them now."""

    @asynccontextmanager
    async def file(self) -> AsyncIterator["Arrival"]:
        """Yields a file to be filled, which is deleted after the block. Raises NotecaseError RATE_LIMITED."""
        if self._files >= self._most:
            raise errors.too_many("import", self._most)
        with _temporary() as file:
            self._files += 1
            arrival = Arrival(self, file)
            try:
                yield arrival
            finally:
                self._files -= 1
                self.size -= arrival.size

    def take(self, size: int) -> None:
        """Counts bytes that are about to be written. Raises NotecaseError RATE_LIMITED."""
        if self.size + size > self._most_bytes:
            raise errors.too_many("byte", self._most_bytes, " of files to import")
        self.size += size


class Arrival:
    """One file."""

    def __init__(self, arrivals: Arrivals, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self._arrivals = arrivals
        self._judge = _Judge()

    async def add(self, chunk: bytes) -> None:
        """Keeps what came. Raises NotecaseError IMPORT_INVALID and RATE_LIMITED."""
        self._arrivals.take(len(chunk))
        self.size += len(chunk)
        await asyncio.to_thread(self._add, chunk)

    def _add(self, chunk: bytes) -> None:
        self._judge.feed(chunk)
        try:
            self.file.write(chunk)
        except OSError as error:
            raise _no_room(error) from error


def _temporary() -> BinaryIO:
    try:
        return cast("BinaryIO", tempfile.TemporaryFile(buffering=0))
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> NotecaseError:
    log.warning("import_not_kept", problem=error.strerror)
    return errors.too_busy("keep the file")


class _Judge:
    """Reads records out of pieces that are cut anywhere."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._begun = self._ended = False
        self._events = self._records = 0
        self._content = 0
        """The bytes that are still to come of the newest blob."""

    def feed(self, chunk: bytes) -> None:
        """Raises NotecaseError IMPORT_INVALID as soon as this cannot be an export any more."""
        self._pending += chunk
        if not self._begun:
            self._begun = transfer.begins(bytes(self._pending))
            if not self._begun:
                return
            del self._pending[: transfer.BEGIN_BYTES]
        at = 0
        while not self._ended:
            length, size = transfer.length_at(self._pending, at)
            if not length or len(self._pending) < at + length + size:
                break
            if size:
                self._look(bytes(self._pending[at + length : at + length + size]))
            self._ended = not size
            at += length + size
        del self._pending[:at]
        if self._ended and len(self._pending) > transfer.DIGEST_BYTES:
            raise errors.import_invalid("has bytes after its end")

    def _look(self, body: bytes) -> None:
        try:
            record = v1.ExportRecord.FromString(body)
        except DecodeError:
            raise errors.import_invalid("has a record that cannot be decoded") from None
        if len(body) > 2 * MOST_WITHIN and not _has_few(record):  # none takes less than two bytes
            raise errors.import_invalid(f"has a record with more than {MOST_WITHIN} parts, labels or the like")
        kind = record.WhichOneof("record")
        self._records += 1
        if (kind == "header") != (self._records == 1):
            raise errors.import_invalid("does not begin with its header, or has a second one")
        if kind == "event":
            self._events += 1
            if record.event.sequence != self._events:
                raise transfer.out_of_place(self._events)
        elif kind == "blob":
            self._content = record.blob.size_bytes
        elif kind == "chunk":
            self._content -= len(record.chunk)
            if self._content < 0:
                raise errors.import_invalid("has more content than it says")
        elif kind is None:
            raise errors.import_invalid("has an empty record")


def _has_few(record: Message) -> bool:
    """Whether a record has at most MOST_WITHIN items. A list that is too long is not looked into."""
    number, left = 0, [record]
    while left:
        for described, held in left.pop().ListFields():
            kind = described.message_type
            number += len(held) if described.is_repeated else kind is not None
            if number > MOST_WITHIN:
                return False
            if kind is None or kind.full_name == VALUE:
                continue
            if not described.is_repeated:
                left.append(held)
            elif not kind.GetOptions().map_entry:
                left.extend(held)
            elif kind.fields_by_name["value"].message_type not in {None, v1.Value.DESCRIPTOR}:
                left.extend(held.values())
    return True

"""Receives files of sessions to import: keeps them on this machine's disk until they are complete, and checks each
record.

A mistake that one record shows is reported when the record arrives, so that invalid files take neither disk nor time.
Whether the log is consistent is checked afterwards, by `transfer.read`.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from typing import BinaryIO, NamedTuple, cast

import structlog
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from notecase import v1

from notecase_server import errors
from notecase_server.engine import transfer
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import PAGE_BYTES

log = structlog.get_logger()

MOST_WITHIN = 20_000
"""Messages within one record, and other items of its lists and maps: twice as many as in the largest result of a tool.
Those in values of state do not count, since their bytes are limited."""

MOST_FIELDS = 10 * MOST_WITHIN
"""Fields of all of them together."""

MOST_VALUE_BYTES = PAGE_BYTES + (64 << 10)
"""Of values of state within one record: as much as one event has. The parser takes some 20 ms for a MiB of the smallest
values, and nothing interrupts it."""

VARINT, DELIMITED, FIXED = 0, 2, {1: 8, 5: 4}
"""How a field is written: the types of protobuf's wire format, the last two with the bytes that they take."""

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
        if len(body) > 2 * MOST_WITHIN:  # none takes less than two bytes
            _require_few(body)
        try:
            record = v1.ExportRecord.FromString(body)
        except DecodeError:
            raise _undecodable() from None
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


class _Known(NamedTuple):
    """A field of messages or of repeated items."""

    within: Descriptor | None
    """The kind of its messages; None for others, and for values of state."""
    is_value: bool


@cache
def _known(kind: Descriptor) -> Mapping[int, _Known]:
    """Returns those fields of a kind of message by number."""
    found = {}
    for number, field in kind.fields_by_number.items():
        is_value = field.message_type is not None and field.message_type.full_name == VALUE
        if field.message_type is not None or field.is_repeated:
            found[number] = _Known(None if is_value else field.message_type, is_value)
    return found


def _require_few(body: bytes) -> None:
    """Raises IMPORT_INVALID for a record with too many items or too much state, by its bytes alone: while the parser is
    at work, nothing else in the process is."""
    fields = items = values = 0
    left = [(v1.ExportRecord.DESCRIPTOR, 0, len(body))]
    while left:
        kind, at, end = left.pop()
        known = _known(kind)
        while at < end:
            tag, at = _varint(body, at)
            wire_type, size = tag & 7, 0
            if wire_type == VARINT:
                _, at = _varint(body, at)
            elif wire_type == DELIMITED:
                size, at = _varint(body, at)
            elif wire_type in FIXED:
                size = FIXED[wire_type]
            else:
                raise _undecodable()
            fields += 1
            if (field := known.get(tag >> 3)) is not None:
                items += 1
                values += size if field.is_value else 0
                if field.within is not None and wire_type == DELIMITED:
                    left.append((field.within, at, min(at + size, end)))
            at += size
            if items > MOST_WITHIN or fields > MOST_FIELDS:
                raise errors.import_invalid(f"has a record with more than {MOST_WITHIN} parts, labels or the like")
            if values > MOST_VALUE_BYTES:
                raise errors.import_invalid(f"has a record with more than {MOST_VALUE_BYTES} bytes of state")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the number that is written at a place, and where the next one is."""
    number = shift = 0
    for byte in data[at : at + 10]:
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise _undecodable()


def _undecodable() -> NotecaseError:
    return errors.import_invalid("has a record that cannot be decoded")

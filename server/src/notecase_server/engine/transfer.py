"""Writes a session as a file from its log, and reads such a file when it is complete. export.proto describes the
format.

A file is checked from its first byte to its last before any of it is used. Its log is replayed through the fold when it
is stored (`store/imports`), and events that do not fit are refused.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import BinaryIO

from google.protobuf.message import DecodeError
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.content import Contents
from notecase_server.engine.rewind import ended
from notecase_server.errors import NotecaseError
from notecase_server.store import fold
from notecase_server.store.contract import Commit, History, Restore, SessionKey

MAGIC = b"notecase"
VERSION = 2
"""Format that is written; the one before is read, too."""

BEGIN_BYTES = len(MAGIC) + 1
"""What comes before the first record: the magic word and the format."""

DIGEST_BYTES = 32

PREFIX = fold.PREFIX.encode()
"""In the bytes of every record that refers to content."""

CHUNK_BYTES = 256 << 10
"""The bytes that a stream sends at a time; far below the limit of a message."""

MAX_RECORD_BYTES = 5 << 20
"""More bytes than any event has: a greater length is invalid."""

MAX_LENGTH_BYTES = 4


async def exported(
    store: History, key: SessionKey, contents: Contents | None = None, end_runs: bool = False
) -> AsyncIterator[bytes]:
    """Yields the file, in pieces of at most CHUNK_BYTES, with the content that the log refers to if `contents` is
    given. The same session gives the same bytes. With `end_runs`, events at the end cancel active runs. Raises
    NotecaseError SESSION_NOT_FOUND, also when the session is deleted meanwhile, and RUN_ACTIVE without `end_runs`."""
    pending = bytearray()
    digest = hashlib.sha256()
    async for framed in _written(store, key, contents, end_runs):
        pending += framed
        while len(pending) >= CHUNK_BYTES:
            digest.update(pending[:CHUNK_BYTES])
            yield bytes(pending[:CHUNK_BYTES])
            del pending[:CHUNK_BYTES]
    digest.update(pending)
    yield bytes(pending)
    yield digest.digest()


async def _written(store: History, key: SessionKey, contents: Contents | None, end_runs: bool) -> AsyncIterator[bytes]:
    """All that the file's digest is of."""
    session = await store.get_session(key)
    if session is None:
        raise errors.not_found("session", names.session(key.session))
    busy = session.active_run or next((queued.run for queued in session.queued_commands), "")
    if busy and not end_runs:
        raise errors.run_active(names.run(key.session, busy))
    header = v1.ExportHeader(
        display_name=session.display_name, agent=session.agent, user=session.user, labels=session.labels
    )
    if session.HasField("usage"):
        header.usage.CopyFrom(session.usage)
    yield MAGIC + bytes([VERSION]) + _framed(v1.ExportRecord(header=header))
    at = v1.Event()
    told = set[str]()
    while at.sequence < session.last_sequence:
        events = await store.read_events(key, at.sequence)
        if not events:
            raise errors.not_found("session", names.session(key.session))
        for event in events[: session.last_sequence - at.sequence]:
            event.ClearField("principal")
            for blob in fold.references(event) if contents is not None else ():
                if contents is not None and blob.name not in told:
                    told.add(blob.name)
                    async for framed in _content(contents, key.tenant, blob):
                        yield framed
            yield _framed(v1.ExportRecord(event=event))
            at = event
    if busy:
        for event in await _ends(store, key, at):
            yield _framed(v1.ExportRecord(event=event))
    yield b"\0"


async def _ends(store: History, key: SessionKey, last: v1.Event) -> list[v1.Event]:
    """Returns the events that cancel the active run after the event `last`, numbered and dated from there on."""
    past = await store.read_past(key, last.sequence)
    events = ended(past, "The session was exported while the run was active.")
    rows = fold.rows_of(past, past.session, epoch=0)
    return fold.apply(rows, Commit(key=key, events=events), last.create_time.ToMicroseconds()).events


async def _content(contents: Contents, tenant: str, blob: v1.Blob) -> AsyncIterator[bytes]:
    yield _framed(v1.ExportRecord(blob=v1.Blob(name=blob.name, size_bytes=blob.size_bytes)))
    pending = bytearray()
    async for piece in contents.download(tenant, names.parse_blob(blob.name) or ""):
        pending += piece.chunk
        while len(pending) >= CHUNK_BYTES:
            yield _framed(v1.ExportRecord(chunk=bytes(pending[:CHUNK_BYTES])))
            del pending[:CHUNK_BYTES]
    if pending:
        yield _framed(v1.ExportRecord(chunk=bytes(pending)))


async def keep_content(contents: Contents, file: BinaryIO, restore: Restore) -> None:
    """Stores the content that a whole file carries; it goes within a day or so unless the session is stored, too.

    Raises NotecaseError IMPORT_INVALID for content that is not what its name says, and PAYLOAD_TOO_LARGE."""
    if not restore.blobs:
        return
    size = sum(size for _, size in restore.blobs.values())
    if size > contents.limits.session:
        raise errors.too_large("The content that the session refers to", size, contents.limits.session)
    reader = _Reader(file)
    await reader.advance()
    while (record := reader.record) is not None:
        await reader.advance()
        if record.HasField("blob"):
            try:
                await contents.upload(restore.key.tenant, v1.UploadBlobRequest(blob=record.blob), reader.chunks())
            except NotecaseError as error:
                if error.reason != v1.ERROR_REASON_BLOB_CORRUPT:
                    raise
                raise errors.import_invalid(f"has content that does not match the name {record.blob.name!r}") from None


class _Reader:
    """A file's records of content, the next of them at hand before it is taken."""

    def __init__(self, file: BinaryIO) -> None:
        self.record: v1.ExportRecord | None = None
        """None after the last."""
        self._records = _content_records(file)

    async def advance(self) -> None:
        found: v1.ExportRecord | None = v1.ExportRecord()
        while found is not None and not found.WhichOneof("record"):
            found = await asyncio.to_thread(next, self._records, None)
        self.record = found

    async def chunks(self) -> AsyncIterator[v1.UploadBlobRequest]:
        """The pieces of the blob that was just taken."""
        while self.record is not None and self.record.HasField("chunk"):
            yield v1.UploadBlobRequest(chunk=self.record.chunk)
            await self.advance()


def _content_records(file: BinaryIO) -> Iterator[v1.ExportRecord]:
    """The records that hold content, and an empty one for each CHUNK_BYTES of others: no look for the next holds others
    up."""
    passed = 0
    for record in _records(file):
        if record.HasField("blob") or record.HasField("chunk"):
            yield record
        elif (passed := passed + record.ByteSize()) >= CHUNK_BYTES:
            passed = 0
            yield v1.ExportRecord()


def _framed(record: v1.ExportRecord) -> bytes:
    body = record.SerializeToString(deterministic=True)
    length, size = bytearray(), len(body)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*length, size]) + body


async def read(file: BinaryIO, key: SessionKey) -> Restore:
    """Returns the session `key` to be stored from a complete file. The log is read again when it is stored, and
    replayed then. Raises NotecaseError IMPORT_INVALID with a sentence about the mistake."""
    check = await asyncio.to_thread(_Check, file)
    while await asyncio.to_thread(check.more):
        pass
    header = await asyncio.to_thread(next, _records(file), v1.ExportRecord())
    if not header.HasField("header"):
        raise errors.import_invalid("does not begin with its header")
    told = header.header
    session = v1.Session(display_name=told.display_name, agent=told.agent, user=told.user, labels=told.labels)
    if told.HasField("usage"):
        session.usage.CopyFrom(told.usage)
    events = partial(_events, file)
    return Restore(key=key, session=session, blobs=check.blobs, events=events, forgets=check.version == 1)


def begins(begun: bytes) -> bool:
    """Whether all of what comes before the first record is there. Raises NotecaseError IMPORT_INVALID when it is not
    that of a file that this server reads."""
    begun = begun[:BEGIN_BYTES]
    if begun[: len(MAGIC)] != MAGIC[: len(begun)]:
        raise errors.import_invalid("is not an export of a session")
    if len(begun) > len(MAGIC) and begun[-1] > VERSION:
        raise errors.import_invalid(
            f"was written by a newer notecase, in format {begun[-1]}; this one reads up to {VERSION}"
        )
    if len(begun) > len(MAGIC) and begun[-1] == 0:
        raise errors.import_invalid(f"is in format 0, which no notecase writes; this one reads 1 to {VERSION}")
    return len(begun) == BEGIN_BYTES


def length_at(data: bytearray, at: int) -> tuple[int, int]:
    """Returns how many bytes the length of the record at `at` takes, 0 while they have not all arrived, and the length.
    Raises NotecaseError IMPORT_INVALID if it is not the length of a record."""
    size = 0
    for place in range(MAX_LENGTH_BYTES):
        if at + place >= len(data):
            return 0, 0
        byte = data[at + place]
        size |= (byte & 0x7F) << 7 * place
        if not byte & 0x80:
            break
    else:
        raise _cut()
    if size > MAX_RECORD_BYTES:
        raise _cut()
    return place + 1, size


def out_of_place(number: int) -> NotecaseError:
    return errors.import_invalid(f"has a different record in place of event {number} of the log")


class _Check:
    """Finds out whether a file is an export, and as long and the same as when it was written."""

    def __init__(self, file: BinaryIO) -> None:
        file.seek(0)
        begun = file.read(BEGIN_BYTES)
        begins(begun)
        self.version = begun[-1] if begun else 0
        self.blobs = dict[str, tuple[int, int]]()
        """What the log refers to, by digest: the first event that does, and the size."""
        self._file = file
        self._digest = hashlib.sha256(begun)
        self._frames = _frames(file)

    def more(self) -> bool:
        """Reads on in a piece of about CHUNK_BYTES; returns whether more follows. Blocks. Raises NotecaseError
        IMPORT_INVALID."""
        size = 0
        while size < CHUNK_BYTES:
            length, body = next(self._frames)
            self._digest.update(length + body)
            if not body:
                self._require_end()
                return False
            if PREFIX in body:
                self._note(body)
            size += len(body)
        return True

    def _require_end(self) -> None:
        trailer = self._file.read(DIGEST_BYTES + 1)
        if len(trailer) < DIGEST_BYTES:
            raise _cut()
        if trailer != self._digest.digest():
            raise errors.import_invalid("is damaged: its SHA-256 does not match its bytes")

    def _note(self, body: bytes) -> None:
        with suppress(DecodeError):  # if the file is whole, it is refused when the log is read
            event = v1.ExportRecord.FromString(body).event
            for blob in fold.references(event):
                self.blobs.setdefault(names.parse_blob(blob.name) or "", (event.sequence, blob.size_bytes))


def _cut() -> NotecaseError:
    return errors.import_invalid("ends before its trailer: it was cut off, or is damaged")


def _frames(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yields the length of each record as it is written, and its body. The last length is the zero after the records;
    the file continues after it."""
    data, at, begin = bytearray(), 0, file.tell()
    while True:
        length, size = length_at(data, at)
        end = at + length + size
        if not length or len(data) < end:
            more = file.read(CHUNK_BYTES)
            if not more:
                raise _cut()
            begin += at
            data, at = data[at:] + more, 0
            continue
        if not size:
            file.seek(begin + end)
        yield bytes(data[at : at + length]), bytes(data[at + length : end])
        if not size:
            return
        at = end


def _records(file: BinaryIO) -> Iterator[v1.ExportRecord]:
    file.seek(BEGIN_BYTES)
    for _, body in _frames(file):
        if body:
            try:
                yield v1.ExportRecord.FromString(body)
            except DecodeError:
                raise errors.import_invalid("has a record that cannot be decoded") from None


def _events(file: BinaryIO) -> Iterator[v1.Event]:
    """Yields the entries of the log, each with the right sequence."""
    number = 0
    for record in islice(_records(file), 1, None):
        if not record.HasField("blob") and not record.HasField("chunk"):
            number += 1
            if not record.HasField("event") or record.event.sequence != number:
                raise out_of_place(number)
            record.event.ClearField("principal")
            yield record.event

"""A session as a file, to be taken elsewhere: written from its log, and read only when it is whole.

The format is told in export.proto. A file is checked from its first byte to its last before anything of it is believed.
Then its log is replayed through the fold, outside of any transaction, and what does not fit there is refused.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import BinaryIO

from google.protobuf.message import DecodeError
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.content import Contents
from notecase_server.errors import NotecaseError
from notecase_server.store import earlier, fold
from notecase_server.store.contract import History, Restore, RunRecord, SessionKey

MAGIC = b"notecase"
VERSION = 2
"""Format that is written; the one before is read, too."""

BEGIN_BYTES = len(MAGIC) + 1
"""What comes before the first record: the magic word and the format."""

DIGEST_BYTES = 32

CHUNK_BYTES = 256 << 10
"""What a stream carries well at a time; far below what a message may have."""

MAX_RECORD_BYTES = 8 << 20
"""More than any event has: a length beyond it is no length."""

MAX_LENGTH_BYTES = 4

ARRIVED = b"imported"
"""In place of the digest of a run's start, which is not in the log: no start is a repeat of such a run's."""

OF_RUNS = frozenset(
    {"run_started", "run_state_changed", "command_queued", "tool_started", "input_requested", "input_resolved"}
    | {"summary_failed", "tools_unavailable"}
)
OF_ANY = frozenset({"message_added", "tool_finished", "state_changed", "usage", "rewound", "summarized"})
"""Kinds of events that a log holds: those that are some run's, and those that need not be."""


async def exported(store: History, key: SessionKey, contents: Contents | None = None) -> AsyncIterator[bytes]:
    """Yields the file, in pieces of at most CHUNK_BYTES, with the content that the log refers to if that is given. The
    same session gives the same bytes.

    Raises NotecaseError RUN_ACTIVE, and SESSION_NOT_FOUND, also when it is deleted meanwhile."""
    pending = bytearray()
    digest = hashlib.sha256()
    async for framed in _written(store, key, contents):
        pending += framed
        while len(pending) >= CHUNK_BYTES:
            digest.update(pending[:CHUNK_BYTES])
            yield bytes(pending[:CHUNK_BYTES])
            del pending[:CHUNK_BYTES]
    digest.update(pending)
    yield bytes(pending)
    yield digest.digest()


async def _written(store: History, key: SessionKey, contents: Contents | None) -> AsyncIterator[bytes]:
    """All that the file's digest is of."""
    session = await store.get_session(key)
    if session is None:
        raise errors.not_found("session", names.session(key.session))
    if busy := session.active_run or next((queued.run for queued in session.queued_commands), ""):
        raise errors.run_active(names.run(key.session, busy))
    header = v1.ExportHeader(
        display_name=session.display_name, agent=session.agent, user=session.user, labels=session.labels
    )
    if session.HasField("usage"):
        header.usage.CopyFrom(session.usage)
    yield MAGIC + bytes([VERSION]) + _framed(v1.ExportRecord(header=header))
    at = 0
    told = set[str]()
    while at < session.last_sequence:
        events = await store.read_events(key, at)
        if not events:
            raise errors.not_found("session", names.session(key.session))
        for event in events:
            if event.sequence > session.last_sequence:
                break
            for blob in fold.references(event) if contents is not None else ():
                if contents is not None and blob.name not in told:
                    told.add(blob.name)
                    async for framed in _content(contents, key.tenant, blob):
                        yield framed
            yield _framed(v1.ExportRecord(event=event))
        at = events[-1].sequence
    yield b"\0"


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
                raise errors.import_invalid(f"has other content than it says for {record.blob.name!r}") from None


class _Reader:
    """A file's records, the next of them at hand before it is taken."""

    def __init__(self, file: BinaryIO) -> None:
        self.record: v1.ExportRecord | None = None
        self._records = _records(file)

    async def advance(self) -> None:
        self.record = await asyncio.to_thread(next, self._records, None)

    async def chunks(self) -> AsyncIterator[v1.UploadBlobRequest]:
        """The pieces of the blob that was just taken."""
        while self.record is not None and self.record.HasField("chunk"):
            yield v1.UploadBlobRequest(chunk=self.record.chunk)
            await self.advance()


def _framed(record: v1.ExportRecord) -> bytes:
    body = record.SerializeToString(deterministic=True)
    length, size = bytearray(), len(body)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*length, size]) + body


def read(file: BinaryIO, key: SessionKey) -> Restore:
    """What is to be stored of a whole file, as the session `key`. The file is read again when it is stored. Blocks.

    Raises NotecaseError IMPORT_INVALID with a sentence that says what is wrong."""
    version = _check(file)
    try:
        return _replayed(file, key, version)
    except DecodeError:
        raise errors.import_invalid("has a record that does not decode") from None


def begins(begun: bytes) -> bool:
    """Whether all of what comes before the first record is there. Raises NotecaseError IMPORT_INVALID when it is not
    that of a file that this server reads."""
    begun = begun[:BEGIN_BYTES]
    if begun[: len(MAGIC)] != MAGIC[: len(begun)]:
        raise errors.import_invalid("is no export of a session")
    if len(begun) > len(MAGIC) and begun[-1] > VERSION:
        raise errors.import_invalid(
            f"was written by a newer notecase, in format {begun[-1]}; this one reads up to {VERSION}"
        )
    if len(begun) > len(MAGIC) and begun[-1] == 0:
        raise errors.import_invalid(f"is in format 0, which no notecase writes; this one reads 1 to {VERSION}")
    return len(begun) == BEGIN_BYTES


def length_at(data: bytearray, at: int) -> tuple[int, int]:
    """How many bytes the length of the record at `at` takes, 0 while they are not all there, and the length. Raises
    NotecaseError IMPORT_INVALID for what is no length of a record."""
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
    return errors.import_invalid(f"has something else where entry {number} of the log belongs")


def _check(file: BinaryIO) -> int:
    """The format of a file that is an export, and as long and the same as when it was written."""
    file.seek(0)
    begun = file.read(BEGIN_BYTES)
    begins(begun)
    digest = hashlib.sha256(begun)
    for length, body in _frames(file):
        digest.update(length + body)
    trailer = file.read(DIGEST_BYTES + 1)
    if len(trailer) < DIGEST_BYTES:
        raise _cut()
    if trailer != digest.digest():
        raise errors.import_invalid("is damaged: its SHA-256 is not that of what it holds")
    return begun[-1]


def _cut() -> NotecaseError:
    return errors.import_invalid("ends before its trailer: it was cut off, or is damaged")


def _frames(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """The length of each record as it is written, and its body; the last is the zero that is no record's."""
    while True:
        length = bytearray()
        while not length or length[-1] & 0x80:
            byte = file.read(1)
            length += byte
            if not byte or len(length) > MAX_LENGTH_BYTES:
                raise _cut()
        size = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(length))
        body = file.read(size) if size <= MAX_RECORD_BYTES else b""
        if len(body) < size:
            raise _cut()
        yield bytes(length), body
        if not size:
            return


def _records(file: BinaryIO) -> Iterator[v1.ExportRecord]:
    file.seek(len(MAGIC) + 1)
    for _, body in _frames(file):
        if body:
            yield v1.ExportRecord.FromString(body)


def _events(file: BinaryIO) -> Iterator[v1.Event]:
    for record in _records(file):
        if record.HasField("event"):
            yield record.event


def _message(rows: Mapping[str, v1.Message], event: v1.Event) -> v1.Message:
    """As it is by the end of the log: where its parts are not held, they are those it came with."""
    row = rows[event.message_added.name]
    if row.parts:
        return row
    message = v1.Message()
    message.CopyFrom(row)
    message.parts.extend(event.message_added.parts)
    return message


def _replayed(file: BinaryIO, key: SessionKey, version: int) -> Restore:
    records = _records(file)
    header = next(records, v1.ExportRecord())
    if not header.HasField("header"):
        raise errors.import_invalid("does not begin with its header")
    told = header.header
    rows = fold.Rows(v1.Session(user=told.user), 0)
    unstarted = set[str]()
    blobs: dict[str, tuple[int, int]] = {}
    number = log_bytes = 0
    for record in records:
        if record.HasField("blob") or record.HasField("chunk"):
            continue
        event = record.event
        number += 1
        log_bytes += event.ByteSize()
        if not record.HasField("event") or event.sequence != number:
            raise out_of_place(number)
        if event.run not in rows.runs and event.HasField("run_state_changed"):
            unstarted.add(event.run)
        for blob in fold.references(event):
            blobs.setdefault(names.parse_blob(blob.name) or "", (number, blob.size_bytes))
        _replay(rows, key, event)
        if event.HasField("message_added") and not any(
            part.HasField("tool_call") for part in event.message_added.parts
        ):
            _forget_parts(rows, event.message_added.name)
    for run in rows.runs.values():
        if run.state not in fold.ENDED:
            raise errors.import_invalid(f"has a run that has not ended, {run.name!r}")
        if version == 1:
            earlier.forget(run)
    session = v1.Session(display_name=told.display_name, agent=told.agent, user=told.user, labels=told.labels)
    session.last_sequence = rows.session.last_sequence
    session.summary_sequence = rows.session.summary_sequence
    session.log_bytes = log_bytes
    session.content_bytes = sum(size for _, size in blobs.values())
    if told.HasField("usage"):
        session.usage.CopyFrom(told.usage)
    scope = key.state
    entries = rows.state.get(scope, {})
    return Restore(
        key=key,
        session=session,
        events=partial(_events, file),
        message=partial(_message, rows.messages),
        calls=rows.calls,
        blobs=blobs,
        runs=[(run, RunRecord(b"" if run.name in unstarted else ARRIVED, v1.Agent())) for run in rows.runs.values()],
        version=rows.versions.get(scope, 0),
        entries={name: entry for name, entry in entries.items() if entry is not None},
    )


def _forget_parts(rows: fold.Rows, name: str) -> None:
    """Nothing to come changes what was said, so it is not held while the rest is read. A copy, since a message gives no
    memory back."""
    whole, rows.messages[name] = rows.messages[name], v1.Message()
    whole.ClearField("parts")
    rows.messages[name].CopyFrom(whole)


def _replay(rows: fold.Rows, key: SessionKey, event: v1.Event) -> None:
    """Applies an entry that may have been written by anybody."""
    kind = event.WhichOneof("payload")
    ids = [event.run] if event.run or kind in OF_RUNS else []
    ids += [event.message_added.name] if kind == "message_added" else []
    covers = event.summarized.last_sequence
    fits = (
        kind in OF_RUNS | OF_ANY
        and covers < event.sequence
        and fold.ops_fit(event.state_changed.ops)
        and all(map(names.is_id, ids))
        and event.message_added.name not in rows.messages
    )
    before = event.SerializeToString(deterministic=True)
    try:
        if fits:
            fold.replay(rows, key, event)
    except (NotecaseError, ValueError):
        fits = False
    if not fits or event.SerializeToString(deterministic=True) != before:
        raise errors.import_invalid(f"has an entry {event.sequence} that cannot come there in a log")

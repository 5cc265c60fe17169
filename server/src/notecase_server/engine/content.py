"""Receives and sends content: uploads that can be interrupted anywhere, downloads, and the parts of callers' and tools'
messages in the form of the log.

Bytes pass through in pieces. Only content within a message, and content for a model, is held as a whole.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

import structlog
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.upload import Writer
from notecase_server.engine.values import json_of
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import CHUNK_BYTES, PAGE_BYTES, BlobStore, Clock, SessionKey, StateStore
from notecase_server.supervisor import Tasks

log = structlog.get_logger()

MAX_PART_BYTES = 256 << 10
"""The most bytes of a part in the log. A larger part becomes a blob, so that pages of messages stay small."""

JSON_AT_ONCE = 64 << 10
"""Bytes of a value that take a few milliseconds to become JSON; more becomes that in a thread."""

MAX_MESSAGE_BYTES = PAGE_BYTES - (64 << 10)
"""Bytes of a message, without what becomes blobs: it fits into one page."""

MAX_SAID_BYTES = 11 << 18
"""Limit for all messages of one request, not counting what became blobs. A queued start is one event with its messages,
its state and its tools, and a default gRPC client accepts 4 MiB."""

MAX_APPENDED_BYTES = 15 << 18
"""The same for AppendMessages. Its answer has the messages and their names, and each message is a separate event."""

PARTS_AT_ONCE, BYTES_AT_ONCE = 500, 256 << 10
"""Parts and bytes of messages that are taken in before others have their turn: a few milliseconds."""

MEDIA_TYPES = {"text": "text/plain; charset=utf-8", "json": "application/json"}
"""Of parts that become blobs when they are large."""

UPLOAD_MICROSECONDS = 24 * 60 * 60 * 1_000_000
"""How long an unfinished upload is kept, and a blob without a reference."""

BINARY = "application/octet-stream"

WRONG = frozenset({v1.ERROR_REASON_BLOB_CORRUPT, v1.ERROR_REASON_PAYLOAD_TOO_LARGE, v1.ERROR_REASON_QUOTA_EXCEEDED})
"""Errors after which an upload's bytes are dropped: sending more does not help, and the bytes count for the quota."""


class Limits(NamedTuple):
    """In bytes."""

    blob: int = 256 << 20
    session: int = 1 << 30
    """Of all blobs that its log refers to."""


class ContentStore(BlobStore, StateStore, Protocol):
    """Holds content, and the states that may name some."""


class Contents:
    """The content of one server. Content that is read here is held: no sweep removes it meanwhile."""

    def __init__(self, store: ContentStore, new_id: Callable[[], str], clock: Clock, limits: Limits) -> None:
        self.limits = limits
        self._store = store
        self._new_id = new_id
        self._clock = clock
        self._held: Counter[tuple[str, str]] = Counter()
        self._receiving = Tasks("uploads")
        self._draining = False

    # ---- blobs

    async def upload(
        self,
        tenant: str,
        first: v1.UploadBlobRequest,
        frames: AsyncIterator[v1.UploadBlobRequest],
        subject: str = "",
        user: str = "",
    ) -> v1.Blob:
        """Returns the blob that UploadBlob makes from its frames, `first` among them, with the media type and filename
        in `first`. When the frames break off, the bytes that have arrived are kept if the caller named the upload. For
        a caller that is bound to a `user` ("users/{user}"), a blob that it may not know of does not count as sent.

        Raises NotecaseError BLOB_CORRUPT, PAYLOAD_TOO_LARGE, QUOTA_EXCEEDED, UPLOAD_OFFSET_MISMATCH, REQUEST_ID_REUSED,
        SERVER_DRAINING; what `frames` raises."""
        self._check_size(first.blob.size_bytes)
        stored = await self._stored(tenant, first.blob, subject, user)
        if stored is None:
            upload_id = first.upload_id or self._new_id()
            upload = await self._opened(tenant, upload_id, first)
            if not upload.HasField("blob"):
                stored = await self._received(partial(self._receive, tenant, upload, first, frames, subject))
            elif _differs(first.blob, upload.blob):
                raise errors.reused("upload_id", upload_id)
            else:
                stored = upload.blob
        return v1.Blob(
            name=stored.name,
            size_bytes=stored.size_bytes,
            media_type=first.blob.media_type,
            filename=first.blob.filename,
        )

    async def _opened(self, tenant: str, upload_id: str, first: v1.UploadBlobRequest) -> v1.Upload:
        expire_time = self._clock() + UPLOAD_MICROSECONDS
        try:
            return await self._store.open_upload(tenant, upload_id, expire_time, first.blob.size_bytes)
        except NotecaseError as error:
            if error.reason in WRONG and first.offset > 0:  # what an earlier call of this caller has sent of it
                with suppress(NotecaseError):
                    await self._store.drop_upload(tenant, upload_id, if_bytes=first.offset)
            raise

    async def _stored(self, tenant: str, said: v1.Blob, subject: str, user: str) -> v1.Blob | None:
        """The blob that the first frame names, if it is here for its caller; it then counts as uploaded just now."""
        sha256 = names.parse_blob(said.name)
        if sha256 and user and not await self._store.known_blobs(tenant, subject, user, [sha256]):
            return None  # it must send the content: that it exists is not revealed
        stored = await self._store.touch_blob(tenant, subject, sha256) if sha256 else None
        if stored is not None and (problem := _differs(said, stored)):
            raise errors.blob_corrupt(problem)
        return stored

    async def _received(self, receive: Callable[[], Coroutine[Any, Any, v1.Blob]]) -> v1.Blob:
        if self._draining:
            raise errors.draining()
        try:
            return await self._receiving.start(receive(), "upload")
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._draining and caller is not None and not caller.cancelling():
                raise errors.draining() from None
            raise

    async def _receive(
        self,
        tenant: str,
        upload: v1.Upload,
        first: v1.UploadBlobRequest,
        frames: AsyncIterator[v1.UploadBlobRequest],
        subject: str,
    ) -> v1.Blob:
        if first.offset != upload.committed_bytes:
            raise errors.upload_offset_mismatch(upload.upload_id, upload.committed_bytes)
        writer = Writer(self._store, tenant, subject, upload, self._check_size)
        try:
            await writer.recall()
            if writer.size != first.offset:
                raise errors.upload_offset_mismatch(upload.upload_id, writer.size)
            last = False
            async for frame in frames:
                await writer.add(frame.chunk)
                last = frame.last
                if last or 0 < first.blob.size_bytes <= writer.size:
                    break
            await writer.flush()
            made = writer.blob
            if not (last or 0 < first.blob.size_bytes <= made.size_bytes or first.blob.name == made.name):
                raise errors.blob_cut(made.size_bytes, first.blob.size_bytes, resumable=first.upload_id != "")
            if problem := _differs(first.blob, made):
                raise errors.blob_corrupt(problem)
            return await writer.complete()
        except BaseException as error:
            # A caller who comes back finds the bytes that it has sent; an upload without a name cannot be continued.
            refused = isinstance(error, NotecaseError) and error.reason in WRONG
            goes_on = isinstance(error, NotecaseError) and "committed_bytes" in error.metadata
            drop = not first.upload_id or (refused and not goes_on)
            with suppress(NotecaseError):
                await asyncio.shield(self._store.drop_upload(tenant, upload.upload_id) if drop else writer.flush())
            raise

    async def drain(self) -> None:
        """Takes no more uploads and ends those under way; what has come of them is stored when it returns."""
        self._draining = True
        await self._receiving.close()

    def _check_size(self, size: int) -> None:
        if size > self.limits.blob:
            raise errors.too_large("The content", size, self.limits.blob)

    async def download(
        self, tenant: str, sha256: str, offset: int = 0, limit: int = 0
    ) -> AsyncGenerator[v1.DownloadBlobResponse, None]:
        """The blob's bytes from `offset` on, at most `limit` of them unless it is 0. Raises NotecaseError
        BLOB_NOT_FOUND; at the end of the whole of it BLOB_CORRUPT, when its digest is not the one that names it."""
        digest = hashlib.sha256() if not (offset or limit) else None
        with self._holding(tenant, sha256):
            left = limit or self.limits.blob
            while left > 0 and (piece := await self._store.read_blob(tenant, sha256, offset)):
                piece = piece[:left]
                if digest is not None:
                    digest.update(piece)
                yield v1.DownloadBlobResponse(chunk=piece, offset=offset)
                offset += len(piece)
                left -= len(piece)
        if digest is not None and digest.hexdigest() != sha256:
            log.error("blob_damaged", sha256=sha256, size_bytes=offset)
            raise errors.blob_corrupt("is damaged in the store: it does not have the SHA-256 in its name")

    async def load(self, tenant: str, blob: v1.Blob) -> bytes:
        """The whole of it. Raises NotecaseError BLOB_NOT_FOUND and BLOB_CORRUPT."""
        pieces = [piece.chunk async for piece in self.download(tenant, names.parse_blob(blob.name) or "")]
        return await asyncio.to_thread(b"".join, pieces) if len(pieces) > 1 else b"".join(pieces)

    @contextmanager
    def _holding(self, tenant: str, sha256: str) -> Iterator[None]:
        self._held[tenant, sha256] += 1
        try:
            yield
        finally:
            self._held[tenant, sha256] -= 1
            self._held += Counter()  # removes counts of zero

    async def put(
        self, tenant: str, data: bytes, media_type: str, filename: str = "", *, of_run: bool = False
    ) -> v1.Blob:
        """Stores content that is at hand. Raises NotecaseError QUOTA_EXCEEDED, unless it is a run's: what that has made
        is paid for."""
        sha256 = (await digest_of(data)).hex()
        await self._store.put_blob(tenant, "", sha256, data, of_run=of_run)
        return v1.Blob(name=names.blob(sha256), media_type=media_type, filename=filename, size_bytes=len(data))

    async def sweep(self) -> int:
        """Removes abandoned uploads, and blobs that nothing has referred to for a day. Returns the number of blobs."""
        now = self._clock()
        return await self._store.sweep_blobs(now, now - UPLOAD_MICROSECONDS, self._held)

    # ---- what is said

    async def kept(
        self,
        key: SessionKey,
        messages: Iterable[v1.Message],
        state: Mapping[str, v1.Value] | None = None,
        most: int = MAX_SAID_BYTES,
        at: int | None = None,
    ) -> list[v1.Message]:
        """Returns messages in the form of the log, at most `most` bytes; `state` are the values to which the session's
        state is about to be set, after a rewind to sequence `at` unless that is None. Raises NotecaseError
        STATE_KEY_NOT_FOUND; PAYLOAD_TOO_LARGE, also when values of state make them too large."""
        made, size = list[v1.Message](), 0
        parts, pause_at = 0, BYTES_AT_ONCE
        for message in messages:
            kept = v1.Message()
            kept.CopyFrom(message)
            del kept.parts[:]
            kept.parts.extend(await self.parts(key, message.parts, state, at=at))
            size += kept.ByteSize()
            if size > most:
                raise errors.too_large("The messages of one request", size, most)
            made.append(kept)
            parts += len(kept.parts)
            if parts >= PARTS_AT_ONCE or size >= pause_at:
                parts, pause_at = 0, size + BYTES_AT_ONCE
                await asyncio.sleep(0)
        return made

    async def parts(
        self,
        key: SessionKey,
        parts: Sequence[v1.Part],
        state: Mapping[str, v1.Value] | None = None,
        *,
        of_run: bool = False,
        at: int | None = None,
    ) -> list[v1.Part]:
        """As `kept`, of one message or result."""
        made, size = list[v1.Part](), 0
        for part in parts:
            made.append(await self._part(key, part, state, of_run, at))
            size += made[-1].ByteSize()
            if size > MAX_MESSAGE_BYTES:  # checked here, so that a few keys of state cannot fill the memory
                raise errors.too_large("The message", size, MAX_MESSAGE_BYTES)
        return made

    async def _part(
        self, key: SessionKey, part: v1.Part, state: Mapping[str, v1.Value] | None, of_run: bool, at: int | None = None
    ) -> v1.Part:
        match part.WhichOneof("kind"):
            case "data":
                data = part.data
                made = await self.put(key.tenant, data.data, data.media_type, data.filename, of_run=of_run)
                return v1.Part(blob=made)
            case "text" | "json" as kind if is_large(part):
                text = (part.text or part.json).encode()
                return v1.Part(blob=await self.put(key.tenant, text, MEDIA_TYPES[kind], of_run=of_run))
            case "state_key":
                return await self._part(key, await self._noted(key, part.state_key, state, at), None, of_run)
        return part

    async def _noted(self, key: SessionKey, name: str, state: Mapping[str, v1.Value] | None, at: int | None) -> v1.Part:
        """A value of state as a part. At sequence 0 the state is empty."""
        value = state[name] if state and name in state else None
        if value is None:
            found = {} if at == 0 else (await self._store.get_state(key.state, [name], at or 0)).entries
            if name not in found:
                raise errors.state_key_not_found(f"{names.session(key.session)}/state", name)
            value = found[name].value
        match value.WhichOneof("kind"):
            case "blob_value":
                return v1.Part(blob=value.blob_value)
            case "bytes_value":
                return v1.Part(data=v1.InlineData(data=value.bytes_value, media_type=BINARY))
            case "string_value":
                return v1.Part(text=value.string_value)
        large = value.ByteSize() > JSON_AT_ONCE
        return v1.Part(json=await asyncio.to_thread(json_of, value) if large else json_of(value))


async def digest_of(data: bytes) -> bytes:
    """Its SHA-256, computed in a thread for much data."""
    made = hashlib.sha256(data) if len(data) <= CHUNK_BYTES else await asyncio.to_thread(hashlib.sha256, data)
    return made.digest()


def is_large(part: v1.Part) -> bool:
    """Whether a part of text or JSON becomes a blob."""
    text = part.text or part.json
    if 4 * len(text) <= MAX_PART_BYTES:  # a character has at most four
        return False
    return len(text) > MAX_PART_BYTES or len(text.encode()) > MAX_PART_BYTES


def _differs(said: v1.Blob, stored: v1.Blob) -> str:
    """How content is not what its first frame says, for `errors.blob_corrupt`; empty when it is."""
    if said.size_bytes and said.size_bytes != stored.size_bytes:
        return f"has {stored.size_bytes} bytes, but {said.size_bytes} were announced"
    if said.name and said.name != stored.name:
        return f"does not have the SHA-256 in its name: it is {stored.name}"
    return ""

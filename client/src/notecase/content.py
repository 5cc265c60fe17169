"""Uploads and downloads content, over broken connections."""

import asyncio
import codecs
import errno
import hashlib
import mimetypes
import os
import re
import stat
import uuid
from collections.abc import AsyncIterator
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import grpc

from notecase import v1
from notecase.arguments import made, shown
from notecase.errors import NotecaseError
from notecase.names import name_of
from notecase.retry import Backoff, Retry, repeat

CHUNK_BYTES = 1 << 20
"""The most bytes that the server accepts in one frame."""

PIPE_BYTES = 256 << 20
"""The most bytes that are uploaded from a pipe or a device. They are held in memory, since an upload may have to be
continued."""

_NAMES = mimetypes.MimeTypes()
"""Python's own types of file names. A machine's types may call a Rust program application/rls-services+xml."""

_TEXTS = re.compile(r"text/(?!x-).+|image/.+|application/(?:.+\+)?(?:json|xml|pdf)")
"""Types that a text file keeps from its name; a model would not read text of another type."""

_LOOKED_AT = 64 << 10
"""The bytes at the start that decide whether content is text."""


class Contents:
    """Uploads and downloads over one connection, and continues where a broken one stopped."""

    def __init__(self, blobs: "v1.BlobServiceAsyncStub", retry: Retry) -> None:
        self._blobs = blobs
        self._retry = retry

    async def upload(
        self, content: bytes | str | PathLike[str], media_type: str = "", *, filename: str = "", upload_id: str = ""
    ) -> v1.Blob:
        """See Client.upload."""
        if not isinstance(content, bytes | str | PathLike):
            raise TypeError(f"content must be bytes or the path of a file, not {shown(content)}")
        if not isinstance(content, bytes):
            filename = filename or Path(content).name
        first = made(
            v1.UploadBlobRequest,
            blob=made(v1.Blob, media_type=media_type, filename=filename),
            upload_id=upload_id or uuid.uuid4().hex,
        )
        backoff = Backoff(self._retry)
        with await asyncio.to_thread(_opened, content) as source:
            if not media_type:
                first.blob.media_type = _media_type(filename, await asyncio.to_thread(source.read, _LOOKED_AT))
            first.blob.size_bytes = await asyncio.to_thread(source.seek, 0, 2)
            first.last = not first.blob.size_bytes
            begun, tries = bool(upload_id), self._retry.tries
            while True:
                try:
                    if begun:
                        offset = await self._committed(first.upload_id)
                        if offset > first.offset:
                            backoff.progress()
                        first.offset = offset
                    begun = True
                    return await self._blobs.UploadBlob(_frames(first, source))
                except NotecaseError as error:
                    # Bytes of an earlier call may have been stored only after the server had reported its offset.
                    late = error.reason == "UPLOAD_OFFSET_MISMATCH" and tries > 0
                    tries -= 1
                    if not late:
                        await backoff.wait(error, limited=True)

    async def _committed(self, upload_id: str) -> int:
        """Returns how many bytes of an upload the server has."""
        request = v1.GetUploadRequest(upload_id=upload_id)
        try:
            upload = await repeat(self._retry, lambda: self._blobs.GetUpload(request))
        except NotecaseError as error:
            if error.reason != "BLOB_NOT_FOUND":
                raise
            return 0
        return 0 if upload.HasField("blob") else upload.committed_bytes

    async def download(self, blob: str | v1.Blob, offset: int = 0, limit: int = 0) -> AsyncIterator[bytes]:
        """See Client.download."""
        name = name_of(blob, "blobs")
        request = made(v1.DownloadBlobRequest, name=name, offset=offset, limit=limit)
        backoff = Backoff(self._retry)
        digest = None if offset or limit else hashlib.sha256()
        while True:
            try:
                async for response in self._blobs.DownloadBlob(request):
                    if digest is not None:
                        digest.update(response.chunk)
                    request.offset += len(response.chunk)
                    backoff.progress()
                    yield response.chunk
                    if limit:
                        request.limit -= len(response.chunk)
                        if not request.limit:
                            return
                break
            except NotecaseError as error:
                # A reader may take his time; the server does not wait for him, and need not.
                if error.reason != "WATCHER_TOO_SLOW":
                    await backoff.wait(error)
        if digest is not None and name != f"blobs/{digest.hexdigest()}":
            problem = "The received content does not have the SHA-256 in its name."
            raise NotecaseError(grpc.StatusCode.DATA_LOSS, "BLOB_CORRUPT", problem)


async def _frames(first: v1.UploadBlobRequest, source: BinaryIO) -> AsyncIterator[v1.UploadBlobRequest]:
    yield first
    await asyncio.to_thread(source.seek, first.offset)
    while chunk := await asyncio.to_thread(source.read, CHUNK_BYTES):
        yield v1.UploadBlobRequest(chunk=chunk)


def _media_type(filename: str, start: bytes) -> str:
    """Guesses a media type from a file's name and the start of its content; for a compressed file, that of the
    compression. Raises ValueError if neither shows it."""
    kind, encoding = _NAMES.guess_type(filename)
    if encoding:
        return "application/gzip" if encoding == "gzip" else f"application/x-{encoding}"
    if _is_text(start):
        return kind if kind and _TEXTS.fullmatch(kind) else "text/plain"
    kind = kind or mimetypes.guess_type(filename)[0]
    if not kind:
        raise ValueError("pass the media_type of the content, for example application/pdf")
    return kind


def _is_text(start: bytes) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < _LOOKED_AT)
    except UnicodeDecodeError:
        return False


def _opened(content: bytes | str | PathLike[str]) -> BinaryIO:
    if isinstance(content, bytes):
        return BytesIO(content)
    opened = Path(content).open("rb")  # noqa: SIM115 - its reader closes it
    found = os.fstat(opened.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size > _LOOKED_AT:
        return opened
    with opened:  # small files may be the system's, such as those in /proc, whose sizes are wrong
        return BytesIO(read_once(opened))


def read_once(source: BinaryIO) -> bytes:
    """Reads a pipe, a device or a small file. Raises OSError EFBIG for more than PIPE_BYTES."""
    content = source.read(PIPE_BYTES + 1)
    if len(content) > PIPE_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {PIPE_BYTES >> 20} MiB; write it to a file first")
    return content

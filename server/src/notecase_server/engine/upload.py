"""Writes uploads to the store, in pieces of one size, and makes their blobs."""

import hashlib
from collections.abc import Callable

from notecase import v1

from notecase_server import errors, names
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import CHUNK_BYTES, BlobStore
from notecase_server.supervisor import is_passing


class Writer:
    """Puts chunks of any size into an upload, in pieces of CHUNK_BYTES."""

    def __init__(
        self, store: BlobStore, tenant: str, subject: str, upload: v1.Upload, check_size: Callable[[int], None]
    ) -> None:
        """`subject` is who uploads."""
        self.size = 0
        """What came, before this call and with it."""
        self._digest = hashlib.sha256()
        self._store = store
        self._tenant = tenant
        self._subject = subject
        self._upload = upload
        self._check_size = check_size
        self._pending = bytearray()

    @property
    def blob(self) -> v1.Blob:
        """What has come, as a blob."""
        return v1.Blob(name=names.blob(self._digest.hexdigest()), size_bytes=self.size)

    async def recall(self) -> None:
        """Takes in what an earlier call has stored."""
        while piece := await self._store.read_upload(self._tenant, self._upload.upload_id, self.size):
            self._take(piece)

    def _take(self, chunk: bytes) -> None:
        self._check_size(self.size + len(chunk))
        self._digest.update(chunk)
        self.size += len(chunk)

    async def add(self, chunk: bytes) -> None:
        self._take(chunk)
        self._pending += chunk
        await self._write(len(self._pending) // CHUNK_BYTES * CHUNK_BYTES)

    async def flush(self) -> None:
        """Stores what has come; durable when it returns."""
        await self._write(len(self._pending))

    async def complete(self) -> v1.Blob:
        """Makes the blob of the bytes that were flushed, and returns it also when the store made it but the answer was
        lost. Raises UPLOAD_OFFSET_MISMATCH, and STORE_UNAVAILABLE when it was not made or the store cannot say."""
        made, upload_id = self.blob, self._upload.upload_id
        try:
            return await self._store.complete_upload(
                self._tenant, self._subject, upload_id, made.size_bytes, self._digest.hexdigest()
            )
        except NotecaseError as error:
            if not is_passing(error):
                raise
            with errors.unsure():
                found = await self._store.get_upload(self._tenant, upload_id)
            if found is None or found.blob.name != made.name:
                raise
            return made

    async def _write(self, size: int) -> None:
        if size:
            start = self.size - len(self._pending)
            data = bytes(self._pending[:size])
            del self._pending[:size]
            try:
                await self._store.add_chunk(self._tenant, self._upload.upload_id, start, data)
            except NotecaseError:
                self._pending.clear()  # it does not follow what is stored, which another call may have sent
                raise

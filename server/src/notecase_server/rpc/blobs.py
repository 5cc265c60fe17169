"""BlobService: parse, call, and pass on the streams."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from notecase import v1

from notecase_server import errors
from notecase_server.rpc import validate
from notecase_server.rpc.caller import caller
from notecase_server.rpc.check import Check
from notecase_server.rpc.desk import Desk, named
from notecase_server.store.contract import BlobStore


class Blobs(v1.BlobServiceServicer):
    def __init__(self, desk: Desk, store: BlobStore) -> None:
        self.desk = desk
        self.store = store

    async def UploadBlob(self, request: AsyncIterator[v1.UploadBlobRequest], context: Any) -> v1.Blob:
        first = await anext(request, v1.UploadBlobRequest())
        check = Check()
        validate.upload(check, first)
        check.done()
        who = caller.get()
        if first.upload_id:
            first.upload_id = _own(first.upload_id)
        frames = _frames(first, request)
        return await self.desk.contents.upload(who.tenant, first, frames, who.principal.subject, who.user)

    async def DownloadBlob(
        self, request: v1.DownloadBlobRequest, context: Any
    ) -> AsyncGenerator[v1.DownloadBlobResponse, None]:
        check = Check()
        sha256 = check.blob_name("name", request.name)
        check(request.offset >= 0, "offset", "is negative")
        check(request.limit >= 0, "limit", "is negative")
        check.done()
        size = (await self._blob(request.name, sha256)).size_bytes
        check(request.offset <= size, "offset", f"is after the end of the content, which is {size}")
        check.done()
        pieces = self.desk.contents.download(caller.get().tenant, sha256, request.offset, request.limit)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def GetUpload(self, request: v1.GetUploadRequest, context: Any) -> v1.Upload:
        check = Check()
        check.token_id("upload_id", request.upload_id)
        check.done()
        upload = await self.store.get_upload(caller.get().tenant, _own(request.upload_id))
        if upload is None:
            raise errors.not_found("upload", request.upload_id)
        upload.upload_id = request.upload_id
        return upload

    async def GetBlob(self, request: v1.GetBlobRequest, context: Any) -> v1.Blob:
        sha256 = named(request, Check.blob_name)
        return await self._blob(request.name, sha256)

    async def _blob(self, name: str, sha256: str) -> v1.Blob:
        who = caller.get()
        found = await self.store.get_blob(who.tenant, sha256)
        if found is not None and who.user:
            known = await self.store.known_blobs(who.tenant, who.principal.subject, who.user, [sha256])
            found = found if known else None
        if found is None:
            raise errors.not_found("blob", name)
        return found


def _own(upload_id: str) -> str:
    """Returns the id under which an upload is stored. Ids chosen by a caller that is bound to a user are separate from
    all others."""
    user = caller.get().user
    return f"{user} {upload_id}" if user else upload_id


async def _frames(
    first: v1.UploadBlobRequest, others: AsyncIterator[v1.UploadBlobRequest]
) -> AsyncIterator[v1.UploadBlobRequest]:
    """All frames of an upload. INVALID_FIELD for a chunk that is too large."""
    check = Check()
    validate.chunk(check, first)
    check.done()
    yield first
    async for frame in others:
        validate.chunk(check, frame)
        check.done()
        yield frame

"""Checks the references in a request of a caller that is bound to a user: content of others does not exist for it."""

import asyncio
from collections.abc import Mapping

from google.protobuf.message import Message

from notecase_server import errors, names
from notecase_server.errors import Violation
from notecase_server.rpc.caller import caller, frame_bytes
from notecase_server.rpc.check import SETTLED_BYTES
from notecase_server.store.contract import BlobStore
from notecase_server.store.fold import TooManyError, references

MAX_MENTIONED = 1000
"""Blobs that one request may refer to: no valid one refers to more."""

MOST_WITHIN = 20_000
"""Messages within one request, down to the values of its state: no valid one has more."""

UPLOAD = "/notecase.v1.BlobService/UploadBlob"
"""Its frames name the blob that they are about to send."""


class Mentions:
    """Judges the requests of one server, each before its handler sees it."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def require_own(self, message: Message) -> None:
        """Raises NotecaseError BLOB_NOT_FOUND for a reference to content that the caller did not upload, and that no
        session of its user refers to, nor that user's state."""
        who = caller.get()
        if not who.user or who.method == UPLOAD:
            return
        large = frame_bytes.get() >= SETTLED_BYTES
        named = await asyncio.to_thread(_named, message) if large else _named(message)
        if len(named) > MAX_MENTIONED:
            raise errors.invalid([Violation("request", f"refers to more than {MAX_MENTIONED} blobs")])
        if named:
            known = await self._store.known_blobs(who.tenant, who.principal.subject, who.user, named)
            for sha256 in named.keys() - known:
                raise errors.not_found("blob", named[sha256])


def _named(message: Message) -> Mapping[str, str]:
    """Returns the names of the blobs that a request refers to, by digest."""
    try:
        found = references(message, MOST_WITHIN)
    except TooManyError:
        raise errors.invalid([Violation("request", f"has more than {MOST_WITHIN} parts, values or the like")]) from None
    return {sha256: blob.name for blob in found if (sha256 := names.parse_blob(blob.name))}

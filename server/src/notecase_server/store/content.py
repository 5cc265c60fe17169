"""Content outside the log: uploads, blobs, and what refers to them.

As in `steps`, a step writes only when nothing can be refused any more.
"""

from collections.abc import Container, Iterable, Sequence
from copy import deepcopy
from typing import TypeVar

from notecase import v1

from notecase_server import errors
from notecase_server.store.contract import CHUNK_BYTES, Scope
from notecase_server.store.fold import PREFIX, references
from notecase_server.store.quotas import require_content, require_upload
from notecase_server.store.sql.tables import Tables
from notecase_server.store.tables import BlobRow, UploadRow

M = TypeVar("M", v1.Event, v1.StateOp)

SWEEP_ROWS = 16
"""Pieces removed in one transaction: about 4 MiB, whose zeroing takes some ten milliseconds of everybody's commits."""

SWEEP_UPLOADERS = 1000
"""Records of who uploaded a blob that one transaction removes: any number of callers may have."""

FORGET_UPLOADS = 250
"""Records of one user's uploads that one transaction removes."""


def sized(tables: Tables, tenant: str, given: Sequence[M]) -> tuple[list[M], list[dict[str, int]]]:
    """The events or operations with the size of each blob in them, copied where they have any; and for each, the blobs
    by digest. BLOB_NOT_FOUND."""
    told: list[M] = []
    found: list[dict[str, int]] = []
    for each in given:
        blobs: dict[str, int] = {}
        if references(each):
            each = deepcopy(each)  # noqa: PLW2901 - the caller's own is not changed
            for blob in references(each):
                sha256 = blob.name.removeprefix(PREFIX)
                row = tables.content.blob(tenant, sha256)
                if row is None:
                    raise errors.not_found("blob", blob.name)
                blob.size_bytes = blobs[sha256] = row.size
        told.append(each)
        found.append(blobs)
    return told, found


def refer_entry(tables: Tables, scope: Scope, key: str, entry: v1.StateEntry | None) -> None:
    """What an entry of a user's or the app's state refers to, instead of what it did."""
    tables.drop_references(scope, key)
    if entry is not None:
        for sha256 in {blob.name.removeprefix(PREFIX) for blob in references(entry)}:
            tables.refer(scope, key, sha256, 0)


def put_blob(tables: Tables, now: int, tenant: str, subject: str, sha256: str, data: bytes, of_run: bool) -> None:
    """Store.put_blob."""
    row = tables.content.blob(tenant, sha256)
    if row is None:
        if not of_run:
            require_content(tables, tenant)
        row = BlobRow(tables.content.new_content(), len(data))
        _add_pieces(tables, row.content, 0, data)
    tables.content.put_blob(tenant, subject, sha256, row, now)


def _add_pieces(tables: Tables, content: int, start: int, data: bytes) -> None:
    for at in range(0, len(data), CHUNK_BYTES):
        tables.content.add_chunk(content, start + at, data[at : at + CHUNK_BYTES])


def get_blob(tables: Tables, tenant: str, sha256: str) -> v1.Blob | None:
    """Store.get_blob."""
    row = tables.content.blob(tenant, sha256)
    return None if row is None else v1.Blob(name=f"{PREFIX}{sha256}", size_bytes=row.size)


def touch_blob(tables: Tables, now: int, tenant: str, subject: str, sha256: str) -> v1.Blob | None:
    """Store.touch_blob."""
    row = tables.content.blob(tenant, sha256)
    if row is not None:
        tables.content.put_blob(tenant, subject, sha256, row, now)
    return get_blob(tables, tenant, sha256)


def read_blob(tables: Tables, tenant: str, sha256: str, offset: int) -> bytes:
    """Store.read_blob."""
    row = tables.content.blob(tenant, sha256)
    if row is None:
        raise errors.not_found("blob", f"{PREFIX}{sha256}")
    return tables.content.chunk(row.content, offset)


def get_upload(tables: Tables, tenant: str, upload_id: str) -> v1.Upload | None:
    """Store.get_upload."""
    row = tables.content.upload(tenant, upload_id)
    return None if row is None else _told(upload_id, row)


def _told(upload_id: str, row: UploadRow) -> v1.Upload:
    upload = v1.Upload(upload_id=upload_id, committed_bytes=row.size)
    upload.expire_time.FromMicroseconds(row.expire_time)
    if row.sha256:
        upload.blob.name = f"{PREFIX}{row.sha256}"
        upload.blob.size_bytes = row.size
    return upload


def _upload(tables: Tables, tenant: str, upload_id: str) -> UploadRow:
    row = tables.content.upload(tenant, upload_id)
    if row is None:
        raise errors.not_found("upload", upload_id)
    return row


def open_upload(tables: Tables, tenant: str, upload_id: str, expire_time: int, size: int) -> v1.Upload:
    """Store.open_upload."""
    row = tables.content.upload(tenant, upload_id)
    if row is None:
        require_upload(tables, tenant)
    if row is None or (not row.sha256 and size > row.size):
        require_content(tables, tenant, size - row.size if row else size)
    if row is None:
        row = UploadRow(tables.content.new_content(), 0, expire_time, "")
    row = row if row.sha256 else row._replace(expire_time=expire_time)
    tables.content.put_upload(tenant, upload_id, row)
    return _told(upload_id, row)


def add_chunk(tables: Tables, tenant: str, upload_id: str, offset: int, data: bytes) -> None:
    """Store.add_chunk."""
    row = _upload(tables, tenant, upload_id)
    if row.size != offset or row.sha256:
        raise errors.upload_offset_mismatch(upload_id, row.size)
    require_content(tables, tenant)
    _add_pieces(tables, row.content, offset, data)
    tables.content.put_upload(tenant, upload_id, row._replace(size=offset + len(data)))


def read_upload(tables: Tables, tenant: str, upload_id: str, offset: int) -> bytes:
    """Store.read_upload."""
    return tables.content.chunk(_upload(tables, tenant, upload_id).content, offset)


def complete_upload(
    tables: Tables, now: int, tenant: str, subject: str, upload_id: str, size: int, sha256: str
) -> v1.Blob:
    """Store.complete_upload."""
    row = _upload(tables, tenant, upload_id)
    if row.size != size or row.sha256 not in {"", sha256}:
        raise errors.upload_offset_mismatch(upload_id, row.size)
    if not row.sha256:
        stored = tables.content.blob(tenant, sha256)
        if stored is not None:
            tables.content.discard(row.content)
        tables.content.put_blob(tenant, subject, sha256, stored or BlobRow(row.content, size), now)
        tables.content.put_upload(tenant, upload_id, row._replace(sha256=sha256))
    return v1.Blob(name=f"{PREFIX}{sha256}", size_bytes=size)


def drop_upload(tables: Tables, tenant: str, upload_id: str, if_bytes: int | None) -> None:
    """Store.drop_upload."""
    row = tables.content.upload(tenant, upload_id)
    if row is not None and not row.sha256 and if_bytes in {None, row.size}:
        tables.content.discard(row.content)
        tables.content.delete_upload(tenant, upload_id)


def expire_uploads(tables: Tables, now: int, limit: int) -> int:
    """At most `limit` of them; returns how many."""
    expired = tables.content.expired_uploads(now, limit)
    for tenant, upload_id, row in expired:
        if not row.sha256:
            tables.content.discard(row.content)
        tables.content.delete_upload(tenant, upload_id)
    return len(expired)


def uploaded_by(tables: Tables, tenant: str, user: str) -> list[tuple[str, str]]:
    """Some of the blobs that callers bound to a user uploaded, by digest and subject."""
    return tables.content.uploaded_by(tenant, user, FORGET_UPLOADS)


def forget_uploaders(tables: Tables, now: int, tenant: str, found: Iterable[tuple[str, str]]) -> None:
    """Removes the records of who uploaded these blobs."""
    for sha256, subject in found:
        tables.content.forget_uploader(tenant, sha256, subject)


def find_loose(tables: Tables, before: int, after: tuple[str, str], limit: int) -> list[tuple[str, str]]:
    """Blobs that nothing may need, at most `limit` of them, by tenant and digest."""
    return tables.content.loose_blobs(before, after, limit)


def remove_loose(
    tables: Tables,
    now: int,
    found: Iterable[tuple[str, str]],
    after: tuple[str, str],
    before: int,
    held: Container[tuple[str, str]],
) -> tuple[int, tuple[str, str]]:
    """Removes those of the blobs found behind `after` that nothing needs still, as far as one transaction goes. Returns
    how many, and the last one that it is done with."""
    removed, left = 0, SWEEP_UPLOADERS
    for tenant, sha256 in found:
        row = tables.content.blob(tenant, sha256)
        if row is not None and (tenant, sha256) not in held and tables.content.is_loose(tenant, sha256, before):
            left -= tables.content.delete_blob(tenant, sha256, left)
            if not left:
                break
            tables.content.discard(row.content)
            removed += 1
        after = (tenant, sha256)
    return removed, after

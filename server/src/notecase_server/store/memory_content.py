"""Content and uploads in memory."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import islice

from notecase_server.store.contract import Query
from notecase_server.store.lists import Found
from notecase_server.store.memory_rows import BlobRows, TenantRows
from notecase_server.store.tables import BlobRow, UploadRow


class MemoryContent:
    """tables.Content in memory."""

    def __init__(self, tenants: Mapping[str, TenantRows]) -> None:
        self._tenants = tenants
        self._contents: dict[int, dict[int, bytes]] = {}
        """The pieces of each by where they start."""
        self._last_content = 0
        self._discarded: list[int] = []

    def new_content(self) -> int:
        self._last_content += 1
        self._contents[self._last_content] = {}
        return self._last_content

    def add_chunk(self, content: int, start: int, data: bytes) -> None:
        self._contents[content][start] = bytes(data)

    def chunk(self, content: int, offset: int) -> bytes:
        pieces = self._contents[content]
        starts = list(pieces)
        place = bisect_right(starts, offset) - 1
        return pieces[starts[place]][offset - starts[place] :] if place >= 0 else b""

    def discard(self, content: int) -> None:
        self._discarded.append(content)

    def delete_chunks(self, limit: int) -> int:
        deleted = 0
        while self._discarded and deleted < limit:
            pieces = self._contents[self._discarded[-1]]
            gone = min(len(pieces), limit - deleted)
            for _ in range(gone):
                pieces.popitem()
            deleted += max(gone, 1)
            if not pieces:
                del self._contents[self._discarded.pop()]
        return deleted

    def blob(self, tenant: str, sha256: str) -> BlobRow | None:
        found = self._tenants[tenant].blobs.get(sha256)
        return found.row if found else None

    def blobs(self, tenant: str, query: Query) -> Iterator[Found[tuple[str, int]]]:
        rows = self._tenants[tenant].blobs
        for sha256 in sorted(rows):
            if query.after is None or (sha256,) > query.after:
                yield Found((sha256,), (sha256, rows[sha256].row.size), len(sha256))

    def put_blob(self, tenant: str, subject: str, sha256: str, row: BlobRow, now: int) -> None:
        blob = self._tenants[tenant].blobs.setdefault(sha256, BlobRows(row, now))
        blob.upload_time = now
        blob.uploaders.add(subject)

    def knows_blob(self, tenant: str, sha256: str, subject: str, user: str) -> bool:
        found = self._tenants[tenant].blobs.get(sha256)
        return found is not None and (
            subject in found.uploaders
            or any(
                user == (f"users/{scope.id}" if scope.kind == "user" else self._tenants[tenant].user_of(scope.id))
                for scope, _ in found.references
                if scope.kind != "app"
            )
        )

    def delete_blob(self, tenant: str, sha256: str, most: int) -> int:
        del self._tenants[tenant].blobs[sha256]
        return 0

    def is_loose(self, tenant: str, sha256: str, before: int) -> bool:
        found = self._tenants[tenant].blobs.get(sha256)
        return found is not None and found.upload_time < before and not found.references

    def loose_blobs(self, before: int, after: tuple[str, str], limit: int) -> list[tuple[str, str]]:
        places = sorted((tenant, sha256) for tenant, rows in self._tenants.items() for sha256 in rows.blobs)
        return [place for place in places if place > after and self.is_loose(*place, before)][:limit]

    def upload(self, tenant: str, upload_id: str) -> UploadRow | None:
        return self._tenants[tenant].uploads.get(upload_id)

    def put_upload(self, tenant: str, upload_id: str, row: UploadRow) -> None:
        self._tenants[tenant].uploads[upload_id] = row

    def delete_upload(self, tenant: str, upload_id: str) -> None:
        del self._tenants[tenant].uploads[upload_id]

    def expired_uploads(self, now: int, limit: int) -> list[tuple[str, str, UploadRow]]:
        found = (
            (tenant, upload_id, row)
            for tenant, rows in self._tenants.items()
            for upload_id, row in rows.uploads.items()
            if row.expire_time <= now
        )
        return list(islice(found, limit))

"""Content and uploads in SQL."""

from collections.abc import Iterator

from notecase import v1

from notecase_server.store.contract import Query
from notecase_server.store.fold import PREFIX
from notecase_server.store.lists import Found
from notecase_server.store.sql.statements import Sql
from notecase_server.store.tables import BlobRow, UploadRow

LOOSE = """upload_time < $1 AND NOT EXISTS
    (SELECT 1 FROM blob_references r WHERE r.tenant = b.tenant AND r.sha256 = b.sha256)"""
"""Holds for a blob `b` that nothing refers to, last uploaded before a time."""


class SqlContent:
    """Uploads and blobs, with the pieces that they consist of."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql

    def new_content(self) -> int:
        """A number under which content can be kept."""
        return int(self._sql.one("INSERT INTO contents (discarded) VALUES (0) RETURNING content")[0])

    def add_chunk(self, content: int, start: int, data: bytes) -> None:
        self._sql.do("INSERT INTO chunks (content, start, data) VALUES ($1, $2, $3)", content, start, data)

    def chunk(self, content: int, offset: int) -> bytes:
        """What follows from `offset` on in the piece that holds it; empty beyond the last."""
        # substr counts from 1.
        row = self._sql.one(
            """SELECT substr(data, CAST($2 - start + 1 AS integer)) FROM chunks WHERE content = $1 AND start <= $2
                ORDER BY start DESC LIMIT 1""",
            *(content, offset),
        )
        return bytes(row[0]) if row else b""

    def discard(self, content: int) -> None:
        """Gives content up; `delete_chunks` removes it."""
        self._sql.do("UPDATE contents SET discarded = 1 WHERE content = $1", content)

    def delete_chunks(self, limit: int) -> int:
        """Removes at most `limit` pieces of what was given up, and returns how many; content without any counts as a
        piece."""
        sql, deleted = self._sql, 0
        discarded = f"SELECT content FROM contents WHERE {sql.discarded} LIMIT 1"
        while deleted < limit and (row := sql.one(discarded)):
            gone = sql.remove(
                """DELETE FROM chunks WHERE content = $1 AND start IN
                    (SELECT start FROM chunks WHERE content = $1 LIMIT $2)""",
                *(row[0], limit - deleted),
            )
            deleted += max(gone, 1)
            if not sql.one("SELECT 1 FROM chunks WHERE content = $1 LIMIT 1", row[0]):
                sql.do("DELETE FROM contents WHERE content = $1", row[0])
        return deleted

    def blob(self, tenant: str, sha256: str) -> BlobRow | None:
        row = self._sql.one("SELECT content, size FROM blobs WHERE tenant = $1 AND sha256 = $2", tenant, sha256)
        return BlobRow(*row) if row else None

    def blobs(self, tenant: str, query: Query) -> Iterator[Found[v1.Blob]]:
        """Names and sizes."""
        statement = "SELECT sha256, size FROM blobs WHERE tenant = $1 AND sha256 > $2 ORDER BY sha256 LIMIT $3"
        for sha256, size in self._sql.rows(statement, tenant, *(query.after or ("",)), query.limit + 1):
            yield Found((sha256,), v1.Blob(name=f"{PREFIX}{sha256}", size_bytes=size), len(sha256))

    def put_blob(self, tenant: str, subject: str, sha256: str, row: BlobRow, now: int) -> None:
        """Records that `subject` uploaded it, just now."""
        self._sql.put("blobs", {"tenant": tenant, "sha256": sha256}, {**row._asdict(), "upload_time": now})
        self._sql.do(
            "INSERT INTO uploaders (tenant, sha256, subject) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            *(tenant, sha256, subject),
        )

    def knows_blob(self, tenant: str, sha256: str, subject: str, user: str) -> bool:
        """Whether that subject uploaded it, or a session or the state of that user refers to it."""
        uploaded = "SELECT 1 FROM uploaders WHERE tenant = $1 AND sha256 = $2 AND subject = $3"
        referred = """SELECT 1 FROM blob_references r WHERE r.tenant = $1 AND r.sha256 = $2 AND (
                r.kind = 'user' AND 'users/' || r.id = $3
                OR r.kind = 'session' AND EXISTS (
                    SELECT 1 FROM sessions s WHERE s.tenant = r.tenant AND s.uid = r.id AND s."user" = $3))
            LIMIT 1"""
        return bool(self._sql.one(uploaded, tenant, sha256, subject) or self._sql.one(referred, tenant, sha256, user))

    def uploaded_by(self, tenant: str, user: str, limit: int) -> list[tuple[str, str]]:
        rows = self._sql.rows(
            """SELECT sha256, subject FROM uploaders WHERE tenant = $1 AND subject IN
                (SELECT subject FROM principals WHERE tenant = $1 AND "user" = $2) LIMIT $3""",
            *(tenant, user, limit),
        )
        return [(sha256, self._sql.read(subject)) for sha256, subject in rows]

    def forget_uploader(self, tenant: str, sha256: str, subject: str) -> None:
        self._sql.remove(
            "DELETE FROM uploaders WHERE tenant = $1 AND sha256 = $2 AND subject = $3", tenant, sha256, subject
        )

    def delete_blob(self, tenant: str, sha256: str, most: int) -> int:
        removed = self._sql.do(
            """DELETE FROM uploaders WHERE tenant = $1 AND sha256 = $2 AND subject IN
                (SELECT subject FROM uploaders WHERE tenant = $1 AND sha256 = $2 ORDER BY subject LIMIT $3)""",
            *(tenant, sha256, most),
        )
        if removed < most:
            self._sql.do("DELETE FROM blobs WHERE tenant = $1 AND sha256 = $2", tenant, sha256)
        return removed

    def is_loose(self, tenant: str, sha256: str, before: int) -> bool:
        """Whether there is such a blob, last uploaded before that time, and nothing refers to it."""
        statement = f"SELECT 1 FROM blobs b WHERE {LOOSE} AND tenant = $2 AND sha256 = $3"
        return self._sql.one(statement, before, tenant, sha256) is not None

    def loose_blobs(self, before: int, after: tuple[str, str], limit: int) -> list[tuple[str, str]]:
        """At most `limit` of those blobs by tenant and digest, ascending, after that one."""
        rows = self._sql.rows(
            f"""SELECT tenant, sha256 FROM blobs b WHERE {LOOSE} AND (tenant, sha256) > ($2, $3)
                ORDER BY tenant, sha256 LIMIT $4""",
            *(before, *after, limit),
        )
        return [(self._sql.read(tenant), sha256) for tenant, sha256 in rows]

    def upload(self, tenant: str, upload_id: str) -> UploadRow | None:
        row = self._sql.one(
            "SELECT content, size, expire_time, sha256 FROM uploads WHERE tenant = $1 AND upload_id = $2",
            *(tenant, upload_id),
        )
        return UploadRow(*row) if row else None

    def put_upload(self, tenant: str, upload_id: str, row: UploadRow) -> None:
        self._sql.put("uploads", {"tenant": tenant, "upload_id": upload_id}, row._asdict())

    def delete_upload(self, tenant: str, upload_id: str) -> None:
        self._sql.do("DELETE FROM uploads WHERE tenant = $1 AND upload_id = $2", tenant, upload_id)

    def expired_uploads(self, now: int, limit: int) -> list[tuple[str, str, UploadRow]]:
        """At most `limit` of them with tenant and id, in no order."""
        rows = self._sql.rows(
            """SELECT tenant, upload_id, content, size, expire_time, sha256 FROM uploads WHERE expire_time <= $1
                LIMIT $2""",
            *(now, limit),
        )
        read = self._sql.read
        return [(read(tenant), read(upload_id), UploadRow(*row)) for tenant, upload_id, *row in rows]

"""Keys, principals, tenants and their audit in SQL."""

from collections.abc import Iterator
from typing import Any

from notecase import v1

from notecase_server.store.contract import AUDIT_COLUMNS, KeyRow, Query
from notecase_server.store.lists import Found, column
from notecase_server.store.sql.statements import Sql, marks

ADD_AUDIT = f"""INSERT INTO audit (tenant, {", ".join(AUDIT_COLUMNS)}, body)
    VALUES ({marks(2 + len(AUDIT_COLUMNS))})"""

DATA_TABLES = ("sessions", "states", "agents", "blobs", "uploads")
"""The tables of which a tenant that has data has rows in at least one."""


class SqlDirectory:
    """Keys, principals, tenants and the audit."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql

    def key(self, key_id: str) -> KeyRow | None:
        row = self._sql.one("SELECT tenant, body, digest, former FROM keys WHERE key = $1", key_id)
        return KeyRow(self._sql.read(row[0]), key_id, v1.Key.FromString(row[1]), row[2], row[3]) if row else None

    def put_key(self, row: KeyRow) -> None:
        """Adds a key, or replaces it."""
        times = {"create_time": row.key.create_time.ToMicroseconds()}
        held = {"digest": row.digest, "former": row.former, "body": row.key.SerializeToString()}
        self._sql.put("keys", {"key": row.key_id}, {"tenant": row.tenant, **times, **held})
        self._sql.do(f"UPDATE {self._sql.store} SET keyed = 1 WHERE keyed = 0")

    def delete_key(self, key_id: str) -> None:
        self._sql.remove("DELETE FROM keys WHERE key = $1", key_id)

    def keys(self, tenant: str, query: Query) -> Iterator[Found[v1.Key]]:
        values = list[Any]([tenant])
        after = query.after and (query.after[0], str(query.after[1]).removeprefix("keys/"))
        where = self._sql.where(Query(query.limit, after), (), ("create_time", "key"), "<", values)
        rows = self._sql.page(
            f"SELECT create_time, key, body, length(body) AS size FROM keys WHERE tenant = $1{where}",
            *("create_time DESC, key DESC", values, query.limit + 1),
        )
        for create_time, _, body, size, *_ in rows:
            key = v1.Key.FromString(body)
            yield Found((create_time, key.name), key, size)

    def count_keys(self, tenant: str) -> int:
        return int(self._sql.one("SELECT count(*) FROM keys WHERE tenant = $1", tenant)[0])

    def is_keyed(self) -> bool:
        """Whether there was ever a key."""
        row = self._sql.one(f"SELECT keyed FROM {self._sql.store}")
        return bool(row and row[0])

    def principal(self, tenant: str, name: str) -> v1.Principal | None:
        row = self._sql.one("SELECT body FROM principals WHERE tenant = $1 AND principal = $2", tenant, name)
        return v1.Principal.FromString(row[0]) if row else None

    def principal_like(self, tenant: str, principal: v1.Principal) -> v1.Principal | None:
        """The one of that subject, role and user."""
        row = self._sql.one(
            'SELECT body FROM principals WHERE tenant = $1 AND "user" = $2 AND subject = $3 AND role = $4',
            *(tenant, principal.user, principal.subject, principal.role),
        )
        return v1.Principal.FromString(row[0]) if row else None

    def add_principal(self, tenant: str, principal: v1.Principal) -> None:
        self._sql.do(
            'INSERT INTO principals (tenant, principal, "user", subject, role, body) VALUES ($1, $2, $3, $4, $5, $6)',
            *(tenant, principal.name, principal.user, principal.subject, principal.role),
            principal.SerializeToString(),
        )

    def delete_principals(self, tenant: str, user: str, limit: int) -> bool:
        """Removes at most `limit` that are bound to "users/{user}"; returns whether there were any."""
        gone = self._sql.remove(
            """DELETE FROM principals WHERE tenant = $1 AND principal IN
                (SELECT principal FROM principals WHERE tenant = $1 AND "user" = $2 LIMIT $3)""",
            *(tenant, user, limit),
        )
        return gone > 0

    def add_audit(self, tenant: str, entry: v1.AuditEntry) -> None:
        columns = (column(entry, name) for name in AUDIT_COLUMNS)
        self._sql.do(ADD_AUDIT, tenant, *columns, entry.SerializeToString())

    def audit(self, tenant: str, query: Query) -> Iterator[Found[v1.AuditEntry]]:
        values = list[Any]([tenant])
        where = self._sql.where(query, AUDIT_COLUMNS, ("number",), "<", values)
        rows = self._sql.page(
            f"SELECT number, body, length(body) AS size FROM audit WHERE tenant = $1{where}",
            *("number DESC", values, query.limit + 1),
        )
        for number, body, size, *_ in rows:
            yield Found((number,), v1.AuditEntry.FromString(body), size)

    def forget_audit(self, before: int, limit: int) -> int:
        """Drops at most `limit` entries made before that time, and returns how many it dropped."""
        return self._sql.do(
            "DELETE FROM audit WHERE number IN (SELECT number FROM audit WHERE create_time < $1 LIMIT $2)",
            *(before, limit),
        )

    def tenant(self, tenant: str) -> v1.Tenant | None:
        row = self._sql.one("SELECT body FROM tenants WHERE tenant = $1", tenant)
        return v1.Tenant.FromString(row[0]) if row else None

    def put_tenant(self, tenant: str, row: v1.Tenant) -> None:
        self._sql.put("tenants", {"tenant": tenant}, {"body": row.SerializeToString()})

    def delete_tenant(self, tenant: str) -> None:
        self._sql.remove("DELETE FROM tenants WHERE tenant = $1", tenant)

    def tenants(self, query: Query) -> Iterator[Found[v1.Tenant]]:
        after = str(query.after[0]).removeprefix("tenants/") if query.after else ""
        rows = self._sql.page(
            "SELECT tenant, body, length(body) AS size FROM tenants WHERE tenant > $1",
            *("tenant", (after,), query.limit + 1),
        )
        for _, body, size, *_ in rows:
            row = v1.Tenant.FromString(body)
            yield Found((row.name,), row, size)

    def has_data(self, tenant: str) -> bool:
        """Whether the tenant has a session, a state, an agent, a blob or an upload."""
        return any(self._sql.one(f"SELECT 1 FROM {table} WHERE tenant = $1 LIMIT 1", tenant) for table in DATA_TABLES)

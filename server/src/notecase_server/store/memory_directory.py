"""Keys, principals, tenants and their audit in memory."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping

from notecase import v1

from notecase_server.store.contract import AUDIT_COLUMNS, KeyRow, Query
from notecase_server.store.lists import Found, matches
from notecase_server.store.memory_rows import TenantRows
from notecase_server.store.steps import copied


class MemoryDirectory:
    """tables.Directory in memory."""

    def __init__(self, tenants: Mapping[str, TenantRows]) -> None:
        self._tenants = tenants
        self._keys: dict[str, KeyRow] = {}
        self._keyed = False
        self._last_audit = 0
        self._known: dict[str, bytes] = {}
        """Tenants by id, where there is a row."""

    def key(self, key_id: str) -> KeyRow | None:
        row = self._keys.get(key_id)
        return row._replace(key=copied(row.key)) if row else None

    def put_key(self, row: KeyRow) -> None:
        self._keys[row.key_id] = row._replace(key=copied(row.key))
        self._keyed = True

    def delete_key(self, key_id: str) -> None:
        del self._keys[key_id]

    def keys(self, tenant: str, query: Query) -> Iterator[Found[v1.Key]]:
        mine = ((row.key.create_time.ToMicroseconds(), row.key) for row in self._keys.values() if row.tenant == tenant)
        for create_time, key in sorted(mine, key=lambda row: (row[0], row[1].name), reverse=True):
            if query.after is None or (create_time, key.name) < query.after:
                yield Found((create_time, key.name), copied(key), key.ByteSize())

    def count_keys(self, tenant: str) -> int:
        return sum(row.tenant == tenant for row in self._keys.values())

    def is_keyed(self) -> bool:
        return self._keyed

    def principal(self, tenant: str, name: str) -> v1.Principal | None:
        body = self._tenants[tenant].principals.get(name)
        return v1.Principal.FromString(body) if body is not None else None

    def principal_like(self, tenant: str, principal: v1.Principal) -> v1.Principal | None:
        return next((row for row in self._principals(tenant) if _who(row) == _who(principal)), None)

    def add_principal(self, tenant: str, principal: v1.Principal) -> None:
        self._tenants[tenant].principals[principal.name] = principal.SerializeToString()

    def delete_principals(self, tenant: str, user: str, limit: int) -> bool:
        bound = [row.name for row in self._principals(tenant) if row.user == user][:limit]
        for name in bound:
            del self._tenants[tenant].principals[name]
        return bool(bound)

    def _principals(self, tenant: str) -> Iterator[v1.Principal]:
        return map(v1.Principal.FromString, self._tenants[tenant].principals.values())

    def add_audit(self, tenant: str, entry: v1.AuditEntry) -> None:
        self._last_audit += 1
        self._tenants[tenant].audit.append((self._last_audit, copied(entry)))

    def audit(self, tenant: str, query: Query) -> Iterator[Found[v1.AuditEntry]]:
        for number, entry in reversed(self._tenants[tenant].audit):
            behind = query.after is None or (number,) < query.after
            if behind and matches(query.where, entry, AUDIT_COLUMNS):
                yield Found((number,), copied(entry), entry.ByteSize())

    def forget_audit(self, before: int, limit: int) -> int:
        forgotten = 0
        for rows in self._tenants.values():
            old = bisect_left(rows.audit, before, key=lambda row: row[1].create_time.ToMicroseconds())
            gone = min(old, limit - forgotten)
            del rows.audit[:gone]
            forgotten += gone
        return forgotten

    def tenant(self, tenant: str) -> v1.Tenant | None:
        body = self._known.get(tenant)
        return None if body is None else v1.Tenant.FromString(body)

    def put_tenant(self, tenant: str, row: v1.Tenant) -> None:
        self._known[tenant] = row.SerializeToString()

    def delete_tenant(self, tenant: str) -> None:
        self._known.pop(tenant, None)

    def tenants(self, query: Query) -> Iterator[Found[v1.Tenant]]:
        for tenant in sorted(self._known):
            row = v1.Tenant.FromString(self._known[tenant])
            if query.after is None or (row.name,) > query.after:
                yield Found((row.name,), row, len(self._known[tenant]))

    def has_data(self, tenant: str) -> bool:
        rows = self._tenants[tenant]
        return bool(rows.sessions or rows.states or rows.agents or rows.blobs or rows.uploads)

    def erase_keys(self, tenant: str) -> bool:
        """Removes all keys of a tenant; returns whether there were any."""
        mine = [key_id for key_id, row in self._keys.items() if row.tenant == tenant]
        for key_id in mine:
            del self._keys[key_id]
        return bool(mine)


def _who(principal: v1.Principal) -> tuple[str, str, int]:
    return principal.user, principal.subject, principal.role

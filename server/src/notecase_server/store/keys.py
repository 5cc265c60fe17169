"""Steps on the keys of callers."""

from copy import deepcopy

from notecase import v1

from notecase_server import errors, names
from notecase_server.store.contract import MAX_KEYS, KeyRow, Once
from notecase_server.store.sql.tables import Tables
from notecase_server.store.steps import recall, remember
from notecase_server.store.tenants import known_tenant


def add_key(tables: Tables, now: int, row: KeyRow, once: Once | None) -> v1.Key:
    """Store.add_key."""
    recall(tables, once)
    if tables.directory.count_keys(row.tenant) >= MAX_KEYS:
        raise errors.quota_exceeded("key", MAX_KEYS, "in a tenant")
    if row.tenant and known_tenant(tables, now, row.tenant).state == v1.Tenant.STATE_DELETING:
        raise errors.not_found("tenant", names.tenant(row.tenant))
    made = deepcopy(row.key)
    made.name = names.key(row.key_id)
    made.create_time.FromMicroseconds(now)
    remember(tables, once, made, now)
    tables.directory.put_key(row._replace(key=made))
    return made


def rotate_key(
    tables: Tables, now: int, tenant: str, key_id: str, digest: bytes, overlap: int, once: Once | None
) -> v1.Key:
    """Store.rotate_key."""
    recall(tables, once)
    row = _existing(tables, tenant, key_id)
    row.key.rotate_time.FromMicroseconds(now)
    row.key.overlap_end_time.FromMicroseconds(now + overlap)
    remember(tables, once, row.key, now)
    tables.directory.put_key(row._replace(digest=digest, former=row.digest))
    return row.key


def delete_key(tables: Tables, now: int, tenant: str, key_id: str, once: Once | None) -> None:
    """Store.delete_key."""
    recall(tables, once)
    _existing(tables, tenant, key_id)
    remember(tables, once, None, now)
    tables.directory.delete_key(key_id)


def _existing(tables: Tables, tenant: str, key_id: str) -> KeyRow:
    row = tables.directory.key(key_id)
    if row is None or row.tenant != tenant:
        raise errors.not_found("key", names.key(key_id))
    return row

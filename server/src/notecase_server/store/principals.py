"""Steps on principals."""

from notecase import v1

from notecase_server.store.sql_tables import Tables
from notecase_server.store.steps import copied


def know(tables: Tables, now: int, tenant: str, principal: v1.Principal) -> v1.Principal:
    """Store.know_principal."""
    known = tables.directory.principal_like(tenant, principal)
    if known is None:
        known = copied(principal)
        known.create_time.FromMicroseconds(now)
        tables.directory.add_principal(tenant, known)
    return known

"""Steps on principals."""

from copy import deepcopy

from notecase import v1

from notecase_server.store.sql.tables import Tables


def know(tables: Tables, now: int, tenant: str, principal: v1.Principal) -> v1.Principal:
    """Store.know_principal."""
    known = tables.directory.principal_like(tenant, principal)
    if known is None:
        known = deepcopy(principal)
        known.create_time.FromMicroseconds(now)
        tables.directory.add_principal(tenant, known)
    return known

"""Steps on tenants."""

from notecase import v1

from notecase_server import errors, names
from notecase_server.store.contract import Once, Query
from notecase_server.store.lists import take
from notecase_server.store.sql.tables import Tables
from notecase_server.store.steps import SWEEP_BYTES, SWEEP_ROWS, recall, remember
from notecase_server.store.tables import Batch

SUSPENDED, DELETING = v1.Tenant.STATE_SUSPENDED, v1.Tenant.STATE_DELETING


def create_tenant(tables: Tables, now: int, tenant: str, display_name: str, once: Once | None) -> v1.Tenant:
    """Store.create_tenant."""
    recall(tables, once)
    if tables.directory.tenant(tenant) is not None:
        raise errors.already_exists("tenant", names.tenant(tenant))
    made = _known(tables, now, tenant, display_name)
    remember(tables, once, made, now)
    return made


def known_tenant(tables: Tables, now: int, tenant: str) -> v1.Tenant:
    """Returns a tenant, which is made known if it was not."""
    return tables.directory.tenant(tenant) or _known(tables, now, tenant, "")


def _known(tables: Tables, now: int, tenant: str, display_name: str) -> v1.Tenant:
    made = v1.Tenant(name=names.tenant(tenant), display_name=display_name, state=v1.Tenant.STATE_ACTIVE)
    made.create_time.FromMicroseconds(now)
    tables.directory.put_tenant(tenant, made)
    return made


def set_tenant_state(
    tables: Tables, now: int, tenant: str, state: v1.Tenant.State.ValueType, once: Once | None
) -> v1.Tenant:
    """Store.set_tenant_state."""
    recall(tables, once)
    row = tables.directory.tenant(tenant)
    if row is None and state == SUSPENDED and tables.directory.has_data(tenant):
        row = _known(tables, now, tenant, "")
    if row is None:
        raise errors.not_found("tenant", names.tenant(tenant))
    if row.state not in {state, DELETING}:
        row.state = state
        tables.directory.put_tenant(tenant, row)
    remember(tables, once, row, now)
    return row


def erase_tenant(tables: Tables, now: int, tenant: str) -> bool:
    """Store.erase_tenant."""
    if take(tables.sessions(tenant, Query(1)), 1).rows or tables.has_deleted_sessions(tenant):
        return False
    batch = Batch(SWEEP_ROWS, SWEEP_BYTES)
    tables.erase_rows(tenant, batch)
    if batch.left < SWEEP_ROWS:
        return False
    tables.directory.delete_tenant(tenant)
    return True

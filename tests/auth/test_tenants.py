"""Which tenants are open, and what the store is asked about that."""

import pytest
from notecase import v1
from notecase_server.auth import tenants as module
from notecase_server.auth.principal import Principal, Role
from notecase_server.auth.tenants import CACHED_SECONDS, Tenants
from notecase_server.store.memory import MemoryStore

from tests.store.build import ManualClock, refused

SUSPENDED = v1.Tenant.STATE_SUSPENDED


class Counting(MemoryStore):
    """Counts how often a tenant is looked up."""

    lookups = 0

    async def get_tenant(self, tenant: str) -> v1.Tenant | None:
        self.lookups += 1
        return await super().get_tenant(tenant)


def caller(tenant: str) -> Principal:
    return Principal(tenant, "somebody", Role.USER)


async def test_a_tenant_is_looked_up_once_in_a_while() -> None:
    """And at once after a change by this server."""
    time, store = [0.0], Counting(ManualClock())
    tenants = Tenants(store, lambda: time[0])
    for _ in range(3):
        await tenants.require_open(caller("acme"))
    assert 1 == store.lookups
    await store.create_tenant("acme", "")
    await store.set_tenant_state("acme", SUSPENDED)
    await tenants.require_open(caller("acme"))
    time[0] = CACHED_SECONDS
    with refused("TENANT_SUSPENDED"):
        await tenants.require_open(caller("acme"))
    await store.set_tenant_state("acme", v1.Tenant.STATE_ACTIVE)
    tenants.changed("acme")
    await tenants.require_open(caller("acme"))
    assert 3 == store.lookups


async def test_an_operator_has_no_tenant_that_could_be_suspended() -> None:
    store = Counting(ManualClock())
    await Tenants(store, lambda: 0.0).require_open(Principal("", "keys/x", Role.OPERATOR))
    assert 0 == store.lookups


async def test_a_tenant_that_is_being_removed_is_not_open() -> None:
    store = Counting(ManualClock())
    await store.create_tenant("acme", "")
    await store.set_tenant_state("acme", v1.Tenant.STATE_DELETING)
    with refused("TENANT_SUSPENDED"):
        await Tenants(store, lambda: 0.0).require_open(caller("acme"))


async def test_tenants_that_are_known_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_TENANTS", 3)
    tenants = Tenants(Counting(ManualClock()), lambda: 0.0)
    for number in range(10):
        await tenants.require_open(caller(f"t{number}"))
        assert len(tenants._known) <= 3

"""Refuses the calls of tenants that an operator has suspended or is deleting."""

from collections.abc import Callable

from notecase import v1

from notecase_server import errors
from notecase_server.auth.principal import Principal
from notecase_server.store.contract import TenantStore

CACHED_TENANTS = 10_000
CACHED_SECONDS = 5.0
"""How many tenants are remembered, and for how long: see `auth/keys`."""

OPEN = frozenset({v1.Tenant.STATE_ACTIVE, v1.Tenant.STATE_UNSPECIFIED})


class Tenants:
    """Knows which tenants are open."""

    def __init__(self, store: TenantStore, monotonic: Callable[[], float]) -> None:
        self._store = store
        self._monotonic = monotonic
        self._known: dict[str, tuple[bool, float]] = {}
        """Whether it is open, and until when that is believed."""
        self._changes = 0

    async def require_open(self, principal: Principal) -> None:
        """Raises NotecaseError TENANT_SUSPENDED, and STORE_UNAVAILABLE if the state of the tenant cannot be read.
        Passes operators, who have no tenant, and callers without a subject, who have no operator above them."""
        if principal.tenant and principal.subject and not await self._is_open(principal.tenant):
            raise errors.tenant_suspended()

    async def _is_open(self, tenant: str) -> bool:
        is_open, until = self._known.get(tenant, (True, 0.0))
        if self._monotonic() < until:
            return is_open
        changes = self._changes
        row = await self._store.get_tenant(tenant)
        is_open = row is None or row.state in OPEN
        if changes == self._changes:  # else the row may be from before the change
            if len(self._known) >= CACHED_TENANTS:
                self._known.clear()
            self._known[tenant] = is_open, self._monotonic() + CACHED_SECONDS
        return is_open

    def changed(self, tenant: str) -> None:
        """Removes a tenant from the cache, so that its change applies at once."""
        self._changes += 1
        self._known.pop(tenant, None)

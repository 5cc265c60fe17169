"""Cancels the runs of suspended tenants, and deletes tenants."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol
from weakref import WeakValueDictionary

import structlog
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.runs import Runs
from notecase_server.engine.sessions import Sessions
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Compare, Or, Query, RunStore, SessionStore, TenantStore

log = structlog.get_logger()

LOOK_SECONDS = 2.0
"""How often the server looks for runs of suspended tenants that a deadline or a start of the server has put to work,
and for interrupted deletions."""

REST_SECONDS = 0.01
"""The pause between two transactions of a deletion, for other writers and for a fork that has begun."""

PAGE = 100

AT_WORK = Or((Compare("state", "=", v1.Run.STATE_RUNNING), Compare("state", "=", v1.Run.STATE_QUEUED)))


class TenancyStore(TenantStore, SessionStore, RunStore, Protocol):
    """Holds tenants and their data."""


class Tenancy:
    """What operators do with whole tenants."""

    def __init__(self, store: TenancyStore, sessions: Sessions, runs: Runs, removed: Callable[[str], None]) -> None:
        """`removed` is called with a tenant that is gone, before its name means another."""
        self._store = store
        self._removed = removed
        self._sessions = sessions
        self._runs = runs
        self._removals: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Held by the task that removes a tenant, by its name."""

    async def keep_looking(self) -> None:
        """Cancels active runs of suspended tenants, without end."""
        await self._keep(v1.Tenant.STATE_SUSPENDED, self.rest)

    async def keep_removing(self) -> None:
        """Continues interrupted deletions, without end. One may take long, and `keep_looking` does not wait for it."""
        await self._keep(v1.Tenant.STATE_DELETING, self.remove)

    async def _keep(self, state: v1.Tenant.State.ValueType, act: Callable[[str], Awaitable[None]]) -> None:
        """Acts on every tenant in a state, again and again. A failure with one tenant is logged, and tried again in its
        turn."""
        while True:
            after: tuple[str | int, ...] | None = None
            while True:
                page = await self._store.list_tenants(Query(PAGE, after))
                for row in page.rows:
                    if row.state != state:
                        continue
                    try:
                        await act(row.name.removeprefix("tenants/"))
                    except NotecaseError as error:
                        log.error("tenant_delayed", tenant=row.name, reason=errors.reason_name(error.reason))
                if (after := page.next) is None:
                    break
            await asyncio.sleep(LOOK_SECONDS)

    async def rest(self, tenant: str) -> None:
        """Cancels every active or queued run of a tenant."""
        stuck = 0
        while rows := (await self._store.list_runs(tenant, None, Query(stuck + 1, where=AT_WORK))).rows[stuck:]:
            name = names.parse_run(rows[0].name)
            assert name is not None
            try:
                key, _ = await self._sessions.find(tenant, name.session)
                await self._runs.commands.cancel(key, name.run, v1.CancelCommand(reason="The tenant is suspended."))
            except NotecaseError as error:
                stuck += 1  # it has just ended, or the next look finds it again
                log.info("run_not_cancelled", run=rows[0].name, reason=errors.reason_name(error.reason))

    async def remove(self, tenant: str) -> None:
        """Removes a tenant that is being deleted, with everything; returns when the last row is gone. Does nothing when
        the name is another tenant's by then, or nobody's."""
        async with self._removals.setdefault(tenant, asyncio.Lock()):
            row = await self._store.get_tenant(tenant)
            if row is None or row.state != v1.Tenant.STATE_DELETING:
                return
            while not await self._store.erase_tenant(tenant):
                while keys := await self._store.session_keys(tenant, "", PAGE):
                    for key in keys:
                        await self._sessions.delete_if_there(key)
                await self._store.sweep_sessions()
                await asyncio.sleep(REST_SECONDS)
            self._removed(tenant)
            log.info("tenant_removed", tenant=tenant)

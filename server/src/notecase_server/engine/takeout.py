"""Reads all data of a tenant, item by item, for its export."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from notecase import v1

from notecase_server import errors, names
from notecase_server.engine import transfer
from notecase_server.engine.content import Contents
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import (
    AgentStore,
    History,
    Page,
    Query,
    Scope,
    SessionKey,
    SessionStore,
    StateStore,
    TenantStore,
)

T = TypeVar("T")

Position = tuple[str | int, ...]

PAGE = 100

PAGE_KEYS = 1000
"""Entries of a state in one record, which has about a mebibyte at most."""

LOST = frozenset(
    {v1.ERROR_REASON_SESSION_NOT_FOUND, v1.ERROR_REASON_BLOB_NOT_FOUND, v1.ERROR_REASON_BLOB_CORRUPT},
)
"""Reasons for which an item is dropped, and the export goes on."""


class Record(NamedTuple):
    """One record of an export."""

    response: v1.ExportTenantResponse
    """Without its page_token."""
    position: Position | None = None
    """Begins an export with this record; None where no export can begin."""


class TakeoutStore(History, SessionStore, StateStore, AgentStore, TenantStore, Protocol):
    """Reads all that a tenant holds."""


class Takeout:
    """Exports tenants. Holds one page of a list and one piece of a file at a time."""

    def __init__(self, store: TakeoutStore, contents: Contents) -> None:
        self._store = store
        self._contents = contents
        self._sections: Mapping[str, Callable[[str, Position], AsyncIterator[Record]]] = {
            "sessions": self._sessions,
            "app": self._app,
            "users": self._users,
            "agents": self._agents,
            "blobs": self._blobs,
        }

    async def records(self, tenant: str, begin: Position = ()) -> AsyncIterator[Record]:
        """Yields the tenant, and then its records in the order that tenant.proto gives: all of them, or those from the
        position `begin` on.

        Raises NotecaseError TENANT_NOT_FOUND when the tenant is not known, is being removed, or was removed
        meanwhile."""
        found = await self._known(tenant)
        yield Record(v1.ExportTenantResponse(tenant=found))
        sections = list(self._sections)
        for name in sections[sections.index(str(begin[0])) if begin else 0 :]:
            async for record in self._sections[name](tenant, begin[1:]):
                yield record._replace(position=None if record.position is None else (name, *record.position))
            begin = ()
        if (await self._known(tenant)).create_time != found.create_time:
            raise errors.not_found("tenant", found.name)

    async def _known(self, tenant: str) -> v1.Tenant:
        found = await self._store.get_tenant(tenant)
        if found is None or found.state == v1.Tenant.STATE_DELETING:
            raise errors.not_found("tenant", names.tenant(tenant))
        return found

    async def _sessions(self, tenant: str, after: Position) -> AsyncIterator[Record]:
        rows = _rows(
            partial(self._store.list_sessions, tenant),
            lambda row: (row.create_time.ToMicroseconds(), row.uid),
            after,
        )
        async for position, row in rows:
            key = SessionKey(tenant, row.name, row.uid)
            yield Record(v1.ExportTenantResponse(session=names.render_session(row)), position)
            async for record in _pieces(row.name, transfer.exported(self._store, key, end_runs=True)):
                yield record

    async def _app(self, tenant: str, after: Position) -> AsyncIterator[Record]:
        async for record in self._state(Scope(tenant, "app", ""), after):
            yield record

    async def _users(self, tenant: str, after: Position) -> AsyncIterator[Record]:
        rows = _rows(partial(self._store.list_user_states, tenant), lambda user: (user,), after)
        async for position, user in rows:
            async for record in self._state(Scope(tenant, "user", user), position):
                yield record

    async def _state(self, scope: Scope, position: Position | None) -> AsyncIterator[Record]:
        query = Query(PAGE_KEYS)
        while True:
            state, page = await self._store.list_state(scope, query)
            if page.rows:
                state.name = names.state(scope)
                yield Record(v1.ExportTenantResponse(state=state), position)
                position = None
            if page.next is None:
                return
            query = query._replace(after=page.next)

    async def _agents(self, tenant: str, after: Position) -> AsyncIterator[Record]:
        agents = _rows(partial(self._store.list_agents, tenant), lambda row: (_id(row.name),), after)
        async for position, newest in agents:
            revisions = _rows(
                partial(self._store.list_agent_revisions, tenant, _id(newest.name)), lambda row: (row.revision,), ()
            )
            async for later, revision in revisions:
                yield Record(v1.ExportTenantResponse(agent=revision), None if later else position)

    async def _blobs(self, tenant: str, after: Position) -> AsyncIterator[Record]:
        rows = _rows(partial(self._store.list_blobs, tenant), lambda row: (_id(row.name),), after)
        async for position, row in rows:
            yield Record(v1.ExportTenantResponse(blob=row), position)
            content = self._contents.download(tenant, _id(row.name))
            async for record in _pieces(row.name, (piece.chunk async for piece in content)):
                yield record


def _id(name: str) -> str:
    return name.partition("/")[2]


async def _rows(
    read: Callable[[Query], Awaitable[Page[T]]], position: Callable[[T], Position], after: Position
) -> AsyncIterator[tuple[Position, T]]:
    """Yields the rows of a list after a position in it, empty for all. Each comes with the position that follows it."""
    more: Position | None = after
    while more is not None:
        page = await read(Query(PAGE, more or None))
        for row in page.rows:
            yield after, row
            after = position(row)
        more = page.next


async def _pieces(name: str, pieces: AsyncIterator[bytes]) -> AsyncIterator[Record]:
    """Yields what belongs to the item of that name, and that it was dropped when it cannot be read to its end."""
    try:
        async for piece in pieces:
            yield Record(v1.ExportTenantResponse(chunk=piece))
    except NotecaseError as error:
        if error.reason not in LOST:
            raise
        yield Record(v1.ExportTenantResponse(dropped=name))

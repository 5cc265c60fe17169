"""A deleted session is gone at once and permanently, whatever happens to the server while its rows are deleted."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from notecase import v1
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store import steps
from notecase_server.store.contract import SessionKey, Store

from tests.e2e.driving import reason_of
from tests.store.build import create
from tests.store.test_identity import fill
from tests.support.crashing import Crashing
from tests.support.failing import Failing, Fault, Mode
from tests.support.inside import rows_with
from tests.support.server import Running, running

KEYS = [SessionKey("default", f"case{number}", f"0000000{number}-dead-4000-8000-000000000000") for number in range(2)]
ERASE = v1.EraseUserRequest(name="users/ada", request_id="erase")


class Swept:
    """A store that tells when all rows of deleted sessions were removed, by whomever."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.done = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def sweep_sessions(self, tenant: str | None = None, user: str = "") -> None:
        await self._store.sweep_sessions(tenant, user)
        self.done.set()


async def require_nothing(served: Running) -> None:
    """Nothing of the sessions is to be seen by any name or in any list."""
    for key in KEYS:
        name = f"sessions/{key.session}"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.sessions.GetSession(v1.GetSessionRequest(name=name))
        assert "SESSION_NOT_FOUND" == reason_of(refused.value)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.WatchEvents(v1.WatchEventsRequest(name=name)).read()
        assert "SESSION_NOT_FOUND" == reason_of(refused.value)
    assert [] == list((await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions)
    assert [] == list((await served.runs.ListRuns(v1.ListRunsRequest(parent="sessions/-"))).runs)


async def rows_of_all(store: Any) -> set[str]:
    return set().union(*[await rows_with(store, key.uid) for key in KEYS])


@pytest.mark.parametrize("after", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("way", ["delete", "expire", "erase"])
async def test_a_server_killed_in_a_deletion_goes_on_with_it_at_its_next_start(
    tmp_path: Path, way: str, after: int
) -> None:
    """Killed after each transaction in turn. What was deleted by then is never seen again, and in the end no row is
    left."""
    path = f"sqlite:{tmp_path / 'notecase.db'}"
    store = await open_store(path, now)
    await fill(store, KEYS[0])
    if way == "erase":
        await create(store, KEYS[1])
    await store.close()
    async with (
        await Crashing.launch(tmp_path, "--deletions", str(after), env={}) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        sessions = v1.SessionServiceStub(channel)
        name = f"sessions/{KEYS[0].session}"
        with suppress(grpc.aio.AioRpcError):
            if way == "erase":
                await sessions.EraseUser(ERASE)
            elif way == "delete":
                await sessions.DeleteSession(v1.DeleteSessionRequest(name=name))
            else:
                session = v1.Session(name=name)
                session.expire_time.FromMicroseconds(now() - 1)
                await sessions.UpdateSession(v1.UpdateSessionRequest(session=session))
        await server.death()
    store = await open_store(path, now)
    assert await rows_of_all(store)
    swept = Swept(store)
    async with running(cast(Store, swept)) as served:
        if way == "erase":
            erased = await served.sessions.EraseUser(ERASE)
            assert erased.sessions_deleted == max(0, 2 - after)
        else:
            await require_nothing(served)
            await swept.done.wait()
        assert await rows_of_all(store) <= {"requests"}
        await require_nothing(served)
        if way == "erase":
            assert erased == await served.sessions.EraseUser(ERASE)


@pytest.mark.parametrize("deleted", [1, 2])
async def test_an_erasure_is_answered_when_the_last_row_is_gone(
    store_url: str, deleted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Including those of sessions that were deleted before, even when no session is left."""
    monkeypatch.setattr(steps, "SWEEP_ROWS", 2)
    store = await open_store(store_url, now)
    await fill(store, KEYS[0])
    await create(store, KEYS[1])
    sweep = store.sweep_sessions

    async def only_of_users(tenant: str | None = None, user: str = "") -> None:
        if user:
            await sweep(tenant, user)

    monkeypatch.setattr(store, "sweep_sessions", only_of_users)
    async with running(store) as served:
        for key in KEYS[:deleted]:
            await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=f"sessions/{key.session}"))
        assert await rows_of_all(store)
        assert 2 - deleted == (await served.sessions.EraseUser(ERASE)).sessions_deleted
        assert await rows_of_all(store) == set()
        await require_nothing(served)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(method, mode)
        for method in ("delete_session", "sweep_sessions", "erase_state", "session_keys", "expired_sessions")
        for mode in (Mode.PASSING, Mode.AFTER)
    ],
    ids=str,
)
async def test_a_store_that_fails_once_leaves_no_row_in_the_end(store_url: str, fault: Fault) -> None:
    """Callers that were refused try again; the sweeper does so by itself."""
    store = await open_store(store_url, now)
    await fill(store, KEYS[0])
    await create(store, KEYS[1])
    failing = Failing(store, *fault)
    swept = Swept(failing.store)
    async with running(cast(Store, swept)) as served:
        delete = v1.DeleteSessionRequest(name=f"sessions/{KEYS[1].session}", request_id="delete")
        for _ in range(2):
            with suppress(grpc.aio.AioRpcError):
                await served.sessions.DeleteSession(delete)
        for _ in range(2):
            with suppress(grpc.aio.AioRpcError):
                await served.sessions.EraseUser(ERASE)
        await failing.failed.wait()
        swept.done.clear()
        await swept.done.wait()
        assert await rows_of_all(store) <= {"requests"}
        await require_nothing(served)
        await served.sessions.EraseUser(ERASE)  # raises nothing: it was done

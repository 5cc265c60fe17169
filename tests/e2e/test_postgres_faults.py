"""A failure of the database while a server works is one typed error; the server waits, and works again afterwards."""

import asyncio
import base64
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
import grpc
import pytest
from notecase import from_value, v1
from notecase_server.errors import NotecaseError, reason_name
from notecase_server.serve import now
from notecase_server.store.contract import Commit, Committed
from notecase_server.store.postgres.store import PostgresStore

from tests.e2e.driving import log_of, reason_of, said
from tests.store.build import KEY, create, increment
from tests.store.build import said as said_by
from tests.support import postgres
from tests.support.openai_server import OpenAIServer, reply
from tests.support.postgres_proxy import PostgresProxy
from tests.support.server import Running, running
from tests.support.small_disk import small_disk, small_log


@dataclass
class Place:
    """A separate database, and a user for the server in it, who is not a superuser."""

    admin: Any
    name: str
    url: str

    async def alter(self, what: str) -> None:
        """Changes the user, and ends its connections, so that the next ones have it."""
        await self.admin.execute(f"ALTER ROLE {self.name} {what}")
        await self.end()

    async def end(self) -> None:
        await self.admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = $1", self.name
        )


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    url = await postgres.shared().new_database()
    admin = await asyncpg.connect(url)
    name = "app_" + url.partition("?")[0].rpartition("/")[2]
    await admin.execute(f"CREATE ROLE {name} LOGIN")
    await admin.execute(f"CREATE DATABASE {name} OWNER {name} TEMPLATE template0")
    folder = url.partition("?host=")[2]
    await admin.close()
    admin = await asyncpg.connect(f"postgresql://postgres@/{name}?host={folder}")
    found = Place(admin, name, f"postgresql://{name}@/{name}?host={folder}")
    yield found
    await found.admin.close()


Fault = Callable[[Place], Any]


@asynccontextmanager
async def _role(place: Place, wrong: str, right: str) -> AsyncIterator[None]:
    await place.alter(wrong)
    yield
    await place.alter(right)


def role(wrong: str, right: str) -> Fault:
    return lambda place: _role(place, wrong, right)


@asynccontextmanager
async def restarted(place: Place) -> AsyncIterator[None]:
    """The database ends all connections and stops, and is started again."""
    await asyncio.to_thread(postgres.shared().stop, "fast")
    yield
    await asyncio.to_thread(postgres.shared().start)
    place.admin = await asyncpg.connect(place.url)


@asynccontextmanager
async def timed_out(place: Place) -> AsyncIterator[None]:
    """The operator's time-out ends statements that wait for a lock of another connection."""
    await place.alter("SET statement_timeout = '50ms'")
    async with place.admin.transaction():
        await place.admin.execute("LOCK TABLE sessions, entries, states IN EXCLUSIVE MODE")
        yield
    await place.alter("RESET statement_timeout")


@asynccontextmanager
async def renamed(place: Place) -> AsyncIterator[None]:
    """A table is missing, as during a restore."""
    await place.admin.execute("ALTER TABLE sessions RENAME TO elsewhere")
    yield
    await place.admin.execute("ALTER TABLE elsewhere RENAME TO sessions")


@asynccontextmanager
async def gone(place: Place) -> AsyncIterator[None]:
    """There is no database of that name, and then it is there again."""
    await place.admin.close()
    elsewhere = await asyncpg.connect(postgres.shared().url())
    await elsewhere.execute(f"ALTER DATABASE {place.name} ALLOW_CONNECTIONS false")
    await elsewhere.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", place.name
    )
    await elsewhere.execute(f"ALTER DATABASE {place.name} RENAME TO {place.name}_gone")
    yield
    await elsewhere.execute(f"ALTER DATABASE {place.name}_gone RENAME TO {place.name}")
    await elsewhere.execute(f"ALTER DATABASE {place.name} ALLOW_CONNECTIONS true")
    await elsewhere.close()
    place.admin = await asyncpg.connect(place.url)


FAULTS: dict[str, Fault] = {
    "read-only": role("SET default_transaction_read_only = on", "RESET default_transaction_read_only"),
    "too many connections": role("CONNECTION LIMIT 0", "CONNECTION LIMIT -1"),
    "no login": role("NOLOGIN", "LOGIN"),
    "time-out": timed_out,
    "no table": renamed,
    "no database": gone,
    "restarted": restarted,
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_run_waits_until_a_fault_of_the_database_ends(fault: str, place: Place, model: OpenAIServer) -> None:
    """A write is STORE_UNAVAILABLE. A run whose reply comes meanwhile is neither lost nor failed, its model is asked
    once, and the write is made once when it is repeated."""
    held = asyncio.Event()
    model.script(reply("All of it is here.", chunks=4).held(held, after=3))
    async with served(place.url, model) as server:
        await server.runs.CreateRun(
            v1.CreateRunRequest(start=v1.StartRun(session="sessions/s", run_id="r", messages=[said("Go")]))
        )
        await model.request(0)
        add = v1.UpdateStateRequest(name="sessions/s/state", request_id="once", ops=[increment("n", 1)])
        async with FAULTS[fault](place):
            held.set()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await server.state.UpdateState(add, timeout=120)
            assert "STORE_UNAVAILABLE" == reason_of(refused.value)
        state = await _patiently(lambda: server.state.UpdateState(add, timeout=120))
        assert 1 == from_value(state.entries["n"].value)
        run = await server.runs.WaitRun(v1.WaitRunRequest(name="sessions/s/runs/r"))
        assert (v1.Run.STATE_SUCCEEDED, 1) == (run.state, run.attempt)
        assert 1 == len(model.requests)
        log = await log_of(server, "sessions/s")
        assert 1 == sum(event.run_state_changed.state == v1.Run.STATE_SUCCEEDED for event in log)
        assert [event.sequence for event in log] == list(range(1, len(log) + 1))


@pytest.mark.parametrize("seed", [1, 2])
async def test_connections_that_are_cut_at_random_lose_nothing_and_do_nothing_twice(
    seed: int, place: Place, model: OpenAIServer
) -> None:
    """Before a statement has reached the database, or when it has: no run that succeeded is reported as FAILED."""
    chance, cuts = random.Random(seed), 0
    async with PostgresProxy(place.url) as proxy:
        url = proxy.url.replace("postgres@", f"{place.name}@")
        async with served(url, model) as server:
            left = chance.randrange(10, 40)

            def cut(kind: str, body: bytes) -> None:
                nonlocal left, cuts
                left -= kind in {"Q", "S"}
                if left == 0:
                    left, cuts = chance.randrange(10, 40), cuts + 1
                    if chance.random() < 0.5:
                        proxy.cut()
                    else:
                        asyncio.get_running_loop().call_soon(proxy.cut)

            proxy.asked = cut
            for number in range(6):
                for name in ("sessions/s/state", "users/ada/state"):
                    add = v1.UpdateStateRequest(name=name, request_id=f"{name} {number}", ops=[increment("n", 1)])
                    await _patiently(partial(server.state.UpdateState, add))
            for number in range(2):
                model.script(reply("All of it is here."))
                start = v1.StartRun(session="sessions/s", run_id=f"r{number}", messages=[said("Go")])
                await _patiently(partial(server.runs.CreateRun, v1.CreateRunRequest(start=start)))
                name = f"sessions/s/runs/r{number}"
                run = await _patiently(partial(server.runs.WaitRun, v1.WaitRunRequest(name=name)))
                assert v1.Run.STATE_SUCCEEDED == run.state, run
            proxy.asked = lambda kind, body: None
            for name in ("sessions/s/state", "users/ada/state"):
                state = await _patiently(partial(server.state.GetState, v1.GetStateRequest(name=name)))
                assert 6 == from_value(state.entries["n"].value)
            log = await log_of(server, "sessions/s")
            ends = [event.run for event in log if event.run_state_changed.state == v1.Run.STATE_SUCCEEDED]
            assert ["sessions/s/runs/r0", "sessions/s/runs/r1"] == ends
            assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    assert cuts >= 3


async def test_a_full_disk_is_logged_and_the_run_waits_until_there_is_room(
    model: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller's write is refused, and a run's commit is tried again. Each is made once when there is room, and the
    model is not asked again."""
    long = base64.b64encode(random.Random(0).randbytes(200_000)).decode()
    attempt, hit = PostgresStore._attempt, asyncio.Event()

    async def watched(store: PostgresStore, commit: Commit, alone: bool) -> Committed:
        try:
            return await attempt(store, commit, alone)
        except asyncpg.DiskFullError:
            hit.set()
            raise

    monkeypatch.setattr(PostgresStore, "_attempt", watched)
    held = asyncio.Event()
    model.script(reply(long, chunks=4).held(held, after=3))
    async with small_disk(postgres.shared()) as disk, served(disk.url, model) as server:
        await server.sessions.CreateSession(v1.CreateSessionRequest(session_id="other"))
        start = v1.StartRun(session="sessions/s", run_id="r", messages=[said("Go")])
        await server.runs.CreateRun(v1.CreateRunRequest(start=start))
        await model.request(0)
        await disk.fill()
        append = v1.AppendMessagesRequest(parent="sessions/other", request_id="once", messages=[said(long)])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.messages.AppendMessages(append)
        assert "STORE_UNAVAILABLE" == reason_of(refused.value)
        assert "The disk of the store is full" in (refused.value.details() or "")
        hit.clear()
        held.set()
        await hit.wait()
        await disk.free()
        await _patiently(lambda: server.messages.AppendMessages(append))
        run = await server.runs.WaitRun(v1.WaitRunRequest(name="sessions/s/runs/r"))
        assert (v1.Run.STATE_SUCCEEDED, 1, 1) == (run.state, run.attempt, len(model.requests))
        assert 1 == len(await log_of(server, "sessions/other"))
        log = await log_of(server, "sessions/s")
        assert 1 == sum(event.run_state_changed.state == v1.Run.STATE_SUCCEEDED for event in log)
        assert [event.sequence for event in log] == list(range(1, len(log) + 1))


async def test_a_full_write_ahead_log_loses_no_commit_and_makes_none_twice() -> None:
    """PostgreSQL ends without an answer and starts again: the server looks up the outcome of the last commit."""
    with small_log() as log:
        store = await PostgresStore.open(await log.server.new_database(), now)
        await create(store)
        made = 0
        while True:
            text = base64.b64encode(random.Random(made).randbytes(500_000)).decode()
            last = Commit(key=KEY, id=f"c{made}", events=[said_by(f"m{made}", text)])
            try:
                await store.commit(last)
            except NotecaseError as error:
                assert "STORE_UNAVAILABLE" == reason_name(error.reason)
                break
            made += 1
            if made == 3:
                await asyncio.to_thread(log.break_off)
        await asyncio.to_thread(log.free)
        found = await _patiently(partial(store.find_commit, KEY, last.id))
        if found is None:
            await store.commit(last)
        assert log.was_full
        session = await store.get_session(KEY)
        assert session is not None
        assert made + 1 == session.last_sequence
        assert not store.fenced.is_set()
        await store.close()


@asynccontextmanager
async def served(url: str, model: OpenAIServer) -> AsyncIterator[Running]:
    """A server with an agent and a session of users/ada."""
    from notecase_server.models.openai import OpenAIProvider

    provider = OpenAIProvider("key", model.url, "m")
    async with running(url, {"openai": provider}) as server:
        agent = v1.Agent(llm=v1.LlmAgent(model="m"))
        await server.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=agent))
        case = v1.Session(agent="agents/a", user="users/ada")
        await server.sessions.CreateSession(v1.CreateSessionRequest(session_id="s", session=case))
        yield server


async def _patiently(call: Callable[[], Awaitable[Any]]) -> Any:
    """Makes a call again for as long as the store cannot be used."""
    while True:
        try:
            return await call()
        except (grpc.aio.AioRpcError, NotecaseError) as error:
            reason = reason_name(error.reason) if isinstance(error, NotecaseError) else reason_of(error)
            if reason != "STORE_UNAVAILABLE":
                raise
        await asyncio.sleep(0.02)

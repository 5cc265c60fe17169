"""SQLite: what is done to many sessions, runs or records at once is done in small transactions, and writes with a
waiting caller come between them."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from notecase import v1
from notecase_server.engine.sessions import Sessions
from notecase_server.store import content, steps
from notecase_server.store.contract import Answer, Commit, RunRecord
from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite.store import SqliteStore

from tests.store.build import (
    KEY,
    ManualClock,
    add,
    changed,
    create,
    once,
    put,
    said,
    session_key,
    started,
)
from tests.support.written import written

MANY = 1000
MINUTE = 60 * 1_000_000
ROWS = 3 * steps.SWEEP_ROWS + 2 * steps.SWEEP_SESSIONS
"""A message has two lookups, and each of SWEEP_SESSIONS is recorded in two more rows."""


@pytest.fixture
async def store(tmp_path: Path, clock: ManualClock) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "store.db", clock)
    opened._connections.writer.execute("PRAGMA synchronous = OFF")  # thousands of transactions are only counted
    yield opened
    await opened.close()


async def fill(store: SqliteStore) -> None:
    """MANY sessions of users/ada that expire in a minute, some of them large."""
    session = v1.Session(user="users/ada")
    session.ttl.seconds = 60
    keys = [session_key("acme", f"s{number}") for number in range(MANY)]
    await asyncio.gather(
        *(
            store.commit(
                Commit(
                    key=key,
                    create=session,
                    events=[said(f"m{each}", "x" * (number % 10 * 1000)) for each in range(5)] + [changed(put("k", 1))],
                    once=once(f"create {number}"),
                )
            )
            for number, key in enumerate(keys)
        )
    )


@pytest.mark.parametrize("way", ["expiry", "erasure"])
async def test_many_sessions_go_in_small_transactions(store: SqliteStore, clock: ManualClock, way: str) -> None:
    """At their expiry, and with their user."""
    await fill(store)
    ids = itertools.count()
    sessions = Sessions(store, lambda: f"id-{next(ids)}", lambda: f"uid-{next(ids)}")
    seen = await written(store)
    if way == "expiry":
        clock.now += 2 * MINUTE
        assert MANY == await sessions.expire(clock.now)
        await store.sweep_sessions()
    else:
        assert MANY == await sessions.erase_user("acme", "users/ada", once("erase", Answer("erased")))
    assert 5 * MANY < sum(each.tables.get("logs", 0) for each in seen)
    assert 20 << 20 < sum(each.size for each in seen)
    assert ROWS >= max(each.rows for each in seen)
    assert steps.SWEEP_BYTES + 100 * steps.SWEEP_ROWS > max(each.size for each in seen)
    assert {1} == {each.steps for each in seen}


async def test_an_agent_goes_in_small_transactions_however_many_runs_and_revisions(store: SqliteStore) -> None:
    """Its runs need the first revision, and other agents' runs are only passed over."""
    agent = await store.create_agent("acme", "clerk", v1.Agent(llm=v1.LlmAgent(instruction="x" * 10_000)))
    other = await store.create_agent("acme", "other", v1.Agent())
    many = 2 * steps.SWEEP_ROWS
    for number in range(many):
        by = other if number % 3 else agent
        key = session_key("acme", f"s{number}")
        begun, record = started("r", agent=by.name), RunRecord(b"d", by)
        await store.commit(Commit(key=key, create=v1.Session(), events=[begun], claim=True, start=record))
    for number in range(1, 300):
        large = v1.Agent(display_name=str(number), llm=v1.LlmAgent(instruction="x" * 10_000))
        await store.edit_agent("acme", "clerk", large, number)
    seen = await written(store)
    await store.delete_agent("acme", "clerk")
    assert [{"agents": 1, "deleted_agents": 1}] == [each.tables for each in seen]
    await store.sweep_agents()
    assert many == len(await store.active_runs())
    assert 300 == sum(each.tables.get("revisions", 0) for each in seen)
    assert steps.SWEEP_ROWS + 2 >= max(each.rows for each in seen)
    assert steps.SWEEP_BYTES >= max(each.size for each in seen[1:] if "runs" not in each.tables)
    assert steps.SWEEP_ROWS >= max(each.tables.get("runs", 0) for each in seen)


async def _steps_of_a_deletion(path: Path, clock: ManualClock, runs: int) -> tuple[int, int]:
    """How many steps SQLite's machine takes for the deletion of an agent, and at most for a transaction of the sweep
    behind it, where the tenant has so many runs of another agent that have not ended."""
    store = await SqliteStore.open(path, clock)
    await store.create_agent("acme", "clerk", v1.Agent())
    other = await store.create_agent("acme", "other", v1.Agent())
    for number in range(runs):
        key = session_key("acme", f"s{number}")
        begun, record = started("r", agent=other.name), RunRecord(b"d", other)
        await store.commit(Commit(key=key, create=v1.Session(), events=[begun], claim=True, start=record))
    counts, together = list[int](), store._writer._together

    def step() -> int:
        counts[-1] += 1
        return 0

    def counting(jobs: Any) -> Any:
        counts.append(0)
        return together(jobs)

    store._writer._together = counting  # type: ignore[method-assign, assignment]
    store._connections.writer.set_progress_handler(step, 1)
    await store.delete_agent("acme", "clerk")
    (deletion,) = counts
    await store.sweep_agents()
    await store.close()
    return deletion, max(counts[1:])


async def test_the_deletion_of_an_agent_does_not_look_at_other_agents_runs(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SWEEP_ROWS", 10)
    few = await _steps_of_a_deletion(tmp_path / "few.db", clock, 20)
    many = await _steps_of_a_deletion(tmp_path / "many.db", clock, 200)
    assert few[0] == many[0]
    assert many[1] <= few[1] * 1.1


async def test_large_records_of_requests_are_forgotten_in_small_transactions(
    store: SqliteStore, clock: ManualClock
) -> None:
    for number in range(20):
        agent = v1.Agent(llm=v1.LlmAgent(instruction="x" * 200_000))
        await store.create_agent("acme", f"a{number}", agent, once(f"r{number}", Answer("agent")))
    seen = await written(store)
    assert 20 == await store.forget_requests(clock.now + 1)
    assert [5, 5, 5, 5] == [each.tables["requests"] for each in seen]


async def test_a_tenant_goes_in_small_transactions(store: SqliteStore) -> None:
    for number in range(20):
        agent = v1.Agent(llm=v1.LlmAgent(instruction="x" * 200_000))
        await store.create_agent("acme", f"a{number}", agent, once(f"r{number}", Answer("agent")))
    state = KEY.state._replace(kind="user", id="ada")
    await store.update_state(state, [put(f"k{number}", "y") for number in range(2 * steps.SWEEP_ROWS)])
    seen = await written(store)
    while not await store.erase_tenant("acme"):
        pass
    assert 8_000_000 < sum(each.size for each in seen)
    assert steps.SWEEP_BYTES >= max(each.size for each in seen)
    assert steps.SWEEP_ROWS == max(each.rows for each in seen)


async def test_a_commit_goes_before_a_piece_of_a_long_job_that_came_first(store: SqliteStore) -> None:
    """In a transaction without it; then one piece has its turn."""
    await create(store)
    loop, entered, release = asyncio.get_running_loop(), asyncio.Semaphore(0), threading.Semaphore(0)

    def piece(tables: Tables, _: int) -> None:
        loop.call_soon_threadsafe(entered.release)
        release.acquire()

    seen = await written(store)
    jobs: list[asyncio.Task[Any]] = [asyncio.create_task(store._write(piece, piece=True)) for _ in range(3)]
    for name in ("m1", "m2"):
        await entered.acquire()
        jobs.append(asyncio.create_task(add(store, said(name))))
        await asyncio.sleep(0)
        release.release()
    release.release()
    await asyncio.gather(*jobs)
    assert [{}, {"logs": 2, "lookups": 2}, {}, {"logs": 2, "lookups": 2}, {}] == [each.tables for each in seen]


async def test_a_blob_that_many_have_uploaded_goes_in_small_transactions(
    store: SqliteStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "SWEEP_UPLOADERS", 10)
    for name in ("a", "b", "c"):
        for number in range(25):
            await store.put_blob("acme", f"subject-{number}", name * 64, b"logo")
    clock.now += MINUTE
    seen = await written(store)
    assert 3 == await store.sweep_blobs(clock.now, clock.now)
    assert 75 == sum(each.tables.get("uploaders", 0) for each in seen)
    assert 10 == max(each.tables.get("uploaders", 0) for each in seen)
    assert 3 == sum(each.tables.get("blobs", 0) for each in seen)

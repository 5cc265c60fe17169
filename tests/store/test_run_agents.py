"""A run keeps the agent that it was started with until it ends; then only the revision remains."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from notecase import v1
from notecase_server.store import steps
from notecase_server.store.contract import Commit, RunRecord, SessionKey
from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite.store import SqliteStore
from notecase_server.store.tables import DeletedAgent

from tests.store.build import (
    EVERYTHING,
    KEY,
    ManualClock,
    add,
    create,
    ended,
    queued_start,
    reborn,
    session_key,
    started,
)

TENANT = KEY.tenant
OTHER = session_key(TENANT, "other")


@pytest.fixture
async def store(tmp_path: Path, clock: ManualClock) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "store.db", clock)
    await create(opened)
    await create(opened, OTHER)
    yield opened
    await opened.close()


async def made(store: SqliteStore, text: str = "first", labels: int = 0) -> v1.Agent:
    body = v1.Agent(display_name=text, labels={f"l{n}": str(n) for n in range(labels)})
    return await store.create_agent(TENANT, "clerk", body)


async def begin(store: SqliteStore, run: str, agent: v1.Agent, key: SessionKey = KEY, *, queue: bool = False) -> None:
    event = queued_start(run) if queue else started(run, agent=agent.name)
    if queue:
        event.command_queued.start.agent = agent.name
    await store.commit(Commit(key=key, events=[event], claim=True, start=RunRecord(b"d", agent)))


async def agents(store: SqliteStore) -> dict[str, v1.Agent]:
    return {active.run.name: active.agent for active in await store.active_runs()}


def rows(store: SqliteStore) -> tuple[int, int]:
    """How many agents are kept for runs alone, and how many revisions of deleted agents."""
    count = "SELECT (SELECT count(*) FROM run_agents), (SELECT count(*) FROM retired_revisions)"
    found: tuple[int, int] = store._connections.readers[0].execute(count).fetchone()
    return found


def revisions(store: SqliteStore) -> list[int]:
    """The revisions that are stored."""
    found = store._connections.readers[0].execute("SELECT revision FROM revisions ORDER BY revision")
    return [revision for (revision,) in found]


@pytest.mark.parametrize("labels", [0, 30])
async def test_a_run_names_the_revision_of_its_agent(store: SqliteStore, labels: int) -> None:
    agent = await made(store, labels=labels)
    read = await store.get_agent(TENANT, "clerk")
    assert read is not None
    await begin(store, "r1", read)
    await begin(store, "r2", agent, queue=True)
    assert await agents(store) == {"r1": agent, "r2": agent}
    assert rows(store) == (0, 0)
    await store.edit_agent(TENANT, "clerk", v1.Agent(display_name="second"), 1)
    assert await agents(store) == {"r1": agent, "r2": agent}


async def test_an_agent_that_a_start_has_changed_is_kept_until_the_run_ends(store: SqliteStore) -> None:
    agent = await made(store)
    changed = v1.Agent()
    changed.CopyFrom(agent)
    changed.llm.instruction = "for this run alone"
    await begin(store, "r1", changed)
    await begin(store, "r2", changed, OTHER)
    assert await agents(store) == {"r1": changed, "r2": changed}
    assert rows(store) == (2, 0)
    await add(store, ended("r1"))
    assert rows(store) == (1, 0)
    await store.delete_session(OTHER)
    assert rows(store) == (0, 0)


async def test_a_deleted_agents_revision_stays_until_the_last_of_its_runs_has_ended(store: SqliteStore) -> None:
    first = await made(store)
    await begin(store, "r1", first)
    await begin(store, "q1", first, queue=True)
    second = await store.edit_agent(TENANT, "clerk", v1.Agent(display_name="second"), 1)
    await begin(store, "r2", second, OTHER)
    expected = {"r1": first, "q1": first, "r2": second}
    await store.delete_agent(TENANT, "clerk")
    assert await agents(store) == expected
    await store.sweep_agents()
    assert await agents(store) == expected
    assert rows(store) == (0, 2)
    assert await store.get_agent(TENANT, "clerk", 1) is None
    again = await made(store, "third")
    assert again.revision == 3
    assert await agents(store) == expected
    await add(store, ended("r1"))
    assert await agents(store) == {"q1": first, "r2": second}
    assert rows(store) == (0, 2)
    await add(store, ended("q1", v1.Run.STATE_CANCELLED))
    assert rows(store) == (0, 1)
    await store.delete_session(OTHER)
    assert rows(store) == (0, 0)


async def test_nothing_stays_of_an_agent_that_no_run_uses(store: SqliteStore) -> None:
    agent = await made(store)
    await begin(store, "r1", agent)
    await add(store, ended("r1"))
    await store.delete_agent(TENANT, "clerk")
    await store.sweep_agents()
    assert rows(store) == (0, 0)
    assert revisions(store) == []


async def test_a_run_that_ends_before_the_sweep_needs_nothing(store: SqliteStore) -> None:
    agent = await made(store)
    await begin(store, "r1", agent)
    await store.delete_agent(TENANT, "clerk")
    await add(store, ended("r1"))
    await store.sweep_agents()
    assert rows(store) == (0, 0)
    assert revisions(store) == []


async def test_an_agent_that_was_deleted_before_the_commit_of_a_start_is_kept_for_it(store: SqliteStore) -> None:
    agent = await made(store)
    await store.delete_agent(TENANT, "clerk")
    await begin(store, "r1", agent)
    assert await agents(store) == {"r1": agent}
    assert rows(store) == (1, 0)
    await add(store, ended("r1"))
    assert rows(store) == (0, 0)


async def test_what_is_kept_goes_in_another_process_too(tmp_path: Path, store: SqliteStore, clock: ManualClock) -> None:
    agent = await made(store)
    await begin(store, "r1", agent)
    await begin(store, "r2", v1.Agent(name=agent.name, revision=1), OTHER)
    await store.delete_agent(TENANT, "clerk")
    await store.sweep_agents()
    await store.close()
    again = await SqliteStore.open(tmp_path / "store.db", clock)
    assert (await agents(again))["r1"] == agent
    assert rows(again) == (1, 1)
    await add(again, ended("r1"))
    await add(again, ended("r2"), key=OTHER)
    assert rows(again) == (0, 0)
    await again.close()


async def test_a_session_created_again_under_the_name_has_none_of_it(store: SqliteStore) -> None:
    await begin(store, "r1", v1.Agent(name="agents/gone", revision=4))
    await store.delete_session(KEY)
    await create(store, reborn(KEY))
    assert await agents(store) == {}
    assert rows(store) == (0, 0)


async def test_no_reader_finds_a_deleted_agent_before_its_rows_are_gone(store: SqliteStore) -> None:
    first = await made(store)
    await store.delete_agent(TENANT, "clerk")
    await begin(store, "r1", first)
    assert rows(store) == (1, 0), "the run has its own, since the stored one is about to go"
    for revision in (0, 1):
        assert await store.get_agent(TENANT, "clerk", revision) is None
    assert (await store.list_agents(TENANT, EVERYTHING)).rows == []
    assert (await store.list_agent_revisions(TENANT, "clerk", EVERYTHING)).rows == []
    for name in ("agents/clerk", "agents/clerk@1"):
        assert (await store.read_start(TENANT, KEY.session, name))[1] is None
    second = await made(store, "second")
    assert second.revision == 2
    assert (await store.list_agents(TENANT, EVERYTHING)).rows == [second]
    assert (await store.list_agent_revisions(TENANT, "clerk", EVERYTHING)).rows == [second]
    assert await store.get_agent(TENANT, "clerk", 1) is None
    assert revisions(store) == [1, 2]
    await store.sweep_agents()
    assert revisions(store) == [2]
    assert await agents(store) == {"r1": first}


@pytest.mark.parametrize("after", range(1, 5))
async def test_a_sweep_that_is_cut_anywhere_is_done_by_the_next(
    store: SqliteStore, tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """And what was counted before is not counted again."""
    monkeypatch.setattr(steps, "SWEEP_ROWS", 1)
    first = await made(store)
    second = await store.edit_agent(TENANT, "clerk", v1.Agent(display_name="second"), 1)
    await begin(store, "r1", first)
    await begin(store, "q1", first, queue=True)
    await begin(store, "r2", second, OTHER)
    await store.delete_agent(TENANT, "clerk")
    write, left = store._write, after

    async def cut(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        if not left:
            raise ConnectionAbortedError
        left -= 1
        return await write(*arguments, **named)

    monkeypatch.setattr(store, "_write", cut)
    with pytest.raises(ConnectionAbortedError):
        await store.sweep_agents()
    monkeypatch.undo()
    await store.close()
    again = await SqliteStore.open(tmp_path / "store.db", clock)
    assert await agents(again) == {"r1": first, "q1": first, "r2": second}
    await again.sweep_agents()
    assert (rows(again), revisions(again)) == ((0, 2), [])
    await add(again, ended("r1"))
    assert rows(again) == (0, 2)
    await add(again, ended("q1", v1.Run.STATE_CANCELLED))
    assert rows(again) == (0, 1)
    await add(again, ended("r2"), key=OTHER)
    assert rows(again) == (0, 0)
    await again.close()


async def test_an_agent_that_is_deleted_again_during_a_sweep_goes_too(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made(store)
    await store.delete_agent(TENANT, "clerk")
    delete, again = steps.delete_revisions, iter([True])

    def interrupted(tables: Tables, now: int, agent: DeletedAgent) -> bool:
        done = delete(tables, now, agent)
        if next(again, False):
            steps.create_agent(tables, now, TENANT, "clerk", v1.Agent(display_name="second"), None)
            steps.delete_agent(tables, now, TENANT, "clerk", "", None)
        return done

    monkeypatch.setattr(steps, "delete_revisions", interrupted)
    await store.sweep_agents()
    assert revisions(store) == []

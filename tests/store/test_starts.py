"""What a start reads is what the file holds, whatever was written before it and however that ended."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest
from notecase import v1
from notecase_server.store.contract import Commit, SessionKey
from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite.store import SqliteStore
from notecase_server.store.sqlite.tables import SqliteTables

from tests.store.build import KEY, ManualClock, add, create, edit, ended, reborn, refused, said, start
from tests.store.test_sqlite import full_disk

TENANT = KEY.tenant


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
async def store(path: Path, clock: ManualClock) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(path, clock)
    await opened.create_agent(TENANT, "sherlock", v1.Agent(display_name="first"))
    yield opened
    await opened.close()


async def read(store: SqliteStore, agent: str = "agents/sherlock") -> tuple[v1.Session | None, v1.Agent | None]:
    """What a start reads, after a look that it is what the file holds."""
    found = await store.read_start(TENANT, KEY.session, agent)
    assert await store._read(lambda tables: tables.start_of(TENANT, KEY.session, agent)) == found
    return found


def kept(store: SqliteStore) -> bool:
    """Whether the next start finds what it needs without asking the file."""
    return store._starts.find(TENANT, KEY.session, "agents/sherlock") is not None


async def test_a_start_behind_a_commit_asks_the_file_for_nothing(store: SqliteStore) -> None:
    await create(store)
    await read(store)
    assert kept(store)
    await add(store, said("m1"))
    assert kept(store)
    session, _ = await read(store)
    assert session is not None
    assert session.last_sequence == 1


async def test_what_is_handed_out_is_a_copy(store: SqliteStore) -> None:
    await create(store)
    await read(store)
    committed = await add(store, said("m1"))
    for session, agent in [await read(store), await read(store)]:
        assert session is not None
        assert agent is not None
        session.Clear()
        agent.Clear()
    committed.session.Clear()
    session, agent = await read(store)
    assert (session is not None, agent is not None) == (True, True)


async def test_every_other_write_is_seen(store: SqliteStore) -> None:
    await create(store)
    await read(store)
    await store.edit_agent(TENANT, "sherlock", v1.Agent(display_name="second"), 1)
    _, agent = await read(store)
    assert agent is not None
    assert agent.display_name == "second"
    await store.edit_session(KEY, edit(display_name="renamed"))
    session, _ = await read(store)
    assert session is not None
    assert session.display_name == "renamed"
    await store.delete_agent(TENANT, "sherlock")
    assert (await read(store))[1] is None
    await store.delete_session(KEY)
    assert (await read(store))[0] is None
    await create(store, reborn(KEY))
    session, _ = await read(store)
    assert session is not None
    assert session.uid == reborn(KEY).uid


async def test_a_write_that_changes_no_row_leaves_what_is_kept(store: SqliteStore, clock: ManualClock) -> None:
    """The server sweeps every second."""
    await create(store)
    await read(store)
    await add(store, said("m1"))
    assert await store.expired_sessions(clock.now, 10) == []
    await store.sweep_sessions()
    await store.forget_requests(clock.now)
    await store.sweep_blobs(clock.now, clock.now)
    await store.scrub()
    await store.probe()
    assert kept(store)
    await store.delete_session(KEY)
    assert not kept(store)


async def test_a_commit_whose_caller_went_away_is_seen(store: SqliteStore) -> None:
    await create(store)
    await read(store)
    task = asyncio.create_task(add(store, said("m1")))
    await asyncio.sleep(0)
    task.cancel()
    await store.probe()  # which the writer makes behind it
    session, _ = await read(store)
    assert session is not None
    assert session.last_sequence == 1


async def test_an_agent_that_changes_while_it_is_read_is_not_kept(store: SqliteStore) -> None:
    await create(store)
    reading = asyncio.create_task(store.read_start(TENANT, KEY.session, "agents/sherlock"))
    await asyncio.sleep(0)
    store._starts.forget()  # as a write does whose outcome is reported meanwhile
    await reading
    assert not kept(store)


async def test_a_refused_commit_and_one_that_the_disk_fails_leave_what_the_file_holds(
    store: SqliteStore, path: Path
) -> None:
    await create(store)
    await read(store)
    with refused("SEQUENCE_MISMATCH"):
        await add(store, said("m1"), if_last_sequence=7)
    await read(store)
    with full_disk(Path(f"{path}-wal").stat().st_size), refused("STORE_UNAVAILABLE"):
        await add(store, said("m2", "x" * 10_000))
    session, _ = await read(store)
    assert session is not None
    assert session.last_sequence == 0


async def test_few_and_small_sessions_and_agents_are_kept(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notecase_server.store.sqlite.starts.MOST_SESSIONS", 3)
    monkeypatch.setattr("notecase_server.store.sqlite.starts.MOST_AGENTS", 2)
    for number in range(9):
        key = SessionKey(TENANT, f"s{number}", f"u{number}")
        await store.commit(Commit(key=key, create=v1.Session(agent="agents/sherlock")))
        await store.read_start(TENANT, f"s{number}", f"agents/sherlock@{1 if number % 2 else ''}".rstrip("@"))
    assert [name for _, name in store._starts._sessions] == ["s6", "s7", "s8"]
    assert len(store._starts._agents) == 2
    await create(store)
    await store.commit(Commit(key=SessionKey(TENANT, "large", "ul"), create=v1.Session(display_name="x" * 5000)))
    assert [name for _, name in store._starts._sessions] == ["s7", "s8", KEY.session]
    body = v1.Agent(llm=v1.LlmAgent(instruction="x" * 70_000))
    await store.create_agent(TENANT, "wordy", body)
    await create(store, SessionKey(TENANT, "again", "ua"))
    await store.read_start(TENANT, "again", "agents/wordy")
    assert (TENANT, "agents/wordy") not in store._starts._agents


def write(store: SqliteStore, chance: random.Random, name: str) -> Awaitable[object]:
    """Begins a write by chance, or what a start reads."""
    acts: list[Callable[[], Awaitable[object]]] = [
        lambda: add(store, said(name)),
        lambda: start(store, name, ended(name)),
        lambda: store.edit_session(KEY, edit(display_name=name)),
        lambda: store.edit_agent(TENANT, "sherlock", v1.Agent(display_name=name), 1),
        lambda: store.delete_session(KEY),
        lambda: create(store),
        lambda: store.read_start(TENANT, KEY.session, ""),
        lambda: store.read_start(TENANT, KEY.session, "agents/sherlock"),
    ]
    return chance.choice(acts)()


@pytest.mark.parametrize("seed", range(3))
async def test_any_writes_at_once_leave_what_the_file_holds(store: SqliteStore, seed: int) -> None:
    chance = random.Random(seed)
    await create(store)
    for number in range(60):
        writes = [write(store, chance, f"n{number}-{each}") for each in range(chance.randint(1, 4))]
        await asyncio.gather(*writes, return_exceptions=True)
        for agent in ("", "agents/sherlock", "agents/sherlock@1", "agents/nobody"):
            await read(store, agent)


async def test_the_rows_of_few_and_small_sessions_are_kept_for_their_next_commit(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notecase_server.store.sqlite.tables.SAVED_SESSIONS", 3)
    kept = store._writer._tables._saved
    keys = [SessionKey(TENANT, f"s{number}", f"u{number}") for number in range(9)]
    for key in keys:
        await create(store, key)
        await add(store, said("m1"), key=key)
    assert [uid for _, uid in kept] == ["u6", "u7", "u8"]
    await store.commit(Commit(key=KEY, create=v1.Session(display_name="x" * 20_000)))
    assert [uid for _, uid in kept] == ["u6", "u7", "u8"]
    await store.edit_session(keys[8], edit(display_name="renamed"))
    assert [uid for _, uid in kept] == ["u6", "u7"]
    assert (await add(store, said("m2"), key=keys[8])).session.display_name == "renamed"


async def test_a_session_that_was_not_idle_is_read_again(store: SqliteStore) -> None:
    """Others may have read that its run has ended, in a commit that is not reported here yet."""
    await create(store)
    await read(store)
    await start(store, "r1")
    assert not kept(store)
    await read(store)
    await add(store, ended("r1"))
    assert kept(store)


async def test_a_transaction_that_is_lost_without_memory_fails_all_of_its_writes(store: SqliteStore) -> None:
    """SQLite has rolled it back then, and Python raises MemoryError, whatever the statement was."""
    await create(store)
    began, held = threading.Event(), threading.Event()

    def hold(tables: Tables, now: int) -> bool:
        began.set()
        return held.wait()

    def lose(tables: Tables, now: int) -> None:
        cast(SqliteTables, tables)._execute("ROLLBACK")
        raise MemoryError

    holding = asyncio.ensure_future(store._write(hold))
    await asyncio.to_thread(began.wait)
    writes = [asyncio.ensure_future(add(store, said("m1"))), asyncio.ensure_future(store._write(lose))]
    await asyncio.sleep(0)  # until both wait behind the one that holds the writer
    held.set()
    assert await holding
    for write in writes:
        with refused("STORE_UNAVAILABLE"):
            await write
    session, _ = await read(store)
    assert session is not None
    assert session.last_sequence == 0
    await add(store, said("m2"))
    session, _ = await read(store)
    assert session is not None
    assert session.last_sequence == 1

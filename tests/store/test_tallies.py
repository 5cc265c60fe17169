"""What a SQLite store's writer knows of how much is kept is what is there, whatever was written."""

import hashlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Answer, Commit, Once, Quotas, Replayed
from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite.store import SqliteStore
from notecase_server.store.sqlite.tallies import ROWS

from tests.store.build import SESSION, ManualClock, edit, once, refused, session_key

BOUNDS = Quotas(sessions=4, requests=100, uploads=100, blob_bytes=1000)
DATA = b"a photograph"


@pytest.fixture
async def store(tmp_path: Path, clock: ManualClock) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "store.db", clock)
    yield opened
    await opened.close()


async def create(store: SqliteStore, session: str, request_id: str = "") -> None:
    once = Once("acme", "", "CreateSession", request_id, b"d", SESSION) if request_id else None
    await store.commit(Commit(key=session_key("acme", session), once=once, create=v1.Session()))


async def tallied(store: SqliteStore) -> list[int]:
    """What the writer knows, once it is seen to be what a reader counts."""

    def kept(tables: Tables, _now: int = 0) -> list[int]:
        return [tables.kept(kind, "acme") for kind in ROWS]

    known = await store._write(kept)
    assert await store._read(kept) == known
    return known


async def test_the_bound_of_remembered_requests_holds_for_changes_that_change_nothing(store: SqliteStore) -> None:
    await create(store, "s")
    await store.create_agent("acme", "sherlock", v1.Agent(display_name="first"))
    store.quotas = Quotas(requests=2)
    for number in range(2):
        await store.edit_session(session_key("acme", "s"), edit(display_name="Case"), once=once(f"r{number}"))
    with refused("QUOTA_EXCEEDED"):
        await store.edit_session(session_key("acme", "s"), edit(display_name="Case"), once=once("r2"))
    with refused("QUOTA_EXCEEDED"):
        await store.edit_agent("acme", "sherlock", v1.Agent(display_name="first"), 1, once=once("r3", Answer("agent")))
    with pytest.raises(Replayed):
        await store.edit_session(session_key("acme", "s"), edit(display_name="Case"), once=once("r1"))


async def test_tallies_are_what_is_there(store: SqliteStore) -> None:
    """What was there before is counted, what comes and goes is added and taken away, and what fails leaves nothing."""
    await create(store, "before", "r0")
    await store.put_blob("acme", "", hashlib.sha256(b"old").hexdigest(), b"old")
    store.quotas = BOUNDS
    assert [1, 1, 0, 3] == await tallied(store)
    await create(store, "one", "r1")
    await create(store, "two")
    with pytest.raises(NotecaseError):
        await create(store, "one", "r2")
    assert [3, 2, 0, 3] == await tallied(store)
    await store.open_upload("acme", "u", 10**16)
    await store.add_chunk("acme", "u", 0, DATA)
    assert [3, 2, 1, 3 + len(DATA)] == await tallied(store)
    await store.complete_upload("acme", "", "u", len(DATA), hashlib.sha256(DATA).hexdigest())
    assert [3, 2, 1, 3 + len(DATA)] == await tallied(store), "it counts once"
    await store.touch_blob("acme", "", hashlib.sha256(DATA).hexdigest())
    await store.put_blob("acme", "", hashlib.sha256(DATA).hexdigest(), DATA)
    assert [3, 2, 1, 3 + len(DATA)] == await tallied(store)
    await create(store, "three")
    with pytest.raises(NotecaseError, match="4"):
        await create(store, "four")
    await store.delete_session(session_key("acme", "one"))
    await create(store, "four")
    await store.forget_requests(10**16)
    await store.drop_upload("acme", "u")
    await store.sweep_blobs(10**16 + 1, 10**16 + 1)
    assert [4, 0, 0, 0] == await tallied(store)


async def test_a_transaction_that_fails_leaves_no_tally(store: SqliteStore) -> None:
    store.quotas = BOUNDS
    await create(store, "one")

    def fail(tables: Tables, _now: int) -> None:
        tables.delete_session(session_key("acme", "one"))
        raise sqlite3.OperationalError("the disk is gone")

    with pytest.raises(NotecaseError):
        await store._write(fail)
    assert [1, 0, 0, 0] == await tallied(store)


async def test_another_session_costs_the_same_work_however_many_there_are(store: SqliteStore) -> None:
    store.quotas = Quotas(sessions=10_000)
    work = []
    for count in (10, 1_000):
        for number in range(count):
            await create(store, f"of-{count}-{number}")
        work.append(await store._write(lambda tables, _: _steps(store, tables)))
    few, many = work
    assert many < 2 * few


def _steps(store: SqliteStore, tables: Tables) -> int:
    """SQLite's own steps to find out how many sessions there are."""
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    connection = store._connections.writer
    connection.set_progress_handler(step, 1)
    tables.kept("sessions", "acme")
    connection.set_progress_handler(None, 0)
    return steps

"""SQLite: what was deleted is in none of its files."""

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from notecase import v1
from notecase_server.store.contract import Answer, Commit, SessionKey
from notecase_server.store.sqlite.store import SqliteStore

from tests.store.build import (
    KEY,
    NOTHING,
    USER_STATE,
    ManualClock,
    add,
    changed,
    create,
    ended,
    once,
    put,
    reborn,
    remove,
    said,
    session_key,
    start,
)

NEEDLE = "needle-in-the-haystack"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
async def store(path: Path, clock: ManualClock) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(path, clock)
    yield opened
    await opened.close()


def found(path: Path) -> dict[str, int]:
    """How often the needle is in each file of the store."""
    counts = {file.name: file.read_bytes().count(NEEDLE.encode()) for file in path.parent.iterdir()}
    return {name: count for name, count in counts.items() if count}


async def fill(store: SqliteStore, key: SessionKey, text: str, rounds: int) -> None:
    """Text wherever a session can hold it, in rows of every size."""
    await store.commit(
        Commit(
            key=key,
            create=v1.Session(user="users/ada", display_name=text, labels={"about": text}),
            once=once(f"create-{key.session}"),
        )
    )
    for number in range(rounds):
        run = f"r{number}"
        sized = f"{text} " * (1 + number % 7 * 40)
        await start(
            store,
            run,
            said(f"m{number}", sized, run),
            changed(put(f"k{number % 5}", sized)),
            labels={"l": text},
            key=key,
            once=once(f"start-{key.session}-{number}"),
        )
        await add(store, ended(run), key=key)
    await add(store, changed(remove("k0")), key=key)


def vacuumed(path: Path) -> None:
    """Removes everything from the file that is not in its rows. SQLite overwrites what it deletes, but the copies that
    it made when it moved rows to another page stay until their place is used, or the file is rewritten."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


async def test_nothing_of_deleted_sessions_is_left_in_any_row_or_in_the_log(store: SqliteStore, path: Path) -> None:
    """Messages, state, events, labels and what requests were answered. The others are whole."""
    keys = [session_key("acme", f"s{number:02}") for number in range(10)]
    secret = set(keys[::3])
    for key in keys:
        await fill(store, key, NEEDLE if key in secret else "hay", 5)
    assert found(path)
    for key in secret:
        await store.delete_session(key, once=once(f"delete-{key.session}", NOTHING))
    await store.sweep_sessions()
    assert "store.db-wal" in found(path)
    assert await store.scrub()
    assert "store.db-wal" not in found(path)
    for key in keys:
        log = await store.read_events(key, 0)
        assert (await store.get_session(key) is None) == (key in secret) == (log == [])
        assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    await store.close()
    vacuumed(path)
    assert found(path) == {}


async def test_nothing_of_removed_content_is_left_in_free_pages(
    store: SqliteStore, path: Path, clock: ManualClock
) -> None:
    """Where it lay is overwritten with what it was."""
    data = NEEDLE.encode() * 50_000
    await store.put_blob("acme", "", "f" * 64, data)
    assert found(path)
    clock.now += 1
    assert await store.sweep_blobs(clock.now, clock.now) == 1
    assert await store.scrub()
    assert found(path) == {}


async def test_nothing_of_an_erased_user_is_left(store: SqliteStore, path: Path) -> None:
    await create(store)
    await store.update_state(USER_STATE, [put("name", NEEDLE)], once=once("put", Answer("state", "users/ada/state")))
    await add(store, changed(put("address", NEEDLE), state="user"), once=once("add"))
    assert found(path)
    await store.delete_session(KEY)
    await store.sweep_sessions("acme", "users/ada")
    assert await store.erase_state("acme", "users/ada")
    assert await store.scrub()
    await store.close()
    vacuumed(path)
    assert found(path) == {}


async def test_a_reader_holds_the_scrubbing_up_and_no_write(store: SqliteStore, path: Path) -> None:
    """It must be called again; commits do not wait for it."""
    await fill(store, KEY, NEEDLE, 3)
    reader = store._connections.readers[0]
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM events").fetchone()
    await store.delete_session(KEY)
    await store.sweep_sessions()
    assert not await store.scrub()
    await create(store, reborn(KEY))
    reader.execute("ROLLBACK")
    assert await store.scrub()
    assert "store.db-wal" not in found(path)


async def test_what_was_deleted_by_a_process_that_died_is_scrubbed_by_the_next(
    store: SqliteStore, path: Path, tmp_path: Path, clock: ManualClock
) -> None:
    """Its files are as a kill would leave them."""
    await fill(store, KEY, NEEDLE, 3)
    await store.delete_session(KEY)
    left = tmp_path / "left"
    left.mkdir()
    for name in ("store.db", "store.db-wal"):
        (left / name).write_bytes((tmp_path / name).read_bytes())
    assert found(left / "store.db")
    second = await SqliteStore.open(left / "store.db", clock)
    await second.sweep_sessions()
    assert await second.scrub()
    await second.close()
    vacuumed(left / "store.db")
    assert found(left / "store.db") == {}

"""`notecase backup`: a copy of a store that is served meanwhile, whole or not there."""

import asyncio
import os
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import grpc
import pytest
from notecase import v1
from notecase_server.store.contract import SessionKey, StoreOpenError
from notecase_server.store.sqlite import file as sqlite_file
from notecase_server.store.sqlite.store import SqliteStore

from tests.cli.command import COMMAND, notecase, spawn
from tests.store.build import ManualClock
from tests.support.polling import until
from tests.support.server import Spawned

WRITERS = 3


@pytest.fixture
async def spawned(tmp_path: Path) -> AsyncIterator[Spawned]:
    server = await Spawned.start(f"sqlite:{tmp_path / 'store.db'}", tmp_path / "log")
    yield server
    await server.kill()


async def appended(channel: grpc.aio.Channel, session: str, heads: dict[str, int], text: str = "Tick. " * 200) -> None:
    """Writes until it is cancelled; `heads` has what was acknowledged."""
    await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id=session))
    stub = v1.MessageServiceStub(channel)
    while True:
        message = v1.Message(parts=[v1.Part(text=text)])
        done = await stub.AppendMessages(v1.AppendMessagesRequest(parent=f"sessions/{session}", messages=[message]))
        heads[session] = done.last_sequence


async def logs(path: Path) -> dict[str, list[v1.Event]]:
    """Returns all data of a copy, which is opened as a store."""
    store = await SqliteStore.open(path, ManualClock())
    found: dict[str, list[v1.Event]] = {}
    for number in range(WRITERS):
        log: list[v1.Event] = []
        row = await store.find_session("default", f"s{number}")
        assert row is not None
        while page := await store.read_events(SessionKey("default", row.name, row.uid), len(log)):
            log += page
        assert row.last_sequence == len(log), "a session and its log are of one moment"
        found[f"s{number}"] = log
    await store.close()
    return found


async def test_a_store_is_copied_while_its_server_writes(spawned: Spawned, tmp_path: Path) -> None:
    """Each copy is dense, a prefix of the log, and holds all that was acknowledged before it; the writers go on."""
    heads: dict[str, int] = {}
    store = f"sqlite:{tmp_path / 'store.db'}"
    async with grpc.aio.insecure_channel(spawned.address) as channel:
        writers = [asyncio.create_task(appended(channel, f"s{number}", heads)) for number in range(WRITERS)]
        await until(lambda: len(heads) == WRITERS and min(heads.values()) >= 20)
        for number in range(3):
            before = dict(heads)
            process = await spawn(*COMMAND, "backup", "--store", store, str(tmp_path / f"copy{number}.db"))
            assert await process.communicate() == (b"", b"")
            assert process.returncode == 0
            assert all(heads[session] > before[session] for session in heads), "nobody waited for it"
            copied = await logs(tmp_path / f"copy{number}.db")
            for session, log in copied.items():
                assert [event.sequence for event in log] == list(range(1, len(log) + 1))
                assert before[session] <= len(log) <= heads[session] + 1
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        for session, log in copied.items():
            watch = v1.RunServiceStub(channel).WatchEvents(
                v1.WatchEventsRequest(name=f"sessions/{session}", after_sequence=0)
            )
            whole = [event.message_added.create_time async for frame in watch for event in frame.batch.events]
            assert [event.message_added.create_time for event in log] == whole[: len(log)]
    assert await spawned.stop() == 0


async def test_a_copy_replaces_a_file_only_with_force(spawned: Spawned, tmp_path: Path) -> None:
    """It leaves no other file next to it."""
    store, copy = f"sqlite:{tmp_path / 'store.db'}", tmp_path / "backups" / "copy.db"
    copy.parent.mkdir()
    copy.write_text("mine")
    done = await notecase("backup", "--store", store, str(copy))
    assert (done.code, done.err) == (1, f"Error: {copy} exists. Choose another path, or add --force to replace it.\n")
    assert copy.read_text() == "mine"
    assert (await notecase("backup", "--store", store, "--force", str(copy))).code == 0
    assert [file.name for file in copy.parent.iterdir()] == ["copy.db"]
    assert oct(copy.stat().st_mode & 0o777) == "0o600"
    connection = sqlite3.connect(copy)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


async def test_a_store_in_use_is_never_replaced(spawned: Spawned, tmp_path: Path) -> None:
    """Neither by itself nor by another, open or left by a server that died."""
    store = f"sqlite:{tmp_path / 'store.db'}"
    for place in ("store.db", "link.db"):
        if place == "link.db":
            (tmp_path / place).symlink_to(tmp_path / "store.db")
        done = await notecase("backup", "--store", store, "--force", str(tmp_path / place))
        assert done.code == 1
        assert "is a store that is open, or was not closed" in done.err
    other = await SqliteStore.open(tmp_path / "other.db", ManualClock())
    done = await notecase("backup", "--store", store, "--force", str(tmp_path / "other.db"))
    assert done.code == 1
    await other.close()
    assert (await notecase("backup", "--store", store, "--force", str(tmp_path / "other.db"))).code == 0
    held = await SqliteStore.open(tmp_path / "other.db", ManualClock())
    (tmp_path / "other.db-wal").unlink()
    done = await notecase("backup", "--store", store, "--force", str(tmp_path / "other.db"))
    assert (done.code, "in use" in done.err) == (1, True)
    await held.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("memory:", "Error: 'memory:' is not a store in a file; write sqlite:PATH.\n"),
        ("sqlite:{}/none.db", "Error: There is no store at {}/none.db. Name the file of one as sqlite:PATH.\n"),
        ("sqlite:{}/text.db", "Error: {}/text.db is not a SQLite database. Choose another path.\n"),
    ],
)
async def test_a_file_that_is_not_a_store_is_not_copied(tmp_path: Path, url: str, expected: str) -> None:
    (tmp_path / "text.db").write_text("This is a text, and not a database of any kind." * 100)
    done = await notecase("backup", "--store", url.format(tmp_path), str(tmp_path / "copy.db"))
    assert (done.code, done.err) == (1, expected.format(tmp_path))
    assert not (tmp_path / "copy.db").exists()
    missing = await notecase("backup", "--store", f"sqlite:{tmp_path}/text.db", str(tmp_path / "no" / "copy.db"))
    assert missing.code == 1


async def test_what_is_not_a_file_is_neither_replaced_nor_a_store(tmp_path: Path) -> None:
    """With --force, a backup to a device replaced the device."""
    device, store = tmp_path / "pipe", f"sqlite:{tmp_path / 'notecase.db'}"
    os.mkfifo(device)
    assert 0 == (await notecase("keys", "bootstrap", "--store", store)).code
    expected = f"Error: {device} is not a file. Choose another path.\n"
    for words in (
        ("backup", str(device), "--force", "--store", store),
        ("keys", "bootstrap", "--store", f"sqlite:{device}"),
    ):
        done = await notecase(*words)
        assert (1, expected) == (done.code, done.err)
    assert device.is_fifo()
    assert not Path(f"{device}-lock").exists()


def test_a_full_disk_names_the_copy_and_not_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    store = tmp_path / "notecase.db"
    sqlite_file.connect(store, 0).close()
    monkeypatch.setattr(tempfile, "mkstemp", mock.Mock(side_effect=full))  # what follows it raises so
    with pytest.raises(StoreOpenError, match=f"^{tmp_path / 'copy.db'} cannot be written: the disk is full.$"):
        sqlite_file.backup(store, tmp_path / "copy.db", force=False)

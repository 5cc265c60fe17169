"""What the SQLite store promises beyond the contract: a durable file, one owner, one transaction for many writes."""

import asyncio
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import v1
from notecase_server.errors import NotecaseError, reason_name
from notecase_server.store import copies, steps
from notecase_server.store.contract import (
    Commit,
    Committed,
    Compare,
    Fork,
    Query,
    RunRecord,
    Scope,
    SessionKey,
    StepKey,
    StoreOpenError,
)
from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite import file as sqlite_file
from notecase_server.store.sqlite.schema import SCHEMA
from notecase_server.store.sqlite.store import SqliteStore
from notecase_server.store.sqlite.tables import SqliteTables
from notecase_server.store.sqlite.writer import CHECKPOINT_WRITES
from structlog.testing import capture_logs

from tests.store.build import (
    EVERYTHING,
    KEY,
    ManualClock,
    add,
    called,
    changed,
    contents,
    create,
    ended,
    finished,
    once,
    put,
    refused,
    said,
    session_key,
    start,
    started,
)
from tests.support.tracing import Trace, given

HERE = Path(__file__).parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
async def store(path: Path, clock: ManualClock) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(path, clock)
    yield opened
    await opened.close()


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that sees the modules this one sees; killed at the end, whatever it does."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            yield running
        finally:
            running.kill()


def lines(running: subprocess.Popen[str]) -> Iterator[str]:
    assert running.stdout is not None
    return (line.rstrip("\n") for line in running.stdout)


async def refusal(path: Path) -> str:
    with pytest.raises(StoreOpenError) as caught:
        await SqliteStore.open(path, ManualClock())
    return str(caught.value)


@asynccontextmanager
async def held(store: SqliteStore) -> AsyncIterator[asyncio.Task[v1.State]]:
    """Keeps the writer busy in a transaction with one write, so that what is written meanwhile waits together."""
    loop, entered, release = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def wait(tables: Tables, now: int) -> v1.State:
        loop.call_soon_threadsafe(entered.set)
        release.wait()
        return steps.update_state(tables, now, Scope("acme", "app", ""), [put("held", 1)], None, None)

    blocker = asyncio.create_task(store._write(wait))
    await entered.wait()
    try:
        yield blocker
    finally:
        release.set()


async def waiting(*writes: asyncio.Task[Committed]) -> None:
    """Lets tasks that were just made hand their writes in."""
    await asyncio.sleep(0)
    assert not any(write.done() for write in writes)


def commits(store: SqliteStore) -> list[str]:
    """Fills with the transactions that the writer commits from here on."""
    seen: list[str] = []
    store._connections.writer.set_trace_callback(lambda sql: seen.append(sql) if sql == "COMMIT" else None)
    return seen


async def test_reopening_keeps_everything(path: Path, clock: ManualClock) -> None:
    first = await SqliteStore.open(path, clock)
    await first.create_agent("acme", "sherlock", v1.Agent(display_name="S"))
    await create(first)
    epoch = (await start(first, "r1", said("m1", run="r1"), changed(put("k", 1)), once=once("start"))).epoch
    before, agent, secret = await contents(first), await first.get_agent("acme", "sherlock"), first.secret
    await first.close()

    second = await SqliteStore.open(path, clock)
    assert await contents(second) == before
    assert await second.get_agent("acme", "sherlock") == agent
    assert second.secret == secret
    assert [active.epoch for active in await second.active_runs()] == [epoch]
    assert (await add(second, said("m2"), if_epoch=epoch)).session.last_sequence == 4
    await second.close()


async def test_two_files_have_different_secrets(tmp_path: Path, clock: ManualClock) -> None:
    stores = [await SqliteStore.open(tmp_path / name, clock) for name in ("a.db", "b.db")]
    assert stores[0].secret != stores[1].secret
    for store in stores:
        await store.close()


async def test_what_was_acknowledged_survives_sigkill(path: Path) -> None:
    """A writer is killed again and again in the middle of its work; nothing that it reported is lost, and nothing is
    half written."""
    chance = random.Random(7)
    acknowledged: dict[str, int] = {}
    for _ in range(5):
        with process("acknowledge.py", path) as writer:
            told = lines(writer)
            assert next(told) == "open"
            for _ in range(chance.randint(1, 60)):
                session, digits = next(told).split()
                acknowledged[session] = int(digits)
            writer.kill()
            for line in told:  # the last one may be cut, which makes its number smaller
                session, _, digits = line.partition(" ")
                if digits:
                    acknowledged[session] = max(acknowledged.get(session, 0), int(digits))
        store = await SqliteStore.open(path, ManualClock())
        for session, sequence in acknowledged.items():
            key = session_key("acme", session)
            log, after = [], 0
            while page := await store.read_events(key, after):
                log += page
                after = page[-1].sequence
            assert [event.sequence for event in log] == list(range(1, len(log) + 1))
            assert len(log) >= sequence
            row, state = await store.get_session(key), await store.get_state(session_key("acme", session).state, ["n"])
            assert row is not None
            assert row.last_sequence == state.entries["n"].value.int_value == len(log)
        await store.close()


def test_the_writer_waits_for_the_disk_and_overwrites_what_it_deletes(path: Path) -> None:
    """A process that is killed loses nothing without that either; a machine that loses its power would."""
    connections = sqlite_file.connect(path, 1)
    try:
        settings = ("journal_mode", "synchronous", "secure_delete")
        found = [connections.writer.execute(f"PRAGMA {name}").fetchone()[0] for name in settings]
        (reader,) = connections.readers
        assert 2 == connections.checkpointer.execute("PRAGMA synchronous").fetchone()[0]
        assert 1 == reader.execute("PRAGMA query_only").fetchone()[0]
    finally:
        connections.close()
    full = 2
    assert ["wal", full, 1] == found


async def test_a_second_owner_in_this_process_is_refused(store: SqliteStore, path: Path, tmp_path: Path) -> None:
    assert f"{path} is in use" in await refusal(path)
    alias = tmp_path / "alias.db"
    alias.symlink_to(path)
    assert f"{path} is in use" in await refusal(alias)
    assert (await create(store)).session.name == "case"


async def test_a_second_owner_in_another_process_is_refused_until_the_first_is_killed(path: Path) -> None:
    with process("acknowledge.py", path, "hold") as owner:
        assert next(lines(owner)) == "open"
        assert f"{path} is in use" in await refusal(path)
        owner.kill()
        owner.wait()
        store = await SqliteStore.open(path, ManualClock())
        await store.close()


async def test_closing_lets_the_next_owner_in(path: Path, clock: ManualClock) -> None:
    for _ in range(3):
        store = await SqliteStore.open(path, clock)
        await store.close()


async def test_a_refused_file_is_not_kept_locked(path: Path, clock: ManualClock) -> None:
    path.write_text("Dear diary")
    await refusal(path)
    path.unlink()
    store = await SqliteStore.open(path, clock)
    await store.close()


async def test_a_file_of_a_newer_version_is_refused(path: Path, clock: ManualClock) -> None:
    await (await SqliteStore.open(path, clock)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    assert "newer notecase: its schema is 99" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    before = path.read_bytes()
    assert "another program" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_file_that_is_not_a_database_is_refused_and_not_changed(path: Path) -> None:
    path.write_text("Dear diary, " * 1000)
    before = path.read_bytes()
    assert "not a SQLite database" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_directory_is_not_a_store_and_a_missing_one_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be opened for writing" in await refusal(tmp_path)
    assert f"The directory {tmp_path / 'none'} does not exist" in await refusal(tmp_path / "none" / "store.db")


@pytest.mark.parametrize("read_only", ["file", "directory"])
async def test_what_cannot_be_written_is_refused(path: Path, clock: ManualClock, read_only: str) -> None:
    await (await SqliteStore.open(path, clock)).close()
    if read_only == "file":
        path.chmod(0o400)
    else:
        Path(f"{path}-lock").unlink()
        path.parent.chmod(0o500)
    with process("unprivileged.py", path) as opener:
        said = list(lines(opener))
        assert opener.wait() == 0
    path.parent.chmod(0o700)
    assert said == [
        f"{path} cannot be opened for writing: Permission denied. Make it writable, or choose another path."
    ]


async def test_what_is_stored_can_be_read_by_its_owner_only(store: SqliteStore, path: Path) -> None:
    await create(store)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()} == {
        "store.db": "0o600",
        "store.db-lock": "0o600",
        "store.db-shm": "0o600",
        "store.db-wal": "0o600",
    }


async def test_deleted_text_is_not_left_in_the_file(path: Path, clock: ManualClock) -> None:
    store = await SqliteStore.open(path, clock)
    await create(store)
    await add(store, *(said(f"m{number}", "confession " * 1000) for number in range(20)))
    await store.close()
    assert b"confession" in path.read_bytes()
    store = await SqliteStore.open(path, clock)
    await store.delete_session(KEY)
    await store.sweep_sessions()
    await store.close()
    assert b"confession" not in path.read_bytes()


async def test_writes_that_wait_share_a_transaction(store: SqliteStore) -> None:
    await create(store)
    async with held(store) as blocker:
        seen = commits(store)
        writes = [asyncio.create_task(add(store, said(f"m{number}"))) for number in range(20)]
        await waiting(*writes)
    done = await asyncio.gather(*writes)
    await blocker
    assert [each.session.last_sequence for each in done] == list(range(1, 21))
    assert seen == ["COMMIT", "COMMIT"]


async def test_a_refused_write_does_not_touch_the_others_of_its_transaction(store: SqliteStore) -> None:
    await create(store)
    async with held(store) as blocker:
        seen = commits(store)
        conditions = [None, 1, 1, 99, None]
        writes = [
            asyncio.create_task(add(store, said(f"m{number}"), if_last_sequence=head))
            for number, head in enumerate(conditions)
        ]
        await waiting(*writes)
    done = await asyncio.gather(*writes, return_exceptions=True)
    await blocker
    assert seen == ["COMMIT", "COMMIT"]
    facts = [
        each.session.last_sequence if isinstance(each, Committed) else reason_name(each.reason)
        for each in done
        if isinstance(each, Committed | NotecaseError)
    ]
    assert facts == [1, 2, "SEQUENCE_MISMATCH", "SEQUENCE_MISMATCH", 3]
    assert [event.message_added.name for event in await store.read_events(KEY, 0)] == ["m0", "m1", "m4"]


async def test_a_write_that_fails_half_way_leaves_nothing(store: SqliteStore) -> None:
    """A message id that is taken is found out by the database, after the events were written."""
    await create(store)
    await add(store, said("m1"))
    before = await contents(store)
    with pytest.raises(sqlite3.IntegrityError):
        await add(store, said("m2"), said("m1"))
    assert await contents(store) == before
    assert (await add(store, said("m2"))).session.last_sequence == 2


async def test_a_write_that_fails_half_way_fails_alone(store: SqliteStore) -> None:
    """The others of its transaction are made, each once and in their order."""
    await create(store)
    await add(store, said("m1"))
    async with held(store) as blocker:
        events = [(said("m2"),), (said("m3"), said("m1")), (said("m4"), said("m5"))]
        writes = [asyncio.create_task(add(store, *each)) for each in events]
        await waiting(*writes)
    _, *done = await asyncio.gather(blocker, *writes, return_exceptions=True)
    assert [type(each) for each in done] == [Committed, sqlite3.IntegrityError, Committed]
    assert [(event.sequence, event.message_added.name) for event in await store.read_events(KEY, 0)] == [
        *((1, "m1"), (2, "m2"), (3, "m4"), (4, "m5"))
    ]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond that size: a write beyond it fails, for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_fails_all_writes_of_the_transaction_and_the_store_goes_on(
    store: SqliteStore, path: Path
) -> None:
    await create(store)
    await add(store, said("m1"))
    before = await contents(store)
    with full_disk(Path(f"{path}-wal").stat().st_size):
        async with held(store) as blocker:
            seen = commits(store)
            writes = [asyncio.create_task(add(store, said(f"n{n}"), once=once(f"r{n}"))) for n in range(5)]
            await waiting(*writes)
        done = await asyncio.gather(blocker, *writes, return_exceptions=True)
        assert seen == ["COMMIT", "COMMIT"]
        reasons = [reason_name(each.reason) for each in done if isinstance(each, NotecaseError)]
        assert reasons == ["STORE_UNAVAILABLE"] * 6
        assert await contents(store) == before

    after = await asyncio.gather(*(add(store, said(f"m-{n}"), once=once(f"r{n}")) for n in range(5)))
    assert [each.session.last_sequence for each in after] == [2, 3, 4, 5, 6]
    assert len(await store.read_events(KEY, 0)) == 6


async def test_a_cancelled_caller_loses_nothing_and_corrupts_nothing(store: SqliteStore) -> None:
    await create(store)
    async with held(store) as blocker:
        writes = [asyncio.create_task(add(store, said(f"m{number}"))) for number in range(3)]
        await waiting(*writes)
        writes[1].cancel()
        await asyncio.sleep(0)
    done = await asyncio.gather(*writes, return_exceptions=True)
    await blocker
    assert isinstance(done[1], asyncio.CancelledError)
    assert [event.message_added.name for event in await store.read_events(KEY, 0)] == ["m0", "m1", "m2"]
    assert (await add(store, said("m3"))).session.last_sequence == 4


async def test_closing_waits_for_commits_under_way(path: Path, clock: ManualClock) -> None:
    store = await SqliteStore.open(path, clock)
    await create(store)
    async with held(store) as blocker:
        write = asyncio.create_task(add(store, said("m1")))
        await waiting(write)
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
        with refused("STORE_UNAVAILABLE"):
            await add(store, said("m2"))
        assert not closing.done()
    await closing
    await blocker
    assert (await write).session.last_sequence == 1
    assert not Path(f"{path}-wal").exists()
    again = await SqliteStore.open(path, clock)
    assert len(await again.read_events(KEY, 0)) == 1
    await again.close()


async def test_a_new_file_that_could_not_be_made_is_empty_and_made_the_next_time(
    path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file, "SCHEMA", (*SCHEMA, "nonsense"))
        assert "cannot be used as a store" in await refusal(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        assert connection.execute("PRAGMA user_version").fetchone() == (0,)
    connection.close()
    store = await SqliteStore.open(path, clock)
    await create(store)
    await store.close()


@pytest.mark.parametrize("version", [0, -1])
async def test_a_file_of_an_unknown_schema_is_refused(path: Path, clock: ManualClock, version: int) -> None:
    await (await SqliteStore.open(path, clock)).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    before = path.read_bytes()
    assert f"unknown schema, {version}" in await refusal(path)
    assert path.read_bytes() == before


async def test_no_list_sorts_or_reads_a_whole_table(store: SqliteStore) -> None:
    """Each page is found in an index, first or later, filtered by common fields or not."""
    await create(store)
    await store.create_agent("acme", "sherlock", v1.Agent())
    await start(store, "r1", ended("r1"), said("m1"), changed(put("k", 1)))
    asked: set[str] = set()
    for reader in store._connections.readers:
        reader.set_trace_callback(asked.add)
    mine = Compare("user", "=", "users/ada")
    running = Compare("state", "=", v1.Run.STATE_RUNNING)
    for after in (None, (1 << 60, "x", "x")):
        two = after[:2] if after else None
        for where in (None, mine):
            await store.list_sessions("acme", Query(2, two, where))
        for where in (None, running, Compare("state", "=", v1.Run.STATE_FAILED)):
            await store.list_runs("acme", None, Query(2, after, where))
            await store.list_runs("acme", KEY, Query(2, after, where))
    for position in (None, (1,)):
        for newest_first in (False, True):
            await store.list_messages(KEY, Query(2, position), newest_first)
            await store.list_messages(KEY, Query(2, position), newest_first, step=StepKey("r1"))
        await store.list_agent_revisions("acme", "sherlock", Query(2, position))
    for key in (None, ("k",)):
        await store.list_agents("acme", Query(2, key))
        await store.list_state(session_key("acme", "case").state, Query(2, key))
    await store.read_events(KEY, 0)
    await store.expired_sessions(0, 10)
    for user in ("", "users/ada"):
        await store.session_keys("acme", user, 10)
    for reader in store._connections.readers:
        reader.set_trace_callback(None)

    planner = store._connections.readers[0]
    plans = {
        sql: [row[3] for row in planner.execute(f"EXPLAIN QUERY PLAN {sql}")]
        for sql in asked
        if sql.startswith("SELECT")
    }
    assert len(plans) > 20
    assert [sql for sql in plans if "unended = 1" in sql]
    for sql, plan in plans.items():
        # A read by a list of names uses that list as a table.
        scans = [step for step in plan if "SCAN" in step and "VIRTUAL TABLE" not in step]
        assert [] == scans + [step for step in plan if "TEMP B-TREE" in step], sql
    for sql, plan in plans.items():
        if '"user" = ' in sql:
            assert "sessions_by_user" in plan[0], sql
        if "unended = " in sql:
            ranges = [step for step in plan if step.startswith("SEARCH r ")]
            assert ranges
            assert all("runs_by_time (unended=? AND tenant=?" in step for step in ranges)


async def test_an_erasure_finds_what_it_removes_in_an_index(store: SqliteStore) -> None:
    """It reads no sessions and no requests of others: the writer keeps all commits waiting."""
    await create(store)
    asked: set[str] = set()
    store._connections.writer.set_trace_callback(asked.add)
    await store.delete_session(KEY)
    await store.sweep_sessions()
    assert await store.erase_state("acme", "users/ada")
    store._connections.writer.set_trace_callback(None)
    planner = store._connections.readers[0]
    found = [
        row[3]
        for sql in asked
        if sql.startswith(("SELECT", "UPDATE requests", "DELETE"))
        for row in planner.execute(f"EXPLAIN QUERY PLAN {sql}")
        if row[3].startswith(("SEARCH requests", "SEARCH sessions"))
    ]
    assert len(found) > 3
    assert [] == [step for step in found if step.endswith(" USING PRIMARY KEY (tenant=?)")]


async def test_a_page_of_messages_needs_no_more_of_the_file_when_it_is_long(store: SqliteStore) -> None:
    """Read costs are counted in steps of SQLite's machine, not in time."""
    await create(store)
    await add(store, *(said(f"a{number}") for number in range(100)))

    async def read() -> None:
        await store.list_messages(KEY, Query(20), newest_first=True)
        await store.get_state(session_key("acme", "case").state, ["k"])

    short = await _steps(store, read)
    await add(store, *(said(f"b{number}") for number in range(5000)))
    assert await _steps(store, read) <= short * 1.3


async def test_a_fork_of_the_beginning_needs_no_more_of_the_file_when_the_log_is_long(store: SqliteStore) -> None:
    await create(store)
    await add(store, *(said(f"a{number}") for number in range(100)))
    numbers = count()

    async def fork() -> None:
        past, key = await store.read_past(KEY, 50), session_key("acme", f"copy{next(numbers)}")
        await store.fork(Fork(key=key, source=KEY, past=past, session=v1.Session()))

    short = await _steps(store, fork)
    await add(store, *(said(f"b{number}") for number in range(5000)))
    assert await _steps(store, fork) <= short * 1.3


async def _steps(store: SqliteStore, ask: Callable[[], Awaitable[None]]) -> int:
    """The steps of an answer on the readers' connections, the fewest of several tries: a reader's first statement reads
    the schema, too."""
    return min([await _steps_once(store, ask) for _ in range(8)])


async def _steps_once(store: SqliteStore, ask: Callable[[], Awaitable[None]]) -> int:
    steps = 0

    def progressed() -> int:
        nonlocal steps
        steps += 1
        return 0

    for reader in store._connections.readers:
        reader.set_progress_handler(progressed, 1)
    await ask()
    for reader in store._connections.readers:
        reader.set_progress_handler(None, 0)
    return steps


async def test_eight_writers_and_readers_at_once(store: SqliteStore) -> None:
    """Readers that run during writes see only complete commits, and always those that have returned."""
    keys = [session_key("acme", f"s{number}") for number in range(8)]
    for key in keys:
        await create(store, key)

    async def write(key: SessionKey) -> None:
        for number in range(10):
            await store.commit(Commit(key=key, events=[said(f"a{number}"), said(f"b{number}")]))
            assert len((await store.list_messages(key, EVERYTHING)).rows) == 2 * number + 2

    async def read(key: SessionKey, writer: asyncio.Task[None]) -> None:
        while not writer.done():
            assert len(await store.read_events(key, 0)) % 2 == 0

    writers = [asyncio.create_task(write(key)) for key in keys]
    await asyncio.gather(*writers, *(read(key, writer) for key, writer in zip(keys, writers, strict=True)))


async def test_a_fork_copies_many_rows_with_a_statement_and_its_cost_grows_with_the_log_only(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in many transactions, and where there are many calls, each of which is looked for in its message."""
    monkeypatch.setattr(copies, "COPY_ROWS", 50)
    seen: list[str] = []
    trace = Trace((store._connections.writer, *store._connections.readers), seen.append, step=10)
    await create(store)
    costs: list[int] = []
    for length in (200, 200):
        for number in range(length):
            name = f"m{length}-{number}-{len(costs)}"
            await start(store, f"r{name}", called(name, f"r{name}", f"c{name}"), finished(f"c{name}", f"r{name}"))
            await add(store, ended(f"r{name}"))
        session = await store.get_session(KEY)
        assert session is not None
        head = session.last_sequence
        past = await store.read_past(KEY, head)
        seen.clear()
        trace.steps = 0
        key = session_key("acme", f"copy{head}")
        with trace.on():
            await store.fork(Fork(key=key, source=KEY, past=past, session=v1.Session()))
        costs.append(trace.steps)
        inserted = Counter(sql.split()[2] for sql in given(seen) if sql.startswith("INSERT"))
        assert {"deleted_sessions": 1, "sessions": 1, "session_names": 1}.items() <= inserted.items()
        assert {"logs", "changed_messages", "calls", "runs"} == inserted.keys() & {
            copied.rows.table for copied in SqliteTables.copies
        }
        assert max(inserted.values()) <= 1 + length * 5 * len(costs) // copies.COPY_ROWS
    assert costs[1] <= costs[0] * 2.3
    early = session_key("acme", "early")
    await store.fork(Fork(key=early, source=KEY, past=await store.read_past(KEY, 5), session=v1.Session()))
    count_calls = "SELECT count(*) FROM calls WHERE uid = ?"
    counts = [store._connections.readers[0].execute(count_calls, (key.uid,)).fetchone() for key in (KEY, early)]
    assert counts == [(400,), (1,)]


@pytest.mark.parametrize("body", [b"\xff\xff", b"\x0a\x7f", b"\x00"])
async def test_a_row_that_does_not_decode_is_a_store_that_cannot_be_used(
    path: Path, clock: ManualClock, body: bytes
) -> None:
    """It is named in the log, and the store goes on with all else."""
    other = session_key("acme", "other")
    store = await SqliteStore.open(path, clock)
    await create(store)
    await create(store, other)
    await store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE logs SET body = ? WHERE uid = ?", (body, KEY.uid))
        connection.commit()
    store = await SqliteStore.open(path, clock)
    with capture_logs() as lines, refused("STORE_UNAVAILABLE"):
        await store.get_session(KEY)
    assert [("store_step_failed", "DecodeError")] == [(line["event"], line["error"]) for line in lines]
    with refused("STORE_UNAVAILABLE"):
        await add(store, said("m1"))
    assert await store.get_session(other) is not None
    await store.close()


async def moved(store: SqliteStore) -> None:
    """Has all moved into the database that can be, after what the checkpointer was asked to do before."""
    done = asyncio.get_running_loop().create_future()
    store._checkpoints.put([done])
    await done


async def test_the_log_does_not_grow_with_what_is_written(store: SqliteStore, path: Path) -> None:
    """Also where nothing is deleted: the writer asks for a checkpoint again and again."""
    passes: list[str] = []
    store._connections.checkpointer.set_trace_callback(passes.append)
    await create(store)
    longest = 0
    for number in range(40):
        await add(store, said(f"m{number}", "x" * 500_000))
        await moved(store)
        longest = max(longest, Path(f"{path}-wal").stat().st_size)
    await store.close()
    assert 40 + 41 // CHECKPOINT_WRITES == len(passes)
    assert longest < 5 << 20


async def test_the_writer_moves_the_rest_of_a_long_log_and_no_commit_does(store: SqliteStore, path: Path) -> None:
    """The log has become long during a read. Callers have their answer before; the next write begins the log again,
    although the checkpointer has not had another turn."""
    seen: list[str] = []
    begun, go = threading.Event(), threading.Event()
    writer, tell = store._connections.writer, store._tell
    assert (0,) == writer.execute("PRAGMA wal_autocheckpoint").fetchone()

    def answered(jobs: Any, outcomes: Any) -> None:
        if threading.current_thread().name == "store-writer":
            seen.append("answered")
        tell(jobs, outcomes)

    def held() -> None:
        begun.set()
        go.wait()

    store._tell = answered  # type: ignore[method-assign]
    await create(store)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM store").fetchall()
        for number in range(9):
            await add(store, said(f"m{number}", "x" * 500_000))
        write = asyncio.create_task(store._write(lambda tables, now: held()))
        await asyncio.to_thread(begun.wait)  # by then the writer has looked whether the log is long
        await moved(store)
    writer.set_trace_callback(seen.append)
    go.set()
    await write
    for number in range(9, 13):
        await add(store, said(f"m{number}", "x" * 500_000))
        if number == 9:
            size = Path(f"{path}-wal").stat().st_size
            assert size > 4 << 20
    assert size == Path(f"{path}-wal").stat().st_size
    (at,) = (place for place, sql in enumerate(seen) if "wal_checkpoint" in sql)
    assert ["COMMIT", "answered"] == seen[at - 2 : at]


async def test_a_checkpoint_that_fails_loses_nothing(store: SqliteStore) -> None:
    store._connections.checkpointer.close()
    await create(store)
    with capture_logs() as logs:
        for number in range(20):
            await add(store, said(f"m{number}", "x" * 1000))
        await moved(store)
    assert "store_checkpoint_failed" in {line["event"] for line in logs}
    assert 20 == len(await store.read_events(KEY, 0))


async def test_a_session_whose_row_is_damaged_expires_by_its_column(tmp_path: Path, clock: ManualClock) -> None:
    path = tmp_path / "n.db"
    store = await SqliteStore.open(path, clock)
    other = session_key("acme", "t")
    await create(store, ttl=Duration(seconds=60))
    await create(store, other, ttl=Duration(seconds=7200))
    agent = await store.create_agent("acme", "a", v1.Agent())
    run = started("r1", agent=agent.name)
    await store.commit(Commit(key=KEY, events=[run, said("m1", run="r1")], start=RunRecord(b"d", agent), claim=True))
    await store.delete_agent("acme", "a")
    await store.sweep_agents()
    await store.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        assert [(1,)] == connection.execute("SELECT uses FROM retired_revisions").fetchall()
        assert 2 == connection.execute("UPDATE logs SET body = x'ff' WHERE epoch IS NOT NULL").rowcount
    store = await SqliteStore.open(path, clock)
    try:
        clock.now += 3_600_000_000
        assert [KEY] == await store.expired_sessions(clock.now, 10)
        assert not await store.expire_session(other)
        assert await store.expire_session(KEY)
        assert [] == await store.expired_sessions(clock.now, 10)
        await store.sweep_sessions()
    finally:
        await store.close()
    with closing(sqlite3.connect(path)) as connection:
        assert [("t",)] == connection.execute("SELECT session FROM sessions").fetchall()
        assert [] == connection.execute("SELECT run FROM runs").fetchall()
        assert [] == connection.execute("SELECT uses FROM retired_revisions").fetchall()

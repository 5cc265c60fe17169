"""A whole store is copied, and renewed: every row of every table, whatever interrupts it."""

import hashlib
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import asyncpg
import grpc
import pytest
from google.protobuf.message import DecodeError
from notecase import v1
from notecase_server import serve_stores
from notecase_server.auth.keys import Keys
from notecase_server.store import store_copy
from notecase_server.store.contract import AuditRow, RunRecord, Scope, SessionKey, Store, StoreOpenError
from notecase_server.store.rows import TABLES, UIDS, Head, Row, Table
from notecase_server.store.store_copy import digest

from tests.e2e.driving import reason_of
from tests.store.build import KEY, ManualClock, add, answered, create, once, put, refused, said, started
from tests.store.filled import GONE, fill
from tests.support import postgres
from tests.support.server import TENANT, Running, running


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    return await fill(tmp_path / "store.db")


def uid() -> str:
    return str(uuid4())


def ignore(table: str, rows: int) -> None:
    """Shows no progress."""


@pytest.fixture(params=["sqlite", "postgresql"])
async def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store can be copied: there is nothing yet."""
    return f"sqlite:{tmp_path / 'copy.db'}" if request.param == "sqlite" else await postgres.shared().new_database()


def by_url(store: Path | str) -> str:
    return store if isinstance(store, str) else f"sqlite:{store}"


async def rows_of(place: Path | str) -> dict[str, list[Row]]:
    """All that is in a store, by table."""
    store = await serve_stores.open_rows(by_url(place), is_target=False)
    found = {table.name: [row async for row in store.rows(table)] for table in TABLES}
    await store.close()
    return found


OF_ACTIVE_RUNS = frozenset({"revision", "deaths", "released"})
"""Columns of runs by which a SQLite store says what the portable table `active_runs` says, with two tables of
agents."""

OF_HEADS = frozenset({"activity", "update_time", "epoch", "commits"})
"""Columns of sessions that a SQLite store has, with the body, in the table of the events."""


async def test_every_column_of_every_table_is_among_the_portable_ones(path: Path) -> None:
    """With its key; and the store of these tests has rows in each."""
    with sqlite3.connect(path) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = set()
        for name in tables:
            columns = connection.execute(f"SELECT name, pk FROM pragma_table_info('{name}') ORDER BY cid").fetchall()
            key = tuple(name for name, _ in sorted((one for one in columns if one[1]), key=lambda one: one[1]))
            others = {column for column, _ in columns}
            if name == "sessions":
                others |= OF_HEADS | {"body"}
            others -= {"logs": OF_HEADS, "runs": OF_ACTIVE_RUNS}.get(name, frozenset())
            found.add(Table("events" if name == "logs" else name, key, tuple(sorted(others))))
    connection.close()
    assert {
        table._replace(columns=tuple(sorted(table.columns))) for table in TABLES if table.name != "active_runs"
    } == {table for table in found if table.name not in {"store", "run_agents", "retired_revisions", "lookups"}}
    assert [] == [name for name, rows in (await rows_of(path)).items() if not rows]
    assert all(table.columns[: len(table.key)] == table.key for table in TABLES)


async def test_postgresql_has_the_same_tables() -> None:
    """And whatever one kind of store keeps of itself alone."""
    url = await postgres.shared().new_database()
    await serve_stores.migrate(url)
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'"
    )
    keys = await connection.fetch(
        """SELECT c.relname, array_agg(a.attname::text ORDER BY array_position(i.indkey, a.attnum))
            FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid AND c.relnamespace = 'public'::regnamespace
            JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey)
            WHERE i.indisprimary GROUP BY c.relname"""
    )
    await connection.close()
    found = {name: {column for table, column in rows if table == name} for name, _ in rows}
    assert {"notecase_store", "owner", "known_revisions"} == found.keys() - {table.name for table in TABLES}
    assert {table.name: set(table.columns) for table in TABLES} == {table.name: found[table.name] for table in TABLES}
    assert {table.name: list(table.key) for table in TABLES} == {name: key for name, key in keys if name != "owner"}


async def test_a_copy_has_every_row_and_is_served(path: Path, target: str, tmp_path: Path) -> None:
    """A run that waited is answered in it, what was carried out is known, page tokens are taken, and new content and
    audit entries get new numbers. A copy of the copy is the same."""
    store = await opened(path)
    secret = store.secret
    await store.close()
    shown = list[tuple[str, int]]()
    digests = await copied(path, target, lambda table, rows: shown.append((table, rows)))
    assert await rows_of(path) == await rows_of(target)
    assert [table.name for table in TABLES] == list(digests)
    assert [(table.name, -1) for table in TABLES] == shown[-len(TABLES) :]
    assert digests == await copied(target, tmp_path / "back.db")
    store = await opened(target)
    assert secret == store.secret
    assert await store.is_keyed()
    with refused("SESSION_NOT_FOUND"):
        await store.recall(once("made"))
    await add(store, answered("i1", "r1"), key=KEY)
    await store.put_blob("acme", "", "0" * 64, b"more")
    await store.add_audit([AuditRow("acme", v1.AuditEntry())])
    assert b"a photograph" == await store.read_blob("acme", hashlib.sha256(b"a photograph").hexdigest(), 0)
    await store.close()


async def test_runs_that_have_not_ended_keep_their_agents(path: Path, target: str, tmp_path: Path) -> None:
    """Whether that is a revision, one of a deleted agent, or an agent that the start has changed."""
    store = await opened(path)
    for name in ("kept", "deleted"):
        await store.create_agent("acme", name, v1.Agent(display_name=name, llm=v1.LlmAgent(instruction=name)))
    changed = v1.Agent(name="agents/kept", revision=1, llm=v1.LlmAgent(instruction="changed"))
    agents = [await store.get_agent("acme", "kept"), await store.get_agent("acme", "deleted"), changed]
    for number, agent in enumerate(agents):
        assert agent is not None
        key = SessionKey("acme", f"at-work-{number}", uid())
        await create(store, key)
        await add(store, started("r1", agent=agent.name), key=key, claim=True, start=RunRecord(b"d", agent))
    await store.delete_agent("acme", "deleted")
    before = await store.active_runs()
    await store.close()
    await copied(path, target)
    await copied(target, tmp_path / "back.db")
    for place in (target, tmp_path / "back.db"):
        copy = await opened(place)
        assert before == await copy.active_runs()
        await copy.close()
    assert {"kept", "deleted", "changed"} <= {run.agent.llm.instruction for run in before}


async def copied(
    source: Path | str, target: Path | str, progress: Callable[[str, int], None] = ignore
) -> dict[str, str]:
    return await serve_stores.copy(by_url(source), by_url(target), progress)


async def opened(place: Path | str) -> Store:
    return await serve_stores.open_store(by_url(place), ManualClock())


class Stopped(Exception):
    """Raised by the progress of a copy, whose transaction before is durable."""


async def test_a_copy_that_is_interrupted_anywhere_goes_on(
    path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its transactions. Until it is complete, no server opens it, and it cannot be copied or renewed."""
    monkeypatch.setattr(store_copy, "BATCH_ROWS", 100)
    expected, whole = await rows_of(path), False

    def stop(table: str, rows: int) -> None:
        nonlocal whole
        whole = rows < 0
        raise Stopped

    interruptions = 0
    while not whole:
        with pytest.raises(Stopped):
            await copied(path, target, stop)
        interruptions += 1
    assert interruptions > len([rows for rows in expected.values() if rows])
    for use in (opened(target), copied(target, "sqlite:never"), serve_stores.renew(target, uid)):
        with pytest.raises(StoreOpenError, match="Repeat the copy"):
            await use
    await copied(path, target)
    assert expected == await rows_of(target)


KILLED = """
import asyncio, os, signal, sys
from notecase_server import serve_stores
from notecase_server.auth.keys import Keys
from notecase_server.store import store_copy
store_copy.BATCH_ROWS = 20
steps = 0
def progress(table, rows):
    global steps
    steps += 1
    if steps == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(serve_stores.copy(sys.argv[1], sys.argv[2], progress))
"""


async def test_a_copy_that_is_killed_goes_on(path: Path, target: str) -> None:
    assert -signal.SIGKILL == run(KILLED, by_url(path), target, "17")
    await copied(path, target)
    assert await rows_of(path) == await rows_of(target)


def run(script: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-c", script, *arguments], check=False, timeout=60).returncode


async def test_a_place_that_is_not_empty_is_refused(path: Path, target: str) -> None:
    """A copy that is whole, which may be of the same source, and an unfinished copy of another store."""
    unfinished = await serve_stores.open_rows(target, is_target=True)
    await unfinished.begin_copy(b"another")
    await unfinished.close()
    with pytest.raises(StoreOpenError, match="Choose another"):
        await copied(path, target)
    again = await serve_stores.open_rows(target, is_target=True)
    await again.finish_copy(Head(b"secret", keyed=False))
    await again.close()
    await copied(path, target)
    with pytest.raises(StoreOpenError, match="is not empty: it has tenants"):
        await copied(path, target)


async def test_a_store_that_is_open_or_not_there_is_not_copied(path: Path, target: str, tmp_path: Path) -> None:
    with pytest.raises(StoreOpenError, match="There is no store at"):
        await copied(tmp_path / "nothing.db", target)
    assert not (tmp_path / "nothing.db").exists()
    with pytest.raises(StoreOpenError, match="is in use"):
        await copied(path, path)
    with pytest.raises(StoreOpenError, match="'memory:' is not a store"):
        await copied(path, "memory:")
    await copied(path, target)
    store = await opened(target)
    for use in (copied(target, tmp_path / "more.db"), renew(target)):
        with pytest.raises(StoreOpenError, match="is in use"):
            await use
    await store.close()


async def renew(place: Path | str) -> int:
    return await serve_stores.renew(by_url(place), uid)


async def test_a_source_that_is_served_meanwhile_is_found_out(path: Path, target: str) -> None:
    """Also where a row has changed that was copied before."""

    def stop(table: str, rows: int) -> None:
        if table == "sessions":
            raise Stopped

    with pytest.raises(Stopped):
        await copied(path, target, stop)
    store = await opened(path)
    await add(store, said("m9", "more"), key=KEY)
    await store.close()
    with pytest.raises(StoreOpenError, match="may have been served since the copy was begun"):
        await copied(path, target)
    with pytest.raises(StoreOpenError, match="is an unfinished copy"):
        await opened(target)


async def test_a_digest_tells_every_value_and_its_place() -> None:
    class Rows:
        def __init__(self, *rows: Row) -> None:
            self._rows = rows

        async def rows(self, table: Table, after: Row | None = None) -> AsyncIterator[Row]:
            for row in self._rows:
                yield row

    kinds = [("a", "bc"), ("ab", "c"), ("a", b"bc"), ("a", None), ("a", ""), ("a", 0), ("abc",)]
    digests = [await digest(cast(Any, Rows(row)), TABLES[0]) for row in kinds]
    digests += [
        await digest(cast(Any, Rows(*kinds)), TABLES[0]),
        await digest(cast(Any, Rows(*reversed(kinds))), TABLES[0]),
    ]
    assert len(kinds) + 2 == len(set(digests))


@pytest.fixture(params=["sqlite", "postgresql"])
async def store_at(request: pytest.FixtureRequest, path: Path) -> str:
    """The store of these tests, in either kind."""
    if request.param == "sqlite":
        return by_url(path)
    url = await postgres.shared().new_database()
    await copied(path, url)
    return url


async def test_a_renewal_changes_the_uids_and_nothing_else(store_at: str) -> None:
    """In every row that holds one, the recorded answers too; the old ones are in no row of a session that is there."""
    before = await rows_of(store_at)
    count = await renew(store_at)
    after = await rows_of(store_at)
    fresh = {(row[0], row[1]): new[2] for row, new in zip(before["session_names"], after["session_names"], strict=True)}
    old = {(row[0], row[1]): row[2] for row in before["session_names"]}
    uids = {old[name]: fresh[name] for name in old}
    assert count == len(uids) == len(set(uids.values()))
    assert not set(uids) & set(uids.values())
    for table in TABLES:
        expected = sorted((renewed(table, row, uids) for row in before[table.name]), key=repr)
        assert expected == sorted(after[table.name], key=repr), table.name
        for row in after[table.name]:
            assert not [one for one in uids for value in row if one in str(value)], table.name
    assert any(GONE.uid in row for row in after["events"]), "what is left of a deleted session is not renewed"


def renewed(table: Table, row: Row, uids: dict[str, str]) -> Row:
    """The row as it has to be."""
    values = dict(zip(table.columns, row, strict=True))
    for name, column, where in UIDS:
        if name == table.name and (where == "true" or values["kind"] == "session"):
            former, values[column] = values[column], uids.get(values[column], values[column])
    body = "body" if table.name == "sessions" else "response" if table.name == "requests" else ""
    if values.get(body) and former in uids:
        with suppress(DecodeError):  # another kind of answer
            session = v1.Session.FromString(values[body])
            if session.uid:
                assert former == session.uid
                session.uid = uids[former]
                session.etag = f"{session.uid[:8]}-{session.etag.rpartition('-')[2]}"
                values[body] = session.SerializeToString()
    return tuple(values.values())


async def test_a_user_named_like_a_sessions_uid_keeps_its_state(store_at: str) -> None:
    store = await opened(store_at)
    scope = Scope("acme", "user", KEY.uid)
    await store.update_state(scope, [put("k", "v")])
    await store.close()
    await renew(store_at)
    store = await opened(store_at)
    assert 1 == (await store.get_state(scope, ["k"])).version
    await store.close()


async def test_keys_open_a_copy_and_a_renewed_store_as_before(path: Path, target: str) -> None:
    def keys(store: Store) -> Keys:
        return Keys(store, uid, ManualClock(), lambda: 0.0)

    store = await opened(path)
    _, token = await keys(store).create("acme", v1.Key(role=v1.Key.ROLE_ADMIN))
    await store.close()
    await copied(path, target)
    for place in (path, target):
        await renew(place)
        store = await opened(place)
        principal = await keys(store).principal({"authorization": f"Bearer {token}"}, dict)
        assert principal is not None
        assert "acme" == principal.tenant
        await store.close()


RENEWED = """
import os, signal, sys
from notecase_server.store.sqlite import renewal as sqlite_renewal
session = sqlite_renewal.renewed_session
def killed(body, uid):
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError
sqlite_renewal.renewed_session = killed
try:
    sqlite_renewal.renew(__import__("pathlib").Path(sys.argv[1]), lambda: str(__import__("uuid").uuid4()))
except sqlite_renewal.StoreOpenError as error:
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("raise", 3)])
async def test_a_renewal_that_is_cut_leaves_the_store_as_it_was(path: Path, how: str, code: int) -> None:
    """When all rows but the sessions' own were renewed."""
    before = await rows_of(path)
    assert code == run(RENEWED, str(path), how)
    assert before == await rows_of(path)


async def test_a_store_that_is_not_there_is_not_renewed(tmp_path: Path) -> None:
    with pytest.raises(StoreOpenError, match="There is no store at"):
        await renew(tmp_path / "nothing.db")
    with pytest.raises(StoreOpenError, match="'memory:' is not a store"):
        await renew("memory:")


async def exports(served: Running, tenant: str) -> dict[str, bytes]:
    """Every session of a tenant that no run is at work in, as a file."""
    found, metadata = {}, ((TENANT, tenant),)
    page = await served.sessions.ListSessions(v1.ListSessionsRequest(page_size=1000), metadata=metadata)
    for session in page.sessions:
        if session.active_run or session.queued_commands:
            continue
        call = served.sessions.ExportSession(v1.ExportSessionRequest(name=session.name), metadata=metadata)
        found[session.name] = b"".join([response.chunk async for response in call])
    return found


async def test_callers_of_a_renewed_store_read_sessions_again(path: Path) -> None:
    """Every session exports as the bytes it was. A cursor and an etag from before are refused, and a request that is
    repeated is answered with the new uid."""
    metadata = ((TENANT, "acme"),)
    created = v1.CreateSessionRequest(session_id="fresh", request_id="once")
    async with running(f"sqlite:{path}") as served:
        was = await served.sessions.CreateSession(created, metadata=metadata)
    async with running(f"sqlite:{path}") as served:
        before = {tenant: await exports(served, tenant) for tenant in ("default", "other", "acme")}
    await renew(path)
    async with running(f"sqlite:{path}") as served:
        after = {tenant: await exports(served, tenant) for tenant in ("default", "other", "acme")}
        assert before == {tenant: {name: after[tenant][name] for name in files} for tenant, files in before.items()}
        assert 10 < sum(map(len, before.values()))
        now = await served.sessions.CreateSession(created, metadata=metadata)
        assert was.uid != now.uid == (await get(served, "sessions/fresh")).uid
        watch = v1.WatchEventsRequest(name="sessions/fresh", if_session_uid=was.uid)
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await served.runs.WatchEvents(watch, metadata=metadata).read()
        update = v1.UpdateSessionRequest(session=v1.Session(name="sessions/fresh", etag=was.etag, display_name="x"))
        update.update_mask.paths.append("display_name")
        with pytest.raises(grpc.aio.AioRpcError) as missed:
            await served.sessions.UpdateSession(update, metadata=metadata)
    assert ["SESSION_NOT_FOUND", "ETAG_MISMATCH"] == [reason_of(error.value) for error in (gone, missed)]


async def get(served: Running, name: str) -> v1.Session:
    return await served.sessions.GetSession(v1.GetSessionRequest(name=name), metadata=((TENANT, "acme"),))

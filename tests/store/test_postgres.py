"""What is PostgreSQL's own of its store: the wire, the fence, other writers, and databases that are not fit."""

import asyncio
import contextlib
import random
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from notecase import v1
from notecase_server import serve_stores
from notecase_server.errors import NotecaseError, reason_name
from notecase_server.store.contract import (
    CommandId,
    Commit,
    Committed,
    Query,
    Quotas,
    Scope,
    SessionKey,
    StoreOpenError,
)
from notecase_server.store.postgres import database as postgres_database
from notecase_server.store.postgres import store as postgres_store
from notecase_server.store.postgres import wire as postgres_wire
from notecase_server.store.postgres.commit import CommitTables
from notecase_server.store.postgres.schema import MIGRATIONS, VERSION
from notecase_server.store.postgres.store import PostgresStore
from notecase_server.store.postgres.tables import PostgresTables
from notecase_server.store.postgres.wire import Defect, awaited, escaped, unescaped
from structlog.testing import capture_logs

from tests.store.build import (
    APP_STATE,
    EVERYTHING,
    KEY,
    NOTHING,
    USER_STATE,
    ManualClock,
    add,
    called,
    changed,
    contents,
    create,
    dispatched,
    ended,
    finished,
    increment,
    once,
    plain,
    put,
    refused,
    replied,
    rewound,
    said,
    session_key,
    start,
)
from tests.support import postgres
from tests.support.authority import Authority
from tests.support.postgres_proxy import PostgresProxy


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with postgres.shared().empty_store() as url:
        yield url


@pytest.fixture
async def store(url: str, clock: ManualClock) -> AsyncIterator[PostgresStore]:
    opened = await PostgresStore.open(url, clock)
    yield opened
    await opened.close()


@pytest.fixture
async def second_connection(url: str) -> AsyncIterator[Any]:
    """A second connection."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


async def turn(store: PostgresStore, number: int) -> list[Committed]:
    """What a run commits: its start with what the user said, a call and its result, and its end with the reply."""
    run, call = f"r{number}", f"c{number}"
    command = CommandId(f"{number}", b"digest")
    done = [await start(store, run, said(f"m{number}", run=run), id=f"{number}-1", command=command, newest=5)]
    asks = (called(f"n{number}", run, call), dispatched(call, run))
    done.append(await add(store, *asks, changed(put("k", number)), if_epoch=done[0].epoch, id=f"{number}-2"))
    done.append(await add(store, finished(call, run), if_epoch=done[0].epoch, id=f"{number}-3"))
    ends = (replied(f"o{number}", run), ended(run))
    done.append(await add(store, *ends, if_epoch=done[0].epoch, id=f"{number}-4"))
    return done


# ---- round trips


@pytest.mark.parametrize(("prepared", "trips"), [(True, 2), (False, 4)])
async def test_a_commit_takes_two_round_trips_prepared_and_four_without(
    url: str, clock: ManualClock, prepared: bool, trips: int
) -> None:
    async with PostgresProxy(url) as proxy:
        store = await PostgresStore.open(proxy.url, clock, connections=1, prepared=prepared)
        await create(store)
        for number in range(2):
            await turn(store, number)
        before = proxy.trips
        commits = await turn(store, 2)
        assert trips * len(commits) == proxy.trips - before
        shared = (changed(increment("n", 1), state="user"), changed(increment("n", 1), state="app"))
        for number in range(3):
            before = proxy.trips
            await add(store, *shared, once=once(f"request {number}", NOTHING))
        assert trips == proxy.trips - before
        await store.close()


async def test_a_list_and_a_read_take_as_many_round_trips_however_many_rows_there_are(
    url: str, clock: ManualClock
) -> None:
    async with PostgresProxy(url) as proxy:
        store = await PostgresStore.open(proxy.url, clock, connections=1)

        async def taken() -> dict[str, int]:
            reads: dict[str, Callable[[], Awaitable[Any]]] = {
                "sessions": lambda: store.list_sessions("acme", EVERYTHING),
                "messages": lambda: store.list_messages(KEY, EVERYTHING),
                "runs": lambda: store.list_runs("acme", None, EVERYTHING),
                "state": lambda: store.list_state(KEY.state, EVERYTHING),
                "events": lambda: store.read_events(KEY, 0),
                "audit": lambda: store.list_audit("acme", EVERYTHING),
            }
            found = {}
            for name, read in reads.items():
                await read()
                before = proxy.trips
                await read()
                found[name] = proxy.trips - before
            return found

        await create(store)
        await turn(store, 0)
        few = await taken()
        await add(store, *(said(f"x{number}") for number in range(200)))
        await add(store, *(changed(put(f"k{number}", number)) for number in range(200)))
        for number in range(1, 20):
            await create(store, session_key("acme", f"s{number}"))
            await turn(store, number)
        assert few == await taken()
        assert max(few.values()) <= 5
        await store.close()


async def test_runs_that_have_not_ended_are_found_without_reading_all_others(
    store: PostgresStore, second_connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(store)
    await start(store, "r1", said("m1", run="r1"))
    columns = (
        'create_time, "user", agent, activity, display_name, update_time, expire_time, labels, epoch, commits, body'
    )
    await second_connection.execute(
        f"""INSERT INTO sessions (tenant, session, uid, {columns})
            SELECT tenant, 's' || g, 'w' || g, {columns} FROM sessions, generate_series(1, 1000) g"""
    )
    for state, prefix, count in ((v1.Run.STATE_WAITING, "w", 1000), (v1.Run.STATE_SUCCEEDED, "e", 2000)):
        await second_connection.execute(
            f"""INSERT INTO runs SELECT tenant, '{prefix}' || g, run, {state}, agent, create_time + g, labels,
                first_sequence, last_sequence, digest, body
                FROM runs, generate_series(1, {count}) g WHERE uid = '{KEY.uid}'"""
        )
    await second_connection.execute(
        """INSERT INTO active_runs SELECT tenant, create_time + g, 'w' || g, run, step, deaths, released, revision
            FROM active_runs, generate_series(1, 1000) g"""
    )
    await second_connection.execute("ANALYZE runs; ANALYZE active_runs; ANALYZE sessions")
    statements, kept = list[tuple[str, tuple[Any, ...]]](), PostgresTables.rows

    def rows(tables: PostgresTables, statement: str, *values: Any) -> Any:
        statements.append((statement, values))
        return kept(tables, statement, *values)

    monkeypatch.setattr(PostgresTables, "rows", rows)
    (run,) = await store.idle_runs()
    assert run == (await store.active_runs(None, 100))[0]
    assert 2 == len(statements)
    for statement, values in statements:
        plan = "\n".join(row[0] for row in await second_connection.fetch(f"EXPLAIN {statement}", *values))
        assert "Scan on runs" not in plan
        assert "Index Scan using runs_" in plan


async def test_runs_behind_a_page_of_which_none_decodes_are_found(store: PostgresStore, second_connection: Any) -> None:
    for number in range(4):
        key = session_key("acme", f"s{number}")
        await create(store, key)
        await start(store, "r1", key=key)
    active = await store.active_runs()
    damaged = [each.key.uid for each in active[:2]]
    await second_connection.execute("UPDATE runs SET body = '\\xffff' WHERE uid = ANY($1)", damaged)
    with capture_logs() as logs:
        assert active[2:] == await store.active_runs(None, 2)
        assert active[2:3] == await store.active_runs(None, 1)
        assert [] == await store.active_runs(active[3], 2)
    assert damaged * 2 == [line["uid"] for line in logs if line["event"] == "run_unreadable"]


async def test_a_session_whose_row_is_damaged_is_listed_and_deleted_with_its_runs(
    store: PostgresStore, second_connection: Any
) -> None:
    await create(store)
    await start(store, "r1")
    await second_connection.execute("UPDATE sessions SET body = '\\xffff'")
    found = await store.list_sessions(KEY.tenant, Query(10))
    assert [(KEY.session, KEY.uid)] == [(row.name, row.uid) for row in found.rows]
    assert (KEY, "users/ada") == await store.find_session_key(KEY.tenant, KEY.session)
    assert [KEY] == await store.session_keys(KEY.tenant, "", 10)
    await store.delete_session(KEY)
    assert 0 == await second_connection.fetchval("SELECT count(*) FROM active_runs")
    assert [] == await store.session_keys(KEY.tenant, "", 10)


async def test_a_page_of_large_rows_is_not_read_beyond_its_end(store: PostgresStore) -> None:
    await create(store)
    for number in range(12):
        await add(store, said(f"m{number}", "x" * 900_000))

    def step(tables: Any) -> int:
        assert isinstance(tables, PostgresTables)
        rows = tables.page(
            "SELECT sequence, body, length(body) AS size FROM events WHERE uid = $1", "sequence", [KEY.uid], 1000
        )
        return len(rows)

    assert 4 == await store._read(step)
    assert 12 == await store._read(lambda tables: len(list(tables.events(KEY, 0, 100))))
    assert 7 == await store._read(lambda tables: len(list(tables.events(KEY, 2, 7))))
    page = await store.list_messages(KEY, EVERYTHING)
    assert (2, (2,)) == (len(page.rows), page.next)


# ---- owners


async def test_a_store_that_another_has_taken_over_writes_nothing_more(
    url: str, store: PostgresStore, clock: ManualClock
) -> None:
    await create(store)
    await add(store, said("m1"))
    successor = await PostgresStore.open(url, clock)
    assert store.fence + 1 == successor.fence
    for write in (
        lambda: add(store, said("m2")),
        lambda: create(store, session_key("acme", "another")),
        lambda: store.update_state(APP_STATE, [put("k", 1)]),
        lambda: store.claim(KEY, 1),
        store.probe,
    ):
        store.fenced.clear()
        with refused("STORE_UNAVAILABLE"):
            await write()
        assert store.fenced.is_set()
    await add(successor, said("m2"))
    assert ["m1", "m2"] == [row.name for row in (await successor.list_messages(KEY, EVERYTHING)).rows]
    assert not (await successor.get_state(APP_STATE, ["k"])).entries
    await successor.close()


async def test_a_takeover_between_the_reads_and_the_writes_of_a_commit_refuses_it(
    url: str, store: PostgresStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(store)
    flush, successors = CommitTables.flush, list[PostgresStore]()

    def late(tables: CommitTables) -> None:
        if not successors:
            successors.append(awaited(PostgresStore.open(url, clock)))
        flush(tables)

    monkeypatch.setattr(CommitTables, "flush", late)
    with refused("STORE_UNAVAILABLE"):
        await add(store, said("m1"))
    assert store.fenced.is_set()
    assert [] == await successors[0].read_events(KEY, 0)
    await successors[0].close()


async def test_a_takeover_waits_for_a_write_under_way_and_then_no_other_is_made(
    url: str, store: PostgresStore, clock: ManualClock, second_connection: Any
) -> None:
    held, let_go = asyncio.Event(), asyncio.Event()

    def step(tables: Any, now: int) -> None:
        held.set()
        awaited(let_go.wait())
        tables.touch()

    writing = asyncio.create_task(store._write(step))
    await held.wait()
    opening = asyncio.create_task(PostgresStore.open(url, clock))
    await waits_for_a_lock(second_connection)
    let_go.set()
    await writing
    successor = await opening
    with refused("STORE_UNAVAILABLE"):
        await store.probe()
    await successor.close()


async def waits_for_a_lock(connection: Any) -> None:
    """Returns once a statement in this database waits for a lock."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    while not await connection.fetchval(waiting):
        pass


# ---- other writers


async def test_a_commit_whose_session_has_changed_since_it_was_read_is_repeated(
    store: PostgresStore, second_connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(store)
    await add(store, said("m1"))
    with come_between(monkeypatch, second_connection.execute("UPDATE sessions SET epoch = epoch + 6")) as tries:
        done = await add(store, said("m2"))
    assert (2, 7) == (len(tries), done.epoch)
    with (
        come_between(monkeypatch, second_connection.execute("UPDATE sessions SET epoch = epoch + 1")),
        refused("OWNER_LOST"),
    ):
        await add(store, said("m3"), if_epoch=7)
    assert ["m1", "m2"] == [row.name for row in (await store.list_messages(KEY, EVERYTHING)).rows]


@pytest.mark.parametrize("scope", [USER_STATE, APP_STATE], ids=lambda scope: scope.kind)
async def test_a_commit_whose_state_has_changed_since_it_was_read_is_repeated(
    store: PostgresStore, second_connection: Any, monkeypatch: pytest.MonkeyPatch, scope: Scope
) -> None:
    """Also the first time that anybody writes to it."""
    await create(store)
    event = changed(increment("n", 1), state=scope.kind)
    entry = v1.StateEntry(version=1)
    entry.value.int_value = 40
    place, body = f"'acme', '{scope.kind}', '{scope.id}'", entry.SerializeToString().hex()
    raced = f"""INSERT INTO states VALUES ({place}, 1);
        INSERT INTO entries VALUES ({place}, 'n', '\\x{body}')"""
    with come_between(monkeypatch, second_connection.execute(raced)) as tries:
        await add(store, event)
    with come_between(monkeypatch, second_connection.execute("UPDATE states SET version = version + 3")) as more:
        await add(store, event)
    assert [2, 2] == [len(tries), len(more)]
    state = await store.get_state(scope, ["n"])
    assert (6, 42) == (state.version, plain(state.entries["n"].value))


@contextlib.contextmanager
def come_between(monkeypatch: pytest.MonkeyPatch, act: Any) -> Iterator[list[CommitTables]]:
    """Lets something happen between the reads and the writes of the next commit; collects what tries to write."""
    flush, tries = CommitTables.flush, list[CommitTables]()

    def late(tables: CommitTables) -> None:
        tries.append(tables)
        if len(tries) == 1:
            awaited(act)
        flush(tables)

    with monkeypatch.context() as patch:
        patch.setattr(CommitTables, "flush", late)
        yield tries


async def test_a_commit_that_others_come_between_every_time_is_given_up(
    store: PostgresStore, second_connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(store)
    flush, tries = CommitTables.flush, 0

    def late(tables: CommitTables) -> None:
        nonlocal tries
        tries += 1
        awaited(second_connection.execute("UPDATE sessions SET epoch = epoch + 1"))
        flush(tables)

    monkeypatch.setattr(CommitTables, "flush", late)
    with refused("STORE_UNAVAILABLE"):
        await add(store, said("m1"))
    assert postgres_store.TRIES == tries
    assert [] == await store.read_events(KEY, 0)


async def test_of_two_commits_with_one_request_id_or_one_name_one_is_made(store: PostgresStore) -> None:
    """Of different sessions at once, so that neither waits for the other."""
    keys = [session_key("acme", f"s{number}") for number in range(8)]
    user = v1.Session(user="users/ada")
    same = (Commit(key=key, create=user, once=once("one", NOTHING)) for key in keys)
    done = await asyncio.gather(*map(store.commit, same), return_exceptions=True)
    assert 1 == sum(isinstance(each, Committed) for each in done)
    assert {"Replayed", "Committed"} == {type(each).__name__ for each in done}
    named = (Commit(key=key._replace(session="case"), create=user) for key in keys[1:])
    done = await asyncio.gather(*map(store.commit, named), return_exceptions=True)
    assert 1 == sum(isinstance(each, Committed) for each in done)
    assert 2 == len((await store.list_sessions("acme", EVERYTHING)).rows)


async def test_a_deadlock_with_another_connection_is_tried_again(store: PostgresStore, second_connection: Any) -> None:
    """The store is the one that PostgreSQL ends: it waits last, and the other looks for no deadlock."""
    await store.update_state(APP_STATE, [put("k", 1)])
    held, let_go, tries = asyncio.Event(), asyncio.Event(), 0

    def step(tables: Any, now: int) -> None:
        nonlocal tries
        tries += 1
        held.set()
        awaited(let_go.wait())
        tables.put_version(APP_STATE, 7)

    await second_connection.execute("SET deadlock_timeout = '10min'; BEGIN; SELECT FROM states FOR UPDATE")
    writing = asyncio.create_task(store._write(step))
    await held.wait()
    blocked = asyncio.create_task(second_connection.execute("SELECT FROM owner FOR UPDATE"))
    await waits_for_a_lock(store._pool)
    let_go.set()
    await blocked
    await second_connection.execute("COMMIT")
    await writing
    assert (await store.get_state(APP_STATE, [])).version == 7
    assert tries > 1  # a try that locks the owner's row before the other does ends in the same deadlock again


async def test_the_wait_for_a_locked_row_is_limited(
    store: PostgresStore, second_connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "WRITE_SECONDS", 0.05)
    await store.update_state(APP_STATE, [put("k", 1)])
    await second_connection.execute("BEGIN; SELECT FROM states FOR UPDATE")
    with refused("STORE_UNAVAILABLE"):
        await store.update_state(APP_STATE, [put("k", 2)])
    await second_connection.execute("COMMIT")
    monkeypatch.undo()
    assert 2 == (await store.update_state(APP_STATE, [put("k", 2)])).version


async def test_the_lock_of_a_frozen_server_in_a_transaction_is_limited(
    store: PostgresStore, second_connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "WRITE_SECONDS", 0.05)
    begun, ended = asyncio.Event(), asyncio.Event()

    def step(tables: Any, now: int) -> None:
        tables.touch()
        begun.set()
        awaited(ended.wait())
        tables.touch()

    writing = asyncio.create_task(store._write(step))
    writing.add_done_callback(lambda _: begun.set())  # where the machine is so slow that its first statement fails
    await begun.wait()
    await second_connection.execute("UPDATE notecase_store SET keyed = keyed")
    while await second_connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
    ):
        pass
    ended.set()
    with refused("STORE_UNAVAILABLE"):
        await writing
    monkeypatch.undo()
    await store.probe()


# ---- failures


@pytest.mark.parametrize(
    "code",
    ["08006", "25006", "40001", "53100", "53300", "55P03", "57014", "57P01", "57P02", "57P03", "42501", "58030"],
)
async def test_a_transient_failure_is_reported_as_one(store: PostgresStore, code: str) -> None:
    with refused("STORE_UNAVAILABLE") as told:
        await store._write(lambda tables, _: raise_sqlstate(tables, code))
    assert ("disk" in str(told.value)) == (code == "53100")
    await store.probe()


@pytest.mark.parametrize("code", ["22003", "23502", "42601"])
async def test_a_statement_that_can_never_succeed_is_a_defect_and_its_error_has_no_stored_data(
    store: PostgresStore, code: str
) -> None:
    with pytest.raises(Defect) as told:
        await store._write(lambda tables, _: raise_sqlstate(tables, code))
    assert code in str(told.value)
    assert "secret" not in repr(told.value)
    assert told.value.__cause__ is None
    await store.probe()


def raise_sqlstate(tables: Any, code: str) -> None:
    tables.do(f"DO $$ BEGIN RAISE EXCEPTION 'a secret' USING ERRCODE = '{code}'; END $$")


async def test_a_connection_that_cannot_be_made_is_the_store_that_is_away(
    url: str, clock: ManualClock, tmp_path: Path
) -> None:
    """Whatever is wrong with its certificates or its password file; the store goes on once that is mended."""
    authority, ca, password = Authority(), tmp_path / "ca.pem", tmp_path / "password"
    ca.write_bytes(authority.cert)
    password.write_text("a-secret")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    good = authority.issue().write(tmp_path)
    expired = authority.issue(lasts=timedelta(seconds=-60)).write(tmp_path, "expired")
    tls.load_cert_chain(*good)
    database = url.partition("?")[0].rpartition("/")[2]
    async with PostgresProxy(url, tls) as proxy:
        by_tls = f"postgresql://postgres@{proxy.address}/{database}?sslmode=verify-full&sslrootcert={ca}"
        store = await PostgresStore.open(by_tls, clock, password=password.read_text)
        await create(store)
        troubles: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "certificate": (lambda: tls.load_cert_chain(*expired), lambda: tls.load_cert_chain(*good)),
            "no CA": (ca.unlink, lambda: ca.write_bytes(authority.cert)),
            "CA": (lambda: ca.write_text("none"), lambda: ca.write_bytes(authority.cert)),
            "password": (lambda: password.write_bytes(b"\xff\xfe"), lambda: password.write_text("a-secret")),
            "no password": (password.unlink, lambda: password.write_text("a-secret")),
        }
        for begin, end in troubles.values():
            begin()
            proxy.cut()
            for _ in range(2):
                with refused("STORE_UNAVAILABLE"):
                    await add(store, said("m1"))
            end()
            await store.probe()
        await store.close()
    passfile = tmp_path / "passfile"
    passfile.write_bytes(b"\xff")
    passfile.chmod(0o600)
    with pytest.raises(StoreOpenError, match="its password file is not text in UTF-8"):
        await serve_stores.open_store(f"{url}&passfile={passfile}", clock)


@pytest.mark.parametrize("code", ["25006", "26000", "42P05"])
async def test_connections_that_have_landed_in_the_wrong_place_are_replaced(store: PostgresStore, code: str) -> None:
    """On a host that is read-only by now, or at a pooler that does not keep what was prepared."""
    await asyncio.gather(*(store.get_session(KEY) for _ in range(5)))
    holders = store._pool._holders
    connections = [holder._con for holder in holders if holder._con]
    if code == "25006":
        for connection in connections:
            await connection.execute("SET default_transaction_read_only = on")
    with refused("STORE_UNAVAILABLE"):
        await store._write(lambda tables, _: raise_sqlstate(tables, code))
    await store.probe()
    await asyncio.gather(*(store.get_session(KEY) for _ in range(5)))
    assert not {holder._con for holder in holders} & {*connections}


async def test_an_answer_that_is_lost_is_of_a_commit_that_can_be_asked_about(url: str, clock: ManualClock) -> None:
    """The connection is cut when the statement that writes has reached the database, and before: it is never half
    made."""
    async with PostgresProxy(url) as proxy:
        store = await PostgresStore.open(proxy.url, clock, connections=1)
        await create(store)
        await add(store, said("m0"), id="warm")
        made = set[bool]()
        for number, (sync, passed) in enumerate([(1, False), (1, True), (2, False), (2, True)]):
            left = sync

            def cut(kind: str, body: bytes, passed: bool = passed) -> asyncio.Event | None:
                nonlocal left
                left -= kind == "S"
                if not left and kind == "S":
                    if passed:
                        asyncio.get_running_loop().call_soon(proxy.cut)
                    else:
                        proxy.cut()
                return None

            proxy.asked = cut
            with refused("STORE_UNAVAILABLE"):
                await add(store, said(f"n{number}"), id=f"commit {number}")
            proxy.asked = lambda kind, body: None
            found = await store.find_commit(KEY, f"commit {number}")
            kept = {message.name for message in (await store.list_messages(KEY, EVERYTHING)).rows}
            assert (found is not None) == (f"n{number}" in kept)
            made.add(found is not None)
            assert (sync, passed) == (2, True) or found is None
        await add(store, said("last"))
        await store.close()


@pytest.mark.parametrize("new", [False, True], ids=["of a session", "of a new session"])
async def test_a_commit_that_was_said_not_to_be_made_is_never_made(url: str, clock: ManualClock, new: bool) -> None:
    """Although its statement reaches the database after it was asked about."""
    async with PostgresProxy(url) as proxy:
        store = await PostgresStore.open(proxy.url, clock, connections=2)
        await create(store, session_key("acme", "another"))
        if not new:
            await create(store)
        commit = Commit(key=KEY, id="late", create=v1.Session() if new else None, events=[said("m1")])
        late, held = asyncio.Event(), list[bytes]()

        def hold(kind: str, body: bytes) -> asyncio.Event | None:
            statement = proxy.executed(kind, body)
            if held or not statement.startswith(b"WITH o AS"):
                return None
            held.append(statement)
            return late

        proxy.asked = hold
        with refused("STORE_UNAVAILABLE"):
            await store.commit(commit)
        assert held
        fence = store.fence
        assert await store.find_commit(KEY, "late") is None
        assert fence + 1 == store.fence
        proxy.ended.clear()
        late.set()
        await proxy.ended.wait()
        assert new == (await store.get_session(KEY) is None)
        assert [] == await store.read_events(KEY, 0)
        await store.commit(commit)
        assert 1 == len(await store.read_events(KEY, 0))
        await store.close()


async def test_a_raise_of_the_fence_that_arrives_late_replaces_no_owner(url: str, clock: ManualClock) -> None:
    """The store that sent it has gone by a later one since, and writes on."""
    async with PostgresProxy(url) as proxy:
        store = await PostgresStore.open(proxy.url, clock, connections=2)
        await create(store)
        late, raises = asyncio.Event(), 0

        def cut(kind: str, body: bytes) -> asyncio.Event | None:
            nonlocal raises
            statement = proxy.executed(kind, body)
            if not raises and statement.startswith(b"WITH o AS"):
                proxy.cut()
            raises += statement.startswith(b"UPDATE owner SET fence")
            return late if statement.startswith(b"UPDATE owner SET fence") and raises == 1 else None

        proxy.asked = cut
        for _ in range(2):
            with refused("STORE_UNAVAILABLE"):
                await add(store, said("m1"), id="lost")
        fence = store.fence
        await add(store, said("m1"), id="lost")
        assert (2, fence + 1) == (raises, store.fence)
        proxy.ended.clear()
        late.set()
        await proxy.ended.wait()
        await add(store, said("m2"))
        await store.probe()
        assert (fence + 1, False) == (store.fence, store.fenced.is_set())
        assert 2 == len(await store.read_events(KEY, 0))
        await store.close()


async def test_commits_whose_connections_are_cut_at_random_are_made_once(url: str, clock: ManualClock) -> None:
    """As long as each is asked about, and repeated when it was not made."""
    chance, cuts = random.Random(0), 0

    def cut(kind: str, body: bytes) -> asyncio.Event | None:
        nonlocal cuts
        if cuts < 20 and chance.random() < 0.04:
            cuts += 1
            if chance.random() < 0.5:
                proxy.cut()
            else:
                asyncio.get_running_loop().call_soon(proxy.cut)
        return None

    async with PostgresProxy(url) as proxy:
        store = await PostgresStore.open(proxy.url, clock, connections=4)
        keys = [session_key("acme", f"s{number}") for number in range(4)]
        for key in keys:
            await create(store, key)

        async def surely(ask: Callable[[], Awaitable[Any]]) -> Any:
            while True:
                try:
                    return await ask()
                except NotecaseError as error:
                    assert "STORE_UNAVAILABLE" == reason_name(error.reason)

        async def write(key: SessionKey) -> None:
            for number in range(12):
                commit = Commit(key=key, id=f"{number}", events=[said(f"m{number}")])
                made = None
                while made is None:
                    try:
                        made = await store.commit(commit)
                    except NotecaseError:
                        made = await surely(partial(store.find_commit, key, commit.id))
                assert number + 1 == made.session.last_sequence

        proxy.asked = cut
        await asyncio.gather(*map(write, keys))
        proxy.asked = lambda kind, body: None
        assert 20 == cuts
        for key in keys:
            log = await surely(partial(store.read_events, key, 0))
            assert [f"m{number}" for number in range(12)] == [event.message_added.name for event in log]
        assert not store.fenced.is_set()
        await store.close()


@pytest.mark.parametrize("kind", ["commit", "transaction"])
async def test_a_write_that_no_synchronous_standby_has_is_never_said_to_be_made(
    url: str, second_connection: Any, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its statement is given up without being cancelled: then PostgreSQL would keep it, and show it to everybody."""

    async def configure(*statements: str) -> None:
        shown = "SELECT count(*) FROM pg_settings WHERE name = 'synchronous_standby_names' AND setting = $1"
        for statement in statements:
            await second_connection.execute(statement)
        await second_connection.execute("SELECT pg_reload_conf()")
        while not await second_connection.fetchval(shown, "" if "RESET" in statements[0] else "nobody"):
            pass

    database = await second_connection.fetchval("SELECT current_database()")
    await second_connection.execute(f"ALTER DATABASE {database} SET synchronous_commit = on")
    store = await PostgresStore.open(url, clock)
    await create(store)
    # What each kind needs is prepared before the time counts.
    await add(store, said("m0"), id="zero")
    await store.update_state(APP_STATE, [put("k", 0)])
    rows = "SELECT (SELECT count(*) FROM events), (SELECT max(version) FROM states)"
    before = await second_connection.fetchrow(rows)
    other = await asyncpg.connect(url)
    await configure("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    # Commits wait once the checkpointer has read the setting, too.
    waits = "SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $1"
    write = asyncio.create_task(other.execute("SELECT pg_logical_emit_message(true, '', '')"))
    try:
        while not await second_connection.fetchval(waits, other.get_server_pid()):
            if write.done():
                write = asyncio.create_task(other.execute("SELECT pg_logical_emit_message(true, '', '')"))
        monkeypatch.setattr(postgres_wire, "STATEMENT_SECONDS", 2)
        with refused("STORE_UNAVAILABLE"):
            if kind == "commit":
                await add(store, said("m1"), id="one")
            else:
                await store.update_state(APP_STATE, [put("k", 1)])
        for _ in range(2):
            with refused("STORE_UNAVAILABLE"):
                await store.find_commit(KEY, "one")
        assert before == await second_connection.fetchrow(rows)
    finally:
        monkeypatch.undo()
        await configure("ALTER SYSTEM RESET synchronous_standby_names", f"ALTER DATABASE {database} RESET ALL")
    await write
    await other.close()
    assert (kind == "commit") == (await store.find_commit(KEY, "one") is not None)
    assert (kind == "transaction") == ((await store.get_state(APP_STATE, ["k"])).entries["k"].value.int_value == 1)
    await store.close()


async def test_connections_that_the_database_has_ended_are_replaced(
    store: PostgresStore, second_connection: Any
) -> None:
    await create(store)
    await asyncio.gather(*(store.get_session(KEY) for _ in range(5)))
    await second_connection.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid != pg_backend_pid()"
    )
    with contextlib.suppress(Exception):
        await add(store, said("m1"), id="one")
    found = await store.find_commit(KEY, "one")
    if found is None:
        await add(store, said("m1"), id="one")
    assert ["m1"] == [row.name for row in (await store.list_messages(KEY, EVERYTHING)).rows]


async def test_a_caller_who_goes_away_leaves_a_commit_that_is_made(store: PostgresStore) -> None:
    await create(store)
    for number in range(1, 4):
        committing = asyncio.create_task(add(store, said(f"m{number}")))
        await asyncio.sleep(0)
        committing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await committing
        await store.claim(KEY, number)  # it comes behind
        assert number == len(await store.read_events(KEY, 0))


async def test_a_store_that_is_closed_finishes_what_is_under_way(
    url: str, store: PostgresStore, clock: ManualClock
) -> None:
    await create(store)
    committing = [asyncio.create_task(add(store, said(f"m{number}"))) for number in range(5)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*committing)
    with refused("STORE_UNAVAILABLE"):
        await store.get_session(KEY)
    again = await PostgresStore.open(url, clock)
    assert 5 == len(await again.read_events(KEY, 0))
    await again.close()


async def test_a_rewind_in_a_commit_is_seen_in_the_newest_messages_that_it_returns(store: PostgresStore) -> None:
    """Which are combined from the existing rows and the written ones."""
    await create(store)
    await add(store, *(said(f"m{number}") for number in range(4)))
    await start(store, "r1", called("n1", "r1", "c1"), dispatched("c1", "r1"))
    done = await add(store, finished("c1", "r1"), said("m4", run="r1"), newest=3)
    assert done.newest == await store.list_messages(KEY, Query(3), newest_first=True)
    await add(store, ended("r1"))
    done = await add(store, said("m5"), rewound(2), said("m6"), newest=4)
    assert done.newest is not None
    assert ["m6", "m1", "m0"] == [message.name for message in done.newest.rows]
    assert done.newest == await store.list_messages(KEY, Query(4), newest_first=True)


async def test_what_a_quota_bounds_is_counted_once_and_then_only_at_the_bound(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, kept = list[str](), PostgresTables.one

    def one(tables: PostgresTables, statement: str, *values: Any) -> Any:
        if "count(*) FROM sessions" in statement:
            counted.append(statement)
        return kept(tables, statement, *values)

    monkeypatch.setattr(PostgresTables, "one", one)
    store.quotas = Quotas(sessions=6)
    keys = [session_key("acme", f"s{number}") for number in range(9)]
    done = await asyncio.gather(*(create(store, key) for key in keys[:6]))
    assert (6, 1) == (len(done), len(counted))
    with refused("QUOTA_EXCEEDED"):
        await create(store, keys[6])
    await store.delete_session(keys[0])
    await create(store, keys[7])
    with refused("QUOTA_EXCEEDED"):
        await create(store, keys[8])
    assert 6 == len((await store.list_sessions("acme", EVERYTHING)).rows)


async def test_commits_side_by_side_do_not_exceed_a_quota(store: PostgresStore) -> None:
    """Each of them looks at the bound before any of them adds: the keys of the state are counted in between."""
    store.quotas = Quotas(sessions=4, requests=9, state_keys=9)
    first = Commit(key=session_key("acme", "first"), create=v1.Session(), once=once("first", NOTHING))
    await store.commit(first)
    new = [
        Commit(
            key=session_key("acme", f"s{number}"),
            create=v1.Session(),
            events=[changed(put("k", number))],
            once=once(f"{number}", NOTHING),
        )
        for number in range(9)
    ]
    done = await asyncio.gather(*map(store.commit, new), return_exceptions=True)
    assert 3 == sum(isinstance(each, Committed) for each in done)
    refusals = [reason_name(each.reason) for each in done if isinstance(each, NotecaseError)]
    assert ["QUOTA_EXCEEDED"] * 6 == refusals
    assert 4 == len((await store.list_sessions("acme", EVERYTHING)).rows)


async def test_a_write_that_no_quota_bounds_waits_for_no_other_at_the_bound(store: PostgresStore) -> None:
    """Its record counts, but nothing is compared with the quota, so it needs no count of the rows."""
    store.quotas = Quotas(requests=1)
    await store.commit(Commit(key=KEY, create=v1.Session(), once=once("first", NOTHING)))
    with refused("QUOTA_EXCEEDED"):
        await add(store, said("m1"), once=once("second", NOTHING))
    async with asyncio.timeout(60), store._locks.within("another session"):
        await store.delete_session(KEY, once=once("third", NOTHING))
    assert await store.get_session(KEY) is None


# ---- text


@given(st.lists(st.text(st.sampled_from("\x00\x01\x02aé\U0001f50d"), max_size=5), min_size=2, max_size=2))
def test_escaped_text_has_no_nul_keeps_its_order_and_comes_back(texts: list[str]) -> None:
    one, two = texts
    assert one == unescaped(escaped(one))
    assert "\0" not in escaped(one)
    assert (one.encode() < two.encode()) == (escaped(one).encode() < escaped(two).encode())


async def test_keys_and_labels_with_nul_are_found_and_kept_in_order(store: PostgresStore) -> None:
    keys = ["\0", "\0\0", "\x01", "\x01\0", "\x02", "a", "a\0", "a\0b", "a\x01", "b"]
    labels = {"k\0": "v\0", "\x01": "w"}
    await create(store, labels=labels, display_name="a\0name")
    await add(store, changed(*(put(key, key) for key in keys)))
    _, page = await store.list_state(KEY.state, Query(4))
    _, rest = await store.list_state(KEY.state, Query(9, page.next))
    assert keys == [*page.rows, *rest.rows]
    entries = (await store.get_state(KEY.state, keys)).entries
    assert {key: key for key in keys} == {key: plain(entry.value) for key, entry in entries.items()}
    assert labels == dict((await contents(store))["session"].labels)


async def test_every_text_is_compared_by_its_bytes(second_connection: Any) -> None:
    """Whatever collation the database has; `commits` is never compared."""
    others = await second_connection.fetch(
        """SELECT c.relname, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
            JOIN pg_collation o ON o.oid = a.attcollation
            WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r' AND o.collname != 'C'"""
    )
    assert [("sessions", "commits")] == [tuple(each) for each in others]


@pytest.fixture
async def german() -> AsyncIterator[str]:
    """The URL of a database that sorts as dictionaries do: by ICU, or by a locale of the C library that is made here;
    where neither is possible, by a collation that only has another name."""
    with contextlib.suppress(asyncpg.PostgresError):
        yield await postgres.shared().new_database("LOCALE_PROVIDER icu ICU_LOCALE 'de' LOCALE 'C'")
        return
    with tempfile.TemporaryDirectory(prefix="notecase-locales-") as folder:
        try:
            making = await asyncio.create_subprocess_exec(
                *("localedef", "-i", "de_DE", "-f", "UTF-8", f"{folder}/de_DE.UTF-8")
            )
            is_made = not await making.wait()
        except OSError:
            is_made = False
        if not is_made:
            yield await postgres.shared().new_database("LOCALE 'C.UTF-8'")
            return
        Path(folder).chmod(0o755)  # the server may run as another user
        server = postgres.Postgres(environment={"LOCPATH": folder})
        try:
            yield await server.new_database("LOCALE 'de_DE.UTF-8'")
        finally:
            server.remove()


async def test_lists_of_a_database_with_another_collation_are_in_the_order_of_bytes(
    german: str, clock: ManualClock
) -> None:
    names = ["B", "Z", "_", "a", "a_b", "aa", "ab", "b", "z", "\u00e4", "\u03a9", "\U0001f50d"]
    store = await PostgresStore.open(german, clock)
    await create(store)
    await add(store, changed(*(put(name, name) for name in reversed(names))))
    for name in reversed(names):
        await store.create_agent("acme", name, v1.Agent(llm=v1.LlmAgent()))
    keys, agents = list[str](), list[str]()
    query: Query | None = Query(5)
    while query is not None:
        _, entries = await store.list_state(KEY.state, query)
        keys += entries.rows
        query = Query(5, entries.next) if entries.next else None
    query = Query(5)
    while query is not None:
        found = await store.list_agents("acme", query)
        agents += [agent.name.removeprefix("agents/") for agent in found.rows]
        query = Query(5, found.next) if found.next else None
    assert (names, names) == (keys, agents)
    await store.close()


# ---- databases


async def test_two_servers_that_open_an_empty_database_at_once_make_its_tables_once(clock: ManualClock) -> None:
    url = await postgres.shared().new_database()
    stores = await asyncio.gather(*(PostgresStore.open(url, clock) for _ in range(3)))
    assert 1 == len({store.secret for store in stores})
    assert [1, 2, 3] == sorted(store.fence for store in stores)
    for store in stores:
        await store.close()


async def test_a_database_that_is_more_than_one_step_newer_is_refused(
    url: str, second_connection: Any, clock: ManualClock
) -> None:
    """A step newer is what another server makes of it when the servers are replaced one by one; it stays."""
    await second_connection.execute("UPDATE notecase_store SET schema = schema + 1")
    try:
        opened = await PostgresStore.open(url, clock)
        await opened.close()
        assert VERSION + 1 == await second_connection.fetchval(
            "UPDATE notecase_store SET schema = schema + 1 RETURNING schema - 1"
        )
        newer = rf"written by a newer notecase: its schema is {VERSION + 2}, this one supports up to {VERSION + 1}\."
        with pytest.raises(StoreOpenError, match=newer):
            await PostgresStore.open(url, clock)
    finally:
        await second_connection.execute("UPDATE notecase_store SET schema = $1", VERSION)


UNFIT = {
    "tables of another program": ("", "CREATE TABLE orders ()", "is a database of another program"),
    "a table that has one of our names": ("", "CREATE TABLE sessions (id text)", "is a database of another program"),
    "all our names": ("", "CREATE TABLE notecase_store (id text)", "is a database of another program"),
    "a view that has one of our names": ("", "CREATE VIEW sessions AS SELECT 1 AS id", "PostgreSQL says 42P07"),
    "another encoding": ("ENCODING 'SQL_ASCII' LOCALE 'C'", "SELECT 1", "has the encoding SQL_ASCII"),
    "read-only": ("", "ALTER DATABASE {name} SET default_transaction_read_only = on", "is read-only"),
    "no schema": ("", "DROP SCHEMA public", "has none of the schemas in its search_path"),
}


@pytest.mark.parametrize("unfit", UNFIT)
async def test_a_database_that_is_not_fit_is_refused_and_not_changed(clock: ManualClock, unfit: str) -> None:
    options, prepare, told = UNFIT[unfit]
    url = await postgres.shared().new_database(options)
    connection = await asyncpg.connect(url)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(prepare.format(name=name))
    relations = "SELECT relname FROM pg_class WHERE relnamespace NOT IN (11, 99) ORDER BY 1"
    before = await connection.fetch(relations)
    with pytest.raises(StoreOpenError, match=told):
        await PostgresStore.open(url, clock)
    assert before == await connection.fetch(relations)
    await connection.close()


async def test_a_database_that_was_restored_without_its_rows_is_refused(clock: ManualClock) -> None:
    url = await postgres.shared().new_database()
    await serve_stores.migrate(url)
    connection = await asyncpg.connect(url)
    await connection.execute("TRUNCATE notecase_store, owner")
    await connection.close()
    with pytest.raises(StoreOpenError, match="Restore the whole database"):
        await serve_stores.open_store(url, clock)


async def test_others_have_their_turn_while_a_long_past_is_read(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step runs on the event loop."""
    await create(store)
    for number in range(8):
        await add(store, changed(put("k", f"{number}" * 100_000)))
    pauses, sleep = list[float](), asyncio.sleep

    async def pausing(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", pausing)
    head = (await store.read_events(KEY, 0))[-1].sequence
    assert [0.0] * 4 == pauses
    pauses.clear()
    state = await store.get_state(KEY.state, ["k"], head - 1)
    assert "6" * 100_000 == state.entries["k"].value.string_value
    assert [0.0] * 7 == pauses  # small changes cost more for their bytes


async def test_an_older_schema_is_refused_or_brought_up_to_date(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration that fails leaves it as it was."""
    url = await postgres.shared().new_database()
    store = await PostgresStore.open(url, clock)
    await create(store)
    await store.close()
    connection = await asyncpg.connect(url)
    await connection.execute("UPDATE owner SET name = ''")
    good = "ALTER TABLE sessions ADD COLUMN later integer NOT NULL DEFAULT 7"
    monkeypatch.setattr(postgres_database, "VERSION", VERSION + 1)
    monkeypatch.setattr(postgres_database, "MIGRATIONS", (*MIGRATIONS, f"{good}; SELECT 1 / 0"))
    needs = rf"has the schema {VERSION}, and this notecase needs {VERSION + 1}\. Run notecase migrate"
    with pytest.raises(StoreOpenError, match=needs):
        await serve_stores.open_store(url, clock, serve_stores.Database(migrate=False))
    with pytest.raises(StoreOpenError, match="22012"):
        await serve_stores.migrate(url)
    assert VERSION == await connection.fetchval("SELECT schema FROM notecase_store")
    monkeypatch.setattr(postgres_database, "MIGRATIONS", (*MIGRATIONS, good))
    await serve_stores.migrate(url)
    assert (VERSION + 1, 7) == await connection.fetchrow("SELECT schema, later FROM notecase_store, sessions")
    opened = await serve_stores.open_store(url, clock, serve_stores.Database(migrate=False))
    assert await opened.get_session(KEY) is not None
    await opened.close()
    await connection.close()


async def test_a_store_of_the_first_schema_has_its_agents_in_the_second(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await postgres.shared().new_database()
    connection = await asyncpg.connect(url)
    with monkeypatch.context() as first:
        first.setattr(postgres_database, "VERSION", 1)
        first.setattr(postgres_database, "MIGRATIONS", MIGRATIONS[:1])
        store = await PostgresStore.open(url, clock)
        await create(store)
        await store.close()
    assert 1 == await connection.fetchval("SELECT schema FROM notecase_store")
    made = [v1.Agent(name="agents/clerk", revision=number, etag=f"{number}") for number in (1, 2)]
    columns = "tenant, agent, revision, display_name, create_time, update_time"
    await connection.execute(f"INSERT INTO agents ({columns}) VALUES ($1, 'clerk', 2, '', 0, 0)", KEY.tenant)
    for agent in made:
        await connection.execute(
            "INSERT INTO revisions (tenant, agent, revision, body) VALUES ($1, $2, $3, $4)",
            *(KEY.tenant, "clerk", agent.revision, agent.SerializeToString(deterministic=True)),
        )
    await connection.execute("UPDATE owner SET name = ''")
    await serve_stores.migrate(url)
    assert VERSION == await connection.fetchval("SELECT schema FROM notecase_store")
    opened = await serve_stores.open_store(url, clock, serve_stores.Database(migrate=False))
    assert made == [await opened.get_agent(KEY.tenant, "clerk", revision) for revision in (1, 0)]
    assert await opened.get_session(KEY) is not None
    await opened.delete_agent(KEY.tenant, "clerk")
    assert await opened.get_agent(KEY.tenant, "clerk", 1) is None
    await opened.sweep_agents()
    await opened.close()
    assert (0, 0) == await connection.fetchrow(
        "SELECT (SELECT count(*) FROM revisions), (SELECT count(*) FROM deleted_agents)"
    )
    await connection.close()


async def test_the_error_says_that_the_user_may_not_create_tables(clock: ManualClock) -> None:
    url = await postgres.shared().new_database()
    connection = await asyncpg.connect(url)
    await connection.execute("DROP ROLE IF EXISTS guest")
    await connection.execute("CREATE ROLE guest LOGIN PASSWORD 'a-secret'")
    await connection.close()
    with pytest.raises(StoreOpenError, match="does not let this user create tables") as told:
        await PostgresStore.open(url.replace("postgres@", "guest:a-secret@"), clock)
    assert "a-secret" not in f"{told.value!r}"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://ada:a-secret@127.0.0.1:1/cases", "postgresql://127.0.0.1:1/cases cannot be reached"),
        ("postgresql://ada:a-secret@127.0.0.1:port/cases", "is not a URL of a PostgreSQL database"),
        ("postgresql://ada:a-secret@127.0.0.1:1/cases?sslmode=a-secret", "has invalid parameters"),
        ("mysql://ada:a-secret@127.0.0.1/cases", "is not a URL of a PostgreSQL database"),
        ("postgresql://ada:9/a-secret@127.0.0.1/cases", "is not a URL of a PostgreSQL database"),
        ("postgresql://ada:p@ss#a-secret@127.0.0.1/cases", "is not a URL of a PostgreSQL database"),
        ("postgresql://ada:9?a-secret@127.0.0.1/cases", "is not a URL of a PostgreSQL database"),
    ],
)
async def test_a_url_that_leads_nowhere_is_refused_without_its_password(
    clock: ManualClock, url: str, told: str
) -> None:
    with pytest.raises(StoreOpenError, match=told) as refusal:
        await PostgresStore.open(url, clock)
    assert "a-secret" not in f"{refusal.value!r}"


async def test_a_database_that_does_not_exist_is_named(clock: ManualClock) -> None:
    with pytest.raises(StoreOpenError, match=r"postgresql:///nowhere: there is no such database\."):
        await PostgresStore.open(postgres.shared().url("nowhere"), clock)


def test_a_key_that_no_index_takes_is_reported_where_a_store_is_copied() -> None:
    """One that a tool once set in a SQLite store."""
    error = asyncpg.exceptions.ProgramLimitExceededError("index row size 6056 exceeds btree version 4 maximum 2704")
    assert postgres_database.refusal("db", error).startswith("db cannot hold a key of state of more than 2.7 KB.")

"""The lease of a PostgreSQL store is kept through trouble, and what commands write is refused once it is lost."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest
from notecase_server import serve, serve_stores
from notecase_server.config import Settings
from notecase_server.models.contract import Provider
from notecase_server.store.contract import StoreOpenError
from notecase_server.store.postgres import renewal as postgres_renewal
from notecase_server.store.postgres.database import Access, dialled, migrate
from notecase_server.store.postgres.lease import Owner, PostgresLease
from notecase_server.store.postgres.renewal import renew
from notecase_server.store.postgres.store import PostgresStore
from notecase_server.store.rows import TABLES, Head
from notecase_server.supervisor import Tasks
from structlog.testing import capture_logs

from tests.store.build import KEY, ManualClock, add, create, said
from tests.support import postgres
from tests.support.authority import Authority
from tests.support.postgres import Postgres
from tests.support.postgres_proxy import PostgresProxy
from tests.support.time import in_no_time

LEASE = 3.0
"""Seconds. PostgreSQL ends a write that stands still for less than half of it, on a busy machine, too."""


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with postgres.shared().empty_store() as url:
        yield url


@pytest.fixture
async def second_connection(url: str) -> AsyncIterator[Any]:
    """A second connection."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


# ---- renewals of the lease


class Connection:
    """Stands for a connection to a database that answers after half a second of the loop's clock, which leaps. A
    statement for which `hangs` is true has no answer, and no later one of the connection has. `owner` is the row."""

    def __init__(
        self, hangs: Callable[[str], bool] = lambda _: False, owner: Callable[[], Owner] = lambda: Owner("", 0, 0)
    ) -> None:
        self._hangs = hangs
        self._owner = owner
        self._useless = self._closed = False

    def is_closed(self) -> bool:
        return self._closed

    def terminate(self) -> None:
        self._closed = True

    def transaction(self) -> Any:
        return self

    async def start(self) -> None:
        await self._answer("BEGIN")

    async def commit(self) -> None:
        await self._answer("COMMIT")

    async def rollback(self) -> None:
        await self._answer("ROLLBACK")

    async def fetchrow(self, statement: str) -> Owner:
        await self._answer(statement)
        return self._owner()

    async def fetchval(self, statement: str, *values: object) -> int:
        await self._answer(statement)
        return 1

    async def execute(self, statement: str, *values: object) -> None:
        await self._answer(statement)

    async def _answer(self, statement: str) -> None:
        assert not self._closed
        self._useless = self._useless or self._hangs(statement)
        if self._useless:
            await asyncio.Event().wait()
        if "owner" in statement:
            await asyncio.sleep(0.5)


def test_a_renewal_that_hangs_does_not_cost_the_lease() -> None:
    """The next one comes in time, over another connection, and the lease holds all the while."""
    renewals, made = 0, list[Connection]()

    def hangs(statement: str) -> bool:
        nonlocal renewals
        renews = "counter + 1 WHERE name" in statement
        renewals += renews
        return renews and renewals == 3

    async def connect() -> Any:
        made.append(Connection(hangs))
        return made[-1]

    async def keep() -> None:
        clock = asyncio.get_running_loop().time
        lease = PostgresLease(connect, "this one", clock, 10.0)
        await lease.take(None)
        while renewals < 6:
            assert lease.holds, clock()
            await asyncio.sleep(0.1)
        assert 2 == len(made)
        await lease.release()

    in_no_time(keep())


@pytest.mark.parametrize("away", [False, True], ids=["in reach", "away"])
def test_an_owner_that_is_silent_is_replaced_within_a_lease_and_three_seconds(away: bool) -> None:
    """And never sooner than after a lease: counted from its last sign of life, or from when the database is back."""
    silent, back = 20.0, 45.0

    async def wait() -> float:
        clock = asyncio.get_running_loop().time

        async def connect() -> Any:
            if away and silent < clock() < back:
                raise ConnectionRefusedError
            return Connection(
                lambda _: away and silent < clock() < back, lambda: Owner("another", int(min(clock(), silent)), 1)
            )

        lease = PostgresLease(connect, "this one", clock, 10.0)
        await lease.take(_setting(asyncio.Event()))
        taken = clock()
        await lease.release()
        return taken

    since = back if away else silent
    assert since + 10 <= in_no_time(wait()) <= since + 13


async def test_a_write_gives_its_rows_back_within_half_a_lease(url: str, clock: ManualClock) -> None:
    """Whatever becomes of its server: PostgreSQL ends a transaction that is idle, or waits for a lock, for so long."""
    lease = PostgresLease(partial(asyncpg.connect, url), "this one", time.monotonic, LEASE)
    await lease.take(None)
    store = await PostgresStore.open(url, clock, lease=lease)
    names = ("idle_in_transaction_session_timeout", "lock_timeout", "statement_timeout")
    found = await store._write(lambda tables, _: [cast(Any, tables).one(f"SHOW {name}")[0] for name in names])
    assert ["1200ms"] * 3 == found
    await store.close()


async def test_a_connection_that_hangs_is_asked_nothing_more_and_replaced(url: str) -> None:
    """Not even to roll back, for which there would be no answer either."""
    never, renewals = asyncio.Event(), asyncio.Queue[bytes]()

    def stall(kind: str, body: bytes) -> asyncio.Event | None:
        if kind != "P" or b"counter = counter + 1 WHERE name" not in body:
            return None
        renewals.put_nowait(body)
        return never if renewals.qsize() == 1 and not seen else None

    seen = list[bytes]()
    async with PostgresProxy(url) as proxy:
        proxy.stalls = stall
        lease = PostgresLease(partial(asyncpg.connect, proxy.url), "this one", time.monotonic, LEASE)
        await lease.take(None)
        for _ in range(2):
            seen.append(await renewals.get())
        await lease.held()
        await lease.release()
        never.set()


async def test_a_wait_for_the_store_outlives_its_database(url: str, second_connection: Any) -> None:
    """Which is renamed, and then named as before."""
    name = url.partition("?")[0].rpartition("/")[2]
    waits, failures = asyncio.Event(), asyncio.Queue[str]()

    async def connect() -> Any:
        try:
            return await asyncpg.connect(url)
        except asyncpg.InvalidCatalogNameError as error:
            failures.put_nowait(error.sqlstate)
            raise

    await second_connection.execute("UPDATE owner SET name = 'another', counter = counter + 1")
    lease = PostgresLease(connect, "this one", time.monotonic, 2 * LEASE)
    taking = asyncio.create_task(lease.take(_setting(waits)))
    await waits.wait()
    elsewhere = await asyncpg.connect(postgres.shared().url())
    await second_connection.close()
    await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await elsewhere.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", name)
    await elsewhere.execute(f"ALTER DATABASE {name} RENAME TO {name}_gone")
    assert "3D000" == await failures.get()
    await elsewhere.execute(f"ALTER DATABASE {name}_gone RENAME TO {name}")
    await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    again = await asyncpg.connect(url)
    await again.execute("UPDATE owner SET name = ''")
    await taking
    assert lease.holds
    await lease.release()
    for connection in (elsewhere, again):
        await connection.close()


def test_a_wait_for_a_database_that_is_away_has_a_line_a_minute() -> None:
    """It used to have one for each try, which is every second."""

    async def wait() -> None:
        clock = asyncio.get_running_loop().time
        begun = clock()

        async def connect() -> Any:
            if clock() < begun + 150:
                raise ConnectionRefusedError
            return Connection(owner=lambda: Owner("", 1, 1))

        lease = PostgresLease(connect, "this one", clock, 10.0)
        await lease.take(_setting(asyncio.Event()))
        await lease.release()

    with capture_logs() as lines:
        in_no_time(wait())
    assert ["store_unreachable"] * 3 == [line["event"] for line in lines if line["event"] == "store_unreachable"]


async def test_a_connection_that_is_lost_once_the_lease_is_taken_is_replaced(url: str) -> None:
    """At each question that a server asks before it serves."""
    questions = [b"to_regclass($1) IS NOT NULL", b"SELECT secret FROM", b"SELECT keyed FROM"]

    def cut(kind: str, body: bytes) -> None:
        if kind == "P" and any(found := [each for each in questions if each in body]):
            questions.remove(found[0])
            proxy.cut()

    async with PostgresProxy(url) as proxy:
        proxy.asked = cut
        server = await serve.make_server(
            Settings(listen="127.0.0.1:0", store=proxy.url, store_lease=LEASE), Tasks("auth"), _unused
        )
        assert [] == questions
        await server._store.close()


async def test_a_store_that_fails_before_it_is_served_is_let_go(url: str, second_connection: Any) -> None:
    def cut(kind: str, body: bytes) -> None:
        if kind == "P" and b"SELECT keyed FROM" in body:
            proxy.cut()

    async with PostgresProxy(url) as proxy:
        proxy.asked = cut
        with pytest.raises(StoreOpenError, match="The store is unavailable at present"):
            await serve.make_server(
                Settings(listen="127.0.0.1:0", store=proxy.url, store_lease=LEASE), Tasks("auth"), _unused
            )
    assert (False, "") == tuple(await second_connection.fetchrow("SELECT fence = 0, name FROM owner"))


def _unused(make: Callable[[], Provider]) -> Any:
    raise AssertionError("the model is offline")


# ---- what is written under a lease that was lost


async def depose(connection: Any) -> None:
    """Becomes the owner in place of the current one."""
    await connection.execute("UPDATE owner SET name = 'another', counter = counter + 1, fence = fence + 1")


async def test_a_renewal_of_sessions_under_an_old_fence_changes_nothing(
    url: str, clock: ManualClock, second_connection: Any
) -> None:
    """As that of a process that stood still for a lease, while another server became the owner."""
    store = await PostgresStore.open(url, clock)
    await create(store)
    await depose(second_connection)
    with pytest.raises(StoreOpenError, match="Another server now owns the store"):
        await renew(second_connection, store.fence)
    assert KEY.uid == await second_connection.fetchval("SELECT uid FROM sessions")
    await store.close()


async def test_no_server_becomes_the_owner_while_sessions_are_renewed(
    url: str, clock: ManualClock, second_connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await PostgresStore.open(url, clock)
    await create(store)
    held, let_go = asyncio.Event(), asyncio.Event()
    kept = postgres_renewal._renew_sessions

    async def slow(connection: Any) -> None:
        held.set()
        await let_go.wait()
        await kept(connection)

    monkeypatch.setattr(postgres_renewal, "_renew_sessions", slow)
    connection = await asyncpg.connect(url)
    renewing = asyncio.create_task(renew(connection, store.fence))
    await held.wait()
    opening = asyncio.create_task(PostgresStore.open(url, clock))
    while not await second_connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        assert not opening.done()
    let_go.set()
    assert 1 == await renewing
    successor = await opening
    session = await successor.find_session("acme", KEY.session)
    assert session is not None
    assert KEY.uid != session.uid
    for opened in (store, successor):
        await opened.close()
    await connection.close()


async def test_a_copy_under_an_old_fence_writes_nothing(url: str, second_connection: Any) -> None:
    """Neither rows nor its end, although its lease seems to hold."""
    (table,) = (table for table in TABLES if table.name == "tenants")
    rows = cast(Any, await serve_stores.open_rows(url, is_target=True))
    await rows.begin_copy(b"a file")
    await depose(second_connection)
    assert rows._lease.holds
    row = tuple(0 if "time" in column else column for column in table.columns)
    for write in (partial(rows.load, table, [row]), partial(rows.finish_copy, Head(b"secret", True))):
        with pytest.raises(StoreOpenError, match="Another server now owns the store"):
            await write()
    assert 0 == await second_connection.fetchval("SELECT count(*) FROM tenants")
    assert b"secret" != await second_connection.fetchval("SELECT secret FROM notecase_store")
    assert b"a file" == await second_connection.fetchval("SELECT source FROM unfinished_copy")
    await rows.close()
    await second_connection.execute("DROP TABLE unfinished_copy")


async def test_a_complete_copy_that_cannot_be_analyzed_is_not_a_failure(url: str, second_connection: Any) -> None:
    def cut(kind: str, body: bytes) -> None:
        if kind == "Q" and b"ANALYZE" in body:
            proxy.cut()

    async with PostgresProxy(url) as proxy:
        proxy.asked = cut
        rows = await serve_stores.open_rows(proxy.url, is_target=True)
        await rows.begin_copy(b"a file")
        with capture_logs() as lines:
            await rows.finish_copy(Head(b"secret", False))
        await rows.close()
    assert ["store_not_analyzed"] == [line["event"] for line in lines if line["event"] != "lease_not_renewed"]
    assert b"secret" == await second_connection.fetchval("SELECT secret FROM notecase_store")


# ---- a standby


@pytest.fixture
async def standby() -> AsyncIterator[tuple[Postgres, str]]:
    """A server with a store that takes no writes before it is promoted, and the URL of its database."""
    server = Postgres()
    url = await server.new_database()
    connection = await asyncpg.connect(url)
    await migrate(connection, "a test's database")
    await connection.close()
    await asyncio.to_thread(server.stop, "fast")
    (server.directory / "data" / "standby.signal").touch()
    await asyncio.to_thread(server.start)
    yield server, url
    server.remove()


async def test_a_standby_is_refused_by_a_sentence_and_taken_once_it_is_promoted(
    standby: tuple[Postgres, str], clock: ManualClock, tmp_path: Path
) -> None:
    """Over TLS with sslmode=verify-full. A server that waits for the store goes on waiting meanwhile."""
    server, url = standby
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.cert)
    (tmp_path / "other.pem").write_bytes(Authority().cert)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*authority.issue().write(tmp_path))
    database = url.partition("?")[0].rpartition("/")[2]
    async with PostgresProxy(url, tls) as proxy:
        by_tls = f"postgresql://postgres@{proxy.address}/{database}?sslmode=verify-full&sslrootcert={tmp_path}"
        writable = f"{by_tls}/ca.pem&target_session_attrs=read-write"
        refusals = {
            f"{by_tls}/ca.pem": "is a standby, which cannot be written. Name the primary.",
            f"{by_tls}/other.pem": "did not agree on TLS",
            writable: "has no server with the target_session_attrs",
        }
        for refused, told in refusals.items():
            with pytest.raises(StoreOpenError, match=told):
                await serve_stores.open_store(refused, clock)
        # Of several hosts that which takes writes is chosen.
        both = postgres.shared().url().replace("host=", f"host={server.directory},")
        async with dialled(Access(both)) as connection:
            assert not await connection.fetchval("SELECT pg_is_in_recovery()")
        lease = PostgresLease(Access(writable).dial, "this one", time.monotonic, LEASE)
        waits = asyncio.Event()
        taking = asyncio.create_task(lease.take(_setting(waits)))
        await waits.wait()
        assert not taking.done()
        await asyncio.to_thread(server.promote)
        await taking
        store = await PostgresStore.open(writable, clock, lease=lease)
        await create(store)
        await add(store, said("m1"))
        assert 1 == len(await store.read_events(KEY, 0))
        await store.close()


def _setting(event: asyncio.Event) -> Callable[[], Awaitable[None]]:
    async def wait() -> None:
        event.set()

    return wait

"""A store in a PostgreSQL database: durable when a commit returns, owned by one server at a time.

Each read sees one state of the rows: it is a transaction or a single statement. A commit is two statements and no
transaction (`commit`); every other write is one transaction. A write is made in a task of the store, so that
no caller who goes away leaves it half done. When a connection is lost, STORE_UNAVAILABLE may also mean that the write
was made: callers ask by the commit's or the request's id.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Self, TypeVar

import asyncpg

from notecase_server import errors
from notecase_server.store import fold, steps
from notecase_server.store.base import TableStore
from notecase_server.store.contract import Clock, Commit, Committed
from notecase_server.store.postgres.commit import CommitTables
from notecase_server.store.postgres.database import Access, Database, connect, raise_fence
from notecase_server.store.postgres.lease import PostgresLease
from notecase_server.store.postgres.locks import Locks
from notecase_server.store.postgres.tables import PostgresTables, WritingTables
from notecase_server.store.postgres.tallies import CountedAloneError, Counts, Tallies
from notecase_server.store.postgres.wire import (
    GUARD,
    LOST,
    MISPLACED,
    OWNED,
    REPEATABLE,
    Fenced,
    is_unsure,
    refusals,
    run,
    sqlstate,
    uncancelled,
)
from notecase_server.store.sql.tables import Tables
from notecase_server.supervisor import Tasks

__all__ = ["PostgresStore"]

T = TypeVar("T")

CONNECTIONS = 10
"""That a server opens at most."""

TRIES = 4
"""How often a write is made when others come between."""

WRITE_SECONDS = 5.0
"""How long a transaction that writes may wait for a lock, for its server's next statement, or for a statement: below
half a lease, so that a frozen server holds no row for longer."""

READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"


class PostgresStore(TableStore):
    """Used from the event loop it was opened in. A caller that is cancelled does not undo its write."""

    kind = "postgresql"

    @classmethod
    async def open(
        cls,
        url: str,
        clock: Clock,
        *,
        connections: int = CONNECTIONS,
        prepared: bool = True,
        password: Callable[[], str] | None = None,
        lease: PostgresLease | None = None,
    ) -> Self:
        """Opens `postgresql://USER@HOST/DATABASE?PARAMETERS`, with the parameters of libpq, under a lease that was
        taken (`database.own`); the store lets go of it when it is closed. See `database.connect` for
        what happens without.

        Raises StoreOpenError, whose text is for the operator."""
        return cls(await connect(Access(url, password, prepared), connections, lease), clock, lease)

    def __init__(self, database: Database, clock: Clock, lease: PostgresLease | None = None) -> None:
        super().__init__()
        self.secret = database.secret
        self.fence = database.fence
        """The number under which this server owns the database: a write is refused once the database has another. It
        is raised each time that a connection was lost under a write."""
        self.fenced = asyncio.Event()
        """Set once a write was refused for that."""
        self._lease = lease
        if lease is not None:
            self.lease = lease
        self._write_seconds = min(WRITE_SECONDS, 0.4 * lease.seconds) if lease is not None else WRITE_SECONDS
        self._name = database.name
        self._pool = database.pool
        self._clock = clock
        self._locks = Locks()
        self._tallies = Tallies()
        self._unsure = False
        """A connection was lost under a write, which may still come to be made."""
        self._settling = asyncio.Lock()
        self._tasks = Tasks("store")
        self._ending = Tasks("store")
        self._closing: asyncio.Task[None] | None = None

    async def commit(self, commit: Commit) -> Committed:
        shared = {"user", "app"} & fold.needs(commit.events, commit.if_state_version).keys.keys()
        within = "" if shared else commit.key.uid
        return await self._own(self._repeated(partial(self._attempt, commit), within))

    async def _attempt(self, commit: Commit, alone: bool) -> Committed:
        counts = Counts(self.quotas, self._tallies, alone)
        async with self._pool.acquire() as connection:
            return await run(self._commit_step, CommitTables(connection, counts, commit, self.fence), commit)

    def _commit_step(self, tables: CommitTables, commit: Commit) -> Committed:
        tables.load()
        done = steps.commit(tables, self._clock(), commit)
        tables.flush()
        return done

    async def _read(self, step: Callable[[Tables], T], alone: bool = False) -> T:
        return await self._own(self._reading(step, alone))

    async def _reading(self, step: Callable[[Tables], T], alone: bool) -> T:
        await self._settle()
        async with self._pool.acquire() as connection:
            tables = PostgresTables(connection, Counts(self.quotas, self._tallies, alone=False))
            if alone:
                return await run(step, tables)
            await connection.execute(READ)
            try:
                return await run(step, tables)
            finally:
                await _end(connection)

    async def _write(self, step: Callable[[Tables, int], T], within: str = "", *, piece: bool = False) -> T:
        return await self._own(self._repeated(partial(self._transact, step), within))

    async def _transact(self, step: Callable[[Tables, int], T], alone: bool) -> T:
        counts = Counts(self.quotas, self._tallies, alone)
        async with self._pool.acquire() as connection:
            try:
                await self._begin(connection)
                result: T = await run(self._write_step, WritingTables(connection, counts), step)
                with uncancelled(connection) as timeout:
                    await connection.execute("COMMIT", timeout=timeout)
            except BaseException:
                await _end(connection)
                raise
            return result

    def _write_step(self, tables: WritingTables, step: Callable[[Tables, int], T]) -> T:
        result = step(tables, self._clock())
        tables.flush()
        return result

    async def _begin(self, connection: Any) -> None:
        """Begins a transaction that writes; another server that takes the store over waits for its end. Raises
        Fenced."""
        limit = round(self._write_seconds * 1000)
        limits = ("idle_in_transaction_session_timeout", "lock_timeout", "statement_timeout")
        guard = GUARD.format(f"(SELECT count(*) FROM ({OWNED.format(self.fence)}) AS o) = 1")
        begin = ["BEGIN", *(f"SET LOCAL {name} = {limit}" for name in limits), guard]
        try:
            await connection.execute("; ".join(begin))
        except asyncpg.DivisionByZeroError:
            raise Fenced from None

    async def _repeated(self, attempt: Callable[[bool], Coroutine[Any, Any, T]], within: str) -> T:
        """Makes a write, and makes it again when others came between its reads and its writes. `within` names its part
        of the store; without a name, and from the second time on, it runs alone, as `attempt` says."""
        for left in reversed(range(TRIES)):
            async with self._locks.within(within) if within else self._locks.alone():
                await self._settle()
                fence = self.fence
                try:
                    return await attempt(not within)
                except CountedAloneError:
                    pass
                except Fenced:
                    await self._settle()
                    if fence == self.fence:  # else it was this server that raised it meanwhile
                        raise
                except LOST as error:
                    self._unsure |= is_unsure(error)
                    if sqlstate(error) not in REPEATABLE or not left:
                        raise
            within = ""
        raise AssertionError("the last try returns or raises")

    async def _settle(self) -> None:
        """Raises the fence, so that the answer about a write whose connection was lost is final: it was made, or it
        never will be."""
        if not self._unsure:
            return
        async with self._settling:
            if self._unsure:
                async with self._pool.acquire() as connection:
                    self.fence = await raise_fence(connection, self._name, self.fence)
                self._unsure = False

    async def _own(self, work: Coroutine[Any, Any, T]) -> T:
        """Carries work to its end whether or not its caller stays."""
        if self._closing is not None:
            work.close()
            raise errors.store_unavailable()
        return await asyncio.shield(self._tasks.start(self._told(work), "call"))

    async def _told(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            with refusals():
                try:
                    return await work
                except asyncpg.PostgresError as error:
                    if sqlstate(error) in MISPLACED:
                        await self._pool.expire_connections()
                    raise
        except Fenced:
            self.fenced.set()
            if self._lease is not None:
                self._lease.lose()
            raise errors.store_unavailable() from None

    async def scrub(self) -> bool:
        """PostgreSQL overwrites what was deleted when it vacuums, and its log when it is old: neither is ours to ask
        for."""
        return True

    async def close(self) -> None:
        if self._closing is None:
            self._closing = self._ending.start(self._close(), "close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        last_writes = asyncio.get_running_loop().call_later(
            WRITE_SECONDS * 2, self._pool.terminate
        )  # see `uncancelled`
        await self._tasks.close(WRITE_SECONDS * 2 + 1)
        last_writes.cancel()
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._pool.close()
        except LOST:
            self._pool.terminate()
        if self._lease is not None:
            await self._lease.release()


async def _end(connection: Any) -> None:
    """Ends a transaction that has nothing to keep, so that the connection can be used again, or closes it."""
    try:
        if not connection.is_closed():
            await connection.execute("ROLLBACK")
    except LOST:
        connection.terminate()

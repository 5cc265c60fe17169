"""The lease by which one server at a time owns a PostgreSQL store.

The table `owner` has one row: the owner's name, a counter that the owner raises again and again, and the fence. A new
owner raises the fence, and every write compares it, so a previous owner that is still alive cannot write any more. No
clocks of two machines are compared: a waiting server considers an owner dead that has not raised its counter for a
whole lease, by the waiting server's own clock and while it could itself read the row.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import asyncpg
import structlog

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.postgres.wire import LOST, kind
from notecase_server.supervisor import Tasks

log = structlog.get_logger()

LEASE_SECONDS = 10.0

Connect = Callable[[], Awaitable["asyncpg.Connection[asyncpg.Record]"]]

UNREACHABLE_SECONDS = 60.0
"""How often a server that waits for its store logs that the database is away."""


class Owner(NamedTuple):
    """The row, as it was read."""

    name: str
    """Empty when the last owner let go."""
    counter: int
    fence: int


UNKNOWN = Owner("an unknown owner", -1, -1)


class PostgresLease:
    """Takes, renews and releases the lease over a separate connection. `clock` counts seconds on this machine,
    including those in which it sleeps."""

    def __init__(self, connect: Connect, name: str, clock: Callable[[], float], seconds: float = LEASE_SECONDS) -> None:
        self.fence = 0
        """The number that every write of this owner is compared with at first. The store may raise it."""
        self._connect = connect
        self.name = name
        self._clock = clock
        self.seconds = seconds
        self._until = 0.0
        """By the clock, when another server may become the owner, less a margin."""
        self._renewed = asyncio.Event()
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._tasks = Tasks("lease")

    @property
    def holds(self) -> bool:
        """Whether no other server can be the owner at this moment."""
        return self._clock() < self._until

    async def held(self) -> None:
        """Returns once the lease holds: never, if it is lost."""
        while not self.holds:
            self._renewed.clear()
            await self._renewed.wait()

    async def lost(self) -> str:
        """Returns the name of another server once that is the owner and this one can write nothing more."""
        return await asyncio.shield(self._lost)

    def lose(self, owner: str = "") -> None:
        """Says that a write was refused since another server is the owner."""
        self._until = 0.0
        if not self._lost.done():
            log.error("store_lost", owner=owner, problem="Another server now owns the store.")
            self._lost.set_result(owner)

    async def take(self, waiting: Callable[[], Awaitable[None]] | None) -> None:
        """Becomes the owner, and keeps the lease from then on. An owner that lives is waited for, as a database is that
        is away: `waiting` is called once when that begins. Where it is None a living owner is a StoreOpenError, and
        what a database that is away raises is raised."""
        try:
            former = await self._wait(waiting)
        except BaseException:
            await self._disconnect()
            raise
        self._tasks.start(self._keep(), "keep", fresh=True)
        log.info("store_taken", owner=self.name, fence=self.fence, former=former)

    async def _wait(self, waiting: Callable[[], Awaitable[None]] | None) -> str:
        """Claims the store once it can be; returns the name of the owner before."""
        seen, since, told = UNKNOWN, self._clock(), list[str]()
        next_line = since
        while True:
            begun = self._clock()
            try:
                found = await self._read()
                if found != seen:
                    if waiting is None and seen.counter >= 0 and found.name:
                        raise StoreOpenError(in_use(found.name))
                    seen, since = found, self._clock()
                if (not found.name or begun - since >= self.seconds) and await self._claim(found):
                    return found.name
            except LOST as error:
                if waiting is None:
                    raise
                seen = UNKNOWN
                if begun >= next_line:
                    next_line = begun + UNREACHABLE_SECONDS
                    log.warning("store_unreachable", error=kind(error))
            if waiting is not None and seen.name not in told:
                if not told:
                    await waiting()
                told.append(seen.name)
                log.warning("store_owned", owner=seen.name, problem="This server waits until the owner stops.")
            await asyncio.sleep(self.seconds / 10)

    async def release(self) -> None:
        """Lets go, so that the next server need not wait."""
        await self._tasks.close()
        self._until = 0.0
        with suppress(*LOST):
            async with self._transaction() as connection:
                await connection.execute("UPDATE owner SET name = '' WHERE name = $1", self.name)
        await self._disconnect()

    async def _read(self) -> Owner:
        async with self._transaction() as connection:
            row = await connection.fetchrow("SELECT name, counter, fence FROM owner")
        assert row is not None
        return Owner(*row)

    async def _claim(self, found: Owner) -> bool:
        """Raises the fence, unless the row is another by now."""
        begun = self._clock()
        async with self._transaction() as connection:
            fence = await connection.fetchval(
                """UPDATE owner SET name = $1, counter = counter + 1, fence = fence + 1
                    WHERE counter = $2 AND fence = $3 RETURNING fence""",
                *(self.name, found.counter, found.fence),
            )
        if fence is None:
            return False
        self.fence = fence
        self._extend(begun)
        return True

    async def _keep(self) -> None:
        """Raises the counter four times a lease, until another server is the owner. What fails is tried again soon: a
        connection that hangs costs a third of the lease, and leaves time for another one."""
        pause = self.seconds / 4
        while True:
            await asyncio.sleep(pause)
            pause = self.seconds / 4
            begun = self._clock()
            try:
                async with self._transaction() as connection:
                    kept = await connection.fetchval(
                        "UPDATE owner SET counter = counter + 1 WHERE name = $1 RETURNING true", self.name
                    )
                    owner = "" if kept else await connection.fetchval("SELECT name FROM owner")
            except LOST as error:
                log.warning("lease_not_renewed", error=kind(error), holds=self.holds)
                pause = self.seconds / 10
                continue
            if not kept:
                self.lose(owner)
                return
            self._extend(begun)

    def _extend(self, begun: float) -> None:
        """Holds the lease from the beginning of the statement that raised the counter on."""
        self._until = begun + self.seconds * 0.8
        self._renewed.set()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """Bounded by a third of a lease; a connection that fails is replaced by the next, and nothing more is asked of
        it, not even to roll back."""
        try:
            async with asyncio.timeout(self.seconds / 3):
                if self._connection is None or self._connection.is_closed():
                    self._connection = await self._connect()
                transaction = self._connection.transaction()
                await transaction.start()
                yield self._connection
                await transaction.commit()
        except BaseException:
            await self._disconnect()
            raise

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


def in_use(name: str) -> str:
    return f"The store is in use: {name} owns it. Stop it first; `notecase serve` waits for it without --no-wait."

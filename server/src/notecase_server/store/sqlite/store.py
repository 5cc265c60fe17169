"""A store in one SQLite file: durable when a commit returns, owned by one process.

One thread writes: it takes all writes that wait and makes one transaction of them, so that the disk is waited for
once. The pieces of long jobs, such as a fork, are transactions of their own, and come after the writes that wait. A few
threads read beside it, each on a consistent state of the file that holds every write that has returned. One more
checkpoints: it moves what was committed from the write-ahead log into the database while commits go on.
"""

import asyncio
import os
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from notecase import v1

from notecase_server import errors
from notecase_server.store import steps
from notecase_server.store.base import TableStore
from notecase_server.store.contract import Clock, Commit, Committed, SessionKey
from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite.file import Connections, connect
from notecase_server.store.sqlite.starts import Starts
from notecase_server.store.sqlite.tables import SqliteTables
from notecase_server.store.sqlite.writer import Outcome, Writer, caller_error, checkpointed
from notecase_server.supervisor import Tasks

__all__ = ["SqliteStore"]

T = TypeVar("T")

READERS = 3
"""They share the interpreter, so more would not read faster; while one waits for the disk, others go on."""

CHECKPOINT_PAGES = 1000
"""Length of the write-ahead log, 4 MB, from which on it begins again at the next chance. That needs a moment without
writes in which all of it is in the database: the writer moves what came since the checkpoint. A short log is also cut
fast; one file system took 3 ms for each MB."""


class _Job(NamedTuple):
    """A step somebody waits for."""

    step: Callable[..., Any]
    future: asyncio.Future[Any]
    alone: bool = False
    """It is a single statement, which needs no transaction."""
    writes: bool = False
    session: SessionKey | None = None
    """It commits to this session, and writes nothing else."""
    piece: bool = False
    """It is one of many steps of a long job."""


def _scrub(*_: Any) -> bool:
    """The only job that is not a step: it needs the connection outside of a transaction. See Writer.scrub."""
    raise AssertionError("scrubbing is no step")


class SqliteStore(TableStore):
    """Used from the event loop it was opened in. A caller that is cancelled does not undo its write, which may still
    happen; so what was handed in must not be changed afterwards either."""

    kind = "sqlite"

    @classmethod
    async def open(cls, path: str | os.PathLike[str], clock: Clock) -> Self:
        """Opens a file, creating it or bringing its schema up to date; the loop is blocked meanwhile, since nothing is
        served before. `clock` is called from the writer's thread.

        Raises StoreOpenError, whose text is for the operator."""
        return cls(connect(Path(path), READERS), clock)

    def __init__(self, connections: Connections, clock: Clock) -> None:
        super().__init__()
        self.secret = connections.secret
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._writes: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._checkpoints: queue.SimpleQueue[list[asyncio.Future[None]] | None] = queue.SimpleQueue()
        """Each with those who wait for it."""
        self._checkpointing = False
        """Set by the writer when it asks for a checkpoint, until that is made, with the writer's part of it."""
        self._log_is_long = False
        """Set by the checkpointer when the rest is the writer's part."""
        self._writer = Writer(connections.writer, clock)
        self._threads = [
            threading.Thread(target=self._write_batches, name="store-writer", daemon=True),
            threading.Thread(target=self._checkpoint, name="store-checkpointer", daemon=True),
            *(
                threading.Thread(target=self._read_steps, args=(reader,), name="store-reader", daemon=True)
                for reader in connections.readers
            ),
        ]
        self._starts = Starts()
        self._tasks = Tasks("store")
        self._closing: asyncio.Task[None] | None = None
        for thread in self._threads:
            thread.start()

    async def _read(self, step: Callable[[Tables], T], alone: bool = False) -> T:
        return await self._ask(self._reads, step, alone)

    async def _write(self, step: Callable[[Tables, int], T], within: str = "", *, piece: bool = False) -> T:
        return await self._ask(self._writes, step, piece=piece)

    async def commit(self, commit: Commit) -> Committed:
        return await self._ask(self._writes, partial(steps.commit, commit=commit), session=commit.key)

    async def read_start(self, tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        if self._closing is None and (kept := self._starts.find(tenant, session, agent)) is not None:
            return kept
        read = self._starts.forgotten
        row, found = await super().read_start(tenant, session, agent)
        if row is not None and found is not None:
            self._starts.keep(tenant, agent or row.agent, found, read)
        return row, found

    async def _ask(
        self,
        jobs: queue.SimpleQueue[_Job | None],
        step: Callable[..., T],
        alone: bool = False,
        session: SessionKey | None = None,
        piece: bool = False,
    ) -> T:
        if self._closing is not None:
            raise errors.store_unavailable()
        future: asyncio.Future[T] = self._loop.create_future()
        jobs.put(_Job(step, future, alone, jobs is self._writes, session, piece))
        return await future

    async def scrub(self) -> bool:
        """What is deleted is overwritten in the database, in the same transaction (`secure_delete`); the write-ahead
        log has it until it is cut. The writer cuts it, and finds moved into the database what was there before. False
        also while another checkpoint is being made."""
        if self._writer.deleted and self._closing is None:
            moved: asyncio.Future[None] = self._loop.create_future()
            self._checkpoints.put([moved])
            await moved
        return await self._ask(self._writes, _scrub)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = self._tasks.start(self._close(), "close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._writes.put(None)
        self._checkpoints.put(None)
        for _ in self._connections.readers:
            self._reads.put(None)
        await asyncio.to_thread(self._let_go)

    def _let_go(self) -> None:
        for thread in self._threads:
            thread.join()
        self._connections.close()

    def _tell(self, jobs: list[_Job], outcomes: list[Outcome]) -> None:
        """Hands outcomes to those who wait, all in one step of the loop."""
        with suppress(RuntimeError):  # the loop is closed, so nobody waits any more
            self._loop.call_soon_threadsafe(self._settle, jobs, outcomes)

    def _settle(self, jobs: list[_Job], outcomes: list[Outcome]) -> None:
        for job, (result, error, wrote) in zip(jobs, outcomes, strict=True):
            if job.session is not None:
                row = result.session if error is None else None
                self._starts.committed(job.session.tenant, job.session.session, row)
            elif job.writes and wrote:
                self._starts.forget()
            if job.future.done():
                continue  # its caller was cancelled
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)

    def _read_steps(self, connection: sqlite3.Connection) -> None:
        tables = SqliteTables(connection)
        while (job := self._reads.get()) is not None:
            try:
                if not job.alone:
                    connection.execute("BEGIN")
                try:
                    outcome = Outcome(job.step(tables))
                finally:
                    if not job.alone:
                        connection.execute("ROLLBACK")
            except Exception as error:  # noqa: BLE001 - it belongs to the caller
                outcome = Outcome(None, caller_error(error))
            self._tell([job], [outcome])

    def _checkpoint(self) -> None:
        """Moves what was committed, while commits go on. Once the log is long, the writer moves the rest."""
        while (waiting := self._checkpoints.get()) is not None:
            if checkpointed(self._connections.checkpointer) < CHECKPOINT_PAGES:
                self._checkpointing = False
            else:
                self._log_is_long = True
            if waiting:
                self._tell([_Job(_scrub, future) for future in waiting], [Outcome(None)] * len(waiting))

    def _write_batches(self) -> None:
        """Makes one transaction of all writes that wait, and then one of one piece of a long job, if any waits: so a
        write waits for one piece at most, and pieces get their turn however many writes come."""
        open_ended, pieces = True, deque[_Job]()
        while open_ended or pieces:
            writes, scrubs = list[_Job](), list[_Job]()
            with suppress(queue.Empty):
                job = self._writes.get(block=not pieces)
                while True:
                    if job is None:
                        open_ended = False
                    elif job.step is _scrub:
                        scrubs.append(job)
                    else:
                        (pieces if job.piece else writes).append(job)
                    job = self._writes.get_nowait()
            if writes:
                self._transact(writes)
            if pieces:
                self._transact([pieces.popleft()])
            if scrubs:
                self._tell(scrubs, [self._writer.scrub() for _ in scrubs])

    def _transact(self, writes: list[_Job]) -> None:
        writer = self._writer
        outcomes = writer.transact([job.step for job in writes], self.quotas)
        if writer.checkpoint_due() and not self._checkpointing:
            self._checkpointing = True
            self._checkpoints.put([])
        self._tell(writes, outcomes)
        if self._log_is_long:
            writer.checkpoint()
            self._log_is_long = self._checkpointing = False

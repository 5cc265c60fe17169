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
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import structlog
from google.protobuf.message import DecodeError
from notecase import v1

from notecase_server import errors
from notecase_server.store import sqlite_tallies
from notecase_server.store.base import TableStore
from notecase_server.store.contract import Clock, Commit, Committed, Quotas, SessionKey
from notecase_server.store.sqlite_file import BUSY_SECONDS, Connections, connect
from notecase_server.store.sqlite_starts import Starts
from notecase_server.store.sqlite_tables import SqliteTables
from notecase_server.store.tables import Tables
from notecase_server.supervisor import Tasks

__all__ = ["SqliteStore"]

T = TypeVar("T")

log = structlog.get_logger()

READERS = 3
"""They share the interpreter, so more would not read faster; while one waits for the disk, others go on."""

CHECKPOINT_WRITES = 16
CHECKPOINT_ROWS = 1000
"""Transactions and changed rows between two checkpoints, which a thread of its own makes: some hundred pages."""

CHECKPOINT_PAGES = 1000
"""Length of the write-ahead log, 4 MB, from which on it begins again at the next chance. That needs a moment without
writes in which all of it is in the database: the writer moves what came since the checkpoint. A short log is also cut
fast; one file system took 3 ms for each MB."""

DEFECTS = (sqlite3.IntegrityError, sqlite3.ProgrammingError)
"""What SQLite raises for a write that can never succeed, such as a message id used twice: our mistake and not the
disk's, so nobody is told to try again."""


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
    """The one job that is no step: it wants the connection outside of a transaction. See _Writer.scrub."""
    raise AssertionError("scrubbing is no step")


class _Outcome(NamedTuple):
    job: _Job
    result: Any
    error: Exception | None
    wrote: bool = True
    """A row may be another than before."""


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
        self._writer = _Writer(connections.writer, clock)
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
        return await self._ask(self._writes, self._commit(commit), session=commit.key)

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

    def _tell(self, outcomes: list[_Outcome]) -> None:
        """Hands outcomes to those who wait, all in one step of the loop."""
        with suppress(RuntimeError):  # the loop is closed, so nobody waits any more
            self._loop.call_soon_threadsafe(self._settle, outcomes)

    def _settle(self, outcomes: list[_Outcome]) -> None:
        for job, result, error, wrote in outcomes:
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
                    outcome = _Outcome(job, job.step(tables), None)
                finally:
                    if not job.alone:
                        connection.execute("ROLLBACK")
            except Exception as error:  # noqa: BLE001 - it belongs to the caller
                outcome = _Outcome(job, None, _told(error))
            self._tell([outcome])

    def _checkpoint(self) -> None:
        """Moves what was committed, while commits go on. Once the log is long, the writer moves the rest."""
        while (waiting := self._checkpoints.get()) is not None:
            if _checkpointed(self._connections.checkpointer) < CHECKPOINT_PAGES:
                self._checkpointing = False
            else:
                self._log_is_long = True
            if waiting:
                self._tell([_Outcome(_Job(_scrub, future), None, None) for future in waiting])

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
                self._tell(self._writer.scrub(scrubs))

    def _transact(self, writes: list[_Job]) -> None:
        writer = self._writer
        outcomes = writer.transact(writes, self.quotas)
        if writer.checkpoint_due() and not self._checkpointing:
            self._checkpointing = True
            self._checkpoints.put([])
        self._tell(outcomes)
        if self._log_is_long:
            writer.checkpoint()
            self._log_is_long = self._checkpointing = False


class _Writer:
    """Makes one transaction of several writes, none of which can touch another."""

    def __init__(self, connection: sqlite3.Connection, clock: Clock) -> None:
        self._connection = connection
        self._tables = SqliteTables(connection)
        self._clock = clock
        self._quotas: Quotas | None = None
        """Those for which the tallies are kept."""
        self._writes = 0
        """Transactions since the last checkpoint was due."""
        self._rows = 0
        """Rows that the connection had changed when it was."""

    def transact(self, jobs: list[_Job], quotas: Quotas) -> list[_Outcome]:
        """Carries all of them out, durably, or when the transaction fails none of them."""
        self._abandon()
        try:
            self._tally(quotas)
            outcomes = self._together(jobs)
        except (sqlite3.Error, MemoryError) as error:
            self._tables.forget()
            self._abandon()
            log.error("store_write_failed", error=_name(error), writes=len(jobs))
            return [_Outcome(job, None, _unavailable(error)) for job in jobs]
        if outcomes is None:
            return [outcome for job in jobs for outcome in self.transact([job], quotas)]
        return outcomes

    def _together(self, jobs: list[_Job]) -> list[_Outcome] | None:
        """Makes one transaction of all jobs. Returns None, with nothing written, when one of several failed half-way: a
        step decides before it writes, so that needs a defect or a disk that fails. Raises sqlite3.Error or
        MemoryError when the transaction is lost."""
        connection, outcomes = self._connection, list[_Outcome]()
        connection.execute("BEGIN IMMEDIATE")
        for job in jobs:
            changes = connection.total_changes
            try:
                result = job.step(self._tables, self._clock())
                outcomes.append(_Outcome(job, result, None, connection.total_changes != changes))
            except Exception as error:
                if not connection.in_transaction:
                    raise  # SQLite gave the transaction up, as it does without memory, and when the disk fails
                if connection.total_changes != changes:
                    self._tables.forget()
                    connection.execute("ROLLBACK")
                    if len(jobs) > 1:
                        return None
                outcomes.append(_Outcome(job, None, _told(error)))
        if connection.in_transaction:
            connection.execute("COMMIT")
        return outcomes

    @property
    def deleted(self) -> bool:
        """Whether the write-ahead log may hold what was deleted since."""
        return self._tables.deleted

    def checkpoint_due(self) -> bool:
        """Tells so once for each of CHECKPOINT_WRITES transactions or CHECKPOINT_ROWS rows."""
        self._writes += 1
        if self._writes < CHECKPOINT_WRITES and self._connection.total_changes - self._rows < CHECKPOINT_ROWS:
            return False
        self._writes, self._rows = 0, self._connection.total_changes
        return True

    def checkpoint(self) -> None:
        """Moves what the checkpointer has left, so that the next write begins the log again."""
        self._abandon()
        _checkpointed(self._connection)

    def scrub(self, jobs: list[_Job]) -> list[_Outcome]:
        """Cuts the write-ahead log to nothing, if something was deleted and nobody reads an older state: commits are
        not kept waiting for a reader."""
        try:
            if self._tables.deleted:
                self._abandon()
                self._connection.execute("PRAGMA busy_timeout = 0")
                busy: int = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                self._tables.deleted = bool(busy)
        except sqlite3.Error as error:
            log.error("store_scrub_failed", error=_name(error))
            return [_Outcome(job, None, _unavailable(error)) for job in jobs]
        finally:
            self._connection.execute(f"PRAGMA busy_timeout = {round(BUSY_SECONDS * 1000)}")
        return [_Outcome(job, not self._tables.deleted, None, wrote=False) for job in jobs]

    def _tally(self, quotas: Quotas) -> None:
        """Begins to keep tallies of what has a bound now."""
        if quotas is self._quotas:
            return
        bounded = {kind for kind in sqlite_tallies.ROWS if getattr(quotas, kind)}
        if new := bounded - self._tables.tallied:
            sqlite_tallies.begin(self._connection, new)
            self._tables.tallied |= new
        self._quotas = quotas

    def _abandon(self) -> None:
        """Rolls back what is left of a failed transaction."""
        if self._connection.in_transaction:
            self._tables.forget()
            with suppress(sqlite3.Error):  # the disk fails still; it is tried again before the next transaction
                self._connection.execute("ROLLBACK")


def _checkpointed(connection: sqlite3.Connection) -> int:
    """Moves what nobody is in the way of; returns the length of the log in pages, or 0 when it failed."""
    try:
        pages: int = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]
    except sqlite3.Error as error:
        log.error("store_checkpoint_failed", error=_name(error))
        return 0
    return pages


def _told(error: Exception) -> Exception:
    """What the caller of a failed step is told: what the disk, SQLite or a row that does not decode said stays here."""
    if not isinstance(error, sqlite3.Error | OSError | DecodeError) or isinstance(error, DEFECTS):
        return error
    log.error("store_step_failed", error=_name(error))
    return _unavailable(error)


def _unavailable(error: Exception) -> Exception:
    failure = errors.store_unavailable(full=_name(error) == "SQLITE_FULL")
    failure.__cause__ = error
    return failure


def _name(error: Exception) -> str:
    """SQLite's name of what went wrong, such as SQLITE_FULL: its messages could quote what is stored."""
    return str(getattr(error, "sqlite_errorname", type(error).__name__))

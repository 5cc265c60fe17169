"""What the thread that writes to a SQLite database does: one transaction of several writes, none of which can touch
another."""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import structlog
from google.protobuf.message import DecodeError

from notecase_server import errors
from notecase_server.store.contract import Clock, Quotas
from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite import tallies
from notecase_server.store.sqlite.file import BUSY_SECONDS
from notecase_server.store.sqlite.tables import SqliteTables

log = structlog.get_logger()

CHECKPOINT_WRITES = 16
CHECKPOINT_ROWS = 1000
"""Transactions and changed rows between two checkpoints, which a thread of its own makes: some hundred pages."""

DEFECTS = (sqlite3.IntegrityError, sqlite3.ProgrammingError)
"""What SQLite raises for a write that can never succeed, such as a message id used twice: our mistake and not the
disk's, so the error does not say that a retry may help."""

Step = Callable[[Tables, int], Any]


class Outcome(NamedTuple):
    """How a step ended."""

    result: Any
    error: Exception | None = None
    wrote: bool = True
    """A row may be another than before."""


class Writer:
    """Makes one transaction of several writes, none of which can touch another."""

    def __init__(self, connection: sqlite3.Connection, clock: Clock) -> None:
        self._connection = connection
        self._tables = SqliteTables(connection)
        self._clock = clock
        self._writes = 0
        """Transactions since the last checkpoint was due."""
        self._rows = 0
        """Rows that the connection had changed when it was."""

    def transact(self, steps: Sequence[Step], quotas: Quotas) -> list[Outcome]:
        """Carries out all steps, durably, or when the transaction fails none of them. Returns an outcome for each."""
        self._abandon()
        try:
            self._tally(quotas)
            outcomes = self._together(steps)
        except (sqlite3.Error, MemoryError) as error:
            self._tables.forget()
            self._abandon()
            log.error("store_write_failed", error=_name(error), writes=len(steps))
            return [Outcome(None, _unavailable(error)) for _ in steps]
        if outcomes is None:
            return [outcome for step in steps for outcome in self.transact([step], quotas)]
        return outcomes

    def _together(self, steps: Sequence[Step]) -> list[Outcome] | None:
        """Makes one transaction of all steps. Returns None, with nothing written, when one of several failed half-way:
        a step decides before it writes, so that needs a defect or a disk that fails. Raises sqlite3.Error or
        MemoryError when the transaction is lost."""
        connection, outcomes = self._connection, list[Outcome]()
        connection.execute("BEGIN IMMEDIATE")
        for step in steps:
            changes = connection.total_changes
            try:
                result = step(self._tables, self._clock())
                outcomes.append(Outcome(result, None, connection.total_changes != changes))
            except Exception as error:
                if not connection.in_transaction:
                    raise  # SQLite gave the transaction up, as it does without memory, and when the disk fails
                if connection.total_changes != changes:
                    self._tables.forget()
                    connection.execute("ROLLBACK")
                    if len(steps) > 1:
                        return None
                outcomes.append(Outcome(None, caller_error(error)))
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
        checkpointed(self._connection)

    def scrub(self) -> Outcome:
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
            return Outcome(None, _unavailable(error))
        finally:
            self._connection.execute(f"PRAGMA busy_timeout = {round(BUSY_SECONDS * 1000)}")
        return Outcome(not self._tables.deleted, wrote=False)

    def _tally(self, quotas: Quotas) -> None:
        """Begins to keep tallies of what has a bound now."""
        if quotas is self._tables.quotas:
            return
        bounded = {kind for kind in tallies.ROWS if getattr(quotas, kind)}
        if new := bounded - self._tables.tallied:
            tallies.begin(self._connection, new)
            self._tables.tallied |= new
        self._tables.quotas = quotas

    def _abandon(self) -> None:
        """Rolls back what is left of a failed transaction."""
        if self._connection.in_transaction:
            self._tables.forget()
            with suppress(sqlite3.Error):  # the disk fails still; it is tried again before the next transaction
                self._connection.execute("ROLLBACK")


def checkpointed(connection: sqlite3.Connection) -> int:
    """Moves what nobody is in the way of; returns the length of the log in pages, or 0 when it failed."""
    try:
        pages: int = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]
    except sqlite3.Error as error:
        log.error("store_checkpoint_failed", error=_name(error))
        return 0
    return pages


def caller_error(error: Exception) -> Exception:
    """Returns the error for the caller of a failed step, without the words of the disk, SQLite or a damaged row."""
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

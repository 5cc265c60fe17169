"""A store in the process's own memory: for tests and trials, gone with the process."""

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

from notecase_server import errors
from notecase_server.store.base import TableStore
from notecase_server.store.contract import Clock
from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite.file import in_memory
from notecase_server.store.sqlite.tables import SqliteTables
from notecase_server.store.sqlite.writer import Writer

T = TypeVar("T")


class MemoryStore(TableStore):
    """The tables of a SQLite store without a file or threads: one step at a time, whichever thread or loop it comes
    from, and nothing is awaited."""

    kind = "memory"

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        connection, self.secret = in_memory()
        self._tables = SqliteTables(connection)
        self._writer = Writer(connection, clock)
        self._lock = threading.Lock()
        self._ending = weakref.finalize(self, connection.close)
        """Closes the connection, also that of a store that nobody closes."""

    async def _read(self, step: Callable[[Tables], T], alone: bool = False) -> T:
        with self._lock:
            self._require_open()
            return step(self._tables)

    async def _write(self, step: Callable[[Tables, int], T], within: str = "", *, piece: bool = False) -> T:
        with self._lock:
            self._require_open()
            (outcome,) = self._writer.transact([step], self.quotas)
        if piece:
            await asyncio.sleep(0)  # others have their turn between the pieces of a long job
        if outcome.error is not None:
            raise outcome.error
        result: T = outcome.result
        return result

    def _require_open(self) -> None:
        if not self._ending.alive:
            raise errors.store_unavailable()

    async def scrub(self) -> bool:
        """There is no file."""
        return True

    async def close(self) -> None:
        with self._lock:
            self._ending()

"""The rows of a SQLite store as portable values, for a copy of the whole store."""

import json
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.rows import TABLES, Head, Row, Table
from notecase_server.store.sqlite_file import UNFINISHED, Connections, connect, has_table

CHECKPOINT_PAGES = 4000
"""How long the write-ahead log becomes while rows are loaded: 16 MB."""


class SqliteRows:
    """StoreRows of a SQLite file, whose lock it holds. Blocks the event loop: nothing else runs in it."""

    @classmethod
    def open_source(cls, path: Path) -> Self:
        """Opens a store that exists. Raises StoreOpenError, also while a server has it open."""
        if not path.is_file():
            raise StoreOpenError(f"There is no store at {path}.")
        return cls(path, connect(path, 0))

    @classmethod
    def open_target(cls, path: Path) -> Self:
        """Opens a file to copy a store into, and makes it where there is none. Raises StoreOpenError."""
        return cls(path, connect(path, 0, unfinished=True))

    def __init__(self, path: Path, connections: Connections) -> None:
        self._path = path
        self._close = connections.close
        self._connection = connections.writer
        self._connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")

    async def head(self) -> Head:
        with self._telling():
            secret, keyed = self._connection.execute("SELECT secret, keyed FROM store").fetchone()
        return Head(secret, bool(keyed))

    async def rows(self, table: Table, after: Row | None = None) -> AsyncGenerator[Row, None]:
        columns, key = ", ".join(table.columns), ", ".join(table.key)
        where = f"WHERE ({key}) > ({', '.join('?' * len(after))})" if after else ""
        portable = _convert(table, _labels_of)
        with self._telling():
            for row in self._connection.execute(
                f"SELECT {columns} FROM {table.name} {where} ORDER BY {key}", after or ()
            ):
                yield portable(row)

    async def last_key(self, table: Table) -> Row | None:
        key = ", ".join(table.key)
        order = ", ".join(f"{column} DESC" for column in table.key)
        with self._telling():
            found: Row | None = self._connection.execute(
                f"SELECT {key} FROM {table.name} ORDER BY {order} LIMIT 1"
            ).fetchone()
        return found

    async def begin_copy(self, source: bytes) -> None:
        with self._telling():
            if has_table(self._connection, UNFINISHED):
                found = self._connection.execute(f"SELECT source FROM {UNFINISHED}").fetchone()
                if found != (source,):
                    raise StoreOpenError(f"{self._path} is an unfinished copy of another store. Choose another path.")
                return
            for table in TABLES:
                if self._connection.execute(f"SELECT 1 FROM {table.name} LIMIT 1").fetchone():
                    raise StoreOpenError(f"{self._path} is not empty: it has {table.name}. Choose another path.")
            self._connection.execute(f"CREATE TABLE {UNFINISHED} AS SELECT ? AS source", (source,))

    async def load(self, table: Table, rows: Sequence[Row]) -> None:
        marks = ", ".join("?" * len(table.columns))
        own = _convert(table, _labels)
        with self._telling(), self._transaction():
            self._connection.executemany(
                f"INSERT INTO {table.name} ({', '.join(table.columns)}) VALUES ({marks})", map(own, rows)
            )

    async def finish_copy(self, head: Head) -> None:
        with self._telling():
            with self._transaction():
                self._connection.execute("UPDATE store SET secret = ?, keyed = ?", head)
                self._connection.execute(f"DROP TABLE {UNFINISHED}")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def close(self) -> None:
        self._close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreOpenError(f"{self._path} cannot be copied: SQLite says {str(error)!r}.") from error


def _convert(table: Table, convert: Callable[[Any], Any]) -> Callable[[Row], Row]:
    """Returns what changes the labels of a row, if its table has them, and leaves all else."""
    if "labels" not in table.columns:
        return lambda row: row
    at = table.columns.index("labels")
    return lambda row: (*row[:at], convert(row[at]), *row[at + 1 :])


def _labels_of(column: str | None) -> tuple[tuple[str, str], ...] | None:
    if column is None:
        return None
    return tuple(sorted((_text(key), _text(value)) for key, value in json.loads(column).items()))


def _labels(labels: tuple[tuple[str, str], ...] | None) -> str | None:
    if labels is None:
        return None
    return json.dumps({key.encode().hex(): value.encode().hex() for key, value in labels})


def _text(column: str) -> str:
    return bytes.fromhex(column).decode()

"""The rows of a SQLite store as portable values, for a copy of the whole store."""

import json
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.rows import TABLES, Head, Row, Table
from notecase_server.store.sqlite.file import UNFINISHED, Connections, connect, has_table, require_existing
from notecase_server.store.sqlite.schema import HEAD

CHECKPOINT_PAGES = 4000
"""How long the write-ahead log becomes while rows are loaded: 16 MB."""


SOURCES = {
    "sessions": "(SELECT * FROM sessions CROSS JOIN heads USING (tenant, uid))",
    "active_runs": """(SELECT r.tenant, r.create_time, r.uid, r.run, '' AS step, r.deaths, r.released,
        coalesce(o.body, v.body, t.body) AS revision FROM runs r
        LEFT JOIN run_agents o ON o.tenant = r.tenant AND o.uid = r.uid AND o.run = r.run
        LEFT JOIN revisions v ON v.tenant = r.tenant AND v.agent = substr(r.agent, 8) AND v.revision = r.revision
        LEFT JOIN retired_revisions t
            ON t.tenant = r.tenant AND t.agent = substr(r.agent, 8) AND t.revision = -r.revision
        WHERE r.unended = 1)""",
}
"""Portable tables that are none of this store: it keeps a session's head with its events, what a run needs of its agent
in the run's row, and the agent where its revisions are."""

LOADS = {
    "sessions": (
        """INSERT INTO sessions (tenant, uid, session, user, agent, display_name, create_time, expire_time, labels)
            VALUES (:tenant, :uid, :session, :user, :agent, :display_name, :create_time, :expire_time, :labels)""",
        f"""INSERT INTO logs (tenant, uid, sequence, tells_past, activity, update_time, epoch, commits, body)
            VALUES (:tenant, :uid, {HEAD}, 0, :activity, :update_time, :epoch, :commits, :body)""",
    ),
    "events": ("INSERT INTO logs ({columns}) VALUES ({marks})",),
    "runs": ("INSERT INTO runs ({columns}, deaths, released) VALUES ({marks}, 0, 0)",),
    "active_runs": (
        """UPDATE runs SET revision = 0, deaths = :deaths, released = :released
            WHERE tenant = :tenant AND uid = :uid AND run = :run""",
        "INSERT INTO run_agents (tenant, uid, run, body) VALUES (:tenant, :uid, :run, :revision)",
    ),
}
"""What adds a row of a table, where it is not one INSERT. The agent of a run is kept with it, although a revision may
say the same: it goes with the end of the run."""


class SqliteRows:
    """StoreRows of a SQLite file, whose lock it holds. Blocks the event loop: nothing else runs in it."""

    @classmethod
    def open_source(cls, path: Path) -> Self:
        """Opens a store that exists. Raises StoreOpenError, also while a server has it open."""
        require_existing(path)
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
                f"SELECT {columns} FROM {_source(table)} {where} ORDER BY {key}", after or ()
            ):
                yield portable(row)

    async def last_key(self, table: Table) -> Row | None:
        key = ", ".join(table.key)
        order = ", ".join(f"{column} DESC" for column in table.key)
        with self._telling():
            found: Row | None = self._connection.execute(
                f"SELECT {key} FROM {_source(table)} ORDER BY {order} LIMIT 1"
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
                if self._connection.execute(f"SELECT 1 FROM {_source(table)} LIMIT 1").fetchone():
                    raise StoreOpenError(f"{self._path} is not empty: it has {table.name}. Choose another path.")
            self._connection.execute(f"CREATE TABLE {UNFINISHED} AS SELECT ? AS source", (source,))

    async def load(self, table: Table, rows: Sequence[Row]) -> None:
        columns, marks = ", ".join(table.columns), ", ".join(f":{column}" for column in table.columns)
        own = [dict(zip(table.columns, row, strict=True)) for row in map(_convert(table, _labels), rows)]
        statements = LOADS.get(table.name, (f"INSERT INTO {table.name} ({{columns}}) VALUES ({{marks}})",))
        with self._telling(), self._transaction():
            for statement in statements:
                self._connection.executemany(statement.format(columns=columns, marks=marks), own)

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


def _source(table: Table) -> str:
    return SOURCES.get(table.name, table.name)


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

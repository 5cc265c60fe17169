"""The rows of a PostgreSQL store as portable values, for a copy of the whole store."""

import json
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import asyncpg
import structlog

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.postgres.database import UNFINISHED, refusal, stay_owner
from notecase_server.store.postgres.lease import PostgresLease
from notecase_server.store.postgres.wire import LOST, escaped, kind, unescaped
from notecase_server.store.rows import TABLES, Head, Row, Table

log = structlog.get_logger()

FETCHED = 50
"""Rows that are read at a time: at most 3 MiB each, and seldom more than a kilobyte."""

NUMBERED = {"contents": "content", "audit": "number"}
"""Tables whose keys PostgreSQL numbers."""

PATIENT = "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0"
"""A table is read for as long as its rows are written elsewhere."""


class PostgresRows:
    """StoreRows of a database whose lease it holds, over one connection that is its own."""

    def __init__(self, where: str, connection: "asyncpg.Connection[asyncpg.Record]", lease: PostgresLease) -> None:
        self._where = where
        self._connection = connection
        self._lease = lease

    async def head(self) -> Head:
        with self._telling():
            row = await self._connection.fetchrow("SELECT secret, keyed FROM notecase_store")
        assert row is not None
        return Head(row[0], bool(row[1]))

    async def rows(self, table: Table, after: Row | None = None) -> AsyncGenerator[Row, None]:
        where = f"WHERE ({_names(table.key)}) > ({_marks(after)})" if after else ""
        statement = f"SELECT {_names(table.columns)} FROM {table.name} {where} ORDER BY {_names(table.key)}"
        portable, values = _convert(table, _portable_labels, unescaped), map(escaped, after or ())
        with self._telling():
            async with self._connection.transaction(isolation="repeatable_read", readonly=True):
                await self._connection.execute(PATIENT)
                # asyncpg's own cursor is a prepared statement, which a pooler would hand to others under its name.
                cursor = f"rows_of_{table.name}"
                await self._connection.execute(f"DECLARE {cursor} NO SCROLL CURSOR FOR {statement}", *values)
                while rows := await self._connection.fetch(f"FETCH {FETCHED} FROM {cursor}"):
                    for row in rows:
                        yield portable(row)

    async def last_key(self, table: Table) -> Row | None:
        order = ", ".join(f'"{column}" DESC' for column in table.key)
        with self._telling():
            found = await self._connection.fetchrow(
                f"SELECT {_names(table.key)} FROM {table.name} ORDER BY {order} LIMIT 1"
            )
        return (
            None if found is None else tuple(unescaped(value) if isinstance(value, str) else value for value in found)
        )

    async def begin_copy(self, source: bytes) -> None:
        with self._telling():
            async with self._connection.transaction():
                await stay_owner(self._connection, self._lease.fence)
                if await self._connection.fetchval("SELECT to_regclass($1) IS NOT NULL", UNFINISHED):
                    if source != await self._connection.fetchval(f"SELECT source FROM {UNFINISHED}"):
                        text = f"{self._where} is an unfinished copy of another store. Choose another database."
                        raise StoreOpenError(text)
                    return
                for table in TABLES:
                    if await self._connection.fetchval(f"SELECT true FROM {table.name} LIMIT 1"):
                        text = f"{self._where} is not empty: it has {table.name}. Choose another database."
                        raise StoreOpenError(text)
                await self._connection.execute(f"CREATE TABLE {UNFINISHED} (source bytea NOT NULL)")
                await self._connection.execute(f"INSERT INTO {UNFINISHED} VALUES ($1)", source)

    async def load(self, table: Table, rows: Sequence[Row]) -> None:
        own = _convert(table, _own_labels, escaped)
        with self._telling():
            if not self._lease.holds:
                raise StoreOpenError(f"{self._where} is now owned by another server. Stop it, and repeat the copy.")
            async with self._connection.transaction():
                await stay_owner(self._connection, self._lease.fence)
                await self._connection.execute(PATIENT)
                await self._connection.copy_records_to_table(table.name, columns=table.columns, records=map(own, rows))

    async def finish_copy(self, head: Head) -> None:
        with self._telling():
            async with self._connection.transaction():
                await stay_owner(self._connection, self._lease.fence)
                await self._connection.execute(PATIENT)
                for table, column in NUMBERED.items():
                    await self._connection.execute(
                        f"""SELECT setval(pg_get_serial_sequence('{table}', '{column}'), max({column})) FROM {table}
                            HAVING max({column}) IS NOT NULL"""
                    )
                await self._connection.execute(
                    "UPDATE notecase_store SET secret = $1, keyed = $2", head.secret, int(head.keyed)
                )
                await self._connection.execute(f"DROP TABLE {UNFINISHED}")
        try:
            async with self._connection.transaction():
                await self._connection.execute(PATIENT)
                await self._connection.execute("ANALYZE")
        except LOST as error:
            log.warning("store_not_analyzed", error=kind(error), problem="The copy is complete. Run ANALYZE there.")

    async def close(self) -> None:
        await self._lease.release()
        self._connection.terminate()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except LOST as error:
            raise StoreOpenError(refusal(self._where, error)) from None


def _names(columns: Sequence[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _marks(values: Row) -> str:
    return ", ".join(f"${number}" for number in range(1, len(values) + 1))


def _convert(table: Table, labels: Callable[[Any], Any], text: Callable[[str], str]) -> Callable[[Sequence[Any]], Row]:
    """Returns what changes the labels and the texts of a row."""
    at = table.columns.index("labels") if "labels" in table.columns else -1

    def convert(row: Sequence[Any]) -> Row:
        return tuple(
            labels(value) if place == at else text(value) if isinstance(value, str) else value
            for place, value in enumerate(row)
        )

    return convert


def _portable_labels(column: str | None) -> tuple[tuple[str, str], ...] | None:
    if column is None:
        return None
    return tuple(sorted((unescaped(key), unescaped(value)) for key, value in json.loads(column).items()))


def _own_labels(labels: tuple[tuple[str, str], ...] | None) -> str | None:
    return None if labels is None else json.dumps({escaped(key): escaped(value) for key, value in labels})

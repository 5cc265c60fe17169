"""Reads the tables of a store, for tests of what a deletion leaves."""

from typing import Any, cast

from notecase_server.store.contract import Store
from notecase_server.store.sql.pieces import STATE_ROWS
from notecase_server.store.sqlite.tables import SqliteTables


async def select(store: Store, statement: str) -> list[Any]:
    """Returns the rows of a statement on a store that has tables."""
    return await cast(Any, store)._read(lambda tables: list(tables.rows(statement)))  # type: ignore[no-any-return]


def session_rows(store: Store) -> tuple[tuple[str, str, str], ...]:
    """The tables with rows of sessions and states, heads left out; with each, how a row is found and how many bytes it
    has."""
    tables: Any = SqliteTables
    if store.kind == "postgresql":
        from notecase_server.store.postgres.tables import PostgresTables

        tables = PostgresTables
    rows = (*tables.session_rows, *STATE_ROWS)
    return tuple(("events" if table == "logs" else table, place, size) for table, place, size, *_ in rows)


async def rows_with(store: Store, uid: str) -> set[str]:
    """Returns the tables that have the uid in any column of any row."""
    names = "SELECT name FROM sqlite_master WHERE type = 'table'"
    if store.kind == "postgresql":
        names = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
    found = set[str]()
    for (table,) in await select(store, names):
        for row in await select(store, f"SELECT * FROM {table}"):
            if any(uid.encode() in (value if isinstance(value, bytes) else str(value).encode()) for value in row):
                found.add(table)
    return found

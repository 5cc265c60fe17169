"""What each transaction of a SQLite store writes: its rows by table and their bytes, counted by triggers of the writer.

seen = await written(store)
await store.sweep_sessions()
assert max(each.rows for each in seen) < 1000
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite.store import SqliteStore

BYTES = {"body", "response", "data"}
"""The columns that may be large."""


class Written(NamedTuple):
    """One transaction."""

    steps: int
    tables: dict[str, int]
    """By table, the rows that were added, changed or removed."""
    size: int
    """Bytes of the large columns of these rows."""

    @property
    def rows(self) -> int:
        return sum(self.tables.values())


async def written(store: SqliteStore) -> list[Written]:
    """Returns a list that gets an item with each transaction from here on."""
    await store._write(_count)
    seen, connection, together = list[Written](), store._connections.writer, store._writer._together

    def counting(steps: Sequence[Any]) -> Any:
        connection.execute("DELETE FROM temp.written")
        outcomes = together(steps)
        found = connection.execute("SELECT name, rows, size FROM temp.written").fetchall()
        seen.append(Written(len(steps), {name: rows for name, rows, _ in found}, sum(size for *_, size in found)))
        return outcomes

    store._writer._together = counting  # type: ignore[method-assign]
    return seen


def _count(tables: Tables, _: int) -> None:
    execute = tables._execute  # type: ignore[attr-defined]
    execute("CREATE TEMP TABLE written (name TEXT PRIMARY KEY, rows INTEGER NOT NULL, size INTEGER NOT NULL)")
    names = [name for (name,) in execute("SELECT name FROM main.sqlite_master WHERE type = 'table'").fetchall()]
    for name in names:
        columns = [row[1] for row in execute(f"PRAGMA table_info({name})").fetchall() if row[1] in BYTES]
        for change, rows in (("INSERT", ["NEW"]), ("UPDATE", ["OLD", "NEW"]), ("DELETE", ["OLD"])):
            sizes = [f"coalesce(length({row}.{column}), 0)" for column in columns for row in rows]
            execute(
                f"""CREATE TEMP TRIGGER written_{name}_{change} AFTER {change} ON main.{name} BEGIN
                    INSERT INTO written VALUES ('{name}', 1, {" + ".join(sizes) or 0}) ON CONFLICT (name)
                        DO UPDATE SET rows = rows + 1, size = size + excluded.size; END"""
            )

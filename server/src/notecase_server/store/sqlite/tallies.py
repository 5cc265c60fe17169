"""Tallies of what quotas bound by tenant, so that a write does not count rows: that takes 10 ms for 100,000 of them.

They are a temporary table and triggers of the writer's connection, in memory. SQLite changes them with every row that
this connection inserts or deletes, and takes that back with a transaction that is rolled back. The file
has nothing of them: each process counts once, so a crash, an older file and a backup need no care.
"""

import sqlite3
from collections.abc import Collection, Mapping

from notecase_server.store.tables import Kept

ROWS: Mapping[Kept, Mapping[str, str]] = {
    "sessions": {"sessions": "1"},
    "requests": {"requests": "1"},
    "uploads": {"uploads": "1"},
    "blob_bytes": {"blobs": "{row}size", "uploads": "CASE {row}sha256 WHEN '' THEN {row}size ELSE 0 END"},
}
"""By kind the tables whose rows count, and what each row counts for. Only an insert or a delete changes that, and
REPLACE, which is both. Keys and revisions are few within what bounds them, and are counted."""

ADD = "INSERT INTO tallies {values} ON CONFLICT DO UPDATE SET amount = amount + excluded.amount"

KEPT = "SELECT amount FROM tallies WHERE kind = ? AND tenant = ?"


def begin(connection: sqlite3.Connection, kinds: Collection[Kept]) -> None:
    """Counts once for each of these kinds, and from then on keeps its tally. Call it outside of a transaction, once for
    a kind. Raises sqlite3.Error, and then nothing is kept."""
    # Without the second, REPLACE deletes rows and no trigger hears of it.
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA recursive_triggers = ON")
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(
            """CREATE TEMP TABLE IF NOT EXISTS tallies (
                kind TEXT NOT NULL, tenant TEXT NOT NULL, amount INTEGER NOT NULL, PRIMARY KEY (kind, tenant)
            ) WITHOUT ROWID"""
        )
        for kind in kinds:
            for table, amount in ROWS[kind].items():
                _begin(connection, kind, table, amount)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _begin(connection: sqlite3.Connection, kind: Kept, table: str, amount: str) -> None:
    counted = f"SELECT '{kind}', tenant, sum({amount.format(row='')}) FROM main.{table} WHERE true GROUP BY tenant"
    connection.execute(ADD.format(values=counted))
    for change, row, sign in (("INSERT", "NEW.", ""), ("DELETE", "OLD.", "-")):
        changed = f"VALUES ('{kind}', {row}tenant, {sign}({amount.format(row=row)}))"
        connection.execute(
            f"""CREATE TEMP TRIGGER {kind}_of_{table}_{change} AFTER {change} ON main.{table}
                BEGIN {ADD.format(values=changed)}; END"""
        )

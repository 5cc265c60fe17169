"""Gives every session of a SQLite store another uid, so that nothing that named the old one goes on in the new
history."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.renewal import renewed_answer, renewed_session
from notecase_server.store.rows import UIDS
from notecase_server.store.sqlite.file import connect, require_closed, require_existing
from notecase_server.store.sqlite.schema import HEAD

OWN = {"active_runs": ("run_agents",), "events": ("logs", "lookups")}
"""Tables of this store that correspond to one of the portable ones."""

FRESH = "SELECT fresh FROM renewed n WHERE n.tenant = t.tenant AND n.uid = t.{column}"


def renew(path: Path, new_uid: Callable[[], str]) -> int:
    """Renews all sessions in one transaction; returns how many sessions there
    are. Needs room on disk for the log of what it changes, about as much as the file has.

    Raises StoreOpenError, also when there is no such store, when a server has it open, and when the log of a server
    that was killed was left next to it: a backup may have been put in the place of the file that the log belongs
    to."""
    require_existing(path)
    require_closed(path)
    opened = connect(path, 0)
    connection = opened.writer
    try:
        connection.create_function("new_uid", 0, new_uid)
        connection.create_function("renewed_session", 2, renewed_session, deterministic=True)
        connection.create_function("renewed_answer", 3, renewed_answer, deterministic=True)
        connection.execute("BEGIN IMMEDIATE")
        sessions = _renew(connection)
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        raise StoreOpenError(f"{path} cannot be renewed: SQLite says {str(error)!r}. Nothing was changed.") from error
    finally:
        opened.close()
    return sessions


def _renew(connection: sqlite3.Connection) -> int:
    connection.execute(
        """CREATE TEMP TABLE renewed (tenant TEXT NOT NULL, uid TEXT NOT NULL, fresh TEXT NOT NULL,
            PRIMARY KEY (tenant, uid)) WITHOUT ROWID"""
    )
    sessions = connection.execute("INSERT INTO renewed SELECT tenant, uid, new_uid() FROM sessions").rowcount
    fresh = FRESH.format(column="owner")
    connection.execute(
        f"""UPDATE requests AS t SET response = renewed_answer(response, owner, ({fresh}))
            WHERE response IS NOT NULL AND EXISTS ({fresh})"""
    )
    for table, column, where in UIDS:
        fresh = FRESH.format(column=column)
        for own in OWN.get(table, (table,)):
            connection.execute(f"UPDATE {own} AS t SET {column} = ({fresh}) WHERE {where} AND EXISTS ({fresh})")
    connection.execute(f"UPDATE logs SET body = renewed_session(body, uid) WHERE sequence = {HEAD}")
    return sessions

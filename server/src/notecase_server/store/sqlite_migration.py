"""A file of an older schema becomes one of now, inside a transaction that somebody else begins and ends.

Of the first, the tables whose rows change are set aside, made anew and filled row by row; the others, content among
them, stay where they are. So the disk needs room for several times the rows, and memory holds a few of them. The second
lacks two tables: that of deleted sessions begins empty, and what rewinds have left behind is read from the logs, since
a message says no more by itself whether it is superseded. The third lacks that of keys, and what says whether there
ever was one.
"""

import re
import sqlite3
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Any

import structlog
from notecase import v1

from notecase_server.store import earlier
from notecase_server.store.sqlite_schema import SCHEMA
from notecase_server.store.stretches import Stretch, last_of, left_behind

log = structlog.get_logger()

Row = tuple[Any, ...]

PROGRESS_ROWS = 100_000
"""Rows between two lines of the log."""

UID = """lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-'
    || substr('89ab', 1 + (random() & 3), 1) || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))"""
"""A UUIDv4."""


def _of_sessions(table: str, columns: str) -> str:
    """The rows of a table that has the session behind the tenant, with the uid in its place. CROSS keeps the rows in
    their order."""
    return f"""SELECT t.tenant, n.uid, {columns} FROM first_{table} t
        CROSS JOIN session_names n ON n.tenant = t.tenant AND n.session = t.session"""


def _of_states(table: str, columns: str) -> str:
    """The rows of a table that has a scope, with the uid as a session's id."""
    return f"""SELECT t.tenant, t.kind, coalesce(n.uid, t.id), {columns} FROM first_{table} t
        LEFT JOIN session_names n ON t.kind = 'session' AND n.tenant = t.tenant AND n.session = t.id"""


ROWS: dict[str, str] = {
    "sessions": _of_sessions(
        "sessions",
        """t.session, user, agent, activity, display_name, create_time, update_time, expire_time, labels, epoch, NULL,
            body""",
    ),
    "events": _of_sessions("events", "sequence, tells_past, body"),
    "messages": _of_sessions("messages", "sequence, message, run, '', update_sequence, body"),
    "calls": _of_sessions("calls", "call_id, message"),
    "runs": _of_sessions("runs", "run, state, agent, create_time, labels, first_sequence, last_sequence, digest, body"),
    "active_runs": _of_sessions("active_runs", "run, '', 0, 0, agent"),
    "commands": _of_sessions("commands", "command_id, digest, sequence, run"),
    "states": _of_states("states", "version"),
    "entries": _of_states("entries", "key, body"),
    "blob_references": _of_states("blob_references", "key, sha256, sequence"),
    "requests": """SELECT t.tenant, '', rpc, request_id, digest, response, about,
        CASE WHEN about LIKE 'sessions/%' THEN coalesce(n.uid, '') ELSE about END, create_time FROM first_requests t
        LEFT JOIN session_names n
            ON about LIKE 'sessions/%' AND n.tenant = t.tenant AND n.session = substr(about, 10)""",
}
"""By table, its rows of now, from those of then."""

CONVERTED: dict[str, Callable[[Row], Row]] = {
    "sessions": lambda row: (*row[:-1], earlier.session(row[-1], row[1]).SerializeToString()),
    "runs": lambda row: (*row[:-1], earlier.run(row[-1]).SerializeToString()),
}
"""By table, what else becomes of a row whose body changes."""


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Converts a file of that version. Raises DecodeError for a row that is damaged."""
    if version == 1:
        _from_first(connection)
    elif version == 2:
        connection.execute("DROP INDEX runs_by_state")
        _make_missing(connection)
        _leave_behind(connection)
        connection.execute("ALTER TABLE messages DROP COLUMN superseded")
    else:
        _make_missing(connection)
    connection.execute("ALTER TABLE store ADD COLUMN keyed INTEGER NOT NULL DEFAULT 0")


def _from_first(connection: sqlite3.Connection) -> None:
    """Converts all of it, with lines in the log that tell how far it is."""
    total = sum(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ROWS)
    progress = _Progress(total)
    _set_aside(connection)
    connection.execute(f"INSERT INTO session_names SELECT tenant, session, {UID} FROM first_sessions")
    connection.execute("INSERT INTO uploaders SELECT tenant, sha256, '' FROM blobs")
    for table, rows in ROWS.items():
        # A cursor that is left in the middle would hold locks after its connection was closed.
        with closing(connection.execute(rows)) as found:
            _fill(connection, table, progress.counted(map(CONVERTED.get(table, lambda row: row), found)))
    _bind(connection)
    _leave_behind(connection)
    for table in ROWS:
        connection.execute(f"DROP TABLE first_{table}")


def _leave_behind(connection: sqlite3.Connection) -> None:
    """Fills `stretches` from the rewinds in the logs."""
    rows = connection.execute(
        "SELECT tenant, uid, sequence, body FROM events WHERE tells_past = 1 ORDER BY tenant, uid, sequence"
    )
    with closing(rows) as found:
        for session, events in groupby(found, lambda row: row[:2]):
            known = list[Stretch]()
            for *_, sequence, body in events:
                event = v1.Event.FromString(body)
                if event.HasField("rewound"):
                    for stretch in left_behind(partial(last_of, known), event.rewound.to_sequence, sequence):
                        insort(known, stretch)
            connection.executemany(
                "INSERT INTO stretches VALUES (?, ?, ?, ?, ?, ?)", [(*session, *stretch) for stretch in known]
            )


class _Progress:
    def __init__(self, total: int) -> None:
        self._done = 0
        self._total = total
        self._tell()

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            yield row
            self._done += 1
            if self._done % PROGRESS_ROWS == 0:
                self._tell()

    def _tell(self) -> None:
        log.info("store_migrating", done=self._done, of=self._total)


def _set_aside(connection: sqlite3.Connection) -> None:
    """Renames the tables whose rows change, and makes what is not there then."""
    indexes = connection.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
    for name, table in indexes.fetchall():
        if table in ROWS:
            connection.execute(f"DROP INDEX {name}")
    for table in ROWS:
        connection.execute(f"ALTER TABLE {table} RENAME TO first_{table}")
    _make_missing(connection)


def _make_missing(connection: sqlite3.Connection) -> None:
    """Makes the tables and indexes of now that are not there."""
    there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    for statement in SCHEMA:
        named = re.match(r"CREATE (?:UNIQUE )?(?:TABLE|INDEX) (\w+)", statement)
        assert named is not None
        if named[1] not in there:
            connection.execute(statement)


def _fill(connection: sqlite3.Connection, table: str, rows: Iterable[Row]) -> None:
    (columns,) = connection.execute("SELECT count(*) FROM pragma_table_info(?)", (table,)).fetchone()
    connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * columns)})", rows)


def _bind(connection: sqlite3.Connection) -> None:
    """Gives the open calls of runs that have not ended what they are bound to, in the row of the run and in its
    messages: such a message has a body of its own from then on, and the event that added it stays as it is."""
    with closing(connection.execute("SELECT tenant, uid, run, agent FROM active_runs")) as active:
        for tenant, uid, name, body in active:
            agent, place = v1.Agent.FromString(body), (tenant, uid, name)
            found = connection.execute(
                "SELECT body FROM runs WHERE tenant = ? AND uid = ? AND run = ?", place
            ).fetchone()
            run = v1.Run.FromString(found[0])
            earlier.bind_run(agent, run)
            connection.execute(
                "UPDATE runs SET body = ? WHERE tenant = ? AND uid = ? AND run = ?", (run.SerializeToString(), *place)
            )
            for message in _messages(connection, place, run):
                if earlier.bind_message(agent, run, message):
                    connection.execute(
                        "UPDATE messages SET body = ? WHERE tenant = ? AND uid = ? AND sequence = ?",
                        (message.SerializeToString(), tenant, uid, message.sequence),
                    )


def _messages(connection: sqlite3.Connection, place: Row, run: v1.Run) -> Iterator[v1.Message]:
    """The messages of a run, the newest first; each may be changed before the next is taken."""
    last = run.last_sequence
    while found := connection.execute(
        """SELECT sequence, m.body, e.body FROM messages m JOIN events e USING (tenant, uid, sequence)
            WHERE tenant = ? AND uid = ? AND run = ? AND sequence BETWEEN ? AND ? ORDER BY sequence DESC LIMIT 1""",
        (*place, run.first_sequence, last),
    ).fetchone():
        sequence, own, event = found
        yield v1.Message.FromString(own) if own is not None else v1.Event.FromString(event).message_added
        last = sequence - 1

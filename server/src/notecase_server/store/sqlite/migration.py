"""A file of an older schema becomes one of now, inside a transaction that somebody else begins and ends.

The tables whose rows change are set aside, made anew and filled, of the first schema row by row; the others, content
among them, stay where they are. So the disk needs room for several times the rows, and memory holds a few of them. The
second lacks two tables: that of deleted sessions begins empty, and what rewinds have left behind is read from the logs,
since a message says no more by itself whether it is superseded. Both it and the third had a row for each message
besides that of its event, and neither had keys, nor what says whether there ever was one. Up to the fourth, runs that
had not ended had a row more, with their agent. Up to the fifth, a session's row had its head, and what finds rows
within a session were indexes. The sixth lacks the table of deleted agents, and runs did not say that their agent was
deleted.
"""

import re
import sqlite3
from bisect import insort
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Any

import structlog
from notecase import v1

from notecase_server.store import earlier
from notecase_server.store.sqlite.schema import BY_ID, HEAD, IN_ORDER, SCHEMA
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
    "sessions": _of_sessions("sessions", "t.session, user, agent, display_name, create_time, expire_time, labels"),
    "logs": f"""{
        _of_sessions(
            "events",
            "t.sequence, tells_past, message, run, substr(message, 1, 0), t.body, NULL, NULL, NULL, NULL",
        )
    }
        LEFT JOIN first_messages m ON m.tenant = t.tenant AND m.session = t.session AND m.sequence = t.sequence""",
    "changed_messages": f"""{_of_sessions("messages", "sequence, update_sequence, body")} WHERE t.body IS NOT NULL""",
    "calls": _of_sessions("calls", "call_id, message"),
    "runs": f"""{
        _of_sessions(
            "runs",
            '''t.run, state, t.agent, create_time, labels, first_sequence, last_sequence, digest,
            iif(a.run IS NULL, NULL, 0), 0, 0, body''',
        )
    } LEFT JOIN first_active_runs a ON a.tenant = t.tenant AND a.session = t.session AND a.run = t.run""",
    "run_agents": _of_sessions("active_runs", "run, agent"),
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

HEADS = _of_sessions("sessions", f"{HEAD}, 0, NULL, NULL, NULL, body, activity, update_time, epoch, NULL")
"""Rows of `logs`."""

FIRST = (
    *("sessions", "events", "messages", "calls", "runs", "active_runs", "commands"),
    *("states", "entries", "blob_references", "requests"),
)
"""The tables of the first schema that have those."""

MOVED = {
    2: ("sessions", "events", "messages", "runs", "active_runs"),
    3: ("sessions", "events", "messages", "runs", "active_runs"),
    4: ("sessions", "runs", "active_runs"),
    5: ("sessions", "runs"),
}
"""The tables of each later schema whose rows lie elsewhere now."""

SESSIONS_FROM_BEFORE = (
    """INSERT INTO sessions SELECT tenant, uid, session, user, agent, display_name, create_time, expire_time, labels
        FROM before_sessions""",
    f"""INSERT INTO logs SELECT tenant, uid, {HEAD}, 0, NULL, NULL, NULL, body, activity, update_time, epoch, commits
        FROM before_sessions""",
)

OF_HEADS = ("activity INTEGER", "update_time INTEGER", "epoch INTEGER", "commits TEXT")

EVENTS_TO_LOGS = (
    "ALTER TABLE events RENAME TO logs",
    *(f"ALTER TABLE logs ADD COLUMN {column}" for column in OF_HEADS),
)
"""Events stay where they are, since the log is most of a file."""

LOOKUPS_OF_LOGS = tuple(
    f"INSERT INTO lookups SELECT tenant, uid, {kind}, {key}, '', sequence FROM logs WHERE message IS NOT NULL"
    for kind, key in ((IN_ORDER, "sequence"), (BY_ID, "message"))
)

FROM_BEFORE = (
    """INSERT INTO logs SELECT tenant, uid, sequence, tells_past, message, run, step, e.body, NULL, NULL, NULL, NULL
        FROM before_events e LEFT JOIN before_messages m USING (tenant, uid, sequence)""",
    """INSERT INTO changed_messages SELECT tenant, uid, sequence, update_sequence, body FROM before_messages
        WHERE body IS NOT NULL""",
)

RUNS_FROM_BEFORE = (
    """INSERT INTO run_agents SELECT tenant, uid, run, a.{agent} FROM before_active_runs a
        JOIN sessions s USING (tenant, uid)""",
    """INSERT INTO runs SELECT tenant, uid, run, state, r.agent, r.create_time, labels, first_sequence, last_sequence,
        digest, iif(o.body IS NULL, NULL, 0), coalesce(deaths, 0), coalesce(released, 0), r.body FROM before_runs r
        LEFT JOIN run_agents o USING (tenant, uid, run) LEFT JOIN before_active_runs a USING (tenant, uid, run)""",
)
"""An agent is kept as it is, although a revision may say the same: it goes with the end of its run."""

RUNS_FROM_FIFTH = """INSERT INTO runs SELECT tenant, uid, run, state, agent, create_time, labels, first_sequence,
    last_sequence, digest, revision, deaths, released, body FROM before_runs"""

RETIRED_RUNS = """UPDATE runs SET revision = -revision WHERE revision > 0 AND EXISTS (SELECT 1 FROM retired_revisions t
    WHERE t.tenant = runs.tenant AND t.agent = substr(runs.agent, 8) AND t.revision = runs.revision)"""
"""A run says that its agent is a retired revision."""

CONVERTED: dict[str, Callable[[Row], Row]] = {
    "runs": lambda row: (*row[:-1], earlier.run(row[-1]).SerializeToString()),
}
"""By table, what else becomes of a row whose body changes."""


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Converts a file of that version. Raises DecodeError for a row that is damaged."""
    if version == 1:
        _from_first(connection)
    elif version == 6:
        log.info("store_migrating", schema=version)
        _make_missing(connection)
    else:
        log.info("store_migrating", schema=version)
        _drop_indexes(connection, (*MOVED[version], "events"))
        for table in MOVED[version]:
            connection.execute(f"ALTER TABLE {table} RENAME TO before_{table}")
        for statement in EVENTS_TO_LOGS if version >= 4 else ():
            connection.execute(statement)
        _make_missing(connection)
        events = LOOKUPS_OF_LOGS if version >= 4 else FROM_BEFORE
        runs = RUNS_FROM_BEFORE if version < 5 else (RUNS_FROM_FIFTH,)
        for statement in (*events, *SESSIONS_FROM_BEFORE, *runs):
            connection.execute(statement.format(agent="agent" if version < 4 else "revision"))
        for table in MOVED[version]:
            connection.execute(f"DROP TABLE before_{table}")
        if version == 2:
            _leave_behind(connection)
    if version >= 5:
        connection.execute(RETIRED_RUNS)
    if version < 4:
        connection.execute("ALTER TABLE store ADD COLUMN keyed INTEGER NOT NULL DEFAULT 0")


def _from_first(connection: sqlite3.Connection) -> None:
    """Converts all of it, with its progress in the log."""
    total = sum(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in FIRST)
    progress = _Progress(total)
    _set_aside(connection)
    connection.execute(f"INSERT INTO session_names SELECT tenant, session, {UID} FROM first_sessions")
    connection.execute("INSERT INTO uploaders SELECT tenant, sha256, '' FROM blobs")
    for table, rows in ROWS.items():
        # A cursor that is left in the middle would hold locks after its connection was closed.
        with closing(connection.execute(rows)) as found:
            _fill(connection, table, progress.counted(map(CONVERTED.get(table, lambda row: row), found)))
    with closing(connection.execute(HEADS)) as found:
        _fill(connection, "logs", map(_head, found))
    _bind(connection)
    _leave_behind(connection)
    for table in FIRST:
        connection.execute(f"DROP TABLE first_{table}")


def _head(row: Row) -> Row:
    return (*row[:7], earlier.session(row[7], row[1]).SerializeToString(), *row[8:])


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
        log.info("store_migrating", schema=1, done=self._done, of=self._total)


def _set_aside(connection: sqlite3.Connection) -> None:
    """Renames the tables whose rows change, and makes what is not there then."""
    _drop_indexes(connection, FIRST)
    for table in FIRST:
        connection.execute(f"ALTER TABLE {table} RENAME TO first_{table}")
    _make_missing(connection)


def _drop_indexes(connection: sqlite3.Connection, tables: Collection[str]) -> None:
    indexes = connection.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
    for name, table in indexes.fetchall():
        if table in tables:
            connection.execute(f"DROP INDEX {name}")


def _make_missing(connection: sqlite3.Connection) -> None:
    """Makes the tables and indexes of now that are not there."""
    there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    for statement in SCHEMA:
        named = re.match(r"CREATE (?:UNIQUE )?(?:TABLE|INDEX|VIEW|TRIGGER) (\w+)", statement)
        assert named is not None
        if named[1] not in there:
            connection.execute(statement)


def _fill(connection: sqlite3.Connection, table: str, rows: Iterable[Row]) -> None:
    (columns,) = connection.execute("SELECT count(*) FROM pragma_table_info(?)", (table,)).fetchone()
    connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * columns)})", rows)


def _bind(connection: sqlite3.Connection) -> None:
    """Gives the open calls of runs that have not ended what they are bound to, in the row of the run and in its
    messages: such a message has a separate body from then on, and the event that added it does not change."""
    with closing(connection.execute("SELECT tenant, uid, run, body FROM run_agents")) as active:
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
                        "REPLACE INTO changed_messages VALUES (?, ?, ?, ?, ?)",
                        (tenant, uid, message.sequence, message.update_sequence, message.SerializeToString()),
                    )


def _messages(connection: sqlite3.Connection, place: Row, run: v1.Run) -> Iterator[v1.Message]:
    """The messages of a run, the newest first; each may be changed before the next is taken."""
    last = run.last_sequence
    while found := connection.execute(
        """SELECT sequence, c.body, e.body FROM events e LEFT JOIN changed_messages c USING (tenant, uid, sequence)
            WHERE tenant = ? AND uid = ? AND run = ? AND sequence BETWEEN ? AND ? ORDER BY sequence DESC LIMIT 1""",
        (*place, run.first_sequence, last),
    ).fetchone():
        sequence, own, event = found
        yield v1.Message.FromString(own) if own is not None else v1.Event.FromString(event).message_added
        last = sequence - 1

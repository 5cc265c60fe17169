"""Tables in PostgreSQL: the statements of every read, and of every write that is no commit.

The text of a statement is constant but for the shape of a filter, so that each connection prepares it once; values are
always bound, and names of columns come from the contract's own tuples. A list is read by one statement that ends where
a page must end, so no cursor stays open.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import structlog
from asyncpg import Connection, Record
from google.protobuf.message import DecodeError
from notecase import v1

from notecase_server.store.contract import (
    AGENT_COLUMNS,
    ANSWER_BYTES,
    AUDIT_COLUMNS,
    RUN_COLUMNS,
    SESSION_COLUMNS,
    ActiveRun,
    And,
    Compare,
    Filter,
    KeyRow,
    Not,
    Once,
    Or,
    Query,
    Quotas,
    Scope,
    SessionKey,
    StepKey,
)
from notecase_server.store.fold import ENDED
from notecase_server.store.lists import LABELS, OPERATORS, Found, Labelled, check_column, column
from notecase_server.store.postgres_tallies import TALLIED, CountedAloneError, Tallies
from notecase_server.store.postgres_wire import awaited, escaped, unescaped
from notecase_server.store.stretches import Stretch, marked
from notecase_server.store.tables import (
    Applied,
    Batch,
    BlobRow,
    Changes,
    CommitRow,
    EventRow,
    Kept,
    Piece,
    Recorded,
    SessionRow,
    UploadRow,
)

log = structlog.get_logger()

SESSION_ROWS = (
    ("events", "sequence", "length(body)"),
    ("changed_messages", "sequence", "length(body)"),
    ("stretches", "after", "0"),
    ("calls", "call_id", "0"),
    ("runs", "run", "length(body)"),
    ("commands", "command_id", "0"),
)
"""The tables that hold rows of a session under its uid, but for its own row, those of its state, and what its deletion
takes away at once. With each, how a row is found within a session, and how many bytes it has beyond a few."""

STATE_ROWS = (("entries", "key", "length(body)"), ("blob_references", "key, sha256", "0"))
"""The same of the tables that hold rows of a state."""

DATA_TABLES = ("sessions", "states", "agents", "blobs", "uploads")
"""The tables of which a tenant that has data has rows in at least one."""

TENANT_ROWS = (
    ("entries", "kind, id, key", "length(body)"),
    ("states", "kind, id", "0"),
    ("blob_references", "kind, id, key, sha256", "0"),
    ("requests", "subject, rpc, request_id", "length(response)"),
    ("uploaders", "sha256, subject", "0"),
    ("uploads", "upload_id", "0"),
    ("agents", "agent", "0"),
    ("revisions", "agent, revision", "length(body)"),
    ("keys", "key", "0"),
    ("principals", "principal", "0"),
    ("audit", "number", "length(body)"),
)
"""The tables that hold rows of a tenant outside of its sessions, content left out; with each, how a row is found, and
how many bytes it has beyond a few."""

CHANGES_READ = 500
"""Events that tell the past read at a time."""

LOOSE_READ = 64
"""Blobs or uploads looked at at a time."""

SESSION = "SELECT body, epoch, commits FROM sessions"

REWIND = """(SELECT CASE WHEN s.until > e.sequence THEN s.sequence END FROM stretches s
    WHERE s.tenant = e.tenant AND s.uid = e.uid AND s.after < e.sequence ORDER BY s.after DESC LIMIT 1)"""
"""The rewind that left a message behind, or NULL."""

CHANGED = "LEFT JOIN changed_messages c ON c.tenant = e.tenant AND c.uid = e.uid AND c.sequence = e.sequence"

MESSAGE = f"c.body AS own, CASE WHEN c.body IS NULL THEN e.body END AS event, {REWIND} AS rewind"
"""A message's own body, or where it has none the event's; and what marks it."""

MESSAGES = f"""SELECT e.sequence, {MESSAGE}, length(coalesce(c.body, e.body)) AS size
    FROM events e {CHANGED} WHERE e.message IS NOT NULL AND e.tenant = $1 AND e.uid = $2"""

CALLS = f"""SELECT t.call_id, e.message, {MESSAGE} FROM calls t
    JOIN events e ON e.message IS NOT NULL AND e.tenant = t.tenant AND e.uid = t.uid AND e.message = t.message
    {CHANGED} WHERE t.tenant = $1 AND t.uid = $2"""
"""With their messages."""

KEPT: Mapping[Kept, str] = {
    "requests": "SELECT count(*) FROM requests WHERE tenant = $1",
    "sessions": "SELECT count(*) FROM sessions WHERE tenant = $1",
    "agents": "SELECT count(DISTINCT agent) FROM revisions WHERE tenant = $1",
    "revisions": "SELECT count(*) FROM revisions WHERE tenant = $1 AND agent = $2",
    "keys": "SELECT count(*) FROM entries WHERE tenant = $1 AND kind = $2 AND id = $3",
    "uploads": "SELECT count(*) FROM uploads WHERE tenant = $1",
    "blob_bytes": """SELECT (coalesce((SELECT sum(size) FROM blobs WHERE tenant = $1), 0)
        + coalesce((SELECT sum(size) FROM uploads WHERE tenant = $1 AND sha256 = ''), 0))::bigint""",
    "upload_bytes": "SELECT coalesce(sum(size), 0)::bigint FROM uploads WHERE tenant = $1 AND sha256 = ''",
}


class _Copied(NamedTuple):
    """A table that a fork has rows of."""

    table: str
    source: str
    """The rows of the source that are looked at: of the tenant $1 and the uid $2, up to the sequence $3."""
    place: str
    """The column that tells them apart."""
    before: str | int
    """Comes before every place."""
    size: str
    values: str
    """What a row becomes under the uid $4."""
    which: str = "true"
    """The rows that are copied."""


OF_SOURCE = "tenant = $1 AND uid = $2"
OF_ITS_STATE = "tenant = $1 AND kind = 'session' AND id = $2"

COPIES = (
    _Copied(
        *("blob_references", f"{OF_ITS_STATE} AND key = ''", "sha256", "", "0"),
        *("$1, 'session', $4, '', sha256, sequence", "sequence <= $3"),
    ),
    _Copied(
        *("events", f"{OF_SOURCE} AND sequence <= $3", "sequence", 0, "length(body)"),
        "$1, $4, sequence, tells_past, message, run, step, body",
    ),
    _Copied(
        *("stretches", OF_SOURCE, "after", -1, "0"),
        *("$1, $4, after, until, sequence, back", "sequence <= $3"),
    ),
    _Copied(
        *("changed_messages", f"{OF_SOURCE} AND sequence <= $3", "sequence", 0, "length(body)"),
        *("$1, $4, sequence, update_sequence, body", "update_sequence <= $3"),
    ),
    _Copied(
        *("calls", OF_SOURCE, "call_id", "", "0", "$1, $4, call_id, message"),
        """EXISTS (SELECT 1 FROM events e WHERE e.tenant = calls.tenant AND e.uid = calls.uid
            AND e.message = calls.message AND e.message IS NOT NULL AND e.sequence <= $3)""",
    ),
    _Copied(
        *("runs", OF_SOURCE, "run", "", "length(body)"),
        f"$1, $4, run, {', '.join(RUN_COLUMNS)}, labels, first_sequence, last_sequence, digest, body",
        """last_sequence <= $3 AND NOT EXISTS
            (SELECT 1 FROM active_runs a WHERE a.tenant = runs.tenant AND a.create_time = runs.create_time
                AND a.uid = runs.uid AND a.run = runs.run)""",
    ),
    _Copied("entries", OF_ITS_STATE, "key", "", "length(body)", "$1, 'session', $4, key, body"),
)
"""In the order in which they are copied: what holds content comes first."""

NAMED = "coalesce($3, s.agent)"

START = f"""SELECT s.body, r.body FROM (SELECT 1) AS one
    LEFT JOIN session_names n ON n.tenant = $1 AND n.session = $2
    LEFT JOIN sessions s ON s.tenant = $1 AND s.uid = n.uid
    LEFT JOIN agents a ON a.tenant = $1 AND a.agent = substr(split_part({NAMED}, '@', 1), 8)
    LEFT JOIN revisions r ON r.tenant = $1 AND r.agent = a.agent AND r.revision = coalesce(
        nullif(CASE WHEN split_part({NAMED}, '@', 2) ~ '^[0-9]{{1,18}}$'
            THEN split_part({NAMED}, '@', 2)::bigint ELSE 0 END, 0), a.revision)"""
"""A session, and the agent that is named, or if none is the session's: both as `agents/ID` or `agents/ID@REVISION`."""

LOOSE_BLOBS = """SELECT tenant, sha256 FROM blobs b WHERE upload_time < $1 AND NOT EXISTS
    (SELECT 1 FROM blob_references r WHERE r.tenant = b.tenant AND r.sha256 = b.sha256)"""

ACTIVE_RUNS = """SELECT a.tenant, s.session, a.uid, r.body, a.revision, s.epoch, a.deaths, a.released FROM active_runs a
    JOIN runs r ON r.tenant = a.tenant AND r.uid = a.uid AND r.run = a.run AND r.create_time = a.create_time
    JOIN sessions s ON s.tenant = a.tenant AND s.uid = a.uid"""

EVERY_ACTIVE_RUN = """SELECT a.tenant, s.session, a.uid, r.body, a.revision, s.epoch, a.deaths, a.released
    FROM active_runs a
    CROSS JOIN LATERAL (SELECT state, body FROM runs r
        WHERE r.tenant = a.tenant AND r.uid = a.uid AND r.run = a.run AND r.create_time = a.create_time OFFSET 0) r
    CROSS JOIN LATERAL (SELECT session, epoch, activity FROM sessions s
        WHERE s.tenant = a.tenant AND s.uid = a.uid OFFSET 0) s"""
"""The same, for many of them: OFFSET keeps PostgreSQL from reading all runs ever made, in order to join a few."""

ACTIVE_RUN = """tenant = $1 AND uid = $2 AND run = $3
    AND create_time = (SELECT create_time FROM runs WHERE tenant = $1 AND uid = $2 AND run = $3)"""
"""Finds the row that a run has among those that have not ended."""

IDLE_RUNS = f"""{EVERY_ACTIVE_RUN} WHERE r.state = {v1.Run.STATE_RUNNING}
    OR (r.state = {v1.Run.STATE_QUEUED} AND s.activity = {v1.Session.ACTIVITY_IDLE})"""


SESSION_CHANGES = (
    *(name for name in SESSION_COLUMNS if name not in {"user", "create_time"}),
    *("expire_time", "labels", "epoch", "commits", "body"),
)
"""The columns that change in a session's row."""


def _marks(count: int, after: int = 0) -> str:
    return ", ".join(f"${at}" for at in range(after + 1, after + count + 1))


ADD_SESSION = f"""INSERT INTO sessions (tenant, session, uid, "user", create_time, {", ".join(SESSION_CHANGES)})
    VALUES ({_marks(5 + len(SESSION_CHANGES))})"""

ADD_NAME = "INSERT INTO session_names (tenant, session, uid) VALUES ($1, $2, $3)"

PUT_SESSION = f"""UPDATE sessions SET {", ".join(f"{name} = ${at}" for at, name in enumerate(SESSION_CHANGES, 3))}
    WHERE tenant = $1 AND uid = $2"""

ADD_EVENTS = """INSERT INTO events (tenant, uid, sequence, tells_past, message, run, step, body)
    SELECT $1, $2, * FROM unnest($3::bigint[], $4::smallint[], $5::text[], $6::text[], $7::text[], $8::bytea[])"""

ADD_STRETCHES = """INSERT INTO stretches (tenant, uid, after, until, sequence, back)
    SELECT $1, $2, * FROM unnest($3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[])"""

PUT_MESSAGES = """INSERT INTO changed_messages (tenant, uid, sequence, update_sequence, body)
    SELECT $1, $2, * FROM unnest($3::bigint[], $4::bigint[], $5::bytea[]) ON CONFLICT (tenant, uid, sequence)
    DO UPDATE SET update_sequence = excluded.update_sequence, body = excluded.body"""

PUT_CALLS = """INSERT INTO calls (tenant, uid, call_id, message) SELECT $1, $2, * FROM unnest($3::text[], $4::text[])
    ON CONFLICT (tenant, uid, call_id) DO UPDATE SET message = excluded.message"""

ADD_RUN = f"""INSERT INTO runs
    (tenant, uid, run, {", ".join(RUN_COLUMNS)}, labels, first_sequence, last_sequence, digest, body)
    VALUES ({_marks(8 + len(RUN_COLUMNS))})"""

PUT_RUN = "UPDATE runs SET state = $4, last_sequence = $5, body = $6 WHERE tenant = $1 AND uid = $2 AND run = $3"

ADD_RECORD = """INSERT INTO active_runs (tenant, create_time, uid, run, step, deaths, released, revision)
    VALUES ($1, $2, $3, $4, '', $5, 0, $6)"""

DROP_RECORD = f"DELETE FROM active_runs WHERE {ACTIVE_RUN}"

PUT_RECORD = f"UPDATE active_runs SET deaths = coalesce($4, deaths), released = $5 WHERE {ACTIVE_RUN}"

PUT_VERSION = """INSERT INTO states AS s (tenant, kind, id, version) VALUES ($1, $2, $3, $4)
    ON CONFLICT (tenant, kind, id) DO UPDATE SET version = excluded.version"""

PUT_ENTRIES = """INSERT INTO entries (tenant, kind, id, key, body)
    SELECT $1, * FROM unnest($2::text[], $3::text[], $4::text[], $5::bytea[])
    ON CONFLICT (tenant, kind, id, key) DO UPDATE SET body = excluded.body"""

DROP_ENTRIES = """DELETE FROM entries WHERE tenant = $1
    AND (kind, id, key) IN (SELECT * FROM unnest($2::text[], $3::text[], $4::text[]))"""

REFER = """INSERT INTO blob_references (tenant, kind, id, key, sha256, sequence)
    SELECT $1, $2, $3, $4, * FROM unnest($5::text[], $6::bigint[])"""

ADD_COMMAND = "INSERT INTO commands (tenant, uid, command_id, digest, sequence, run) VALUES ($1, $2, $3, $4, $5, $6)"

ADD_REQUEST = f"""INSERT INTO requests
    (tenant, subject, rpc, request_id, digest, response, about, owner, create_time) VALUES ({_marks(9)})"""

ADD_AUDIT = (
    f"""INSERT INTO audit (tenant, {", ".join(AUDIT_COLUMNS)}, body) VALUES ({_marks(2 + len(AUDIT_COLUMNS))})"""
)


@dataclass(slots=True)
class Counts:
    """What is known of how much there is, for one step."""

    quotas: Quotas
    tallies: Tallies
    alone: bool
    """No other write is under way."""
    asked: set[tuple[Kept, str]] = field(default_factory=set)
    """What the step compares with a quota."""

    def add(self, kind: Kept, tenant: str) -> None:
        """Takes note of one more. Raises CountedAloneError when writes of other sessions have reached the bound since
        this step asked for the count."""
        asked = (kind, tenant) in self.asked
        if asked and not self.alone and self.tallies.below(kind, tenant, self.quotas) is None:
            raise CountedAloneError
        self.tallies.added(kind, tenant)


class PostgresTables:
    """Rows as one connection sees them, for a step that `postgres_wire.run` runs: within a transaction that somebody
    else begins and ends, or a statement at a time."""

    def __init__(self, connection: "Connection[Record]", counts: Counts) -> None:
        self._connection = connection
        self._counts = counts
        self._content_added = 0
        """Bytes that no row says yet whose they are."""

    def _rows(self, statement: str, *values: Any) -> list[Record]:
        return awaited(self._connection.fetch(statement, *map(escaped, values)))

    def _one(self, statement: str, *values: Any) -> Any:
        """The first row, or None."""
        return awaited(self._connection.fetchrow(statement, *map(escaped, values)))

    def _do(self, statement: str, *values: Any) -> int:
        """Returns how many rows were written."""
        status: str = awaited(self._connection.execute(statement, *map(escaped, values)))
        return int(status.rpartition(" ")[2])

    def _put(self, statement: str, of: tuple[str, ...], rows: Sequence[tuple[Any, ...]], width: int) -> None:
        """Writes rows by a statement over their columns, which begin behind the values `of`. The first `width` columns
        tell a row from all others."""
        if rows:
            self._do(statement, *of, *_columns(rows))

    def save(self, changes: Changes) -> None:
        key, deaths = changes.key, dict(changes.deaths)
        (self.add_session if changes.made else self.put_session)(key, changes.session)
        self.add_events(key, changes.events)
        if changes.command is not None:
            self.add_command(key, *changes.command)
        self.add_stretches(key, changes.stretches)
        written = [message for message in changes.messages if message.update_sequence != message.sequence]
        self._put_messages(key, [*written, *changes.changed_messages])
        if changes.calls:
            self.put_calls(key, changes.calls)
        for run, record in changes.runs:
            self.add_run(key, run, record.digest)
            if run.name not in changes.ended:
                self._add_record(key, run, record.agent, deaths.pop(run.name, 0))
        for run, moved in changes.changed_runs:
            self.put_run(key, run, moved)
            if run.name in changes.ended:
                self.drop_record(key, run.name)
        for name, died in deaths.items():
            self.put_record(key, name, died, released=False)
        for scope, version in changes.versions.items():
            self.put_version(scope, version)
        self._put_entries(key.tenant, changes.entries)
        self._refer(key.state, "", changes.references)

    def _page(self, statement: str, order: str, values: Sequence[Any], limit: int) -> list[Record]:
        """At most `limit` rows of a statement without an order, which selects their `size`: they end where no page
        goes on."""
        return self._rows(
            f"""SELECT * FROM (
                    SELECT *, sum(size) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) - size AS before FROM (
                        {statement} ORDER BY {order} LIMIT ${len(values) + 1}) AS q) AS p
                WHERE before <= {ANSWER_BYTES} ORDER BY {order}""",
            *values,
            limit,
        )

    def request(self, once: Once) -> Recorded | None:
        row = self._one(
            """SELECT digest, response, about, owner FROM requests
                WHERE tenant = $1 AND subject = $2 AND rpc = $3 AND request_id = $4""",
            *once[:4],
        )
        return Recorded(*row) if row else None

    def add_request(self, once: Once, response: bytes, about: str, owner: str, now: int) -> None:
        self._counts.add("requests", once.tenant)
        self._do(ADD_REQUEST, *once[:4], once.digest, response, about, owner, now)

    def kept(self, kind: Kept, tenant: str, *within: str, more: int = 1) -> int:
        if kind not in TALLIED:
            return int(self._one(KEPT[kind], tenant, *within)[0])
        counts = self._counts
        counts.asked.add((kind, tenant))
        below = counts.tallies.below(kind, tenant, counts.quotas, more)
        if below is None:
            if not counts.alone:
                raise CountedAloneError
            below = int(self._one(KEPT[kind], tenant)[0])
            counts.tallies.counted(kind, tenant, below)
        return below

    def touch(self) -> None:
        self._do("UPDATE notecase_store SET keyed = keyed")

    def forget_requests(self, before: int, batch: Batch) -> int:
        rows = self._rows(
            """SELECT length(response), tenant, subject, rpc, request_id FROM requests WHERE create_time < $1
                ORDER BY create_time LIMIT $2""",
            *(before, batch.left),
        )
        if taken := [tuple(map(unescaped, place)) for size, *place in rows if batch.takes(size or 0)]:
            self._do(
                """DELETE FROM requests WHERE (tenant, subject, rpc, request_id) IN
                    (SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]))""",
                *_columns(taken),
            )
        return len(taken)

    def command(self, key: SessionKey, command_id: str) -> Applied | None:
        row = self._one(
            "SELECT digest, sequence, run FROM commands WHERE tenant = $1 AND uid = $2 AND command_id = $3",
            *_of(key),
            command_id,
        )
        return Applied(*row) if row else None

    def add_command(self, key: SessionKey, command_id: str, applied: Applied) -> None:
        self._do(ADD_COMMAND, *_of(key), command_id, *applied)

    def named_session(self, tenant: str, session: str) -> str:
        row = self._one("SELECT uid FROM session_names WHERE tenant = $1 AND session = $2", tenant, session)
        return str(row[0]) if row else ""

    def exists(self, tenant: str, uid: str) -> bool:
        return self._one("SELECT 1 FROM sessions WHERE tenant = $1 AND uid = $2", tenant, uid) is not None

    def session(self, key: SessionKey) -> SessionRow | None:
        row = self._one(f"{SESSION} WHERE tenant = $1 AND uid = $2", *_of(key))
        return session_row(*row) if row else None

    def session_of_name(self, tenant: str, session: str) -> SessionRow | None:
        row = self._one(
            f"""{SESSION} WHERE tenant = $1
                AND uid = (SELECT uid FROM session_names WHERE tenant = $1 AND session = $2)""",
            *(tenant, session),
        )
        return session_row(*row) if row else None

    def session_with_runs(self, key: SessionKey, runs: Collection[str]) -> tuple[SessionRow, dict[str, v1.Run]] | None:
        row = self.session(key)
        if row is None:
            return None
        rows = self._rows("SELECT body FROM runs WHERE tenant = $1 AND uid = $2 AND run = ANY($3)", *_of(key), runs)
        found = [v1.Run.FromString(body) for (body,) in rows]
        return row, {run.name: run for run in found}

    def add_session(self, key: SessionKey, row: SessionRow) -> None:
        whose = (row.session.user, column(row.session, "create_time"))
        self._counts.add("sessions", key.tenant)
        self._do(ADD_SESSION, *key, *whose, *session_changes(row))
        self._do(ADD_NAME, *key)

    def put_session(self, key: SessionKey, row: SessionRow) -> None:
        self._do(PUT_SESSION, *_of(key), *session_changes(row))

    def delete_session(self, key: SessionKey) -> None:
        self._do(
            """INSERT INTO deleted_sessions (tenant, uid, "user") SELECT tenant, uid, "user" FROM sessions
                WHERE tenant = $1 AND uid = $2""",
            *_of(key),
        )
        self._do("DELETE FROM sessions WHERE tenant = $1 AND uid = $2", *_of(key))
        self._do("DELETE FROM session_names WHERE tenant = $1 AND session = $2 AND uid = $3", *key)

    def deleted_sessions(self, tenant: str | None, user: str, limit: int) -> list[Scope]:
        where, values = ("", ()) if tenant is None else (' WHERE tenant = $2 AND "user" = $3', (tenant, user))
        # Of a copy that is under way, a transaction that writes to it ends first: see is_copy.
        rows = self._rows(f"SELECT tenant, uid FROM deleted_sessions{where} LIMIT $1 FOR UPDATE", limit, *values)
        return [Scope(tenant, "session", uid) for tenant, uid in rows]

    def delete_rows(self, scope: Scope, batch: Batch) -> bool:
        of_session = "tenant = $1 AND uid = $2", (scope.tenant, scope.id)
        of_state = "tenant = $1 AND kind = $2 AND id = $3", scope
        if scope.kind == "session":
            for table, place, size in SESSION_ROWS:
                self._delete_some(table, *of_session, place, size, batch)
        for table, place, size in STATE_ROWS:
            self._delete_some(table, *of_state, place, size, batch)
        self._blank_some(scope, batch)
        if batch.full:
            return False
        self._do(f"DELETE FROM states WHERE {of_state[0]}", *of_state[1])
        if scope.kind == "session":
            self._do(f"DELETE FROM deleted_sessions WHERE {of_session[0]}", *of_session[1])
        return True

    def _delete_some(self, table: str, where: str, values: Sequence[str], place: str, size: str, batch: Batch) -> None:
        limit = f"${len(values) + 1}"
        rows = self._rows(
            f"SELECT {size}, {place} FROM {table} WHERE {where} ORDER BY {place} LIMIT {limit}", *values, batch.left
        )
        taken = [found for size, *found in rows if batch.takes(size or 0)]
        if taken:
            last = [unescaped(one) if isinstance(one, str) else one for one in taken[-1]]
            marks = _marks(len(last), after=len(values))
            self._do(f"DELETE FROM {table} WHERE {where} AND ({place}) <= ({marks})", *values, *last)

    def _blank_some(self, scope: Scope, batch: Batch) -> None:
        """Drops the responses of requests that go with it, and keeps that they were carried out."""
        owner = scope.id if scope.kind == "session" else f"users/{scope.id}"
        rows = self._rows(
            """SELECT length(response), subject, rpc, request_id FROM requests
                WHERE tenant = $1 AND owner = $2 AND owner != '' LIMIT $3""",
            *(scope.tenant, owner, batch.left),
        )
        if taken := [tuple(map(unescaped, place)) for size, *place in rows if batch.takes(size or 0)]:
            self._do(
                """UPDATE requests SET response = NULL, owner = '' WHERE tenant = $1
                    AND (subject, rpc, request_id) IN (SELECT * FROM unnest($2::text[], $3::text[], $4::text[]))""",
                *(scope.tenant, *_columns(taken)),
            )

    def begin_copy(self, key: SessionKey, user: str) -> None:
        self._do('INSERT INTO deleted_sessions (tenant, uid, "user") VALUES ($1, $2, $3)', *_of(key), user)

    def is_copy(self, key: SessionKey) -> bool:
        statement = "SELECT 1 FROM deleted_sessions WHERE tenant = $1 AND uid = $2 FOR SHARE"
        return self._one(statement, *_of(key)) is not None

    def bind_copy(self, key: SessionKey, row: SessionRow) -> None:
        self._do("DELETE FROM deleted_sessions WHERE tenant = $1 AND uid = $2", *_of(key))
        self.add_session(key, row)

    def rows_to_copy(self, source: SessionKey, at: int, after: Piece, batch: Batch) -> list[Piece]:
        found = list[Piece]()
        for number, (table, rows, place, before, size, _, which) in islice(enumerate(COPIES), after.table, None):
            last = after.places[-1] if number == after.table and after.places else before
            sizes = self._rows(
                f"""SELECT {place}, {size} FROM {table} WHERE {rows} AND {place} > $4 AND {which}
                    AND $3::bigint IS NOT NULL ORDER BY {place} LIMIT $5""",
                *(source.tenant, source.uid, at, last, batch.left),
            )
            places = [one for one, size in sizes if batch.takes(size or 0)]
            if places:
                found.append(Piece(number, [unescaped(one) if isinstance(one, str) else one for one in places]))
            if batch.full:
                break
        return found

    def copy_rows(self, source: SessionKey, key: SessionKey, at: int, pieces: Sequence[Piece]) -> None:
        for number, places in pieces:
            table, rows, place, _, _, values, which = COPIES[number]
            self._do(
                f"""INSERT INTO {table} SELECT {values} FROM {table} WHERE {rows} AND {place} = ANY($5) AND {which}
                    AND $3::bigint IS NOT NULL""",
                *(key.tenant, source.uid, at, key.uid, list(places)),
            )

    def expired(self, now: int, limit: int) -> list[SessionKey]:
        rows = self._rows(
            """SELECT tenant, session, uid FROM sessions WHERE expire_time <= $1
                ORDER BY expire_time, tenant, uid LIMIT $2""",
            *(now, limit),
        )
        return [SessionKey(*row) for row in rows]

    def sessions(self, tenant: str, query: Query) -> Iterator[Found[v1.Session]]:
        values = list[Any]([tenant])
        where = _where(query, SESSION_COLUMNS, ("create_time", "uid"), "<", values)
        rows = self._page(
            f"SELECT create_time, uid, body, length(body) AS size FROM sessions WHERE tenant = $1{where}",
            *("create_time DESC, uid DESC", values, query.limit + 1),
        )
        for create_time, uid, body, size, _ in rows:
            yield Found((create_time, uid), v1.Session.FromString(body), size)

    def add_events(self, key: SessionKey, events: Sequence[EventRow]) -> None:
        self._put(ADD_EVENTS, _of(key), list(map(_event, events)), 1)

    def events(self, key: SessionKey, after: int, limit: int) -> Iterator[Found[v1.Event]]:
        # Some ask for all that there are, however large.
        while rows := self._page(
            """SELECT sequence, body, length(body) AS size FROM events
                WHERE tenant = $1 AND uid = $2 AND sequence > $3""",
            *("sequence", (*_of(key), after), limit),
        ):
            for sequence, body, size, _ in rows:
                yield Found((sequence,), v1.Event.FromString(body), size)
            after, limit = rows[-1]["sequence"], limit - len(rows)
            if rows[-1]["before"] + rows[-1]["size"] <= ANSWER_BYTES:
                break

    def changes(self, key: SessionKey, after: int, until: int) -> Iterator[v1.Event]:
        while rows := self._page(
            """SELECT sequence, body, length(body) AS size FROM events WHERE tells_past = 1
                AND tenant = $1 AND uid = $2 AND sequence > $3 AND sequence <= $4""",
            *("sequence", (*_of(key), after, until), CHANGES_READ),
        ):
            yield from (v1.Event.FromString(row["body"]) for row in rows)
            after = rows[-1]["sequence"]

    def last_stretch(self, key: SessionKey, before: int) -> Stretch | None:
        row = self._one(
            """SELECT after, until, sequence, back FROM stretches WHERE tenant = $1 AND uid = $2 AND after < $3
                ORDER BY after DESC LIMIT 1""",
            *(*_of(key), before),
        )
        return Stretch(*row) if row else None

    def add_stretches(self, key: SessionKey, stretches: Sequence[Stretch]) -> None:
        self._put(ADD_STRETCHES, _of(key), stretches, 1)

    def message(self, key: SessionKey, message: str) -> v1.Message | None:
        row = self._one(f"{MESSAGES} AND e.message = $3", *_of(key), message)
        return message_row(*row[1:4]) if row else None

    def named_messages(self, tenant: str, names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], v1.Message]:
        if not names:
            return {}
        rows = self._rows(
            f"""SELECT e.uid, e.message, {MESSAGE} FROM unnest($2::text[], $3::text[]) AS n (uid, message)
                JOIN events e ON e.message IS NOT NULL AND e.tenant = $1 AND e.uid = n.uid AND e.message = n.message
                {CHANGED}""",
            *(tenant, *_columns(names)),
        )
        return {(uid, unescaped(name)): message_row(*found) for uid, name, *found in rows}

    def add_messages(self, key: SessionKey, messages: Sequence[v1.Message]) -> None:
        self._put_messages(key, [message for message in messages if message.update_sequence != message.sequence])

    def put_message(self, key: SessionKey, message: v1.Message) -> None:
        self._put_messages(key, [message])

    def _put_messages(self, key: SessionKey, messages: Sequence[v1.Message]) -> None:
        rows = [(message.sequence, message.update_sequence, message.SerializeToString()) for message in messages]
        self._put(PUT_MESSAGES, _of(key), rows, 1)

    def messages(
        self, key: SessionKey, query: Query, newest_first: bool, step: StepKey | None, superseded: bool
    ) -> Iterator[Found[v1.Message]]:
        statement, values = MESSAGES, list[Any](_of(key))
        if not superseded:
            statement += f" AND {REWIND} IS NULL"
        if step is not None:
            # The run's own events bound the search: nothing of it lies before its first or after its last.
            bounds = self._one(
                "SELECT first_sequence, last_sequence FROM runs WHERE tenant = $1 AND uid = $2 AND run = $3",
                *(*_of(key), step.run),
            )
            statement += " AND e.run = $3 AND e.step = $4 AND e.sequence BETWEEN $5 AND $6"
            values += [*step, *(bounds or (0, 0))]
        if query.after is not None:
            statement += f" AND e.sequence {'<' if newest_first else '>'} {_mark(values, query.after[0])}"
        order = "sequence DESC" if newest_first else "sequence"
        for sequence, own, event, rewind, size, _ in self._page(statement, order, values, query.limit + 1):
            yield Found((sequence,), message_row(own, event, rewind), size)

    def changed_messages(self, key: SessionKey, at: int) -> list[v1.Message]:
        rows = self._rows(
            f"""SELECT c.body, {REWIND} FROM changed_messages c
                JOIN events e ON e.tenant = c.tenant AND e.uid = c.uid AND e.sequence = c.sequence
                WHERE c.tenant = $1 AND c.uid = $2 AND c.sequence <= $3 AND c.update_sequence > $3""",
            *(*_of(key), at),
        )
        return [message_row(own, None, rewind) for own, rewind in rows]

    def messages_of_calls(self, key: SessionKey, calls: Collection[str]) -> dict[str, v1.Message]:
        return held_calls(self._rows(f"{CALLS} AND t.call_id = ANY($3)", *_of(key), calls)) if calls else {}

    def put_calls(self, key: SessionKey, calls: Mapping[str, str]) -> None:
        self._put(PUT_CALLS, _of(key), list(calls.items()), 1)

    def run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        row = self._one("SELECT body, digest FROM runs WHERE tenant = $1 AND uid = $2 AND run = $3", *_of(key), run)
        return (v1.Run.FromString(row[0]), row[1]) if row else None

    def add_run(self, key: SessionKey, run: v1.Run, digest: bytes) -> None:
        columns = (column(run, name) for name in RUN_COLUMNS)
        bounds = (run.first_sequence, run.last_sequence)
        self._do(ADD_RUN, *_of(key), run.name, *columns, _labels(run), *bounds, digest, run.SerializeToString())

    def put_run(self, key: SessionKey, run: v1.Run, moved: bool) -> None:
        self._do(PUT_RUN, *_of(key), run.name, run.state, run.last_sequence, run.SerializeToString())

    def add_record(self, key: SessionKey, run: v1.Run, agent: v1.Agent) -> None:
        self._add_record(key, run, agent, 0)

    def _add_record(self, key: SessionKey, run: v1.Run, agent: v1.Agent, deaths: int) -> None:
        place = (key.tenant, column(run, "create_time"), key.uid, run.name)
        self._do(ADD_RECORD, *place, deaths, agent.SerializeToString())

    def drop_record(self, key: SessionKey, run: str) -> None:
        self._do(DROP_RECORD, *_of(key), run)

    def runs(
        self, tenant: str, session: SessionKey | None, query: Query, user: str
    ) -> Iterator[tuple[SessionKey, Found[v1.Run]]]:
        values = list[Any]([tenant])
        where = _where(query, RUN_COLUMNS, ("create_time", "uid", "run"), "<", values, "r.")
        source = "runs r"
        if session is not None:
            where += f" AND r.uid = {_mark(values, session.uid)}"
        elif _is_unended(query.where):
            source = """active_runs a JOIN runs r
                ON r.tenant = a.tenant AND r.create_time = a.create_time AND r.uid = a.uid AND r.run = a.run"""
            where += " AND a.tenant = $1"
        if user:
            where += f' AND s."user" = {_mark(values, user)}'
        rows = self._page(
            f"""SELECT r.create_time, r.uid, r.run, r.body, s.session, length(r.body) AS size FROM {source}
                JOIN sessions s ON s.tenant = r.tenant AND s.uid = r.uid WHERE r.tenant = $1{where}""",
            *("create_time DESC, uid DESC, run DESC", values, query.limit + 1),
        )
        for create_time, uid, run, body, name, size, _ in rows:
            found = Found((create_time, uid, unescaped(run)), v1.Run.FromString(body), size)
            yield SessionKey(tenant, name, uid), found

    def changed_runs(self, key: SessionKey, at: int) -> list[v1.Run]:
        rows = self._rows(
            """SELECT body FROM runs
                WHERE tenant = $1 AND uid = $2 AND first_sequence <= $3 AND last_sequence > $3""",
            *(*_of(key), at),
        )
        return [v1.Run.FromString(body) for (body,) in rows]

    def active_run(self, key: SessionKey, run: str) -> ActiveRun | None:
        row = self._one(f"{ACTIVE_RUNS} WHERE r.tenant = $1 AND r.uid = $2 AND r.run = $3", *_of(key), run)
        return _active_run(*row) if row else None

    def active_runs(self, after: ActiveRun | None, limit: int) -> list[ActiveRun]:
        where, values = "", tuple[Any, ...]()
        if after is not None:
            where = " WHERE (a.tenant, a.create_time, a.uid, a.run) > ($2, $3, $4, $5)"
            values = (after.key.tenant, column(after.run, "create_time"), after.key.uid, after.run.name)
        order = " ORDER BY a.tenant, a.create_time, a.uid, a.run LIMIT $1"
        return list(_readable(self._rows(f"{EVERY_ACTIVE_RUN}{where}{order}", limit, *values)))

    def idle_runs(self) -> list[ActiveRun]:
        return list(_readable(self._rows(IDLE_RUNS)))

    def put_record(self, key: SessionKey, run: str, deaths: int | None, released: bool) -> None:
        self._do(PUT_RECORD, *_of(key), run, deaths, int(released))

    def version(self, scope: Scope) -> int:
        row = self._one("SELECT version FROM states WHERE tenant = $1 AND kind = $2 AND id = $3", *scope)
        return int(row[0]) if row else 0

    def state(self, scope: Scope, keys: Collection[str]) -> tuple[int, dict[str, v1.StateEntry | None]]:
        rows = self._rows(
            """SELECT s.version, e.key, e.body FROM states s LEFT JOIN entries e
                ON e.tenant = s.tenant AND e.kind = s.kind AND e.id = s.id AND e.key = ANY($4)
                WHERE s.tenant = $1 AND s.kind = $2 AND s.id = $3""",
            *(*scope, keys),
        )
        entries: dict[str, v1.StateEntry | None] = {
            unescaped(key): v1.StateEntry.FromString(body) for _, key, body in rows if key is not None
        }
        return (rows[0][0] if rows else 0), entries

    def put_version(self, scope: Scope, version: int) -> None:
        self._do(PUT_VERSION, *scope, version)

    def put_entry(self, scope: Scope, key: str, entry: v1.StateEntry | None) -> None:
        self._put_entries(scope.tenant, [(scope, key, entry)])

    def _put_entries(self, tenant: str, entries: Sequence[tuple[Scope, str, v1.StateEntry | None]]) -> None:
        put = [(*scope[1:], key, entry.SerializeToString()) for scope, key, entry in entries if entry is not None]
        gone = [(*scope[1:], key) for scope, key, entry in entries if entry is None]
        self._put(PUT_ENTRIES, (tenant,), put, 3)
        self._put(DROP_ENTRIES, (tenant,), gone, 3)

    def entries(self, scope: Scope, query: Query) -> Iterator[Found[tuple[str, v1.StateEntry]]]:
        # No key is empty, so the empty text comes before all.
        rows = self._page(
            """SELECT key, body, length(body) AS size FROM entries
                WHERE tenant = $1 AND kind = $2 AND id = $3 AND key > $4""",
            *("key", (*scope, *(query.after or ("",))), query.limit + 1),
        )
        for escaped_key, body, size, _ in rows:
            key = unescaped(escaped_key)
            yield Found((key,), (key, v1.StateEntry.FromString(body)), size)

    def last_revision(self, tenant: str, agent_id: str) -> int:
        row = self._one("SELECT revision FROM agents WHERE tenant = $1 AND agent = $2", tenant, agent_id)
        return int(row[0]) if row else 0

    def agent(self, tenant: str, agent_id: str, revision: int) -> v1.Agent | None:
        row = self._one(
            """SELECT body FROM revisions WHERE tenant = $1 AND agent = $2 AND revision =
                coalesce(nullif($3, 0::bigint), (SELECT revision FROM agents WHERE tenant = $1 AND agent = $2))""",
            *(tenant, agent_id, revision),
        )
        return v1.Agent.FromString(row[0]) if row else None

    def start_of(self, tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        row, revision = self._one(START, tenant, session, agent or None)
        return v1.Session.FromString(row) if row else None, v1.Agent.FromString(revision) if revision else None

    def add_revision(self, tenant: str, agent_id: str, agent: v1.Agent) -> None:
        columns = ("revision", *AGENT_COLUMNS, "labels")
        values = (agent.revision, *(column(agent, name) for name in AGENT_COLUMNS), _labels(agent))
        self._do(
            f"""INSERT INTO agents (tenant, agent, {", ".join(columns)}) VALUES ($1, $2, {_marks(len(columns), 2)})
                ON CONFLICT (tenant, agent) DO UPDATE SET
                {", ".join(f"{name} = excluded.{name}" for name in columns)}""",
            *(tenant, agent_id, *values),
        )
        self._do(
            "INSERT INTO revisions (tenant, agent, revision, body) VALUES ($1, $2, $3, $4)",
            *(tenant, agent_id, agent.revision, agent.SerializeToString()),
        )

    def delete_agent(self, tenant: str, agent_id: str) -> None:
        self._do("DELETE FROM revisions WHERE tenant = $1 AND agent = $2", tenant, agent_id)
        self._do(
            "UPDATE agents SET display_name = '', labels = NULL WHERE tenant = $1 AND agent = $2", tenant, agent_id
        )

    def agents(self, tenant: str, query: Query) -> Iterator[Found[v1.Agent]]:
        values = list[Any]([tenant])
        where = _where(query, AGENT_COLUMNS, ("agent",), ">", values, "a.")
        rows = self._page(
            f"""SELECT a.agent, r.body, length(r.body) AS size FROM agents a
                JOIN revisions r ON r.tenant = a.tenant AND r.agent = a.agent AND r.revision = a.revision
                WHERE a.tenant = $1{where}""",
            *("agent", values, query.limit + 1),
        )
        for agent_id, body, size, _ in rows:
            yield Found((agent_id,), v1.Agent.FromString(body), size)

    def revisions(self, tenant: str, agent_id: str, query: Query) -> Iterator[Found[v1.Agent]]:
        values = [tenant, agent_id]
        where = _where(query._replace(where=None), (), ("revision",), "<", values)
        rows = self._page(
            f"""SELECT revision, body, length(body) AS size FROM revisions
                WHERE tenant = $1 AND agent = $2{where}""",
            *("revision DESC", values, query.limit + 1),
        )
        for revision, body, size, _ in rows:
            yield Found((revision,), v1.Agent.FromString(body), size)

    def new_content(self) -> int:
        return int(self._one("INSERT INTO contents (discarded) VALUES (0) RETURNING content")[0])

    def add_chunk(self, content: int, start: int, data: bytes) -> None:
        self._content_added += len(data)
        self._do("INSERT INTO chunks (content, start, data) VALUES ($1, $2, $3)", content, start, data)

    def chunk(self, content: int, offset: int) -> bytes:
        # substr counts from 1.
        row = self._one(
            """SELECT substr(data, ($2 - start + 1)::integer) FROM chunks WHERE content = $1 AND start <= $2
                ORDER BY start DESC LIMIT 1""",
            *(content, offset),
        )
        return bytes(row[0]) if row else b""

    def discard(self, content: int) -> None:
        self._do("UPDATE contents SET discarded = 1 WHERE content = $1", content)

    def delete_chunks(self, limit: int) -> int:
        deleted = 0
        while deleted < limit and (row := self._one("SELECT content FROM contents WHERE discarded = 1 LIMIT 1")):
            gone = self._do(
                """DELETE FROM chunks WHERE content = $1 AND start IN
                    (SELECT start FROM chunks WHERE content = $1 LIMIT $2)""",
                *(row[0], limit - deleted),
            )
            deleted += max(gone, 1)
            if not self._one("SELECT 1 FROM chunks WHERE content = $1 LIMIT 1", row[0]):
                self._do("DELETE FROM contents WHERE content = $1", row[0])
        return deleted

    def blob(self, tenant: str, sha256: str) -> BlobRow | None:
        row = self._one("SELECT content, size FROM blobs WHERE tenant = $1 AND sha256 = $2", tenant, sha256)
        return BlobRow(*row) if row else None

    def put_blob(self, tenant: str, subject: str, sha256: str, row: BlobRow, now: int) -> None:
        self._own_content(tenant)
        self._do(
            """INSERT INTO blobs (tenant, sha256, content, size, upload_time) VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT (tenant, sha256) DO UPDATE
                SET content = excluded.content, size = excluded.size, upload_time = excluded.upload_time""",
            *(tenant, sha256, *row, now),
        )
        self._do(
            "INSERT INTO uploaders (tenant, sha256, subject) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            *(tenant, sha256, subject),
        )

    def _own_content(self, tenant: str) -> None:
        """Takes note that what was added is that tenant's."""
        self._counts.tallies.added("blob_bytes", tenant, self._content_added)
        self._content_added = 0

    def uploaded(self, tenant: str, subject: str, sha256: str) -> bool:
        statement = "SELECT 1 FROM uploaders WHERE tenant = $1 AND sha256 = $2 AND subject = $3"
        return self._one(statement, tenant, sha256, subject) is not None

    def knows_blob(self, tenant: str, sha256: str, subject: str, user: str) -> bool:
        return self.uploaded(tenant, subject, sha256) or (
            self._one(
                """SELECT 1 FROM blob_references r WHERE r.tenant = $1 AND r.sha256 = $2 AND (
                        r.kind = 'user' AND 'users/' || r.id = $3
                        OR r.kind = 'session' AND EXISTS (
                            SELECT 1 FROM sessions s WHERE s.tenant = r.tenant AND s.uid = r.id AND s."user" = $3))
                    LIMIT 1""",
                *(tenant, sha256, user),
            )
            is not None
        )

    def delete_blob(self, tenant: str, sha256: str) -> None:
        for table in ("blobs", "uploaders"):
            self._do(f"DELETE FROM {table} WHERE tenant = $1 AND sha256 = $2", tenant, sha256)

    def is_loose(self, tenant: str, sha256: str, before: int) -> bool:
        return self._one(f"{LOOSE_BLOBS} AND tenant = $2 AND sha256 = $3", before, tenant, sha256) is not None

    def loose_blobs(self, before: int, after: tuple[str, str]) -> Iterator[tuple[str, str]]:
        statement = f"{LOOSE_BLOBS} AND (tenant, sha256) > ($2, $3) ORDER BY tenant, sha256 LIMIT {LOOSE_READ}"
        while rows := self._rows(statement, before, *after):
            for tenant, sha256 in rows:
                after = unescaped(tenant), sha256
                yield after

    def blobs(self, tenant: str, query: Query) -> Iterator[Found[tuple[str, int]]]:
        statement = "SELECT sha256, size FROM blobs WHERE tenant = $1 AND sha256 > $2 ORDER BY sha256 LIMIT $3"
        for sha256, size in self._rows(statement, tenant, *(query.after or ("",)), query.limit + 1):
            yield Found((sha256,), (sha256, size), len(sha256))

    def users_with_state(self, tenant: str, query: Query) -> Iterator[Found[str]]:
        statement = "SELECT id FROM states WHERE tenant = $1 AND kind = 'user' AND id > $2 ORDER BY id LIMIT $3"
        for (user,) in self._rows(statement, tenant, *(query.after or ("",)), query.limit + 1):
            yield Found((user,), user, len(user))

    def refers(self, scope: Scope, key: str, sha256: str) -> bool:
        statement = """SELECT 1 FROM blob_references
            WHERE tenant = $1 AND kind = $2 AND id = $3 AND key = $4 AND sha256 = $5"""
        return self._one(statement, *scope, key, sha256) is not None

    def content_bytes(self, key: SessionKey, until: int) -> int:
        row = self._one(
            """SELECT coalesce(sum(b.size), 0)::bigint FROM blob_references r
                JOIN blobs b ON b.tenant = r.tenant AND b.sha256 = r.sha256
                WHERE r.tenant = $1 AND r.kind = 'session' AND r.id = $2 AND r.key = '' AND r.sequence <= $3""",
            *(*_of(key), until),
        )
        return int(row[0])

    def log_bytes(self, key: SessionKey, until: int) -> int:
        row = self._one(
            """SELECT coalesce(sum(length(body)), 0)::bigint FROM events
                WHERE tenant = $1 AND uid = $2 AND sequence <= $3""",
            *(*_of(key), until),
        )
        return int(row[0])

    def refer(self, scope: Scope, key: str, sha256: str, sequence: int) -> None:
        self._refer(scope, key, {sha256: sequence})

    def _refer(self, scope: Scope, key: str, references: Mapping[str, int]) -> None:
        self._put(REFER, (*scope, key), list(references.items()), 1)

    def drop_references(self, scope: Scope, key: str) -> None:
        self._do("DELETE FROM blob_references WHERE tenant = $1 AND kind = $2 AND id = $3 AND key = $4", *scope, key)

    def upload(self, tenant: str, upload_id: str) -> UploadRow | None:
        row = self._one(
            "SELECT content, size, expire_time, sha256 FROM uploads WHERE tenant = $1 AND upload_id = $2",
            *(tenant, upload_id),
        )
        return UploadRow(*row) if row else None

    def put_upload(self, tenant: str, upload_id: str, row: UploadRow) -> None:
        self._counts.tallies.added("uploads", tenant)
        self._own_content(tenant)
        self._do(
            """INSERT INTO uploads (tenant, upload_id, content, size, expire_time, sha256)
                VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (tenant, upload_id) DO UPDATE SET content =
                excluded.content, size = excluded.size, expire_time = excluded.expire_time, sha256 = excluded.sha256""",
            *(tenant, upload_id, *row),
        )

    def delete_upload(self, tenant: str, upload_id: str) -> None:
        self._do("DELETE FROM uploads WHERE tenant = $1 AND upload_id = $2", tenant, upload_id)

    def expired_uploads(self, now: int) -> Iterator[tuple[str, str, UploadRow]]:
        after = ("", "")
        while rows := self._rows(
            f"""SELECT tenant, upload_id, content, size, expire_time, sha256 FROM uploads
                WHERE expire_time <= $1 AND (tenant, upload_id) > ($2, $3)
                ORDER BY tenant, upload_id LIMIT {LOOSE_READ}""",
            *(now, *after),
        ):
            for tenant, upload_id, *row in rows:
                after = unescaped(tenant), unescaped(upload_id)
                yield *after, UploadRow(*row)

    def key(self, key_id: str) -> KeyRow | None:
        row = self._one("SELECT tenant, body, digest, former FROM keys WHERE key = $1", key_id)
        return KeyRow(unescaped(row[0]), key_id, v1.Key.FromString(row[1]), row[2], row[3]) if row else None

    def put_key(self, row: KeyRow) -> None:
        self._do(
            """INSERT INTO keys (key, tenant, create_time, digest, former, body) VALUES ($1, $2, $3, $4, $5, $6)
                ON CONFLICT (key) DO UPDATE SET tenant = excluded.tenant, create_time = excluded.create_time,
                digest = excluded.digest, former = excluded.former, body = excluded.body""",
            *(row.key_id, row.tenant, row.key.create_time.ToMicroseconds()),
            *(row.digest, row.former, row.key.SerializeToString()),
        )
        self._do("UPDATE notecase_store SET keyed = 1 WHERE keyed = 0")

    def delete_key(self, key_id: str) -> None:
        self._do("DELETE FROM keys WHERE key = $1", key_id)

    def keys(self, tenant: str, query: Query) -> Iterator[Found[v1.Key]]:
        values = list[Any]([tenant])
        if query.after is not None:
            query = query._replace(after=(query.after[0], str(query.after[1]).removeprefix("keys/")))
        where = _where(query._replace(where=None), (), ("create_time", "key"), "<", values)
        rows = self._page(
            f"SELECT create_time, key, body, length(body) AS size FROM keys WHERE tenant = $1{where}",
            *("create_time DESC, key DESC", values, query.limit + 1),
        )
        for create_time, _, body, size, _ in rows:
            key = v1.Key.FromString(body)
            yield Found((create_time, key.name), key, size)

    def principal(self, tenant: str, name: str) -> v1.Principal | None:
        row = self._one("SELECT body FROM principals WHERE tenant = $1 AND principal = $2", tenant, name)
        return v1.Principal.FromString(row[0]) if row else None

    def principal_like(self, tenant: str, principal: v1.Principal) -> v1.Principal | None:
        row = self._one(
            'SELECT body FROM principals WHERE tenant = $1 AND "user" = $2 AND subject = $3 AND role = $4',
            *(tenant, principal.user, principal.subject, principal.role),
        )
        return v1.Principal.FromString(row[0]) if row else None

    def add_principal(self, tenant: str, principal: v1.Principal) -> None:
        self._do(
            'INSERT INTO principals (tenant, principal, "user", subject, role, body) VALUES ($1, $2, $3, $4, $5, $6)',
            *(tenant, principal.name, principal.user, principal.subject, principal.role),
            principal.SerializeToString(),
        )

    def delete_principals(self, tenant: str, user: str, limit: int) -> bool:
        gone = self._do(
            """DELETE FROM principals WHERE tenant = $1 AND principal IN
                (SELECT principal FROM principals WHERE tenant = $1 AND "user" = $2 LIMIT $3)""",
            *(tenant, user, limit),
        )
        return gone > 0

    def add_audit(self, tenant: str, entry: v1.AuditEntry) -> None:
        columns = (column(entry, name) for name in AUDIT_COLUMNS)
        self._do(ADD_AUDIT, tenant, *columns, entry.SerializeToString())

    def audit(self, tenant: str, query: Query) -> Iterator[Found[v1.AuditEntry]]:
        values = list[Any]([tenant])
        where = _where(query, AUDIT_COLUMNS, ("number",), "<", values)
        rows = self._page(
            f"SELECT number, body, length(body) AS size FROM audit WHERE tenant = $1{where}",
            *("number DESC", values, query.limit + 1),
        )
        for number, body, size, _ in rows:
            yield Found((number,), v1.AuditEntry.FromString(body), size)

    def forget_audit(self, before: int, limit: int) -> int:
        return self._do(
            "DELETE FROM audit WHERE number IN (SELECT number FROM audit WHERE create_time < $1 LIMIT $2)",
            *(before, limit),
        )

    def tenant(self, tenant: str) -> v1.Tenant | None:
        row = self._one("SELECT body FROM tenants WHERE tenant = $1", tenant)
        return v1.Tenant.FromString(row[0]) if row else None

    def put_tenant(self, tenant: str, row: v1.Tenant) -> None:
        self._do(
            """INSERT INTO tenants (tenant, body) VALUES ($1, $2)
                ON CONFLICT (tenant) DO UPDATE SET body = excluded.body""",
            *(tenant, row.SerializeToString()),
        )

    def delete_tenant(self, tenant: str) -> None:
        self._do("DELETE FROM tenants WHERE tenant = $1", tenant)

    def tenants(self, query: Query) -> Iterator[Found[v1.Tenant]]:
        after = str(query.after[0]).removeprefix("tenants/") if query.after else ""
        rows = self._page(
            "SELECT tenant, body, length(body) AS size FROM tenants WHERE tenant > $1",
            *("tenant", (after,), query.limit + 1),
        )
        for _, body, size, _ in rows:
            row = v1.Tenant.FromString(body)
            yield Found((row.name,), row, size)

    def has_data(self, tenant: str) -> bool:
        return any(self._one(f"SELECT 1 FROM {table} WHERE tenant = $1 LIMIT 1", tenant) for table in DATA_TABLES)

    def has_deleted_sessions(self, tenant: str) -> bool:
        return self._one("SELECT 1 FROM deleted_sessions WHERE tenant = $1 LIMIT 1", tenant) is not None

    def erase_rows(self, tenant: str, batch: Batch) -> None:
        contents = self._rows(
            """SELECT content FROM blobs WHERE tenant = $1 UNION ALL
                SELECT content FROM uploads WHERE tenant = $1 AND sha256 = '' ORDER BY content LIMIT $2""",
            *(tenant, batch.left),
        )
        for (content,) in contents:
            batch.takes(0)
            self.discard(content)
            for table in ("blobs", "uploads"):
                self._do(f"DELETE FROM {table} WHERE tenant = $1 AND content = $2", tenant, content)
        for table, place, size in TENANT_ROWS:
            self._delete_some(table, "tenant = $1", (tenant,), place, size, batch)

    def count_keys(self, tenant: str) -> int:
        return int(self._one("SELECT count(*) FROM keys WHERE tenant = $1", tenant)[0])

    def is_keyed(self) -> bool:
        row = self._one("SELECT keyed FROM notecase_store")
        return bool(row and row[0])


def _of(key: SessionKey) -> tuple[str, str]:
    """What a session's rows begin with."""
    return key.tenant, key.uid


def session_row(body: bytes, epoch: int, commits: str | None) -> SessionRow:
    """Reads a row of SESSION."""
    made = tuple(CommitRow(*one) for one in json.loads(commits)) if commits else ()
    return SessionRow(v1.Session.FromString(body), epoch, made)


def session_changes(row: SessionRow) -> list[Any]:
    """Returns the values of SESSION_CHANGES."""
    session = row.session
    columns = [column(session, name) for name in SESSION_COLUMNS if name not in {"user", "create_time"}]
    expire_time = session.expire_time.ToMicroseconds() if session.HasField("expire_time") else None
    commits = json.dumps(row.commits, separators=(",", ":")) if row.commits else None
    return [*columns, expire_time, _labels(session), row.epoch, commits, session.SerializeToString()]


class WritingTables(PostgresTables):
    """Tables within a transaction, which write rows that come one by one together: an import makes hundreds of them.
    Before anything else is asked or written, and by `flush`."""

    def __init__(self, connection: "Connection[Record]", counts: Counts) -> None:
        super().__init__(connection, counts)
        self._waiting: tuple[str, tuple[str, ...]] | None = None
        """The statement, and the values that come first."""
        self._rows_waiting: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def _put(self, statement: str, of: tuple[str, ...], rows: Sequence[tuple[Any, ...]], width: int) -> None:
        for row in rows:
            if self._waiting != (statement, of) or row[:width] in self._rows_waiting:
                self.flush()
                self._waiting = statement, of
            self._rows_waiting[row[:width]] = row

    def flush(self) -> None:
        """Writes what waits."""
        if self._waiting is not None:
            (statement, of), rows = self._waiting, list(self._rows_waiting.values())
            self._waiting, self._rows_waiting = None, {}
            super()._put(statement, of, rows, 0)

    def _rows(self, statement: str, *values: Any) -> list[Record]:
        self.flush()
        return super()._rows(statement, *values)

    def _one(self, statement: str, *values: Any) -> Any:
        self.flush()
        return super()._one(statement, *values)

    def _do(self, statement: str, *values: Any) -> int:
        self.flush()
        return super()._do(statement, *values)


def _event(row: EventRow) -> tuple[Any, ...]:
    return (row.sequence, int(row.tells_past), *(row.message or (None, None, None)), row.body)


def _columns(rows: Iterable[Iterable[Any]]) -> Iterator[list[Any]]:
    """The columns of rows, of which there are some."""
    return map(list, zip(*rows, strict=True))


def held_calls(rows: Iterable[Record]) -> dict[str, v1.Message]:
    """Reads rows of CALLS: by call, the message that holds it."""
    messages, holders = dict[str, v1.Message](), dict[str, str]()
    for call_id, holder, *found in rows:
        holders[unescaped(call_id)] = holder
        if holder not in messages:
            messages[holder] = message_row(*found)
    return {call_id: messages[holder] for call_id, holder in holders.items()}


def _labels(row: Labelled) -> str | None:
    """Returns labels as jsonb takes them; None where there are none."""
    return json.dumps({escaped(key): escaped(value) for key, value in row.labels.items()}) if row.labels else None


def message_row(own: bytes | None, event: bytes | None, rewind: int | None) -> v1.Message:
    """Reads the columns of MESSAGE."""
    message = v1.Message.FromString(own) if own is not None else v1.Event.FromString(event or b"").message_added
    return marked(message, rewind)


def _active_run(
    tenant: str, session: str, uid: str, run: bytes, agent: bytes, epoch: int, deaths: int, released: int
) -> ActiveRun:
    key = SessionKey(unescaped(tenant), session, uid)
    return ActiveRun(key, v1.Run.FromString(run), v1.Agent.FromString(agent), epoch, deaths, bool(released))


def _readable(rows: Iterable[Record]) -> Iterator[ActiveRun]:
    """The runs of these rows but those that do not decode: damage to one run does not keep the others from going on."""
    for row in rows:
        try:
            yield _active_run(*row)
        except DecodeError:
            log.error("run_unreadable", tenant=row[0], session=row[1], uid=row[2])


def _mark(values: list[Any], value: Any) -> str:
    """Binds one more value, and returns what stands for it."""
    values.append(value)
    return f"${len(values)}"


def _is_unended(where: Filter | None) -> bool:
    """Whether a filter of runs holds only for such as have not ended."""
    match where:
        case Compare("state", "=", state):
            return state not in ENDED
        case And(terms):
            return any(map(_is_unended, terms))
        case Or(terms):
            return all(map(_is_unended, terms))
    return False


def _where(
    query: Query, columns: tuple[str, ...], places: tuple[str, ...], then: str, values: list[Any], table: str = ""
) -> str:
    """The conditions of a page, to be put behind others; their values are added to `values`. A row behind a position
    compares `then` to it, by its `places`."""
    conditions = ""
    if query.after is not None:
        marks = ", ".join(_mark(values, value) for value in query.after)
        conditions += f" AND ({', '.join(table + place for place in places)}) {then} ({marks})"
    if query.where is not None:
        conditions += f" AND {_condition(query.where, columns, values, table)}"
    return conditions


def _condition(where: Filter, columns: tuple[str, ...], values: list[Any], table: str) -> str:
    """A filter as SQL."""
    match where:
        case And(terms):
            return f"({' AND '.join(_condition(term, columns, values, table) for term in terms) or 'true'})"
        case Or(terms):
            return f"({' OR '.join(_condition(term, columns, values, table) for term in terms) or 'false'})"
        case Not(term):
            return f"NOT {_condition(term, columns, values, table)}"
        case Compare(name, op, value):
            if op not in OPERATORS:
                raise ValueError("a filter compares with an operator that does not exist")
            if name.startswith(LABELS):
                label = f"coalesce({table}labels ->> {_mark(values, name.removeprefix(LABELS))}::text, '')"
                return f'{label} COLLATE "C" {op} {_mark(values, str(value))}'
            return f'{table}"{check_column(name, columns)}" {op} {_mark(values, value)}'

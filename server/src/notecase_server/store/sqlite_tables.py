"""Tables in SQLite: every statement of the SQLite store.

The text of a statement is constant but for the shape of a filter, so that SQLite compiles each once; values are always
bound, and names of columns come from the contract's own tuples.

Labels are kept as a JSON object whose keys and values are the hexadecimal of their UTF-8: in that form every label can
be named in a JSON path and compared in the order of its bytes, whatever characters it has. None stands for no labels.
"""

import json
import sqlite3
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import structlog
from google.protobuf.message import DecodeError
from notecase import v1

from notecase_server.store import sqlite_tallies
from notecase_server.store.contract import (
    AGENT_COLUMNS,
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
    Scope,
    SessionKey,
    StepKey,
)
from notecase_server.store.fold import ENDED
from notecase_server.store.lists import LABELS, OPERATORS, Found, Labelled, check_column, column
from notecase_server.store.sqlite_schema import BY_ID, HEAD, IN_ORDER, OF_RUN, VERSION
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
    Saving,
    SessionRow,
    UploadRow,
)

log = structlog.get_logger()

_COMMITS = msgspec.json.Decoder(tuple[CommitRow, ...])

Bound = str | int | bytes | None

_Head = tuple[int, int | str, int, str | None, bytes]
"""The columns of a session's head, the last of which is its body."""

SAVED_SESSIONS, SAVED_BYTES = 256, 16 << 10
"""Sessions whose rows are kept for their next commit, and how large those of one may be."""

INSERTED = 16
"""Rows that one statement adds at most, so that there are few of such statements to compile."""

ADD_EVENTS = tuple(
    "INSERT INTO logs (tenant, uid, sequence, tells_past, message, run, step, body) VALUES "
    + ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?)"] * rows)
    for rows in range(1, INSERTED + 1)
)
"""By the number of rows, less one."""

_NO_MESSAGE = (None, None, None)

SESSION_ROWS = (
    ("logs", "sequence", "length(body)"),
    ("changed_messages", "sequence", "length(body)"),
    ("stretches", "after", "0"),
    ("calls", "call_id", "0"),
    ("runs", "run", "length(body)"),
    ("run_agents", "run", "length(body)"),
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
    ("retired_revisions", "agent, revision", "length(body)"),
    ("keys", "key", "0"),
    ("principals", "principal", "0"),
    ("audit", "number", "length(body)"),
)
"""The tables that hold rows of a tenant outside of its sessions, content left out; with each, how a row is found, and
how many bytes it has beyond a few."""

ONE_SESSION = "SELECT body, epoch, commits FROM heads WHERE tenant = ? AND uid = ?"

ADD_SESSION = """INSERT INTO sessions
    (tenant, uid, session, user, create_time, agent, display_name, expire_time, labels)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""

PUT_SESSION = """UPDATE sessions SET agent = ?, display_name = ?, expire_time = ?, labels = ?
    WHERE tenant = ? AND uid = ?"""
"""User and create_time stay: setting a column of an index costs a rewrite of the index, changed or not."""

ADD_HEAD = f"""INSERT INTO logs (tenant, uid, sequence, tells_past, activity, update_time, epoch, commits, body)
    VALUES (?, ?, {HEAD}, 0, ?, ?, ?, ?, ?)"""

PUT_HEAD = f"""UPDATE logs SET activity = ?, update_time = ?, epoch = ?, commits = ?, body = ?
    WHERE tenant = ? AND uid = ? AND sequence = {HEAD}"""

ADD_RUN = f"""INSERT INTO runs (tenant, uid, run, {", ".join(RUN_COLUMNS)}, labels, first_sequence, last_sequence,
    digest, revision, deaths, released, body) VALUES (?, ?, ?{", ?" * len(RUN_COLUMNS)}, ?, ?, ?, ?, {{}}, 0, 0, ?)"""

ADD_ENDED_RUN = ADD_RUN.format("NULL")

ADD_ACTIVE_RUN = (
    ADD_RUN.format(
        """iif(EXISTS (SELECT 1 FROM revisions WHERE tenant = ? AND agent = ? AND revision = ? AND body = ?), ?, 0)"""
    )
    + " RETURNING revision"
)
"""Names the revision of the run's agent, if a stored one has the same bytes."""

PUT_AGENT = f"""REPLACE INTO agents (tenant, agent, revision, {", ".join(AGENT_COLUMNS)}, labels)
    VALUES (?, ?, ?{", ?" * len(AGENT_COLUMNS)}, ?)"""

REWIND = """(SELECT iif(s.until > e.sequence, s.sequence, NULL) FROM stretches s
    WHERE s.tenant = e.tenant AND s.uid = e.uid AND s.after < e.sequence ORDER BY s.after DESC LIMIT 1)"""
"""The rewind that left a message behind, or NULL."""

CHANGED = "LEFT JOIN changed_messages c ON c.tenant = e.tenant AND c.uid = e.uid AND c.sequence = e.sequence"

FOUND = f"CROSS JOIN logs e ON e.tenant = l.tenant AND e.uid = l.uid AND e.sequence = l.sequence {CHANGED}"
"""The event of a lookup, and the message that it has become. CROSS keeps the lookups the outer loop."""

MESSAGES = f"""SELECT e.sequence, c.body, iif(c.body IS NULL, e.body, NULL), {REWIND} FROM lookups l {FOUND}
    WHERE l.kind = {IN_ORDER} AND l.tenant = ? AND l.uid = ?"""
"""Of each its own body, or where it has none the event's."""

IN_FORCE = f"{MESSAGES.replace(REWIND, 'NULL', 1)} AND {REWIND} IS NULL"
"""As MESSAGES, of those that no rewind left behind."""

MESSAGE = f"{MESSAGES.replace(f'kind = {IN_ORDER}', f'kind = {BY_ID}')} AND l.key = ?"

CHANGED_MESSAGES = f"""SELECT e.sequence, c.body, NULL, {REWIND} FROM changed_messages c
    JOIN logs e ON e.tenant = c.tenant AND e.uid = c.uid AND e.sequence = c.sequence
    WHERE c.tenant = ? AND c.uid = ? AND c.sequence <= ? AND c.update_sequence > ?"""

KEPT: Mapping[Kept, str] = {
    "requests": "SELECT count(*) FROM requests WHERE tenant = ?",
    "sessions": "SELECT count(*) FROM sessions WHERE tenant = ?",
    "agents": "SELECT count(DISTINCT agent) FROM revisions WHERE tenant = ?",
    "revisions": "SELECT count(*) FROM revisions WHERE tenant = ? AND agent = ?",
    "keys": "SELECT count(*) FROM entries WHERE tenant = ? AND kind = ? AND id = ?",
    "uploads": "SELECT count(*) FROM uploads WHERE tenant = ?",
    "blob_bytes": """SELECT coalesce((SELECT sum(size) FROM blobs WHERE tenant = ?1), 0)
        + coalesce((SELECT sum(size) FROM uploads WHERE tenant = ?1 AND sha256 = ''), 0)""",
    "upload_bytes": "SELECT coalesce(sum(size), 0) FROM uploads WHERE tenant = ? AND sha256 = ''",
}
CALLS = f"""SELECT t.call_id, e.sequence, c.body, iif(c.body IS NULL, e.body, NULL), {REWIND} FROM calls t
    CROSS JOIN lookups l ON l.kind = {BY_ID} AND l.tenant = t.tenant AND l.uid = t.uid AND l.key = t.message
    {FOUND} WHERE t.tenant = ? AND t.uid = ?"""
"""With their messages. CROSS keeps the calls the outer loop."""

NAMED_MESSAGES = f"""SELECT e.uid, e.message, c.body, iif(c.body IS NULL, e.body, NULL), {REWIND}
    FROM json_each(?) n CROSS JOIN lookups l ON l.kind = {BY_ID} AND l.tenant = ?
        AND l.uid = json_extract(n.value, '$[0]') AND l.key = json_extract(n.value, '$[1]') {FOUND}"""
"""CROSS keeps the names the outer loop."""


class _Copied(NamedTuple):
    """A table that a fork has rows of."""

    table: str
    source: str
    """The rows of the source that are looked at."""
    place: str
    """The column that tells them apart."""
    before: str | int
    """Comes before every place."""
    size: str
    values: str
    """What a row becomes."""
    which: str = "true"
    """The rows that are copied."""


OF_SOURCE = "tenant = :tenant AND uid = :source"
OF_ITS_STATE = "tenant = :tenant AND kind = 'session' AND id = :source"

COPIES = (
    _Copied(
        *("blob_references", f"{OF_ITS_STATE} AND key = ''", "sha256", "", "0"),
        *(":tenant, 'session', :uid, '', sha256, sequence", "sequence <= :at"),
    ),
    _Copied(
        *("logs", f"{OF_SOURCE} AND sequence <= :at", "sequence", 0, "length(body)"),
        ":tenant, :uid, sequence, tells_past, message, run, step, body, NULL, NULL, NULL, NULL",
    ),
    _Copied(
        *("stretches", OF_SOURCE, "after", -1, "0"),
        *(":tenant, :uid, after, until, sequence, back", "sequence <= :at"),
    ),
    _Copied(
        *("changed_messages", f"{OF_SOURCE} AND sequence <= :at", "sequence", 0, "length(body)"),
        *(":tenant, :uid, sequence, update_sequence, body", "update_sequence <= :at"),
    ),
    _Copied(
        *("calls", OF_SOURCE, "call_id", "", "0", ":tenant, :uid, call_id, message"),
        f"""EXISTS (SELECT 1 FROM lookups l WHERE l.tenant = calls.tenant AND l.uid = calls.uid AND l.kind = {BY_ID}
            AND l.key = calls.message AND l.sequence <= :at)""",
    ),
    _Copied(
        *("runs", OF_SOURCE, "run", "", "length(body)"),
        f""":tenant, :uid, run, {", ".join(RUN_COLUMNS)}, labels, first_sequence, last_sequence, digest, NULL, 0, 0,
            body""",
        "last_sequence <= :at AND revision IS NULL",
    ),
    _Copied("entries", OF_ITS_STATE, "key", "", "length(body)", ":tenant, 'session', :uid, key, body"),
)
"""In the order in which they are copied: what holds content comes first. CROSS keeps the rows that are named the outer
loop."""

NAMED = "coalesce(:agent, s.agent)"
AT = f"instr({NAMED} || '@', '@')"

START = f"""SELECT h.body, r.body FROM (SELECT 1)
    LEFT JOIN session_names n ON n.tenant = :tenant AND n.session = :session
    LEFT JOIN heads h ON h.tenant = :tenant AND h.uid = n.uid
    LEFT JOIN sessions s ON s.tenant = :tenant AND s.uid = n.uid
    LEFT JOIN agents a ON a.tenant = :tenant AND a.agent = substr({NAMED}, 8, {AT} - 8)
    LEFT JOIN revisions r ON r.tenant = :tenant AND r.agent = a.agent
        AND r.revision = coalesce(nullif(substr({NAMED}, {AT} + 1) + 0, 0), a.revision)"""
"""A session, and the agent that is named, or if none is the session's: both as `agents/ID` or `agents/ID@REVISION`."""

RUN = "r.body, (SELECT session FROM sessions s WHERE s.tenant = r.tenant AND s.uid = r.uid)"
"""With the name of its session."""

SESSION_RUNS = f"""SELECT l.key AS create_time, l.uid AS uid, l.run AS run, {RUN} FROM lookups l
    CROSS JOIN runs r ON r.tenant = l.tenant AND r.uid = l.uid AND r.run = l.run
    WHERE l.kind = {OF_RUN} AND l.tenant = ? AND l.uid = ?"""

UNENDED_RUNS = f"""SELECT r.create_time AS create_time, r.uid AS uid, r.run AS run, {RUN}
    FROM runs r INDEXED BY runs_by_time WHERE r.unended = 1 AND r.tenant = ?"""

ENDED_RUNS = UNENDED_RUNS.replace("unended = 1", "unended = 0")

PUT_RUN = "last_sequence = ?, body = ? WHERE tenant = ? AND uid = ? AND run = ?"

RETIRE = """INSERT INTO retired_revisions (tenant, agent, revision, uses, body)
    SELECT v.tenant, v.agent, v.revision, u.uses, v.body FROM
        (SELECT revision, count(*) AS uses FROM runs INDEXED BY runs_by_time
            WHERE unended = 1 AND revision > 0 AND tenant = :tenant AND agent = 'agents/' || :agent GROUP BY revision) u
        CROSS JOIN revisions v ON v.tenant = :tenant AND v.agent = :agent AND v.revision = u.revision"""

AGENTS = """SELECT a.agent, r.body FROM agents a
    JOIN revisions r ON r.tenant = a.tenant AND r.agent = a.agent AND r.revision = a.revision
    WHERE a.tenant = ?"""


LOOSE_BLOBS = """SELECT tenant, sha256 FROM blobs b WHERE upload_time < ? AND NOT EXISTS
    (SELECT 1 FROM blob_references r WHERE r.tenant = b.tenant AND r.sha256 = b.sha256)"""

ACTIVE_RUN = """SELECT r.tenant, s.session, r.uid, r.body, coalesce(o.body, v.body, t.body), h.epoch, r.deaths,
    r.released FROM runs r JOIN sessions s ON s.tenant = r.tenant AND s.uid = r.uid
    JOIN heads h ON h.tenant = r.tenant AND h.uid = r.uid
    LEFT JOIN run_agents o ON o.tenant = r.tenant AND o.uid = r.uid AND o.run = r.run
    LEFT JOIN revisions v ON v.tenant = r.tenant AND v.agent = substr(r.agent, 8) AND v.revision = r.revision
    LEFT JOIN retired_revisions t ON t.tenant = r.tenant AND t.agent = substr(r.agent, 8) AND t.revision = r.revision
    WHERE r.unended = 1"""

ACTIVE_RUNS = ACTIVE_RUN.replace("runs r JOIN", "runs r INDEXED BY runs_by_time CROSS JOIN")
"""CROSS keeps the runs the outer loop."""

IDLE_RUNS = f"""{ACTIVE_RUNS} AND (r.state = {v1.Run.STATE_RUNNING}
    OR (r.state = {v1.Run.STATE_QUEUED} AND h.activity = {v1.Session.ACTIVITY_IDLE}))"""


def _active_run(
    tenant: str, session: str, uid: str, run: bytes, agent: bytes, epoch: int, deaths: int, released: int
) -> ActiveRun:
    key = SessionKey(tenant, session, uid)
    return ActiveRun(key, v1.Run.FromString(run), v1.Agent.FromString(agent), epoch, deaths, bool(released))


def _readable(rows: Iterable[tuple[Any, ...]]) -> Iterator[ActiveRun]:
    """The runs of these rows but those that do not decode: damage to one run does not keep the others from going on."""
    for row in rows:
        try:
            yield _active_run(*row)
        except DecodeError:
            log.error("run_unreadable", tenant=row[0], session=row[1], uid=row[2])


def _expire_time(session: v1.Session) -> int | None:
    return session.expire_time.ToMicroseconds() if session.HasField("expire_time") else None


class _Saved(NamedTuple):
    """Holds the rows of a session that its next commit loads, as the last commit left them."""

    body: bytes
    epoch: int
    commits: bytes
    """As JSON, which takes a quarter of the memory."""
    runs: Mapping[str, bytes]
    """The bodies of the runs of that commit that have not ended."""


class SqliteTables(Saving):
    """Rows as one connection sees them; used inside a transaction that the caller begins and ends. A caller that rolls
    one back calls `forget`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.deleted = True
        """Something may be left of rows that were deleted: nobody knows what the process before did."""
        self.tallied: set[Kept] = set()
        """What this connection has tallies of."""
        self._saved: OrderedDict[tuple[str, str], _Saved] = OrderedDict()
        """Rows for the next commit of each session. Every write to a session's row or runs goes through this object."""
        self._retires: bool | None = None
        """Whether `retired_revisions` or `run_agents` may hold something; None while nobody has looked."""
        self._execute = connection.execute
        self._executemany = connection.executemany

    def forget(self) -> None:
        """Forgets the rows that were kept for the next commit, after a rollback."""
        self._saved.clear()

    def save(self, changes: Changes) -> None:
        key = changes.key
        head = _head(changes.session)
        if changes.made:
            self._add_session(key, changes.session.session, head)
        else:
            self._put_head(key, head)
        if changes.expiry_moved:
            self._put_listed(key, changes.session.session)
        self.add_events(key, changes.events)
        if changes.command is not None:
            self.add_command(key, *changes.command)
        if changes.stretches:
            self.add_stretches(key, changes.stretches)
        if changes.messages:
            self.add_messages(key, changes.messages)
        if changes.calls:
            self.put_calls(key, changes.calls)
        for message in changes.changed_messages:
            self.put_message(key, message)
        runs: dict[str, bytes] = {}
        for run, record in changes.runs:
            ended = run.name in changes.ended
            runs[run.name] = self._add_run(key, run, record.digest, None if ended else record.agent)
        for run, moved in changes.changed_runs:
            runs[run.name] = self._put_run(key, run, moved, ended=run.name in changes.ended)
        for name, deaths in changes.deaths.items():
            self.put_record(key, name, deaths, released=False)
        for scope, version in changes.versions.items():
            self.put_version(scope, version)
        for scope, name, entry in changes.entries:
            self.put_entry(scope, name, entry)
        for sha256, sequence in changes.references.items():
            self.refer(key.state, "", sha256, sequence)
        for name in changes.ended:
            del runs[name]
        body = head[-1]
        if len(body) + sum(map(len, runs.values())) <= SAVED_BYTES:
            commits = msgspec.json.encode(changes.session.commits)
            self._saved[_of(key)] = _Saved(body, changes.session.epoch, commits, runs)
            if len(self._saved) > SAVED_SESSIONS:
                self._saved.popitem(last=False)

    def _one(self, statement: str, *values: Bound) -> Any:
        """The first row as a tuple, or None."""
        return self._execute(statement, values).fetchone()

    def request(self, once: Once) -> Recorded | None:
        row = self._one(
            """SELECT digest, response, about, owner FROM requests
                WHERE tenant = ? AND subject = ? AND rpc = ? AND request_id = ?""",
            *once[:4],
        )
        return Recorded(*row) if row else None

    def add_request(self, once: Once, response: bytes, about: str, owner: str, now: int) -> None:
        self._execute(
            """INSERT INTO requests
                (tenant, subject, rpc, request_id, digest, response, about, owner, create_time)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            (*once[:4], once.digest, response, about, owner, now),
        )

    def kept(self, kind: Kept, tenant: str, *within: str, more: int = 1) -> int:
        if kind in self.tallied:
            row = self._one(sqlite_tallies.KEPT, kind, tenant)
            return int(row[0]) if row else 0
        return int(self._one(KEPT[kind], tenant, *within)[0])

    def touch(self) -> None:
        # A row is not written again when it stays as it is; the file's header is.
        self._execute(f"PRAGMA user_version = {VERSION}")

    def forget_requests(self, before: int, batch: Batch) -> int:
        rows = self._execute(
            """SELECT length(response), tenant, subject, rpc, request_id FROM requests WHERE create_time < ?
                ORDER BY create_time LIMIT ?""",
            (before, batch.left),
        ).fetchall()
        taken = [place for size, *place in rows if batch.takes(size or 0)]
        self._executemany("DELETE FROM requests WHERE tenant = ? AND subject = ? AND rpc = ? AND request_id = ?", taken)
        self.deleted |= bool(taken)
        return len(taken)

    def command(self, key: SessionKey, command_id: str) -> Applied | None:
        row = self._one(
            "SELECT digest, sequence, run FROM commands WHERE tenant = ? AND uid = ? AND command_id = ?",
            *_of(key),
            command_id,
        )
        return Applied(*row) if row else None

    def add_command(self, key: SessionKey, command_id: str, applied: Applied) -> None:
        self._execute(
            "INSERT INTO commands (tenant, uid, command_id, digest, sequence, run) VALUES (?, ?, ?, ?, ?, ?)",
            (*_of(key), command_id, *applied),
        )

    def named_session(self, tenant: str, session: str) -> str:
        row = self._one("SELECT uid FROM session_names WHERE tenant = ? AND session = ?", tenant, session)
        return str(row[0]) if row else ""

    def exists(self, tenant: str, uid: str) -> bool:
        return self._one("SELECT 1 FROM sessions WHERE tenant = ? AND uid = ?", tenant, uid) is not None

    def session(self, key: SessionKey) -> SessionRow | None:
        row = self._one(ONE_SESSION, key.tenant, key.uid)
        return _session(*row) if row else None

    def session_of_name(self, tenant: str, session: str) -> SessionRow | None:
        uid = "(SELECT uid FROM session_names n WHERE n.tenant = heads.tenant AND n.session = ?)"
        row = self._one(ONE_SESSION.replace("uid = ?", f"uid = {uid}"), tenant, session)
        return _session(*row) if row else None

    def session_with_runs(self, key: SessionKey, runs: Collection[str]) -> tuple[SessionRow, dict[str, v1.Run]] | None:
        saved = self._saved.get(_of(key))
        if saved is not None and saved.runs.keys() >= set(runs):
            row = SessionRow(v1.Session.FromString(saved.body), saved.epoch, _COMMITS.decode(saved.commits))
            return row, {name: v1.Run.FromString(saved.runs[name]) for name in runs}
        rows = self._execute(
            f"""SELECT h.body, h.epoch, h.commits, r.body FROM heads h LEFT JOIN runs r
                ON r.tenant = h.tenant AND r.uid = h.uid AND r.run IN ({_marks(runs)})
                WHERE h.tenant = ? AND h.uid = ?""",
            (*runs, *_of(key)),
        ).fetchall()
        found = [v1.Run.FromString(body) for *_, body in rows if body is not None]
        return (_session(*rows[0][:3]), {run.name: run for run in found}) if rows else None

    def add_session(self, key: SessionKey, row: SessionRow) -> None:
        self._add_session(key, row.session, _head(row))

    def _add_session(self, key: SessionKey, session: v1.Session, head: _Head) -> None:
        columns = key.session, session.user, column(session, "create_time")
        self._execute(ADD_SESSION, (*_of(key), *columns, *_listed(session)))
        self._execute(
            "INSERT INTO session_names (tenant, session, uid) VALUES (?, ?, ?)", (key.tenant, key.session, key.uid)
        )
        self._execute(ADD_HEAD, (*_of(key), *head))

    def put_session(self, key: SessionKey, row: SessionRow) -> None:
        self._put_head(key, _head(row))
        self._put_listed(key, row.session)

    def _put_head(self, key: SessionKey, head: _Head) -> None:
        self._saved.pop(_of(key), None)
        self._execute(PUT_HEAD, (*head, *_of(key)))

    def _put_listed(self, key: SessionKey, session: v1.Session) -> None:
        self._execute(PUT_SESSION, (*_listed(session), *_of(key)))

    def delete_session(self, key: SessionKey) -> None:
        self.deleted = True
        self._saved.pop(_of(key), None)
        self._execute(
            """INSERT INTO deleted_sessions (tenant, uid, user) SELECT tenant, uid, user FROM sessions
                WHERE tenant = ? AND uid = ?""",
            _of(key),
        )
        self._execute("DELETE FROM sessions WHERE tenant = ? AND uid = ?", _of(key))
        self._execute(f"DELETE FROM logs WHERE tenant = ? AND uid = ? AND sequence = {HEAD}", _of(key))
        self._execute("DELETE FROM session_names WHERE tenant = ? AND session = ? AND uid = ?", key)

    def deleted_sessions(self, tenant: str | None, user: str, limit: int) -> list[Scope]:
        where, values = ("", ()) if tenant is None else ("WHERE tenant = ? AND user = ?", (tenant, user))
        rows = self._execute(f"SELECT tenant, uid FROM deleted_sessions {where} LIMIT ?", (*values, limit))
        return [Scope(tenant, "session", uid) for tenant, uid in rows]

    def delete_rows(self, scope: Scope, batch: Batch) -> bool:
        self.deleted = True
        of_session = "tenant = ? AND uid = ?", (scope.tenant, scope.id)
        of_state = "tenant = ? AND kind = ? AND id = ?", scope
        if scope.kind == "session":
            for table, place, size in SESSION_ROWS:
                self._delete_some(table, *of_session, place, size, batch)
        for table, place, size in STATE_ROWS:
            self._delete_some(table, *of_state, place, size, batch)
        self._blank_some(scope, batch)
        if batch.full:
            return False
        self._execute(f"DELETE FROM states WHERE {of_state[0]}", of_state[1])
        if scope.kind == "session":
            self._execute(f"DELETE FROM deleted_sessions WHERE {of_session[0]}", of_session[1])
        return True

    def _delete_some(
        self, table: str, where: str, values: Sequence[Bound], place: str, size: str, batch: Batch
    ) -> None:
        rows = self._execute(
            f"SELECT {size}, {place} FROM {table} WHERE {where} ORDER BY {place} LIMIT ?", (*values, batch.left)
        ).fetchall()
        taken = [found for size, *found in rows if batch.takes(size or 0)]
        if taken:
            marks = ", ".join("?" * len(taken[-1]))
            self._execute(f"DELETE FROM {table} WHERE {where} AND ({place}) <= ({marks})", (*values, *taken[-1]))

    def _blank_some(self, scope: Scope, batch: Batch) -> None:
        """Drops the responses of requests that go with it, and keeps that they were carried out."""
        owner = scope.id if scope.kind == "session" else f"users/{scope.id}"
        rows = self._execute(
            """SELECT length(response), tenant, subject, rpc, request_id FROM requests
                WHERE tenant = ? AND owner = ? AND owner != '' LIMIT ?""",
            (scope.tenant, owner, batch.left),
        ).fetchall()
        self._executemany(
            """UPDATE requests SET response = NULL, owner = ''
                WHERE tenant = ? AND subject = ? AND rpc = ? AND request_id = ?""",
            [place for size, *place in rows if batch.takes(size or 0)],
        )

    def begin_copy(self, key: SessionKey, user: str) -> None:
        self._execute("INSERT INTO deleted_sessions (tenant, uid, user) VALUES (?, ?, ?)", (*_of(key), user))

    def is_copy(self, key: SessionKey) -> bool:
        return self._one("SELECT 1 FROM deleted_sessions WHERE tenant = ? AND uid = ?", *_of(key)) is not None

    def bind_copy(self, key: SessionKey, row: SessionRow) -> None:
        self._execute("DELETE FROM deleted_sessions WHERE tenant = ? AND uid = ?", _of(key))
        self.add_session(key, row)

    def rows_to_copy(self, source: SessionKey, at: int, after: Piece, batch: Batch) -> list[Piece]:
        found = list[Piece]()
        for number, (table, rows, place, before, size, _, which) in islice(enumerate(COPIES), after.table, None):
            last = after.places[-1] if number == after.table and after.places else before
            sizes = self._execute(
                f"""SELECT {place}, {size} FROM {table} WHERE {rows} AND {place} > :last AND {which}
                    ORDER BY {place} LIMIT :limit""",
                {"tenant": source.tenant, "source": source.uid, "at": at, "last": last, "limit": batch.left},
            ).fetchall()
            if places := [one for one, size in sizes if batch.takes(size or 0)]:
                found.append(Piece(number, places))
            if batch.full:
                break
        return found

    def copy_rows(self, source: SessionKey, key: SessionKey, at: int, pieces: Sequence[Piece]) -> None:
        for number, places in pieces:
            table, rows, place, _, _, values, which = COPIES[number]
            # Not as JSON: SQLite's functions end a text at a character 0, which a key of a state may have.
            bound = {f"place{number}": place for number, place in enumerate(places)}
            self._execute(
                f"""INSERT INTO {table} SELECT {values}
                    FROM (SELECT column1 AS one FROM (VALUES {", ".join(f"(:{name})" for name in bound)}))
                    CROSS JOIN {table} ON {place} = one WHERE {rows} AND {which}""",
                {"tenant": key.tenant, "uid": key.uid, "source": source.uid, "at": at, **bound},
            )

    def expired(self, now: int, limit: int) -> list[SessionKey]:
        rows = self._execute(
            """SELECT tenant, session, uid FROM sessions WHERE expire_time <= ?
                ORDER BY expire_time, tenant, uid LIMIT ?""",
            (now, limit),
        )
        return [SessionKey(*row) for row in rows]

    def sessions(self, tenant: str, query: Query) -> Iterator[Found[v1.Session]]:
        where, values = _where(query, SESSION_COLUMNS, "(create_time, uid) < (?, ?)")
        rows = self._execute(
            f"""SELECT create_time, uid, body FROM sessions CROSS JOIN heads USING (tenant, uid) WHERE tenant = ?{where}
                ORDER BY create_time DESC, uid DESC LIMIT ?""",
            (tenant, *values, query.limit + 1),
        )
        for create_time, uid, body in rows:
            yield Found((create_time, uid), v1.Session.FromString(body), len(body))

    def add_events(self, key: SessionKey, events: Sequence[EventRow]) -> None:
        tenant, uid = key.tenant, key.uid
        rows = [
            (tenant, uid, sequence, tells_past, *(message or _NO_MESSAGE), body)
            for sequence, tells_past, message, body in events
        ]
        for at in range(0, len(rows), INSERTED):
            some = rows[at : at + INSERTED]
            self._execute(ADD_EVENTS[len(some) - 1], [value for row in some for value in row])

    def events(self, key: SessionKey, after: int, limit: int) -> Iterator[Found[v1.Event]]:
        rows = self._execute(
            """SELECT sequence, body FROM events WHERE tenant = ? AND uid = ? AND sequence > ?
                ORDER BY sequence LIMIT ?""",
            (*_of(key), after, limit),
        )
        for sequence, body in rows:
            yield Found((sequence,), v1.Event.FromString(body), len(body))

    def changes(self, key: SessionKey, after: int, until: int) -> Iterator[v1.Event]:
        rows = self._execute(
            """SELECT body FROM logs INDEXED BY events_of_past WHERE tells_past = 1
                AND tenant = ? AND uid = ? AND sequence > ? AND sequence <= ? ORDER BY sequence""",
            (*_of(key), after, until),
        )
        for (body,) in rows:
            yield v1.Event.FromString(body)

    def last_stretch(self, key: SessionKey, before: int) -> Stretch | None:
        row = self._one(
            """SELECT after, until, sequence, back FROM stretches WHERE tenant = ? AND uid = ? AND after < ?
                ORDER BY after DESC LIMIT 1""",
            *_of(key),
            before,
        )
        return Stretch(*row) if row else None

    def add_stretches(self, key: SessionKey, stretches: Sequence[Stretch]) -> None:
        self._executemany(
            "INSERT INTO stretches (tenant, uid, after, until, sequence, back) VALUES (?, ?, ?, ?, ?, ?)",
            [(*_of(key), *stretch) for stretch in stretches],
        )

    def message(self, key: SessionKey, message: str) -> v1.Message | None:
        row = self._one(MESSAGE, *_of(key), message)
        return _message(*row[1:]) if row else None

    def named_messages(self, tenant: str, names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], v1.Message]:
        rows = self._execute(NAMED_MESSAGES, (json.dumps(names), tenant))
        return {(uid, name): _message(*found) for uid, name, *found in rows}

    def add_messages(self, key: SessionKey, messages: Sequence[v1.Message]) -> None:
        for message in messages:
            if message.update_sequence != message.sequence:
                self.put_message(key, message)

    def put_message(self, key: SessionKey, message: v1.Message) -> None:
        self._execute(
            "REPLACE INTO changed_messages (tenant, uid, sequence, update_sequence, body) VALUES (?, ?, ?, ?, ?)",
            (*_of(key), message.sequence, message.update_sequence, message.SerializeToString()),
        )

    def messages(
        self, key: SessionKey, query: Query, newest_first: bool, step: StepKey | None, superseded: bool
    ) -> Iterator[Found[v1.Message]]:
        statement, values = MESSAGES if superseded else IN_FORCE, list[Bound](_of(key))
        if step is not None:
            # The run's own events bound the search: nothing of it lies before its first or after its last.
            bounds = self._one(
                "SELECT first_sequence, last_sequence FROM runs WHERE tenant = ? AND uid = ? AND run = ?",
                *_of(key),
                step.run,
            )
            statement += " AND e.run = ? AND e.step = ? AND l.key BETWEEN ? AND ?"
            values += [*step, *(bounds or (0, 0))]
        if query.after is not None:
            statement += f" AND l.key {'<' if newest_first else '>'} ?"
            values += query.after
        statement += f" ORDER BY l.key{' DESC' if newest_first else ''} LIMIT ?"
        for sequence, own, event, rewind in self._execute(statement, (*values, query.limit + 1)):
            yield Found((sequence,), _message(own, event, rewind), len(own or event))

    def changed_messages(self, key: SessionKey, at: int) -> list[v1.Message]:
        rows = self._execute(CHANGED_MESSAGES, (*_of(key), at, at))
        return [_message(*found) for _, *found in rows]

    def messages_of_calls(self, key: SessionKey, calls: Collection[str]) -> dict[str, v1.Message]:
        if not calls:
            return {}
        rows = self._execute(f"{CALLS} AND t.call_id IN ({_marks(calls)})", (*_of(key), *calls)).fetchall()
        messages = {holder: _message(*found) for _, holder, *found in rows}
        return {call_id: messages[holder] for call_id, holder, *_ in rows}

    def put_calls(self, key: SessionKey, calls: Mapping[str, str]) -> None:
        self._executemany(
            "REPLACE INTO calls (tenant, uid, call_id, message) VALUES (?, ?, ?, ?)",
            [(*_of(key), *call) for call in calls.items()],
        )

    def run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        row = self._one("SELECT body, digest FROM runs WHERE tenant = ? AND uid = ? AND run = ?", *_of(key), run)
        return (v1.Run.FromString(row[0]), row[1]) if row else None

    def add_run(self, key: SessionKey, run: v1.Run, digest: bytes) -> None:
        self._add_run(key, run, digest, None)

    def _add_run(self, key: SessionKey, run: v1.Run, digest: bytes, agent: v1.Agent | None) -> bytes:
        """Adds a run, with its agent if it has not ended, and returns its body."""
        columns = (column(run, name) for name in RUN_COLUMNS)
        body = run.SerializeToString()
        row = (*_of(key), run.name, *columns, _labels(run), run.first_sequence, run.last_sequence, digest)
        if agent is None:
            self._execute(ADD_ENDED_RUN, (*row, body))
            return body
        own, revision = _body(agent), agent.revision
        name = agent.name.removeprefix("agents/") if agent.name == run.agent else ""
        (kept,) = self._execute(ADD_ACTIVE_RUN, (*row, key.tenant, name, revision, own, revision, body)).fetchone()
        if not kept:
            self._retires = True
            self._execute(
                "INSERT INTO run_agents (tenant, uid, run, body) VALUES (?, ?, ?, ?)", (*_of(key), run.name, own)
            )
        return body

    def put_run(self, key: SessionKey, run: v1.Run, moved: bool) -> None:
        self._saved.pop(_of(key), None)
        self._put_run(key, run, moved, ended=False)

    def _put_run(self, key: SessionKey, run: v1.Run, moved: bool, *, ended: bool) -> bytes:
        """Replaces a run, which has its agent no longer once it has `ended`, and returns its body."""
        body = run.SerializeToString()
        changed: tuple[Bound, ...] = (run.last_sequence, body, *_of(key), run.name)
        if ended:
            self._drop_agent(key, run.name)
            self._execute(f"UPDATE runs SET revision = NULL, state = ?, {PUT_RUN}", (run.state, *changed))
        elif moved:
            self._execute(f"UPDATE runs SET state = ?, {PUT_RUN}", (run.state, *changed))
        else:
            self._execute(f"UPDATE runs SET {PUT_RUN}", changed)
        return body

    def add_record(self, key: SessionKey, run: v1.Run, agent: v1.Agent) -> None:
        raise AssertionError("runs are added with their agents")

    def drop_record(self, key: SessionKey, run: str) -> None:
        self._saved.pop(_of(key), None)
        self._drop_agent(key, run)
        self._execute("UPDATE runs SET revision = NULL WHERE tenant = ? AND uid = ? AND run = ?", (*_of(key), run))

    def _drop_agent(self, key: SessionKey, run: str) -> None:
        """Drops what only this run needs of its agent. Call it while the run's row still has its revision."""
        if self._retires is None:
            some = "SELECT EXISTS (SELECT 1 FROM run_agents) OR EXISTS (SELECT 1 FROM retired_revisions)"
            self._retires = bool(self._one(some)[0])
        if not self._retires:
            return
        self.deleted = True
        self._execute("DELETE FROM run_agents WHERE tenant = ? AND uid = ? AND run = ?", (*_of(key), run))
        self._execute(
            """UPDATE retired_revisions SET uses = uses - 1 WHERE (tenant, 'agents/' || agent, revision) =
                (SELECT tenant, agent, revision FROM runs WHERE tenant = ? AND uid = ? AND run = ?)""",
            (*_of(key), run),
        )
        self._execute("DELETE FROM retired_revisions WHERE tenant = ? AND uses = 0", (key.tenant,))

    def runs(
        self, tenant: str, session: SessionKey | None, query: Query, user: str
    ) -> Iterator[tuple[SessionKey, Found[v1.Run]]]:
        if session is not None:
            selects, place = [SESSION_RUNS], [tenant, session.uid]
            where, values = _where(query, RUN_COLUMNS, "(l.key, l.uid, l.run) < (?, ?, ?)")
        else:
            selects, place = [UNENDED_RUNS] if _is_unended(query.where) else [UNENDED_RUNS, ENDED_RUNS], [tenant]
            where, values = _where(query, RUN_COLUMNS, "(r.create_time, r.uid, r.run) < (?, ?, ?)")
        whose = " AND s.user = ?" if user else ""
        where += f" AND EXISTS (SELECT 1 FROM sessions s WHERE s.tenant = r.tenant AND s.uid = r.uid{whose})"
        rows = self._execute(
            f"""{" UNION ALL ".join(select + where for select in selects)}
                ORDER BY create_time DESC, uid DESC, run DESC LIMIT ?""",
            (*(*place, *values, *([user] if user else [])) * len(selects), query.limit + 1),
        )
        for create_time, uid, run, body, name in rows:
            found = Found((create_time, uid, run), v1.Run.FromString(body), len(body))
            yield SessionKey(tenant, name, uid), found

    def changed_runs(self, key: SessionKey, at: int) -> list[v1.Run]:
        rows = self._execute(
            """SELECT body FROM runs WHERE tenant = ? AND uid = ? AND first_sequence <= ? AND last_sequence > ?""",
            (*_of(key), at, at),
        )
        return [v1.Run.FromString(body) for (body,) in rows]

    def active_run(self, key: SessionKey, run: str) -> ActiveRun | None:
        where = " AND r.tenant = ? AND r.uid = ? AND r.run = ?"
        row = self._execute(ACTIVE_RUN + where, (*_of(key), run)).fetchone()
        return _active_run(*row) if row else None

    def active_runs(self, after: ActiveRun | None, limit: int) -> list[ActiveRun]:
        where, values = "", tuple[Bound, ...]()
        if after is not None:
            where = " AND (r.tenant, r.create_time, r.uid, r.run) > (?, ?, ?, ?)"
            values = (after.key.tenant, column(after.run, "create_time"), after.key.uid, after.run.name)
        order = " ORDER BY r.tenant, r.create_time, r.uid, r.run"
        with closing(self._execute(f"{ACTIVE_RUNS}{where}{order}", values)) as rows:
            return list(islice(_readable(rows), limit))

    def idle_runs(self) -> list[ActiveRun]:
        return list(_readable(self._execute(IDLE_RUNS)))

    def put_record(self, key: SessionKey, run: str, deaths: int | None, released: bool) -> None:
        self._execute(
            """UPDATE runs SET deaths = coalesce(?, deaths), released = ?
                WHERE tenant = ? AND uid = ? AND run = ? AND revision IS NOT NULL""",
            (deaths, released, *_of(key), run),
        )

    def version(self, scope: Scope) -> int:
        row = self._one("SELECT version FROM states WHERE tenant = ? AND kind = ? AND id = ?", *scope)
        return int(row[0]) if row else 0

    def state(self, scope: Scope, keys: Collection[str]) -> tuple[int, dict[str, v1.StateEntry | None]]:
        rows = self._execute(
            f"""SELECT s.version, e.key, e.body FROM states s LEFT JOIN entries e
                ON e.tenant = s.tenant AND e.kind = s.kind AND e.id = s.id AND e.key IN ({_marks(keys)})
                WHERE s.tenant = ? AND s.kind = ? AND s.id = ?""",
            (*keys, *scope),
        ).fetchall()
        entries: dict[str, v1.StateEntry | None] = {
            key: v1.StateEntry.FromString(body) for _, key, body in rows if key is not None
        }
        return (rows[0][0] if rows else 0), entries

    def put_version(self, scope: Scope, version: int) -> None:
        self._execute("REPLACE INTO states (tenant, kind, id, version) VALUES (?, ?, ?, ?)", (*scope, version))

    def put_entry(self, scope: Scope, key: str, entry: v1.StateEntry | None) -> None:
        if entry is None:
            self.deleted = True
            self._execute("DELETE FROM entries WHERE tenant = ? AND kind = ? AND id = ? AND key = ?", (*scope, key))
        else:
            self._execute(
                "REPLACE INTO entries (tenant, kind, id, key, body) VALUES (?, ?, ?, ?, ?)",
                (*scope, key, entry.SerializeToString()),
            )

    def entries(self, scope: Scope, query: Query) -> Iterator[Found[tuple[str, v1.StateEntry]]]:
        # No key is empty, so the empty text comes before all.
        rows = self._execute(
            """SELECT key, body FROM entries WHERE tenant = ? AND kind = ? AND id = ? AND key > ?
                ORDER BY key LIMIT ?""",
            (*scope, *(query.after or ("",)), query.limit + 1),
        )
        for key, body in rows:
            yield Found((key,), (key, v1.StateEntry.FromString(body)), len(body))

    def users_with_state(self, tenant: str, query: Query) -> Iterator[Found[str]]:
        rows = self._execute(
            "SELECT id FROM states WHERE tenant = ? AND kind = 'user' AND id > ? ORDER BY id LIMIT ?",
            (tenant, *(query.after or ("",)), query.limit + 1),
        )
        for (user,) in rows:
            yield Found((user,), user, len(user))

    def last_revision(self, tenant: str, agent_id: str) -> int:
        row = self._one("SELECT revision FROM agents WHERE tenant = ? AND agent = ?", tenant, agent_id)
        return int(row[0]) if row else 0

    def agent(self, tenant: str, agent_id: str, revision: int) -> v1.Agent | None:
        row = self._one(
            """SELECT body FROM revisions WHERE tenant = ?1 AND agent = ?2
                AND revision = iif(?3, ?3, (SELECT revision FROM agents WHERE tenant = ?1 AND agent = ?2))""",
            *(tenant, agent_id, revision),
        )
        return v1.Agent.FromString(row[0]) if row else None

    def start_of(self, tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        named = {"tenant": tenant, "session": session, "agent": agent or None}
        row, revision = self._execute(START, named).fetchone()
        return v1.Session.FromString(row) if row else None, v1.Agent.FromString(revision) if revision else None

    def add_revision(self, tenant: str, agent_id: str, agent: v1.Agent) -> None:
        columns = (column(agent, name) for name in AGENT_COLUMNS)
        self._execute(PUT_AGENT, (tenant, agent_id, agent.revision, *columns, _labels(agent)))
        self._execute(
            "INSERT INTO revisions (tenant, agent, revision, body) VALUES (?, ?, ?, ?)",
            (tenant, agent_id, agent.revision, _body(agent)),
        )

    def delete_agent(self, tenant: str, agent_id: str) -> None:
        self.deleted = True
        retired = self._execute(RETIRE, {"tenant": tenant, "agent": agent_id}).rowcount
        if retired:
            self._retires = True
        self._execute("DELETE FROM revisions WHERE tenant = ? AND agent = ?", (tenant, agent_id))
        self._execute(
            "UPDATE agents SET display_name = '', labels = NULL WHERE tenant = ? AND agent = ?", (tenant, agent_id)
        )

    def agents(self, tenant: str, query: Query) -> Iterator[Found[v1.Agent]]:
        where, values = _where(query, AGENT_COLUMNS, "a.agent > ?")
        rows = self._execute(f"{AGENTS}{where} ORDER BY a.agent LIMIT ?", (tenant, *values, query.limit + 1))
        for agent_id, body in rows:
            yield Found((agent_id,), v1.Agent.FromString(body), len(body))

    def revisions(self, tenant: str, agent_id: str, query: Query) -> Iterator[Found[v1.Agent]]:
        where, values = _where(query._replace(where=None), (), "revision < ?")
        rows = self._execute(
            f"""SELECT revision, body FROM revisions WHERE tenant = ? AND agent = ?{where}
                ORDER BY revision DESC LIMIT ?""",
            (tenant, agent_id, *values, query.limit + 1),
        )
        for revision, body in rows:
            yield Found((revision,), v1.Agent.FromString(body), len(body))

    def new_content(self) -> int:
        number = self._execute("INSERT INTO contents (discarded) VALUES (0)").lastrowid
        assert number is not None
        return number

    def add_chunk(self, content: int, start: int, data: bytes) -> None:
        self._execute("INSERT INTO chunks (content, start, data) VALUES (?, ?, ?)", (content, start, data))

    def chunk(self, content: int, offset: int) -> bytes:
        # substr counts from 1.
        row = self._one(
            """SELECT substr(data, ? - start + 1) FROM chunks WHERE content = ? AND start <= ?
                ORDER BY start DESC LIMIT 1""",
            offset,
            content,
            offset,
        )
        return bytes(row[0]) if row else b""

    def discard(self, content: int) -> None:
        self._execute("UPDATE contents SET discarded = 1 WHERE content = ?", (content,))

    def delete_chunks(self, limit: int) -> int:
        deleted = 0
        while deleted < limit and (row := self._one("SELECT content FROM contents WHERE discarded LIMIT 1")):
            gone = self._execute(
                """DELETE FROM chunks WHERE content = ?1 AND start IN
                    (SELECT start FROM chunks WHERE content = ?1 LIMIT ?2)""",
                (row[0], limit - deleted),
            ).rowcount
            deleted += max(gone, 1)
            self.deleted = True
            if not self._one("SELECT 1 FROM chunks WHERE content = ? LIMIT 1", row[0]):
                self._execute("DELETE FROM contents WHERE content = ?", row)
        return deleted

    def blob(self, tenant: str, sha256: str) -> BlobRow | None:
        row = self._one("SELECT content, size FROM blobs WHERE tenant = ? AND sha256 = ?", tenant, sha256)
        return BlobRow(*row) if row else None

    def blobs(self, tenant: str, query: Query) -> Iterator[Found[tuple[str, int]]]:
        rows = self._execute(
            "SELECT sha256, size FROM blobs WHERE tenant = ? AND sha256 > ? ORDER BY sha256 LIMIT ?",
            (tenant, *(query.after or ("",)), query.limit + 1),
        )
        for sha256, size in rows:
            yield Found((sha256,), (sha256, size), len(sha256))

    def put_blob(self, tenant: str, subject: str, sha256: str, row: BlobRow, now: int) -> None:
        self._execute(
            "REPLACE INTO blobs (tenant, sha256, content, size, upload_time) VALUES (?, ?, ?, ?, ?)",
            (tenant, sha256, *row, now),
        )
        self._execute(
            "INSERT OR IGNORE INTO uploaders (tenant, sha256, subject) VALUES (?, ?, ?)", (tenant, sha256, subject)
        )

    def uploaded(self, tenant: str, subject: str, sha256: str) -> bool:
        statement = "SELECT 1 FROM uploaders WHERE tenant = ? AND sha256 = ? AND subject = ?"
        return self._one(statement, tenant, sha256, subject) is not None

    def knows_blob(self, tenant: str, sha256: str, subject: str, user: str) -> bool:
        return self.uploaded(tenant, subject, sha256) or (
            self._one(
                """SELECT 1 FROM blob_references r WHERE r.tenant = ? AND r.sha256 = ? AND (
                        r.kind = 'user' AND 'users/' || r.id = ?
                        OR r.kind = 'session' AND EXISTS (
                            SELECT 1 FROM sessions s WHERE s.tenant = r.tenant AND s.uid = r.id AND s.user = ?))
                    LIMIT 1""",
                *(tenant, sha256, user, user),
            )
            is not None
        )

    def delete_blob(self, tenant: str, sha256: str) -> None:
        for table in ("blobs", "uploaders"):
            self._execute(f"DELETE FROM {table} WHERE tenant = ? AND sha256 = ?", (tenant, sha256))

    def is_loose(self, tenant: str, sha256: str, before: int) -> bool:
        return self._one(f"{LOOSE_BLOBS} AND tenant = ? AND sha256 = ?", before, tenant, sha256) is not None

    def loose_blobs(self, before: int, after: tuple[str, str]) -> Iterator[tuple[str, str]]:
        statement = f"{LOOSE_BLOBS} AND (tenant, sha256) > (?, ?) ORDER BY tenant, sha256"
        return self._execute(statement, (before, *after))

    def refers(self, scope: Scope, key: str, sha256: str) -> bool:
        return (
            self._one(
                """SELECT 1 FROM blob_references
                    WHERE tenant = ? AND kind = ? AND id = ? AND key = ? AND sha256 = ?""",
                *(*scope, key, sha256),
            )
            is not None
        )

    def content_bytes(self, key: SessionKey, until: int) -> int:
        row = self._one(
            """SELECT coalesce(sum(b.size), 0) FROM blob_references r
                JOIN blobs b ON b.tenant = r.tenant AND b.sha256 = r.sha256
                WHERE r.tenant = ? AND r.kind = 'session' AND r.id = ? AND r.key = '' AND r.sequence <= ?""",
            *_of(key),
            until,
        )
        return int(row[0])

    def log_bytes(self, key: SessionKey, until: int) -> int:
        row = self._one(
            "SELECT coalesce(sum(length(body)), 0) FROM events WHERE tenant = ? AND uid = ? AND sequence <= ?",
            *_of(key),
            until,
        )
        return int(row[0])

    def refer(self, scope: Scope, key: str, sha256: str, sequence: int) -> None:
        self._execute(
            "INSERT INTO blob_references (tenant, kind, id, key, sha256, sequence) VALUES (?, ?, ?, ?, ?, ?)",
            (*scope, key, sha256, sequence),
        )

    def drop_references(self, scope: Scope, key: str) -> None:
        self._execute("DELETE FROM blob_references WHERE tenant = ? AND kind = ? AND id = ? AND key = ?", (*scope, key))

    def key(self, key_id: str) -> KeyRow | None:
        row = self._one("SELECT tenant, body, digest, former FROM keys WHERE key = ?", key_id)
        return KeyRow(row[0], key_id, v1.Key.FromString(row[1]), *row[2:]) if row else None

    def put_key(self, row: KeyRow) -> None:
        self._execute(
            "REPLACE INTO keys (key, tenant, create_time, digest, former, body) VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(row.key_id, row.tenant, row.key.create_time.ToMicroseconds()),
                *(row.digest, row.former, row.key.SerializeToString()),
            ),
        )
        self._execute("UPDATE store SET keyed = 1 WHERE NOT keyed", ())

    def delete_key(self, key_id: str) -> None:
        self.deleted = True
        self._execute("DELETE FROM keys WHERE key = ?", (key_id,))

    def keys(self, tenant: str, query: Query) -> Iterator[Found[v1.Key]]:
        where, values = _where(query._replace(where=None), (), "(create_time, 'keys/' || key) < (?, ?)")
        rows = self._execute(
            f"SELECT create_time, body FROM keys WHERE tenant = ?{where} ORDER BY create_time DESC, key DESC LIMIT ?",
            (tenant, *values, query.limit + 1),
        )
        for create_time, body in rows:
            key = v1.Key.FromString(body)
            yield Found((create_time, key.name), key, len(body))

    def principal(self, tenant: str, name: str) -> v1.Principal | None:
        row = self._one("SELECT body FROM principals WHERE tenant = ? AND principal = ?", tenant, name)
        return v1.Principal.FromString(row[0]) if row else None

    def principal_like(self, tenant: str, principal: v1.Principal) -> v1.Principal | None:
        row = self._one(
            "SELECT body FROM principals WHERE tenant = ? AND user = ? AND subject = ? AND role = ?",
            *(tenant, principal.user, principal.subject, principal.role),
        )
        return v1.Principal.FromString(row[0]) if row else None

    def add_principal(self, tenant: str, principal: v1.Principal) -> None:
        self._execute(
            "INSERT INTO principals (tenant, principal, user, subject, role, body) VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(tenant, principal.name, principal.user, principal.subject, principal.role),
                principal.SerializeToString(),
            ),
        )

    def delete_principals(self, tenant: str, user: str, limit: int) -> bool:
        self.deleted = True
        gone = self._execute(
            """DELETE FROM principals WHERE tenant = ?1 AND principal IN
                (SELECT principal FROM principals WHERE tenant = ?1 AND user = ?2 LIMIT ?3)""",
            (tenant, user, limit),
        )
        return gone.rowcount > 0

    def add_audit(self, tenant: str, entry: v1.AuditEntry) -> None:
        self._execute(
            f"INSERT INTO audit (tenant, {', '.join(AUDIT_COLUMNS)}, body) VALUES (?{', ?' * len(AUDIT_COLUMNS)}, ?)",
            (tenant, *(column(entry, name) for name in AUDIT_COLUMNS), entry.SerializeToString()),
        )

    def audit(self, tenant: str, query: Query) -> Iterator[Found[v1.AuditEntry]]:
        where, values = _where(query, AUDIT_COLUMNS, "number < ?")
        rows = self._execute(
            f"SELECT number, body FROM audit WHERE tenant = ?{where} ORDER BY number DESC LIMIT ?",
            (tenant, *values, query.limit + 1),
        )
        for number, body in rows:
            yield Found((number,), v1.AuditEntry.FromString(body), len(body))

    def forget_audit(self, before: int, limit: int) -> int:
        return self._execute(
            "DELETE FROM audit WHERE number IN (SELECT number FROM audit WHERE create_time < ? LIMIT ?)",
            (before, limit),
        ).rowcount

    def tenant(self, tenant: str) -> v1.Tenant | None:
        row = self._one("SELECT body FROM tenants WHERE tenant = ?", tenant)
        return v1.Tenant.FromString(row[0]) if row else None

    def put_tenant(self, tenant: str, row: v1.Tenant) -> None:
        self._execute("REPLACE INTO tenants (tenant, body) VALUES (?, ?)", (tenant, row.SerializeToString()))

    def delete_tenant(self, tenant: str) -> None:
        self.deleted = True
        self._execute("DELETE FROM tenants WHERE tenant = ?", (tenant,))

    def tenants(self, query: Query) -> Iterator[Found[v1.Tenant]]:
        after = str(query.after[0]).removeprefix("tenants/") if query.after else ""
        rows = self._execute(
            "SELECT body FROM tenants WHERE tenant > ? ORDER BY tenant LIMIT ?", (after, query.limit + 1)
        )
        for (body,) in rows:
            row = v1.Tenant.FromString(body)
            yield Found((row.name,), row, len(body))

    def has_data(self, tenant: str) -> bool:
        return any(self._one(f"SELECT 1 FROM {table} WHERE tenant = ? LIMIT 1", tenant) for table in DATA_TABLES)

    def has_deleted_sessions(self, tenant: str) -> bool:
        return self._one("SELECT 1 FROM deleted_sessions WHERE tenant = ? LIMIT 1", tenant) is not None

    def erase_rows(self, tenant: str, batch: Batch) -> None:
        self.deleted = True
        contents = self._execute(
            """SELECT content FROM blobs WHERE tenant = ?1 UNION ALL
                SELECT content FROM uploads WHERE tenant = ?1 AND sha256 = '' ORDER BY content LIMIT ?2""",
            (tenant, batch.left),
        ).fetchall()
        for (content,) in contents:
            batch.takes(0)
            self.discard(content)
            for table in ("blobs", "uploads"):
                self._execute(f"DELETE FROM {table} WHERE tenant = ? AND content = ?", (tenant, content))
        for table, place, size in TENANT_ROWS:
            self._delete_some(table, "tenant = ?", (tenant,), place, size, batch)

    def count_keys(self, tenant: str) -> int:
        return int(self._one("SELECT count(*) FROM keys WHERE tenant = ?", tenant)[0])

    def is_keyed(self) -> bool:
        row = self._one("SELECT keyed FROM store")
        return bool(row and row[0])

    def upload(self, tenant: str, upload_id: str) -> UploadRow | None:
        row = self._one(
            "SELECT content, size, expire_time, sha256 FROM uploads WHERE tenant = ? AND upload_id = ?",
            *(tenant, upload_id),
        )
        return UploadRow(*row) if row else None

    def put_upload(self, tenant: str, upload_id: str, row: UploadRow) -> None:
        self._execute(
            "REPLACE INTO uploads (tenant, upload_id, content, size, expire_time, sha256) VALUES (?, ?, ?, ?, ?, ?)",
            (tenant, upload_id, *row),
        )

    def delete_upload(self, tenant: str, upload_id: str) -> None:
        self._execute("DELETE FROM uploads WHERE tenant = ? AND upload_id = ?", (tenant, upload_id))

    def expired_uploads(self, now: int) -> Iterator[tuple[str, str, UploadRow]]:
        rows = self._execute(
            "SELECT tenant, upload_id, content, size, expire_time, sha256 FROM uploads WHERE expire_time <= ?", (now,)
        )
        for tenant, upload_id, *row in rows:
            yield tenant, upload_id, UploadRow(*row)


def _body(agent: v1.Agent) -> bytes:
    """Returns an agent as it is stored: the same bytes for the same agent."""
    return agent.SerializeToString(deterministic=True)


def _of(key: SessionKey) -> tuple[str, str]:
    """What a session's rows begin with."""
    return key.tenant, key.uid


def _listed(session: v1.Session) -> tuple[Bound, ...]:
    """The columns of a session that change seldom."""
    return session.agent, session.display_name, _expire_time(session), _labels(session)


def _head(row: SessionRow) -> _Head:
    commits = msgspec.json.encode(row.commits).decode() if row.commits else None
    session = row.session
    return session.activity, column(session, "update_time"), row.epoch, commits, session.SerializeToString()


def _session(body: bytes, epoch: int, commits: str | None) -> SessionRow:
    return SessionRow(v1.Session.FromString(body), epoch, _commits(commits))


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))


def _commits(column: str | None) -> tuple[CommitRow, ...]:
    return _COMMITS.decode(column) if column else ()


def _message(own: bytes | None, event: bytes | None, rewind: int | None) -> v1.Message:
    message = v1.Message.FromString(own) if own is not None else v1.Event.FromString(event or b"").message_added
    return marked(message, rewind)


def _labels(row: Labelled) -> str | None:
    return json.dumps({_hex(key): _hex(value) for key, value in row.labels.items()}) if row.labels else None


def _hex(text: str) -> str:
    return text.encode().hex()


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


def _where(query: Query, columns: tuple[str, ...], after: str) -> tuple[str, list[Bound]]:
    """The conditions of a page, to be put behind others, and their values. `after` is the condition for rows behind a
    position."""
    conditions, values = "", list[Bound]()
    if query.after is not None:
        conditions += f" AND {after}"
        values += query.after
    if query.where is not None:
        conditions += f" AND {_condition(query.where, columns, values)}"
    return conditions, values


def _condition(where: Filter, columns: tuple[str, ...], values: list[Bound]) -> str:
    """A filter as SQL; what is to be bound is added to `values` in the order of the question marks."""
    match where:
        case And(terms):
            return f"({' AND '.join(_condition(term, columns, values) for term in terms) or '1'})"
        case Or(terms):
            return f"({' OR '.join(_condition(term, columns, values) for term in terms) or '0'})"
        case Not(term):
            return f"NOT {_condition(term, columns, values)}"
        case Compare(name, op, value):
            if op not in OPERATORS:
                raise ValueError("a filter compares with an operator that does not exist")
            if name.startswith(LABELS):
                values += [f'$."{_hex(name.removeprefix(LABELS))}"', _hex(str(value))]
                return f"coalesce(json_extract(labels, ?), '') {op} ?"
            values.append(value)
            return f"{check_column(name, columns)} {op} ?"

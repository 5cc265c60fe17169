"""Tables in SQLite: what a commit reads and writes, and what the order of its rows decides.

Labels are kept as a JSON object whose keys and values are the hexadecimal of their UTF-8: in that form every label can
be named in a JSON path and compared in the order of its bytes, whatever characters it has. None means no labels.
"""

import json
import sqlite3
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from notecase import v1

from notecase_server.store.contract import RUN_COLUMNS, Query, Quotas, Scope, SessionKey, StepKey
from notecase_server.store.lists import Found, Labelled, column
from notecase_server.store.sql.pieces import ROWS, SESSION_ROWS, TENANT_ROWS, Copied, Rows, TenantRows, copies
from notecase_server.store.sql.statements import (
    CHANGED,
    COMMITS,
    MESSAGE,
    REWIND,
    bind,
    commits_column,
    expire_column,
    is_unended,
    marks,
    message_row,
    of,
    session_row,
)
from notecase_server.store.sql.tables import Tables, agent_body
from notecase_server.store.sqlite import tallies
from notecase_server.store.sqlite.schema import BY_ID, HEAD, IN_ORDER, OF_RUN, VERSION
from notecase_server.store.stretches import Stretch
from notecase_server.store.tables import (
    Applied,
    Batch,
    Changes,
    DeletedAgent,
    EventRow,
    Kept,
    RunPlace,
    SessionRow,
)

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
        """iif(EXISTS (SELECT 1 FROM known_revisions
            WHERE tenant = ? AND agent = ? AND revision = ? AND body = ?), ?, 0)"""
    )
    + " RETURNING revision"
)
"""Names the revision of the run's agent, if a stored one has the same bytes."""

FOUND = f"CROSS JOIN logs e ON e.tenant = l.tenant AND e.uid = l.uid AND e.sequence = l.sequence {CHANGED}"
"""The event of a lookup, and the message that it has become. CROSS keeps the lookups the outer loop."""

MESSAGES = f"""SELECT e.sequence, {MESSAGE} FROM lookups l {FOUND}
    WHERE l.kind = {IN_ORDER} AND l.tenant = ? AND l.uid = ?"""

IN_FORCE = f"{MESSAGES.replace(REWIND, 'NULL', 1)} AND {REWIND} IS NULL"
"""As MESSAGES, of those that no rewind left behind."""

CALLS = f"""SELECT t.call_id, e.sequence, {MESSAGE} FROM calls t
    CROSS JOIN lookups l ON l.kind = {BY_ID} AND l.tenant = t.tenant AND l.uid = t.uid AND l.key = t.message
    {FOUND} WHERE t.tenant = ? AND t.uid = ?"""
"""With their messages. CROSS keeps the calls the outer loop."""

NAMED_MESSAGES = f"""SELECT e.uid, e.message, {MESSAGE}
    FROM json_each(?) n CROSS JOIN lookups l ON l.kind = {BY_ID} AND l.tenant = ?
        AND l.uid = json_extract(n.value, '$[0]') AND l.key = json_extract(n.value, '$[1]') {FOUND}"""
"""CROSS keeps the names the outer loop."""

NAMED = "coalesce($3, s.agent)"
AT = f"instr({NAMED} || '@', '@')"

RUN = "r.body, (SELECT session FROM sessions s WHERE s.tenant = r.tenant AND s.uid = r.uid)"
"""With the name of its session."""

SESSION_RUNS = f"""SELECT l.key AS create_time, l.uid AS uid, l.run AS run, {RUN} FROM lookups l
    CROSS JOIN runs r ON r.tenant = l.tenant AND r.uid = l.uid AND r.run = l.run
    WHERE l.kind = {OF_RUN} AND l.tenant = $1 AND l.uid = $2"""

UNENDED_RUNS = f"""SELECT r.create_time AS create_time, r.uid AS uid, r.run AS run, {RUN}
    FROM runs r INDEXED BY runs_by_time WHERE r.unended = 1 AND r.tenant = $1"""

ENDED_RUNS = UNENDED_RUNS.replace("unended = 1", "unended = 0")

PUT_RUN = "last_sequence = ?, body = ? WHERE tenant = ? AND uid = ? AND run = ?"

UNENDED_AFTER = """SELECT create_time, uid, run, agent, revision FROM runs INDEXED BY runs_by_time
    WHERE unended = 1 AND tenant = ? AND (create_time, uid, run) > (?, ?, ?)
    ORDER BY create_time, uid, run LIMIT ?"""

RETIRE = """INSERT INTO retired_revisions (tenant, agent, revision, uses, body)
    SELECT tenant, agent, revision, ?4, body FROM revisions WHERE tenant = ?1 AND agent = ?2 AND revision = ?3
    ON CONFLICT DO UPDATE SET uses = uses + excluded.uses"""

THIS_RUN = "tenant = ? AND uid = ? AND run = ?"

ACTIVE_RUN = """SELECT a.tenant, s.session, a.uid, a.body, coalesce(o.body, v.body, t.body), h.epoch, a.deaths,
    a.released, a.create_time, a.run FROM runs a JOIN sessions s ON s.tenant = a.tenant AND s.uid = a.uid
    JOIN heads h ON h.tenant = a.tenant AND h.uid = a.uid
    LEFT JOIN run_agents o ON o.tenant = a.tenant AND o.uid = a.uid AND o.run = a.run
    LEFT JOIN revisions v ON v.tenant = a.tenant AND v.agent = substr(a.agent, 8) AND v.revision = a.revision
    LEFT JOIN retired_revisions t ON t.tenant = a.tenant AND t.agent = substr(a.agent, 8) AND t.revision = -a.revision
    WHERE a.unended = 1"""

ACTIVE_RUNS = ACTIVE_RUN.replace("runs a JOIN", "runs a INDEXED BY runs_by_time CROSS JOIN")
"""CROSS keeps the runs the outer loop."""


class _Saved(NamedTuple):
    """Holds the rows of a session that its next commit loads, as the last commit left them."""

    body: bytes
    epoch: int
    commits: str | None
    """As JSON, which takes a quarter of the memory."""
    runs: Mapping[str, bytes]
    """The bodies of the runs of that commit that have not ended."""


def _labels(row: Labelled) -> str | None:
    return json.dumps({_hex(key): _hex(value) for key, value in row.labels.items()}) if row.labels else None


def _hex(text: str) -> str:
    return text.encode().hex()


class SqliteTables(Tables):
    """Rows as one connection sees them; used inside a transaction that the caller begins and ends. A caller that rolls
    one back calls `forget`."""

    store = "store"
    labels = staticmethod(_labels)
    discarded = "discarded"
    by_owner = " INDEXED BY requests_by_owner"
    heads = "heads"
    log = "logs"
    listed = "sessions CROSS JOIN heads USING (tenant, uid)"
    session_rows: ClassVar[Sequence[Rows]] = (
        *(ROWS["events"]._replace(table="logs"), *SESSION_ROWS),
        ROWS["runs"]._replace(table="run_agents"),
    )
    tenant_rows = (*TENANT_ROWS, TenantRows("retired_revisions", "agent, revision", "length(body)"))
    copies: ClassVar[Sequence[Copied]] = copies(
        log,
        added=f"""EXISTS (SELECT 1 FROM lookups l WHERE l.tenant = calls.tenant AND l.uid = calls.uid
            AND l.kind = {BY_ID} AND l.key = calls.message AND l.sequence <= $3)""",
        ended="revision IS NULL",
        of_run=", deaths, released",
    )
    start = f"""SELECT h.body, r.body FROM (SELECT 1)
        LEFT JOIN session_names n ON n.tenant = $1 AND n.session = $2
        LEFT JOIN heads h ON h.tenant = $1 AND h.uid = n.uid
        LEFT JOIN sessions s ON s.tenant = $1 AND s.uid = n.uid
        LEFT JOIN agents a ON a.tenant = $1 AND a.agent = substr({NAMED}, 8, {AT} - 8)
        LEFT JOIN known_revisions r ON r.tenant = $1 AND r.agent = a.agent
            AND r.revision = coalesce(nullif(substr({NAMED}, {AT} + 1) + 0, 0), a.revision)"""
    message_of = f"{MESSAGES.replace(f'kind = {IN_ORDER}', f'kind = {BY_ID}')} AND l.key = ?"
    active = ACTIVE_RUN
    every_active = ACTIVE_RUNS
    idle = f"""{ACTIVE_RUNS} AND (a.state = {v1.Run.STATE_RUNNING}
        OR (a.state = {v1.Run.STATE_QUEUED} AND h.activity = {v1.Session.ACTIVITY_IDLE}))"""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.quotas = Quotas()
        self.deleted = True
        """Deleted rows may have left bytes: what the previous process did is not known."""
        self.tallied: set[Kept] = set()
        """What this connection has tallies of."""
        self._saved: OrderedDict[tuple[str, str], _Saved] = OrderedDict()
        """Rows for the next commit of each session. Every write to a session's row or runs goes through this object."""
        self._retires: bool | None = None
        """Whether `retired_revisions` or `run_agents` may have rows; None before the first check."""
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
        for message in changes.messages:
            if message.update_sequence != message.sequence:
                self.put_message(key, message)
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
            self._saved[of(key)] = _Saved(body, changes.session.epoch, head[3], runs)
            if len(self._saved) > SAVED_SESSIONS:
                self._saved.popitem(last=False)

    def one(self, statement: str, *values: Any) -> Any:
        return self._execute(statement.replace("$", "?"), values).fetchone()

    def rows(self, statement: str, *values: Any) -> sqlite3.Cursor:
        return self._execute(statement.replace("$", "?"), values)

    def do(self, statement: str, *values: Any) -> int:
        return self._execute(statement.replace("$", "?"), values).rowcount

    def remove(self, statement: str, *values: Any) -> int:
        gone = self.do(statement, *values)
        self.deleted |= gone > 0
        return gone

    def page(self, statement: str, order: str, values: Sequence[Any], limit: int) -> sqlite3.Cursor:
        return self.rows(f"{statement} ORDER BY {order} LIMIT {marks(1, len(values))}", *values, limit)

    def put(self, table: str, key: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        row = {**key, **rest}
        self.do(f"REPLACE INTO {table} ({', '.join(row)}) VALUES ({marks(len(row))})", *row.values())

    def read(self, value: Any) -> Any:
        return value

    def named(self, table: str, place: str, places: Sequence[str | int]) -> tuple[str, str, Sequence[Any]]:
        # Not as JSON: SQLite's functions end a text at a character 0, which a key of a state may have.
        rows = ", ".join(f"({mark})" for mark in marks(len(places), 4).split(", "))
        return f"(SELECT column1 AS one FROM (VALUES {rows})) CROSS JOIN {table}", f"{place} = one", places

    def label(self, table: str, name: str, value: str, values: list[Any]) -> tuple[str, str]:
        path = bind(values, f'$."{_hex(name)}"')
        return f"coalesce(json_extract({table}labels, {path}), '')", bind(values, _hex(value))

    def kept(self, kind: Kept, tenant: str, *within: str, more: int = 1) -> int:
        if kind in self.tallied:
            row = self._execute(tallies.KEPT, (kind, tenant)).fetchone()
            return int(row[0]) if row else 0
        return super().kept(kind, tenant, *within)

    def touch(self) -> None:
        # A row is not written again when it stays as it is; the file's header is.
        self._execute(f"PRAGMA user_version = {VERSION}")

    def add_command(self, key: SessionKey, command_id: str, applied: Applied) -> None:
        self._execute(
            "INSERT INTO commands (tenant, uid, command_id, digest, sequence, run) VALUES (?, ?, ?, ?, ?, ?)",
            (*of(key), command_id, *applied),
        )

    def session_with_runs(self, key: SessionKey, runs: Collection[str]) -> tuple[SessionRow, dict[str, v1.Run]] | None:
        saved = self._saved.get(of(key))
        if saved is not None and saved.runs.keys() >= set(runs):
            commits = COMMITS.decode(saved.commits) if saved.commits else ()
            row = SessionRow(v1.Session.FromString(saved.body), saved.epoch, commits)
            return row, {name: v1.Run.FromString(saved.runs[name]) for name in runs}
        rows = self._execute(
            f"""SELECT h.body, h.epoch, h.commits, r.body FROM heads h LEFT JOIN runs r
                ON r.tenant = h.tenant AND r.uid = h.uid AND r.run IN ({_marks(runs)})
                WHERE h.tenant = ? AND h.uid = ?""",
            (*runs, *of(key)),
        ).fetchall()
        found = [v1.Run.FromString(body) for *_, body in rows if body is not None]
        return (session_row(*rows[0][:3]), {run.name: run for run in found}) if rows else None

    def add_session(self, key: SessionKey, row: SessionRow) -> None:
        self._add_session(key, row.session, _head(row))

    def _add_session(self, key: SessionKey, session: v1.Session, head: _Head) -> None:
        columns = key.session, session.user, column(session, "create_time")
        self._execute(ADD_SESSION, (*of(key), *columns, *_listed(session)))
        self._execute(
            "INSERT INTO session_names (tenant, session, uid) VALUES (?, ?, ?)", (key.tenant, key.session, key.uid)
        )
        self._execute(ADD_HEAD, (*of(key), *head))

    def put_session(self, key: SessionKey, row: SessionRow) -> None:
        self._put_head(key, _head(row))
        self._put_listed(key, row.session)

    def _put_head(self, key: SessionKey, head: _Head) -> None:
        self._saved.pop(of(key), None)
        self._execute(PUT_HEAD, (*head, *of(key)))

    def _put_listed(self, key: SessionKey, session: v1.Session) -> None:
        self._execute(PUT_SESSION, (*_listed(session), *of(key)))

    def delete_session(self, key: SessionKey) -> None:
        self._saved.pop(of(key), None)
        super().delete_session(key)
        self.remove(f"DELETE FROM logs WHERE tenant = $1 AND uid = $2 AND sequence = {HEAD}", *of(key))

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
            (*of(key), after, limit),
        )
        for sequence, body in rows:
            yield Found((sequence,), v1.Event.FromString(body), len(body))

    def changes(self, key: SessionKey, after: int, until: int) -> Iterator[v1.Event]:
        rows = self._execute(
            """SELECT body FROM logs INDEXED BY events_of_past WHERE tells_past = 1
                AND tenant = ? AND uid = ? AND sequence > ? AND sequence <= ? ORDER BY sequence""",
            (*of(key), after, until),
        )
        for (body,) in rows:
            yield v1.Event.FromString(body)

    def add_stretches(self, key: SessionKey, stretches: Sequence[Stretch]) -> None:
        self._executemany(
            "INSERT INTO stretches (tenant, uid, after, until, sequence, back) VALUES (?, ?, ?, ?, ?, ?)",
            [(*of(key), *stretch) for stretch in stretches],
        )

    def named_messages(self, tenant: str, names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], v1.Message]:
        rows = self._execute(NAMED_MESSAGES, (json.dumps(names), tenant))
        return {(uid, name): message_row(*found) for uid, name, *found in rows}

    def put_message(self, key: SessionKey, message: v1.Message) -> None:
        self._execute(
            "REPLACE INTO changed_messages (tenant, uid, sequence, update_sequence, body) VALUES (?, ?, ?, ?, ?)",
            (*of(key), message.sequence, message.update_sequence, message.SerializeToString()),
        )

    def messages(
        self, key: SessionKey, query: Query, newest_first: bool, step: StepKey | None, superseded: bool
    ) -> Iterator[Found[v1.Message]]:
        statement, values = MESSAGES if superseded else IN_FORCE, list[Bound](of(key))
        if step is not None:
            statement += " AND e.run = ? AND e.step = ? AND l.key BETWEEN ? AND ?"
            values += [*step, *self._bounds(key, step.run)]
        if query.after is not None:
            statement += f" AND l.key {'<' if newest_first else '>'} ?"
            values += query.after
        statement += f" ORDER BY l.key{' DESC' if newest_first else ''} LIMIT ?"
        for sequence, own, event, rewind in self._execute(statement, (*values, query.limit + 1)):
            yield Found((sequence,), message_row(own, event, rewind), len(own or event))

    def messages_of_calls(self, key: SessionKey, calls: Collection[str]) -> dict[str, v1.Message]:
        if not calls:
            return {}
        rows = self._execute(f"{CALLS} AND t.call_id IN ({_marks(calls)})", (*of(key), *calls)).fetchall()
        messages = {holder: message_row(*found) for _, holder, *found in rows}
        return {call_id: messages[holder] for call_id, holder, *_ in rows}

    def put_calls(self, key: SessionKey, calls: Mapping[str, str]) -> None:
        self._executemany(
            "REPLACE INTO calls (tenant, uid, call_id, message) VALUES (?, ?, ?, ?)",
            [(*of(key), *call) for call in calls.items()],
        )

    def add_run(self, key: SessionKey, run: v1.Run, digest: bytes) -> None:
        self._add_run(key, run, digest, None)

    def _add_run(self, key: SessionKey, run: v1.Run, digest: bytes, agent: v1.Agent | None) -> bytes:
        """Adds a run, with its agent if it has not ended, and returns its body."""
        columns = (column(run, name) for name in RUN_COLUMNS)
        body = run.SerializeToString()
        row = (*of(key), run.name, *columns, _labels(run), run.first_sequence, run.last_sequence, digest)
        if agent is None:
            self._execute(ADD_ENDED_RUN, (*row, body))
            return body
        own, revision = agent_body(agent), agent.revision
        name = agent.name.removeprefix("agents/") if agent.name == run.agent else ""
        (kept,) = self._execute(ADD_ACTIVE_RUN, (*row, key.tenant, name, revision, own, revision, body)).fetchone()
        if not kept:
            self._retires = True
            self._execute(
                "INSERT INTO run_agents (tenant, uid, run, body) VALUES (?, ?, ?, ?)", (*of(key), run.name, own)
            )
        return body

    def put_run(self, key: SessionKey, run: v1.Run, moved: bool) -> None:
        self._saved.pop(of(key), None)
        self._put_run(key, run, moved, ended=False)

    def _put_run(self, key: SessionKey, run: v1.Run, moved: bool, *, ended: bool) -> bytes:
        """Replaces a run, which has its agent no longer once it has `ended`, and returns its body."""
        body = run.SerializeToString()
        changed: tuple[Bound, ...] = (run.last_sequence, body, *of(key), run.name)
        if ended:
            self._drop_agent(key, run.name)
            self._execute(f"UPDATE runs SET revision = NULL, state = ?, {PUT_RUN}", (run.state, *changed))
        elif moved:
            self._execute(f"UPDATE runs SET state = ?, {PUT_RUN}", (run.state, *changed))
        else:
            self._execute(f"UPDATE runs SET {PUT_RUN}", changed)
        return body

    def drop_record(self, key: SessionKey, run: str) -> None:
        self._saved.pop(of(key), None)
        self._drop_agent(key, run)
        self._execute("UPDATE runs SET revision = NULL WHERE tenant = ? AND uid = ? AND run = ?", (*of(key), run))

    def _drop_agent(self, key: SessionKey, run: str) -> None:
        """Drops what only this run needs of its agent. Call it while the run's row still has its revision."""
        if self._retires is None:
            some = "SELECT EXISTS (SELECT 1 FROM run_agents) OR EXISTS (SELECT 1 FROM retired_revisions)"
            self._retires = bool(self._execute(some).fetchone()[0])
        if not self._retires:
            return
        self.deleted = True
        self._execute("DELETE FROM run_agents WHERE tenant = ? AND uid = ? AND run = ?", (*of(key), run))
        retired = self._execute(
            """UPDATE retired_revisions SET uses = uses - 1 WHERE (tenant, agent, revision) =
                (SELECT tenant, substr(agent, 8), -revision FROM runs WHERE tenant = ? AND uid = ? AND run = ?)
                RETURNING tenant, agent, revision, uses""",
            (*of(key), run),
        ).fetchall()
        for *whose, uses in retired:
            if not uses:
                self._execute("DELETE FROM retired_revisions WHERE tenant = ? AND agent = ? AND revision = ?", whose)

    def unended_runs(self, key: SessionKey) -> list[str]:
        runs = "SELECT run FROM runs INDEXED BY runs_by_time WHERE unended = 1 AND tenant = ? AND uid = ?"
        return [run for (run,) in self._execute(runs, of(key))]

    def runs(
        self, tenant: str, session: SessionKey | None, query: Query, user: str
    ) -> Iterator[tuple[SessionKey, Found[v1.Run]]]:
        values = list[Any]([tenant] if session is None else of(session))
        if session is not None:
            selects, places = [SESSION_RUNS], ("l.key", "l.uid", "l.run")
        else:
            selects = [UNENDED_RUNS] if is_unended(query.where) else [UNENDED_RUNS, ENDED_RUNS]
            places = ("r.create_time", "r.uid", "r.run")
        where = self.where(query, RUN_COLUMNS, places, "<", values, "r.")
        whose = f" AND s.user = {bind(values, user)}" if user else ""
        where += f" AND EXISTS (SELECT 1 FROM sessions s WHERE s.tenant = r.tenant AND s.uid = r.uid{whose})"
        rows = self.page(
            " UNION ALL ".join(select + where for select in selects),
            *("create_time DESC, uid DESC, run DESC", values, query.limit + 1),
        )
        for create_time, uid, run, body, name in rows:
            found = Found((create_time, uid, run), v1.Run.FromString(body), len(body))
            yield SessionKey(tenant, name, uid), found

    def put_record(self, key: SessionKey, run: str, deaths: int | None, released: bool) -> None:
        self._execute(
            """UPDATE runs SET deaths = coalesce(?, deaths), released = ?
                WHERE tenant = ? AND uid = ? AND run = ? AND revision IS NOT NULL""",
            (deaths, released, *of(key), run),
        )

    def state(
        self, scope: Scope, keys: Collection[str], values: Collection[str] | None = None
    ) -> tuple[int, dict[str, v1.StateEntry | None]]:
        body = "e.body" if values is None else f"CASE WHEN e.key IN ({_marks(values)}) THEN e.body ELSE x'' END"
        rows = self._execute(
            f"""SELECT s.version, e.key, {body} FROM states s LEFT JOIN entries e
                ON e.tenant = s.tenant AND e.kind = s.kind AND e.id = s.id AND e.key IN ({_marks(keys)})
                WHERE s.tenant = ? AND s.kind = ? AND s.id = ?""",
            (*(values or ()), *keys, *scope),
        ).fetchall()
        entries: dict[str, v1.StateEntry | None] = {
            key: v1.StateEntry.FromString(body) for _, key, body in rows if key is not None
        }
        return (rows[0][0] if rows else 0), entries

    def entry_bytes(self, scope: Scope, keys: Collection[str]) -> int:
        (size,) = self._execute(
            f"""SELECT coalesce(sum(length(body)), 0) FROM entries
                WHERE tenant = ? AND kind = ? AND id = ? AND key IN ({_marks(keys)})""",
            (*scope, *keys),
        ).fetchone()
        return int(size)

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

    def retire_revisions(self, agent: DeletedAgent, after: RunPlace, batch: Batch) -> RunPlace | None:
        name, number = f"agents/{agent.agent_id}", batch.left
        uses, last = Counter[int](), False
        rows = self._execute(UNENDED_AFTER, (agent.tenant, *after, number)).fetchall()
        for create_time, uid, run, agent_of_run, revision in rows:
            used = agent_of_run == name and 0 < revision <= agent.revision
            if not batch.takes(self._size_of(agent, revision) if used and revision not in uses else 0):
                break
            if used:
                uses[revision] += 1
                self._execute(f"UPDATE runs SET revision = -revision WHERE {THIS_RUN}", (agent.tenant, uid, run))
            after = (create_time, uid, run)
        else:
            last = len(rows) < number
        for revision, number in uses.items():
            self._retires = True
            self._execute(RETIRE, (agent.tenant, agent.agent_id, revision, number))
        return None if last else after

    def _size_of(self, agent: DeletedAgent, revision: int) -> int:
        """The bytes of a revision."""
        row = self._execute(
            "SELECT length(body) FROM revisions WHERE tenant = ? AND agent = ? AND revision = ?",
            (agent.tenant, agent.agent_id, revision),
        ).fetchone()
        return int(row[0]) if row else 0

    def refer(self, scope: Scope, key: str, sha256: str, sequence: int) -> None:
        self._execute(
            "INSERT INTO blob_references (tenant, kind, id, key, sha256, sequence) VALUES (?, ?, ?, ?, ?, ?)",
            (*scope, key, sha256, sequence),
        )


def _listed(session: v1.Session) -> tuple[Bound, ...]:
    """The columns of a session that change seldom."""
    return session.agent, session.display_name, expire_column(session), _labels(session)


def _head(row: SessionRow) -> _Head:
    session = row.session
    body = session.SerializeToString()
    return session.activity, column(session, "update_time"), row.epoch, commits_column(row), body


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))

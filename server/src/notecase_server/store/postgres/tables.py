"""Tables in PostgreSQL: what a commit writes, and reads whose statements are not those of SQLite.

A list is read by one statement that ends where a page must end, so no cursor stays open.
"""

import asyncio
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from asyncpg import Connection, Record
from notecase import v1

from notecase_server.store.contract import (
    ANSWER_BYTES,
    RUN_COLUMNS,
    SESSION_COLUMNS,
    Once,
    Query,
    Scope,
    SessionKey,
    StepKey,
)
from notecase_server.store.lists import Found, Labelled, column
from notecase_server.store.postgres.tallies import TALLIED, CountedAloneError, Counts
from notecase_server.store.postgres.wire import awaited, escaped, unescaped
from notecase_server.store.sql.content import SqlContent
from notecase_server.store.sql.pieces import ROWS, SESSION_ROWS, TENANT_ROWS, Copied, Rows, copies
from notecase_server.store.sql.statements import (
    CHANGED,
    MESSAGE,
    REWIND,
    bind,
    commits_column,
    expire_column,
    is_unended,
    marks,
    message_row,
    of,
)
from notecase_server.store.sql.tables import Tables
from notecase_server.store.stretches import Stretch
from notecase_server.store.tables import Applied, BlobRow, Changes, EventRow, Kept, SessionRow, UploadRow

CHANGES_READ = 500
"""Events that are read at a time to compute the past."""

AT_ONCE_BYTES = 128 << 10
"""Bytes of events that are parsed, and replayed, before others have their turn."""

CHANGES_AT_ONCE_BYTES = 16 << 10
"""The same of changes of a state: a thousand small values take some milliseconds."""

MESSAGES = f"""SELECT e.sequence, {MESSAGE}, length(coalesce(c.body, e.body)) AS size
    FROM events e {CHANGED} WHERE e.message IS NOT NULL AND e.tenant = $1 AND e.uid = $2"""

CALLS = f"""SELECT t.call_id, e.message, {MESSAGE} FROM calls t
    JOIN events e ON e.message IS NOT NULL AND e.tenant = t.tenant AND e.uid = t.uid AND e.message = t.message
    {CHANGED} WHERE t.tenant = $1 AND t.uid = $2"""
"""With their messages."""

ACTIVE_RUNS = """SELECT a.tenant, s.session, a.uid, r.body, a.revision, s.epoch, a.deaths, a.released,
    a.create_time, a.run FROM active_runs a
    JOIN runs r ON r.tenant = a.tenant AND r.uid = a.uid AND r.run = a.run AND r.create_time = a.create_time
    JOIN sessions s ON s.tenant = a.tenant AND s.uid = a.uid WHERE true"""

EVERY_ACTIVE_RUN = """SELECT a.tenant, s.session, a.uid, r.body, a.revision, s.epoch, a.deaths, a.released,
    a.create_time, a.run FROM active_runs a
    CROSS JOIN LATERAL (SELECT state, body FROM runs r
        WHERE r.tenant = a.tenant AND r.uid = a.uid AND r.run = a.run AND r.create_time = a.create_time OFFSET 0) r
    CROSS JOIN LATERAL (SELECT session, epoch, activity FROM sessions s
        WHERE s.tenant = a.tenant AND s.uid = a.uid OFFSET 0) s WHERE true"""
"""The same, for many of them: OFFSET keeps PostgreSQL from reading all runs ever made, in order to join a few."""

ACTIVE_RUN = """tenant = $1 AND uid = $2 AND run = $3
    AND create_time = (SELECT create_time FROM runs WHERE tenant = $1 AND uid = $2 AND run = $3)"""
"""Finds the row that a run has among those that have not ended."""

NAMED = "coalesce($3, s.agent)"

SESSION_CHANGES = (
    *(name for name in SESSION_COLUMNS if name not in {"user", "create_time"}),
    *("expire_time", "labels", "epoch", "commits", "body"),
)
"""The columns that change in a session's row."""


ADD_SESSION = f"""INSERT INTO sessions (tenant, session, uid, "user", create_time, {", ".join(SESSION_CHANGES)})
    VALUES ({marks(5 + len(SESSION_CHANGES))})"""

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
    VALUES ({marks(8 + len(RUN_COLUMNS))})"""

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


def _labels(row: Labelled) -> str | None:
    """Returns labels as jsonb takes them; None where there are none."""
    return json.dumps({escaped(key): escaped(value) for key, value in row.labels.items()}) if row.labels else None


class PostgresTables(Tables):
    """Rows as one connection sees them, for a step that `wire.run` runs: within a transaction that somebody
    else begins and ends, or a statement at a time."""

    store = "notecase_store"
    labels = staticmethod(_labels)
    discarded = "discarded = 1"
    for_update = " FOR UPDATE"
    for_share = " FOR SHARE"
    heads = "sessions"
    log = "events"
    listed = "sessions"
    session_rows: ClassVar[Sequence[Rows]] = (ROWS["events"], *SESSION_ROWS)
    tenant_rows = TENANT_ROWS
    copies: ClassVar[Sequence[Copied]] = copies(
        log,
        added="""EXISTS (SELECT 1 FROM events e WHERE e.tenant = calls.tenant AND e.uid = calls.uid
            AND e.message = calls.message AND e.message IS NOT NULL AND e.sequence <= $3)""",
        ended="""NOT EXISTS (SELECT 1 FROM active_runs a WHERE a.tenant = runs.tenant
            AND a.create_time = runs.create_time AND a.uid = runs.uid AND a.run = runs.run)""",
    )
    start = f"""SELECT s.body, r.body FROM (SELECT 1) AS one
        LEFT JOIN session_names n ON n.tenant = $1 AND n.session = $2
        LEFT JOIN sessions s ON s.tenant = $1 AND s.uid = n.uid
        LEFT JOIN agents a ON a.tenant = $1 AND a.agent = substr(split_part({NAMED}, '@', 1), 8)
        LEFT JOIN known_revisions r ON r.tenant = $1 AND r.agent = a.agent AND r.revision = coalesce(
            nullif(CASE WHEN split_part({NAMED}, '@', 2) ~ '^[0-9]{{1,18}}$'
                THEN split_part({NAMED}, '@', 2)::bigint ELSE 0 END, 0), a.revision)"""
    message_of = f"{MESSAGES} AND e.message = $3"
    active = ACTIVE_RUNS
    every_active = EVERY_ACTIVE_RUN
    idle = f"""{EVERY_ACTIVE_RUN} AND (r.state = {v1.Run.STATE_RUNNING}
        OR (r.state = {v1.Run.STATE_QUEUED} AND s.activity = {v1.Session.ACTIVITY_IDLE}))"""

    def __init__(self, connection: "Connection[Record]", counts: Counts) -> None:
        self._connection = connection
        self.counts = counts
        self.quotas = counts.quotas

    @cached_property
    def content(self) -> SqlContent:
        return PostgresContent(self)

    def rows(self, statement: str, *values: Any) -> list[Record]:
        return awaited(self._connection.fetch(statement, *map(escaped, values)))

    def one(self, statement: str, *values: Any) -> Any:
        return awaited(self._connection.fetchrow(statement, *map(escaped, values)))

    def do(self, statement: str, *values: Any) -> int:
        status: str = awaited(self._connection.execute(statement, *map(escaped, values)))
        return int(status.rpartition(" ")[2])

    def remove(self, statement: str, *values: Any) -> int:
        return self.do(statement, *values)

    def page(self, statement: str, order: str, values: Sequence[Any], limit: int) -> list[Record]:
        return self.rows(
            f"""SELECT * FROM (
                    SELECT *, sum(size) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) - size AS before FROM (
                        {statement} ORDER BY {order} LIMIT ${len(values) + 1}) AS q) AS p
                WHERE before <= {ANSWER_BYTES} ORDER BY {order}""",
            *values,
            limit,
        )

    def put(self, table: str, key: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        row = {**key, **rest}
        replaced = ", ".join(f"{name} = excluded.{name}" for name in rest)
        self.do(
            f"""INSERT INTO {table} ({", ".join(row)}) VALUES ({marks(len(row))})
                ON CONFLICT ({", ".join(key)}) DO UPDATE SET {replaced}""",
            *row.values(),
        )

    def read(self, value: Any) -> Any:
        return unescaped(value) if isinstance(value, str) else value

    def named(self, table: str, place: str, places: Sequence[str | int]) -> tuple[str, str, Sequence[Any]]:
        return table, f"{place} = ANY($5)", [list(places)]

    def label(self, table: str, name: str, value: str, values: list[Any]) -> tuple[str, str]:
        label = f"coalesce({table}labels ->> {bind(values, name)}::text, '')"
        return f'{label} COLLATE "C"', bind(values, value)

    def _put(self, statement: str, of: tuple[str, ...], rows: Sequence[tuple[Any, ...]], width: int) -> None:
        """Writes rows by a statement over their columns, which begin behind the values `of`. The first `width` columns
        identify a row."""
        if rows:
            self.do(statement, *of, *_columns(rows))

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

    def add_request(self, once: Once, response: bytes, about: str, owner: str, now: int) -> None:
        self.counts.add("requests", once.tenant)
        super().add_request(once, response, about, owner, now)

    def kept(self, kind: Kept, tenant: str, *within: str, more: int = 1) -> int:
        if kind not in TALLIED:
            return super().kept(kind, tenant, *within)
        counts = self.counts
        counts.asked.add((kind, tenant))
        below = counts.tallies.below(kind, tenant, counts.quotas, more)
        if below is None:
            if not counts.alone:
                raise CountedAloneError
            below = super().kept(kind, tenant)
            counts.tallies.counted(kind, tenant, below)
        return below

    def touch(self) -> None:
        self.do("UPDATE notecase_store SET keyed = keyed")

    def add_command(self, key: SessionKey, command_id: str, applied: Applied) -> None:
        self.do(ADD_COMMAND, *of(key), command_id, *applied)

    def session_with_runs(self, key: SessionKey, runs: Collection[str]) -> tuple[SessionRow, dict[str, v1.Run]] | None:
        row = self.session(key)
        if row is None:
            return None
        rows = self.rows("SELECT body FROM runs WHERE tenant = $1 AND uid = $2 AND run = ANY($3)", *of(key), runs)
        found = [v1.Run.FromString(body) for (body,) in rows]
        return row, {run.name: run for run in found}

    def add_session(self, key: SessionKey, row: SessionRow) -> None:
        whose = (row.session.user, column(row.session, "create_time"))
        self.counts.add("sessions", key.tenant)
        self.do(ADD_SESSION, *key, *whose, *session_changes(row))
        self.do(ADD_NAME, *key)

    def put_session(self, key: SessionKey, row: SessionRow) -> None:
        self.do(PUT_SESSION, *of(key), *session_changes(row))

    def add_events(self, key: SessionKey, events: Sequence[EventRow]) -> None:
        self._put(ADD_EVENTS, of(key), list(map(_event, events)), 1)

    def events(self, key: SessionKey, after: int, limit: int) -> Iterator[Found[v1.Event]]:
        # Some ask for all that there are, however large.
        while rows := self.page(
            """SELECT sequence, body, length(body) AS size FROM events
                WHERE tenant = $1 AND uid = $2 AND sequence > $3""",
            *("sequence", (*of(key), after), limit),
        ):
            for sequence, body, size, _ in _in_turn(rows):
                yield Found((sequence,), v1.Event.FromString(body), size)
            after, limit = rows[-1]["sequence"], limit - len(rows)
            if rows[-1]["before"] + rows[-1]["size"] <= ANSWER_BYTES:
                break

    def changes(self, key: SessionKey, after: int, until: int) -> Iterator[v1.Event]:
        while rows := self.page(
            """SELECT sequence, body, length(body) AS size FROM events WHERE tells_past = 1
                AND tenant = $1 AND uid = $2 AND sequence > $3 AND sequence <= $4""",
            *("sequence", (*of(key), after, until), CHANGES_READ),
        ):
            yield from (v1.Event.FromString(row["body"]) for row in _in_turn(rows, CHANGES_AT_ONCE_BYTES))
            after = rows[-1]["sequence"]

    def add_stretches(self, key: SessionKey, stretches: Sequence[Stretch]) -> None:
        self._put(ADD_STRETCHES, of(key), stretches, 1)

    def named_messages(self, tenant: str, names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], v1.Message]:
        if not names:
            return {}
        rows = self.rows(
            f"""SELECT e.uid, e.message, {MESSAGE} FROM unnest($2::text[], $3::text[]) AS n (uid, message)
                JOIN events e ON e.message IS NOT NULL AND e.tenant = $1 AND e.uid = n.uid AND e.message = n.message
                {CHANGED}""",
            *(tenant, *_columns(names)),
        )
        return {(uid, unescaped(name)): message_row(*found) for uid, name, *found in rows}

    def put_message(self, key: SessionKey, message: v1.Message) -> None:
        self._put_messages(key, [message])

    def _put_messages(self, key: SessionKey, messages: Sequence[v1.Message]) -> None:
        rows = [(message.sequence, message.update_sequence, message.SerializeToString()) for message in messages]
        self._put(PUT_MESSAGES, of(key), rows, 1)

    def messages(
        self, key: SessionKey, query: Query, newest_first: bool, step: StepKey | None, superseded: bool
    ) -> Iterator[Found[v1.Message]]:
        statement, values = MESSAGES, list[Any](of(key))
        if not superseded:
            statement += f" AND {REWIND} IS NULL"
        if step is not None:
            statement += " AND e.run = $3 AND e.step = $4 AND e.sequence BETWEEN $5 AND $6"
            values += [*step, *self._bounds(key, step.run)]
        if query.after is not None:
            statement += f" AND e.sequence {'<' if newest_first else '>'} {bind(values, query.after[0])}"
        order = "sequence DESC" if newest_first else "sequence"
        for sequence, own, event, rewind, size, _ in self.page(statement, order, values, query.limit + 1):
            yield Found((sequence,), message_row(own, event, rewind), size)

    def messages_of_calls(self, key: SessionKey, calls: Collection[str]) -> dict[str, v1.Message]:
        return held_calls(self.rows(f"{CALLS} AND t.call_id = ANY($3)", *of(key), calls)) if calls else {}

    def put_calls(self, key: SessionKey, calls: Mapping[str, str]) -> None:
        self._put(PUT_CALLS, of(key), list(calls.items()), 1)

    def add_run(self, key: SessionKey, run: v1.Run, digest: bytes) -> None:
        columns = (column(run, name) for name in RUN_COLUMNS)
        bounds = (run.first_sequence, run.last_sequence)
        self.do(ADD_RUN, *of(key), run.name, *columns, _labels(run), *bounds, digest, run.SerializeToString())

    def put_run(self, key: SessionKey, run: v1.Run, moved: bool) -> None:
        self.do(PUT_RUN, *of(key), run.name, run.state, run.last_sequence, run.SerializeToString())

    def _add_record(self, key: SessionKey, run: v1.Run, agent: v1.Agent, deaths: int) -> None:
        place = (key.tenant, column(run, "create_time"), key.uid, run.name)
        self.do(ADD_RECORD, *place, deaths, agent.SerializeToString())

    def drop_record(self, key: SessionKey, run: str) -> None:
        self.do(DROP_RECORD, *of(key), run)

    def unended_runs(self, key: SessionKey) -> list[str]:
        rows = self.rows("SELECT run FROM active_runs WHERE tenant = $1 AND uid = $2", *of(key))
        return [unescaped(run) for (run,) in rows]

    def runs(
        self, tenant: str, session: SessionKey | None, query: Query, user: str
    ) -> Iterator[tuple[SessionKey, Found[v1.Run]]]:
        values = list[Any]([tenant])
        where = self.where(query, RUN_COLUMNS, ("r.create_time", "r.uid", "r.run"), "<", values, "r.")
        source = "runs r"
        if session is not None:
            where += f" AND r.uid = {bind(values, session.uid)}"
        elif is_unended(query.where):
            source = """active_runs a JOIN runs r
                ON r.tenant = a.tenant AND r.create_time = a.create_time AND r.uid = a.uid AND r.run = a.run"""
            where += " AND a.tenant = $1"
        if user:
            where += f' AND s."user" = {bind(values, user)}'
        rows = self.page(
            f"""SELECT r.create_time, r.uid, r.run, r.body, s.session, length(r.body) AS size FROM {source}
                JOIN sessions s ON s.tenant = r.tenant AND s.uid = r.uid WHERE r.tenant = $1{where}""",
            *("create_time DESC, uid DESC, run DESC", values, query.limit + 1),
        )
        for create_time, uid, run, body, name, size, _ in rows:
            found = Found((create_time, uid, unescaped(run)), v1.Run.FromString(body), size)
            yield SessionKey(tenant, name, uid), found

    def put_record(self, key: SessionKey, run: str, deaths: int | None, released: bool) -> None:
        self.do(PUT_RECORD, *of(key), run, deaths, int(released))

    def state(
        self, scope: Scope, keys: Collection[str], values: Collection[str] | None = None
    ) -> tuple[int, dict[str, v1.StateEntry | None]]:
        rows = self.rows(
            """SELECT s.version, e.key, CASE WHEN e.key = ANY($5) THEN e.body ELSE '' END
                FROM states s LEFT JOIN entries e
                ON e.tenant = s.tenant AND e.kind = s.kind AND e.id = s.id AND e.key = ANY($4)
                WHERE s.tenant = $1 AND s.kind = $2 AND s.id = $3""",
            *(*scope, keys, keys if values is None else values),
        )
        entries: dict[str, v1.StateEntry | None] = {
            unescaped(key): v1.StateEntry.FromString(body) for _, key, body in rows if key is not None
        }
        return (rows[0][0] if rows else 0), entries

    def entry_bytes(self, scope: Scope, keys: Collection[str]) -> int:
        (size,) = self.one(
            """SELECT coalesce(sum(octet_length(body)), 0) FROM entries
                WHERE tenant = $1 AND kind = $2 AND id = $3 AND key = ANY($4)""",
            *(*scope, keys),
        )
        return int(size)

    def put_version(self, scope: Scope, version: int) -> None:
        self.do(PUT_VERSION, *scope, version)

    def put_entry(self, scope: Scope, key: str, entry: v1.StateEntry | None) -> None:
        self._put_entries(scope.tenant, [(scope, key, entry)])

    def _put_entries(self, tenant: str, entries: Sequence[tuple[Scope, str, v1.StateEntry | None]]) -> None:
        put = [(*scope[1:], key, entry.SerializeToString()) for scope, key, entry in entries if entry is not None]
        gone = [(*scope[1:], key) for scope, key, entry in entries if entry is None]
        self._put(PUT_ENTRIES, (tenant,), put, 3)
        self._put(DROP_ENTRIES, (tenant,), gone, 3)

    def refer(self, scope: Scope, key: str, sha256: str, sequence: int) -> None:
        self._refer(scope, key, {sha256: sequence})

    def _refer(self, scope: Scope, key: str, references: Mapping[str, int]) -> None:
        self._put(REFER, (*scope, key), list(references.items()), 1)


class PostgresContent(SqlContent):
    """Content that is counted."""

    def __init__(self, tables: PostgresTables) -> None:
        super().__init__(tables)
        self._tallies = tables.counts.tallies
        self._added = 0
        """Bytes that no row says yet whose they are."""

    def add_chunk(self, content: int, start: int, data: bytes) -> None:
        self._added += len(data)
        super().add_chunk(content, start, data)

    def put_blob(self, tenant: str, subject: str, sha256: str, row: BlobRow, now: int) -> None:
        self._own(tenant)
        super().put_blob(tenant, subject, sha256, row, now)

    def put_upload(self, tenant: str, upload_id: str, row: UploadRow) -> None:
        self._tallies.added("uploads", tenant)
        self._own(tenant)
        super().put_upload(tenant, upload_id, row)

    def _own(self, tenant: str) -> None:
        """Takes note that what was added is that tenant's."""
        self._tallies.added("blob_bytes", tenant, self._added)
        self._added = 0


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

    def rows(self, statement: str, *values: Any) -> list[Record]:
        self.flush()
        return super().rows(statement, *values)

    def one(self, statement: str, *values: Any) -> Any:
        self.flush()
        return super().one(statement, *values)

    def do(self, statement: str, *values: Any) -> int:
        self.flush()
        return super().do(statement, *values)


def session_changes(row: SessionRow) -> list[Any]:
    """Returns the values of SESSION_CHANGES."""
    session = row.session
    columns = [column(session, name) for name in SESSION_COLUMNS if name not in {"user", "create_time"}]
    listed = [*columns, expire_column(session), _labels(session)]
    return [*listed, row.epoch, commits_column(row), session.SerializeToString()]


def _event(row: EventRow) -> tuple[Any, ...]:
    return (row.sequence, int(row.tells_past), *(row.message or (None, None, None)), row.body)


def _columns(rows: Iterable[Iterable[Any]]) -> Iterator[list[Any]]:
    """The columns of rows, of which there are some."""
    return map(list, zip(*rows, strict=True))


def _in_turn(rows: Iterable[Record], at_once: int = AT_ONCE_BYTES) -> Iterator[Record]:
    """Yields rows, and lets others have their turn after every so many bytes: a step runs on the event loop."""
    size = 0
    for row in rows:
        yield row
        size += row["size"]
        if size >= at_once:
            size = 0
            awaited(asyncio.sleep(0))


def held_calls(rows: Iterable[Record]) -> dict[str, v1.Message]:
    """Reads rows of CALLS: by call, the message that holds it."""
    messages, holders = dict[str, v1.Message](), dict[str, str]()
    for call_id, holder, *found in rows:
        holders[unescaped(call_id)] = holder
        if holder not in messages:
            messages[holder] = message_row(*found)
    return {call_id: messages[holder] for call_id, holder in holders.items()}

"""A commit on PostgreSQL: one statement reads what it needs, and one writes what it changes.

Nothing is locked in between, and no transaction is open while this process thinks. The statement that writes compares
what was read: the row of the session by the transaction that wrote it (`xmin`), the versions of states, and the owner's
fence. When one is another, the statement fails as a whole, and the commit is made again from its beginning.
"""

import re
from collections.abc import Collection, Iterator
from copy import deepcopy
from functools import lru_cache
from typing import Any

from asyncpg import Connection, Record
from notecase import v1

from notecase_server.store import fold
from notecase_server.store.contract import Commit, Once, Query, Scope, SessionKey, StepKey
from notecase_server.store.lists import Found
from notecase_server.store.postgres.tables import (
    CALLS,
    MESSAGES,
    PUT_SESSION,
    PUT_VERSION,
    SESSION_CHANGES,
    PostgresTables,
    held_calls,
    session_changes,
)
from notecase_server.store.postgres.tallies import Counts
from notecase_server.store.postgres.wire import (
    GUARD,
    LOCK_BOUND,
    OWNED,
    Fenced,
    awaited,
    escaped,
    uncancelled,
    unescaped,
)
from notecase_server.store.sql.statements import REWIND, message_row, session_row
from notecase_server.store.steps import KEYS_AT_ONCE
from notecase_server.store.stretches import superseded_at
from notecase_server.store.tables import Applied, Changes, Recorded, SessionRow

OF_STATE = {"": ("session", "$2"), "user": ("user", 'substr(s."user", 7)'), "app": ("app", "''")}
"""By state in stored form, its kind, and its id as the row of the session has it."""

READS = {
    "runs": "ARRAY(SELECT body FROM runs WHERE tenant = $1 AND uid = $2 AND run = ANY({}))",
    "request": """(SELECT ROW(digest, response, about, owner) FROM requests
        WHERE tenant = $1 AND subject = {} AND rpc = {} AND request_id = {})""",
    "command": """(SELECT ROW(digest, sequence, run) FROM commands
        WHERE tenant = $1 AND uid = $2 AND command_id = {})""",
    "named": "(SELECT uid FROM session_names WHERE tenant = $1 AND session = {})",
    "calls": f"ARRAY(SELECT ROW(call_id, message, own, event, rewind) FROM ({CALLS} AND t.call_id = ANY({{}})) AS h)",
    "newest": f"""ARRAY(SELECT ROW(sequence, own, event, rewind, size)
        FROM ({MESSAGES} AND {REWIND} IS NULL ORDER BY sequence DESC LIMIT {{}}) AS m)""",
    **{
        f"version {state}": f"(SELECT version FROM states WHERE tenant = $1 AND kind = '{kind}' AND id = {of})"
        for state, (kind, of) in OF_STATE.items()
    },
    **{
        f"entries {state}": f"""ARRAY(SELECT ROW(key, CASE WHEN key = ANY({{}}) THEN body ELSE '' END) FROM entries
            WHERE tenant = $1 AND kind = '{kind}' AND id = {of} AND key = ANY({{}}))"""
        for state, (kind, of) in OF_STATE.items()
    },
}
"""The parts of the statement that reads, each a column of it; a brace is the place of each of its values."""

PUT_READ_SESSION = f"{PUT_SESSION} AND xmin = ${len(SESSION_CHANGES) + 3} RETURNING 1"

PUT_READ_VERSION = f"{PUT_VERSION} WHERE s.version = $5 RETURNING 1"

DROP_REFERENCES = """DELETE FROM blob_references
    WHERE tenant = $1 AND (kind, id, key) IN (SELECT * FROM unnest($2::text[], $3::text[], $4::text[]))
    AND (kind, id, key, sha256) NOT IN (SELECT * FROM unnest($5::text[], $6::text[], $7::text[], $8::text[]))"""

ADD_REFERENCES = """INSERT INTO blob_references (tenant, kind, id, key, sha256, sequence)
    SELECT $1, *, 0 FROM unnest($2::text[], $3::text[], $4::text[], $5::text[]) ON CONFLICT DO NOTHING"""

SHAPES = 1000
"""Statements whose texts are kept: of a few dozens, most commits have one."""


@lru_cache(SHAPES)
def _reading(parts: tuple[str, ...]) -> str:
    """The statement with these parts; its values are the session's tenant and uid, and those of the parts."""
    columns, last = list[str](), 2
    for part in parts:
        count = READS[part].count("{}")
        columns.append(READS[part].format(*(f"${last + at}" for at in range(1, count + 1))))
        last += count
    return f"""SELECT {", ".join(["o.fence", "s.body", "s.epoch", "s.commits", "s.xmin", *columns])}
        FROM owner o LEFT JOIN sessions s ON s.tenant = $1 AND s.uid = $2"""


@lru_cache(SHAPES)
def _writing(writes: tuple[tuple[str, bool], ...]) -> str:
    """One statement of several, each with whether it must write a row; its values are the fence and those of each."""
    parts, guards, last = [f"o AS ({OWNED.format('$1')})"], [LOCK_BOUND, "(SELECT count(*) FROM o) = 1"], 1
    for number, (statement, guarded) in enumerate(writes):
        marks = {int(mark) for mark in re.findall(r"\$(\d+)", statement)}
        shifted = re.sub(r"\$(\d+)", lambda mark: f"${int(mark[1]) + last}", statement)  # noqa: B023 - at once
        parts.append(f"w{number} AS ({shifted})")
        if guarded:
            guards.append(f"(SELECT count(*) FROM w{number}) = 1")
        last += max(marks)
    return f"WITH {', '.join(parts)} {GUARD.format(' AND '.join(guards))}"


class CommitTables(PostgresTables):
    """Rows for one commit: `load` reads what it needs, `flush` writes what it changes, and each is one statement. What
    else a rare commit looks at is read when it does."""

    def __init__(self, connection: "Connection[Record]", counts: Counts, commit: Commit, fence: int) -> None:
        super().__init__(connection, counts)
        self._commit = commit
        self._fence = fence
        self._needs = fold.needs(commit.events, commit.if_state_version)
        self._read: dict[str, Any] = {}
        """By part of READS."""
        self._session: SessionRow | None = None
        self._xmin = 0
        self._versions: dict[Scope, int] = {}
        """Of the states that were read."""
        self._writes: list[tuple[str, bool]] = []
        self._values: list[Any] = []
        self._references: dict[tuple[Scope, str], list[str]] = {}
        """What entries of users' and the app's states refer to from now on."""
        self._changes: Changes | None = None

    def _wanted(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """The parts of READS that the commit needs, with their values."""
        commit, needs = self._commit, self._needs
        if needs.runs:
            yield "runs", (needs.runs,)
        if commit.once is not None:
            yield "request", commit.once[1:4]
        if commit.command is not None:
            yield "command", (commit.command.command_id,)
        if commit.create is not None:
            yield "named", (commit.key.session,)
        if needs.calls:
            yield "calls", (needs.calls,)
        if commit.newest and not self._rewinds():
            yield "newest", (commit.newest + 1,)
        for state, keys in needs.keys.items():
            if (state != "user" or commit.create is None) and len(needs.values[state]) <= KEYS_AT_ONCE:
                yield f"version {state}", ()
                yield f"entries {state}", (needs.values[state], keys)

    def _rewinds(self) -> list[int]:
        """Where the commit goes back to."""
        return [event.rewound.to_sequence for event in self._commit.events if event.HasField("rewound")]

    def load(self) -> None:
        """Reads what the commit needs. Raises Fenced."""
        wanted = dict(self._wanted())
        key = self._commit.key
        values = [key.tenant, key.uid, *(value for values in wanted.values() for value in values)]
        fence, body, epoch, commits, self._xmin, *found = self.one(_reading(tuple(wanted)), *values)
        if fence != self._fence:
            raise Fenced
        self._read = dict(zip(wanted, found, strict=True))
        self._session = session_row(body, epoch, commits) if body is not None else None

    def session_with_runs(self, key: SessionKey, runs: Collection[str]) -> tuple[SessionRow, dict[str, v1.Run]] | None:
        if self._session is None:
            return None
        found = [v1.Run.FromString(body) for body in self._read.get("runs", ())]
        return self._session, {run.name: run for run in found}

    def request(self, once: Once) -> Recorded | None:
        row = self._read["request"]
        return Recorded(*row) if row else None

    def command(self, key: SessionKey, command_id: str) -> Applied | None:
        row = self._read["command"]
        return Applied(*row) if row else None

    def named_session(self, tenant: str, session: str) -> str:
        return self._read["named"] or ""

    def messages_of_calls(self, key: SessionKey, calls: Collection[str]) -> dict[str, v1.Message]:
        if calls and set(calls) <= self._needs.calls:
            return held_calls(self._read["calls"])
        return super().messages_of_calls(key, calls)

    def state(
        self, scope: Scope, keys: Collection[str], values: Collection[str] | None = None
    ) -> tuple[int, dict[str, v1.StateEntry | None]]:
        state = "" if scope.kind == "session" else scope.kind
        is_read = f"version {state}" in self._read and set(keys) <= self._needs.keys[state]
        if is_read and values is not None and set(values) <= self._needs.values[state]:
            version = self._read[f"version {state}"] or 0
            entries: dict[str, v1.StateEntry | None] = {
                unescaped(key): v1.StateEntry.FromString(body) for key, body in self._read[f"entries {state}"]
            }
        else:
            version, entries = super().state(scope, keys, values)
        self._versions[scope] = version
        return version, entries

    def messages(
        self, key: SessionKey, query: Query, newest_first: bool, step: StepKey | None, superseded: bool
    ) -> Iterator[Found[v1.Message]]:
        changes = self._changes
        if changes is None:
            yield from super().messages(key, query, newest_first, step, superseded)
            return
        # The newest, of what is to be written and of what was there before.
        stretches, sizes = sorted(changes.stretches), {event.sequence: len(event.body) for event in changes.events}
        for message in reversed(changes.messages):
            if superseded_at(stretches, message.sequence) is None:
                own = message.update_sequence != message.sequence
                size = message.ByteSize() if own else sizes[message.sequence]
                yield Found((message.sequence,), deepcopy(message), size)
        changed = {message.sequence: message for message in changes.changed_messages}
        for found in self._newest_before(key, query.limit):
            anew = changed.get(found.row.sequence)
            yield found if anew is None else Found(found.position, deepcopy(anew), anew.ByteSize())

    def _newest_before(self, key: SessionKey, limit: int) -> Iterator[Found[v1.Message]]:
        """The newest messages that were there before, and that the commit leaves in force."""
        if rewinds := self._rewinds():
            after = Query(limit, (min(rewinds) + 1,))
            yield from super().messages(key, after, newest_first=True, step=None, superseded=False)
            return
        for sequence, own, event, rewind, size in self._read["newest"]:
            yield Found((sequence,), message_row(own, event, rewind), size)

    def do(self, statement: str, *values: Any) -> int:
        self._write(statement, values)
        return 0

    def _write(self, statement: str, values: tuple[Any, ...], guarded: bool = False) -> None:
        """Adds a statement to those that are written together. No row may be written by two of them."""
        self._writes.append((statement, guarded))
        self._values += values

    def save(self, changes: Changes) -> None:
        super().save(changes)
        self._changes = changes

    def put_session(self, key: SessionKey, row: SessionRow) -> None:
        self._write(PUT_READ_SESSION, (key.tenant, key.uid, *session_changes(row), self._xmin), guarded=True)

    def put_version(self, scope: Scope, version: int) -> None:
        self._write(PUT_READ_VERSION, (*scope, version, self._versions[scope]), guarded=True)

    def drop_references(self, scope: Scope, key: str) -> None:
        self._references[scope, key] = []

    def refer(self, scope: Scope, key: str, sha256: str, sequence: int) -> None:
        self._references[scope, key].append(sha256)

    def _refer_entries(self) -> None:
        """Writes what entries refer to instead of what they did. One that is as before is neither removed nor added."""
        tenant, places = self._commit.key.tenant, [(*scope[1:], key) for scope, key in self._references]
        held = [
            (*place, sha256)
            for place, digests in zip(places, self._references.values(), strict=True)
            for sha256 in digests
        ]
        columns = list(map(list, zip(*held, strict=True))) or [[]] * 4
        self._write(DROP_REFERENCES, (tenant, *map(list, zip(*places, strict=True)), *columns))
        if held:
            self._write(ADD_REFERENCES, (tenant, *columns))

    def flush(self) -> None:
        """Writes everything, or raises and writes nothing."""
        if self._references:
            self._refer_entries()
        if self._writes:
            statement = _writing(tuple(self._writes))
            with uncancelled(self._connection) as timeout:
                awaited(self._connection.execute(statement, self._fence, *map(escaped, self._values), timeout=timeout))

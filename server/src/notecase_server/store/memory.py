"""A store in the process's own memory: for tests and trials, gone with the process."""

import os
import threading
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from notecase import v1

from notecase_server import errors
from notecase_server.store.base import TableStore
from notecase_server.store.contract import (
    AGENT_COLUMNS,
    RUN_COLUMNS,
    SESSION_COLUMNS,
    ActiveRun,
    Clock,
    Once,
    Query,
    Scope,
    SessionKey,
    StepKey,
)
from notecase_server.store.lists import Found, Position, matches
from notecase_server.store.memory_content import MemoryContent
from notecase_server.store.memory_directory import MemoryDirectory
from notecase_server.store.memory_rows import AgentRows, RequestRow, RunRow, SessionRows, StateRows, TenantRows
from notecase_server.store.stretches import Stretch, last_of, marked, superseded_at
from notecase_server.store.tables import (
    Applied,
    Batch,
    Changes,
    DeletedAgent,
    EventRow,
    Kept,
    Piece,
    Recorded,
    RunPlace,
    SessionRow,
    Tables,
    save_states,
)

T = TypeVar("T")
P = TypeVar("P", bound=Position)


class MemoryStore(TableStore):
    """One step at a time, whichever thread or loop it comes from; nothing is awaited."""

    kind = "memory"

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.secret = os.urandom(32)
        self._clock = clock
        self._tables = _MemoryTables()
        self._lock = threading.Lock()
        self._closed = False

    async def _read(self, step: Callable[[Tables], T], alone: bool = False) -> T:
        with self._lock:
            return step(self._open())

    async def _write(self, step: Callable[[Tables, int], T], within: str = "", *, piece: bool = False) -> T:
        with self._lock:
            return step(self._open(), self._clock())

    def _open(self) -> Tables:
        if self._closed:
            raise errors.store_unavailable()
        return self._tables

    async def scrub(self) -> bool:
        """There is no file."""
        return True

    async def close(self) -> None:
        with self._lock:
            self._closed = True
            self._tables = _MemoryTables()


TABLES_COPIED = 7
"""References, events, stretches, messages, calls, runs and entries: what holds content comes first."""


class _MemoryTables:
    """Tables in dicts, a tree for each tenant. They hold serialized bytes, so that nobody's changes reach them."""

    def __init__(self) -> None:
        self._tenants: defaultdict[str, TenantRows] = defaultdict(TenantRows)
        self.content = MemoryContent(self._tenants)
        self.directory = MemoryDirectory(self._tenants)

    def _session(self, key: SessionKey) -> SessionRows | None:
        return self._tenants[key.tenant].sessions.get(key.uid)

    def _rows(self, tenant: str, uid: str) -> SessionRows | None:
        """The rows of a session or of a copy, if there are any."""
        rows = self._tenants[tenant]
        return rows.sessions.get(uid) or (rows.deleted[uid][1] if uid in rows.deleted else None)

    def _existing(self, key: SessionKey) -> SessionRows:
        """The rows of a session or of a copy, one of which there is."""
        rows = self._rows(key.tenant, key.uid)
        assert rows is not None
        return rows

    def _state(self, scope: Scope) -> StateRows:
        """The state, an empty one where nobody wrote to it."""
        return self._tenants[scope.tenant].states.get((scope.kind, scope.id)) or StateRows()

    def _agent(self, tenant: str, agent_id: str) -> AgentRows:
        """The agent, one without revisions where there never was one."""
        return self._tenants[tenant].agents.get(agent_id) or AgentRows()

    def save(self, changes: Changes) -> None:
        key = changes.key
        (self.add_session if changes.made else self.put_session)(key, changes.session)
        self.add_events(key, changes.events)
        if changes.command is not None:
            command_id, applied = changes.command
            self._existing(key).commands[command_id] = applied
        self.add_stretches(key, changes.stretches)
        self.add_messages(key, changes.messages)
        self.put_calls(key, changes.calls)
        for message in changes.changed_messages:
            self.put_message(key, message)
        for run, record in changes.runs:
            self.add_run(key, run, record.digest)
            if run.name not in changes.ended:
                self._existing(key).runs[run.name].agent = record.agent.SerializeToString()
        for run, moved in changes.changed_runs:
            self.put_run(key, run, moved)
        for run, _ in changes.changed_runs:
            if run.name in changes.ended:
                self.drop_record(key, run.name)
        save_states(self, changes)

    def request(self, once: Once) -> Recorded | None:
        found = self._tenants[once.tenant].requests.get((once.subject, once.rpc, once.request_id))
        return found.recorded if found else None

    def add_request(self, once: Once, response: bytes, about: str, owner: str, now: int) -> None:
        made = RequestRow(Recorded(once.digest, response, about, owner), now)
        self._tenants[once.tenant].requests[once.subject, once.rpc, once.request_id] = made

    def kept(self, kind: Kept, tenant: str, *within: str, more: int = 1) -> int:
        rows = self._tenants[tenant]
        match kind:
            case "revisions":
                return len(self._agent(tenant, within[0]).revisions)
            case "agents":
                return sum(bool(agent.revisions) for agent in rows.agents.values())
            case "keys":
                state = rows.states.get((within[0], within[1]))
                return len(state.entries) if state else 0
            case "blob_bytes":
                return sum(blob.row.size for blob in rows.blobs.values()) + self.kept("upload_bytes", tenant)
            case "upload_bytes":
                return sum(row.size for row in rows.uploads.values() if not row.sha256)
            case "requests":
                return len(rows.requests)
            case "sessions":
                return len(rows.sessions)
            case "uploads":
                return len(rows.uploads)

    def touch(self) -> None:
        pass

    def forget_requests(self, before: int, batch: Batch) -> int:
        old = [
            (tenant, place)
            for tenant in self._tenants.values()
            for place, request in tenant.requests.items()
            if request.create_time < before and batch.takes(len(request.recorded.response or b""))
        ]
        for tenant, place in old:
            del tenant.requests[place]
        return len(old)

    def command(self, key: SessionKey, command_id: str) -> Applied | None:
        session = self._session(key)
        return session.commands.get(command_id) if session else None

    def named_session(self, tenant: str, session: str) -> str:
        return self._tenants[tenant].names.get(session, "")

    def exists(self, tenant: str, uid: str) -> bool:
        return uid in self._tenants[tenant].sessions

    def session(self, key: SessionKey) -> SessionRow | None:
        row = self._session(key)
        return SessionRow(v1.Session.FromString(row.body), row.epoch, row.commits) if row else None

    def session_of_name(self, tenant: str, session: str) -> SessionRow | None:
        uid = self.named_session(tenant, session)
        return self.session(SessionKey(tenant, session, uid))

    def session_with_runs(self, key: SessionKey, runs: Collection[str]) -> tuple[SessionRow, dict[str, v1.Run]] | None:
        row, kept = self.session(key), self._session(key)
        if row is None or kept is None:
            return None
        return row, {name: v1.Run.FromString(kept.runs[name].body) for name in runs if name in kept.runs}

    def add_session(self, key: SessionKey, row: SessionRow) -> None:
        self._bind(key, row, SessionRows(key.session))

    def _bind(self, key: SessionKey, row: SessionRow, rows: SessionRows) -> None:
        tenant, rows.create_time = self._tenants[key.tenant], row.session.create_time.ToMicroseconds()
        tenant.sessions[key.uid] = rows
        tenant.names[key.session] = key.uid
        insort(tenant.created, (rows.create_time, key.uid))
        self.put_session(key, row)

    def put_session(self, key: SessionKey, row: SessionRow) -> None:
        kept, session = self._existing(key), row.session
        kept.body, kept.epoch, kept.commits = session.SerializeToString(), row.epoch, row.commits
        kept.expire_time = session.expire_time.ToMicroseconds() if session.HasField("expire_time") else None

    def delete_session(self, key: SessionKey) -> None:
        tenant = self._tenants[key.tenant]
        gone = tenant.sessions.pop(key.uid)
        del tenant.names[gone.name]
        _remove(tenant.created, (gone.create_time, key.uid))
        tenant.deleted[key.uid] = (v1.Session.FromString(gone.body).user, gone)

    def deleted_sessions(self, tenant: str | None, user: str, limit: int) -> list[Scope]:
        found = (
            Scope(name, "session", uid)
            for name, rows in self._tenants.items()
            for uid, (whose, _) in rows.deleted.items()
            if tenant is None or (name, whose) == (tenant, user)
        )
        return list(islice(found, limit))

    def delete_rows(self, scope: Scope, batch: Batch) -> bool:
        tenant = self._tenants[scope.tenant]
        if scope.kind == "session":
            _, gone = tenant.deleted[scope.id]
            while gone.events and batch.takes(len(gone.events[-1])):
                gone.events.pop()
            while gone.started and batch.takes(len(gone.runs[gone.started[-1][2]].body)):
                _remove(tenant.started, gone.started.pop())
            for rows in (gone.messages, gone.calls, gone.commands):
                for row in [row for row in islice(rows, batch.left) if batch.takes(len(rows[row]))]:
                    del rows[row]
        entries = self._state(scope).entries
        for key in [key for key in islice(entries, batch.left) if batch.takes(len(entries[key]))]:
            self.put_entry(scope, key, None)
        for place in [place for place in tenant.references if place[0] == scope]:
            held = tenant.references[place]
            while held and batch.takes(0):
                tenant.blobs[held.popitem()[0]].references.discard(place)
            if not held:
                del tenant.references[place]
        owner = scope.id if scope.kind == "session" else f"users/{scope.id}"
        mine = [request_id for request_id, request in tenant.requests.items() if request.recorded.owner == owner]
        for request_id in sorted(mine):
            request = tenant.requests[request_id]
            if batch.takes(len(request.recorded.response or b"")):
                request.recorded = request.recorded._replace(response=None, owner="")
        if batch.full:
            return False
        tenant.states.pop((scope.kind, scope.id), None)
        if scope.kind == "session":
            del tenant.deleted[scope.id]
        return True

    def begin_copy(self, key: SessionKey, user: str) -> None:
        self._tenants[key.tenant].deleted[key.uid] = (user, SessionRows(key.session))

    def is_copy(self, key: SessionKey) -> bool:
        return key.uid in self._tenants[key.tenant].deleted

    def bind_copy(self, key: SessionKey, row: SessionRow) -> None:
        _, rows = self._tenants[key.tenant].deleted.pop(key.uid)
        self._bind(key, row, rows)

    def rows_to_copy(self, source: SessionKey, at: int, after: Piece, batch: Batch) -> list[Piece]:
        found = list[Piece]()
        for table in range(after.table, TABLES_COPIED):
            last = after.places[-1] if table == after.table and after.places else None
            rows = islice(self._to_copy(source, at, table, last), batch.left)
            if places := [place for place, size in rows if batch.takes(size)]:
                found.append(Piece(table, places))
            if batch.full:
                break
        return found

    def _to_copy(self, source: SessionKey, at: int, table: int, last: Any) -> Iterator[tuple[Any, int]]:
        """The places of a table's rows behind `last`, ascending, and the size of each row."""
        old = self._existing(source)
        match table:
            case 0:
                held = self._tenants[source.tenant].references.get((source.state, ""), {})
                yield from _behind(last, ((sha256, 0) for sha256, sequence in held.items() if sequence <= at))
            case 1:
                for sequence in range((last or 0) + 1, at + 1):
                    yield sequence, len(old.events[sequence - 1])
            case 2:
                yield from _behind(last, ((one.after, 0) for one in old.stretches if one.sequence <= at))
            case 3:
                begin, end = bisect_left(old.order, ((last or 0) + 1,)), bisect_left(old.order, (at + 1,))
                for sequence, name, _ in islice(old.order, begin, end):
                    if old.changed.get(name, 0) <= at:
                        yield sequence, len(old.messages[name])
            case 4:
                added = {name for _, name, _ in old.order[: bisect_left(old.order, (at + 1,))]}
                yield from _behind(last, ((call, 0) for call, message in old.calls.items() if message in added))
            case 5:
                ended = ((name, row.body) for name, row in old.runs.items() if row.agent is None)
                rows = ((name, len(body)) for name, body in ended if v1.Run.FromString(body).last_sequence <= at)
                yield from _behind(last, rows)
            case 6:
                state = self._state(source.state)
                for key in islice(state.keys, bisect_right(state.keys, last or ""), None):
                    yield key, len(state.entries[key])

    def copy_rows(self, source: SessionKey, key: SessionKey, at: int, pieces: Sequence[Piece]) -> None:
        for table, places in pieces:
            for place in places:
                self._copy_row(source, key, at, table, place)

    def _copy_row(self, source: SessionKey, key: SessionKey, at: int, table: int, place: Any) -> None:
        old, new = self._existing(source), self._existing(key)
        match table:
            case 0:
                self.refer(key.state, "", place, self._tenants[key.tenant].references[source.state, ""][place])
            case 1:
                new.events.append(old.events[place - 1])
                found = bisect_left(old.changes, place)
                new.changes += [place] if old.changes[found : found + 1] == [place] else []
            case 2:
                insort(new.stretches, old.stretches[bisect_left(old.stretches, (place,))])
            case 3:
                row = old.order[bisect_left(old.order, (place,))]
                name, changed = row[1], old.changed.get(row[1], 0)
                if changed <= at:
                    new.messages[name] = old.messages[name]
                    new.order.append(row)
                    if changed:
                        new.changed[name] = changed
            case 4:
                new.calls[place] = old.calls[place]
            case 5:
                self._put_run(key, place, replace(old.runs[place]))
            case 6:
                states = self._tenants[key.tenant].states
                state = states.setdefault(("session", key.uid), StateRows())
                if (body := self._state(source.state).entries.get(place)) is not None:
                    state.entries[place] = body
                    state.keys.append(place)

    def expired(self, now: int, limit: int) -> list[SessionKey]:
        found = [
            (row.expire_time, tenant, uid, row.name)
            for tenant, rows in self._tenants.items()
            for uid, row in rows.sessions.items()
            if row.expire_time is not None and row.expire_time <= now
        ]
        return [SessionKey(tenant, name, uid) for _, tenant, uid, name in sorted(found)[:limit]]

    def sessions(self, tenant: str, query: Query) -> Iterator[Found[v1.Session]]:
        rows = self._tenants[tenant]
        for position in _before(rows.created, query.after):
            body = rows.sessions[position[1]].body
            session = v1.Session.FromString(body)
            if matches(query.where, session, SESSION_COLUMNS):
                yield Found(position, session, len(body))

    def add_events(self, key: SessionKey, events: Sequence[EventRow]) -> None:
        session = self._existing(key)
        session.events.extend(event.body for event in events)
        session.changes.extend(event.sequence for event in events if event.tells_past)

    def events(self, key: SessionKey, after: int, limit: int) -> Iterator[Found[v1.Event]]:
        session = self._rows(key.tenant, key.uid)
        for sequence, body in enumerate(session.events[after : after + limit] if session else (), after + 1):
            yield Found((sequence,), v1.Event.FromString(body), len(body))

    def changes(self, key: SessionKey, after: int, until: int) -> Iterator[v1.Event]:
        session = self._session(key)
        if session is not None:
            for place in range(bisect_right(session.changes, after), bisect_right(session.changes, until)):
                yield v1.Event.FromString(session.events[session.changes[place] - 1])

    def last_stretch(self, key: SessionKey, before: int) -> Stretch | None:
        session = self._rows(key.tenant, key.uid)
        return last_of(session.stretches, before) if session else None

    def add_stretches(self, key: SessionKey, stretches: Sequence[Stretch]) -> None:
        for stretch in stretches:
            insort(self._existing(key).stretches, stretch)

    def message(self, key: SessionKey, message: str) -> v1.Message | None:
        session = self._rows(key.tenant, key.uid)
        body = session.messages.get(message) if session else None
        return session.message(body) if session is not None and body is not None else None

    def named_messages(self, tenant: str, names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], v1.Message]:
        found = dict[tuple[str, str], v1.Message]()
        for uid, name in names:
            rows = self._rows(tenant, uid)
            if rows is not None and name in rows.messages:
                found[uid, name] = rows.message(rows.messages[name])
        return found

    def add_messages(self, key: SessionKey, messages: Sequence[v1.Message]) -> None:
        session = self._existing(key)
        for message in messages:
            session.messages[message.name] = message.SerializeToString()
            if message.update_sequence != message.sequence:
                session.changed[message.name] = message.update_sequence
            insort(session.order, (message.sequence, message.name, message.run))

    def put_message(self, key: SessionKey, message: v1.Message) -> None:
        session = self._existing(key)
        session.messages[message.name] = message.SerializeToString()
        session.changed[message.name] = message.update_sequence

    def messages(
        self, key: SessionKey, query: Query, newest_first: bool, step: StepKey | None, superseded: bool
    ) -> Iterator[Found[v1.Message]]:
        session = self._session(key)
        if session is None:
            return
        order = session.order
        if newest_first:
            end = len(order) if query.after is None else bisect_right(order, query.after)
            places = range(end - 1, -1, -1)
        else:
            start = 0 if query.after is None else bisect_right(order, (int(query.after[0]) + 1,))
            places = range(start, len(order))
        for place in places:
            sequence, name, holder = order[place]
            if step is None or StepKey(holder) == step:
                rewind = superseded_at(session.stretches, sequence)
                if superseded or rewind is None:
                    body = session.messages[name]
                    yield Found((sequence,), marked(v1.Message.FromString(body), rewind), len(body))

    def changed_messages(self, key: SessionKey, at: int) -> list[v1.Message]:
        session = self._session(key)
        changed = [name for name, sequence in session.changed.items() if sequence > at] if session else []
        found = [session.message(session.messages[name]) for name in changed] if session else []
        return [message for message in found if message.sequence <= at]

    def messages_of_calls(self, key: SessionKey, calls: Collection[str]) -> dict[str, v1.Message]:
        session = self._rows(key.tenant, key.uid)
        held = {call_id: session.calls[call_id] for call_id in calls if call_id in session.calls} if session else {}
        messages = {holder: message for holder in set(held.values()) if (message := self.message(key, holder))}
        return {call_id: messages[holder] for call_id, holder in held.items() if holder in messages}

    def put_calls(self, key: SessionKey, calls: Mapping[str, str]) -> None:
        self._existing(key).calls.update(calls)

    def run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        session = self._rows(key.tenant, key.uid)
        row = session.runs.get(run) if session else None
        return (v1.Run.FromString(row.body), row.digest) if row else None

    def add_run(self, key: SessionKey, run: v1.Run, digest: bytes) -> None:
        created = run.create_time.ToMicroseconds()
        self._put_run(key, run.name, RunRow(run.SerializeToString(), digest, created, None))

    def _put_run(self, key: SessionKey, run: str, row: RunRow) -> None:
        session, place = self._existing(key), (row.create_time, key.uid, run)
        session.runs[run] = row
        insort(session.started, place)
        insort(self._tenants[key.tenant].started, place)

    def put_run(self, key: SessionKey, run: v1.Run, moved: bool) -> None:
        self._existing(key).runs[run.name].body = run.SerializeToString()

    def drop_record(self, key: SessionKey, run: str) -> None:
        self._existing(key).runs[run].agent = None

    def runs(
        self, tenant: str, session: SessionKey | None, query: Query, user: str
    ) -> Iterator[tuple[SessionKey, Found[v1.Run]]]:
        rows = self._tenants[tenant]
        of_session = self._session(session) if session is not None else None
        started = rows.started if session is None else of_session.started if of_session else []
        for position in _before(started, query.after):
            _, uid, name = position
            if uid not in rows.sessions or (user and rows.user_of(uid) != user):
                continue
            body = rows.sessions[uid].runs[name].body
            found = v1.Run.FromString(body)
            if matches(query.where, found, RUN_COLUMNS):
                yield SessionKey(tenant, rows.sessions[uid].name, uid), Found(position, found, len(body))

    def changed_runs(self, key: SessionKey, at: int) -> list[v1.Run]:
        session = self._session(key)
        found = [v1.Run.FromString(row.body) for row in session.runs.values()] if session else []
        return [run for run in found if run.first_sequence <= at < run.last_sequence]

    def active_run(self, key: SessionKey, run: str) -> ActiveRun | None:
        session = self._session(key)
        row = session.runs.get(run) if session else None
        return _active(key, session, row) if session and row and row.agent is not None else None

    def active_runs(self, after: ActiveRun | None, limit: int) -> list[ActiveRun]:
        found = sorted(self._active(), key=_position)
        return [active for active in found if after is None or _position(active) > _position(after)][:limit]

    def idle_runs(self) -> list[ActiveRun]:
        idle = []
        for active in self._active():
            session = self.session(active.key)
            waits = session is not None and not session.session.active_run
            if active.run.state == v1.Run.STATE_RUNNING or (active.run.state == v1.Run.STATE_QUEUED and waits):
                idle.append(active)
        return idle

    def _active(self) -> Iterator[ActiveRun]:
        for tenant, rows in self._tenants.items():
            for uid, session in rows.sessions.items():
                for run in session.runs.values():
                    if run.agent is not None:
                        yield _active(SessionKey(tenant, session.name, uid), session, run)

    def put_record(self, key: SessionKey, run: str, deaths: int | None, released: bool) -> None:
        session = self._session(key)
        row = session.runs.get(run) if session else None
        if row is not None and row.agent is not None:
            row.deaths, row.released = row.deaths if deaths is None else deaths, released

    def version(self, scope: Scope) -> int:
        return self._state(scope).version

    def put_version(self, scope: Scope, version: int) -> None:
        states = self._tenants[scope.tenant].states
        states.setdefault((scope.kind, scope.id), StateRows()).version = version

    def state(self, scope: Scope, keys: Collection[str]) -> tuple[int, dict[str, v1.StateEntry | None]]:
        state = self._state(scope)
        found: dict[str, v1.StateEntry | None] = {
            key: v1.StateEntry.FromString(state.entries[key]) for key in keys if key in state.entries
        }
        return state.version, found

    def put_entry(self, scope: Scope, key: str, entry: v1.StateEntry | None) -> None:
        states = self._tenants[scope.tenant].states
        state = states.setdefault((scope.kind, scope.id), StateRows())
        if entry is None:
            if state.entries.pop(key, None) is not None:
                _remove(state.keys, key)
            return
        if key not in state.entries:
            insort(state.keys, key)
        state.entries[key] = entry.SerializeToString()

    def entries(self, scope: Scope, query: Query) -> Iterator[Found[tuple[str, v1.StateEntry]]]:
        state = self._state(scope)
        start = 0 if query.after is None else bisect_right(state.keys, str(query.after[0]))
        for key in islice(state.keys, start, None):
            body = state.entries[key]
            yield Found((key,), (key, v1.StateEntry.FromString(body)), len(body))

    def users_with_state(self, tenant: str, query: Query) -> Iterator[Found[str]]:
        users = (user for kind, user in self._tenants[tenant].states if kind == "user")
        for user in sorted(users):
            if query.after is None or (user,) > query.after:
                yield Found((user,), user, len(user))

    def last_revision(self, tenant: str, agent_id: str) -> int:
        return self._agent(tenant, agent_id).last_revision

    def agent(self, tenant: str, agent_id: str, revision: int) -> v1.Agent | None:
        found = self._agent(tenant, agent_id)
        body = found.revisions.get(revision or found.last_revision)
        return None if body is None else v1.Agent.FromString(body)

    def add_revision(self, tenant: str, agent_id: str, agent: v1.Agent) -> None:
        row = self._tenants[tenant].agents.setdefault(agent_id, AgentRows())
        row.last_revision = agent.revision
        row.revisions[agent.revision] = agent.SerializeToString()

    def delete_agent(self, tenant: str, agent_id: str) -> None:
        self._agent(tenant, agent_id).revisions.clear()

    def deleted_agents(self, limit: int) -> list[DeletedAgent]:
        return []

    def retire_revisions(self, agent: DeletedAgent, after: RunPlace, batch: Batch) -> RunPlace | None:
        return None  # a run has its agent with it

    def delete_revisions(self, agent: DeletedAgent, batch: Batch) -> bool:
        return True

    def start_of(self, tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        row = self.session_of_name(tenant, session)
        named = agent or (row.session.agent if row else "")
        agent_id, _, revision = named.removeprefix("agents/").partition("@")
        return row.session if row else None, self.agent(tenant, agent_id, int(revision or 0))

    def agents(self, tenant: str, query: Query) -> Iterator[Found[v1.Agent]]:
        rows = self._tenants[tenant].agents
        for agent_id in sorted(rows):
            body = rows[agent_id].revisions.get(rows[agent_id].last_revision)
            if body is not None and (query.after is None or (agent_id,) > query.after):
                agent = v1.Agent.FromString(body)
                if matches(query.where, agent, AGENT_COLUMNS):
                    yield Found((agent_id,), agent, len(body))

    def revisions(self, tenant: str, agent_id: str, query: Query) -> Iterator[Found[v1.Agent]]:
        rows = self._agent(tenant, agent_id).revisions
        for revision in sorted(rows, reverse=True):
            if query.after is None or (revision,) < query.after:
                yield Found((revision,), v1.Agent.FromString(rows[revision]), len(rows[revision]))

    def refers(self, scope: Scope, key: str, sha256: str) -> bool:
        return sha256 in self._tenants[scope.tenant].references.get((scope, key), ())

    def content_bytes(self, key: SessionKey, until: int) -> int:
        tenant = self._tenants[key.tenant]
        held = tenant.references.get((key.state, ""), {})
        return sum(tenant.blobs[sha256].row.size for sha256, sequence in held.items() if sequence <= until)

    def log_bytes(self, key: SessionKey, until: int) -> int:
        return sum(map(len, self._existing(key).events[:until]))

    def refer(self, scope: Scope, key: str, sha256: str, sequence: int) -> None:
        tenant = self._tenants[scope.tenant]
        tenant.references[scope, key][sha256] = sequence
        tenant.blobs[sha256].references.add((scope, key))

    def drop_references(self, scope: Scope, key: str) -> None:
        tenant = self._tenants[scope.tenant]
        for sha256 in tenant.references.pop((scope, key), ()):
            tenant.blobs[sha256].references.discard((scope, key))

    def has_deleted_sessions(self, tenant: str) -> bool:
        return bool(self._tenants[tenant].deleted)

    def erase_rows(self, tenant: str, batch: Batch) -> None:
        rows = self._tenants.pop(tenant, TenantRows())
        kept = [*(blob.row.content for blob in rows.blobs.values())]
        kept += [upload.content for upload in rows.uploads.values() if not upload.sha256]
        for content in kept:
            self.content.discard(content)
        others = (rows.states, rows.agents, rows.requests, rows.uploads, rows.principals, rows.audit)
        if self.directory.erase_keys(tenant) or kept or any(others):
            batch.takes(0)


def _before(rows: Sequence[P], after: Position | None) -> Iterator[P]:
    """The rows before `after`, which need not be one of them, from the last on."""
    end = len(rows) if after is None else bisect_left(rows, after)
    return (rows[place] for place in range(end - 1, -1, -1))


def _behind(last: Any, rows: Iterable[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Those whose place follows `last`, ascending; all of them for None."""
    return sorted(row for row in rows if last is None or row[0] > last)


def _remove(rows: list[Any], row: Any) -> None:
    """From a list in order, in which it is."""
    del rows[bisect_left(rows, row)]


def _active(key: SessionKey, session: SessionRows, row: RunRow) -> ActiveRun:
    run, agent = v1.Run.FromString(row.body), v1.Agent.FromString(row.agent or b"")
    return ActiveRun(key, run, agent, session.epoch, row.deaths, row.released)


def _position(active: ActiveRun) -> tuple[str, int, str, str]:
    return active.key.tenant, active.run.create_time.ToMicroseconds(), active.key.uid, active.run.name

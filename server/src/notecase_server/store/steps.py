"""What each write and each composed read means: the same steps for every store.

A step first reads and decides, and writes only when nothing can be refused any more; so a step that is refused has
written nothing, and the others of its transaction are kept.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from copy import deepcopy
from itertools import islice
from typing import NamedTuple, Self

import msgspec
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import DecodeError
from notecase import v1

from notecase_server import errors
from notecase_server.store import answers, content, fold, past
from notecase_server.store.contract import (
    REMEMBERED_COMMITS,
    AuditRow,
    CommandId,
    Commit,
    Committed,
    Duplicate,
    Once,
    Page,
    Query,
    Replayed,
    Scope,
    SessionEdit,
    SessionKey,
    microseconds,
)
from notecase_server.store.lists import Found, take
from notecase_server.store.quotas import require_agent, require_keys, require_log, require_record, require_session
from notecase_server.store.sql.tables import Tables
from notecase_server.store.stretches import Stretch, last_of, left_behind
from notecase_server.store.tables import (
    Added,
    Applied,
    Batch,
    Changes,
    CommitRow,
    DeletedAgent,
    EventRow,
    RunPlace,
    SessionRow,
)

KEYS_AT_ONCE = 16
"""Entries of a state that a list of named keys reads at a time."""

REPLIES = 50
"""Runs whose replies are read at one go: a page may end before it has them all."""

SWEEP_ROWS, SWEEP_BYTES, SWEEP_SESSIONS = 250, 1 << 20, 20
"""Rows of deleted sessions that one transaction removes, their bytes and the sessions that they are of: few enough that
commits wait for some milliseconds only."""

FORGET_ROWS = 1000
"""Records of requests dropped in one transaction, which have SWEEP_BYTES together: most have a few hundred bytes."""

FIRST_EPOCH = 1


def commit(tables: Tables, now: int, commit: Commit) -> Committed:
    """Store.commit."""
    key = commit.key
    needs = fold.needs(commit.events, commit.if_state_version)
    found = tables.session_with_runs(key, needs.runs)
    row = found[0] if found is not None else None
    if row is not None and (made := _remembered(row, commit.id)) is not None:
        return _made(tables, key, row, made)
    recall(tables, commit.once)
    if row is not None and commit.command is not None:
        _recall_applied(tables, key, commit.command)
    events, blobs = content.sized(tables, key.tenant, commit.events)
    if refers := any(blobs):
        commit = commit._replace(events=events)
    if commit.create is not None:
        require_free(tables, key)
        row = SessionRow(fold.new_session(key, commit.create, now), FIRST_EPOCH)
    if row is None:
        raise errors.not_found("session", f"sessions/{key.session}")
    rows = fold.Rows(row.session, row.epoch, runs=found[1] if found is not None else {})
    load(tables, key, needs, rows)
    require_record(tables, commit.once)
    if commit.create is not None:
        require_session(tables, key.tenant)
    require_log(tables.quotas, commit, rows.session)
    before = _Before.of(rows)
    done = fold.apply(rows, commit, now)
    if done.state and commit.if_epoch is None:
        for scope in done.state:
            require_keys(tables, scope, _existing(rows.state[scope]) - before.keys[scope])
    if commit.start is None and rows.runs.keys() - before.runs.keys():
        raise ValueError("an event that makes a run wants Commit.start")
    changes = before.changes(rows, commit, done, row.commits)
    if needs.summaries_after is not None:
        changes.stretches = stretches_of(tables, key, done.events)
    if refers:
        referred = _first_references(tables, key.state, done, blobs)
        rows.session.content_bytes += sum(size for _, size in referred.values())
        size, limit = rows.session.content_bytes, commit.content_limit
        if referred and limit is not None and size > limit:
            raise errors.too_large("The content that the session refers to", size, limit)
        changes.references = {sha256: sequence for sha256, (sequence, _) in referred.items()}
    remember(tables, commit.once, done, now, key)
    tables.save(changes)
    if commit.audit is not None:
        add_audit(tables, now, [commit.audit])
    for scope, name, entry in changes.entries:
        if scope.kind != "session":
            content.refer_entry(tables, scope, name, entry)
    if commit.newest:
        messages = tables.messages(key, Query(commit.newest), newest_first=True, step=None, superseded=False)
        done.newest = take(messages, commit.newest)
    return done


class _Before(NamedTuple):
    """What of the rows of a commit there was before it."""

    runs: Mapping[str, v1.Run.State.ValueType]
    messages: Set[str]
    calls: Set[str]
    versions: Mapping[Scope, int]
    keys: Mapping[Scope, int]
    """How many of those it names each state had."""
    expire_time: int

    @classmethod
    def of(cls, rows: fold.Rows) -> Self:
        """Takes note of rows as they were loaded."""
        runs = {name: run.state for name, run in rows.runs.items()}
        keys = {scope: _existing(entries) for scope, entries in rows.state.items()}
        expire_time = microseconds(rows.session.expire_time)
        return cls(runs, set(rows.messages), set(rows.calls), dict(rows.versions), keys, expire_time)

    def changes(self, rows: fold.Rows, commit: Commit, done: Committed, commits: tuple[CommitRow, ...]) -> Changes:
        """Returns what the commit writes after `fold.apply`, except what only the tables know.
        `commits` are those that the session remembered before. Counts the events in the session's log_bytes."""
        events = event_rows(done.events)
        rows.session.log_bytes += sum([len(event.body) for event in events])
        last = rows.session.last_sequence
        if commit.id:
            commits = (*commits, CommitRow(commit.id, last - len(events) + 1, last))[-REMEMBERED_COMMITS:]
        command = None
        if commit.command is not None:
            run = next((event.run for event in reversed(done.events) if event.run), "")
            command = commit.command.command_id, Applied(commit.command.digest, last, run)
        runs = rows.runs.values()
        new = [run for run in runs if run.name not in self.runs]
        ended = [run.name for run in runs if run.state in fold.ENDED]
        return Changes(
            key=commit.key,
            session=SessionRow(rows.session, rows.epoch, commits),
            made=commit.create is not None,
            expiry_moved=commit.create is None and microseconds(rows.session.expire_time) != self.expire_time,
            events=events,
            messages=[message for name, message in rows.messages.items() if name not in self.messages],
            changed_messages=[message for name, message in rows.messages.items() if name in self.messages],
            calls={call_id: holder for call_id, holder in rows.calls.items() if call_id not in self.calls},
            runs=[(run, commit.start) for run in new if commit.start is not None],
            changed_runs=[(run, run.state != self.runs[run.name]) for run in runs if run.name in self.runs],
            ended=ended,
            deaths={} if commit.deaths is None else {name: commit.deaths for name in rows.runs if name not in ended},
            versions={scope: rows.versions[scope] for scope in done.state},
            entries=[
                (scope, key, entry)
                for scope in done.state
                for key, entry in rows.state[scope].items()
                if entry is None or entry.version > self.versions[scope]
            ],
            command=command,
        )


def event_rows(events: Sequence[v1.Event]) -> list[EventRow]:
    """Returns events as they are stored."""
    return [event_row(event, event.SerializeToString()) for event in events]


def event_row(event: v1.Event, body: bytes) -> EventRow:
    """Returns an event as it is stored, with its bytes."""
    added = Added(event.message_added.name, event.run) if event.HasField("message_added") else None
    return EventRow(event.sequence, fold.tells_past(event), added, body)


def stretches_of(tables: Tables, key: SessionKey, events: Sequence[v1.Event]) -> list[Stretch]:
    """Returns what the rewinds among these events leave behind, which the tables do not have yet."""
    made = list[Stretch]()

    def last(before: int) -> Stretch | None:
        return max(filter(None, (tables.last_stretch(key, before), last_of(sorted(made), before))), default=None)

    for event in events:
        if event.HasField("rewound"):
            made += left_behind(last, event.rewound.to_sequence, event.sequence)
    return made


def _existing(entries: Mapping[str, v1.StateEntry | None]) -> int:
    return sum(entry is not None for entry in entries.values())


def _first_references(
    tables: Tables, log: Scope, done: Committed, blobs: list[dict[str, int]]
) -> dict[str, tuple[int, int]]:
    """The blobs that the log refers to from now on: the event that does, and the size, by digest."""
    found: dict[str, tuple[int, int]] = {}
    for event, held in zip(done.events, blobs, strict=True):
        for sha256, size in held.items():
            if sha256 not in found and not tables.refers(log, "", sha256):
                found[sha256] = (event.sequence, size)
    return found


def find_commit(tables: Tables, key: SessionKey, commit_id: str) -> Committed | None:
    """Store.find_commit."""
    row = tables.session(key)
    made = _remembered(row, commit_id) if row is not None else None
    return _made(tables, key, row, made) if row is not None and made is not None else None


def _remembered(row: SessionRow, commit_id: str) -> CommitRow | None:
    for made in row.commits if commit_id else ():
        if made.commit_id == commit_id:
            return made
    return None


def _made(tables: Tables, key: SessionKey, row: SessionRow, made: CommitRow) -> Committed:
    """What a commit returned, but for what has changed since: all that its events touched, read again."""
    events = [found.row for found in tables.events(key, made.first - 1, made.last - made.first + 1)]
    done = Committed(row.session, row.epoch, events, {}, {}, {})
    for event in events:
        calls = {event.tool_started.call_id, event.tool_finished.call_id} - {""}
        touched = [*tables.messages_of_calls(key, calls).values(), tables.message(key, event.message_added.name)]
        done.messages.update((message.name, message) for message in touched if message is not None)
        found = tables.run(key, event.run) if event.run else None
        if found is not None:
            done.runs[event.run] = found[0]
        if event.HasField("state_changed"):
            change = event.state_changed
            scope = fold.state_scope(key, row.session.user, change.state)
            state = done.state.setdefault(scope, v1.State())
            names = [op.key for op in change.ops]
            state.version, entries = tables.state(scope, set(names))
            fold.show_entries(state, entries, names)
    return done


def recall(tables: Tables, once: Once | None) -> None:
    """Store.recall: the first thing that every step with an id does."""
    if once is not None and (recorded := tables.request(once)) is not None:
        if recorded.digest != once.digest:
            raise errors.reused("request_id", once.request_id)
        of_session = recorded.about.startswith("sessions/")
        if of_session and (recorded.response is None or not tables.exists(once.tenant, recorded.owner)):
            raise errors.not_found("session", recorded.about)
        raise Replayed(recorded.response or b"")


def recall_command(tables: Tables, key: SessionKey, command: CommandId | None) -> None:
    """Store.recall_command."""
    if command is not None and tables.exists(key.tenant, key.uid):
        _recall_applied(tables, key, command)


def _recall_applied(tables: Tables, key: SessionKey, command: CommandId) -> None:
    if (applied := tables.command(key, command.command_id)) is not None:
        if applied.digest != command.digest:
            raise errors.reused("command_id", command.command_id)
        raise Duplicate(applied.sequence, applied.run)


def remember(tables: Tables, once: Once | None, result: answers.Result, now: int, of: SessionKey | str = "") -> None:
    """Records a request with its answer. `of` is the session, or the user by name, whose content that holds."""
    if once is not None:
        about, owner = (f"sessions/{of.session}", of.uid) if isinstance(of, SessionKey) else (of, of)
        tables.add_request(once, answers.of(once.answer, result).SerializeToString(), about, owner, now)
        add_audit(tables, now, [once.audit] if once.audit is not None else [])


def add_audit(tables: Tables, now: int, rows: Sequence[AuditRow]) -> None:
    """Store.add_audit."""
    for row in rows:
        entry = deepcopy(row.entry)
        entry.create_time.FromMicroseconds(now)
        tables.directory.add_audit(row.tenant, entry)


def existing(tables: Tables, key: SessionKey) -> SessionRow:
    """Returns the row of a session. Raises NotecaseError SESSION_NOT_FOUND."""
    found = tables.session(key)
    if found is None:
        raise errors.not_found("session", f"sessions/{key.session}")
    return found


def require_free(tables: Tables, key: SessionKey) -> None:
    """Raises NotecaseError ALREADY_EXISTS when a session has the name."""
    if tables.named_session(key.tenant, key.session):
        raise errors.already_exists("session", f"sessions/{key.session}")


def load(tables: Tables, key: SessionKey, needs: fold.Needs, rows: fold.Rows) -> None:
    """Reads what events need besides their session and runs."""
    session = rows.session
    for state, keys in needs.keys.items():
        scope = fold.state_scope(key, session.user, state)
        rows.versions[scope], rows.state[scope] = _entries(tables, scope, keys, needs.values[state])
    if needs.calls:
        held = tables.messages_of_calls(key, needs.calls)
        rows.calls = {call_id: message.name for call_id, message in held.items()}
        rows.messages = {message.name: message for message in held.values()}
    if needs.summaries_after is not None:
        rows.continued = _continued(tables, key, session.summary_sequence, needs.summaries_after)
    for sequence in needs.shown:
        after = Query(1, (sequence - 1,))
        rows.shown.update(found.row.sequence for found in islice(tables.messages(key, after, False, None, False), 1))


def _entries(
    tables: Tables, scope: Scope, keys: Collection[str], values: Collection[str]
) -> tuple[int, dict[str, v1.StateEntry | None]]:
    """Returns what `Tables.state` does. Raises PAYLOAD_TOO_LARGE if the entries that are read are many and large."""
    most = fold.MAX_APPENDED_BYTES
    if len(values) > KEYS_AT_ONCE and (size := tables.entry_bytes(scope, values)) > most:
        raise errors.too_large("The total of all values that one change depends on", size, most)
    return tables.state(scope, keys, values)


def _continued(tables: Tables, key: SessionKey, summary: int, after: int) -> dict[int, int]:
    """What each summary continues, from the one in effect back to the first that is not after `after`."""
    continued = {}
    while summary > max(after, 0):
        (found,) = tables.events(key, summary - 1, 1)
        continued[summary] = found.row.summarized.previous
        summary = continued[summary]
    return continued


def _save_state(
    tables: Tables, scope: Scope, version: int, entries: dict[str, v1.StateEntry | None], before: int
) -> None:
    """`before` is the version the state had: entries that are newer have changed."""
    tables.put_version(scope, version)
    for key, entry in entries.items():
        if entry is None or entry.version > before:
            tables.put_entry(scope, key, entry)
            if scope.kind != "session":
                content.refer_entry(tables, scope, key, entry)


def claim(tables: Tables, key: SessionKey, epoch: int) -> int:
    """Store.claim."""
    row = existing(tables, key)
    if row.epoch != epoch:
        raise errors.owner_lost(key.session)
    tables.put_session(key, row._replace(epoch=epoch + 1))
    return epoch + 1


def edit_session(
    tables: Tables, now: int, key: SessionKey, edit: SessionEdit, if_etag: str, once: Once | None
) -> v1.Session:
    """Store.edit_session."""
    recall(tables, once)
    row = existing(tables, key)
    session = row.session
    if if_etag and if_etag != session.etag:
        raise errors.etag_mismatch(f"sessions/{key.session}", session.etag)
    require_record(tables, once)
    FieldMask(paths=[path for path in edit.paths if path != "remembered"]).MergeMessage(
        edit.session, session, replace_message_field=True, replace_repeated_field=True
    )
    took_back = "remembered" in edit.paths and _take_back(tables, key, session, edit.session)
    if edit.expiry:
        fold.set_expiration(session, edit.session, now)
    fold.touch_session(session, now)
    if once is not None and not took_back:
        once = once._replace(audit=None)
    remember(tables, once, session, now, key)
    tables.put_session(key, row)
    return session


def _take_back(tables: Tables, key: SessionKey, session: v1.Session, given: v1.Session) -> bool:
    """Removes the remembered answers that `given` leaves out, each with all older ones for the same tool of the same
    agent, those of the active run included: an answer that it overruled does not apply again. Answers after the
    last_sequence of `given` stay, unless that is 0. Returns whether it removed any."""
    known = given.last_sequence or session.last_sequence
    missing = [session.remembered[input_id] for input_id in session.remembered.keys() - given.remembered.keys()]
    left_out = [one for one in missing if one.sequence <= known]
    newest = {(one.agent, one.digest): one.sequence for one in sorted(left_out, key=lambda one: one.sequence)}
    found = tables.run(key, session.active_run) if newest and session.active_run else None
    for holder in (session, found[0]) if found is not None else (session,):
        for input_id, one in list(holder.remembered.items()):
            if one.sequence <= newest.get((one.agent, one.digest), 0):
                del holder.remembered[input_id]
    if found is not None:
        tables.put_run(key, found[0], moved=False)
    return bool(left_out)


def delete_session(tables: Tables, now: int, key: SessionKey, if_etag: str, once: Once | None) -> None:
    """Store.delete_session."""
    recall(tables, once)
    session = _undamaged(tables, key)
    etag = session.etag if session is not None else ""
    if if_etag and if_etag != etag:
        raise errors.etag_mismatch(f"sessions/{key.session}", etag)
    remember(tables, once, None, now)
    _delete(tables, key, session)


def _undamaged(tables: Tables, key: SessionKey) -> v1.Session | None:
    """Returns the session, or None if its row does not decode. Raises NotecaseError SESSION_NOT_FOUND."""
    try:
        return existing(tables, key).session
    except (DecodeError, msgspec.DecodeError):
        return None


def _delete(tables: Tables, key: SessionKey, session: v1.Session | None) -> None:
    """Deletes a session by its row, or without one if that is damaged."""
    if session is None:
        runs = set(tables.unended_runs(key))
    else:
        runs = {session.active_run, *(queued.run for queued in session.queued_commands)} - {""}
    for run in runs:
        tables.drop_record(key, run)
    tables.delete_session(key)


EXPIRED_LOOK = 1000
"""Expired sessions among which one is looked for whose row is damaged: it is deleted when fewer are older than it."""


def expire_session(tables: Tables, now: int, key: SessionKey) -> bool:
    """Store.expire_session."""
    if not tables.exists(key.tenant, key.uid):
        return False
    session = _undamaged(tables, key)
    if session is None:  # the time is in a column, too
        expired = key in tables.expired(now, EXPIRED_LOOK)
    else:
        expired = session.HasField("expire_time") and session.expire_time.ToMicroseconds() <= now
    if expired:
        _delete(tables, key, session)
    return expired


def retire_revisions(tables: Tables, now: int, agent: DeletedAgent, after: RunPlace) -> RunPlace | None:
    """One of the first transactions of Store.sweep_agents; returns where the next one begins, None after the last."""
    return tables.retire_revisions(agent, after, Batch(SWEEP_ROWS, SWEEP_BYTES))


def delete_revisions(tables: Tables, now: int, agent: DeletedAgent) -> bool:
    """One of the other transactions of Store.sweep_agents; returns whether it was the last."""
    return tables.delete_revisions(agent, Batch(SWEEP_ROWS, SWEEP_BYTES))


def sweep_sessions(
    tables: Tables, now: int, tenant: str | None, user: str, spared: Collection[Scope] = frozenset()
) -> bool:
    """One of the transactions of Store.sweep_sessions; returns whether it was the last. Nothing is removed of the
    `spared`."""
    batch = Batch(SWEEP_ROWS, SWEEP_BYTES)
    recorded = tables.deleted_sessions(tenant, user, SWEEP_SESSIONS + len(spared))
    found = [scope for scope in recorded if scope not in spared][:SWEEP_SESSIONS]
    return all(tables.delete_rows(scope, batch) for scope in found) and len(found) < SWEEP_SESSIONS


def forget_requests(tables: Tables, now: int, before: int) -> tuple[int, bool]:
    """One of the transactions of Store.forget_requests; returns how many it dropped, and whether it was the last."""
    batch = Batch(FORGET_ROWS, SWEEP_BYTES)
    return tables.forget_requests(before, batch), not batch.full


def erase_state(tables: Tables, now: int, tenant: str, user: str, once: Once | None, last: bool) -> bool:
    """Store.erase_state. Unless it is the `last` step, the principals stay, by which the user's uploads are found."""
    recall(tables, once)
    if tables.session_keys(tenant, user, 1):
        return False
    if tables.deleted_sessions(tenant, user, 1):
        return False
    scope = Scope(tenant, "user", user.removeprefix("users/"))
    if not tables.delete_rows(scope, Batch(SWEEP_ROWS, SWEEP_BYTES)):
        return False
    if not last:
        return True
    if tables.directory.delete_principals(tenant, user, SWEEP_ROWS):
        return False
    remember(tables, once, None, now)
    return True


def whole_run(tables: Tables, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
    """Store.get_run."""
    found = tables.run(key, run)
    if found is not None:
        _resolve_reply(tables, key, found[0])
    return found


def _resolve_reply(tables: Tables, key: SessionKey, run: v1.Run) -> None:
    reply = tables.message(key, run.reply.name) if run.HasField("reply") else None
    if reply is not None:
        run.reply.CopyFrom(reply)


def whole_runs(
    tables: Tables, tenant: str, session: SessionKey | None, query: Query, user: str
) -> Iterator[Found[v1.Run]]:
    """The rows of Store.list_runs, some read at a time, with their replies."""
    rows = tables.runs(tenant, session, query, user)
    while some := list(islice(rows, min(query.limit + 1, REPLIES))):
        names = [(key.uid, found.row.reply.name) for key, found in some if found.row.HasField("reply")]
        replies = tables.named_messages(tenant, names)
        for key, found in some:
            run = found.row
            if run.HasField("reply") and (reply := replies.get((key.uid, run.reply.name))) is not None:
                run.reply.CopyFrom(reply)
            run.name = f"sessions/{key.session}/runs/{run.name}"
            yield Found(found.position, run, run.ByteSize())


def named_entries(tables: Tables, scope: Scope, keys: Sequence[str], at: int) -> v1.State:
    """Store.get_state."""
    if at:
        version, entries = past.state(tables, scope, at, set(keys))
    else:
        version, entries = tables.state(scope, set(keys))
    state = v1.State(version=version)
    fold.show_entries(state, entries, keys)
    return state


def _named(tables: Tables, scope: Scope, keys: Sequence[str]) -> Iterator[tuple[str, v1.StateEntry | None]]:
    """Yields those of the keys that exist, in their order, and reads few at a time: each may have a page."""
    for at in range(0, len(keys), KEYS_AT_ONCE):
        _, entries = tables.state(scope, keys[at : at + KEYS_AT_ONCE])
        yield from sorted(entries.items())


def page_of_entries(
    tables: Tables, scope: Scope, query: Query, at: int, keys: Sequence[str] = ()
) -> tuple[v1.State, Page[str]]:
    """Store.list_state."""
    if at or keys:
        after = str(query.after[0]) if query.after else ""
        found: Iterable[tuple[str, v1.StateEntry | None]]
        if at:
            version, entries = past.state(tables, scope, at, set(keys) or None)
            found = ((key, entries[key]) for key in sorted(entries) if key > after)
        else:
            version = tables.version(scope)
            found = _named(tables, scope, sorted(key for key in set(keys) if key > after))
        rows = (Found((key,), (key, entry), entry.ByteSize()) for key, entry in found if entry is not None)
        page = take(rows, query.limit)
    else:
        version = tables.version(scope)
        page = take(tables.entries(scope, query), query.limit)
    state = v1.State(version=version)
    for key, entry in page.rows:
        state.entries[key].CopyFrom(entry)
    return state, Page([key for key, _ in page.rows], page.next, page.size)


def update_state(
    tables: Tables,
    now: int,
    scope: Scope,
    ops: Sequence[v1.StateOp],
    if_version: int | None,
    once: Once | None,
) -> v1.State:
    """Store.update_state."""
    recall(tables, once)
    ops, _ = content.sized(tables, scope.tenant, ops)
    before, entries = _entries(tables, scope, {op.key for op in ops}, set(fold.read_by(ops)))
    if if_version is not None and if_version != before:
        raise errors.version_mismatch("The state", before)
    version = before + 1
    old_keys = _existing(entries)
    fold.apply_ops(entries, ops, version, now, fold.MAX_APPENDED_BYTES)
    require_record(tables, once)
    require_keys(tables, scope, _existing(entries) - old_keys)
    state = v1.State(version=version)
    fold.show_entries(state, entries, (op.key for op in ops))
    remember(tables, once, state, now, f"users/{scope.id}" if scope.kind == "user" else "")
    _save_state(tables, scope, version, entries, before)
    return state


def create_agent(tables: Tables, now: int, tenant: str, agent_id: str, agent: v1.Agent, once: Once | None) -> v1.Agent:
    """Store.create_agent."""
    recall(tables, once)
    last = tables.last_revision(tenant, agent_id)
    if tables.agent(tenant, agent_id, last) is not None:
        raise errors.already_exists("agent", f"agents/{agent_id}")
    require_record(tables, once)
    require_agent(tables, tenant, agent_id, new=True)
    return _add_revision(tables, now, tenant, agent_id, agent, last + 1, None, once)


def edit_agent(
    tables: Tables,
    now: int,
    tenant: str,
    agent_id: str,
    agent: v1.Agent,
    if_revision: int,
    once: Once | None,
) -> v1.Agent:
    """Store.edit_agent."""
    recall(tables, once)
    last = tables.last_revision(tenant, agent_id)
    newest = tables.agent(tenant, agent_id, last)
    if if_revision != (newest.revision if newest is not None else 0):
        raise errors.etag_mismatch(f"agents/{agent_id}", newest.etag if newest is not None else "")
    require_record(tables, once)
    if newest is not None and _says_the_same(agent, newest):
        remember(tables, once, newest, now)
        return newest
    require_agent(tables, tenant, agent_id, new=newest is None)
    return _add_revision(tables, now, tenant, agent_id, agent, last + 1, newest, once)


def _says_the_same(agent: v1.Agent, newest: v1.Agent) -> bool:
    """Compares two agents by what callers set in them."""
    given = deepcopy(agent)
    given.name, given.revision, given.etag = newest.name, newest.revision, newest.etag
    given.create_time.CopyFrom(newest.create_time)
    given.update_time.CopyFrom(newest.update_time)
    return given == newest


def _add_revision(
    tables: Tables,
    now: int,
    tenant: str,
    agent_id: str,
    agent: v1.Agent,
    revision: int,
    before: v1.Agent | None,
    once: Once | None,
) -> v1.Agent:
    made = deepcopy(agent)
    made.name = f"agents/{agent_id}"
    made.revision = revision
    made.update_time.FromMicroseconds(now)
    made.create_time.CopyFrom(made.update_time if before is None else before.create_time)
    # A revision's number is never used twice under one id, so it alone distinguishes two states of an agent.
    made.etag = f"{revision}"
    remember(tables, once, made, now)
    tables.add_revision(tenant, agent_id, made)
    return made


def delete_agent(tables: Tables, now: int, tenant: str, agent_id: str, if_etag: str, once: Once | None) -> None:
    """Store.delete_agent."""
    recall(tables, once)
    newest = tables.agent(tenant, agent_id, 0)
    if newest is None:
        raise errors.not_found("agent", f"agents/{agent_id}")
    if if_etag and if_etag != newest.etag:
        raise errors.etag_mismatch(f"agents/{agent_id}", newest.etag)
    remember(tables, once, None, now)
    tables.delete_agent(tenant, agent_id)

"""Computes a session as it was: the rows that have changed since a sequence are computed again from the log, and the
current rows serve for the rest. So the cost depends on the changes: reading the log from where they began, and the
changes of state from the first.
"""

from collections.abc import Iterator, Set
from copy import deepcopy

from notecase import v1

from notecase_server import errors
from notecase_server.store import fold
from notecase_server.store.contract import Past, Query, Scope, SessionKey, StepKey
from notecase_server.store.sql.tables import Tables

Entries = dict[str, v1.StateEntry | None]


def read(tables: Tables, key: SessionKey, at: int) -> Past:
    """Store.read_past."""
    session = _session(tables, key, at)
    kept, version, keys = at, tables.version(key.state), set[str]()
    for event in tables.changes(key, at, session.last_sequence):
        if event.HasField("rewound"):
            kept = min(kept, event.rewound.to_sequence)
        elif event.HasField("state_changed") and not keys:
            version = event.state_changed.version - 1
        keys.update(op.key for op in event.state_changed.ops)
    _, entries = _state(tables, key, at, keys) if keys else (0, Entries())
    changed = {message.name for message in tables.changed_messages(key, at)}
    rows = _replayed(tables, key, at, changed)
    runs = [run for run in rows.runs.values() if run.state not in fold.ENDED]
    runs += [run for run in _unended(tables, key, session) if run.last_sequence <= at and run.name not in rows.runs]
    runs.sort(key=lambda run: run.first_sequence)
    messages = {name: rows.messages[name] for name in changed}
    messages |= {message.name: message for run in runs for message in _open(tables, key, at, run, rows)}
    then = _then(session, at, runs, rows)
    then.summary_sequence = _summary(tables, key, at, session.summary_sequence if kept == at else None)
    return Past(
        session=then,
        head=session.last_sequence,
        kept=kept,
        runs=runs,
        messages=sorted(messages.values(), key=lambda message: message.sequence),
        version=version,
        entries={name: entries.get(name) for name in keys},
    )


def state(tables: Tables, scope: Scope, at: int, keys: Set[str] | None = None) -> tuple[int, Entries]:
    """The version of a session's state at that sequence, and the named keys, or all, that had a value then or before.

    Raises NotecaseError SESSION_NOT_FOUND, and SEQUENCE_AHEAD beyond the head."""
    key = SessionKey(scope.tenant, scope.id, scope.id)
    _session(tables, key, at)
    return _state(tables, key, at, keys)


def _session(tables: Tables, key: SessionKey, at: int) -> v1.Session:
    found = tables.session(key)
    if found is None:
        raise errors.not_found("session", f"sessions/{key.session}")
    if at > found.session.last_sequence:
        raise errors.sequence_ahead(at, found.session.last_sequence)
    return found.session


def _state(tables: Tables, key: SessionKey, at: int, keys: Set[str] | None) -> tuple[int, Entries]:
    version, entries = 0, Entries()
    for event in tables.changes(key, 0, at):
        if event.HasField("state_changed"):
            version = event.state_changed.version
            ops = [op for op in event.state_changed.ops if keys is None or op.key in keys]
            fold.apply_ops(entries, ops, version, event.create_time.ToMicroseconds())
    return version, entries


def _summary(tables: Tables, key: SessionKey, at: int, now: int | None) -> int:
    """The summary that was in effect: the one of `now`, or the newest before it that it continues; None if later
    rewinds went back further, so that `now` does not have it."""
    if now is not None:
        while now > at:
            (found,) = tables.events(key, now - 1, 1)
            now = found.row.summarized.previous
        return now
    made: list[int] = []
    for event in tables.changes(key, 0, at):
        if event.HasField("summarized"):
            made.append(event.sequence)
        while event.HasField("rewound") and made and made[-1] > event.rewound.to_sequence:
            made.pop()
    return made[-1] if made else 0


def _replayed(tables: Tables, key: SessionKey, at: int, changed: Set[str]) -> fold.Rows:
    """The messages named and the runs that have changed since, as they were, with all that belongs to the same runs."""
    messages = [message for name in changed if (message := tables.message(key, name)) is not None]
    runs = {run.name: run for run in tables.changed_runs(key, at)}
    for name in {message.run for message in messages if message.run} - runs.keys():
        found = tables.run(key, name)
        assert found is not None
        runs[name] = found[0]
    begin = min(
        [*(message.sequence for message in messages), *(run.first_sequence for run in runs.values())], default=at
    )
    rows = fold.Rows(v1.Session(), 0)
    for found_event in tables.events(key, begin - 1, at - begin + 1) if messages or runs else ():
        event = found_event.row
        sealed = event.tool_finished.call_id in rows.calls
        if event.run in runs or event.message_added.name in changed or sealed or event.HasField("rewound"):
            if event.HasField("state_changed") or event.HasField("summarized"):
                event.ClearField("payload")  # they follow from the changes
            fold.replay(rows, key, event)
    return rows


def _unended(tables: Tables, key: SessionKey, session: v1.Session) -> Iterator[v1.Run]:
    """The runs that have not ended now."""
    for name in {session.active_run, *(queued.run for queued in session.queued_commands)}:
        found = tables.run(key, name)
        if found is not None and found[0].state not in fold.ENDED:
            yield found[0]


def _open(tables: Tables, key: SessionKey, at: int, run: v1.Run, rows: fold.Rows) -> list[v1.Message]:
    """The messages of a run that had not ended, with calls that had not either."""
    if run.name in rows.runs:
        found = [message for message in rows.messages.values() if message.run == run.name]
    else:
        found = [each.row for each in tables.messages(key, Query(1, (at + 1,)), True, StepKey(run.name), True)][:1]
    return [message for message in found if fold.open_calls(message)]


def _then(session: v1.Session, at: int, runs: list[v1.Run], rows: fold.Rows) -> v1.Session:
    then = deepcopy(session)
    then.last_sequence = at
    queued = [one for one in session.queued_commands if one.sequence <= at and one.run not in rows.runs]
    queued = sorted([*queued, *rows.session.queued_commands], key=lambda one: one.sequence)
    then.ClearField("queued_commands")
    then.queued_commands.extend(queued)
    then.active_run = next((run.name for run in runs if run.state != v1.Run.STATE_QUEUED), "")
    return then

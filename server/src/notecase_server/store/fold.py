"""Turns entries of the log into rows of sessions, runs, messages and state; no other module does. Pure: a store reads
the rows that `needs` names, calls `apply` inside its transaction, and writes the changes. KINDS has for each kind of
event the rows that it needs, what it does, and what it does when the log is read again. So all stores keep the same
promises, and the rows can be checked against the log at any time.

A payload that would break a promise is refused, whatever its origin: a second active run or a rewind during a run, and
events of a run that is queued (RUN_ACTIVE) or has ended (RUN_ENDED), a second outcome for a call except by a rewind
(CALL_NOT_PENDING), a second answer to an input (INPUT_NOT_PENDING), an operation that the value's type does not have
(STATE_TYPE_MISMATCH), a summary that does not continue the one in effect or covers what was rewound
(SEQUENCE_MISMATCH).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from notecase import v1

from notecase_server import errors
from notecase_server.store.contract import PAGE_BYTES, Commit, Committed, Past, Scope, SessionKey, microseconds

ENDED = frozenset({v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED, v1.Run.STATE_CANCELLED})
OPEN_OUTCOMES = frozenset({v1.ToolCall.OUTCOME_PENDING, v1.ToolCall.OUTCOME_RUNNING})
"""Outcomes that are still to change."""

MAX_QUEUED = 16
"""Commands that may wait in one session: a person's impatience, not a work queue."""

INT32_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1

MAX_APPENDED_BYTES = 16 << 20
"""Bytes of the lists that one change appends to, together: each is copied once, and written as a whole."""

ITEM_BYTES = 16
"""More than an item of a list takes besides its own bytes."""

MAX_VALUE_DEPTH = 16
"""Levels of lists and maps in a value; each is up to four of protobuf's nested messages."""

PREFIX = "blobs/"
"""Before the digest, in the name of a blob."""

_PREFIX = PREFIX.encode()


@dataclass(slots=True)
class Needs:
    """The rows that a commit reads, in addition to its session."""

    keys: dict[str, set[str]] = field(default_factory=dict)
    """By state, in stored form."""
    values: dict[str, set[str]] = field(default_factory=dict)
    """By state, those of the keys whose entries are read. Of the others it matters only whether they exist."""
    runs: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)
    summaries_after: int | None = None
    """What the summaries made after this sequence continue."""
    shown: set[int] = field(default_factory=set)
    """Sequences of messages, to know whether they are superseded."""


@dataclass(slots=True)
class Rows:
    """Rows as loaded for one commit. A run, message or key that does not exist is absent. After `apply`: as they are to
    be written; an entry of `state` that is None is to be removed."""

    session: v1.Session
    epoch: int
    versions: dict[Scope, int] = field(default_factory=dict)
    state: dict[Scope, dict[str, v1.StateEntry | None]] = field(default_factory=dict)
    runs: dict[str, v1.Run] = field(default_factory=dict)
    messages: dict[str, v1.Message] = field(default_factory=dict)
    """Those that hold one of the calls needed."""
    calls: dict[str, str] = field(default_factory=dict)
    """The message of each call, by id."""
    continued: dict[int, int] = field(default_factory=dict)
    """By the sequence of a summary, that of the one it continues."""
    shown: set[int] = field(default_factory=set)
    """Sequences of messages that are not superseded, of those asked for."""
    sealing: int | None = None
    """Where a rewind went back to, for as long as nothing but the calls it cancels has followed."""
    open: dict[str, dict[str, list[v1.ToolCall]]] = field(default_factory=dict)
    """The open calls of messages that were asked for one, by the message and by their ids: a commit may end a thousand
    calls of one message."""
    pending: dict[str, set[str]] = field(default_factory=dict)
    """The ids in `pending_calls` of runs that were asked for one, by the run."""


def state_scope(key: SessionKey, user: str, state: str) -> Scope:
    """The scope that a state in stored form means in a session of `user` ("users/{user}", or empty).

    Raises NotecaseError INVALID_FIELD for the user's state in a session that has no user."""
    if state == "user":
        if not user:
            raise errors.invalid([errors.Violation("name", "the session has no user, so there is no user state")])
        return Scope(key.tenant, "user", user.removeprefix("users/"))
    return Scope(key.tenant, "app", "") if state == "app" else key.state


def needs(events: Iterable[v1.Event], states: Iterable[str] = ()) -> Needs:
    """What `apply` and `replay` look at for these events, and for the versions of these states."""
    wanted = Needs()
    for event in events:
        if event.run:
            wanted.runs.add(event.run)
        if (name := _kind(event).needs) is not None:
            name(wanted, event)
    for state in states:
        wanted.keys.setdefault(state, set())
        wanted.values.setdefault(state, set())
    return wanted


def new_session(key: SessionKey, session: v1.Session, now: int) -> v1.Session:
    """A session's first row: what the caller chose, and the server's own fields."""
    made = v1.Session(
        name=key.session,
        uid=key.uid,
        display_name=session.display_name,
        agent=session.agent,
        user=session.user,
        labels=session.labels,
    )
    made.activity = v1.Session.ACTIVITY_IDLE
    made.create_time.FromMicroseconds(now)
    set_expiration(made, session, now)
    touch_session(made, now)
    return made


def set_expiration(session: v1.Session, given: v1.Session, now: int) -> None:
    """Takes over when a session expires, as `given` has it; durations count from `now`."""
    for name in ("expire_time", "idle_ttl"):
        session.ClearField(name)
        if given.HasField(name):
            getattr(session, name).CopyFrom(getattr(given, name))
    if given.HasField("ttl"):
        session.expire_time.FromMicroseconds(now + given.ttl.ToMicroseconds())
    elif not session.HasField("expire_time"):
        _rest(session, now)


def _rest(session: v1.Session, now: int) -> None:
    """An idle session expires so long after what was done last; one with a run, under way or queued, is not idle."""
    if session.HasField("idle_ttl"):
        session.ClearField("expire_time")
        if not (session.active_run or session.queued_commands):
            session.expire_time.FromMicroseconds(now + session.idle_ttl.ToMicroseconds())


def touch_session(session: v1.Session, now: int) -> None:
    """Gives changed metadata its next etag: the beginning of the uid and a count, so that an etag of another session
    that had the name does not fit."""
    count = int(session.etag.rpartition("-")[2] or 0) + 1
    session.etag = f"{session.uid[:8]}-{count}"
    session.update_time.FromMicroseconds(now)


def rows_of(past: Past, session: v1.Session, epoch: int) -> Rows:
    """Returns what events need that end the runs of a session as it was; `session` becomes its row behind them."""
    rows = Rows(session, epoch)
    rows.runs = {run.name: deepcopy(run) for run in past.runs}
    rows.messages = {message.name: deepcopy(message) for message in past.messages if open_calls(message)}
    rows.calls = {call.call_id: message.name for message in rows.messages.values() for call in open_calls(message)}
    return rows


def apply(rows: Rows, commit: Commit, now: int) -> Committed:
    """Checks the commit's conditions against `rows`, numbers its events, and applies them to `rows` in place."""
    session = rows.session
    if commit.if_epoch is not None and commit.if_epoch != rows.epoch:
        raise errors.owner_lost(commit.key.session)
    rows.epoch += commit.claim
    if commit.if_last_sequence is not None and commit.if_last_sequence != session.last_sequence:
        raise errors.sequence_mismatch(session.last_sequence)
    for state, version in commit.if_state_version.items():
        scope = state_scope(commit.key, session.user, state)
        if rows.versions.get(scope, 0) != version:
            raise errors.version_mismatch("The state", rows.versions.get(scope, 0))
    done = Committed(session, rows.epoch, [], rows.runs, rows.messages, {})
    early = commit.start is not None and not commit.start.digest
    time = Timestamp()
    time.FromMicroseconds(now)
    for given in commit.events:
        event = v1.Event()
        event.CopyFrom(given)
        session.last_sequence += 1
        event.sequence = session.last_sequence
        event.create_time.CopyFrom(time)
        if not event.principal:
            event.principal = commit.principal
        _apply_event(rows, commit.key, event, early, _kind(event).does)
        if event.HasField("rewound"):
            _leave_behind(rows, event)
        elif event.HasField("state_changed"):
            _tell_state(rows, commit.key, event, done)
        done.events.append(event)
    if done.events:
        session.update_time.CopyFrom(time)
        _rest(session, now)
    return done


def replay(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    """Applies an entry of the log once more, as `apply` did when it was new, to rows that hold all that it is about.
    The state of users and the app is left alone."""
    session = rows.session
    session.last_sequence = event.sequence
    session.update_time.CopyFrom(event.create_time)
    early = event.run not in rows.runs and event.run_state_changed.state == v1.Run.STATE_CANCELLED
    kind = _kind(event)
    _apply_event(rows, key, event, early, kind.replayed or kind.does)


def tells_past(event: v1.Event) -> bool:
    """Whether earlier rows depend on it: it changed the session's state, summarised, or rewound."""
    tells = _kind(event).tells_past
    return tells is not None and tells(event)


def _kind(event: v1.Event) -> "Kind":
    return KINDS.get(event.WhichOneof("payload") or "", OTHER)


def _apply_event(rows: Rows, key: SessionKey, event: v1.Event, early: bool, does: "Does") -> None:
    """`early` says that it may be a run's end before its start."""
    if event.run or not event.HasField("tool_finished"):
        rows.sealing = None
    if event.run and not (event.HasField("run_started") or event.command_queued.HasField("start")):
        _go_on(rows, key, event, early)
    does(rows, key, event)


def _go_on(rows: Rows, key: SessionKey, event: v1.Event, early: bool) -> None:
    """Checks that an event of a run may come now."""
    run = rows.runs.get(event.run)
    if early:
        # A cancel that came before its start: the run is over before it was.
        if run is not None:
            raise errors.already_exists("run", _run_name(key, event.run))
        run = rows.runs[event.run] = v1.Run(
            name=event.run, first_sequence=event.sequence, create_time=event.create_time
        )
    if run is None:
        raise errors.not_found("run", _run_name(key, event.run))
    if run.state in ENDED:
        raise errors.run_ended(_run_name(key, event.run), run.state)
    if run.state == v1.Run.STATE_QUEUED and event.run_state_changed.state not in ENDED:
        raise errors.run_active(_run_name(key, rows.session.active_run or event.run))
    run.last_sequence = event.sequence


def _run_name(key: SessionKey, run: str) -> str:
    return f"sessions/{key.session}/runs/{run}"


def _change_state(rows: Rows, key: SessionKey, event: v1.Event, most: int | None = MAX_APPENDED_BYTES) -> None:
    change = event.state_changed
    scope = state_scope(key, rows.session.user, change.state)
    version = rows.versions[scope] = rows.versions.get(scope, 0) + 1
    apply_ops(rows.state.setdefault(scope, {}), change.ops, version, event.create_time.ToMicroseconds(), most)
    for op in change.ops:
        op.ClearField("if_version")
    change.version = version


def _change_own_state(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    if not event.state_changed.state:
        _change_state(rows, key, event, None)


def _tell_state(rows: Rows, key: SessionKey, event: v1.Event, done: Committed) -> None:
    """Adds to what a commit returns the state that an event has changed."""
    change = event.state_changed
    scope = state_scope(key, rows.session.user, change.state)
    told = done.state.setdefault(scope, v1.State())
    told.version = change.version
    show_entries(told, rows.state[scope], (op.key for op in change.ops))


def _rewind(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    """All that a rewind restores by itself: what must be spelled out, calls and state, follows it. Answers that were
    remembered later are taken back; what the runs that ended remembered is left with them. Messages are marked as they
    are read: see `stretches`."""
    if rows.session.active_run:
        raise errors.run_active(_run_name(key, rows.session.active_run))
    rows.sealing = event.rewound.to_sequence
    remembered = rows.session.remembered
    for input_id in [key for key, answer in remembered.items() if answer.sequence > event.rewound.to_sequence]:
        del remembered[input_id]
    while rows.session.summary_sequence > event.rewound.to_sequence:
        rows.session.summary_sequence = rows.continued[rows.session.summary_sequence]


def _leave_behind(rows: Rows, event: v1.Event) -> None:
    """Marks the messages of the same commit, which its caller gets back."""
    for message in rows.messages.values():
        if message.sequence > event.rewound.to_sequence and message.status != v1.Message.STATUS_SUPERSEDED:
            message.status = v1.Message.STATUS_SUPERSEDED
            message.update_sequence = event.sequence


def _summarize(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    session, summary = rows.session, event.summarized
    if summary.previous != session.summary_sequence or summary.last_sequence not in rows.shown:
        raise errors.sequence_mismatch(event.sequence - 1)
    session.summary_sequence = event.sequence
    rows.continued[event.sequence] = summary.previous


def _summarize_again(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    rows.shown.add(event.summarized.last_sequence)
    _summarize(rows, key, event)


def _add_message(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    message = event.message_added
    message.sequence = message.update_sequence = event.sequence
    message.create_time.CopyFrom(event.create_time)
    message.run = event.run
    rows.messages[message.name] = v1.Message.FromString(message.SerializeToString())
    for part in message.parts:
        if part.HasField("tool_call"):
            rows.calls[part.tool_call.call_id] = message.name
    if event.run and message.role == v1.Message.ROLE_ASSISTANT and message.status == v1.Message.STATUS_COMPLETED:
        rows.runs[event.run].reply.CopyFrom(v1.Message(name=message.name, sequence=message.sequence))
    _take_up_cause(rows.session, event)


def _start_run(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    session = rows.session
    if session.active_run:
        raise errors.run_active(_run_name(key, session.active_run))
    run = rows.runs.get(event.run)
    if run is None:
        run = rows.runs[event.run] = v1.Run(
            name=event.run, first_sequence=event.sequence, create_time=event.create_time
        )
    elif run.state != v1.Run.STATE_QUEUED:
        raise errors.already_exists("run", _run_name(key, event.run))
    _describe(run, event.run_started)
    run.last_sequence = event.sequence
    run.state = v1.Run.STATE_RUNNING
    run.state_time.CopyFrom(event.create_time)
    run.attempt = 1
    session.active_run = event.run
    session.activity = v1.Session.ACTIVITY_RUNNING
    _take_up_cause(session, event)


def _describe(run: v1.Run, started: v1.RunStarted) -> None:
    run.agent = started.agent
    run.agent_revision = started.agent_revision
    run.labels.update(started.labels)
    run.ClearField("client_tools")
    run.client_tools.extend(started.client_tools)
    if started.HasField("limits"):
        run.limits.CopyFrom(started.limits)
    if started.HasField("disconnect"):
        run.disconnect.CopyFrom(started.disconnect)


def _change_run(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    session, change, run = rows.session, event.run_state_changed, rows.runs[event.run]
    if run.state == v1.Run.STATE_RUNNING:
        ran = microseconds(event.create_time) - microseconds(run.state_time) - microseconds(change.place_wait)
        run.running_duration.FromMicroseconds(microseconds(run.running_duration) + max(ran, 0))
    run.state = change.state
    run.state_time.CopyFrom(event.create_time)
    run.attempt = change.attempt or run.attempt
    if change.state not in ENDED:
        waits = change.state == v1.Run.STATE_WAITING
        session.activity = v1.Session.ACTIVITY_WAITING if waits else v1.Session.ACTIVITY_RUNNING
        return
    if change.HasField("error"):
        run.error.CopyFrom(change.error)
    run.end_time.CopyFrom(event.create_time)
    _take_up(session, lambda queued: queued.run == event.run)
    if session.active_run == event.run:
        session.active_run = ""
        session.activity = v1.Session.ACTIVITY_IDLE


def _queue(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    queued = event.command_queued
    if queued.HasField("cancel"):
        rows.runs[event.run].ending = True
        return
    if len(rows.session.queued_commands) >= MAX_QUEUED:
        raise errors.queue_full(MAX_QUEUED)
    if queued.HasField("start"):
        if event.run in rows.runs:
            raise errors.already_exists("run", _run_name(key, event.run))
        rows.runs[event.run] = v1.Run(
            name=event.run,
            agent=queued.start.agent,
            state=v1.Run.STATE_QUEUED,
            first_sequence=event.sequence,
            last_sequence=event.sequence,
            create_time=event.create_time,
            state_time=event.create_time,
            labels=queued.start.labels,
        )
    rows.session.queued_commands.add(command_id=event.cause_id, sequence=event.sequence, run=event.run)


def _take_up_cause(session: v1.Session, event: v1.Event) -> None:
    """Takes the command that this event carries out from the queue."""
    if event.cause_id:
        _take_up(session, lambda queued: queued.run == event.run and queued.command_id == event.cause_id)


def _take_up(session: v1.Session, taken: Callable[[v1.QueuedCommand], bool]) -> None:
    if not session.queued_commands:
        return
    left = [queued for queued in session.queued_commands if not taken(queued)]
    if len(left) < len(session.queued_commands):
        session.ClearField("queued_commands")
        session.queued_commands.extend(left)


def _call(rows: Rows, call_id: str, run: str) -> tuple[v1.Message, v1.ToolCall]:
    """The open call of the run with its message; NotecaseError CALL_NOT_PENDING."""
    message = rows.messages.get(rows.calls.get(call_id, ""))
    if message is not None and message.run == run and (found := _open(rows, message).get(call_id)):
        return message, found[0]
    raise errors.call_not_pending(call_id)


def _open(rows: Rows, message: v1.Message) -> dict[str, list[v1.ToolCall]]:
    """The open calls of a message by their ids. Two with one id come from imports only."""
    found = rows.open.get(message.name)
    if found is None:
        found = rows.open[message.name] = {}
        for call in open_calls(message):
            found.setdefault(call.call_id, []).append(call)
    return found


def _change_call(rows: Rows, message: v1.Message, call: v1.ToolCall, changed: v1.ToolCall) -> None:
    """Makes an open call of a message what an event says of it."""
    call.CopyFrom(changed)
    if call.outcome not in OPEN_OUTCOMES:
        held = _open(rows, message)
        held[call.call_id].pop(0)
        if not held[call.call_id]:
            del held[call.call_id]


def _start_call(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    message, call = _call(rows, event.tool_started.call_id, event.run)
    run = rows.runs[event.run]
    run.tool_calls += call.outcome == v1.ToolCall.OUTCOME_PENDING
    _drop_pending(rows, run, call.call_id)
    event.tool_started.start_time.CopyFrom(event.create_time)
    _change_call(rows, message, call, event.tool_started)
    message.update_sequence = event.sequence
    if call.client_executed:
        run.pending_calls.append(call)
        _pending(rows, run).add(call.call_id)


def _finish_call(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    if not event.run:
        _seal_call(rows, event)
        return
    message, call = _call(rows, event.tool_finished.call_id, event.run)
    if call.HasField("start_time"):
        took = event.create_time.ToMicroseconds() - call.start_time.ToMicroseconds()
        event.tool_finished.start_time.CopyFrom(call.start_time)
        event.tool_finished.elapsed.FromMicroseconds(max(took, 0))
    _change_call(rows, message, call, event.tool_finished)
    _complete(rows, message, event)
    _drop_pending(rows, rows.runs[event.run], call.call_id)


def _seal_call(rows: Rows, event: v1.Event) -> None:
    """A call that was open where a rewind went back to is cancelled, whatever became of it since."""
    sealed = event.tool_finished
    message = rows.messages.get(rows.calls.get(sealed.call_id, ""))
    behind = rows.sealing is not None and message is not None and message.sequence <= rows.sealing
    if message is None or not behind or sealed.outcome != v1.ToolCall.OUTCOME_CANCELLED:
        raise errors.call_not_pending(sealed.call_id)
    for part in message.parts:
        if part.tool_call.call_id == sealed.call_id:
            part.tool_call.CopyFrom(sealed)
    _open(rows, message).pop(sealed.call_id, None)
    _complete(rows, message, event)


def _complete(rows: Rows, message: v1.Message, event: v1.Event) -> None:
    """Takes note that one of its calls has an outcome."""
    if message.status == v1.Message.STATUS_IN_PROGRESS and not _open(rows, message):
        message.status = v1.Message.STATUS_COMPLETED
    message.update_sequence = event.sequence


def _pending(rows: Rows, run: v1.Run) -> set[str]:
    """The ids in `pending_calls` of a run."""
    found = rows.pending.get(run.name)
    if found is None:
        found = rows.pending[run.name] = {call.call_id for call in run.pending_calls}
    return found


def _drop_pending(rows: Rows, run: v1.Run, call_id: str) -> None:
    """Takes a call from those that wait, if it is one of them; each is there once, and the first ones end first."""
    if call_id not in (held := _pending(rows, run)):
        return
    held.discard(call_id)
    for index, pending in enumerate(run.pending_calls):
        if pending.call_id == call_id:
            del run.pending_calls[index]
            return


def open_calls(message: v1.Message) -> list[v1.ToolCall]:
    """The calls of a message that have no outcome yet, in order."""
    return [part.tool_call for part in message.parts if part.tool_call.outcome in OPEN_OUTCOMES]


def _request_input(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    rows.runs[event.run].pending_inputs.append(event.input_requested)


def _resolve_input(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    response, run = event.input_resolved.response, rows.runs[event.run]
    asked = _take_input(run, response.input_id)
    if asked.kind == v1.InputRequest.KIND_APPROVAL:
        call = asked.call
        answer = v1.RememberedApproval(
            agent=run.agent,
            tool=call.tool,
            digest=call.binding.digest,
            approved=response.decision == v1.InputResponse.DECISION_APPROVE,
            sequence=event.sequence,
        )
        if response.remember == v1.InputResponse.REMEMBER_RUN:
            run.remembered[response.input_id].CopyFrom(answer)
        elif response.remember == v1.InputResponse.REMEMBER_SESSION:
            rows.session.remembered[response.input_id].CopyFrom(answer)


def _take_input(run: v1.Run, input_id: str) -> v1.InputRequest:
    """Takes a request from those that wait. Raises NotecaseError INPUT_NOT_PENDING."""
    for index, pending in enumerate(run.pending_inputs):
        if pending.input_id == input_id:
            asked = deepcopy(pending)
            del run.pending_inputs[index]
            return asked
    raise errors.input_not_pending(input_id)


def can_hold(value: v1.Value, depth: int = 1) -> bool:
    """Whether a state can: numbers are finite, no value is missing, and lists and maps have at most MAX_VALUE_DEPTH
    levels, since protobuf parsers stop at 100 nested messages and what was committed must be readable in an event."""
    held: Iterable[v1.Value]  # never made a list of: that takes a second at once where there are a million
    match value.WhichOneof("kind"):
        case None:
            return False
        case "double_value":
            return math.isfinite(value.double_value)
        case "list_value":
            held = value.list_value.values
        case "map_value":
            held = value.map_value.values.values()
        case _:
            return True
    return depth <= MAX_VALUE_DEPTH and all(can_hold(item, depth + 1) for item in held)


MAX_KEY_BYTES = 256

RESERVED_KEYS = frozenset({"user", "app"})
"""Which no key of a session's state has: templates name the other states so."""


def keys_fit(ops: Iterable[v1.StateOp]) -> bool:
    """Whether each key is one that a session's state may be given."""
    return all(0 < len(op.key.encode()) <= MAX_KEY_BYTES and op.key not in RESERVED_KEYS for op in ops)


def ops_fit(ops: Iterable[v1.StateOp]) -> bool:
    """Whether a state can hold what each operation gives it. What is larger than a page is not looked into, and
    keys are not looked at: a log may have others than may be set now."""
    for op in ops:
        kind = op.WhichOneof("op")
        if kind is None:
            return False
        if kind in {"set", "append"}:
            value: v1.Value = getattr(op, kind)
            if value.ByteSize() > PAGE_BYTES or not can_hold(value, depth=1 if kind == "set" else 2):
                return False
    return True


def show_entries(told: v1.State, entries: dict[str, v1.StateEntry | None], keys: Iterable[str]) -> None:
    """Puts the named keys into `told` with their current values; those that do not exist are left out. A key may be
    named often: a change of a long list by many operations."""
    for key in dict.fromkeys(keys):
        entry = entries.get(key)
        if entry is None:
            told.entries.pop(key, None)
        else:
            told.entries[key].CopyFrom(entry)


def read_by(ops: Iterable[v1.StateOp]) -> Iterator[str]:
    """Yields the keys whose entries operations depend on."""
    for op in ops:
        if op.HasField("if_version") or op.HasField("append") or op.HasField("increment"):
            yield op.key


def apply_ops(
    entries: dict[str, v1.StateEntry | None],
    ops: Iterable[v1.StateOp],
    version: int,
    now: int,
    most: int | None = None,
) -> None:
    """Applies operations in order to the entries of one state, in place; all of them get `version`. Entries that are
    not of `read_by` may be empty.

    Raises STATE_VERSION_MISMATCH for a condition that misses, STATE_TYPE_MISMATCH for an operation that the value's
    type does not have, PAYLOAD_TOO_LARGE for a value that outgrows a page, or for lists that are appended to and have
    more than `most` bytes together; `entries` is then to be thrown away."""
    copied = 0
    lists = dict[str, int]()
    """The lists that were copied to be appended to, with at least as many bytes as they have."""
    for op in ops:
        before = entries.get(op.key)
        if op.HasField("if_version") and op.if_version != (before.version if before else 0):
            raise errors.version_mismatch(f"State key {op.key!r}", before.version if before else 0)
        kind = op.WhichOneof("op")
        if kind == "append" and before is not None and op.key in lists:
            before.value.list_value.values.append(op.append)
            lists[op.key] += op.append.ByteSize() + ITEM_BYTES
            if lists[op.key] > PAGE_BYTES:
                lists[op.key] = _size_of(op.key, before)
            continue
        lists.pop(op.key, None)
        if kind == "remove":
            entries[op.key] = None
            continue
        entry = v1.StateEntry(version=version)
        entry.update_time.FromMicroseconds(now)
        if kind == "set":
            entry.value.CopyFrom(op.set)
        elif kind == "increment":
            entry.value.int_value = _incremented(op, before)
        else:
            if before is not None and not before.value.HasField("list_value"):
                raise errors.type_mismatch(op.key, "append needs a list or a missing key")
            entry.value.list_value.SetInParent()
            if before is not None:
                entry.value.list_value.CopyFrom(before.value.list_value)
            entry.value.list_value.values.append(op.append)
            lists[op.key] = entry.ByteSize()
            copied += lists[op.key]
            if most is not None and copied > most:
                raise errors.too_large("The total of all lists that one change appends to", copied, most)
        _size_of(op.key, entry)
        entries[op.key] = entry


def _size_of(key: str, entry: v1.StateEntry) -> int:
    """Returns the bytes of an entry. Raises PAYLOAD_TOO_LARGE when it outgrows a page."""
    size = entry.ByteSize()
    if size > PAGE_BYTES:
        raise errors.too_large(f"The value of state key {key!r}", size, PAGE_BYTES)
    return size


def _incremented(op: v1.StateOp, before: v1.StateEntry | None) -> int:
    if before is not None and not before.value.HasField("int_value"):
        raise errors.type_mismatch(op.key, "increment needs an int or a missing key")
    total = (before.value.int_value if before else 0) + op.increment
    if not -INT64_MAX - 1 <= total <= INT64_MAX:
        raise errors.type_mismatch(op.key, "the sum does not fit into 64 bits")
    return total


def add_usage(total: v1.Usage, one: v1.Usage) -> None:
    """Adds one model call's usage to a sum, whose numbers end at the largest that fit: a provider may name any."""
    total.model = one.model if not total.model_calls or total.model == one.model else ""
    total.provider = one.provider if not total.model_calls or total.provider == one.provider else ""
    total.input_tokens = min(total.input_tokens + one.input_tokens, INT64_MAX)
    total.cached_input_tokens = min(total.cached_input_tokens + one.cached_input_tokens, INT64_MAX)
    total.output_tokens = min(total.output_tokens + one.output_tokens, INT64_MAX)
    total.reasoning_tokens = min(total.reasoning_tokens + one.reasoning_tokens, INT64_MAX)
    total.model_calls = min(total.model_calls + one.model_calls, INT32_MAX)


def _use(rows: Rows, key: SessionKey, event: v1.Event) -> None:
    add_usage(rows.session.usage, event.usage)
    if event.run:
        add_usage(rows.runs[event.run].usage, event.usage)


def _need_keys(needs: Needs, event: v1.Event) -> None:
    change = event.state_changed
    needs.keys.setdefault(change.state, set()).update(op.key for op in change.ops)
    needs.values.setdefault(change.state, set()).update(read_by(change.ops))


def _need_call(needs: Needs, event: v1.Event) -> None:
    needs.calls |= {event.tool_started.call_id, event.tool_finished.call_id} - {""}


def _need_summaries(needs: Needs, event: v1.Event) -> None:
    back = event.rewound.to_sequence
    needs.summaries_after = back if needs.summaries_after is None else min(back, needs.summaries_after)


def _need_shown(needs: Needs, event: v1.Event) -> None:
    needs.shown.add(event.summarized.last_sequence)


Does = Callable[[Rows, SessionKey, v1.Event], None]


class Kind(NamedTuple):
    """A kind of event: all that the fold knows of it."""

    does: Does = lambda _rows, _key, _event: None
    """Applies it to the rows, and sets what the server sets in it."""
    needs: Callable[[Needs, v1.Event], None] | None = None
    """Names the rows that it reads, but for its run; None for no others."""
    replayed: Does | None = None
    """Applies it when it is read again; None: as when it was new."""
    tells_past: Callable[[v1.Event], bool] | None = None
    """Whether earlier rows depend on it; None for never."""


KINDS: Mapping[str, Kind] = {
    "state_changed": Kind(_change_state, _need_keys, _change_own_state, lambda event: not event.state_changed.state),
    "message_added": Kind(_add_message),
    "tool_started": Kind(_start_call, _need_call),
    "tool_finished": Kind(_finish_call, _need_call),
    "input_requested": Kind(_request_input),
    "input_resolved": Kind(_resolve_input),
    "rewound": Kind(_rewind, _need_summaries, tells_past=lambda _: True),
    "summarized": Kind(_summarize, _need_shown, _summarize_again, lambda _: True),
    "command_queued": Kind(_queue),
    "usage": Kind(_use),
    "run_started": Kind(_start_run),
    "run_state_changed": Kind(_change_run),
}
"""By payload. Events of other kinds are facts that change no row."""

OTHER = Kind()


class TooManyError(Exception):
    """A message has more messages within it than are looked at."""


def references(message: Message, most: int | None = None) -> list[v1.Blob]:
    """Every blob that a message refers to, however deep, as it stands there. Raises TooManyError where there are more
    than `most` messages within it."""
    # Nearly no message has any, and the bytes tell at once; that a text may say the same only costs a look.
    if _PREFIX not in message.SerializeToString():
        return []
    found, left, seen = list[v1.Blob](), [message], 0
    while left:
        each = left.pop()
        if isinstance(each, v1.Blob):
            found.append(each)
            continue
        within = [inner for described, held in each.ListFields() for inner in _messages(described, held, most)]
        seen += len(within)
        if most is not None and seen > most:
            raise TooManyError
        left += reversed(within)
    return found


def _messages(described: Any, held: Any, most: int | None) -> Sequence[Message]:
    """The messages of a field; of a list that is longer than `most`, as many as show that."""
    kind = described.message_type
    if kind is None:
        return ()
    if not described.is_repeated:
        return (held,)
    if most is not None and len(held) > most:
        raise TooManyError
    if not kind.GetOptions().map_entry:
        return list(held)
    return list(held.values()) if kind.fields_by_name["value"].message_type is not None else ()

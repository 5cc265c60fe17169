"""Rebuilds a session from its events. Two views that were given the same events are equal, however these arrived.

A program that follows a session does not have to fetch its messages, state or runs: this fold over the log has them.
"""

from collections.abc import Callable, Iterable, MutableSequence
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from notecase import v1

M = TypeVar("M", bound=Message)

ENDED = frozenset({v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED, v1.Run.STATE_CANCELLED})
OPEN_OUTCOMES = frozenset({v1.ToolCall.OUTCOME_PENDING, v1.ToolCall.OUTCOME_RUNNING})


class Gap(Exception):
    """Something is missing before an event: attach again after `SessionView.last_sequence`."""


@dataclass
class Block:
    """The received beginning of one part of an unfinished message."""

    kind: str
    """"text", "json", "reasoning", "arguments" or "refusal"."""
    text: str = ""
    end: int = 0
    """The length of `text` in bytes of UTF-8."""
    call_id: str = ""
    tool: str = ""


@dataclass
class SessionView:
    """One session as its events describe it; `attach` and `apply` keep it up to date. Equal events make equal views.

    Made with the sequence that the first event follows: 0 for a whole log, None when the first event may be any.
    Messages, runs and values belong to the view: read them, or copy them.
    """

    last_sequence: int | None = 0
    """The newest event of the log in the view, after which to attach again. None before the first."""
    messages: dict[str, v1.Message] = field(default_factory=dict)
    """Complete messages by name, oldest first, with the outcomes of their calls. A rewind makes them superseded."""
    open: dict[str, dict[int, Block]] = field(default_factory=dict)
    """The blocks of unfinished messages, by message name and part index."""
    state: dict[str, v1.Value] = field(default_factory=dict)
    """The session's own state: all of it in a view of the whole log. In another view it holds only what was set since,
    and is incomplete but not wrong: the result of an increment of an unknown value is unknown."""
    runs: dict[str, v1.Run] = field(default_factory=dict)
    """Runs by name, queued ones too, in the order in which they were accepted."""
    queued: list[v1.QueuedCommand] = field(default_factory=list)
    """The session's queued commands, in order, as far as the view has their events."""
    remembered: dict[str, v1.RememberedApproval] = field(default_factory=dict)
    """Remembered answers for later calls in this session, by the input_id that each answered, as far as the view has
    their events. The newest for one agent and digest applies."""
    summaries: dict[int, v1.Summarized] = field(default_factory=dict)
    """Summaries by sequence, as far as the view has their events. The last one replaces older messages for the model;
    it extends the earlier ones."""
    _whole: bool = field(default=False, init=False, repr=False, compare=False)
    _writers: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The run that writes each unfinished message."""

    def __post_init__(self) -> None:
        self._whole = self.last_sequence == 0

    @property
    def run(self) -> v1.Run | None:
        """The run that is running or waiting, otherwise the newest one; see its state. None before the first."""
        for run in reversed(self.runs.values()):
            if run.state in {v1.Run.STATE_RUNNING, v1.Run.STATE_WAITING}:
                return run
        return next(reversed(self.runs.values()), None)

    def attach(self, attached: v1.Attached) -> None:
        """Takes the first frame of a stream, and forgets the open blocks, which the stream sends again.

        A run that started before the view is taken as the server reports it, which may be ahead of the events."""
        self.open.clear()
        self._writers.clear()
        run, seen = attached.run, self.last_sequence
        if run.name and run.name not in self.runs and seen is not None and seen >= run.first_sequence:
            self.runs[run.name] = _copy(run)

    def apply(self, event: v1.Event) -> bool:
        """Takes the next event and returns whether it was new; an event of the log that the view has is ignored.

        Raises Gap, with the view unchanged, when an event of the log or a piece of a block is missing before it."""
        if event.sequence:
            if self.last_sequence is None:
                self.last_sequence = event.sequence - 1
                self._whole = event.sequence == 1
            if event.sequence <= self.last_sequence:
                return False
            if event.sequence != self.last_sequence + 1:
                raise Gap(f"event {event.sequence} came after {self.last_sequence}")
            self.last_sequence = event.sequence
        match event.WhichOneof("payload"):
            case "block_delta":
                self._grow(event.block_delta)
                self._writers[event.block_delta.message] = event.run
            case "message_discarded":
                self._close(event.message_discarded.message)
            case "message_added":
                self._close(event.message_added.name)
                self.messages[event.message_added.name] = _copy(event.message_added)
            case "state_changed" if event.state_changed.state.startswith("sessions/"):
                self._change_state(event.state_changed.ops)
            case "rewound":
                self._supersede(event)
            case "summarized":
                self.summaries[event.sequence] = _copy(event.summarized)
            case "run_state_changed":
                self._close_all(event.run)
        self._follow_run(event)
        self._follow_call(event)
        self._follow_queue(event)
        return True

    def _close(self, message: str) -> None:
        self.open.pop(message, None)
        self._writers.pop(message, None)

    def _close_all(self, run: str) -> None:
        """Forgets the unfinished messages of a run; those of another run stay open."""
        for message, writer in list(self._writers.items()):
            if writer == run or "" in {writer, run}:
                self._close(message)

    def _grow(self, delta: v1.BlockDelta) -> None:
        kind = delta.WhichOneof("delta")
        if kind is None:  # of a kind that this version of the client does not know
            return
        piece: str = getattr(delta, kind)
        blocks = self.open.get(delta.message, {})
        block = blocks.get(delta.block)
        if delta.start == 0:
            block = Block(kind, call_id=delta.call_id, tool=delta.tool)
        if block is None or block.end != delta.start or delta.start + len(piece.encode()) != delta.end:
            have = block.end if block else 0
            raise Gap(f"bytes {delta.start} to {delta.end} of block {delta.block} came after {have}")
        block.text += piece
        block.end = delta.end
        self.open.setdefault(delta.message, blocks)[delta.block] = block

    def _supersede(self, event: v1.Event) -> None:
        """Marks messages as superseded. A reply may be newer than the rewind, in a run that `attach` took ahead of its
        events."""
        replies = (run.reply for run in self.runs.values() if run.HasField("reply"))
        for message in (*self.messages.values(), *replies):
            gone = event.rewound.to_sequence < message.sequence < event.sequence
            if gone and message.status != v1.Message.STATUS_SUPERSEDED:
                message.status = v1.Message.STATUS_SUPERSEDED
                message.update_sequence = event.sequence
        kept = event.rewound.to_sequence
        self.summaries = {sequence: made for sequence, made in self.summaries.items() if sequence <= kept}
        self.remembered = {asked: answer for asked, answer in self.remembered.items() if answer.sequence <= kept}

    def _find_call(self, call_id: str) -> tuple[v1.Message, v1.ToolCall] | None:
        """Returns a call with its message, or None when the message is older than the view."""
        for message in reversed(self.messages.values()):
            for part in message.parts:
                if part.HasField("tool_call") and part.tool_call.call_id == call_id:
                    return message, part.tool_call
        return None

    def _follow_call(self, event: v1.Event) -> None:
        finished = event.HasField("tool_finished")
        if not finished and not event.HasField("tool_started"):
            return
        told = event.tool_finished if finished else event.tool_started
        if found := self._find_call(told.call_id):
            message, call = found
            call.CopyFrom(told)
            message.update_sequence = event.sequence
            waits = any(part.tool_call.outcome in OPEN_OUTCOMES for part in message.parts)
            if message.status == v1.Message.STATUS_IN_PROGRESS and not waits:
                message.status = v1.Message.STATUS_COMPLETED

    def _change_state(self, ops: Iterable[v1.StateOp]) -> None:
        for op in ops:
            known = self.state.get(op.key)
            match op.WhichOneof("op"):
                case "set":
                    self.state[op.key] = _copy(op.set)
                case "remove":
                    self.state.pop(op.key, None)
                case "increment" if known is not None or self._whole:
                    self.state[op.key] = v1.Value(int_value=(known.int_value if known else 0) + op.increment)
                case "append" if known is not None or self._whole:
                    held = self.state.setdefault(op.key, v1.Value(list_value=v1.ValueList()))
                    held.list_value.values.append(op.append)

    def _follow_run(self, event: v1.Event) -> None:
        run = self.runs.get(event.run)
        queued = event.command_queued
        if run is None:
            # A run that is cancelled before its start begins with its end. In a view that may have missed the start, an
            # end does not show where the run began.
            sealed = self._whole and event.HasField("run_state_changed")
            if not (event.HasField("run_started") or queued.HasField("start") or sealed):
                return
            run = self.runs[event.run] = v1.Run(
                name=event.run, first_sequence=event.sequence, create_time=event.create_time
            )
        elif event.sequence <= run.last_sequence:
            return  # passing, or already in the frame that `attach` received
        run.last_sequence = event.sequence
        match event.WhichOneof("payload"):
            case "command_queued" if queued.HasField("start"):
                run.state = v1.Run.STATE_QUEUED
                run.agent = queued.start.agent
                run.labels.update(queued.start.labels)
                run.state_time.CopyFrom(event.create_time)
            case "command_queued" if queued.HasField("cancel"):
                run.ending = True
            case "run_started":
                _start(run, event)
            case "message_added":
                message = event.message_added
                if message.role == v1.Message.ROLE_ASSISTANT and message.status == v1.Message.STATUS_COMPLETED:
                    run.reply.CopyFrom(message)
            case "tool_started":
                self._start_call(run, event.tool_started)
            case "tool_finished":
                _keep(run.pending_calls, lambda call: call.call_id != event.tool_finished.call_id)
            case "input_requested":
                run.pending_inputs.append(event.input_requested)
            case "input_resolved":
                self._resolve(run, event)
            case "usage":
                _add_usage(run.usage, event.usage)
            case "run_state_changed":
                _change(run, event)

    def _start_call(self, run: v1.Run, call: v1.ToolCall) -> None:
        found = self._find_call(call.call_id)
        first = found[1].outcome == v1.ToolCall.OUTCOME_PENDING if found else call.attempt <= 1
        run.tool_calls += first
        _keep(run.pending_calls, lambda pending: pending.call_id != call.call_id)
        if call.client_executed:
            run.pending_calls.append(call)

    def _resolve(self, run: v1.Run, event: v1.Event) -> None:
        response = event.input_resolved.response
        asked = next((one for one in run.pending_inputs if one.input_id == response.input_id), v1.InputRequest())
        if asked.kind == v1.InputRequest.KIND_APPROVAL:
            answer = v1.RememberedApproval(
                agent=run.agent,
                tool=asked.call.tool,
                digest=asked.call.binding.digest,
                approved=response.decision == v1.InputResponse.DECISION_APPROVE,
                sequence=event.sequence,
            )
            if response.remember == v1.InputResponse.REMEMBER_RUN:
                run.remembered[response.input_id].CopyFrom(answer)
            elif response.remember == v1.InputResponse.REMEMBER_SESSION:
                self.remembered[response.input_id] = answer
        _keep(run.pending_inputs, lambda one: one.input_id != response.input_id)

    def _follow_queue(self, event: v1.Event) -> None:
        if event.HasField("command_queued") and not event.command_queued.HasField("cancel"):
            self.queued.append(v1.QueuedCommand(command_id=event.cause_id, sequence=event.sequence, run=event.run))
        elif event.cause_id and (event.HasField("message_added") or event.HasField("run_started")):
            taken = (event.run, event.cause_id)
            self.queued = [queued for queued in self.queued if (queued.run, queued.command_id) != taken]
        elif event.run_state_changed.state in ENDED:
            self.queued = [queued for queued in self.queued if queued.run != event.run]


def _start(run: v1.Run, event: v1.Event) -> None:
    started = event.run_started
    run.agent = started.agent
    run.agent_revision = started.agent_revision
    run.labels.update(started.labels)
    run.client_tools.extend(started.client_tools)
    if started.HasField("limits"):
        run.limits.CopyFrom(started.limits)
    if started.HasField("disconnect"):
        run.disconnect.CopyFrom(started.disconnect)
    run.state = v1.Run.STATE_RUNNING
    run.state_time.CopyFrom(event.create_time)
    run.attempt = 1


def _change(run: v1.Run, event: v1.Event) -> None:
    change = event.run_state_changed
    if run.state == v1.Run.STATE_RUNNING:
        ran = event.create_time.ToMicroseconds() - run.state_time.ToMicroseconds() - change.place_wait.ToMicroseconds()
        run.running_duration.FromMicroseconds(run.running_duration.ToMicroseconds() + max(ran, 0))
    run.state = change.state
    run.state_time.CopyFrom(event.create_time)
    run.attempt = change.attempt or run.attempt
    if change.state in ENDED:
        run.end_time.CopyFrom(event.create_time)
        if change.HasField("error"):
            run.error.CopyFrom(change.error)


def _keep(held: MutableSequence[M], wanted: Callable[[M], bool]) -> None:
    left = [one for one in held if wanted(one)]
    del held[:]
    held.extend(left)


def _copy(message: M) -> M:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _add_usage(total: v1.Usage, one: v1.Usage) -> None:
    total.model = one.model if total.model_calls == 0 or total.model == one.model else ""
    total.provider = one.provider if total.model_calls == 0 or total.provider == one.provider else ""
    total.input_tokens += one.input_tokens
    total.cached_input_tokens += one.cached_input_tokens
    total.output_tokens += one.output_tokens
    total.reasoning_tokens += one.reasoning_tokens
    total.model_calls += one.model_calls

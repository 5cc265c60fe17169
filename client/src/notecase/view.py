"""A session rebuilt from its events: whoever has seen the same events holds an equal view, however they came.

Everything the service tells can be had from this fold over the log, so a program that follows a session need not ask
again for its messages, its state or its run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from notecase import v1

M = TypeVar("M", bound=Message)

ENDED = frozenset({v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED, v1.Run.STATE_CANCELLED})


class Gap(Exception):
    """Something is missing before this event: attach again after `SessionView.last_sequence`."""


@dataclass
class Block:
    """One part of a message being made, as far as it is known."""

    kind: str
    """"text", "reasoning", "arguments" or "refusal"."""
    text: str = ""
    end: int = 0
    """The length of `text` in bytes of UTF-8."""
    call_id: str = ""
    tool: str = ""


@dataclass
class SessionView:
    """What is known of one session; `attach` and `apply` keep it up to date. Views that know the same are equal.

    Made with the sequence that the first event follows: 0 for a whole log, None when the first event may be any.
    Messages, runs and values handed out are the view's own: read them, or copy them.
    """

    last_sequence: int | None = 0
    """The newest entry of the log that is in the view, and so where to attach again; None before the first."""
    messages: dict[str, v1.Message] = field(default_factory=dict)
    """Whole messages by name, oldest first, with the outcomes their calls have."""
    open: dict[str, dict[int, Block]] = field(default_factory=dict)
    """The blocks of messages being made, by message name and part index."""
    state: dict[str, v1.Value] = field(default_factory=dict)
    """The session's own state: all of it in a view of the whole log; otherwise what was changed since, never wrong but
    incomplete, since an increment of what the view has not seen remains unknown."""
    run: v1.Run | None = None
    """The newest run; to be told apart by its state whether it is under way or has ended."""
    _whole: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._whole = self.last_sequence == 0

    def attach(self, attached: v1.Attached) -> None:
        """Takes the first frame of a stream: forgets the open blocks, which the stream sends again whole.

        A run whose start lies before the view is taken as the server knows it, which may be ahead of the events."""
        self.open.clear()
        run, seen = attached.run, self.last_sequence
        if run.name and seen is not None and seen >= run.first_sequence and (not self.run or self.run.name != run.name):
            self.run = _copy(run)

    def apply(self, event: v1.Event) -> bool:
        """Takes the next event and tells whether it was new: an entry of the log that the view has is ignored.

        Raises Gap, with the view unchanged, when an entry of the log or a piece of a block is missing before it."""
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
            case "message_discarded":
                self.open.pop(event.message_discarded.message, None)
            case "message_added":
                self.open.pop(event.message_added.name, None)
                self.messages[event.message_added.name] = _copy(event.message_added)
            case "tool_finished":
                self._finish_call(event)
            case "state_changed" if event.state_changed.state.startswith("sessions/"):
                self._change_state(event.state_changed.ops)
            case "run_state_changed":
                self.open.clear()
        self._follow_run(event)
        return True

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

    def _finish_call(self, event: v1.Event) -> None:
        """A message that came before the view began is not there to be changed."""
        finished = event.tool_finished
        for message in reversed(self.messages.values()):
            calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
            for call in calls:
                if call.call_id == finished.call_id:
                    call.CopyFrom(finished)
                    message.update_sequence = event.sequence
                    pending = any(call.outcome == v1.ToolCall.OUTCOME_PENDING for call in calls)
                    if message.status == v1.Message.STATUS_IN_PROGRESS and not pending:
                        message.status = v1.Message.STATUS_COMPLETED
                    return

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
        if event.HasField("run_started"):
            started = event.run_started
            self.run = v1.Run(
                name=event.run,
                agent=started.agent,
                agent_revision=started.agent_revision,
                state=v1.Run.STATE_RUNNING,
                attempt=1,
                first_sequence=event.sequence,
                create_time=event.create_time,
                labels=started.labels,
            )
        run = self.run
        if run is None or run.name != event.run or event.sequence <= run.last_sequence:
            return  # of another run, passing, or already in what `attach` was told
        run.last_sequence = event.sequence
        message, changed = event.message_added, event.run_state_changed
        if message.role == v1.Message.ROLE_ASSISTANT and message.status == v1.Message.STATUS_COMPLETED:
            run.reply.CopyFrom(message)
        if event.HasField("usage"):
            _add_usage(run.usage, event.usage)
        if event.HasField("run_state_changed"):
            run.state = changed.state
            run.attempt = changed.attempt or run.attempt
            if changed.HasField("error"):
                run.error.CopyFrom(changed.error)
            if changed.state in ENDED:
                run.end_time.CopyFrom(event.create_time)


def _copy(message: M) -> M:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _add_usage(total: v1.Usage, one: v1.Usage) -> None:
    total.model = one.model if total.model_calls == 0 or total.model == one.model else ""
    total.input_tokens += one.input_tokens
    total.cached_input_tokens += one.cached_input_tokens
    total.output_tokens += one.output_tokens
    total.reasoning_tokens += one.reasoning_tokens
    total.model_calls += one.model_calls

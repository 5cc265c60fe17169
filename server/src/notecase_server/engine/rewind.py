"""Makes the events that rewind a session, or that end the runs of a copy.

The log is not cut. A mark supersedes the messages after the sequence, the calls that were open then are cancelled, and
operations restore the state, so that a reader folds the log with the existing rules.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import NamedTuple, TypeVar

from notecase import v1

from notecase_server import errors
from notecase_server.engine import ledger
from notecase_server.errors import NotecaseError, Violation
from notecase_server.store.contract import PAGE_BYTES, History, Past, SessionKey
from notecase_server.store.fold import open_calls

T = TypeVar("T")

PAGE_OPS = 500
"""Operations in one event, which ends at PAGE_BYTES of them, too: what puts a state back may be more than one event
should hold."""


RACES = 3
"""How often a way back is worked out again because others wrote meanwhile. Then they wait: see LiveSession.quiet."""


class Rewind(NamedTuple):
    """What to commit while the log's head is still `head`."""

    head: int
    events: list[v1.Event]


class Back(NamedTuple):
    """How far a session goes back before another run starts in it: to a sequence, or with None to before the run that
    ends."""

    to_sequence: int | None
    field: str = ""
    """Where the caller named the sequence."""


async def undisturbed(quiet: asyncio.Lock, act: Callable[[], Awaitable[T]]) -> T:
    """Returns what `act` does once it is not refused with SEQUENCE_MISMATCH. After RACES tries it holds `quiet`, for
    which the others wait that write to the session."""
    async with AsyncExitStack() as until_done:
        for tries in itertools.count(1):
            try:
                return await act()
            except NotecaseError as error:
                if error.reason != v1.ERROR_REASON_SEQUENCE_MISMATCH:
                    raise
            if tries == RACES:
                await until_done.enter_async_context(quiet)
    raise AssertionError("a try returns or raises")


async def back(store: History, key: SessionKey, run: v1.Run, way: Back) -> Rewind:
    """Returns the way back from where `run` is under way. Raises as `rewound` and `rolled_back`."""
    if way.to_sequence is None:
        return await rolled_back(store, key, run)
    return await rewound(store, key, way.to_sequence, way.field)


async def rewound(store: History, key: SessionKey, to_sequence: int, field: str) -> Rewind:
    """Returns the rewind to a sequence that is still in effect; `field` is where the caller named it. Raises
    NotecaseError SESSION_NOT_FOUND, SEQUENCE_AHEAD, and INVALID_FIELD inside a range that was rewound before: its
    messages are superseded, and their effects are gone."""
    past = await store.read_past(key, to_sequence)
    if past.kept < to_sequence:
        told = (
            f"{to_sequence} lies in a stretch that a rewind to {past.kept} left behind: its messages are no longer part"
        )
        raise errors.invalid([Violation(field, f"{told} of this conversation; fork at it instead (ForkSession)")])
    return await asyncio.to_thread(_back, past, to_sequence)


async def rolled_back(store: History, key: SessionKey, run: v1.Run) -> Rewind:
    """Returns the way back to before a run's start: what went on while it was queued is not its doing, and stays. Where
    that was rewound meanwhile, it goes as far as the rewind went."""
    before = await _before(store, key, run)
    past = await store.read_past(key, before)
    if past.kept < before:
        past = await store.read_past(key, past.kept)
    return await asyncio.to_thread(_back, past, past.session.last_sequence, run.name)


async def _before(store: History, key: SessionKey, run: v1.Run) -> int:
    """The sequence before the run's start, which is its first event unless it was queued."""
    before, size = run.first_sequence - 1, 1
    while events := await store.read_events(key, before, size):
        for event in events:
            if event.HasField("run_started") and event.run == run.name:
                return event.sequence - 1
        before, size = events[-1].sequence, PAGE_OPS
    return before


def _back(past: Past, to_sequence: int, run: str = "") -> Rewind:
    calls = [call for message in past.messages for call in open_calls(message)]
    sealed = [ledger.cancelled(call, "The session was rewound to before its outcome.") for call in calls]
    ops = []
    for name, entry in sorted(past.entries.items()):
        op = v1.StateOp(key=name)
        if entry is not None:
            op.set.CopyFrom(entry.value)
        else:
            op.remove.SetInParent()
        ops.append(op)
    mark = v1.Event(rewound=v1.Rewound(to_sequence=to_sequence, run=run))
    restored, size = list[v1.Event](), 0
    for op in ops:
        size += op.ByteSize()
        if not restored or len(restored[-1].state_changed.ops) == PAGE_OPS or size > PAGE_BYTES:
            restored.append(v1.Event())
            size = op.ByteSize()
        restored[-1].state_changed.ops.append(op)
    return Rewind(past.head, [mark, *sealed, *restored])


def ended(past: Past, reason: str) -> list[v1.Event]:
    """Returns the events that end the runs of a session as it was, so that its copy has no active run."""
    events = []
    for run in past.runs:
        dropped = [
            queued.command_id
            for queued in past.session.queued_commands
            if queued.run == run.name and run.state != v1.Run.STATE_QUEUED
        ]
        own = (message for message in reversed(past.messages) if message.run == run.name and open_calls(message))
        change = v1.RunStateChanged(state=v1.Run.STATE_CANCELLED, reason=reason, dropped_commands=dropped)
        sealed = [*ledger.sealed(run, next(own, None), reason), v1.Event(run_state_changed=change)]
        for event in sealed:
            event.run = run.name
        events += sealed
    return events

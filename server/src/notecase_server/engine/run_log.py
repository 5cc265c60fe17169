"""Commits for a run: knows the run's state after the last commit, and is the only writer of its part of the log. Code
that decides for a run holds its session's lock, reads that state, and commits the consequences. The outcome of a commit
whose answer was lost is looked up before anything else is decided.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.engine import ledger
from notecase_server.engine.caused import NOBODY, Caused
from notecase_server.engine.draft import Draft
from notecase_server.engine.services import Services
from notecase_server.engine.session import LiveSession
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import ActiveRun, Commit, Committed, RunRecord, StepKey
from notecase_server.store.fold import ENDED, open_calls
from notecase_server.supervisor import backoff, is_passing
from notecase_server.tools.clock import Stopwatch

T = TypeVar("T")

log = structlog.get_logger()

RUNNING, WAITING = v1.Run.STATE_RUNNING, v1.Run.STATE_WAITING

LOST = frozenset({v1.ERROR_REASON_OWNER_LOST, v1.ERROR_REASON_SESSION_NOT_FOUND})
"""The run is no longer this process's: its worker stops at once and commits nothing more."""


class RunLog:
    """Holds one run as this process knows it. `run`, `message` and the rest are as of the last commit."""

    def __init__(
        self,
        live: LiveSession,
        services: Services,
        session: v1.Session,
        active: ActiveRun,
        message: v1.Message | None = None,
        said: Sequence[v1.Event] = (),
    ) -> None:
        """`message` is the reply with open calls, if there is one, and `said` has the command_queued events of queued
        input."""
        self.live = live
        self.services = services
        self.agent = active.agent
        self.run = v1.Run()
        self.run.CopyFrom(active.run)
        self.epoch = active.epoch
        self.deaths = active.deaths
        self.message = message
        self.said = list(said)
        self.session = session
        self.resolved: dict[str, v1.InputResponse] = {}
        """What was answered, by input_id, until `Questions.hand_out` has given it to the tools that asked."""
        self.spent: v1.Usage | None = None
        """The usage of the last model call that its provider reported and that no commit has counted."""
        self.log = log.bind(tenant=live.key.tenant, session=live.key.session, run=active.run.name)
        self._watch.start()
        self._know(session, ())

    @property
    def ended(self) -> bool:
        return self.run.state in ENDED

    @cached_property
    def step(self) -> StepKey:
        return StepKey(self.run.name)

    @cached_property
    def _watch(self) -> Stopwatch:
        return Stopwatch(self.services.clock)

    @property
    def draft(self) -> Draft | None:
        """The reply being written."""
        return self.live.drafts.get(self.step)

    @property
    def answers(self) -> dict[bytes, bool]:
        """Remembered answers: see ledger.remembered."""
        return ledger.remembered(self.session, self.run)

    @property
    def open(self) -> list[v1.ToolCall]:
        """The calls without an outcome, in order."""
        return open_calls(self.message) if self.message is not None else []

    @property
    def started(self) -> list[v1.ToolCall]:
        """The calls that are dispatched and the server's to run, unless a person is asked about them."""
        return self._own_calls(self.open, {request.call.call_id for request in self.run.pending_inputs})

    def call(self, call_id: str) -> v1.ToolCall:
        """Returns an open call. Raises NotecaseError CALL_NOT_PENDING."""
        for call in self.open:
            if call.call_id == call_id:
                return call
        raise errors.call_not_pending(call_id)

    # ---- what follows

    def consequence(self, events: Sequence[v1.Event]) -> list[v1.Event]:
        """Returns the event, if any, that makes the run wait or go on once these events are committed."""
        for event in events:
            if event.HasField("run_state_changed"):
                return []
        if self.ended:
            return []
        left = ledger.left_open(self.message, events)
        asked = {request.call.call_id for request in self.run.pending_inputs}
        asked |= {event.input_requested.call.call_id for event in events if event.HasField("input_requested")}
        resolved = {event.input_resolved.response.input_id for event in events if event.HasField("input_resolved")}
        asked -= {request.call.call_id for request in self.run.pending_inputs if request.input_id in resolved}
        wanted = WAITING if left and not self._own_calls(left, asked) else RUNNING
        if wanted == self.run.state:
            return []
        return [v1.Event(run_state_changed=v1.RunStateChanged(state=wanted))]

    def _own_calls(self, calls: Sequence[v1.ToolCall], asked: set[str]) -> list[v1.ToolCall]:
        return [
            call
            for call in calls
            if call.outcome == v1.ToolCall.OUTCOME_RUNNING and not call.client_executed and call.call_id not in asked
        ]

    def ending(
        self, state: v1.Run.State.ValueType, error: v1.Error | None = None, reason: str = "", cause_id: str = ""
    ) -> v1.Event:
        """Returns the event that ends the run."""
        dropped = [event.cause_id for event in self.said]
        change = v1.RunStateChanged(state=state, error=error, reason=reason, dropped_commands=dropped)
        return v1.Event(cause_id=cause_id, run_state_changed=change)

    def cut(self) -> list[v1.Event]:
        """Returns the events that keep an unfinished reply as it is, and its usage if the provider reported it."""
        message = self.draft.cut(self.run.agent) if self.draft is not None else None
        if message is None:
            self.live.discard(self.step)
            return self.used()
        return [v1.Event(message_added=message), *self.used()]

    def spend(self, usage: v1.Usage) -> None:
        """Records the usage so far of the current model call."""
        self.spent = usage

    def used(self) -> list[v1.Event]:
        """Returns the usage event of the last model call, if its provider reported usage and no commit has counted
        it."""
        return [v1.Event(usage=self.spent)] if self.spent is not None else []

    def queued(self, latest: v1.UserInput.When.ValueType) -> list[v1.Event]:
        """Returns the command_queued events of inputs, in order: of those that steer, or with WHEN_FOLLOW_UP of all."""
        late = v1.UserInput.WHEN_FOLLOW_UP
        return [event for event in self.said if latest == late or event.command_queued.input.when != late]

    def own(self, events: Sequence[v1.Event]) -> Sequence[v1.Event]:
        """Gives this run's name to the events that have none."""
        for event in events:
            if self.run.state == RUNNING and event.HasField("run_state_changed"):
                self._watch.leave_out(event.run_state_changed)
            if not event.run:
                event.run = self.run.name
                if event.HasField("message_added"):
                    event.message_added.run = self.run.name
        return events

    # ---- commits

    async def command(
        self,
        events: Sequence[v1.Event],
        caused: Caused = NOBODY,
        deaths: int | None = None,
    ) -> Committed:
        """Commits on behalf of a command, with what follows. The caller holds the session's lock."""
        for event in events:
            event.cause_id = event.cause_id or caused.cause_id
        return await self._commit(self._followed(events), caused, deaths=deaths)

    def _followed(self, events: Sequence[v1.Event]) -> Sequence[v1.Event]:
        return self.own([*events, *self.consequence(events)])

    def durably(self, decide: Callable[[], list[v1.Event]]) -> Coroutine[Any, Any, Committed | None]:
        """Commits the events that `decide` returns, and the change of state that follows from them. Holds the session's
        lock while it decides and commits, and repeats both as long as the store is unavailable. Returns None, without a
        commit, if there are no events."""
        return self.surely(lambda: self._followed(decide()))

    def surely(
        self,
        decide: Callable[[], Sequence[v1.Event]],
        *,
        caused: Caused = NOBODY,
        if_last_sequence: int | None = None,
        start: RunRecord | None = None,
        deaths: int | None = None,
        then: Callable[[Committed], None] | None = None,
    ) -> Coroutine[Any, Any, Committed | None]:
        """Commits as `durably` does, but only the events of `decide`, and only if the conditions hold. Calls `then`
        with the commit under the same lock."""
        made: Committed | None = None

        def follow(committed: Committed) -> None:
            nonlocal made
            made = committed
            if then is not None:
                then(committed)

        async def commit() -> Committed | None:
            async with self.live.held():
                if made is not None:  # the commit whose answer was lost had been made
                    return made
                events = decide()
                if not events:
                    return None
                conditions = (caused, if_last_sequence, start, deaths)
                try:
                    return await self._commit(events, *conditions, follow)
                except NotecaseError as error:
                    # A run must be able to end: what `cut` keeps then has no content.
                    if not self._forget_made(error):
                        raise
                    return await self._commit(decide(), *conditions, follow)

        return self.patiently(commit)

    def _forget_made(self, error: NotecaseError) -> bool:
        """Replaces the images and clips of the unfinished reply by words if there is no room for them; returns whether
        it did."""
        too_large = error.reason == v1.ERROR_REASON_PAYLOAD_TOO_LARGE
        return too_large and self.draft is not None and self.draft.forget_made()

    async def patiently(self, act: Callable[[], Awaitable[T]]) -> T:
        """Repeats work as long as the store is unavailable: the work of a run is worth more than its slot."""
        waits: Iterator[float] | None = None
        while True:
            try:
                return await act()
            except NotecaseError as error:
                if not is_passing(error):
                    raise
            waits = waits or backoff()
            wait = next(waits)
            self.log.warning("run_waits_for_store", seconds=round(wait, 2))
            await asyncio.sleep(wait)

    async def _commit(
        self,
        events: Sequence[v1.Event],
        caused: Caused,
        if_last_sequence: int | None = None,
        start: RunRecord | None = None,
        deaths: int | None = None,
        then: Callable[[Committed], None] | None = None,
    ) -> Committed:
        def follow(committed: Committed) -> None:
            self.deaths = self.deaths if deaths is None else deaths
            self._learn(committed)
            if then is not None:
                then(committed)

        if deaths is None and self.deaths and start is None:
            deaths = 0  # the run made progress: a later death of its process has another cause
        committed = await self.live.commit(
            Commit(
                key=self.live.key,
                once=caused.once,
                command=caused.command,
                if_epoch=self.epoch,
                claim=start is not None,
                if_last_sequence=if_last_sequence,
                events=events,
                principal=caused.principal,
                audit=caused.audit,
                start=start,
                deaths=deaths,
            ),
            late=follow,
        )
        follow(committed)
        return committed

    def _learn(self, committed: Committed) -> None:
        """Updates the run from a commit."""
        name = self.run.name
        self.run.CopyFrom(committed.runs.get(name, self.run))
        self._know(committed.session, committed.events)
        for event in committed.events:
            if event.run != name:
                continue
            if event.HasField("run_state_changed"):
                self._watch.start()
            elif event.HasField("usage"):
                self.spent = None
            elif event.HasField("input_resolved"):
                self.resolved[event.input_resolved.response.input_id] = event.input_resolved.response
        for message in committed.messages.values():
            if message.run != name:
                continue
            if open_calls(message):
                self.message = message
            elif self.message is not None and self.message.name == message.name:
                self.message = None
        if self.ended:
            self.log.info(
                "run_finished",
                state=v1.Run.State.Name(self.run.state).removeprefix("STATE_"),
                reason=errors.reason_name(self.run.error.reason) if self.run.HasField("error") else "",
                model_calls=self.run.usage.model_calls,
                tool_calls=self.run.tool_calls,
                input_tokens=self.run.usage.input_tokens,
                output_tokens=self.run.usage.output_tokens,
            )

    def _know(self, session: v1.Session, events: Sequence[v1.Event]) -> None:
        self.session = session
        if session.queued_commands:
            waiting = {queued.sequence for queued in session.queued_commands if queued.run == self.run.name}
            self.said = [event for event in (*self.said, *events) if event.sequence in waiting]
        else:
            self.said = []


def taken(queued: Sequence[v1.Event]) -> list[v1.Event]:
    """Returns the messages that were said, as events under the ids and the principals of their commands."""
    return [
        v1.Event(cause_id=event.cause_id, principal=event.principal, message_added=message)
        for event in queued
        for message in event.command_queued.input.messages
    ]

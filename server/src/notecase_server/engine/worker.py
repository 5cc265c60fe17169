"""Works on one run: finds its next step from the rows and takes it. Only commits make anything durable. Between two of
them the worker can be lost at any moment, and the next one, here or after a restart, continues from the last: it reads
the rows, not the memory of this object.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from notecase import v1
from structlog.contextvars import bind_contextvars

from notecase_server import errors, names
from notecase_server.engine import ledger
from notecase_server.engine.asking import Budget
from notecase_server.engine.calls import Calls
from notecase_server.engine.context import Newest
from notecase_server.engine.halt import Halt, Halted, Halts
from notecase_server.engine.model_turn import ModelTurn, Reply, Tools
from notecase_server.engine.rewind import Rewind, back, undisturbed
from notecase_server.engine.run_log import LOST, RUNNING, WAITING, RunLog, taken
from notecase_server.engine.seat import Seat
from notecase_server.engine.timers import Alarm
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Committed, Duplicate, Replayed
from notecase_server.store.fold import ENDED
from notecase_server.supervisor import is_own_end
from notecase_server.tools.contract import Outcome

if TYPE_CHECKING:
    from notecase_server.engine.roster import Roster

MOST_DEATHS = 3
"""A run whose process died so often in a row is what kills it."""

SUSPECT_DEATHS = 2
"""From so many deaths on, a run is active only while no other such run is."""


class Worker:
    """Works on one run in one process. `work` makes it go on; the other methods may be called meanwhile."""

    def __init__(self, run_log: RunLog, roster: "Roster") -> None:
        self.log = run_log
        self.lost = False
        """Another process owns the run, or the session is gone: nothing more is committed."""
        self.takes_over: int | None = None
        """Set until this worker has committed that it continues the run of another worker: how many processes died in
        a row with the run. None if there is nothing to take over."""
        self.newest: Newest | None = None
        """The newest messages, read by the commit that started the run."""
        self._services = run_log.services
        self._roster = roster
        self._halts = Halts()
        self.seat = Seat(run_log, self._halts)
        """Its slot, once it has one."""
        self._calls: Calls | None = None
        self._budget = Budget(run_log.run, run_log.agent)
        self._tools = Tools(run_log, self._halts)
        self._draining = False

    def halt(self, halt: Halt) -> None:
        """Cuts what is running; `work` then commits the halt."""
        self._halts.add(halt)

    def drain(self) -> None:
        """Asks the worker to leave the run as it is at its next commit."""
        self._draining = True
        self._halts.stirred.set()
        if not self.seat.taken or self.takes_over is not None:  # nothing has begun that could be lost
            self._halts.interrupt()

    def stop_call(self, call_id: str) -> None:
        """Stops a call that runs here, once its end is on record."""
        if self._calls is not None:
            self._calls.stop(call_id)

    def stir(self) -> None:
        """Makes the worker look at the commit of a command."""
        self._halts.stirred.set()

    async def work(self) -> None:
        """Works until the run has ended, waits only for what is in the rows, was left to a successor, or belongs to
        another owner. Each line that is logged meanwhile has the run's ids, also those of providers and tools."""
        bind_contextvars(session=self.log.live.key.session, run=self.log.run.name)
        alarm = Alarm(self.log.run, self.halt)
        try:
            while self._goes_on:
                alarm.set(self.seat.taken)
                await self._step()
                self.seat.clear()
                if self._calls is not None and not self._goes_on:
                    await self._calls.close()  # while it may still be given a halt
        except NotecaseError as error:
            if error.reason not in LOST:
                raise
            self.lost = True
            if error.reason == v1.ERROR_REASON_SESSION_NOT_FOUND:
                self.log.live.deleted = True
            self.log.log.info("run_abandoned", reason=errors.reason_name(error.reason))
        finally:
            alarm.set(False)
            self.log.live.discard(self.log.step)
            self._stop_calls()
            self.let_go()

    def _stop_calls(self) -> None:
        if self._calls is not None:
            self._calls.stop_all()

    @property
    def _goes_on(self) -> bool:
        state = self.log.run.state
        works = state == RUNNING and not (self._draining and self._may_leave)
        return state not in ENDED and (works or bool(self._halts.pending) or self._rests)

    @property
    def _rests(self) -> bool:
        """Whether only tools that wait for a person's answer are running. A stop does not wait for people."""
        return self.log.run.state == WAITING and bool(self._calls) and not self._draining

    @property
    def _may_leave(self) -> bool:
        """Whether the worker may stop now. It may not while calls run, whose outcomes would be lost."""
        begun = (self.seat.taken and self.takes_over is None) or self._calls
        return self.log.message is None or not begun

    def let_go(self) -> None:
        """Returns its slot and refuses the halts that it will not carry out, also when it has never run."""
        if self._halts.pending:
            self._halts.refuse_all(self._gone())
        self.seat.leave()

    def _gone(self) -> NotecaseError:
        """Returns why a halt is not carried out."""
        session = self.log.live.key.session
        if self.log.live.deleted:
            return errors.not_found("session", names.session(session))
        if self.log.ended:
            return errors.run_ended(names.run(session, self.log.run.name), self.log.run.state)
        return errors.draining() if self._draining else errors.worker_lost(session)

    async def _step(self) -> None:
        try:
            if self._halts.pending:
                await self._seal(self._halts.pending[0])
            elif not (self.seat.taken or self._rests):
                await self._begin()
            elif self.log.message is not None:
                await self._tend()
            elif self.log.run.ending:
                await self._end(v1.Run.STATE_CANCELLED)
            else:
                await self._turn()
        except Halted:
            return
        except NotecaseError as error:
            if error.reason in LOST:
                raise
            await self._end(v1.Run.STATE_FAILED, error.to_proto())
        except (Exception, asyncio.CancelledError) as error:
            if is_own_end() and isinstance(error, asyncio.CancelledError):
                raise
            request_id = self._services.new_id()
            self.log.log.exception("run_crashed", request_id=request_id, kind=type(error).__name__)
            await self._end(v1.Run.STATE_FAILED, errors.internal(request_id).to_proto())

    async def _begin(self) -> None:
        """Waits for a slot. Then commits the takeover, if there is one, or how long the run had no worker."""
        waited = await self.seat.take(suspect=self.takes_over is not None and self.takes_over >= SUSPECT_DEATHS)
        if self._draining and not self._calls:
            self.seat.leave()
        elif self.takes_over is not None:
            await self._take_over(self.takes_over)
        elif waited and (idle := self.seat.idle):
            change = v1.RunStateChanged(state=RUNNING)
            change.place_wait.FromMicroseconds(idle)
            await self.log.durably(lambda: [v1.Event(run_state_changed=change)])

    async def _take_over(self, deaths: int) -> None:
        """Commits that this worker goes on with the run, and what becomes of calls that had started under the one
        before."""

        def decide() -> list[v1.Event]:
            reason = "The server stopped; the run goes on from its last commit."
            change = v1.RunStateChanged(state=RUNNING, attempt=self.log.run.attempt + 1, reason=reason)
            change.place_wait.FromMicroseconds(self.seat.idle)
            events = ledger.interrupted(
                self.log.started, self._declaration, self._services.new_id, self._expire_request
            )
            return list(self.log.own([v1.Event(run_state_changed=change), *events]))

        if deaths >= MOST_DEATHS:
            died = errors.owner_died(self.log.live.key.session, deaths)
            await self._end(v1.Run.STATE_FAILED, died.to_proto())
            return
        await self.log.surely(decide, deaths=deaths)
        self.takes_over = None
        self._budget = Budget(self.log.run, self.log.agent)
        self.log.log.info("run_taken_over", attempt=self.log.run.attempt, deaths=deaths)

    def _declaration(self, call: v1.ToolCall) -> v1.Tool:
        return ledger.declaration(self.log.agent, self.log.run, call)

    def _expire_request(self, request: v1.InputRequest) -> None:
        ledger.expire(request, self.log.run, self._services.clock())

    async def _turn(self) -> None:
        bound, newest, self.newest = await self._tools.bound(), self.newest, None
        reply = await ModelTurn(self.log, self._halts, self._budget, bound, newest).reply()
        output = await reply.output(self.log.agent)
        await self.log.durably(partial(self._replied, reply, output))

    def _replied(self, reply: Reply, output: v1.Event | None) -> list[v1.Event]:
        """Returns the events of the reply, its value under output_key, and what follows: calls are bound and
        dispatched, queued input is added, or the run ends."""
        message, run = reply.message, self.log.run
        calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
        for call in calls:
            if call.tool in reply.bound:
                call.binding.CopyFrom(reply.bound[call.tool].binding)
        message.status = v1.Message.STATUS_IN_PROGRESS if calls else v1.Message.STATUS_COMPLETED
        events = [v1.Event(message_added=message), v1.Event(usage=reply.finish.usage)]
        if output is not None:
            events.append(output)
        limit = run.limits.max_tool_calls
        if limit and run.tool_calls + len(calls) > limit:
            told = f"The run may call tools {errors.counted(limit, 'time')}, and would need more calls."
            error = errors.limit_exceeded("max_tool_calls", limit, told)
            events += [ledger.cancelled(call, error.message) for call in calls]
            return [*events, self.log.ending(v1.Run.STATE_FAILED, error.to_proto())]
        if calls and reply.finish.cut:
            cut = f"The reply was cut off ({reply.finish.reason})"
            why = f"{cut}, so that no call in it was run; call again, with less."
            return [*events, *(ledger.finished(call, Outcome(error=why)) for call in calls)]
        if calls:
            return events + self._triaged(calls, reply)
        if self.log.said and not run.ending:
            return events + taken(self.log.queued(v1.UserInput.WHEN_FOLLOW_UP))
        return [*events, self.log.ending(v1.Run.STATE_SUCCEEDED)]

    def _triaged(self, calls: Sequence[v1.ToolCall], reply: Reply) -> list[v1.Event]:
        read = [call for call in calls if call.call_id in reply.read]
        calls = [call for call in calls if call.call_id not in reply.read]
        made = [ledger.finished(call, reply.read[call.call_id]) for call in read]
        made += ledger.triage(calls, reply.bound, self.log.answers, self._services.new_id, self._expire_request)
        if self.log.run.ending:  # its new questions are dropped
            asked = [event.input_requested.call for event in made if event.HasField("input_requested")]
            made = [event for event in made if not event.HasField("input_requested")]
            made += [ledger.cancelled(call, "The run is to end.") for call in asked]
        return made

    async def _tend(self) -> None:
        """Runs the server's calls, and commits their outcomes and questions as they come. While the run waits for
        answers, it has no slot."""
        self._halts.stirred.clear()
        self._calls = Calls(self.log, self._halts.stirred) if self._calls is None else self._calls
        await self._calls.keep()
        if self._rests and self.seat.taken:
            self.seat.leave()
            return
        works = self.log.run.state == RUNNING and self.seat.taken
        if self._halts.pending or self.log.message is None or not (works or self._rests):
            return
        if works:
            self._calls.begin()
        if not self._calls:
            # Nothing of it is the server's any more: the run waits, unless somebody gives the last result just now.
            await self.log.durably(list)
            return
        self._roster.tending(self)
        await self._calls.wait()

    async def _seal(self, halt: Halt) -> None:
        """Stops everything that runs in one commit, and ends the run or continues with the user's message. A refused
        halt has changed nothing: calls continue, and the model is called again."""
        try:
            if self._calls is not None:
                await self._calls.keep_finished()  # results from before a halt are kept
            committed = await self._sealed(halt)
        except (NotecaseError, Replayed, Duplicate) as refused:
            self._halts.remove(halt)
            halt.refuse(refused)
            if isinstance(refused, NotecaseError) and refused.reason in LOST:
                raise
            await self.log.durably(self.log.used)
            if self.log.draft is not None:  # the model is asked again, which is not to count twice
                self.log.live.discard(self.log.step)
                self._budget.give_back()
            return
        self._halts.remove(halt)
        self._stop_calls()
        if not halt.done.done():
            halt.done.set_result(committed)

    async def _sealed(self, halt: Halt) -> Committed:
        seal, replacement = partial(self._seal_once, halt), halt.replacement
        goes_back = replacement is not None and replacement.back is not None and replacement.if_last_sequence is None
        return await (undisturbed(self.log.live.quiet, seal) if goes_back else seal())

    async def _seal_once(self, halt: Halt) -> Committed:
        replacement, way = halt.replacement, None
        head = replacement.if_last_sequence if replacement is not None else None
        if replacement is not None and replacement.back is not None:
            where = (self._services.store, self.log.live.key, self.log.run, replacement.back)
            way = await self.log.patiently(partial(back, *where))
            if head not in {None, way.head}:
                raise errors.sequence_mismatch(way.head)
            head = way.head
        committed = await self.log.surely(
            lambda: self._sealing(halt, way),
            caused=halt.caused,
            if_last_sequence=head,
            start=replacement.record if replacement is not None else None,
            then=(lambda made: self._roster.begin_next(self, halt, made)) if replacement else None,
        )
        assert committed is not None
        return committed

    def _sealing(self, halt: Halt, way: Rewind | None) -> list[v1.Event]:
        events = [*self.log.cut(), *ledger.sealed(self.log.run, self.log.message, halt.reason)]
        if halt.said and (refused := ledger.refusal(self.log.run.pending_inputs, halt.by, "input")) is not None:
            raise refused  # asked for since the command was taken
        if halt.said:
            events += [*taken(self.log.queued(v1.UserInput.WHEN_STEER)), *halt.said]  # in their order
            return list(self.log.own([*events, *self.log.consequence(events)]))
        ended = self.log.own([*events, self._ending(halt.state, halt.error, halt.reason, halt.cause_id)])
        return [*ended, *(way.events if way else ()), *(halt.replacement.events if halt.replacement else ())]

    async def _end(self, state: v1.Run.State.ValueType, error: v1.Error | None = None) -> None:
        def decide() -> list[v1.Event]:
            sealed = ledger.sealed(self.log.run, self.log.message, "The run ended.")
            return [*self.log.cut(), *sealed, self._ending(state, error)]

        await self.log.durably(decide)

    def _ending(
        self, state: v1.Run.State.ValueType, error: v1.Error | None = None, reason: str = "", cause_id: str = ""
    ) -> v1.Event:
        """Returns the event that ends the run, with the time for which it was still waiting for this worker."""
        event = self.log.ending(state, error, reason, cause_id)
        if self.log.run.state == RUNNING and (self.takes_over is not None or not self.seat.taken):
            event.run_state_changed.place_wait.FromMicroseconds(self.seat.idle)
        return event

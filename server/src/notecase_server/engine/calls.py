"""Runs the calls of a run in this process: starts, times and stops them, and records their results."""

import asyncio
import traceback
from collections.abc import Sequence
from functools import partial

from notecase import v1

from notecase_server import names
from notecase_server.engine import ledger, results
from notecase_server.engine.arguments import arguments_of
from notecase_server.engine.questions import Questions
from notecase_server.engine.run_log import LOST, RunLog
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import PAGE_BYTES
from notecase_server.store.fold import keys_fit, ops_fit
from notecase_server.supervisor import Tasks, is_own_end
from notecase_server.tools.clock import Clock
from notecase_server.tools.contract import CallContext, Outcome

Result = tuple[Outcome, Sequence[v1.StateOp]]


class Calls:
    """Holds the running calls of one worker, which alone waits for them."""

    def __init__(self, run_log: RunLog, stirred: asyncio.Event) -> None:
        """`stirred` is set when a call asks something."""
        self._log = run_log
        self._stirred = stirred
        self._questions = Questions(run_log, stirred)
        self._supervisor = run_log.services.supervisor
        self._tasks: dict[str, asyncio.Task[Result]] = {}
        self._owned = Tasks("calls")
        self._tools: dict[str, asyncio.Task[Result]] = {}
        """What runs in a tool, by call: held by the supervisor, since a tool may go on longer than its run."""

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def begin(self) -> None:
        """Starts every call of the server that does not run yet, and passes answers to the tools that asked."""
        self._questions.hand_out()
        for call in self._log.started:
            if call.call_id not in self._tasks:
                self._tasks[call.call_id] = self._owned.start(self._timed(call), f"call {call.call_id}")

    async def wait(self) -> None:
        """Returns when a call has ended, or when the event is set."""
        watch = self._owned.start(self._stirred.wait(), "stirred")
        try:
            await asyncio.wait([watch, *self._tasks.values()], return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()

    def stop(self, call_id: str) -> None:
        """Stops a call that runs here, once its end is on record."""
        for task in (self._tools.get(call_id), self._tasks.pop(call_id, None)):
            if task is not None:
                task.cancel()
        self._questions.close(call_id)

    def stop_all(self) -> None:
        for call_id in list(self._tasks):
            self.stop(call_id)

    async def close(self) -> None:
        """Stops all calls and waits until their tools have ended, except for those that do not stop."""
        self.stop_all()
        await self._owned.close()
        await self._supervisor.end(self._tools.values())

    async def keep(self) -> None:
        """Commits the results that are there, and what calls ask."""
        await self.keep_finished()
        await self._questions.keep()

    async def keep_finished(self) -> None:
        """Commits the results that are there."""
        for call_id in [call_id for call_id, task in self._tasks.items() if task.done()]:
            task = self._tasks.pop(call_id, None)
            if task is not None:  # the call has not ended in another way meanwhile
                await self._keep(call_id, *_result(task))

    async def _keep(self, call_id: str, outcome: Outcome, ops: Sequence[v1.StateOp]) -> None:
        """Commits a result with the state that it changed. If the state or the session does not accept it, the call
        fails, and the run continues."""
        contents, key = self._log.services.contents, self._log.live.key
        try:
            message = self._log.message
            given = outcome.parts
            parts = await self._log.patiently(lambda: results.kept(contents, key, message, given, of_run=True))
            await self._log.durably(partial(self._outcome, call_id, outcome._replace(parts=parts), ops))
        except NotecaseError as refused:
            if outcome.error or refused.reason in LOST:
                raise
            await self._log.durably(partial(self._outcome, call_id, Outcome(error=refused.message), ()))
        self._questions.close(call_id)

    def _outcome(self, call_id: str, outcome: Outcome, ops: Sequence[v1.StateOp]) -> list[v1.Event]:
        """Returns the events of a result with the state that it changed, and withdraws the questions of its call. Empty
        when the call has ended in another way before."""
        for call in self._log.open:
            if call.call_id == call_id:
                kept = results.fitting(self._log.message, outcome)
                changed = [v1.Event(state_changed=v1.StateChanged(ops=ops))] if ops and not kept.error else []
                asked = [request for request in self._log.run.pending_inputs if request.call.call_id == call_id]
                return [*ledger.unasked(asked, "The call has ended."), ledger.finished(call, kept), *changed]
        return []

    async def _timed(self, call: v1.ToolCall) -> Result:
        """Runs one call within its tool's time-out. The result of a tool that does not stop then is ignored."""
        tool = ledger.declaration(self._log.agent, self._log.run, call)
        seconds = tool.timeout.ToMicroseconds() / 1e6 if tool.HasField("timeout") else None
        clock = Clock(seconds)
        work = self._supervisor.start(self._execute(call, clock), call.tool)
        self._tools[call.call_id] = work
        work.add_done_callback(lambda _: self._tools.pop(call.call_id, None))
        try:
            async with clock:
                await asyncio.wait([work])
        except TimeoutError:
            if work.done():
                return _result(work)
            await self._supervisor.end([work])
            return Outcome(error=f"The tool took longer than {seconds:g} seconds."), []
        except asyncio.CancelledError:
            if not work.cancelling():
                work.cancel()
            raise
        return _result(work)

    async def _execute(self, call: v1.ToolCall, clock: Clock) -> Result:
        """Runs one call. A tool that is broken is a failed call, whatever it raises: the model learns that much, the
        log the rest."""
        if not call.HasField("binding"):
            return ledger.no_tool(call), []
        where = self._where(call, clock)
        toolbox = self._log.services.toolbox
        if not self._log.services.lease.holds:
            with clock.paused():
                await self._log.services.lease.held()
        try:
            outcome = await toolbox.call(call.binding, arguments_of(call) or {}, where)
        except NotecaseError as error:
            return Outcome(error=error.message), []
        except asyncio.CancelledError:
            if is_own_end():
                raise
            return self._broken(call, "CancelledError"), []
        except BaseException as error:  # noqa: BLE001  (also what would end the process: a tool has no say in that)
            return self._broken(call, type(error).__name__, error), []
        size = sum(op.ByteSize() for op in where.ops)
        if size > PAGE_BYTES:
            return Outcome(error=f"The tool changed {size} bytes of state; the limit is {PAGE_BYTES}."), []
        if not (keys_fit(where.ops) and ops_fit(where.ops)):
            return Outcome(error="The tool set a key or a value that state cannot hold."), []
        return outcome, where.ops

    def _broken(self, call: v1.ToolCall, kind: str, error: BaseException | None = None) -> Outcome:
        # The text of an exception may quote messages, so it is only in the log for debugging.
        at = _place(error)
        self._log.log.error("tool_crashed", tool=call.tool, call_id=call.call_id, kind=kind, at=at)
        self._log.log.debug("tool_traceback", tool=call.tool, call_id=call.call_id, exc_info=error)
        return Outcome(error="The tool failed.")

    def _where(self, call: v1.ToolCall, clock: Clock) -> CallContext:
        live = self._log.live

        async def get_state(*keys: str) -> dict[str, v1.Value]:
            state = await self._log.services.store.get_state(live.key.state, keys)
            return {key: entry.value for key, entry in state.entries.items()}

        return CallContext(
            session=names.session(live.key.session),
            session_uid=live.key.uid,
            user=live.user,
            run=names.run(live.key.session, self._log.run.name),
            call_id=call.call_id,
            attempt=call.attempt,
            get_state=get_state,
            pose=self._questions.of(call.call_id, clock),
        )


def _place(error: BaseException | None) -> str:
    """Where an exception was raised: the innermost file and line."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _result(task: asyncio.Task[Result]) -> Result:
    """What a call came to. A tool that cancelled itself has failed."""
    return (Outcome(error="The tool failed."), []) if task.cancelled() else task.result()

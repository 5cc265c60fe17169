"""Acts on deadlines in the rows, and cancels runs that no stream follows.

A deadline is a time of the wall clock. It is checked when it is due and at least every LOOK_SECONDS, so that a clock
that jumps, as after a suspension of the machine, delays nothing for long. A deadline that is due becomes a duty, which
is tried until it is done.
"""

import asyncio
import heapq
import math
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from notecase import v1

from notecase_server import errors
from notecase_server.engine import ledger
from notecase_server.engine.halt import Halt
from notecase_server.engine.run_log import RunLog
from notecase_server.engine.session import Bell, LiveSession
from notecase_server.store.bindings import declared
from notecase_server.store.contract import Clock, RunStore, SessionKey
from notecase_server.store.fold import ENDED
from notecase_server.tools.contract import Outcome

LOOK_SECONDS = 5.0

SPARE = 64
"""How many moved or dropped deadlines may be kept in addition to the valid ones."""


class Timers:
    """Holds the deadlines of the runs that wait in this process."""

    def __init__(self, clock: Clock, due: Callable[[SessionKey, str], None]) -> None:
        """`due` is called when a deadline of a run has come; it is then armed no more."""
        self._clock = clock
        self._due = due
        self._deadlines: dict[SessionKey, dict[str, int]] = {}
        self._heap: list[tuple[int, SessionKey, str]] = []
        """What was armed, the soonest first. What is not in `_deadlines` (any more) is skipped."""
        self._changed = Bell()

    def arm(self, key: SessionKey, run: str, deadline: int | None) -> None:
        """Sets the only deadline of a run, in microseconds since 1970; None for none."""
        runs = self._deadlines.get(key, {})
        if runs.get(run) == deadline:
            return
        if deadline is None:
            del runs[run]
            if not runs:
                self.disarm(key)
            return
        self._deadlines.setdefault(key, runs)[run] = deadline
        heapq.heappush(self._heap, (deadline, key, run))
        if len(self._heap) > 2 * len(self._deadlines) + SPARE:
            self._heap = [(at, key, run) for key, runs in self._deadlines.items() for run, at in runs.items()]
            heapq.heapify(self._heap)
        if deadline <= self._heap[0][0]:
            self._changed.ring()

    def disarm(self, key: SessionKey) -> None:
        """Drops the deadlines of a session's runs."""
        self._deadlines.pop(key, None)

    async def run(self) -> None:
        """Calls `due` for what has come, as long as the server lives."""
        while True:
            now = self._clock()
            while self._heap and self._heap[0][0] <= now:
                at, key, run = heapq.heappop(self._heap)
                if self._deadlines.get(key, {}).get(run) == at:
                    self.arm(key, run, None)
                    self._due(key, run)
            left = self._heap[0][0] - now if self._heap else math.inf
            await self._changed.wait(min(left / 1e6, LOOK_SECONDS))


def deadline(log: RunLog) -> int | None:
    """Returns when a waiting run is next to be looked at by `expired`, in microseconds; None for never."""
    return min((at for at, _ in _deadlines(log)), default=None)


def expired(log: RunLog) -> list[v1.Event]:
    """Returns what becomes of requests and calls that were left unanswered too long."""
    now = log.services.clock()
    return [event for at, becomes in _deadlines(log) if at <= now for event in becomes()]


def _deadlines(log: RunLog) -> Iterator[tuple[int, Callable[[], list[v1.Event]]]]:
    run, limits = log.run, log.run.limits
    calls = {call.call_id: call for call in log.open}
    for request in run.pending_inputs:
        if request.HasField("expire_time"):
            call = calls.get(request.call.call_id) or log.call(request.call.call_id)
            yield request.expire_time.ToMicroseconds(), partial(_unanswered, request, call)
    tools = declared(log.agent, run) if run.pending_calls else []
    for call in run.pending_calls:
        tool = ledger.declaration_of(tools, call)
        times = [tool.timeout.ToMicroseconds()] if tool.HasField("timeout") else []
        times += [limits.input_timeout.ToMicroseconds()] if limits.HasField("input_timeout") else []
        if times:
            yield call.start_time.ToMicroseconds() + min(times), partial(_late, call)


def _unanswered(request: v1.InputRequest, call: v1.ToolCall) -> list[v1.Event]:
    reason = "Nobody answered in time."
    decision = ledger.CANCEL if ledger.asked_by_tool(request) else ledger.DENY
    nobody = v1.InputResponse(input_id=request.input_id, decision=decision, reason=reason)
    return ledger.answered(request, nobody, call)


def _late(call: v1.ToolCall) -> list[v1.Event]:
    return [ledger.finished(call, Outcome(error="The caller gave no result in time."))]


class Alarm:
    """Halts a run when its time-out has passed, if it has one."""

    def __init__(self, run: v1.Run, halt: Callable[[Halt], None]) -> None:
        self._run = run
        self._halt = halt
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at_work: bool) -> None:
        """Lets the time pass, or stops it."""
        if self._timer is not None and not at_work:
            self._timer.cancel()
            self._timer = None
        elif self._timer is None and at_work and self._run.limits.HasField("timeout"):
            left = self._run.limits.timeout.ToMicroseconds() - self._run.running_duration.ToMicroseconds()
            self._timer = asyncio.get_running_loop().call_later(max(left, 0) / 1e6, self._over)

    def _over(self) -> None:
        seconds = self._run.limits.timeout.ToMicroseconds() / 1e6
        told = f"The run took longer than its limit of {errors.counted(seconds, 'second')}."
        error = errors.limit_exceeded("timeout", round(seconds), told)
        self._halt(Halt(state=v1.Run.STATE_FAILED, error=error.to_proto()))


class Company:
    """Watches over one run that ends when no stream has been attached for `seconds`."""

    def __init__(self, live: LiveSession, run: str, seconds: float, poll_seconds: float) -> None:
        self._live = live
        self._run = run
        self._seconds = seconds
        self._poll_seconds = poll_seconds
        self._alone_since = asyncio.get_running_loop().time()

    async def watch(self, store: RunStore, cancel: Callable[[str], Awaitable[None]]) -> None:
        """Returns as soon as the run has ended or is gone, or when `cancel` has ended it for the reason given. May be
        called again after it failed: the time alone goes on."""
        loop = asyncio.get_running_loop()
        while True:
            row = await store.get_run(self._live.key, self._run)
            if row is None or row[0].state in ENDED:
                return
            accompanied = bool(self._live.watchers or row[0].pending_inputs)
            if accompanied:
                self._alone_since = loop.time()
            left = self._seconds - (loop.time() - self._alone_since)
            if left <= 0:
                await cancel(f"No stream was attached for {self._seconds:g} seconds.")
                return
            await self._live.company.wait(self._poll_seconds if accompanied else left)
            if accompanied:
                self._alone_since = loop.time()

"""Makes sure that every run that has not ended has a worker, a timer, or a place in the queue.

No caller waits for this work, so all of it is a duty or a service of the supervisor: temporary failures of the store
are retried, and permanent refusals are recorded in the log.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.engine import ledger
from notecase_server.engine.admission import Admission
from notecase_server.engine.caused import NOBODY
from notecase_server.engine.commands import Commands, words
from notecase_server.engine.halt import Halt
from notecase_server.engine.queue import Queue
from notecase_server.engine.roster import QUEUED, Roster
from notecase_server.engine.run_log import RUNNING, WAITING, RunLog, taken
from notecase_server.engine.services import Services
from notecase_server.engine.session import LiveSession
from notecase_server.engine.sessions import Sessions
from notecase_server.engine.timers import Company, Timers, deadline, expired
from notecase_server.engine.worker import Worker
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import ActiveRun, SessionKey

log = structlog.get_logger()

TAKEOVER_BATCH = 32
"""Runs that a takeover starts before a pause: so many call the providers at once. Runs that wait for people or callers
do not count."""

RAMP_SECONDS = 0.2
"""Between two batches of a takeover."""

REPAIR_SECONDS = 2.0
"""How often unfinished runs without a worker are looked for. Whatever happened to their last worker, they continue
within seconds."""

MOVED_ON = frozenset(
    {
        v1.ERROR_REASON_SESSION_NOT_FOUND,
        v1.ERROR_REASON_RUN_NOT_FOUND,
        v1.ERROR_REASON_RUN_ENDED,
        v1.ERROR_REASON_RUN_ACTIVE,
        v1.ERROR_REASON_CALL_NOT_PENDING,
        v1.ERROR_REASON_INPUT_NOT_PENDING,
        v1.ERROR_REASON_SERVER_DRAINING,
        v1.ERROR_REASON_OWNER_LOST,
    }
)
"""Refusals that say that there is nothing left to do."""


def denies(run_log: RunLog) -> bool:
    """Returns whether a run waits for people alone, and a user who may answer all that it asks has said something
    instead."""
    run = run_log.run
    if run.state != WAITING or run.pending_calls or not run.pending_inputs:
        return False
    senders = (event.command_queued.approver for event in run_log.said)
    return any(ledger.refusal(run.pending_inputs, sender, "input") is None for sender in senders)


class Upkeep:
    """Does the background work for all runs of one process."""

    def __init__(
        self,
        sessions: Sessions,
        services: Services,
        roster: Roster,
        admission: Admission,
        queue: Queue,
        commands: Commands,
        poll_seconds: float,
    ) -> None:
        self._sessions = sessions
        self._services = services
        self._store = services.store
        self._roster = roster
        self._queue = queue
        self._commands = commands
        self._poll_seconds = poll_seconds
        self._timers = Timers(services.clock, self._time_is_up)
        self._left_over: set[tuple[SessionKey, str]] = set()
        """Runs that could not be taken over: they are tried again."""
        roster.settle, roster.lost, roster.employed = self.settle, self.lost, self.employed
        roster.tending = self.tending
        admission.queued = self.start_next
        sessions.unsure = self.settle_commits
        sessions.gone = self._timers.disarm

    def start(self) -> None:
        """Takes over the runs that an earlier process left, and looks after all runs from then on."""
        self._services.supervisor.service("upkeep", self._run)
        self._services.supervisor.service("timers", self._timers.run)

    async def _run(self) -> None:
        await self.take_over()
        while True:
            await asyncio.sleep(REPAIR_SECONDS)
            await self.repair()

    # ---- takeover and repair

    async def take_over(self) -> int:
        """Goes on with every run that a process before this one left, from its last commit; returns how many were at
        work. One that cannot be taken over is left for `repair`."""
        taken_over, set_to_work, after = 0, 0, None
        while page := await self._store.active_runs(after, TAKEOVER_BATCH):
            for active in page:
                adopted = await self._adopt(active)
                taken_over += adopted
                if adopted or active.run.state == QUEUED:
                    set_to_work += 1
                    if set_to_work % TAKEOVER_BATCH == 0:
                        await asyncio.sleep(RAMP_SECONDS)
            after = page[-1]
        return taken_over

    async def repair(self) -> None:
        """Sets workers to work on runs that have none."""
        for active in await self._store.idle_runs():
            if self._roster.at_work(active.key, active.run.name) is None:
                await self._adopt(active)
        for key, run in list(self._left_over):
            await self._adopt_left_over(key, run)

    async def _adopt_left_over(self, key: SessionKey, run: str) -> None:
        try:
            active = await self._store.active_run(key, run)
        except NotecaseError as error:
            log.warning("takeover_delayed", session=key.session, run=run, reason=errors.reason_name(error.reason))
            return
        self._left_over.discard((key, run))
        if active is not None:
            await self._adopt(active)

    async def _adopt(self, found: ActiveRun) -> bool:
        """Gives a run a worker, a timer or a place in the queue. Returns whether it was RUNNING and is now taken over.
        A failure does not affect other runs."""
        key, run = found.key, found.run.name
        try:
            if found.run.state == QUEUED:
                self.start_next(key)
                return False
            live, _ = await self._sessions.watched(key)
            async with live.held():
                if self._roster.at_work(key, run) is not None:
                    return False
                active = await self._store.active_run(key, run)
                session = await self._store.get_session(key)
                if active is None or session is None or active.run.state == QUEUED:
                    return False
                worker = await self._roster.adopted(live, session, active)
                self.settle(worker)
                return active.run.state == RUNNING
        except NotecaseError as error:
            if error.reason in MOVED_ON:
                return False
            log.warning("takeover_delayed", session=key.session, run=run, reason=errors.reason_name(error.reason))
        except Exception:
            log.exception("takeover_failed", session=key.session, run=run)
        self._left_over.add((key, run))
        return False

    def lost(self, worker: Worker) -> None:
        """Leaves a run whose worker broke to the next `repair`: one that breaks each time is not tried without a
        pause."""
        self._left_over.add((worker.log.live.key, worker.log.run.name))

    # ---- what follows when a worker has gone home

    def settle(self, worker: Worker) -> None:
        """Restarts a run without a worker, arms its timers, or starts the next queued run. Does nothing for a deleted
        session, and when the worker has lost its run to another process."""
        if self._roster.draining or worker.lost or worker.log.live.deleted:
            return
        run_log = worker.log
        key, run = run_log.live.key, run_log.run
        self._timers.arm(key, run.name, None)
        if run.state == RUNNING:
            self._roster.employ(worker)
        elif run.state == WAITING:
            self.tending(worker)
            self._accompany(worker)
        elif run_log.ended and run_log.session.queued_commands:
            self.start_next(key)

    def tending(self, worker: Worker) -> None:
        """Arms the timers of a waiting run, whether its tools run or not. If the run waits only for approvals or
        answers, and a user who may answer has sent new input, that replaces the answers."""
        run_log = worker.log
        key, run = run_log.live.key, run_log.run
        self._timers.arm(key, run.name, deadline(run_log))
        if denies(run_log):
            self._duty("deny", key, run.name, lambda: self._deny_for_queue(key, run.name))

    def _duty(self, name: str, key: SessionKey, run: str, act: Callable[[], Awaitable[None]]) -> None:
        """Starts a duty for a run. When it is permanently refused and the run has not changed meanwhile, the run
        fails."""

        async def refused(error: NotecaseError) -> None:
            if error.reason not in MOVED_ON:
                log.error("run_stuck", duty=name, session=key.session, run=run, reason=errors.reason_name(error.reason))
                await self._fail(key, run, error)

        self._services.supervisor.duty(name, (key, run), act, refused)

    async def _fail(self, key: SessionKey, run: str, error: NotecaseError) -> None:
        try:
            async with self._roster.worker(key, run, NOBODY) as worker:
                halt = Halt(state=v1.Run.STATE_FAILED, error=error.to_proto(), reason="It cannot go on.")
                self._roster.halt(worker, halt)
            await halt.done
        except NotecaseError as moved:
            if moved.reason not in MOVED_ON:
                raise

    async def _deny_for_queue(self, key: SessionKey, run: str) -> None:
        """Puts users' messages in place of the answers that the run waits for, after the results of tools that
        asked."""
        async with self._roster.worker(key, run, NOBODY) as worker:
            run_log = worker.log
            if denies(run_log):
                queued = run_log.queued(v1.UserInput.WHEN_FOLLOW_UP)
                reason = words(event.command_queued.input for event in queued)
                denied = ledger.withdrawn(run_log.run, run_log.message, reason, deny=True)
                left = ledger.left_open(run_log.message, denied)  # tools that asked: they go on first
                await run_log.command(denied if left else [*denied, *taken(queued)])

    # ---- the queue

    def start_next(self, key: SessionKey) -> None:
        """Starts the first queued run of a session when it is idle and a slot is free. A start that is permanently
        refused ends as a failed run, and the next one follows."""

        async def refused(error: NotecaseError) -> None:
            if error.reason not in MOVED_ON:  # a defect that shows every time
                await self._queue.fail_next(key, error)

        self._services.supervisor.duty("start", key, lambda: self._queue.start_next(key), refused)

    # ---- commits whose answers were lost

    def settle_commits(self, live: LiveSession) -> None:
        """Asks the store about commits until it is known whether they were made, so that no caller has to wait for
        it."""

        async def settle() -> None:
            async with live.held():
                pass

        async def refused(error: NotecaseError) -> None:
            log.error("commit_unknown", session=live.key.session, reason=errors.reason_name(error.reason))

        self._services.supervisor.duty("settle", live.key, settle, refused)

    # ---- time

    def _time_is_up(self, key: SessionKey, run: str) -> None:
        async def expire() -> None:
            async with self._roster.worker(key, run, NOBODY) as worker:
                if events := expired(worker.log):
                    await worker.log.command(events)

        self._duty("deadline", key, run, expire)

    def employed(self, worker: Worker) -> None:
        """Records that a run is active: the deadlines of its wait no longer apply."""
        self._timers.arm(worker.log.live.key, worker.log.run.name, None)
        self._accompany(worker)

    def _accompany(self, worker: Worker) -> None:
        """Cancels a run that no stream has followed for as long as its `disconnect` allows. One task watches it from
        its first worker to its end."""
        key, run = worker.log.live.key, worker.log.run.name
        bounded = worker.log.run.disconnect.HasField("cancel_after") and not worker.log.ended
        if not bounded or self._services.supervisor.is_at("company", (key, run)):
            return
        seconds = worker.log.run.disconnect.cancel_after.ToMicroseconds() / 1e6
        company = Company(worker.log.live, run, seconds, self._poll_seconds)

        async def cancel(reason: str) -> None:
            await self._commands.cancel(key, run, v1.CancelCommand(reason=reason))

        self._duty("company", key, run, lambda: company.watch(self._store, cancel))

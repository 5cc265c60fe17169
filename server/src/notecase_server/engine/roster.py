"""Knows which worker has which run in this process."""

import asyncio
import contextvars
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import structlog
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine import ledger
from notecase_server.engine.caused import Caused
from notecase_server.engine.context import Newest
from notecase_server.engine.halt import Halt
from notecase_server.engine.run_log import RUNNING, RunLog
from notecase_server.engine.seat import last_work
from notecase_server.engine.services import Services
from notecase_server.engine.session import LiveSession
from notecase_server.engine.sessions import Sessions
from notecase_server.engine.worker import Worker
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import ActiveRun, Committed, Query, SessionKey, StepKey
from notecase_server.store.fold import ENDED, open_calls
from notecase_server.supervisor import Tasks, backoff

log = structlog.get_logger()

QUEUED = v1.Run.STATE_QUEUED

RELEASE_TRIES = 2
"""A stop does not wait long for a store that is away: the next process then counts a death too many."""

NOT_UNDER_WAY = frozenset({v1.ERROR_REASON_RUN_NOT_FOUND, v1.ERROR_REASON_RUN_ENDED, v1.ERROR_REASON_RUN_ACTIVE})
"""Why a run takes no answers: it never was, has ended, or is queued."""


class Entry(msgspec.Struct, frozen=True):
    """A worker with its task: active, or waiting for its slot."""

    worker: Worker
    task: asyncio.Task[None]


class Roster:
    """Holds the workers of one process."""

    def __init__(self, sessions: Sessions, services: Services) -> None:
        self.draining = False
        self.settle: Callable[[Worker], None] = lambda _: None
        """Called with a worker that is not running: see Upkeep.settle."""
        self.employed: Callable[[Worker], None] = lambda _: None
        """Called with a worker that was set to work: see Upkeep.employed."""
        self.tending: Callable[[Worker], None] = lambda _: None
        """Called with a worker that waits for calls: see Upkeep.tending."""
        self.lost: Callable[[Worker], None] = lambda _: None
        """Called with a worker that broke: see Upkeep.lost."""
        self._sessions = sessions
        self._services = services
        self._store = services.store
        self._entries: dict[tuple[SessionKey, StepKey], Entry] = {}
        self._drained: list[Worker] = []
        """Those that were asked to go."""
        self._tasks = Tasks("workers")

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def at_work(self, key: SessionKey, run: str) -> Worker | None:
        """Returns the worker of a run. None once it has stopped, since it takes no more commands then."""
        entry = self._entries.get((key, StepKey(run)))
        return None if entry is None or entry.task.done() else entry.worker

    # ---- to work, and from it

    def begin(self, live: LiveSession, committed: Committed, run: str, agent: v1.Agent, *, placed: bool) -> None:
        """Sets a worker to work on a run that a commit has started. With `placed` it gets the slot that the caller has
        taken, else it waits for one. The caller holds the session's lock."""
        if self.at_work(live.key, run) is not None:
            if placed:
                self._services.places.give_back()
            return
        active = ActiveRun(live.key, committed.runs[run], agent, committed.epoch)
        worker = Worker(RunLog(live, self._services, committed.session, active), self)
        worker.seat.taken = placed
        if committed.newest is not None:
            worker.newest = Newest(committed.session.last_sequence, committed.newest)
        self.employ(worker)

    def begin_next(self, worker: Worker, halt: Halt, committed: Committed) -> None:
        """Starts the worker of the run that a halt has started in place of another. The session's lock is held, so that
        nothing else is decided in between."""
        assert halt.replacement is not None
        run, agent = halt.replacement.run, halt.replacement.record.agent
        placed, worker.seat.taken = worker.seat.taken, False
        self.begin(worker.log.live, committed, run, agent, placed=placed)

    def employ(self, worker: Worker) -> None:
        """Starts a worker. Its run may have no other."""
        if self.draining:
            worker.drain()
            self._drained.append(worker)
        live, step = worker.log.live, worker.log.step
        task = self._tasks.start(worker.work(), f"run {step.run}", fresh=True)
        self._entries[live.key, step] = Entry(worker, task)
        live.work.add(task)
        task.add_done_callback(partial(self._left, worker), context=contextvars.Context())
        self.employed(worker)

    def halt(self, worker: Worker, halt: Halt) -> None:
        """Makes the worker stop what is running, also when the run waits. The caller holds the session's lock."""
        worker.halt(halt)
        if self.at_work(worker.log.live.key, worker.log.run.name) is None:
            self.employ(worker)

    def _left(self, worker: Worker, task: asyncio.Task[None]) -> None:
        live, step = worker.log.live, worker.log.step
        live.work.discard(task)
        worker.let_go()
        if self._entries[live.key, step].task is not task:
            return  # another worker has the run already
        del self._entries[live.key, step]
        if task.cancelled() or task.exception() is not None:
            if not (live.deleted or self.draining):
                log.error("run_lost", session=live.key.session, run=step.run, cancelled=task.cancelled())
                worker.lost = True
                self.lost(worker)
        elif not worker.lost:
            self.settle(worker)

    async def drain(self, grace: float) -> None:
        """Waits up to `grace` seconds for running replies and calls, then stops the rest. Runs that have not ended stay
        in the store as they are, with a record that they were left in an orderly way."""
        self.draining = True
        self._drained += [entry.worker for entry in self]
        for worker in self._drained:
            worker.drain()
        left = await self._tasks.close(grace)
        for worker in self._drained:
            if worker.log.run.state == RUNNING and not worker.lost and not worker.log.live.deleted:
                await self._release(worker.log)
        log.info("runs_drained", left=left)

    async def _release(self, run_log: RunLog) -> None:
        for wait in itertools.islice(backoff(), RELEASE_TRIES):
            try:
                await self._store.release_run(run_log.live.key, run_log.run.name)
            except NotecaseError as error:
                run_log.log.warning("run_not_released", reason=errors.reason_name(error.reason))
                await asyncio.sleep(wait)
            else:
                return

    # ---- the worker of a run

    @asynccontextmanager
    async def worker(
        self, key: SessionKey, run: str, caused: Caused, late: NotecaseError | None = None
    ) -> AsyncIterator[Worker]:
        """Yields the worker of an active run (for "", of the session's active one) under the session's lock; makes one
        if there is none. Afterwards the run continues if it can. Raises Replayed and Duplicate for a repeat,
        SESSION_NOT_FOUND, SERVER_DRAINING, and `late` for a run that is not active; by default RUN_NOT_FOUND,
        RUN_ENDED, and RUN_ACTIVE for a run that is queued behind another."""
        live = self._sessions.live(key)
        async with live.held():
            await self._store.recall(caused.once)
            await self._store.recall_command(key, caused.command)
            _, session = await self._sessions.watched(key)
            run = run or session.active_run
            try:
                worker = self.at_work(key, run) or await self._made(live, session, run)
            except NotecaseError as error:
                raise (late if late is not None and error.reason in NOT_UNDER_WAY else error) from None
            try:
                yield worker
            finally:
                live.once_known(lambda: self._go_on(worker))

    def _go_on(self, worker: Worker) -> None:
        """Makes sure that the commit of a command has a worker to follow it. A worker that has just stopped is settled
        by its own end, since the run may not have to continue."""
        entry = self._entries.get((worker.log.live.key, worker.log.step))
        if entry is None:
            self.settle(worker)
        elif not entry.task.done():
            worker.stir()

    async def _made(self, live: LiveSession, session: v1.Session, run: str) -> Worker:
        active = await self._store.active_run(live.key, run) if run else None
        if active is None:
            raise await self._not_under_way(live.key, run)
        if active.run.state == QUEUED:
            raise errors.run_active(names.run(live.key.session, session.active_run or run))
        if self.draining and (active.run.state == RUNNING or ledger.lost(active.run)):
            raise errors.draining()
        return await self.adopted(live, session, active)

    async def adopted(self, live: LiveSession, session: v1.Session, active: ActiveRun) -> Worker:
        """Makes a worker from the rows. A run that is RUNNING had another worker: its epoch is raised, so that the
        other can commit nothing more. Questions of tools under that worker are withdrawn, since nothing would receive
        their answers. The caller holds the session's lock, and settles the worker."""
        step = StepKey(active.run.name)
        newest = await self._store.list_messages(live.key, Query(1), newest_first=True, step=step)
        message = newest.rows[0] if newest.rows and open_calls(newest.rows[0]) else None
        said = [
            event
            for queued in session.queued_commands
            if queued.run == active.run.name
            for event in await self._store.read_events(live.key, queued.sequence - 1, 1)
        ]
        worker = Worker(RunLog(live, self._services, session, active, message, said), self)
        if active.run.state == RUNNING:
            worker.seat.worked_until = await last_work(self._store, live.key, active.run)
            worker.log.epoch = await self._store.claim(live.key, active.epoch)
            worker.takes_over = active.deaths + (not active.released)
        if lost := ledger.lost(active.run):
            worker.takes_over = worker.takes_over or 0
            withdrawn = ledger.unasked(lost, "The process in which the tool waited for the answer was lost.")
            await worker.log.command(withdrawn, deaths=worker.takes_over)
        return worker

    async def _not_under_way(self, key: SessionKey, run: str) -> NotecaseError:
        if not run:
            return errors.no_run(names.session(key.session))
        row = await self._store.get_run(key, run)
        name = names.run(key.session, run)
        if row is None:
            return errors.not_found("run", name)
        return errors.run_ended(name, row[0].state) if row[0].state in ENDED else errors.draining()

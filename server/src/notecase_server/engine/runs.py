"""The runs of this process: started, queued, taken over, answered, stopped, waited for and drained.

"May this happen at this moment?" is answered here or, where another process could answer differently, by the commit
itself.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import structlog
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine import ledger, summary
from notecase_server.engine.rewind import Rewind, ended, rewound, rolled_back
from notecase_server.engine.session import LiveSession, Sessions
from notecase_server.engine.turn import RUNNING, WAITING, Halt, Services, Worker
from notecase_server.errors import NotecaseError, Violation
from notecase_server.store.contract import (
    ActiveRun,
    Answer,
    CommandId,
    Commit,
    Committed,
    Duplicate,
    Fork,
    Once,
    Query,
    Replayed,
    RunRecord,
    SessionKey,
    StepKey,
)
from notecase_server.store.fold import ENDED, open_calls
from notecase_server.tools import naming
from notecase_server.tools.contract import Outcome

T = TypeVar("T")

log = structlog.get_logger()

COMPLETED = v1.Message.STATUS_COMPLETED
QUEUED = v1.Run.STATE_QUEUED
INTERRUPT = v1.StartRun.ON_BUSY_INTERRUPT

POLL_SECONDS = 5.0
"""How often what waits looks into the store although no bell rang: a lost hint costs this much time, and nothing
else."""

NOT_UNDER_WAY = frozenset({v1.ERROR_REASON_RUN_NOT_FOUND, v1.ERROR_REASON_RUN_ENDED, v1.ERROR_REASON_RUN_ACTIVE})
"""Why a run takes no answers: it never was, has ended, or is queued."""

BUSY_TRIES = 5
"""How often a start that stops another run tries again when that one had ended and a third one came first."""


class Started(NamedTuple):
    """A run that a start made, or found."""

    key: SessionKey
    run: v1.Run
    """The caller's own."""
    existing: bool


class Caused(NamedTuple):
    """What is behind a write: its id in the log, and what makes it idempotent."""

    cause_id: str = ""
    once: Once | None = None
    command: CommandId | None = None


class Runs:
    """All runs of this process."""

    def __init__(
        self, sessions: Sessions, services: Services, max_runs: int, poll_seconds: float = POLL_SECONDS
    ) -> None:
        """At most `max_runs` are at work at once; those that wait or are queued do not count."""
        self.max_runs = max_runs
        self._sessions = sessions
        self._services = services
        self._store = services.store
        self._contents = services.contents
        self._new_id = services.new_id
        self._poll_seconds = poll_seconds
        self._workers: dict[tuple[SessionKey, StepKey], tuple[Worker, asyncio.Task[None]]] = {}
        self._alarms: dict[tuple[SessionKey, str], asyncio.TimerHandle] = {}
        self._chaperones: dict[tuple[SessionKey, str], asyncio.Task[None]] = {}
        self._errands: set[asyncio.Task[Any]] = set()
        self._starting = 0
        self._draining = False

    # ---- starts

    async def start(self, tenant: str, start: v1.StartRun, caused: Caused | None = None) -> Started:
        """Starts a run in a session, made if need be, in one commit. A run_id that exists with the same body is found,
        not started again, and so is a command that came before.

        Raises Replayed for a repeat, and NotecaseError: SESSION_NOT_FOUND, AGENT_NOT_FOUND, ALREADY_EXISTS, RUN_ACTIVE,
        REQUEST_ID_REUSED, SEQUENCE_MISMATCH, RATE_LIMITED, QUEUE_FULL, SERVER_DRAINING, INVALID_FIELD,
        RUN_CANCELLED_BEFORE_START."""
        return await self._whole(self._found_or_started(tenant, start, caused or Caused()))

    async def _found_or_started(self, tenant: str, start: v1.StartRun, caused: Caused) -> Started:
        body = v1.StartRun()
        body.CopyFrom(start)
        body.ClearField("options")
        body.ClearField("if_session_uid")
        digest = hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
        await self._store.recall(caused.once)
        key = await self._meant(tenant, start)
        try:
            await self._store.recall_command(key, caused.command)
            if found := await self._find(key, start.run_id, digest):
                return found
            if not start.session:  # the one that has the name may be deleted meanwhile, and its uid is never used again
                key = self._sessions.new_key(tenant, key.session)
            del body.messages[:]
            body.messages.extend(await self._contents.kept(key, start.messages, start.state))
            return await self._admit(key, body, digest, caused)
        except Duplicate as duplicate:
            row = await self._store.get_run(key, duplicate.run)
            if row is None:
                raise errors.reused("command_id", caused.cause_id) from None
            return Started(key, row[0], existing=True)
        except NotecaseError as error:
            if error.reason == v1.ERROR_REASON_ALREADY_EXISTS:
                key = await self._meant(tenant, start)  # somebody else has just made a session of this name
            elif error.reason != v1.ERROR_REASON_RUN_ACTIVE:
                raise
            if found := await self._find(key, start.run_id, digest):
                return found
            raise

    async def _meant(self, tenant: str, start: v1.StartRun) -> SessionKey:
        """The session that a start names, or the one that it makes; SESSION_NOT_FOUND. A new one whose name is taken
        is the one that has it: the start may be a repeat."""
        if start.session:
            key, _ = await self._sessions.find(tenant, start.session.removeprefix("sessions/"), start.if_session_uid)
            return key
        session = start.new_session.name.removeprefix("sessions/")
        row = await self._store.find_session(tenant, session) if session else None
        if row is not None:
            return SessionKey(tenant, session, row.uid)
        return self._sessions.new_key(tenant, session or self._new_id())

    async def _find(self, key: SessionKey, run_id: str, digest: bytes) -> Started | None:
        row = await self._store.get_run(key, run_id) if run_id else None
        if row is None:
            return None
        if not row[1]:
            raise errors.cancelled_before_start(names.run(key.session, run_id))
        if row[1] != digest:
            raise errors.reused("run_id", run_id)
        return Started(key, row[0], existing=True)

    async def _admit(self, key: SessionKey, start: v1.StartRun, digest: bytes, caused: Caused) -> Started:
        for _ in range(BUSY_TRIES):
            try:
                return await self._start(key, start, digest, caused)
            except NotecaseError as error:
                if error.reason != v1.ERROR_REASON_RUN_ACTIVE:
                    raise
                if start.on_busy == v1.StartRun.ON_BUSY_QUEUE:
                    return await self._queue(key, start, digest, caused)
                if start.on_busy in {v1.StartRun.ON_BUSY_UNSPECIFIED, v1.StartRun.ON_BUSY_REJECT}:
                    raise
                active = error.metadata["run"].rpartition("/")[2]
            if found := await self._find(key, start.run_id, digest):
                return found  # a repeat must not stop the very run that it asks for
            try:
                return await self._replace(key, active, start, digest, caused)
            except NotecaseError as error:  # it may have ended by itself, and there is nothing to stop
                if error.reason not in {v1.ERROR_REASON_RUN_ENDED, v1.ERROR_REASON_RUN_NOT_FOUND}:
                    raise
        raise errors.run_active(names.run(key.session, active))

    async def _start(self, key: SessionKey, start: v1.StartRun, digest: bytes, caused: Caused) -> Started:
        with self._place():
            live = self._sessions.live(key)
            session = start.new_session
            if start.session:
                live, session = await self._sessions.watched(key)
            agent = await self._agent(key.tenant, start, session)
            rewinds = start.HasField("rewind_to_sequence")
            if not (start.messages or rewinds):
                await self._require_question(key)
            run_id = start.run_id or self._new_id()
            commit = Commit(
                key=key,
                once=caused.once,
                command=caused.command,
                create=None if start.session else session,
                claim=True,
                if_last_sequence=start.if_last_sequence if start.HasField("if_last_sequence") else None,
                events=self._opening(start, session.user, agent, run_id, caused.cause_id),
                start=RunRecord(digest, agent),
            )
            async with live.lock:
                if rewinds:
                    place = (start.rewind_to_sequence, "start.rewind_to_sequence")
                    committed = await self._commit_back(live, commit, *place, caused.cause_id)
                else:
                    committed = await live.commit(commit)
                self._begin(live, committed, run_id, agent)
            return Started(key, committed.runs[run_id], existing=False)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Takes the place of a run that is at work for the block's time. SERVER_DRAINING, RATE_LIMITED."""
        if self._draining:
            raise errors.draining()
        if len(self._workers) + self._starting >= self.max_runs:
            raise errors.too_many_runs(self.max_runs)
        self._starting += 1
        try:
            yield
        finally:
            self._starting -= 1

    def _begin(self, live: LiveSession, committed: Committed, run_id: str, agent: v1.Agent) -> None:
        """Sets to work on a run that the commit started."""
        run = _copy(committed.runs[run_id])
        self._employ(Worker(live, self._services, committed.session, run, agent, committed.epoch))

    async def _agent(self, tenant: str, start: v1.StartRun, session: v1.Session) -> v1.Agent:
        if not (start.agent or session.agent):
            raise errors.invalid([Violation("start.agent", "neither the start nor the session names an agent")])
        agent = await self._named(tenant, start.agent or session.agent)
        taken = {name for tool in agent.llm.tools for name in naming.declared(tool)}
        clashes = [
            Violation(f"start.client_tools[{index}].name", f"the agent has a tool {tool.name!r} of its own")
            for index, tool in enumerate(start.client_tools)
            if tool.name in taken
        ]
        if clashes:
            raise errors.invalid(clashes)
        return agent

    async def _named(self, tenant: str, name: str) -> v1.Agent:
        parsed = names.parse_agent(name)
        agent = await self._store.get_agent(tenant, parsed.agent, parsed.revision) if parsed else None
        if agent is None:
            raise errors.not_found("agent", name)
        return agent

    async def _require_question(self, key: SessionKey, until: int | None = None) -> None:
        """INVALID_FIELD when the history up to that sequence ends with nothing to answer: what was said, or results of
        calls."""
        after = None if until is None else (until + 1,)
        newest = (await self._store.list_messages(key, Query(1, after), newest_first=True)).rows
        if not newest or _is_answer(newest[0]):
            problem = "is empty, and the session's history does not end with something to answer"
            raise errors.invalid([Violation("start.messages", problem)])

    def _opening(self, start: v1.StartRun, user: str, agent: v1.Agent, run_id: str, cause_id: str) -> list[v1.Event]:
        started = v1.RunStarted(
            agent=agent.name,
            agent_revision=agent.revision,
            client_tools=start.client_tools,
            limits=start.limits if start.HasField("limits") else None,
            disconnect=start.disconnect if start.HasField("disconnect") else None,
            labels=start.labels,
        )
        events = [v1.Event(run_started=started)]
        if start.state:
            ops = [v1.StateOp(key=name, set=value) for name, value in sorted(start.state.items())]
            events.append(v1.Event(state_changed=v1.StateChanged(ops=ops)))
        events += [v1.Event(message_added=m) for m in self.incoming(start.messages, user)]
        for event in events:
            event.run = run_id
            event.cause_id = cause_id
            if event.HasField("message_added"):
                event.message_added.run = run_id
        return events

    def incoming(self, messages: Sequence[v1.Message], user: str) -> list[v1.Message]:
        """What a caller says, as it goes into the log: with an id, whole, by the session's user unless it says by
        whom."""
        made = []
        for given in messages:
            message = v1.Message(
                name=self._new_id(),
                role=given.role or v1.Message.ROLE_USER,
                author=given.author or user,
                parts=given.parts,
                labels=given.labels,
                status=COMPLETED,
            )
            made.append(message)
        return made

    async def _replace(
        self, key: SessionKey, active: str, start: v1.StartRun, digest: bytes, caused: Caused
    ) -> Started:
        """Ends the active run, rewinds the session if the start says so, and starts another: one commit, so that nobody
        who is queued comes between."""
        live, session = await self._sessions.watched(key)
        agent = await self._agent(key.tenant, start, session)
        run_id = start.run_id or self._new_id()
        async with self._worker(key, active, Caused()) as worker:
            back = self._way_back(key, start, worker.run)
            to_sequence = None
            if back is not None:  # what stands in its way is told before anything is stopped
                to_sequence = (await back()).events[0].rewound.to_sequence
            if not start.messages:
                await self._require_question(key, to_sequence)
            halt = Halt(
                events=self._opening(start, session.user, agent, run_id, caused.cause_id),
                rewind=back,
                start=RunRecord(digest, agent),
                reason="Another run was started." if start.on_busy == INTERRUPT else "It was rolled back.",
                then=lambda committed: self._begin(live, committed, run_id, agent),
                once=caused.once,
                command=caused.command,
            )
            self._halt(worker, halt)
        return Started(key, (await halt.done).runs[run_id], existing=False)

    def _way_back(
        self, key: SessionKey, start: v1.StartRun, run: v1.Run
    ) -> Callable[[], Coroutine[Any, Any, Rewind]] | None:
        """How far the session goes back when `start` takes the place of `run`; None for not at all."""
        if start.on_busy == v1.StartRun.ON_BUSY_ROLLBACK:
            return lambda: rolled_back(self._store, key, run)
        if not start.HasField("rewind_to_sequence"):
            return None
        return lambda: rewound(self._store, key, start.rewind_to_sequence, "start.rewind_to_sequence")

    async def _queue(self, key: SessionKey, start: v1.StartRun, digest: bytes, caused: Caused) -> Started:
        if not start.messages:
            problem = "is empty, and nobody knows what the session's history will end with when this start's turn comes"
            raise errors.invalid([Violation("start.messages", problem)])
        live, session = await self._sessions.watched(key)
        agent = await self._agent(key.tenant, start, session)
        run_id = start.run_id or self._new_id()
        waiting = v1.StartRun()
        waiting.CopyFrom(start)
        waiting.agent = agent.name
        event = v1.Event(run=run_id, cause_id=caused.cause_id or run_id)
        event.command_queued.start.CopyFrom(waiting)
        committed = await live.commit(
            Commit(key=key, once=caused.once, command=caused.command, events=[event], start=RunRecord(digest, agent))
        )
        await self._next(key)
        return Started(key, committed.runs[run_id], existing=False)

    async def _next(self, key: SessionKey) -> None:
        """Starts the first queued run of an idle session."""
        live = self._sessions.live(key)
        async with live.lock:
            session = await self._store.get_session(key)
            if session is None or session.active_run or self._draining:
                return
            for queued in session.queued_commands:
                active = await self._store.active_run(key, queued.run)
                if active is None or active.run.state != QUEUED:
                    continue
                (event,) = await self._store.read_events(key, queued.sequence - 1, 1)
                start = event.command_queued.start
                events = self._opening(start, session.user, active.agent, queued.run, queued.command_id)
                committed = await live.commit(Commit(key=key, claim=True, events=events))
                self._begin(live, committed, queued.run, active.agent)
                return

    # ---- the past

    async def rewind(
        self, key: SessionKey, to_sequence: int, if_last_sequence: int | None, caused: Caused
    ) -> Committed:
        """Takes a session back to a sequence, in one commit.

        Raises Replayed for a repeat, and NotecaseError: SESSION_NOT_FOUND, RUN_ACTIVE, SEQUENCE_MISMATCH,
        SEQUENCE_AHEAD, INVALID_FIELD."""
        commit = Commit(key=key, once=caused.once, if_last_sequence=if_last_sequence)
        return await self._whole(self._rewind(commit, to_sequence, caused.cause_id))

    async def _rewind(self, commit: Commit, to_sequence: int, cause_id: str) -> Committed:
        live = self._sessions.live(commit.key)
        async with live.lock:
            await self._store.recall(commit.once)
            return await self._commit_back(live, commit, to_sequence, "to_sequence", cause_id)

    async def _commit_back(
        self, live: LiveSession, commit: Commit, to_sequence: int, field: str, cause_id: str
    ) -> Committed:
        """The commit, with the way back before its events. The caller holds the session's lock, and yet others write:
        what they wrote meanwhile is rewound too, unless the commit has a condition of its own."""
        while True:
            _, session = await self._sessions.watched(live.key)
            if busy := session.active_run or next((queued.run for queued in session.queued_commands), ""):
                raise errors.run_active(names.run(live.key.session, busy))
            if commit.if_last_sequence not in {None, session.last_sequence}:
                raise errors.sequence_mismatch(session.last_sequence)
            back = await rewound(self._store, live.key, to_sequence, field)
            if commit.start is not None and not any(event.HasField("message_added") for event in commit.events):
                await self._require_question(live.key, to_sequence)
            for event in back.events:
                event.cause_id = cause_id
            try:
                return await live.commit(
                    replace(commit, if_last_sequence=back.head, events=[*back.events, *commit.events])
                )
            except NotecaseError as error:
                if error.reason != v1.ERROR_REASON_SEQUENCE_MISMATCH:
                    raise

    async def fork(
        self, source: SessionKey, at_sequence: int | None, key: SessionKey, chosen: v1.Session, once: Once | None
    ) -> Committed:
        """A new session that begins with the log of another up to a sequence, its head for None. What of `chosen` is
        empty is the source's, but for when it expires.

        Raises Replayed for a repeat, and NotecaseError: SESSION_NOT_FOUND, SEQUENCE_AHEAD, ALREADY_EXISTS."""
        _, session = await self._sessions.watched(source)
        past = await self._store.read_past(source, session.last_sequence if at_sequence is None else at_sequence)
        made = v1.Session(
            display_name=chosen.display_name or past.session.display_name,
            agent=chosen.agent or past.session.agent,
            labels=chosen.labels or past.session.labels,
        )
        for name in ("expire_time", "ttl", "idle_ttl"):
            if chosen.HasField(name):
                getattr(made, name).CopyFrom(getattr(chosen, name))
        fork = Fork(key=key, source=source, past=past, session=made, events=ended(past))
        record = self._sessions.record(once, key.tenant, Answer("session"))
        committed = await self._sessions.surely(record, lambda record: self._store.fork(replace(fork, once=record)))
        self._sessions.live(key).committed(committed)
        return committed

    # ---- summaries

    async def compact(self, key: SessionKey, keep_recent: int, agent_name: str, caused: Caused) -> Committed:
        """Has the older messages of an idle session summarised by an agent's model, "" for the session's agent: all but
        the newest `keep_recent`, 0 for as many as the agent says. The commit is empty when that leaves nothing.

        Raises Replayed for a repeat, and NotecaseError: SESSION_NOT_FOUND, AGENT_NOT_FOUND, RUN_ACTIVE, INVALID_FIELD,
        RATE_LIMITED, SERVER_DRAINING, SEQUENCE_MISMATCH, and what the model's provider raises."""
        with self._place():
            await self._store.recall(caused.once)
            live, session = await self._sessions.watched(key)
            if session.active_run:
                raise errors.run_active(names.run(key.session, session.active_run))
            if not (agent_name or session.agent):
                raise errors.invalid([Violation("agent", "neither the request nor the session names an agent")])
            llm = (await self._named(key.tenant, agent_name or session.agent)).llm
            keep = keep_recent or llm.context.summary.keep_recent or summary.KEEP_RECENT
            plan = await summary.plan(self._store, key, session.summary_sequence, keep, batch=1)
            events: list[v1.Event] = []
            if plan is not None:
                provider = self._services.providers.get(llm.provider)
                if provider is None:
                    raise errors.model_error(f"This server has no provider {llm.provider!r}.")
                events = plan.events(*await summary.write(provider, plan.request(llm)))
            for event in events:
                event.cause_id = caused.cause_id
            return await live.commit(Commit(key=key, once=caused.once, events=events))

    # ---- workers

    def _employ(self, worker: Worker) -> None:
        place = (worker.live.key, StepKey(worker.run.name))
        if (alarm := self._alarms.pop((worker.live.key, worker.run.name), None)) is not None:
            alarm.cancel()
        if self._draining:
            worker.drain()
        task = asyncio.create_task(worker.work(), name=f"run {worker.run.name}")
        self._workers[place] = (worker, task)
        worker.live.work = task
        task.add_done_callback(lambda done: self._left(worker, done))
        self._accompany(worker)

    def _at_work(self, key: SessionKey, run_id: str) -> Worker | None:
        """The worker of a run, unless it has turned to go: then nobody may count on it any more."""
        worker, task = self._workers.get((key, StepKey(run_id)), (None, None))
        return None if task is None or task.done() else worker

    def _left(self, worker: Worker, task: asyncio.Task[None]) -> None:
        place = (worker.live.key, StepKey(worker.run.name))
        if self._workers[place][1] is not task:
            return  # somebody else is at work on it already
        del self._workers[place]
        worker.live.work = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("run_lost", session=place[0].session, run=place[1].run, exc_info=error)
        elif not worker.lost:
            self._settle(worker)

    def _settle(self, worker: Worker) -> None:
        """Sees to a run that nobody is at work on: it goes on, waits, or makes room for the next."""
        if self._draining:
            return
        if worker.run.state == RUNNING:
            self._employ(worker)
        elif worker.run.state == WAITING:
            self._arm(worker)
            self._accompany(worker)
            if worker.waits_for_queue:
                self._errand(self._deny_for_queue(worker.live.key, worker.run.name))
        elif worker.ended:
            self._errand(self._next(worker.live.key))

    def _halt(self, worker: Worker, halt: Halt) -> None:
        """Has the worker stop what is under way, also when the run waits. The caller holds the session's lock."""
        worker.halt(halt)
        if self._at_work(worker.live.key, worker.run.name) is None:
            self._employ(worker)

    def _errand(self, work: Coroutine[Any, Any, None]) -> None:
        """Does something that nobody waits for."""

        async def run() -> None:
            try:
                await work
            except NotecaseError as error:
                log.warning("errand_failed", reason=errors.reason_name(error.reason))

        self._kept(run())

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Carries work out to its end although its caller goes away: whoever committed must do what follows."""
        task = self._kept(work)
        task.add_done_callback(_told)
        return await asyncio.shield(task)

    def _kept(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
        return task

    @asynccontextmanager
    async def _worker(
        self, key: SessionKey, run_id: str, caused: Caused, late: NotecaseError | None = None
    ) -> AsyncIterator[Worker]:
        """The worker of a run under way, the session's active one for "", under the session's lock; one that is made
        for the purpose when the run waits. Afterwards the run goes on if it can.

        Raises Replayed and Duplicate for a repeat, SESSION_NOT_FOUND, and `late` for a run that is not under way; by
        default RUN_NOT_FOUND, RUN_ENDED, and RUN_ACTIVE for a run that is queued behind another."""
        live = self._sessions.live(key)
        async with live.lock:
            await self._settle_commit(live)
            await self._store.recall(caused.once)
            await self._store.recall_command(key, caused.command)
            _, session = await self._sessions.watched(key)
            run_id = run_id or session.active_run
            try:
                worker = self._at_work(key, run_id) or await self._revive(live, run_id)
            except NotecaseError as error:
                raise (late if late is not None and error.reason in NOT_UNDER_WAY else error) from None
            yield worker
            if self._at_work(key, run_id) is None:
                self._settle(worker)

    async def _settle_commit(self, live: LiveSession) -> None:
        """Finds out what became of a commit whose answer was lost, before anybody decides on what is known. The caller
        holds the session's lock."""
        made = await live.settle()
        if made is not None:
            for (key, _), (worker, _) in self._workers.items():
                if key == live.key:
                    worker.learn(made)

    async def _revive(self, live: LiveSession, run_id: str) -> Worker:
        active = await self._store.active_run(live.key, run_id) if run_id else None
        session = await self._store.get_session(live.key)
        if active is None or session is None:
            raise await self._not_running(live.key, run_id)
        if active.run.state == QUEUED:
            raise errors.run_active(names.run(live.key.session, session.active_run or run_id))
        if active.run.state == RUNNING:
            raise errors.draining()
        return await self._made(live, session, active)

    async def _made(self, live: LiveSession, session: v1.Session, active: ActiveRun) -> Worker:
        newest = await self._store.list_messages(live.key, Query(1), newest_first=True, step=StepKey(active.run.name))
        message = newest.rows[0] if newest.rows and open_calls(newest.rows[0]) else None
        said = [
            event
            for queued in session.queued_commands
            if queued.run == active.run.name
            for event in await self._store.read_events(live.key, queued.sequence - 1, 1)
        ]
        return Worker(live, self._services, session, active.run, active.agent, active.epoch, message, said)

    async def _not_running(self, key: SessionKey, run_id: str) -> NotecaseError:
        if not run_id:
            return errors.no_run(names.session(key.session))
        row = await self._store.get_run(key, run_id)
        name = names.run(key.session, run_id)
        if row is None:
            return errors.not_found("run", name)
        return errors.run_ended(name, row[0].state) if row[0].state in ENDED else errors.draining()

    async def take_over(self) -> int:
        """Goes on with every run that a process before this one left, from its last commit; returns how many were at
        work."""
        found = await self._store.active_runs()
        taken = 0
        for active in found:
            if active.run.state == QUEUED:
                continue
            live, session = await self._sessions.watched(active.key)
            worker = await self._made(live, session, active)
            worker.epoch = await self._store.claim(active.key, active.epoch)
            if active.run.state == RUNNING:
                async with live.lock:
                    await worker.take_over()
                taken += 1
            self._settle(worker)
        for key in {active.key for active in found if active.run.state == QUEUED}:
            await self._next(key)
        return taken

    # ---- what callers say meanwhile

    async def tool_result(self, key: SessionKey, run_id: str, result: v1.ToolResult, caused: Caused) -> Committed:
        """Gives a dispatched call its outcome. CALL_NOT_PENDING when it waits for none, whatever its run does by
        now."""
        return await self._whole(self._tool_result(key, run_id, result, caused))

    async def _tool_result(self, key: SessionKey, run_id: str, result: v1.ToolResult, caused: Caused) -> Committed:
        late = errors.call_not_pending(result.call_id)
        async with self._worker(key, run_id, caused, late) as worker:
            for call in worker.run.pending_calls:
                if call.call_id == result.call_id:
                    parts = await self._contents.parts(key, result.result)
                    outcome = worker.fitting(Outcome(parts, result.error))
                    return await worker.commit([ledger.finished(call, outcome)], *caused)
            raise late

    async def respond(self, key: SessionKey, run_id: str, response: v1.InputResponse, caused: Caused) -> Committed:
        """Answers an approval or a question. INPUT_NOT_PENDING when nobody asks (any more), whatever the run does by
        now."""
        return await self._whole(self._respond(key, run_id, response, caused))

    async def _respond(self, key: SessionKey, run_id: str, response: v1.InputResponse, caused: Caused) -> Committed:
        late = errors.input_not_pending(response.input_id)
        async with self._worker(key, run_id, caused, late) as worker:
            for request in worker.run.pending_inputs:
                if request.input_id == response.input_id:
                    _check_decision(request, response)
                    call = worker.call(request.call.call_id)
                    return await worker.commit(ledger.answered(request, response, call), *caused)
            raise late

    async def say(self, key: SessionKey, run_id: str, said: v1.UserInput, caused: Caused) -> tuple[Committed, bool]:
        """What a user says to a run under way; the commit, and whether it only queued it. RUN_ENDED, QUEUE_FULL."""
        return await self._whole(self._say(key, run_id, said, caused))

    async def _say(self, key: SessionKey, run_id: str, said: v1.UserInput, caused: Caused) -> tuple[Committed, bool]:
        async with self._worker(key, run_id, caused) as worker:
            added = [
                v1.Event(message_added=message, cause_id=caused.cause_id)
                for message in self.incoming(await self._contents.kept(key, said.messages), worker.live.user)
            ]
            if said.when == v1.UserInput.WHEN_INTERRUPT:
                halt = Halt(events=added, reason="The user interrupted.", once=caused.once, command=caused.command)
                self._halt(worker, halt)
            elif worker.run.state == WAITING and not worker.run.pending_calls:
                denied = ledger.withdrawn(worker.run, worker.message, _words(said), deny=True)
                return await worker.commit([*denied, *added], *caused), False
            else:
                event = v1.Event(cause_id=caused.cause_id or self._new_id())
                event.command_queued.input.CopyFrom(said)
                del event.command_queued.input.messages[:]
                event.command_queued.input.messages.extend(added_event.message_added for added_event in added)
                return await worker.commit([event], *caused), True
        return await self._halted(key, halt), False

    async def cancel(
        self, key: SessionKey, run_id: str, cancel: v1.CancelCommand, caused: Caused | None = None
    ) -> Committed:
        """Stops a run, "" the session's active one, or one of its calls; returns the commit that made it durable.

        Raises Replayed and Duplicate for a repeat, and NotecaseError: SESSION_NOT_FOUND, RUN_NOT_FOUND, RUN_ENDED,
        CALL_NOT_PENDING."""
        return await self._whole(self._cancel(key, run_id, cancel, caused or Caused()))

    async def _cancel(self, key: SessionKey, run_id: str, cancel: v1.CancelCommand, caused: Caused) -> Committed:
        if run_id and not cancel.call_id and (queued := await self._cancel_queued(key, run_id, cancel, caused)):
            return queued
        async with self._worker(key, run_id, caused) as worker:
            if cancel.call_id:
                call = worker.call(cancel.call_id)
                committed = await worker.commit(ledger.dropped(worker.run, call, cancel.reason), *caused)
                worker.stop_call(call.call_id)
                return committed
            if cancel.mode == v1.CancelCommand.MODE_AFTER_TURN:
                return await worker.commit(worker.ending(cancel), *caused)
            halt = Halt(reason=cancel.reason, cause_id=caused.cause_id, once=caused.once, command=caused.command)
            self._halt(worker, halt)
        return await self._halted(key, halt)

    async def _halted(self, key: SessionKey, halt: Halt) -> Committed:
        try:
            return await halt.done
        except NotecaseError as error:
            if error.reason == v1.ERROR_REASON_RUN_ENDED:  # by a repeat of this very command, perhaps
                await self._store.recall(halt.once)
                await self._store.recall_command(key, halt.command)
            raise

    async def _cancel_queued(
        self, key: SessionKey, run_id: str, cancel: v1.CancelCommand, caused: Caused
    ) -> Committed | None:
        """Ends a run that has not begun; None when there is none such."""
        async with self._sessions.live(key).lock:
            active = await self._store.active_run(key, run_id)
            if active is None or active.run.state != QUEUED:
                return None
            return await self._cancel_run(key, run_id, cancel, caused)

    async def cancel_unstarted(
        self, key: SessionKey, run_id: str, cancel: v1.CancelCommand, caused: Caused
    ) -> Committed:
        """Puts the end of a run on record whose start has not arrived; one that has just arrived is cancelled as by
        `cancel`. SESSION_NOT_FOUND."""
        try:
            return await self._cancel_run(key, run_id, cancel, caused, RunRecord(b"", v1.Agent()))
        except NotecaseError as error:
            if error.reason != v1.ERROR_REASON_ALREADY_EXISTS:
                raise
        return await self.cancel(key, run_id, cancel, caused)

    async def _cancel_run(
        self, key: SessionKey, run_id: str, cancel: v1.CancelCommand, caused: Caused, start: RunRecord | None = None
    ) -> Committed:
        change = v1.RunStateChanged(state=v1.Run.STATE_CANCELLED, reason=cancel.reason)
        event = v1.Event(run=run_id, cause_id=caused.cause_id, run_state_changed=change)
        return await self._sessions.commit(
            Commit(key=key, once=caused.once, command=caused.command, events=[event], start=start)
        )

    async def _deny_for_queue(self, key: SessionKey, run_id: str) -> None:
        """Only people are waited for, and somebody has spoken: what was said takes the place of their answers."""
        with suppress(NotecaseError):  # the run may have moved on by itself
            async with self._worker(key, run_id, Caused()) as worker:
                if worker.run.state == WAITING and worker.waits_for_queue:
                    queued = worker.inputs(v1.UserInput.WHEN_FOLLOW_UP)
                    reason = " ".join(_words(event.command_queued.input) for event in queued)
                    denied = ledger.withdrawn(worker.run, worker.message, reason, deny=True)
                    await worker.commit([*denied, *worker.taken(queued)])

    # ---- clocks

    def _arm(self, worker: Worker) -> None:
        """Sets the clock for what a waiting run may not wait longer for."""
        place = (worker.live.key, worker.run.name)
        if (alarm := self._alarms.pop(place, None)) is not None:
            alarm.cancel()
        if (deadline := worker.deadline()) is not None and not self._draining:
            left = max(deadline - self._services.clock(), 0) / 1e6
            loop = asyncio.get_running_loop()
            self._alarms[place] = loop.call_later(left, lambda: self._errand(self._expire(*place)))

    async def _expire(self, key: SessionKey, run_id: str) -> None:
        self._alarms.pop((key, run_id), None)
        with suppress(NotecaseError):  # the run may have ended meanwhile
            async with self._worker(key, run_id, Caused()) as worker:
                if expired := worker.expired():
                    await worker.commit(expired)

    def _accompany(self, worker: Worker) -> None:
        """Cancels a run that nobody has followed for as long as its `disconnect` allows."""
        place = (worker.live.key, worker.run.name)
        if worker.run.disconnect.HasField("cancel_after") and place not in self._chaperones:
            seconds = worker.run.disconnect.cancel_after.ToMicroseconds() / 1e6
            task = asyncio.create_task(self._watch_company(worker.live, worker.run.name, seconds))
            self._chaperones[place] = task
            task.add_done_callback(lambda _: self._chaperones.pop(place, None))

    async def _watch_company(self, live: LiveSession, run_id: str, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        alone_since = loop.time()
        while True:
            row = await self._store.get_run(live.key, run_id)
            if row is None or row[0].state in ENDED:
                return
            accompanied = bool(live.watchers or row[0].pending_inputs)
            left = seconds - (loop.time() - alone_since)
            if not accompanied and left <= 0:
                reason = f"No stream was attached for {seconds:g} seconds."
                with suppress(NotecaseError):  # it may end by itself meanwhile
                    await self.cancel(live.key, run_id, v1.CancelCommand(reason=reason))
                return
            await live.company.wait(self._poll_seconds if accompanied else left)
            if accompanied:
                alone_since = loop.time()

    async def wait(self, key: SessionKey, run_id: str, seconds: float | None, after: int = 0) -> v1.Run:
        """The run once it has ended or waits, or as it is after that many seconds; NotecaseError RUN_NOT_FOUND. A wait
        that began by sequence `after` is not looked at."""
        live = self._sessions.live(key)
        loop = asyncio.get_running_loop()
        until = None if seconds is None else loop.time() + seconds
        while True:
            seen = live.head  # the session's, which others move too
            row = await self._store.get_run(key, run_id)
            if row is None:
                raise errors.not_found("run", names.run(key.session, run_id))
            left = self._poll_seconds if until is None else min(self._poll_seconds, until - loop.time())
            rests = row[0].state in ENDED or (row[0].state == WAITING and row[0].last_sequence > after)
            if rests or left <= 0:
                return row[0]
            while live.head <= seen and left > 0:
                before = loop.time()
                await live.soon.wait(left)
                left -= loop.time() - before

    async def drain(self, grace: float) -> None:
        """Takes nothing new, lets replies and calls under way come to their end for up to `grace` seconds, then lets
        go. A run that has not ended stays as it is in the store, for the next process to take over."""
        self._draining = True
        for alarm in self._alarms.values():
            alarm.cancel()
        for chaperone in list(self._chaperones.values()):
            chaperone.cancel()
        tasks = [task for _, task in self._workers.values()]
        for worker, _ in list(self._workers.values()):
            worker.drain()
        late: set[asyncio.Task[None]] = set()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, *self._errands, *self._chaperones.values(), return_exceptions=True)
        log.info("runs_drained", left=len(late))


def _check_decision(request: v1.InputRequest, response: v1.InputResponse) -> None:
    kinds = {
        v1.InputRequest.KIND_APPROVAL: {ledger.APPROVE, ledger.DENY},
        v1.InputRequest.KIND_QUESTION: {ledger.ANSWER, ledger.DENY},
        v1.InputRequest.KIND_INTERRUPTED_CALL: {ledger.APPROVE, ledger.DENY, ledger.ANSWER},
    }
    allowed = kinds[request.kind]
    if response.decision not in allowed:
        told = " or ".join(sorted(v1.InputResponse.Decision.Name(decision) for decision in allowed))
        raise errors.invalid([Violation("input_response.decision", f"this asks for {told}")])


def _is_answer(message: v1.Message) -> bool:
    """Whether nothing is left to say after it: a whole reply that called no tools, whose results want one."""
    calls = any(part.HasField("tool_call") for part in message.parts)
    return message.role == v1.Message.ROLE_ASSISTANT and message.status == COMPLETED and not calls


def _words(said: v1.UserInput) -> str:
    return " ".join(part.text for message in said.messages for part in message.parts if part.text)


def _told(task: asyncio.Task[Any]) -> None:
    """Takes note of how work ended whose caller may be gone: what he would have been told matters to nobody else."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, NotecaseError | Replayed | Duplicate):
        log.error("work_crashed", exc_info=error)


def _copy(run: v1.Run) -> v1.Run:
    return v1.Run.FromString(run.SerializeToString())

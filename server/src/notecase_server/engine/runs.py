"""The runs at work in this process: started, taken over, stopped, waited for and drained.

"May this happen at this moment?" is answered here or, where another process could answer differently, by the commit
itself.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import structlog
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.session import LiveSession, Sessions
from notecase_server.engine.turn import Stop, Worker
from notecase_server.errors import NotecaseError, Violation
from notecase_server.models.contract import Provider
from notecase_server.store.contract import CommandId, Commit, Committed, Duplicate, Once, Query, RunRecord, SessionKey
from notecase_server.store.fold import ENDED

log = structlog.get_logger()

COMPLETED = v1.Message.STATUS_COMPLETED

POLL_SECONDS = 5.0
"""How often what waits looks into the store although no bell rang: a lost hint costs this much time, and nothing
else."""


class Started(NamedTuple):
    """A run that a start made, or found."""

    key: SessionKey
    run: v1.Run
    """The caller's own."""
    existing: bool


class Runs:
    """All runs of this process."""

    def __init__(
        self,
        sessions: Sessions,
        providers: Mapping[str, Provider],
        new_id: Callable[[], str],
        max_runs: int,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`providers` by name, the default one under "" as well. `max_runs` run at once."""
        self.max_runs = max_runs
        self._sessions = sessions
        self._store = sessions.store
        self._providers = providers
        self._new_id = new_id
        self._poll_seconds = poll_seconds
        self._workers: dict[tuple[SessionKey, str], tuple[Worker, asyncio.Task[None]]] = {}
        self._starting = 0
        self._draining = False

    async def start(
        self,
        tenant: str,
        start: v1.StartRun,
        cause_id: str = "",
        once: Once | None = None,
        command: CommandId | None = None,
    ) -> Started:
        """Starts a run in a session, made if need be, in one commit. A run_id that exists with the same body is found,
        not started again, and so is a command that came before.

        Raises Replayed for a repeated `once`, and NotecaseError: SESSION_NOT_FOUND, AGENT_NOT_FOUND, ALREADY_EXISTS,
        RUN_ACTIVE, REQUEST_ID_REUSED, SEQUENCE_MISMATCH, RATE_LIMITED, SERVER_DRAINING, INVALID_FIELD."""
        session_id = start.session or start.new_session.name
        key = SessionKey(tenant, session_id.removeprefix("sessions/") or self._new_id())
        body = v1.StartRun()
        body.CopyFrom(start)
        body.ClearField("options")
        digest = hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
        try:
            await self._store.recall(key, once, command)
            if found := await self._find(key, start.run_id, digest):
                return found
            return await self._start(key, start, digest, cause_id, once, command)
        except Duplicate as duplicate:
            row = await self._store.get_run(key, duplicate.run)
            if row is None:
                raise errors.reused("command_id", command.command_id if command else "") from None
            return Started(key, row[0], existing=True)
        except NotecaseError as error:
            beaten = error.reason in {v1.ERROR_REASON_RUN_ACTIVE, v1.ERROR_REASON_ALREADY_EXISTS}
            if beaten and (found := await self._find(key, start.run_id, digest)):
                return found
            raise

    async def _find(self, key: SessionKey, run_id: str, digest: bytes) -> Started | None:
        row = await self._store.get_run(key, run_id) if run_id else None
        if row is None:
            return None
        if row[1] != digest:
            raise errors.reused("run_id", run_id)
        return Started(key, row[0], existing=True)

    async def _start(
        self,
        key: SessionKey,
        start: v1.StartRun,
        digest: bytes,
        cause_id: str,
        once: Once | None,
        command: CommandId | None,
    ) -> Started:
        if self._draining:
            raise errors.draining()
        if len(self._workers) + self._starting >= self.max_runs:
            raise errors.too_many_runs(self.max_runs)
        self._starting += 1
        try:
            live = self._sessions.live(key)
            session = start.new_session
            if start.session:
                live, session = await self._sessions.watched(key)
            agent = await self._agent(key.tenant, start.agent or session.agent)
            if not start.messages:
                await self._require_question(key)
            run_id = start.run_id or self._new_id()
            commit = Commit(
                key=key,
                once=once,
                command=command,
                create=None if start.session else session,
                claim=True,
                if_last_sequence=start.if_last_sequence if start.HasField("if_last_sequence") else None,
                events=self._opening(start, session, agent, run_id, cause_id),
                start=RunRecord(digest, agent),
            )
            committed = await live.commit(commit)
            run = committed.runs[run_id]
            self._employ(live, v1.Run.FromString(run.SerializeToString()), agent, committed.epoch)
            return Started(key, run, existing=False)
        finally:
            self._starting -= 1

    async def _agent(self, tenant: str, name: str) -> v1.Agent:
        if not name:
            raise errors.invalid([Violation("start.agent", "neither the start nor the session names an agent")])
        parsed = names.parse_agent(name)
        agent = await self._store.get_agent(tenant, parsed.agent, parsed.revision) if parsed else None
        if agent is None:
            raise errors.not_found("agent", name)
        return agent

    async def _require_question(self, key: SessionKey) -> None:
        newest = (await self._store.list_messages(key, Query(1), newest_first=True)).rows
        answered = newest and newest[0].role == v1.Message.ROLE_ASSISTANT and newest[0].status == COMPLETED
        if not newest or answered:
            problem = "is empty, and the session's history does not end with something to answer"
            raise errors.invalid([Violation("start.messages", problem)])

    def _opening(
        self, start: v1.StartRun, session: v1.Session, agent: v1.Agent, run_id: str, cause_id: str
    ) -> list[v1.Event]:
        started = v1.RunStarted(agent=agent.name, agent_revision=agent.revision, labels=start.labels)
        events = [v1.Event(run_started=started)]
        if start.state:
            ops = [v1.StateOp(key=name, set=value) for name, value in sorted(start.state.items())]
            events.append(v1.Event(state_changed=v1.StateChanged(ops=ops)))
        events += [v1.Event(message_added=m) for m in self.incoming(start.messages, session.user)]
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
                status=v1.Message.STATUS_COMPLETED,
            )
            made.append(message)
        return made

    def _employ(self, live: LiveSession, run: v1.Run, agent: v1.Agent, epoch: int) -> None:
        provider = self._providers.get(agent.llm.provider)
        worker = Worker(live, self._store, run, agent, epoch, provider, self._new_id)
        place = (live.key, run.name)
        task = asyncio.create_task(worker.work(), name=f"run {run.name}")
        self._workers[place] = (worker, task)
        task.add_done_callback(lambda done: self._left(place, done))

    def _left(self, place: tuple[SessionKey, str], task: asyncio.Task[None]) -> None:
        del self._workers[place]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("run_lost", session=place[0].session, run=place[1], exc_info=error)

    async def take_over(self) -> int:
        """Goes on with every run that a process before this one left, from its last commit; returns how many."""
        found = await self._store.active_runs()
        for active in found:
            live, _ = await self._sessions.watched(active.key)
            epoch = await self._store.claim(active.key, active.epoch)
            change = v1.RunStateChanged(
                state=v1.Run.STATE_RUNNING,
                attempt=active.run.attempt + 1,
                reason="The server stopped; the run goes on from its last commit.",
            )
            event = v1.Event(run=active.run.name, run_state_changed=change)
            committed = await live.commit(Commit(key=active.key, if_epoch=epoch, events=[event]))
            self._employ(live, committed.runs[active.run.name], active.agent, epoch)
            log.info("run_taken_over", session=active.key.session, run=active.run.name, attempt=change.attempt)
        return len(found)

    async def cancel(
        self,
        key: SessionKey,
        run_id: str,
        reason: str,
        cause_id: str = "",
        once: Once | None = None,
        command: CommandId | None = None,
    ) -> Committed:
        """Stops a run, the session's active one when `run_id` is "", and returns the commit that sealed it.

        Raises Replayed and Duplicate for a repeat, and NotecaseError: SESSION_NOT_FOUND, RUN_NOT_FOUND, RUN_ENDED."""
        await self._store.recall(key, once, command)
        if not run_id:
            session = await self._store.get_session(key)
            if session is None:
                raise errors.not_found("session", names.session(key.session))
            run_id = session.active_run
        place = self._workers.get((key, run_id))
        if place is None:
            raise await self._not_running(key, run_id)
        stop = Stop(reason, cause_id, once, command, asyncio.get_running_loop().create_future())
        if not place[0].stop(stop):
            await asyncio.wait([place[1]])
            await self._store.recall(key, once, command)
            raise await self._not_running(key, run_id)
        return await asyncio.shield(stop.sealed)

    async def _not_running(self, key: SessionKey, run_id: str) -> NotecaseError:
        row = await self._store.get_run(key, run_id) if run_id else None
        if row is None:
            return errors.not_found("run", names.run(key.session, run_id or "-"))
        if row[0].state in ENDED:
            return errors.run_ended(names.run(key.session, run_id), row[0].state)
        return errors.draining()

    async def wait(self, key: SessionKey, run_id: str, seconds: float | None) -> v1.Run:
        """The run once it has ended, or as it is after that many seconds; NotecaseError RUN_NOT_FOUND."""
        live = self._sessions.live(key)
        loop = asyncio.get_running_loop()
        until = None if seconds is None else loop.time() + seconds
        while True:
            row = await self._store.get_run(key, run_id)
            if row is None:
                raise errors.not_found("run", names.run(key.session, run_id))
            left = self._poll_seconds if until is None else min(self._poll_seconds, until - loop.time())
            if row[0].state in ENDED or left <= 0:
                return row[0]
            seen = row[0].last_sequence
            while live.head <= seen and left > 0:
                before = loop.time()
                await live.soon.wait(left)
                left -= loop.time() - before

    async def drain(self, grace: float) -> None:
        """Takes nothing new, lets each run reach its next commit for up to `grace` seconds, then lets go. What has not
        ended stays as it is in the store, for the next process to take over."""
        self._draining = True
        tasks = [task for _, task in self._workers.values()]
        for worker, _ in list(self._workers.values()):
            worker.drain()
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=grace)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        log.info("runs_drained", left=len(late))

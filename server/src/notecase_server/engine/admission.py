"""Admits runs: starts, queues or replaces one, each in one commit."""

from collections.abc import Callable
from functools import partial

import msgspec
import structlog
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.caused import NOBODY, Caused
from notecase_server.engine.content import digest_of
from notecase_server.engine.context import to_read
from notecase_server.engine.halt import Halt, Replacement
from notecase_server.engine.opening import (
    INTERRUPT,
    ROLLBACK,
    Meant,
    agent_of,
    ahead,
    expected,
    goes_back,
    is_answer,
    opening,
    way_of,
    without_values,
)
from notecase_server.engine.rewind import Back, rewound, undisturbed
from notecase_server.engine.rewind import back as way_back
from notecase_server.engine.roster import Roster
from notecase_server.engine.run_log import WAITING
from notecase_server.engine.services import Services
from notecase_server.engine.session import Late, LiveSession
from notecase_server.engine.sessions import Sessions
from notecase_server.errors import NotecaseError, Violation
from notecase_server.store.contract import Commit, Committed, Duplicate, Query, RunRecord, SessionKey

log = structlog.get_logger()

BUSY_TRIES = 5
"""How often a start that stops another run tries again when that one had ended and a third one came first."""

BY_ANOTHER = frozenset({v1.ERROR_REASON_RUN_ACTIVE, v1.ERROR_REASON_SEQUENCE_MISMATCH, v1.ERROR_REASON_QUEUE_FULL})
"""Refusals for which the same start may be the cause, when it is sent twice at once."""


class Started(msgspec.Struct, frozen=True):
    """A run that a start made, or found."""

    key: SessionKey
    run: v1.Run
    """A copy, which the receiver may change."""
    session: v1.Session | None
    """The session after the start; None if the run was found."""

    @property
    def existing(self) -> bool:
        """Whether the run was found."""
        return self.session is None


class Admission:
    """Makes the starts of one process."""

    def __init__(self, sessions: Sessions, services: Services, roster: Roster) -> None:
        self.queued: Callable[[SessionKey], None] = lambda _: None
        """Called when a start was queued in a session: see Upkeep.start_next."""
        self._sessions = sessions
        self._services = services
        self._store = services.store
        self._roster = roster
        self._new_id = services.new_id

    async def start(self, tenant: str, start: v1.StartRun, caused: Caused = NOBODY, user: str = "") -> Started:
        """Starts a run in one commit, which also creates the session if the start names none. With `user`
        ("users/{user}") only sessions of that user exist. Returns the existing run, without another start, for a run_id
        that was started with the same body and for a command that was carried out before.

        Raises Replayed for a repeat, and NotecaseError: SESSION_NOT_FOUND, AGENT_NOT_FOUND, ALREADY_EXISTS, RUN_ACTIVE,
        REQUEST_ID_REUSED, SEQUENCE_MISMATCH, RATE_LIMITED, QUEUE_FULL, SERVER_DRAINING, INVALID_FIELD,
        RUN_CANCELLED_BEFORE_START."""
        return await self._services.supervisor.whole(self._found_or_started(tenant, start, caused, user))

    async def _found_or_started(self, tenant: str, start: v1.StartRun, caused: Caused, user: str) -> Started:
        body = v1.StartRun()
        body.CopyFrom(start)
        body.ClearField("options")
        body.ClearField("if_session_uid")
        digest = await digest_of(body.SerializeToString(deterministic=True))
        await self._store.recall(caused.once)
        meant = await self._meant(tenant, start, user)
        key = meant.key
        try:
            await self._store.recall_command(key, caused.command)
            if found := await self._find(key, start.run_id, digest):
                return found
            if not start.session:  # the one that has the name may be deleted meanwhile, and its uid is never used again
                key = self._sessions.new_key(tenant, key.session)
                meant = Meant(key, start.new_session, meant.agent)
            body = body if goes_back(start) else await self._kept(key, body)
            try:
                return await self._admit(meant, body, digest, caused)
            except NotecaseError as error:
                if error.reason == v1.ERROR_REASON_ALREADY_EXISTS:
                    key = (await self._meant(tenant, start, user)).key  # another start has just made its session
                elif error.reason not in BY_ANOTHER:
                    raise
                await self._store.recall(caused.once)
                await self._store.recall_command(key, caused.command)
                if found := await self._find(key, start.run_id, digest):
                    return found
                raise
        except Duplicate as duplicate:
            row = await self._store.get_run(key, duplicate.run)
            if row is None:
                await self._sessions.watched(key)  # it may be gone since
                raise errors.reused("command_id", caused.cause_id) from None
            return Started(key, row[0], None)

    async def _meant(self, tenant: str, start: v1.StartRun, user: str) -> Meant:
        """Reads the session and the agent that a start names. For a new session whose name is taken, returns the
        session with that name: the start may be a repeat. Raises SESSION_NOT_FOUND, also for a session that belongs to
        another user than `user`."""
        session = (start.session or start.new_session.name).removeprefix("sessions/")
        row, agent = await self._store.read_start(tenant, session, start.agent or start.new_session.agent)
        theirs = user and row is not None and row.user != user
        if row is not None and start.if_session_uid in {"", row.uid} and not theirs:
            return Meant(SessionKey(tenant, session, row.uid), row, agent)
        if start.session:
            raise errors.not_found("session", start.session)
        return Meant(self._sessions.new_key(tenant, session or self._new_id()), start.new_session, agent)

    async def _again(self, key: SessionKey, start: v1.StartRun) -> Meant:
        """Reads the session and the agent of a start again. Raises SESSION_NOT_FOUND."""
        row, agent = await self._store.read_start(key.tenant, key.session, start.agent)
        if row is None or row.uid != key.uid:
            raise errors.not_found("session", names.session(key.session))
        return Meant(key, row, agent)

    async def _find(self, key: SessionKey, run_id: str, digest: bytes) -> Started | None:
        row = await self._store.get_run(key, run_id) if run_id else None
        if row is None:
            return None
        if not row[1]:
            raise errors.cancelled_before_start(names.run(key.session, run_id))
        if row[1] != digest:
            raise errors.reused("run_id", run_id)
        return Started(key, row[0], None)

    async def _admit(self, meant: Meant, start: v1.StartRun, digest: bytes, caused: Caused) -> Started:
        if self._roster.draining:
            raise errors.draining()
        key = meant.key
        for _ in range(BUSY_TRIES):
            try:
                return await self._start(meant, start, digest, caused)
            except NotecaseError as error:
                if error.reason != v1.ERROR_REASON_RUN_ACTIVE:
                    raise
                if start.on_busy == v1.StartRun.ON_BUSY_QUEUE:
                    return await self._queue(key, start, digest, caused)
                if start.on_busy not in {INTERRUPT, ROLLBACK}:
                    raise
                active = error.metadata["run"].rpartition("/")[2]
            if found := await self._find(key, start.run_id, digest):
                return found  # a repeat must not stop the very run that it asks for
            try:
                return await self._replace(key, active, start, digest, caused)
            except NotecaseError as error:  # it may have ended by itself, and there is nothing to stop
                if error.reason not in {v1.ERROR_REASON_RUN_ENDED, v1.ERROR_REASON_RUN_NOT_FOUND}:
                    raise
            meant = await self._again(key, start)
        raise errors.run_active(names.run(key.session, active))

    # ---- starting

    async def _start(self, meant: Meant, start: v1.StartRun, digest: bytes, caused: Caused) -> Started:
        key, session = meant.key, meant.session
        if busy := ahead(session, start):
            if start.HasField("if_last_sequence") and start.if_last_sequence != session.last_sequence:
                raise errors.sequence_mismatch(session.last_sequence)
            raise errors.run_active(names.run(key.session, busy))
        self._services.places.take()
        placed = False
        try:
            agent = agent_of(meant, start)
            rewinds = start.HasField("rewind_to_sequence")
            if not (start.messages or rewinds):
                await self._require_question(key)
            if goes_back(start):
                start = await self._kept(key, start, start.rewind_to_sequence if rewinds else None)
            run_id = start.run_id or self._new_id()
            commit = Commit(
                key=key,
                once=caused.once,
                command=caused.command,
                create=None if start.session else session,
                claim=True,
                if_last_sequence=expected(start),
                events=opening(start, session.user, agent, run_id, caused.cause_id, self._new_id),
                start=RunRecord(digest, agent),
                principal=caused.principal,
                newest=to_read(self._sessions.transcripts, key, session, agent.llm.context),
            )
            live = self._sessions.live(key)
            begin = partial(self._roster.begin, live, run=run_id, agent=agent)
            late = partial(begin, placed=False)
            async with live.held():
                if rewinds:
                    way = Back(start.rewind_to_sequence, "start.rewind_to_sequence")
                    committed = await self.commit_back(live, commit, way, caused.cause_id, late)
                else:
                    committed = await live.commit(commit, late)
                placed = True
                begin(committed, placed=True)
            return Started(key, committed.runs[run_id], committed.session)
        finally:
            if not placed:
                self._services.places.give_back()

    async def _kept(self, key: SessionKey, start: v1.StartRun, at: int | None = None) -> v1.StartRun:
        """Returns a start with its messages in the form of the log. Values of state in them are those that the session
        has once it is back at sequence `at`; None for those of now."""
        kept = v1.StartRun()
        kept.CopyFrom(start)
        del kept.messages[:]
        kept.messages.extend(await self._services.contents.kept(key, start.messages, start.state, at=at))
        return kept

    async def commit_back(
        self, live: LiveSession, commit: Commit, way: Back, cause_id: str, late: Late | None = None
    ) -> Committed:
        """Commits with the events of a rewind before the commit's own; `late` is as for LiveSession.commit. The caller
        holds the session's lock, which does not stop other writers: their writes in that time are rewound too, unless
        the commit has its own condition."""
        commit_once = partial(self._committed_back, live, commit, way, cause_id, late)
        return await (undisturbed(live.quiet, commit_once) if commit.if_last_sequence is None else commit_once())

    async def _committed_back(
        self, live: LiveSession, commit: Commit, way: Back, cause_id: str, late: Late | None
    ) -> Committed:
        assert way.to_sequence is not None
        _, session = await self._sessions.watched(live.key)
        if busy := session.active_run or next((queued.run for queued in session.queued_commands), ""):
            raise errors.run_active(names.run(live.key.session, busy))
        if commit.if_last_sequence not in {None, session.last_sequence}:
            raise errors.sequence_mismatch(session.last_sequence)
        back = await rewound(self._store, live.key, way.to_sequence, way.field)
        if commit.start is not None and not any(event.HasField("message_added") for event in commit.events):
            await self._require_question(live.key, way.to_sequence)
        for event in back.events:
            event.cause_id = cause_id
        events = [*back.events, *commit.events]
        return await live.commit(commit._replace(if_last_sequence=back.head, events=events), late)

    async def named_agent(self, tenant: str, name: str) -> v1.Agent:
        """Returns the agent of that name, or its revision. Raises NotecaseError AGENT_NOT_FOUND."""
        parsed = names.parse_agent(name)
        agent = await self._store.get_agent(tenant, parsed.agent, parsed.revision) if parsed else None
        if agent is None:
            raise errors.not_found("agent", name)
        return agent

    async def _require_question(self, key: SessionKey, until: int | None = None) -> None:
        """Raises NotecaseError INVALID_FIELD when the history up to that sequence does not end with something to
        answer: a user's message, or results of calls."""
        after = None if until is None else (until + 1,)
        newest = (await self._store.list_messages(key, Query(1, after), newest_first=True)).rows
        if not newest or is_answer(newest[0]):
            problem = "is empty, and the session's history does not end with something to answer"
            raise errors.invalid([Violation("start.messages", problem)])

    # ---- replacing

    async def _replace(
        self, key: SessionKey, active: str, start: v1.StartRun, digest: bytes, caused: Caused
    ) -> Started:
        """Ends the active run, rewinds the session if the start says so, and starts another in the same commit, so that
        no queued run comes between. The new run takes over the slot of a run that has a worker; when the old run waits,
        it needs a slot like any new start."""
        meant = await self._again(key, start)
        if expected(start) not in {None, meant.session.last_sequence}:
            raise errors.sequence_mismatch(meant.session.last_sequence)
        agent = agent_of(meant, start)
        run_id = start.run_id or self._new_id()
        async with self._roster.worker(key, active, NOBODY) as worker:
            way = way_of(start)
            to_sequence = None
            if way is not None:  # what prevents the rewind must be found before anything is stopped
                back = await way_back(self._store, key, worker.log.run, way)
                to_sequence = back.events[0].rewound.to_sequence
                start = await self._kept(key, start, to_sequence)
            if not start.messages:
                await self._require_question(key, to_sequence)
            waits = worker.log.run.state == WAITING and not worker.seat.taken
            if waits or self._roster.at_work(key, active) is None:
                self._services.places.take()
                worker.seat.taken = True
            events = opening(start, meant.session.user, agent, run_id, caused.cause_id, self._new_id)
            halt = Halt(
                replacement=Replacement(run_id, events, RunRecord(digest, agent), way, expected(start)),
                reason="Another run was started." if start.on_busy == INTERRUPT else "It was rolled back.",
                caused=caused,
            )
            self._roster.halt(worker, halt)
        committed = await halt.done
        return Started(key, committed.runs[run_id], committed.session)

    # ---- queueing

    async def _queue(self, key: SessionKey, start: v1.StartRun, digest: bytes, caused: Caused) -> Started:
        if not start.messages:
            problem = "is empty, but a queued start needs messages: how the session's history will end is not known yet"
            raise errors.invalid([Violation("start.messages", problem)])
        agent = agent_of(await self._again(key, start), start)
        run_id = start.run_id or self._new_id()
        event = v1.Event(run=run_id, cause_id=caused.cause_id or run_id)
        event.command_queued.start.CopyFrom(start)
        event.command_queued.start.agent = agent.name
        if start.HasField("settings"):  # the run's record has them
            event.command_queued.start.settings.CopyFrom(without_values(start.settings))
        committed = await self._sessions.live(key).commit(
            Commit(
                key=key,
                once=caused.once,
                command=caused.command,
                if_last_sequence=expected(start),
                events=[event],
                principal=caused.principal,
                start=RunRecord(digest, agent),
            ),
            late=lambda _: self.queued(key),
        )
        self.queued(key)
        return Started(key, committed.runs[run_id], committed.session)

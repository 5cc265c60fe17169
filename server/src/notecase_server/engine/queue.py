"""Starts queued runs, each when its session is idle and a slot is free."""

from functools import partial

import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.engine.context import to_read
from notecase_server.engine.opening import opening
from notecase_server.engine.roster import QUEUED, Roster
from notecase_server.engine.services import Services
from notecase_server.engine.sessions import Sessions
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Commit, SessionKey
from notecase_server.supervisor import is_passing

log = structlog.get_logger()

MOVED_ON = frozenset({v1.ERROR_REASON_SESSION_NOT_FOUND, v1.ERROR_REASON_RUN_ACTIVE})
"""Refusals that say that a queued start has to wait on, or that nothing is left of it."""


class Queue:
    """Starts the queued runs of one process."""

    def __init__(self, sessions: Sessions, services: Services, roster: Roster) -> None:
        self._sessions = sessions
        self._services = services
        self._store = services.store
        self._roster = roster

    async def start_next(self, key: SessionKey) -> None:
        """Starts the first queued run of an idle session once there is a slot. A run that is permanently refused ends
        as failed, and the next one follows. STORE_UNAVAILABLE, SESSION_NOT_FOUND, RUN_ACTIVE."""
        if await self._first_queued(key) is None:
            return
        await self._services.places.wait(key.tenant)
        placed = False
        try:
            live = self._sessions.live(key)
            async with live.held():
                while not placed and (found := await self._first_queued(key)) and not self._roster.draining:
                    session, queued, agent = found
                    (event,) = await self._store.read_events(key, queued.sequence - 1, 1)
                    start = event.command_queued.start
                    events = opening(start, session.user, agent, queued.run, queued.command_id, self._services.new_id)
                    begin = partial(self._roster.begin, live, run=queued.run, agent=agent)
                    newest = to_read(self._sessions.transcripts, key, session, agent.llm.context)
                    commit = Commit(key=key, claim=True, events=events, principal=event.principal, newest=newest)
                    try:
                        committed = await live.commit(commit, late=partial(begin, placed=False))
                    except NotecaseError as error:
                        if is_passing(error) or error.reason in MOVED_ON:
                            raise
                        await self._fail_queued(key, queued.run, error)
                        continue
                    placed = True
                    begin(committed, placed=True)
        finally:
            if not placed:
                self._services.places.give_back()

    async def fail_next(self, key: SessionKey, error: NotecaseError) -> None:
        """Ends the first queued run of an idle session as failed: it cannot be started."""
        async with self._sessions.live(key).held():
            if (found := await self._first_queued(key)) is not None:
                await self._fail_queued(key, found[1].run, error)

    async def _fail_queued(self, key: SessionKey, run: str, error: NotecaseError) -> None:
        """The caller holds the session's lock."""
        log.error("queued_start_failed", session=key.session, run=run, reason=errors.reason_name(error.reason))
        change = v1.RunStateChanged(state=v1.Run.STATE_FAILED, error=error.to_proto())
        await self._sessions.live(key).commit(Commit(key=key, events=[v1.Event(run=run, run_state_changed=change)]))

    async def _first_queued(self, key: SessionKey) -> tuple[v1.Session, v1.QueuedCommand, v1.Agent] | None:
        session = await self._store.get_session(key)
        if session is not None and not session.active_run:
            for queued in session.queued_commands:
                active = await self._store.active_run(key, queued.run)
                if active is not None and active.run.state == QUEUED:
                    return session, queued, active.agent
        return None

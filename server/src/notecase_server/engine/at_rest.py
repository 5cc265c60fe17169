"""Rewinds, forks and compacts a session without an active run."""

from collections.abc import Sequence
from dataclasses import replace

import structlog
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine import summary
from notecase_server.engine.admission import Admission
from notecase_server.engine.asking import Source, ask_at_rest, sources
from notecase_server.engine.caused import Caused
from notecase_server.engine.rewind import Back, ended
from notecase_server.engine.services import Services
from notecase_server.engine.session import LiveSession
from notecase_server.engine.sessions import Sessions
from notecase_server.errors import NotecaseError, Violation
from notecase_server.store.contract import Answer, Commit, Committed, Fork, Replayed, SessionKey
from notecase_server.supervisor import is_passing

log = structlog.get_logger()


class AtRest:
    """Rewinds, forks and compacts a session without an active run; nothing here continues in the background."""

    def __init__(self, sessions: Sessions, services: Services, admission: Admission) -> None:
        self._sessions = sessions
        self._services = services
        self._store = services.store
        self._admission = admission

    async def rewind(
        self, key: SessionKey, to_sequence: int, if_last_sequence: int | None, caused: Caused
    ) -> Committed:
        """Takes a session back to a sequence, in one commit.

        Raises Replayed for a repeat, and NotecaseError: SESSION_NOT_FOUND, RUN_ACTIVE, SEQUENCE_MISMATCH,
        SEQUENCE_AHEAD, INVALID_FIELD."""
        commit = Commit(key=key, once=caused.once, if_last_sequence=if_last_sequence, principal=caused.principal)
        way = Back(to_sequence, "to_sequence")
        return await self._services.supervisor.whole(self._rewind(commit, way, caused.cause_id))

    async def _rewind(self, commit: Commit, way: Back, cause_id: str) -> Committed:
        live = self._sessions.live(commit.key)
        async with live.held():
            await self._store.recall(commit.once)
            return await self._admission.commit_back(live, commit, way, cause_id)

    async def fork(
        self, source: SessionKey, at_sequence: int | None, key: SessionKey, chosen: v1.Session, caused: Caused
    ) -> Committed:
        """Makes a session that begins with the log of another up to a sequence, its head for None. What of `chosen` is
        empty is taken from the source, except for its expiry.

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
        events = ended(past, "The session was forked while the run was active.")
        for event in events:
            event.principal = caused.principal
        fork = Fork(key=key, source=source, past=past, session=made, events=events)
        record = self._sessions.record(caused.once, key.tenant, Answer("session"))
        store = self._sessions.store
        committed = await self._sessions.surely(record, lambda record: store.fork(replace(fork, once=record)))
        self._sessions.live(key).committed(committed)
        return committed

    async def compact(self, key: SessionKey, keep_recent: int, agent_name: str, caused: Caused) -> Committed:
        """Has the older messages of an idle session summarised by an agent's model, "" for the session's agent: all but
        the newest `keep_recent`, 0 for as many as the agent says. The commit is empty when that leaves nothing.

        Raises Replayed for a repeat, and NotecaseError: SESSION_NOT_FOUND, AGENT_NOT_FOUND, RUN_ACTIVE, INVALID_FIELD,
        RATE_LIMITED, SERVER_DRAINING, SEQUENCE_MISMATCH, and what the model's provider raises."""
        self._services.places.take()
        try:
            return await self._compacted(key, keep_recent, agent_name, caused)
        finally:
            self._services.places.give_back()

    async def _compacted(self, key: SessionKey, keep_recent: int, agent_name: str, caused: Caused) -> Committed:
        await self._store.recall(caused.once)
        live, session = await self._sessions.watched(key)
        if session.active_run:
            raise errors.run_active(names.run(key.session, session.active_run))
        if not (agent_name or session.agent):
            raise errors.invalid([Violation("agent", "neither the request nor the session names an agent")])
        llm = (await self._admission.named_agent(key.tenant, agent_name or session.agent)).llm
        keep = keep_recent or llm.context.summary.keep_recent or summary.KEEP_RECENT
        contents = self._services.contents
        plan = await summary.plan(self._store, contents, key, session.summary_sequence, keep, batch=1)
        events, usage = list[v1.Event](), list[v1.Event]()
        try:
            if plan is not None:
                events = await self._summarized(plan, llm, usage)
        except BaseException:  # its caller gone, perhaps
            await self._services.supervisor.whole(self._counted(live, usage, caused))
            raise
        return await self._services.supervisor.whole(self._kept(live, events, usage, caused))

    async def _kept(
        self, live: LiveSession, events: Sequence[v1.Event], usage: Sequence[v1.Event], caused: Caused
    ) -> Committed:
        """Commits the summary and its usage; the usage even if the summary is refused."""
        both = [*events, *usage]
        for event in both:
            event.cause_id = caused.cause_id
        try:
            return await live.commit(Commit(key=live.key, once=caused.once, events=both, principal=caused.principal))
        except (NotecaseError, Replayed) as refused:
            if not is_passing(refused):  # else it may have been made
                await self._counted(live, usage, caused)
            raise

    async def _counted(self, live: LiveSession, usage: Sequence[v1.Event], caused: Caused) -> None:
        """Commits the usage of a failed summary, if the session still exists."""
        if usage:
            for event in usage:
                event.cause_id = caused.cause_id
            try:
                await live.commit(Commit(key=live.key, events=usage, principal=caused.principal))
            except NotecaseError as error:
                log.warning("usage_lost", session=live.key.session, reason=errors.reason_name(error.reason))

    async def _summarized(self, plan: summary.Plan, llm: v1.LlmAgent, usage: list[v1.Event]) -> list[v1.Event]:
        """Returns the summary's event; it covers fewer messages if the model does not accept all of the plan. Adds the
        usage of each model call to `usage`, even if there is no summary."""
        request = await plan.request(llm)

        async def once(source: Source) -> list[v1.Event]:
            taken: v1.Usage | None = None

            def used(one: v1.Usage) -> None:
                nonlocal taken
                source.own(one)
                taken = one

            try:
                text, _ = await summary.write(source.named.provider, source.fit(request), used)
                return [plan.event(text)]
            except NotecaseError as error:
                if error.usage is not None:
                    used(error.usage)
                raise
            finally:
                if taken is not None:
                    usage.append(v1.Event(usage=taken))

        try:
            return await ask_at_rest(sources(self._services, llm), once)
        except NotecaseError as error:
            shorter = plan.shorter() if summary.too_long(error) else None
            if shorter is None:
                raise
        return await self._summarized(shorter, llm, usage)

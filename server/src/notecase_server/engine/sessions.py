"""Holds the sessions that are active in this process, and makes every write to a session that does not come from a
run."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from itertools import islice
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

import structlog
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.session import LiveSession
from notecase_server.engine.transcripts import Transcripts
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import (
    Answer,
    AuditRow,
    Commit,
    Committed,
    History,
    LogStore,
    Once,
    Replayed,
    RequestStore,
    RunStore,
    Scope,
    SessionKey,
    SessionStore,
    StateStore,
)

T = TypeVar("T")

log = structlog.get_logger()

BATCH = 100
"""Sessions that are deleted before the next page is read."""

REFUSALS = 10
"""Sessions that one call leaves to the next because the store refuses them: a few may be damaged."""

QUIET_SECONDS = 2.0
"""How long a write that no run makes waits for a rewind that others have disturbed."""

VISITS = 200
"""Sessions that hear of a change in one step of the loop: some 10 to 20 microseconds each."""


class CaseStore(LogStore, History, RequestStore, SessionStore, RunStore, StateStore, Protocol):
    """Holds sessions, with all that belongs to them."""


class Sessions:
    """Holds the sessions alive in this process, and makes every write to one, so that its watchers here hear of it at
    once."""

    def __init__(
        self,
        store: CaseStore,
        new_id: Callable[[], str],
        new_uid: Callable[[], str],
        content_limit: int | None = None,
    ) -> None:
        """No log is let to refer to blobs of more than `content_limit` bytes together."""
        self.store = store
        self.new_id = new_id
        self.content_limit = content_limit
        self.unsure: Callable[[LiveSession], None] = lambda _: None
        """Called with a session when the outcome of one of its commits is not known: see Upkeep.settle_commits."""
        self.gone: Callable[[SessionKey], None] = lambda _: None
        """Called with a session that is deleted: see Timers.disarm."""
        self.transcripts = Transcripts()
        self._new_uid = new_uid
        self._live: WeakValueDictionary[SessionKey, LiveSession] = WeakValueDictionary()
        self._visits: deque[Iterator[None]] = deque()
        """Changes that some sessions have not heard of yet, the first one first."""

    def new_key(self, tenant: str, session: str) -> SessionKey:
        """Returns the key of a session that is about to be made under that id."""
        return SessionKey(tenant, session, self._new_uid())

    async def find(self, tenant: str, session: str, if_uid: str = "", user: str = "") -> tuple[SessionKey, v1.Session]:
        """Returns the key of the session that has this id now, and its row. Raises NotecaseError SESSION_NOT_FOUND when
        there is none, when `if_uid` is set and it is another one, or when `user` is set ("users/{user}") and it is
        another's."""
        row = await self.store.find_session(tenant, session)
        if row is None or (if_uid and row.uid != if_uid) or (user and row.user != user):
            raise errors.not_found("session", f"sessions/{session}")
        return SessionKey(tenant, session, row.uid), row

    async def find_key(self, tenant: str, session: str, user: str = "") -> SessionKey:
        """Returns the key of the session that has this id now, as `find`, also when its row is damaged."""
        found = await self.store.find_session_key(tenant, session)
        if found is None or (user and found[1] != user):
            raise errors.not_found("session", f"sessions/{session}")
        return found[0]

    def live(self, key: SessionKey) -> LiveSession:
        found = self._live.get(key)
        if found is None:
            found = self._live[key] = LiveSession(key, self.store, self)
        return found

    async def watched(self, key: SessionKey) -> tuple[LiveSession, v1.Session]:
        """Returns the live side of a session that exists, and its row. Raises NotecaseError SESSION_NOT_FOUND
        otherwise."""
        row = await self.store.get_session(key)
        if row is None:
            raise errors.not_found("session", f"sessions/{key.session}")
        return self.seen(key, row), row

    def seen(self, key: SessionKey, row: v1.Session) -> LiveSession:
        """Returns the live side of a session whose row was just read."""
        live = self.live(key)
        live.user = row.user
        live.head = max(live.head, row.last_sequence)
        return live

    def record(self, once: Once | None, tenant: str, answer: Answer) -> Once:
        """Returns the record of a write that has no Commit: the caller's own, or one under a new id, so that it can be
        asked about."""
        return once or Once.unnamed(tenant, self.new_id(), answer)

    async def surely(self, once: Once, write: Callable[[Once], Awaitable[T]]) -> T:
        """Makes a write that leaves this record. When its answer is lost and it was made, raises Replayed, as for a
        repeat. Raises STORE_UNAVAILABLE when it was not made, or when the store cannot say."""
        try:
            return await write(once)
        except NotecaseError as error:
            if error.reason == v1.ERROR_REASON_STORE_UNAVAILABLE:
                with errors.unsure():
                    await self.store.recall(once)
            raise

    async def commit(self, commit: Commit) -> Committed:
        """Commits as LiveSession.commit does, for writes that no run makes."""
        live = self.live(commit.key)
        if live.quiet.locked():
            with suppress(TimeoutError):  # it may wait for a store that is away
                async with asyncio.timeout(QUIET_SECONDS), live.quiet:
                    pass
        return await live.commit(commit)

    async def update_state(
        self,
        key: SessionKey | None,
        scope: Scope,
        ops: Sequence[v1.StateOp],
        if_version: int | None,
        once: Once | None,
        cause_id: str,
        principal: str = "",
    ) -> Committed | v1.State:
        """Changes a state of any scope: that of the session `key` by an event of its log, others in place and with a
        record."""
        if key is not None:
            change = v1.Event(cause_id=cause_id)
            change.state_changed.ops.extend(ops)
            versions = {} if if_version is None else {"": if_version}
            commit = Commit(key=key, once=once, if_state_version=versions, events=[change], principal=principal)
            return await self.commit(commit)
        assert once is not None
        state = await self.surely(once, lambda record: self.store.update_state(scope, ops, if_version, record))
        self.state_changed(scope, ops, state.version)
        return state

    def state_changed(
        self, scope: Scope, ops: Sequence[v1.StateOp], version: int, besides: LiveSession | None = None
    ) -> None:
        """Gives notice of a change of a user's or the app's state to every session here that reads it: to the first
        VISITS at once, to the others in further steps of the loop, and to each in the order of the changes."""
        self._visits.append(self._noticing(scope, ops, version, besides, list(self._live.values())))
        if len(self._visits) == 1:
            self._visit()

    def _visit(self) -> None:
        left = VISITS
        while self._visits:
            for _ in islice(self._visits[0], left):
                left -= 1
            if not left:
                asyncio.get_running_loop().call_soon(self._visit)
                return
            self._visits.popleft()

    def _noticing(
        self,
        scope: Scope,
        ops: Sequence[v1.StateOp],
        version: int,
        besides: LiveSession | None,
        lives: Iterable[LiveSession],
    ) -> Iterator[None]:
        """Yields once for each session that it has looked at."""
        notice, size = v1.Event(), 0
        for live in lives:
            mine = live.key.tenant == scope.tenant and (scope.kind == "app" or live.user == f"users/{scope.id}")
            if mine and live is not besides:
                if not notice.HasField("state_changed"):
                    change = notice.state_changed
                    change.state, change.version = scope.kind, version
                    change.ops.extend(ops)
                    for op in change.ops:
                        op.ClearField("if_version")
                    size = notice.ByteSize()
                live.notice(notice, size)
            yield

    def ring(self) -> None:
        """Wakes every watcher."""
        for live in list(self._live.values()):
            live.ring()

    async def delete(
        self, key: SessionKey, if_etag: str = "", once: Once | None = None, audit: AuditRow | None = None
    ) -> None:
        """Deletes a session and lets its watchers go; see Store.delete_session. Raises Replayed for a repeat."""
        record = self.record(once, key.tenant, Answer("nothing"))._replace(audit=audit)
        try:
            await self.surely(record, lambda record: self.store.delete_session(key, if_etag, record))
        except Replayed:
            if await self.store.get_session(key) is None:
                self._gone(key)
            raise
        self._gone(key)

    async def expire(self, now: int) -> int:
        """Deletes every session whose time has come; returns how many. Afterwards as `delete`. What the store refuses,
        or its own clock does not take for expired, is left to the next call. Raises what it refuses for the REFUSALS-th
        time: then it is not a session that is damaged."""
        gone, more = 0, True
        refused = set[SessionKey]()
        while more:
            more = False
            for key in await self.store.expired_sessions(now, BATCH + len(refused)):
                if key in refused:
                    continue
                try:
                    expired = await self.store.expire_session(key)
                except NotecaseError as error:
                    log.error("session_not_expired", session=key.session, reason=errors.reason_name(error.reason))
                    refused.add(key)
                    if len(refused) == REFUSALS:
                        raise
                    more = True
                    break  # a store that is away refuses to name the others, too
                if expired:
                    self._gone(key)
                    gone += 1
                    more = True
        return gone

    async def erase_user(self, tenant: str, user: str, once: Once) -> int:
        """Deletes every session of "users/{user}", those that are made meanwhile too, then the user's state, and
        returns when the last row of them is gone. Returns how many sessions this call deleted; so does the record
        `once`. Raises Replayed."""
        await self.store.recall(once)
        gone = 0

        async def erased(record: Once) -> bool:
            return await self.store.erase_state(tenant, user, record._replace(answer=Answer("erased", erased=gone)))

        with errors.unsure():
            while not await self.surely(once, erased):
                while keys := await self.store.session_keys(tenant, user, BATCH):
                    for key in keys:
                        gone += await self.delete_if_there(key, once.audit)
                await self.store.sweep_sessions(tenant, user)
        return gone

    async def delete_if_there(self, key: SessionKey, audit: AuditRow | None = None) -> bool:
        """Deletes a session; returns whether this call deleted it. `audit` is the entry for the audit."""
        if audit is not None:
            entry = deepcopy(audit.entry)
            entry.resource = names.session(key.session)
            audit = audit._replace(entry=entry)
        try:
            await self.delete(key, audit=audit)
        except Replayed:
            return True
        except NotecaseError as error:
            if error.reason != v1.ERROR_REASON_SESSION_NOT_FOUND:
                raise
            return False
        return True

    def _gone(self, key: SessionKey) -> None:
        self.transcripts.drop(key)
        self.gone(key)
        live = self._live.get(key)
        if live is not None:
            live.deleted = True
            for task in live.work:
                task.cancel()
            live.ring()
            live.company.ring()

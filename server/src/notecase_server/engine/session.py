"""The live side of the sessions at work in this process: what is being made, and a bell for whoever watches.

Everything here is a hint. What is durable is in the store; a watcher that misses every bell still finds it there,
later. Used from one event loop only.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar
from weakref import WeakValueDictionary

from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import (
    Answer,
    Commit,
    Committed,
    Compare,
    Once,
    Query,
    Replayed,
    Scope,
    SessionKey,
    StepKey,
    Store,
)

T = TypeVar("T")

TAIL_BYTES = 256 << 10
"""Newest events kept for watchers that are nearly there. A turn commits a handful of small ones, so this spares the
usual watcher the store, and a session that nobody runs or watches keeps none."""

BATCH = 100
"""Sessions deleted one after another before it is asked for more."""

NOTICES = 64
"""Passing notices kept for watchers that are behind; each can be recovered from what is stored."""


class Bell:
    """Wakes everybody who waits. A waiter looks at what it waits for, then waits, with no await in between."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait(self, seconds: float | None = None) -> None:
        """Returns at the next ring, or after that many seconds."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters.add(waiter)
        alarm = None if seconds is None else loop.call_later(seconds, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            if alarm is not None:
                alarm.cancel()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Block:
    """One part of a message being made. Its bytes are UTF-8 and only grow, by whole code points."""

    __slots__ = ("call_id", "data", "kind", "tool")

    def __init__(self, kind: Literal["text", "json", "reasoning", "refusal", "arguments"], call_id: str = "") -> None:
        self.kind = kind
        self.call_id = call_id
        self.tool = ""
        self.data = bytearray()


class OpenMessage:
    """The draft of the reply that a step of a run is making; a block's index is that of the part it will be."""

    __slots__ = ("blocks", "name", "run", "settled")

    def __init__(self, name: str, run: str = "") -> None:
        self.name = name
        self.run = run
        self.blocks: list[Block] = []
        self.settled = False
        """A commit of its message has begun and may be in the log before this process hears of it: watchers take the
        rest from the message."""


class LiveSession:
    """One session, as long as a run or a watcher here holds on to it."""

    def __init__(self, key: SessionKey, store: Store, sessions: "Sessions") -> None:
        self.key = key
        self.user = ""
        self.head = 0
        """The newest sequence known here; the store may be ahead."""
        self.drafts: dict[StepKey, OpenMessage] = {}
        """The replies being made. A draft that is gone without its message in the log was discarded."""
        self.deleted = False
        self.work: asyncio.Task[None] | None = None
        """What works on a run of it here; stopped when the session is deleted."""
        self.lock = asyncio.Lock()
        """Held by whoever decides and commits for a run of this session."""
        self.watchers = 0
        """Streams attached to the session or a run of it."""
        self.company = Bell()
        """Rung when that number changes."""
        self.soon = Bell()
        """Rung for what watchers want at once: a commit, a block begun, a notice, the end."""
        self.later = Bell()
        """Rung for everything: what is not rung soon is text that can wait for company."""
        self.noticed = 0
        """Notices ever given: the number of the newest."""
        self._notices: deque[v1.Event] = deque(maxlen=NOTICES)
        self._tail: deque[v1.Event] = deque()
        self._tail_bytes = 0
        self._store = store
        self._sessions = sessions
        self._unsure = ""
        """The commit of a run that may have been made: the store was away when it was asked."""
        self._found: dict[str, Committed] = {}

    async def commit(self, commit: Commit) -> Committed:
        """Commits, then tells the watchers; see Store.commit for what it raises. A commit whose answer is lost is asked
        about. When the store cannot say either, STORE_UNAVAILABLE is raised, and what became of a run's commit is left
        to `settle`."""
        commit_id = commit.id or self._sessions.new_id()
        commit = replace(commit, id=commit_id, content_limit=self._sessions.content_limit)
        added = _messages_added(commit.events)
        for draft in self.drafts.values():
            draft.settled = draft.settled or draft.name in added
        try:
            committed = await self._store.commit(commit)
        except NotecaseError as error:
            if error.reason != v1.ERROR_REASON_STORE_UNAVAILABLE:
                raise
            if commit.if_epoch is not None:
                self._unsure = commit_id
            found = await self._store.find_commit(self.key, commit_id)
            self._unsure = ""
            if found is None:
                raise
            committed = found
        self.committed(committed)
        return committed

    async def settle(self) -> Committed | None:
        """What a run's last commit made when nobody could say before; None where nothing is left open, or it was not
        made. Called by whoever holds the lock, before deciding anything. STORE_UNAVAILABLE when the store is still
        away."""
        if not self._unsure:
            return None
        found = await self._store.find_commit(self.key, self._unsure)
        commit_id, self._unsure = self._unsure, ""
        if found is not None:
            self._found[commit_id] = found
            self.committed(found)
        return found

    def settled(self, commit_id: str) -> Committed | None:
        """What `settle` found out about that commit; to be asked once."""
        return self._found.pop(commit_id, None)

    def committed(self, committed: Committed) -> None:
        self.user = committed.session.user
        for event in committed.events:
            self._keep(event)
        added = _messages_added(committed.events)
        self.drafts = {step: draft for step, draft in self.drafts.items() if draft.name not in added}
        self.head = max(self.head, committed.session.last_sequence)
        self.ring()
        for scope, state in committed.state.items():
            if scope.kind != "session":
                ops = [
                    op
                    for event in committed.events
                    for op in event.state_changed.ops
                    if event.state_changed.state == scope.kind
                ]
                self._sessions.state_changed(scope, ops, state.version, besides=self)

    def _keep(self, event: v1.Event) -> None:
        if self._tail and event.sequence != self._tail[-1].sequence + 1:
            self._tail.clear()
            self._tail_bytes = 0
        self._tail.append(event)
        self._tail_bytes += event.ByteSize()
        while self._tail_bytes > TAIL_BYTES:
            self._tail_bytes -= self._tail.popleft().ByteSize()

    def tail(self, after: int) -> list[v1.Event] | None:
        """The committed events after that sequence up to the head, or None when some are only in the store. Not
        copies."""
        if not self._tail or self._tail[-1].sequence != self.head or self._tail[0].sequence > after + 1:
            return None
        return [event for event in self._tail if event.sequence > after]

    def notices(self, after: int) -> list[v1.Event]:
        """The notices given after number `after`, as far as they are kept. Not copies."""
        missed = min(self.noticed - after, len(self._notices))
        return list(self._notices)[len(self._notices) - missed :] if missed > 0 else []

    def notice(self, event: v1.Event) -> None:
        """Tells the watchers of something that is not stored."""
        self._notices.append(event)
        self.noticed += 1
        self.ring()

    def join(self) -> None:
        """A stream is attached."""
        self.watchers += 1
        self.company.ring()

    def leave(self) -> None:
        """That stream is gone."""
        self.watchers -= 1
        self.company.ring()

    def begin(self, step: StepKey, name: str) -> OpenMessage:
        """Opens the draft of the message that a model is about to write for a step, in place of the one before."""
        draft = self.drafts[step] = OpenMessage(name, step.run)
        return draft

    def add(self, block: Block, text: str) -> int:
        """Appends to a block of a draft and returns how many bytes. A lone surrogate becomes U+FFFD."""
        first = not block.data
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        block.data += data
        if first:
            self.ring()
        else:
            self.later.ring()
        return len(data)

    def discard(self, step: StepKey) -> None:
        """Forgets the draft of a step: nothing of it was kept. Whoever was sent some of it is told."""
        if self.drafts.pop(step, None) is not None:
            self.ring()

    def ring(self) -> None:
        self.soon.ring()
        self.later.ring()


def _messages_added(events: Iterable[v1.Event]) -> set[str]:
    return {event.message_added.name for event in events if event.HasField("message_added")}


class Sessions:
    """The sessions alive in this process, and every write to one: so that a watcher here hears of it at once."""

    def __init__(
        self,
        store: Store,
        new_id: Callable[[], str],
        new_uid: Callable[[], str],
        content_limit: int | None = None,
    ) -> None:
        """No log is let to refer to blobs of more than `content_limit` bytes together."""
        self.store = store
        self.new_id = new_id
        self.content_limit = content_limit
        self._new_uid = new_uid
        self._live: WeakValueDictionary[SessionKey, LiveSession] = WeakValueDictionary()

    def new_key(self, tenant: str, session: str) -> SessionKey:
        """The key of a session that is about to be made under that id."""
        return SessionKey(tenant, session, self._new_uid())

    async def find(self, tenant: str, session: str, if_uid: str = "") -> tuple[SessionKey, v1.Session]:
        """The session that has this id now, with its row. NotecaseError SESSION_NOT_FOUND when there is none, or when
        `if_uid` is set and it is another one."""
        row = await self.store.find_session(tenant, session)
        if row is None or (if_uid and row.uid != if_uid):
            raise errors.not_found("session", f"sessions/{session}")
        return SessionKey(tenant, session, row.uid), row

    def live(self, key: SessionKey) -> LiveSession:
        found = self._live.get(key)
        if found is None:
            found = self._live[key] = LiveSession(key, self.store, self)
        return found

    async def watched(self, key: SessionKey) -> tuple[LiveSession, v1.Session]:
        """The live side of a session that exists, with its row; NotecaseError SESSION_NOT_FOUND otherwise."""
        row = await self.store.get_session(key)
        if row is None:
            raise errors.not_found("session", f"sessions/{key.session}")
        return self.seen(key, row), row

    def seen(self, key: SessionKey, row: v1.Session) -> LiveSession:
        """The live side of a session whose row was just read."""
        live = self.live(key)
        live.user = row.user
        live.head = max(live.head, row.last_sequence)
        return live

    def record(self, once: Once | None, tenant: str, answer: Answer) -> Once:
        """The record of a write that has no Commit: the caller's own, or one under a new id, so that it can be asked
        about."""
        return once or Once.unnamed(tenant, self.new_id(), answer)

    async def surely(self, once: Once, write: Callable[[Once], Awaitable[T]]) -> T:
        """Makes a write that leaves this record. When its answer is lost and it was made, Replayed is raised, as for a
        repeat. STORE_UNAVAILABLE when it was not made, or when nobody can say."""
        try:
            return await write(once)
        except NotecaseError as error:
            if error.reason == v1.ERROR_REASON_STORE_UNAVAILABLE:
                await self.store.recall(once)
            raise

    async def commit(self, commit: Commit) -> Committed:
        """As LiveSession.commit, for what no run does."""
        return await self.live(commit.key).commit(commit)

    async def update_state(
        self,
        key: SessionKey | None,
        scope: Scope,
        ops: Sequence[v1.StateOp],
        if_version: int | None,
        once: Once | None,
        cause_id: str,
    ) -> Committed | v1.State:
        """Changes a state of any scope: that of the session `key` by an event of its log, others in place and with a
        record."""
        if key is not None:
            change = v1.Event(cause_id=cause_id, state_changed=v1.StateChanged(ops=ops))
            versions = {} if if_version is None else {"": if_version}
            return await self.commit(Commit(key=key, once=once, if_state_version=versions, events=[change]))
        assert once is not None
        state = await self.surely(once, lambda record: self.store.update_state(scope, ops, if_version, record))
        self.state_changed(scope, ops, state.version)
        return state

    def state_changed(
        self, scope: Scope, ops: Sequence[v1.StateOp], version: int, besides: LiveSession | None = None
    ) -> None:
        """Gives notice of a change of a user's or the app's state to every session here that reads it."""
        concerned = [
            live
            for live in self._live.values()
            if live is not besides
            and live.key.tenant == scope.tenant
            and (scope.kind == "app" or live.user == f"users/{scope.id}")
        ]
        change = v1.StateChanged(state=scope.kind, ops=ops, version=version)
        for op in change.ops:
            op.ClearField("if_version")
        for live in concerned:
            live.notice(v1.Event(state_changed=change))

    def ring(self) -> None:
        """Wakes every watcher."""
        for live in list(self._live.values()):
            live.ring()

    async def delete(self, key: SessionKey, if_etag: str = "", once: Once | None = None) -> None:
        """Deletes a session and lets its watchers go; see Store.delete_session. Raises Replayed for a repeat."""
        record = self.record(once, key.tenant, Answer("nothing"))
        try:
            await self.surely(record, lambda record: self.store.delete_session(key, if_etag, record))
        except Replayed:
            if await self.store.get_session(key) is None:
                self._gone(key)
            raise
        self._gone(key)

    async def expire(self, now: int) -> int:
        """Deletes every session whose time has come; returns how many. Afterwards as `delete`."""
        gone = 0
        while keys := await self.store.expired_sessions(now, BATCH):
            for key in keys:
                if await self.store.expire_session(key):
                    self._gone(key)
                    gone += 1
        return gone

    async def erase_user(self, tenant: str, user: str, once: Once) -> int:
        """Deletes every session of "users/{user}", those that are made meanwhile too, then the user's state. Returns
        how many sessions; so does the record `once`. Raises Replayed."""
        await self.store.recall(once)
        mine, gone = Query(BATCH, where=Compare("user", "=", user)), 0

        async def erased(record: Once) -> bool:
            return await self.store.erase_state(tenant, user, record._replace(answer=Answer("erased", erased=gone)))

        while not await self.surely(once, erased):
            for row in (await self.store.list_sessions(tenant, mine)).rows:
                gone += await self._deleted(SessionKey(tenant, row.name, row.uid))
        return gone

    async def _deleted(self, key: SessionKey) -> bool:
        """Deletes a session; whether it was not somebody else who did."""
        try:
            await self.delete(key)
        except Replayed:
            return True
        except NotecaseError as error:
            if error.reason != v1.ERROR_REASON_SESSION_NOT_FOUND:
                raise
            return False
        return True

    def _gone(self, key: SessionKey) -> None:
        live = self._live.get(key)
        if live is not None:
            live.deleted = True
            if live.work is not None:
                live.work.cancel()
            live.ring()

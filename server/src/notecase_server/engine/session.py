"""The live side of the sessions at work in this process: what is being made, and a bell for whoever watches.

Everything here is a hint. What is durable is in the store; a watcher that misses every bell still finds it there,
later. Used from one event loop only.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal
from weakref import WeakValueDictionary

from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Commit, Committed, Compare, Once, Query, Scope, SessionKey, Store

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

    __slots__ = ("call_id", "data", "kind", "provider_data", "tool")

    def __init__(self, kind: Literal["text", "json", "reasoning", "refusal", "arguments"], call_id: str = "") -> None:
        self.kind = kind
        self.call_id = call_id
        self.tool = ""
        self.data = bytearray()
        self.provider_data: v1.ProviderData | None = None
        """What the model's provider gets back with the part."""


class OpenMessage:
    """The reply a run is making; a block's index is that of the part it will be."""

    __slots__ = ("blocks", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.blocks: list[Block] = []


class LiveSession:
    """One session, as long as a run or a watcher here holds on to it."""

    def __init__(self, key: SessionKey, store: Store, sessions: "Sessions") -> None:
        self.key = key
        self.user = ""
        self.head = 0
        """The newest sequence known here; the store may be ahead."""
        self.open: OpenMessage | None = None
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

    async def commit(self, commit: Commit) -> Committed:
        """Commits, then tells the watchers; see Store.commit for what it raises."""
        committed = await self._store.commit(replace(commit, content_limit=self._sessions.content_limit))
        self.committed(committed)
        return committed

    def committed(self, committed: Committed) -> None:
        self.user = committed.session.user
        for event in committed.events:
            self._keep(event)
            if self.open is not None and event.message_added.name == self.open.name:
                self.open = None
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

    def begin(self, name: str) -> OpenMessage:
        """Opens the message that a model is about to write."""
        self.open = OpenMessage(name)
        return self.open

    def add(self, block: Block, text: str) -> int:
        """Appends to a block of the open message and returns how many bytes. A lone surrogate becomes U+FFFD."""
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

    def discard(self) -> None:
        """Forgets the open message: nothing of it was kept."""
        opened, self.open = self.open, None
        if opened is not None and opened.blocks:
            self.notice(v1.Event(message_discarded=v1.MessageDiscarded(message=opened.name)))

    def ring(self) -> None:
        self.soon.ring()
        self.later.ring()


class Sessions:
    """The sessions alive in this process, and every write to one: so that a watcher here hears of it at once."""

    def __init__(self, store: Store, content_limit: int | None = None) -> None:
        """No log is let to refer to blobs of more than `content_limit` bytes together."""
        self.store = store
        self.content_limit = content_limit
        self._live: WeakValueDictionary[SessionKey, LiveSession] = WeakValueDictionary()

    def live(self, key: SessionKey) -> LiveSession:
        found = self._live.get(key)
        if found is None:
            found = self._live[key] = LiveSession(key, self.store, self)
        return found

    async def watched(self, key: SessionKey) -> tuple[LiveSession, v1.Session]:
        """The live side of a session that exists, with its row; NotecaseError SESSION_NOT_FOUND otherwise."""
        live = self.live(key)
        row = await self.store.get_session(key)
        if row is None:
            raise errors.not_found("session", f"sessions/{key.session}")
        live.user = row.user
        live.head = max(live.head, row.last_sequence)
        return live, row

    async def commit(self, commit: Commit) -> Committed:
        """As LiveSession.commit, for what no run does."""
        return await self.live(commit.key).commit(commit)

    async def update_state(
        self, scope: Scope, ops: Sequence[v1.StateOp], if_version: int | None, once: Once | None, cause_id: str
    ) -> v1.State:
        """Changes a state of any scope: a session's by an event of its log, the others' in place. Returns the keys
        named."""
        if scope.kind == "session":
            change = v1.Event(cause_id=cause_id, state_changed=v1.StateChanged(ops=ops))
            versions = {} if if_version is None else {"": if_version}
            committed = await self.commit(
                Commit(key=SessionKey(scope.tenant, scope.id), once=once, if_state_version=versions, events=[change])
            )
            return committed.state[scope]
        state = await self.store.update_state(scope, ops, if_version, once)
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

    async def delete(self, key: SessionKey, if_etag: str, once: Once | None) -> None:
        """Deletes a session and lets its watchers go; see Store.delete_session."""
        await self.store.delete_session(key, if_etag, once)
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

    async def erase_user(self, tenant: str, user: str, once: Callable[[int], Once | None]) -> int:
        """Deletes every session of "users/{user}", those that are made meanwhile too, then the user's state. Returns
        how many sessions; `once` makes the record of that. Raises Replayed."""
        await self.store.recall(SessionKey(tenant, ""), once(0), None)
        mine, gone = Query(BATCH, where=Compare("user", "=", user)), 0
        while not await self.store.erase_state(tenant, user, once(gone)):
            for row in (await self.store.list_sessions(tenant, mine)).rows:
                gone += await self._deleted(SessionKey(tenant, row.name))
        return gone

    async def _deleted(self, key: SessionKey) -> bool:
        """Deletes a session; whether it was not somebody else who did."""
        try:
            await self.delete(key, "", None)
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

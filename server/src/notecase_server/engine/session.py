"""Keeps the in-memory side of the sessions that are active in this process: their drafts, and a bell that wakes their
watchers.

Everything here is a hint. Durable data is in the store, and a watcher that misses every ring still finds it there,
later. Used from one event loop only.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import islice
from typing import Protocol

from notecase import v1

from notecase_server import errors
from notecase_server.engine.draft import Draft
from notecase_server.engine.transcripts import Transcript, Transcripts
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Commit, Committed, LogStore, Scope, SessionKey, StepKey
from notecase_server.supervisor import backoff, is_passing, wake

Late = Callable[[Committed], None]
"""Called in place of the code after `LiveSession.commit` when that raised, because the store could not answer, and the
commit turns out later to have been made. The session's lock is held."""

TAIL_BYTES = 256 << 10
"""Newest events that are kept for watchers that are almost up to date. A turn commits a few small ones, so the usual
watcher needs no read of the store. A session without an active run or a watcher keeps none."""

ASKS = 6
"""How often a store is asked at once what became of a commit: for some three seconds. Then the caller hears that it
cannot be known yet, and it is asked on without the caller."""

NOTICES = 64
"""Transient notices that are kept for watchers that are behind, of at most TAIL_BYTES together, or only the newest;
each can be recovered from stored data."""


class Bell(dict[asyncio.Future[None], None]):
    """Wakes all waiters, which are its keys. A waiter checks its condition, then waits, without an await in between."""

    __slots__ = ()

    def ring(self) -> None:
        for waiter in self:
            wake(waiter)
        self.clear()

    async def wait(self, seconds: float | None = None) -> None:
        """Returns at the next ring, or after that many seconds."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self[waiter] = None
        alarm = None if seconds is None else loop.call_later(seconds, wake, waiter)
        try:
            await waiter
        finally:
            self.pop(waiter, None)
            if alarm is not None:
                alarm.cancel()


class Registry(Protocol):
    """The part of `Sessions` that a live session uses."""

    new_id: Callable[[], str]
    content_limit: int | None

    transcripts: Transcripts

    unsure: Callable[["LiveSession"], None]
    """Called with a session when it is not known whether one of its commits was made: some task has to take its
    lock."""

    def state_changed(
        self, scope: Scope, ops: Sequence[v1.StateOp], version: int, besides: "LiveSession | None" = None
    ) -> None: ...


class LiveSession:
    """Holds one session, as long as a run or a watcher here holds on to it."""

    def __init__(self, key: SessionKey, store: LogStore, sessions: Registry) -> None:
        self.key = key
        self.user = ""
        self.head = 0
        """The newest sequence known here; the store may be ahead."""
        self.drafts: dict[StepKey, Draft] = {}
        """The replies being made. A draft that is gone without its message in the log was discarded."""
        self.deleted = False
        self.work: set[asyncio.Task[None]] = set()
        """What works on runs of it here; stopped when the session is deleted."""
        self.watchers = 0
        """Streams attached to the session or a run of it."""
        self.company = Bell()
        """Rung when that number changes, when a run of the session changes its state, and once it is deleted."""
        self.soon = Bell()
        """Rung for events that are sent at once: a commit, the beginning of a block, a notice, the end."""
        self.later = Bell()
        """Rung for everything. Text, for which only this rings, is sent in batches."""
        self.noticed = 0
        """Notices ever given: the number of the newest."""
        self._notices: list[tuple[v1.Event, int]] = []
        """With their bytes."""
        self._tail: list[v1.Event] = []
        self._tail_bytes = 0
        self.quiet = asyncio.Lock()
        """Held by a task that can commit only while no writer outside of runs does; such writers wait. In a session
        with an active run it is taken before the session's own lock, and in any other session after it."""
        self._store = store
        self._sessions = sessions
        self._lock = asyncio.Lock()
        self._unsure: dict[str, Late] = {}
        """The commits that may have been made, by id, in their order: the store was away when it was asked."""
        self._afterwards: list[Callable[[], None]] = []
        """What is put off until it is known what became of them."""

    def held(self) -> AbstractAsyncContextManager[None]:
        """Holds the lock under which something is decided and committed for a run of this session, once it is known
        what became of the commits before. Raises STORE_UNAVAILABLE while the store cannot say."""
        return self

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        if self._unsure or self._afterwards:
            try:
                await self._settle()
            except BaseException:
                self._lock.release()
                raise

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()

    async def commit(self, commit: Commit, late: Late | None = None) -> Committed:
        """Commits, then wakes the watchers; see Store.commit for what it raises. If the answer of a commit is lost, the
        store is asked whether the commit was made. If it cannot answer that either, STORE_UNAVAILABLE is raised, and
        `late` is called once it is known that the commit was made: before anything else is decided for a run of this
        session."""
        commit_id = commit.id or self._sessions.new_id()
        commit = commit._replace(id=commit_id, content_limit=self._sessions.content_limit)
        if self.drafts:
            added = {event.message_added.name for event in commit.events if event.HasField("message_added")}
            for draft in self.drafts.values():
                draft.settled = draft.settled or draft.name in added
        try:
            committed = await self._store.commit(commit)
        except NotecaseError as error:
            if not is_passing(error):
                raise
            try:
                with errors.unsure():
                    found = await self._ask(commit_id)
            except BaseException:
                if late is not None:
                    self._unsure[commit_id] = late
                    self._sessions.unsure(self)
                raise
            if found is None:
                raise
            committed = found
        self.committed(committed)
        return committed

    async def _ask(self, commit_id: str) -> Committed | None:
        for wait in islice(backoff(), ASKS - 1):
            try:
                return await self._store.find_commit(self.key, commit_id)
            except NotecaseError as error:
                if not is_passing(error):
                    raise
            await asyncio.sleep(wait)
        return await self._store.find_commit(self.key, commit_id)

    async def _settle(self) -> None:
        for commit_id, late in list(self._unsure.items()):
            found = await self._store.find_commit(self.key, commit_id)
            del self._unsure[commit_id]
            if found is not None:
                self.committed(found)
                late(found)
        if not self._unsure:
            acts, self._afterwards = self._afterwards, []
            for act in acts:
                act()

    def once_known(self, act: Callable[[], None]) -> None:
        """Calls `act` with the lock held, once it is known what became of every commit: at once where it is. The caller
        holds the lock."""
        if self._unsure:
            self._afterwards.append(act)
        else:
            act()

    def committed(self, committed: Committed) -> None:
        self.user = committed.session.user
        self.head = max(self.head, committed.session.last_sequence)
        self._keep(committed.events)
        if self.drafts:
            self.drafts = {step: draft for step, draft in self.drafts.items() if draft.name not in committed.messages}
        self._sessions.transcripts.follow(self.key, committed)
        self.ring()
        if self.company:
            for event in committed.events:
                if event.HasField("run_state_changed"):
                    self.company.ring()
                    break
        for scope, state in committed.state.items():
            if scope.kind != "session":
                ops = [
                    op
                    for event in committed.events
                    for op in event.state_changed.ops
                    if event.state_changed.state == scope.kind
                ]
                self._sessions.state_changed(scope, ops, state.version, besides=self)

    def _keep(self, events: Sequence[v1.Event]) -> None:
        """Adds the events of a commit to the tail, which starts again after a gap."""
        if self._tail and events and events[0].sequence != self._tail[-1].sequence + 1:
            self._tail.clear()
            self._tail_bytes = 0
        self._tail += events
        self._tail_bytes += sum(map(v1.Event.ByteSize, events))
        over = 0
        while self._tail_bytes > TAIL_BYTES:
            self._tail_bytes -= self._tail[over].ByteSize()
            over += 1
        del self._tail[:over]

    def transcript(self) -> Transcript | None:
        """Returns the messages of a long session up to the head if they are cached, else None."""
        return self._sessions.transcripts.find(self.key, self.head)

    def keep(self, transcript: Transcript, head: int) -> None:
        """Caches messages that were read while the log ended at `head`, unless it has grown since."""
        if head == self.head and not self.deleted:
            self._sessions.transcripts.keep(self.key, head, transcript)

    def tail(self, after: int) -> list[v1.Event] | None:
        """Returns the committed events after that sequence up to the head, or None when some are only in the store. Not
        copies."""
        tail = self._tail
        if not tail or tail[-1].sequence != self.head or (first := tail[0].sequence) > after + 1:
            return None
        return tail[after + 1 - first :]

    def notices(self, after: int) -> list[v1.Event]:
        """Returns the kept notices after number `after`. Not copies."""
        missed = min(self.noticed - after, len(self._notices))
        return [event for event, _ in self._notices[len(self._notices) - missed :]] if missed > 0 else []

    def notice(self, event: v1.Event, size: int) -> None:
        """Gives the watchers an event of so many bytes that is not stored."""
        self._notices.append((event, size))
        del self._notices[:-NOTICES]
        over = sum(size for _, size in self._notices) - TAIL_BYTES
        while over > 0 and len(self._notices) > 1:
            over -= self._notices.pop(0)[1]
        self.noticed += 1
        self.ring()

    def join(self) -> None:
        """Counts a stream that has attached."""
        self.watchers += 1
        if self.company:
            self.company.ring()

    def leave(self) -> None:
        """Counts a stream that has gone."""
        self.watchers -= 1
        if self.company:
            self.company.ring()

    def begin(self, step: StepKey, draft: Draft) -> None:
        """Opens the draft of the message that a model is about to write for a step, in place of the one before."""
        self.drafts[step] = draft

    def written(self, first: bool) -> None:
        """Wakes the watchers of a draft that has grown; `first` says that a block has begun."""
        if first:
            self.ring()
        else:
            self.later.ring()

    def discard(self, step: StepKey) -> None:
        """Removes the draft of a step, of which nothing was stored. Watchers that received a part of it are
        notified."""
        if self.drafts.pop(step, None) is not None:
            self.ring()

    def ring(self) -> None:
        if self.soon:
            self.soon.ring()
        if self.later:
            self.later.ring()

"""A watcher is a cursor over the log and the open blocks of one session: it looks, sends what is missing, and waits.

Nothing is queued for it. What it has not seen is in the store or in the blocks, so a slow watcher gets larger batches,
and one that missed every bell is only late.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.session import LiveSession
from notecase_server.store.contract import PAGE_BYTES, Store
from notecase_server.store.fold import ENDED

DEFAULT_BATCH_DELAY = 0.03
"""Seconds that text waits for company. A message costs the same whether it carries one event or thirty, and nobody
reads faster than thirty times a second."""


class Pace(NamedTuple):
    """How often the server says something to a stream on which nothing happens, in seconds."""

    heartbeat: float = 15.0
    poll: float = 5.0
    """How often a watcher looks into the store although no bell rang."""
    stall: float = 60.0
    """How long a frame may wait for its reader: who reads nothing for so long is let go."""


class Cursor:
    """One watcher's place. Not shared; used by one task at a time."""

    def __init__(
        self,
        live: LiveSession,
        store: Store,
        after: int,
        head: int,
        options: v1.WatchOptions,
        pace: Pace,
        run: str = "",
    ) -> None:
        """Begins behind sequence `after`; `caught_up` is told at `head`. Unless `keep_open` it ends with `run`'s end,
        or when caught up if `run` is ""."""
        self.sequence = after
        self.finished = False
        self._live = live
        self._store = store
        self._head = head
        self._durable_only = options.durable_only
        self._keep_open = options.keep_open
        delay = options.max_batch_delay
        self._delay = delay.seconds + delay.nanos / 1e9 if options.HasField("max_batch_delay") else DEFAULT_BATCH_DELAY
        self._pace = pace
        self._run = run
        self._noticed = live.noticed
        self._caught_up = False
        self._message = ""
        self._ends: list[int] = []
        """How much of each block of the open message was sent, in bytes."""
        self._flushed = 0.0

    async def next(self, woken: Callable[[], bool]) -> v1.EventBatch | None:
        """The next batch, as soon as something is due. None after a while in which nothing was, or when `woken` says
        that the caller has something else to do. Afterwards `finished` tells whether it was the last.

        Raises NotecaseError SESSION_NOT_FOUND when the session is deleted, and what the store raises."""
        loop = asyncio.get_running_loop()
        beat = loop.time() + self._pace.heartbeat
        poll = loop.time() + self._pace.poll
        while True:
            if self._live.deleted:
                raise errors.not_found("session", names.session(self._live.key.session))
            now = loop.time()
            soon, later = self._due()
            if soon or (later and now >= self._flushed + self._delay):
                batch = await self._batch()
                self._flushed = loop.time()
                if batch.events or batch.caught_up:
                    return batch
                continue
            if woken() or self.finished or now >= beat:
                return None
            if later:
                await self._live.soon.wait(self._flushed + self._delay - now)
                continue
            if now >= poll:
                await self._look()
                poll = now + self._pace.poll
                continue
            await self._live.later.wait(min(poll, beat) - now)

    def _due(self) -> tuple[bool, bool]:
        """Whether there is something to send at once, and whether there is something that can wait for company."""
        live = self._live
        if live.head > self.sequence or not self._caught_up or live.noticed > self._noticed:
            return True, False
        if live.open is None or self._durable_only:
            return False, False
        ends = self._ends if live.open.name == self._message else []
        if any(block.data or block.tool for block in live.open.blocks[len(ends) :]):
            return True, False
        return False, any(len(block.data) > end for block, end in zip(live.open.blocks, ends, strict=False))

    async def _look(self) -> None:
        """What a lost bell would have told."""
        row = await self._store.get_session(self._live.key)
        if row is None:
            self._live.deleted = True
        else:
            self._live.head = max(self._live.head, row.last_sequence)

    async def _batch(self) -> v1.EventBatch:
        batch = v1.EventBatch()
        for event in await self._durable():
            batch.events.append(event)
        if self.finished:
            self._catch_up(batch)
            return batch
        if self.sequence < self._live.head:
            return batch
        for notice in self._live.notices(self._noticed):
            self._add(batch, notice)
        self._noticed = self._live.noticed
        if not self._durable_only:
            self._add_deltas(batch)
        self._catch_up(batch)
        return batch

    def _catch_up(self, batch: v1.EventBatch) -> None:
        if not self._caught_up and (self.finished or self.sequence >= self._head):
            self._caught_up = batch.caught_up = True
            self.finished = self.finished or not (self._run or self._keep_open)

    async def _durable(self) -> list[v1.Event]:
        """The next events of the log, at most a page, up to where the watch ends."""
        live = self._live
        if self.finished or live.head <= self.sequence:
            return []
        found = live.tail(self.sequence)
        if found is None:
            found = await self._store.read_events(live.key, self.sequence)
        events: list[v1.Event] = []
        size = 0
        for stored in found:
            event = v1.Event()
            event.CopyFrom(stored)
            events.append(names.render_event(live.key.session, live.user, event))
            self.sequence = stored.sequence
            size += stored.ByteSize()
            if stored.HasField("run_state_changed"):
                self._message = ""  # watchers forget open blocks at it, whichever run's it is: they come again whole
            if stored.run == self._run and stored.run_state_changed.state in ENDED and not self._keep_open:
                self.finished = True
            if self.finished or size > PAGE_BYTES:
                break
        return events

    def _add(self, batch: v1.EventBatch, notice: v1.Event) -> None:
        event = v1.Event()
        event.CopyFrom(notice)
        batch.events.append(names.render_event(self._live.key.session, self._live.user, event))

    def _add_deltas(self, batch: v1.EventBatch) -> None:
        opened = self._live.open
        if opened is None:
            return
        if opened.name != self._message:
            self._message = opened.name
            self._ends = []
        for index, block in enumerate(opened.blocks):
            known = index < len(self._ends)
            start = self._ends[index] if known else 0
            end = len(block.data)
            if known and end == start:
                continue
            delta = v1.BlockDelta(
                message=names.message(self._live.key.session, opened.name),
                block=index,
                start=start,
                end=end,
                call_id=block.call_id,
                tool=block.tool,
            )
            setattr(delta, block.kind, block.data[start:].decode())
            batch.events.add().block_delta.CopyFrom(delta)
            if known:
                self._ends[index] = end
            else:
                self._ends.append(end)

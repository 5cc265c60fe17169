"""A watcher is a cursor over the log and the drafts of one session: it checks what is new, sends what is missing, and
waits.

It has no queue. Whatever it has not sent is in the store or in the drafts, so a slow watcher gets larger batches, and
one that missed every wake-up is only late. It knows how much of each draft it sent. The rest of a draft is sent before
the message itself, and a draft that disappears without a message in the log was discarded.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.draft import Block
from notecase_server.engine.session import LiveSession
from notecase_server.store.contract import PAGE_BYTES, History
from notecase_server.store.fold import ENDED

DEFAULT_BATCH_DELAY = 0.03
"""Seconds for which deltas are batched. A message costs the same whether it carries one event or thirty, and people do
not read thirty times a second."""


class Pace(NamedTuple):
    """How often the server says something to a stream on which nothing happens, in seconds."""

    heartbeat: float = 15.0
    poll: float = 5.0
    """How often a watcher looks into the store although nothing woke it."""
    stall: float = 60.0
    """How long a frame may wait for its reader: who reads nothing for so long is let go."""


SLICE_BYTES = 256 << 10
"""The most text in one delta, so that a batch ends near its bound whatever the length of a reply."""


AT_ONCE_BYTES = 128 << 10
"""Bytes of events that are copied, or sent, before others have their turn: a MiB of small values takes 8 ms each."""


class _Batch:
    """Events up to about a page; a larger one comes alone."""

    __slots__ = ("_live", "events", "frame", "size")

    def __init__(self, live: LiveSession) -> None:
        self.frame = v1.RunResponse()
        self.events = self.frame.batch.events
        self._live = live
        self.size = 0
        """Bytes of the events."""

    def add(self, event: v1.Event) -> bool:
        """Adds a copy of an event with full names. Returns False, and leaves the event out, when there is no room for
        it."""
        added = self.events.add()
        added.CopyFrom(event)
        return self.fits(names.render_event(self._live.key.session, self._live.user, added))

    def fits(self, added: v1.Event) -> bool:
        """Whether there is room for the newest event, which was added in its whole names; otherwise it is taken out."""
        size = added.ByteSize()
        if self.size + size > PAGE_BYTES and len(self.events) > 1:
            del self.events[-1]
            return False
        self.size += size
        return True


class _Sent:
    """What a stream was sent of one message before the message itself."""

    __slots__ = ("blocks", "message", "run")

    def __init__(self, session: str, message: str, run: str) -> None:
        self.message = names.message(session, message)
        self.run = names.run(session, run) if run else ""
        self.blocks: dict[int, tuple[str, int]] = {}
        """The kind of each block's deltas and the end of the last one, in bytes."""


class Cursor:
    """One watcher's place. Not shared; used by one task at a time."""

    __slots__ = (
        "_caught_up",
        "_cut_off",
        "_delay",
        "_durable_only",
        "_flushed",
        "_head",
        "_keep_open",
        "_live",
        "_noticed",
        "_pace",
        "_run",
        "_sent",
        "_store",
        "finished",
        "sequence",
    )

    def __init__(
        self,
        live: LiveSession,
        store: History,
        after: int,
        head: int,
        options: v1.WatchOptions,
        pace: Pace,
        run: str = "",
    ) -> None:
        """Begins after sequence `after`. Sets `caught_up` at `head`; replies after `head` come after their deltas.
        Unless `keep_open` is set, it ends with `run`'s end, or when caught up if `run` is ""."""
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
        self._sent: dict[str, _Sent] = {}
        """The messages, by name, of which some deltas were sent and the end was not."""
        self._cut_off = False
        """The last batch was full before all was in it."""
        self._flushed = 0.0

    async def next(self, woken: Callable[[], bool]) -> v1.RunResponse | None:
        """Returns the frame of the next batch as soon as one is due. Returns None after a while without one, or when
        `woken` says that the caller has something else to do. Afterwards `finished` says whether it was the last.

        Raises NotecaseError SESSION_NOT_FOUND when the session is deleted, and what the store raises."""
        live, time = self._live, asyncio.get_running_loop().time
        now = time()
        beat, poll = now + self._pace.heartbeat, now + self._pace.poll
        while True:
            if live.deleted:
                raise errors.not_found("session", names.session(live.key.session))
            soon, later = self._due()
            if soon or (later and now >= self._flushed + self._delay):
                frame = await self._batch()
                now = self._flushed = time()
                if frame is not None:
                    return frame
                continue
            if woken() or self.finished or now >= beat:
                return None
            pause = self._flushed + self._delay - now
            if later or (pause > 0 and live.drafts and not self._durable_only):  # nothing is due before
                await live.soon.wait(pause)
            elif now >= poll:
                await self._look()
                poll = now + self._pace.poll
            else:
                await live.later.wait(min(poll, beat) - now)
            now = time()

    def _due(self) -> tuple[bool, bool]:
        """Returns whether there is something to send at once, and whether there are deltas that can wait for others."""
        live = self._live
        if live.head > self.sequence or not self._caught_up or live.noticed > self._noticed or self._cut_off:
            return True, False
        if self._durable_only or not (live.drafts or self._sent):
            return False, False
        more, begun = False, 0
        for draft in live.drafts.values():
            sent = self._sent.get(draft.name)
            begun += sent is not None
            if draft.settled:
                continue
            for index, block in enumerate(draft.blocks):
                known = sent.blocks.get(index) if sent is not None else None
                if known is None and block.data:
                    return True, False
                more = more or (known is not None and len(block.data) > known[1])
        discarded = begun < len(self._sent)
        return discarded, more and not discarded

    async def _look(self) -> None:
        """Reads events from the store whose wake-up was missed."""
        row = await self._store.get_session(self._live.key)
        if row is None:
            self._live.deleted = True
        else:
            self._live.head = max(self._live.head, row.last_sequence)

    async def _batch(self) -> v1.RunResponse | None:
        """Returns the frame with the events that are due, or None."""
        live, batch = self._live, _Batch(self._live)
        self._cut_off = not (self.finished or live.head <= self.sequence or await self._add_log(batch))
        read = self.sequence >= live.head and not self._cut_off
        if read and not self.finished:
            self._cut_off = not self._add_passing(batch)
        told = not self._caught_up and (self.finished or (read and not self._cut_off and self.sequence >= self._head))
        if told:
            self._caught_up = batch.frame.batch.caught_up = True
            self.finished = self.finished or not (self._run or self._keep_open)
        return batch.frame if told or batch.events else None

    async def _add_log(self, batch: _Batch) -> bool:
        """Adds the next events of the log, up to where the watch ends, each reply after the deltas that complete it.
        Returns False when the batch was full before."""
        live = self._live
        found = live.tail(self.sequence)
        if found is None:
            found = await self._store.read_events(live.key, self.sequence)
        pause_at = AT_ONCE_BYTES
        for stored in found:
            kind = stored.WhichOneof("payload")
            ends = kind == "run_state_changed" and stored.run == self._run and stored.run_state_changed.state in ENDED
            if ends and self._sent and not self._add_discarded(batch):  # nothing follows it
                return False
            if kind == "message_added" and not self._complete(batch, stored):
                return False
            if not batch.add(stored):
                return False
            self.sequence = stored.sequence
            if kind == "message_added":
                self._sent.pop(stored.message_added.name, None)
            if ends and not self._keep_open:
                self.finished = True
                break
            if batch.size >= pause_at:
                pause_at = batch.size + AT_ONCE_BYTES
                await asyncio.sleep(0)
        return True

    def _complete(self, batch: _Batch, stored: v1.Event) -> bool:
        """Adds the missing deltas of a reply that comes next in the log. Returns False when the batch is full."""
        message = stored.message_added
        if self._durable_only or stored.sequence <= self._head or message.role != v1.Message.ROLE_ASSISTANT:
            return True
        for index, part in enumerate(message.parts):
            block = _block(part)
            if block is not None and not self._grow(batch, message.name, stored.run, index, block):
                return False
        return True

    def _add_passing(self, batch: _Batch) -> bool:
        """Adds notices, discarded messages and new text of the drafts. Returns False when the batch is full."""
        live = self._live
        if live.noticed > self._noticed:
            notices = live.notices(self._noticed)
            for number, notice in enumerate(notices, live.noticed - len(notices) + 1):
                if not batch.add(notice):
                    return False
                self._noticed = number
        if self._sent and not self._add_discarded(batch):
            return False
        if self._durable_only:
            return True
        for draft in live.drafts.values():
            if draft.settled:
                continue
            for index, block in enumerate(draft.blocks):
                if block.data and not self._grow(batch, draft.name, draft.run, index, block):
                    return False
        return True

    def _add_discarded(self, batch: _Batch) -> bool:
        """Adds a notice for each message of which a part was sent and which will not come, since the log was read
        beyond the point where it could be. Returns False when the batch is full."""
        drafts = {draft.name for draft in self._live.drafts.values()}
        for name, sent in list(self._sent.items()):
            if name in drafts:
                continue
            discarded = v1.MessageDiscarded(message=sent.message)
            if not batch.fits(batch.events.add(run=sent.run, message_discarded=discarded)):
                return False
            del self._sent[name]
        return True

    def _grow(self, batch: _Batch, name: str, run: str, index: int, block: Block) -> bool:
        """Adds the deltas of a block from the last `end` sent on; False when the batch is full before its end. All
        deltas of a block have the kind of the first one."""
        sent = self._sent.get(name) or _Sent(self._live.key.session, name, run)
        kind, start = sent.blocks.get(index, (block.kind, 0))
        whole = len(block.data)
        while start < whole or index not in sent.blocks:
            end = whole if whole - start <= SLICE_BYTES else _slice_end(block.data, start)
            added = batch.events.add(run=sent.run)
            delta = added.block_delta
            delta.message, delta.block, delta.start, delta.end = sent.message, index, start, end
            delta.call_id, delta.tool = block.call_id, block.tool
            setattr(delta, kind, block.data[start:end].decode())
            if not batch.fits(added):
                return False
            self._sent[name] = sent
            sent.blocks[index] = (kind, end)
            start = end
        return True


def _slice_end(data: bytearray, start: int) -> int:
    """Where a slice ends that begins at `start`, between code points, when not all is in it."""
    end = start + SLICE_BYTES
    while data[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _block(part: v1.Part) -> Block | None:
    """A part of a whole message as the block of a draft; None for one that is not streamed."""
    match part.WhichOneof("kind"):
        case "text":
            block, text = Block("text"), part.text
        case "json":
            block, text = Block("json"), part.json
        case "reasoning":
            block, text = Block("reasoning"), part.reasoning.text
        case "refusal":
            block, text = Block("refusal"), part.refusal
        case "tool_call":
            block, text = Block("arguments", part.tool_call.call_id), part.tool_call.arguments
            block.tool = part.tool_call.tool
        case _:
            return None
    block.data += text.encode()
    return block

"""Caches the messages of long sessions between their turns, so that a turn reads only what is new.

The cached messages are those of one sequence and are used at that sequence only. They are updated by a commit that
directly follows. A commit of another process is a gap, after which all of them are removed and read again. The cache
never replaces a question to the store: a worker has just committed, and knows from that where the log ends.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

from notecase import v1

from notecase_server.store.contract import Committed, SessionKey

MOST_BYTES = 64 << 20
"""Bytes of all cached messages: the sessions that were used last."""

LONGEST = 10_000
LONGEST_BYTES = 16 << 20
"""Messages of one session, and bytes of them. A longer one is read again for each turn, which its model takes much
longer for."""

MESSAGE_BYTES = 300
"""Bytes of a message in memory in addition to its content."""

_sequence = attrgetter("sequence")

_SPOKEN = (v1.Message.ROLE_USER, v1.Message.ROLE_ASSISTANT)


class Transcript(NamedTuple):
    """Messages of a session that are not superseded, whatever runs they belong to."""

    messages: Sequence[v1.Message]
    """Oldest first, up to the newest. Not to be changed."""
    only_text: bool
    """Each of them is one text that a user or the assistant said, and nothing else."""
    size: int
    """Bytes of all of them, nearly."""


def is_only_text(messages: Iterable[v1.Message]) -> bool:
    """See Transcript.only_text."""
    for message in messages:
        if message.role not in _SPOKEN or len(parts := message.parts) != 1 or not parts[0].text:
            return False
    return True


class _Kept:
    __slots__ = ("content", "head", "messages", "only_text")

    def __init__(self, head: int, transcript: Transcript) -> None:
        self.head = head
        self.messages = list(transcript.messages)
        self.only_text = transcript.only_text
        self.content = transcript.size
        """Bytes of the messages, nearly."""

    @property
    def size(self) -> int:
        return self.content + MESSAGE_BYTES * len(self.messages)

    @property
    def fits(self) -> bool:
        return len(self.messages) <= LONGEST and self.size <= LONGEST_BYTES

    def put(self, message: v1.Message) -> None:
        """Adds a message, or replaces its earlier version."""
        copy = v1.Message()
        copy.CopyFrom(message)
        self.only_text = self.only_text and is_only_text((copy,))
        self.content += copy.ByteSize()
        if copy.sequence > self.messages[-1].sequence:
            self.messages.append(copy)
            return
        at = bisect_left(self.messages, copy.sequence, key=_sequence)
        if self.messages[at].sequence == copy.sequence:
            self.content -= self.messages[at].ByteSize()
            self.messages[at] = copy


class Transcripts:
    """Those of one process. Used from one event loop only."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.size = 0
        """Bytes, nearly: the texts with MESSAGE_BYTES for each."""
        self._most = most_bytes
        self._kept: OrderedDict[SessionKey, _Kept] = OrderedDict()

    def holds(self, key: SessionKey, head: int) -> bool:
        """Whether `find` finds something."""
        kept = self._kept.get(key)
        return kept is not None and kept.head == head

    def find(self, key: SessionKey, head: int) -> Transcript | None:
        """Returns the cached messages of a session whose log ends at `head`, or None."""
        kept = self._kept.get(key)
        if kept is None or kept.head != head:
            return None
        self._kept.move_to_end(key)
        return Transcript(kept.messages.copy(), kept.only_text, kept.content)

    def keep(self, key: SessionKey, head: int, transcript: Transcript) -> None:
        """Caches the messages that were read of a session while its log ended at `head`, unless there are too many."""
        self.drop(key)
        messages = transcript.messages
        if not messages or len(messages) > LONGEST or messages[-1].sequence > head:
            return
        kept = _Kept(head, transcript)
        if kept.fits:
            self._kept[key] = kept
            self.size += kept.size
            self._bound()

    def follow(self, key: SessionKey, committed: Committed) -> None:
        """Applies the changes of a commit."""
        kept = self._kept.get(key)
        if kept is None or not committed.events:
            return
        gap = committed.events[0].sequence != kept.head + 1
        for event in committed.events:
            if gap or event.HasField("rewound"):
                self.drop(key)
                return
        self.size -= kept.size
        for message in sorted(committed.messages.values(), key=_sequence):
            kept.put(message)
        self.size += kept.size
        kept.head = committed.events[-1].sequence
        if not kept.fits:
            self.drop(key)
        self._bound()

    def drop(self, key: SessionKey) -> None:
        """Forgets a session."""
        if (kept := self._kept.pop(key, None)) is not None:
            self.size -= kept.size

    def _bound(self) -> None:
        while self.size > self._most:
            _, kept = self._kept.popitem(last=False)
            self.size -= kept.size

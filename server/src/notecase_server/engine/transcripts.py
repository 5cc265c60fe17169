"""Caches the messages of long sessions between their turns, so that a turn reads only what is new.

The cached messages are those of one sequence and are used at that sequence only. They are updated by a commit that
directly follows. A commit of another process is a gap, after which all of them are removed and read again. The cache
never replaces a question to the store: a worker has just committed, and knows from that where the log ends.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from sys import getsizeof
from typing import NamedTuple

from notecase import v1

from notecase_server.models.contract import texts_of
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


class Transcript(NamedTuple):
    """Messages of a session that are not superseded, whatever runs they belong to."""

    messages: Sequence[v1.Message]
    """Oldest first, up to the newest. Not to be changed."""
    texts: Sequence[str] | None
    """See ModelRequest.texts."""
    size: int
    """Bytes of all of them, nearly."""


class _Kept:
    __slots__ = ("content", "head", "messages", "text_bytes", "texts")

    def __init__(self, head: int, transcript: Transcript) -> None:
        self.head = head
        self.messages = list(transcript.messages)
        self.texts = None if transcript.texts is None else list(transcript.texts)
        self.content = transcript.size
        """Bytes of the messages, nearly."""
        self.text_bytes = _bytes(self.texts)

    @property
    def size(self) -> int:
        return self.content + self.text_bytes + MESSAGE_BYTES * len(self.messages)

    @property
    def fits(self) -> bool:
        return len(self.messages) <= LONGEST and self.size <= LONGEST_BYTES

    def put(self, message: v1.Message) -> None:
        """Adds a message, or replaces its earlier version."""
        copy = v1.Message()
        copy.CopyFrom(message)
        at = len(self.messages)
        if copy.sequence <= self.messages[-1].sequence:
            at = bisect_left(self.messages, copy.sequence, key=_sequence)
            if self.messages[at].sequence != copy.sequence:
                return
            self.content -= self.messages[at].ByteSize()
        self.content += copy.ByteSize()
        self.messages[at : at + 1] = [copy]
        if self.texts is None:
            return
        if (text := texts_of([copy])) is None:
            self.texts, self.text_bytes = None, 0
        else:
            self.text_bytes += _bytes(text) - _bytes(self.texts[at : at + 1])
            self.texts[at : at + 1] = text


def _bytes(texts: Sequence[str] | None) -> int:
    """Returns how many bytes texts have in memory."""
    return sum(map(getsizeof, texts or ()))


class Transcripts:
    """Those of one process. Used from one event loop only."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.size = 0
        """Bytes of all cached messages, nearly."""
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
        return Transcript(kept.messages.copy(), kept.texts and kept.texts.copy(), kept.content)

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

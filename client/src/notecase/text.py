"""Joins the pieces of text in a stream's events to what `RunStream.text` yields."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from notecase import v1


class Piece(NamedTuple):
    """A piece of a message's text. The same bytes may arrive again, after a broken connection."""

    message: str
    block: int
    """Index of the part in the message."""
    start: int
    """First byte within the part."""
    text: str


class Text:
    """The text after a delta that was read before; after an empty one, the whole text."""

    def __init__(self, after: v1.BlockDelta) -> None:
        self._after = after
        self._ends = {(after.message, after.block): after.end}
        self._message = after.message
        self._held: list[Piece] | None = [] if after.message else None
        """Text that precedes the message of `after`, if that message is still to come."""

    def add(self, event: v1.Event, pieces: Iterable[Piece], old: bool) -> Iterator[str]:
        """Yields the new text of an event. `old` says that a message of `after` may still follow; the text before it is
        held back, and left out when it follows."""
        if self._held is not None:
            seen = {event.block_delta.message, event.message_added.name, event.message_discarded.message}
            if self._after.message in seen:
                self._held = None
            elif old:
                self._held.extend(pieces)
                return
            else:
                yield from self.end()
        yield from self._new(pieces)

    def end(self) -> Iterator[str]:
        """Yields the text that was held back for a message that has not come."""
        held, self._held = self._held, None
        yield from self._new(held or ())

    def _new(self, pieces: Iterable[Piece]) -> Iterator[str]:
        for message, block, start, text in pieces:
            if message == self._after.message and block < self._after.block:
                continue
            data = text.encode()
            have = self._ends.get((message, block), start)
            self._ends[message, block] = max(have, start + len(data))
            new = data[max(have - start, 0) :].decode()
            if new and self._message not in {"", message}:
                yield "\n\n"
            if new:
                self._message = message
                yield new

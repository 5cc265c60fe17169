"""What rewinds have left behind, as stretches of a log: a message that lies in one is superseded. So a rewind writes no
message again, however many lie behind it.

Stretches of one log do not overlap: what a rewind has left behind stays that one's. Everything between a rewind and
where it went back to is left behind, by it or by others, so a search steps over all of them at once: what a rewind
costs is the stretches that it adds, however many there are.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from notecase import v1


class Stretch(NamedTuple):
    """What lies behind sequence `after` and before `until`, superseded by the rewind at `sequence`, which went back to
    `back`."""

    after: int
    until: int
    sequence: int
    back: int


def left_behind(last: Callable[[int], Stretch | None], back: int, sequence: int) -> list[Stretch]:
    """Returns the stretches that a rewind to `back` adds, the last first: what lies between and is in force. `last`
    finds the last stretch that begins before a sequence."""
    added, until, stretch = list[Stretch](), sequence, last(sequence)
    while stretch is not None and stretch.until - 1 > back:
        added.append(Stretch(stretch.until - 1, until, sequence, back))
        until = stretch.back + 1
        stretch = last(stretch.back)
    added.append(Stretch(back, until, sequence, back))
    return [stretch for stretch in added if stretch.until > stretch.after + 1]


def last_of(known: Sequence[Stretch], before: int) -> Stretch | None:
    """Returns the last one that begins before a sequence, of those of a log in their order."""
    place = bisect_left(known, (before,)) - 1
    return known[place] if place >= 0 else None


def superseded_at(known: Sequence[Stretch], sequence: int) -> int | None:
    """Returns the rewind that left this sequence behind; None when it is in force."""
    stretch = last_of(known, sequence)
    return stretch.sequence if stretch is not None and stretch.until > sequence else None


def marked(message: v1.Message, rewind: int | None) -> v1.Message:
    """Returns the message, which the caller owns, as the rewind at that sequence has left it, if one has."""
    if rewind is not None:
        message.status = v1.Message.STATUS_SUPERSEDED
        message.update_sequence = rewind
    return message

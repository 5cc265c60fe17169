"""What rewinds have left behind, as stretches of a log: a message that lies in one is superseded. So a rewind writes no
message again, however many lie behind it.

Stretches of one log do not overlap: what a rewind has left behind stays that one's.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from notecase import v1


class Stretch(NamedTuple):
    """What lies behind sequence `after` and before `until`, superseded by the rewind at `sequence`."""

    after: int
    until: int
    sequence: int


def left_behind(known: Sequence[Stretch], to_sequence: int, sequence: int) -> list[Stretch]:
    """Returns the stretches that a rewind adds, between those of `known`, which are in their order: all from where it
    goes back to up to itself."""
    added, after = list[Stretch](), to_sequence
    for stretch in known:
        if stretch.until - 1 > after:
            added.append(Stretch(after, stretch.after + 1, sequence))
            after = stretch.until - 1
    added.append(Stretch(after, sequence, sequence))
    return [stretch for stretch in added if stretch.until > stretch.after + 1]


def superseded_at(known: Sequence[Stretch], sequence: int) -> int | None:
    """Returns the rewind that left this sequence behind; None when it is in force."""
    place = bisect_left(known, (sequence,)) - 1
    return known[place].sequence if place >= 0 and known[place].until > sequence else None


def marked(message: v1.Message, rewind: int | None) -> v1.Message:
    """Returns the message, which the caller owns, as the rewind at that sequence has left it, if one has."""
    if rewind is not None:
        message.status = v1.Message.STATUS_SUPERSEDED
        message.update_sequence = rewind
    return message

"""A line of the list: how the frames of a request are made, how the call has to end, and what of it is bounded.

`make bench` measures the longest time that one callback of the server's loop takes for it. The tests count what is done
for it, because counts are the same on every machine.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import Message

KIB, MIB = 1 << 10, 1 << 20

OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT

USUAL: Mapping[str, int] = {
    "calls": 45_000,
    "bytes": MIB,
    "steps": 12_000,
    "violations": 100,
    "handovers": 6,
    "writes": 2,
    "statements": 40,
}
"""The bounds of a line that says nothing else; tests/support/work.py says what is counted."""

Frame = Message | bytes


@dataclass(frozen=True)
class Hostile:
    """One call."""

    method: str
    """`StateService/PutState`, or with its package where that is not notecase.v1."""
    frames: Callable[[], Iterable[Frame]]
    code: grpc.StatusCode = OK
    reason: str = ""
    most: Mapping[str, int] = field(default_factory=dict)
    """The bounds that differ from USUAL."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    excepted: str = ""
    """Why a callback may take longer for it than for the others; empty where it may not."""

    @property
    def path(self) -> str:
        return self.method if "." in self.method else f"notecase.v1.{self.method}"

    @property
    def bounds(self) -> Mapping[str, int]:
        """Everything that is bounded. A request that is refused for what it says writes nothing."""
        refused = {"writes": 0} if self.code == INVALID else {}
        return {**USUAL, **refused, **self.most}

    def sent(self) -> list[bytes]:
        """Its frames as they are on the wire."""
        return [made if isinstance(made, bytes) else made.SerializeToString() for made in self.frames()]


def accepted(method: str, frame: Callable[[], Frame], **most: int) -> Hostile:
    """A call of one frame that is answered."""
    return Hostile(method, lambda: [frame()], most=most)


PARSER = "Protobuf's parser cannot be interrupted, and nothing of the server's own runs before it."


def flood(method: str, frame: Callable[[], Frame], **most: int) -> Hostile:
    """A call of one frame that is INVALID_ARGUMENT, and that has so many parts that most of the time goes to reading
    it."""
    return Hostile(method, lambda: [frame()], INVALID, "INVALID_FIELD", most, excepted=PARSER)


def refused(method: str, frame: Callable[[], Frame], reason: str = "INVALID_FIELD", **most: int) -> Hostile:
    """A call of one frame that is INVALID_ARGUMENT."""
    return Hostile(method, lambda: [frame()], INVALID, reason, most)

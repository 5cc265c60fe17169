"""What no answer of the server may be, whatever it was asked."""

import re
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import grpc
from google.protobuf.message import Message
from notecase import v1

from tests.promises import ROOT
from tests.support.raw import Method, Outcome

NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DATA_LOSS}

INTERNALS = re.compile(
    r"Traceback|File \"|\bline \d+, in |site-packages|\.py\b|object at 0x|notecase_server|"
    + "|".join(re.escape(str(place)) for place in (ROOT, tempfile.gettempdir()))
    + r"|(?i:sqlite)|\b(SELECT|INSERT|UPDATE|DELETE) .*\b(FROM|INTO|SET|WHERE)\b|\b[A-Z][A-Za-z]+(Error|Exception)\b"
)
"""What the server's own language, files and tables are called."""

UNTYPED = "grpc.health.v1.Health/"
"""A probe that asks for a service that is not there is answered as its protocol says, without details."""


TRANSPORT = "SERVER: Received message larger than max"
"""What the transport says of a frame that it does not hand on."""


class Finding(NamedTuple):
    """Something that may not be."""

    what: str
    path: str
    frames: tuple[bytes, ...]
    """As they were sent."""

    def __str__(self) -> str:
        frames = " ".join(frame[:400].hex() + ("…" if len(frame) > 400 else "") for frame in self.frames[:4])
        return f"{self.path}: {self.what}\n    {frames}"


def problems(method: Method, done: Outcome) -> Iterator[str]:
    """What is wrong with how a call ended."""
    if done.code in NEVER:
        yield f"{done.code.name} {done.message!r}"
    failed = done.code is not grpc.StatusCode.OK and not done.cut and not done.message.startswith(TRANSPORT)
    if failed and not done.reason and not method.path.startswith(UNTYPED):
        yield f"{done.code.name} without a reason: {done.message!r}"
    if found := _internals(done.message):
        yield f"{found!r} in the message {done.message!r}"
    for detail in done.status.details if done.status else ():
        if found := _internals(detail.value.decode(errors="replace")):
            yield f"{found!r} in the details of {done.message!r}"
    for answer in done.answers:
        yield from _within(method.answer.FromString(answer))


def _within(answer: Message) -> Iterator[str]:
    """Failures within an answer: of a command, of a run, in an event."""
    for field, held in answer.ListFields():
        if field.name == "error_message" and (found := _internals(held)):
            yield f"{found!r} in an answer: {held!r}"
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inner in held if field.is_repeated else [held]:
            if isinstance(inner, v1.Error):
                if inner.reason in {v1.ERROR_REASON_UNSPECIFIED, v1.ERROR_REASON_INTERNAL}:
                    yield f"{v1.ErrorReason.Name(inner.reason)} in an answer: {inner.message!r}"
                if found := _internals(inner.message):
                    yield f"{found!r} in an answer: {inner.message!r}"
            else:
                yield from _within(inner)


def _internals(told: str) -> str:
    found = INTERNALS.search(told)
    return found.group() if found else ""

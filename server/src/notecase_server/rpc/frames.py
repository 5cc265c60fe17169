"""Incoming frames: their largest size, and how they are parsed without delaying other calls for longer than the parse
takes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

from google.protobuf.message import DecodeError
from grpc.aio import EOF

from notecase_server import errors
from notecase_server.errors import Violation
from notecase_server.rpc.caller import caller, frame_bytes
from notecase_server.rpc.gate import Call
from notecase_server.rpc.receiving import SHARE, Receiving
from notecase_server.store.contract import PAGE_BYTES

MAX_MESSAGE_BYTES = 4 << 20
"""The largest frame of the methods in MESSAGES. The transport takes 16 MiB, so that a frame in between is refused with
details."""

MAX_OTHER_BYTES = PAGE_BYTES + (64 << 10)
"""The largest frame of any other method: room for an agent or a state, and for the fields around it. Nothing can
interrupt the parser, which takes up to 30 ms for a MiB of the smallest messages."""

MESSAGES = frozenset(
    {
        "/notecase.v1.MessageService/AppendMessages",
        *(f"/notecase.v1.RunService/{name}" for name in ("CreateRun", "Invoke", "Run", "SendCommand")),
    }
)
"""The methods by which messages come, with content within them."""

HEALTH = "/grpc.health.v1.Health/"
"""The methods that need no credential: a probe has none."""

MAX_PROBE_BYTES = 4 << 10
"""The largest frame of those: the name of a service, which is held as long as its health is watched."""

ALONE_BYTES = 32 << 10
"""A frame from this size on is parsed in a step of the loop by itself."""

TRANSPORT_BYTES = 16 << 20

DRAIN_BYTES = 64 << 20
DRAIN_SECONDS = 0.5
"""What is still read of a stream that was refused, and for how long."""

GONE_SECONDS = 0.1
"""A call that has no message may be one whose caller has left: the end of its frames comes first, and within so many
seconds it is cancelled."""


class Decoder:
    """Parses the frames of one method."""

    def __init__(
        self, method: str, parse: Callable[[bytes], Any], judge: Callable[[Any], Awaitable[None]] | None = None
    ) -> None:
        """`method` is its path, such as /notecase.v1.RunService/Run. `judge` checks a parsed request whose caller is
        bound to a user."""
        self._judge = judge
        most = MAX_PROBE_BYTES if method.startswith(HEALTH) else MAX_OTHER_BYTES
        self._most = MAX_MESSAGE_BYTES if method in MESSAGES else most
        self._parse = parse

    async def __call__(self, frame: bytes, call: Call) -> Any:
        """Raises NotecaseError PAYLOAD_TOO_LARGE, RATE_LIMITED and INVALID_FIELD, and the errors of the check."""
        if len(frame) > self._most:
            advice = "Upload large content (UploadBlob), and refer to it."
            raise errors.too_large("The request", len(frame), self._most, advice)
        frame_bytes.set(len(frame))
        call.takes(len(frame))
        try:
            message = self._parse(frame)
        except DecodeError:
            problem = (
                "cannot be decoded as the method's message; a string may not be UTF-8, or the nesting may be too deep"
            )
            raise errors.invalid([Violation("request", problem)]) from None
        if len(frame) >= ALONE_BYTES:
            await asyncio.sleep(0)
        if self._judge is not None and caller.get().principal.user:
            await self._judge(message)
        return message


class Decoded:
    """Gives the messages of a stream as they come. A generator would also be registered with the loop, and closed."""

    __slots__ = ("_begun", "_call", "_decode", "_read")

    def __init__(self, decode: Decoder, context: Any, call: Call) -> None:
        """`context` is grpc's of the call, without a deserializer."""
        self._begun = False
        self._call = call
        self._decode = decode
        self._read = context.read

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        self._call.takes(0)
        if self._begun:
            frame = await self._read()
        else:
            self._begun = True
            frame = await self._call.receive(caller.get().principal, self._read)
        if frame is EOF:
            raise StopAsyncIteration
        return await self._decode(frame, self._call)

    async def only(self) -> Any:
        """Returns the message of a call that has one. Raises as a Decoder, and INVALID_FIELD without a message."""
        async for message in self:
            self._call.whole = True
            return message
        await asyncio.sleep(GONE_SECONDS)
        raise errors.invalid([Violation("request", "the call has no message")])


async def drain(frames: AsyncIterator[bytes], receiving: Receiving) -> None:
    """Discards further frames of a caller, up to a limit, unless that is being done for many others. Some clients lose
    the status of a call that ends while they write."""
    if receiving.draining >= SHARE:
        return
    left = DRAIN_BYTES
    receiving.draining += 1
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            async for frame in frames:
                left -= len(frame)
                if left < 0:
                    break
    except TimeoutError:
        pass
    finally:
        receiving.draining -= 1

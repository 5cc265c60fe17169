"""Bounds what the transport holds for callers: the calls that are open, and the frames that wait for a reader.

grpc keeps each frame until its connection takes it, and a connection whose other end reads nothing takes nothing. So a
call counts until grpc is done with it: its status was taken, or its connection is gone.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from notecase_server import errors
from notecase_server.limit import Limit
from notecase_server.rpc.peers import Peers

READ_AHEAD = 64 << 10
"""Bytes a connection may always leave unread. About what HTTP/2 lets each end send ahead."""

CALLS_SHARE = 2
UNREAD_SHARE = 8
"""One connection has at most a half of the calls, and an eighth of what may wait unread."""


PROBES = 100
"""Probes that one connection may have open. They need no credential, so they take no places of callers."""


class _Connection:
    __slots__ = ("calls", "probes", "unread")

    def __init__(self) -> None:
        self.calls = 0
        self.probes = 0
        self.unread = 0


class Gate:
    """Counts for one server. Used from one event loop only."""

    def __init__(self, max_calls: int, max_unread: int, peers: Peers | None = None) -> None:
        """`max_calls` of all shapes may be open at once; `max_unread` bytes of frames may wait for readers. Without
        `peers` calls come from anywhere."""
        self._peers = peers or Peers()
        self._max_calls = max_calls
        self._max_unread = max_unread
        self._connections: dict[str, _Connection] = {}
        self.calls = 0
        """Open now, without probes."""
        self.unread = 0
        """Bytes that wait for their readers now."""

    def enter(self, context: Any, *, probe: bool) -> "Call":
        """Counts a call until grpc is done with it. Raises NotecaseError UNAUTHENTICATED when its peer is not served,
        and RATE_LIMITED when there is no room for it: on its connection, or, unless it is a `probe`, on the server: one
        that is full is healthy. Probes have room of their own."""
        peer = context.peer()
        connection = self._connections.get(peer)
        if connection is None and not self._peers.serves(peer):
            raise errors.unserved_peer()
        most = max(self._max_calls // CALLS_SHARE, 1)
        if probe:
            if connection is not None and connection.probes >= PROBES:
                raise errors.too_many("probe", PROBES, " on one connection")
        elif self.calls >= self._max_calls:
            raise errors.too_many("call", self._max_calls)
        elif connection is not None and connection.calls >= most:
            raise errors.too_many("call", most, " on one connection")
        if connection is not None and connection.unread > self._share():
            raise errors.unread_answers()
        if connection is None:
            connection = self._connections[peer] = _Connection()
        self._count(connection, 1, probe)
        call = Call(self, peer, connection, probe)
        context.add_done_callback(call.left)
        return call

    def _share(self) -> int:
        """What one connection may leave unread. A connection that reads is far below it, even when the server's bound
        is reached."""
        return max(self._max_unread // UNREAD_SHARE, READ_AHEAD) if self.unread < self._max_unread else READ_AHEAD

    def _take(self, connection: _Connection, size: int) -> None:
        connection.unread += size
        self.unread += size

    def _count(self, connection: _Connection, more: int, probe: bool) -> None:
        if probe:
            connection.probes += more
        else:
            connection.calls += more
            self.calls += more

    def _leave(self, peer: str, connection: _Connection, probe: bool) -> None:
        self._count(connection, -1, probe)
        if not (connection.calls or connection.probes):
            self._connections.pop(peer, None)


class Call:
    """One open call, and what of it waits for its reader."""

    __slots__ = ("_connection", "_gate", "_peer", "_probe", "_unread")

    def __init__(self, gate: Gate, peer: str, connection: _Connection, probe: bool) -> None:
        self._gate = gate
        self._peer = peer
        self._probe = probe
        self._connection = connection
        self._unread = 0

    def has_room(self, size: int) -> bool:
        """Whether a frame of so many bytes may wait, too. A connection on which nothing waits takes any."""
        unread = self._connection.unread
        return not unread or unread + size <= self._gate._share()

    def waits(self, size: int) -> None:
        """A frame is handed to grpc."""
        self._unread += size
        self._gate._take(self._connection, size)

    def read(self, size: int) -> None:
        """Its connection has taken a frame."""
        self._unread -= size
        self._gate._take(self._connection, -size)

    def left(self, _context: Any) -> None:
        """Grpc is done with the call, and with what waited."""
        self.read(self._unread)
        self._gate._leave(self._peer, self._connection, self._probe)


async def deliver(
    responses: AsyncGenerator[Any, None], serializer: Callable[[Any], bytes], context: Any, stall: float, call: Call
) -> None:
    """Sends responses as they come. Raises NotecaseError WATCHER_TOO_SLOW when one waits `stall` seconds for room, or
    would wait where too much waits on its connection already.

    Room is what the reader's transport takes in advance, a few megabytes: a stream with less to say is never too
    slow."""
    time = asyncio.get_running_loop().time
    limit = Limit()
    try:
        async with aclosing(responses), limit:
            async for response in responses:
                frame = serializer(response)
                size = len(frame)
                if not call.has_room(size):
                    raise errors.unread_stream()
                call.waits(size)
                limit.due = time() + stall
                await context.write(frame)
                limit.due = math.inf
                call.read(size)
    except TimeoutError:
        if not limit.passed:
            raise
        raise errors.watcher_too_slow(stall) from None

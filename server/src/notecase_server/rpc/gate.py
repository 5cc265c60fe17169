"""Limits what is held for callers: the open calls, the frames that wait for a reader, and the requests under way.

grpc keeps each frame until its connection takes it, and a connection whose client reads nothing takes nothing. So a
call counts until grpc is done with it: its status was taken, or its connection is gone. A large request may wait for
its turn, and counts until its call ends or, in a stream, until the next one is read.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from inspect import isasyncgen
from typing import Any

import grpc

from notecase_server import errors
from notecase_server.auth.principal import Principal
from notecase_server.rpc.peers import Peers
from notecase_server.rpc.receiving import PATIENCE, Receiving

READ_AHEAD = 64 << 10
"""Bytes a connection may always leave unread. About what HTTP/2 lets each end send ahead."""

SMALL_BYTES = 64 << 10
"""A request of at most so many bytes is taken whatever is under way; the limit on calls limits those."""

CALLS_SHARE = 2
REQUESTS_SHARE = 2
UNREAD_SHARE = 8
"""One connection has at most a half of the calls, a half of the bytes of requests, and an eighth of the unread
bytes."""


PROBES = 100
"""Probes that one connection may have open. They need no credential, so they take no places of callers."""


class _Connection:
    __slots__ = ("calls", "probes", "requested", "unread")

    def __init__(self) -> None:
        self.calls = 0
        self.probes = 0
        self.requested = 0
        self.unread = 0


class Gate:
    """Counts for one server. Used from one event loop only."""

    def __init__(self, max_calls: int, max_unread: int, max_requested: int, peers: Peers | None = None) -> None:
        """`max_calls` of all shapes may be open at once; `max_unread` bytes of frames may wait for readers, and
        `max_requested` bytes of requests may be under way. Without `peers` calls come from anywhere."""
        self._peers = peers or Peers()
        self._max_calls = max_calls
        self._most = max(max_calls // CALLS_SHARE, 1)
        self._max_unread = max_unread
        self._max_requested = max_requested
        self._connections: dict[str, _Connection] = {}
        self.receiving = Receiving()
        self.calls = 0
        """Open now, without probes."""
        self.unread = 0
        """Bytes that wait for their readers now."""
        self.requested = 0
        """Bytes of requests that are under way now."""

    def enter(self, context: Any, *, probe: bool) -> "Call":
        """Counts a call until grpc is done with it. Raises NotecaseError UNAUTHENTICATED when its peer is not served,
        and RATE_LIMITED when its connection or the server has too many calls. A `probe` has a separate limit, since a
        server that is full is healthy."""
        peer = context.peer()
        connection = self._connections.get(peer)
        if connection is None and not self._peers.serves(peer):
            raise errors.unserved_peer()
        if probe:
            if connection is not None and connection.probes >= PROBES:
                raise errors.too_many("probe", PROBES, " on one connection")
        elif self.calls >= self._max_calls:
            raise errors.too_many("call", self._max_calls)
        elif connection is not None and connection.calls >= self._most:
            raise errors.too_many("call", self._most, " on one connection")
        if connection is not None and connection.unread > self._share():
            raise errors.unread_answers()
        if connection is None:
            connection = self._connections[peer] = _Connection()
        call = Call(self, peer, connection, probe)
        context.add_done_callback(call.left)
        return call

    def require_room(self, connection: _Connection, size: int, held: int) -> None:
        """Raises NotecaseError RATE_LIMITED when a request of so many bytes would be too much on its connection or the
        server, without the `held` ones that it takes the place of. One of any size is taken where no other is."""
        most = self._max_requested
        own, all_ = connection.requested - held, self.requested - held
        if own and own + size > most // REQUESTS_SHARE:
            raise errors.too_much_requested(most // REQUESTS_SHARE, " on one connection")
        if all_ and all_ + size > most:
            raise errors.too_much_requested(most)

    def _share(self) -> int:
        """What one connection may leave unread. A connection that reads is far below it, even when the server's bound
        is reached."""
        return max(self._max_unread // UNREAD_SHARE, READ_AHEAD) if self.unread < self._max_unread else READ_AHEAD


class Call:
    """One open call, and what of it waits for its reader."""

    __slots__ = ("_connection", "_gate", "_peer", "_probe", "_unread", "due", "requested", "whole")

    def __init__(self, gate: Gate, peer: str, connection: _Connection, probe: bool) -> None:
        self.due = math.inf
        """The loop's time at which a frame has waited for its reader for too long, or the request of a probe has been
        received for too long; infinite while neither is so."""
        self._gate = gate
        self._peer = peer
        self._probe = probe
        self._connection = connection
        self._unread = 0
        self.requested = 0
        """Bytes of the request that is under way, of the newest one in a stream."""
        self.whole = False
        """Nothing more of its request is to come."""
        self._count(1)

    def _count(self, more: int) -> None:
        if self._probe:
            self._connection.probes += more
        else:
            self._connection.calls += more
            self._gate.calls += more

    def takes(self, size: int) -> None:
        """Counts a request of so many bytes in place of the one before, 0 for none. Raises NotecaseError RATE_LIMITED
        when a large one is too much."""
        if size > SMALL_BYTES:
            self._gate.require_room(self._connection, size, self.requested)
        more = size - self.requested
        self.requested = size
        self._connection.requested += more
        self._gate.requested += more

    async def receive(self, principal: Principal, read: Callable[[], Awaitable[Any]]) -> Any:
        """Reads the first request of a call in its turn; a probe's at once, but not for longer than PATIENCE."""
        if self._probe:
            self.due = asyncio.get_running_loop().time() + PATIENCE
            try:
                return await read()
            finally:
                self.due = math.inf
        turn = await self._gate.receiving.turn(principal, self._peer)
        try:
            return await read()
        finally:
            turn.end()

    def overdue(self, stall: float) -> errors.NotecaseError:
        """Returns the error with which a call ends at `due`; `stall` is how long a frame may wait for its reader."""
        if self._probe and not self.whole:
            return errors.invalid([errors.Violation("request", f"was not complete within {PATIENCE:g} seconds")])
        return errors.watcher_too_slow(stall)

    def has_room(self, size: int) -> bool:
        """Whether a frame of so many bytes may wait, too. A connection on which nothing waits takes any."""
        unread = self._connection.unread
        return not unread or unread + size <= self._gate._share()

    def waits(self, size: int) -> None:
        """A frame is handed to grpc."""
        self._unread += size
        self._connection.unread += size
        self._gate.unread += size

    def read(self, size: int) -> None:
        """Its connection has taken a frame."""
        self._unread -= size
        self._connection.unread -= size
        self._gate.unread -= size

    def left(self, _context: Any) -> None:
        """Grpc is done with the call, and with what waited."""
        connection = self._connection
        self.takes(0)
        connection.unread -= self._unread
        self._gate.unread -= self._unread
        self._count(-1)
        if not (connection.calls or connection.probes):
            self._gate._connections.pop(self._peer, None)


class Outlet:
    """What the handler of a stream writes its responses to, as to grpc's context."""

    __slots__ = ("_call", "_serializer", "_stall", "_time", "_write")

    def __init__(self, call: Call, serializer: Callable[[Any], bytes], context: Any, stall: float) -> None:
        self._call = call
        self._serializer = serializer
        self._write = context.write
        self._stall = stall
        self._time = asyncio.get_running_loop().time

    async def write(self, response: Any) -> None:
        """Sends a response, and returns once the transport has room for it; `Call.due` is the time by which it must.
        Raises NotecaseError WATCHER_TOO_SLOW when it would have to wait and too much waits on its connection already.

        The transport takes a few megabytes in advance, so a stream with less to send is never too slow."""
        frame, call = self._serializer(response), self._call
        size = len(frame)
        if not call.has_room(size):
            raise errors.unread_stream()
        call.waits(size)
        call.due = self._time() + self._stall
        try:
            await self._write(frame)
        except grpc.aio.InternalError:  # the caller is gone, and grpc is about to cancel the call
            raise asyncio.CancelledError from None
        finally:
            call.due = math.inf
        call.read(size)

    def sent(self, answers: Any) -> Awaitable[None]:
        """Sends the values of a handler. A handler that is not a generator writes by itself."""
        responses: Any = answers
        sending: Awaitable[None] = self._deliver(responses) if isasyncgen(answers) else responses
        return sending

    async def _deliver(self, responses: AsyncGenerator[Any, None]) -> None:
        async with aclosing(responses):
            async for response in responses:
                await self.write(response)

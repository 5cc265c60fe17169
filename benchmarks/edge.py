"""Callers that speak HTTP/2 badly on purpose, at most 200 frames or connections a second.

`python -m benchmarks.edge NAME PORT` attacks a server of this machine until it is terminated. What a connection has
left to say when the server closes it is said on another.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import ssl
import struct
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import uvloop
from notecase import v1

from benchmarks.load import Load
from tests.support.http2 import (
    ACK,
    ACKNOWLEDGED,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    OPENING,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WIDE,
    WINDOW_UPDATE,
    frame,
    header_block,
    message,
    setting,
)

RATE = 200
"""Frames and connections a second, together."""

SESSION = "sessions/long"
"""What is asked for where much is asked for; see `prepare`."""

LIST_MESSAGES = "/notecase.v1.MessageService/ListMessages"
GET_INFO = "/notecase.v1.ServerService/GetServerInfo"

LONG = 8
"""Messages of it, of 120 KB each."""

CALLS = 40
"""On a connection of a slow reader: more than it may leave unread, where each is answered with a mebibyte."""

LARGE = 16 << 10
"""Bytes of a frame that every server takes."""

CANCEL = struct.pack(">I", 8)


class Attack(NamedTuple):
    described: str
    opening: bytes = OPENING
    """What is written first on each connection."""
    frames: Callable[[], Iterator[bytes]] = lambda: iter(())
    """What follows, one at a time; after the last another connection is opened, and this one stays."""
    answers: bool = True
    """Whether the server's settings are acknowledged."""


def _streams() -> Iterator[int]:
    return itertools.count(1, 2)


def _call(stream: int, method: str, request: bytes) -> tuple[bytes, bytes]:
    headers = frame(HEADERS, END_HEADERS, stream, header_block(method))
    return headers, frame(DATA, END_STREAM, stream, message(request))


def _much() -> Iterator[bytes]:
    request = v1.ListMessagesRequest(parent=SESSION, page_size=1000).SerializeToString()
    for stream in itertools.islice(_streams(), CALLS):
        yield from _call(stream, LIST_MESSAGES, request)


def _continued(payload: bytes) -> Callable[[], Iterator[bytes]]:
    """Headers that never end, so much at a time. As HPACK, each run of "a" is a date after the other."""
    begun = frame(HEADERS, 0, 1, header_block(GET_INFO))
    return lambda: itertools.chain([begun], itertools.repeat(frame(CONTINUATION, 0, 1, payload)))


def _halves() -> Iterator[bytes]:
    """Messages of which the end never comes."""
    for stream in _streams():
        headers, whole = _call(stream, LIST_MESSAGES, bytes(1 << 20))
        yield headers
        yield frame(DATA, 0, stream, whole[9 : 9 + LARGE])


def _reset() -> Iterator[bytes]:
    for stream in _streams():
        yield frame(HEADERS, END_HEADERS, stream, header_block(GET_INFO))
        yield frame(RST_STREAM, 0, stream, CANCEL)


def _cancelled() -> Iterator[bytes]:
    for stream in _streams():
        yield from _call(stream, GET_INFO, b"")
        yield frame(RST_STREAM, 0, stream, CANCEL)


def _unknown() -> Iterator[bytes]:
    block = header_block("/notecase.v1.SessionService/Missing")
    return (frame(HEADERS, END_HEADERS | END_STREAM, stream, block) for stream in _streams())


def _repeated(sent: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: itertools.repeat(sent)


def _hello() -> bytes:
    """What a client says first that takes the port for one with TLS."""
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    return sent.read()


SMALL = setting(INITIAL_WINDOW_SIZE, 65_535)
CLOSED = PREFACE + frame(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 0)) + WIDE

ATTACKS: dict[str, Attack] = {
    "idle": Attack("connections that say nothing", b"", answers=False),
    "half-open": Attack("connections that say nothing after the preface", answers=False),
    "slow-readers": Attack("pages of a mebibyte, with a window of 0", CLOSED, _much),
    "slow-writers": Attack("headers that come a byte at a time", frames=_continued(b"a")),
    "halves": Attack("calls whose message is begun and not ended, 16 KiB of it", frames=_halves),
    "headers": Attack("headers without an end, 16 KiB at a time", frames=_continued(b"a" * LARGE)),
    "resets": Attack("streams that are opened and reset", frames=_reset),
    "pings": Attack("PING", frames=_repeated(frame(PING, 0, 0, b"notecase"))),
    "settings": Attack("SETTINGS", frames=_repeated(frame(SETTINGS, 0, 0, SMALL))),
    "acks": Attack("acknowledgements of nothing", frames=_repeated(frame(SETTINGS, ACK, 0))),
    "windows": Attack("WINDOW_UPDATE", frames=_repeated(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)))),
    "garbage": Attack("connections with a kilobyte of noise", os.urandom(1 << 10)),
    "tls": Attack("connections that begin with TLS", _hello()),
    "unknown": Attack("calls of a method that does not exist", frames=_unknown),
    "cancelled": Attack("calls that are cancelled at once", frames=_cancelled),
}


async def prepare(load: Load) -> None:
    """Makes the session that is asked for."""
    await load.sessions.CreateSession(v1.CreateSessionRequest(session_id=SESSION.removeprefix("sessions/")))
    said = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text="a" * 120_000)])
    await load.messages.AppendMessages(v1.AppendMessagesRequest(parent=SESSION, messages=[said] * LONG))


class _Attacker:
    """Goes through an attack, and counts."""

    def __init__(self, attack: Attack, port: int) -> None:
        self._attack = attack
        self._port = port
        self.opened = self.closed = self.sent = 0
        """Connections, those of them that the server closed, and frames."""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        connection: _Connection | None = None
        frames: Iterator[bytes] = iter(())
        for number in itertools.count():
            await asyncio.sleep(begun + number / RATE - loop.time())
            sent = None if connection is None or connection.closed else next(frames, None)
            if connection is not None and sent is not None:
                connection.transport.write(sent)
                self.sent += 1
                continue
            with contextlib.suppress(OSError):
                _, connection = await loop.create_connection(self._connection, "127.0.0.1", self._port)
                connection.transport.write(self._attack.opening)
                frames = self._attack.frames()
                self.opened += 1

    def _connection(self) -> "_Connection":
        return _Connection(self, self._attack.answers)


class _Connection(asyncio.Protocol):
    """A connection on which what comes is thrown away."""

    def __init__(self, attacker: _Attacker, answers: bool) -> None:
        self._attacker = attacker
        self._answers = answers
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answers:
            self.transport.write(ACKNOWLEDGED)
            self._answers = False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._attacker.closed += 1


async def _serve(name: str, port: int) -> None:
    attacker = _Attacker(ATTACKS[name], port)
    sys.stdout.write(f"attacking port {port}\n")
    sys.stdout.flush()
    task = asyncio.create_task(attacker.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    sys.stdout.write(f"{attacker.opened} connections, {attacker.closed} of them closed, {attacker.sent} frames\n")


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], int(sys.argv[2])))

"""As much HTTP/2 as a call needs: frames as bytes, and a client that reads only on request."""

import asyncio
import struct
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
ACK, END_STREAM, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
"""A setting: how many bytes the other end may send on a stream before it gets more window."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame; a `payload` above 16 KiB is more than a server takes without being asked."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def setting(identifier: int, value: int) -> bytes:
    """One entry of a SETTINGS frame."""
    return struct.pack(">HI", identifier, value)


def header_block(method: str, **more: bytes) -> bytes:
    """The headers of a call of that path, uncompressed; `more` are further ones."""
    fields = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x"}
    fields |= {"content-type": "application/grpc", "te": "trailers"}
    whole = {name: value.encode() for name, value in fields.items()} | more
    return b"".join(b"\0" + _string(name.encode()) + _string(value) for name, value in whole.items())


def message(request: bytes) -> bytes:
    """One message as gRPC sends it."""
    return b"\0" + struct.pack(">I", len(request)) + request


OPENING = PREFACE + frame(SETTINGS, 0, 0)
ACKNOWLEDGED = frame(SETTINGS, ACK, 0)
"""Answers the server's own settings."""
WIDE = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 30))
"""Opens the connection's own window, so that each stream has what one stream may send ahead."""


class Deaf:
    """One connection. Whatever is called on it, nothing of the answers is read, and no stream's window is opened."""

    def __init__(self, address: str, window: int = 65535) -> None:
        """`window` is how many bytes the server may send on each stream."""
        self._window = window
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._stream = 1

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        self._writer.write(PREFACE + frame(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, self._window)) + WIDE)
        size = int.from_bytes((await self._reader.readexactly(9))[:3], "big")
        await self._reader.readexactly(size)
        self._writer.write(ACKNOWLEDGED)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.transport.abort()

    async def call(self, method: str, request: bytes, times: int = 1) -> None:
        """Sends calls of a method whose request is one message."""
        block = header_block(method)
        for _ in range(times):
            self._writer.write(frame(HEADERS, END_HEADERS, self._stream, block))
            self._writer.write(frame(DATA, END_STREAM, self._stream, message(request)))
            self._stream += 2
        await self._writer.drain()

    async def windows(self) -> dict[int, int]:
        """Reads what the server has sent, and returns how many more bytes each stream may send, by its number."""
        self._writer.write(frame(PING, 0, 0, bytes(8)))
        opened: dict[int, int] = {}
        while True:
            head = await self._reader.readexactly(9)
            kind, stream = head[3], int.from_bytes(head[5:], "big")
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            if kind == WINDOW_UPDATE:
                opened[stream] = opened.get(stream, 0) + int.from_bytes(payload, "big")
            if kind == PING and head[4] & ACK:
                return opened

    async def begin(self, method: str, beginning: bytes) -> None:
        """Sends a call whose request has a mebibyte, and only the beginning of that."""
        self._writer.write(frame(HEADERS, END_HEADERS, self._stream, header_block(method)))
        self._writer.write(frame(DATA, 0, self._stream, message(bytes(1 << 20))[:5] + beginning))
        self._stream += 2
        await self._writer.drain()


def _string(text: bytes) -> bytes:
    assert len(text) < 127  # longer ones take more than a byte for their length
    return bytes([len(text)]) + text


async def trailers(address: str, headers: bytes, request: bytes = b"") -> bytes:
    """Makes a call with these headers over a connection of its own, and returns the last headers of the answer as they
    came. Raises OSError and EOFError when the connection ends before."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(OPENING + ACKNOWLEDGED + WIDE + frame(HEADERS, END_HEADERS, 1, headers))
    writer.write(frame(DATA, END_STREAM, 1, message(request)))
    while True:
        head = await reader.readexactly(9)
        payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] == HEADERS and head[4] & END_STREAM:
            writer.transport.abort()
            return payload

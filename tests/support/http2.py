"""A client that speaks as much HTTP/2 as it takes to call, and reads only when it is told to."""

import asyncio
import struct
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
ACKNOWLEDGED = b"\0\0\0\4\1\0\0\0\0"
"""Of the server's own settings, which are all that is read."""
WIDE = b"\0\0\4\x08\0\0\0\0\0\x40\0\0\0"
"""Opens the connection's own window, so that each stream has what one stream may send ahead."""
HEADERS, DATA, END_HEADERS, END_STREAM = 1, 0, 4, 1


class Deaf:
    """One connection. Whatever is called on it, nothing of the answers is read, and no stream's window is opened."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._stream = 1

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        self._writer.write(PREFACE + SETTINGS + WIDE)
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
        fields = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x"}
        fields |= {"content-type": "application/grpc", "te": "trailers"}
        block = b"".join(b"\0" + _string(name) + _string(value) for name, value in fields.items())
        message = b"\0" + struct.pack(">I", len(request)) + request
        for _ in range(times):
            frames = _frame(HEADERS, END_HEADERS, self._stream, block) + _frame(DATA, END_STREAM, self._stream, message)
            self._writer.write(frames)
            self._stream += 2
        await self._writer.drain()


def _string(text: str) -> bytes:
    assert len(text) < 127  # longer ones take more than a byte for their length
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

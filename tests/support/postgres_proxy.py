"""A proxy between a store and PostgreSQL that reads what passes: it counts round trips, and cuts connections.

async with PostgresProxy(url) as proxy:
    store = await PostgresStore.open(proxy.url, clock)
    before = proxy.trips
"""

import asyncio
import ssl
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

ASKS = {"Q": "query", "S": "sync", "H": "flush"}
"""The messages of a client that ask the server to answer now: each is a round trip."""


SSL_REQUEST = struct.pack("!i", 80877103)
"""The body of a client's question whether the server speaks TLS."""


class PostgresProxy:
    """Listens on a separate socket, and passes data on between clients and the server of `url`. With `tls` it
    listens on 127.0.0.1 instead, and speaks TLS with clients that ask for it."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        self._tls = tls
        self.trips = 0
        """Messages of ASKS that clients have sent."""
        self.asked: Callable[[str, bytes], asyncio.Event | None] = lambda kind, body: None
        """Is called with each message of a client, its kind and its body, before it is passed on. Where it returns an
        event, the client's connection is cut, and the message is still passed on when the event is set."""
        self.stalls: Callable[[str, bytes], asyncio.Event | None] = lambda kind, body: None
        """Is called likewise. Where it returns an event, the connection stays, and this message and those behind it are
        passed on once the event is set."""
        self.ended = asyncio.Event()
        """Set when a connection has come to its end at the server, too."""
        self._upstream = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"
        self._folder = tempfile.TemporaryDirectory(prefix="notecase-proxy-")
        self.url = f"postgresql://postgres@{parts.path}?host={self._folder.name}"
        self.address = ""
        """HOST:PORT, with `tls`."""
        self._texts: dict[bytes, bytes] = {}
        """Of statements, by their names, which no two connections of a process share."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def executed(self, kind: str, body: bytes) -> bytes:
        """Returns the text of the statement that a client's message of kind B is about to execute; empty for others."""
        return self._texts.get(body.split(b"\0", 2)[1], b"") if kind == "B" else b""

    async def __aenter__(self) -> Self:
        if self._tls is not None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            host, port = self._server.sockets[0].getsockname()
            self.address = f"{host}:{port}"
        else:
            self._server = await asyncio.start_unix_server(self._serve, Path(self._folder.name, ".s.PGSQL.5432"))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._folder.cleanup()

    def cut(self) -> None:
        """Closes every connection; what is on its way is lost."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        self._writers |= {writer, up_writer}
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._read_client(reader, writer, up_writer))
                both.create_task(self._pass_on(up_reader, writer))
        finally:
            self._writers -= {writer, up_writer}
            up_writer.transport.abort()
            self.ended.set()

    async def _read_client(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, writer: asyncio.StreamWriter
    ) -> None:
        startup = True
        try:
            while True:
                # The first message has no kind.
                kind = "" if startup else (await reader.readexactly(1)).decode()
                length = await reader.readexactly(4)
                body = await reader.readexactly(struct.unpack("!i", length)[0] - 4)
                offers = startup and body[:4] == SSL_REQUEST
                if offers and self._tls is not None:
                    client.write(b"S")
                    try:
                        await client.start_tls(self._tls)
                    except OSError:
                        raise ConnectionResetError from None
                    continue
                startup = offers  # which the server declines
                self.trips += kind in ASKS
                if kind == "P":
                    name, text, _ = body.split(b"\0", 2)
                    self._texts[name] = text
                stalled = self.stalls(kind, body)
                if stalled is not None:
                    await stalled.wait()
                late = self.asked(kind, body)
                if late is not None:
                    client.transport.abort()
                    await late.wait()
                writer.write(kind.encode() + length + self._passed(kind, body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.write_eof()  # what was sent arrives

    def _passed(self, kind: str, body: bytes) -> bytes:
        """What the server gets of a client's message: as many bytes."""
        return body

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if not writer.is_closing():
                    writer.write(data)
        writer.transport.abort()

"""A proxy between a store and PostgreSQL that reads what passes: it counts round trips, and cuts connections.

async with PostgresProxy(url) as proxy:
    store = await PostgresStore.open(proxy.url, clock)
    before = proxy.trips
"""

import asyncio
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

ASKS = {"Q": "query", "S": "sync", "H": "flush"}
"""The messages of a client that ask the server to answer now: each is a round trip."""


class PostgresProxy:
    """Listens on a socket of its own, and passes on what comes between clients and the server of `url`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.trips = 0
        """Messages of ASKS that clients have sent."""
        self.asked: Callable[[str, bytes], asyncio.Event | None] = lambda kind, body: None
        """Is called with each message of a client, its kind and its body, before it is passed on. Where it returns an
        event, the client's connection is cut, and the message is passed on all the same once the event is set."""
        self.ended = asyncio.Event()
        """Set when a connection has come to its end at the server, too."""
        self._upstream = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"
        self._folder = tempfile.TemporaryDirectory(prefix="notecase-proxy-")
        self.url = f"postgresql://postgres@{parts.path}?host={self._folder.name}"
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
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
                startup = startup and body[:4] == struct.pack("!i", 80877103)  # an offer of TLS, which is declined
                self.trips += kind in ASKS
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

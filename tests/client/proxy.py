"""A hop on the way to a server, whose connections a test cuts when it likes."""

import asyncio
from contextlib import suppress
from typing import Self


class Proxy:
    """Forwards TCP connections to `address`, each with both its directions, while its context is entered."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.opened = 0
        """Connections so far."""
        self.told = 0
        """Bytes from the server so far."""
        self.sent = 0
        """Bytes to the server so far."""
        self.away = False
        """New connections are reset."""
        self.deaf = False
        """What the server says is lost, from here on and on open connections too."""
        self.passes = asyncio.Event()
        """While it is not set, what the server says is held back."""
        self.passes.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks)

    @property
    def address(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Resets every connection at once, and loses what was on its way."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        if self.away:
            writer.transport.abort()
            return
        try:
            there = await asyncio.open_connection(self._host, self._port)
        except OSError:  # the server is unavailable, and so is this proxy
            writer.transport.abort()
            return
        self._writers |= {writer, there[1]}
        for source, sink, answer in ((reader, there[1], False), (there[0], writer, True)):
            task = asyncio.create_task(self._pump(source, sink, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answer: bool) -> None:
        with suppress(ConnectionError):  # cut, by the test or by either end
            while data := await source.read(1 << 16):
                self.told += len(data) if answer else 0
                self.sent += 0 if answer else len(data)
                if answer:
                    await self.passes.wait()
                if not (answer and self.deaf):
                    sink.write(data)
                    await sink.drain()
        sink.transport.abort()

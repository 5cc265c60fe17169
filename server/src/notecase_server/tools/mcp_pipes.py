"""An MCP server that is a program and speaks on its pipes, one message a line.

The protocol's library has such a transport, but it reads lines of any length. And it forks under uvloop: gRPC's
handlers for forks crash in the new process while the server has calls. subprocess uses vfork, which runs no handlers.
"""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self, TextIO

import anyio
import structlog
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp import types
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage

from notecase_server.supervisor import Tasks
from notecase_server.tools.mcp_answers import MAX_ANSWER, Asked, fits, messages_of
from notecase_server.tools.mcp_settings import McpServerSettings

log = structlog.get_logger()

FLUSH_SECONDS = 0.5
"""How long the program may take to read what was already written to it, before its input is closed."""

EXIT_SECONDS = 2.0
"""How long a program may take to end by itself once its input is closed; and once more after SIGTERM."""

LOOK_SECONDS = 0.01
"""How often it is checked whether a program has ended: the end of its pipes does not tell, because its children may
hold them open."""

ANSWERS = (types.JSONRPCResponse, types.JSONRPCError)

CLOSED = (anyio.ClosedResourceError, anyio.BrokenResourceError, OSError)
"""What is raised where the other side of a stream or a pipe has gone."""


@dataclass
class _Program:
    """A program that was started. `output` and `input` are what it writes and reads."""

    process: subprocess.Popen[bytes]
    output: asyncio.StreamReader
    input: asyncio.StreamWriter
    _unused: asyncio.StreamWriter

    @classmethod
    async def start(cls, settings: McpServerSettings, errors: TextIO) -> Self:
        """Starts it. Raises OSError when that is not possible."""
        # Sockets, as libuv gives to programs: a transport over a file closes its descriptor twice under uvloop.
        (ours_in, its_in), (ours_out, its_out) = socket.socketpair(), socket.socketpair()
        with its_in, its_out:
            try:
                process = subprocess.Popen(  # noqa: ASYNC220  (it returns once the program is executed)
                    [settings.command or "", *settings.args],
                    env=get_default_environment() | dict(settings.env or {}),
                    cwd=settings.cwd,
                    stdin=its_in.fileno(),
                    stdout=its_out.fileno(),
                    stderr=errors,
                    start_new_session=True,
                )
            except BaseException:
                ours_in.close()
                ours_out.close()
                raise
        _, into = await asyncio.open_unix_connection(sock=ours_in)
        output, unused = await asyncio.open_unix_connection(sock=ours_out, limit=MAX_ANSWER)
        return cls(process, output, into, unused)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the program and its children, as far as they are there and it may."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    async def ended(self) -> bool:
        """Whether the program ends within EXIT_SECONDS."""
        with anyio.move_on_after(EXIT_SECONDS):
            while self.process.poll() is None:  # noqa: ASYNC110  (see LOOK_SECONDS)
                await anyio.sleep(LOOK_SECONDS)
        return self.process.poll() is not None  # it may have ended while this process had no turn

    async def end(self) -> int | None:
        """Closes the program's input, and ends it with its children when it does not end by itself: then returns None,
        otherwise its exit code."""
        self.input.close()
        code = self.process.returncode if await self.ended() else None
        if code is None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                self.signal(number)
                await self.ended()
        # A child that is left may hold the other side of both, and read nothing more.
        self.input.transport.abort()
        self._unused.close()
        return code


@asynccontextmanager
async def program(
    name: str, settings: McpServerSettings, errors: TextIO, exited: Callable[[int], None]
) -> AsyncGenerator[tuple[Any, Any], None]:
    """Starts a server's program, and ends it with the block, with its children if necessary. Yields the streams of its
    output and its input, as mcp.Client expects them. A line that is not an answer of an accepted size ends the program.
    Calls `exited` with the exit code of a program that ended by itself. Raises OSError when it cannot be started."""
    with anyio.CancelScope(shield=True):  # otherwise a caller who leaves meanwhile would leave the program behind
        started = await _Program.start(settings, errors)
    said, hears = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    tells, asks = anyio.create_memory_object_stream[SessionMessage](0)
    pipes = Tasks(f"mcp {name}")
    asked = Asked()
    pipes.start(_read(name, started, said, asked), "read")
    writing = pipes.start(_write(started.input, asks, said, asked), "write")
    try:
        yield hears, tells
    finally:
        with anyio.CancelScope(shield=True):
            hears.close()
            tells.close()
            await asyncio.wait([writing], timeout=FLUSH_SECONDS)
            if (code := await started.end()) is not None:
                exited(code)
            await pipes.close()


async def _read(
    name: str,
    started: _Program,
    said: MemoryObjectSendStream[SessionMessage | Exception],
    asked: Asked,
) -> None:
    """Passes on the program's output, and removes the ids of its answers from `asked`. Output that nobody reads any
    more is dropped, because a program that waits for a full pipe would never end."""
    with suppress(*CLOSED):
        async with said:
            while line := await _line(started.output):
                for message in messages_of(line, asked):
                    if isinstance(message, SessionMessage) and isinstance(message.message, ANSWERS):
                        asked.discard(message.message.id)
                    await said.send(message)
            if line is None:
                log.warning("mcp_answer_too_large", server=name)
                started.signal(signal.SIGKILL)
    with suppress(OSError):
        while await started.output.read(1 << 16):
            pass


async def _line(pipe: asyncio.StreamReader) -> bytes | None:
    """The next line, empty at the end; None for one that is too large."""
    try:
        line = await pipe.readline()
    except ValueError:
        return None
    return line if fits(len(line), line.count(b"{")) else None


async def _write(
    pipe: asyncio.StreamWriter,
    told: MemoryObjectReceiveStream[SessionMessage],
    said: MemoryObjectSendStream[SessionMessage | Exception],
    asked: Asked,
) -> None:
    """Writes the messages to the program, and adds the ids of requests to `asked`. When the program has closed its
    input, its output is not read any more either."""
    try:
        async with told:
            async for message in told:
                if isinstance(message.message, types.JSONRPCRequest):
                    asked.add(message.message.id)
                elif isinstance(message.message, types.JSONRPCNotification):
                    asked.discard((message.message.params or {}).get("requestId", 0))
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                pipe.write(f"{text}\n".encode())
                await pipe.drain()
    except CLOSED:
        await said.aclose()

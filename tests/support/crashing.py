"""A server that kills itself at a chosen commit, with tools whose effects are counted outside it.

`main` with `--store sqlite:PATH --before 3` is `notecase serve` with these tools, and kills itself right before a run's
third commit; with `--after 3`, when it is durable and not yet announced. With `--deletions 3` that is the third
transaction of a deletion, counted from the one that begins it, and each removes two rows; with `--copies 3` the third
of a fork or an import, each of which writes `--copy-rows` rows. Without any of these it keeps running. The process
sends itself SIGKILL: nothing is flushed, closed or announced.
"""

import argparse
import asyncio
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, Self
from unittest import mock

from notecase_server import serve, serve_stores
from notecase_server.config import Settings, configure_logging, providers_from_environment
from notecase_server.store import copies, steps
from notecase_server.store.contract import Clock, Commit, Committed, Store
from notecase_server.tools.functions import CallContext, tool
from notecase_server.tools.mcp_settings import read_mcp_servers

from tests.support.copying import Made, transactions
from tests.support.server import Spawned

TOOLS = __name__
EFFECTS = "CRASHING_EFFECTS"
"""The variable that names the file of effects: a line each, of the idempotency key and the attempt."""
GATE = "CRASHING_GATE"
"""The variable that holds the port of a Gate."""


async def _announce(context: CallContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(os.environ[GATE]))
    writer.write(f"{context.call_id} {context.attempt}\n".encode())
    return reader, writer


def _take_effect(context: CallContext) -> None:
    with Path(os.environ[EFFECTS]).open("a") as effects:
        effects.write(f"{context.idempotency_key} {context.attempt}\n")


@tool
async def act(context: CallContext) -> str:
    """Takes effect and is done; the count of effects in the state commits with its result."""
    _take_effect(context)
    context.increment("acted")
    return f"acted at attempt {context.attempt}"


@tool
async def linger(context: CallContext) -> str:
    """Takes effect, then waits at the gate."""
    _take_effect(context)
    reader, writer = await _announce(context)
    try:
        await reader.read()
    finally:
        writer.close()
    return f"lingered at attempt {context.attempt}"


@tool
async def cling(context: CallContext) -> str:
    """Comes to the gate, and does not stop when it is asked to, not even on its way there."""
    arrival = asyncio.ensure_future(_announce(context))
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.shield(arrival)
            await asyncio.Event().wait()


@tool
async def hang(context: CallContext) -> str:
    """Comes to the gate, and keeps a thread of the process's own pool."""
    await _announce(context)
    await asyncio.to_thread(threading.Event().wait)
    return ""


@tool
async def stray(awaited: bool) -> str:
    """Makes a task and a callback that would end the process, and waits for the task, or does not."""

    async def leave(error: BaseException) -> None:
        raise error

    def interrupt() -> None:
        raise KeyboardInterrupt

    asyncio.get_running_loop().call_soon(interrupt)
    made = asyncio.create_task(leave(SystemExit(3)))
    if awaited:
        await made
    await asyncio.wait([made, asyncio.create_task(leave(KeyboardInterrupt()))])
    return "stayed"


def effects_of(path: Path) -> Counter[str]:
    """How often each idempotency key took effect. Fails when an attempt did so twice."""
    lines = path.read_text().splitlines() if path.exists() else []
    assert len(lines) == len(set(lines)), "each attempt takes effect once"
    return Counter(line.split()[0] for line in lines)


class Gate:
    """Where tools wait, in another process perhaps, until the test lets them through."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self._opened = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._opened.set()
        self._server.close()

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def arrival(self) -> tuple[str, int]:
        """Waits for the next tool that comes: the call's id and the attempt."""
        return await self._waiting.get()

    def open(self) -> None:
        """Lets through those that wait and all that come."""
        self._opened.set()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call_id, attempt = (await reader.readline()).decode().split()
        await self._waiting.put((call_id, int(attempt)))
        gone = asyncio.create_task(reader.read())
        opened = asyncio.create_task(self._opened.wait())
        await asyncio.wait([gone, opened], return_when=asyncio.FIRST_COMPLETED)
        for waiting in (gone, opened):
            waiting.cancel()
        writer.transport.abort() if gone.done() else writer.close()


class Mortal:
    """A store that dies with its process at the chosen commit of a run; with None for both it never does."""

    def __init__(self, store: Store, before: int | None, after: int | None) -> None:
        self._store = store
        self._before = before
        self._after = after
        self._made = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, commit: Commit) -> Committed:
        if not any(event.run for event in commit.events):
            return await self._store.commit(commit)
        if self._made + 1 == self._before:
            os.kill(os.getpid(), signal.SIGKILL)
        committed = await self._store.commit(commit)
        self._made += 1
        if self._made == self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        return committed


BEGINS = (steps.delete_session, steps.expire_session)
GOES_ON = (steps.sweep_sessions, steps.erase_state)


def _die_deleting(store: Any, after: int) -> None:
    """Lets the process die when so many transactions of a deletion are durable."""
    write, made = store._write, 0
    steps.SWEEP_ROWS = 2

    async def counted(step: Any, *within: Any, **how: Any) -> Any:
        nonlocal made
        result = await write(step, *within, **how)
        does = getattr(step, "func", None)
        if does in BEGINS or (made and does in GOES_ON):
            made += 1
        if made == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    store._write = counted


def _die_copying(store: Any, after: int, rows: int | None) -> AbstractContextManager[Made]:
    """Lets the process die, within the block, when so many transactions of a fork or an import are durable."""
    copies.COPY_ROWS = rows or copies.COPY_ROWS

    async def die(made: int) -> None:
        if made == after:
            os.kill(os.getpid(), signal.SIGKILL)

    return transactions(store, after=die)


class Crashing(Spawned):
    """Such a server as a process."""

    @classmethod
    async def launch(cls, directory: Path, *arguments: str, env: Mapping[str, str], store: str = "") -> Self:
        """Returns once it serves, from `store` or from `notecase.db` in the directory, where its log and its effects
        are too."""
        words = ("--store", store or f"sqlite:{directory / 'notecase.db'}", *arguments)
        return await cls.fork(__name__, words, {EFFECTS: str(directory / "effects"), **env}, directory / "log")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Whatever a test came to, the process does not outlive it."""
        await self.kill()

    async def death(self) -> None:
        """Waits for the kill that it gives itself."""
        await self._gone()
        assert self.process.returncode == -signal.SIGKILL, self.log.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve until the chosen commit of a run, or until SIGTERM.")
    parser.add_argument("--store", required=True)
    parser.add_argument("--before", type=int, help="the commit that is never made")
    parser.add_argument("--after", type=int, help="the commit that nobody is told of")
    parser.add_argument("--deletions", type=int, help="the transaction of a deletion that nobody is told of")
    parser.add_argument("--copies", type=int, help="the transaction of a fork or an import that nobody is told of")
    parser.add_argument("--copy-rows", type=int, help="how many rows each of them writes")
    parser.add_argument("--grace", type=float, default=5.0)
    parser.add_argument("--mcp-config", type=Path)
    options = parser.parse_args()

    configure_logging("console", "info")
    open_store = serve_stores.open_store

    async def open_mortal(url: str, clock: Clock, *others: Any) -> Any:
        store = await open_store(url, clock, *others)
        if options.deletions:
            _die_deleting(store, options.deletions)
        if options.copies:
            dying.enter_context(_die_copying(store, options.copies, options.copy_rows))
        return Mortal(store, options.before, options.after)

    settings = Settings(
        listen="127.0.0.1:0",
        store=options.store,
        providers=providers_from_environment(),
        tools=(TOOLS,),
        mcp_servers=read_mcp_servers(options.mcp_config) if options.mcp_config else {},
        grace=options.grace,
    )

    def ready(server: serve.Server) -> None:
        sys.stdout.write(f"listening on port {server.port}\n")
        sys.stdout.flush()

    with ExitStack() as dying, mock.patch.object(serve, "open_store", open_mortal):
        serve.run(settings, ready)

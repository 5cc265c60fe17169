"""How long one request can hold the server's loop, over the list of hostile requests that the tests have, too."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
from notecase import v1

from benchmarks.load import WrongError
from benchmarks.processes import Cpus, Process, running_server
from benchmarks.watched import GARBAGE
from tests.hostile import HOSTILE, Hostile, scene
from tests.support import raw

MANY = 300
"""Sessions with a run and a watcher each."""

TIMES = 2
"""How often each request is sent: what else a machine does meanwhile falls into one of them, and seldom into both."""


class Longest(NamedTuple):
    """The longest callback of the loop that a request takes, each time that it is sent."""

    seconds: float
    request: str
    callback: str

    def __str__(self) -> str:
        return f"{self.seconds * 1e3:.1f} ms: {self.request} ({self.callback[:100]})"


class Held(NamedTuple):
    """What held the loop, the longest first."""

    requests: list[Longest]
    """But those that are excepted."""
    excepted: list[Longest]
    garbage: float
    """Seconds of the longest collection."""


async def hostile(cpus: Cpus, folder: Path, name: str, model: Process) -> Held:
    """Sends each request of the list to a new server. Raises WrongError for one that does not end as the list says."""
    found: dict[bool, list[Longest]] = {False: [], True: []}
    garbage = 0.0
    async with _watched(cpus, folder, name, model) as watch, scene(watch.channel, MANY):
        for request, row in HOSTILE.items():
            held = []
            for _ in range(TIMES):
                taken = list(await watch.taken(request, row))
                held.append(max((each for each in taken if each.callback != GARBAGE), default=Longest(0, request, "")))
                garbage = max([garbage, *(each.seconds for each in taken if each.callback == GARBAGE)])
            found[bool(row.excepted)].append(min(held))
    return Held(sorted(found[False], reverse=True), sorted(found[True], reverse=True), garbage)


class _Watch:
    """A server whose loop is watched."""

    def __init__(self, channel: grpc.aio.Channel, file: Path) -> None:
        self.channel = channel
        self._file = file

    async def taken(self, request: str, row: Hostile) -> Iterator[Longest]:
        """The long callbacks of one call, and the collections of garbage meanwhile."""
        frames = row.sent()
        await self._settled()
        before = self._file.stat().st_size
        done = await raw.call(self.channel, row.path, frames, metadata=row.metadata)
        if (done.code, done.reason) != (row.code, row.reason):
            raise WrongError(f"{request}: {done.code.name} {done.reason} {done.message}")
        await self._settled()
        lines = self._file.read_bytes()[before:].decode().splitlines()
        return (Longest(float(seconds), request, what) for seconds, _, what in (line.partition(" ") for line in lines))

    async def _settled(self) -> None:
        """Waits for what the loop still has in its queue."""
        for _ in range(3):
            await v1.ServerServiceStub(self.channel).GetServerInfo(v1.GetServerInfoRequest())


@asynccontextmanager
async def _watched(cpus: Cpus, folder: Path, name: str, model: Process) -> AsyncIterator[_Watch]:
    file = folder / f"{name}.callbacks"
    async with (
        running_server(cpus.server, folder, name, model.port, "benchmarks.watched", str(file)) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield _Watch(channel, file)

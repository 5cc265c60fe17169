"""Sends what was made, several callers at once, and looks at what is left of it in the process."""

import asyncio
import gc
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import grpc
import structlog
from notecase import v1
from notecase_server.models.offline import OfflineProvider
from notecase_server.rpc.watch import Pace
from notecase_server.tools.functions import tool
from notecase_server.tools.toolbox import make_toolbox
from structlog.processors import format_exc_info
from structlog.testing import LogCapture

from tests.fuzz.corpus import FRAMES
from tests.fuzz.judge import Finding, problems
from tests.fuzz.making import Maker, World, parsed
from tests.support import raw
from tests.support.raw import METHODS, Method
from tests.support.server import Running, running

MOST_LEFT = 5
"""Of each kind of object, of descriptors and of tasks: what a fuzz of any length may leave behind."""

CALLERS = 4

WAITING = 0.3
"""Seconds after which a caller cuts a call that goes on: a stream, or one that waits for a run."""

PATIENCE = 60.0
"""Seconds within which any other call has to end."""

WAITS = {"Run", "Invoke", "WaitRun", "WatchEvents", "Watch"}
"""The methods whose calls last as long as their caller chooses."""

NAMES = [path.rpartition("/")[2] for path in METHODS]
SELDOM = {"EraseUser", "DeleteSession", "DeleteAgent", "GetServerInfo", "Check", "List", "Watch", "GetUpload"}
OFTEN = {"Run", "Invoke", "CreateRun", "SendCommand", "AppendMessages", "RewindSession", "ForkSession", "ImportSession"}
WEIGHTS = [1 if name in SELDOM else 12 if name in OFTEN else 4 for name in NAMES]
"""How often each method is called: what ends everything seldom, what sets things going often."""

CACHES = {"_Known", "Template", "_MeteredNode", "_MeteredTag", "_OutputNode", "_RangeEnd"}
"""What is kept of templates, and of the kinds of messages that imports had, whose numbers are bounded."""


@tool
def lens(depth: int = 1) -> str:
    """Looks closely."""
    return f"A hair, {depth} mm."


class Left(NamedTuple):
    """What a server holds on to."""

    descriptors: int
    tasks: int
    objects: Counter[str]
    """Of the server's own classes, by their names."""

    @classmethod
    def now(cls) -> "Left":
        gc.collect()
        kinds = (type(held) for held in gc.get_objects())
        own = Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("notecase_server"))
        return cls(len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks()), own)

    @classmethod
    async def settled(cls, before: "Left") -> dict[str, int]:
        """What there is more of than before by more than MOST_LEFT, once calls that were cut have come to their ends,
        for which grpc takes its time."""
        end = time.monotonic() + PATIENCE
        while (grown := cls.now().grown(before, MOST_LEFT)) and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return grown

    def grown(self, before: "Left", most: int) -> dict[str, int]:
        """What there is more of by more than `most`."""
        more = {"descriptors": self.descriptors - before.descriptors, "tasks": self.tasks - before.tasks}
        more |= {kind: count - before.objects[kind] for kind, count in self.objects.items() if kind not in CACHES}
        return {kind: count for kind, count in more.items() if count > most}


@asynccontextmanager
async def fuzzed_server(store: str) -> AsyncIterator[Running]:
    """A server with a tool, whose streams end soon when they are not read."""
    async with running(
        store,
        {"offline": OfflineProvider()},
        max_runs=50,
        max_blob_bytes=1 << 20,
        max_session_bytes=4 << 20,
        pace=Pace(heartbeat=0.1, poll=0.2, stall=5.0),
        toolbox=make_toolbox([__name__], {}),
    ) as served:
        yield served


class Fuzz:
    """One fuzz of a server in this process. The same seed sends the same requests if the server answers the same; each
    caller has its own random numbers."""

    def __init__(self, served: Running, seed: int) -> None:
        self.findings: list[Finding] = []
        self.sent: Counter[str] = Counter()
        """How often each method ended with each code."""
        self._served = served
        self._seed = seed
        self._world = World()
        self._number = 0

    async def play(self, requests: int, until: float = float("inf")) -> None:
        """Sends so many requests, or as many as fit until that time of time.monotonic."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self._told("a task", str(context.get("exception") or context)))
        before = self._number
        with _captured() as lines:
            await self._prepare()

            async def caller(number: int) -> None:
                make = Maker(Random(f"{self._seed}/{number}/{before}"), self._world)
                while self._number < before + requests and time.monotonic() < until:
                    self._number += 1
                    await self._send(make)
                    self._read(lines)

            async with asyncio.TaskGroup() as group:
                for number in range(CALLERS):
                    group.create_task(caller(number))
            await self._clear()
            self._read(lines)
        loop.set_exception_handler(None)

    async def _prepare(self) -> None:
        """Creates some of the resources that requests name, and calls each method once."""
        make = Maker(Random(self._seed), self._world)
        often = [f"notecase.v1.{name}" for name in ("AgentService/CreateAgent", "RunService/Invoke") * 3]
        for path in (*often, *METHODS):
            await self._call(make, METHODS[path], _frames(FRAMES[path](make)))

    async def _send(self, make: Maker) -> None:
        (method,) = make.chance.choices(list(METHODS.values()), WEIGHTS)
        await self._call(make, method, self._made(make, method))

    def _made(self, make: Maker, method: Method) -> list[bytes]:
        chance = make.chance.random()
        if chance < 0.1:
            frames = [make.filled(method.request()) for _ in range(make.chance.choice((1, 2)))]
        else:
            frames = _messages(FRAMES[method.path](make))
            if chance < 0.55:
                place = make.chance.randrange(len(frames))
                for _ in range(make.chance.choice((1, 1, 2))):
                    frames[place] = make.changed(frames[place])
        sent = [frame.SerializeToString() for frame in frames]
        if chance > 0.85:
            place = make.chance.randrange(len(sent))
            sent[place] = make.damaged(sent[place])
        return sent if method.client_streams else sent[:1]

    async def _call(self, make: Maker, method: Method, frames: list[bytes]) -> None:
        waits = method.path.rpartition("/")[2] in WAITS
        most = make.chance.choice((None, None, 1, 3)) if method.server_streams else None
        seconds = WAITING if waits else PATIENCE
        done = await raw.call(self._served.channel, method.path, frames, most=most, seconds=seconds)
        if done.message == raw.TOO_LONG and not waits:
            self._find(f"no end within {PATIENCE:g} seconds", method, frames)
        self.sent[f"{method.path.rpartition('/')[2]} {done.code.name}"] += 1
        for problem in problems(method, done):
            self._find(problem, method, frames)
        if method.answer is v1.ExportSessionResponse and done.code is grpc.StatusCode.OK and most is None:
            self._world.files.append(b"".join(v1.ExportSessionResponse.FromString(each).chunk for each in done.answers))
        for frame in done.answers[:20]:
            if (answer := parsed(method.answer, frame)) is not None:
                self._world.hear(answer)

    def _find(self, what: str, method: Method, frames: Sequence[bytes]) -> None:
        self.findings.append(Finding(what, method.path, tuple(frames)))

    def _told(self, who: str, what: str) -> None:
        self.findings.append(Finding(f"{who} ended with {what}", "", ()))

    def _read(self, lines: list[Any]) -> None:
        """Looks through what was logged since, and forgets it."""
        for line in lines:
            if line["log_level"] in {"error", "critical"} or "exception" in line:
                self._told("a line of the log", repr(line))
        lines.clear()

    async def _clear(self) -> None:
        """Deletes all sessions, which ends what works on them, and all agents."""
        sessions, agents = self._served.sessions, self._served.agents
        while found := (await sessions.ListSessions(v1.ListSessionsRequest(page_size=1000))).sessions:
            for session in found:
                await sessions.DeleteSession(v1.DeleteSessionRequest(name=session.name))
        while listed := (await agents.ListAgents(v1.ListAgentsRequest(page_size=1000))).agents:
            for agent in listed:
                await agents.DeleteAgent(v1.DeleteAgentRequest(name=agent.name))


@contextmanager
def _captured() -> Iterator[list[Any]]:
    """What is logged within the block, with the exceptions in full."""
    capture, before = LogCapture(), structlog.get_config()["processors"]
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, format_exc_info, capture])
    try:
        yield capture.entries
    finally:
        structlog.configure(processors=before)


def _messages(made: Any) -> list[Any]:
    return made if isinstance(made, list) else [made]


def _frames(made: Any) -> list[bytes]:
    return [frame.SerializeToString() for frame in _messages(made)]


def distinct(findings: Sequence[Finding]) -> Iterator[Finding]:
    """One of each that are alike but for what they quote."""
    seen = set()
    for finding in findings:
        kind = (finding.path, finding.what[:60])
        if kind not in seen:
            seen.add(kind)
            yield finding


def store_of(folder: Path) -> str:
    return f"sqlite:{folder / 'fuzz.db'}"

"""Measures how other callers affect a neighbour: a caller with one turn a second, first alone and then together with
each of them. The others are separate processes, `python -m MODULE NAME PORT`, on the CPU of the load; the server has
its own CPU. They stop when they are terminated.
"""

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from notecase import v1

from benchmarks.load import Load, WrongError
from benchmarks.processes import Process, running

EVERY = 1.0
"""Seconds from one turn's start to the next one's."""

WARM = 5
"""Turns before any is measured."""

LONGEST = 10.0
"""Seconds after which a turn is given up; one that fails counts for as much."""

ALLOWED = 0.02
"""Seconds that a turn may take on top of twice what it takes alone."""

KEPT = 1.1
"""How many times the memory of before the server may hold once its callers are gone."""


class Turns(NamedTuple):
    """Seconds of a turn, from its start to the end of its stream."""

    p50: float
    p99: float
    longest: float

    @property
    def bound(self) -> float:
        """Returns the p99 that is allowed together with others, from the turns of a neighbour that is alone."""
        return 2 * self.p99 + ALLOWED

    def __str__(self) -> str:
        return " | ".join(f"{seconds * 1e3:.1f}" for seconds in self)


class Effect(NamedTuple):
    """What one kind of caller does to the neighbour and to the server."""

    name: str
    did: str
    """What it says that it has done."""
    turns: Turns
    memory: tuple[int, int, int]
    """Bytes that the server holds before, at the most, and after."""
    back: float
    """Seconds until its memory is back within `KEPT`, or until the wait ends."""

    @property
    def kept(self) -> float:
        """How many times the memory of before is held after."""
        return self.memory[2] / self.memory[0]

    def row(self, alone: Turns) -> str:
        memory = " | ".join(f"{size / 2**20:.0f}" for size in self.memory)
        verdict = "pass" if self.turns.p99 <= alone.bound and self.kept <= KEPT else "over"
        return f"| {self.name} | {self.did} | {self.turns} | {memory} | {self.back:.0f} | {verdict} |"


def table(alone: Turns, others: Iterable[Effect]) -> Iterator[str]:
    """The lines of a Markdown table: turns in milliseconds, memory in MiB."""
    yield f"The neighbour's p99 may be {alone.bound * 1e3:.1f} ms, and the server's memory {KEPT} times what it was."
    yield "| with | that made | p50 | p99 | longest | memory before | at most | after | seconds until back | |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    yield f"| nobody | | {alone} | | | | | |"
    for other in others:
        yield other.row(alone)


class Neighbour:
    """The caller whose turns are measured, in a separate session."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._request = v1.RunRequest()

    async def prepare(self) -> None:
        """Makes its session, and an agent that is shown little of it."""
        llm = v1.LlmAgent(context=v1.Context(max_messages=10))
        agent = await self._load.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=llm)))
        said = v1.Message(parts=[v1.Part(text="/chunks 1")])
        start = v1.StartRun(session=await self._load.session(), agent=agent.name, messages=[said])
        self._request = v1.RunRequest(start=start)

    async def turns(self, seconds: float) -> Turns:
        """Takes its turns for so long, at least two. One that is late delays the next, and makes it no less."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        taken = list[float]()
        for number in itertools.count():
            await asyncio.sleep(begun + number * EVERY - loop.time())
            if number > 1 and number * EVERY >= seconds:
                break
            taken.append(await self._turn())
        hundredths = statistics.quantiles(taken, n=100, method="inclusive")
        return Turns(hundredths[49], hundredths[98], max(taken))

    async def take(self, count: int) -> list[float]:
        """Takes so many turns, one right after the other, and returns the seconds of each."""
        return [await self._turn() for _ in range(count)]

    async def _turn(self) -> float:
        begun = time.perf_counter()
        ended = v1.RunStateChanged()
        try:
            call: Any = self._load.runs[0].Run(iter([self._request]), timeout=LONGEST)
            async for response in call:
                for event in response.batch.events:
                    if event.WhichOneof("payload") == "run_state_changed":
                        ended = event.run_state_changed
        except grpc.aio.AioRpcError:
            return LONGEST
        return time.perf_counter() - begun if ended.state == v1.Run.STATE_SUCCEEDED else LONGEST


class Times(NamedTuple):
    """Seconds that parts of the measurement take."""

    alone: float = 30.0
    beside: float = 15.0
    """Together with each kind of caller."""
    rest: float = 60.0
    """After each, at most: until the server's memory is back."""


async def compare(
    load: Load, server: Process, cpu: int, folder: Path, module: str, callers: Mapping[str, str], times: Times
) -> tuple[Turns, list[Effect]]:
    """Measures a neighbour of that server alone, and then together with each of the module's callers, which are
    described by their names. They run on `cpu`."""
    neighbour = Neighbour(load)
    await neighbour.prepare()
    await neighbour.turns(WARM * EVERY)
    alone = await neighbour.turns(times.alone)
    found = list[Effect]()
    for name, described in callers.items():
        server.forget_peak()
        before = server.resident()
        arguments = ("-m", module, name, str(server.port))
        log = folder / f"{module}-{name}.log"
        async with running(cpu, log, *arguments, env=dict(os.environ)) as caller:
            turns = await neighbour.turns(times.beside)
            did = await caller.last_words()
        if not did:
            raise WrongError(f"{name}: {log.read_text()[-500:]}")
        waited = await _back(server, before, times.rest)
        found.append(Effect(described, did, turns, (before, server.peak(), server.resident()), waited))
    return alone, found


async def _back(server: Process, before: int, seconds: float) -> float:
    """Waits until the server holds about what it held before, for at most so many seconds; returns how many it was."""
    begun = time.perf_counter()
    while server.resident() > before * KEPT and time.perf_counter() - begun < seconds:  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    return time.perf_counter() - begun

"""Callers whose calls are all valid, and as many as a server takes: `python -m benchmarks.neighbours NAME PORT`.

Sizes are those of `prepare`, a tenth of what a hostile caller would take, so that a run is prepared in seconds.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import grpc
import uvloop
from notecase import v1

from benchmarks.load import Load

LONG = "sessions/long"
MESSAGES = 20_000

WIDE = "sessions/wide"
KEYS = 20_000

AGENT = "agents/echo"

LARGE = v1.Value(bytes_value=bytes(900 << 10))
"""What a session's state begins with: as much as one request takes."""

WATCHERS = 1_000

Call = Callable[[], Awaitable[object]]


async def prepare(load: Load) -> None:
    """Makes what is asked for."""
    await load.session(MESSAGES, LONG)
    await load.session(0, WIDE)
    for first in range(0, KEYS, 1000):
        update = v1.UpdateStateRequest(name=f"{WIDE}/state")
        for number in range(first, first + 1000):
            update.ops.add(key=f"key-{number}", set=v1.Value(int_value=number))
        await load.state.UpdateState(update)
    llm = v1.LlmAgent(context=v1.Context(max_messages=10))
    await load.agents.CreateAgent(v1.CreateAgentRequest(agent_id="echo", agent=v1.Agent(llm=llm)))


def _forks(load: Load, _: str) -> Call:
    return partial(load.sessions.ForkSession, v1.ForkSessionRequest(name=LONG))


def _creations(load: Load, _: str) -> Call:
    return partial(load.sessions.CreateSession, v1.CreateSessionRequest(state={"large": LARGE}))


def _pages(load: Load, _: str) -> Call:
    return partial(load.messages.ListMessages, v1.ListMessagesRequest(parent=LONG, page_size=1000))


def _past(load: Load, _: str) -> Call:
    return partial(load.state.GetState, v1.GetStateRequest(name=f"{WIDE}/state", at_sequence=KEYS // 2000))


def _turns(load: Load, session: str) -> Call:
    said = v1.Message(parts=[v1.Part(text="/chunks 1")])
    start = v1.StartRun(session=session, agent=AGENT, messages=[said])
    return partial(load.runs[0].Invoke, v1.InvokeRequest(start=start))


def _app_state(load: Load, _: str) -> Call:
    put = v1.PutStateRequest(name="app/state", key="mood", value=v1.Value(string_value="wary"))
    return partial(load.state.PutState, put)


class Callers(NamedTuple):
    described: str
    call: Callable[[Load, str], Call]
    """Makes what each of them does, again and again, by the session that it has to itself."""
    at_once: int
    watchers: int = 0
    """Streams that follow a session each."""


CALLERS: dict[str, Callers] = {
    "forks": Callers(f"a caller who forks a session of {MESSAGES} entries", _forks, 1),
    "creations": Callers("16 callers who make sessions with a state of 900 KiB", _creations, 16),
    "app-state": Callers(f"a caller who writes app/state that {WATCHERS} watchers follow", _app_state, 1, WATCHERS),
    "pages": Callers("32 callers who read pages of 1000 messages", _pages, 32),
    "past": Callers(f"4 callers who read {KEYS} keys as they were", _past, 4),
    "turns": Callers("64 callers who take turns", _turns, 64),
}


class _Crowd:
    """So many callers at once, who count."""

    def __init__(self) -> None:
        self.answered = self.refused = 0

    async def run(self, callers: Callers, load: Load) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(callers.watchers):
                group.create_task(self._watch(load, await load.session(name=f"sessions/watched-{number}"), number))
            for number in range(callers.at_once):
                # Named by their callers, as the others are: no two kinds make the same.
                session = await load.session(name=f"sessions/{callers.call.__name__.strip('_')}-{number}")
                group.create_task(self._repeat(callers.call(load, session)))

    async def _repeat(self, call: Call) -> None:
        while True:
            try:
                await call()
                self.answered += 1
            except grpc.aio.AioRpcError:
                self.refused += 1
                await asyncio.sleep(0.1)

    async def _watch(self, load: Load, session: str, number: int) -> None:
        attach = v1.AttachRun(name=session, options=v1.WatchOptions(keep_open=True))
        call: Any = load.runs[number % len(load.runs)].Run()
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call.write(v1.RunRequest(attach=attach))
            async for _ in call:
                self.answered += 1


async def _serve(name: str, port: int) -> None:
    crowd = _Crowd()
    async with Load.connect(port) as load:
        task = asyncio.create_task(crowd.run(CALLERS[name], load))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        sys.stdout.write(f"calling port {port}\n")
        sys.stdout.flush()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    sys.stdout.write(f"{crowd.answered} answers, {crowd.refused} refusals\n")


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], int(sys.argv[2])))

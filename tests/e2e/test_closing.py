"""What a model's turn opens it closes itself, whatever ends it: nothing is left to the garbage collector."""

import asyncio
import gc
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from notecase import v1
from notecase_server.models.openai import OpenAIProvider

from tests.e2e.driving import said
from tests.support.openai_server import Answer, OpenAIServer, chunk, error, reply, stream
from tests.support.server import Running, running

CASE = "sessions/case"
SUCCEEDED, FAILED, CANCELLED = v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED, v1.Run.STATE_CANCELLED


@contextmanager
def left_open() -> Iterator[list[str]]:
    """The names of the generators that the collector finds open, of those begun within the block."""
    found: list[str] = []
    before = sys.get_asyncgen_hooks()

    def finalize(generator: AsyncGenerator[Any, None]) -> None:
        found.append(getattr(generator, "__qualname__", repr(generator)))
        assert before.finalizer is not None
        before.finalizer(generator)

    sys.set_asyncgen_hooks(firstiter=before.firstiter, finalizer=finalize)
    try:
        yield found
    finally:
        sys.set_asyncgen_hooks(*before)


async def start(served: Running) -> None:
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent())))
    session = v1.Session(agent="agents/clerk")
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
    begun = v1.StartRun(session=CASE, run_id="r", messages=[said("Hello")])
    await served.runs.CreateRun(v1.CreateRunRequest(start=begun))


async def cancel(served: Running) -> None:
    """Once the reply has begun."""
    async for frame in served.runs.WatchEvents(v1.WatchEventsRequest(name=f"{CASE}/runs/r", after_sequence=0)):
        if any(event.HasField("block_delta") for event in frame.batch.events):
            await served.runs.CancelRun(v1.CancelRunRequest(name=f"{CASE}/runs/r", allow_missing=True))


async def nothing(served: Running) -> None:
    """The reply ends by itself."""


HELD = reply("Good evening.", chunks=4).held(asyncio.Event(), after=3)


@pytest.mark.parametrize(
    ("answer", "act", "state"),
    [
        (reply("Good evening.", chunks=4), nothing, SUCCEEDED),
        (HELD, cancel, CANCELLED),
        (HELD, nothing, FAILED),
        (reply("Good evening.", chunks=4).cut(after=3), nothing, FAILED),
        (stream(chunk({"content": "Good "}), b"data: {\n\n"), nothing, FAILED),
        (stream(*[chunk({"content": "x" * 100_000})] * 12), nothing, FAILED),
        (error(400), nothing, FAILED),
        (error(500), nothing, FAILED),
    ],
    ids=["whole", "cancelled", "silent", "cut", "broken", "too long", "refused", "failed"],
)
async def test_no_generator_of_a_turn_is_left_to_the_collector(
    model: OpenAIServer,
    answer: Answer,
    act: Callable[[Running], Awaitable[None]],
    state: v1.Run.State.ValueType,
) -> None:
    idle = 0.2 if answer is HELD and act is nothing else 60.0
    provider = OpenAIProvider("test-key", model.url, "stub-1", idle_timeout=idle)
    model.script(answer, answer, answer)  # as often as it is requested
    with left_open() as left:
        async with running("memory:", {"openai": provider}) as served:
            await start(served)
            await act(served)
            run = await served.runs.WaitRun(v1.WaitRunRequest(name=f"{CASE}/runs/r"))
            assert state == run.state
        gc.collect()
        assert [] == left


async def test_the_connection_of_a_whole_reply_serves_the_next(served: Running, model: OpenAIServer) -> None:
    model.script(reply("Good evening.", chunks=4), reply("Good night."))
    await start(served)
    await served.runs.WaitRun(v1.WaitRunRequest(name=f"{CASE}/runs/r"))
    await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=CASE, messages=[said("Bye")])))
    first, second = (received.client_port for received in model.received)
    assert first == second

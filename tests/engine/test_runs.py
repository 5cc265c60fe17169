"""The rooms together: a stop takes one grace, whatever is under way."""

import asyncio

from notecase_server.store.memory import MemoryStore
from notecase_server.tools.functions import tool

from tests.engine.rooms import house, server_tool
from tests.store.build import ManualClock
from tests.support.time import in_no_time


@tool
async def wait() -> str:
    await asyncio.Event().wait()
    return ""


def test_a_stop_takes_one_grace() -> None:
    """A call and another piece of work go on for longer; both are cut at the same time."""

    async def stopped() -> float:
        clock = ManualClock()
        async with house(MemoryStore(clock), clock, tools=[__name__]) as rooms:
            (key,) = await rooms.prepare(tools=[server_tool("wait")])
            await rooms.start(key, "/call wait")
            rooms.supervisor.start(asyncio.Event().wait(), "work")
            now = asyncio.get_running_loop().time
            begun = now()
            await rooms.runs.drain(10.0)
            return now() - begun

    assert 10.0 == in_no_time(stopped())

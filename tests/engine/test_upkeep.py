"""Upkeep: every run that has not ended has a worker, a timer or its turn, and one that has ended has nothing."""

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import v1
from notecase_server.engine.roster import Caused
from notecase_server.store.contract import SessionKey, Store
from notecase_server.store.memory import MemoryStore

from tests.engine.rooms import House, Model, client_tool, house
from tests.store.build import ManualClock
from tests.support.time import in_no_time

SUCCEEDED, CANCELLED = v1.Run.STATE_SUCCEEDED, v1.Run.STATE_CANCELLED
HOUR = 3600.0
ALONE = v1.Disconnect(cancel_after=Duration(seconds=3600))


class Looks:
    """A store that notes which tasks of the duty "company" look for a run."""

    def __init__(self, store: Store) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self._store = store

    def __getattr__(self, name: str) -> Any:
        task = asyncio.current_task() if name == "get_run" else None
        if task is not None and task.get_name() == "company":
            self.tasks.add(task)
        return getattr(self._store, name)


async def answered(rooms: House, key: SessionKey) -> v1.Run:
    """The run once its call has a result, and has ended."""
    (call,) = (await rooms.rests(key)).pending_calls
    await rooms.runs.commands.tool_result(key, "r", v1.ToolResult(call_id=call.call_id), Caused())
    return await rooms.ended(key)


async def deleted(rooms: House, key: SessionKey) -> None:
    await rooms.rests(key)
    await rooms.sessions.delete(key)


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("way", [answered, deleted])
def test_nobody_watches_over_a_run_that_is_gone(way: Any, followed: bool) -> None:
    """One task watches over it, however often it gets a worker, and ends with it: no hour later, and no poll later."""

    async def watched() -> tuple[int, float]:
        clock, now = ManualClock(), asyncio.get_running_loop().time
        looks = Looks(MemoryStore(clock))
        async with house(cast(Store, looks), clock, Model(), poll=HOUR) as rooms:
            (key,) = await rooms.prepare(tools=[client_tool("look")])
            live = rooms.sessions.live(key)
            if followed:
                live.join()
            await rooms.start(key, "call look", disconnect=ALONE)
            await cast(Coroutine[Any, Any, object], way(rooms, key))
            await asyncio.wait(looks.tasks)
            assert [] == [task for task in asyncio.all_tasks() if task.get_name() == "company"]
            return len(looks.tasks), now()

    assert (1, 0.0) == in_no_time(watched())


def test_a_run_that_nobody_follows_is_cancelled_when_its_time_has_come() -> None:
    async def cancelled() -> tuple[v1.Run.State.ValueType, float]:
        clock = ManualClock()
        async with house(MemoryStore(clock), clock, Model(), poll=HOUR) as rooms:
            (key,) = await rooms.prepare(tools=[client_tool("look")])
            await rooms.start(key, "call look", disconnect=ALONE)
            return (await rooms.ended(key)).state, asyncio.get_running_loop().time()

    assert (CANCELLED, HOUR) == in_no_time(cancelled())

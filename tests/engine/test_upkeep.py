"""Upkeep: every run that has not ended has a worker, a timer or its turn, and one that has ended has nothing."""

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import v1
from notecase_server.engine.caused import Caused
from notecase_server.engine.upkeep import RAMP_SECONDS, TAKEOVER_BATCH
from notecase_server.store.contract import SessionKey, Store
from notecase_server.store.memory import MemoryStore

from tests.engine.rooms import House, Model, client_tool, house
from tests.store.build import ManualClock
from tests.support.time import in_no_time

SUCCEEDED, CANCELLED = v1.Run.STATE_SUCCEEDED, v1.Run.STATE_CANCELLED
WAITING = v1.Run.STATE_WAITING
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
def test_the_task_that_watches_a_run_ends_with_it(way: Any, followed: bool) -> None:
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
            await asyncio.sleep(1.0)  # which passes when there is nothing left to do
            await cast(Coroutine[Any, Any, object], way(rooms, key))
            await asyncio.wait(looks.tasks)
            assert [] == [task for task in asyncio.all_tasks() if task.get_name() == "company"]
            return len(looks.tasks), now()

    assert (1, 1.0) == in_no_time(watched())


def test_a_run_without_a_stream_is_cancelled_at_its_deadline() -> None:
    async def cancelled() -> tuple[v1.Run.State.ValueType, float]:
        clock = ManualClock()
        async with house(MemoryStore(clock), clock, Model(), poll=HOUR) as rooms:
            (key,) = await rooms.prepare(tools=[client_tool("look")])
            await rooms.start(key, "call look", disconnect=ALONE)
            return (await rooms.ended(key)).state, asyncio.get_running_loop().time()

    assert (CANCELLED, HOUR) == in_no_time(cancelled())


async def test_what_a_process_left_is_taken_over_and_its_queue_goes_on(store: Store, clock: ManualClock) -> None:
    """A run that waits is left as it is."""
    model = Model()
    async with asyncio.timeout(60):
        async with house(store, clock, model) as rooms:
            held, waits = await rooms.prepare("s", "t", tools=[client_tool("look")])
            await rooms.start(held, "hold")
            await rooms.start(held, "later", "queued", on_busy=v1.StartRun.ON_BUSY_QUEUE)
            await rooms.start(waits, "call look")
            before = await rooms.rests(waits)
            await model.arrived.acquire()
        model.let.set()
        async with house(store, clock, model) as rooms:
            assert 1 == await rooms.runs.upkeep.take_over()
            first, queued = await rooms.ended(held), await rooms.ended(held, "queued")
            assert [(SUCCEEDED, 2), (SUCCEEDED, 1)] == [(run.state, run.attempt) for run in (first, queued)]
            assert before == await rooms.rests(waits)


def test_runs_that_wait_hold_up_no_takeover_and_those_at_work_come_in_batches() -> None:
    async def taken_over() -> tuple[float, int]:
        clock, model = ManualClock(), Model()
        store = MemoryStore(clock)
        async with house(store, clock, model) as rooms:
            names = [f"s{number:03}" for number in range(3 * TAKEOVER_BATCH)]
            keys = await rooms.prepare(*names, tools=[client_tool("look")])
            for number, key in enumerate(keys):
                await rooms.start(key, "hold" if number >= 2 * TAKEOVER_BATCH else "call look")
            for key in keys[: 2 * TAKEOVER_BATCH]:
                await rooms.rests(key)
        begun = asyncio.get_running_loop().time()
        async with house(store, clock, Model()) as rooms:
            adopted = await rooms.runs.upkeep.take_over()
            return asyncio.get_running_loop().time() - begun, adopted

    assert (RAMP_SECONDS, TAKEOVER_BATCH) == in_no_time(taken_over())


@pytest.mark.parametrize("way", [answered, deleted])
async def test_no_deadline_is_kept_of_a_run_that_is_gone(store: Store, clock: ManualClock, way: Any) -> None:
    async with asyncio.timeout(60), house(store, clock, Model()) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool("look", timeout=Duration(seconds=3600))])
        timers = rooms.runs.upkeep._timers
        armed = asyncio.create_task(timers._changed.wait())
        await rooms.start(key, "call look")
        await armed
        assert [key] == list(timers._deadlines)
        await cast(Coroutine[Any, Any, object], way(rooms, key))
        assert {} == timers._deadlines


async def test_a_run_without_a_worker_is_given_one_and_no_second_one(store: Store, clock: ManualClock) -> None:
    model = Model()
    async with asyncio.timeout(60), house(store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        await rooms.run_log(key)
        for _ in range(3):
            await rooms.runs.upkeep.repair()
        run = await rooms.ended(key)
        assert (SUCCEEDED, 2, ["Go"]) == (run.state, run.attempt, model.asked)


def test_what_is_not_answered_in_time_goes_on_without() -> None:
    """By the clock of the wall, which is looked at every few seconds."""

    async def timed_out() -> tuple[v1.Run, list[v1.Event]]:
        clock = ManualClock()
        async with house(MemoryStore(clock), clock, Model()) as rooms:
            (key,) = await rooms.prepare(tools=[client_tool("look", timeout=Duration(seconds=3600))])
            rooms.runs.upkeep.start()
            await rooms.start(key, "call look")
            assert WAITING == (await rooms.rests(key)).state
            clock.now += 3_600_000_000
            return await rooms.ended(key), await rooms.log(key)

    run, events = in_no_time(timed_out())
    assert SUCCEEDED == run.state
    (late,) = [event.tool_finished for event in events if event.HasField("tool_finished")]
    assert (v1.ToolCall.OUTCOME_FAILED, "The caller gave no result in time.") == (late.outcome, late.error)

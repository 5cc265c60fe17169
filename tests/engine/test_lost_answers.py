"""A commit that starts a run is made, its answer is lost, and the store cannot say at once whether it was made: the run
still gets exactly one worker. Upkeep does not run here: only what follows from the commit does."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import pytest
from notecase import v1
from notecase_server.engine.caused import Caused
from notecase_server.engine.session import ASKS
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Commit, SessionKey, Store

from tests.engine.rooms import House, Model, client_tool, house
from tests.store.build import ManualClock, refused
from tests.support.failing import Failing, Mode

QUEUE, INTERRUPT, ROLLBACK = v1.StartRun.ON_BUSY_QUEUE, v1.StartRun.ON_BUSY_INTERRUPT, v1.StartRun.ON_BUSY_ROLLBACK
SUCCEEDED = v1.Run.STATE_SUCCEEDED

Way = Callable[[House, SessionKey, Model], Awaitable[str]]
"""Starts the run "two", and lets the one before it end; returns the run in its caller's answer, "" for none."""


async def direct(rooms: House, key: SessionKey, model: Model) -> str:
    return (await rooms.start(key, "hi", "two")).run.name


async def queued(rooms: House, key: SessionKey, model: Model) -> str:
    await rooms.start(key, "hold", "one")
    await rooms.start(key, "hi", "two", on_busy=QUEUE)
    model.let.set()
    return ""


async def by_interrupt(rooms: House, key: SessionKey, model: Model) -> str:
    return await _in_its_place(rooms, key, model, INTERRUPT)


async def by_rollback(rooms: House, key: SessionKey, model: Model) -> str:
    return await _in_its_place(rooms, key, model, ROLLBACK)


async def _in_its_place(rooms: House, key: SessionKey, model: Model, on_busy: v1.StartRun.OnBusy.ValueType) -> str:
    await rooms.start(key, "hold", "one")
    await model.arrived.acquire()
    return (await rooms.start(key, "hi", "two", on_busy=on_busy)).run.name


def starts(run: str) -> Callable[[Commit], bool]:
    return lambda commit: any(event.HasField("run_started") and event.run == run for event in commit.events)


def without_an_answer(store: Store, silent: int, counts: Callable[[Commit], bool]) -> tuple[Store, list[Failing]]:
    """A store that loses the answer of the first such commit, and as often cannot say what became of it."""
    asked = [Failing(store, "find_commit", Mode.PASSING, times=silent)] if silent else []
    lost = Failing(asked[0].store if asked else store, "commit", Mode.AFTER, counts=counts)
    return lost.store, asked


TOLD: Mapping[Way, str] = {direct: "two", queued: "", by_interrupt: "two", by_rollback: "two"}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("silent", [0, 1, ASKS + 3], ids=["", "asked twice", "away for a while"])
@pytest.mark.parametrize("way", TOLD, ids=lambda way: way.__name__)
async def test_a_run_whose_start_was_made_unheard_is_at_work_once_and_the_queue_goes_on(
    store: Store, clock: ManualClock, way: Way, silent: int
) -> None:
    model = Model()
    failing, asked = without_an_answer(store, silent, starts("two"))
    async with asyncio.timeout(60), house(failing, clock, model) as rooms:
        (key,) = await rooms.prepare()
        if way is direct and silent > ASKS:
            with refused("STORE_UNAVAILABLE"):  # the outcome is not known yet, and a repeat gets it
                await way(rooms, key, model)
        else:
            assert TOLD[way] == await way(rooms, key, model)
        await rooms.start(key, "three", "three", on_busy=QUEUE)
        two, three = await rooms.ended(key, "two"), await rooms.ended(key, "three")
        assert (SUCCEEDED, 1) == (two.state, two.attempt)
        assert (SUCCEEDED, 1) == (three.state, three.attempt)
        again = await rooms.start(key, "hi", "two", **_same(way))
        assert (True, two) == (again.existing, again.run)
        assert ["hi", "three"] == [text for text in model.asked if not text.startswith("hold")]
        started = [event.run for event in await rooms.log(key) if event.HasField("run_started")]
        assert started == [*(["one"] if way is not direct else []), "two", "three"]
        assert all(one.failed.is_set() for one in asked)
        assert 100 == await _free(rooms), "places are lost"


def _same(way: Way) -> dict[str, v1.StartRun.OnBusy.ValueType]:
    ways = {queued: QUEUE, by_interrupt: INTERRUPT, by_rollback: ROLLBACK}
    return {"on_busy": ways[way]} if way in ways else {}


async def _free(rooms: House) -> int:
    """How many places there are once every worker has gone home."""
    if workers := [entry.task for entry in rooms.runs.roster]:
        await asyncio.wait(workers)
    free = 0
    try:
        while True:
            rooms.services.places.take()
            free += 1
    except NotecaseError:
        return free


@pytest.mark.usefixtures("at_once")
async def test_a_run_goes_on_with_a_result_that_was_taken_unheard(store: Store, clock: ManualClock) -> None:
    """The caller gets an error that the outcome is not known, and the run has a worker."""
    model = Model()
    failing, _ = without_an_answer(
        store, ASKS + 3, lambda commit: any(event.HasField("tool_finished") for event in commit.events)
    )
    async with asyncio.timeout(60), house(failing, clock, model) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool("look")])
        await rooms.start(key, "call look")
        (call,) = (await rooms.rests(key)).pending_calls
        result = v1.ToolResult(call_id=call.call_id)
        with refused("STORE_UNAVAILABLE"):
            await rooms.runs.commands.tool_result(key, "r", result, Caused())
        run = await rooms.ended(key)
        assert (SUCCEEDED, 1) == (run.state, run.attempt)

"""The roster: a run has at most one worker, and one is made from the rows where it is needed."""

import asyncio

import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.engine.caused import Caused
from notecase_server.store.contract import CommandId, Duplicate, Store

from tests.engine.rooms import Model, client_tool, house
from tests.store.build import ManualClock, put, refused

QUEUE = v1.StartRun.ON_BUSY_QUEUE


async def test_a_run_that_waits_has_a_worker_only_while_it_is_decided_about(store: Store, clock: ManualClock) -> None:
    async with house(store, clock, Model()) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool("look")])
        await rooms.start(key, "call look")
        waits = await rooms.rests(key)
        await asyncio.gather(*(entry.task for entry in rooms.runs.roster))
        async with rooms.runs.roster.worker(key, "r", Caused()) as worker:
            assert (waits, ["look"]) == (worker.log.run, [call.tool for call in worker.log.open])
        assert rooms.runs.roster.at_work(key, "r") is None


async def test_a_run_at_work_is_decided_about_with_its_own_worker(store: Store, clock: ManualClock) -> None:
    """Also by the name of the session's active run; and it is not set to work twice."""
    model = Model()
    async with house(store, clock, model, max_runs=2) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "hold")
        await model.arrived.acquire()
        mine = rooms.runs.roster.at_work(key, "r")
        assert mine is not None
        async with rooms.runs.roster.worker(key, "", Caused()) as worker:
            assert mine is worker
            rooms.services.places.take()
            made = await worker.log.command([v1.Event(state_changed=v1.StateChanged(ops=[put("n", 1)]))])
            rooms.runs.roster.begin(worker.log.live, made, "r", worker.log.agent, placed=True)
            rooms.services.places.take()  # it was given back
        assert [mine] == [entry.worker for entry in rooms.runs.roster]


@pytest.mark.parametrize("end", ["deletion", "a crash"])
async def test_a_worker_that_stopped_while_a_command_was_decided_about_is_not_set_to_work_again(
    store: Store, clock: ManualClock, end: str
) -> None:
    """It would run its calls once more, under the same attempt, without having committed anything."""
    model = Model()
    async with asyncio.timeout(60), house(store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "hold")
        await model.arrived.acquire()
        (entry,) = rooms.runs.roster
        with refused("CALL_NOT_PENDING"):
            async with rooms.runs.roster.worker(key, "r", Caused()):
                if end == "deletion":
                    await rooms.sessions.delete(key)
                else:
                    entry.task.cancel()
                await asyncio.wait([entry.task])
                raise errors.call_not_pending("c")
        assert rooms.runs.roster.at_work(key, "r") is None
        await asyncio.sleep(0)
        assert not list(rooms.runs.roster)
        assert ["hold"] == model.asked


async def test_a_decision_about_an_inactive_run_is_refused_with_the_reason(store: Store, clock: ManualClock) -> None:
    model = Model()
    async with house(store, clock, model) as rooms:
        key, other = await rooms.prepare("s", "t")
        await rooms.start(key, "hold")
        await rooms.start(key, "hi", "queued", on_busy=QUEUE)
        await rooms.start(other, "hi")
        await rooms.ended(other)
        for where, run, reason in (
            (key, "nowhere", "RUN_NOT_FOUND"),
            (key, "queued", "RUN_ACTIVE"),
            (other, "r", "RUN_ENDED"),
        ):
            with refused(reason):
                async with rooms.runs.roster.worker(where, run, Caused()):
                    raise AssertionError("it is not under way")
            with refused("CALL_NOT_PENDING"):
                async with rooms.runs.roster.worker(where, run, Caused(), errors.call_not_pending("c")):
                    raise AssertionError("it is not under way")


async def test_a_repeated_command_is_recognised_before_anything_is_decided(store: Store, clock: ManualClock) -> None:
    async with house(store, clock, Model()) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool("look")])
        await rooms.start(key, "call look")
        (call,) = (await rooms.rests(key)).pending_calls
        caused = Caused("once", None, CommandId("once", b"digest"))
        await rooms.runs.commands.tool_result(key, "r", v1.ToolResult(call_id=call.call_id), caused)
        await rooms.ended(key)
        with pytest.raises(Duplicate):
            async with rooms.runs.roster.worker(key, "r", caused):
                raise AssertionError("it came before")


async def test_a_worker_of_an_earlier_owner_commits_no_more(store: Store, clock: ManualClock) -> None:
    async with house(store, clock, Model()) as rooms:
        (key,) = await rooms.prepare()
        earlier = await rooms.run_log(key)
        active = await store.active_run(key, "r")
        assert active is not None
        worker = await rooms.runs.roster.adopted(rooms.sessions.live(key), earlier.session, active)
        with refused("OWNER_LOST"):
            await earlier.durably(lambda: [earlier.ending(v1.Run.STATE_CANCELLED)])
        await worker.log.durably(lambda: [worker.log.ending(v1.Run.STATE_CANCELLED)])


async def test_a_stop_leaves_a_run_in_good_order(store: Store, clock: ManualClock) -> None:
    """So it is no death of its process, and nothing is decided about the run here any more."""
    model = Model()
    async with house(store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "hold")
        await model.arrived.acquire()
        await rooms.runs.roster.drain(0)
        active = await store.active_run(key, "r")
        assert active is not None
        assert (v1.Run.STATE_RUNNING, True) == (active.run.state, active.released)
        with refused("SERVER_DRAINING"):
            async with rooms.runs.roster.worker(key, "r", Caused()):
                raise AssertionError("the server stops")

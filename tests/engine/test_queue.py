"""The queue of a session: its runs start in order, each when the session is idle and has a place."""

import asyncio

from notecase import v1
from notecase_server import errors
from notecase_server.engine.queue import Queue
from notecase_server.store.contract import Commit, RunRecord, Store

from tests.engine.rooms import TENANT, House, Model, house
from tests.store.build import ManualClock, refused
from tests.support.failing import Failing, Mode

QUEUE = v1.StartRun.ON_BUSY_QUEUE
SUCCEEDED, FAILED, QUEUED = v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED, v1.Run.STATE_QUEUED


def queue_of(rooms: House) -> Queue:
    return Queue(rooms.sessions, rooms.services, rooms.runs.roster)


async def test_queued_runs_start_in_order_though_there_is_one_place(store: Store, clock: ManualClock) -> None:
    model = Model()
    async with asyncio.timeout(60), house(store, clock, model, max_runs=1) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "hold", "one")
        for name in ("two", "three"):
            await rooms.start(key, name, name, on_busy=QUEUE)
        await model.arrived.acquire()
        model.let.set()
        assert [SUCCEEDED] * 3 == [(await rooms.ended(key, run)).state for run in ("one", "two", "three")]
        assert ["hold", "two", "three"] == model.asked


async def test_a_session_at_work_starts_nothing_and_keeps_no_place(store: Store, clock: ManualClock) -> None:
    model = Model()
    async with asyncio.timeout(60), house(store, clock, model, max_runs=2) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "hold", "one")
        await rooms.start(key, "two", "two", on_busy=QUEUE)
        await queue_of(rooms).start_next(key)
        row = await store.get_run(key, "two")
        assert row is not None
        assert QUEUED == row[0].state
        rooms.services.places.take()


async def test_a_start_that_the_store_fails_passingly_is_still_queued_and_keeps_no_place(
    store: Store, clock: ManualClock
) -> None:
    failing = Failing(store, "read_events", Mode.PASSING)
    async with asyncio.timeout(60), house(failing.store, clock, Model(), max_runs=1) as rooms:
        (key,) = await rooms.prepare()
        agent = await store.get_agent(TENANT, "clerk")
        assert agent is not None
        event = v1.Event(run="r", cause_id="r")
        event.command_queued.start.messages.add().parts.add(text="hi")
        await rooms.sessions.commit(Commit(key=key, events=[event], start=RunRecord(b"digest", agent)))
        with refused("STORE_UNAVAILABLE"):
            await queue_of(rooms).start_next(key)
        await queue_of(rooms).start_next(key)
        assert SUCCEEDED == (await rooms.ended(key)).state


async def test_a_start_that_finds_the_session_idle_does_not_overtake_what_is_queued(
    store: Store, clock: ManualClock
) -> None:
    """Between the end of a run and the start of the next one, which waits for the store here, no other run starts."""
    failing = Failing(store, "read_events", Mode.PASSING, times=3)
    model = Model()
    async with asyncio.timeout(60), house(failing.store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        agent = await store.get_agent(TENANT, "clerk")
        assert agent is not None
        event = v1.Event(run="first", cause_id="first")
        event.command_queued.start.messages.add().parts.add(text="first")
        await rooms.sessions.commit(Commit(key=key, events=[event], start=RunRecord(b"digest", agent)))
        with refused("RUN_ACTIVE"):
            await rooms.start(key, "refused", "refused")
        assert QUEUED == (await rooms.start(key, "second", "second", on_busy=QUEUE)).run.state
        await rooms.start(key, "hurried", "hurried", on_busy=v1.StartRun.ON_BUSY_INTERRUPT)
        for run in ("hurried", "first", "second"):
            assert SUCCEEDED == (await rooms.ended(key, run)).state
        assert ["hurried", "first", "second"] == model.asked


async def test_a_start_that_is_permanently_refused_fails_and_the_next_one_starts(
    store: Store, clock: ManualClock
) -> None:
    failing = Failing(
        store,
        "commit",
        Mode.FOR_GOOD,
        refuse=lambda: errors.invalid([]),
        counts=lambda commit: any(event.HasField("run_started") and event.run == "two" for event in commit.events),
    )
    model = Model()
    async with asyncio.timeout(60), house(failing.store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "hold", "one")
        await rooms.start(key, "two", "two", on_busy=QUEUE)
        await rooms.start(key, "three", "three", on_busy=QUEUE)
        model.let.set()
        two = await rooms.ended(key, "two")
        assert (FAILED, v1.ERROR_REASON_INVALID_FIELD) == (two.state, two.error.reason)
        assert SUCCEEDED == (await rooms.ended(key, "three")).state
        assert ["hold", "three"] == model.asked

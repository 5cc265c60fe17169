"""Admission: a start is one commit, made once, and a refused one leaves nothing."""

import asyncio

import pytest
from notecase import v1
from notecase_server.engine.admission import Started
from notecase_server.engine.caused import Caused
from notecase_server.errors import NotecaseError, reason_name
from notecase_server.store.contract import CommandId, Commit, Query, SessionKey, Store

from tests.engine.rooms import TENANT, House, Model, house, kinds
from tests.store.build import ManualClock, refused
from tests.support.failing import Failing, Mode

QUEUE, INTERRUPT, ROLLBACK = v1.StartRun.ON_BUSY_QUEUE, v1.StartRun.ON_BUSY_INTERRUPT, v1.StartRun.ON_BUSY_ROLLBACK
SUCCEEDED = v1.Run.STATE_SUCCEEDED


async def test_a_start_that_comes_again_is_found_and_another_under_its_name_refused(
    store: Store, clock: ManualClock
) -> None:
    model = Model()
    async with house(store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        first = await rooms.start(key, "hi")
        ended = await rooms.ended(key)
        again = await rooms.start(key, "hi")
        assert (False, True, ended) == (first.existing, again.existing, again.run)
        with refused("REQUEST_ID_REUSED"):
            await rooms.start(key, "something else")
        assert ["hi"] == model.asked


async def test_of_many_starts_at_once_one_is_made_and_the_others_wait_or_are_refused(
    store: Store, clock: ManualClock
) -> None:
    model = Model()
    async with house(store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        ways = [v1.StartRun.ON_BUSY_REJECT] * 3 + [QUEUE] * 3
        starts = (rooms.start(key, "hold", f"r{number}", on_busy=way) for number, way in enumerate(ways))
        made = await asyncio.gather(*starts, return_exceptions=True)
        told = [
            v1.Run.State.Name(one.run.state) if isinstance(one, Started) else reason_name(one.reason)
            for one in made
            if isinstance(one, Started | NotecaseError)
        ]
        assert sorted(["STATE_RUNNING", *["RUN_ACTIVE"] * 2, *["STATE_QUEUED"] * 3]) == sorted(told)
        model.let.set()
        for one in made:
            if isinstance(one, Started):
                assert SUCCEEDED == (await rooms.ended(key, one.run.name)).state


@pytest.mark.parametrize("mode", [Mode.FOR_GOOD, Mode.PASSING])
async def test_a_start_that_is_refused_keeps_no_place_and_no_session(
    store: Store, clock: ManualClock, mode: Mode
) -> None:
    failing = Failing(store, "commit", mode, counts=lambda commit: "run_started" in kinds(commit.events))
    async with house(failing.store, clock, Model(), max_runs=1) as rooms:
        (key,) = await rooms.prepare()
        new = v1.Session(name="sessions/new", agent="agents/clerk")
        start = v1.StartRun(new_session=new, messages=[v1.Message(parts=[v1.Part(text="hi")])])
        with pytest.raises(NotecaseError):
            await rooms.runs.admission.start(TENANT, start)
        with refused("AGENT_NOT_FOUND"):
            await rooms.start(key, "hi", agent="agents/nobody")
        with refused("INVALID_FIELD"):
            await rooms.start(key, "")
        assert ["s"] == [row.name for row in (await store.list_sessions(TENANT, Query(10))).rows]
        await rooms.start(key, "hi")
        assert SUCCEEDED == (await rooms.ended(key)).state


@pytest.mark.parametrize(("way", "marks"), [(INTERRUPT, 0), (ROLLBACK, 1)])
async def test_a_start_in_place_of_another_run_is_one_commit(
    store: Store, clock: ManualClock, way: v1.StartRun.OnBusy.ValueType, marks: int
) -> None:
    """A run that is queued does not come between, and one place is enough."""
    model = Model()
    async with house(store, clock, model, max_runs=1) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "hold", "one")
        await model.arrived.acquire()
        await rooms.start(key, "later", "queued", on_busy=QUEUE)
        started = await rooms.start(key, "hi", "two", on_busy=way)
        assert ("two", v1.Run.STATE_RUNNING) == (started.run.name, started.run.state)
        assert SUCCEEDED == (await rooms.ended(key, "queued")).state
        events = await rooms.log(key)
        sealed = [event.sequence for event in events if event.run_state_changed.state == v1.Run.STATE_CANCELLED]
        begun = [event.sequence for event in events if event.HasField("run_started") and event.run == "two"]
        between = kinds([event for event in events if sealed[0] < event.sequence < begun[0]])
        assert ["rewound"] * marks == between
        assert ["hold", "hi", "later"] == model.asked


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("way", [QUEUE, INTERRUPT, ROLLBACK])
async def test_a_start_that_expects_the_head_is_refused_when_the_log_grows_before_its_commit(
    store: Store,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    way: v1.StartRun.OnBusy.ValueType,
    *,
    before: bool,
) -> None:
    """Also when it waits behind a run or takes its place, before or after the session is read again: the run goes on,
    and is not even cut where that can be seen."""
    model = Model()
    async with house(store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "hold", "one")
        await model.arrived.acquire()
        head, reads, read = len(await rooms.log(key)), 0, store.read_start

        async def late(tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
            nonlocal reads
            reads += 1
            found = await read(tenant, session, agent)
            if reads == 2:
                aside = v1.Event(message_added=v1.Message(name="aside", role=v1.Message.ROLE_USER))
                await rooms.sessions.commit(Commit(key=key, events=[aside]))
            return await read(tenant, session, agent) if before else found

        monkeypatch.setattr(store, "read_start", late)
        with refused("SEQUENCE_MISMATCH"):
            await rooms.start(key, "hi", "two", on_busy=way, if_last_sequence=head)
        model.let.set()
        assert SUCCEEDED == (await rooms.ended(key, "one")).state
        assert ["one"] == [event.run for event in await rooms.log(key) if event.HasField("run_started")]
        assert len(model.asked) == 1 or not before


async def session_for(rooms: House, way: v1.StartRun.OnBusy.ValueType) -> SessionKey:
    """Makes a session that has an active run, unless a start of that way is refused then."""
    (key,) = await rooms.prepare()
    if way != v1.StartRun.ON_BUSY_REJECT:
        await rooms.start(key, "hold", "one")
    return key


@pytest.mark.parametrize("way", [v1.StartRun.ON_BUSY_REJECT, QUEUE, INTERRUPT, ROLLBACK])
async def test_of_starts_at_once_that_expect_the_same_head_one_is_made_and_its_repeats_find_it(
    store: Store, clock: ManualClock, way: v1.StartRun.OnBusy.ValueType
) -> None:
    async with house(store, clock, Model()) as rooms:
        key = await session_for(rooms, way)
        head, runs = len(await rooms.log(key)), ("a", "b", "a", "b", "a", "b")
        starts = (rooms.start(key, "hold", run, on_busy=way, if_last_sequence=head) for run in runs)
        made = await asyncio.gather(*starts, return_exceptions=True)
        names = {one.run.name for one in made if isinstance(one, Started)}
        lost = {reason_name(one.reason) for one in made if isinstance(one, NotecaseError)}
        assert (1, 3) == (len(names), sum(isinstance(one, Started) for one in made))
        assert {"SEQUENCE_MISMATCH"} == lost


@pytest.mark.parametrize("way", [v1.StartRun.ON_BUSY_REJECT, QUEUE, INTERRUPT, ROLLBACK])
async def test_repeats_of_a_command_at_once_find_its_run_although_the_log_has_grown(
    store: Store, clock: ManualClock, way: v1.StartRun.OnBusy.ValueType
) -> None:
    async with house(store, clock, Model()) as rooms:
        key = await session_for(rooms, way)
        said = [v1.Message(parts=[v1.Part(text="hold")])]
        head = len(await rooms.log(key))
        start = v1.StartRun(session=f"sessions/{key.session}", messages=said, on_busy=way, if_last_sequence=head)
        caused = Caused("c", None, CommandId("c", b"digest"))
        made = await asyncio.gather(*(rooms.runs.admission.start(TENANT, start, caused) for _ in range(3)))
        assert 1 == len({one.run.name for one in made})


async def test_a_stop_refuses_starts(store: Store, clock: ManualClock) -> None:
    async with house(store, clock, Model()) as rooms:
        (key,) = await rooms.prepare()
        await rooms.runs.roster.drain(0)
        with refused("SERVER_DRAINING"):
            await rooms.start(key, "hi")
        assert [] == await rooms.log(key)


async def test_a_repeat_during_the_deletion_of_its_session_gets_that_error(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known as a repeat, and its run is gone before it is read."""
    async with house(store, clock, Model()) as rooms:
        (key,) = await rooms.prepare()
        start = v1.StartRun(session="sessions/s", messages=[v1.Message(parts=[v1.Part(text="hi")])])
        caused = Caused("c", None, CommandId("c", b"digest"))
        made = await rooms.runs.admission.start(TENANT, start, caused)
        await rooms.ended(key, made.run.name)
        assert (await rooms.runs.admission.start(TENANT, start, caused)).existing
        read = store.get_run

        async def late(key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
            await rooms.sessions.delete(key)
            return await read(key, run)

        monkeypatch.setattr(store, "get_run", late)
        with refused("SESSION_NOT_FOUND"):
            await rooms.runs.admission.start(TENANT, start, caused)

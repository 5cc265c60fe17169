"""Work that no caller waits for: after a failure it is retried until it is done, or the log has the failure."""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from notecase import v1
from notecase_server import errors
from notecase_server.engine import timers, upkeep
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Call, Delta, Finish, ModelRequest, Text
from notecase_server.rpc.watch import Pace
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import Clock, Commit, Store
from notecase_server.store.fold import ENDED
from structlog.testing import capture_logs

from tests.e2e.driving import detail_of, log_of, reason_of, said
from tests.store.build import ManualClock
from tests.support.failing import Failing, Fault, Mode
from tests.support.server import Running, running

QUEUE = v1.StartRun.ON_BUSY_QUEUE
SUCCEEDED, FAILED, CANCELLED = v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED, v1.Run.STATE_CANCELLED
RUNNING, WAITING = v1.Run.STATE_RUNNING, v1.Run.STATE_WAITING

SECONDS = 60.0
"""A test that waits for longer has failed."""


class Model:
    """Calls the tools that the last message names, holds its reply for "hold" until `let` is set, and says something
    otherwise."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.arrived = asyncio.Semaphore(0)
        self.at_work = 0
        self.most = 0
        self.order: list[str] = []

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        last = request.messages[-1]
        text = "".join(part.text for part in last.parts)
        self.order.append(text)
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        self.arrived.release()
        try:
            if text.startswith("hold"):
                await self.let.wait()
            if text.startswith("odd"):
                raise asyncio.CancelledError
            if last.role == v1.Message.ROLE_USER and {*text.split()} <= {tool.name for tool in request.tools}:
                for number, name in enumerate(text.split()):
                    yield Call(number, name, "{}")
            yield Text("Done.")
            yield Finish("stop", v1.Usage())
        finally:
            self.at_work -= 1

    async def close(self) -> None:
        pass


TOOLS = (
    v1.Tool(name="look", client=v1.ClientTool()),
    v1.Tool(name="late", client=v1.ClientTool(), timeout=Duration(seconds=3600)),
    v1.Tool(name="ask", client=v1.ClientTool(), requires_approval=True),
)


async def prepared(served: Running, *sessions: str) -> None:
    agent = v1.Agent(llm=v1.LlmAgent(tools=TOOLS))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=agent))
    for session in sessions or ("s",):
        request = v1.CreateSessionRequest(session_id=session, session=v1.Session(agent="agents/a"))
        await served.sessions.CreateSession(request)


async def start(served: Running, text: str, run_id: str, session: str = "s", **fields: Any) -> v1.Run:
    begun = v1.StartRun(session=f"sessions/{session}", run_id=run_id, messages=[said(text)], **fields)
    return await served.runs.CreateRun(v1.CreateRunRequest(start=begun))


async def rests(served: Running, run: str, session: str = "s", after: int = 0) -> v1.Run:
    """The run once it waits or has ended. A call that the store refuses is made again."""
    wait = v1.WaitRunRequest(name=f"sessions/{session}/runs/{run}", after_sequence=after)
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                found = await served.runs.WaitRun(wait)
            except grpc.aio.AioRpcError as error:
                assert reason_of(error) == "STORE_UNAVAILABLE", error
            else:
                if found.state in ENDED or found.state == WAITING:
                    return found


async def ended(served: Running, run: str, session: str = "s") -> v1.Run:
    found = await rests(served, run, session)
    while found.state not in ENDED:
        found = await rests(served, run, session, found.last_sequence)
    return found


# What is put off. Each goes up to the moment from which a store may fail, arms the failure, and lets time or the queue
# do the rest; it returns how the runs are to end.


@dataclass
class Scene:
    served: Running
    model: Model
    clock: ManualClock
    arm: Callable[[], None]


async def queued_start(scene: Scene) -> Mapping[str, int]:
    await start(scene.served, "hold", "one")
    await scene.model.arrived.acquire()
    await start(scene.served, "hi", "two", on_busy=QUEUE)
    scene.arm()
    scene.model.let.set()
    return {"one": SUCCEEDED, "two": SUCCEEDED}


async def input_timeout(scene: Scene) -> Mapping[str, int]:
    await start(scene.served, "ask", "one", limits=v1.Limits(input_timeout=Duration(seconds=3600)))
    await rests(scene.served, "one")
    scene.arm()
    scene.clock.now += 3_600_000_000
    return {"one": SUCCEEDED}


async def tool_timeout(scene: Scene) -> Mapping[str, int]:
    await start(scene.served, "late", "one")
    await rests(scene.served, "one")
    scene.arm()
    scene.clock.now += 3_600_000_000
    return {"one": SUCCEEDED}


async def denial(scene: Scene) -> Mapping[str, int]:
    """A message waits for the result of one call, and then takes the place of the other one's approval."""
    await start(scene.served, "look ask", "one")
    waits = await rests(scene.served, "one")
    more = v1.RunRequest(input=v1.UserInput(messages=[said("Rather not.")]))
    await scene.served.runs.SendCommand(v1.SendCommandRequest(session="sessions/s", command=more))
    scene.arm()
    result = v1.RunRequest(tool_result=v1.ToolResult(call_id=waits.pending_calls[0].call_id))
    await scene.served.runs.SendCommand(v1.SendCommandRequest(session="sessions/s", command=result))
    return {"one": SUCCEEDED}


async def cancel_after(scene: Scene) -> Mapping[str, int]:
    """The only stream goes away."""
    watch = v1.WatchEventsRequest(name="sessions/s", options=v1.WatchOptions(keep_open=True))
    stream = scene.served.runs.WatchEvents(watch)
    await stream.read()
    await start(scene.served, "look", "one", disconnect=v1.Disconnect(cancel_after=Duration(nanos=1_000_000)))
    await rests(scene.served, "one")
    scene.arm()
    stream.cancel()
    return {"one": CANCELLED}


Putting = Callable[[Scene], Awaitable[Mapping[str, int]]]

WRITES = [
    (Fault("commit", Mode.PASSING),),
    (Fault("commit", Mode.AFTER),),
    (Fault("commit", Mode.AFTER), Fault("find_commit", Mode.PASSING)),
]
READS: Mapping[Putting, Sequence[str]] = {
    queued_start: ("get_session", "active_run", "read_events"),
    input_timeout: ("get_session", "active_run", "list_messages"),
    tool_timeout: ("get_session", "active_run", "list_messages"),
    denial: ("get_session", "active_run", "list_messages", "read_events"),
    cancel_after: ("get_session", "active_run", "list_messages", "get_run"),
}


def unasked(*_: object, **__: object) -> bool:
    """Counts what is done behind no call of a client."""
    return "method" not in structlog.contextvars.get_contextvars()


def by_the_queue(*_: object, **__: object) -> bool:
    """Counts what the duty does that starts queued runs, and not the run before."""
    task = asyncio.current_task()
    return task is not None and task.get_name() == "start"


async def store_with(faults: Sequence[Fault], counts: Callable[..., bool], url: str, clock: Clock = now) -> Store:
    """A store with each of these faults, once."""
    store = await open_store(url, clock)
    for fault in faults:
        store = Failing(store, *fault, counts=counts).store
    return store


def named(case: object) -> str:
    return " and ".join(map(str, case)) if isinstance(case, tuple) else getattr(case, "__name__", "")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upkeep and timers look often."""
    monkeypatch.setattr(upkeep, "REPAIR_SECONDS", 0.05)
    monkeypatch.setattr(timers, "LOOK_SECONDS", 0.02)


class Talking(Model):
    """Writes a line to the log for each request, as a provider without knowledge of runs may."""

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        structlog.get_logger().info("model_asked")
        async with aclosing(super().stream(request)) as deltas:
            async for delta in deltas:
                yield delta


async def test_the_lines_of_a_run_have_its_own_ids_and_none_of_a_call(store_url: str) -> None:
    """Whatever started it: a call, the end of the run before it in the queue, or the answer to a call of the model."""
    model = Talking()
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with running(store_url, {"model": model}) as served:
            await prepared(served)
            await start(served, "hold", "one")
            await model.arrived.acquire()
            for run_id in ("two", "three"):
                await start(served, "look", run_id, on_busy=QUEUE)
            model.let.set()
            for run_id in ("two", "three"):
                waiting = await rests(served, run_id)
                result = v1.ToolResult(call_id=waiting.pending_calls[0].call_id, result=[v1.Part(text="Seen.")])
                command = v1.RunRequest(command_id=run_id, tool_result=result)
                await served.runs.SendCommand(v1.SendCommandRequest(session="sessions/s", command=command))
                await ended(served, run_id)
    asked, finished = ([line for line in lines if line["event"] == event] for event in ("model_asked", "run_finished"))
    assert ["one", "two", "two", "three", "three"] == [line.get("run") for line in asked]
    assert ["one", "two", "three"] == [line["run"] for line in finished]
    assert {"s"} == {line["session"] for line in (*asked, *finished)}
    assert [] == [line for line in (*asked, *finished) if line.keys() & {"request_id", "method", "peer"}]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("putting", "faults"),
    [
        (putting, faults)
        for putting, reads in READS.items()
        for faults in (*WRITES, *((Fault(method, Mode.PASSING),) for method in reads))
    ],
    ids=named,
)
async def test_what_is_put_off_outlives_a_store_that_fails_once(putting: Putting, faults: Sequence[Fault]) -> None:
    armed, model, clock = asyncio.Event(), Model(), ManualClock()
    mine = by_the_queue if putting is queued_start else unasked
    store = await store_with(faults, lambda *_, **__: armed.is_set() and mine(), "memory:", clock)
    async with running(store, {"model": model}, grace=0.2, clock=clock) as served:
        await prepared(served)
        ends = await putting(Scene(served, model, clock, armed.set))
        assert ends == {run: (await ended(served, run)).state for run in ends}


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    "faults",
    [
        *WRITES,
        *((Fault("claim", mode),) for mode in (Mode.PASSING, Mode.AFTER)),
        *((Fault(name, Mode.PASSING),) for name in ("active_runs", "get_session", "active_run")),
        *((Fault(name, Mode.PASSING),) for name in ("list_messages", "read_events")),
    ],
    ids=named,
)
async def test_a_takeover_outlives_a_store_that_fails_once(tmp_path: Path, faults: Sequence[Fault]) -> None:
    url = f"sqlite:{tmp_path / 'n.db'}"
    before = Model()
    async with running(url, {"model": before}, grace=0.1) as served:
        await prepared(served, "s", "t")
        await start(served, "hold", "one")
        await start(served, "hi", "two", on_busy=QUEUE)
        await start(served, "hold", "one", "t")
        for _ in range(2):
            await before.arrived.acquire()
    after = Model()
    after.let.set()
    async with running(await store_with(faults, unasked, url), {"model": after}) as served:
        for session, run in (("s", "one"), ("s", "two"), ("t", "one")):
            assert SUCCEEDED == (await ended(served, run, session)).state


# Permanent refusals.


def starts(run: str) -> Callable[[Commit], bool]:
    return lambda commit: any(event.HasField("run_started") and event.run == run for event in commit.events)


@pytest.mark.parametrize("refuse", [lambda: errors.not_found("blob", "blobs/gone"), lambda: errors.invalid([])])
async def test_a_queued_start_that_is_permanently_refused_fails_and_the_next_one_follows(
    refuse: Callable[[], NotecaseError],
) -> None:
    model = Model()
    inner = await open_store("memory:", now)
    failing = Failing(inner, "commit", Mode.FOR_GOOD, times=None, refuse=refuse, counts=starts("two"))
    async with running(failing.store, {"model": model}) as served:
        await prepared(served)
        await start(served, "hold", "one")
        await start(served, "never", "two", on_busy=QUEUE)
        await start(served, "hi", "three", on_busy=QUEUE)
        model.let.set()
        assert SUCCEEDED == (await ended(served, "one")).state
        two = await ended(served, "two")
        assert (FAILED, refuse().reason) == (two.state, two.error.reason)
        assert SUCCEEDED == (await ended(served, "three")).state
    assert ["hold", "hi"] == model.order


async def test_a_queued_start_that_breaks_the_server_fails_and_the_next_has_its_turn() -> None:
    """An exception that is no refusal, each time."""
    model = Model()
    inner = await open_store("memory:", now)
    failing = Failing(inner, "commit", Mode.FOR_GOOD, times=None, refuse=RuntimeError, counts=starts("two"))
    async with running(failing.store, {"model": model}) as served:
        await prepared(served)
        await start(served, "hold", "one")
        await start(served, "never", "two", on_busy=QUEUE)
        await start(served, "hi", "three", on_busy=QUEUE)
        model.let.set()
        two = await ended(served, "two")
        assert (FAILED, v1.ERROR_REASON_INTERNAL) == (two.state, two.error.reason)
        assert SUCCEEDED == (await ended(served, "three")).state


async def test_a_poisoned_queue_that_a_start_of_the_server_finds_is_repaired(tmp_path: Path) -> None:
    """Its commit is refused permanently from then on, so the queued start can never begin."""
    url = f"sqlite:{tmp_path / 'n.db'}"
    before = Model()
    async with running(url, {"model": before}, grace=0.1) as served:
        await prepared(served)
        await start(served, "hold", "one")
        await start(served, "never", "two", on_busy=QUEUE)
        await start(served, "hi", "three", on_busy=QUEUE)
        await before.arrived.acquire()
    after = Model()
    after.let.set()
    inner = await open_store(url, now)
    failing = Failing(inner, "commit", Mode.FOR_GOOD, times=None, counts=starts("two"))
    async with running(failing.store, {"model": after}) as served:
        found = {run: (await ended(served, run)).state for run in ("one", "two", "three")}
    assert found == {"one": SUCCEEDED, "two": FAILED, "three": SUCCEEDED}


async def test_a_cancelled_first_start_does_not_fail_the_one_behind_it() -> None:
    """The cancel comes at the moment at which its start is refused, and finds that it has failed."""
    model = Model()
    inner = await open_store("memory:", now)
    failing = Failing(inner, "commit", Mode.FOR_GOOD, counts=starts("two"))
    async with running(failing.store, {"model": model}) as served:
        await prepared(served)
        await start(served, "hold", "one")
        await start(served, "never", "two", on_busy=QUEUE)
        await start(served, "hi", "three", on_busy=QUEUE)
        model.let.set()
        await failing.failed.wait()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.CancelRun(v1.CancelRunRequest(name="sessions/s/runs/two"))
        assert "RUN_ENDED" == reason_of(refused.value)
        assert SUCCEEDED == (await ended(served, "three")).state
        assert FAILED == (await ended(served, "two")).state


# Workers that are lost.


def ends_a_run(commit: Commit) -> bool:
    return any(event.run_state_changed.state in ENDED for event in commit.events)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("away", [(), ("idle_runs",), ("claim",)], ids=named)
async def test_a_worker_whose_end_is_refused_is_given_another_one(away: Sequence[str]) -> None:
    """Also when the store is away as it is looked for, or as the other one begins."""
    model = Model()
    inner = await store_with(
        [Fault(method, Mode.PASSING) for method in away], lambda *_, **__: refusing.calls > 0, "memory:"
    )
    refusing = Failing(inner, "commit", Mode.FOR_GOOD, times=2, counts=ends_a_run)
    async with running(refusing.store, {"model": model}) as served:
        await prepared(served)
        await start(served, "hi", "one")
        one = await ended(served, "one")
    assert (SUCCEEDED, 2) == (one.state, one.attempt)


async def test_a_run_whose_worker_breaks_is_left_until_the_next_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that breaks each time would otherwise be tried without a pause."""
    monkeypatch.setattr(upkeep, "REPAIR_SECONDS", 3600.0)
    model = Model()
    inner = await open_store("memory:", now)
    failing = Failing(
        inner, "commit", Mode.FOR_GOOD, times=2, counts=lambda commit: commit.key.session == "s" and ends_a_run(commit)
    )
    async with running(failing.store, {"model": model}, grace=0.1) as served:
        await prepared(served, "s", "t")
        await start(served, "hi", "one")
        await failing.failed.wait()
        assert SUCCEEDED == (await ended_after(served, "other", "t")).state
        assert 2 == failing.calls
        assert RUNNING == (await served.runs.GetRun(v1.GetRunRequest(name="sessions/s/runs/one"))).state


async def ended_after(served: Running, run: str, session: str) -> v1.Run:
    await start(served, "hi", run, session)
    return await ended(served, run, session)


async def test_a_cancellation_without_a_request_fails_the_run() -> None:
    """The provider raises it; and a command in which it is raised is answered."""
    model = Model()
    inner = await open_store("memory:", now)
    failing = Failing(
        inner, "list_messages", Mode.FOR_GOOD, refuse=asyncio.CancelledError, counts=lambda *_, **__: armed
    )
    armed = False
    async with running(failing.store, {"model": model}, grace=0.1) as served:
        await prepared(served)
        await start(served, "odd", "one")
        one = await ended(served, "one")
        assert (FAILED, v1.ERROR_REASON_MODEL_UNAVAILABLE) == (one.state, one.error.reason)
        await start(served, "look", "two")
        await rests(served, "two")
        armed = True
        result = v1.ToolResult(call_id=(await rests(served, "two")).pending_calls[0].call_id)
        command = v1.RunRequest(tool_result=result)
        given = v1.SendCommandRequest(session="sessions/s", command=command)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.SendCommand(given)
        assert reason_of(refused.value) == "INTERNAL"
        await served.runs.SendCommand(given)
        assert SUCCEEDED == (await ended(served, "two")).state


# Damage.


async def test_one_damaged_session_of_a_hundred_does_not_stop_the_others(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path / 'n.db'}"
    before = Model()
    names = [f"s{number}" for number in range(100)]
    async with running(url, {"model": before}, grace=0.1, max_runs=200) as served:
        await prepared(served, *names)
        for name in names:
            await start(served, "hold", "one", name)
        for _ in names:
            await before.arrived.acquire()
    with sqlite3.connect(tmp_path / "n.db") as connection:
        uid = connection.execute("SELECT uid FROM sessions WHERE session = 's7'").fetchone()[0]
        connection.execute("UPDATE logs SET body = x'ff' WHERE uid = ? AND epoch IS NOT NULL", (uid,))
        uid = connection.execute("SELECT uid FROM sessions WHERE session = 's8'").fetchone()[0]
        connection.execute("UPDATE runs SET body = x'ff' WHERE uid = ?", (uid,))
    connection.close()
    after = Model()
    after.let.set()
    async with running(url, {"model": after}, grace=0.1, max_runs=200) as served:
        for name in names:
            if name not in {"s7", "s8"}:
                assert SUCCEEDED == (await ended(served, "one", name)).state
        for name, reason in (("s7", "STORE_UNAVAILABLE"), ("s8", "RUN_ACTIVE")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await start(served, "hi", "two", name)
            assert reason == reason_of(refused.value)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.GetRun(v1.GetRunRequest(name="sessions/s8/runs/one"))
        assert reason_of(refused.value) == "STORE_UNAVAILABLE"
        await served.info.GetServerInfo(v1.GetServerInfoRequest())
        assert not served.server.broken.is_set()


# Places.


async def test_no_more_runs_are_at_work_than_there_are_places_however_they_came_to_it(tmp_path: Path) -> None:
    """Runs that were taken over, starts that were queued, and runs that have waited for their caller."""
    url = f"sqlite:{tmp_path / 'n.db'}"
    before = Model()
    held, waiting = ["h1", "h2", "h3", "h4"], ["w1", "w2", "w3"]
    async with running(url, {"model": before}, grace=0.1) as served:
        await prepared(served, *held, *waiting, "idle")
        for name in held:
            await start(served, "hold", "one", name)
            await start(served, "hi", "two", name, on_busy=QUEUE)
        for name in waiting:
            await start(served, "look", "one", name)
            await rests(served, "one", name)
        for _ in (*held, *waiting):
            await before.arrived.acquire()
    after = Model()
    async with running(url, {"model": after}, max_runs=2) as served:
        for _ in range(2):
            await after.arrived.acquire()
        for name in waiting:
            call = (await rests(served, "one", name)).pending_calls[0]
            command = v1.RunRequest(tool_result=v1.ToolResult(call_id=call.call_id))
            await served.runs.SendCommand(v1.SendCommandRequest(session=f"sessions/{name}", command=command))
        for name, reason in (("w1", "RUN_ACTIVE"), ("idle", "RATE_LIMITED")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await start(served, "hi", "new", name, on_busy=v1.StartRun.ON_BUSY_REJECT)
            assert reason == reason_of(refused.value)
        after.let.set()
        runs = [*((name, "one") for name in held + waiting), *((name, "two") for name in held)]
        for name, run in runs:
            assert SUCCEEDED == (await ended(served, run, name)).state
    assert 2 == after.most


async def test_a_start_beyond_the_places_is_refused_and_nothing_of_it_is_kept() -> None:
    model = Model()
    async with running("memory:", {"model": model}, max_runs=1) as served:
        await prepared(served, "s", "t")
        await start(served, "hold", "one")
        new = v1.StartRun(new_session=v1.Session(name="sessions/u", agent="agents/a"), messages=[said("hi")])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.CreateRun(v1.CreateRunRequest(start=new))
        assert reason_of(refused.value) == "RATE_LIMITED"
        assert detail_of(refused.value, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        listed = await served.sessions.ListSessions(v1.ListSessionsRequest())
        assert {"sessions/s", "sessions/t"} == {session.name for session in listed.sessions}
        replaced = await start(served, "hi", "two", on_busy=v1.StartRun.ON_BUSY_INTERRUPT)
        assert SUCCEEDED == (await ended(served, "two")).state, replaced
        assert CANCELLED == (await ended(served, "one")).state


async def test_a_start_in_place_of_a_run_that_waits_is_refused_before_anything_is_sealed() -> None:
    model = Model()
    async with running("memory:", {"model": model}, max_runs=1, grace=0.1) as served:
        await prepared(served, "s", "t")
        await start(served, "look", "one")
        waits = await rests(served, "one")
        await start(served, "hold", "one", "t")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await start(served, "hi", "two", on_busy=v1.StartRun.ON_BUSY_INTERRUPT)
        assert reason_of(refused.value) == "RATE_LIMITED"
        assert waits == await rests(served, "one")


async def test_waiting_for_a_slot_does_not_count_as_running() -> None:
    """Neither for running_duration nor for Limits.timeout, by a clock that moves only meanwhile."""
    time, model = ManualClock(), Model()
    async with running("memory:", {"model": model}, max_runs=1, clock=time) as served:
        await prepared(served, "s", "t")
        await start(served, "look", "one", limits=v1.Limits(timeout=Duration(seconds=30)))
        waits = await rests(served, "one")
        await start(served, "hold", "one", "t")
        command = v1.RunRequest(tool_result=v1.ToolResult(call_id=waits.pending_calls[0].call_id))
        await served.runs.SendCommand(v1.SendCommandRequest(session="sessions/s", command=command))
        assert RUNNING == (await served.runs.GetRun(v1.GetRunRequest(name="sessions/s/runs/one"))).state
        time.now += 3_600_000_000
        model.let.set()
        one = await ended(served, "one")
        assert SUCCEEDED == one.state
        assert one.running_duration.ToMicroseconds() < 1_000_000
        told = [event.run_state_changed.place_wait.ToSeconds() for event in await log_of(served, "sessions/s")]
        assert 3600 == max(told)


async def test_a_halt_of_a_run_that_waits_for_its_place_is_carried_out_at_once() -> None:
    model = Model()
    async with running("memory:", {"model": model}, max_runs=1) as served:
        await prepared(served, "s", "t")
        await start(served, "look", "one")
        waits = await rests(served, "one")
        await start(served, "hold", "one", "t")
        command = v1.RunRequest(tool_result=v1.ToolResult(call_id=waits.pending_calls[0].call_id))
        await served.runs.SendCommand(v1.SendCommandRequest(session="sessions/s", command=command))
        run = await served.runs.CancelRun(v1.CancelRunRequest(name="sessions/s/runs/one"))
        assert CANCELLED == run.state
        model.let.set()
        assert SUCCEEDED == (await ended(served, "one", "t")).state
        assert SUCCEEDED == (await ended_after(served, "two", "s")).state, "its turn was given up"


async def test_places_come_back_from_sessions_that_are_deleted() -> None:
    """At any moment of their runs: the place of each is free afterwards."""
    model = Model()
    async with running("memory:", {"model": model}, max_runs=2) as served:
        for number in range(12):
            await prepared_session(served, f"d{number}") if number else await prepared(served, "d0")
            await start(served, "hold", "one", f"d{number}")
            if number % 3:
                await model.arrived.acquire()
            await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=f"sessions/d{number}"))
        await prepared_session(served, "s")
        assert SUCCEEDED == (await ended_after(served, "one", "s")).state


async def prepared_session(served: Running, session: str) -> None:
    request = v1.CreateSessionRequest(session_id=session, session=v1.Session(agent="agents/a"))
    await served.sessions.CreateSession(request)


async def test_waits_for_a_run_end_at_once_when_its_session_is_deleted() -> None:
    model = Model()
    async with running("memory:", {"model": model}, pace=Pace(poll=3600.0)) as served:
        await prepared(served)
        await start(served, "hold", "one")
        await model.arrived.acquire()
        waiting = asyncio.ensure_future(served.runs.WaitRun(v1.WaitRunRequest(name="sessions/s/runs/one")))
        await served.runs.GetRun(v1.GetRunRequest(name="sessions/s/runs/one"))
        await served.sessions.DeleteSession(v1.DeleteSessionRequest(name="sessions/s"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asyncio.wait_for(waiting, SECONDS)
        assert "SESSION_NOT_FOUND" == reason_of(refused.value)

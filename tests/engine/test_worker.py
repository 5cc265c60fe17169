"""A worker: it goes on from the rows, and its run has worked only while it had a place."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterable, Sequence

import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import v1
from notecase_server.engine.caused import Caused
from notecase_server.engine.opening import opening
from notecase_server.engine.schema import Schemas, value_of
from notecase_server.models.contract import Delta, Finish, ModelRequest, Text
from notecase_server.store.contract import Commit, RunRecord, SessionKey, Store
from notecase_server.tools.clock import Stopwatch
from notecase_server.tools.contract import Function, Outcome
from notecase_server.tools.functions import tool

from tests.engine.rooms import TENANT, House, Model, client_tool, house, kinds, new_id, server_tool
from tests.store.build import ManualClock

RUNNING, SUCCEEDED, CANCELLED = v1.Run.STATE_RUNNING, v1.Run.STATE_SUCCEEDED, v1.Run.STATE_CANCELLED
HOUR = 3_600_000_000
TIGHT = v1.Limits(timeout=Duration(seconds=30))

begun: list[asyncio.Event] = []


@tool
async def stay() -> str:
    """Stays once, and then goes at once."""
    if not begun[0].is_set():
        begun[0].set()
        await asyncio.Event().wait()
    return "gone"


async def waits_for_a_place(rooms: House, model: Model) -> tuple[SessionKey, SessionKey]:
    """A run that its caller's result has made RUNNING, while another session's run has the only place."""
    mine, other = await rooms.prepare("s", "t", tools=[client_tool("look")])
    await rooms.start(mine, "call look", limits=TIGHT)
    (call,) = (await rooms.rests(mine)).pending_calls
    await rooms.start(other, "hold")
    await rooms.runs.commands.tool_result(mine, "r", v1.ToolResult(call_id=call.call_id), Caused())
    row = await rooms.store.get_run(mine, "r")
    assert row is not None
    assert RUNNING == row[0].state
    return mine, other


async def say(rooms: House, key: SessionKey) -> None:
    said = v1.UserInput(messages=[v1.Message(parts=[v1.Part(text="Quick")])])
    await rooms.runs.commands.say(key, "r", said, Caused("said"), v1.Tool.APPROVER_ADMIN)


async def waited(rooms: House, key: SessionKey) -> int:
    """Microseconds that the log counts as waiting for a place."""
    return sum(event.run_state_changed.place_wait.ToMicroseconds() for event in await rooms.log(key))


async def test_a_wait_for_a_place_is_counted_whole_though_the_worker_is_lost(store: Store, clock: ManualClock) -> None:
    model = Model()
    async with asyncio.timeout(60), house(store, clock, model, max_runs=1) as rooms:
        mine, _ = await waits_for_a_place(rooms, model)
        clock.now += HOUR
        lost = [entry.task for entry in rooms.runs.roster if entry.worker.log.live.key == mine]
        for task in lost:
            task.cancel()
        await asyncio.wait(lost)
        await rooms.runs.upkeep.repair()
        clock.now += HOUR
        model.let.set()
        run = await rooms.ended(mine)
        assert (SUCCEEDED, 2, 0) == (run.state, run.attempt, run.running_duration.ToMicroseconds())
        assert 2 * HOUR == await waited(rooms, mine)


async def test_a_wait_for_a_place_is_counted_whole_though_the_process_is_another(
    store: Store, clock: ManualClock
) -> None:
    """Also when a user says something meanwhile, which is no work."""
    model = Model()
    async with asyncio.timeout(60):
        async with house(store, clock, model, max_runs=1) as rooms:
            mine, _ = await waits_for_a_place(rooms, model)
            clock.now += HOUR
            await say(rooms, mine)
            clock.now += HOUR
        model.let.set()
        async with house(store, clock, model, max_runs=1) as rooms:
            assert 2 == await rooms.runs.upkeep.take_over()
            run = await rooms.ended(mine)
            assert (SUCCEEDED, 0) == (run.state, run.running_duration.ToMicroseconds())
            assert 2 * HOUR == await waited(rooms, mine)


async def test_a_run_that_is_cancelled_while_it_waits_for_a_place_has_not_worked(
    store: Store, clock: ManualClock
) -> None:
    model = Model()
    async with asyncio.timeout(60), house(store, clock, model, max_runs=1) as rooms:
        mine, _ = await waits_for_a_place(rooms, model)
        clock.now += HOUR
        await rooms.runs.commands.cancel(mine, "r", v1.CancelCommand())
        run = await rooms.ended(mine)
        assert (CANCELLED, 0) == (run.state, run.running_duration.ToMicroseconds())


async def test_work_up_to_the_last_commit_counts_though_the_worker_is_lost(store: Store, clock: ManualClock) -> None:
    """Work after it is lost, and does not count, like the time until the takeover."""
    begun[:] = [asyncio.Event()]
    model = Model()
    stays = server_tool("stay", on_interrupt=v1.Tool.ON_INTERRUPT_RETRY)
    async with asyncio.timeout(60):
        async with house(store, clock, model, tools=[__name__]) as rooms:
            (key,) = await rooms.prepare(tools=[stays, client_tool("look")])
            await rooms.start(key, "hold")
            await model.arrived.acquire()
            clock.now += HOUR
            message = v1.Message(parts=[v1.Part(text="call stay")])
            said = v1.UserInput(messages=[message], when=v1.UserInput.WHEN_FOLLOW_UP)
            await rooms.runs.commands.say(key, "r", said, Caused("said"), v1.Tool.APPROVER_ADMIN)
            model.let.set()
            await begun[0].wait()
            clock.now += HOUR
        async with house(store, clock, model, tools=[__name__]) as rooms:
            await rooms.runs.upkeep.take_over()
            run = await rooms.ended(key)
            assert (SUCCEEDED, 2, HOUR) == (run.state, run.attempt, run.running_duration.ToMicroseconds())


async def test_a_jump_of_the_clock_does_not_count_as_work(store: Store, clock: ManualClock) -> None:
    """As when the machine was suspended while a model answered: the run waits next, and is then within its limit."""
    model = Model()
    async with asyncio.timeout(60), house(store, clock, model) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool("look")])
        await rooms.start(key, "hold", limits=TIGHT)
        await model.arrived.acquire()
        message = v1.Message(parts=[v1.Part(text="call look")])
        said = v1.UserInput(messages=[message], when=v1.UserInput.WHEN_FOLLOW_UP)
        await rooms.runs.commands.say(key, "r", said, Caused("said"), v1.Tool.APPROVER_ADMIN)
        clock.now += HOUR
        model.let.set()
        (call,) = (await rooms.rests(key)).pending_calls
        await rooms.runs.commands.tool_result(key, "r", v1.ToolResult(call_id=call.call_id), Caused())
        run = await rooms.ended(key)
        assert (SUCCEEDED, True) == (run.state, run.running_duration.ToMicroseconds() < HOUR / 100)


async def test_suspects_are_at_work_one_at_a_time_and_do_not_count_the_wait(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they keep others from their places meanwhile."""
    monkeypatch.setattr(Stopwatch, "jumped", 0)  # an hour of this clock is an hour of work
    model = Model()
    async with asyncio.timeout(60), house(store, clock, model, max_runs=2) as rooms:
        keys = await rooms.prepare("s", "t", "u")
        agent = await store.get_agent(TENANT, "clerk")
        assert agent is not None
        start = v1.StartRun(messages=[v1.Message(parts=[v1.Part(text="hold")])], limits=TIGHT)
        for key in keys[:2]:
            events = opening(start, "", agent, "r", "", new_id)
            await store.commit(Commit(key=key, claim=True, events=events, start=RunRecord(b"digest", agent), deaths=1))
        clock.now += HOUR
        await rooms.runs.upkeep.take_over()
        await model.arrived.acquire()
        clock.now += HOUR
        await rooms.start(keys[2], "hi")
        assert SUCCEEDED == (await rooms.ended(keys[2])).state
        assert ["hold", "hi"] == model.asked
        model.let.set()
        runs = [await rooms.ended(key) for key in keys[:2]]
        assert [SUCCEEDED] * 2 == [run.state for run in runs]
        assert [0, HOUR] == sorted(run.running_duration.ToMicroseconds() for run in runs)


async def test_a_run_that_cannot_go_on_says_so_in_its_log(store: Store, clock: ManualClock) -> None:
    """The agent's model is not one that this server has."""
    async with house(store, clock, Model()) as rooms:
        (key,) = await rooms.prepare(provider="elsewhere")
        await rooms.start(key, "hi")
        run = await rooms.ended(key)
        assert (v1.Run.STATE_FAILED, v1.ERROR_REASON_MODEL_ERROR) == (run.state, run.error.reason)
        assert "run_state_changed" == kinds(await rooms.log(key))[-1]


async def test_a_cancel_cuts_the_wait_for_mcp_servers_which_are_asked_at_the_same_time(
    store: Store, clock: ManualClock
) -> None:
    asked = asyncio.Semaphore(0)

    class Mute:
        """Has servers that take connections and never say anything."""

        functions: Sequence[str] = ()
        mcp_servers: Sequence[str] = ()

        def changes(self, servers: Iterable[str]) -> int:
            return 0

        async def resolve(self, tool: v1.Tool) -> Sequence[Function]:
            asked.release()
            await asyncio.Event().wait()
            raise AssertionError(tool)

        async def call(self, binding: v1.ToolBinding, arguments: object, context: object) -> Outcome:
            raise AssertionError(binding)

        async def close(self) -> None:
            pass

    async with asyncio.timeout(60), house(store, clock, Model(), toolbox=Mute()) as rooms:
        tools = [v1.Tool(name=name, mcp=v1.McpTool(server=name)) for name in ("one", "two")]
        (key,) = await rooms.prepare(tools=tools)
        await rooms.start(key, "Go")
        await asked.acquire()
        await asked.acquire()
        await rooms.runs.commands.cancel(key, "r", v1.CancelCommand())
        assert CANCELLED == (await rooms.ended(key)).state
        assert ["run_started", "message_added", "run_state_changed"] == kinds(await rooms.log(key))


async def test_a_cancel_cuts_the_check_of_a_reply_and_keeps_what_came(store: Store, clock: ManualClock) -> None:
    class Slow(Schemas):
        def __init__(self) -> None:
            super().__init__()
            self.asked = asyncio.Event()

        async def problem(self, schema: str, reply: str | None) -> str:
            self.asked.set()
            await asyncio.Event().wait()
            return schema

    slow = Slow()
    async with asyncio.timeout(60), house(store, clock, Model(), schemas=slow) as rooms:
        (key,) = await rooms.prepare(output_schema="{}")
        await rooms.start(key, "Go")
        await slow.asked.wait()
        await rooms.runs.commands.cancel(key, "r", v1.CancelCommand())
        assert CANCELLED == (await rooms.ended(key)).state
        added = [event.message_added for event in await rooms.log(key) if event.HasField("message_added")]
        assert v1.Message.STATUS_INCOMPLETE == added[-1].status
        assert "Done." == added[-1].parts[0].json


@pytest.mark.parametrize(("items", "state"), [(40_000, SUCCEEDED), (300_000, v1.Run.STATE_FAILED)])
async def test_a_large_note_is_made_in_a_thread_and_fails_the_run_where_a_state_cannot_hold_it(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, items: int, state: v1.Run.State.ValueType
) -> None:
    class Lists(Model):
        async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
            yield Text("[" + "1," * (items - 1) + "1]")
            yield Finish("stop", v1.Usage())

    class Content(Schemas):
        async def problem(self, schema: str, reply: str | None) -> str:
            return ""

    made_in = list[str]()

    def seen(reply: str) -> v1.Value:
        made_in.append(threading.current_thread().name)
        return value_of(reply)

    monkeypatch.setattr("notecase_server.engine.model_turn.value_of", seen)
    async with asyncio.timeout(60), house(store, clock, Lists(), schemas=Content()) as rooms:
        await store.create_agent(TENANT, "clerk", v1.Agent(llm=v1.LlmAgent(output_schema="{}"), output_key="k"))
        key = await rooms.make("s")
        await rooms.start(key, "Go")
        run = await rooms.ended(key)
        assert state == run.state
        assert (v1.ERROR_REASON_PAYLOAD_TOO_LARGE if items > 40_000 else 0) == run.error.reason
        entries = (await store.get_state(key.state, ["k"])).entries
        assert (0 if items > 40_000 else items) == len(entries["k"].value.list_value.values if entries else ())
        assert "MainThread" not in made_in
        assert made_in

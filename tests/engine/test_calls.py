"""Calls: side by side, each to one outcome with the state that it changed, and none left without an owner."""

import asyncio
from collections.abc import Sequence

import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import from_value, v1
from notecase_server import supervisor
from notecase_server.engine.calls import Calls
from notecase_server.engine.run_log import RunLog
from notecase_server.store.contract import Store
from notecase_server.tools.functions import CallContext, tool
from structlog.testing import capture_logs

from tests.engine.rooms import House, house, server_tool
from tests.store.build import ManualClock, put

SUCCEEDED, FAILED, CANCELLED = v1.ToolCall.OUTCOME_SUCCEEDED, v1.ToolCall.OUTCOME_FAILED, v1.ToolCall.OUTCOME_CANCELLED

MOMENT = Duration(nanos=1_000_000)

doors: dict[str, asyncio.Event] = {}
seen: list[CallContext] = []


@pytest.fixture(autouse=True)
def _doors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "doors", {name: asyncio.Event() for name in ("in", "out")})
    monkeypatch.setitem(globals(), "seen", [])


@tool
async def meet(context: CallContext) -> str:
    """Waits until two are there."""
    seen.append(context)
    if len(seen) == 2:
        doors["in"].set()
    await doors["in"].wait()
    context.increment("met")
    return "met"


@tool
async def misuse(context: CallContext) -> str:
    """Increments a value that is not a number."""
    context.increment("text")
    return "done"


@tool
async def interrupt() -> str:
    raise KeyboardInterrupt


@tool
async def cancel() -> str:
    raise asyncio.CancelledError


@tool
async def wait() -> str:
    doors["in"].set()
    await asyncio.Event().wait()
    return ""


@tool
async def cling(context: CallContext) -> str:
    """Does not stop when it is asked to, and is late."""
    doors["in"].set()
    while not doors["out"].is_set():
        try:
            await doors["out"].wait()
        except asyncio.CancelledError:
            continue
    context.put("late", True)
    return "too late"


TOOLS = [
    *(server_tool(name) for name in ("meet", "misuse", "interrupt", "cancel", "wait")),
    server_tool("cling", timeout=MOMENT),
]


async def at_work(rooms: House, *tools: str) -> tuple[RunLog, Calls, list[v1.ToolCall]]:
    """These tools called by a run, and begun."""
    (key,) = await rooms.prepare(tools=TOOLS)
    log = await rooms.run_log(key)
    called = await rooms.call(log, *tools)
    calls = Calls(log, asyncio.Event())
    calls.begin()
    return log, calls, called


async def done(calls: Calls) -> None:
    """Until each has its outcome on record."""
    while calls:
        await calls.wait()
        await calls.keep_finished()


async def outcomes(rooms: House, log: RunLog) -> list[tuple[str, v1.ToolCall.Outcome.ValueType, str]]:
    ended: Sequence[v1.Event] = await rooms.log(log.live.key)
    finished = [event.tool_finished for event in ended if event.HasField("tool_finished")]
    return sorted((call.tool, call.outcome, call.error) for call in finished)


async def test_calls_run_side_by_side_and_each_is_on_record_with_the_state_it_changed(
    store: Store, clock: ManualClock
) -> None:
    async with house(store, clock, tools=[__name__]) as rooms:
        log, calls, called = await at_work(rooms, "meet", "meet")
        calls.begin()  # what is at work is not begun again
        await done(calls)
        assert [("meet", SUCCEEDED, "")] * 2 == await outcomes(rooms, log)
        events = await rooms.log(log.live.key)
        changed = [event.sequence for event in events if event.HasField("state_changed")]
        assert changed == [event.sequence + 1 for event in events if event.HasField("tool_finished")]
        assert 2 == from_value((await store.get_state(log.live.key.state, ["met"])).entries["met"].value)
        assert {call.call_id for call in called} == {context.call_id for context in seen}
        assert not log.open


async def test_what_a_tool_raises_fails_its_call_and_nothing_else(store: Store, clock: ManualClock) -> None:
    """Also exceptions that would end a process or mean that the task was cancelled; and state operations that do not
    apply."""
    async with house(store, clock, tools=[__name__]) as rooms:
        (key,) = await rooms.prepare(tools=TOOLS)
        log = await rooms.run_log(key)
        await log.durably(lambda: [v1.Event(state_changed=v1.StateChanged(ops=[put("text", "x")]))])
        await rooms.call(log, "interrupt", "cancel", "misuse")
        calls = Calls(log, asyncio.Event())
        calls.begin()
        await done(calls)
        (broken, mixed, stopped) = await outcomes(rooms, log)
        assert ("cancel", FAILED, "The tool failed.") == broken
        assert ("interrupt", FAILED, "The tool failed.") == mixed
        assert ("misuse", FAILED) == stopped[:2]
        assert "text" in stopped[2]


async def test_a_call_that_was_given_another_end_keeps_it(store: Store, clock: ManualClock) -> None:
    async with house(store, clock, tools=[__name__]) as rooms:
        log, calls, (one, other) = await at_work(rooms, "meet", "meet")
        await doors["in"].wait()
        cancelled = v1.ToolCall(call_id=one.call_id, tool=one.tool, outcome=CANCELLED)
        await log.durably(lambda: [v1.Event(tool_finished=cancelled)])
        calls.stop(one.call_id)
        await done(calls)
        assert [("meet", SUCCEEDED, ""), ("meet", CANCELLED, "")] == await outcomes(rooms, log)
        assert 1 == from_value((await store.get_state(log.live.key.state, ["met"])).entries["met"].value), other


async def test_no_task_is_left_once_calls_are_closed(store: Store, clock: ManualClock) -> None:
    async with house(store, clock, tools=[__name__]) as rooms:
        before = asyncio.all_tasks()
        _, calls, _ = await at_work(rooms, "wait", "meet")
        await doors["in"].wait()
        await calls.close()
        assert before == asyncio.all_tasks()


async def test_a_tool_that_ignores_its_time_out_fails_and_is_left_behind(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is owned, named and counted, and what it comes to later counts for nothing."""
    monkeypatch.setattr(supervisor, "STUCK_SECONDS", 0.0)
    async with house(store, clock, tools=[__name__]) as rooms:
        with capture_logs() as lines:
            log, calls, _ = await at_work(rooms, "cling")
            await asyncio.wait_for(done(calls), 60)
            assert [("cling", FAILED, "The tool took longer than 0.001 seconds.")] == await outcomes(rooms, log)
            await calls.close()
            await rooms.supervisor.drain(3600.0)  # which waits no hour for what was left behind
        assert [("supervisor", "cling")] == [
            (line["owner"], line["task"]) for line in lines if line["event"] == "task_stuck"
        ]
        assert {"cling": 1} == rooms.supervisor.stuck
        left = {task for task in asyncio.all_tasks() if task.get_name() == "cling"}
        doors["out"].set()
        await asyncio.wait(left)
        assert {} == (await store.get_state(log.live.key.state, ["late"])).entries

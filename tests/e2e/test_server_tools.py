"""Tools that run in the server: what they change commits with their result, and whatever they do, the run goes on."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import pytest
import structlog
from google.protobuf.duration_pb2 import Duration
from notecase import v1
from notecase_server.models.openai import OpenAIProvider
from notecase_server.tools.functions import CallContext, ToolFailure, tool
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import durable, log_of, said
from tests.support.openai_server import OpenAIServer, reply, tool_calls
from tests.support.server import Running, running

FAILED, CANCELLED = v1.ToolCall.OUTCOME_FAILED, v1.ToolCall.OUTCOME_CANCELLED
SECRET = "the password is swordfish"


class Meeting:
    """Where the tools of one test come together."""

    def __init__(self) -> None:
        self.tasks = asyncio.Barrier(2)
        self.threads = threading.Barrier(2)
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.over = threading.Event()


meeting = Meeting()


@pytest.fixture(autouse=True)
def _meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(globals(), "meeting", Meeting())
    yield
    meeting.over.set()


@tool
async def note(context: CallContext, fact: str) -> str:
    before = sorted((await context.read("count", "facts")).items())
    context.append("facts", fact)
    context.increment("count")
    context.put("last", fact)
    return f"There were {before}."


@tool
async def identify(context: CallContext) -> str:
    return context.idempotency_key


@tool
async def refuse(context: CallContext) -> str:
    context.put("kept", True)
    raise ToolFailure("Not today.")


@tool
async def spoil(context: CallContext) -> str:
    """Its second operation is none that the state takes, once the first is done."""
    context.put("kept", True)
    context.put("word", "seven")
    context.increment("count")
    context.increment("word")
    return "spoilt"


@tool
async def flood(context: CallContext) -> str:
    for number in range(3):
        context.put(f"kept{number}", "x" * (400 << 10))
    return "flooded"


@tool
async def overdo(context: CallContext, how: Literal["deep", "endless", "unnamed", "long", "reserved"]) -> str:
    value: Any = float("inf")
    if how == "deep":
        for _ in range(17):
            value = [value if value != float("inf") else 1]
    keys = {"unnamed": "", "long": "k" * 257, "reserved": "user"}
    context.put(keys.get(how, "kept"), 1 if how in keys else value)
    return "overdone"


@tool
async def meet() -> str:
    await meeting.tasks.wait()
    return "met"


@tool
def meet_in_threads() -> str:
    meeting.threads.wait()
    return "met"


@tool
async def hang() -> str:
    meeting.begun.set()
    try:
        await asyncio.Event().wait()
    finally:
        meeting.cancelled.set()
    return "never"


@tool
def hang_in_a_thread() -> str:
    meeting.over.wait()
    return "too late"


@tool
async def crash() -> str:
    raise RuntimeError(SECRET)


@tool
async def time_out_by_itself() -> str:
    raise TimeoutError(SECRET)


@tool
async def large() -> str:
    return "x" * 10_000_000


@tool
async def strange() -> Any:
    return object()


@pytest.fixture
async def served(store_url: str, model: OpenAIServer) -> AsyncIterator[Running]:
    """A server with the tools of this module."""
    providers = {"openai": OpenAIProvider("test-key", model.url, "stub-1")}
    async with running(store_url, providers, toolbox=make_toolbox((__name__,), {})) as server:
        yield server


async def session_with(served: Running, *functions: str, llm: v1.LlmAgent | None = None, **fields: Any) -> str:
    """A session whose agent has these functions as its tools."""
    agent = v1.Agent(llm=llm)
    agent.llm.tools.extend(v1.Tool(name=name, server=v1.ServerTool(function=name), **fields) for name in functions)
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
    request = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
    return (await served.sessions.CreateSession(request)).name


async def invoke(served: Running, session: str, **fields: Any) -> v1.Run:
    start = v1.StartRun(session=session, messages=[said("Go")], **fields)
    return (await served.runs.Invoke(v1.InvokeRequest(start=start))).run


def results_of(request: dict[str, Any]) -> list[str]:
    return [message["content"] for message in request["messages"] if message["role"] == "tool"]


async def state_of(served: Running, session: str) -> dict[str, v1.Value]:
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session}/state"))
    return {key: entry.value for key, entry in state.entries.items()}


def ended_calls(log: list[v1.Event]) -> list[v1.ToolCall]:
    return [event.tool_finished for event in log if event.HasField("tool_finished")]


async def test_what_a_tool_changes_commits_with_its_result(served: Running, model: OpenAIServer) -> None:
    """One commit a call; the next call and the next model request see it."""
    session = await session_with(served, "note", llm=v1.LlmAgent(instruction="Known: {{ last }}"))
    model.script(
        tool_calls(("note", '{"fact": "harbour"}')), tool_calls(("note", '{"fact": "violin"}')), reply("Noted.")
    )
    run = await invoke(served, session)
    assert run.state == v1.Run.STATE_SUCCEEDED
    log = await log_of(served, session)
    times = [
        event.create_time.ToMicroseconds()
        for event in log
        if event.HasField("tool_finished") or event.HasField("state_changed")
    ]
    assert times[0] == times[1] < times[2] == times[3]
    assert results_of(model.requests[2]) == ["There were [].", "There were [('count', 1), ('facts', ['harbour'])]."]
    assert model.requests[2]["messages"][0]["content"] == "Known: violin"
    state = await state_of(served, session)
    assert state["count"].int_value == 2
    assert [fact.string_value for fact in state["facts"].list_value.values] == ["harbour", "violin"]


@pytest.mark.parametrize(
    ("function", "arguments", "told"),
    [
        ("refuse", "{}", "Not today."),
        ("spoil", "{}", "increment needs an int"),
        ("flood", "{}", "bytes of state"),
        ("overdo", '{"how": "deep"}', "that state cannot hold"),
        ("overdo", '{"how": "endless"}', "that state cannot hold"),
        ("overdo", '{"how": "unnamed"}', "that state cannot hold"),
        ("overdo", '{"how": "long"}', "that state cannot hold"),
        ("overdo", '{"how": "reserved"}', "that state cannot hold"),
    ],
)
async def test_a_call_that_fails_changes_nothing_and_the_run_goes_on(
    served: Running, model: OpenAIServer, function: str, arguments: str, told: str
) -> None:
    """Also when it is the state that refuses what the tool did to it."""
    session = await session_with(served, function)
    model.script(tool_calls((function, arguments)), reply("A pity."))
    run = await invoke(served, session)
    assert run.state == v1.Run.STATE_SUCCEEDED, run.error
    assert await state_of(served, session) == {}
    (call,) = ended_calls(await log_of(served, session))
    assert call.outcome == FAILED
    assert told in results_of(model.requests[1])[0]


async def test_an_idempotency_key_belongs_to_one_call_of_one_session(served: Running, model: OpenAIServer) -> None:
    """The model repeats the ids of its calls in each run, and the session is made again under its name."""
    session = await session_with(served, "identify")
    keys = []
    for _ in range(2):
        for _ in range(2):
            model.script(tool_calls(("identify", "{}"), ("identify", "{}")), reply("Done."))
            await invoke(served, session)
            keys += results_of(model.requests[-1])[-2:]
        uid = (await served.sessions.GetSession(v1.GetSessionRequest(name=session))).uid
        calls = [call.call_id for call in ended_calls(await log_of(served, session))]
        assert [f"{uid}/{call_id}" for call_id in calls] == keys[-4:]
        await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=session))
        again = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
        await served.sessions.CreateSession(again)
    assert len(set(keys)) == 8


@pytest.mark.parametrize("function", ["meet", "meet_in_threads"])
async def test_calls_of_one_reply_run_at_once(served: Running, model: OpenAIServer, function: str) -> None:
    """Each waits for the other, so run in turn they would wait forever."""
    session = await session_with(served, function)
    model.script(tool_calls((function, "{}"), (function, "{}")), reply("They met."))
    await invoke(served, session)
    assert results_of(model.requests[1]) == ["met", "met"]


@pytest.mark.parametrize("function", ["hang", "hang_in_a_thread"])
async def test_a_call_that_takes_too_long_fails(served: Running, model: OpenAIServer, function: str) -> None:
    session = await session_with(served, function, timeout=Duration(nanos=50_000_000))
    model.script(tool_calls((function, "{}")), reply("Too slow."))
    run = await invoke(served, session)
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert "took longer than 0.05 seconds" in results_of(model.requests[1])[0]


@pytest.mark.parametrize("limit", [None, Duration(seconds=3600)])
@pytest.mark.parametrize("function", ["crash", "time_out_by_itself"])
async def test_the_model_reads_only_that_a_tool_with_a_defect_failed(
    served: Running, model: OpenAIServer, function: str, limit: Duration | None
) -> None:
    """The server's log has the rest; nothing of it is in the session."""
    session = await session_with(served, function, timeout=limit)
    model.script(tool_calls((function, "{}")), reply("Broken."))
    with structlog.testing.capture_logs() as logged:
        run = await invoke(served, session)
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert "The tool failed." in results_of(model.requests[1])[0]
    assert SECRET not in str(await log_of(served, session))
    assert [line["tool"] for line in logged if line["event"] == "tool_crashed"] == [function]


@pytest.mark.parametrize(
    ("function", "told"), [("large", "at most 524288 are taken"), ("strange", "neither text nor JSON")]
)
async def test_a_result_that_cannot_be_kept_is_a_failed_call(
    served: Running, model: OpenAIServer, function: str, told: str
) -> None:
    session = await session_with(served, function)
    model.script(tool_calls((function, "{}")), reply("Never mind."))
    run = await invoke(served, session)
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert told in results_of(model.requests[1])[0]


async def test_a_hanging_call_ends_with_its_run(served: Running, model: OpenAIServer) -> None:
    """IMMEDIATE: the tool is cancelled, a thread is left to itself, and the run does not wait for either."""
    session = await session_with(served, "hang", "hang_in_a_thread")
    model.script(tool_calls(("hang", "{}"), ("hang_in_a_thread", "{}")))
    start = v1.StartRun(session=session, messages=[said("Go")])
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    await meeting.begun.wait()
    ended = await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    assert ended.state == v1.Run.STATE_CANCELLED
    await meeting.cancelled.wait()
    assert [call.outcome for call in ended_calls(await log_of(served, session))] == [CANCELLED, CANCELLED]


async def test_a_tool_at_work_is_stopped_when_its_run_is_rolled_back(served: Running, model: OpenAIServer) -> None:
    """What another call of the reply has changed is put back with it, and nothing of either comes after the mark."""
    session = await session_with(served, "hang", "note", "hang_in_a_thread")
    model.script(tool_calls(("hang", "{}"), ("note", '{"fact": "x"}'), ("hang_in_a_thread", "{}")), reply("Anew."))
    start = v1.StartRun(session=session, messages=[said("Go")])
    first = await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    await meeting.begun.wait()
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=first.name))
    async for frame in watch:
        if any(event.tool_finished.tool == "note" for event in frame.batch.events):
            break
    watch.cancel()
    again = v1.StartRun(session=session, run_id="two", messages=[said("Better")], on_busy=v1.StartRun.ON_BUSY_ROLLBACK)
    answers = [await served.runs.Invoke(v1.InvokeRequest(start=again)) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0].reply.parts[0].text == "Anew."
    await meeting.cancelled.wait()
    meeting.over.set()
    log = await log_of(served, session)
    assert {call.tool: call.outcome for call in ended_calls(log)} == {
        "hang": CANCELLED,
        "note": v1.ToolCall.OUTCOME_SUCCEEDED,
        "hang_in_a_thread": CANCELLED,
    }
    (mark,) = [event for event in log if event.HasField("rewound")]
    assert {event.run for event in log if event.sequence > mark.sequence} == {"", f"{session}/runs/two"}
    assert await state_of(served, session) == {}
    assert [message["content"] for message in model.requests[1]["messages"]] == ["Better"]


async def test_a_call_cancelled_alone_is_stopped_and_the_others_go_on(served: Running, model: OpenAIServer) -> None:
    session = await session_with(served, "hang", "note")
    model.script(tool_calls(("hang", "{}"), ("note", '{"fact": "x"}')), reply("One of them."))
    frames = []
    call = served.runs.Run()
    await call.write(v1.RunRequest(start=v1.StartRun(session=session, messages=[said("Go")])))
    async for frame in call:
        frames.append(frame)
        for event in frame.batch.events:
            if event.tool_started.tool == "hang":
                await meeting.begun.wait()
                stop = v1.CancelCommand(call_id=event.tool_started.call_id, reason="not that one")
                await call.write(v1.RunRequest(cancel=stop))
    await meeting.cancelled.wait()
    log = durable(frames)
    assert log[-1].run_state_changed.state == v1.Run.STATE_SUCCEEDED
    assert {ended.tool: ended.outcome for ended in ended_calls(log)} == {
        "hang": CANCELLED,
        "note": v1.ToolCall.OUTCOME_SUCCEEDED,
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("nothing", "{}"), ("note", '{"fact": '), ("note", "[1]"), ("note", '{"fact": 7}'), ("note", "[" * 2000)],
    ids=["unknown", "broken", "no-object", "wrong-type", "deep"],
)
async def test_a_model_that_never_learns_ends_at_its_limit(
    served: Running, model: OpenAIServer, name: str, arguments: str
) -> None:
    """A hundred times in a row: each call fails with its reason, and the run by its limit."""
    session = await session_with(served, "note", llm=v1.LlmAgent(max_model_calls=100))
    model.script(*[tool_calls((name, arguments))] * 100)
    run = await invoke(served, session)
    assert run.error.reason == v1.ERROR_REASON_LIMIT_EXCEEDED
    assert run.error.metadata["limit"] == "max_model_calls"
    assert run.usage.model_calls == 100
    log = await log_of(served, session)
    ended = ended_calls(log)
    assert [call.outcome for call in ended] == [FAILED] * 100
    begun = arguments == '{"fact": 7}'  # only the tool itself knows their types
    assert len([event for event in log if event.HasField("tool_started")]) == 100 * begun
    assert len(results_of(model.requests[-1])) == 99, "each is shown its failures"
    assert await state_of(served, session) == {}

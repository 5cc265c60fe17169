"""A tool that asks its user while it runs: over MCP servers as real processes, and as a function in the server."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import Client, v1
from notecase_server.engine.questions import MAX_QUESTION_BYTES, MAX_QUESTIONS
from notecase_server.models.openai import OpenAIProvider
from notecase_server.store.fold import ENDED
from notecase_server.tools.functions import CallContext, tool
from notecase_server.tools.mcp_settings import McpServerSettings
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import BySendCommand, OnStream, fields_of, kinds, log_of, reason_of, said
from tests.support.crashing import GATE, TOOLS, Crashing, Gate
from tests.support.mcp_process import TRANSPORTS, Http, over, stdio
from tests.support.openai_server import OpenAIServer, reply, tool_calls
from tests.support.server import Running, running
from tests.tools.calls import Witness

WAITING, RUNNING = v1.Run.STATE_WAITING, v1.Run.STATE_RUNNING
ANSWER, DENY, CANCEL, APPROVE = (
    v1.InputResponse.DECISION_ANSWER,
    v1.InputResponse.DECISION_DENY,
    v1.InputResponse.DECISION_CANCEL,
    v1.InputResponse.DECISION_APPROVE,
)
SUCCEEDED, FAILED, CANCELLED = (
    v1.ToolCall.OUTCOME_SUCCEEDED,
    v1.ToolCall.OUTCOME_FAILED,
    v1.ToolCall.OUTCOME_CANCELLED,
)
RETRY, ASK, FAIL = v1.Tool.ON_INTERRUPT_RETRY, v1.Tool.ON_INTERRUPT_UNSPECIFIED, v1.Tool.ON_INTERRUPT_FAIL
RED = '{"colour": "red"}'
BLUE = '{"colour": "blue"}'

COLOUR = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}


@tool
async def tint(context: CallContext, schema: str = "") -> str:
    """Asks as a function does."""
    got = await context.ask("Which tint?", json.loads(schema) if schema else None)
    return f"{v1.InputResponse.Decision.Name(got.decision)} {got.answer}{got.reason}"


@tool
async def pester(context: CallContext) -> str:
    """Never has enough."""
    while True:
        await context.ask("And now?")


@tool
async def ramble(context: CallContext, size: int) -> str:
    return (await context.ask("x" * size)).answer


kept: list[CallContext] = []


@tool
async def keep(context: CallContext) -> str:
    kept.append(context)
    return "kept"


@pytest.fixture(scope="module")
def http() -> Iterator[Http]:
    served = Http()
    yield served
    served.kill()


@asynccontextmanager
async def serving(
    store: str, model: OpenAIServer, *settings: McpServerSettings, **options: Any
) -> AsyncIterator[Running]:
    """A server with the functions of this module, and these MCP servers by the names m0, m1 …"""
    providers = {"openai": OpenAIProvider("test-key", model.url, "stub-1")}
    servers = {f"m{index}": one for index, one in enumerate(settings)}
    toolbox = make_toolbox((__name__, TOOLS), servers)
    async with running(store, providers, toolbox=toolbox, **options) as server:
        yield server


@pytest.fixture
async def served(store_url: str, model: OpenAIServer, http: Http) -> AsyncIterator[Running]:
    async with serving(store_url, model, over("http", http)) as server:
        yield server


def of_mcp(server: str = "m0", *names: str, **fields: Any) -> v1.Tool:
    return v1.Tool(mcp=v1.McpTool(server=server, tools=names), **fields)


def of_server(name: str, **fields: Any) -> v1.Tool:
    return v1.Tool(name=name, server=v1.ServerTool(function=name), **fields)


async def session_with(served: Running, *tools: v1.Tool, name: str = "case") -> str:
    request = v1.UpdateAgentRequest(
        agent=v1.Agent(name="agents/painter", llm=v1.LlmAgent(tools=tools)), allow_missing=True
    )
    await served.agents.UpdateAgent(request)
    made = v1.CreateSessionRequest(session_id=name, session=v1.Session(agent="agents/painter"))
    return (await served.sessions.CreateSession(made)).name


async def start(served: Running, session: str, **fields: Any) -> v1.Run:
    """Starts a run, and returns it once it waits or has ended."""
    begun = v1.StartRun(session=session, messages=[said("Go")], **fields)
    return (await served.runs.Invoke(v1.InvokeRequest(start=begun))).run


async def rested(served: Running, run: v1.Run) -> v1.Run:
    """The run once it waits again since it was looked at, or has ended."""
    found: v1.Run = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=run.last_sequence))
    return found


async def respond(
    served: Running, run: v1.Run, decision: v1.InputResponse.Decision.ValueType, answer: str = "", which: int = 0
) -> v1.CommandResult:
    response = v1.InputResponse(input_id=run.pending_inputs[which].input_id, decision=decision, answer=answer)
    return await send(served, run, v1.RunRequest(input_response=response))


async def send(served: Running, run: v1.Run, command: v1.RunRequest) -> v1.CommandResult:
    session = run.name.partition("/runs/")[0]
    request = v1.SendCommandRequest(session=session, run=run.name, command=command)
    return (await served.runs.SendCommand(request)).result


async def refusal(served: Running, run: v1.Run, *response: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await respond(served, run, *response)
    return refused.value


def results_of(request: dict[str, Any]) -> list[str]:
    return [message["content"] for message in request["messages"] if message["role"] == "tool"]


def finished(log: Sequence[v1.Event]) -> list[v1.ToolCall]:
    return [event.tool_finished for event in log if event.HasField("tool_finished")]


def resolved(log: Sequence[v1.Event]) -> list[v1.InputResponse]:
    return [event.input_resolved.response for event in log if event.HasField("input_resolved")]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_tool_asks_and_goes_on_with_the_answer(
    store_url: str, model: OpenAIServer, http: Http, transport: str
) -> None:
    """The run waits, and lists of waiting runs have it; the question, its form and the wait are one commit, the answer
    and the continuation another."""
    model.script(tool_calls(("varnish", "{}")), reply("Done."))
    async with serving(store_url, model, over(transport, http)) as served:
        session = await session_with(served, of_mcp("m0", "varnish"))
        run = await start(served, session)
        assert (WAITING, 1) == (run.state, len(run.pending_inputs))
        (asked,) = run.pending_inputs
        assert (v1.InputRequest.KIND_QUESTION, "Which tone?") == (asked.kind, asked.prompt)
        assert (v1.ToolCall.OUTCOME_RUNNING, "varnish") == (asked.call.outcome, asked.call.tool)
        assert {"colour"} == set(json.loads(asked.schema)["properties"])
        listed = await served.runs.ListRuns(v1.ListRunsRequest(parent="sessions/-", filter="state = WAITING"))
        assert [run.name] == [one.name for one in listed.runs]
        await respond(served, run, ANSWER, RED)
        ended = await rested(served, run)
        log = await log_of(served, session)
    assert ended.state == v1.Run.STATE_SUCCEEDED
    assert ["red varnish"] == results_of(model.requests[1])
    assert kinds(log) == [
        *("run_started", "message_added", "message_added", "usage", "tool_started"),
        *("input_requested", "run_state_changed", "input_resolved", "run_state_changed"),
        *("tool_finished", "message_added", "usage", "run_state_changed"),
    ]
    states = [event.run_state_changed.state for event in log if event.HasField("run_state_changed")]
    assert states == [WAITING, RUNNING, v1.Run.STATE_SUCCEEDED]
    times = [event.create_time.ToMicroseconds() for event in log]
    assert times[5] == times[6] < times[7] == times[8]
    assert [(SUCCEEDED, 1)] == [(call.outcome, call.attempt) for call in finished(log)]


@pytest.mark.parametrize("driver", [OnStream, BySendCommand])
async def test_a_function_in_the_server_asks_too_and_is_answered_on_either_way(
    served: Running, model: OpenAIServer, driver: type[OnStream | BySendCommand]
) -> None:
    model.script(tool_calls(("tint", "{}")), reply("Done."))
    session = await session_with(served, of_server("tint"))
    driving = driver()
    async for frame in driving.start(served, v1.StartRun(session=session, messages=[said("Go")])):
        for event in frame.batch.events:
            if event.HasField("input_requested"):
                input_id = event.input_requested.input_id
                response = v1.InputResponse(input_id=input_id, decision=ANSWER, answer="warm")
                await driving.send(v1.RunRequest(input_response=response))
    assert ["DECISION_ANSWER warm"] == results_of(model.requests[1])


@pytest.mark.parametrize(("decision", "told"), [(DENY, "decline"), (CANCEL, "cancel")])
async def test_a_tool_learns_whether_it_was_declined_or_dismissed(
    served: Running, model: OpenAIServer, decision: v1.InputResponse.Decision.ValueType, told: str
) -> None:
    model.script(tool_calls(("paint", "{}")), reply("Done."))
    session = await session_with(served, of_mcp())
    run = await start(served, session)
    await respond(served, run, decision)
    assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
    assert [told] == results_of(model.requests[1])
    assert [decision] == [response.decision for response in resolved(await log_of(served, session))]


async def test_a_question_without_an_answer_in_time_is_dismissed(served: Running, model: OpenAIServer) -> None:
    model.script(tool_calls(("paint", "{}")), reply("Done."))
    session = await session_with(served, of_mcp())
    run = await start(served, session, limits=v1.Limits(input_timeout=Duration(nanos=50_000_000)))
    while run.state not in ENDED:
        run = await rested(served, run)
    assert ["cancel"] == results_of(model.requests[1])
    (response,) = resolved(await log_of(served, session))
    assert (CANCEL, "Nobody answered in time.") == (response.decision, response.reason)


async def test_a_question_is_dismissed_in_time_although_another_call_is_at_work(
    served: Running, model: OpenAIServer, tmp_path: Path
) -> None:
    async with Witness.listening(tmp_path / "w") as witness:
        model.script(tool_calls(("paint", "{}"), ("wait", json.dumps({"witness": witness.path}))), reply("Done."))
        session = await session_with(served, of_mcp())
        begun = v1.StartRun(
            session=session, messages=[said("Go")], limits=v1.Limits(input_timeout=Duration(nanos=50_000_000))
        )
        run = await served.runs.CreateRun(v1.CreateRunRequest(start=begun))
        async for frame in served.runs.WatchEvents(v1.WatchEventsRequest(name=run.name)):
            done = [event.tool_finished for event in frame.batch.events if event.HasField("tool_finished")]
            if done:
                break
        assert [("paint", "cancel")] == [(call.tool, call.result[0].text) for call in done]
        await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))


@pytest.mark.parametrize(
    "wrong",
    ["red", "", '{"colour": "green"}', "{}", '{"colour": "red", "coats": 2}', '{"colour": "\\ud800"}', "[" * 100_000],
    ids=["no JSON", "empty", "another value", "nothing", "more", "half a surrogate pair", "deep"],
)
async def test_an_answer_that_does_not_fit_is_refused_and_the_question_stays_open(
    served: Running, model: OpenAIServer, wrong: str
) -> None:
    model.script(tool_calls(("varnish" if "ud800" in wrong else "paint", "{}")), reply("Done."))
    session = await session_with(served, of_mcp())
    run = await start(served, session)
    refused = await refusal(served, run, ANSWER, wrong)
    assert ("INVALID_FIELD", {"input_response.answer"}) == (reason_of(refused), fields_of(refused))
    still = await served.runs.GetRun(v1.GetRunRequest(name=run.name))
    assert run == still
    await respond(served, run, ANSWER, RED)
    assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
    assert "red" in results_of(model.requests[1])[0]


async def test_a_decision_that_the_question_does_not_have_is_refused(served: Running, model: OpenAIServer) -> None:
    """A question of the agent itself cannot be dismissed: its call has no other end than an answer or a no."""
    asks = v1.Tool(name="ask_user", server=v1.ServerTool(function="ask_user"))
    model.script(tool_calls(("paint", "{}"), ("ask_user", '{"question": "Really?"}')))
    session = await session_with(served, of_mcp(), asks)
    run = await start(served, session)
    while len(run.pending_inputs) < 2:
        run = await rested(served, run)
    by_tool = {asked.call.tool: index for index, asked in enumerate(run.pending_inputs)}
    for which, decision in (("paint", APPROVE), ("ask_user", CANCEL)):
        refused = await refusal(served, run, decision, "", by_tool[which])
        assert {"input_response.decision"} == fields_of(refused)


async def test_an_answer_to_a_question_that_is_gone_is_refused_by_one_reason(
    served: Running, model: OpenAIServer
) -> None:
    """While its call is still at work, and when the run has ended."""
    model.script(tool_calls(("tint", "{}"), ("paint", "{}")), reply("Done."))
    session = await session_with(served, of_mcp(), of_server("tint"))
    run = await start(served, session)
    while len(run.pending_inputs) < 2:
        run = await rested(served, run)
    tint = next(index for index, asked in enumerate(run.pending_inputs) if asked.call.tool == "tint")
    await respond(served, run, ANSWER, "warm", tint)
    assert "INPUT_NOT_PENDING" == reason_of(await refusal(served, run, ANSWER, "cold", tint))
    await respond(served, run, CANCEL, "", 1 - tint)
    ended = await rested(served, await rested(served, run))
    assert ended.state in {WAITING, v1.Run.STATE_SUCCEEDED}
    while ended.state not in ENDED:
        ended = await rested(served, ended)
    assert "INPUT_NOT_PENDING" == reason_of(await refusal(served, run, ANSWER, RED, 1 - tint))


@pytest.mark.parametrize("transport", ["http", "stdio"])
async def test_two_tools_ask_side_by_side_and_each_gets_its_own_answer(
    store_url: str, model: OpenAIServer, http: Http, transport: str
) -> None:
    """In one run, and over one connection; the later question is answered first."""
    model.script(tool_calls(("paint", '{"what": "door"}'), ("paint", '{"what": "gate"}')), reply("Done."))
    async with serving(store_url, model, over(transport, http)) as served:
        session = await session_with(served, of_mcp())
        run = await start(served, session)
        while len(run.pending_inputs) < 2:
            run = await rested(served, run)
        asked = {json.loads(one.call.arguments)["what"]: one.prompt for one in run.pending_inputs}
        assert {what: f"Which colour for the {what}?" for what in ("door", "gate")} == asked
        of_call = {json.loads(one.call.arguments)["what"]: index for index, one in enumerate(run.pending_inputs)}
        await respond(served, run, ANSWER, BLUE, of_call["gate"])
        half = await rested(served, run)
        while half.state == RUNNING or len(half.pending_inputs) != 1:
            half = await rested(served, half)
        assert ["door"] == [json.loads(one.call.arguments)["what"] for one in half.pending_inputs]
        await respond(served, half, ANSWER, RED)
        assert (await rested(served, half)).state == v1.Run.STATE_SUCCEEDED
    assert ["accept red", "accept blue"] == results_of(model.requests[1])


async def test_users_of_one_process_are_asked_by_their_own_tools_only(store_url: str, model: OpenAIServer) -> None:
    """Two sessions over the pipes of one MCP server."""
    model.script(*[tool_calls(("paint", "{}"))] * 2, *[reply("Done.")] * 2)
    async with serving(store_url, model, stdio()) as served:
        sessions = [await session_with(served, of_mcp(), name=name) for name in ("ada", "ben")]
        runs = [await start(served, session) for session in sessions]
        assert [1, 1] == [len(run.pending_inputs) for run in runs]
        for run, answer in zip(runs, (RED, BLUE), strict=True):
            await respond(served, run, ANSWER, answer)
            assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
        told = [finished(await log_of(served, session))[0].result[0].text for session in sessions]
    assert ["accept red", "accept blue"] == told


async def test_a_second_question_of_a_call_comes_when_the_first_is_answered(
    served: Running, model: OpenAIServer
) -> None:
    model.script(tool_calls(("prime_and_paint", "{}")), reply("Done."))
    session = await session_with(served, of_mcp())
    first = await start(served, session)
    assert 1 == len(first.pending_inputs)
    await respond(served, first, ANSWER, RED)
    second = await rested(served, first)
    assert 1 == len(second.pending_inputs)
    assert {"Which colour for the primer?", "Which colour for the top?"} == {
        run.pending_inputs[0].prompt for run in (first, second)
    }
    await respond(served, second, CANCEL)
    assert (await rested(served, second)).state == v1.Run.STATE_SUCCEEDED
    assert {"accept", "cancel"} == set(results_of(model.requests[1])[0].split())


async def test_a_tool_that_cancels_its_question_withdraws_it(
    served: Running, model: OpenAIServer, tmp_path: Path
) -> None:
    closing = asyncio.Event()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await closing.wait()
        writer.close()

    async with await asyncio.start_unix_server(meet, tmp_path / "w"):
        model.script(tool_calls(("doubt", json.dumps({"witness": str(tmp_path / "w")}))), reply("Done."))
        session = await session_with(served, of_mcp())
        run = await start(served, session)
        assert 1 == len(run.pending_inputs)
        closing.set()
        assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
    assert ["never mind"] == results_of(model.requests[1])
    assert [v1.InputResponse.DECISION_UNSPECIFIED] == [
        response.decision for response in resolved(await log_of(served, session))
    ]


async def test_a_run_cancelled_meanwhile_takes_its_question_along(
    served: Running, model: OpenAIServer, tmp_path: Path
) -> None:
    """The question is withdrawn with the end of its call and of its run, and the tool is stopped."""
    async with Witness.listening(tmp_path / "w") as witness:
        model.script(tool_calls(("ask_and_tell", json.dumps({"witness": witness.path}))))
        session = await session_with(served, of_mcp())
        run = await start(served, session)
        ended = await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
        assert "cancelled" == await witness.heard()
    assert (v1.Run.STATE_CANCELLED, 0) == (ended.state, len(ended.pending_inputs))
    log = await log_of(served, session)
    assert ["input_resolved", "tool_finished", "run_state_changed"] == kinds(log)[-3:]
    assert [CANCELLED] == [call.outcome for call in finished(log)]
    assert "INPUT_NOT_PENDING" == reason_of(await refusal(served, run, ANSWER, RED))


async def test_a_call_cancelled_alone_takes_its_question_along_and_the_others_go_on(
    served: Running, model: OpenAIServer
) -> None:
    model.script(tool_calls(("paint", "{}"), ("tint", "{}")), reply("Done."))
    session = await session_with(served, of_mcp(), of_server("tint"))
    run = await start(served, session)
    while len(run.pending_inputs) < 2:
        run = await rested(served, run)
    paint, tint = sorted(run.pending_inputs, key=lambda asked: asked.call.tool)
    await send(served, run, v1.RunRequest(cancel=v1.CancelCommand(call_id=paint.call.call_id, reason="not that")))
    left = await served.runs.GetRun(v1.GetRunRequest(name=run.name))
    assert (WAITING, [tint.input_id]) == (left.state, [asked.input_id for asked in left.pending_inputs])
    await respond(served, left, ANSWER, "warm")
    assert (await rested(served, left)).state == v1.Run.STATE_SUCCEEDED
    assert "DECISION_ANSWER warm" == results_of(model.requests[1])[1]


async def test_a_run_that_is_to_end_after_its_turn_awaits_the_tool_and_asks_no_person(
    served: Running, model: OpenAIServer
) -> None:
    """The question is withdrawn at once, the tool gets DECISION_CANCEL, and its result is kept."""
    model.script(tool_calls(("prime_and_paint", "{}")))
    session = await session_with(served, of_mcp())
    run = await start(served, session)
    await send(served, run, v1.RunRequest(cancel=v1.CancelCommand(mode=v1.CancelCommand.MODE_AFTER_TURN)))
    ended = await rested(served, run)
    assert ended.state == v1.Run.STATE_CANCELLED
    log = await log_of(served, session)
    assert 1 == len([event for event in log if event.HasField("input_requested")])
    assert [(SUCCEEDED, "cancel cancel")] == [(call.outcome, call.result[0].text) for call in finished(log)]


async def test_what_a_user_says_instead_declines_the_question_and_comes_behind_the_result(
    served: Running, model: OpenAIServer
) -> None:
    model.script(tool_calls(("paint", "{}")), reply("As you like."))
    session = await session_with(served, of_mcp())
    run = await start(served, session)
    sent = await send(served, run, v1.RunRequest(command_id="no", input=v1.UserInput(messages=[said("Leave it.")])))
    assert v1.CommandResult.DISPOSITION_QUEUED == sent.disposition
    assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
    told = [(message["role"], message["content"]) for message in model.requests[1]["messages"]]
    assert told.index(("tool", "decline")) < told.index(("user", "Leave it."))
    (response,) = resolved(await log_of(served, session))
    assert (DENY, "Leave it.") == (response.decision, response.reason)


async def test_what_a_user_said_before_declines_a_question_that_comes_later(
    served: Running, model: OpenAIServer
) -> None:
    """It was queued while the tool had not asked yet."""
    held = asyncio.Event()
    model.script(tool_calls(("paint", "{}")).held(held), reply("As you like."))
    session = await session_with(served, of_mcp())
    begun = v1.StartRun(session=session, messages=[said("Go")])
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=begun))
    await model.request(0)
    await send(served, run, v1.RunRequest(input=v1.UserInput(messages=[said("Wait.")])))
    held.set()
    while run.state not in ENDED:
        run = await rested(served, run)
    assert ["decline"] == results_of(model.requests[1])
    assert run.state == v1.Run.STATE_SUCCEEDED


async def test_a_user_who_interrupts_stops_the_tool_that_asks(served: Running, model: OpenAIServer) -> None:
    model.script(tool_calls(("paint", "{}")), reply("Stopped."))
    session = await session_with(served, of_mcp())
    run = await start(served, session)
    now = v1.UserInput(messages=[said("Stop.")], when=v1.UserInput.WHEN_INTERRUPT)
    await send(served, run, v1.RunRequest(input=now))
    assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
    log = await log_of(served, session)
    assert [CANCELLED] == [call.outcome for call in finished(log)]
    assert "Stop." == model.requests[1]["messages"][-1]["content"]


async def test_a_server_that_dies_meanwhile_fails_the_call_and_withdraws_the_question(
    store_url: str, model: OpenAIServer
) -> None:
    mortal = Http()
    model.script(tool_calls(("paint", "{}")), reply("A pity."))
    async with serving(store_url, model, over("http", mortal)) as served:
        session = await session_with(served, of_mcp())
        run = await start(served, session)
        mortal.kill()
        assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
        log = await log_of(served, session)
    assert ["input_resolved", "tool_finished", "run_state_changed"] == kinds(log)[7:10]
    assert "was lost" in results_of(model.requests[1])[0]


async def test_a_deleted_session_stops_the_tool_that_asks(served: Running, model: OpenAIServer, tmp_path: Path) -> None:
    async with Witness.listening(tmp_path / "w") as witness:
        model.script(tool_calls(("ask_and_tell", json.dumps({"witness": witness.path}))))
        session = await session_with(served, of_mcp())
        await start(served, session)
        await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=session))
        assert "cancelled" == await witness.heard()


async def test_a_fork_has_the_question_withdrawn_and_leaves_the_tool_to_its_own(
    served: Running, model: OpenAIServer
) -> None:
    model.script(tool_calls(("paint", "{}")), reply("Done."))
    session = await session_with(served, of_mcp())
    run = await start(served, session)
    fork = await served.sessions.ForkSession(v1.ForkSessionRequest(name=session, session_id="fork"))
    log = await log_of(served, fork.name)
    assert [CANCELLED] == [call.outcome for call in finished(log)]
    assert [v1.InputResponse.DECISION_UNSPECIFIED] == [response.decision for response in resolved(log)]
    await respond(served, run, ANSWER, RED)
    assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
    assert ["accept red"] == results_of(model.requests[1])


async def test_a_run_that_waits_for_an_answer_takes_no_place(store_url: str, model: OpenAIServer, http: Http) -> None:
    """With room for one run: another is done meanwhile, and its own goes on afterwards. A start in place of it is a new
    one, refused without a place before anything is sealed."""
    held = asyncio.Event()
    model.script(tool_calls(("paint", "{}")), reply("The other.").held(held), reply("Done."))
    async with serving(store_url, model, over("http", http), max_runs=1) as served:
        session = await session_with(served, of_mcp())
        other = await session_with(served, of_mcp(), name="other")
        run = await start(served, session)
        begun = v1.StartRun(session=other, messages=[said("Go")])
        busy = await served.runs.CreateRun(v1.CreateRunRequest(start=begun))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await start(served, session, on_busy=v1.StartRun.ON_BUSY_INTERRUPT)
        assert "RATE_LIMITED" == reason_of(refused.value)
        assert run == await served.runs.GetRun(v1.GetRunRequest(name=run.name))
        held.set()
        assert (await rested(served, busy)).state == v1.Run.STATE_SUCCEEDED
        await respond(served, run, ANSWER, RED)
        assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
    assert ["accept red"] == results_of(model.requests[2])


async def test_another_run_in_place_of_one_that_asks_seals_it(served: Running, model: OpenAIServer) -> None:
    model.script(tool_calls(("paint", "{}")), reply("Anew."))
    session = await session_with(served, of_mcp())
    run = await start(served, session)
    again = await start(served, session, on_busy=v1.StartRun.ON_BUSY_ROLLBACK)
    assert again.state == v1.Run.STATE_SUCCEEDED
    first = await served.runs.GetRun(v1.GetRunRequest(name=run.name))
    assert (v1.Run.STATE_CANCELLED, 0) == (first.state, len(first.pending_inputs))


async def test_the_time_in_which_a_tool_waits_for_a_person_does_not_count(served: Running, model: OpenAIServer) -> None:
    """Neither for the tool, which has a millisecond, nor for the run."""
    model.script(tool_calls(("tint", "{}")), reply("Done."))
    session = await session_with(served, of_server("tint", timeout=Duration(nanos=1_000_000)))
    run = await start(served, session)
    assert 1 == len(run.pending_inputs)
    await respond(served, run, ANSWER, "warm")
    ended = await rested(served, run)
    assert ["DECISION_ANSWER warm"] == results_of(model.requests[1])
    log = await log_of(served, session)
    changes = {event.run_state_changed.state: event.create_time.ToMicroseconds() for event in log}
    waited = changes[RUNNING] - changes[WAITING]
    assert ended.end_time.ToMicroseconds() - ended.create_time.ToMicroseconds() - waited == (
        ended.running_duration.ToMicroseconds()
    )


async def test_a_tool_that_asks_on_and_on_fails(served: Running, model: OpenAIServer) -> None:
    model.script(tool_calls(("pester", "{}")), reply("Enough."))
    session = await session_with(served, of_server("pester"))
    run = await start(served, session)
    asked = 0
    while run.pending_inputs:
        asked += 1
        await respond(served, run, ANSWER, "this")
        run = await rested(served, run)
    assert (MAX_QUESTIONS, v1.Run.STATE_SUCCEEDED) == (asked, run.state)
    assert f"may ask {MAX_QUESTIONS} questions" in results_of(model.requests[1])[0]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (("ramble", f'{{"size": {MAX_QUESTION_BYTES + 1}}}'), f"at most {MAX_QUESTION_BYTES}"),
        (("tint", json.dumps({"schema": '{"type": "nothing"}'})), "not a JSON Schema"),
        (("tint", json.dumps({"schema": json.dumps({"description": "x" * 70_000})})), "at most 65536"),
    ],
    ids=["large", "no schema", "large schema"],
)
async def test_a_question_that_cannot_be_asked_fails_its_call(
    served: Running, model: OpenAIServer, call: tuple[str, str], told: str
) -> None:
    model.script(tool_calls(call), reply("Never mind."))
    session = await session_with(served, of_server("ramble"), of_server("tint"))
    run = await start(served, session)
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert told in results_of(model.requests[1])[0]


async def test_a_tool_whose_call_has_ended_cannot_ask(served: Running, model: OpenAIServer) -> None:
    model.script(tool_calls(("keep", "{}")), reply("Done."))
    session = await session_with(served, of_server("keep"))
    assert (await start(served, session)).state == v1.Run.STATE_SUCCEEDED
    late = await kept.pop().ask("Still there?")
    assert v1.InputResponse.DECISION_UNSPECIFIED == late.decision
    assert "input_requested" not in kinds(await log_of(served, session))


async def test_the_client_answers_with_what_becomes_the_form_or_dismisses(served: Running, model: OpenAIServer) -> None:
    model.script(tool_calls(("paint", "{}"), ("tint", "{}")), reply("Done."))
    session = await session_with(served, of_mcp(), of_server("tint"))
    async with Client(served.address) as client, client.run("Go", session=session) as run:
        async for event in run:
            if event.input_requested.prompt == "Which tint?":
                await client.dismiss(run.name, event.input_requested.input_id, "Later.")
            elif event.HasField("input_requested"):
                await run.answer(event.input_requested.input_id, {"colour": "red"})
        assert run.result.state == v1.Run.STATE_SUCCEEDED
    assert ["accept red", "DECISION_CANCEL Later."] == results_of(model.requests[1])


@pytest.mark.parametrize("policy", [RETRY, ASK, FAIL])
async def test_a_stop_does_not_wait_for_people_and_the_call_goes_the_way_of_lost_ones(
    tmp_path: Path, model: OpenAIServer, http: Http, policy: v1.Tool.OnInterrupt.ValueType
) -> None:
    """An answer to a question of the previous process is refused."""
    model.script(tool_calls(("paint", "{}")), reply("Done."))
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    async with asyncio.timeout(60):
        async with serving(store, model, over("http", http), grace=3600) as served:
            session = await session_with(served, of_mcp(on_interrupt=policy))
            before = await start(served, session)
    async with serving(store, model, over("http", http)) as served:
        run = await rested(served, before)
        assert "INPUT_NOT_PENDING" == reason_of(await refusal(served, before, ANSWER, RED))
        if policy == RETRY:
            (asked,) = run.pending_inputs
            assert (2, "Which colour for the fence?") == (asked.call.attempt, asked.prompt)
            await respond(served, run, ANSWER, RED)
        elif policy == ASK:
            assert [v1.InputRequest.KIND_INTERRUPTED_CALL] == [asked.kind for asked in run.pending_inputs]
            await respond(served, run, ANSWER, "It is red now.")
        while run.state not in ENDED:
            run = await rested(served, run)
        assert run.state == v1.Run.STATE_SUCCEEDED
    told = {RETRY: "accept red", ASK: "It is red now.", FAIL: "may or may not have taken effect"}
    assert told[policy] in results_of(model.requests[1])[0]


async def test_a_kill_while_one_tool_asks_and_another_works_loses_both_to_their_own_ways(
    tmp_path: Path, model: OpenAIServer, http: Http
) -> None:
    """A takeover of a run that was RUNNING with a question open."""
    model.script(tool_calls(("paint", "{}"), ("linger", "{}")), reply("Done."))
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"m0": {"url": http.url}}}))
    async with Gate() as gate:
        env = {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "test-key", GATE: str(gate.port)}
        async with await Crashing.launch(tmp_path, "--mcp-config", str(config), env=env) as killed:
            async with grpc.aio.insecure_channel(killed.address) as channel:
                served = Running(None, killed.address, channel)  # type: ignore[arg-type]
                tools = (of_mcp(on_interrupt=RETRY), of_server("linger", on_interrupt=FAIL))
                session = await session_with(served, *tools)
                begun = v1.StartRun(session=session, messages=[said("Go")])
                run = await served.runs.CreateRun(v1.CreateRunRequest(start=begun))
                await gate.arrival()
                async for frame in served.runs.WatchEvents(v1.WatchEventsRequest(name=run.name)):
                    if any(event.HasField("input_requested") for event in frame.batch.events):
                        break
            await killed.kill()
    async with serving(f"sqlite:{tmp_path / 'notecase.db'}", model, over("http", http)) as served:
        run = await served.runs.GetRun(v1.GetRunRequest(name=run.name))
        while not (run.state == WAITING and run.attempt == 2):
            run = await rested(served, run)
        assert ["Which colour for the fence?"] == [asked.prompt for asked in run.pending_inputs]
        await respond(served, run, ANSWER, BLUE)
        assert (await rested(served, run)).state == v1.Run.STATE_SUCCEEDED
        log = await log_of(served, session)
    assert {"paint": SUCCEEDED, "linger": FAILED} == {call.tool: call.outcome for call in finished(log)}
    assert [v1.InputResponse.DECISION_UNSPECIFIED, ANSWER] == [response.decision for response in resolved(log)]


async def test_a_tool_that_a_call_adds_can_be_called_in_the_same_run(store_url: str, model: OpenAIServer) -> None:
    """The server announces that its tools have changed, and the model gets the new ones."""
    async with serving(store_url, model, stdio()) as served:
        session = await session_with(served, of_mcp())
        model.script(tool_calls(("grow", '{"name": "later"}')), tool_calls(("later", '{"text": "x"}')), reply("ok"))
        run = await start(served, session)
        assert run.state == v1.Run.STATE_SUCCEEDED
        named = [[tool["function"]["name"] for tool in request["tools"]] for request in model.requests]
        assert ["later" in names for names in named] == [False, True, True]
        assert ["grown", "x"] == results_of(model.requests[-1])

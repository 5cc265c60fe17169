"""The tool of a called name is determined when the call is made, and a remembered answer applies only to that tool."""

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import v1
from notecase_server.models.openai import OpenAIProvider
from notecase_server.tools.contract import Toolbox
from notecase_server.tools.functions import tool
from notecase_server.tools.mcp_settings import McpServerSettings
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import fields_of, log_of, reason_of, said
from tests.support.openai_server import OpenAIServer, reply, tool_calls
from tests.support.server import Running, Spawned, running
from tests.tools.calls import Witness

ROOT = Path(__file__).parents[2]
MCP_ARGUMENTS = ("-m", "tests.support.mcp_server", "stdio")
MCP = McpServerSettings(command=sys.executable, args=MCP_ARGUMENTS, cwd=str(ROOT), connect_timeout=120)
WAITING, SUCCEEDED, FAILED = v1.Run.STATE_WAITING, v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED
APPROVE, DENY = v1.InputResponse.DECISION_APPROVE, v1.InputResponse.DECISION_DENY
ALWAYS = v1.InputResponse.REMEMBER_SESSION
CASE = "sessions/case"


@tool
async def pay() -> str:
    return "paid"


@tool
async def refund() -> str:
    return "refunded"


def toolbox(**servers: McpServerSettings) -> Toolbox:
    return make_toolbox((__name__,), servers)


@pytest.fixture
async def served() -> AsyncIterator[Running]:
    """The offline model calls the tools that the message names."""
    async with running(toolbox=toolbox(one=MCP, two=MCP)) as server:
        yield server


def function(name: str = "pay", implementation: str = "pay", **fields: Any) -> v1.Tool:
    given = {"requires_approval": True, **fields}
    return v1.Tool(name=name, server=v1.ServerTool(function=implementation), **given)


def client_tool(name: str, **fields: Any) -> v1.Tool:
    return v1.Tool(name=name, client=v1.ClientTool(), **fields)


def mcp(server: str, *names: str, prefix: str = "", **fields: Any) -> v1.Tool:
    return v1.Tool(name=prefix, mcp=v1.McpTool(server=server, tools=names), **fields)


async def agent(served: Running, *tools: v1.Tool, name: str = "clerk", instruction: str = "") -> str:
    """Makes or changes an agent, and makes the session of the case with the first."""
    made = v1.Agent(name=f"agents/{name}", llm=v1.LlmAgent(tools=tools, instruction=instruction))
    await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=made, allow_missing=True))
    return made.name


async def session(served: Running, *tools: v1.Tool) -> None:
    request = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent=await agent(served, *tools)))
    await served.sessions.CreateSession(request)


async def call(served: Running, *tools: str, **fields: Any) -> v1.Run:
    """A run whose model calls these tools, once it waits or has ended."""
    lines = "\n".join(f"/call {name}" for name in tools)
    start = v1.StartRun(session=CASE, messages=[said(lines)], **fields)
    return (await served.runs.Invoke(v1.InvokeRequest(start=start))).run


async def answer(
    served: Running,
    run: v1.Run,
    decision: v1.InputResponse.Decision.ValueType = APPROVE,
    remember: v1.InputResponse.Remember.ValueType = ALWAYS,
    index: int = 0,
) -> None:
    response = v1.InputResponse(input_id=run.pending_inputs[index].input_id, decision=decision, remember=remember)
    command = v1.RunRequest(input_response=response)
    await served.runs.SendCommand(v1.SendCommandRequest(session=CASE, run=run.name, command=command))


async def rest(served: Running, run: v1.Run) -> v1.Run:
    """Returns the run when it has ended or waits again."""
    return await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=run.last_sequence))


async def approved(served: Running, *tools: str, **fields: Any) -> v1.Run:
    """A run that asked once, and was answered for the whole session."""
    asked = await call(served, *tools, **fields)
    await answer(served, asked)
    return await rest(served, asked)


async def cancel(served: Running, run: v1.Run) -> None:
    await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))


def results(log: list[v1.Event]) -> list[str]:
    ends = [event.tool_finished for event in log if event.HasField("tool_finished")]
    return [end.error or end.result[0].text for end in ends]


async def test_a_call_says_what_it_was_bound_to(served: Running) -> None:
    """From the message on, in every message and event with the call; an unknown name is bound to nothing."""
    tools = [function(), mcp("one", "listings", prefix="one"), client_tool("mine")]
    await session(served, *tools)
    run = await call(served, "pay", "one_listings", "mine", "theirs", "nobody", client_tools=[client_tool("theirs")])
    await cancel(served, run)
    log = await log_of(served, CASE)
    (message,) = [event.message_added for event in log if event.message_added.role == v1.Message.ROLE_ASSISTANT]
    bindings = {part.tool_call.tool: part.tool_call.binding for part in message.parts if part.HasField("tool_call")}
    assert {
        "pay": (0, "function"),
        "one_listings": (1, "mcp"),
        "mine": (2, None),
        "theirs": (3, None),
        "nobody": (0, None),
    } == {name: (bound.declaration, bound.WhichOneof("implementation")) for name, bound in bindings.items()}
    assert ["nobody"] == [name for name, bound in bindings.items() if not bound.digest]
    assert v1.McpBinding(server="one", tool="listings") == bindings["one_listings"].mcp
    assert "pay" == bindings["pay"].function
    assert bindings["pay"] == run.pending_inputs[0].call.binding
    assert [bindings["mine"], bindings["theirs"]] == [pending.binding for pending in run.pending_calls]
    assert len({bound.digest for bound in bindings.values()}) == 5


@pytest.mark.parametrize(
    ("tools", "changed", "called"),
    [
        ([function()], [function(implementation="refund")], "pay"),
        ([function()], [], "pay"),
        ([function(), function("refund", "refund")], [function("refund", "refund"), function()], "pay"),
        ([mcp("one", requires_approval=True)], [client_tool("echo")], 'echo {"text": "paid"}'),
    ],
    ids=["another-function", "removed", "another-order", "to-the-caller"],
)
async def test_an_approved_call_runs_what_it_was_bound_to_whatever_its_agent_became(
    tmp_path: Path, tools: list[v1.Tool], changed: list[v1.Tool], called: str
) -> None:
    """Also by another process, days later."""
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    async with running(store, toolbox=toolbox(one=MCP)) as served:
        await session(served, *tools)
        asked = await call(served, called)
        assert WAITING == asked.state
        await agent(served, *changed)
    async with running(store, toolbox=toolbox(one=MCP)) as served:
        await answer(served, asked)
        run = await rest(served, asked)
        assert (SUCCEEDED, []) == (run.state, list(run.pending_calls))
        assert ["paid"] == results(await log_of(served, CASE))


@pytest.mark.parametrize(
    ("given", "called", "told"),
    [
        (function(), "pay", "This server has no function 'pay'."),
        (mcp("one", requires_approval=True), "listings", "This server has no MCP server 'one'."),
    ],
    ids=["function", "server"],
)
async def test_a_tool_that_is_gone_between_approval_and_call_fails_the_call(
    tmp_path: Path, given: v1.Tool, called: str, told: str
) -> None:
    """Another server's tool of the same name does not take its place."""
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    async with running(store, toolbox=toolbox(one=MCP, two=MCP)) as served:
        await session(served, given)
        asked = await call(served, called)
    async with running(store, toolbox=make_toolbox((), {"two": MCP})) as served:
        await answer(served, asked)
        await rest(served, asked)
        assert [told] == results(await log_of(served, CASE))


@pytest.mark.parametrize("policy", [v1.Tool.ON_INTERRUPT_FAIL, v1.Tool.ON_INTERRUPT_RETRY])
async def test_an_interrupted_call_is_treated_as_its_own_declaration_says(
    tmp_path: Path, model: OpenAIServer, policy: v1.Tool.OnInterrupt.ValueType
) -> None:
    """A name may begin with the prefix of another declaration: a payment that must not be repeated is not."""
    other = {v1.Tool.ON_INTERRUPT_FAIL: v1.Tool.ON_INTERRUPT_RETRY}.get(policy, v1.Tool.ON_INTERRUPT_FAIL)
    tools = [
        mcp("one", "wait", prefix="pay", on_interrupt=other),
        mcp("one", "wait", prefix="pay_wire", on_interrupt=policy),
    ]
    config = tmp_path / "mcp.json"
    server = {"command": sys.executable, "args": MCP_ARGUMENTS, "cwd": str(ROOT), "connectTimeout": 120}
    config.write_text(json.dumps({"mcpServers": {"one": server}}))
    env = {"OPENAI_API_KEY": "test-key", "OPENAI_BASE_URL": model.url, "OPENAI_MODEL": "stub-1"}
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    async with Witness.listening(tmp_path / "witness") as witness:
        model.script(tool_calls(("pay_wire_wait", json.dumps({"witness": witness.path}))), reply("Ended."))
        spawned = await Spawned.start(store, tmp_path / "log", "--mcp-config", str(config), env=env)
        try:
            async with grpc.aio.insecure_channel(spawned.address) as channel:
                stubs = Running(None, spawned.address, channel)  # type: ignore[arg-type]
                await session(stubs, *tools)
                start = v1.StartRun(session=CASE, run_id="r1", messages=[said("Go")])
                await stubs.runs.CreateRun(v1.CreateRunRequest(start=start))
                assert (await witness.heard()).startswith("started ")
        finally:
            await spawned.kill()
        providers = {"openai": OpenAIProvider("test-key", model.url, "stub-1")}
        async with running(store, providers, toolbox=toolbox(one=MCP)) as served:
            if policy == v1.Tool.ON_INTERRUPT_RETRY:
                while not (await witness.heard()).startswith("started "):
                    pass
                await served.runs.CancelRun(v1.CancelRunRequest(name=f"{CASE}/runs/r1"))
            else:
                run = await served.runs.WaitRun(v1.WaitRunRequest(name=f"{CASE}/runs/r1"))
                assert SUCCEEDED == run.state
            log = await log_of(served, CASE)
    begun = [event.tool_started.attempt for event in log if event.HasField("tool_started")]
    assert ([1, 2] if policy == v1.Tool.ON_INTERRUPT_RETRY else [1]) == begun


async def test_a_time_out_is_that_of_the_calls_own_declaration(served: Running, tmp_path: Path) -> None:
    short = Duration(nanos=1_000_000)
    tools = [mcp("one", "wait", prefix="one"), mcp("two", "wait", prefix="one_more", timeout=short)]
    await session(served, *tools)
    async with Witness.listening(tmp_path / "witness") as witness:
        run = await call(served, f"one_more_wait {json.dumps({'witness': witness.path})}")
    assert SUCCEEDED == run.state
    assert ["The tool took longer than 0.001 seconds."] == results(await log_of(served, CASE))


CLASHES = {
    "listed": ([client_tool("echo"), mcp("one", "echo")], ["agent.llm.tools[1].mcp.tools"]),
    "listed-first": ([mcp("one", "echo"), client_tool("echo")], ["agent.llm.tools[0].mcp.tools"]),
    "two-servers": ([mcp("one", "a", "b"), mcp("two", "c", "b")], ["agent.llm.tools[1].mcp.tools"]),
    "behind-a-prefix": ([function("files_read"), mcp("one", "read", prefix="files")], ["agent.llm.tools[1].mcp.tools"]),
    "two-prefixes": ([mcp("one", "b_c", prefix="a"), mcp("two", "c", prefix="a_b")], ["agent.llm.tools[1].mcp.tools"]),
    "changed": ([function("a_b"), mcp("one", "a.b")], ["agent.llm.tools[1].mcp.tools"]),
    "whole-twice": ([mcp("one"), mcp("one", requires_approval=True)], ["agent.llm.tools[1].mcp.server"]),
    "whole-and-one": ([mcp("one"), mcp("one", "echo", requires_approval=True)], ["agent.llm.tools[1].mcp.server"]),
    "one-and-whole": ([mcp("one", "echo", requires_approval=True), mcp("one")], ["agent.llm.tools[1].mcp.server"]),
    "too-many": ([mcp("one", *map(str, range(129)))], ["agent.llm.tools[0].mcp.tools"]),
    "no-name": ([mcp("one", "")], ["agent.llm.tools[0].mcp.tools"]),
    "apart": ([mcp("one", "a"), mcp("one", "b", requires_approval=True), mcp("one", prefix="c"), mcp("two")], []),
}


@pytest.mark.parametrize(("tools", "fields"), CLASHES.values(), ids=CLASHES.keys())
async def test_tools_that_yield_one_name_are_refused_where_they_are_declared(
    served: Running, tools: list[v1.Tool], fields: list[str]
) -> None:
    """As far as the declarations tell."""
    found: set[str] = set()
    try:
        await agent(served, *tools)
    except grpc.aio.AioRpcError as refused:
        assert "INVALID_FIELD" == reason_of(refused)
        found = fields_of(refused)
    assert set(fields) == found


async def test_a_callers_tool_cannot_have_the_name_of_one_that_the_agent_lists(served: Running) -> None:
    await session(served, mcp("one", "echo", requires_approval=True))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(served, "echo", client_tools=[client_tool("other"), client_tool("echo")])
    assert {"start.client_tools[1].name"} == fields_of(refused.value)


@pytest.mark.parametrize(
    ("tools", "brought", "told"),
    [
        ([mcp("one"), mcp("two", requires_approval=True)], [], "'echo' of the MCP server 'two'"),
        ([mcp("one", requires_approval=True)], [client_tool("echo")], "a client tool"),
        ([function("echo"), mcp("one")], [], "the function 'pay'"),
        ([mcp("one", prefix="a"), function("a_echo")], [], "'echo' of the MCP server 'one'"),
    ],
    ids=["two-servers", "the-caller", "a-function", "a-prefix"],
)
async def test_tools_whose_names_only_their_server_knows_fail_the_run_when_they_clash(
    served: Running, tools: list[v1.Tool], brought: list[v1.Tool], told: str
) -> None:
    """Before the model is asked: one that was left out could hide that the other needs approval."""
    await session(served, *tools)
    run = await call(served, "echo", client_tools=brought)
    assert (FAILED, v1.ERROR_REASON_TOOL_ERROR) == (run.state, run.error.reason)
    assert "echo'" in run.error.message
    assert told in run.error.message
    assert 0 == run.usage.model_calls


async def test_an_answer_is_remembered_for_what_was_called(served: Running) -> None:
    await session(served, function())
    assert SUCCEEDED == (await approved(served, "pay")).state
    found = await served.sessions.GetSession(v1.GetSessionRequest(name=CASE))
    (answered,) = found.remembered.values()
    log = await log_of(served, CASE)
    (resolved,) = [event for event in log if event.HasField("input_resolved")]
    assert [resolved.input_resolved.response.input_id] == list(found.remembered)
    assert ("agents/clerk", "pay", True) == (answered.agent, answered.tool, answered.approved)
    assert resolved.sequence == answered.sequence
    assert 32 == len(answered.digest)
    assert SUCCEEDED == (await call(served, "pay")).state


@pytest.mark.parametrize(
    ("changed", "asks"),
    [
        (function(implementation="refund"), True),
        (function(description="Pays twice."), True),
        (function(timeout=Duration(seconds=1)), True),
        (client_tool("pay", requires_approval=True), True),
        (function(), False),
    ],
    ids=["implementation", "description", "timeout", "to-the-caller", "the-instruction-only"],
)
async def test_a_changed_declaration_of_a_tool_needs_a_new_approval(
    served: Running, changed: v1.Tool, asks: bool
) -> None:
    """An agent is updated between the answer and the next call."""
    await session(served, function())
    await approved(served, "pay")
    await agent(served, function("refund", "refund"), changed, instruction="Be brief.")
    run = await call(served, "pay")
    assert (WAITING if asks else SUCCEEDED) == run.state
    assert asks == bool(run.pending_inputs)


async def test_another_agents_tool_is_asked_about_though_it_is_the_same(served: Running) -> None:
    await session(served, function())
    await approved(served, "pay")
    other = await agent(served, function(), name="other")
    assert WAITING == (await call(served, "pay", agent=other)).state


async def test_a_callers_tool_is_answered_for_by_its_own_approvals_only(served: Running) -> None:
    """An agent's tool that the caller runs is another one, though its declaration is the same."""
    mine = client_tool("pay", requires_approval=True)
    await session(served, mine)
    run = await approved(served, "pay")
    assert ["pay"] == [pending.tool for pending in run.pending_calls]
    await cancel(served, run)
    await agent(served)
    asked = await call(served, "pay", client_tools=[mine])
    assert 1 == len(asked.pending_inputs)
    await answer(served, asked)
    await cancel(served, asked)
    run = await call(served, "pay", client_tools=[mine])
    assert ([], 1) == (list(run.pending_inputs), len(run.pending_calls))
    await cancel(served, run)
    other = client_tool("pay", requires_approval=True, description="Another.")
    assert 1 == len((await call(served, "pay", client_tools=[other])).pending_inputs)


async def test_of_two_answers_the_newest_counts_and_a_rewind_takes_it_back(served: Running) -> None:
    """Two calls of one tool are asked about at once, and answered differently."""
    await session(served, function())
    asked = await call(served, "pay", "pay")
    await answer(served, asked, DENY, index=1)
    await answer(served, asked, APPROVE, index=0)
    await rest(served, asked)
    assert SUCCEEDED == (await call(served, "pay")).state
    told = results(await log_of(served, CASE))
    assert ["It was denied.", "paid", "paid"] == told, "each call got its own answer"
    log = await log_of(served, CASE)
    denial, approval = [event.sequence for event in log if event.HasField("input_resolved")]
    for sequence, left in ((approval - 1, "This tool was denied before."), (denial - 1, None)):
        await served.sessions.RewindSession(v1.RewindSessionRequest(name=CASE, to_sequence=sequence))
        run = await call(served, "pay")
        assert (WAITING if left is None else SUCCEEDED) == run.state
        if left is not None:
            assert left == results(await log_of(served, CASE))[-1]


async def test_a_run_that_goes_back_by_itself_asks_again(served: Running) -> None:
    """A start that rewinds commits both at once."""
    await session(served, function())
    await approved(served, "pay")
    assert WAITING == (await call(served, "pay", rewind_to_sequence=0)).state


async def test_an_answer_for_the_run_and_one_for_the_session_are_one_order(served: Running) -> None:
    await session(served, function())
    await approved(served, "pay")
    await agent(served, function(description="Changed."))
    asked = await call(served, "pay", "pay")
    await answer(served, asked, APPROVE, v1.InputResponse.REMEMBER_RUN, index=0)
    await answer(served, asked, DENY, ALWAYS, index=1)
    run = await rest(served, asked)
    assert [True] == [held.approved for held in run.remembered.values()]
    assert SUCCEEDED == (await call(served, "pay")).state
    assert "This tool was denied before." == results(await log_of(served, CASE))[-1]


async def test_a_fork_remembers_nothing(served: Running) -> None:
    await session(served, function())
    await approved(served, "pay")
    fork = await served.sessions.ForkSession(v1.ForkSessionRequest(name=CASE))
    assert {} == dict(fork.remembered)
    start = v1.StartRun(session=fork.name, messages=[said("/call pay")])
    assert WAITING == (await served.runs.Invoke(v1.InvokeRequest(start=start))).run.state

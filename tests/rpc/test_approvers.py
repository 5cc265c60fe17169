"""Who answers an approval: the least role that the call's tool names, whatever a caller does to answer it."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from notecase import v1
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.tools.functions import tool
from notecase_server.tools.mcp_settings import McpServerSettings
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import durable, fields_of, reason_of, said
from tests.support.callers import Words
from tests.support.server import Running, running

ROOT = Path(__file__).parents[2]
MCP = McpServerSettings(
    command=sys.executable, args=("-m", "tests.support.mcp_server", "stdio"), cwd=str(ROOT), connect_timeout=120
)
APPROVE, DENY, ANSWER = (
    v1.InputResponse.DECISION_APPROVE,
    v1.InputResponse.DECISION_DENY,
    v1.InputResponse.DECISION_ANSWER,
)
ANYBODY, USER, DEVELOPER, ADMIN = (
    v1.Tool.APPROVER_UNSPECIFIED,
    v1.Tool.APPROVER_USER,
    v1.Tool.APPROVER_DEVELOPER,
    v1.Tool.APPROVER_ADMIN,
)
CALLERS = ("ada", "user", "developer", "admin")
"""Each with a different key; Ada's is bound to her."""

CASE = "sessions/case"
QUEUED = v1.CommandResult.DISPOSITION_QUEUED
WAITING, SUCCEEDED, CANCELLED = v1.Run.STATE_WAITING, v1.Run.STATE_SUCCEEDED, v1.Run.STATE_CANCELLED
STEER, FOLLOW_UP, INTERRUPT = (
    v1.UserInput.WHEN_STEER,
    v1.UserInput.WHEN_FOLLOW_UP,
    v1.UserInput.WHEN_INTERRUPT,
)


@tool
async def pay() -> str:
    return "paid"


def paying(approver: v1.Tool.Approver.ValueType = ANYBODY, name: str = "pay", **fields: Any) -> v1.Tool:
    given: dict[str, Any] = {"server": v1.ServerTool(function="pay"), **fields}
    return v1.Tool(name=name, requires_approval=True, approver=approver, **given)


class Office:
    """A server that takes keys, with one of each role and one of Ada's."""

    def __init__(self, served: Running) -> None:
        self.served = served
        self.keys: dict[str, Words] = {}

    async def hire(self) -> None:
        for who in CALLERS:
            role = v1.Key.ROLE_USER if who == "ada" else v1.Key.Role.Value(f"ROLE_{who.upper()}")
            key = v1.Key(role=role, user="users/ada" if who == "ada" else "")
            _, secret = await self.served.server._keys.create("acme", key)
            self.keys[who] = (("authorization", f"Bearer {secret}"),)

    async def agent(self, *tools: v1.Tool) -> None:
        agent = v1.Agent(name="agents/clerk", llm=v1.LlmAgent(tools=tools))
        request = v1.UpdateAgentRequest(agent=agent, allow_missing=True)
        await self.served.agents.UpdateAgent(request, metadata=self.keys["developer"])

    async def session(self, *tools: v1.Tool) -> None:
        """Ada's, with an agent that has these tools."""
        await self.agent(*tools)
        request = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
        await self.served.sessions.CreateSession(request, metadata=self.keys["ada"])

    async def run(self, *calls: str) -> v1.Run:
        """A run of Ada's whose model makes these calls, once it waits or has ended."""
        start = v1.StartRun(session=CASE, messages=[said("\n".join(f"/call {call}" for call in calls))])
        return (await self.served.runs.Invoke(v1.InvokeRequest(start=start), metadata=self.keys["ada"])).run

    async def send(self, who: str, run: v1.Run, **command: Any) -> v1.CommandResult:
        request = v1.SendCommandRequest(session=CASE, run=run.name, command=v1.RunRequest(**command))
        return (await self.served.runs.SendCommand(request, metadata=self.keys[who])).result

    async def answer(self, who: str, run: v1.Run, decision: Any = APPROVE, index: int = 0, **fields: Any) -> None:
        asked = run.pending_inputs[index].input_id
        await self.send(who, run, input_response=v1.InputResponse(input_id=asked, decision=decision, **fields))

    async def say(self, who: str, run: v1.Run, text: str, when: Any = STEER) -> v1.CommandResult:
        return await self.send(who, run, input=v1.UserInput(messages=[said(text)], when=when))

    async def found(self, run: v1.Run) -> v1.Run:
        return await self.served.runs.GetRun(v1.GetRunRequest(name=run.name), metadata=self.keys["admin"])

    async def rest(self, run: v1.Run) -> v1.Run:
        """Returns the run when it has ended or waits again."""
        request = v1.WaitRunRequest(name=run.name, after_sequence=run.last_sequence)
        return await self.served.runs.WaitRun(request, metadata=self.keys["ada"])

    async def log(self) -> list[v1.Event]:
        request = v1.WatchEventsRequest(name=CASE, after_sequence=0)
        return durable([frame async for frame in self.served.runs.WatchEvents(request, metadata=self.keys["ada"])])


async def refusal(call: Any) -> tuple[str, set[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return reason_of(refused.value), fields_of(refused.value)


@asynccontextmanager
async def opened(url: str, **servers: McpServerSettings) -> AsyncIterator[Office]:
    store = await open_store(url, now)
    toolbox = make_toolbox((__name__,), servers)
    async with running(store, authenticators=(), auth="keys", toolbox=toolbox) as served:
        office = Office(served)
        await office.hire()
        yield office


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"


@pytest.fixture
async def office(url: str) -> AsyncIterator[Office]:
    async with opened(url) as made:
        yield made


MAY = {
    USER: {"ada", "user", "developer", "admin"},
    ANYBODY: {"user", "developer", "admin"},
    DEVELOPER: {"developer", "admin"},
    ADMIN: {"admin"},
}


@pytest.mark.parametrize("approver", MAY, ids=v1.Tool.Approver.Name)
async def test_an_approval_is_answered_by_who_has_the_role_that_its_tool_names(office: Office, approver: Any) -> None:
    await office.session(paying(approver))
    for who in CALLERS:
        run = await office.run("pay")
        assert approver == run.pending_inputs[0].approver
        if who in MAY[approver]:
            await office.answer(who, run)
            assert SUCCEEDED == (await office.rest(run)).state
            continue
        for decision in (APPROVE, DENY):
            refused = await refusal(office.answer(who, run, decision, remember=v1.InputResponse.REMEMBER_SESSION))
            assert ("ROLE_MISSING", {"input_response.input_id"}) == refused
        assert run == await office.found(run)
        await office.served.runs.CancelRun(v1.CancelRunRequest(name=run.name), metadata=office.keys[who])


async def test_a_remembered_approval_comes_from_a_caller_who_may_approve(office: Office) -> None:
    await office.session(paying(USER), paying(ADMIN, "refund"))
    for name, who in (("pay", "ada"), ("refund", "admin")):
        run = await office.run(name)
        await office.answer(who, run, remember=v1.InputResponse.REMEMBER_SESSION)
        assert SUCCEEDED == (await office.rest(run)).state
        assert SUCCEEDED == (await office.run(name)).state


async def test_it_is_the_setting_of_the_declaration_that_the_call_was_bound_to(office: Office) -> None:
    """Whatever the agent has become meanwhile."""
    await office.session(paying(ADMIN))
    run = await office.run("pay")
    await office.agent(paying(USER))
    assert "ROLE_MISSING" == (await refusal(office.answer("ada", run)))[0]
    await office.answer("admin", run)
    assert SUCCEEDED == (await office.rest(run)).state
    run = await office.run("pay")
    await office.answer("ada", run)
    assert SUCCEEDED == (await office.rest(run)).state


async def test_it_holds_for_tools_of_every_kind() -> None:
    """One of the caller's, and all of an MCP server's."""
    async with opened("memory:", one=MCP) as office:

        def mine(approver: v1.Tool.Approver.ValueType, name: str) -> v1.Tool:
            return paying(approver, name, server=None, client=v1.ClientTool())

        mcp = paying(USER, "", server=None, mcp=v1.McpTool(server="one"))
        await office.session(mcp, mine(USER, "weigh"), mine(ANYBODY, "wire"))
        for call, needed in (('echo {"text": "hello"}', USER), ("weigh", USER), ("wire", ANYBODY)):
            run = await office.run(call)
            assert [needed] == [asked.approver for asked in run.pending_inputs]
            if needed is ANYBODY:
                assert "ROLE_MISSING" == (await refusal(office.answer("ada", run)))[0]
            else:
                await office.answer("ada", run)
                assert [] == list((await office.found(run)).pending_inputs)
            if call != 'echo {"text": "hello"}':
                await office.served.runs.CancelRun(v1.CancelRunRequest(name=run.name), metadata=office.keys["ada"])
            else:
                assert SUCCEEDED == (await office.rest(run)).state


async def test_a_question_needs_no_approver(office: Office) -> None:
    await office.session(v1.Tool(name="ask_user", server=v1.ServerTool(function="ask_user"), approver=ADMIN))
    run = await office.run('ask_user {"question": "Which?"}')
    await office.answer("ada", run, ANSWER, answer="This.")
    assert SUCCEEDED == (await office.rest(run)).state
    run = await office.run('ask_user {"question": "Which?"}')
    await office.say("ada", run, "/say Another.")
    assert SUCCEEDED == (await office.rest(run)).state


async def test_an_approver_that_is_not_known_is_refused(office: Office) -> None:
    refused = await refusal(office.agent(paying(99)))  # type: ignore[arg-type]
    assert ("INVALID_FIELD", {"agent.llm.tools[0].approver"}) == refused


async def test_what_is_said_waits_behind_an_approval_that_its_sender_may_not_answer(office: Office) -> None:
    await office.session(paying(DEVELOPER))
    run = await office.run("pay")
    for who, when in (("ada", STEER), ("user", FOLLOW_UP)):
        assert QUEUED == (await office.say(who, run, f"/say Heard {who}.", when)).disposition
        assert ("ROLE_MISSING", {"input"}) == await refusal(office.say(who, run, "Stop.", INTERRUPT))
    assert run.pending_inputs == (await office.found(run)).pending_inputs
    await office.answer("developer", run)
    assert SUCCEEDED == (await office.rest(run)).state
    log = await office.log()
    assert {FOLLOW_UP} == {event.command_queued.input.when for event in log if event.HasField("command_queued")}
    resolved = next(event.sequence for event in log if event.HasField("input_resolved"))
    texts = [
        event.message_added.parts[0].text
        for event in log
        if event.HasField("message_added")
        and event.sequence > resolved
        and event.message_added.role == v1.Message.ROLE_USER
    ]
    assert ["/say Heard ada.", "/say Heard user."] == texts


async def test_a_message_from_a_caller_who_may_answer_denies(office: Office) -> None:
    for approver, who in ((USER, "ada"), (ANYBODY, "user"), (ADMIN, "admin")):
        if approver == USER:
            await office.session(paying(approver))
        else:
            await office.agent(paying(approver))
        run = await office.run("pay")
        await office.say(who, run, "/say Rather not.")
        assert SUCCEEDED == (await office.rest(run)).state
        resolved = [event.input_resolved for event in await office.log() if event.HasField("input_resolved")]
        assert (DENY, "/say Rather not.") == (resolved[-1].response.decision, resolved[-1].response.reason)


async def test_what_was_said_before_denies_no_approval_that_is_left(url: str, tmp_path: Path) -> None:
    """Neither when the run has nothing else to wait for, nor after a restart; but what a developer says does."""
    async with opened(url) as office:
        weigh = v1.Tool(name="weigh", client=v1.ClientTool())
        await office.session(weigh, paying(DEVELOPER))
        run = await office.run("weigh", "pay")
        assert QUEUED == (await office.say("ada", run, "/say Heard.")).disposition
        result = v1.ToolResult(call_id=run.pending_calls[0].call_id, result=[v1.Part(text="heavy")])
        await office.send("ada", run, tool_result=result)
        if url == "memory:":
            await settled(office, run)
            return
        keys = office.keys
    store = await open_store(url, now)
    toolbox = make_toolbox((__name__,), {})
    async with running(store, authenticators=(), auth="keys", toolbox=toolbox) as served:
        office = Office(served)
        office.keys = keys
        await settled(office, run)


async def settled(office: Office, run: v1.Run) -> None:
    """Lets the run come to its end: its approval waits, until a developer says something instead."""
    found = await office.found(run)
    assert (WAITING, run.pending_inputs) == (found.state, found.pending_inputs)
    await office.say("developer", run, "/say Rather not.")
    assert SUCCEEDED == (await office.rest(found)).state
    texts = [part.text for event in await office.log() for part in event.message_added.parts if part.text]
    assert ["/say Rather not.", "/say Heard."] == [text for text in texts if text.startswith("/say")]


async def test_a_call_is_cancelled_by_callers_who_may_answer_it_and_a_run_by_any_caller(office: Office) -> None:
    await office.session(paying(DEVELOPER))
    run = await office.run("pay")
    cancel = v1.CancelCommand(call_id=run.pending_inputs[0].call.call_id)
    by_call = v1.CancelRunRequest(name=run.name, cancel=cancel)
    for who in ("ada", "user"):
        assert ("ROLE_MISSING", {"cancel.call_id"}) == await refusal(office.send(who, run, cancel=cancel))
        call = office.served.runs.CancelRun(by_call, metadata=office.keys[who])
        assert ("ROLE_MISSING", {"cancel.call_id"}) == await refusal(call)
    assert run == await office.found(run)
    await office.send("developer", run, cancel=cancel)
    assert SUCCEEDED == (await office.rest(run)).state
    for mode in (v1.CancelCommand.MODE_IMMEDIATE, v1.CancelCommand.MODE_AFTER_TURN):
        run = await office.run("pay")
        await office.send("ada", run, cancel=v1.CancelCommand(mode=mode))
        assert CANCELLED == (await office.rest(run)).state

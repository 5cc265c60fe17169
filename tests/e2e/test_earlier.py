"""What an earlier version left: its store is served, its runs go on as their tools say, its exports are imported."""

import gzip
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from notecase import v1

from tests.e2e.driving import durable, reason_of, said
from tests.e2e.test_transfer import load
from tests.store.test_migration import FIXTURES, known, told
from tests.support.crashing import EFFECTS, GATE, TOOLS, Gate, effects_of
from tests.support.server import Running, Spawned, running

SUCCEEDED, FAILED, DENIED = v1.ToolCall.OUTCOME_SUCCEEDED, v1.ToolCall.OUTCOME_FAILED, v1.ToolCall.OUTCOME_DENIED
APPROVE, ANSWER = v1.InputResponse.DECISION_APPROVE, v1.InputResponse.DECISION_ANSWER
LOST = "Its process was lost; it may or may not have taken effect."


class Left:
    """A server on what an earlier version left."""

    def __init__(self, channel: grpc.aio.Channel, gate: Gate, effects: Path) -> None:
        self.sessions = v1.SessionServiceStub(channel)
        self.runs = v1.RunServiceStub(channel)
        self.messages = v1.MessageServiceStub(channel)
        self.agents = v1.AgentServiceStub(channel)
        self.gate = gate
        self.effects = effects

    async def run(self, session: str, run: str = "r1") -> v1.Run:
        """The run once it has ended or waits."""
        done: v1.Run = await self.runs.WaitRun(v1.WaitRunRequest(name=f"sessions/{session}/runs/{run}"))
        return done

    async def calls(self, session: str) -> dict[str, v1.ToolCall]:
        """The calls of the session's last reply that has any, by tool."""
        page = await self.messages.ListMessages(v1.ListMessagesRequest(parent=f"sessions/{session}"))
        found = [[part.tool_call for part in message.parts if part.HasField("tool_call")] for message in page.messages]
        return {call.tool: call for call in [calls for calls in found if calls][-1]}

    async def send(self, session: str, **command: Any) -> v1.CommandResult:
        request = v1.SendCommandRequest(session=f"sessions/{session}", command=v1.RunRequest(**command))
        result: v1.CommandResult = (await self.runs.SendCommand(request)).result
        assert result.disposition == v1.CommandResult.DISPOSITION_APPLIED, result
        return result

    async def answer(self, session: str, asked: v1.Run, **response: Any) -> None:
        (request,) = asked.pending_inputs
        await self.send(session, input_response=v1.InputResponse(input_id=request.input_id, **response))

    async def log(self, session: str) -> list[v1.Event]:
        watch = v1.WatchEventsRequest(name=f"sessions/{session}", after_sequence=0)
        events: list[v1.Event] = []
        async for frame in self.runs.WatchEvents(watch):
            events += durable([frame])
            if frame.batch.caught_up:
                break
        return events


@pytest.fixture
async def left(tmp_path: Path) -> AsyncIterator[Left]:
    (tmp_path / "store.db").write_bytes(gzip.decompress((FIXTURES / "schema-1.db.gz").read_bytes()))
    command: dict[str, Any] = {"command": sys.executable, "args": ["-m", "tests.support.mcp_server", "stdio"]}
    desk = {**command, "connectTimeout": 300}
    settings = tmp_path / "mcp.json"
    settings.write_text(json.dumps({"mcpServers": {"desk": desk}}))
    async with Gate() as gate:
        server = await Spawned.start(
            f"sqlite:{tmp_path / 'store.db'}",
            tmp_path / "log",
            *("--tools", TOOLS, "--mcp-config", str(settings)),
            env={EFFECTS: str(tmp_path / "effects"), GATE: str(gate.port)},
            forked=True,
        )
        try:
            assert "store_migrated" in server.log.read_text()
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield Left(channel, gate, tmp_path / "effects")
        finally:
            await server.kill()


@pytest.mark.parametrize(
    ("session", "tool", "run_state"),
    [
        ("fail", "slow_fail", v1.Run.STATE_SUCCEEDED),
        ("steered", "slow_fail", v1.Run.STATE_SUCCEEDED),
        ("ending", "slow_fail", v1.Run.STATE_CANCELLED),
        ("mcp-prefix", "desk_pay_wait", v1.Run.STATE_SUCCEEDED),
    ],
)
async def test_what_is_declared_to_fail_is_not_run_again(
    left: Left, session: str, tool: str, run_state: v1.Run.State.ValueType
) -> None:
    """By the declaration the call meant: the server's tools behind another prefix may be run again, this one not."""
    done = await left.run(session)
    assert (done.state, done.attempt) == (run_state, 2)
    call = (await left.calls(session))[tool]
    assert (call.outcome, call.error, call.attempt) == (FAILED, LOST, 1)


async def test_what_may_be_run_again_is(left: Left) -> None:
    calls = {session: (await left.calls(session))["slow_retry"] for session in ("retry", "retried", "queue")}
    arrived = {await left.gate.arrival() for _ in calls}
    assert arrived == {
        (calls["retry"].call_id, 2),
        (calls["retried"].call_id, 3),
        (calls["queue"].call_id, 2),
    }
    left.gate.open()
    for session in calls:
        assert (await left.run(session)).state == v1.Run.STATE_SUCCEEDED
    assert set(effects_of(left.effects).values()) == {1}
    for run in ("r2", "r3"):
        assert (await left.run("queue", run)).state == v1.Run.STATE_SUCCEEDED
    assert (await left.run("queue", "r3")).agent_revision == 1


async def test_calls_without_a_decision_are_asked_about(left: Left) -> None:
    bare = await left.run("mcp-bare")
    assert bare.pending_inputs[0].kind == v1.InputRequest.KIND_INTERRUPTED_CALL
    await left.answer("mcp-bare", bare, decision=ANSWER, answer="It waited.")
    assert (await left.run("mcp-bare")).state == v1.Run.STATE_SUCCEEDED
    asked = await left.run("ask")
    assert [call.tool for call in asked.pending_calls] == ["measure"]
    await left.answer("ask", asked, decision=APPROVE)
    call = (await left.calls("ask"))["slow_ask"]
    while (arrived := await left.gate.arrival())[0] != call.call_id:
        pass
    assert arrived[1] == 2
    left.gate.open()
    result = v1.ToolResult(call_id=asked.pending_calls[0].call_id, result=[v1.Part(text="12 g")])
    await left.send("ask", tool_result=result)
    assert (await left.run("ask")).state == v1.Run.STATE_SUCCEEDED


async def test_what_waited_for_a_person_is_answered(left: Left) -> None:
    question = await left.run("question")
    await left.answer("question", question, decision=ANSWER, answer="The left one.")
    assert (await left.run("question")).state == v1.Run.STATE_SUCCEEDED
    interrupted = await left.run("interrupted")
    await left.answer("interrupted", interrupted, decision=APPROVE)
    call = (await left.calls("interrupted"))["slow_ask"]
    while (await left.gate.arrival())[0] != call.call_id:
        pass
    left.gate.open()
    assert (await left.run("interrupted")).state == v1.Run.STATE_SUCCEEDED


async def test_what_waited_for_a_caller_is_answered(left: Left) -> None:
    waiting = await left.run("client")
    assert {call.tool for call in waiting.pending_calls} == {"measure", "weigh"}
    for call in waiting.pending_calls:
        await left.send("client", tool_result=v1.ToolResult(call_id=call.call_id, result=[v1.Part(text="12 g")]))
    assert (await left.run("client")).state == v1.Run.STATE_SUCCEEDED


async def test_an_answer_from_an_older_file_is_asked_again_and_a_new_one_applies(left: Left) -> None:
    """A tool of a caller that waited for approval goes to the caller; what is remembered from then on holds for it."""
    waiting = await left.run("approval", "r2")
    await left.answer("approval", waiting, decision=APPROVE, remember=v1.InputResponse.REMEMBER_SESSION)
    waiting = await left.run("approval", "r2")
    (call,) = waiting.pending_calls
    await left.send("approval", tool_result=v1.ToolResult(call_id=call.call_id, result=[v1.Part(text="12 g")]))
    assert (await left.run("approval", "r2")).state == v1.Run.STATE_SUCCEEDED
    start = v1.StartRun(session="sessions/approval", run_id="r3", messages=[said("/call pay {} /call weigh {}")])
    await left.runs.CreateRun(v1.CreateRunRequest(start=start))
    again = await left.run("approval", "r3")
    assert [request.call.tool for request in again.pending_inputs] == ["pay"]
    assert [call.tool for call in again.pending_calls] == ["weigh"]


async def test_a_reply_that_was_under_way_is_made(left: Left) -> None:
    done = await left.run("reply")
    assert (done.state, done.attempt) == (v1.Run.STATE_SUCCEEDED, 2)
    assert done.reply.parts[0].text


async def test_a_request_that_was_carried_out_is_not_carried_out_again(left: Left) -> None:
    """What was deleted by it is there again where another request made it since."""
    session = v1.Session(display_name="Another")
    made = await left.sessions.CreateSession(v1.CreateSessionRequest(session_id="parent", session=session))
    await left.sessions.DeleteSession(v1.DeleteSessionRequest(name="sessions/parent", request_id="parent-gone"))
    assert await left.sessions.GetSession(v1.GetSessionRequest(name="sessions/parent")) == made
    agent = v1.Agent(llm=v1.LlmAgent(model="offline"))
    again = await left.agents.CreateAgent(v1.CreateAgentRequest(agent_id="former", agent=agent))
    assert again.revision == 3
    await left.agents.DeleteAgent(v1.DeleteAgentRequest(name="agents/former", request_id="agent-former-gone"))
    assert await left.agents.GetAgent(v1.GetAgentRequest(name="agents/former")) == again
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await left.agents.DeleteAgent(v1.DeleteAgentRequest(name="agents/clerk", request_id="agent-former-gone"))
    assert reason_of(refused.value) == "REQUEST_ID_REUSED"


async def test_a_log_of_before_is_watched_and_gone_back_in(left: Left) -> None:
    was = known()["default"]["sessions"]
    for session in ("talk", "rewound", "summed", "fork"):
        assert [told(event) for event in await left.log(session)] == was[f"sessions/{session}"]["events"]
    fork = v1.ForkSessionRequest(name="sessions/talk", session_id="branch", at_sequence=20)
    assert (await left.sessions.ForkSession(fork)).last_sequence >= 20
    rewound = await left.sessions.RewindSession(v1.RewindSessionRequest(name="sessions/talk", to_sequence=5))
    assert rewound.last_sequence > 35
    start = v1.StartRun(session="sessions/talk", run_id="later", messages=[said("/say Later.")])
    assert (await left.runs.Invoke(v1.InvokeRequest(start=start))).run.reply.parts[0].text == "Later."


@pytest.fixture(params=["memory", "sqlite"])
async def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Running]:
    async with running("memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'elsewhere.db'}") as server:
        yield server


async def exported(served: Running, session: str, with_blobs: bool) -> bytes:
    request = v1.ExportSessionRequest(name=session, with_blobs=with_blobs)
    return b"".join([piece.chunk async for piece in served.sessions.ExportSession(request)])


def records(file: bytes) -> bytes:
    """What is between the format's number and the checksum."""
    return file[9:-32]


@pytest.mark.parametrize("name", ["format-1", "format-1-content"])
async def test_an_export_of_the_first_format_is_imported_and_exported_in_the_second(
    elsewhere: Running, name: str
) -> None:
    file = (FIXTURES / f"{name}.case").read_bytes()
    made = await load(elsewhere, file, session_id="moved")
    again = await exported(elsewhere, made.name, with_blobs=True)
    assert (file[:9], again[:9]) == (b"notecase\1", b"notecase\2")
    assert records(again) == records(file)
    assert (await load(elsewhere, again, session_id="back")).last_sequence == made.last_sequence
    runs = (await elsewhere.runs.ListRuns(v1.ListRunsRequest(parent=made.name))).runs
    assert runs
    assert not any(run.remembered for run in runs)


@pytest.mark.parametrize(("name", "session"), [("format-1", "talk"), ("format-1-content", "content")])
async def test_an_export_of_a_converted_session_is_the_one_of_before(tmp_path: Path, name: str, session: str) -> None:
    """But for the format's number and the checksum."""
    (tmp_path / "store.db").write_bytes(gzip.decompress((FIXTURES / "schema-1.db.gz").read_bytes()))
    file = (FIXTURES / f"{name}.case").read_bytes()
    async with running(f"sqlite:{tmp_path / 'store.db'}") as served:
        again = await exported(served, f"sessions/{session}", with_blobs=True)
    assert records(again) == records(file)


@pytest.mark.parametrize(("version", "told_so"), [(0, "is in format 0"), (3, "newer notecase, in format 3")])
async def test_an_unknown_format_is_refused(elsewhere: Running, version: int, told_so: str) -> None:
    file = bytearray((FIXTURES / "format-1.case").read_bytes())
    file[8] = version
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await load(elsewhere, bytes(file), session_id="moved")
    assert reason_of(refused.value) == "IMPORT_INVALID"
    assert told_so in str(refused.value.details())

"""Answers: all that is wrong at once, one reason for what comes late, nothing larger than a client takes."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from notecase import v1

from tests.e2e.driving import fields_of, metadata_of, reason_of, said
from tests.e2e.test_bad_input import call
from tests.e2e.test_tools import answer, client_tool, result, start_with
from tests.support.openai_server import OpenAIServer, chunk, reply, stream, tool_calls
from tests.support.server import Running

LARGEST = 3 * (1 << 20) + (1 << 19)
"""Nothing that the server sends is larger: 3.5 MiB."""

DENY = v1.InputResponse.DECISION_DENY


async def refusal(attempt: Awaitable[Message]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await attempt
    return refused.value


# Updates that change nothing.


async def revisions(served: Running, name: str) -> list[int]:
    page = await served.agents.ListAgentRevisions(v1.ListAgentRevisionsRequest(name=name))
    return [agent.revision for agent in page.agents]


async def test_a_program_that_sets_its_agent_up_at_each_start_makes_one_revision(served: Running) -> None:
    """Whatever of the agent it names, with a mask or without, and whether it says what it read or only what it set."""
    llm = v1.LlmAgent(instruction="Deduce.", tools=[client_tool("weigh")])
    mine = v1.Agent(name="agents/sherlock", llm=llm, labels={"team": "night"})
    first = await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=mine, allow_missing=True))
    assert first.revision == 1
    for agent, paths in (
        (mine, []),
        (mine, ["*"]),
        (mine, ["llm.instruction", "labels"]),
        (v1.Agent(name=mine.name), []),
        (v1.Agent(name=mine.name), ["display_name", "output_key"]),
        (first, []),
    ):
        request = v1.UpdateAgentRequest(agent=agent, update_mask=FieldMask(paths=paths), allow_missing=True)
        assert await served.agents.UpdateAgent(request) == first
    assert await revisions(served, mine.name) == [1]
    mine.llm.tools[0].description = "Another."
    assert (await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=mine, allow_missing=True))).revision == 2


async def test_a_field_that_is_named_and_not_set_is_cleared_also_within_a_message_that_is_not_set(
    served: Running,
) -> None:
    llm = v1.LlmAgent(instruction="Deduce.", model="m", context=v1.Context(max_messages=5))
    made = await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=llm)))
    update = v1.UpdateAgentRequest(agent=v1.Agent(name=made.name))
    update.update_mask.paths.extend(["llm.instruction", "llm.context.max_messages"])
    changed = await served.agents.UpdateAgent(update)
    assert v1.LlmAgent(model="m", context=v1.Context()) == changed.llm
    update.update_mask.paths[:] = ["llm.generation.temperature"]
    assert changed == await served.agents.UpdateAgent(update), "no message is made of nothing"


async def test_an_update_that_changes_nothing_is_conditional_and_remembered_as_any(served: Running) -> None:
    made = await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent())))
    same = v1.UpdateAgentRequest(agent=v1.Agent(name=made.name, etag=made.etag), request_id="same")
    assert await served.agents.UpdateAgent(same) == made
    changed = v1.Agent(name=made.name, display_name="B", etag=made.etag)
    second = await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=changed))
    assert await served.agents.UpdateAgent(same) == made, "the first answer, although its etag is stale by now"
    refused = await refusal(served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=made)))
    assert (reason_of(refused), metadata_of(refused)) == ("ETAG_MISMATCH", {"etag": second.etag})
    same.agent.display_name = "C"
    assert reason_of(await refusal(served.agents.UpdateAgent(same))) == "REQUEST_ID_REUSED"
    missing = v1.UpdateAgentRequest(agent=v1.Agent(name="agents/none"))
    assert reason_of(await refusal(served.agents.UpdateAgent(missing))) == "AGENT_NOT_FOUND"


async def test_updates_of_different_fields_at_once_all_take_effect(served: Running) -> None:
    """An update that came second is merged again; of those with an etag only one succeeds."""
    made = await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent())))
    fields = {"display_name": "A", "description": "B", "output_key": "c"}
    updates = [v1.Agent(name=made.name, **{name: value}) for name, value in fields.items()]  # type: ignore[arg-type]
    await asyncio.gather(*(served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=agent)) for agent in updates))
    newest = await served.agents.GetAgent(v1.GetAgentRequest(name=made.name))
    assert {name: getattr(newest, name) for name in fields} == fields
    assert newest.revision == 4
    for index, agent in enumerate(updates):
        agent.etag, agent.display_name = newest.etag, str(index)
    told = await asyncio.gather(
        *(served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=agent)) for agent in updates), return_exceptions=True
    )
    lost = [reason_of(one) for one in told if isinstance(one, grpc.RpcError)]
    assert lost == ["ETAG_MISMATCH"] * 2
    assert (await served.agents.GetAgent(v1.GetAgentRequest(name=made.name))).revision == 5


# All that is wrong, at once.

BAD_TOOL = v1.Tool(name="weigh", parameters="[]", client=v1.ClientTool())
BAD_LLM = v1.LlmAgent(
    provider="acme", instruction="{% if %}", output_schema='{"type": 7}', tools=[BAD_TOOL], max_model_calls=-1
)
BAD_LLM_FIELDS = {
    "agent.llm.provider",
    "agent.llm.instruction",
    "agent.llm.output_schema",
    "agent.llm.tools[0].parameters",
    "agent.llm.max_model_calls",
}
LIST = {"page_size": -1, "page_token": "WzFd.AAAA"}
BAD_START: dict[str, Any] = {
    "session": "sessions/case",
    "agent": "clerk",
    "run_id": "A",
    "state": {"user": v1.Value()},
    "messages": [v1.Message(role=v1.Message.ROLE_ASSISTANT)],
    "client_tools": [v1.Tool(name="a b", client=v1.ClientTool())],
    "limits": v1.Limits(max_tool_calls=-1),
}
BAD_START_FIELDS = {
    "start.agent",
    "start.run_id",
    "start.state['user']",
    "start.messages[0].role",
    "start.messages[0].parts",
    "start.client_tools[0].name",
    "start.limits.max_tool_calls",
}

AT_ONCE: dict[str, tuple[str, Message, set[str]]] = {
    "CreateAgent": (
        "AgentService/CreateAgent",
        v1.CreateAgentRequest(agent_id="A", agent=v1.Agent(llm=BAD_LLM, labels={"?": ""}), request_id="x" * 200),
        {"agent_id", "request_id", "agent.labels['?']"} | BAD_LLM_FIELDS,
    ),
    "UpdateAgent": (
        "AgentService/UpdateAgent",
        v1.UpdateAgentRequest(
            agent=v1.Agent(name="agents/clerk", llm=BAD_LLM, output_key="app"),
            update_mask=FieldMask(paths=["llm", "output_key", "revision"]),
            request_id="x" * 200,
        ),
        {"update_mask", "request_id", "agent.output_key"} | BAD_LLM_FIELDS,
    ),
    "UpdateAgent with a bad name": (
        "AgentService/UpdateAgent",
        v1.UpdateAgentRequest(agent=v1.Agent(name="clerk", llm=BAD_LLM)),
        {"agent.name"} | BAD_LLM_FIELDS,
    ),
    "UpdateAgent of a part": (
        "AgentService/UpdateAgent",
        v1.UpdateAgentRequest(
            agent=v1.Agent(name="agents/none", llm=BAD_LLM), update_mask=FieldMask(paths=["llm.instruction", "llm.no"])
        ),
        {"update_mask"},
    ),
    "UpdateSession": (
        "SessionService/UpdateSession",
        v1.UpdateSessionRequest(session=v1.Session(name="case", agent="a"), update_mask=FieldMask(paths=["uid"])),
        {"session.name", "session.agent", "update_mask"},
    ),
    "ForkSession": (
        "SessionService/ForkSession",
        v1.ForkSessionRequest(
            name="case", at_sequence=-1, session_id="A", session=v1.Session(user="users/b", agent="b", labels={"?": ""})
        ),
        {"name", "at_sequence", "session_id", "session.user", "session.agent", "session.labels['?']"},
    ),
    "PutState": (
        "StateService/PutState",
        v1.PutStateRequest(name="case", key="k" * 300, request_id="x" * 200),
        {"name", "key", "value", "request_id"},
    ),
    "PutState too large": (
        "StateService/PutState",
        v1.PutStateRequest(name="sessions/case/state", key="user", value=v1.Value(string_value="x" * (1 << 20))),
        {"key", "value"},
    ),
    "UpdateState": (
        "StateService/UpdateState",
        v1.UpdateStateRequest(name="x", ops=[v1.StateOp(), v1.StateOp(key="a", append=v1.Value())], request_id="\n"),
        {"name", "ops[0].key", "ops[0]", "ops[1].append", "request_id"},
    ),
    "CreateRun": (
        "RunService/CreateRun",
        v1.CreateRunRequest(start=v1.StartRun(**BAD_START), request_id="\n"),
        {"request_id"} | BAD_START_FIELDS,
    ),
    "SendCommand": (
        "RunService/SendCommand",
        v1.SendCommandRequest(
            session="case",
            run="r",
            command=v1.RunRequest(
                command_id="\n",
                update_state=v1.StateUpdate(name="state", ops=[v1.StateOp(key="user"), v1.StateOp(key="k")]),
            ),
        ),
        {"session", "run", "command_id", "update_state.name", "update_state.ops[0]", "update_state.ops[1]"},
    ),
    "ListAgents": (
        "AgentService/ListAgents",
        v1.ListAgentsRequest(filter="colour = red", **LIST),  # type: ignore[arg-type]
        {"filter", "page_size", "page_token"},
    ),
    "ListAgentRevisions": (
        "AgentService/ListAgentRevisions",
        v1.ListAgentRevisionsRequest(name="a", **LIST),  # type: ignore[arg-type]
        {"name", "page_size", "page_token"},
    ),
    "ListSessions": (
        "SessionService/ListSessions",
        v1.ListSessionsRequest(filter="(", **LIST),  # type: ignore[arg-type]
        {"filter", "page_size", "page_token"},
    ),
    "ListRuns": (
        "RunService/ListRuns",
        v1.ListRunsRequest(parent="case", filter="state = SLEEPING", **LIST),  # type: ignore[arg-type]
        {"parent", "filter", "page_size", "page_token"},
    ),
    "ListMessages": (
        "MessageService/ListMessages",
        v1.ListMessagesRequest(parent="case", order_by="author", **LIST),  # type: ignore[arg-type]
        {"parent", "order_by", "page_size", "page_token"},
    ),
    "GetState": (
        "StateService/GetState",
        v1.GetStateRequest(name="case", at_sequence=-1, keys=["a"], **LIST),  # type: ignore[arg-type]
        {"name", "at_sequence", "page_size", "page_token"},
    ),
}


@pytest.mark.parametrize("case", AT_ONCE)
async def test_all_mistakes_are_reported_at_once(served: Running, session: str, case: str) -> None:
    """Templates, schemas, masks, filters and page tokens with it; the reason is then INVALID_FIELD."""
    method, request, fields = AT_ONCE[case]
    refused = await refusal(call(served, method, request))  # type: ignore[arg-type]
    assert fields_of(refused) == fields
    assert reason_of(refused) == "INVALID_FIELD"


async def test_a_template_that_is_all_that_is_wrong_keeps_its_reason(served: Running, agent: str) -> None:
    llm = v1.LlmAgent(instruction="{% include 'x' %}")
    update = v1.UpdateAgentRequest(agent=v1.Agent(name=agent, llm=llm), update_mask=FieldMask(paths=["llm"]))
    refused = await refusal(served.agents.UpdateAgent(update))
    assert (reason_of(refused), fields_of(refused)) == ("TEMPLATE_ERROR", {"agent.llm.instruction"})
    assert await revisions(served, agent) == [1]


async def test_an_update_reports_all_problems_of_an_agent_too(served: Running, agent: str) -> None:
    """Two updates that are fine by themselves make an agent together that is too large."""
    for index, refused in ((0, False), (1, True)):
        tools = [client_tool(f"t{index}{n}", parameters='{"x": "%s"}' % ("x" * 60_000)) for n in range(9)]
        llm = (await served.agents.GetAgent(v1.GetAgentRequest(name=agent))).llm
        llm.tools.extend(tools)
        update = v1.UpdateAgentRequest(agent=v1.Agent(name=agent, llm=llm))
        if not refused:
            await served.agents.UpdateAgent(update)
        else:
            assert fields_of(await refusal(served.agents.UpdateAgent(update))) == {"agent"}


# Late answers.


def a_result(command_id: str) -> v1.RunRequest:
    return result("call", "late", command_id=command_id)


def a_response(command_id: str) -> v1.RunRequest:
    return v1.RunRequest(command_id=command_id, input_response=v1.InputResponse(input_id="input", decision=DENY))


def a_cancel(command_id: str) -> v1.RunRequest:
    return v1.RunRequest(command_id=command_id, cancel=v1.CancelCommand(call_id="gone"))


LATE: dict[str, tuple[Callable[[str], v1.RunRequest], str]] = {
    "result": (a_result, "CALL_NOT_PENDING"),
    "response": (a_response, "INPUT_NOT_PENDING"),
    "cancel": (a_cancel, "CALL_NOT_PENDING"),
}


async def reasons(served: Running, session: str, command: v1.RunRequest, runs: list[str]) -> list[str]:
    """What the command is refused with, said about each of the runs and about none, by SendCommand."""
    told = []
    for run in ["", *runs]:
        request = v1.SendCommandRequest(session=session, run=run, command=command)
        told.append(reason_of(await refusal(served.runs.SendCommand(request))))
    return told


@pytest.mark.parametrize("kind", LATE)
async def test_what_comes_late_has_one_reason_whatever_the_moment(
    served: Running, session: str, model: OpenAIServer, kind: str
) -> None:
    """No run yet, one under way, one that waits for something else, one that is queued, ended or never was."""
    make, reason = LATE[kind]
    never, first, second = (f"{session}/runs/{run_id}" for run_id in ("never", "r1", "r2"))
    assert await reasons(served, session, make("a"), [never]) == [reason] * 2
    held = asyncio.Event()
    model.script(reply("Working.").held(held), tool_calls(("weigh", "{}")), reply("Done."), reply("Next."))
    await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, client_tool("weigh"), run_id="r1")))
    assert await reasons(served, session, make("b"), [never, first]) == [reason] * 3
    held.set()
    await served.runs.WaitRun(v1.WaitRunRequest(name=first))
    start = start_with(session, client_tool("weigh"), run_id="r2")
    waiting = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
    assert waiting.state == v1.Run.STATE_WAITING
    queued = v1.StartRun(session=session, run_id="r3", messages=[said("Then")], on_busy=v1.StartRun.ON_BUSY_QUEUE)
    await served.runs.CreateRun(v1.CreateRunRequest(start=queued))
    third = f"{session}/runs/r3"
    assert await reasons(served, session, make("c"), [never, first, second, third]) == [reason] * 5
    given = v1.SendCommandRequest(session=session, command=result(waiting.pending_calls[0].call_id, "3 kg"))
    await served.runs.SendCommand(given)
    await served.runs.WaitRun(v1.WaitRunRequest(name=second, after_sequence=waiting.last_sequence))
    await served.runs.WaitRun(v1.WaitRunRequest(name=third))
    assert await reasons(served, session, make("d"), [never, first, second, third]) == [reason] * 5
    gone = v1.SendCommandRequest(session="sessions/none", command=make("e"))
    assert reason_of(await refusal(served.runs.SendCommand(gone))) == "SESSION_NOT_FOUND"


@pytest.mark.parametrize("kind", LATE)
async def test_what_comes_late_on_a_stream_has_the_same_reason(
    served: Running, session: str, model: OpenAIServer, kind: str
) -> None:
    """Attached to the run while it was under way, to one that has ended, and to an idle session."""
    make, reason = LATE[kind]
    model.script(reply("Done."))
    await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, run_id="r1")))
    for name in (session, f"{session}/runs/r1"):
        stream = served.runs.Run()
        options = v1.WatchOptions(keep_open=True)
        await stream.write(v1.RunRequest(attach=v1.AttachRun(name=name, options=options)))
        await stream.write(make("late"))
        async for frame in stream:
            if frame.HasField("result"):
                assert v1.ErrorReason.Name(frame.result.error.reason) == f"ERROR_REASON_{reason}"
                break
        stream.cancel()


async def test_a_second_click_is_no_longer_pending_whenever_it_comes(
    served: Running, agent: str, session: str, model: OpenAIServer
) -> None:
    tool = client_tool("weigh", requires_approval=True)
    model.script(tool_calls(("weigh", "{}")), reply("Fine."))
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, tool)))).run
    click = answer(run.pending_inputs[0].input_id, DENY)
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=click))
    click.command_id = "second"
    assert await reasons(served, session, click, [run.name]) == ["INPUT_NOT_PENDING"] * 2
    await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=run.last_sequence))
    assert await reasons(served, session, click, [run.name]) == ["INPUT_NOT_PENDING"] * 2


@pytest.mark.parametrize(
    "command",
    [v1.RunRequest(input=v1.UserInput(messages=[said("Hello?")])), v1.RunRequest(cancel=v1.CancelCommand())],
    ids=["input", "cancel"],
)
async def test_a_command_to_an_idle_session_says_that_no_run_is_under_way(
    served: Running, session: str, command: v1.RunRequest
) -> None:
    refused = await refusal(served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command)))
    assert (refused.code(), reason_of(refused)) == (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")
    assert (refused.details() or "").startswith(f"{session} has no run under way")


# The sizes of answers.


FILLER = '{"x": "%s"}' % ("x" * 60_000)


def large(size: int) -> v1.Value:
    return v1.Value(list_value=v1.ValueList(values=[v1.Value(string_value="x" * size)]))


@pytest.mark.parametrize("owner", ["sessions/case", "users/ada", "app"])
async def test_named_keys_of_state_come_in_pages(served: Running, session: str, owner: str) -> None:
    """By size and by number; a token is of the same keys only, in whichever order they are named."""
    name, keys = f"{owner}/state", [f"k{number}" for number in range(6)]
    for key in keys:
        await served.state.PutState(v1.PutStateRequest(name=name, key=key, value=large(900_000)))
    found: list[str] = []
    request = v1.GetStateRequest(name=name, keys=[*reversed(keys), "none", "k0"])
    while True:
        page = await served.state.GetState(request)
        assert page.ByteSize() < LARGEST
        assert page.version == 6
        found += sorted(page.entries)
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
        request.keys[:] = [*keys, "none"]
    assert found == keys
    one = await served.state.GetState(v1.GetStateRequest(name=name, keys=keys[:2], page_size=1))
    assert sorted(one.entries) == ["k0"]
    for others in (keys, keys[:1], []):
        elsewhere = v1.GetStateRequest(name=name, keys=others, page_token=one.next_page_token)
        assert reason_of(await refusal(served.state.GetState(elsewhere))) == "PAGE_TOKEN_INVALID"
    async with served.client() as client:
        assert sorted(await client.get_state(owner, *keys, "none")) == keys


async def test_named_keys_as_they_were_come_in_pages_too(served: Running, session: str) -> None:
    name, keys = f"{session}/state", ["a", "b", "c"]
    for key in keys:
        await served.state.PutState(v1.PutStateRequest(name=name, key=key, value=large(900_000)))
    remove = [v1.StateOp(key=key, remove=Empty()) for key in keys]
    await served.state.UpdateState(v1.UpdateStateRequest(name=name, ops=remove))
    first = await served.state.GetState(v1.GetStateRequest(name=name, keys=["c", "a", "b"], at_sequence=3))
    assert (sorted(first.entries), first.version) == (["a", "b"], 3)
    rest = v1.GetStateRequest(name=name, keys=keys, at_sequence=3, page_token=first.next_page_token)
    assert sorted((await served.state.GetState(rest)).entries) == ["c"]


@pytest.mark.parametrize("owner", ["sessions/case", "users/ada", "app"])
async def test_an_update_of_large_values_is_answered_within_a_page(served: Running, session: str, owner: str) -> None:
    """The entries behind the first mebibyte come without their values, in a repeat too."""
    name, keys = f"{owner}/state", [f"k{number}" for number in range(4)]
    for key in keys:
        await served.state.PutState(v1.PutStateRequest(name=name, key=key, value=large(900_000)))
    ops = [v1.StateOp(key=key, append=v1.Value(int_value=1)) for key in keys]
    request = v1.UpdateStateRequest(name=name, ops=ops, request_id="once")
    state = await served.state.UpdateState(request)
    assert state.ByteSize() < LARGEST
    assert [state.entries[key].HasField("value") for key in keys] == [True, True, False, False]
    assert {state.entries[key].version for key in keys} == {state.version} == {5}
    assert await served.state.UpdateState(request) == state
    last = await served.state.GetState(v1.GetStateRequest(name=name, keys=["k3"]))
    assert len(last.entries["k3"].value.list_value.values) == 2


async def test_appended_messages_are_answered_within_what_a_client_takes(served: Running, session: str) -> None:
    part = v1.Part(text="x" * 200_000)
    fits = v1.AppendMessagesRequest(parent=session, messages=[v1.Message(parts=[part] * 4)] * 4)
    assert (await served.messages.AppendMessages(fits)).ByteSize() < 4 << 20
    more = v1.AppendMessagesRequest(parent=session, messages=[v1.Message(parts=[part] * 4)] * 5)
    assert reason_of(await refusal(served.messages.AppendMessages(more))) == "PAYLOAD_TOO_LARGE"
    state = {f"k{number}": v1.Value(string_value="x" * 1000) for number in range(1000)}
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(), state=state))
    assert made.ByteSize() < 1000


async def test_the_largest_run_is_answered_within_what_a_client_takes(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """A reply, what the run waits for, and its tools: by itself, together with its reply, and in a list of runs."""
    asks = v1.LlmAgent(tools=[v1.Tool(name="ask", server=v1.ServerTool(function="ask_user"))])
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="asker", agent=v1.Agent(llm=asks)))
    tools = [client_tool(f"t{number}", parameters=FILLER) for number in range(4)]
    question = '{"question": "%s"}' % ("x" * 950_000)
    for name in (session, f"{session}2"):
        if name != session:
            await served.sessions.CreateSession(v1.CreateSessionRequest(session_id=name.removeprefix("sessions/")))
        go_on = asyncio.Event()
        model.script(reply("x" * 950_000).held(go_on), tool_calls(("ask", question)))
        start = start_with(name, *tools, agent="agents/asker", run_id="r1")
        run = await served.runs.CreateRun(v1.CreateRunRequest(start=start))
        then = v1.UserInput(messages=[said("And then?")], when=v1.UserInput.WHEN_FOLLOW_UP)
        await served.runs.SendCommand(v1.SendCommandRequest(session=name, command=v1.RunRequest(input=then)))
        go_on.set()
        waited = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
        assert len(waited.pending_inputs[0].prompt) == 950_000
        assert waited.HasField("reply")
        invoked = await served.runs.Invoke(v1.InvokeRequest(start=start))
        assert (invoked.HasField("reply"), invoked.run.HasField("reply")) == (True, False)
        for answered in (run, waited, await served.runs.GetRun(v1.GetRunRequest(name=run.name)), invoked):
            assert answered.ByteSize() < LARGEST
    listed: list[str] = []
    request = v1.ListRunsRequest(parent="sessions/-")
    while not listed or request.page_token:
        page = await served.runs.ListRuns(request)
        assert page.ByteSize() < LARGEST
        listed += [run.name for run in page.runs]
        request.page_token = page.next_page_token
    assert listed == [f"{session}2/runs/r1", f"{session}/runs/r1"]
    for name in listed:
        cancelled = await served.runs.CancelRun(v1.CancelRunRequest(name=name))
        assert cancelled.ByteSize() < LARGEST


async def test_tools_of_a_run_that_are_too_large_together_are_refused(served: Running, session: str) -> None:
    tools = [client_tool(f"t{number}", parameters=FILLER) for number in range(5)]
    create = v1.CreateRunRequest(start=start_with(session, *tools))
    assert fields_of(await refusal(served.runs.CreateRun(create))) == {"start.client_tools"}


# Replies that become notes.


async def test_only_a_reply_that_ends_a_turn_becomes_a_note(served: Running, model: OpenAIServer) -> None:
    """Text next to calls is not a result, whether the call continues or the run ends with it."""
    made = v1.Agent(llm=v1.LlmAgent(tools=[client_tool("weigh")]), output_key="out")
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=made))
    created = v1.CreateSessionRequest(
        session=v1.Session(agent="agents/clerk"), state={"out": v1.Value(string_value="before")}
    )
    name = (await served.sessions.CreateSession(created)).name

    async def noted() -> str:
        state = await served.state.GetState(v1.GetStateRequest(name=f"{name}/state"))
        return state.entries["out"].value.string_value

    aside = stream(
        chunk({"content": "Let me look."}),
        chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "weigh", "arguments": "{}"}}]}),
        finish="tool_calls",
    )
    model.script(aside, reply(""), reply("The result."), aside)
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(name)))).run
    assert await noted() == "before"
    given = v1.SendCommandRequest(session=name, command=result(run.pending_calls[0].call_id, "3 kg"))
    await served.runs.SendCommand(given)
    await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=run.last_sequence))
    assert await noted() == "before", "an empty reply says nothing"
    await served.runs.Invoke(v1.InvokeRequest(start=start_with(name)))
    assert await noted() == "The result."
    limits = v1.Limits(max_tool_calls=1)
    model.script(*[aside] * 2)
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(name, limits=limits)))).run
    given = v1.SendCommandRequest(session=name, command=result(run.pending_calls[0].call_id, "3 kg"))
    await served.runs.SendCommand(given)
    wait = v1.WaitRunRequest(name=run.name, after_sequence=run.last_sequence)
    assert (await served.runs.WaitRun(wait)).error.reason == v1.ERROR_REASON_LIMIT_EXCEEDED
    assert await noted() == "The result."


async def test_the_last_reply_of_a_run_that_is_to_end_becomes_a_note_and_a_half_one_does_not(
    served: Running, model: OpenAIServer
) -> None:
    """A turn that ends with a follow-up behind it is a turn too; what a cancel cuts off is none."""
    made = v1.Agent(llm=v1.LlmAgent(), output_key="out")
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=made))
    created = v1.CreateSessionRequest(session=v1.Session(agent="agents/clerk"))
    name = (await served.sessions.CreateSession(created)).name
    go_on, never = asyncio.Event(), asyncio.Event()
    model.script(reply("First.").held(go_on), reply("Half of it", chunks=2).held(never, after=2))
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(name)))
    follow_up = v1.UserInput(messages=[said("And then?")], when=v1.UserInput.WHEN_FOLLOW_UP)
    await served.runs.SendCommand(v1.SendCommandRequest(session=name, command=v1.RunRequest(input=follow_up)))
    go_on.set()
    async for frame in served.runs.WatchEvents(v1.WatchEventsRequest(name=run.name, after_sequence=0)):
        if any("Half" in event.block_delta.text for event in frame.batch.events):
            await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    never.set()
    state = await served.state.GetState(v1.GetStateRequest(name=f"{name}/state"))
    assert state.entries["out"].value.string_value == "First."

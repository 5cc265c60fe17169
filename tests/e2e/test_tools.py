"""Calls of tools: dispatched once, answered once, by the caller or by a person, on every store and in both forms."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import v1

from tests.e2e.driving import BySendCommand, OnStream, durable, fields_of, kinds, log_of, reason_of, said
from tests.support.openai_server import OpenAIServer, chunk, error, reply, stream, tool_calls
from tests.support.server import Running

DRIVERS = [OnStream, BySendCommand]
Driver = type[OnStream | BySendCommand]


def client_tool(name: str, **fields: Any) -> v1.Tool:
    return v1.Tool(name=name, description=f"The caller's {name}.", client=v1.ClientTool(), **fields)


def start_with(session: str, *tools: v1.Tool, **fields: Any) -> v1.StartRun:
    return v1.StartRun(session=session, messages=[said("Go")], client_tools=tools, **fields)


def result(call_id: str, text: str = "", error: str = "", command_id: str = "") -> v1.RunRequest:
    parts = [] if error else [v1.Part(text=text)]
    answer = v1.ToolResult(call_id=call_id, result=parts, error=error)
    return v1.RunRequest(command_id=command_id or f"r-{call_id}", tool_result=answer)


async def drive(
    served: Running, driver: Driver, start: v1.StartRun, react: Callable[[v1.Event], v1.RunRequest | None]
) -> list[v1.RunResponse]:
    """Runs to the end of the stream, sending what `react` makes of each event of the log."""
    driving = driver()
    frames = []
    async for frame in driving.start(served, start):
        frames.append(frame)
        for event in frame.batch.events:
            command = react(event) if event.sequence else None
            if command is not None:
                await driving.send(command)
    return frames


def results_of(request: dict[str, Any]) -> list[str]:
    return [message["content"] for message in request["messages"] if message["role"] == "tool"]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_call_goes_to_the_caller_and_its_result_to_the_model(
    served: Running, session: str, model: OpenAIServer, driver: Driver
) -> None:
    """Dispatched in the commit of its message; the run waits without a worker; the last result wakes it."""
    model.script(tool_calls(("weigh", '{"what": "violin"}'), ("weigh", '{"what": "bow"}')), reply("Light."))

    def react(event: v1.Event) -> v1.RunRequest | None:
        call = event.tool_started
        return result(call.call_id, f"weighed {call.arguments}") if call.client_executed else None

    frames = await drive(served, driver, start_with(session, client_tool("weigh")), react)
    log = durable(frames)
    assert kinds(log) == [
        *("run_started", "message_added"),
        *("message_added", "usage", "tool_started", "tool_started", "run_state_changed"),
        *("tool_finished", "tool_finished", "run_state_changed"),
        *("message_added", "usage", "run_state_changed"),
    ]
    assert log == await log_of(served, session)
    times = [event.create_time.ToMicroseconds() for event in log]
    assert len(set(times[2:7])) == 1, "the message, its dispatches and the wait are one commit"
    assert times[8] == times[9], "the last result and the going on are one commit"
    waits = [event.run_state_changed.state for event in log if event.HasField("run_state_changed")]
    assert waits == [v1.Run.STATE_WAITING, v1.Run.STATE_RUNNING, v1.Run.STATE_SUCCEEDED]
    assert results_of(model.requests[1]) == ['weighed {"what": "violin"}', 'weighed {"what": "bow"}']
    assert [tool["function"]["name"] for tool in model.requests[0]["tools"]] == ["weigh"]
    finished = [event.tool_finished for event in log if event.HasField("tool_finished")]
    assert [(call.outcome, call.attempt) for call in finished] == [(v1.ToolCall.OUTCOME_SUCCEEDED, 1)] * 2


async def test_a_waiting_run_names_its_calls_and_another_process_may_answer_them(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(tool_calls(("weigh", "{}")), reply("Done."))
    start = start_with(session, client_tool("weigh"), run_id="r1")
    waiting = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
    assert waiting.state == v1.Run.STATE_WAITING
    (call,) = waiting.pending_calls
    listed = await served.runs.ListRuns(v1.ListRunsRequest(parent="sessions/-", filter="state = WAITING"))
    assert [run.name for run in listed.runs] == [waiting.name]
    found = await served.sessions.GetSession(v1.GetSessionRequest(name=session))
    assert found.activity == v1.Session.ACTIVITY_WAITING
    command = result(call.call_id, "3 kg")
    first = await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    again = await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    assert first.result.disposition == v1.CommandResult.DISPOSITION_APPLIED
    assert again.result.disposition == v1.CommandResult.DISPOSITION_DUPLICATE
    assert again.result.sequence == first.result.sequence
    late = v1.SendCommandRequest(session=session, command=result(call.call_id, "4 kg", command_id="other"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.SendCommand(late)
    assert reason_of(refused.value) == "CALL_NOT_PENDING"
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=waiting.name, after_sequence=waiting.last_sequence))
    assert ended.state == v1.Run.STATE_SUCCEEDED
    assert results_of(model.requests[1]) == ["3 kg"]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_of_two_results_for_one_call_the_first_wins(
    served: Running, session: str, model: OpenAIServer, driver: Driver
) -> None:
    """Also while the run waits for another call, and also of several that come at once."""
    model.script(tool_calls(("a", "{}"), ("b", "{}")), reply("Done."))
    driving, started, finished = driver(), [], []
    refused: list[str] = []
    frames = []

    async def give(command: v1.RunRequest) -> None:
        try:
            await driving.send(command)
        except grpc.aio.AioRpcError as error:
            refused.append(reason_of(error))

    async for frame in driving.start(served, start_with(session, client_tool("a"), client_tool("b"))):
        frames.append(frame)
        if frame.result.HasField("error"):
            refused.append(v1.ErrorReason.Name(frame.result.error.reason).removeprefix("ERROR_REASON_"))
        started += [event.tool_started for event in frame.batch.events if event.HasField("tool_started")]
        finished += [event.tool_finished for event in frame.batch.events if event.HasField("tool_finished")]
        if len(started) == 2:
            a, b = started
            started.clear()
            for number in range(3):
                await give(result(a.call_id, f"A {number}", command_id=f"a{number}"))
        if len(finished) == 1 and len(refused) == 2:
            await asyncio.gather(*(give(result(b.call_id, f"B {n}", command_id=f"b{n}")) for n in range(2)))
            finished.append(b)
    assert refused[:2] == ["CALL_NOT_PENDING"] * 2
    assert len([event for event in durable(frames) if event.HasField("tool_finished")]) == 2
    first, second = results_of(model.requests[1])
    assert first == "A 0"
    assert second in {"B 0", "B 1"}


async def test_results_that_are_too_large_are_refused_or_kept_aside_and_the_run_goes_on(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """One that no frame or no field takes leaves its call waiting; several that each fit and together do not are kept
    whole."""
    model.script(tool_calls(*[("weigh", "{}")] * 5), reply("Heavy."))
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, client_tool("weigh"))))).run

    async def give(call: v1.ToolCall, size: int) -> None:
        command = result(call.call_id, "x" * size, command_id=f"{call.call_id}-{size}")
        await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))

    for size, reason in ((10_000_000, "PAYLOAD_TOO_LARGE"), (600_000, "INVALID_FIELD")):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await give(run.pending_calls[0], size)
        assert reason_of(refused.value) == reason
    for call in run.pending_calls:
        await give(call, 250_000)
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=run.last_sequence + 1))
    assert ended.state == v1.Run.STATE_SUCCEEDED
    results = results_of(model.requests[1])
    assert ["of 250000." in told for told in results] == [True] * 5


def choices(model: OpenAIServer) -> list[Any]:
    return [request.get("tool_choice") for request in model.requests]


FORCED = {"type": "function", "function": {"name": "weigh"}}


@pytest.fixture
async def forced(served: Running, model: OpenAIServer) -> str:
    """A session whose agent has to call `weigh` before it speaks."""
    generation = v1.Generation(extra=json.dumps({"tool_choice": FORCED}))
    weigh = client_tool("weigh", requires_approval=True)
    llm = v1.LlmAgent(generation=generation, tools=[client_tool("look"), weigh])
    agent = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=llm)))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    return str(made.name)


async def wait_again(served: Running, run: v1.Run) -> v1.Run:
    """The run once it has gone on and waits or has ended."""
    return await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=run.last_sequence))


@pytest.mark.parametrize("approved", [True, False], ids=["a result", "a denial"])
async def test_a_forced_choice_holds_until_its_call_has_an_outcome(
    served: Running, forced: str, model: OpenAIServer, approved: bool
) -> None:
    """Over a failed try and the call of another tool; then the model may reply with text, and the choice applies again
    after the user's next message."""
    model.script(error(503), tool_calls(("look", "{}")), tool_calls(("weigh", "{}")), reply("1 kg."), reply("Again."))
    run = (await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=forced, messages=[said("Go")])))).run
    (look,) = run.pending_calls
    await served.runs.SendCommand(v1.SendCommandRequest(session=forced, command=result(look.call_id, "a box")))
    run = await wait_again(served, run)
    assert [FORCED] * 3 == choices(model)
    (asked,) = run.pending_inputs
    decision = v1.InputResponse.DECISION_APPROVE if approved else v1.InputResponse.DECISION_DENY
    answer = v1.RunRequest(input_response=v1.InputResponse(input_id=asked.input_id, decision=decision))
    await served.runs.SendCommand(v1.SendCommandRequest(session=forced, command=answer))
    if approved:
        run = await wait_again(served, run)
        (weigh,) = run.pending_calls
        await served.runs.SendCommand(v1.SendCommandRequest(session=forced, command=result(weigh.call_id, "1 kg")))
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=10**6))
    assert ended.state == v1.Run.STATE_SUCCEEDED
    assert [FORCED] * 3 + ["auto"] == choices(model)
    await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=forced, messages=[said("And now?")])))
    assert [FORCED] * 3 + ["auto", FORCED] == choices(model)


async def test_a_forced_choice_applies_again_after_a_users_message(
    served: Running, forced: str, model: OpenAIServer
) -> None:
    """Input that comes while the call waits is a separate message after the call's result."""
    model.script(tool_calls(("weigh", "{}")), tool_calls(("weigh", "{}")))
    run = (await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=forced, messages=[said("Go")])))).run
    said_more = v1.RunRequest(input=v1.UserInput(messages=[said("The other one.")]))
    await served.runs.SendCommand(v1.SendCommandRequest(session=forced, command=said_more))
    run = await wait_again(served, run)
    assert run.state == v1.Run.STATE_WAITING
    assert [FORCED, FORCED] == choices(model)


async def test_a_result_for_a_call_of_another_session_is_refused(
    served: Running, session: str, agent: str, model: OpenAIServer
) -> None:
    other = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent)))
    model.script(tool_calls(("weigh", "{}")), tool_calls(("weigh", "{}")))
    runs = []
    for name in (session, other.name):
        start = start_with(name, client_tool("weigh"))
        runs.append((await served.runs.Invoke(v1.InvokeRequest(start=start))).run)
    wrong = result(runs[1].pending_calls[0].call_id, "theirs")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=wrong))
    assert reason_of(refused.value) == "CALL_NOT_PENDING"


@pytest.fixture
async def careful(served: Running) -> str:
    """A session whose agent may pay only with an approval, and may ask."""
    tools = [
        client_tool("pay", requires_approval=True),
        v1.Tool(name="ask", server=v1.ServerTool(function="ask_user")),
    ]
    agent = v1.Agent(llm=v1.LlmAgent(tools=tools))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="careful", agent=agent))
    created = await served.sessions.CreateSession(
        v1.CreateSessionRequest(session_id="careful", session=v1.Session(agent="agents/careful"))
    )
    return created.name


def answer(input_id: str, decision: v1.InputResponse.Decision.ValueType, **fields: Any) -> v1.RunRequest:
    return v1.RunRequest(input_response=v1.InputResponse(input_id=input_id, decision=decision, **fields))


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("decision", "fields", "told"),
    [
        (v1.InputResponse.DECISION_APPROVE, {}, 'paid {"sum": 5}'),
        (v1.InputResponse.DECISION_APPROVE, {"edited_arguments": '{"sum": 1}'}, 'paid {"sum": 1}'),
        (v1.InputResponse.DECISION_DENY, {"reason": "too much"}, "too much"),
    ],
    ids=["approved", "edited", "denied"],
)
async def test_a_call_waits_for_approval(
    served: Running,
    careful: str,
    model: OpenAIServer,
    driver: Driver,
    decision: v1.InputResponse.Decision.ValueType,
    fields: dict[str, str],
    told: str,
) -> None:
    model.script(tool_calls(("pay", '{"sum": 5}')), reply("So be it."))

    def react(event: v1.Event) -> v1.RunRequest | None:
        if event.HasField("input_requested"):
            return answer(event.input_requested.input_id, decision, **fields)
        call = event.tool_started
        return result(call.call_id, f"paid {call.arguments}") if call.client_executed else None

    frames = await drive(served, driver, start_with(careful), react)
    assert durable(frames)[-1].run_state_changed.state == v1.Run.STATE_SUCCEEDED
    assert told in results_of(model.requests[1])[0]
    dispatched = [event.tool_started.arguments for event in durable(frames) if event.HasField("tool_started")]
    assert len(dispatched) == (decision == v1.InputResponse.DECISION_APPROVE)


async def test_an_approval_can_be_remembered(served: Running, careful: str, model: OpenAIServer) -> None:
    """For the session: the next run's call is dispatched at once."""
    model.script(*[tool_calls(("pay", "{}")), reply("ok")] * 2)
    asked = 0

    def react(event: v1.Event) -> v1.RunRequest | None:
        nonlocal asked
        if event.HasField("input_requested"):
            asked += 1
            remember = v1.InputResponse.REMEMBER_SESSION
            return answer(event.input_requested.input_id, v1.InputResponse.DECISION_APPROVE, remember=remember)
        call = event.tool_started
        return result(call.call_id, "paid") if call.client_executed else None

    for _ in range(2):
        frames = await drive(served, OnStream, start_with(careful), react)
        assert durable(frames)[-1].run_state_changed.state == v1.Run.STATE_SUCCEEDED
    assert asked == 1
    found = await served.sessions.GetSession(v1.GetSessionRequest(name=careful))
    (remembered,) = found.remembered.values()
    assert (remembered.tool, remembered.approved) == ("pay", True)


async def test_a_question_is_answered_by_a_person(served: Running, careful: str, model: OpenAIServer) -> None:
    model.script(tool_calls(("ask", '{"question": "Which harbour?"}')), reply("Thanks."))
    questions = []

    def react(event: v1.Event) -> v1.RunRequest | None:
        if not event.HasField("input_requested"):
            return None
        questions.append((event.input_requested.kind, event.input_requested.prompt))
        return answer(event.input_requested.input_id, v1.InputResponse.DECISION_ANSWER, answer="The old one.")

    await drive(served, OnStream, start_with(careful), react)
    assert questions == [(v1.InputRequest.KIND_QUESTION, "Which harbour?")]
    assert results_of(model.requests[1]) == ["The old one."]


async def test_an_answer_of_the_wrong_kind_and_one_without_a_question_are_refused(
    served: Running, careful: str, model: OpenAIServer
) -> None:
    model.script(tool_calls(("pay", "{}")))
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(careful)))).run
    (request,) = run.pending_inputs
    for wrong, reason in (
        (answer(request.input_id, v1.InputResponse.DECISION_ANSWER, answer="x"), "INVALID_FIELD"),
        (answer("nobody", v1.InputResponse.DECISION_DENY), "INPUT_NOT_PENDING"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.SendCommand(v1.SendCommandRequest(session=careful, command=wrong))
        assert reason_of(refused.value) == reason


async def test_a_user_who_speaks_instead_of_approving_denies(
    served: Running, careful: str, model: OpenAIServer
) -> None:
    """In the commit that adds the message, with its words as the reason."""
    model.script(tool_calls(("pay", "{}")), reply("Understood."))
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(careful)))).run
    command = v1.RunRequest(command_id="no", input=v1.UserInput(messages=[said("Rather not.")]))
    sent = await served.runs.SendCommand(v1.SendCommandRequest(session=careful, command=command))
    assert sent.result.disposition == v1.CommandResult.DISPOSITION_APPLIED
    await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=sent.result.sequence))
    assert results_of(model.requests[1]) == ["Rather not."] or "Rather not." in results_of(model.requests[1])[0]
    assert model.requests[1]["messages"][-1] == {"role": "user", "content": "Rather not."}
    log = await log_of(served, careful)
    at = {event.create_time.ToMicroseconds() for event in log if event.cause_id == "no"}
    assert len(at) == 1
    assert kinds([event for event in log if event.cause_id == "no"])[:3] == [
        *("input_resolved", "tool_finished", "message_added"),
    ]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_steering_reaches_the_model_before_its_next_call(
    served: Running, session: str, model: OpenAIServer, driver: Driver
) -> None:
    """Queued while the model speaks, in the log at once, a message before the next call under the same cause."""
    go_on = asyncio.Event()
    model.script(tool_calls(("weigh", "{}")).held(go_on), reply("Noted."))

    def react(event: v1.Event) -> v1.RunRequest | None:
        if event.HasField("run_started"):
            return v1.RunRequest(command_id="steer", input=v1.UserInput(messages=[said("Also the bow.")]))
        if event.HasField("command_queued"):
            go_on.set()
        call = event.tool_started
        return result(call.call_id, "1 kg") if call.client_executed else None

    frames = await drive(served, driver, start_with(session, client_tool("weigh")), react)
    contents = [message.get("content") for message in model.requests[1]["messages"]]
    assert contents[-3:] == ["1 kg", "I have the result.", "Also the bow."]
    steered = [event for event in durable(frames) if event.cause_id == "steer"]
    assert kinds(steered) == ["command_queued", "message_added"]
    found = await served.sessions.GetSession(v1.GetSessionRequest(name=session))
    assert list(found.queued_commands) == []


async def test_a_follow_up_is_taken_up_when_the_run_would_end(
    served: Running, session: str, model: OpenAIServer
) -> None:
    go_on = asyncio.Event()
    model.script(reply("First.").held(go_on), reply("Second."))

    def react(event: v1.Event) -> v1.RunRequest | None:
        if event.HasField("run_started"):
            later = v1.UserInput(messages=[said("And then?")], when=v1.UserInput.WHEN_FOLLOW_UP)
            return v1.RunRequest(command_id="later", input=later)
        if event.HasField("command_queued"):
            go_on.set()
        return None

    frames = await drive(served, OnStream, start_with(session), react)
    assert [message["content"] for message in model.requests[1]["messages"][1:]] == ["Go", "First.", "And then?"]
    states = [event.run_state_changed.state for event in durable(frames) if event.HasField("run_state_changed")]
    assert states == [v1.Run.STATE_SUCCEEDED], "one run, one end"


async def test_an_interruption_keeps_the_half_reply_and_asks_again(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(
        stream(chunk({"content": "Half "}), chunk({"content": "said"})).held(asyncio.Event(), after=2), reply("Yes?")
    )
    driving = OnStream()
    frames: list[v1.RunResponse] = []
    async for frame in driving.start(served, start_with(session)):
        frames.append(frame)
        if any(event.HasField("block_delta") for event in frame.batch.events) and len(model.requests) == 1:
            now = v1.UserInput(messages=[said("Wait!")], when=v1.UserInput.WHEN_INTERRUPT)
            await driving.send(v1.RunRequest(command_id="now", input=now))
    shown = [message["content"] for message in model.requests[1]["messages"][1:]]
    assert shown == ["Go", "Half ", "Wait!"]
    assert durable(frames)[-1].run_state_changed.state == v1.Run.STATE_SUCCEEDED
    results = [frame.result for frame in frames if frame.HasField("result")]
    assert [found.disposition for found in results] == [v1.CommandResult.DISPOSITION_APPLIED]


async def test_at_most_sixteen_commands_wait(served: Running, session: str, model: OpenAIServer) -> None:
    model.script(reply("Slow.").held(asyncio.Event()))
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session)))
    await model.request(0)
    for number in range(17):
        command = v1.RunRequest(command_id=f"c{number}", input=v1.UserInput(messages=[said("more")]))
        request = v1.SendCommandRequest(session=session, command=command)
        if number < 16:
            sent = await served.runs.SendCommand(request)
            assert sent.result.disposition == v1.CommandResult.DISPOSITION_QUEUED
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.SendCommand(request)
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    end = (await log_of(served, session))[-1].run_state_changed
    assert list(end.dropped_commands) == [f"c{number}" for number in range(16)]


@pytest.mark.parametrize("mode", [v1.CancelCommand.MODE_IMMEDIATE, v1.CancelCommand.MODE_AFTER_TURN])
async def test_cancel_keeps_the_result_of_a_and_seals_b(
    served: Running, session: str, model: OpenAIServer, mode: v1.CancelCommand.Mode.ValueType
) -> None:
    """A has finished, B is at the caller. The next turn's request is well formed and holds A's result."""
    model.script(tool_calls(("a", "{}"), ("b", "{}")), reply("Later."))
    start = start_with(session, client_tool("a"), client_tool("b"), run_id="r1")
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
    a, b = run.pending_calls
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=result(a.call_id, "A was done")))
    cancel = v1.CancelCommand(mode=mode, reason="enough")
    after = await served.runs.CancelRun(v1.CancelRunRequest(name=run.name, cancel=cancel))
    if mode == v1.CancelCommand.MODE_AFTER_TURN:
        assert (after.state, after.ending) == (v1.Run.STATE_WAITING, True)
        command = result(b.call_id, "B was done")
        await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=after.last_sequence))
    assert ended.state == v1.Run.STATE_CANCELLED
    await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session, messages=[said("Go on")])))
    results = results_of(model.requests[-1])
    assert results[0] == "A was done"
    assert len(results) == 2
    assert ("B was done" in results[1]) == (mode == v1.CancelCommand.MODE_AFTER_TURN)
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    outcomes = [part.tool_call.outcome for part in listed.messages[1].parts]
    sealed = v1.ToolCall.OUTCOME_CANCELLED if mode == v1.CancelCommand.MODE_IMMEDIATE else v1.ToolCall.OUTCOME_SUCCEEDED
    assert outcomes == [v1.ToolCall.OUTCOME_SUCCEEDED, sealed]


@pytest.mark.parametrize("mode", v1.CancelCommand.Mode.values())
async def test_one_call_can_be_cancelled_alone(
    served: Running, session: str, model: OpenAIServer, mode: v1.CancelCommand.Mode.ValueType
) -> None:
    """At once, whichever mode is given: modes are of runs."""
    model.script(tool_calls(("a", "{}"), ("b", "{}")), reply("Fine."))
    start = start_with(session, client_tool("a"), client_tool("b"))
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
    a, b = run.pending_calls
    cancel = v1.RunRequest(cancel=v1.CancelCommand(mode=mode, call_id=a.call_id, reason="not that one"))
    sent = await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=cancel))
    assert sent.result.disposition == v1.CommandResult.DISPOSITION_APPLIED
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=result(b.call_id, "B")))
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=run.last_sequence + 1))
    assert ended.state == v1.Run.STATE_SUCCEEDED
    assert "not that one" in results_of(model.requests[1])[0]


async def test_an_interrupt_comes_behind_what_steered_before_it(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """What was said first is read first; a follow-up still waits until the run would end."""
    model.script(tool_calls(("a", "{}")), reply("Fine."), reply("Then."))
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, client_tool("a"))))).run
    spoken = {
        "First": v1.UserInput.WHEN_STEER,
        "Later": v1.UserInput.WHEN_FOLLOW_UP,
        "Now": v1.UserInput.WHEN_INTERRUPT,
    }
    for text, when in spoken.items():
        command = v1.RunRequest(command_id=text, input=v1.UserInput(messages=[said(text)], when=when))
        await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    added = [event for event in await log_of(served, session) if event.HasField("message_added")]
    causes = [event.cause_id for event in added if event.message_added.role == v1.Message.ROLE_USER]
    assert causes[1:] == ["First", "Now", "Later"]


async def test_a_cancel_before_the_start_wins(served: Running, session: str, agent: str) -> None:
    name = f"{session}/runs/r1"
    cancelled = await served.runs.CancelRun(v1.CancelRunRequest(name=name, allow_missing=True))
    assert cancelled.state == v1.Run.STATE_CANCELLED
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, run_id="r1")))
    assert (refused.value.code(), reason_of(refused.value)) == (
        grpc.StatusCode.CANCELLED,
        "RUN_CANCELLED_BEFORE_START",
    )


async def test_a_cancel_of_a_call_puts_no_end_of_a_run_on_record(served: Running, session: str, agent: str) -> None:
    name, call = f"{session}/runs/r1", v1.CancelCommand(call_id="none")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.CancelRun(v1.CancelRunRequest(name=name, cancel=call, allow_missing=True))
    assert reason_of(refused.value) == "CALL_NOT_PENDING"
    assert await log_of(served, session) == []


async def test_a_queued_run_starts_when_the_one_before_has_ended(
    served: Running, session: str, model: OpenAIServer
) -> None:
    go_on = asyncio.Event()
    model.script(reply("One.").held(go_on), reply("Two."))
    await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, run_id="one")))
    queue = start_with(session, run_id="two", on_busy=v1.StartRun.ON_BUSY_QUEUE)
    second = await served.runs.CreateRun(v1.CreateRunRequest(start=queue))
    assert second.state == v1.Run.STATE_QUEUED
    assert (await served.runs.CreateRun(v1.CreateRunRequest(start=queue))).name == second.name
    go_on.set()
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=second.name))
    assert ended.state == v1.Run.STATE_SUCCEEDED
    log = await log_of(served, session)
    assert [event.run for event in log if event.HasField("run_started")] == [f"{session}/runs/one", second.name]
    assert [m["content"] for m in model.requests[1]["messages"][1:]] == ["Go", "One.", "Go"]


async def test_a_start_may_interrupt_the_run_before_it(served: Running, session: str, model: OpenAIServer) -> None:
    model.script(stream(chunk({"content": "Half"})).held(asyncio.Event(), after=2), reply("New."))
    await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, run_id="one")))
    await model.request(0)
    other = start_with(session, on_busy=v1.StartRun.ON_BUSY_INTERRUPT)
    answered = await served.runs.Invoke(v1.InvokeRequest(start=other))
    assert answered.reply.parts[0].text == "New."
    first = await served.runs.GetRun(v1.GetRunRequest(name=f"{session}/runs/one"))
    assert first.state == v1.Run.STATE_CANCELLED


async def test_a_start_that_interrupts_comes_before_those_that_wait(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """The end of the one and the start of the other are one commit, so that no queued run comes between and is
    interrupted, too."""
    go_on = asyncio.Event()
    model.script(reply("Never.").held(asyncio.Event()), reply("Now.").held(go_on), reply("Queued."))
    await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, run_id="one")))
    await model.request(0)
    queue = start_with(session, run_id="queued", on_busy=v1.StartRun.ON_BUSY_QUEUE)
    await served.runs.CreateRun(v1.CreateRunRequest(start=queue))
    now = start_with(session, run_id="now", on_busy=v1.StartRun.ON_BUSY_INTERRUPT)
    await served.runs.CreateRun(v1.CreateRunRequest(start=now, request_id="now"))
    go_on.set()
    await served.runs.WaitRun(v1.WaitRunRequest(name=f"{session}/runs/queued"))
    log = await log_of(served, session)
    ends = {event.run.rpartition("/")[2]: event for event in log if event.HasField("run_state_changed")}
    assert {name: event.run_state_changed.state for name, event in ends.items()} == {
        "one": v1.Run.STATE_CANCELLED,
        "now": v1.Run.STATE_SUCCEEDED,
        "queued": v1.Run.STATE_SUCCEEDED,
    }
    started = {event.run.rpartition("/")[2]: event for event in log if event.HasField("run_started")}
    assert list(started) == ["one", "now", "queued"]
    assert started["now"].create_time == ends["one"].create_time


async def test_a_start_that_interrupts_may_require_the_last_sequence(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """`if_last_sequence` is of the log before the interruption: when it misses nothing is stopped, and when it does not
    the interruption itself does not make it miss."""
    model.script(reply("Never.").held(asyncio.Event()), reply("Now."))
    first = await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, run_id="one")))
    await model.request(0)
    now = start_with(session, on_busy=v1.StartRun.ON_BUSY_INTERRUPT, if_last_sequence=first.last_sequence - 1)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.CreateRun(v1.CreateRunRequest(start=now))
    assert reason_of(refused.value) == "SEQUENCE_MISMATCH"
    assert (await served.runs.GetRun(v1.GetRunRequest(name=first.name))).state == v1.Run.STATE_RUNNING
    now.if_last_sequence = first.last_sequence
    assert (await served.runs.Invoke(v1.InvokeRequest(start=now))).reply.parts[0].text == "Now."


@pytest.mark.parametrize(
    ("limits", "limit"),
    [
        (v1.Limits(max_model_calls=1), "max_model_calls"),
        (v1.Limits(max_tool_calls=1), "max_tool_calls"),
        (v1.Limits(max_total_tokens=10), "max_total_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_limit_ends_the_run_by_its_name(
    served: Running, session: str, model: OpenAIServer, limits: v1.Limits, limit: str
) -> None:
    model.script(*[tool_calls(("nothing", "{}"), ("nothing", "{}"))] * 2)
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, limits=limits)))).run
    assert run.error.reason == v1.ERROR_REASON_LIMIT_EXCEEDED
    assert run.error.metadata["limit"] == limit


async def test_a_run_out_of_time_fails_and_keeps_what_came(served: Running, session: str, model: OpenAIServer) -> None:
    half = stream(chunk({"content": "Half"})).held(asyncio.Event(), after=2)
    for milliseconds in (300, 3_000, 30_000):
        model.script(half)
        limit = Duration()
        limit.FromMilliseconds(milliseconds)
        start = start_with(session, limits=v1.Limits(timeout=limit))
        run = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
        assert run.error.metadata["limit"] == "timeout"
        listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
        if listed.messages[-1].role == v1.Message.ROLE_ASSISTANT:
            break  # else the machine was so slow that nothing had come
    assert listed.messages[-1].status == v1.Message.STATUS_INCOMPLETE
    assert listed.messages[-1].parts[0].text == "Half"


async def test_approvals_without_an_answer_in_time_are_denied_and_late_calls_fail(
    served: Running, careful: str, session: str, model: OpenAIServer
) -> None:
    soon = v1.Limits(input_timeout=Duration(nanos=50_000_000))
    model.script(tool_calls(("pay", "{}")), reply("Denied."), tool_calls(("weigh", "{}")), reply("Late."))
    for name, tools in ((careful, ()), (session, (client_tool("weigh"),))):
        frames = await drive(served, OnStream, start_with(name, *tools, limits=soon), lambda event: None)
        assert durable(frames)[-1].run_state_changed.state == v1.Run.STATE_SUCCEEDED
    assert "in time" in results_of(model.requests[1])[0]
    assert "in time" in results_of(model.requests[3])[0]


async def test_a_run_without_a_stream_is_cancelled_if_it_was_started_so(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("Never.").held(asyncio.Event()))
    alone = v1.Disconnect(cancel_after=Duration(nanos=50_000_000))
    call = served.runs.Run(iter([v1.RunRequest(start=start_with(session, run_id="r1", disconnect=alone))]))
    await call.read()
    await model.request(0)
    call.cancel()
    run = await served.runs.WaitRun(v1.WaitRunRequest(name=f"{session}/runs/r1"))
    assert run.state == v1.Run.STATE_CANCELLED


async def test_a_run_that_waits_for_a_person_needs_no_company(
    served: Running, careful: str, session: str, model: OpenAIServer
) -> None:
    """Its time would be up before that of the run after it, which waits for its caller."""
    model.script(tool_calls(("pay", "{}")), tool_calls(("weigh", "{}")))
    runs = []
    for start, millis in ((start_with(careful), 500), (start_with(session, client_tool("weigh")), 600)):
        start.disconnect.cancel_after.CopyFrom(Duration(nanos=millis * 1_000_000))
        runs.append((await served.runs.Invoke(v1.InvokeRequest(start=start))).run)
    person, caller = runs
    alone = await served.runs.WaitRun(v1.WaitRunRequest(name=caller.name, after_sequence=caller.last_sequence))
    assert alone.state == v1.Run.STATE_CANCELLED
    assert (await served.runs.GetRun(v1.GetRunRequest(name=person.name))).state == v1.Run.STATE_WAITING


async def test_a_start_may_roll_the_run_before_it_back(served: Running, session: str, model: OpenAIServer) -> None:
    """End, rewind and start are one commit: messages since are superseded and the state is as it was."""

    def put(value: int) -> v1.StateOp:
        return v1.StateOp(key="n", set=v1.Value(int_value=value))

    state = f"{session}/state"
    await served.state.UpdateState(v1.UpdateStateRequest(name=state, ops=[put(1)]))
    model.script(tool_calls(("weigh", "{}")), reply("Anew."))
    first = start_with(session, client_tool("weigh"), run_id="one", state={"m": v1.Value(int_value=5)})
    waiting = (await served.runs.Invoke(v1.InvokeRequest(start=first))).run
    await served.state.UpdateState(v1.UpdateStateRequest(name=state, ops=[put(2)]))
    again = v1.StartRun(session=session, messages=[said("Better")], on_busy=v1.StartRun.ON_BUSY_ROLLBACK)
    answered = await served.runs.Invoke(v1.InvokeRequest(start=again, request_id="again"))
    assert answered.reply.parts[0].text == "Anew."
    assert await served.runs.Invoke(v1.InvokeRequest(start=again, request_id="again")) == answered
    assert (await served.runs.GetRun(v1.GetRunRequest(name=waiting.name))).state == v1.Run.STATE_CANCELLED
    assert [message["content"] for message in model.requests[1]["messages"][1:]] == ["Better"]
    log = await log_of(served, session)
    mark = next(event for event in log if event.HasField("rewound"))
    assert (mark.rewound.to_sequence, mark.rewound.run) == (1, waiting.name)
    commit = [event for event in log if event.create_time == mark.create_time]
    assert kinds(commit) == [
        *("tool_finished", "run_state_changed", "rewound", "state_changed", "run_started", "message_added"),
    ]
    entries = (await served.state.GetState(v1.GetStateRequest(name=state))).entries
    assert {key: entry.value.int_value for key, entry in entries.items()} == {"n": 1}
    shown = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    assert [message.parts[0].text for message in shown.messages] == ["Better", "Anew."]
    everything = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session, show_superseded=True))
    statuses = [message.status for message in everything.messages]
    assert statuses == [*[v1.Message.STATUS_SUPERSEDED] * 2, *[v1.Message.STATUS_COMPLETED] * 2]


async def test_a_reply_half_made_is_rolled_back_with_its_run(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """The half reply is in the log, superseded; a repeat of the start finds the run that it made, also while that runs,
    and rolls nothing back."""
    go_on = asyncio.Event()
    model.script(
        stream(chunk({"content": "Half"})).held(asyncio.Event(), after=2),
        stream(chunk({"content": "Anew."})).held(go_on, after=2),
    )
    first = await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, run_id="one")))
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=first.name))
    async for frame in watch:
        if any(event.HasField("block_delta") for event in frame.batch.events):
            break
    watch.cancel()
    again = v1.StartRun(session=session, run_id="two", messages=[said("Better")], on_busy=v1.StartRun.ON_BUSY_ROLLBACK)
    made = await served.runs.CreateRun(v1.CreateRunRequest(start=again))
    await model.request(1)
    repeated = await served.runs.CreateRun(v1.CreateRunRequest(start=again))
    assert (repeated.name, repeated.first_sequence) == (made.name, made.first_sequence)
    go_on.set()
    assert (await served.runs.Invoke(v1.InvokeRequest(start=again))).run.state == v1.Run.STATE_SUCCEEDED
    assert (await served.runs.GetRun(v1.GetRunRequest(name=first.name))).state == v1.Run.STATE_CANCELLED
    assert [message["content"] for message in model.requests[1]["messages"][1:]] == ["Better"]
    log = await log_of(served, session)
    mark = next(event for event in log if event.HasField("rewound"))
    assert kinds([event for event in log if event.create_time == mark.create_time]) == [
        *("message_added", "run_state_changed", "rewound", "run_started", "message_added"),
    ]
    everything = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session, show_superseded=True))
    assert [(message.parts[0].text, message.status) for message in everything.messages] == [
        ("Go", v1.Message.STATUS_SUPERSEDED),
        ("Half", v1.Message.STATUS_SUPERSEDED),
        ("Better", v1.Message.STATUS_COMPLETED),
        ("Anew.", v1.Message.STATUS_COMPLETED),
    ]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_start_that_rolls_back_is_repeated_under_its_id(
    served: Running, session: str, model: OpenAIServer, driver: Driver
) -> None:
    """A request_id or a command_id is recorded in the commit that ends one run and starts another."""
    model.script(reply("Never.").held(asyncio.Event()), reply("Anew."))
    first = await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session)))
    again = v1.StartRun(session=session, messages=[said("Better")], on_busy=v1.StartRun.ON_BUSY_ROLLBACK)
    if driver is OnStream:
        request = v1.CreateRunRequest(start=again, request_id="again")
        made = [(await served.runs.CreateRun(request)).name for _ in range(2)]
    else:
        command = v1.SendCommandRequest(session=session, command=v1.RunRequest(command_id="again", start=again))
        results = [(await served.runs.SendCommand(command)).result for _ in range(2)]
        assert results[0].sequence == results[1].sequence
        log = await log_of(served, session)
        made = [log[told.sequence - 1].run for told in results]
    assert made[0] == made[1] != first.name
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=made[0]))
    assert ended.state == v1.Run.STATE_SUCCEEDED
    assert len([event for event in await log_of(served, session) if event.HasField("rewound")]) == 1


async def test_rolling_back_a_run_that_was_queued_keeps_what_went_on_before_it(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Its first event lies in the middle of the run before it, whose reply is not its doing."""
    go_on = asyncio.Event()
    model.script(reply("One.").held(go_on), reply("Never.").held(asyncio.Event()), reply("Three."))
    await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, run_id="one")))
    await model.request(0)
    queue = start_with(session, on_busy=v1.StartRun.ON_BUSY_QUEUE, state={"n": v1.Value(int_value=2)})
    second = await served.runs.CreateRun(v1.CreateRunRequest(start=queue))
    put = v1.StateOp(key="n", set=v1.Value(int_value=1))
    await served.state.UpdateState(v1.UpdateStateRequest(name=f"{session}/state", ops=[put]))
    go_on.set()
    await model.request(1)
    again = v1.StartRun(session=session, messages=[said("Better")], on_busy=v1.StartRun.ON_BUSY_ROLLBACK)
    await served.runs.Invoke(v1.InvokeRequest(start=again))
    assert [message["content"] for message in model.requests[2]["messages"][1:]] == ["Go", "One.", "Better"]
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session}/state"))
    assert state.entries["n"].value.int_value == 1
    (mark,) = [event.rewound for event in await log_of(served, session) if event.HasField("rewound")]
    assert mark.to_sequence > second.first_sequence


def without_messages(session: str, on_busy: v1.StartRun.OnBusy.ValueType) -> v1.StartRun:
    return v1.StartRun(session=session, run_id="two", on_busy=on_busy)


async def test_a_start_with_nothing_to_say_goes_on_where_the_run_that_it_stops_was(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """An active run always leaves something to answer: here a call's outcome, as when the run has ended."""
    model.script(tool_calls(("weigh", "{}")), reply("Unweighed."))
    start = start_with(session, client_tool("weigh"), run_id="one")
    await served.runs.Invoke(v1.InvokeRequest(start=start))
    go_on = without_messages(session, v1.StartRun.ON_BUSY_INTERRUPT)
    answered = await served.runs.Invoke(v1.InvokeRequest(start=go_on))
    assert answered.reply.parts[0].text == "Unweighed."
    assert [message["role"] for message in model.requests[1]["messages"][1:]] == ["user", "assistant", "tool"]


async def test_a_start_with_nothing_to_say_goes_on_after_a_call_whose_run_was_cancelled(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(tool_calls(("weigh", "{}")), reply("Unweighed."))
    start = start_with(session, client_tool("weigh"), run_id="one")
    run = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
    await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    go_on = without_messages(session, v1.StartRun.ON_BUSY_REJECT)
    assert (await served.runs.Invoke(v1.InvokeRequest(start=go_on))).reply.parts[0].text == "Unweighed."


async def test_a_start_with_nothing_to_say_does_not_wait_to_find_out_whether_it_has(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Nobody knows what the history will end with when its turn comes, and a refusal now is worth more than a failure
    later."""
    go_on = asyncio.Event()
    model.script(reply("One.").held(go_on))
    first = await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, run_id="one")))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        queue = without_messages(session, v1.StartRun.ON_BUSY_QUEUE)
        await served.runs.CreateRun(v1.CreateRunRequest(start=queue))
    assert (reason_of(refused.value), fields_of(refused.value)) == ("INVALID_FIELD", {"start.messages"})
    go_on.set()
    assert (await served.runs.WaitRun(v1.WaitRunRequest(name=first.name))).state == v1.Run.STATE_SUCCEEDED
    assert len(model.requests) == 1


@pytest.mark.parametrize("asked", [False, True], ids=["answered", "asked"])
async def test_a_start_that_rolls_back_with_nothing_to_say_answers_what_was_there_before(
    served: Running, session: str, model: OpenAIServer, asked: bool
) -> None:
    """When that is nothing, it is refused, and the run that it would have rolled back goes on."""
    model.script(reply("One."))
    await served.runs.Invoke(v1.InvokeRequest(start=start_with(session)))
    if asked:
        question = v1.AppendMessagesRequest(parent=session, messages=[said("And the bow?")])
        await served.messages.AppendMessages(question)
    go_on = asyncio.Event()
    model.script(reply("Two.").held(go_on), reply("Anew."))
    active = await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session, run_id="one")))
    await model.request(1)
    back = v1.CreateRunRequest(start=without_messages(session, v1.StartRun.ON_BUSY_ROLLBACK))
    if asked:
        ended = await served.runs.WaitRun(v1.WaitRunRequest(name=(await served.runs.CreateRun(back)).name))
        assert ended.reply.parts[0].text == "Anew."
        shown = [message["content"] for message in model.requests[2]["messages"][1:]]
        assert shown == ["Go", "One.", "And the bow?"]
    else:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.CreateRun(back)
        assert (reason_of(refused.value), fields_of(refused.value)) == ("INVALID_FIELD", {"start.messages"})
        go_on.set()
        ended = await served.runs.WaitRun(v1.WaitRunRequest(name=active.name))
        assert ended.reply.parts[0].text == "Two."
        assert len(model.requests) == 2

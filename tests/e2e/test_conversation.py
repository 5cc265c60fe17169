"""A conversation over a real channel, on every store."""

import asyncio

import grpc
import pytest
from notecase import v1

from tests.e2e.driving import (
    BySendCommand,
    OnStream,
    durable,
    events_of,
    kinds,
    log_of,
    metadata_of,
    reason_of,
    said,
)
from tests.support.openai_server import Answer, OpenAIServer, chunk, error, reply, stream, tool_calls
from tests.support.server import Running

DRIVERS = [OnStream, BySendCommand]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_turn_is_two_commits_and_streams_in_between(
    served: Running, session: str, model: OpenAIServer, driver: type[OnStream | BySendCommand]
) -> None:
    """The question and the start are one commit, the reply and the end another; text streams before it is committed."""
    go_on = asyncio.Event()
    model.script(reply("Good evening, Ada.", chunks=3).held(go_on, after=2))
    frames: list[v1.RunResponse] = []
    start = v1.StartRun(session=session, messages=[said("Hello")])
    async for frame in driver().start(served, start):
        frames.append(frame)
        if any(event.HasField("block_delta") for event in frame.batch.events):
            go_on.set()
    assert frames[0].WhichOneof("frame") == "attached"
    assert kinds(durable(frames)) == ["run_started", "message_added", "message_added", "usage", "run_state_changed"]
    assert [event.sequence for event in durable(frames)] == [1, 2, 3, 4, 5]
    times = [event.create_time.ToMicroseconds() for event in durable(frames)]
    assert len(set(times[:2])) == 1
    assert len(set(times[2:])) == 1
    deltas = [event.block_delta for event in events_of(frames) if event.HasField("block_delta")]
    whole = durable(frames)[2].message_added
    assert {delta.message for delta in deltas} == {whole.name}
    text = ""
    for delta in deltas:
        assert delta.start == len(text.encode())
        text += delta.text
        assert delta.end == len(text.encode())
    assert whole.parts[0].text.startswith(text)
    assert whole.parts[0].text == "Good evening, Ada."
    assert durable(frames) == await log_of(served, session)


async def test_the_model_is_shown_the_instruction_the_history_and_the_question(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("One."), reply("Two."))
    for text in ("First?", "Second?"):
        await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session, messages=[said(text)])))
    assert model.requests[1]["messages"] == [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Second?"},
    ]


async def test_notes_reach_the_instruction_and_a_reply_becomes_a_note(served: Running, model: OpenAIServer) -> None:
    """Templates read the session's, the user's and the app's state; output_key writes the reply back, in its commit."""
    instruction = "Case: {{ case }}. For {{ user.name }}. Policy: {{ app.policy }}. Missing: [{{ nothing }}]"
    made = v1.Agent(llm=v1.LlmAgent(instruction=instruction), output_key="verdict")
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="judge", agent=made))
    session = await served.sessions.CreateSession(
        v1.CreateSessionRequest(
            session=v1.Session(agent="agents/judge", user="users/Ada@x.org"),
            state={"case": v1.Value(string_value="<violin> & bow")},
        )
    )
    for owner, key, text in (("users/Ada@x.org", "name", "Ada"), ("app", "policy", "be kind")):
        value = v1.Value(string_value=text)
        await served.state.PutState(v1.PutStateRequest(name=f"{owner}/state", key=key, value=value))
    model.script(reply("Guilty."))
    await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session.name, messages=[said("Well?")])))
    assert model.requests[0]["messages"][0]["content"] == (
        "Case: <violin> & bow. For Ada. Policy: be kind. Missing: []"
    )
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session.name}/state", keys=["verdict"]))
    assert state.entries["verdict"].value.string_value == "Guilty."
    log = await log_of(served, session.name)
    assert kinds(log)[-4:] == ["message_added", "usage", "state_changed", "run_state_changed"]


async def test_usage_is_reported_per_call_and_summed_per_run_and_session(
    served: Running, session: str, model: OpenAIServer
) -> None:
    counted = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    model.script(tool_calls(("nothing", "{}"), usage=counted), reply("Done.", usage=counted))
    answer = await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session, messages=[said("Go")])))
    twice = v1.Usage(input_tokens=20, cached_input_tokens=8, output_tokens=10, reasoning_tokens=4, model_calls=2)
    twice.model, twice.provider = "stub-1", "openai"
    assert answer.run.usage == twice
    assert (await served.sessions.GetSession(v1.GetSessionRequest(name=session))).usage == twice
    per_call = [event.usage for event in await log_of(served, session) if event.HasField("usage")]
    assert [usage.input_tokens for usage in per_call] == [10, 10]


async def test_a_call_of_a_missing_tool_fails_and_the_model_reads_why(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Call and outcome stay one part, and the next request is well formed: every call answered."""
    model.script(tool_calls(("search", '{"q": "violin"}'), ("weigh", "{}")), reply("I cannot."))
    answer = await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session, messages=[said("Go")])))
    assert answer.run.state == v1.Run.STATE_SUCCEEDED
    assistant, *results = model.requests[1]["messages"][2:]
    asked = [call["id"] for call in assistant["tool_calls"]]
    assert [result["tool_call_id"] for result in results] == asked
    assert len(set(asked)) == 2
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    calls = [part.tool_call for part in listed.messages[1].parts]
    assert [call.outcome for call in calls] == [v1.ToolCall.OUTCOME_FAILED] * 2
    assert calls[0].error == "There is no tool 'search'."
    assert listed.messages[1].status == v1.Message.STATUS_COMPLETED
    assert listed.messages[1].update_sequence > listed.messages[1].sequence


async def test_a_loop_of_model_calls_ends_at_the_agents_limit(served: Running, model: OpenAIServer) -> None:
    llm = v1.LlmAgent(max_model_calls=3)
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="loop", agent=v1.Agent(llm=llm)))
    model.script(*[tool_calls(("again", "{}"))] * 5)
    start = v1.StartRun(new_session=v1.Session(agent="agents/loop"), messages=[said("Go")])
    answer = await served.runs.Invoke(v1.InvokeRequest(start=start))
    assert answer.run.state == v1.Run.STATE_FAILED
    assert answer.run.error.reason == v1.ERROR_REASON_LIMIT_EXCEEDED
    assert dict(answer.run.error.metadata) == {"limit": "max_model_calls", "value": "3"}
    assert len(model.requests) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (error(401, "bad key test-key"), v1.ERROR_REASON_MODEL_ERROR),
        (error(404, "no such model", code="model_not_found"), v1.ERROR_REASON_MODEL_ERROR),
        (error(500, headers={"retry-after-ms": "1"}), v1.ERROR_REASON_MODEL_UNAVAILABLE),
    ],
)
async def test_a_model_that_refuses_fails_the_run_as_data_without_the_key(
    served: Running, session: str, model: OpenAIServer, answer: Answer, reason: v1.ErrorReason.ValueType
) -> None:
    """A failed run ends the call with OK and says why; the session takes the next run."""
    model.script(*[answer] * 3)
    failed = await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session, messages=[said("Go")])))
    assert (failed.run.state, failed.run.error.reason) == (v1.Run.STATE_FAILED, reason)
    assert "test-key" not in str(failed)
    assert not failed.HasField("reply")
    model._script.clear()
    model.script(reply("Better."))
    again = await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session)))
    assert again.reply.parts[0].text == "Better."


async def frames_of_run(served: Running, session: str, seen: asyncio.Event) -> list[v1.RunResponse]:
    """Runs a turn to its end; sets `seen` when text was streamed."""
    call = served.runs.Run(iter([v1.RunRequest(start=v1.StartRun(session=session, messages=[said("Go")]))]))
    frames = []
    async for frame in call:
        frames.append(frame)
        if any(event.HasField("block_delta") for event in frame.batch.events):
            seen.set()
    return frames


async def test_a_reply_cut_in_mid_stream_is_requested_again_under_another_name(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Watchers receive `message_discarded` for the first; only the second is in the log."""
    seen = asyncio.Event()
    model.script(reply("Lost words.", chunks=3).cut(after=2).held(seen, after=2), reply("Kept words."))
    frames = await frames_of_run(served, session, seen)
    discarded = [e.message_discarded.message for e in events_of(frames) if e.HasField("message_discarded")]
    kept = [e.message_added for e in durable(frames) if e.message_added.role == v1.Message.ROLE_ASSISTANT]
    assert [message.parts[0].text for message in kept] == ["Kept words."]
    assert len(discarded) == 1
    assert discarded[0] != kept[0].name


async def test_text_that_a_closing_tag_shows_to_be_reasoning_is_sent_again_as_reasoning(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Watchers drop the text, and joined deltas are what the log has."""
    seen = asyncio.Event()
    model.script(reply("I weigh it.\n</think>\n\nLight.", chunks=2).held(seen, after=2))
    frames = await frames_of_run(served, session, seen)
    events = events_of(frames)
    (discarded,) = (event.message_discarded.message for event in events if event.HasField("message_discarded"))
    (kept,) = (e.message_added for e in durable(frames) if e.message_added.role == v1.Message.ROLE_ASSISTANT)
    assert discarded != kept.name
    assert ["I weigh it.\n", "Light."] == [part.reasoning.text or part.text for part in kept.parts]
    assert ["reasoning", "text"] == [part.WhichOneof("kind") for part in kept.parts]
    deltas = [event.block_delta for event in events if event.block_delta.message == kept.name]
    assert "I weigh it.\n" == "".join(delta.reasoning for delta in deltas)
    assert "Light." == "".join(delta.text for delta in deltas)


async def test_a_reply_that_is_cut_again_and_again_fails_and_keeps_what_came(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Each is cut only when its first words have been seen: before them, a cut would be the provider's business."""
    gates = [asyncio.Event() for _ in range(3)]
    model.script(*[reply("Half a sentence", chunks=2).cut(after=2).held(gate, after=2) for gate in gates])
    call = served.runs.Run(iter([v1.RunRequest(start=v1.StartRun(session=session, messages=[said("Go")]))]))
    begun: list[str] = []
    frames = []
    async for frame in call:
        frames.append(frame)
        for event in frame.batch.events:
            if event.HasField("block_delta") and event.block_delta.message not in begun:
                begun.append(event.block_delta.message)
                gates[len(begun) - 1].set()
    assert len(begun) == 3
    assert durable(frames)[-1].run_state_changed.error.reason == v1.ERROR_REASON_MODEL_UNAVAILABLE
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    assert listed.messages[-1].status == v1.Message.STATUS_INCOMPLETE
    assert listed.messages[-1].parts[0].text == "Half a s"


@pytest.mark.parametrize("driver", DRIVERS)
async def test_cancel_seals_the_run_and_keeps_the_half_reply(
    served: Running, session: str, model: OpenAIServer, driver: type[OnStream | BySendCommand]
) -> None:
    """The provider sees the connection go, the log keeps an incomplete message, and the next turn shows it the
    model."""
    never = asyncio.Event()
    model.script(stream(chunk({"content": "Half "}), chunk({"content": "said"})).held(never, after=2), reply("Next."))
    driving = driver()
    frames: list[v1.RunResponse] = []
    async for frame in driving.start(served, v1.StartRun(session=session, messages=[said("Go")])):
        frames.append(frame)
        if any(event.HasField("block_delta") for event in frame.batch.events):
            await driving.send(v1.RunRequest(command_id="stop", cancel=v1.CancelCommand(reason="enough")))
    await (await model.request(0)).left.wait()
    message, end = durable(frames)[-2:]
    assert message.message_added.status == v1.Message.STATUS_INCOMPLETE
    assert message.message_added.parts[0].text == "Half "
    assert end.run_state_changed.state == v1.Run.STATE_CANCELLED
    assert (end.run_state_changed.reason, end.cause_id) == ("enough", "stop")
    await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session, messages=[said("And?")])))
    assert [m["content"] for m in model.requests[1]["messages"][1:]] == ["Go", "Half ", "And?"]


async def test_a_lost_stream_changes_nothing(served: Running, session: str, model: OpenAIServer) -> None:
    go_on = asyncio.Event()
    model.script(reply("All of it.", chunks=2).held(go_on, after=2))
    call = served.runs.Run(
        iter([v1.RunRequest(start=v1.StartRun(session=session, run_id="r1", messages=[said("Go")]))])
    )
    async for frame in call:
        if any(event.HasField("block_delta") for event in frame.batch.events):
            break
    call.cancel()
    go_on.set()
    run = await served.runs.WaitRun(v1.WaitRunRequest(name=f"{session}/runs/r1"))
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert run.reply.parts[0].text == "All of it."


async def test_one_run_at_a_time_and_the_refusal_names_the_holder(
    served: Running, session: str, model: OpenAIServer
) -> None:
    go_on = asyncio.Event()
    model.script(reply("Slow.").held(go_on))
    first = await served.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=session, messages=[said("A")])))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=session, messages=[said("B")])))
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(refused.value) == "RUN_ACTIVE"
    assert metadata_of(refused.value) == {"run": first.name}
    go_on.set()
    assert (await served.runs.WaitRun(v1.WaitRunRequest(name=first.name))).state == v1.Run.STATE_SUCCEEDED
    assert kinds(await log_of(served, session)).count("run_started") == 1


async def test_a_wait_for_a_run_bears_what_others_write(served: Running, session: str, model: OpenAIServer) -> None:
    """A note that is put meanwhile is no news of the run, and nothing to go round in circles for."""
    go_on = asyncio.Event()
    model.script(reply("Done.").held(go_on))
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=session, messages=[said("Go")])))
    await model.request(0)
    value = v1.Value(string_value="the harbour")
    await served.state.PutState(v1.PutStateRequest(name=f"{session}/state", key="last_seen", value=value))
    waiting = asyncio.ensure_future(served.runs.WaitRun(v1.WaitRunRequest(name=run.name)))
    await served.runs.GetRun(v1.GetRunRequest(name=run.name))
    go_on.set()
    assert (await waiting).state == v1.Run.STATE_SUCCEEDED

"""Replies by a schema: one `json` part that is valid, or a typed failure after one more try, on every store."""

import json
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from notecase import from_value, text_of, v1

from tests.e2e.driving import OnStream, durable, events_of, fields_of, kinds, log_of, reason_of, said
from tests.support.openai_server import USAGE, OpenAIServer, chunk, reply, stream, tool_calls
from tests.support.server import Running

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "suspect": {"type": "string", "maxLength": 40},
        "odds": {"type": "number"},
        "sightings": {"type": "array", "items": {"type": "integer"}},
        "alibi": {"anyOf": [{"$ref": "#/$defs/alibi"}, {"type": "null"}]},
    },
    "required": ["suspect", "sightings", "alibi"],
    "additionalProperties": False,
    "$defs": {"alibi": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}},
}
VERDICT = '{"suspect": "Moriarty", "odds": 0.5, "sightings": [9007199254740993, 2], "alibi": null}'
TYPED = {"suspect": "Moriarty", "odds": 0.5, "sightings": [9007199254740993, 2], "alibi": None}


async def opened(served: Running, provider: str = "", tools: list[v1.Tool] | None = None, **llm: Any) -> str:
    """A session of an agent that answers by SCHEMA, and keeps its answer under "verdict"."""
    made = v1.LlmAgent(output_schema=json.dumps(SCHEMA), provider=provider, tools=tools or [], **llm)
    agent = v1.Agent(llm=made, output_key="verdict")
    created = await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="judge", agent=agent))
    request = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent=created.name))
    return (await served.sessions.CreateSession(request)).name


async def driven(served: Running, session: str, text: str = "Who was it?") -> list[v1.RunResponse]:
    start = v1.StartRun(session=session, messages=[said(text)])
    return [frame async for frame in OnStream().start(served, start)]


async def run_of(served: Running, session: str) -> v1.Run:
    return (await served.runs.ListRuns(v1.ListRunsRequest(parent=session))).runs[0]


async def note(served: Running, session: str) -> Any:
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session}/state", keys=["verdict"]))
    return from_value(state.entries["verdict"].value) if "verdict" in state.entries else "no note"


@pytest.mark.parametrize("fence", ["{}", "```json\n{}\n```", "\n```\n{}\n```\n"])
async def test_a_reply_by_a_schema_is_one_json_part_and_a_typed_note(
    served: Running, model: OpenAIServer, fence: str
) -> None:
    """The request in full; what streams is exactly what is committed, without the fence; the note has integers."""
    session = await opened(served)
    model.script(reply(fence.format(VERDICT), chunks=9))
    frames = await driven(served, session)
    assert model.requests == [
        {
            "model": "stub-1",
            "messages": [{"role": "user", "content": "Who was it?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA}},
        }
    ]
    log = durable(frames)
    assert kinds(log) == [
        *("run_started", "message_added"),
        *("message_added", "usage", "state_changed", "run_state_changed"),
    ]
    assert list(log[2].message_added.parts) == [v1.Part(json=VERDICT)]
    deltas = [event.block_delta for event in events_of(frames) if event.HasField("block_delta")]
    assert {delta.WhichOneof("delta") for delta in deltas} == {"json"}
    assert VERDICT.startswith("".join(delta.json for delta in deltas))
    assert await note(served, session) == TYPED
    assert (await run_of(served, session)).state == v1.Run.STATE_SUCCEEDED


async def test_an_invalid_reply_is_discarded_and_requested_once_more(served: Running, model: OpenAIServer) -> None:
    """The model sees its own reply and what is wrong; both calls are on the bill; only the second reply is kept."""
    session = await opened(served)
    bad = '{"suspect": 7, "sightings": [], "alibi": null}'
    model.script(reply(bad, chunks=3), reply(VERDICT))
    frames = await driven(served, session)
    complaint = model.requests[1]["messages"][2]["content"]
    assert complaint == (
        'That reply is not valid: at /suspect: the value is not of type "string".\n'
        f"Reply again, only with JSON that matches this JSON Schema:\n{json.dumps(SCHEMA)}"
    )
    assert model.requests[1] == {
        **model.requests[0],
        "messages": [
            {"role": "user", "content": "Who was it?"},
            {"role": "assistant", "content": bad},
            {"role": "user", "content": complaint},
        ],
    }
    log = durable(frames)
    assert kinds(log) == [
        *("run_started", "message_added", "usage"),
        *("message_added", "usage", "state_changed", "run_state_changed"),
    ]
    discarded = [event.message_discarded.message for event in events_of(frames) if event.HasField("message_discarded")]
    shown = {event.block_delta.message for event in events_of(frames) if event.HasField("block_delta")}
    (of_bad,) = shown - {log[3].message_added.name}
    assert discarded == [of_bad]
    run = await run_of(served, session)
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert (run.usage.model_calls, run.usage.input_tokens) == (2, 2 * USAGE["prompt_tokens"])


async def test_two_invalid_replies_fail_the_run(served: Running, model: OpenAIServer) -> None:
    """Typed, with the place and without the value; the last reply is kept as incomplete, and there is no note."""
    session = await opened(served)
    bad = '{"suspect": "Moriarty", "sightings": ["secret"], "alibi": null}'
    model.script(reply("I cannot say."), reply(bad))
    log = durable(await driven(served, session))
    assert kinds(log)[2:] == ["usage", "usage", "message_added", "run_state_changed"]
    assert list(log[4].message_added.parts) == [v1.Part(json=bad)]
    assert log[4].message_added.status == v1.Message.STATUS_INCOMPLETE
    run = await run_of(served, session)
    assert run.state == v1.Run.STATE_FAILED
    assert run.error.reason == v1.ERROR_REASON_OUTPUT_INVALID
    assert run.error.metadata["problem"] == 'at /sightings/0: the value is not of type "integer"'
    assert "secret" not in str(run.error)
    assert run.usage.model_calls == 2
    assert not run.HasField("reply")
    assert await note(served, session) == "no note"
    model.script(reply(VERDICT))
    await driven(served, session, "And now?")
    assert model.requests[2]["messages"][1] == {"role": "assistant", "content": bad}


async def test_a_reply_cut_off_at_its_limit_is_not_requested_again(served: Running, model: OpenAIServer) -> None:
    session = await opened(served)
    model.script(reply(VERDICT[:40], finish="length"))
    await driven(served, session)
    run = await run_of(served, session)
    assert run.error.reason == v1.ERROR_REASON_OUTPUT_INVALID
    assert run.error.metadata["finish_reason"] == "length"
    assert len(model.requests) == 1
    assert run.usage.model_calls == 1


async def test_a_refusal_is_a_reply(served: Running, model: OpenAIServer) -> None:
    """Typed as what it is, and not asked again: the model has said why."""
    session = await opened(served)
    model.script(stream(chunk({"refusal": "I will not."})))
    log = durable(await driven(served, session))
    assert list(log[2].message_added.parts) == [v1.Part(refusal="I will not.")]
    assert (await run_of(served, session)).state == v1.Run.STATE_SUCCEEDED
    assert await note(served, session) == "no note"
    assert len(model.requests) == 1


async def test_text_next_to_calls_stays_text_and_the_reply_after_them_is_json(
    served: Running, model: OpenAIServer
) -> None:
    session = await opened(served, tools=[v1.Tool(name="look", client=v1.ClientTool())])
    calls = tool_calls(("look", "{}"))
    model.script(replace(calls, pieces=(chunk({"content": "Let me look."}), *calls.pieces)), reply(VERDICT))
    waiting = await served.runs.Invoke(
        v1.InvokeRequest(start=v1.StartRun(session=session, messages=[said("Who was it?")]))
    )
    assert waiting.run.state == v1.Run.STATE_WAITING
    found = v1.ToolResult(call_id=waiting.run.pending_calls[0].call_id, result=[v1.Part(json='{"seen": true}')])
    await served.runs.SendCommand(
        v1.SendCommandRequest(session=session, command=v1.RunRequest(command_id="c", tool_result=found))
    )
    run = await served.runs.WaitRun(v1.WaitRunRequest(name=waiting.run.name, after_sequence=waiting.run.last_sequence))
    assert run.state == v1.Run.STATE_SUCCEEDED
    said_first, said_last = (
        event.message_added for event in (await log_of(served, session)) if event.message_added.usage.model_calls
    )
    assert [part.WhichOneof("kind") for part in said_first.parts] == ["text", "tool_call"]
    assert list(said_last.parts) == [v1.Part(json=VERDICT)]
    assert model.requests[1]["messages"][1]["content"] == "Let me look."
    assert model.requests[1]["messages"][2]["content"] == '{"seen": true}'
    assert await note(served, session) == TYPED


async def test_words_next_to_a_refusal_stay_text_and_store_nothing(served: Running, model: OpenAIServer) -> None:
    """They do not match the schema, and were not checked."""
    session = await opened(served)
    model.script(stream(chunk({"content": "Let me think."}), chunk({"refusal": "I had rather not."})))
    await driven(served, session)
    run = await run_of(served, session)
    assert (v1.Run.STATE_SUCCEEDED, v1.Error()) == (run.state, run.error)
    assert [v1.Part(refusal="I had rather not."), v1.Part(text="Let me think.")] == list(run.reply.parts)
    assert await note(served, session) == "no note"


async def test_reasoning_in_between_does_not_part_the_json(served: Running, model: OpenAIServer) -> None:
    session = await opened(served)
    halves = [chunk({"content": VERDICT[:20]}), chunk({"reasoning": "Hm."}), chunk({"content": VERDICT[20:]})]
    model.script(stream(chunk({"reasoning": "Well. "}), *halves))
    log = durable(await driven(served, session))
    kinds_of = [part.WhichOneof("kind") for part in log[2].message_added.parts]
    assert kinds_of == ["reasoning", "json", "reasoning"]
    assert log[2].message_added.parts[1].json == VERDICT


async def test_the_repeat_counts_as_a_model_call(served: Running, model: OpenAIServer) -> None:
    session = await opened(served, max_model_calls=1)
    model.script(reply("Nobody."))
    await driven(served, session)
    run = await run_of(served, session)
    assert run.error.reason == v1.ERROR_REASON_LIMIT_EXCEEDED
    assert run.error.metadata["limit"] == "max_model_calls"
    assert len(model.requests) == 1


async def test_extra_has_the_last_word_about_the_format(served: Running, model: OpenAIServer) -> None:
    """For a provider that knows no schemas."""
    extra = '{"response_format": {"type": "json_object"}}'
    session = await opened(served, generation=v1.Generation(extra=extra))
    model.script(reply(VERDICT))
    log = durable(await driven(served, session))
    assert model.requests[0]["response_format"] == {"type": "json_object"}
    assert list(log[2].message_added.parts) == [v1.Part(json=VERDICT)]


async def test_the_offline_model_answers_by_a_schema(served: Running) -> None:
    session = await opened(served, "offline")
    for text, told in [("By the pier", "By the pier"), ("/say " + VERDICT, "Moriarty")]:
        await driven(served, session, text)
        run = await run_of(served, session)
        assert run.state == v1.Run.STATE_SUCCEEDED, run.error
        assert json.loads(run.reply.parts[0].json)["suspect"] == told


@pytest.mark.parametrize("schema", ["{", "[1]", '{"type": "strin"}', '{"$ref": "https://example.org/s"}', "x" * 70_000])
async def test_an_agent_with_an_invalid_schema_is_refused(served: Running, schema: str) -> None:
    await opened(served)
    broken = v1.Agent(name="agents/judge", llm=v1.LlmAgent(output_schema=schema))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent=broken))
    assert reason_of(refused.value) == "INVALID_FIELD"
    assert fields_of(refused.value) == {"agent.llm.output_schema"}
    for paths in ([], ["llm"], ["llm.output_schema"], ["*"]):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=broken, update_mask=FieldMask(paths=paths)))
        assert fields_of(refused.value) == {"agent.llm.output_schema"}
    fine = v1.UpdateAgentRequest(agent=broken, update_mask=FieldMask(paths=["llm.instruction"]))
    assert (await served.agents.UpdateAgent(fine)).llm.output_schema == json.dumps(SCHEMA)


async def test_callers_may_send_json_which_the_model_reads_as_text(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("Noted."), reply("Yes."))
    both = v1.Message(parts=[v1.Part(text="Look:"), v1.Part(json='{"tide": 3}')])
    alone = v1.Message(parts=[v1.Part(json="[1, 2]")])
    for message in (both, alone):
        await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session, messages=[message])))
    assert model.requests[1]["messages"][1:] == [
        {"role": "user", "content": 'Look:\n\n{"tide": 3}'},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": "[1, 2]"},
    ]


@pytest.mark.parametrize("text", ["", "{", "NaN", "{} {}", "[" * 100_000])
async def test_text_that_is_not_json_is_not_a_json_part(served: Running, session: str, text: str) -> None:
    request = v1.AppendMessagesRequest(parent=session, messages=[v1.Message(parts=[v1.Part(json=text)])])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.messages.AppendMessages(request)
    assert fields_of(refused.value) == {"messages[0].parts[0].json"}


async def test_the_clients_text_of_a_reply_by_a_schema_is_its_json(served: Running, model: OpenAIServer) -> None:
    """As it streams, and whole."""
    session = await opened(served)
    model.script(reply(VERDICT, chunks=4))
    async with served.client() as client, client.run("Who was it?", session=session) as run:
        assert "".join([piece async for piece in run.text()]) == VERDICT
        assert run.result is not None
        assert text_of(run.result.reply) == VERDICT

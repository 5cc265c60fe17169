"""What a provider gets back is kept with its part: through the log, an export, a fork and a rewind, to that provider
and model alone, and never from a caller."""

import base64
from typing import Any

import grpc
import pytest
from notecase import v1
from notecase_server.models.openai import OpenAIProvider

from tests.e2e.driving import reason_of, said
from tests.e2e.test_past import fork, rewind, turn
from tests.e2e.test_tools import client_tool, result, start_with
from tests.e2e.test_transfer import export, load
from tests.support.openai_server import Answer, OpenAIServer, chunk, error, event, reply, stream
from tests.support.server import Running, running

SIGNED = {"extra_content": {"google": {"thought_signature": "c2ln"}}}


def signed_call(call_id: str = "own-1") -> Answer:
    call = {"index": 0, "id": call_id, "type": "function", "function": {"name": "weigh", "arguments": "{}"}}
    return stream(
        chunk({"reasoning_content": "I weigh "}),
        chunk({"reasoning_content": "it."}),
        chunk({"tool_calls": [call | SIGNED]}),
        finish="tool_calls",
    )


@pytest.fixture
async def weighed(served: Running, session: str, model: OpenAIServer) -> str:
    """A session with a call whose data the provider gets back, and a reply."""
    await called(served, session, model)
    return session


async def called(served: Running, session: str, model: OpenAIServer, *answers: Answer) -> v1.Run:
    model.script(signed_call(), *(answers or [reply("Light.")]))
    started = await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, client_tool("weigh"))))
    (call,) = started.run.pending_calls
    command = v1.SendCommandRequest(session=session, command=result(call.call_id, "12 g"))
    await served.runs.SendCommand(command)
    return await served.runs.WaitRun(v1.WaitRunRequest(name=started.run.name, after_sequence=1000))


def sent_back(request: dict[str, Any]) -> list[tuple[str, str | None, Any]]:
    """Id, reasoning and data of each call in a request."""
    return [
        (call["id"], message.get("reasoning_content"), call.get("extra_content"))
        for message in request["messages"]
        for call in message.get("tool_calls", ())
    ]


OWN = ("own-1", "I weigh it.", SIGNED["extra_content"])
OWN_LATER = ("own-1", None, SIGNED["extra_content"])
"""In a later turn, where its profile does not ask for the reasoning."""


async def test_the_provider_gets_it_back_within_the_turn_and_later(
    served: Running, weighed: str, model: OpenAIServer
) -> None:
    model.script(reply("Still."))
    await turn(served, weighed, "And now?")
    assert [[], [OWN], [OWN_LATER]] == [sent_back(request) for request in model.requests]


async def test_it_is_shown_opaque_with_its_part(served: Running, weighed: str) -> None:
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=weighed))
    reasoning, call = listed.messages[1].parts
    assert "I weigh it." == reasoning.reasoning.text
    assert "reasoning_content" == reasoning.reasoning.provider_data.text_member
    data = call.tool_call.provider_data
    assert ("stub-1", "own-1") == (data.model, data.call_id)
    assert b'{"extra_content":{"google":{"thought_signature":"c2ln"}}}' == data.members
    assert "127.0.0.1" not in str(data)  # where the provider is, is the operator's business


async def test_it_goes_with_a_fork_and_stays_behind_a_rewind(
    served: Running, weighed: str, model: OpenAIServer
) -> None:
    other = await fork(served, weighed)
    model.script(reply("Forked."), reply("Rewound."))
    await turn(served, other.name, "And now?")
    head = (await served.sessions.GetSession(v1.GetSessionRequest(name=weighed))).last_sequence
    await turn_and_back(served, weighed, head, model)
    assert [OWN_LATER] == sent_back(model.requests[2])
    assert [OWN_LATER] == sent_back(model.requests[-1])


async def turn_and_back(served: Running, session: str, head: int, model: OpenAIServer) -> None:
    await turn(served, session, "No.")
    await rewind(served, session, head)
    model.script(reply("Again."))
    await turn(served, session, "Again.")


async def test_it_goes_with_an_export(served: Running, weighed: str, model: OpenAIServer, tmp_path: Any) -> None:
    file = await export(served, weighed)
    providers = {"openai": OpenAIProvider("other-key", model.url, "stub-1")}
    async with running(f"sqlite:{tmp_path / 'other.db'}", providers) as elsewhere:
        agent = v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent()))
        await elsewhere.agents.CreateAgent(agent)
        there = await load(elsewhere, file, session_id="moved")
        assert file == await export(elsewhere, there.name)
        model.script(reply("There."))
        await turn(elsewhere, there.name, "And now?")
    assert [OWN_LATER] == sent_back(model.requests[-1])


async def test_another_model_is_sent_none_of_it(served: Running, weighed: str, model: OpenAIServer) -> None:
    other = v1.CreateAgentRequest(agent_id="other", agent=v1.Agent(llm=v1.LlmAgent(model="stub-2")))
    agent = (await served.agents.CreateAgent(other)).name
    model.script(reply("Hm."))
    await turn(served, weighed, "And now?", agent=agent)
    ((call_id, reasoning, extra),) = sent_back(model.requests[-1])
    assert (9, None, None) == (len(call_id), reasoning, extra)


async def test_another_endpoint_is_sent_none_of_it(served: Running, weighed: str) -> None:
    file = await export(served, weighed)
    async with OpenAIServer(lambda body: reply("There.")) as model:
        async with running("memory:", {"openai": OpenAIProvider("test-key", model.url, "stub-1")}) as elsewhere:
            await elsewhere.agents.CreateAgent(
                v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent()))
            )
            there = await load(elsewhere, file, session_id="moved")
            await turn(elsewhere, there.name, "And now?")
        ((call_id, reasoning, extra),) = sent_back(model.requests[-1])
    assert (9, None, None) == (len(call_id), reasoning, extra)


REFUSED_WITHIN = stream(event({"error": {"message": "reasoning_content: Extra inputs are not permitted", "code": 400}}))


@pytest.mark.parametrize(
    "refused",
    [
        error(400, "invalid signature"),
        error(415, "no reasoning"),
        error(500, "Unsupported field reasoning_content"),
        error(500, "can only concatenate str to str"),
        error(502, "upstream: messages.1.extra_content is not supported"),
        REFUSED_WITHIN,
    ],
    ids=["400", "415", "500", "500, crashed", "502", "within the reply"],
)
async def test_what_is_refused_is_left_out_once(
    served: Running, session: str, model: OpenAIServer, refused: Answer
) -> None:
    """An account or a model changed: the request is sent once more, without."""
    run = await called(served, session, model, refused, reply("Light."))
    assert v1.Run.STATE_SUCCEEDED == run.state
    again, without = (sent_back(request) for request in model.requests[1:])
    assert [OWN] == again
    assert [(9, None, None)] == [(len(call_id), reasoning, extra) for call_id, reasoning, extra in without]


async def test_a_failure_that_passes_is_repeated_with_it(served: Running, session: str, model: OpenAIServer) -> None:
    """As is one that did not pass without it, whatever was wrong with that request."""
    later, bare, unsigned = error(500, "Please try again later."), error(500), error(400, "no signature")
    run = await called(served, session, model, later, bare, unsigned, reply("Light."))
    assert v1.Run.STATE_SUCCEEDED == run.state
    assert [True, True, False, True] == [[OWN] == sent_back(request) for request in model.requests[1:]]


async def test_a_request_that_is_refused_without_it_too_is_refused(
    served: Running, session: str, model: OpenAIServer
) -> None:
    run = await called(served, session, model, error(400, "no signature"), error(400, "no such thing"))
    assert v1.Run.STATE_FAILED == run.state
    assert run.error.message.endswith("no such thing")
    assert 3 == len(model.requests)


@pytest.mark.parametrize("status", [401, 404, 413])
async def test_another_refusal_is_none_of_the_data(
    served: Running, session: str, model: OpenAIServer, status: int
) -> None:
    run = await called(served, session, model, error(status))
    assert v1.Run.STATE_FAILED == run.state
    assert 2 == len(model.requests)


async def test_reasoning_that_is_not_shown_is_kept_as_an_empty_part(
    served: Running, session: str, model: OpenAIServer
) -> None:
    secret = [{"type": "reasoning.encrypted", "data": base64.b64encode(b"secret").decode(), "index": 0}]
    model.script(stream(chunk({"reasoning_details": secret}), chunk({"content": "Hi"})))
    done = await turn(served, session, "Hello")
    text, thought = done.run.reply.parts
    assert ("Hi", "") == (text.text, thought.reasoning.text)
    assert b"reasoning.encrypted" in thought.reasoning.provider_data.members


async def test_more_than_a_signature_can_be_is_not_kept(served: Running, session: str, model: OpenAIServer) -> None:
    large = [{"type": "reasoning.encrypted", "data": "a" * (128 << 10), "index": 0}]
    model.script(stream(chunk({"reasoning_details": large}), chunk({"content": "Hi"})))
    done = await turn(served, session, "Hello")
    assert [v1.Part(text="Hi")] == list(done.run.reply.parts)


@pytest.mark.parametrize(
    "part",
    [
        v1.Part(reasoning=v1.Reasoning(text="hm", provider_data=v1.ProviderData(members=b"{}"))),
        v1.Part(tool_call=v1.ToolCall(tool="a", provider_data=v1.ProviderData(call_id="own-1"))),
    ],
    ids=["reasoning", "tool_call"],
)
async def test_no_caller_sets_it(served: Running, session: str, part: v1.Part) -> None:
    said_so = v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[part])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[said("a"), said_so]))
    assert "INVALID_FIELD" == reason_of(refused.value)

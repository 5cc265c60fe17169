"""An agent's fallbacks answer while its model is unavailable, and the model that answers is named and counted."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from notecase import v1
from notecase_server.models.openai import OpenAIProvider

from tests.e2e.driving import detail_of, log_of, reason_of, said
from tests.e2e.test_past import turn
from tests.e2e.test_provider_data import OWN_LATER, called, sent_back
from tests.support.openai_server import Answer, OpenAIServer, chunk, error, reply, stream
from tests.support.server import Running, running

AWAY = error(503, "later", headers={"x-should-retry": "false"})
"""A refusal after which the same provider is not asked again."""

ABORTED = stream(chunk({"content": "Half"}), finish="abort", usage={"prompt_tokens": 50, "completion_tokens": 4})


class Setting(NamedTuple):
    served: Running
    first: OpenAIServer
    second: OpenAIServer

    async def session(self, *fallbacks: v1.Fallback, **llm: int) -> str:
        """An empty session of an agent of the first provider's model with these fallbacks."""
        agent = await self.agent(*fallbacks, **llm)
        made = v1.CreateSessionRequest(session=v1.Session(agent=agent.name, user="users/ada"))
        return (await self.served.sessions.CreateSession(made)).name

    async def agent(self, *fallbacks: v1.Fallback, **llm: int) -> v1.Agent:
        body = v1.Agent(llm=v1.LlmAgent(fallbacks=fallbacks, **llm))  # type: ignore[arg-type]
        return await self.served.agents.CreateAgent(v1.CreateAgentRequest(agent=body))

    async def run(self, session: str) -> v1.Run:
        start = v1.StartRun(session=session, messages=[said("Go")])
        return (await self.served.runs.Invoke(v1.InvokeRequest(start=start))).run


SECOND = v1.Fallback(provider="second", model="other-1")


@pytest.fixture
async def setting(store_url: str) -> AsyncIterator[Setting]:
    async with OpenAIServer() as first, OpenAIServer() as second:
        providers = {
            "first": OpenAIProvider("key-1", first.url, "stub-1"),
            "second": OpenAIProvider("key-2", second.url, "stub-2"),
        }
        async with running(store_url, providers) as served:
            yield Setting(served, first, second)


async def test_the_next_model_answers_where_one_is_away_and_is_named(setting: Setting) -> None:
    session = await setting.session(SECOND)
    setting.first.script(AWAY)
    setting.second.script(reply("Here."))
    run = await setting.run(session)
    assert ("Here.", "second") == (run.reply.parts[0].text, run.reply.usage.provider)
    assert (1, "second") == (run.usage.model_calls, run.usage.provider)  # nothing came of the first
    assert ["other-1"] == [request["model"] for request in setting.second.requests]
    assert setting.first.requests[0]["messages"] == setting.second.requests[0]["messages"]

    setting.first.script(reply("Back."))
    run = await setting.run(session)
    assert ("Back.", "first") == (run.reply.parts[0].text, run.usage.provider)


async def test_fallbacks_are_called_in_order_and_the_last_failure_is_reported(setting: Setting) -> None:
    session = await setting.session(SECOND, v1.Fallback(provider="second"), v1.Fallback(model="small-1"))
    setting.first.script(AWAY, error(503, "the last", headers={"x-should-retry": "false"}))
    setting.second.script(AWAY, AWAY)
    run = await setting.run(session)
    assert v1.ERROR_REASON_MODEL_UNAVAILABLE == run.error.reason
    assert "the last" in run.error.message
    assert ["other-1", "stub-2"] == [request["model"] for request in setting.second.requests]
    assert ["stub-1", "small-1"] == [request["model"] for request in setting.first.requests]


async def test_what_had_come_of_a_reply_is_discarded_and_each_call_is_counted_as_its_providers(
    setting: Setting,
) -> None:
    session = await setting.session(SECOND)
    seen = [asyncio.Event() for _ in range(3)]
    setting.first.script(*(ABORTED.held(event, after=2) for event in seen))
    setting.second.script(reply("Whole."))
    call = setting.served.runs.Run()
    await call.write(v1.RunRequest(start=v1.StartRun(session=session, messages=[said("Go")], run_id="r")))
    events: list[v1.Event] = []
    begun: list[str] = []
    async for frame in call:
        events += frame.batch.events
        for event in frame.batch.events:
            if event.HasField("block_delta") and event.block_delta.message not in begun:
                begun.append(event.block_delta.message)
                if len(begun) <= len(seen):
                    seen[len(begun) - 1].set()
    gone = [event.message_discarded.message for event in events if event.HasField("message_discarded")]
    kept = [event.message_added for event in events if event.message_added.role == v1.Message.ROLE_ASSISTANT]
    assert begun[:3] == gone
    assert ["Whole."] == [message.parts[0].text for message in kept]
    used = [event.usage for event in await log_of(setting.served, session) if event.HasField("usage")]
    assert [("first", 50)] * 3 + [("second", 11)] == [(usage.provider, usage.input_tokens) for usage in used]
    run = await setting.served.runs.GetRun(v1.GetRunRequest(name=f"{session}/runs/r"))
    assert (4, "") == (run.usage.model_calls, run.usage.provider)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(error(401, "who is that"), v1.ERROR_REASON_MODEL_ERROR), (error(404, "no"), v1.ERROR_REASON_MODEL_ERROR)],
)
async def test_a_permanent_failure_is_reported_and_no_other_model_is_called(
    setting: Setting, answer: Answer, reason: v1.ErrorReason.ValueType
) -> None:
    session = await setting.session(SECOND)
    setting.first.script(answer)
    assert reason == (await setting.run(session)).error.reason
    assert [] == setting.second.requests


async def test_a_run_without_calls_left_asks_no_other_model(setting: Setting) -> None:
    """It fails with what happened, and not with its limit."""
    session = await setting.session(SECOND, max_model_calls=3)
    setting.first.script(ABORTED, ABORTED, ABORTED)
    run = await setting.run(session)
    assert (v1.ERROR_REASON_MODEL_UNAVAILABLE, 3) == (run.error.reason, run.usage.model_calls)
    assert [] == setting.second.requests


async def test_a_run_with_calls_left_only_by_those_of_which_nothing_came_asks_the_next(setting: Setting) -> None:
    session = await setting.session(SECOND, max_model_calls=1)
    setting.first.script(AWAY)
    setting.second.script(reply("Here."))
    assert "Here." == (await setting.run(session)).reply.parts[0].text


async def test_what_a_provider_gets_back_goes_to_no_fallback(setting: Setting) -> None:
    """And to the provider itself again, once it is back."""
    session = await setting.session(SECOND)
    await called(setting.served, session, setting.first)
    setting.first.script(AWAY, reply("Back."))
    setting.second.script(reply("Here."))
    for text in ("And now?", "And then?"):
        await turn(setting.served, session, text)
    ((call_id, *data),) = sent_back(setting.second.requests[0])
    assert call_id != "own-1"
    assert [None, None] == data
    assert [OWN_LATER] == sent_back(setting.first.requests[-1])
    assert "c2ln" not in str(setting.second.requests)


async def test_fallbacks_that_cannot_be_are_refused_with_all_that_is_wrong(setting: Setting) -> None:
    wrong = [v1.Fallback(provider="third"), SECOND, SECOND, v1.Fallback(), v1.Fallback(provider="first")]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await setting.agent(*wrong)
    assert [
        ("agent.llm.fallbacks[0].provider", "there is no provider 'third'; this server has first, second"),
        ("agent.llm.fallbacks[2]", "appears twice, or is the agent's own"),
        ("agent.llm.fallbacks[3]", "appears twice, or is the agent's own"),
        ("agent.llm.fallbacks[4]", "appears twice, or is the agent's own"),
    ] == violations(refused.value)
    many = [v1.Fallback(model=f"m-{number}") for number in range(9)]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await setting.agent(*many)
    assert [("agent.llm.fallbacks", "has more than 8")] == violations(refused.value)
    agent = await setting.agent(*many[:8])
    agent.llm.fallbacks.append(many[8])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        mask = FieldMask(paths=["llm.fallbacks"])
        await setting.served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=agent, update_mask=mask))
    assert "INVALID_FIELD" == reason_of(refused.value)


def violations(refused: grpc.aio.AioRpcError) -> list[tuple[str, str]]:
    found = detail_of(refused, error_details_pb2.BadRequest).field_violations
    return [(one.field, one.description) for one in found]


async def test_a_fallback_whose_provider_the_server_has_no_more_is_passed_over(tmp_path: Path) -> None:
    async with OpenAIServer() as first, OpenAIServer() as third:
        one, other = OpenAIProvider("key-1", first.url, "stub-1"), OpenAIProvider("key-3", third.url, "stub-3")
        store = f"sqlite:{tmp_path / 'notecase.db'}"
        async with running(store, {"first": one, "second": other, "third": other}) as served:
            session = await Setting(served, first, third).session(SECOND, v1.Fallback(provider="third"))
        one, other = OpenAIProvider("key-1", first.url, "stub-1"), OpenAIProvider("key-3", third.url, "stub-3")
        async with running(store, {"first": one, "third": other}) as served:
            first.script(AWAY)
            third.script(reply("Here."))
            run = await Setting(served, first, third).run(session)
    assert ("Here.", "third") == (run.reply.parts[0].text, run.usage.provider)


async def test_a_summary_is_made_by_a_fallback_too(setting: Setting) -> None:
    agent = v1.Agent(llm=v1.LlmAgent(fallbacks=[SECOND]))
    agent.llm.context.summary.CopyFrom(v1.Context.Summary(keep_recent=1, batch=1, model="small-1"))
    made = await setting.served.agents.CreateAgent(v1.CreateAgentRequest(agent=agent))
    session = await setting.served.sessions.CreateSession(
        v1.CreateSessionRequest(session=v1.Session(agent=made.name, user="users/ada"))
    )
    setting.first.script(reply("One."))
    await setting.run(session.name)
    setting.first.script(AWAY, reply("Two."))
    setting.second.script(reply("In short."))
    assert "Two." == (await setting.run(session.name)).reply.parts[0].text
    assert ["stub-1", "small-1", "stub-1"] == [request["model"] for request in setting.first.requests]
    assert ["other-1"] == [request["model"] for request in setting.second.requests]


async def test_a_compaction_is_made_by_a_fallback_too(setting: Setting) -> None:
    """After the retries of the agent's own model, whose usage is counted; when no model answers, nothing is kept."""
    session = await setting.session(SECOND)
    for text in ("One.", "Two."):
        setting.first.script(reply(text))
        await setting.run(session)
    request = v1.CompactSessionRequest(name=session, keep_recent=1)
    setting.first.script(AWAY)
    setting.second.script(AWAY)
    before = await log_of(setting.served, session)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await setting.served.sessions.CompactSession(request)
    assert "MODEL_UNAVAILABLE" == reason_of(refused.value)
    assert before == await log_of(setting.served, session)
    setting.first.script(ABORTED, AWAY)
    setting.second.script(reply("In short."))
    assert (await setting.served.sessions.CompactSession(request)).summary_sequence
    summarized, *used = (await log_of(setting.served, session))[len(before) :]
    assert "In short." == summarized.summarized.text
    assert [("first", 50), ("second", 11)] == [(each.usage.provider, each.usage.input_tokens) for each in used]
    assert ["other-1"] * 2 == [asked["model"] for asked in setting.second.requests]

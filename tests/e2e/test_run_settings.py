"""What a start sets for its run alone: it holds for that run in whatever way it begins or goes on, and its values are
in no log."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from notecase import v1

from tests.e2e.driving import fields_of, log_of, reason_of, said
from tests.e2e.test_crash import start as spawn
from tests.e2e.test_past import turn
from tests.e2e.test_transfer import export
from tests.support.openai_server import Json, OpenAIServer, reply
from tests.support.server import Running

SETTINGS = v1.RunSettings(
    model="large-1", instruction="Speak of {{ topic }}, secretly.", generation=v1.Generation(temperature=0.5)
)

OWN = ("stub-1", "Answer briefly.", None)
SET = ("large-1", "Speak of owls, secretly.", 0.5)

TOPIC = {"topic": v1.Value(string_value="owls")}


def asked(request: Json) -> tuple[str, str, Any]:
    """Model, instruction and temperature of a request."""
    return request["model"], request["messages"][0]["content"], request.get("temperature")


async def test_they_hold_for_this_run_and_in_its_log_are_only_their_names(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("One."), reply("Two."))
    await turn(served, session, "Go", settings=SETTINGS, state=TOPIC, run_id="one")
    await turn(served, session, "Go", run_id="two")
    assert [SET, OWN] == list(map(asked, model.requests))
    log = await log_of(served, session)
    started = [event.run_started for event in log if event.HasField("run_started")]
    assert [["model", "instruction", "generation"], []] == [list(one.settings.paths) for one in started]
    assert ["agents/clerk", "agents/clerk"] == [one.agent for one in started]
    assert "secretly" not in str(log)
    assert b"secretly" not in await export(served, session)
    agent = await served.agents.GetAgent(v1.GetAgentRequest(name="agents/clerk"))
    assert (1, "Answer briefly.") == (agent.revision, agent.llm.instruction)


async def test_each_is_set_by_itself_and_an_empty_one_is_set_too(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("One."), reply("Two."), reply("Three."))
    for settings in (v1.RunSettings(model="large-1"), v1.RunSettings(instruction=""), v1.RunSettings()):
        await turn(served, session, "Go", settings=settings)
    one, two, three = model.requests
    assert ("large-1", OWN[1], None) == asked(one)
    assert ("stub-1", "user") == (two["model"], two["messages"][0]["role"])
    assert OWN == asked(three)


@pytest.mark.parametrize("on_busy", [v1.StartRun.ON_BUSY_QUEUE, v1.StartRun.ON_BUSY_INTERRUPT])
async def test_a_run_that_waits_for_another_or_takes_its_place_has_them(
    served: Running, session: str, model: OpenAIServer, on_busy: v1.StartRun.OnBusy.ValueType
) -> None:
    go_on = asyncio.Event()
    model.script(reply("One.").held(go_on), reply("Two."))
    create = v1.CreateRunRequest(start=v1.StartRun(session=session, messages=[said("Go")]))
    first = await served.runs.CreateRun(create)
    await model.request(0)
    start = v1.StartRun(session=session, messages=[said("Go")], settings=SETTINGS, state=TOPIC, on_busy=on_busy)
    second = await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    go_on.set()
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=second.name))
    assert "Two." == ended.reply.parts[0].text
    assert [OWN, SET] == list(map(asked, model.requests))
    log = await log_of(served, session)
    begun = next(e.run_started for e in log if e.HasField("run_started") and e.run == second.name)
    assert ["model", "instruction", "generation"] == list(begun.settings.paths)
    assert "secretly" not in str(log)
    assert "large-1" not in str([event for event in log if not event.HasField("usage")])
    assert first.name != second.name


async def test_a_run_of_a_process_that_was_killed_goes_on_with_them(tmp_path: Path, model: OpenAIServer) -> None:
    model.script(reply("One.").held(asyncio.Event()), reply("Two."))
    server = await spawn(tmp_path, model)
    async with grpc.aio.insecure_channel(server.address) as channel:
        agent = v1.Agent(llm=v1.LlmAgent(model="stub-1", instruction="Answer briefly."))
        await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        start = v1.StartRun(agent="agents/clerk", messages=[said("Go")], settings=SETTINGS, state=TOPIC)
        run = await v1.RunServiceStub(channel).CreateRun(v1.CreateRunRequest(start=start))
        await model.request(0)
        await server.kill()
    server = await spawn(tmp_path, model)
    async with grpc.aio.insecure_channel(server.address) as channel:
        ended = await v1.RunServiceStub(channel).WaitRun(v1.WaitRunRequest(name=run.name))
        assert ("Two.", 2) == (ended.reply.parts[0].text, ended.attempt)
    assert 0 == await server.stop()
    assert [SET, SET] == list(map(asked, model.requests))


async def test_a_repeat_with_other_settings_is_another_start(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("One."))
    run = (await turn(served, session, "Go", settings=SETTINGS, state=TOPIC, run_id="one")).run
    again = (await turn(served, session, "Go", settings=SETTINGS, state=TOPIC, run_id="one")).run
    assert run.last_sequence == again.last_sequence
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await turn(served, session, "Go", settings=v1.RunSettings(model="small-1"), state=TOPIC, run_id="one")
    assert "REQUEST_ID_REUSED" == reason_of(refused.value)
    assert 1 == len(model.requests)


@pytest.mark.parametrize(
    ("settings", "reason", "field"),
    [
        (v1.RunSettings(instruction="{{ topic"), "TEMPLATE_ERROR", "instruction"),
        (v1.RunSettings(instruction="a" * (1 << 19) + "{{ topic"), "TEMPLATE_ERROR", "instruction"),
        (v1.RunSettings(model="m" * 5000), "INVALID_FIELD", "model"),
        (v1.RunSettings(generation=v1.Generation(temperature=-1)), "INVALID_FIELD", "generation.temperature"),
        (v1.RunSettings(generation=v1.Generation(extra="[]")), "INVALID_FIELD", "generation.extra"),
    ],
)
async def test_what_cannot_be_is_refused_by_its_field(
    served: Running, session: str, settings: v1.RunSettings, reason: str, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await turn(served, session, "Go", settings=settings)
    assert (reason, {f"start.settings.{field}"}) == (reason_of(refused.value), fields_of(refused.value))

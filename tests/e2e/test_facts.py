"""Failures during a run that do not end it are events in its log."""

from collections.abc import Sequence

import pytest
from notecase import v1
from notecase_server.models.openai import OpenAIProvider
from notecase_server.tools.mcp_settings import McpServerSettings
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import log_of, said
from tests.support.openai_server import OpenAIServer, error, reply
from tests.support.server import Running, running

AWAY = McpServerSettings(command="/nonexistent/mcp")


async def ask(served: Running, llm: v1.LlmAgent, *questions: str) -> Sequence[v1.Run]:
    """Asks the questions one after the other in `sessions/case`, of an agent that is made for it."""
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=llm)))
    session = v1.Session(agent="agents/clerk")
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
    runs = []
    for question in questions:
        start = v1.StartRun(session="sessions/case", messages=[said(question)])
        runs.append((await served.runs.Invoke(v1.InvokeRequest(start=start))).run)
    return runs


@pytest.mark.parametrize("required", [False, True])
async def test_a_tool_server_that_is_away_costs_its_tools_and_not_the_run(
    store_url: str, model: OpenAIServer, required: bool
) -> None:
    """Unless the agent requires them. The other tools are shown, and an export keeps the fact."""
    model.script(reply("Good evening."))
    tools = [
        v1.Tool(name="away", mcp=v1.McpTool(server="away", required=required)),
        v1.Tool(name="look", client=v1.ClientTool()),
    ]
    toolbox = make_toolbox((), {"away": AWAY})
    async with running(store_url, {"openai": OpenAIProvider("key", model.url, "m")}, toolbox=toolbox) as served:
        (run,) = await ask(served, v1.LlmAgent(tools=tools), "Hello")
        log = await log_of(served, "sessions/case")
        told = [event.tools_unavailable for event in log if event.HasField("tools_unavailable")]
        if required:
            assert (run.state, run.error.reason) == (v1.Run.STATE_FAILED, v1.ERROR_REASON_TOOL_ERROR)
            assert told == []
            return
        assert run.state == v1.Run.STATE_SUCCEEDED
        assert [(one.server, one.error.reason) for one in told] == [("away", v1.ERROR_REASON_TOOL_ERROR)]
        assert [tool["function"]["name"] for tool in model.requests[0]["tools"]] == ["look"]
        exported = served.sessions.ExportSession(v1.ExportSessionRequest(name="sessions/case"))
        chunks = [v1.ImportSessionRequest(chunk=piece.chunk) async for piece in exported]
        header = v1.ImportSessionRequest(header=v1.ImportHeader(session_id="copy"))
        await served.sessions.ImportSession(iter([header, *chunks]))
        copy = await log_of(served, "sessions/copy")
        assert [event.WhichOneof("payload") for event in copy] == [event.WhichOneof("payload") for event in log]


async def test_a_summary_that_fails_is_a_fact_and_is_tried_again_in_the_next_run(
    store_url: str, model: OpenAIServer
) -> None:
    refusal = error(400, "the summary model is not there")
    model.script(reply("One."), refusal, reply("Two."), refusal, reply("Three."))
    context = v1.Context(summary=v1.Context.Summary(keep_recent=1, batch=1))
    async with running(store_url, {"openai": OpenAIProvider("key", model.url, "m")}) as served:
        runs = await ask(served, v1.LlmAgent(context=context), "1?", "2?", "3?")
        log = await log_of(served, "sessions/case")
    assert [run.reply.parts[0].text for run in runs] == ["One.", "Two.", "Three."]
    failed = [event for event in log if event.HasField("summary_failed")]
    assert [event.run for event in failed] == [run.name for run in runs[1:]]
    assert {event.summary_failed.error.reason for event in failed} == {v1.ERROR_REASON_MODEL_ERROR}

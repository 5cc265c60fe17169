"""An update of an agent is refused for what it changes or breaks, not for what was wrong with the stored agent."""

from pathlib import Path

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from notecase import v1
from notecase_server.rpc import validate
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.tools.mcp_settings import McpServerSettings
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import fields_of
from tests.support.server import Running, running

NAMES = validate.MAX_MCP_NAMES // 10 + 1
TOOLS = [v1.Tool(name=f"p{n}", mcp=v1.McpTool(server="gone", tools=map(str, range(NAMES)))) for n in range(10)]


async def update(served: Running, agent: v1.Agent, *paths: str) -> v1.Agent:
    agent.name = "agents/old"
    return await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=agent, update_mask=FieldMask(paths=paths)))


async def test_only_what_an_update_changes_or_breaks_is_refused(tmp_path: Path) -> None:
    store = await open_store(f"sqlite:{tmp_path / 'notecase.db'}", now)
    llm = v1.LlmAgent(tools=TOOLS, context=v1.Context(max_messages=3))
    await store.create_agent("default", "old", v1.Agent(llm=llm))
    summary = v1.LlmAgent(context=v1.Context(summary=v1.Context.Summary()))
    toolbox = make_toolbox([], {"here": McpServerSettings(command="true")})
    async with running(store, toolbox=toolbox) as served:
        assert "New" == (await update(served, v1.Agent(display_name="New"), "display_name")).display_name
        made = await update(served, v1.Agent(llm=v1.LlmAgent(instruction="Deduce.")), "llm.instruction")
        assert (3, TOOLS) == (made.revision, list(made.llm.tools))
        for agent, path, expected in (
            (v1.Agent(llm=v1.LlmAgent(tools=TOOLS)), "llm.tools", "agent.llm.tools"),
            (v1.Agent(llm=llm), "llm", "agent.llm.tools"),
            (v1.Agent(output_key="user"), "output_key", "agent.output_key"),
            (v1.Agent(llm=summary), "llm.context.summary", "max_messages"),
            (v1.Agent(description="x" * (1 << 20)), "description", "agent"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await update(served, agent, path)
            assert any(field.endswith(expected) for field in fields_of(refused.value)), fields_of(refused.value)
        assert 3 == (await served.agents.GetAgent(v1.GetAgentRequest(name="agents/old"))).revision

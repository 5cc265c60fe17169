"""A stop ends the process, whatever the tools of its runs do."""

from pathlib import Path

import grpc
import pytest
from notecase import v1

from tests.e2e.driving import said
from tests.support.crashing import GATE, Crashing, Gate
from tests.support.openai_server import OpenAIServer, tool_calls

GRACE = 0.2


async def launched(directory: Path, model: OpenAIServer, gate: Gate) -> Crashing:
    env = {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "test-key", GATE: str(gate.port)}
    return await Crashing.launch(directory, "--grace", str(GRACE), env=env)


@pytest.mark.parametrize("tool", ["cling", "hang"])
async def test_a_tool_that_does_not_stop_does_not_keep_the_process(
    tmp_path: Path, model: OpenAIServer, tool: str
) -> None:
    """The run stays as it is, for the next process; the log names what was left; the exit code is that of an orderly
    stop."""
    model.script(tool_calls((tool, "{}")))
    async with Gate() as gate, await launched(tmp_path, model, gate) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            declared = v1.Tool(name=tool, server=v1.ServerTool(function=tool))
            agent = v1.Agent(llm=v1.LlmAgent(model="m", tools=[declared]))
            await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=agent))
            start = v1.StartRun(new_session=v1.Session(name="sessions/s", agent="agents/a"), messages=[said("Go")])
            await v1.RunServiceStub(channel).CreateRun(v1.CreateRunRequest(start=start))
            await gate.arrival()
        assert 0 == await server.stop()
    log = (tmp_path / "log").read_text()
    assert "server_stopped" in log
    assert "server_left" in log

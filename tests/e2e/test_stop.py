"""A stop ends the process, whatever the tools of its runs do."""

import signal
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import v1
from notecase_server.models.offline import OfflineProvider

from tests.e2e.driving import said
from tests.support.crashing import GATE, Crashing, Gate
from tests.support.openai_server import OpenAIServer, reply, tool_calls
from tests.support.polling import until
from tests.support.server import running

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


async def test_a_tool_that_ignores_its_time_out_delays_neither_its_run_nor_the_process(
    tmp_path: Path, model: OpenAIServer
) -> None:
    """The call fails, the run comes to its end, and the log names the tool that goes on."""
    model.script(tool_calls(("cling", "{}")), reply("Without it."))
    async with Gate() as gate, await launched(tmp_path, model, gate) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            clings = v1.Tool(name="cling", server=v1.ServerTool(function="cling"), timeout=Duration(nanos=200_000_000))
            agent = v1.Agent(llm=v1.LlmAgent(model="m", tools=[clings]))
            await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=agent))
            start = v1.StartRun(new_session=v1.Session(name="sessions/s", agent="agents/a"), messages=[said("Go")])
            run = (await v1.RunServiceStub(channel).Invoke(v1.InvokeRequest(start=start))).run
            assert (v1.Run.STATE_SUCCEEDED, "Without it.") == (run.state, run.reply.parts[0].text)
            told = model.requests[1]["messages"][-1]
            assert "The tool took longer than 0.2 seconds." in told["content"]
        assert 0 == await server.stop()
    log = (tmp_path / "log").read_text()
    assert 1 == log.count("task_stuck")
    assert "server_left" in log


async def test_a_task_that_a_tool_makes_does_not_end_the_process(tmp_path: Path, model: OpenAIServer) -> None:
    """Nor does a callback. The tool that waits for the task gets its error."""
    calls = [("stray", '{"awaited": true}'), ("stray", '{"awaited": false}')]
    model.script(tool_calls(*calls), reply("All there."))
    async with Gate() as gate, await launched(tmp_path, model, gate) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            declared = v1.Tool(name="stray", server=v1.ServerTool(function="stray"))
            agent = v1.Agent(llm=v1.LlmAgent(model="m", tools=[declared]))
            await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=agent))
            start = v1.StartRun(new_session=v1.Session(name="sessions/s", agent="agents/a"), messages=[said("Go")])
            run = (await v1.RunServiceStub(channel).Invoke(v1.InvokeRequest(start=start))).run
            assert (v1.Run.STATE_SUCCEEDED, "All there.") == (run.state, run.reply.parts[0].text)
        assert 0 == await server.stop()
    failed, stayed = (message["content"] for message in model.requests[1]["messages"][-2:])
    assert "failed" in failed
    assert "stayed" == stayed
    assert "exit_ignored" in (tmp_path / "log").read_text()


class Jammed(OfflineProvider):
    """A provider that cannot be closed."""

    async def close(self) -> None:
        raise OSError("jammed")


async def test_what_fails_in_a_stop_keeps_nothing_else_open(tmp_path: Path) -> None:
    """The failure is raised, and the store is closed: another server may have it."""
    store = f"sqlite:{tmp_path / 'store.db'}"
    with pytest.raises(OSError, match="jammed"):
        async with running(store, {"offline": Jammed()}) as served:
            await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s"))
    async with running(store) as served:
        assert "sessions/s" == (await served.sessions.GetSession(v1.GetSessionRequest(name="sessions/s"))).name


async def test_a_second_signal_ends_the_time_that_runs_have(tmp_path: Path, model: OpenAIServer) -> None:
    """Somebody presses Ctrl-C twice. The run is left as by the first signal, for the next process."""
    model.script(tool_calls(("hang", "{}")))
    env = {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "test-key"}
    async with Gate() as gate:
        server = await Crashing.launch(tmp_path, "--grace", "3600", env={**env, GATE: str(gate.port)})
        async with server, grpc.aio.insecure_channel(server.address) as channel:
            declared = v1.Tool(name="hang", server=v1.ServerTool(function="hang"))
            agent = v1.Agent(llm=v1.LlmAgent(model="m", tools=[declared]))
            await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=agent))
            start = v1.StartRun(new_session=v1.Session(name="sessions/s", agent="agents/a"), messages=[said("Go")])
            await v1.RunServiceStub(channel).CreateRun(v1.CreateRunRequest(start=start))
            await gate.arrival()
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: "server_draining" in (tmp_path / "log").read_text())
            assert 0 == await server.stop()
    assert 2 == (tmp_path / "log").read_text().count("server_draining")

"""A run whose process dies again and again: it is given up when it is what kills it, and only then."""

import os
from pathlib import Path

import grpc
import pytest
from notecase import Client, v1
from notecase_server.serve import now
from notecase_server.store.contract import SessionKey
from notecase_server.store.sqlite.store import SqliteStore

from tests.e2e.driving import said
from tests.support.crashing import Crashing
from tests.support.openai_server import OpenAIServer, reply

SUCCEEDED, FAILED = v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED


async def begin(directory: Path, env: dict[str, str]) -> None:
    """A run whose process dies before the commit of its reply."""
    async with await Crashing.launch(directory, "--before", "2", env=env) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            agent = v1.Agent(llm=v1.LlmAgent(model="m"))
            await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=agent))
            new = v1.Session(name="sessions/s", agent="agents/a")
            start = v1.StartRun(new_session=new, run_id="r", messages=[said("Go")])
            try:
                await v1.RunServiceStub(channel).CreateRun(v1.CreateRunRequest(start=start))
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE
        await server.death()


async def die(directory: Path, env: dict[str, str], *arguments: str) -> None:
    """The run is taken over, and its process dies at the same point: after the takeover, before the reply."""
    async with await Crashing.launch(directory, *(arguments or ("--before", "2")), env=env) as server:
        await server.death()


async def end(directory: Path, env: dict[str, str]) -> v1.Run:
    async with await Crashing.launch(directory, env=env) as server:
        async with Client(server.address) as client:
            run = await client.runs.WaitRun(v1.WaitRunRequest(name="sessions/s/runs/r"))
        assert 0 == await server.stop()
    return run


async def deaths(directory: Path) -> int:
    store = await SqliteStore.open(directory / "notecase.db", now)
    try:
        session = await store.find_session("default", "s")
        assert session is not None
        active = await store.active_run(SessionKey("default", "s", session.uid), "r")
        assert active is not None
        return active.deaths
    finally:
        await store.close()


@pytest.fixture
def env(model: OpenAIServer) -> dict[str, str]:
    model.script(*[reply("Whole.") for _ in range(9)])
    return {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "test-key", "PATH": os.environ["PATH"]}


async def test_three_deaths_at_one_point_end_the_run(tmp_path: Path, env: dict[str, str]) -> None:
    await begin(tmp_path, env)
    for _ in range(2):
        await die(tmp_path, env)
    run = await end(tmp_path, env)
    assert (FAILED, v1.ERROR_REASON_OWNER_LOST) == (run.state, run.error.reason)


async def test_a_run_that_gets_somewhere_after_two_deaths_is_not_suspected(tmp_path: Path, env: dict[str, str]) -> None:
    await begin(tmp_path, env)
    await die(tmp_path, env)
    assert 1 == await deaths(tmp_path)
    run = await end(tmp_path, env)
    assert (SUCCEEDED, 3) == (run.state, run.attempt)


async def test_an_orderly_stop_does_not_count_as_a_death(tmp_path: Path, env: dict[str, str]) -> None:
    """Stopped again and again, the run goes on from its last commit each time."""
    model_held = {**env, "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}  # refused at once, and tried again for a while
    await begin(tmp_path, env)
    for _ in range(3):
        async with await Crashing.launch(tmp_path, "--grace", "0.1", env=model_held) as server:
            assert 0 == await server.stop()
        assert await deaths(tmp_path) <= 1
    assert SUCCEEDED == (await end(tmp_path, env)).state

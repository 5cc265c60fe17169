"""A run that has started, while its server is away."""

import asyncio

import pytest
from notecase import NotecaseError, Retry, v1
from notecase.client import Client
from notecase_server.cli import follow

from tests.client.proxy import Proxy
from tests.support.server import Running


async def clerk(served: Running) -> None:
    agent = v1.Agent(llm=v1.LlmAgent(instruction=""))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "AGAIN_SECONDS", 0.01)


async def test_a_run_is_attached_to_again_after_the_clients_own_tries(
    served: Running, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    await clerk(served)
    called = asyncio.Event()

    async def search() -> str:
        called.set()
        await asyncio.Event().wait()
        return ""

    async with (
        Client(served.address) as direct,
        Proxy(served.address) as proxy,
        Client(proxy.address, retry=Retry(tries=0)) as client,
    ):
        stream = client.run("/call search {}", agent="clerk", tools=[search])
        following = asyncio.create_task(follow.Follower(client, stream, patience=600).follow())
        await called.wait()
        proxy.cut()
        (call,) = (await direct.runs.GetRun(v1.GetRunRequest(name=stream.name))).pending_calls
        await direct.give_result(stream.name, call.call_id, "found")
        assert await following
        assert proxy.opened >= 2
    assert "succeeded: found" in capsys.readouterr().err


async def test_a_run_that_is_given_up_is_named(
    served: Running, impatient: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "AWAY_SECONDS", -1)
    await clerk(served)
    called = asyncio.Event()

    async def search() -> str:
        called.set()
        await asyncio.Event().wait()
        return ""

    async with Client(served.address) as direct:
        await direct.create_session("clerk", session_id="case")
    async with Proxy(served.address) as proxy, Client(proxy.address, retry=Retry(tries=0)) as client:
        stream = client.run("/call search {}", session="case", tools=[search])
        following = asyncio.create_task(follow.Follower(client, stream, patience=600).follow())
        await called.wait()
        proxy.cut()
        with pytest.raises(NotecaseError, match="UNAVAILABLE"):
            await following
    told = f"{stream.name} continues there; `notecase chat --session case` shows it."
    assert told in capsys.readouterr().err

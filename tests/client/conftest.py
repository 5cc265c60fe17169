"""A client of a real server whose model is scripted."""

from collections.abc import AsyncIterator

import pytest
from notecase import Client, Retry, v1
from notecase_server.models.openai import OpenAIProvider

from tests.support.openai_server import OpenAIServer
from tests.support.server import Running, running

QUICK = Retry(tries=20, first_delay=0.01, max_delay=0.2)


@pytest.fixture
async def model() -> AsyncIterator[OpenAIServer]:
    """What the agents speak with."""
    async with OpenAIServer() as server:
        yield server


@pytest.fixture
async def served(model: OpenAIServer) -> AsyncIterator[Running]:
    """A server whose default provider is the scripted model."""
    async with running(providers={"openai": OpenAIProvider("test-key", model.url, "stub-1")}) as server:
        yield server


@pytest.fixture
async def client(served: Running) -> AsyncIterator[Client]:
    """A client with an agent, agents/detective, that reads a note."""
    async with Client(served.address, retry=QUICK) as client:
        llm = v1.LlmAgent(instruction="Case: {{ case }}. Seen: {{ seen }}.")
        await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="detective", agent=v1.Agent(llm=llm)))
        yield client


@pytest.fixture
async def session(client: Client) -> str:
    """The name of an empty session of the detective's."""
    return (await client.create_session("agents/detective")).name

"""A server over each store, with the offline model and a scripted OpenAI-compatible one."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from notecase import v1
from notecase_server.models.contract import Provider
from notecase_server.models.offline import OfflineProvider
from notecase_server.models.openai import OpenAIProvider

from tests.support import pgbouncer, postgres
from tests.support.openai_server import OpenAIServer
from tests.support.server import Running, running

STORES = os.environ.get("NOTECASE_STORES", "memory sqlite").split()
"""The stores that these tests run on. NOTECASE_STORES=postgresql runs them on that one, which `make test` does not: it
plays sessions on it instead, and holds it to everything that a store promises, also while it fails."""

EVERY_STORE = pytest.mark.parametrize("store_url", dict.fromkeys([*STORES, "postgresql"]), indirect=True)
"""Of a test that runs on PostgreSQL whatever STORES are."""


@pytest.fixture(params=STORES)
async def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Each of STORES."""
    if request.param == "postgresql":
        async with postgres.shared().empty_store() as url:
            yield pgbouncer.shared().url(url) if pgbouncer.PROGRAM in os.environ else url
    else:
        yield "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"


@pytest.fixture
async def model() -> AsyncIterator[OpenAIServer]:
    """What the `openai` provider talks to."""
    async with OpenAIServer() as server:
        yield server


@pytest.fixture
async def served(store_url: str, model: OpenAIServer) -> AsyncIterator[Running]:
    """A server; "openai" is its default provider."""
    providers: dict[str, Provider] = {
        "openai": OpenAIProvider("test-key", model.url, "stub-1"),
        "offline": OfflineProvider(),
    }
    async with running(store_url, providers) as server:
        yield server


@pytest.fixture
async def agent(served: Running) -> str:
    """An agent on the scripted model."""
    request = v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent(instruction="Answer briefly.")))
    return (await served.agents.CreateAgent(request)).name


@pytest.fixture
async def session(served: Running, agent: str) -> str:
    """An empty session of that agent."""
    request = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent=agent, user="users/ada"))
    return (await served.sessions.CreateSession(request)).name

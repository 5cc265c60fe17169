"""A server with the offline model, and an agent on it."""

import os
from collections.abc import AsyncIterator

import pytest
from notecase import v1

from tests.support import pgbouncer
from tests.support.server import Running, running

collect_ignore = [] if pgbouncer.PROGRAM in os.environ else ["test_pgbouncer.py"]


@pytest.fixture
async def served() -> AsyncIterator[Running]:
    async with running() as server:
        yield server


@pytest.fixture
async def agent(served: Running) -> v1.Agent:
    detective = v1.Agent(display_name="Detective", llm=v1.LlmAgent(instruction="The case: {{ case }}."))
    return await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="detective", agent=detective))

"""Hostile requests: each call ends as the list says, and does no more for it than its line allows. Work is counted and
not timed; `make bench` has the times."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from notecase_server.models.contract import Provider
from notecase_server.models.offline import OfflineProvider
from notecase_server.models.openai import OpenAIProvider

from tests.hostile import HOSTILE, scene
from tests.support import raw
from tests.support.openai_server import OpenAIServer, reply
from tests.support.server import Running, running
from tests.support.work import counted, counting_statements

pytestmark = pytest.mark.asyncio(loop_scope="module")

MANY = 60
"""Sessions with a run and a watcher each: more than any bound of a line that lists or tells them."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["memory", "sqlite"])
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """A server with the scene in it, over each store."""
    path: Path = tmp_path_factory.mktemp("hostile") / "notecase.db"
    async with OpenAIServer(lambda _: reply("I see.")) as model:
        providers: dict[str, Provider] = {
            "offline": OfflineProvider(),
            "openai": OpenAIProvider("test-key", model.url, "stub-1"),
        }
        store = "memory:" if request.param == "memory" else f"sqlite:{path}"
        with counting_statements():
            async with running(store, providers) as server, scene(server.channel, MANY):
                yield server


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_request_ends_as_it_has_to_and_is_bounded(served: Running, name: str) -> None:
    row = HOSTILE[name]
    frames = row.sent()
    with counted(served, row.path) as work:
        done = await raw.call(served.channel, row.path, frames, metadata=row.metadata)
    assert (row.code, row.reason) == (done.code, done.reason), done.message
    assert {} == {what: count for what, count in work.items() if count > row.bounds[what]}

"""`store`: the one suite runs over every store there is."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from notecase_server.store.contract import Store
from notecase_server.store.memory import MemoryStore
from notecase_server.store.sqlite import SqliteStore

from tests.store.build import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
    opened: Store = (
        MemoryStore(clock) if request.param == "memory" else await SqliteStore.open(tmp_path / "store.db", clock)
    )
    yield opened
    await opened.close()

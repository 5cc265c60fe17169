"""The fixtures of the engine's tests: a store in memory, with a clock that the test advances."""

from collections.abc import AsyncIterator

import pytest
from notecase_server import supervisor
from notecase_server.store.contract import Store
from notecase_server.store.memory import MemoryStore

from tests.store.build import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def store(clock: ManualClock) -> AsyncIterator[Store]:
    opened = MemoryStore(clock)
    yield opened
    await opened.close()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried at once."""
    monkeypatch.setattr(supervisor, "BACKOFF", (0.0, 0.0))

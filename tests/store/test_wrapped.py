"""A wrapper that tests put around a store keeps every promise of the store unless it is set to break one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from notecase_server.store.contract import Clock, Store
from notecase_server.store.memory import MemoryStore

from tests.store.suite import *  # noqa: F403
from tests.store.suite import Open
from tests.support.crashing import Mortal
from tests.support.failing import Unreliable


@pytest.fixture(params=["fails", "kills"])
def open_store(request: pytest.FixtureRequest) -> Open:
    @asynccontextmanager
    async def opened(clock: Clock) -> AsyncIterator[Store]:
        inner = MemoryStore(clock)
        wrapped: Any = Unreliable(inner) if request.param == "fails" else Mortal(inner, None, None)
        yield cast(Store, wrapped)
        await inner.close()

    return opened

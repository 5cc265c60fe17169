"""The fixtures of tests that hold for every store. Each run of them defines one more, `open_store`, which returns an
Open."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import pytest
import pytest_asyncio
from notecase_server.store.contract import Clock, Store

from tests.store.build import ManualClock

T = TypeVar("T", bound=Callable[..., Any])

Open = Callable[[Clock], AbstractAsyncContextManager[Store]]
"""Opens a store, a new and empty one at each call, and closes it."""


INSIDE: set[Callable[..., Any]] = set()
"""The tests that look into the tables which this repository's stores share: no other store can be held to them."""


def looks_inside(test: T) -> T:
    """Says of a test that it is one of INSIDE."""
    INSIDE.add(test)
    return test


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest_asyncio.fixture
async def store(open_store: Open, clock: ManualClock) -> AsyncIterator[Store]:
    async with open_store(clock) as opened:
        yield opened

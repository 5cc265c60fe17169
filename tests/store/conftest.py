"""`open_store`: the one suite runs over every store there is."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from notecase_server.store.contract import Clock, Store
from notecase_server.store.memory import MemoryStore
from notecase_server.store.sqlite import SqliteStore

from tests.store.fixtures import Open, clock, store

__all__ = ["clock", "open_store", "store"]


@pytest.fixture(params=["memory", "sqlite"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    @asynccontextmanager
    async def opened(clock: Clock) -> AsyncIterator[Store]:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            memory = request.param == "memory"
            store: Store = MemoryStore(clock) if memory else await SqliteStore.open(Path(folder, "store.db"), clock)
            try:
                yield store
            finally:
                await store.close()

    return opened

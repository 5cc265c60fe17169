"""`open_store`: the one suite runs on every store, on PostgreSQL through PgBouncer on request."""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from notecase_server.store.contract import Clock, Store
from notecase_server.store.memory import MemoryStore
from notecase_server.store.postgres.store import PostgresStore
from notecase_server.store.sqlite.store import SqliteStore

from tests.store.fixtures import Open, clock, store
from tests.support import pgbouncer, postgres

__all__ = ["clock", "open_store", "store"]


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    @asynccontextmanager
    async def opened(clock: Clock) -> AsyncIterator[Store]:
        async with AsyncExitStack() as stack:
            store: Store
            match request.param:
                case "memory":
                    store = MemoryStore(clock)
                case "sqlite":
                    folder = Path(tempfile.mkdtemp(dir=tmp_path))
                    store = await SqliteStore.open(folder / "store.db", clock)
                case _:
                    url = await stack.enter_async_context(postgres.shared().empty_store())
                    if pgbouncer.PROGRAM in os.environ:
                        pooler = pgbouncer.shared()
                        store = await PostgresStore.open(pooler.url(url), clock, prepared=pooler.keeps_statements)
                    else:
                        store = await PostgresStore.open(url, clock)
            stack.push_async_callback(store.close)
            yield store

    return opened

"""A server finds out whether a pooler is between it and its database, and whether that keeps prepared statements."""

import asyncio
import struct
from collections.abc import AsyncIterator

import asyncpg
import pytest
from notecase_server.store.postgres.database import Access, dialled, keeps_statements, reach
from structlog.testing import capture_logs

from tests.support import postgres
from tests.support.postgres_proxy import PostgresProxy

PROCESS = struct.pack("!cii", b"K", 12, 12345)
"""How a server begins to tell a client the number of its process."""

NAME, ANOTHER = b"notecase_", b"pgpooler_"


class Pooler(PostgresProxy):
    """Shows its own process number, as poolers do, and may rename prepared statements."""

    renames = False

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await super()._pass_on(_Changed(reader), writer)  # type: ignore[arg-type]

    def _passed(self, kind: str, body: bytes) -> bytes:
        return body.replace(NAME, ANOTHER) if self.renames and kind in {"P", "D", "C"} else body


class _Changed:
    """What a server says, with another process number."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def read(self, size: int) -> bytes:
        data = await self._reader.read(size)
        at = data.find(PROCESS[:5])
        return data if at < 0 else data[:at] + PROCESS + data[at + len(PROCESS) :]


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with postgres.shared().empty_store() as url:
        yield url


async def test_a_direct_connection_prepares_statements(url: str) -> None:
    with capture_logs() as logs:
        assert Access(url) == await reach(Access(url))
        assert Access(url, prepared=False) == await reach(Access(url, prepared=False))
    assert [] == logs


@pytest.mark.parametrize("keeps", [False, True])
async def test_statements_are_prepared_through_a_pooler_that_keeps_them(url: str, keeps: bool) -> None:
    """Through another one they are not, and the log says so."""
    async with Pooler(url) as pooler:
        pooler.renames = keeps
        with capture_logs() as logs:
            access = await reach(Access(pooler.url))
        async with dialled(access) as connection:
            assert 12345 == connection.get_server_pid()
    assert keeps == access.prepared
    assert ([] if keeps else ["statements_not_prepared"]) == [line["event"] for line in logs]


async def test_the_question_leaves_no_statement_in_a_poolers_connection(url: str) -> None:
    connection = await asyncpg.connect(url, statement_cache_size=0)
    assert await keeps_statements(connection)
    # A query of another kind would let asyncpg close its statements first.
    await connection.execute("DO $$ BEGIN ASSERT NOT EXISTS (SELECT FROM pg_prepared_statements); END $$")
    await connection.close()

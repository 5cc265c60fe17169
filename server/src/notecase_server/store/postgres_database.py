"""The database of a PostgreSQL store: found fit and brought up to date, or refused with a sentence."""

import secrets
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import asyncpg
import structlog
from asyncpg import Pool, Record

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.postgres_schema import MIGRATIONS, VERSION
from notecase_server.store.postgres_wire import LOST, Fenced, sqlstate

log = structlog.get_logger()

SCHEMES = ("postgresql", "postgres")

CONNECT_SECONDS = 10.0

STATEMENT_SECONDS = 30.0
"""After which a statement is given up: its database does not answer."""

STATEMENTS = 256
"""Prepared statements that a connection keeps: a commit's text depends on what it reads and writes, in some dozens of
combinations."""

MIGRATION_LOCK = 0x6E746373
"""The number of the advisory lock under which a database is brought up to date: "ntcs"."""

NEWER = 1
"""Steps that a schema may be ahead: a migration only adds what the version before can do without, and the release after
it removes what is no longer used. So a server of the version before still works while others are replaced."""

OLDEST_SERVER = 14


class Database(NamedTuple):
    """An open database."""

    pool: "Pool[Record]"
    secret: bytes
    fence: int
    """The number under which this process owns it."""


async def connect(url: str, connections: int, prepared: bool) -> Database:
    """Opens a pool of at most so many connections, makes the tables or brings them up to date, and becomes the owner:
    writes of the one before are refused from then on. `prepared` is false where a pooler keeps no prepared statements.

    Raises StoreOpenError, whose text is for the operator and has no password in it."""
    where = place(url)
    try:
        pool = await asyncpg.create_pool(
            url,
            min_size=0,
            max_size=connections,
            timeout=CONNECT_SECONDS,
            command_timeout=STATEMENT_SECONDS,
            statement_cache_size=STATEMENTS if prepared else 0,
            max_cached_statement_lifetime=0,
            reset=_reset,
            server_settings={"application_name": "notecase"} if prepared else None,
        )
        try:
            async with pool.acquire() as connection:
                await migrate(connection, where)
                secret = await connection.fetchval("SELECT secret FROM notecase_store")
                fence = await own(connection)
        except BaseException:
            pool.terminate()
            raise
    except LOST as error:
        raise StoreOpenError(_refusal(where, error)) from None
    return Database(pool, secret, fence)


async def own(connection: Any, fence: int | None = None) -> int:
    """Raises the fence, and returns the new one: no write that goes by an older one is made from then on. Waits for
    those that are under way. Raises Fenced where `fence` is given and is not the one in force."""
    raised: int | None = await connection.fetchval(
        "UPDATE owner SET fence = fence + 1 WHERE fence = coalesce($1, fence) RETURNING fence", fence
    )
    if raised is None:
        raise Fenced
    return raised


async def _reset(connection: Any) -> None:
    """Leaves a connection as it is when it goes back to the pool: nothing is ever set in its session."""


def place(url: str) -> str:
    """What the operator is told of a database: its URL without user, password and parameters.

    Raises StoreOpenError for what is no such URL."""
    try:
        parts = urlsplit(url)
        host, port, name = parts.hostname, parts.port, parts.path.lstrip("/")
    except ValueError:
        parts, host, port, name = urlsplit(""), None, None, ""
    if parts.scheme not in SCHEMES:
        raise StoreOpenError("The store is no URL of a PostgreSQL database; want postgresql://USER@HOST/DATABASE.")
    return f"postgresql://{host or ''}{f':{port}' if port else ''}/{name}"


async def migrate(connection: Any, where: str) -> None:
    """Makes the tables of an empty database, or brings older ones up to date, in one transaction: others wait, and
    until all is done the database is what it was. Raises StoreOpenError for one that is not fit, before anything in it
    is changed."""
    async with connection.transaction():
        await connection.execute(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
        version = await _check(connection, where)
        if version >= VERSION:
            return
        for migration in MIGRATIONS[version:]:
            await connection.execute(migration)
        if version:
            await connection.execute("UPDATE notecase_store SET schema = $1", VERSION)
            log.info("store_migrated", schema=VERSION)
        else:
            await connection.execute(
                "INSERT INTO notecase_store (schema, secret) VALUES ($1, $2)", VERSION, secrets.token_bytes(32)
            )


async def _check(connection: Any, where: str) -> int:
    """Returns the number of the schema, 0 in an empty database. Raises StoreOpenError for one that is not fit."""
    encoding, number, recovering, schema, ours, tables = await connection.fetchrow(
        """SELECT current_setting('server_encoding'), current_setting('server_version_num')::integer,
            pg_is_in_recovery(), current_schema(), to_regclass('notecase_store') IS NOT NULL,
            (SELECT count(*) FROM pg_tables WHERE schemaname = current_schema())"""
    )
    if number < OLDEST_SERVER * 10000:
        raise StoreOpenError(f"{where} is PostgreSQL {number // 10000}; notecase needs {OLDEST_SERVER} or newer.")
    if encoding != "UTF8":
        raise StoreOpenError(f"{where} has the encoding {encoding}. Create the database with ENCODING 'UTF8'.")
    if recovering:
        raise StoreOpenError(f"{where} is a standby, which cannot be written. Name the primary.")
    if schema is None:
        raise StoreOpenError(f"{where} has no schema that its search_path names. Create one, or name another.")
    if not ours:
        if tables:
            raise StoreOpenError(f"{where} is a database of another program. Choose another database or schema.")
        return 0
    version: int = await connection.fetchval("SELECT schema FROM notecase_store")
    if version > VERSION + NEWER:
        raise StoreOpenError(
            f"{where} was written by a newer notecase: its schema is {version}, this one works with {VERSION + NEWER}."
            " Use that version, or choose another database."
        )
    return version


def _refusal(where: str, error: BaseException) -> str:
    code = sqlstate(error)
    if code in {"42501", "25006"}:
        right = "is read-only" if code == "25006" else "does not let this user create tables"
        return f"{where} {right}. Grant the right, or choose another user or database."
    if code[:2] == "28":
        return f"{where} does not accept this user or password."
    if code == "3D000":
        return f"{where}: there is no such database. Create it, or choose another."
    if code == "53300":
        return f"{where} has no connection left. Raise max_connections, or lower the number that notecase may open."
    if isinstance(error, ValueError):
        return f"{where} has parameters that cannot be understood."
    if isinstance(error, OSError | TimeoutError | asyncpg.PostgresConnectionError) or code[:3] == "57P":
        return f"{where} cannot be reached. Start it, or choose another."
    return f"{where} cannot be used as a store: PostgreSQL says {code or type(error).__name__}."

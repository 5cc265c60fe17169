"""The database of a PostgreSQL store: found fit and brought up to date, or refused with a sentence."""

import os
import re
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import asyncpg
import structlog
from asyncpg import Connection, Pool, Record

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.postgres.lease import PostgresLease
from notecase_server.store.postgres.schema import MIGRATIONS, VERSION
from notecase_server.store.postgres.wire import (
    LOCK_BOUND,
    LOST,
    OWNED,
    STATEMENT_SECONDS,
    Fenced,
    Unconnected,
    is_lost,
    sqlstate,
    uncancelled,
)
from notecase_server.supervisor import patiently

log = structlog.get_logger()

SCHEMES = ("postgresql", "postgres")

CONNECT_SECONDS = 10.0

STATEMENTS = 256
"""Prepared statements that a connection keeps: a commit's text depends on what it reads and writes, in some dozens of
combinations."""

MIGRATION_LOCK = 0x6E746373
"""The number of the advisory lock under which a database is brought up to date: "ntcs"."""

NEWER = 1
"""Steps that a schema may be ahead: a migration only adds what the version before can do without, and the release after
it removes what is no longer used. So a server of the version before still works while others are replaced."""

OLDEST_SERVER = 14


SECRET = "SELECT secret FROM notecase_store"

UNFINISHED = "unfinished_copy"
"""A table that only a store has that another one is being copied into."""


FILES = frozenset({"sslrootcert", "sslcert", "sslkey"})
"""Parameters of a URL that name files which must be there. `passfile` need not, as with libpq."""

PARAMETER = re.compile(r'"(\w+)"')
"""The name of a parameter in a message of PostgreSQL."""


class Access(NamedTuple):
    """How a database is reached."""

    url: str
    password: Callable[[], str] | None = None
    """Asked for each connection; None where the URL, PGPASSWORD or a password file of libpq has it."""
    prepared: bool = True
    """False where a pooler keeps no prepared statements; see `reach`."""

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a connection of asyncpg."""
        return {
            "dsn": self.url,
            "timeout": CONNECT_SECONDS,
            "statement_cache_size": STATEMENTS if self.prepared else 0,
            "max_cached_statement_lifetime": 0,
            "server_settings": {"application_name": "notecase"} if self.prepared else None,
            **({"password": self.password} if self.password is not None else {}),
            **({"target_session_attrs": "read-write"} if self._has_choice else {}),
        }

    @property
    def _has_choice(self) -> bool:
        """Whether the URL names several hosts and leaves open which of them to choose."""
        parts = urlsplit(self.url)
        given = dict(parse_qsl(parts.query))
        several = "," in parts.netloc.rpartition("@")[2] or "," in given.get("host", "")
        return several and "target_session_attrs" not in given

    async def dial(self) -> "Connection[Record]":
        """Makes a connection that belongs to no pool. Raises Unconnected."""
        return await _connect(**self.options)


async def _connect(*arguments: Any, **options: Any) -> "Connection[Record]":
    """asyncpg.connect. Raises Unconnected: asyncpg itself may raise anything, such as ValueError for a certificate."""
    try:
        return await asyncpg.connect(*arguments, **options)
    except Exception as error:  # noqa: BLE001 - its kind is logged
        raise Unconnected(error) from None


HOSTS = re.compile(r"(([^\s:,@\[\]]*|\[[0-9a-fA-F:.]+\])(:[0-9]+)?(,(?!$)|$))*")
"""The hosts of a URL, which may be several or none, each with its port or without."""


class Database(NamedTuple):
    """An open database."""

    pool: "Pool[Record]"
    secret: bytes
    fence: int
    """The number under which this process owns it."""
    name: str
    """The name under which it does, which no other process has."""


async def connect(access: Access, connections: int, lease: PostgresLease | None = None) -> Database:
    """Opens a pool of at most so many connections. Without a lease it makes the tables or brings them up to date, and
    becomes the owner by force: writes of the one before are refused from then on.

    Raises StoreOpenError, whose text is for the operator and has no password in it."""
    where = place(access.url)
    with telling(where):
        pool = await asyncpg.create_pool(
            **access.options,
            connect=_connect,
            min_size=0,
            max_size=connections,
            command_timeout=STATEMENT_SECONDS,
            reset=_reset,
        )
        try:
            if lease is None:
                async with pool.acquire() as connection:
                    await migrate(connection, where)
                    name = f"by force {secrets.token_hex(4)}"
                    fence = await seize(connection, name)
                    secret = await connection.fetchval(SECRET)
            else:
                name, fence = lease.name, lease.fence
                secret = await patiently(partial(pool.fetchval, SECRET), is_lost, lease.seconds)
        except BaseException:
            pool.terminate()
            raise
    log.info("store_opened", store=where, fence=fence, connections=connections, prepared=access.prepared)
    return Database(pool, secret, fence, name)


async def reach(access: Access) -> Access:
    """Returns the access that works: without prepared statements where a pooler is in between that does not keep them.

    Raises StoreOpenError, also for a file of the URL that is missing."""
    require_files(access.url)
    if not access.prepared:
        return access
    where = place(access.url)
    with telling(where):
        async with dialled(access._replace(prepared=False)) as connection:
            if await keeps_statements(connection):
                return access
    log.warning(
        "statements_not_prepared",
        store=where,
        problem="A pooler is in between that keeps no prepared statements: each statement takes another round trip.",
    )
    return access._replace(prepared=False)


def require_files(url: str) -> None:
    """Raises StoreOpenError for a file that the URL names and that cannot be read: the driver's error is the same as
    that of a server that is away."""
    for key, path in parse_qsl(urlsplit(url).query):
        if key in FILES and not os.access(path, os.R_OK):
            raise StoreOpenError(f"{place(url)}: the file of {key} cannot be read.")


async def keeps_statements(connection: Any) -> bool:
    """Finds out whether a statement that is prepared is still there in the next transaction.

    A pooler shows its own process number, and gives each transaction any of its connections to the database. One that
    keeps prepared statements renames them. If the database has the client's name under another process number, the
    pooler only passes statements on."""
    name = f"notecase_{secrets.token_hex(4)}"
    async with connection.transaction():
        statement = await connection.prepare("SELECT 1", name=name)
        process, passed_on = await connection.fetchrow(
            "SELECT pg_backend_pid(), EXISTS (SELECT FROM pg_prepared_statements WHERE name = $1)", statement.get_name()
        )
        if passed_on:  # the database's connection may stay, and serve others
            await connection.execute(f"DEALLOCATE {name}")
    return not passed_on or process == connection.get_server_pid()


async def seize(connection: Any, name: str) -> int:
    """Becomes the owner by force, and returns the new fence: no write of the previous owner is made from then on. Waits
    for current writes."""
    fence: int = await connection.fetchval("UPDATE owner SET name = $1, fence = fence + 1 RETURNING fence", name)
    return fence


async def raise_fence(connection: Any, name: str, fence: int) -> int:
    """Raises the fence of the owner of that name above `fence`, and returns the new one: no write with an older one is
    made from then on. Waits for current writes. A statement that arrives late does not change a fence that was raised
    since. Raises Fenced where another one is the owner."""
    raising = f"UPDATE owner SET fence = fence + 1 WHERE name = $1 AND fence = $2 AND {LOCK_BOUND} RETURNING fence"
    with uncancelled(connection) as timeout:
        raised: int | None = await connection.fetchval(raising, name, fence, timeout=timeout)
    if raised is None:  # by an earlier try, or since another one is the owner
        raised = await connection.fetchval("SELECT fence FROM owner WHERE name = $1 AND fence > $2", name, fence)
    if raised is None:
        raise Fenced
    return raised


async def stay_owner(connection: Any, fence: int) -> None:
    """Keeps everybody else from becoming the owner until the end of the connection's transaction. Raises StoreOpenError
    where somebody has."""
    if await connection.fetchval(f"SELECT count(*) FROM ({OWNED.format(fence)}) AS o") != 1:
        raise StoreOpenError("Another server now owns the store. Stop it, and repeat the command.")


async def own(
    access: Access,
    lease: PostgresLease,
    waiting: Callable[[], Awaitable[None]] | None,
    may_migrate: bool,
    unfinished: bool = False,
) -> int:
    """Becomes the owner of a database, and then brings its schema up to date. An empty database gets its tables first.
    Returns the number of the schema before, 0 if there was none. `waiting` is as for PostgresLease.take.

    Raises StoreOpenError, also for an older schema where it may not migrate, and for an unfinished copy of another
    store unless `unfinished` says that one will do."""
    where = place(access.url)
    with telling(where):
        async with dialled(access) as connection:
            former = await check(connection, where)
            if not former or not may_migrate:
                await require(connection, where, may_migrate)

        async def look() -> None:
            async with dialled(access) as connection:
                await require(connection, where, may_migrate)
                if not unfinished and await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", UNFINISHED):
                    text = f"{where} is an unfinished copy of another store. Repeat the copy, or drop the database."
                    raise StoreOpenError(text)

        await lease.take(waiting)
        try:
            await patiently(look, is_lost, lease.seconds)
        except BaseException:
            await lease.release()
            raise
    return former


async def require(connection: Any, where: str, may_migrate: bool) -> None:
    """Brings a schema up to date, or refuses an older one. Raises StoreOpenError."""
    if may_migrate:
        await migrate(connection, where)
    elif (version := await check(connection, where)) < VERSION:
        found = f"has the schema {version}, and this notecase needs {VERSION}"
        if not version:
            schema = await connection.fetchval("SELECT current_schema()")
            found = f"has no tables of notecase in {schema}, the first schema of its search_path that this user may use"
        raise StoreOpenError(f"{where} {found}. Run notecase migrate --store URL, or leave out --no-migrate.")


@asynccontextmanager
async def dialled(access: Access) -> "AsyncIterator[Connection[Record]]":
    """A connection within the block."""
    connection = await access.dial()
    try:
        yield connection
    finally:
        connection.terminate()


@contextmanager
def telling(where: str) -> Iterator[None]:
    """Raises StoreOpenError instead of what the database or its driver says."""
    try:
        yield
    except LOST as error:
        raise StoreOpenError(refusal(where, error)) from None


async def _reset(connection: Any) -> None:
    """Leaves a connection as it is when it goes back to the pool: nothing is ever set in its session."""


def place(url: str) -> str:
    """Returns how a database is named to the operator: its URL without user, password and parameters. Raises
    StoreOpenError for an invalid URL. A URL is also invalid if its password has characters that end that part of a URL,
    since the text after them would be shown."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    user, _, hosts = parts.netloc.rpartition("@")
    cut = "@" in parts.path or parts.fragment or ("@" in parts.query and not user)
    if parts.scheme not in SCHEMES or cut or not HOSTS.fullmatch(hosts):
        raise StoreOpenError(
            "The store is not a URL of a PostgreSQL database: it must be postgresql://USER@HOST/DATABASE, with special "
            "characters of a password as %2F and so on."
        )
    return f"postgresql://{hosts}/{parts.path.lstrip('/')}"


async def migrate(connection: Any, where: str) -> None:
    """Makes the tables of an empty database, or brings older ones up to date, in one transaction: others wait, and
    until the end the database does not change. Raises StoreOpenError for an unsuitable one, before anything in it is
    changed."""
    async with connection.transaction():
        await connection.execute(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
        version = await check(connection, where)
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


async def check(connection: Any, where: str) -> int:
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
        raise StoreOpenError(
            f"{where} has none of the schemas in its search_path, or its user may use none of them. Create "
            "one, grant USAGE on it, or set another search_path."
        )
    foreign = StoreOpenError(f"{where} is a database of another program. Choose another database or schema.")
    if not ours:
        if tables:
            raise foreign
        return 0
    try:
        version: int | None = await connection.fetchval("SELECT schema FROM notecase_store")
    except asyncpg.UndefinedColumnError:
        raise foreign from None
    if version is None:
        raise StoreOpenError(f"{where} has the tables of notecase but not their rows. Restore the whole database.")
    if version > VERSION + NEWER:
        raise StoreOpenError(
            f"{where} was written by a newer notecase: its schema is {version}, this one supports up to "
            f"{VERSION + NEWER}."
            " Use that version, or choose another database."
        )
    return version


TOO_LONG = "54000"
"""What PostgreSQL says of a row that is too long for an index."""


def refusal(where: str, error: BaseException) -> str:
    if isinstance(error, Unconnected):
        error = error.reason
    code = sqlstate(error)
    if code in {"42501", "25006"}:
        right = "is read-only" if code == "25006" else "does not let this user create tables, or use those of notecase"
        return f"{where} {right}. Grant the right, or choose another user or database."
    if code[:2] == "28":
        return f"{where} does not accept this user or password."
    if code == "3D000":
        return f"{where}: there is no such database. Create it, or choose another."
    if code == "53300":
        return f"{where} has no free connection. Raise max_connections, or lower --store-connections."
    if isinstance(error, ssl.SSLError):
        return f"{where} did not agree on TLS. Check sslmode, sslrootcert and the names in the server's certificate."
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return (
            f"{where} has no server with the target_session_attrs of the URL, which are read-write if it names several "
            "hosts and says nothing else. Name the primary, or start it."
        )
    if code == "42704" and (unknown := PARAMETER.search(str(error))):
        return f"{where}: there is no parameter {unknown[1]}. Check the spelling of the URL's parameters."
    if isinstance(error, UnicodeError):
        return f"{where}: its password file is not text in UTF-8. Correct the file."
    if isinstance(error, ValueError):
        if "root certificate" in str(error):
            return f"{where}: its sslmode needs the CA certificates of the server. Name their file in sslrootcert."
        return f"{where} has invalid parameters."
    if isinstance(error, OSError | TimeoutError | asyncpg.PostgresConnectionError) or code[:3] == "57P":
        return f"{where} cannot be reached. Start it, or choose another."
    if code == TOO_LONG:
        return f"{where} cannot hold a key of state of more than 2.7 KB. Delete the session with it in the other store."
    return f"{where} cannot be used as a store: PostgreSQL says {code or type(error).__name__}."

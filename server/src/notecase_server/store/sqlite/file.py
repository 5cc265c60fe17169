"""The file of a SQLite store: found fit and brought up to date, or refused with a sentence; and owned by one process.

The owner holds a lock of the operating system for as long as it lives, and its death frees the lock. So no owner before
this one can still be at work, and a stale commit cannot reach the file: taking a run over needs no waiting for leases.

The lock is as good as the locks of the file system, which on NFS may be not at all. Where the system is not Linux, hard
links to one file are taken for two files.
"""

import errno
import fcntl
import os
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import structlog
from google.protobuf.message import DecodeError

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.sqlite.migration import migrate
from notecase_server.store.sqlite.schema import SCHEMA, VERSION

log = structlog.get_logger()

APPLICATION_ID = 0x6E746373
"""Says whose file it is, in its header: "ntcs"."""

UNFINISHED = "unfinished_copy"
"""A table that only a store has that another one is being copied into."""

OWNER_BYTE = 1 << 62
"""The byte of the database that its owner locks: no file is so long."""

BUSY_SECONDS = 5.0
"""How long to wait for a lock of SQLite's own: no other server holds one, but a backup or a curious shell may."""

WRITER_CACHE_KIB = 8192
"""The writer touches the same upper pages again and again; readers keep SQLite's 2 MB each."""

WAL_BYTES = 64 << 20
"""What the write-ahead log is cut back to when a burst has made it longer."""


class Connections(NamedTuple):
    """An open file. `close` lets go of everything, the lock last."""

    writer: sqlite3.Connection
    checkpointer: sqlite3.Connection
    """Only moves pages from the write-ahead log into the database."""
    readers: Sequence[sqlite3.Connection]
    secret: bytes
    close: Callable[[], None]


def connect(path: Path, readers: int, unfinished: bool = False) -> Connections:
    """Takes the file into possession, creating it or bringing its schema up to date. One that is an unfinished copy of
    another store is opened only with `unfinished`.

    Raises StoreOpenError when another owner holds it, also one in this process, when it was made by a newer version or
    another program, and when it cannot be written. The connections may be used from any one thread at a time."""
    path = Path(os.path.realpath(path))
    with ExitStack() as opened:
        try:
            _lock(path, opened)
            writer = _connection(path, opened)
            _check(path, writer)
            if not unfinished and has_table(writer, UNFINISHED):
                raise StoreOpenError(
                    f"{path} is an unfinished copy of another store. Repeat the copy, or delete the file."
                )
            writer.execute("PRAGMA journal_mode = WAL")
            # A full sync is what lets a commit be announced; the other settings say what deletion and the log cost.
            checkpointer = _connection(path, opened)
            for connection in (writer, checkpointer):
                connection.execute("PRAGMA synchronous = FULL")
            writer.execute("PRAGMA secure_delete = ON")
            writer.execute("PRAGMA wal_autocheckpoint = 0")  # a commit would make it, and its caller wait
            writer.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
            writer.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KIB}")
            bring_up_to_date(writer)
            secret = _secret(writer)
            pool = [_connection(path, opened) for _ in range(readers)]
            for reader in pool:
                reader.execute("PRAGMA query_only = ON")
        except OSError as error:
            raise StoreOpenError(_refusal(path, error)) from error
        except sqlite3.Error as error:
            raise StoreOpenError(_sqlite_refusal(path, error)) from error
        except DecodeError as error:
            raise StoreOpenError(f"{path} has a damaged row. Restore a backup.") from error
        return Connections(writer, checkpointer, pool, secret, opened.pop_all().close)


def in_memory() -> tuple[sqlite3.Connection, bytes]:
    """Makes a database without a file, which is gone once the connection is closed; returns its secret as well."""
    connection = _open(":memory:")
    bring_up_to_date(connection)
    return connection, _secret(connection)


def _lock(path: Path, opened: ExitStack) -> None:
    """Locks a file next to the database, then the database, and creates the database if needed, readable by its owner
    only. The database is touched last, since closing any handle of it drops SQLite's own locks in this process."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    _require_file(path)
    lock = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, lock)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    database = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, database)  # once all connections are closed
    _lock_byte(database)


def _lock_byte(database: int) -> None:
    """Locks a byte of the database itself, behind all that SQLite locks, where the system has locks that belong to a
    handle. The other lock is another file's where the database has a second name: a hard link, or a mount of it alone
    into another container."""
    if not hasattr(fcntl, "F_OFD_SETLK"):
        return
    try:
        fcntl.fcntl(database, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, OWNER_BYTE, 1, 0))
    except BlockingIOError:
        raise
    except OSError as error:
        log.debug("store_byte_not_locked", error=errno.errorcode.get(error.errno or 0, ""))


def _require_file(path: Path) -> None:
    """Refuses what exists and is not a file, such as a device or a pipe."""
    if path.exists() and not path.is_file():
        raise StoreOpenError(f"{path} is not a file. Choose another path.")


def _secret(connection: sqlite3.Connection) -> bytes:
    secret: bytes = connection.execute("SELECT secret FROM store").fetchone()[0]
    return secret


def _open(path: Path | str) -> sqlite3.Connection:
    return sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
    )


def _connection(path: Path, opened: ExitStack) -> sqlite3.Connection:
    connection = _open(path)
    opened.callback(connection.close)
    return connection


def has_table(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is not None


def _check(path: Path, connection: sqlite3.Connection) -> None:
    """Refuses a file that is not ours, before anything in it is changed."""
    owner, version, tables = connection.execute(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)"
        " FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    if owner != APPLICATION_ID and (owner or version or tables):
        raise StoreOpenError(f"{path} is a database of another program. Choose another path.")
    if version > VERSION:
        raise StoreOpenError(
            f"{path} was written by a newer notecase: its schema is {version}, this one supports up to {VERSION}."
            " Use that version, or choose another path."
        )
    if version < 0 or (tables and not version):
        raise StoreOpenError(f"{path} has tables of an unknown schema, {version}. Choose another path.")


def require_closed(path: Path) -> None:
    """Raises StoreOpenError when somebody has the store open, and when a write-ahead log was left next to it: SQLite
    would apply that to whatever file has been put there."""
    path = Path(os.path.realpath(path))
    log_left = Path(f"{path}-wal")
    with ExitStack() as opened:
        try:
            _lock(path, opened)
            if not log_left.exists() or not log_left.stat().st_size:
                return
        except OSError as error:
            raise StoreOpenError(_refusal(path, error)) from error
    raise StoreOpenError(
        f"{log_left} was left by a server that was killed, and would be applied to {path}. If a backup was put there"
        " since, delete the -wal file; otherwise start a server with the store, and stop it."
    )


def require_existing(path: Path) -> None:
    """Raises StoreOpenError when there is no file at the path."""
    if not path.is_file():
        raise StoreOpenError(f"There is no store at {path}. Name the file of one as sqlite:PATH.")


def backup(path: Path, destination: Path, force: bool) -> None:
    """Copies the database as it is at one moment, whoever owns it, into a file that is whole or not there. No lock of
    the owner's is taken, and its commits do not wait.

    Raises StoreOpenError when there is no store, when there is something in the destination's place (with `force` only
    when that is a store in use, or one that was not closed), and when the copy cannot be written."""
    path, destination = Path(os.path.realpath(path)), Path(os.path.realpath(destination))
    try:
        with ExitStack() as opened:
            require_existing(path)
            _require_free(path, destination, force, opened)
            source = _connection(path, opened)
            _check(path, source)
            source.execute("PRAGMA query_only = ON")
            handle, name = tempfile.mkstemp(prefix=f".{destination.name}-", dir=destination.parent)
            opened.callback(Path(name).unlink, missing_ok=True)
            opened.callback(os.close, handle)
            copy = sqlite3.connect(name, isolation_level=None)
            try:
                source.backup(copy)
            finally:
                copy.close()
            os.fsync(handle)
            if force:
                os.replace(name, destination)
            else:
                os.link(name, destination)  # which never replaces what came meanwhile
            _sync_directory(destination.parent)
    except OSError as error:
        raise StoreOpenError(_backup_refusal(destination, error)) from error
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:  # only the copy is written
            raise StoreOpenError(f"{destination} cannot be written: the disk is full.") from error
        raise StoreOpenError(_sqlite_refusal(path, error)) from error


def _require_free(path: Path, destination: Path, force: bool, opened: ExitStack) -> None:
    """Refuses a place that a copy would do harm in: what a store's log holds would be put into the copy."""
    _require_file(destination)
    if destination.exists() and not force:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    if destination == path or Path(f"{destination}-wal").exists():
        raise StoreOpenError(f"{destination} is a store that is open, or was not closed. Choose another path.")
    if destination.exists() and Path(f"{destination}-lock").exists():
        _lock(destination, opened)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _backup_refusal(destination: Path, error: OSError) -> str:
    if isinstance(error, FileExistsError):
        return f"{destination} exists. Choose another path, or add --force to replace it."
    return _refusal(destination, error)


def _refusal(path: Path, error: OSError) -> str:
    if error.errno in {errno.EAGAIN, errno.EACCES} and isinstance(error, BlockingIOError):
        return (
            f"{path} is in use: a SQLite store has one owner at a time. Stop the other server, or choose another path."
        )
    if isinstance(error, FileNotFoundError):
        return f"The directory {path.parent} does not exist. Create it, or choose another path."
    return f"{path} cannot be opened for writing: {error.strerror}. Make it writable, or choose another path."


def _sqlite_refusal(path: Path, error: sqlite3.Error) -> str:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
        return f"{path} is not a SQLite database. Choose another path."
    return f"{path} cannot be used as a store: SQLite says {str(error)!r}."


def bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Makes the tables of a new file or converts those of an older one, in one transaction: until all is done the
    file is what it was.

    Raises DecodeError for a row that is damaged."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        if version:
            migrate(connection, version)
        else:
            _make(connection)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    if version:
        log.info("store_migrated", schema=VERSION)


def _make(connection: sqlite3.Connection) -> None:
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute("INSERT INTO store (secret) VALUES (randomblob(32))")

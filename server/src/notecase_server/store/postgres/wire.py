"""Runs steps, which are plain functions, on PostgreSQL, which must be awaited. Each step runs in a greenlet. When it
needs an answer from the database, it switches to the greenlet of the event loop with the awaitable, which switches back
with the answer. So every rule is written once for all stores, and a statement needs no thread.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import asyncpg
import structlog
from google.protobuf.message import DecodeError
from greenlet import getcurrent, greenlet

from notecase_server import errors

T = TypeVar("T")

log = structlog.get_logger()

ESCAPES = {0: "\x01\x01", 1: "\x01\x02"}
"""Escapes for U+0000, which PostgreSQL cannot store in text, and for U+0001: escaped texts still compare by the bytes
of their UTF-8."""

UNESCAPES = {escape: chr(code) for code, escape in ESCAPES.items()}
ESCAPED = re.compile("\x01[\x01\x02]")

GUARD = "SELECT 1 / CASE WHEN {} THEN 1 ELSE 0 END"
"""Divides by zero where a condition does not hold, so that the whole statement, or transaction, is undone."""

OWNED = "SELECT FROM owner WHERE fence = {} FOR KEY SHARE"
"""Finds one row, and keeps the fence from being raised until the transaction ends; none when it was raised before."""

REPEATABLE = frozenset({"22012", "23505", "40001", "40P01"})
"""SQLSTATEs of a write that is made again from its beginning, since others came between its reads and its writes: a
guard that did not hold, a key that is taken, a serialization failure, a deadlock."""

DEFECTS = ("22", "23", "42")
"""Classes of SQLSTATEs of statements that can never succeed: our mistake, so callers are not asked to try again."""

PASSING = frozenset({"22012", "42501", "42P01", "42P05"})
"""Those of DEFECTS that are not ours: a guard that others broke again and again, a right or a table that is missing
until an operator gives it back, and a prepared statement that a pooler kept from another client."""

MISPLACED = frozenset({"25006", "26000", "42P05"})
"""SQLSTATEs of a connection that is of no more use, while another one may be: its host takes no writes any more, or
its pooler has lost prepared statements or mixed them up."""

DISK_FULL = "53100"

STATEMENT_SECONDS = 30.0
"""After which a statement is given up: its database does not answer."""

LOCK_BOUND = "set_config('lock_timeout', '30s', true) != ''"
"""Is true, and limits how long its statement waits for locks: when a connection is closed while its
statement waits, PostgreSQL goes on waiting."""


class Unconnected(Exception):
    """No connection could be made, so nothing was asked of the database. Whatever its reason is, another try may
    succeed: files of certificates and passwords are replaced, too."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(type(reason).__name__)
        self.reason = reason


LOST = (
    *(asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError),
    *(OSError, TimeoutError, Unconnected),
)
"""Raised when a statement has failed, or the connection is missing or lost."""


class Fenced(Exception):
    """Another server has become the owner of the database."""


class Defect(Exception):
    """The database refused a statement that can never succeed."""


def awaited(answer: Awaitable[T]) -> T:
    """Waits for something of the event loop, within a step that `run` runs."""
    result: T = getcurrent().parent.switch(answer)
    return result


async def run(step: Callable[..., T], *arguments: Any) -> T:
    """Runs a step, awaiting for it what it hands to `awaited`. Raises what the step raises."""
    inner = greenlet(step)
    inner.gr_context = getcurrent().gr_context
    result = inner.switch(*arguments)
    while not inner.dead:
        try:
            answer = await result
        except BaseException as error:  # noqa: BLE001 - it belongs to the step
            result = inner.throw(error)
        else:
            result = inner.switch(answer)
    return result  # type: ignore[no-any-return]


def escaped(value: Any) -> Any:
    """Returns a value, or each of several, as it is bound: see ESCAPES."""
    if isinstance(value, str):
        return value.translate(ESCAPES) if "\0" in value or "\x01" in value else value
    if isinstance(value, list | tuple | set | frozenset):
        return [escaped(each) for each in value]
    return value


def unescaped(text: str) -> str:
    """Returns a text as it was before `escaped`."""
    return ESCAPED.sub(lambda found: UNESCAPES[found[0]], text) if "\x01" in text else text


def sqlstate(error: BaseException) -> str:
    """The code of an error that the database raised; empty for others."""
    return getattr(error, "sqlstate", None) or ""


def kind(error: BaseException) -> str:
    """What the log says of an error: its words could quote what is stored."""
    found = error.reason if isinstance(error, Unconnected) else error
    return " ".join(filter(None, (type(found).__name__, sqlstate(found))))


def is_unsure(error: BaseException) -> bool:
    """Whether a statement that failed may have been carried out: the database did not answer it."""
    is_answer = isinstance(error, asyncpg.PostgresError) and not sqlstate(error).startswith("08")
    return not (is_answer or isinstance(error, Unconnected))


def is_lost(error: BaseException) -> bool:
    """Whether there was no connection, or it was lost: the next one may work."""
    return isinstance(error, LOST) and (
        isinstance(error, Unconnected) or is_unsure(error) or sqlstate(error)[:3] == "57P"
    )


@contextmanager
def uncancelled(connection: Any) -> Iterator[float]:
    """For the statement that makes a write. It is given up by closing the connection, where asyncpg would cancel the
    statement: if PostgreSQL waits for a synchronous standby by then, it would end the wait, keep the write and show it
    to everybody, although a failover may lose it. Yields the time-out to give the statement, which never passes."""
    timer = asyncio.get_running_loop().call_later(STATEMENT_SECONDS, connection.terminate)
    try:
        yield 1000 * STATEMENT_SECONDS
    finally:
        timer.cancel()


@contextmanager
def refusals() -> Iterator[None]:
    """Raises the caller's error in place of that of the database or its driver, whose text could quote stored data: its
    kind is logged."""
    try:
        yield
    except (*LOST, DecodeError) as error:
        code = sqlstate(error)
        if code[:2] in DEFECTS and code not in PASSING:
            raise Defect(kind(error)) from None
        log.error("store_failed", error=kind(error))
        raise errors.store_unavailable(full=code == DISK_FULL) from None

"""Copies of whole sessions, forks and imports, in transactions of a bounded number of rows and of bytes.

A copy is written under its uid while there is no such session, so nothing finds it. Its first transaction records it
like a deleted session, and the last one removes that record and adds the session with its name. So
`Store.sweep_sessions` removes an unfinished copy, except while this process is writing it (`Copies`).

The source of a fork may change meanwhile, but its log up to the fork's sequence does not, and each row follows from
that log. A row that changes before it is copied is left out, and a value of the state may be copied too late; after
everything was copied, `Past` names both, and they are corrected before the fork is visible. So it does not matter when
each row was copied, and the last transaction does not read the source again.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from typing import NamedTuple

from notecase import v1

from notecase_server import errors
from notecase_server.store import fold, past
from notecase_server.store.contract import Commit, Committed, Fork, Once, Past, Restore, Scope, SessionKey
from notecase_server.store.quotas import require_record, require_session
from notecase_server.store.sql.tables import Tables
from notecase_server.store.steps import FIRST_EPOCH, event_rows, existing, recall, remember, require_free
from notecase_server.store.tables import Batch, Piece, SessionRow

COPY_ROWS, COPY_BYTES = 500, 1 << 20
"""Rows of a copy that one transaction writes, and their bytes: few enough that commits wait for some milliseconds
only."""

BEGINNING = Piece(0)
"""Comes before all that a fork copies."""

Write = Callable[[Tables], None]
Row = tuple[int, Write]
"""The bytes of a row, and what writes it."""


class Copies:
    """The copies that this process is at; all others are left from one that has ended, or from a call that has."""

    def __init__(self) -> None:
        self._under_way: dict[Scope, tuple[str, asyncio.Event]] = {}

    @property
    def scopes(self) -> Collection[Scope]:
        """The states of the sessions that they are to become, as they are at each look."""
        return self._under_way.keys()

    @contextmanager
    def under_way(self, key: SessionKey, user: str) -> Iterator[None]:
        """Spares the copy `key`, of that user, within the block."""
        ended = asyncio.Event()
        self._under_way[key.state] = (user, ended)
        try:
            yield
        finally:
            del self._under_way[key.state]
            ended.set()

    async def end(self, tenant: str, user: str) -> None:
        """Waits until those of one user that are under way now have ended."""
        for scope, (whose, ended) in list(self._under_way.items()):
            if (scope.tenant, whose) == (tenant, user):
                await ended.wait()


class Whole(NamedTuple):
    """What the session of a fork needs besides the rows that were copied."""

    past: Past
    """As Fork.past; messages and entries are those that may not have been copied as they were."""
    log_bytes: int
    content_bytes: int


def begin_fork(tables: Tables, now: int, fork: Fork) -> None:
    """The first transaction of Store.fork."""
    recall(tables, fork.once)
    source = existing(tables, fork.source).session
    _begin(tables, fork.key, fork.once, source.user)
    if fork.past.version:
        tables.put_version(fork.key.state, fork.past.version)


def rows_to_copy(tables: Tables, fork: Fork, after: Piece) -> list[Piece]:
    """Returns what the next transaction copies, behind that piece; empty when everything was. Raises NotecaseError
    SESSION_NOT_FOUND, as `copy_rows` does, when the source is gone."""
    existing(tables, fork.source)
    at = fork.past.session.last_sequence
    return tables.rows_to_copy(fork.source, at, after, Batch(COPY_ROWS, COPY_BYTES))


def copy_rows(tables: Tables, now: int, fork: Fork, pieces: Sequence[Piece]) -> None:
    """One of the transactions of Store.fork."""
    existing(tables, fork.source)
    _require_begun(tables, fork.key)
    tables.copy_rows(fork.source, fork.key, fork.past.session.last_sequence, pieces)


def whole(tables: Tables, fork: Fork) -> Whole:
    """Reads what is left to be known once everything was copied. Raises NotecaseError SESSION_NOT_FOUND."""
    then, at = fork.past, fork.past.session.last_sequence
    if existing(tables, fork.source).session.last_sequence != then.head:
        then = past.read(tables, fork.source, at)
    return Whole(then, tables.log_bytes(fork.source, at), tables.content_bytes(fork.source, at))


def put_right(key: SessionKey, then: Past) -> Iterator[Row]:
    """Yields the rows that may not have been copied as they were."""
    for message in then.messages:
        yield message.ByteSize(), methodcaller("put_message", key, message)
    for name, entry in then.entries.items():
        size = entry.ByteSize() if entry is not None else 0
        yield size, methodcaller("put_entry", key.state, name, entry)


def finish_fork(tables: Tables, now: int, fork: Fork, whole: Whole) -> Committed:
    """The last transaction of Store.fork."""
    recall(tables, fork.once)
    source = existing(tables, fork.source).session
    _require_new(tables, fork.key, fork.once)
    _require_begun(tables, fork.key)
    then, at = whole.past, fork.past.session.last_sequence
    session = fold.new_session(fork.key, fork.session, now)
    session.user, session.parent_session, session.fork_sequence = source.user, fork.source.session, at
    session.last_sequence, session.active_run = at, then.session.active_run
    session.queued_commands.extend(then.session.queued_commands)
    session.summary_sequence = then.session.summary_sequence
    session.content_bytes = whole.content_bytes
    rows = fold.rows_of(then, session, FIRST_EPOCH)
    done = fold.apply(rows, Commit(key=fork.key, events=fork.events), now)
    session.log_bytes = whole.log_bytes + sum(event.ByteSize() for event in done.events)
    remember(tables, fork.once, done, now, fork.key)

    tables.bind_copy(fork.key, SessionRow(session, FIRST_EPOCH))
    tables.add_events(fork.key, event_rows(done.events))
    for message in rows.messages.values():
        tables.put_message(fork.key, message)
    for run in rows.runs.values():
        kept = tables.run(fork.source, run.name)
        assert kept is not None
        tables.add_run(fork.key, run, kept[1])
    return done


def begin_restore(tables: Tables, now: int, restore: Restore) -> None:
    """The first transaction of Store.restore."""
    recall(tables, restore.once)
    _begin(tables, restore.key, restore.once, restore.session.user)


def references(restore: Restore) -> Iterator[Row]:
    """Yields what holds the content of an imported session: it comes before all other rows."""
    for sha256, (sequence, size) in restore.blobs.items():
        yield 0, partial(_refer, key=restore.key, sha256=sha256, sequence=sequence, size=size)


def _refer(tables: Tables, key: SessionKey, sha256: str, sequence: int, size: int) -> None:
    row = tables.content.blob(key.tenant, sha256)
    if row is None:
        raise errors.not_found("blob", f"blobs/{sha256}")
    if row.size != size:
        raise errors.import_invalid(f"says that blobs/{sha256} has {size} bytes, but it has {row.size}")
    tables.refer(key.state, "", sha256, sequence)


def finish_restore(tables: Tables, now: int, restore: Restore, replayed: v1.Session) -> v1.Session:
    """The last transaction of Store.restore. `replayed` is what the log makes of the session."""
    key = restore.key
    recall(tables, restore.once)
    _require_new(tables, key, restore.once)
    _require_begun(tables, key)
    session = fold.new_session(key, restore.session, now)
    session.last_sequence, session.log_bytes = replayed.last_sequence, replayed.log_bytes
    session.summary_sequence = replayed.summary_sequence
    session.content_bytes = sum(size for _, size in restore.blobs.values())
    if restore.session.HasField("usage"):
        session.usage.CopyFrom(restore.session.usage)
    remember(tables, restore.once, session, now, key)
    tables.bind_copy(key, SessionRow(session, FIRST_EPOCH))
    return session


def batches(rows: Iterable[Row]) -> Iterator[list[Write]]:
    """Yields what each transaction writes of these rows."""
    writes, batch = list[Write](), Batch(COPY_ROWS, COPY_BYTES)
    for size, write in rows:
        if not batch.takes(size):
            yield writes
            writes, batch = [], Batch(COPY_ROWS, COPY_BYTES)
            batch.takes(size)
        writes.append(write)
    if writes:
        yield writes


def write_rows(tables: Tables, now: int, key: SessionKey, source: SessionKey | None, writes: Sequence[Write]) -> None:
    """One of the transactions of a copy. Raises NotecaseError SESSION_NOT_FOUND when its source is gone, and what a
    row raises."""
    if source is not None:
        existing(tables, source)
    _require_begun(tables, key)
    for write in writes:
        write(tables)


def _begin(tables: Tables, key: SessionKey, once: Once | None, user: str) -> None:
    _require_new(tables, key, once)
    tables.begin_copy(key, user)


def _require_new(tables: Tables, key: SessionKey, once: Once | None) -> None:
    """Checks the conditions of a new session: at the beginning, to avoid useless work, and at the end, where they
    count."""
    require_free(tables, key)
    require_record(tables, once)
    require_session(tables, key.tenant)


def _require_begun(tables: Tables, key: SessionKey) -> None:
    """Refuses to write rows that would never be removed: those of a copy whose caller went away, and which was swept
    before this transaction."""
    if not tables.is_copy(key):
        raise errors.not_found("session", f"sessions/{key.session}")

"""What the two SQL stores share: how a statement is written, and the words in which their databases differ.

A statement is written once for both. Its values are `$1`, `$2` …; its text is constant but for the shape of a filter,
so that a database prepares each once; values are always bound, and names of columns come from the contract's own
tuples.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from notecase import v1

from notecase_server.store.contract import And, Compare, Filter, Not, Or, Query, SessionKey
from notecase_server.store.fold import ENDED
from notecase_server.store.lists import Labelled
from notecase_server.store.stretches import marked
from notecase_server.store.tables import CommitRow, Kept, SessionRow

REWIND = """(SELECT CASE WHEN s.until > e.sequence THEN s.sequence END FROM stretches s
    WHERE s.tenant = e.tenant AND s.uid = e.uid AND s.after < e.sequence ORDER BY s.after DESC LIMIT 1)"""
"""The rewind that left a message behind, or NULL."""

CHANGED = "LEFT JOIN changed_messages c ON c.tenant = e.tenant AND c.uid = e.uid AND c.sequence = e.sequence"

MESSAGE = f"c.body AS own, CASE WHEN c.body IS NULL THEN e.body END AS event, {REWIND} AS rewind"
"""A message's own body, or where it has none the event's; and what marks it. `message_row` reads them."""

KEPT: Mapping[Kept, str] = {
    "requests": "SELECT count(*) FROM requests WHERE tenant = $1",
    "sessions": "SELECT count(*) FROM sessions WHERE tenant = $1",
    "agents": "SELECT count(DISTINCT agent) FROM known_revisions WHERE tenant = $1",
    "revisions": "SELECT count(*) FROM known_revisions WHERE tenant = $1 AND agent = $2",
    "keys": "SELECT count(*) FROM entries WHERE tenant = $1 AND kind = $2 AND id = $3",
    "uploads": "SELECT count(*) FROM uploads WHERE tenant = $1",
    "blob_bytes": """SELECT coalesce((SELECT sum(size) FROM blobs WHERE tenant = $1), 0)
        + coalesce((SELECT sum(size) FROM uploads WHERE tenant = $1 AND sha256 = ''), 0)""",
    "upload_bytes": "SELECT coalesce(sum(size), 0) FROM uploads WHERE tenant = $1 AND sha256 = ''",
}

OPERATORS = frozenset({"=", "!=", "<", ">", "<=", ">="})
"""Text compares by code point, which is the order of its UTF-8 bytes too."""

LABELS = "labels."

COMMITS = msgspec.json.Decoder(tuple[CommitRow, ...])


class Sql(ABC):
    """Carries out statements on one connection, within a transaction that its caller begins and ends."""

    store: ClassVar[str]
    """The table whose one row has the store's secret."""
    discarded: ClassVar[str]
    """Finds content that was given up, by its partial index."""
    by_owner: ClassVar[str] = ""
    """Stands behind the table of requests, where they are to be found by their owner."""
    for_update: ClassVar[str] = ""
    for_share: ClassVar[str] = ""
    """End a SELECT that locks its rows, where several transactions write at a time."""

    @abstractmethod
    def one(self, statement: str, *values: Any) -> Any:
        """Returns the first row, or None."""

    @abstractmethod
    def rows(self, statement: str, *values: Any) -> Iterable[Any]:
        """Returns all rows, which may be read as they are taken."""

    @abstractmethod
    def do(self, statement: str, *values: Any) -> int:
        """Returns how many rows were written."""

    @abstractmethod
    def remove(self, statement: str, *values: Any) -> int:
        """As `do`, of what must not be found in any journal of the store once it was scrubbed."""

    @abstractmethod
    def page(self, statement: str, order: str, values: Sequence[Any], limit: int) -> Iterable[Any]:
        """Returns at most `limit` rows of a statement without an order, as far as a page goes on. It selects their
        `size` last; more columns may follow."""

    @abstractmethod
    def read(self, value: Any) -> Any:
        """Returns a value of a row as it was bound: a database may keep texts in another form."""

    @abstractmethod
    def put(self, table: str, key: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        """Adds a row, or replaces the one of that key."""

    @abstractmethod
    def named(self, table: str, place: str, places: Sequence[str | int]) -> tuple[str, str, Sequence[Any]]:
        """Returns how to look rows of a table up by their `places`: what stands behind FROM, a condition, and values
        from $5 on."""

    @staticmethod
    @abstractmethod
    def labels(row: Labelled) -> str | None:
        """Returns the labels of a row as its column; None where there are none."""

    @abstractmethod
    def label(self, table: str, name: str, value: str, values: list[Any]) -> tuple[str, str]:
        """Returns a label of a row, or "", and what it is compared with, as SQL; binds both names in `values`."""

    def where(
        self,
        query: Query,
        columns: tuple[str, ...],
        places: tuple[str, ...],
        then: str,
        values: list[Any],
        table: str = "",
    ) -> str:
        """Returns the conditions of a page, to be put behind others; their values are added to `values`. A row behind
        a position compares `then` to it, by its `places`. `table` stands before columns, with its dot."""
        conditions = ""
        if query.after is not None:
            marks = ", ".join(bind(values, value) for value in query.after)
            conditions += f" AND ({', '.join(places)}) {then} ({marks})"
        if query.where is not None:
            conditions += f" AND {self._condition(query.where, columns, values, table)}"
        return conditions

    def _condition(self, where: Filter, columns: tuple[str, ...], values: list[Any], table: str) -> str:
        match where:
            case And(terms):
                return f"({' AND '.join(self._condition(term, columns, values, table) for term in terms) or 'true'})"
            case Or(terms):
                return f"({' OR '.join(self._condition(term, columns, values, table) for term in terms) or 'false'})"
            case Not(term):
                return f"NOT {self._condition(term, columns, values, table)}"
            case Compare(name, op, value):
                if op not in OPERATORS:
                    raise ValueError("a filter compares with an operator that does not exist")
                if name.startswith(LABELS):
                    label, other = self.label(table, name.removeprefix(LABELS), str(value), values)
                    return f"{label} {op} {other}"
                if name not in columns:
                    raise ValueError("a filter names a field that is not a column of its list")
                return f'{table}"{name}" {op} {bind(values, value)}'


def bind(values: list[Any], value: Any) -> str:
    """Binds one more value, and returns what stands for it."""
    values.append(value)
    return f"${len(values)}"


def marks(count: int, after: int = 0) -> str:
    """Returns what stands for so many values, behind the first `after`."""
    return ", ".join(f"${at}" for at in range(after + 1, after + count + 1))


def of(key: SessionKey) -> tuple[str, str]:
    """Returns what a session's rows begin with."""
    return key.tenant, key.uid


def is_unended(where: Filter | None) -> bool:
    """Whether a filter of runs holds only for such as have not ended."""
    match where:
        case Compare("state", "=", state):
            return state not in ENDED
        case And(terms):
            return any(map(is_unended, terms))
        case Or(terms):
            return all(map(is_unended, terms))
    return False


def session_row(body: bytes, epoch: int, commits: str | None) -> SessionRow:
    """Reads the columns of a session's row."""
    return SessionRow(v1.Session.FromString(body), epoch, COMMITS.decode(commits) if commits else ())


def commits_column(row: SessionRow) -> str | None:
    """Returns the commits that a session remembers as JSON; None where there are none."""
    return msgspec.json.encode(row.commits).decode() if row.commits else None


def expire_column(session: v1.Session) -> int | None:
    """Returns when a session expires, in microseconds; None where it does not."""
    return session.expire_time.ToMicroseconds() if session.HasField("expire_time") else None


def message_row(own: bytes | None, event: bytes | None, rewind: int | None) -> v1.Message:
    """Reads the columns of MESSAGE."""
    message = v1.Message.FromString(own) if own is not None else v1.Event.FromString(event or b"").message_added
    return marked(message, rewind)

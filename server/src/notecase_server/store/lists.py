"""What every store's lists share: which rows match a filter, and where a page ends."""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from notecase_server.store.contract import (
    ANSWER_BYTES,
    PAGE_BYTES,
    And,
    Compare,
    Filter,
    Not,
    Or,
    Page,
    microseconds,
)

T = TypeVar("T")

Position = tuple[str | int, ...]

OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}
"""They mean the same in SQL. Text compares by code point, which is the order of its UTF-8 bytes too."""

LABELS = "labels."


class Labelled(Protocol):
    """A session, an agent or a run."""

    @property
    def labels(self) -> Any: ...


class Found(NamedTuple, Generic[T]):
    """A row of a list, the position it has there, and its size in bytes."""

    position: Position
    row: T
    size: int


def take(found: Iterable[Found[T]], limit: int) -> Page[T]:
    """The page that begins with the first row found: it ends at `limit` or PAGE_BYTES, before a row that
    would take it beyond ANSWER_BYTES, and reads one row beyond."""
    rows: list[T] = []
    size = 0
    last: Position | None = None
    for each in found:
        if len(rows) == limit or size >= PAGE_BYTES or (rows and size + each.size > ANSWER_BYTES):
            return Page(rows, last, size)
        rows.append(each.row)
        size += each.size
        last = each.position
    return Page(rows, None, size)


def column(row: Any, name: str) -> str | int:
    """A field as lists compare it: a time in microseconds, everything else as it is."""
    value: str | int | Timestamp = getattr(row, name)
    return microseconds(value) if isinstance(value, Timestamp) else value


def check_column(name: str, columns: tuple[str, ...]) -> str:
    """The name, when it is a column; ValueError otherwise, since filters are checked at the edge."""
    if name not in columns:
        raise ValueError("a filter names a field that is no column of its list")
    return name


def matches(where: Filter | None, row: Any, columns: tuple[str, ...]) -> bool:
    """Whether a filter holds for a row, which is Labelled where the filter names labels."""
    match where:
        case None:
            return True
        case And(terms):
            return all(matches(term, row, columns) for term in terms)
        case Or(terms):
            return any(matches(term, row, columns) for term in terms)
        case Not(term):
            return not matches(term, row, columns)
        case Compare(name, op, value) if name.startswith(LABELS):
            return OPERATORS[op](row.labels.get(name.removeprefix(LABELS), ""), value)
        case Compare(name, op, value):
            return OPERATORS[op](column(row, check_column(name, columns)), value)

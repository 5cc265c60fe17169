"""What every store's lists share: the columns of their rows, and where a page ends."""

from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from notecase_server.store.contract import ANSWER_BYTES, PAGE_BYTES, Page, microseconds

T = TypeVar("T")

Position = tuple[str | int, ...]


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

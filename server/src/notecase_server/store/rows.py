"""The tables of a store as portable rows, so that a whole store can be copied to another kind of store and compared
with it.

A row is a tuple with the values of its table's columns, in their order: text (which may hold U+0000), an int, bytes, or
None. A boolean is 0 or 1, and labels are a tuple of pairs, ascending by key; no labels are None. Rows are in the order
of their keys: texts by their bytes in UTF-8.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple, Protocol

Row = tuple[Any, ...]


class Table(NamedTuple):
    """A table of a store; its columns begin with its key."""

    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]


def _table(name: str, key: str, others: str = "") -> Table:
    keys = tuple(key.split())
    return Table(name, keys, keys + tuple(others.split()))


TABLES = (
    _table("tenants", "tenant", "body"),
    _table("agents", "tenant agent", "revision display_name create_time update_time labels"),
    _table("revisions", "tenant agent revision", "body"),
    _table("deleted_agents", "tenant agent", "revision"),
    _table("keys", "key", "tenant create_time digest former body"),
    _table("principals", "tenant principal", "user subject role body"),
    _table("contents", "content", "discarded"),
    _table("chunks", "content start", "data"),
    _table("blobs", "tenant sha256", "content size upload_time"),
    _table("uploaders", "tenant sha256 subject"),
    _table("uploads", "tenant upload_id", "content size expire_time sha256"),
    _table(
        *("sessions", "tenant uid"),
        "session user agent activity display_name create_time update_time expire_time labels epoch commits body",
    ),
    _table("session_names", "tenant session", "uid"),
    _table("deleted_sessions", "tenant uid", "user"),
    _table("events", "tenant uid sequence", "tells_past message run step body"),
    _table("changed_messages", "tenant uid sequence", "update_sequence body"),
    _table("stretches", "tenant uid after", "until sequence back"),
    _table("calls", "tenant uid call_id", "message"),
    _table("runs", "tenant uid run", "state agent create_time labels first_sequence last_sequence digest body"),
    _table("active_runs", "tenant create_time uid run step", "deaths released revision"),
    _table("states", "tenant kind id", "version"),
    _table("entries", "tenant kind id key", "body"),
    _table("blob_references", "tenant kind id key sha256", "sequence"),
    _table("commands", "tenant uid command_id", "digest sequence run"),
    _table("requests", "tenant subject rpc request_id", "digest response about owner create_time"),
    _table("audit", "number", "tenant principal method resource outcome create_time body"),
)
"""Every table of a store but `store`, which has one row: its `Head`."""

UIDS = (
    *(("sessions", "uid", "true"), ("session_names", "uid", "true"), ("events", "uid", "true")),
    *(("changed_messages", "uid", "true"), ("stretches", "uid", "true"), ("calls", "uid", "true")),
    *(("runs", "uid", "true"), ("active_runs", "uid", "true"), ("commands", "uid", "true")),
    *(("states", "id", "kind = 'session'"), ("entries", "id", "kind = 'session'")),
    *(("blob_references", "id", "kind = 'session'"), ("requests", "owner", "true")),
)
"""Each table with rows of sessions, the column that holds the session's uid, and in which rows it does. An owner that
is a user is not a UUID."""


class Head(NamedTuple):
    """Data about the store itself."""

    secret: bytes
    """What page tokens are signed with; no other store has it, but for a copy."""
    keyed: bool
    """There was ever a key."""


class StoreRows(Protocol):
    """All rows of one store that no server has open. Raises StoreOpenError, whose text is for the operator, for
    everything that goes wrong."""

    async def head(self) -> Head: ...

    def rows(self, table: Table, after: Row | None = None) -> AsyncGenerator[Row, None]:
        """Yields the rows of a table in the order of their keys, all of them or those behind a key. Few are in memory
        at a time."""
        ...

    async def last_key(self, table: Table) -> Row | None:
        """Returns the key of the last row; None when there is no row."""
        ...

    async def begin_copy(self, source: bytes) -> None:
        """Marks the store as an unfinished copy of the source with that digest, which no server opens. Refuses a store
        that is not empty, unless it is marked so already."""
        ...

    async def load(self, table: Table, rows: Sequence[Row]) -> None:
        """Adds rows behind the last one, all of them or none, durably."""
        ...

    async def finish_copy(self, head: Head) -> None:
        """Makes the copy a store that can be served."""
        ...

    async def close(self) -> None: ...

"""The rows under a store as values; `sql.tables.Tables` reads and writes them, and `steps` decides what they hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from notecase import v1

from notecase_server.store.contract import RunRecord, Scope, SessionKey
from notecase_server.store.stretches import Stretch


class Recorded(NamedTuple):
    """What is remembered of a request that was carried out."""

    digest: bytes
    response: bytes | None
    """None after its subject was deleted."""
    about: str
    """The resource whose content the response holds: "sessions/{session}", "users/{user}", or empty for others."""
    owner: str
    """The uid of that session or the name of that user, as long as the response is there; or empty."""


class Applied(NamedTuple):
    """What is remembered of a command that was applied."""

    digest: bytes
    sequence: int
    run: str


class CommitRow(NamedTuple):
    """What is remembered of a commit."""

    commit_id: str
    first: int
    """The sequence of its first event."""
    last: int
    """Of its last one: one less than `first` when it had none."""


class Added(NamedTuple):
    """What a message that an event added is found by."""

    message: str
    run: str
    step: str = ""


class EventRow(NamedTuple):
    """An entry of the log as it is stored."""

    sequence: int
    tells_past: bool
    """See `fold.tells_past`."""
    message: Added | None
    body: bytes


class SessionRow(NamedTuple):
    """A session, and what is kept with it that no caller sees."""

    session: v1.Session
    epoch: int
    commits: tuple[CommitRow, ...] = ()
    """The newest commits, the oldest of them first."""


class BlobRow(NamedTuple):
    """Where content is, and how much."""

    content: int
    size: int


class UploadRow(NamedTuple):
    """Content under way, or complete once it has a digest."""

    content: int
    size: int
    expire_time: int
    sha256: str


class Batch:
    """What one transaction writes or removes: at most `rows` rows of `size` bytes together, or one row that is
    larger."""

    def __init__(self, rows: int, size: int) -> None:
        self._rows = rows
        self._size = size
        self.full = False
        """A row did not fit, or none will any more."""
        self.left = rows
        """Rows that fit still."""

    def takes(self, size: int) -> bool:
        """Counts a row in, if it fits."""
        if not self.full and (self.left == self._rows or size <= self._size):
            self.left -= 1
            self._size -= size
            self.full = not self.left
            return True
        self.full = True
        return False


class Piece(NamedTuple):
    """Rows of one table that a fork has of its source."""

    table: int
    """Its number in the order in which a fork is copied, from 0."""
    places: Sequence[str | int] = ()
    """Identifies the rows within their session, ascending."""


class DeletedAgent(NamedTuple):
    """An agent whose revisions up to that one are to be removed. Later ones are of an agent made anew."""

    tenant: str
    agent_id: str
    revision: int


RunPlace = tuple[int, str, str]
"""Where a run is among those of its tenant: its create_time, its session's uid and its id."""

FIRST_PLACE: RunPlace = (-1, "", "")
"""Before all of them."""

Kept = Literal["requests", "sessions", "agents", "revisions", "keys", "uploads", "blob_bytes", "upload_bytes"]


@dataclass(slots=True, kw_only=True)
class Changes:
    """What one commit writes, by table. A row is here once."""

    key: SessionKey
    session: SessionRow
    made: bool
    """The session is new."""
    expiry_moved: bool
    """The session was there, and its expire_time is another than before."""
    events: Sequence[EventRow]
    messages: Sequence[v1.Message]
    """New ones."""
    changed_messages: Sequence[v1.Message]
    calls: Mapping[str, str]
    """New ones, each with the id of its message."""
    runs: Sequence[tuple[v1.Run, RunRecord]]
    """New ones."""
    changed_runs: Sequence[tuple[v1.Run, bool]]
    """With whether the state is another than before."""
    ended: Sequence[str]
    """Runs that have ended, new ones among them."""
    deaths: Mapping[str, int]
    """Of runs that have not ended."""
    versions: Mapping[Scope, int]
    entries: Sequence[tuple[Scope, str, v1.StateEntry | None]]
    """Of the states with those versions. None is to be removed."""
    command: tuple[str, Applied] | None
    """By its id."""
    stretches: Sequence[Stretch] = ()
    references: Mapping[str, int] = field(default_factory=dict)
    """By digest, the first event of the log that refers to the blob."""

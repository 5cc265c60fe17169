"""Rows in the process's own memory: dicts of serialized bytes, so that nobody's changes reach them."""

from collections import defaultdict
from dataclasses import dataclass, field

from notecase import v1

from notecase_server.store.contract import Scope
from notecase_server.store.stretches import Stretch, marked, superseded_at
from notecase_server.store.tables import Applied, BlobRow, CommitRow, Recorded, UploadRow


@dataclass(slots=True)
class RunRow:
    body: bytes
    digest: bytes
    create_time: int
    agent: bytes | None
    """Until it has ended."""
    deaths: int = 0
    released: bool = False


@dataclass(slots=True)
class SessionRows:
    name: str
    body: bytes = b""
    epoch: int = 0
    create_time: int = 0
    commits: tuple[CommitRow, ...] = ()
    expire_time: int | None = None
    events: list[bytes] = field(default_factory=list)
    """Sequence 1 first."""
    messages: dict[str, bytes] = field(default_factory=dict)
    order: list[tuple[int, str, str]] = field(default_factory=list)
    """The sequence, id and run of each message, ascending."""
    stretches: list[Stretch] = field(default_factory=list)
    """Ascending."""
    changes: list[int] = field(default_factory=list)
    """The sequences of events that tell the past."""
    changed: dict[str, int] = field(default_factory=dict)
    """The last sequence that changed a message, by its id, for those that were changed at all."""
    runs: dict[str, RunRow] = field(default_factory=dict)
    started: list[tuple[int, str, str]] = field(default_factory=list)
    """The create_time, uid and id of each run, ascending."""
    calls: dict[str, str] = field(default_factory=dict)
    commands: dict[str, Applied] = field(default_factory=dict)

    def message(self, body: bytes) -> v1.Message:
        message = v1.Message.FromString(body)
        return marked(message, superseded_at(self.stretches, message.sequence))


@dataclass(slots=True)
class StateRows:
    version: int = 0
    entries: dict[str, bytes] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    """Ascending."""


@dataclass(slots=True)
class AgentRows:
    last_revision: int = 0
    revisions: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class BlobRows:
    row: BlobRow
    upload_time: int
    references: set[tuple[Scope, str]] = field(default_factory=set)
    uploaders: set[str] = field(default_factory=set)


@dataclass(slots=True)
class RequestRow:
    recorded: Recorded
    create_time: int


@dataclass(slots=True)
class TenantRows:
    sessions: dict[str, SessionRows] = field(default_factory=dict)
    """By uid."""
    deleted: dict[str, tuple[str, SessionRows]] = field(default_factory=dict)
    """By uid: the user of each session that does not exist, and the rows that it has all the same: what is left of a
    deleted one, or what is there of a copy."""
    names: dict[str, str] = field(default_factory=dict)
    """The uid of the session that has a name."""
    created: list[tuple[int, str]] = field(default_factory=list)
    """The create_time and uid of each session, ascending."""
    started: list[tuple[int, str, str]] = field(default_factory=list)
    """Of all runs: see SessionRows.started."""
    states: dict[tuple[str, str], StateRows] = field(default_factory=dict)
    agents: dict[str, AgentRows] = field(default_factory=dict)
    requests: dict[tuple[str, str, str], RequestRow] = field(default_factory=dict)
    """By subject, RPC and id."""
    blobs: dict[str, BlobRows] = field(default_factory=dict)
    uploads: dict[str, UploadRow] = field(default_factory=dict)
    principals: dict[str, bytes] = field(default_factory=dict)
    audit: list[tuple[int, v1.AuditEntry]] = field(default_factory=list)
    """By number."""
    references: defaultdict[tuple[Scope, str], dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    """By whom: the digests, each with the first event that refers to it."""

    def user_of(self, uid: str) -> str:
        """Returns the user of a session; empty where there is none."""
        row = self.sessions.get(uid)
        return v1.Session.FromString(row.body).user if row else ""

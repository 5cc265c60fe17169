"""The rows under a store, as plain reads and writes; `steps` decides what they hold.

A store that keeps its rows in another place implements `Tables`; what a commit or an edit means is written once.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from notecase import v1

from notecase_server.store.contract import ActiveRun, KeyRow, Once, Query, RunRecord, Scope, SessionKey, StepKey
from notecase_server.store.lists import Found
from notecase_server.store.stretches import Stretch


class Recorded(NamedTuple):
    """What is remembered of a request that was carried out."""

    digest: bytes
    response: bytes | None
    """None once what it told of was deleted."""
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
    """What tells the rows apart within their session, ascending."""


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


class Content(Protocol):
    """Uploads and blobs, with the pieces that they consist of."""

    def new_content(self) -> int:
        """A number under which content can be kept."""
        ...

    def add_chunk(self, content: int, start: int, data: bytes) -> None: ...

    def chunk(self, content: int, offset: int) -> bytes:
        """What follows from `offset` on in the piece that holds it; empty beyond the last."""
        ...

    def discard(self, content: int) -> None:
        """Gives content up; `delete_chunks` removes it."""
        ...

    def delete_chunks(self, limit: int) -> int:
        """Removes at most `limit` pieces of what was given up, and returns how many; content without any counts as a
        piece."""
        ...

    def blob(self, tenant: str, sha256: str) -> BlobRow | None: ...

    def blobs(self, tenant: str, query: Query) -> Iterator[Found[tuple[str, int]]]:
        """Digests and sizes."""
        ...

    def put_blob(self, tenant: str, subject: str, sha256: str, row: BlobRow, now: int) -> None:
        """Records that `subject` uploaded it, just now."""
        ...

    def knows_blob(self, tenant: str, sha256: str, subject: str, user: str) -> bool:
        """Whether that subject uploaded it, or a session or the state of that user refers to it."""
        ...

    def delete_blob(self, tenant: str, sha256: str, most: int) -> int:
        """Removes the records of at most `most` subjects that uploaded it, and, if those were fewer, the blob. Returns
        how many it removed."""
        ...

    def is_loose(self, tenant: str, sha256: str, before: int) -> bool:
        """Whether there is such a blob, last uploaded before that time, and nothing refers to it."""
        ...

    def loose_blobs(self, before: int, after: tuple[str, str], limit: int) -> list[tuple[str, str]]:
        """At most `limit` of those blobs by tenant and digest, ascending, after that one."""
        ...

    def upload(self, tenant: str, upload_id: str) -> UploadRow | None: ...

    def put_upload(self, tenant: str, upload_id: str, row: UploadRow) -> None: ...

    def delete_upload(self, tenant: str, upload_id: str) -> None: ...

    def expired_uploads(self, now: int, limit: int) -> list[tuple[str, str, UploadRow]]:
        """At most `limit` of them with tenant and id, in no order."""
        ...


class Directory(Protocol):
    """Keys, principals, tenants and the audit."""

    def key(self, key_id: str) -> KeyRow | None: ...

    def put_key(self, row: KeyRow) -> None:
        """Adds a key, or replaces it."""
        ...

    def delete_key(self, key_id: str) -> None: ...

    def keys(self, tenant: str, query: Query) -> Iterator[Found[v1.Key]]: ...

    def count_keys(self, tenant: str) -> int: ...

    def is_keyed(self) -> bool:
        """Whether there was ever a key."""
        ...

    def principal(self, tenant: str, name: str) -> v1.Principal | None: ...

    def principal_like(self, tenant: str, principal: v1.Principal) -> v1.Principal | None:
        """The one of that subject, role and user."""
        ...

    def add_principal(self, tenant: str, principal: v1.Principal) -> None: ...

    def delete_principals(self, tenant: str, user: str, limit: int) -> bool:
        """Removes at most `limit` that are bound to "users/{user}"; returns whether there were any."""
        ...

    def add_audit(self, tenant: str, entry: v1.AuditEntry) -> None: ...

    def audit(self, tenant: str, query: Query) -> Iterator[Found[v1.AuditEntry]]: ...

    def forget_audit(self, before: int, limit: int) -> int:
        """Drops at most `limit` entries made before that time, and returns how many it dropped."""
        ...

    def tenant(self, tenant: str) -> v1.Tenant | None: ...

    def put_tenant(self, tenant: str, row: v1.Tenant) -> None: ...

    def delete_tenant(self, tenant: str) -> None: ...

    def tenants(self, query: Query) -> Iterator[Found[v1.Tenant]]: ...

    def has_data(self, tenant: str) -> bool:
        """Whether the tenant has a session, a state, an agent, a blob or an upload."""
        ...


class Tables(Protocol):
    """Rows within one transaction: those of sessions, states and agents, and in two parts all others.

    What a read hands out is a copy; what is missing is None, 0 or nothing. The iterators of lists are lazy, in the
    order the contract gives the list, and hold what matches the query and comes after its position; they may go on
    beyond its limit. They end with the transaction.
    """

    @property
    def content(self) -> Content: ...

    @property
    def directory(self) -> Directory: ...

    def save(self, changes: Changes) -> None: ...

    def request(self, once: Once) -> Recorded | None: ...

    def add_request(self, once: Once, response: bytes, about: str, owner: str, now: int) -> None:
        """`owner` is the uid of the session, or the name of the user, with which the response goes; or empty."""
        ...

    def kept(self, kind: Kept, tenant: str, *within: str, more: int = 1) -> int:
        """How many there are, `within` an agent by its id for revisions, and within a state by kind and id for keys.
        "blob_bytes" are the bytes of blobs and of unfinished uploads, "upload_bytes" those of unfinished uploads alone.
        May return too large a number if that and `more` are within the quota."""
        ...

    def touch(self) -> None:
        """Writes something that was there before."""
        ...

    def forget_requests(self, before: int, batch: Batch) -> int:
        """Drops the records made before that time that the batch takes, and returns how many it dropped."""
        ...

    def command(self, key: SessionKey, command_id: str) -> Applied | None: ...

    def named_session(self, tenant: str, session: str) -> str:
        """The uid of the session that has this name, or empty."""
        ...

    def exists(self, tenant: str, uid: str) -> bool:
        """Whether there is such a session. Of one that there is not, there may be rows: those of a deleted one, or of a
        copy."""
        ...

    def session(self, key: SessionKey) -> SessionRow | None: ...

    def session_of_name(self, tenant: str, session: str) -> SessionRow | None:
        """The session that has this name."""
        ...

    def session_with_runs(self, key: SessionKey, runs: Collection[str]) -> tuple[SessionRow, dict[str, v1.Run]] | None:
        """A session with those of the named runs that exist, as `run` has them."""
        ...

    def put_session(self, key: SessionKey, row: SessionRow) -> None:
        """Replaces the row of one that exists; its user and create_time are as they were."""
        ...

    def delete_session(self, key: SessionKey) -> None:
        """Removes the row and the name of a session without records of runs, and records that everything else of it is
        to go."""
        ...

    def deleted_sessions(self, tenant: str | None, user: str, limit: int) -> list[Scope]:
        """The states of at most `limit` sessions that do not exist and may have rows, deleted ones and copies: of all,
        or, with a tenant, of one of its users ("users/{user}")."""
        ...

    def delete_rows(self, scope: Scope, batch: "Batch") -> bool:
        """Removes the rows of a deleted session, or of a user's state, that fit into the batch, and blanks the answers
        of requests about it; returns whether nothing is left of it."""
        ...

    def begin_copy(self, key: SessionKey, user: str) -> None:
        """Records that rows of the session `key` are about to be written although it does not exist: as those that a
        deletion leaves, they are to go unless `bind_copy` comes first. Nothing may ever have had this uid."""
        ...

    def is_copy(self, key: SessionKey) -> bool:
        """Whether there is such a record, or one that a deletion left."""
        ...

    def bind_copy(self, key: SessionKey, row: SessionRow) -> None:
        """Adds the session of a copy that was begun, with its name: the rows that were written are now its."""
        ...

    def rows_to_copy(self, source: SessionKey, at: int, after: Piece, batch: Batch) -> list[Piece]:
        """The next rows that a fork of `source` at sequence `at` has of it, behind `after`, as many as fit into the
        batch; empty at the end. Those are what its log refers to by then; its events up to there, and what rewinds had
        left behind; the messages added and runs ended by then that have not changed since; the calls of messages added
        by then; and the entries of its state as they are now. The one place that says what of each table a fork
        has."""
        ...

    def copy_rows(self, source: SessionKey, key: SessionKey, at: int, pieces: Sequence[Piece]) -> None:
        """Gives the copy `key` those of the rows that `rows_to_copy` would find still."""
        ...

    def expired(self, now: int, limit: int) -> list[SessionKey]:
        """Of all tenants, sessions whose expire_time is not after `now`; the earliest first."""
        ...

    def sessions(self, tenant: str, query: Query) -> Iterator[Found[v1.Session]]: ...

    def add_events(self, key: SessionKey, events: Sequence[EventRow]) -> None:
        """The messages that they add are to follow."""
        ...

    def events(self, key: SessionKey, after: int, limit: int) -> Iterator[Found[v1.Event]]: ...

    def changes(self, key: SessionKey, after: int, until: int) -> Iterator[v1.Event]:
        """The events after one sequence and up to another that `fold.tells_past`, in their order."""
        ...

    def last_stretch(self, key: SessionKey, before: int) -> Stretch | None:
        """The last that begins before that sequence. Messages are read as stretches leave them."""
        ...

    def add_stretches(self, key: SessionKey, stretches: Sequence[Stretch]) -> None:
        """Adds such as overlap with none."""
        ...

    def message(self, key: SessionKey, message: str) -> v1.Message | None:
        """Of a session, or of a copy."""
        ...

    def named_messages(self, tenant: str, names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], v1.Message]:
        """Those that exist of messages of many sessions, by the session's uid and the message's id, at one go."""
        ...

    def add_messages(self, key: SessionKey, messages: Sequence[v1.Message]) -> None:
        """Of messages whose events are added in the same transaction."""
        ...

    def put_message(self, key: SessionKey, message: v1.Message) -> None: ...

    def messages(
        self, key: SessionKey, query: Query, newest_first: bool, step: StepKey | None, superseded: bool
    ) -> Iterator[Found[v1.Message]]: ...

    def changed_messages(self, key: SessionKey, at: int) -> list[v1.Message]:
        """Those added up to that sequence and changed after it, but for what rewinds have done."""
        ...

    def messages_of_calls(self, key: SessionKey, calls: Collection[str]) -> dict[str, v1.Message]:
        """By call, the message that holds it: one object for all of its calls. Of those that exist."""
        ...

    def put_calls(self, key: SessionKey, calls: Mapping[str, str]) -> None:
        """By call, the id of the message that holds it."""
        ...

    def run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        """The run, `reply` by id and sequence only, and its digest."""
        ...

    def add_run(self, key: SessionKey, run: v1.Run, digest: bytes) -> None: ...

    def put_run(self, key: SessionKey, run: v1.Run, moved: bool) -> None:
        """`moved` says that its state is another than before."""
        ...

    def drop_record(self, key: SessionKey, run: str) -> None:
        """Makes it one of the others: it has ended, or its session is about to be deleted."""
        ...

    def runs(
        self, tenant: str, session: SessionKey | None, query: Query, user: str
    ) -> Iterator[tuple[SessionKey, Found[v1.Run]]]:
        """With the session of each; where `user` is set, of that user's sessions only."""
        ...

    def changed_runs(self, key: SessionKey, at: int) -> list[v1.Run]:
        """As `run` has them, those that began up to that sequence and went on after it."""
        ...

    def active_run(self, key: SessionKey, run: str) -> ActiveRun | None: ...

    def active_runs(self, after: ActiveRun | None, limit: int) -> list[ActiveRun]: ...

    def idle_runs(self) -> list[ActiveRun]: ...

    def put_record(self, key: SessionKey, run: str, deaths: int | None, released: bool) -> None:
        """Sets what is known of a run that has not ended; None leaves the deaths as they are. Else nothing."""
        ...

    def version(self, scope: Scope) -> int: ...

    def state(self, scope: Scope, keys: Collection[str]) -> tuple[int, dict[str, v1.StateEntry | None]]:
        """The version, and those of the keys that exist."""
        ...

    def put_version(self, scope: Scope, version: int) -> None:
        """Before the entries that it brings."""
        ...

    def put_entry(self, scope: Scope, key: str, entry: v1.StateEntry | None) -> None:
        """None removes it."""
        ...

    def entries(self, scope: Scope, query: Query) -> Iterator[Found[tuple[str, v1.StateEntry]]]:
        """With their keys."""
        ...

    def users_with_state(self, tenant: str, query: Query) -> Iterator[Found[str]]: ...

    def last_revision(self, tenant: str, agent_id: str) -> int:
        """The last number given out under this id, whether the agent still exists or not."""
        ...

    def agent(self, tenant: str, agent_id: str, revision: int) -> v1.Agent | None:
        """That revision, or with 0 the newest."""
        ...

    def start_of(self, tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        """Store.read_start, at one go."""
        ...

    def add_revision(self, tenant: str, agent_id: str, agent: v1.Agent) -> None:
        """Makes it the newest."""
        ...

    def delete_agent(self, tenant: str, agent_id: str) -> None:
        """Removes all but the last number, and records that the revisions are to go."""
        ...

    def deleted_agents(self, limit: int) -> list[DeletedAgent]:
        """At most `limit` of those that may have rows."""
        ...

    def retire_revisions(self, agent: DeletedAgent, after: RunPlace, batch: Batch) -> RunPlace | None:
        """Keeps the revisions of a deleted agent for those runs that have not ended and use them, as many runs of the
        tenant behind `after` as fit into the batch. Returns the place of the last one looked at, None at the end."""
        ...

    def delete_revisions(self, agent: DeletedAgent, batch: Batch) -> bool:
        """Removes the revisions of a deleted agent that the batch takes; returns whether none is left. No run needs
        them: all were looked at."""
        ...

    def agents(self, tenant: str, query: Query) -> Iterator[Found[v1.Agent]]: ...

    def revisions(self, tenant: str, agent_id: str, query: Query) -> Iterator[Found[v1.Agent]]: ...

    def refers(self, scope: Scope, key: str, sha256: str) -> bool: ...

    def content_bytes(self, key: SessionKey, until: int) -> int:
        """Of the blobs that a session's log refers to up to that sequence."""
        ...

    def log_bytes(self, key: SessionKey, until: int) -> int:
        """Of a session's events up to that sequence."""
        ...

    def refer(self, scope: Scope, key: str, sha256: str, sequence: int) -> None:
        """A session's log, with key "" and the first event that does, or an entry of another state with its key."""
        ...

    def drop_references(self, scope: Scope, key: str) -> None: ...

    def has_deleted_sessions(self, tenant: str) -> bool:
        """Whether rows of deleted sessions, or of copies, may be left."""
        ...

    def erase_rows(self, tenant: str, batch: Batch) -> None:
        """Removes the rows of the tenant outside of its sessions that the batch takes, its own row left out."""
        ...


def save_states(tables: Tables, changes: Changes) -> None:
    """Saves the versions and entries of states, the session's references to content, and how often its runs' workers
    have died, for a store that saves them row by row."""
    key = changes.key
    for name, deaths in changes.deaths.items():
        tables.put_record(key, name, deaths, released=False)
    for scope, version in changes.versions.items():
        tables.put_version(scope, version)
    for scope, name, entry in changes.entries:
        tables.put_entry(scope, name, entry)
    for sha256, sequence in changes.references.items():
        tables.refer(key.state, "", sha256, sequence)

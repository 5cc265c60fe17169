"""The contract between the engine and every store. `tests/store` has the one suite that every store passes.

The log is the truth; every other row is a fold over it (`fold`), kept for reading. Rows are `notecase.v1` messages in
*stored form*: within a session, runs and messages are named by bare ids, and a state by "", "user" or "app", so that a
session's rows mean the same under another name. `rpc` renders full names. A store returns copies, and does not keep
references to its arguments.

The key of a session's rows is its uid. Its name is a row that points to the uid: a session created later under the same
name shares nothing with it.

Time is a count of microseconds since 1970, UTC, from the clock the store was opened with. A tenant is part of every
key. Every method may raise NotecaseError STORE_UNAVAILABLE, after which nothing of the call was stored.
"""

import asyncio
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from notecase import v1

T = TypeVar("T")

Clock = Callable[[], int]

PAGE_BYTES = 1 << 20
"""A page of rows ends once it holds this much, so that no answer outgrows what a default gRPC client accepts (4 MiB);
the row that crosses the line is still part of the page."""

ANSWER_BYTES = 3 << 20
"""A row that would take its page beyond this begins the next one. A run with a reply and what it waits for may hold
this much by itself; every other row is at most PAGE_BYTES."""


class SessionKey(NamedTuple):
    """Identifies one session permanently, by its uid. `session`, the id in its name, is only for display."""

    tenant: str
    session: str
    uid: str

    @property
    def state(self) -> "Scope":
        """The session's own state."""
        return Scope(self.tenant, "session", self.uid)


def microseconds(time: Timestamp | Duration) -> int:
    """The microseconds of a time since 1970, or of a duration. Both are in range already: those of rows and requests
    were checked when they came."""
    return time.seconds * 1_000_000 + time.nanos // 1000


LAST_SECOND = 253_402_300_799
"""Of the year 9999, where protobuf's times end."""


CHUNK_BYTES = 256 << 10
"""Content lies in pieces of at most this much: a row each, and a read each."""


class StepKey(NamedTuple):
    """A step of a run, within its session. Each step has its own draft, calls and worker."""

    run: str
    step: str = ""
    """Empty for the run itself, which is the only step that there is yet."""


class Scope(NamedTuple):
    """One state: `("session", uid)`, `("user", id)` or `("app", "")`, within its tenant."""

    tenant: str
    kind: Literal["session", "user", "app"]
    id: str


class Answer(NamedTuple):
    """Says what of a write's result is answered, and so recorded: see `answers.of`."""

    kind: Literal[
        "nothing",
        "session",
        "run",
        "started",
        "entry",
        "state",
        "messages",
        "agent",
        "erased",
        "made_key",
        "rotated_key",
        "tenant",
    ]
    name: str = ""
    """The run's id, the state's whole name, or the entry's key."""
    erased: int = 0
    """How many sessions were erased before."""


class AuditRow(NamedTuple):
    """Tells who did something, in whose audit. The store sets create_time."""

    tenant: str
    """Whose it is; empty for what is the operators'."""
    entry: v1.AuditEntry


class Once(NamedTuple):
    """Makes a write idempotent: the record is part of the write's own transaction and outlives what the write made.
    It keeps no answer about deleted data: a repeat is then SESSION_NOT_FOUND, or an empty answer for an erased user's
    state.

    When `request_id` was recorded for this tenant, `subject` and `rpc` before, nothing is written: with the same
    `digest` the store raises Replayed with the recorded answer, with another it raises NotecaseError
    REQUEST_ID_REUSED. A write that fails records nothing.

    A write that changes no session has no Commit that could be looked up by its id: if its caller gave no request_id,
    the record has an id of the engine (`unnamed`)."""

    tenant: str
    subject: str
    """Who asks, within the tenant; empty where callers have no credentials."""
    rpc: str
    request_id: str
    digest: bytes
    """Of the request's body."""
    answer: Answer
    audit: AuditRow | None = None
    """Written with the record."""

    @classmethod
    def unnamed(cls, tenant: str, commit_id: str, answer: Answer) -> "Once":
        """The record of a write that its caller cannot repeat, so that a lost answer can be looked up."""
        return cls(tenant, "", "", commit_id, b"", answer)


class Replayed(Exception):
    """The request was carried out before; `response` is its serialized answer."""

    def __init__(self, response: bytes) -> None:
        super().__init__("replayed")
        self.response = response


class CommandId(NamedTuple):
    """Makes a commit take effect once per session: a repeat with the same digest raises Duplicate, with another
    NotecaseError REQUEST_ID_REUSED. Kept as long as the session's log."""

    command_id: str
    digest: bytes


class Duplicate(Exception):
    """The command was applied before: its commit ended at `sequence`, and `run` is the run its events belong to, the
    later one when it ended one run and started another."""

    def __init__(self, sequence: int, run: str) -> None:
        super().__init__("duplicate")
        self.sequence = sequence
        self.run = run


class RunRecord(NamedTuple):
    """Data of a run in addition to its row: `digest` permanently, empty for a run that was cancelled before its start;
    until the end of the run, the agent as it was at the start."""

    digest: bytes
    agent: v1.Agent


MAX_KEYS = 1000
"""Keys of one tenant, and of all operators: some for each program that calls, not one for each user."""

REMEMBERED_COMMITS = 8
"""Commits that a session's row remembers. A commit is asked about right after it was made, by the one process that
works on the session; so those of a few callers at once are enough."""


class Commit(NamedTuple):
    """Events that belong together: all of them become the log's next entries, with their effects, or nothing happens.

    Conditions are checked in the order of the fields below, against what is stored at that moment."""

    key: SessionKey
    id: str = ""
    """Made by the engine, and the same when the commit is made again because its answer was lost: one that is among the
    REMEMBERED_COMMITS newest of its session returns what it made, and nothing else is looked at. Empty: not
    remembered."""
    once: Once | None = None
    command: CommandId | None = None
    create: v1.Session | None = None
    """Creates the session first, under its name. ALREADY_EXISTS when another one has the name. Without it:
    SESSION_NOT_FOUND when there is no session of this uid."""
    if_epoch: int | None = None
    """OWNER_LOST when the session's epoch is another. Every commit of a run carries it."""
    claim: bool = False
    """Raises the session's epoch by 1 in the same transaction."""
    if_last_sequence: int | None = None
    """SEQUENCE_MISMATCH when the log's head is another."""
    if_state_version: Mapping[str, int] = MappingProxyType({})
    """By state, in stored form. STATE_VERSION_MISMATCH when the version of the whole state is another."""
    events: Sequence[v1.Event] = ()
    """Without sequence and create_time: the store sets both. `fold` says what each payload does and refuses."""
    content_limit: int | None = None
    """PAYLOAD_TOO_LARGE when the log would refer to blobs of more than so many bytes together, and to more than it did;
    checked last."""
    principal: str = ""
    """The caller that caused the events without a principal of their own: principals/{principal}, or empty."""
    audit: AuditRow | None = None
    """Written with the events."""
    start: RunRecord | None = None
    """With the event that makes a run: its start, its place in the queue, or its end when that came first."""
    deaths: int | None = None
    """What is to be known of the run that the events belong to when its process dies: ActiveRun.deaths. Unset: what
    was known stays."""
    newest: int = 0
    """How many messages to return as Committed.newest: few, since other commits wait meanwhile."""


@dataclass(slots=True)
class Committed:
    """What a commit made, in stored form."""

    session: v1.Session
    epoch: int
    events: list[v1.Event]
    """As committed: numbered, dated, state operations without their conditions and with the version they made."""
    runs: dict[str, v1.Run]
    """The rows of all runs the events belong to. `reply` holds the message's id and sequence only."""
    messages: dict[str, v1.Message]
    """The rows of all messages added or changed."""
    state: dict[Scope, v1.State]
    """Of each state changed: its version and the named keys that exist now."""
    newest: "Page[v1.Message] | None" = None
    """As list_messages returns them, newest first, right after this commit; None when none were asked for, and where a
    commit was made before."""


# ---- the past


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """A session as it was at one sequence: what has changed since, as it was then. All else is as it is now."""

    session: v1.Session
    """As then: last_sequence, active_run, queued_commands."""
    head: int
    """The log's head when this was read."""
    kept: int
    """The newest sequence up to that one which later rewinds left in force: the sequence itself, or where the furthest
    of those that went back beyond it went."""
    runs: Sequence[v1.Run]
    """Those that had not ended, in the order they came; `reply` by id and sequence only."""
    messages: Sequence[v1.Message]
    """Those that have changed since, and those that have a call open then, in their order."""
    version: int
    """Of the session's state."""
    entries: Mapping[str, v1.StateEntry | None]
    """Of the session's state, by key; None for a key that did not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A new session that begins with the log of another. Conditions are checked in the order of the fields below."""

    key: SessionKey
    """Of a uid that was never used."""
    once: Once | None = None
    source: SessionKey
    """Of the same tenant. SESSION_NOT_FOUND when it is gone."""
    past: Past
    """The source at the sequence where the fork leaves it."""
    session: v1.Session
    """What the caller chooses. ALREADY_EXISTS when another session has the name. The user is the source's."""
    events: Sequence[v1.Event] = ()
    """The events that end the runs of `past`: the first entries of the fork that are not copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """A whole session that was kept elsewhere: its log, of which the fold makes all rows. Conditions are checked in the
    order of the fields below."""

    key: SessionKey
    """As Fork.key."""
    once: Once | None = None
    session: v1.Session
    """Its metadata and usage. ALREADY_EXISTS when another session has the name."""
    blobs: Mapping[str, tuple[int, int]]
    """What the log refers to, by digest: its first event that does, and the size. BLOB_NOT_FOUND when one is missing,
    IMPORT_INVALID when it has another size."""
    events: Callable[[], Iterator[v1.Event]]
    """The log from sequence 1, read again at each call, so that it is never in memory as a whole. IMPORT_INVALID for
    one that `fold` refuses, and when a run has not ended by its end."""
    forgets: bool = False
    """Drops what runs remembered of answers."""


# ---- lists


class Compare(NamedTuple):
    """`field op value`. `field` is a column, or `labels.KEY`, where a missing label equals "". `value` is text, or an
    integer for times (microseconds) and enums (their number)."""

    field: str
    op: Literal["=", "!=", "<", ">", "<=", ">="]
    value: str | int


class And(NamedTuple):
    terms: tuple["Filter", ...]


class Or(NamedTuple):
    terms: tuple["Filter", ...]


class Not(NamedTuple):
    term: "Filter"


Filter = Compare | And | Or | Not

SESSION_COLUMNS = ("user", "agent", "activity", "display_name", "create_time", "update_time")
AGENT_COLUMNS = ("display_name", "create_time", "update_time")
RUN_COLUMNS = ("state", "agent", "create_time")
AUDIT_COLUMNS = ("principal", "method", "resource", "outcome", "create_time")
"""The fields by which a list of each can be filtered, besides labels. Agents and users have their full names
(`agents/a`)."""


class Query(NamedTuple):
    """One page: at most `limit` rows that match, strictly after the position `after` in the list's order."""

    limit: int
    after: tuple[str | int, ...] | None = None
    where: Filter | None = None


class Page(NamedTuple, Generic[T]):
    """Rows in order. `next` is the position of the last row when more follow, else None. Never empty with a next."""

    rows: list[T]
    next: tuple[str | int, ...] | None
    size: int = 0
    """Bytes of the rows as they are stored."""


class SessionEdit(NamedTuple):
    """A change of a session's metadata."""

    paths: tuple[str, ...]
    """The fields that change, as paths of a field mask: display_name, agent, labels, remembered. Remembered answers are
    only removed: those that `session` does not have, up to its last_sequence unless that is 0, and what they
    overruled."""
    session: v1.Session
    """What they become."""
    expiry: bool = False
    """When it expires changes too, to what `session` says of it: expire_time, ttl, idle_ttl."""


class ActiveRun(NamedTuple):
    """A run that has not ended, with what a takeover needs."""

    key: SessionKey
    run: v1.Run
    agent: v1.Agent
    epoch: int
    deaths: int = 0
    """How many processes died at work on it, one after the other, without a commit of the run since: see
    Commit.deaths."""
    released: bool = False
    """The process that was at work on it last has let go of it in good order."""


class Quotas(NamedTuple):
    """How much may be stored; 0 means no limit. A write beyond it is QUOTA_EXCEEDED, unless it is a repeat, which gets
    the first answer. Writes of a run are accepted, so that every run that has begun can end."""

    sessions: int = 0
    """Of a tenant, by name; those that have expired count until they are removed."""
    agents: int = 0
    """Of a tenant."""
    revisions: int = 0
    """Of an agent."""
    state_keys: int = 0
    """Of one state."""
    events: int = 0
    """Of a session's log; one commit may go beyond it."""
    log_bytes: int = 0
    """Of a session's log; one commit may go beyond it."""
    blob_bytes: int = 0
    """Of a tenant's content, with uploads under way; one piece of content may go beyond it."""
    uploads: int = 0
    """Of a tenant, under way or remembered."""
    requests: int = 0
    """Of a tenant: records of Once, those that the engine makes included."""


class KeyRow(NamedTuple):
    """A caller's key, as it is kept."""

    tenant: str
    """Empty for an operator's."""
    key_id: str
    key: v1.Key
    digest: bytes
    """SHA-256 of the key as it is sent."""
    former: bytes
    """The same for the secret before the last rotation; accepted until overlap_end_time."""


class StoreOpenError(Exception):
    """A store cannot be opened. Its text is for the operator: whole sentences that say what to do."""


class LogStore(Protocol):
    """Writes a session's log."""

    async def commit(self, commit: Commit) -> Committed:
        """Appends to a session's log, in one transaction, with all its effects: see Commit and `fold`. When it returns
        the commit is as durable as the store can make it. Commits of one session are numbered in the order they were
        made."""
        ...

    async def find_commit(self, key: SessionKey, commit_id: str) -> Committed | None:
        """What a commit made, if it is among the newest REMEMBERED_COMMITS of its session: asked when the answer was
        lost. The rows are as they are now, the events those of the commit. None where it was not made."""
        ...

    async def fork(self, fork: Fork) -> Committed:
        """Copies a session up to a sequence, and ends the runs that were active there: sequences, messages, ended runs
        and state are as they were then, in separate rows. Usage starts at 0; ids of requests and commands, remembered
        answers and queued commands are not copied. `events` are those of Fork only.

        Writes in transactions with a limited number of rows and bytes. The session is not visible until the last of
        them, which checks every condition again: until then the source may change, and is SESSION_NOT_FOUND when it is
        deleted. When a fork fails, is cancelled or its process dies, `sweep_sessions` removes what was written."""
        ...

    async def restore(self, restore: Restore) -> v1.Session:
        """Stores a session that was kept elsewhere, under whatever name. Its create_time is now. Writes as `fork`
        does."""
        ...


class History(Protocol):
    """Reads what one session holds."""

    async def get_session(self, key: SessionKey) -> v1.Session | None: ...

    async def read_events(self, key: SessionKey, after: int, limit: int = 1000) -> list[v1.Event]:
        """The events with sequences after + 1, after + 2, …: dense, at most `limit`, ending at PAGE_BYTES. Empty at the
        head, beyond it, and if there is no session."""
        ...

    async def read_past(self, key: SessionKey, at: int) -> Past:
        """The session as it was at that sequence. The cost is a read of the log from the first change since, and of the
        earlier changes of state if the state has changed. SESSION_NOT_FOUND; SEQUENCE_AHEAD beyond the head."""
        ...

    async def get_message(self, key: SessionKey, message: str) -> v1.Message | None: ...

    async def list_messages(
        self,
        key: SessionKey,
        query: Query,
        newest_first: bool = False,
        step: StepKey | None = None,
        superseded: bool = False,
    ) -> Page[v1.Message]:
        """By sequence, ascending unless `newest_first`; of one step when `step` is set; with the superseded ones on
        demand. Positions are (sequence,). `query.where` is ignored. Ends at PAGE_BYTES. Empty if there is no
        session."""
        ...


class RequestStore(Protocol):
    """Knows which requests and commands were carried out."""

    async def recall(self, once: Once | None) -> None:
        """Raises what a write would for a repeat: Replayed, or REQUEST_ID_REUSED. Returns when it is new, so that a
        caller recognises a repeat before it checks what may have changed since the first time, and when `once` is
        None."""
        ...

    async def recall_command(self, key: SessionKey, command: CommandId | None) -> None:
        """As `recall`, of a command: Duplicate, or REQUEST_ID_REUSED."""
        ...

    async def forget_requests(self, before: int) -> int:
        """Drops the records of Once made before that time; returns how many."""
        ...


class SessionStore(Protocol):
    """Finds, lists, edits and removes sessions."""

    async def find_session(self, tenant: str, session: str) -> v1.Session | None:
        """The session that has this name now; its `uid` makes the key."""
        ...

    async def find_session_key(self, tenant: str, session: str) -> tuple[SessionKey, str] | None:
        """The key and the user ("users/{user}" or empty) of the session that has this name now, also when its row is
        damaged."""
        ...

    async def session_keys(self, tenant: str, user: str, limit: int) -> list[SessionKey]:
        """At most `limit` sessions of a tenant, or of one of its users ("users/{user}"), in no order, also those whose
        rows are damaged."""
        ...

    async def list_sessions(self, tenant: str, query: Query) -> Page[v1.Session]:
        """The last created first; those of one microsecond by uid descending. Positions are (create_time, uid)."""
        ...

    async def edit_session(
        self, key: SessionKey, edit: SessionEdit, if_etag: str = "", once: Once | None = None
    ) -> v1.Session:
        """Changes metadata of the stored session; update_time and etag are the store's. Writes Once.audit only if a
        remembered answer was removed. SESSION_NOT_FOUND; ETAG_MISMATCH when `if_etag` is set and another."""
        ...

    async def delete_session(self, key: SessionKey, if_etag: str = "", once: Once | None = None) -> None:
        """Removes the session: from now on nothing of it is found, and its name is free. SESSION_NOT_FOUND,
        ETAG_MISMATCH. A commit that is under way for it either comes before or is refused. Its rows are removed by
        `sweep_sessions`, so this is one small transaction however long the log is. A session whose row is damaged is
        removed, too; no `if_etag` matches it."""
        ...

    async def expired_sessions(self, now: int, limit: int) -> list[SessionKey]:
        """Of all tenants, those whose expire_time has come by `now`: the longest expired first, at most `limit`."""
        ...

    async def expire_session(self, key: SessionKey) -> bool:
        """Like delete_session, if there is such a session and its expire_time has passed; returns whether it was
        deleted."""
        ...

    async def sweep_sessions(self, tenant: str | None = None, user: str = "") -> None:
        """Removes the rows of deleted sessions, and of abandoned forks and imports, in transactions with a limited
        number of rows and bytes: of all such sessions, or of those of one user of a tenant ("users/{user}"), in which
        case it first waits for running copies. When it fails or its process dies, the next call removes the rest. It
        may run twice at the same time."""
        ...

    async def erase_state(self, tenant: str, user: str, once: Once | None = None) -> bool:
        """Removes a user's state ("users/{user}"), the principals that are bound to the user, and the record of which
        blobs they uploaded, when there is no session of that user, nor a row of a deleted one. True when all of it is
        gone; then it is recorded. False when it is to be called again: a session is left, or there are more rows than
        one transaction removes."""
        ...


class RunStore(Protocol):
    """Reads runs, and knows which process may commit for one."""

    async def read_start(self, tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        """What the start of a run is about, at one moment: the session that has this id now, and the agent that is
        named so, with or without a revision; where `agent` is empty, the one that the session names."""
        ...

    async def get_run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        """The run, `reply` in full, and the digest it was started with."""
        ...

    async def list_runs(self, tenant: str, session: SessionKey | None, query: Query, user: str = "") -> Page[v1.Run]:
        """Of one session, or of all, or of all of a user ("users/{user}"): the last created first, those of one
        microsecond by session's uid and id descending. Positions are (create_time, uid, id). Ends at PAGE_BYTES.
        `reply` is in full, `name` is "sessions/{session}/runs/{run}" (this list alone can span sessions)."""
        ...

    async def active_run(self, key: SessionKey, run: str) -> ActiveRun | None:
        """The run with what a worker needs; None when it does not exist or has ended."""
        ...

    async def active_runs(self, after: ActiveRun | None = None, limit: int = 1 << 40) -> list[ActiveRun]:
        """At most `limit` runs that have not ended, of all tenants, ordered by tenant, create_time, uid and run; only
        those that follow `after`."""
        ...

    async def idle_runs(self) -> list[ActiveRun]:
        """The runs that should have a worker: each that is RUNNING, and the QUEUED ones of each session without an
        active run. In any order."""
        ...

    async def claim(self, key: SessionKey, epoch: int) -> int:
        """Raises the session's epoch from `epoch` and returns the new one; from then on every commit with an older one
        is refused. OWNER_LOST when it is not `epoch` any more, SESSION_NOT_FOUND when there is no session."""
        ...

    async def release_run(self, key: SessionKey, run: str) -> None:
        """Takes note that the process that was at work on a run lets go of it in good order, before its end. Of a run
        that has ended, or is gone with its session: nothing."""
        ...


class StateStore(Protocol):
    """Reads states, and writes those that no session's log records."""

    async def get_state(self, scope: Scope, keys: Sequence[str], at: int = 0) -> v1.State:
        """The named keys that exist, and the state's version. `name` is empty. A state without writes is empty at
        version 0. With `at`, only for a session's state: as it was at that sequence, folded again from the log; 0 means
        now. SESSION_NOT_FOUND; SEQUENCE_AHEAD beyond the head."""
        ...

    async def list_state(
        self, scope: Scope, query: Query, at: int = 0, keys: Sequence[str] = ()
    ) -> tuple[v1.State, Page[str]]:
        """A page of keys in ascending order of their UTF-8 bytes, as entries and in order: of all keys, or of those of
        `keys` that exist. Positions are (key,). `query.where` is not looked at. Ends at PAGE_BYTES. `at` as in
        get_state."""
        ...

    async def update_state(
        self, scope: Scope, ops: Sequence[v1.StateOp], if_version: int | None = None, once: Once | None = None
    ) -> v1.State:
        """Applies operations to a user's or the app's state, all or none, and returns what Committed.state would. A
        session's state changes by `commit` only. STATE_VERSION_MISMATCH, STATE_TYPE_MISMATCH as `fold.apply_ops`
        says."""
        ...


class AgentStore(Protocol):
    """Keeps agents, with their revisions."""

    async def create_agent(self, tenant: str, agent_id: str, agent: v1.Agent, once: Once | None = None) -> v1.Agent:
        """Stores `agent` as its next revision: 1, or one after the last of a deleted agent of that id. Sets name,
        revision, times and etag. ALREADY_EXISTS."""
        ...

    async def get_agent(self, tenant: str, agent_id: str, revision: int = 0) -> v1.Agent | None:
        """The newest revision, or that one; None where either does not exist (any more)."""
        ...

    async def list_agents(self, tenant: str, query: Query) -> Page[v1.Agent]:
        """The newest revisions by id ascending. Positions are (id,). Ends at PAGE_BYTES."""
        ...

    async def list_agent_revisions(self, tenant: str, agent_id: str, query: Query) -> Page[v1.Agent]:
        """Newest first. Positions are (revision,). Ends at PAGE_BYTES. Empty if there is no such agent."""
        ...

    async def edit_agent(
        self,
        tenant: str,
        agent_id: str,
        agent: v1.Agent,
        if_revision: int,
        once: Once | None = None,
    ) -> v1.Agent:
        """Stores `agent` as the revision after `if_revision`, 0 to create it; create_time stays. Returns the newest
        revision as it is, and makes none, when `agent` changes nothing in it. Sets the fields that create_agent sets.
        ETAG_MISMATCH when another revision is the newest, or none is."""
        ...

    async def delete_agent(self, tenant: str, agent_id: str, if_etag: str = "", once: Once | None = None) -> None:
        """Removes every revision, remembering only the last number. AGENT_NOT_FOUND, ETAG_MISMATCH.

        From then on no read finds any of them, and runs that use one have it until they end. Their rows are left to
        `sweep_agents`, so this is one small transaction however many revisions there are."""
        ...

    async def sweep_agents(self) -> None:
        """Removes the revisions of deleted agents, in transactions of a bounded number of rows and of bytes. When it
        fails or its process dies, the next call removes what is left. It may be called twice at once."""
        ...


class BlobStore(Protocol):
    """Keeps content, and uploads under way.

    A blob is named by its tenant and the SHA-256 of its bytes, in lower-case hexadecimal. Each commit or state that
    refers to a blob is refused with BLOB_NOT_FOUND when it is not there, is given its size, and holds on to it: a
    session by its log, until it is deleted; a user's or the app's state by its entries as they are. Each subject that
    uploaded a blob is recorded with it."""

    async def put_blob(self, tenant: str, subject: str, sha256: str, data: bytes, *, of_run: bool = False) -> None:
        """Stores content whole; what is there already counts as uploaded just now. The caller vouches for the
        digest. QUOTA_EXCEEDED, unless it is a run's."""
        ...

    async def get_blob(self, tenant: str, sha256: str) -> v1.Blob | None:
        """Name and size."""
        ...

    async def known_blobs(self, tenant: str, subject: str, user: str, digests: Collection[str]) -> set[str]:
        """Those of the blobs that the subject uploaded, or that a session or the state of that user ("users/{user}")
        refers to."""
        ...

    async def touch_blob(self, tenant: str, subject: str, sha256: str) -> v1.Blob | None:
        """As get_blob; the blob then counts as uploaded just now."""
        ...

    async def read_blob(self, tenant: str, sha256: str, offset: int) -> bytes:
        """From that byte to the end of the piece that holds it; empty at the end and beyond. BLOB_NOT_FOUND."""
        ...

    async def open_upload(self, tenant: str, upload_id: str, expire_time: int, size: int = 0) -> v1.Upload:
        """The upload of that id, made if there is none. One under way then lasts until `expire_time`. `size` is how
        many bytes it will have, 0 if that is not known. QUOTA_EXCEEDED when that is more than the tenant may store."""
        ...

    async def get_upload(self, tenant: str, upload_id: str) -> v1.Upload | None: ...

    async def add_chunk(self, tenant: str, upload_id: str, offset: int, data: bytes) -> None:
        """Appends to an upload; durable when it returns. UPLOAD_OFFSET_MISMATCH when the upload does not end at
        `offset`, or is complete. BLOB_NOT_FOUND when there is none, QUOTA_EXCEEDED when the tenant may store no
        more."""
        ...

    async def read_upload(self, tenant: str, upload_id: str, offset: int) -> bytes:
        """As read_blob, of an upload under way."""
        ...

    async def complete_upload(self, tenant: str, subject: str, upload_id: str, size: int, sha256: str) -> v1.Blob:
        """Makes the blob; the upload's id leads to it until it expires. UPLOAD_OFFSET_MISMATCH when the upload does not
        end at `size`, BLOB_NOT_FOUND when there is none. The caller vouches for the digest."""
        ...

    async def drop_upload(self, tenant: str, upload_id: str, if_bytes: int | None = None) -> None:
        """Forgets an upload under way, with its bytes. Does nothing if it is missing or complete, or if `if_bytes` is
        set and the upload has another number of bytes."""
        ...

    async def sweep_blobs(self, now: int, uploaded_before: int, held: Container[tuple[str, str]] = ()) -> int:
        """Removes the uploads that have expired, and the blobs that were last uploaded before that time and that
        nothing refers to; returns how many blobs. Those `held`, by tenant and digest, stay. In many small
        transactions."""
        ...


class KeyStore(Protocol):
    """Keeps callers' keys, which have one space of ids for all tenants."""

    async def add_key(self, row: KeyRow, once: Once | None = None) -> v1.Key:
        """Stores a new key, of an id that was never used, and sets its name and create_time. QUOTA_EXCEEDED when the
        tenant has MAX_KEYS, TENANT_NOT_FOUND while it is being deleted."""
        ...

    async def find_key(self, key_id: str) -> KeyRow | None:
        """The key of that id, of whatever tenant."""
        ...

    async def list_keys(self, tenant: str, query: Query) -> Page[v1.Key]:
        """The last created first, those of one microsecond by name descending. Positions are (create_time, name).
        `query.where` is not looked at."""
        ...

    async def rotate_key(
        self, tenant: str, key_id: str, digest: bytes, overlap: int, once: Once | None = None
    ) -> v1.Key:
        """Gives a key another digest, and takes the one before for `overlap` microseconds more. KEY_NOT_FOUND."""
        ...

    async def delete_key(self, tenant: str, key_id: str, once: Once | None = None) -> None:
        """KEY_NOT_FOUND."""
        ...

    async def is_keyed(self) -> bool:
        """Whether there was ever a key here."""
        ...


class PrincipalStore(Protocol):
    """Keeps who the principals are that events name."""

    async def know_principal(self, tenant: str, principal: v1.Principal) -> v1.Principal:
        """The principal of that subject, role and user; stored as it is given when there is none. create_time is the
        store's."""
        ...

    async def get_principal(self, tenant: str, principal_id: str) -> v1.Principal | None: ...


class AuditStore(Protocol):
    """Keeps who did what. Entries of writes are written by the writes themselves: Once.audit and Commit.audit."""

    async def add_audit(self, rows: Sequence[AuditRow]) -> None:
        """Adds entries in one transaction."""
        ...

    async def list_audit(self, tenant: str, query: Query) -> Page[v1.AuditEntry]:
        """The last written first. Positions are (number,), by which later entries have higher numbers."""
        ...

    async def forget_audit(self, before: int) -> int:
        """Removes the entries of all tenants that were written before that time, in transactions of a bounded number of
        rows; returns how many."""
        ...


class TenantStore(Protocol):
    """Stores the tenants that operators manage, lists their data, and removes them."""

    async def create_tenant(self, tenant: str, display_name: str, once: Once | None = None) -> v1.Tenant:
        """Makes a tenant known. ALREADY_EXISTS."""
        ...

    async def get_tenant(self, tenant: str) -> v1.Tenant | None: ...

    async def list_tenants(self, query: Query) -> Page[v1.Tenant]:
        """By name ascending. Positions are (name,). `query.where` is not looked at."""
        ...

    async def set_tenant_state(
        self, tenant: str, state: v1.Tenant.State.ValueType, once: Once | None = None
    ) -> v1.Tenant:
        """Changes the state of a known tenant. A tenant that is not known but has data becomes known when it is
        suspended. TENANT_NOT_FOUND otherwise. One that is being removed stays so."""
        ...

    async def list_user_states(self, tenant: str, query: Query) -> Page[str]:
        """The ids of the users that have a state, ascending. Positions are (user,). `query.where` is not looked at."""
        ...

    async def list_blobs(self, tenant: str, query: Query) -> Page[v1.Blob]:
        """Names and sizes, by digest ascending. Positions are (digest,). `query.where` is not looked at."""
        ...

    async def erase_tenant(self, tenant: str) -> bool:
        """Removes rows of a tenant that has no sessions, in one transaction of a bounded number of rows. True when all
        of it is gone, itself too. False when it is to be called again: rows are left, or a session, or rows of a
        deleted one."""
        ...


class Lease(Protocol):
    """Says whether this process is the owner of its store. What acts outside of the store, and would act twice if two
    processes took themselves for the owner, asks first."""

    @property
    def holds(self) -> bool:
        """Whether no other process can be the owner at this moment."""
        ...

    async def held(self) -> None:
        """Returns once it holds; never, when another process has become the owner."""
        ...

    async def lost(self) -> str:
        """Returns the name of another process once that has become the owner; empty where it is not known."""
        ...


class Unshared:
    """The lease of a store that no other process can own while this one lives."""

    holds = True

    async def held(self) -> None:
        """Returns at once."""

    async def lost(self) -> str:
        """Never returns."""
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never


class StoreLife(Protocol):
    """Says what a store is, and carries it to its end."""

    kind: str
    """As ServerInfo.store names it."""
    secret: bytes
    """32 random bytes made with the store, the same for each process that opens it: signs page tokens."""

    quotas: Quotas
    """May be set before the store is used."""

    @property
    def lease(self) -> Lease: ...

    async def probe(self) -> None:
        """Makes the least write that reaches the disk, and changes nothing; STORE_UNAVAILABLE when it is refused."""
        ...

    async def scrub(self) -> bool:
        """Removes data that was deleted before from all journals of the store. False when a reader prevents that: call
        it again. Costs nothing when nothing was deleted."""
        ...

    async def close(self) -> None:
        """Waits for commits under way, then lets go of everything. Afterwards every call raises STORE_UNAVAILABLE.
        Idempotent."""
        ...


class Store(
    LogStore,
    History,
    RequestStore,
    SessionStore,
    RunStore,
    StateStore,
    AgentStore,
    BlobStore,
    KeyStore,
    PrincipalStore,
    AuditStore,
    TenantStore,
    StoreLife,
    Protocol,
):
    """Keeps everything. Only what composes a server names the whole; all else asks for the parts that it uses."""

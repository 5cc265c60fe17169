"""The rows under a store, as plain reads and writes in SQL; `steps` decides what they hold.

Here is every read and write that both databases make in the same words. What a commit writes, and what the order of a
store's rows decides, each has for itself."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import structlog
from google.protobuf.message import DecodeError
from notecase import v1

from notecase_server.store.contract import (
    AGENT_COLUMNS,
    SESSION_COLUMNS,
    ActiveRun,
    Once,
    Query,
    Quotas,
    Scope,
    SessionKey,
    StepKey,
)
from notecase_server.store.lists import Found, column
from notecase_server.store.sql.content import SqlContent
from notecase_server.store.sql.directory import SqlDirectory
from notecase_server.store.sql.pieces import Pieces
from notecase_server.store.sql.statements import KEPT, REWIND, marks, message_row, of, session_row
from notecase_server.store.stretches import Stretch
from notecase_server.store.tables import (
    Applied,
    Batch,
    Changes,
    DeletedAgent,
    EventRow,
    Kept,
    Recorded,
    RunPlace,
    SessionRow,
)

log = structlog.get_logger()

ADD_REQUEST = """INSERT INTO requests (tenant, subject, rpc, request_id, digest, response, about, owner, create_time)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"""


class Tables(Pieces):
    """Rows within one transaction: those of sessions, states and agents, and in two parts all others.

    What a read hands out is a copy; what is missing is None, 0 or nothing. The iterators of lists are lazy, in the
    order the contract gives the list, and hold what matches the query and comes after its position; they may go on
    beyond its limit. They end with the transaction.
    """

    quotas: Quotas
    """What may be kept, for writes."""
    heads: ClassVar[str]
    """Has the body, epoch and commits of each session."""
    log: ClassVar[str]
    """Has the events, and perhaps rows of sessions behind them."""
    listed: ClassVar[str]
    """Has them with the columns of lists."""
    start: ClassVar[str]
    """Selects the bodies of the session of tenant $1 and name $2, and of the agent that $3 names, or if it is NULL the
    session: both as `agents/ID` or `agents/ID@REVISION`."""
    message_of: ClassVar[str]
    """Selects the sequence and MESSAGE of one message."""
    active: ClassVar[str]
    """Selects the runs `a` that have not ended, up to a condition: see `_active_run`."""
    every_active: ClassVar[str]
    """The same, for many of them."""
    idle: ClassVar[str]
    """The same, those that somebody should be at work on."""

    @abstractmethod
    def save(self, changes: Changes) -> None: ...

    @abstractmethod
    def touch(self) -> None:
        """Writes something that was there before."""

    @abstractmethod
    def session_with_runs(self, key: SessionKey, runs: Collection[str]) -> tuple[SessionRow, dict[str, v1.Run]] | None:
        """A session with those of the named runs that exist, as `run` has them."""

    @abstractmethod
    def put_session(self, key: SessionKey, row: SessionRow) -> None:
        """Replaces the row of one that exists; its user and create_time are as they were."""

    @abstractmethod
    def add_events(self, key: SessionKey, events: Sequence[EventRow]) -> None:
        """The messages that they add are to follow."""

    @abstractmethod
    def events(self, key: SessionKey, after: int, limit: int) -> Iterator[Found[v1.Event]]: ...

    @abstractmethod
    def changes(self, key: SessionKey, after: int, until: int) -> Iterator[v1.Event]:
        """The events after one sequence and up to another that `fold.tells_past`, in their order."""

    @abstractmethod
    def add_stretches(self, key: SessionKey, stretches: Sequence[Stretch]) -> None:
        """Adds such as overlap with none."""

    @abstractmethod
    def named_messages(self, tenant: str, names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], v1.Message]:
        """Those that exist of messages of many sessions, by the session's uid and the message's id, at one go."""

    @abstractmethod
    def put_message(self, key: SessionKey, message: v1.Message) -> None:
        """Of one that is another than its event added."""

    @abstractmethod
    def messages(
        self, key: SessionKey, query: Query, newest_first: bool, step: StepKey | None, superseded: bool
    ) -> Iterator[Found[v1.Message]]: ...

    @abstractmethod
    def messages_of_calls(self, key: SessionKey, calls: Collection[str]) -> dict[str, v1.Message]:
        """By call, the message that holds it: one object for all of its calls. Of those that exist."""

    @abstractmethod
    def put_calls(self, key: SessionKey, calls: Mapping[str, str]) -> None:
        """By call, the id of the message that holds it."""

    @abstractmethod
    def add_run(self, key: SessionKey, run: v1.Run, digest: bytes) -> None: ...

    @abstractmethod
    def put_run(self, key: SessionKey, run: v1.Run, moved: bool) -> None:
        """`moved` says that its state is another than before."""

    @abstractmethod
    def drop_record(self, key: SessionKey, run: str) -> None:
        """Makes it one of the others: it has ended, or its session is about to be deleted."""

    @abstractmethod
    def unended_runs(self, key: SessionKey) -> list[str]:
        """The runs of a session that have not ended, without a look at their rows."""

    @abstractmethod
    def runs(
        self, tenant: str, session: SessionKey | None, query: Query, user: str
    ) -> Iterator[tuple[SessionKey, Found[v1.Run]]]:
        """With the session of each; where `user` is set, of that user's sessions only."""

    @abstractmethod
    def put_record(self, key: SessionKey, run: str, deaths: int | None, released: bool) -> None:
        """Sets what is known of a run that has not ended; None leaves the deaths as they are. Else nothing."""

    @abstractmethod
    def state(
        self, scope: Scope, keys: Collection[str], values: Collection[str] | None = None
    ) -> tuple[int, dict[str, v1.StateEntry | None]]:
        """The version, and the entries of those of the keys that exist. If `values` is given, all others are empty, and
        are not read."""

    @abstractmethod
    def entry_bytes(self, scope: Scope, keys: Collection[str]) -> int:
        """How many bytes the entries of these keys have together."""

    @abstractmethod
    def put_version(self, scope: Scope, version: int) -> None:
        """Before the entries that it brings."""

    @abstractmethod
    def put_entry(self, scope: Scope, key: str, entry: v1.StateEntry | None) -> None:
        """None removes it."""

    @abstractmethod
    def refer(self, scope: Scope, key: str, sha256: str, sequence: int) -> None:
        """A session's log, with key "" and the first event that does, or an entry of another state with its key."""

    @cached_property
    def content(self) -> SqlContent:
        return SqlContent(self)

    @cached_property
    def directory(self) -> SqlDirectory:
        return SqlDirectory(self)

    def request(self, once: Once) -> Recorded | None:
        row = self.one(
            """SELECT digest, response, about, owner FROM requests
                WHERE tenant = $1 AND subject = $2 AND rpc = $3 AND request_id = $4""",
            *once[:4],
        )
        return Recorded(*row) if row else None

    def add_request(self, once: Once, response: bytes, about: str, owner: str, now: int) -> None:
        """`owner` is the uid of the session, or the name of the user, with which the response goes; or empty."""
        self.do(ADD_REQUEST, *once[:4], once.digest, response, about, owner, now)

    def kept(self, kind: Kept, tenant: str, *within: str, more: int = 1) -> int:
        """How many there are, `within` an agent by its id for revisions, and within a state by kind and id for keys.
        "blob_bytes" are the bytes of blobs and of unfinished uploads, "upload_bytes" those of unfinished uploads alone.
        May return too large a number if that and `more` are within the quota."""
        return int(self.one(KEPT[kind], tenant, *within)[0])

    def command(self, key: SessionKey, command_id: str) -> Applied | None:
        row = self.one(
            "SELECT digest, sequence, run FROM commands WHERE tenant = $1 AND uid = $2 AND command_id = $3",
            *(*of(key), command_id),
        )
        return Applied(*row) if row else None

    def named_session(self, tenant: str, session: str) -> str:
        """The uid of the session that has this name, or empty."""
        row = self.one("SELECT uid FROM session_names WHERE tenant = $1 AND session = $2", tenant, session)
        return str(row[0]) if row else ""

    def session_key(self, tenant: str, session: str) -> tuple[SessionKey, str] | None:
        row = self.one(
            """SELECT s.uid, s."user" FROM session_names n JOIN sessions s ON s.tenant = n.tenant AND s.uid = n.uid
                WHERE n.tenant = $1 AND n.session = $2""",
            *(tenant, session),
        )
        return (SessionKey(tenant, session, row[0]), row[1]) if row else None

    def session_keys(self, tenant: str, user: str, limit: int) -> list[SessionKey]:
        whose, values = (' AND "user" = $3', (user,)) if user else ("", ())
        # The order is that of an index, which no database then passes over for all sessions of the tenant.
        rows = self.rows(
            f"SELECT session, uid FROM sessions WHERE tenant = $1{whose} ORDER BY create_time, uid LIMIT $2",
            *(tenant, limit, *values),
        )
        return [SessionKey(tenant, session, uid) for session, uid in rows]

    def exists(self, tenant: str, uid: str) -> bool:
        """Whether there is such a session. Of one that there is not, there may be rows: those of a deleted one, or of a
        copy."""
        return self.one("SELECT 1 FROM sessions WHERE tenant = $1 AND uid = $2", tenant, uid) is not None

    def session(self, key: SessionKey) -> SessionRow | None:
        row = self.one(f"SELECT body, epoch, commits FROM {self.heads} WHERE tenant = $1 AND uid = $2", *of(key))
        return session_row(*row) if row else None

    def session_of_name(self, tenant: str, session: str) -> SessionRow | None:
        """The session that has this name."""
        row = self.one(
            f"""SELECT body, epoch, commits FROM {self.heads} WHERE tenant = $1
                AND uid = (SELECT uid FROM session_names WHERE tenant = $1 AND session = $2)""",
            *(tenant, session),
        )
        return session_row(*row) if row else None

    @abstractmethod
    def add_session(self, key: SessionKey, row: SessionRow) -> None:
        """Adds a session with its name."""

    def delete_session(self, key: SessionKey) -> None:
        """Removes the row and the name of a session without records of runs, and records that everything else of it is
        to go."""
        self.do(
            """INSERT INTO deleted_sessions (tenant, uid, "user") SELECT tenant, uid, "user" FROM sessions
                WHERE tenant = $1 AND uid = $2""",
            *of(key),
        )
        self.remove("DELETE FROM sessions WHERE tenant = $1 AND uid = $2", *of(key))
        self.do("DELETE FROM session_names WHERE tenant = $1 AND session = $2 AND uid = $3", *key)

    def deleted_sessions(self, tenant: str | None, user: str, limit: int) -> list[Scope]:
        """The states of at most `limit` sessions that do not exist and may have rows, deleted ones and copies: of all,
        or, with a tenant, of one of its users ("users/{user}")."""
        where, values = ("", ()) if tenant is None else (' WHERE tenant = $2 AND "user" = $3', (tenant, user))
        # Of a copy that is under way, a transaction that writes to it ends first: see is_copy.
        statement = f"SELECT tenant, uid FROM deleted_sessions{where} LIMIT $1{self.for_update}"
        return [Scope(tenant, "session", uid) for tenant, uid in self.rows(statement, limit, *values)]

    def has_deleted_sessions(self, tenant: str) -> bool:
        """Whether rows of deleted sessions, or of copies, may be left."""
        return self.one("SELECT 1 FROM deleted_sessions WHERE tenant = $1 LIMIT 1", tenant) is not None

    def begin_copy(self, key: SessionKey, user: str) -> None:
        """Records that rows of the session `key` are about to be written although it does not exist: as those that a
        deletion leaves, they are to go unless `bind_copy` comes first. Nothing may ever have had this uid."""
        self.do('INSERT INTO deleted_sessions (tenant, uid, "user") VALUES ($1, $2, $3)', *of(key), user)

    def is_copy(self, key: SessionKey) -> bool:
        """Whether there is such a record, or one that a deletion left."""
        statement = f"SELECT 1 FROM deleted_sessions WHERE tenant = $1 AND uid = $2{self.for_share}"
        return self.one(statement, *of(key)) is not None

    def bind_copy(self, key: SessionKey, row: SessionRow) -> None:
        """Adds the session of a copy that was begun, with its name: the rows that were written are now its."""
        self.do("DELETE FROM deleted_sessions WHERE tenant = $1 AND uid = $2", *of(key))
        self.add_session(key, row)

    def expired(self, now: int, limit: int) -> list[SessionKey]:
        """Of all tenants, sessions whose expire_time is not after `now`; the earliest first."""
        rows = self.rows(
            """SELECT tenant, session, uid FROM sessions WHERE expire_time <= $1
                ORDER BY expire_time, tenant, uid LIMIT $2""",
            *(now, limit),
        )
        return [SessionKey(*row) for row in rows]

    def sessions(self, tenant: str, query: Query) -> Iterator[Found[v1.Session]]:
        values = list[Any]([tenant])
        where = self.where(query, SESSION_COLUMNS, ("create_time", "uid"), "<", values)
        rows = self.page(
            f"""SELECT create_time, uid, session, "user", body, length(body) AS size FROM {self.listed}
                WHERE tenant = $1{where}""",
            *("create_time DESC, uid DESC", values, query.limit + 1),
        )
        for create_time, uid, session, user, body, size, *_ in rows:
            try:
                row = v1.Session.FromString(body)
            except DecodeError:  # listed by its columns, so that it can be found and deleted
                log.error("session_damaged", tenant=tenant, session=session)
                row = v1.Session(name=session, uid=uid, user=user)
                row.create_time.FromMicroseconds(create_time)
            yield Found((create_time, uid), row, size)

    def last_stretch(self, key: SessionKey, before: int) -> Stretch | None:
        """The last that begins before that sequence. Messages are read as stretches leave them."""
        row = self.one(
            """SELECT after, until, sequence, back FROM stretches WHERE tenant = $1 AND uid = $2 AND after < $3
                ORDER BY after DESC LIMIT 1""",
            *(*of(key), before),
        )
        return Stretch(*row) if row else None

    def message(self, key: SessionKey, message: str) -> v1.Message | None:
        """Of a session, or of a copy."""
        row = self.one(self.message_of, *of(key), message)
        return message_row(*row[1:4]) if row else None

    def _bounds(self, key: SessionKey, run: str) -> tuple[int, int]:
        """The first and the last event of a run: no message of it lies outside of them."""
        row = self.one(
            "SELECT first_sequence, last_sequence FROM runs WHERE tenant = $1 AND uid = $2 AND run = $3", *of(key), run
        )
        return (row[0], row[1]) if row else (0, 0)

    def changed_messages(self, key: SessionKey, at: int) -> list[v1.Message]:
        """Those added up to that sequence and changed after it, but for what rewinds have done."""
        rows = self.rows(
            f"""SELECT c.body, {REWIND} FROM changed_messages c
                JOIN events e ON e.tenant = c.tenant AND e.uid = c.uid AND e.sequence = c.sequence
                WHERE c.tenant = $1 AND c.uid = $2 AND c.sequence <= $3 AND c.update_sequence > $3""",
            *(*of(key), at),
        )
        return [message_row(own, None, rewind) for own, rewind in rows]

    def run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        """The run, `reply` by id and sequence only, and its digest."""
        row = self.one("SELECT body, digest FROM runs WHERE tenant = $1 AND uid = $2 AND run = $3", *of(key), run)
        return (v1.Run.FromString(row[0]), row[1]) if row else None

    def changed_runs(self, key: SessionKey, at: int) -> list[v1.Run]:
        """As `run` has them, those that began up to that sequence and went on after it."""
        rows = self.rows(
            """SELECT body FROM runs
                WHERE tenant = $1 AND uid = $2 AND first_sequence <= $3 AND last_sequence > $3""",
            *(*of(key), at),
        )
        return [v1.Run.FromString(body) for (body,) in rows]

    def active_run(self, key: SessionKey, run: str) -> ActiveRun | None:
        row = self.one(f"{self.active} AND a.tenant = $1 AND a.uid = $2 AND a.run = $3", *of(key), run)
        return self._active_run(*row) if row else None

    def active_runs(self, after: ActiveRun | None, limit: int) -> list[ActiveRun]:
        values = list[Any]()
        if after is not None:
            values += (after.key.tenant, column(after.run, "create_time"), after.key.uid, after.run.name)
        # An empty page is the last: one of which no run decodes is not handed out.
        while rows := self._active_after(values, limit):
            if found := list(self._readable(rows)):
                return found
            tenant, _, uid, *_, create_time, run = rows[-1]
            values = list(map(self.read, (tenant, create_time, uid, run)))
        return []

    def _active_after(self, values: Sequence[Any], limit: int) -> list[Any]:
        """At most `limit` rows in the order of active_runs, only those behind a place if `values` has one."""
        where = " AND (a.tenant, a.create_time, a.uid, a.run) > ($1, $2, $3, $4)" if values else ""
        order = "ORDER BY a.tenant, a.create_time, a.uid, a.run"
        return list(self.rows(f"{self.every_active}{where} {order} LIMIT {marks(1, len(values))}", *values, limit))

    def idle_runs(self) -> list[ActiveRun]:
        return list(self._readable(self.rows(self.idle)))

    def _active_run(
        self,
        tenant: str,
        session: str,
        uid: str,
        run: bytes,
        agent: bytes,
        epoch: int,
        deaths: int,
        released: int,
        *_: Any,
    ) -> ActiveRun:
        key = SessionKey(self.read(tenant), session, uid)
        return ActiveRun(key, v1.Run.FromString(run), v1.Agent.FromString(agent), epoch, deaths, bool(released))

    def _readable(self, rows: Iterable[Any]) -> Iterator[ActiveRun]:
        """The runs of these rows but those that do not decode: damage to one run does not keep the others from going
        on."""
        for row in rows:
            try:
                yield self._active_run(*row)
            except DecodeError:
                log.error("run_unreadable", tenant=row[0], session=row[1], uid=row[2])

    def version(self, scope: Scope) -> int:
        row = self.one("SELECT version FROM states WHERE tenant = $1 AND kind = $2 AND id = $3", *scope)
        return int(row[0]) if row else 0

    def entries(self, scope: Scope, query: Query) -> Iterator[Found[tuple[str, v1.StateEntry]]]:
        """With their keys."""
        # No key is empty, so the empty text comes before all.
        rows = self.page(
            """SELECT key, body, length(body) AS size FROM entries
                WHERE tenant = $1 AND kind = $2 AND id = $3 AND key > $4""",
            *("key", (*scope, *(query.after or ("",))), query.limit + 1),
        )
        for name, body, size, *_ in rows:
            key = self.read(name)
            yield Found((key,), (key, v1.StateEntry.FromString(body)), size)

    def users_with_state(self, tenant: str, query: Query) -> Iterator[Found[str]]:
        statement = "SELECT id FROM states WHERE tenant = $1 AND kind = 'user' AND id > $2 ORDER BY id LIMIT $3"
        for (user,) in self.rows(statement, tenant, *(query.after or ("",)), query.limit + 1):
            yield Found((user,), user, len(user))

    def refers(self, scope: Scope, key: str, sha256: str) -> bool:
        statement = """SELECT 1 FROM blob_references
            WHERE tenant = $1 AND kind = $2 AND id = $3 AND key = $4 AND sha256 = $5"""
        return self.one(statement, *scope, key, sha256) is not None

    def drop_references(self, scope: Scope, key: str) -> None:
        self.do("DELETE FROM blob_references WHERE tenant = $1 AND kind = $2 AND id = $3 AND key = $4", *scope, key)

    def content_bytes(self, key: SessionKey, until: int) -> int:
        """Of the blobs that a session's log refers to up to that sequence."""
        row = self.one(
            """SELECT coalesce(sum(b.size), 0) FROM blob_references r
                JOIN blobs b ON b.tenant = r.tenant AND b.sha256 = r.sha256
                WHERE r.tenant = $1 AND r.kind = 'session' AND r.id = $2 AND r.key = '' AND r.sequence <= $3""",
            *(*of(key), until),
        )
        return int(row[0])

    def log_bytes(self, key: SessionKey, until: int) -> int:
        """Of a session's events up to that sequence."""
        row = self.one(
            f"SELECT coalesce(sum(length(body)), 0) FROM {self.log} WHERE tenant = $1 AND uid = $2 AND sequence <= $3",
            *(*of(key), until),
        )
        return int(row[0])

    def last_revision(self, tenant: str, agent_id: str) -> int:
        """The last number given out under this id, whether the agent still exists or not."""
        row = self.one("SELECT revision FROM agents WHERE tenant = $1 AND agent = $2", tenant, agent_id)
        return int(row[0]) if row else 0

    def agent(self, tenant: str, agent_id: str, revision: int) -> v1.Agent | None:
        """That revision, or with 0 the newest."""
        row = self.one(
            """SELECT body FROM known_revisions WHERE tenant = $1 AND agent = $2 AND revision = coalesce(
                nullif($3, CAST(0 AS bigint)), (SELECT revision FROM agents WHERE tenant = $1 AND agent = $2))""",
            *(tenant, agent_id, revision),
        )
        return v1.Agent.FromString(row[0]) if row else None

    def start_of(self, tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        """Store.read_start, at one go."""
        row, revision = self.one(self.start, tenant, session, agent or None)
        return v1.Session.FromString(row) if row else None, v1.Agent.FromString(revision) if revision else None

    def add_revision(self, tenant: str, agent_id: str, agent: v1.Agent) -> None:
        """Makes it the newest."""
        columns = {name: column(agent, name) for name in AGENT_COLUMNS}
        newest = {"revision": agent.revision, **columns, "labels": self.labels(agent)}
        self.put("agents", {"tenant": tenant, "agent": agent_id}, newest)
        self.do(
            "INSERT INTO revisions (tenant, agent, revision, body) VALUES ($1, $2, $3, $4)",
            *(tenant, agent_id, agent.revision, agent_body(agent)),
        )

    def delete_agent(self, tenant: str, agent_id: str) -> None:
        """Removes all but the last number, and records that the revisions are to go."""
        self.do(
            """INSERT INTO deleted_agents (tenant, agent, revision) SELECT tenant, agent, revision FROM agents
                WHERE tenant = $1 AND agent = $2
                ON CONFLICT (tenant, agent) DO UPDATE SET revision = excluded.revision""",
            *(tenant, agent_id),
        )
        self.do("UPDATE agents SET display_name = '', labels = NULL WHERE tenant = $1 AND agent = $2", tenant, agent_id)

    def deleted_agents(self, limit: int) -> list[DeletedAgent]:
        """At most `limit` of those that may have rows."""
        rows = self.rows("SELECT tenant, agent, revision FROM deleted_agents ORDER BY tenant, agent LIMIT $1", limit)
        return [DeletedAgent(*row) for row in rows]

    def retire_revisions(self, agent: DeletedAgent, after: RunPlace, batch: Batch) -> RunPlace | None:
        """Keeps the revisions of a deleted agent for those runs that have not ended and use them, as many runs of the
        tenant after `after` as fit into the batch. Returns the place of the last one looked at, None at the end."""
        return None  # a run has its agent with it

    def agents(self, tenant: str, query: Query) -> Iterator[Found[v1.Agent]]:
        values = list[Any]([tenant])
        where = self.where(query, AGENT_COLUMNS, ("a.agent",), ">", values, "a.")
        rows = self.page(
            f"""SELECT a.agent AS agent, r.body, length(r.body) AS size FROM agents a
                JOIN known_revisions r ON r.tenant = a.tenant AND r.agent = a.agent AND r.revision = a.revision
                WHERE a.tenant = $1{where}""",
            *("agent", values, query.limit + 1),
        )
        for agent_id, body, size, *_ in rows:
            yield Found((agent_id,), v1.Agent.FromString(body), size)

    def revisions(self, tenant: str, agent_id: str, query: Query) -> Iterator[Found[v1.Agent]]:
        values = list[Any]([tenant, agent_id])
        where = self.where(query._replace(where=None), (), ("revision",), "<", values)
        rows = self.page(
            f"""SELECT revision, body, length(body) AS size FROM known_revisions
                WHERE tenant = $1 AND agent = $2{where}""",
            *("revision DESC", values, query.limit + 1),
        )
        for revision, body, size, *_ in rows:
            yield Found((revision,), v1.Agent.FromString(body), size)


def agent_body(agent: v1.Agent) -> bytes:
    """Returns an agent as it is stored: the same bytes for the same agent."""
    return agent.SerializeToString(deterministic=True)

"""Sessions, runs, states and agents in SQL: every read and write that both SQL stores make in the same words. What a
commit writes, and what the order of a store's rows decides, each has for itself."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import structlog
from google.protobuf.message import DecodeError
from notecase import v1

from notecase_server.store import sql_pieces
from notecase_server.store.contract import (
    AGENT_COLUMNS,
    SESSION_COLUMNS,
    ActiveRun,
    Once,
    Query,
    Scope,
    SessionKey,
)
from notecase_server.store.lists import Found, column
from notecase_server.store.sql import KEPT, REWIND, Sql, marks, message_row, of, session_row
from notecase_server.store.sql_content import SqlContent
from notecase_server.store.sql_directory import SqlDirectory
from notecase_server.store.sql_pieces import Copied, Rows, TenantRows
from notecase_server.store.stretches import Stretch
from notecase_server.store.tables import Applied, Batch, DeletedAgent, Kept, Piece, Recorded, RunPlace, SessionRow

log = structlog.get_logger()

ADD_REQUEST = """INSERT INTO requests (tenant, subject, rpc, request_id, digest, response, about, owner, create_time)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"""


class SqlTables(Sql):
    """Tables in SQL, but for what a store adds."""

    heads: ClassVar[str]
    """Has the body, epoch and commits of each session."""
    log: ClassVar[str]
    """Has the events, and perhaps rows of sessions behind them."""
    listed: ClassVar[str]
    """Has them with the columns of lists."""
    session_rows: ClassVar[Sequence[Rows]]
    tenant_rows: ClassVar[Sequence[TenantRows]]
    copies: ClassVar[Sequence[Copied]]
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
        self.do(ADD_REQUEST, *once[:4], once.digest, response, about, owner, now)

    def kept(self, kind: Kept, tenant: str, *within: str, more: int = 1) -> int:
        return int(self.one(KEPT[kind], tenant, *within)[0])

    def forget_requests(self, before: int, batch: Batch) -> int:
        return sql_pieces.forget_requests(self, before, batch)

    def command(self, key: SessionKey, command_id: str) -> Applied | None:
        row = self.one(
            "SELECT digest, sequence, run FROM commands WHERE tenant = $1 AND uid = $2 AND command_id = $3",
            *(*of(key), command_id),
        )
        return Applied(*row) if row else None

    def named_session(self, tenant: str, session: str) -> str:
        row = self.one("SELECT uid FROM session_names WHERE tenant = $1 AND session = $2", tenant, session)
        return str(row[0]) if row else ""

    def exists(self, tenant: str, uid: str) -> bool:
        return self.one("SELECT 1 FROM sessions WHERE tenant = $1 AND uid = $2", tenant, uid) is not None

    def session(self, key: SessionKey) -> SessionRow | None:
        row = self.one(f"SELECT body, epoch, commits FROM {self.heads} WHERE tenant = $1 AND uid = $2", *of(key))
        return session_row(*row) if row else None

    def session_of_name(self, tenant: str, session: str) -> SessionRow | None:
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
        self.do(
            """INSERT INTO deleted_sessions (tenant, uid, "user") SELECT tenant, uid, "user" FROM sessions
                WHERE tenant = $1 AND uid = $2""",
            *of(key),
        )
        self.remove("DELETE FROM sessions WHERE tenant = $1 AND uid = $2", *of(key))
        self.do("DELETE FROM session_names WHERE tenant = $1 AND session = $2 AND uid = $3", *key)

    def deleted_sessions(self, tenant: str | None, user: str, limit: int) -> list[Scope]:
        where, values = ("", ()) if tenant is None else (' WHERE tenant = $2 AND "user" = $3', (tenant, user))
        # Of a copy that is under way, a transaction that writes to it ends first: see is_copy.
        statement = f"SELECT tenant, uid FROM deleted_sessions{where} LIMIT $1{self.for_update}"
        return [Scope(tenant, "session", uid) for tenant, uid in self.rows(statement, limit, *values)]

    def has_deleted_sessions(self, tenant: str) -> bool:
        return self.one("SELECT 1 FROM deleted_sessions WHERE tenant = $1 LIMIT 1", tenant) is not None

    def delete_rows(self, scope: Scope, batch: Batch) -> bool:
        return sql_pieces.delete_rows(self, self.session_rows, scope, batch)

    def erase_rows(self, tenant: str, batch: Batch) -> None:
        sql_pieces.erase_rows(self, self.tenant_rows, tenant, batch)

    def begin_copy(self, key: SessionKey, user: str) -> None:
        self.do('INSERT INTO deleted_sessions (tenant, uid, "user") VALUES ($1, $2, $3)', *of(key), user)

    def is_copy(self, key: SessionKey) -> bool:
        statement = f"SELECT 1 FROM deleted_sessions WHERE tenant = $1 AND uid = $2{self.for_share}"
        return self.one(statement, *of(key)) is not None

    def bind_copy(self, key: SessionKey, row: SessionRow) -> None:
        self.do("DELETE FROM deleted_sessions WHERE tenant = $1 AND uid = $2", *of(key))
        self.add_session(key, row)

    def rows_to_copy(self, source: SessionKey, at: int, after: Piece, batch: Batch) -> list[Piece]:
        return sql_pieces.rows_to_copy(self, self.copies, source, at, after, batch)

    def copy_rows(self, source: SessionKey, key: SessionKey, at: int, pieces: Sequence[Piece]) -> None:
        sql_pieces.copy_rows(self, self.copies, source, key, at, pieces)

    def expired(self, now: int, limit: int) -> list[SessionKey]:
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
            f"SELECT create_time, uid, body, length(body) AS size FROM {self.listed} WHERE tenant = $1{where}",
            *("create_time DESC, uid DESC", values, query.limit + 1),
        )
        for create_time, uid, body, size, *_ in rows:
            yield Found((create_time, uid), v1.Session.FromString(body), size)

    def last_stretch(self, key: SessionKey, before: int) -> Stretch | None:
        row = self.one(
            """SELECT after, until, sequence, back FROM stretches WHERE tenant = $1 AND uid = $2 AND after < $3
                ORDER BY after DESC LIMIT 1""",
            *(*of(key), before),
        )
        return Stretch(*row) if row else None

    def message(self, key: SessionKey, message: str) -> v1.Message | None:
        row = self.one(self.message_of, *of(key), message)
        return message_row(*row[1:4]) if row else None

    def _bounds(self, key: SessionKey, run: str) -> tuple[int, int]:
        """The first and the last event of a run: no message of it lies outside of them."""
        row = self.one(
            "SELECT first_sequence, last_sequence FROM runs WHERE tenant = $1 AND uid = $2 AND run = $3", *of(key), run
        )
        return (row[0], row[1]) if row else (0, 0)

    def changed_messages(self, key: SessionKey, at: int) -> list[v1.Message]:
        rows = self.rows(
            f"""SELECT c.body, {REWIND} FROM changed_messages c
                JOIN events e ON e.tenant = c.tenant AND e.uid = c.uid AND e.sequence = c.sequence
                WHERE c.tenant = $1 AND c.uid = $2 AND c.sequence <= $3 AND c.update_sequence > $3""",
            *(*of(key), at),
        )
        return [message_row(own, None, rewind) for own, rewind in rows]

    def run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        row = self.one("SELECT body, digest FROM runs WHERE tenant = $1 AND uid = $2 AND run = $3", *of(key), run)
        return (v1.Run.FromString(row[0]), row[1]) if row else None

    def changed_runs(self, key: SessionKey, at: int) -> list[v1.Run]:
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
        row = self.one(
            """SELECT coalesce(sum(b.size), 0) FROM blob_references r
                JOIN blobs b ON b.tenant = r.tenant AND b.sha256 = r.sha256
                WHERE r.tenant = $1 AND r.kind = 'session' AND r.id = $2 AND r.key = '' AND r.sequence <= $3""",
            *(*of(key), until),
        )
        return int(row[0])

    def log_bytes(self, key: SessionKey, until: int) -> int:
        row = self.one(
            f"SELECT coalesce(sum(length(body)), 0) FROM {self.log} WHERE tenant = $1 AND uid = $2 AND sequence <= $3",
            *(*of(key), until),
        )
        return int(row[0])

    def last_revision(self, tenant: str, agent_id: str) -> int:
        row = self.one("SELECT revision FROM agents WHERE tenant = $1 AND agent = $2", tenant, agent_id)
        return int(row[0]) if row else 0

    def agent(self, tenant: str, agent_id: str, revision: int) -> v1.Agent | None:
        row = self.one(
            """SELECT body FROM known_revisions WHERE tenant = $1 AND agent = $2 AND revision = coalesce(
                nullif($3, CAST(0 AS bigint)), (SELECT revision FROM agents WHERE tenant = $1 AND agent = $2))""",
            *(tenant, agent_id, revision),
        )
        return v1.Agent.FromString(row[0]) if row else None

    def start_of(self, tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        row, revision = self.one(self.start, tenant, session, agent or None)
        return v1.Session.FromString(row) if row else None, v1.Agent.FromString(revision) if revision else None

    def add_revision(self, tenant: str, agent_id: str, agent: v1.Agent) -> None:
        columns = {name: column(agent, name) for name in AGENT_COLUMNS}
        newest = {"revision": agent.revision, **columns, "labels": self.labels(agent)}
        self.put("agents", {"tenant": tenant, "agent": agent_id}, newest)
        self.do(
            "INSERT INTO revisions (tenant, agent, revision, body) VALUES ($1, $2, $3, $4)",
            *(tenant, agent_id, agent.revision, agent_body(agent)),
        )

    def delete_agent(self, tenant: str, agent_id: str) -> None:
        self.do(
            """INSERT INTO deleted_agents (tenant, agent, revision) SELECT tenant, agent, revision FROM agents
                WHERE tenant = $1 AND agent = $2
                ON CONFLICT (tenant, agent) DO UPDATE SET revision = excluded.revision""",
            *(tenant, agent_id),
        )
        self.do("UPDATE agents SET display_name = '', labels = NULL WHERE tenant = $1 AND agent = $2", tenant, agent_id)

    def deleted_agents(self, limit: int) -> list[DeletedAgent]:
        rows = self.rows("SELECT tenant, agent, revision FROM deleted_agents ORDER BY tenant, agent LIMIT $1", limit)
        return [DeletedAgent(*row) for row in rows]

    def retire_revisions(self, agent: DeletedAgent, after: RunPlace, batch: Batch) -> RunPlace | None:
        return None  # a run has its agent with it

    def delete_revisions(self, agent: DeletedAgent, batch: Batch) -> bool:
        return sql_pieces.delete_revisions(self, agent, batch)

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

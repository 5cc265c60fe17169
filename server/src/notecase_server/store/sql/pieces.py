"""Long work on SQL tables, in pieces of a bounded number of rows: what deletion and erasure remove, and what a fork
copies."""

from collections.abc import Sequence
from itertools import islice
from typing import ClassVar, NamedTuple

from notecase_server.store.contract import Scope, SessionKey
from notecase_server.store.rows import TABLES, Table
from notecase_server.store.sql.statements import Sql, marks
from notecase_server.store.tables import Batch, DeletedAgent, Piece

WHOSE = frozenset({"tenant", "uid", "kind", "id"})
"""The columns that say of which session or state a row is."""


class Rows(NamedTuple):
    """A table with rows of sessions, or of states."""

    table: str
    place: str
    """The columns that identify a row within one session or state."""
    size: str
    """How many bytes a row has beyond a few."""
    columns: str
    """All columns but WHOSE."""
    of_state: bool


class TenantRows(NamedTuple):
    """A table with rows of a tenant."""

    table: str
    place: str
    """The columns that identify a row within one tenant."""
    size: str
    """How many bytes a row has beyond a few."""


def _rows(table: Table) -> Rows:
    place, columns = (", ".join(name for name in names if name not in WHOSE) for names in (table.key, table.columns))
    size = "length(body)" if "body" in table.columns else "0"
    return Rows(table.name, place, size, columns, "kind" in table.columns)


ROWS = {table.name: _rows(table) for table in TABLES}

SESSION_ROWS = tuple(ROWS[name] for name in ("changed_messages", "stretches", "calls", "runs", "commands"))
"""The tables that hold rows of a session under its uid, but for its own row, its log, and what its deletion takes away
at once."""

STATE_ROWS = (ROWS["entries"], ROWS["blob_references"])
"""The tables that hold rows of a state."""

OF_TENANT = frozenset(
    {"entries", "states", "blob_references", "requests", "uploaders", "uploads", "agents", "revisions", "keys"}
    | {"deleted_agents", "principals", "audit"}
)
TENANT_ROWS = tuple(
    TenantRows(
        table.name,
        ", ".join(name for name in table.key if name != "tenant"),
        next((f"length({column})" for column in ("body", "response") if column in table.columns), "0"),
    )
    for table in TABLES
    if table.name in OF_TENANT
)
"""The tables that hold rows of a tenant outside of its sessions, content left out."""

OF_SESSION = "tenant = $1 AND uid = $2"
OF_STATE = "tenant = $1 AND kind = $2 AND id = $3"


class Copied(NamedTuple):
    """A table of which a fork at sequence $3 has rows of its source, of the tenant $1 and the uid $2."""

    rows: Rows
    """The table; one column identifies its rows."""
    which: str
    """The condition for rows that are copied."""

    @property
    def source(self) -> str:
        """The same, of the rows of the source alone."""
        whose = "tenant = $1 AND kind = 'session' AND id = $2" if self.rows.of_state else OF_SESSION
        return f"{whose} AND {self.which} AND CAST($3 AS bigint) IS NOT NULL"


def copies(log: str, added: str, ended: str, of_run: str = "") -> tuple[Copied, ...]:
    """Returns the tables that a fork copies, in that order: what holds content comes first. `log` is the table with the
    events, `added` the condition for a call whose message was added by then, `ended` for a run that has ended, and
    `of_run` names more columns of runs."""
    runs = ROWS["runs"]
    return (
        Copied(ROWS["blob_references"]._replace(place="sha256"), "key = '' AND sequence <= $3"),
        Copied(ROWS["events"]._replace(table=log), "sequence <= $3"),
        Copied(ROWS["stretches"], "sequence <= $3"),
        Copied(ROWS["changed_messages"], "sequence <= $3 AND update_sequence <= $3"),
        Copied(ROWS["calls"], added),
        Copied(runs._replace(columns=runs.columns + of_run), f"last_sequence <= $3 AND {ended}"),
        Copied(ROWS["entries"], "true"),
    )


class Pieces(Sql):
    """Deletes, erases and copies rows in pieces that fit into a batch."""

    session_rows: ClassVar[Sequence[Rows]]
    """The tables with rows of a session."""
    tenant_rows: ClassVar[Sequence[TenantRows]]
    """As TENANT_ROWS."""
    copies: ClassVar[Sequence[Copied]]
    """The tables that a fork copies, in that order."""

    def delete_rows(self, scope: Scope, batch: Batch) -> bool:
        """Removes the rows of a deleted session, or of a user's state, that fit into the batch, and blanks the answers
        of requests about it; returns whether nothing is left of it."""
        if scope.kind == "session":
            for each in self.session_rows:
                self._delete_some(each, OF_SESSION, (scope.tenant, scope.id), batch)
        for each in STATE_ROWS:
            self._delete_some(each, OF_STATE, scope, batch)
        self._blank_some(scope, batch)
        if batch.full:
            return False
        self.remove(f"DELETE FROM states WHERE {OF_STATE}", *scope)
        if scope.kind == "session":
            self.remove(f"DELETE FROM deleted_sessions WHERE {OF_SESSION}", scope.tenant, scope.id)
        return True

    def _delete_some(self, rows: Rows | TenantRows, where: str, values: Sequence[str | int], batch: Batch) -> None:
        table, place, size = rows[:3]
        found = self.rows(
            f"SELECT {size}, {place} FROM {table} WHERE {where} ORDER BY {place} LIMIT {marks(1, len(values))}",
            *(*values, batch.left),
        )
        taken = [one for size, *one in found if batch.takes(size or 0)]
        if taken:
            last = list(map(self.read, taken[-1]))
            upto = f"({place}) <= ({marks(len(last), len(values))})"
            self.remove(f"DELETE FROM {table} WHERE {where} AND {upto}", *values, *last)

    def _blank_some(self, scope: Scope, batch: Batch) -> None:
        """Drops the responses of requests that go with it, and keeps that they were carried out."""
        owner = scope.id if scope.kind == "session" else f"users/{scope.id}"
        blanked = f"""FROM requests{self.by_owner} WHERE tenant = $1 AND owner = $2 AND owner != ''
            ORDER BY subject, rpc, request_id LIMIT $3"""
        sizes = self.rows(f"SELECT length(response) {blanked}", scope.tenant, owner, batch.left)
        if taken := sum([batch.takes(size or 0) for (size,) in sizes]):
            self.remove(
                f"""UPDATE requests SET response = NULL, owner = '' WHERE tenant = $1
                    AND (subject, rpc, request_id) IN (SELECT subject, rpc, request_id {blanked})""",
                *(scope.tenant, owner, taken),
            )

    def erase_rows(self, tenant: str, batch: Batch) -> None:
        """Removes the rows of the tenant outside of its sessions that the batch takes, its own row left out."""
        contents = self.rows(
            """SELECT content FROM blobs WHERE tenant = $1 UNION ALL
                SELECT content FROM uploads WHERE tenant = $1 AND sha256 = '' ORDER BY content LIMIT $2""",
            *(tenant, batch.left),
        )
        for (content,) in list(contents):
            batch.takes(0)
            self.do("UPDATE contents SET discarded = 1 WHERE content = $1", content)
            for table in ("blobs", "uploads"):
                self.remove(f"DELETE FROM {table} WHERE tenant = $1 AND content = $2", tenant, content)
        for each in self.tenant_rows:
            self._delete_some(each, "tenant = $1", (tenant,), batch)

    def delete_revisions(self, agent: DeletedAgent, batch: Batch) -> bool:
        """Removes the revisions of a deleted agent that the batch takes; returns whether none is left. No run needs
        them: `retire_revisions` looked at all. Removes nothing once the deletion is not recorded any more: the tenant
        was erased meanwhile, and another agent may have the id and the numbers."""
        recorded = "SELECT 1 FROM deleted_agents WHERE tenant = $1 AND agent = $2 AND revision >= $3"
        if self.one(recorded, *agent) is None:
            return True
        table = TenantRows("revisions", "revision", "length(body)")
        self._delete_some(table, "tenant = $1 AND agent = $2 AND revision <= $3", agent, batch)
        if batch.full:
            return False
        self.do("DELETE FROM deleted_agents WHERE tenant = $1 AND agent = $2 AND revision = $3", *agent)
        return True

    def forget_requests(self, before: int, batch: Batch) -> int:
        """Drops the records made before that time that the batch takes, and returns how many it dropped."""
        oldest = "FROM requests WHERE create_time < $1 ORDER BY create_time, tenant, subject, rpc, request_id LIMIT $2"
        sizes = self.rows(f"SELECT length(response) {oldest}", before, batch.left)
        if taken := sum([batch.takes(size or 0) for (size,) in sizes]):
            self.remove(
                f"""DELETE FROM requests WHERE (tenant, subject, rpc, request_id) IN
                    (SELECT tenant, subject, rpc, request_id {oldest})""",
                *(before, taken),
            )
        return taken

    def rows_to_copy(self, source: SessionKey, at: int, after: Piece, batch: Batch) -> list[Piece]:
        """The next rows that a fork of `source` at sequence `at` has of it, behind `after`, as many as fit into the
        batch; empty at the end. Those are what its log refers to by then; its events up to there, and what rewinds had
        left behind; the messages added and runs ended by then that have not changed since; the calls of messages added
        by then; and the entries of its state as they are now. The one place that says what of each table a fork
        has."""
        found = list[Piece]()
        for number, copied in islice(enumerate(self.copies), after.table, None):
            table, place, size, *_ = copied.rows
            first = -1 if place in {"sequence", "after"} else ""  # comes before every place
            last = after.places[-1] if number == after.table and after.places else first
            rows = self.rows(
                f"""SELECT {place}, {size} FROM {table} WHERE {copied.source} AND {place} > $4
                    ORDER BY {place} LIMIT $5""",
                *(source.tenant, source.uid, at, last, batch.left),
            )
            if places := [self.read(place) for place, size in rows if batch.takes(size or 0)]:
                found.append(Piece(number, places))
            if batch.full:
                break
        return found

    def copy_rows(self, source: SessionKey, key: SessionKey, at: int, pieces: Sequence[Piece]) -> None:
        """Gives the copy `key` those of the rows that `rows_to_copy` would find still."""
        for number, places in pieces:
            table, place, _, columns, of_state = self.copies[number].rows
            into, those = ("tenant, kind, id", "$1, 'session', $4") if of_state else ("tenant, uid", "$1, $4")
            rows, named, values = self.named(table, place, places)
            self.do(
                f"""INSERT INTO {table} ({into}, {columns}) SELECT {those}, {columns}
                    FROM {rows} WHERE {named} AND {self.copies[number].source}""",
                *(key.tenant, source.uid, at, key.uid, *values),
            )

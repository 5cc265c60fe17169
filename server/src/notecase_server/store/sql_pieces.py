"""Long work on SQL tables, in pieces of a bounded number of rows: what deletion and erasure remove, and what a fork
copies."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from notecase_server.store.contract import Scope, SessionKey
from notecase_server.store.rows import TABLES, Table
from notecase_server.store.sql import Sql, marks
from notecase_server.store.tables import Batch, DeletedAgent, Piece

WHOSE = frozenset({"tenant", "uid", "kind", "id"})
"""The columns that say of which session or state a row is."""


class Rows(NamedTuple):
    """A table with rows of sessions, or of states."""

    table: str
    place: str
    """The columns that tell the rows of one session or state apart."""
    size: str
    """How many bytes a row has beyond a few."""
    columns: str
    """All columns but WHOSE."""
    of_state: bool


class TenantRows(NamedTuple):
    """A table with rows of a tenant."""

    table: str
    place: str
    """The columns that tell the rows of one tenant apart."""
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
BLANKED = """FROM requests WHERE tenant = $1 AND owner = $2 AND owner != ''
    ORDER BY subject, rpc, request_id LIMIT $3"""


def delete_rows(sql: Sql, rows: Sequence[Rows], scope: Scope, batch: Batch) -> bool:
    """Tables.delete_rows; `rows` are the tables with rows of a session."""
    if scope.kind == "session":
        for each in rows:
            _delete_some(sql, each, OF_SESSION, (scope.tenant, scope.id), batch)
    for each in STATE_ROWS:
        _delete_some(sql, each, OF_STATE, scope, batch)
    _blank_some(sql, scope, batch)
    if batch.full:
        return False
    sql.remove(f"DELETE FROM states WHERE {OF_STATE}", *scope)
    if scope.kind == "session":
        sql.remove(f"DELETE FROM deleted_sessions WHERE {OF_SESSION}", scope.tenant, scope.id)
    return True


def _delete_some(sql: Sql, rows: Rows | TenantRows, where: str, values: Sequence[str | int], batch: Batch) -> None:
    table, place, size = rows[:3]
    found = sql.rows(
        f"SELECT {size}, {place} FROM {table} WHERE {where} ORDER BY {place} LIMIT {marks(1, len(values))}",
        *(*values, batch.left),
    )
    taken = [one for size, *one in found if batch.takes(size or 0)]
    if taken:
        last = list(map(sql.read, taken[-1]))
        upto = f"({place}) <= ({marks(len(last), len(values))})"
        sql.remove(f"DELETE FROM {table} WHERE {where} AND {upto}", *values, *last)


def _blank_some(sql: Sql, scope: Scope, batch: Batch) -> None:
    """Drops the responses of requests that go with it, and keeps that they were carried out."""
    owner = scope.id if scope.kind == "session" else f"users/{scope.id}"
    sizes = sql.rows(f"SELECT length(response) {BLANKED}", scope.tenant, owner, batch.left)
    if taken := sum([batch.takes(size or 0) for (size,) in sizes]):
        sql.remove(
            f"""UPDATE requests SET response = NULL, owner = '' WHERE tenant = $1
                AND (subject, rpc, request_id) IN (SELECT subject, rpc, request_id {BLANKED})""",
            *(scope.tenant, owner, taken),
        )


def erase_rows(sql: Sql, rows: Sequence[TenantRows], tenant: str, batch: Batch) -> None:
    """Tables.erase_rows; `rows` are as TENANT_ROWS."""
    contents = sql.rows(
        """SELECT content FROM blobs WHERE tenant = $1 UNION ALL
            SELECT content FROM uploads WHERE tenant = $1 AND sha256 = '' ORDER BY content LIMIT $2""",
        *(tenant, batch.left),
    )
    for (content,) in list(contents):
        batch.takes(0)
        sql.do("UPDATE contents SET discarded = 1 WHERE content = $1", content)
        for table in ("blobs", "uploads"):
            sql.remove(f"DELETE FROM {table} WHERE tenant = $1 AND content = $2", tenant, content)
    for each in rows:
        _delete_some(sql, each, "tenant = $1", (tenant,), batch)


def delete_revisions(sql: Sql, agent: DeletedAgent, batch: Batch) -> bool:
    """Tables.delete_revisions."""
    table = TenantRows("revisions", "revision", "length(body)")
    _delete_some(sql, table, "tenant = $1 AND agent = $2 AND revision <= $3", agent, batch)
    if batch.full:
        return False
    sql.do("DELETE FROM deleted_agents WHERE tenant = $1 AND agent = $2 AND revision = $3", *agent)
    return True


def forget_requests(sql: Sql, before: int, batch: Batch) -> int:
    """Tables.forget_requests."""
    oldest = "FROM requests WHERE create_time < $1 ORDER BY create_time, tenant, subject, rpc, request_id LIMIT $2"
    sizes = sql.rows(f"SELECT length(response) {oldest}", before, batch.left)
    if taken := sum([batch.takes(size or 0) for (size,) in sizes]):
        sql.remove(
            f"""DELETE FROM requests WHERE (tenant, subject, rpc, request_id) IN
                (SELECT tenant, subject, rpc, request_id {oldest})""",
            *(before, taken),
        )
    return taken


class Copied(NamedTuple):
    """A table of which a fork at sequence $3 has rows of its source, of the tenant $1 and the uid $2."""

    rows: Rows
    """The table; one column tells its rows apart."""
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


def rows_to_copy(
    sql: Sql, tables: Sequence[Copied], source: SessionKey, at: int, after: Piece, batch: Batch
) -> list[Piece]:
    """Tables.rows_to_copy."""
    found = list[Piece]()
    for number, copied in islice(enumerate(tables), after.table, None):
        table, place, size, *_ = copied.rows
        first = -1 if place in {"sequence", "after"} else ""  # comes before every place
        last = after.places[-1] if number == after.table and after.places else first
        rows = sql.rows(
            f"""SELECT {place}, {size} FROM {table} WHERE {copied.source} AND {place} > $4
                ORDER BY {place} LIMIT $5""",
            *(source.tenant, source.uid, at, last, batch.left),
        )
        if places := [sql.read(place) for place, size in rows if batch.takes(size or 0)]:
            found.append(Piece(number, places))
        if batch.full:
            break
    return found


def copy_rows(
    sql: Sql, tables: Sequence[Copied], source: SessionKey, key: SessionKey, at: int, pieces: Sequence[Piece]
) -> None:
    """Tables.copy_rows."""
    for number, places in pieces:
        table, place, _, columns, of_state = tables[number].rows
        into, those = ("tenant, kind, id", "$1, 'session', $4") if of_state else ("tenant, uid", "$1, $4")
        rows, named, values = sql.named(table, place, places)
        sql.do(
            f"""INSERT INTO {table} ({into}, {columns}) SELECT {those}, {columns}
                FROM {rows} WHERE {named} AND {tables[number].source}""",
            *(key.tenant, source.uid, at, key.uid, *values),
        )

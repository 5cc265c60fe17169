"""Gives every session of a PostgreSQL store another uid, so that nothing that named the old one goes on in the new
history."""

import asyncpg

from notecase_server.store.postgres.database import stay_owner
from notecase_server.store.renewal import renewed_answer, renewed_session
from notecase_server.store.rows import UIDS

BATCH = 200
"""Messages that are read and written at a time."""


async def renew(connection: "asyncpg.Connection[asyncpg.Record]", fence: int) -> int:
    """Renews all sessions in one transaction; returns how many sessions there are. The caller owns the store under that
    fence, and no other server can become the owner until the end. Raises StoreOpenError if another one has, and the
    errors of the database."""
    async with connection.transaction():
        await stay_owner(connection, fence)
        await connection.execute("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
        await connection.execute(
            """CREATE TEMP TABLE renewed ON COMMIT DROP AS
                SELECT tenant, uid, gen_random_uuid()::text COLLATE "C" AS fresh FROM sessions"""
        )
        await connection.execute("CREATE UNIQUE INDEX ON renewed (tenant, uid); ANALYZE renewed")
        sessions: int = await connection.fetchval("SELECT count(*) FROM renewed")
        for table, column, where in UIDS:
            await connection.execute(
                f"""UPDATE {table} SET {column} = n.fresh FROM renewed n
                    WHERE n.tenant = {table}.tenant AND n.uid = {table}.{column} AND {where}"""
            )
        await _renew_sessions(connection)
        await _renew_answers(connection)
    return sessions


async def _renew_sessions(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    after = ("", "")
    while rows := await connection.fetch(
        """SELECT tenant, uid, body FROM sessions WHERE (tenant, uid) > ($1, $2) ORDER BY tenant, uid LIMIT $3""",
        *(*after, BATCH),
    ):
        bodies = [renewed_session(row["body"], row["uid"]) for row in rows]
        await connection.execute(
            """UPDATE sessions s SET body = u.body
                FROM unnest($1::text[], $2::text[], $3::bytea[]) AS u(tenant, uid, body)
                WHERE s.tenant = u.tenant AND s.uid = u.uid""",
            *([row["tenant"] for row in rows], [row["uid"] for row in rows], bodies),
        )
        after = (rows[-1]["tenant"], rows[-1]["uid"])


async def _renew_answers(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    place = ("tenant", "subject", "rpc", "request_id")
    after = ("", "", "", "")
    while rows := await connection.fetch(
        """SELECT r.tenant, r.subject, r.rpc, r.request_id, r.response, n.uid, n.fresh
            FROM requests r JOIN renewed n ON n.tenant = r.tenant AND n.fresh = r.owner
            WHERE r.response IS NOT NULL AND (r.tenant, r.subject, r.rpc, r.request_id) > ($1, $2, $3, $4)
            ORDER BY r.tenant, r.subject, r.rpc, r.request_id LIMIT $5""",
        *(*after, BATCH),
    ):
        await connection.execute(
            """UPDATE requests r SET response = u.response
                FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[])
                    AS u(tenant, subject, rpc, request_id, response)
                WHERE (r.tenant, r.subject, r.rpc, r.request_id) = (u.tenant, u.subject, u.rpc, u.request_id)""",
            *([row[name] for row in rows] for name in place),
            [renewed_answer(row["response"], row["uid"], row["fresh"]) for row in rows],
        )
        after = tuple(rows[-1][name] for name in place)

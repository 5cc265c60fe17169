"""A session whose row is damaged can be found, and deleted with everything, by its name and by what it belongs to."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from notecase import v1
from structlog.testing import capture_logs

from tests.e2e.driving import reason_of, said
from tests.support.server import TENANT, Running, running

CASE = "sessions/case"
OF_ADA = v1.Session(user="users/ada")
OPERATOR = ((TENANT, ""),)

DAMAGE = {
    "body": "UPDATE logs SET body = x'ff' WHERE epoch IS NOT NULL AND uid = ?",
    "commits": "UPDATE logs SET commits = '{' WHERE epoch IS NOT NULL AND uid = ?",
}


async def damage(url: Path, how: str) -> None:
    """Makes two sessions of one user, one of which has a run that waits, and damages that."""
    waits = v1.Agent(llm=v1.LlmAgent(tools=[v1.Tool(name="weigh", client=v1.ClientTool())]))
    async with running(f"sqlite:{url}") as served:
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=waits))
        for name in ("case", "other"):
            made = await served.sessions.CreateSession(v1.CreateSessionRequest(session_id=name, session=OF_ADA))
            if name == "case":
                uid = made.uid
        start = v1.StartRun(session=CASE, agent="agents/a", messages=[said("/call weigh {}")])
        await served.runs.CreateRun(v1.CreateRunRequest(start=start))
        wait = v1.ListRunsRequest(parent=CASE)
        while (await served.runs.ListRuns(wait)).runs[0].state != v1.Run.STATE_WAITING:
            pass
    with closing(sqlite3.connect(url)) as connection, connection:
        assert 1 == connection.execute(DAMAGE[how], (uid,)).rowcount


@pytest.fixture(params=DAMAGE)
async def path(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Path]:
    """A file in which one of two sessions is damaged. Afterwards nothing of that one may be left."""
    path = tmp_path / "notecase.db"
    await damage(path, request.param)
    yield path
    with closing(sqlite3.connect(path)) as connection:
        for table in ("runs", "run_agents", "retired_revisions", "deleted_sessions"):
            assert [] == connection.execute(f"SELECT * FROM {table}").fetchall()
        assert [] == connection.execute("SELECT * FROM sessions WHERE session = 'case'").fetchall()


async def listed(served: Running) -> list[str]:
    return [row.name for row in (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions]


async def swept(served: Running) -> None:
    await served.server._store.sweep_sessions()


async def test_it_is_deleted_by_its_name(path: Path, request: pytest.FixtureRequest) -> None:
    async with running(f"sqlite:{path}") as served:
        with capture_logs() as logs:
            found = (await served.sessions.ListSessions(v1.ListSessionsRequest(filter='user = "users/ada"'))).sessions
        assert {("sessions/other", "users/ada"), (CASE, "users/ada")} == {(row.name, row.user) for row in found}
        damaged = [line["session"] for line in logs if line["event"] == "session_damaged"]
        assert (["case"] if "body" in request.node.name else []) == damaged
        stale = v1.DeleteSessionRequest(name=CASE, etag="1")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.sessions.DeleteSession(stale)
        assert "ETAG_MISMATCH" == reason_of(refused.value)
        delete = v1.DeleteSessionRequest(name=CASE, request_id="r")
        for _ in range(2):
            await served.sessions.DeleteSession(delete)
        assert ["sessions/other"] == await listed(served)
        await swept(served)


async def test_it_goes_with_its_user(path: Path) -> None:
    async with running(f"sqlite:{path}") as served:
        erase = v1.EraseUserRequest(name="users/ada")
        assert 2 == (await served.sessions.EraseUser(erase)).sessions_deleted
        assert [] == await listed(served)


async def test_it_goes_with_its_tenant(path: Path) -> None:
    async with running(f"sqlite:{path}") as served:
        await served.tenants.SuspendTenant(v1.SuspendTenantRequest(name="tenants/default"), metadata=OPERATOR)
        await served.tenants.DeleteTenant(v1.DeleteTenantRequest(name="tenants/default"), metadata=OPERATOR)

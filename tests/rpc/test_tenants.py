"""TenantService: what an operator does with whole tenants, and what their callers and runs see of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.engine import tenancy
from notecase_server.rpc import interceptor
from notecase_server.serve import now
from notecase_server.serve_stores import open_store

from tests.e2e.driving import reason_of, said
from tests.rpc.test_keys import Scene, Words, bearer
from tests.support.server import running

ADMIN, OPERATOR = v1.Key.ROLE_ADMIN, v1.Key.ROLE_OPERATOR
ACME = "tenants/acme"


@pytest.fixture(params=["memory", "sqlite"])
async def scene(request: pytest.FixtureRequest, tmp_path: Any) -> AsyncIterator[Scene]:
    """With an agent, and a session with a run that never ends its reply."""
    url = "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"
    async with running(await open_store(url, now), authenticators=(), auth="keys") as served:
        _, admin = await served.server._keys.create("acme", v1.Key(role=ADMIN))
        _, operator = await served.server._keys.create("", v1.Key(role=OPERATOR))
        made = Scene(served, bearer(admin), bearer(operator))
        clerk = v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent()))
        await served.agents.CreateAgent(clerk, metadata=made.admin)
        yield made


async def begin(scene: Scene, session: str, directive: str, **fields: Any) -> str:
    start = v1.StartRun(
        new_session=v1.Session(name=f"sessions/{session}", agent="agents/clerk"), messages=[said(directive)], **fields
    )
    return (await scene.served.runs.CreateRun(v1.CreateRunRequest(start=start), metadata=scene.admin)).name


async def reason(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return reason_of(refused.value)


async def suspend(scene: Scene) -> v1.Tenant:
    return await scene.served.tenants.SuspendTenant(v1.SuspendTenantRequest(name=ACME), metadata=scene.operator)


async def resume(scene: Scene) -> v1.Tenant:
    return await scene.served.tenants.ResumeTenant(v1.ResumeTenantRequest(name=ACME), metadata=scene.operator)


async def delete(scene: Scene, **fields: Any) -> None:
    await scene.served.tenants.DeleteTenant(v1.DeleteTenantRequest(name=ACME, **fields), metadata=scene.operator)


async def test_a_suspended_tenants_calls_are_refused_and_taken_again(scene: Scene) -> None:
    await scene.look(scene.admin)
    assert v1.Tenant.STATE_SUSPENDED == (await suspend(scene)).state
    assert "TENANT_SUSPENDED" == await reason(scene.look(scene.admin))
    other = await scene.make(scene.operator, "tenants/other", ADMIN)
    await scene.look(bearer(other.secret))
    assert v1.Tenant.STATE_ACTIVE == (await resume(scene)).state
    await scene.look(scene.admin)


async def test_a_suspended_tenants_streams_end_and_its_runs_come_to_rest(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptor, "JUDGE_SECONDS", 3600)
    run = await begin(scene, "case", "/pause 10000 /say never")
    request = v1.WatchEventsRequest(name="sessions/case", options=v1.WatchOptions(keep_open=True))
    stream = scene.served.runs.WatchEvents(request, metadata=scene.admin)
    frame: Any = await stream.read()
    assert frame.HasField("attached")
    await suspend(scene)
    await scene.served.server._doorway.judge()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        while await stream.read() is not grpc.aio.EOF:
            pass
    assert (grpc.StatusCode.PERMISSION_DENIED, "TENANT_SUSPENDED") == (ended.value.code(), reason_of(ended.value))
    await resume(scene)
    found = await scene.served.runs.GetRun(v1.GetRunRequest(name=run), metadata=scene.admin)
    assert v1.Run.STATE_CANCELLED == found.state


async def test_a_run_that_waits_goes_on_waiting(scene: Scene) -> None:
    tools = [v1.Tool(name="lens", client=v1.ClientTool())]
    run = await begin(scene, "case", "/call lens {}", client_tools=tools)
    await scene.served.runs.WaitRun(v1.WaitRunRequest(name=run), metadata=scene.admin)
    await suspend(scene)
    await resume(scene)
    found = await scene.served.runs.GetRun(v1.GetRunRequest(name=run), metadata=scene.admin)
    assert v1.Run.STATE_WAITING == found.state


async def test_what_is_put_to_work_in_a_suspended_tenant_is_cancelled_by_the_server(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its loop, as after a start, or when a deadline has woken a run."""
    monkeypatch.setattr(tenancy, "LOOK_SECONDS", 0.01)
    run = await begin(scene, "case", "/pause 10000 /say never")
    await scene.served.server._store.set_tenant_state("acme", v1.Tenant.STATE_SUSPENDED)
    key, _ = await scene.served.server._sessions.find("acme", "case")
    ended = await scene.served.server._runs.commands.wait(key, run.rpartition("/")[2], 30)
    assert v1.Run.STATE_CANCELLED == ended.state


async def test_a_deletion_does_not_delay_the_rest_of_suspended_tenants(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes long, which the server continues."""
    monkeypatch.setattr(tenancy, "LOOK_SECONDS", 0.01)
    store, begun = scene.served.server._store, asyncio.Event()

    async def linger(tenant: str) -> bool:
        begun.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(store, "erase_tenant", linger)
    run = await begin(scene, "case", "/pause 10000 /say never")
    await store.create_tenant("aaa", "")  # before the other one in the list
    await store.set_tenant_state("aaa", v1.Tenant.STATE_DELETING)
    await begun.wait()
    await store.set_tenant_state("acme", v1.Tenant.STATE_SUSPENDED)
    key, _ = await scene.served.server._sessions.find("acme", "case")
    ended = await scene.served.server._runs.commands.wait(key, run.rpartition("/")[2], 30)
    assert v1.Run.STATE_CANCELLED == ended.state


async def test_a_deleted_tenant_is_gone_with_everything_and_its_keys(scene: Scene) -> None:
    run = await begin(scene, "case", "/pause 10000 /say never")
    await scene.served.state.PutState(
        v1.PutStateRequest(name="app/state", key="k", value=v1.Value(bool_value=True)), metadata=scene.admin
    )
    assert run
    await delete(scene, request_id="once")
    await delete(scene, request_id="once")
    assert "UNAUTHENTICATED" == await reason(scene.look(scene.admin))
    get = v1.GetTenantRequest(name=ACME)
    assert "TENANT_NOT_FOUND" == await reason(scene.served.tenants.GetTenant(get, metadata=scene.operator))
    assert "TENANT_NOT_FOUND" == await reason(delete(scene))
    fresh = bearer((await scene.make(scene.operator, ACME, ADMIN)).secret)
    assert [] == list((await scene.served.sessions.ListSessions(v1.ListSessionsRequest(), metadata=fresh)).sessions)
    assert [] == list((await scene.served.agents.ListAgents(v1.ListAgentsRequest(), metadata=fresh)).agents)
    state = await scene.served.state.GetState(v1.GetStateRequest(name="app/state"), metadata=fresh)
    assert 0 == state.version


async def test_a_removal_that_was_cut_is_gone_on_with(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenancy, "LOOK_SECONDS", 0.01)
    gone = asyncio.Event()
    told = scene.served.server._tenancy._removed

    def removed(tenant: str) -> None:
        told(tenant)
        gone.set()

    monkeypatch.setattr(scene.served.server._tenancy, "_removed", removed)
    await begin(scene, "case", "/say done")
    await scene.served.server._store.set_tenant_state("acme", v1.Tenant.STATE_DELETING)
    await gone.wait()
    assert "UNAUTHENTICATED" == await reason(scene.look(scene.admin))
    assert await scene.served.server._store.get_tenant("acme") is None


async def test_a_repeated_deletion_returns_when_the_last_row_is_gone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call was interrupted, and the server has not continued by itself yet."""
    monkeypatch.setattr(tenancy, "LOOK_SECONDS", 3600)
    store = scene.served.server._store
    await begin(scene, "case", "/say done")
    with monkeypatch.context() as away:

        async def refuse(tenant: str) -> bool:
            raise errors.store_unavailable()

        away.setattr(store, "erase_tenant", refuse)
        assert "STORE_UNAVAILABLE" == await reason(delete(scene, request_id="once"))
    await delete(scene, request_id="once")
    assert await store.get_tenant("acme") is None


async def test_a_late_removal_leaves_the_tenant_that_has_the_name_now(scene: Scene) -> None:
    """The server's loop and a call may remove a tenant at the same time; the name is used again when one is done."""
    await delete(scene, request_id="once")
    fresh = bearer((await scene.make(scene.operator, ACME, ADMIN)).secret)
    await scene.served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"), metadata=fresh)
    await scene.served.server._tenancy.remove("acme")
    await delete(scene, request_id="once")
    await scene.served.sessions.GetSession(v1.GetSessionRequest(name="sessions/case"), metadata=fresh)


async def test_tenants_are_made_found_and_listed(scene: Scene) -> None:
    by: Words = scene.operator
    tenants = scene.served.tenants
    new = v1.CreateTenantRequest(tenant_id="new", tenant=v1.Tenant(display_name="New"), request_id="once")
    made = await tenants.CreateTenant(new, metadata=by)
    assert made == await tenants.CreateTenant(new, metadata=by)
    assert made == await tenants.GetTenant(v1.GetTenantRequest(name="tenants/new"), metadata=by)
    assert "ALREADY_EXISTS" == await reason(tenants.CreateTenant(v1.CreateTenantRequest(tenant_id="new"), metadata=by))
    for bad in ("", "Acme", "a/b"):
        assert "INVALID_FIELD" == await reason(tenants.CreateTenant(v1.CreateTenantRequest(tenant_id=bad), metadata=by))
    first = await tenants.ListTenants(v1.ListTenantsRequest(page_size=1), metadata=by)
    second = await tenants.ListTenants(
        v1.ListTenantsRequest(page_size=1, page_token=first.next_page_token), metadata=by
    )
    assert [ACME, "tenants/new"] == [row.name for page in (first, second) for row in page.tenants]

"""Every store: two tenants with the same ids have nothing in common."""

from typing import Any

import pytest
from notecase import v1
from notecase_server.store.contract import Answer, CommandId, Query, Replayed, Scope, SessionKey, Store

from tests.store.build import (
    EVERYTHING,
    add,
    changed,
    contents,
    create,
    edit,
    ended,
    names,
    once,
    put,
    refused,
    said,
    session_key,
    start,
)

ACME, GLOBEX = session_key("acme", "case"), session_key("globex", "case")


async def fill(store: Store, key: SessionKey) -> None:
    """The same ids in each tenant; every text names the tenant."""
    tenant = key.tenant
    await store.create_agent(
        tenant, "sherlock", v1.Agent(display_name=tenant), once=once("agent", Answer("agent"), tenant=tenant)
    )
    await create(store, key, display_name=tenant)
    await start(
        store,
        "r1",
        said("m1", tenant, run="r1"),
        changed(put("k", tenant)),
        changed(put("k", tenant), state="user"),
        changed(put("k", tenant), state="app"),
        key=key,
        once=once("start", tenant=tenant),
        command=CommandId("start", b"d"),
    )


def scopes(key: SessionKey) -> list[Scope]:
    tenant = key.tenant
    return [key.state, Scope(tenant, "user", "ada"), Scope(tenant, "app", "")]


async def everything(store: Store, key: SessionKey) -> dict[str, Any]:
    """All that a tenant can see, by every method that reads."""
    tenant = key.tenant
    message, run = await store.get_message(key, "m1"), await store.get_run(key, "r1")
    return {
        **await contents(store, key),
        "message": message,
        "run": run,
        "named": [await store.get_state(scope, ["k"]) for scope in scopes(key)],
        "sessions": (await store.list_sessions(tenant, EVERYTHING)).rows,
        "all runs": (await store.list_runs(tenant, None, EVERYTHING)).rows,
        "agent": await store.get_agent(tenant, "sherlock"),
        "agents": (await store.list_agents(tenant, EVERYTHING)).rows,
        "revisions": (await store.list_agent_revisions(tenant, "sherlock", EVERYTHING)).rows,
    }


async def test_the_same_ids_are_different_things(store: Store) -> None:
    await fill(store, ACME)
    await fill(store, GLOBEX)
    for key, other in ((ACME, GLOBEX), (GLOBEX, ACME)):
        seen = await everything(store, key)
        assert key.tenant in str(seen)
        assert other.tenant not in str(seen)
        assert seen["active"] == ["r1"]
        assert len((await store.list_runs(key.tenant, None, Query(9))).rows) == 1


async def test_nothing_is_there_for_a_tenant_that_made_nothing(store: Store) -> None:
    before = await everything(store, GLOBEX)
    await fill(store, ACME)
    assert await everything(store, GLOBEX) == before
    with refused("SESSION_NOT_FOUND"):
        await add(store, said("m2"), key=GLOBEX)
    with refused("SESSION_NOT_FOUND"):
        await store.claim(GLOBEX, 0)
    with refused("SESSION_NOT_FOUND"):
        await store.edit_session(GLOBEX, edit())
    with refused("SESSION_NOT_FOUND"):
        await store.delete_session(GLOBEX)
    with refused("ETAG_MISMATCH"):
        await store.edit_agent("globex", "sherlock", v1.Agent(), if_revision=1)
    with refused("AGENT_NOT_FOUND"):
        await store.delete_agent("globex", "sherlock")
    await store.recall(once("start", tenant="globex"))
    await store.recall_command(GLOBEX, CommandId("start", b"d"))
    assert await everything(store, GLOBEX) == before


async def test_no_write_of_one_tenant_reaches_another(store: Store) -> None:
    await fill(store, ACME)
    await fill(store, GLOBEX)
    before = await everything(store, GLOBEX)
    await add(store, said("m2"), ended("r1"), key=ACME)
    await store.update_state(Scope("acme", "user", "ada"), [put("k", "new")])
    await store.update_state(Scope("acme", "app", ""), [put("k", "new")])
    await store.edit_session(ACME, edit(display_name="new"))
    await store.edit_agent("acme", "sherlock", v1.Agent(display_name="new"), if_revision=1)
    await store.claim(ACME, (await add(store, said("m3"), key=ACME)).epoch)
    await store.delete_agent("acme", "sherlock")
    await store.delete_session(ACME)
    assert await everything(store, GLOBEX) == before
    assert names((await store.list_sessions("acme", EVERYTHING)).rows) == []
    with pytest.raises(Replayed):
        await store.recall(once("start", tenant="globex"))

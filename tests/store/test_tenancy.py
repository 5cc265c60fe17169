"""Every store: the tenants that operators manage, and the removal of one with all its data."""

import hashlib
from collections.abc import Awaitable, Callable

import pytest
from notecase import v1
from notecase_server.store.contract import Answer, KeyRow, Query, Replayed, Scope, Store

from tests.store.build import (
    EVERYTHING,
    KEY,
    NOTHING,
    ManualClock,
    add,
    create,
    names,
    once,
    put,
    refused,
    said,
    session_key,
)

ACTIVE, SUSPENDED, DELETING = v1.Tenant.STATE_ACTIVE, v1.Tenant.STATE_SUSPENDED, v1.Tenant.STATE_DELETING
TENANT = Answer("tenant")


async def test_a_tenant_is_made_known_once(store: Store, clock: ManualClock) -> None:
    assert await store.get_tenant("acme") is None
    made = await store.create_tenant("acme", "Acme", once("create", TENANT))
    assert ("tenants/acme", "Acme", ACTIVE) == (made.name, made.display_name, made.state)
    assert clock.now == made.create_time.ToMicroseconds()
    assert made == await store.get_tenant("acme")
    with refused("ALREADY_EXISTS"):
        await store.create_tenant("acme", "Other")
    with pytest.raises(Replayed):
        await store.create_tenant("acme", "Acme", once("create", TENANT))


async def test_tenants_are_listed_by_name(store: Store) -> None:
    for tenant in ("b", "c", "a"):
        await store.create_tenant(tenant, "")
    first = await store.list_tenants(Query(2))
    assert ["tenants/a", "tenants/b"] == names(first.rows)
    second = await store.list_tenants(Query(2, first.next))
    assert (["tenants/c"], None) == (names(second.rows), second.next)


async def test_a_state_is_set_and_a_removal_is_permanent(store: Store) -> None:
    for state in (ACTIVE, DELETING, SUSPENDED):
        with refused("TENANT_NOT_FOUND"):
            await store.set_tenant_state("acme", state)
    assert [] == (await store.list_tenants(EVERYTHING)).rows
    await store.create_tenant("acme", "")
    assert SUSPENDED == (await store.set_tenant_state("acme", SUSPENDED)).state
    assert ACTIVE == (await store.set_tenant_state("acme", ACTIVE)).state
    assert DELETING == (await store.set_tenant_state("acme", DELETING)).state
    for state in (ACTIVE, SUSPENDED):
        assert DELETING == (await store.set_tenant_state("acme", state)).state


async def _session(store: Store) -> None:
    await create(store)


async def _state(store: Store) -> None:
    await store.update_state(Scope("acme", "user", "ada"), [put("k", "v")])


async def _agent(store: Store) -> None:
    await store.create_agent("acme", "clerk", v1.Agent())


async def _blob(store: Store) -> None:
    await store.put_blob("acme", "", hashlib.sha256(b"x").hexdigest(), b"x")


async def _upload(store: Store) -> None:
    await store.open_upload("acme", "u", 1_900_000_000_000_000)


@pytest.mark.parametrize("make", [_session, _state, _agent, _blob, _upload])
async def test_a_tenant_that_no_operator_made_can_be_suspended_once_it_has_data(
    store: Store, make: Callable[[Store], Awaitable[None]]
) -> None:
    """Its credentials are an identity provider's. A name that was mistyped used to become a suspended tenant."""
    await make(store)
    with refused("TENANT_NOT_FOUND"):
        await store.set_tenant_state("acne", SUSPENDED)
    assert SUSPENDED == (await store.set_tenant_state("acme", SUSPENDED)).state
    assert ["tenants/acme"] == names((await store.list_tenants(EVERYTHING)).rows)


async def test_a_key_makes_its_tenant_known(store: Store) -> None:
    await store.add_key(KeyRow("acme", "a", v1.Key(), b"a", b""))
    await store.add_key(KeyRow("", "b", v1.Key(), b"b", b""))
    assert ["tenants/acme"] == names((await store.list_tenants(EVERYTHING)).rows)


async def test_a_tenant_that_is_being_removed_gets_no_key(store: Store) -> None:
    """It would go with the tenant, and its caller would be left with a secret that means nothing."""
    key = KeyRow("acme", "a", v1.Key(), b"a", b"")
    await store.create_tenant("acme", "")
    await store.set_tenant_state("acme", DELETING)
    with refused("TENANT_NOT_FOUND"):
        await store.add_key(key)
    while not await store.erase_tenant("acme"):
        pass
    await store.add_key(key)


async def test_a_tenant_with_a_session_or_its_rows_is_not_erased(store: Store) -> None:
    await create(store)
    await add(store, said("m", "Hello."))
    assert not await store.erase_tenant("acme")
    await store.delete_session(KEY)
    assert not await store.erase_tenant("acme")
    await store.sweep_sessions()
    while not await store.erase_tenant("acme"):
        pass
    assert [] == (await store.list_sessions("acme", EVERYTHING)).rows


async def fill(store: Store, tenant: str) -> str:
    """All that a tenant has outside of its sessions; returns a blob's digest."""
    digest = hashlib.sha256(tenant.encode()).hexdigest()
    await store.create_tenant(tenant, "")
    await store.put_blob(tenant, "", digest, tenant.encode())
    blob = v1.Value(blob_value=v1.Blob(name=f"blobs/{digest}", media_type="text/plain"))
    for kind, id_ in (("user", "ada"), ("app", "")):
        for number in range(3):
            op = v1.StateOp(key=f"k{number}", set=blob)
            await store.update_state(Scope(tenant, kind, id_), [op])  # type: ignore[arg-type]
    for number in range(70):
        await store.create_agent(tenant, f"a{number}", v1.Agent(), once(f"r{number}", Answer("agent"), tenant=tenant))
    await store.delete_agent(tenant, "a0", once=once("gone", NOTHING, tenant=tenant))
    await store.open_upload(tenant, "u", 1_900_000_000_000_000)
    await store.add_chunk(tenant, "u", 0, b"x")
    await store.add_key(KeyRow(tenant, f"key-of-{tenant}", v1.Key(), b"d", b""))
    return digest


async def test_everything_of_a_tenant_is_removed_and_nothing_of_another(store: Store) -> None:
    digests = {tenant: await fill(store, tenant) for tenant in ("acme", "other")}
    await create(store, session_key("other", "case"))
    times = 1
    while not await store.erase_tenant("acme"):
        times += 1
    assert 2 <= times < 20
    for tenant, there in (("acme", False), ("other", True)):
        assert there == (await store.get_tenant(tenant) is not None)
        assert there == (await store.get_blob(tenant, digests[tenant]) is not None)
        assert there == (await store.get_upload(tenant, "u") is not None)
        assert there == (await store.find_key(f"key-of-{tenant}") is not None)
        assert there == bool((await store.list_agents(tenant, EVERYTHING)).rows)
        for kind, id_ in (("user", "ada"), ("app", "")):
            state = await store.get_state(Scope(tenant, kind, id_), ["k0"])  # type: ignore[arg-type]
            assert there == bool(state.version)
        record = once("r1", Answer("agent"), tenant=tenant)
        if there:
            with pytest.raises(Replayed):
                await store.recall(record)
        else:
            await store.recall(record)
    assert 1 == (await store.create_agent("acme", "a0", v1.Agent())).revision
    assert ["case"] == names((await store.list_sessions("other", EVERYTHING)).rows)


async def test_an_erased_tenant_is_erased_again(store: Store) -> None:
    assert await store.erase_tenant("acme")
    assert await store.erase_tenant("acme")


async def test_users_with_a_state_and_content_are_listed_by_tenant(store: Store) -> None:
    for tenant in ("acme", "other"):
        for user in ("b", "a", "c"):
            await store.update_state(Scope(tenant, "user", f"{user}-{tenant}"), [put("k", "v")])
        await store.update_state(Scope(tenant, "app", ""), [put("k", "v")])
    first = await store.list_user_states("acme", Query(2))
    second = await store.list_user_states("acme", Query(2, first.next))
    assert (["a-acme", "b-acme"], ["c-acme"], None) == (first.rows, second.rows, second.next)
    for digest in ("bb", "aa", "cc"):
        await store.put_blob("acme", "", digest, digest.encode() * 3)
    await store.put_blob("other", "", "dd", b"d")
    page = await store.list_blobs("acme", Query(2))
    last = await store.list_blobs("acme", Query(2, page.next))
    assert [v1.Blob(name=f"blobs/{digest}", size_bytes=6) for digest in ("aa", "bb", "cc")] == [*page.rows, *last.rows]
    assert last.next is None

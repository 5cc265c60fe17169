"""Every store: the keys of callers, by digest."""

import asyncio

import pytest
from notecase import v1
from notecase_server.store.contract import MAX_KEYS, Answer, KeyRow, Query, Replayed, Store

from tests.store.build import EVERYTHING, NOTHING, ManualClock, names, once, refused

ROTATED = Answer("rotated_key")


def row(key_id: str, tenant: str = "acme", digest: bytes = b"d", **fields: object) -> KeyRow:
    key = v1.Key(display_name=key_id, role=v1.Key.ROLE_USER, **fields)  # type: ignore[arg-type]
    return KeyRow(tenant, key_id, key, digest, b"")


async def test_a_key_is_found_by_its_id_whatever_its_tenant(store: Store, clock: ManualClock) -> None:
    made = await store.add_key(row("a"))
    assert ("keys/a", "a", v1.Key.ROLE_USER) == (made.name, made.display_name, made.role)
    assert clock.now == made.create_time.ToMicroseconds()
    await store.add_key(row("b", "other", b"e"))
    assert KeyRow("acme", "a", made, b"d", b"") == await store.find_key("a")
    found = await store.find_key("b")
    assert found is not None
    assert ("other", b"e") == (found.tenant, found.digest)
    assert await store.find_key("c") is None


async def test_what_is_handed_out_is_a_copy(store: Store) -> None:
    given = row("a")
    made = await store.add_key(given)
    made.display_name = given.key.display_name = "changed"
    (listed,) = (await store.list_keys("acme", EVERYTHING)).rows
    listed.display_name = "changed"
    found = await store.find_key("a")
    assert found is not None
    assert "a" == found.key.display_name


async def test_keys_are_listed_by_tenant_the_last_created_first(store: Store, clock: ManualClock) -> None:
    for key_id in "abc":
        clock.now += 1
        await store.add_key(row(key_id))
    await store.add_key(row("d"))
    await store.add_key(row("e", "other"))
    await store.add_key(row("f", ""))
    first = await store.list_keys("acme", Query(3))
    assert ["keys/d", "keys/c", "keys/b"] == names(first.rows)
    second = await store.list_keys("acme", Query(3, first.next))
    assert (["keys/a"], None) == (names(second.rows), second.next)
    assert ["keys/e"] == names((await store.list_keys("other", EVERYTHING)).rows)
    assert ["keys/f"] == names((await store.list_keys("", EVERYTHING)).rows)


async def test_a_rotation_keeps_the_digest_before(store: Store, clock: ManualClock) -> None:
    await store.add_key(row("a", digest=b"1"))
    clock.now += 5
    made = await store.rotate_key("acme", "a", b"2", 7)
    assert (clock.now, clock.now + 7) == (made.rotate_time.ToMicroseconds(), made.overlap_end_time.ToMicroseconds())
    assert KeyRow("acme", "a", made, b"2", b"1") == await store.find_key("a")
    await store.rotate_key("acme", "a", b"3", 0)
    found = await store.find_key("a")
    assert found is not None
    assert (b"3", b"2") == (found.digest, found.former)


async def test_a_deleted_key_is_gone(store: Store) -> None:
    await store.add_key(row("a"))
    await store.delete_key("acme", "a")
    assert await store.find_key("a") is None
    assert [] == (await store.list_keys("acme", EVERYTHING)).rows
    with refused("KEY_NOT_FOUND"):
        await store.delete_key("acme", "a")


async def test_another_tenants_key_is_not_found(store: Store) -> None:
    await store.add_key(row("a"))
    for tenant in ("other", ""):
        with refused("KEY_NOT_FOUND"):
            await store.rotate_key(tenant, "a", b"2", 0)
        with refused("KEY_NOT_FOUND"):
            await store.delete_key(tenant, "a")
    found = await store.find_key("a")
    assert found is not None
    assert b"d" == found.digest


async def test_a_repeat_changes_nothing(store: Store) -> None:
    await store.add_key(row("a", digest=b"1"), once("add", Answer("made_key")))
    with pytest.raises(Replayed) as replayed:
        await store.add_key(row("b"), once("add", Answer("made_key")))
    assert "keys/a" == v1.CreateKeyResponse.FromString(replayed.value.response).key.name
    await store.rotate_key("acme", "a", b"2", 0, once("rotate", ROTATED))
    with pytest.raises(Replayed) as replayed:
        await store.rotate_key("acme", "a", b"3", 0, once("rotate", ROTATED))
    assert "keys/a" == v1.RotateKeyResponse.FromString(replayed.value.response).key.name
    found = await store.find_key("a")
    assert found is not None
    assert (b"2", b"1") == (found.digest, found.former)
    await store.delete_key("acme", "a", once("delete", NOTHING))
    with pytest.raises(Replayed):
        await store.delete_key("acme", "a", once("delete", NOTHING))


async def test_a_tenants_keys_are_bounded(store: Store) -> None:
    await asyncio.gather(*(store.add_key(row(f"{number}")) for number in range(MAX_KEYS)))
    with refused("QUOTA_EXCEEDED"):
        await store.add_key(row("more"))
    await store.add_key(row("other", "other"))
    await store.delete_key("acme", "0")
    await store.add_key(row("more"))


async def test_a_store_remembers_permanently_that_it_had_a_key(store: Store) -> None:
    assert not await store.is_keyed()
    await store.add_key(row("a"))
    await store.delete_key("acme", "a")
    assert await store.is_keyed()

"""Every store: who did what, written with what was done."""

from typing import Any, cast

import pytest
from notecase import v1
from notecase_server.store import base
from notecase_server.store.base import TableStore
from notecase_server.store.contract import AuditRow, Commit, Compare, KeyRow, Query, Replayed, Store

from tests.store.build import EVERYTHING, KEY, NOTHING, ManualClock, changed, create, once, put, refused
from tests.store.fixtures import looks_inside


def row(resource: str, tenant: str = "acme", **fields: str) -> AuditRow:
    return AuditRow(tenant, v1.AuditEntry(resource=resource, **fields))  # type: ignore[arg-type]


async def resources(store: Store, tenant: str = "acme", query: Query = EVERYTHING) -> list[str]:
    return [entry.resource for entry in (await store.list_audit(tenant, query)).rows]


async def test_entries_are_listed_by_tenant_the_last_one_first(store: Store, clock: ManualClock) -> None:
    await store.add_audit([row("a", principal="p", method="m", outcome="OK", request_id="r"), row("b")])
    clock.now += 1
    await store.add_audit([row("c"), row("d", "other"), row("e", "")])
    assert ["c", "b", "a"] == await resources(store)
    assert (["d"], ["e"]) == (await resources(store, "other"), await resources(store, ""))
    first = await store.list_audit("acme", Query(2))
    assert ["c", "b"] == [entry.resource for entry in first.rows]
    (last,) = (await store.list_audit("acme", Query(2, first.next))).rows
    made = v1.AuditEntry(resource="a", principal="p", method="m", outcome="OK", request_id="r")
    made.create_time.FromMicroseconds(clock.now - 1)
    assert made == last


@pytest.mark.parametrize("field", ["principal", "method", "resource", "outcome"])
async def test_entries_are_filtered_by_what_they_say(store: Store, field: str) -> None:
    await store.add_audit([AuditRow("acme", v1.AuditEntry(**{field: text})) for text in "abc"])  # type: ignore[arg-type]
    page = await store.list_audit("acme", Query(10, where=Compare(field, ">=", "b")))
    assert ["c", "b"] == [getattr(entry, field) for entry in page.rows]


async def test_entries_are_filtered_by_their_time(store: Store, clock: ManualClock) -> None:
    for resource in "abc":
        clock.now += 1
        await store.add_audit([row(resource)])
    assert ["c", "b"] == await resources(store, query=Query(10, where=Compare("create_time", ">", clock.now - 2)))


async def test_a_write_and_its_entry_are_both_there_or_neither(store: Store) -> None:
    await create(store)
    record = once("first", NOTHING)._replace(audit=row("sessions/case"))
    with refused("ETAG_MISMATCH"):
        await store.delete_session(KEY, "stale", record)
    assert [] == await resources(store)
    await store.delete_session(KEY, "", record)
    assert ["sessions/case"] == await resources(store)
    with pytest.raises(Replayed):
        await store.delete_session(KEY, "", record)
    assert ["sessions/case"] == await resources(store)


async def test_a_commit_and_its_entry_are_both_there_or_neither(store: Store) -> None:
    await create(store)
    commit = Commit(key=KEY, id="a", events=[changed(put("note", 1))], audit=row("sessions/case/runs/first"))
    with refused("SEQUENCE_MISMATCH"):
        await store.commit(commit._replace(id="b", if_last_sequence=7))
    assert [] == await resources(store)
    await store.commit(commit)
    await store.commit(commit)  # as it is made again when its answer was lost
    assert ["sessions/case/runs/first"] == await resources(store)


async def test_entries_that_are_old_are_forgotten(store: Store, clock: ManualClock) -> None:
    for number in range(5):
        await store.add_audit([row(f"{number}", ("acme", "other")[number % 2])])
        clock.now += 1
    assert 4 == await store.forget_audit(clock.now - 1)
    assert (["4"], []) == (await resources(store), await resources(store, "other"))
    assert 0 == await store.forget_audit(clock.now - 1)


@looks_inside
async def test_entries_that_are_old_are_forgotten_in_bounded_steps(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "FORGET_BATCH", 2)
    await store.add_audit([row(f"{number}") for number in range(5)])
    write, removed = cast(TableStore, store)._write, list[int]()

    async def counted(step: Any, *within: str, **how: Any) -> Any:
        removed.append(await write(step, *within, **how))
        return removed[-1]

    monkeypatch.setattr(store, "_write", counted)
    assert 5 == await store.forget_audit(clock.now + 1)
    assert [2, 2, 1] == removed


async def test_an_audit_goes_with_its_tenant(store: Store) -> None:
    await store.add_key(KeyRow("acme", "a", v1.Key(), b"d", b""))
    await store.add_audit([row("a"), row("b", "other"), row("c", "")])
    while not await store.erase_tenant("acme"):
        pass
    assert ([], ["b"], ["c"]) == (
        await resources(store),
        await resources(store, "other"),
        await resources(store, ""),
    )


async def test_an_entry_that_is_handed_out_is_a_copy(store: Store) -> None:
    given = row("a")
    await store.add_audit([given])
    given.entry.resource = "changed"
    (listed,) = (await store.list_audit("acme", EVERYTHING)).rows
    listed.resource = "changed"
    assert ["a"] == await resources(store)

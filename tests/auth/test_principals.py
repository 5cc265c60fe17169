"""The names that events have for principals: remembered, within a bound, and forgotten once rows are erased."""

import asyncio
from itertools import count

import pytest
from notecase import v1
from notecase_server.auth import principals
from notecase_server.auth.principal import Principal, Role
from notecase_server.auth.principals import Principals
from notecase_server.store.memory import MemoryStore

from tests.store.build import ManualClock


class Counted(MemoryStore):
    """Counts the writes, and can make each of them wait."""

    def __init__(self) -> None:
        super().__init__(ManualClock())
        self.writes = 0
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def know_principal(self, tenant: str, principal: v1.Principal) -> v1.Principal:
        self.writes += 1
        known = await super().know_principal(tenant, principal)
        self.asked.set()
        await self.go.wait()
        return known


def made(store: Counted) -> Principals:
    numbers = count()
    return Principals(store, lambda: f"{next(numbers)}")


ADA = Principal("acme", "keys/a", Role.USER, "ada", display_name="Ada's phone")


async def test_a_name_is_requested_once_for_each_tenant_and_principal() -> None:
    store = Counted()
    known = made(store)
    first = await known.name(ADA, "acme")
    assert first == await known.name(ADA, "acme")
    assert 1 == store.writes
    row = await store.get_principal("acme", first.removeprefix("principals/"))
    assert row is not None
    assert ("keys/a", v1.Key.ROLE_USER, "users/ada", "Ada's phone") == (
        *(row.subject, row.role, row.user),
        row.display_name,
    )
    others = [
        await known.name(Principal("acme", "keys/a", Role.VIEWER, "ada"), "acme"),
        await known.name(Principal("", "keys/o", Role.OPERATOR), ""),
        await known.name(Principal("", "keys/o", Role.OPERATOR), "acme"),
    ]
    assert 4 == len({first, *others})
    assert "" == await known.name(Principal("default", "", Role.ADMIN), "default")
    assert 4 == store.writes


async def test_names_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(principals, "KNOWN_PRINCIPALS", 2)
    store = Counted()
    known = made(store)
    one, two, three = (Principal("acme", f"keys/{number}", Role.USER) for number in range(3))
    for principal in (one, two, one, three, one, two):
        await known.name(principal, "acme")
    assert 4 == store.writes  # the one that was not used for the longest time is forgotten


async def test_a_name_that_was_erased_while_it_was_looked_up_is_not_remembered() -> None:
    store = Counted()
    known = made(store)
    store.go.clear()
    asked = asyncio.ensure_future(known.name(ADA, "acme"))
    await store.asked.wait()
    while not await store.erase_state("acme", "users/ada"):
        pass
    known.forget()
    store.go.set()
    erased = await asked
    assert erased != await known.name(ADA, "acme")

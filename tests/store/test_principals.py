"""Every store: who the principals are that events name."""

import hashlib
from typing import Any

import pytest
from notecase import v1
from notecase_server.store import content, steps
from notecase_server.store.contract import Commit, Replayed, Store

from tests.store.build import KEY, NOTHING, USER_STATE, ManualClock, changed, create, once, put
from tests.store.fixtures import looks_inside


def principal(number: int, subject: str = "keys/a", user: str = "", role: int = v1.Key.ROLE_USER) -> v1.Principal:
    return v1.Principal(name=f"principals/{number}", subject=subject, user=user, role=role)  # type: ignore[arg-type]


async def test_a_principal_is_made_once_for_each_subject_role_and_user(store: Store, clock: ManualClock) -> None:
    first = await store.know_principal("acme", principal(1))
    assert ("principals/1", clock.now) == (first.name, first.create_time.ToMicroseconds())
    clock.now += 1
    assert first == await store.know_principal("acme", principal(2))
    others = [
        await store.know_principal("acme", principal(3, subject="keys/b")),
        await store.know_principal("acme", principal(4, user="users/ada")),
        await store.know_principal("acme", principal(5, role=v1.Key.ROLE_ADMIN)),
        await store.know_principal("other", principal(6)),
    ]
    assert ["principals/3", "principals/4", "principals/5", "principals/6"] == [row.name for row in others]
    assert first == await store.get_principal("acme", "1")
    assert await store.get_principal("acme", "2") is None
    assert await store.get_principal("other", "1") is None


async def test_a_principal_that_is_handed_out_is_a_copy(store: Store) -> None:
    given = principal(1)
    made = await store.know_principal("acme", given)
    made.display_name = given.display_name = "changed"
    found = await store.get_principal("acme", "1")
    assert found is not None
    assert "" == found.display_name


async def test_a_commit_names_who_caused_its_events_but_for_those_that_say_so(store: Store) -> None:
    events = [changed(put("a", 1)), changed(put("b", 2))]
    events[1].principal = "principals/2"
    made = await store.commit(Commit(key=KEY, create=v1.Session(), events=events, principal="principals/1"))
    assert ["principals/1", "principals/2"] == [event.principal for event in made.events]
    stored = await store.read_events(KEY, 0)
    assert made.events == stored


async def test_erasing_a_user_removes_the_principals_that_are_bound_to_it(store: Store) -> None:
    for number in range(3):
        await store.know_principal("acme", principal(number, f"keys/{number}", "users/ada"))
    await store.know_principal("acme", principal(7, user="users/eve"))
    await store.know_principal("other", principal(8, user="users/ada"))
    while not await store.erase_state("acme", "users/ada"):
        pass
    assert [None] * 3 == [await store.get_principal("acme", f"{number}") for number in range(3)]
    assert await store.get_principal("acme", "7") is not None
    assert await store.get_principal("other", "8") is not None


@looks_inside
async def test_principals_are_erased_in_bounded_steps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SWEEP_ROWS", 2)
    for number in range(3):
        await store.know_principal("acme", principal(number, f"keys/{number}", "users/ada"))
    assert [False, False, True] == [await store.erase_state("acme", "users/ada") for _ in range(3)]


async def test_a_principal_goes_with_its_tenant(store: Store) -> None:
    await store.know_principal("acme", principal(1))
    await store.know_principal("other", principal(2))
    while not await store.erase_tenant("acme"):
        pass
    assert await store.get_principal("acme", "1") is None
    assert await store.get_principal("other", "2") is not None


async def test_erasing_a_user_removes_who_uploaded_a_blob_that_others_have_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "FORGET_UPLOADS", 2)
    blobs = {hashlib.sha256(data).hexdigest(): data for data in (b"one", b"two", b"three")}
    for number, user in enumerate(("users/ada", "users/ada", "users/eve")):
        await store.know_principal("acme", principal(number, f"keys/{number}", user))
        for sha256, data in blobs.items():
            await store.put_blob("acme", f"keys/{number}", sha256, data)
    while not await store.erase_state("acme", "users/ada"):
        pass
    known = [await store.known_blobs("acme", f"keys/{number}", "users/nobody", blobs) for number in range(3)]
    assert [set(), set(), set(blobs)] == known


async def test_a_users_uploads_stay_on_record_unless_the_user_is_erased_now(store: Store) -> None:
    """Neither an erasure that must wait for a session, nor a repeat of an earlier one, forgets them."""
    sha256 = hashlib.sha256(b"one").hexdigest()

    async def uploaded() -> bool:
        return bool(await store.known_blobs("acme", "keys/1", "users/nobody", [sha256]))

    assert await store.erase_state("acme", "users/ada", once("erase", NOTHING))
    await store.know_principal("acme", principal(1, "keys/1", "users/ada"))
    await store.put_blob("acme", "keys/1", sha256, b"one")
    await create(store)
    assert not await store.erase_state("acme", "users/ada")
    assert await uploaded()
    await store.delete_session(KEY)
    await store.sweep_sessions()
    with pytest.raises(Replayed):
        await store.erase_state("acme", "users/ada", once("erase", NOTHING))
    assert await uploaded()
    while not await store.erase_state("acme", "users/ada"):
        pass
    assert not await uploaded()


async def test_uploads_are_looked_for_once_however_many_rows_a_user_has(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SWEEP_ROWS", 2)
    await store.update_state(USER_STATE, [put(f"k{number}", 1) for number in range(9)])
    find, looks = content.uploaded_by, []

    def counted(*arguments: Any, **named: Any) -> Any:
        looks.append(1)
        return find(*arguments, **named)

    monkeypatch.setattr(content, "uploaded_by", counted)
    while not await store.erase_state("acme", "users/ada"):
        assert [] == looks
    assert [1] == looks

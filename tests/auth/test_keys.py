"""Keys: what opens, what does not, and what the store is asked."""

import hmac
import secrets
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
from notecase import v1
from notecase_server.auth import keys as module
from notecase_server.auth.keys import ADMIN_KEY, CACHED_SECONDS, Keys
from notecase_server.auth.principal import Metadata, Principal, Role
from notecase_server.errors import NotecaseError, reason_name
from notecase_server.serve import new_id
from notecase_server.store.contract import KeyRow
from notecase_server.store.memory import MemoryStore

from tests.store.build import ManualClock, refused

CHOSEN = "a key that an operator chose".replace(" ", "-") + "-0123456789"
SECOND = 1_000_000


class Counting(MemoryStore):
    """Counts how often a key is looked up."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.lookups = 0

    async def find_key(self, key_id: str) -> KeyRow | None:
        self.lookups += 1
        return await super().find_key(key_id)


class Scene(NamedTuple):
    keys: Keys
    store: Counting
    clock: ManualClock
    monotonic: list[float]

    async def make(self, **fields: object) -> tuple[str, str]:
        """A key of acme's: its id, and what is sent."""
        key = v1.Key(**{"display_name": "ci", "role": v1.Key.ROLE_DEVELOPER, **fields})  # type: ignore[arg-type]
        made, token = await self.keys.create("acme", key)
        return made.name.removeprefix("keys/"), token

    async def who(self, token: str) -> Principal | None:
        return await self.keys.principal({"authorization": f"Bearer {token}"}, dict)

    async def accepts(self, token: str) -> bool:
        try:
            return await self.who(token) is not None
        except NotecaseError as error:
            assert "UNAUTHENTICATED" == reason_name(error.reason)
            return False


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    clock, monotonic = ManualClock(), [0.0]
    store = Counting(clock)
    yield Scene(Keys(store, new_id, clock, lambda: monotonic[0], CHOSEN), store, clock, monotonic)
    await store.close()


async def test_a_key_makes_its_principal(scene: Scene) -> None:
    key_id, token = await scene.make()
    prefix, held, secret = token.split("_", 2)
    assert ("nck", key_id, 43 + 16) == (prefix, held, len(secret))
    assert Principal("acme", f"keys/{key_id}", Role.DEVELOPER) == await scene.who(token)


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.OPERATOR])
async def test_each_role_is_the_principals(scene: Scene, role: Role) -> None:
    _, token = await scene.make(role=v1.Key.Role.Value(f"ROLE_{role.name}"))
    found = await scene.who(token)
    assert found is not None
    assert role is found.role


async def test_an_operators_key_has_no_tenant(scene: Scene) -> None:
    made, token = await scene.keys.create("", v1.Key(role=v1.Key.ROLE_OPERATOR))
    assert Principal("", made.name, Role.OPERATOR) == await scene.who(token)


async def test_the_store_holds_digests_only(scene: Scene) -> None:
    key_id, token = await scene.make()
    row = await scene.store.find_key(key_id)
    assert row is not None
    assert token.split("_", 2)[2] not in repr(row)
    assert 32 == len(row.digest)


@pytest.mark.parametrize("is_known", [False, True])
async def test_a_key_with_one_bit_changed_is_refused_alike_whichever_bit_it_is(scene: Scene, is_known: bool) -> None:
    """By its tag, before anything is looked up, so the time that it takes cannot depend on what the store holds. The
    tag is compared in constant time."""
    _, token = await scene.make()
    if is_known:
        assert await scene.accepts(token)
    before, compared = scene.store.lookups, list[tuple[bytes, bytes]]()
    compare = hmac.compare_digest

    def comparing(given: bytes, right: bytes) -> bool:
        compared.append((given, right))
        return compare(given, right)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hmac, "compare_digest", comparing)
        for bit in range(8 * len("nck_"), 8 * len(token)):
            changed = bytearray(token.encode())
            changed[bit // 8] ^= 1 << bit % 8
            compared.clear()
            assert not await scene.accepts(changed.decode("latin-1"))
            _, (made, held) = compared  # the first is for the key that the operator chose
            assert made != held
    assert before == scene.store.lookups


async def test_a_key_with_characters_left_out_or_added_is_refused(scene: Scene) -> None:
    _, token = await scene.make()
    for other in (token[:-1], f"{token}0", f"{token}_", token.upper(), "nck_", "nck__", f"nck_{'x' * 300}"):
        assert not await scene.accepts(other)


OTHERS: dict[str, Metadata] = {
    "nothing": {},
    "another scheme": {"authorization": "Basic bmNrOmtleQ=="},
    "no token": {"authorization": "Bearer"},
    "another token": {"authorization": "Bearer eyJhbGciOiJSUzI1NiJ9.e30.c2ln"},
    "bytes": {"authorization": b"Bearer nck_x"},
    "another name": {"x-api-key": "nck_x"},
}


@pytest.mark.parametrize("metadata", OTHERS.values(), ids=OTHERS)
async def test_other_credentials_than_keys_are_left_to_other_authenticators(scene: Scene, metadata: Metadata) -> None:
    assert await scene.keys.principal(metadata, dict) is None
    assert 0 == scene.store.lookups


async def test_the_scheme_is_read_in_any_case(scene: Scene) -> None:
    _, token = await scene.make()
    assert await scene.keys.principal({"authorization": f"bearer  {token}"}, dict) is not None


async def test_a_key_ends_when_it_expires_and_not_before(scene: Scene) -> None:
    expire_time = v1.Key().expire_time
    expire_time.FromMicroseconds(scene.clock.now + 90 * SECOND)
    _, token = await scene.make(expire_time=expire_time)
    scene.clock.now += 90 * SECOND - 1
    assert await scene.accepts(token)
    scene.clock.now += 1
    assert not await scene.accepts(token)


async def test_a_key_that_has_expired_is_not_made(scene: Scene) -> None:
    expire_time = v1.Key().expire_time
    expire_time.FromMicroseconds(scene.clock.now)
    with refused("INVALID_FIELD"):
        await scene.make(expire_time=expire_time)


async def test_a_revoked_key_is_refused_although_it_was_cached(scene: Scene) -> None:
    key_id, token = await scene.make()
    assert await scene.accepts(token)
    await scene.keys.revoke("acme", key_id)
    assert not await scene.accepts(token)


async def test_a_key_that_is_revoked_while_it_is_looked_up_is_not_remembered(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id, token = await scene.make()
    find = scene.store.find_key

    async def slowly(key_id: str) -> KeyRow | None:
        row = await find(key_id)
        await scene.keys.revoke("acme", key_id)
        return row

    monkeypatch.setattr(scene.store, "find_key", slowly)
    assert await scene.accepts(token)  # it was accepted before it was revoked
    monkeypatch.setattr(scene.store, "find_key", find)
    assert not await scene.accepts(token)
    assert key_id


async def test_a_rotation_keeps_the_subject_and_takes_the_secret_before_for_a_while(scene: Scene) -> None:
    key_id, first = await scene.make()
    before = await scene.who(first)
    _, second = await scene.keys.rotate("acme", key_id, 60 * SECOND)
    assert before == await scene.who(first) == await scene.who(second)
    scene.clock.now += 60 * SECOND - 1
    assert await scene.accepts(first)
    scene.clock.now += 1
    assert not await scene.accepts(first)
    assert await scene.accepts(second)


async def test_a_second_rotation_ends_the_first_secret(scene: Scene) -> None:
    key_id, first = await scene.make()
    _, second = await scene.keys.rotate("acme", key_id, 60 * SECOND)
    _, third = await scene.keys.rotate("acme", key_id, 60 * SECOND)
    assert [False, True, True] == [await scene.accepts(token) for token in (first, second, third)]


async def test_a_rotation_without_an_overlap_ends_the_secret_at_once(scene: Scene) -> None:
    key_id, first = await scene.make()
    assert await scene.accepts(first)
    _, second = await scene.keys.rotate("acme", key_id, 0)
    assert [False, True] == [await scene.accepts(token) for token in (first, second)]


async def test_a_known_key_costs_no_look_into_the_store(scene: Scene) -> None:
    """Until it has been known for CACHED_SECONDS."""
    _, token = await scene.make()
    for _ in range(3):
        assert await scene.accepts(token)
    assert 1 == scene.store.lookups
    scene.monotonic[0] = CACHED_SECONDS
    assert await scene.accepts(token)
    assert 2 == scene.store.lookups


async def test_keys_that_are_known_are_bounded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_KEYS", 3)
    tokens = [(await scene.make())[1] for _ in range(4)]
    for token in tokens:
        await scene.accepts(token)
    assert 3 == len(scene.keys._judged)
    before = scene.store.lookups
    assert [True] * 3 == [await scene.accepts(token) for token in tokens[1:]]
    assert before == scene.store.lookups


async def test_wrong_keys_cost_no_look_into_the_store(scene: Scene) -> None:
    """However many there are; a valid key is accepted between them."""
    key_id, right = await scene.make()
    elsewhere = Keys(Counting(scene.clock), lambda: key_id, scene.clock, lambda: 0.0)
    _, others = await elsewhere.create("acme", v1.Key(role=v1.Key.ROLE_ADMIN))
    for number in range(1000):
        assert not await scene.accepts(f"nck_{new_id()}_{secrets.token_urlsafe(44)}")
        assert not await scene.accepts(others)
        assert number % 100 or await scene.accepts(right)
    assert 1 == scene.store.lookups


async def test_a_key_that_was_revoked_costs_one_look_in_a_while(scene: Scene) -> None:
    key_id, token = await scene.make()
    await scene.keys.revoke("acme", key_id)
    for _ in range(1000):
        assert not await scene.accepts(token)
    assert 1 == scene.store.lookups


async def test_the_key_that_an_operator_chose_is_an_admins(scene: Scene) -> None:
    assert ADMIN_KEY == await scene.who(CHOSEN)
    assert ("default", Role.ADMIN) == (ADMIN_KEY.tenant, ADMIN_KEY.role)
    assert await scene.who(f"{CHOSEN}x") is None
    assert 0 == scene.store.lookups


async def test_without_a_chosen_key_nothing_is_one(scene: Scene) -> None:
    keys = Keys(scene.store, new_id, scene.clock, lambda: 0.0)
    for token in ("", CHOSEN):
        assert await keys.principal({"authorization": f"Bearer {token}"}, dict) is None

"""Every store: when sessions expire, what is erased with a user, and that nothing of it can be read any more."""

import asyncio
import hashlib
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from notecase import v1
from notecase_server.store.contract import Answer, Fork, Once, Replayed, SessionKey, Store

from tests.store.build import (
    EVERYTHING,
    KEY,
    RECORD,
    USER_STATE,
    ManualClock,
    add,
    changed,
    create,
    edit,
    ended,
    moved,
    once,
    put,
    queued_start,
    refused,
    said,
    session_key,
    start,
)

SECOND = 1_000_000
WAITING = v1.Run.STATE_WAITING
PUT = Answer("state", "users/x/state")


def at(microseconds: int) -> Timestamp:
    time = Timestamp()
    time.FromMicroseconds(microseconds)
    return time


async def expires(store: Store, key: SessionKey = KEY) -> int | None:
    session = await store.get_session(key)
    assert session is not None
    assert not session.HasField("ttl"), "it is never stored"
    return session.expire_time.ToMicroseconds() if session.HasField("expire_time") else None


async def test_a_time_to_live_becomes_a_time_that_activity_does_not_move(store: Store, clock: ManualClock) -> None:
    born = clock.now
    await create(store, ttl=Duration(seconds=60))
    assert await expires(store) == born + 60 * SECOND
    clock.now += 59 * SECOND
    await start(store, "r1", said("m1", run="r1"))
    assert await expires(store) == born + 60 * SECOND
    assert await store.expired_sessions(clock.now, 10) == []
    clock.now += SECOND
    assert await store.expired_sessions(clock.now, 10) == [KEY]
    assert await store.get_session(KEY) is not None, "it is there until it is deleted"
    assert await store.expire_session(KEY)
    assert await store.get_session(KEY) is None
    with refused("SESSION_NOT_FOUND"):
        await add(store, ended("r1"))
    assert not await store.expire_session(KEY)


async def test_each_commit_of_an_idle_session_puts_its_end_off(store: Store, clock: ManualClock) -> None:
    await create(store, idle_ttl=Duration(seconds=60))
    for event in (said("m1"), changed(put("k", 1))):
        clock.now += 50 * SECOND
        await add(store, event)
        assert await expires(store) == clock.now + 60 * SECOND
    last = clock.now
    clock.now += SECOND
    with refused("SEQUENCE_MISMATCH"):
        await add(store, said("m2"), if_last_sequence=9)
    await store.edit_session(KEY, edit(display_name="Case"))
    assert await expires(store) == last + 60 * SECOND, "a refusal or other metadata is no activity"


async def test_a_session_with_a_run_is_not_idle(store: Store, clock: ManualClock) -> None:
    """Running or waiting; its time begins with the end of the run."""
    await create(store, idle_ttl=Duration(seconds=60))
    await start(store, "r1", said("m1", run="r1"))
    assert await expires(store) is None
    clock.now += 1000 * SECOND
    await add(store, moved("r1", WAITING))
    assert await expires(store) is None
    assert await store.expired_sessions(clock.now, 10) == []
    await add(store, ended("r1"))
    assert await expires(store) == clock.now + 60 * SECOND


async def test_a_session_whose_queue_holds_a_run_is_not_idle(store: Store, clock: ManualClock) -> None:
    """The run was accepted, and may have to wait for a place longer than the session may be idle."""
    await create(store, idle_ttl=Duration(seconds=60))
    await start(store, "r1", said("m1", run="r1"))
    await add(store, queued_start("r2"), start=RECORD)
    await add(store, ended("r1"))
    clock.now += 61 * SECOND
    assert await store.expired_sessions(clock.now, 10) == []
    assert not await store.expire_session(KEY)


async def test_an_end_that_was_put_off_is_none(store: Store, clock: ManualClock) -> None:
    """The session may have been used between the check and the deletion."""
    await create(store, idle_ttl=Duration(seconds=60))
    clock.now += 60 * SECOND
    assert await store.expired_sessions(clock.now, 10) == [KEY]
    await add(store, said("m1"))
    assert not await store.expire_session(KEY)
    assert await store.get_session(KEY) is not None


async def test_an_edit_changes_when_a_session_expires(store: Store, clock: ManualClock) -> None:
    await create(store)
    assert await expires(store) is None

    async def edited(**fields: Any) -> int | None:
        await store.edit_session(KEY, edit(expiry=True, **fields))
        return await expires(store)

    assert await edited(ttl=Duration(seconds=5)) == clock.now + 5 * SECOND
    assert await edited(expire_time=at(7 * SECOND)) == 7 * SECOND
    assert await edited(idle_ttl=Duration(seconds=9)) == clock.now + 9 * SECOND
    assert await edited() is None
    await start(store, "r1", said("m1", run="r1"))
    assert await edited(idle_ttl=Duration(seconds=9)) is None
    assert await edited(ttl=Duration(seconds=5)) == clock.now + 5 * SECOND
    await add(store, ended("r1"))
    assert await expires(store) == clock.now + 5 * SECOND


async def test_the_longest_expired_come_first_over_all_tenants(store: Store, clock: ManualClock) -> None:
    keys = [session_key("acme", "a"), session_key("globex", "b"), session_key("acme", "c"), session_key("acme", "d")]
    for key, seconds in zip(keys, (3, 1, 2, 4), strict=True):
        await create(store, key, ttl=Duration(seconds=seconds))
    await create(store, session_key("acme", "for-ever"))
    clock.now += 3 * SECOND
    assert await store.expired_sessions(clock.now, 10) == [keys[1], keys[2], keys[0]]
    assert await store.expired_sessions(clock.now, 2) == [keys[1], keys[2]]


async def test_a_users_state_is_erased_when_no_session_is_left(store: Store) -> None:
    """With its versions and what requests were answered about it; other users' and tenants' stay."""
    others = [USER_STATE._replace(id="bob"), USER_STATE._replace(tenant="globex")]
    for scope in (USER_STATE, *others):
        await store.update_state(scope, [put("name", "x")], once=once(f"put-{scope.id}", PUT, tenant=scope.tenant))
    await create(store)
    assert not await store.erase_state("acme", "users/ada", _counted("erase"))
    assert (await store.get_state(USER_STATE, ["name"])).version == 1
    await store.recall(_counted("erase"))  # raises nothing: what was not done is not recorded
    await store.delete_session(KEY)
    assert not await store.erase_state("acme", "users/ada", _counted("erase")), "rows of it are left"
    await store.sweep_sessions("acme", "users/ada")
    assert await store.erase_state("acme", "users/ada", _counted("erase"))
    assert await store.get_state(USER_STATE, ["name"]) == v1.State()
    assert (await store.list_state(USER_STATE, EVERYTHING))[0] == v1.State()
    for scope in others:
        assert (await store.get_state(scope, ["name"])).version == 1
    with pytest.raises(Replayed) as replayed:
        await store.update_state(USER_STATE, [put("name", "x")], once=once("put-ada", PUT))
    assert replayed.value.response == b"", "a repeat that comes late brings nothing back"
    with pytest.raises(Replayed) as replayed:
        await store.recall(once("put-bob", PUT))
    assert b"x" in replayed.value.response
    with pytest.raises(Replayed) as replayed:
        await store.recall(_counted("erase"))
    assert v1.EraseUserResponse.FromString(replayed.value.response).sessions_deleted == 1
    assert await store.erase_state("acme", "users/nobody")


async def test_of_two_erasures_with_one_id_one_is_done(store: Store) -> None:
    await store.update_state(USER_STATE, [put("name", "x")])
    done = await asyncio.gather(
        *(store.erase_state("acme", "users/ada", _counted("erase")) for _ in range(2)), return_exceptions=True
    )
    assert {type(each) for each in done} == {bool, Replayed}  # whichever comes first
    with refused("REQUEST_ID_REUSED"):
        await store.erase_state("acme", "users/eve", once("erase", digest=b"other"))


async def test_an_erased_users_state_refers_to_no_blob_any_more(store: Store, clock: ManualClock) -> None:
    """So that what only it held is collected as any other blob is."""
    held = hashlib.sha256(b"a portrait").hexdigest()
    await store.put_blob("acme", "", held, b"a portrait")
    value = v1.Value(blob_value=v1.Blob(name=f"blobs/{held}"))
    await store.update_state(USER_STATE, [v1.StateOp(key="portrait", set=value)])
    clock.now += SECOND
    assert await store.sweep_blobs(clock.now, clock.now) == 0
    assert await store.erase_state("acme", "users/ada")
    assert await store.sweep_blobs(clock.now, clock.now) == 1
    assert await store.get_blob("acme", held) is None


async def test_a_fork_has_the_expiry_in_its_request_and_not_its_sources(store: Store, clock: ManualClock) -> None:
    await create(store, ttl=Duration(seconds=60))
    await add(store, said("m1"))
    past = await store.read_past(KEY, 1)
    for name, given, expected in (("a", v1.Session(), None), ("b", v1.Session(ttl=Duration(seconds=5)), 5 * SECOND)):
        key = session_key("acme", name)
        await store.fork(Fork(key=key, source=KEY, past=past, session=given))
        assert await expires(store, key) == (expected and clock.now + expected)


def _counted(request_id: str) -> Once:
    return once(request_id, Answer("erased", erased=1))

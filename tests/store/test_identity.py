"""Every store: a session is its uid. What was made under its name before, or elsewhere, is no part of it."""

import asyncio
import hashlib
import io
from typing import Any, Literal

import pytest
from notecase import v1
from notecase_server.engine import transfer
from notecase_server.errors import NotecaseError, reason_name
from notecase_server.store.base import TableStore
from notecase_server.store.contract import (
    Answer,
    CommandId,
    Commit,
    Fork,
    Once,
    Query,
    SessionKey,
    StepKey,
    Store,
)

from tests.store.build import (
    EVERYTHING,
    KEY,
    NOTHING,
    RECORD,
    ManualClock,
    add,
    called,
    changed,
    contents,
    create,
    dispatched,
    edit,
    ended,
    names,
    once,
    put,
    queued_start,
    reborn,
    refused,
    said,
    session_key,
    start,
    started,
)
from tests.store.fixtures import looks_inside
from tests.support.inside import rows_with

NEXT = reborn(KEY)
COMMAND = CommandId("command", b"d")
PORTRAIT = hashlib.sha256(b"a portrait").hexdigest()
Way = Literal["create", "fork", "restore", "start"]
WAYS: list[Way] = ["create", "fork", "restore", "start"]


async def fill(store: Store, key: SessionKey) -> None:
    """A session with rows of every kind, at work."""
    await store.put_blob(key.tenant, "", PORTRAIT, b"a portrait")
    portrait = v1.Value(blob_value=v1.Blob(name=f"blobs/{PORTRAIT}"))
    session = v1.Session(user="users/ada", labels={"old": "yes"})
    await store.commit(Commit(key=key, create=session, once=about("create", key), id="first"))
    await start(
        store,
        "r1",
        called("m1", "r1", "c1"),
        dispatched("c1", "r1"),
        changed(put("k", "old"), v1.StateOp(key="portrait", set=portrait)),
        key=key,
        once=about("start", key, Answer("run", "r1")),
        command=COMMAND,
        id="second",
    )
    await add(store, queued_start("r2"), key=key, start=RECORD, deaths=1)


def about(request_id: str, key: SessionKey, answer: Answer | None = None) -> Once:
    return once(request_id, answer or Answer("session"), tenant=key.tenant)


async def recorded(store: Store, request: Once) -> bytes | None:
    """The answer that is kept of a request that was carried out."""
    assert isinstance(store, TableStore)
    row = await store._read(lambda tables: tables.request(request))
    assert row is not None
    return row.response


async def made(store: Store, way: Way, key: SessionKey) -> None:
    """A session, in one of the ways there are."""
    source = session_key(key.tenant, "source")
    match way:
        case "create":
            await create(store, key)
        case "start":
            events = [started("r1"), said("m1", run="r1")]
            session = v1.Session(user="users/ada")
            await store.commit(Commit(key=key, create=session, events=events, start=RECORD, claim=True))
        case "fork":
            past = await store.read_past(source, 2)
            await store.fork(Fork(key=key, source=source, past=past, session=v1.Session()))
        case "restore":
            file = b"".join([piece async for piece in transfer.exported(store, source)])
            await store.restore(await transfer.read(io.BytesIO(file), key))


async def prepare(store: Store, tenant: str) -> None:
    source = session_key(tenant, "source")
    await create(store, source)
    await add(store, said("m1"), changed(put("k", "source")), key=source)


async def everything(store: Store, key: SessionKey) -> dict[str, Any]:
    """All that can be asked of a session by its key; no command was applied to it."""
    await store.recall_command(key, COMMAND)
    return {
        **await contents(store, key),
        "message": await store.get_message(key, "m1"),
        "run": await store.get_run(key, "r1"),
        "active run": await store.active_run(key, "r1"),
        "named": await store.get_state(key.state, ["k", "portrait"]),
        "of the run": (await store.list_messages(key, EVERYTHING, step=StepKey("r1"))).rows,
        "found": [await store.find_commit(key, commit_id) for commit_id in ("first", "second")],
    }


@pytest.mark.parametrize("way", WAYS)
async def test_a_session_made_under_the_name_of_a_deleted_one_has_nothing_of_it(store: Store, way: Way) -> None:
    """It is what it would be where there never was another."""
    for tenant in ("acme", "globex"):
        await prepare(store, tenant)
    await fill(store, KEY)
    await store.delete_session(KEY)
    await made(store, way, NEXT)
    twin = NEXT._replace(tenant="globex")
    await made(store, way, twin)
    seen, expected = await everything(store, NEXT), await everything(store, twin)
    assert seen == {**expected, "active run": seen["active run"]}
    assert (seen["active run"] is None) == (expected["active run"] is None) == (way != "start")
    assert await store.find_session("acme", "case") == seen["session"]
    assert seen["session"].uid == NEXT.uid


@pytest.mark.parametrize("way", WAYS)
async def test_by_the_key_of_a_deleted_session_nothing_is_found_or_changed(store: Store, way: Way) -> None:
    await prepare(store, "acme")
    nothing = await everything(store, KEY)
    assert nothing["session"] is None
    await fill(store, KEY)
    past = await store.read_past(KEY, 1)
    await store.delete_session(KEY)
    await made(store, way, NEXT)
    before = await everything(store, NEXT)

    assert await everything(store, KEY) == nothing
    for commit in (
        Commit(key=KEY),
        Commit(key=KEY, events=[said("m9")]),
        Commit(key=KEY, events=[ended("r1")], if_epoch=2),
        Commit(key=KEY, events=[started("r9")], start=RECORD, claim=True),
        Commit(key=KEY, events=[changed(put("k", "late"))], id="second"),
    ):
        with refused("SESSION_NOT_FOUND"):
            await store.commit(commit)
    for write in (
        store.claim(KEY, 2),
        store.edit_session(KEY, edit(display_name="late")),
        store.delete_session(KEY),
        store.read_past(KEY, 0),
        store.fork(Fork(key=session_key("acme", "copy"), source=KEY, past=past, session=v1.Session())),
    ):
        with refused("SESSION_NOT_FOUND"):
            await write
    with refused("ALREADY_EXISTS"):
        await create(store, KEY)
    assert not await store.expire_session(KEY)
    await store.release_run(KEY, "r1")
    assert await everything(store, NEXT) == before


@looks_inside
@pytest.mark.parametrize("way", WAYS)
async def test_requests_about_a_deleted_session_are_not_answered_by_the_next(store: Store, way: Way) -> None:
    """Nor do they make another; what they were answered is gone."""
    await prepare(store, "acme")
    await fill(store, KEY)
    await store.delete_session(KEY, once=once("delete", NOTHING))
    await made(store, way, NEXT)
    before = await everything(store, NEXT)
    requests = about("create", KEY), about("start", KEY, Answer("run", "r1"))
    for swept in (False, True):
        if swept:
            await store.sweep_sessions()
        for request in requests:
            with refused("SESSION_NOT_FOUND"):
                await store.recall(request)
            with refused("SESSION_NOT_FOUND"):
                await store.commit(Commit(key=NEXT, events=[said("m9")], once=request))
    assert [await recorded(store, request) for request in requests] == [None, None]
    assert await everything(store, NEXT) == before


@pytest.mark.parametrize("one", WAYS)
@pytest.mark.parametrize("other", WAYS)
async def test_of_two_that_take_a_name_one_has_it(store: Store, one: Way, other: Way) -> None:
    """At once, and while the session that had it is being deleted; where writes run side by side both could find it
    there still, so that it is deleted before."""
    await prepare(store, "acme")
    await fill(store, KEY)
    keys = [NEXT, reborn(NEXT)]
    ways = [made(store, way, key) for way, key in zip((one, other), keys, strict=True)]
    deletion = store.delete_session(KEY)
    if store.kind == "postgresql":
        await deletion
        deletion = asyncio.sleep(0)
    _, *done = await asyncio.gather(deletion, *ways, return_exceptions=True)
    (lost,) = [each for each in done if each is not None]
    assert isinstance(lost, NotecaseError)
    assert reason_name(lost.reason) == "ALREADY_EXISTS"
    found = await store.find_session("acme", "case")
    assert found is not None
    assert found.uid == keys[done.index(None)].uid
    loser = keys[done.index(lost)]
    assert await everything(store, loser) == await everything(store, loser._replace(uid="never"))
    assert sorted(names((await store.list_sessions("acme", EVERYTHING)).rows)) == ["case", "source"]


async def test_the_names_of_two_tenants_do_not_meet(store: Store) -> None:
    other = NEXT._replace(tenant="globex")
    await create(store)
    assert await store.find_session("globex", "case") is None
    await create(store, other)
    for key in (KEY, other):
        found = await store.find_session(key.tenant, "case")
        assert found is not None
        assert found.uid == key.uid
        assert await store.get_session(key) == found
    for wrong in (KEY._replace(tenant="globex"), other._replace(tenant="acme")):
        assert await store.get_session(wrong) is None
        with refused("SESSION_NOT_FOUND"):
            await store.delete_session(wrong)
    await store.delete_session(KEY)
    assert await store.find_session("acme", "case") is None
    assert await store.find_session("globex", "case") is not None


async def test_a_name_that_was_never_used_is_not_found(store: Store) -> None:
    await create(store)
    for name in ("", "none", "CASE", KEY.uid):
        assert await store.find_session("acme", name) is None


async def test_sessions_that_took_a_name_one_after_the_other_are_listed_apart(store: Store, clock: ManualClock) -> None:
    """Runs and pages go by uid: a page that ended at the old one goes on behind it."""
    await prepare(store, "acme")
    await create(store)
    await start(store, "r1", ended("r1"))
    first = await store.list_sessions("acme", Query(1))
    await store.delete_session(KEY)
    clock.now += 1
    await create(store, NEXT)
    assert (await store.list_runs("acme", None, EVERYTHING)).rows == []
    assert first.next is not None
    rest = await store.list_sessions("acme", Query(9, first.next))
    assert NEXT.uid not in {row.uid for row in rest.rows}
    assert [row.uid for row in (await store.list_sessions("acme", Query(1))).rows] == [NEXT.uid]


@looks_inside
async def test_deletion_leaves_no_row_of_the_uid(store: Store, clock: ManualClock) -> None:
    """Requests alone are remembered, without their answers, until they are forgotten."""
    await fill(store, KEY)
    filled = await rows_with(store, KEY.uid)
    assert filled == {
        *("sessions", "session_names", "changed_messages", "calls", "runs", "commands"),
        *("states", "entries", "blob_references", "requests"),
        *(("events", "active_runs") if store.kind == "postgresql" else ("logs", "lookups", "run_agents")),
    }
    await store.delete_session(KEY)
    await store.sweep_sessions()
    assert await rows_with(store, KEY.uid) <= {"requests"}
    await store.forget_requests(clock.now + 1)
    assert await rows_with(store, KEY.uid) == set()
    clock.now += 1
    assert await store.sweep_blobs(clock.now, clock.now) == 1


@looks_inside
async def test_an_expired_session_leaves_no_row_of_the_uid(store: Store, clock: ManualClock) -> None:
    await fill(store, KEY)
    past = edit(expiry=True)
    past.session.expire_time.FromMicroseconds(clock.now)
    await store.edit_session(KEY, past)
    assert await store.expire_session(KEY)
    await store.sweep_sessions()
    await store.forget_requests(clock.now + 1)
    assert await rows_with(store, KEY.uid) == set()
    await create(store, NEXT)

"""Every store: a commit that is made again under its id, or asked about, is what it was the first time."""

from pathlib import Path
from typing import Any

import pytest
from notecase import v1
from notecase_server.store.contract import (
    REMEMBERED_COMMITS,
    CommandId,
    Commit,
    Committed,
    Fork,
    Store,
)
from notecase_server.store.sqlite.store import SqliteStore

from tests.store.build import (
    EVERYTHING,
    KEY,
    RECORD,
    STATE,
    USER_STATE,
    ManualClock,
    add,
    answered,
    asked,
    called,
    changed,
    contents,
    create,
    dispatched,
    edit,
    ended,
    finished,
    increment,
    once,
    put,
    queued,
    queued_start,
    refused,
    remove,
    replied,
    rewound,
    said,
    session_key,
    start,
    started,
    summarized,
    taken,
    used,
)

BORN = v1.Session(user="users/ada")


def life() -> list[tuple[str, dict[str, Any]]]:
    """Commits of every kind of event, one after the other."""
    cancelled = v1.ToolCall.OUTCOME_CANCELLED
    seals = [v1.Event(tool_finished=v1.ToolCall(call_id=call, tool="lens", outcome=cancelled)) for call in ("c1", "c2")]
    return [
        ("create", {"create": BORN}),
        ("append", {"events": [said("m1"), said("m2")]}),
        ("start", {"events": [started("r1"), said("m3", run="r1")], "start": RECORD, "claim": True}),
        ("reply", {"events": [called("m4", "r1", "c1", "c2"), dispatched("c1", "r1"), asked("i1", "c2", "r1")]}),
        ("queue", {"events": [queued("q1", "r1"), queued_start("r2")], "start": RECORD}),
        ("answer", {"events": [answered("i1", "r1", remember=v1.InputResponse.REMEMBER_SESSION)]}),
        ("finish", {"events": [finished("c1", "r1"), dispatched("c2", "r1", client=False), finished("c2", "r1")]}),
        (
            "states",
            {
                "events": [
                    changed(put("k", 1), put("gone", 1), increment("n", 1)),
                    changed(put("k", 2), remove("gone"), put("l", "x")),
                    changed(put("name", "Ada"), state="user"),
                    changed(put("policy", "p"), state="app"),
                ]
            },
        ),
        ("end", {"events": [taken("q1", "m5", "r1"), replied("m6", "r1"), used("r1"), ended("r1")]}),
        ("cancel early", {"events": [ended("r2", v1.Run.STATE_CANCELLED)]}),
        ("summarize", {"events": [summarized(1, 2)]}),
        ("rewind", {"events": [rewound(5), *seals, changed(remove("k"))]}),
        ("nothing", {}),
    ]


async def test_a_commit_made_again_is_what_it_was_and_makes_nothing(store: Store) -> None:
    """Whatever it did, and though each of its conditions would fail now."""
    await create(store, session_key("acme", "other"))
    used_once, command = once("used"), CommandId("used", b"d")
    await add(store, once=used_once, key=session_key("acme", "other"))
    for name, fields in life():
        commit = Commit(key=KEY, id=name, **fields)
        made = await store.commit(commit)
        if name == "create":
            await add(store, command=command)
        before = await contents(store)
        again = commit._replace(
            once=used_once,
            command=CommandId("used", b"another"),
            create=BORN,
            if_epoch=99,
            if_last_sequence=99,
            if_state_version={"": 99},
            content_limit=0,
        )
        for repeated in (await store.commit(commit), await store.commit(again), await store.find_commit(KEY, name)):
            assert repeated == made, name
        assert await contents(store) == before, name


async def test_a_commit_is_remembered_through_seven_more(store: Store) -> None:
    await create(store)
    first = await add(store, said("m0"), id="c0")
    for number in range(1, REMEMBERED_COMMITS):
        await add(store, said(f"m{number}"), id=f"c{number}")
    for found in (await store.find_commit(KEY, "c0"), await add(store, said("m0"), id="c0")):
        assert found is not None
        assert (found.events, found.messages, found.runs, found.state) == (first.events, first.messages, {}, {})
    assert len(await store.read_events(KEY, 0)) == REMEMBERED_COMMITS
    await add(store, id="one more")
    assert await store.find_commit(KEY, "c0") is None
    assert await store.find_commit(KEY, "c1") is not None
    assert [event.sequence for event in (await add(store, said("new"), id="c0")).events] == [REMEMBERED_COMMITS + 1]


async def test_a_repeat_does_not_age_the_others(store: Store) -> None:
    await create(store)
    await add(store, said("m1"), id="first")
    for _ in range(2 * REMEMBERED_COMMITS):
        await add(store, said("m2"), id="second")
    assert await store.find_commit(KEY, "first") is not None
    assert len(await store.read_events(KEY, 0)) == 2


async def test_other_writes_of_a_session_lose_no_commit(store: Store) -> None:
    """Claims, edits, commits without an id and refused ones, however many."""
    epoch = (await create(store)).epoch
    made = await add(store, said("m1"), id="first")
    for number in range(2 * REMEMBERED_COMMITS):
        await store.claim(KEY, epoch + number)
        await store.edit_session(KEY, edit(display_name=f"{number}"))
        await add(store, said(f"n{number}"))
        with refused("SEQUENCE_MISMATCH"):
            await add(store, said("x"), if_last_sequence=0, id=f"refused{number}")
    found = await store.find_commit(KEY, "first")
    assert found is not None
    assert (found.events, found.messages) == (made.events, made.messages)
    session = await store.get_session(KEY)
    assert session is not None
    assert (found.session, found.epoch) == (session, epoch + 2 * REMEMBERED_COMMITS)


async def test_a_refused_commit_is_not_remembered(store: Store) -> None:
    await create(store)
    with refused("RUN_NOT_FOUND"):
        await add(store, said("m1"), ended("nobody"), id="c")
    assert await store.find_commit(KEY, "c") is None
    assert (await add(store, said("m1"), id="c")).session.last_sequence == 1


async def test_commit_ids_belong_to_their_session(store: Store) -> None:
    """To none of another one, of a fork, or of the next of the name; and an empty id is none."""
    other, copy = session_key("acme", "other"), session_key("acme", "copy")
    await create(store)
    await create(store, other)
    await add(store, said("m1"), id="c")
    await add(store, said("m2"))
    past = await store.read_past(KEY, 1)
    await store.fork(Fork(key=copy, source=KEY, past=past, session=v1.Session()))
    for key in (other, copy, KEY._replace(tenant="globex"), session_key("acme", "none")):
        assert await store.find_commit(key, "c") is None
    for commit_id in ("", "C", "c "):
        assert await store.find_commit(KEY, commit_id) is None
    assert (await add(store, said("m9"), id="c", key=other)).session.last_sequence == 1
    assert (await add(store, said("m9"), id="c", key=copy)).session.last_sequence == 2
    await store.delete_session(KEY)
    assert await store.find_commit(KEY, "c") is None
    with refused("SESSION_NOT_FOUND"):
        await add(store, said("m1"), id="c")


async def test_what_is_found_has_rows_as_they_are_now(store: Store) -> None:
    await create(store)
    made = await start(store, "r1", called("m1", "r1", "c1"), changed(put("k", 1)), id="c")
    await add(store, finished("c1", "r1"), changed(put("k", 2)), ended("r1"))
    found = await store.find_commit(KEY, "c")
    assert found is not None
    assert found.events == made.events
    run, message = await store.get_run(KEY, "r1"), await store.get_message(KEY, "m1")
    assert run is not None
    assert (found.runs, found.messages) == ({"r1": run[0]}, {"m1": message})
    assert found.state == {STATE: await store.get_state(STATE, ["k"])}


async def test_the_state_of_a_user_is_found_by_its_own_scope(store: Store) -> None:
    await create(store)
    made = await add(store, changed(put("name", "Ada"), put("age", 36), state="user"), id="c")
    found = await store.find_commit(KEY, "c")
    assert found is not None
    assert found.state == made.state == {USER_STATE: await store.get_state(USER_STATE, ["age", "name"])}


@pytest.mark.parametrize("kills", [1, 3])
async def test_commits_are_remembered_through_restarts(tmp_path: Path, clock: ManualClock, kills: int) -> None:
    store = await SqliteStore.open(tmp_path / "store.db", clock)
    made: dict[str, Committed] = {"create": await store.commit(Commit(key=KEY, id="create", create=BORN))}
    made["start"] = await start(store, "r1", said("m1", run="r1"), id="start")
    for _ in range(kills):
        await store.close()
        store = await SqliteStore.open(tmp_path / "store.db", clock)
        again = await start(store, "r1", said("m1", run="r1"), id="start", if_epoch=1)
        assert again == made["start"]
        found = await store.find_commit(KEY, "create")
        assert found is not None
        assert (found.events, found.runs) == ([], {})
    assert len((await store.list_runs("acme", KEY, EVERYTHING)).rows) == 1
    await store.close()

"""Every store: what each kind of write is answered, and answered again when it is repeated."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from notecase import v1
from notecase_server.store import answers
from notecase_server.store.contract import PAGE_BYTES, Answer, KeyRow, Once, Replayed, Store

from tests.store.build import (
    APP_STATE,
    KEY,
    RECORD,
    USER_STATE,
    add,
    changed,
    create,
    edit,
    ended,
    once,
    put,
    queued_start,
    remove,
    replied,
    said,
    start,
    started,
)

Write = Callable[[Store, Once | None], Awaitable[Any]]
SESSION, STARTED, NOTHING = Answer("session"), Answer("started"), Answer("nothing")
RUN, MESSAGES, AGENT = Answer("run", "r1"), Answer("messages"), Answer("agent")
SHERLOCK = v1.Agent(display_name="S")
CHANGE = [put("b", "x"), put("a", 1), remove("none")]


def turned(store: Store, record: Once | None) -> Awaitable[Any]:
    """One run ends and the next begins."""
    return add(store, ended("r1"), started("r2"), said("m2", run="r2"), start=RECORD, once=record)


WRITES: dict[str, tuple[Answer, Write]] = {
    "append to a session": (SESSION, lambda store, record: add(store, said("m2"), once=record)),
    "a commit of nothing": (SESSION, lambda store, record: add(store, once=record)),
    "edit": (SESSION, lambda store, record: store.edit_session(KEY, edit(display_name="x"), once=record)),
    "a run's end": (RUN, lambda store, record: add(store, replied("m2", "r1"), ended("r1"), once=record)),
    "the start after an end": (STARTED, turned),
    "a place in the queue": (
        STARTED,
        lambda store, record: add(store, queued_start("r2"), start=RECORD, once=record),
    ),
    "an entry": (Answer("entry", "a"), lambda store, record: add(store, changed(*CHANGE), once=record)),
    "an entry of the app": (
        Answer("entry", "a"),
        lambda store, record: store.update_state(APP_STATE, CHANGE, None, record),
    ),
    "state": (
        Answer("state", "sessions/case/state"),
        lambda store, record: add(store, changed(*CHANGE), once=record),
    ),
    "state of a user": (
        Answer("state", "users/ada/state"),
        lambda store, record: store.update_state(USER_STATE, CHANGE, None, record),
    ),
    "messages": (MESSAGES, lambda store, record: add(store, said("m2"), said("m3"), changed(put("k", 1)), once=record)),
    "a new agent": (AGENT, lambda store, record: store.create_agent("acme", "new", SHERLOCK, record)),
    "another agent": (AGENT, lambda store, record: store.edit_agent("acme", "sherlock", SHERLOCK, 1, record)),
    "a deleted agent": (NOTHING, lambda store, record: store.delete_agent("acme", "sherlock", "", record)),
    "a deleted session": (NOTHING, lambda store, record: store.delete_session(KEY, "", record)),
    "a new key": (
        Answer("made_key"),
        lambda store, record: store.add_key(KeyRow("acme", "new", v1.Key(), b"d", b""), record),
    ),
    "a rotated key": (
        Answer("rotated_key"),
        lambda store, record: store.rotate_key("acme", "old", b"d", 0, record),
    ),
    "a tenant": (Answer("tenant"), lambda store, record: store.create_tenant("other", "", record)),
    "an erased user": (
        Answer("erased", erased=3),
        lambda store, record: store.erase_state("acme", "users/nobody", record),
    ),
}

TOLD: dict[str, Callable[[Any], Message]] = {
    "nothing": lambda _: Empty(),
    "session": lambda result: v1.Session(name="sessions/case", uid=KEY.uid, user="users/ada"),
    "run": lambda result: v1.Run(name="sessions/case/runs/r1", agent="agents/sherlock"),
    "started": lambda result: v1.Run(name="sessions/case/runs/r2", agent="agents/sherlock"),
    "entry": lambda result: v1.StateEntry(value=v1.Value(int_value=1), version=1),
    "state": lambda result: v1.State(version=1),
    "messages": lambda result: v1.AppendMessagesResponse(last_sequence=5),
    "agent": lambda result: result,
    "made_key": lambda result: v1.CreateKeyResponse(key=result),
    "rotated_key": lambda result: v1.RotateKeyResponse(key=result),
    "tenant": lambda result: result,
    "erased": lambda result: v1.EraseUserResponse(sessions_deleted=3),
}
"""The least that an answer of each kind must contain."""


async def prepare(store: Store) -> None:
    await create(store)
    await store.create_agent("acme", "sherlock", v1.Agent(display_name="before"))
    await store.add_key(KeyRow("acme", "old", v1.Key(), b"c", b""))
    await start(store, "r1", said("m1", run="r1"))


@pytest.mark.parametrize("name", WRITES)
async def test_a_repeat_is_answered_in_the_words_of_the_first(store: Store, name: str) -> None:
    answer, write = WRITES[name]
    await prepare(store)
    record = once("request", answer)
    result = await write(store, record)
    before = str(result)
    given = None if isinstance(result, bool) else result
    first = answers.of(answer, given)
    assert str(result) == before, "the result stays as it was"
    with pytest.raises(Replayed) as caught:
        await write(store, record)
    assert type(first).FromString(caught.value.response) == first
    expected = TOLD[answer.kind](result)
    assert type(first) is type(expected)
    told = type(expected)()
    told.CopyFrom(first)
    for field, _ in expected.ListFields():
        assert getattr(told, field.name) == getattr(expected, field.name)


async def test_every_kind_of_answer_is_among_these() -> None:
    assert {answer.kind for answer, _ in WRITES.values()} == set(TOLD) == set(answers._ANSWERS)


async def test_names_within_an_answer_are_whole(store: Store) -> None:
    await prepare(store)
    done = await add(store, replied("m2", "r1"), ended("r1"))
    run = answers.of(RUN, done)
    assert (run.name, run.reply.name) == ("sessions/case/runs/r1", "sessions/case/messages/m2")
    messages = answers.of(MESSAGES, done).messages
    assert [(each.name, each.run) for each in messages] == [("sessions/case/messages/m2", "sessions/case/runs/r1")]
    await start(store, "r2")
    session = answers.of(SESSION, await add(store, said("m3", run="r2")))
    assert (session.name, session.active_run) == ("sessions/case", "sessions/case/runs/r2")


@pytest.mark.parametrize("owner", ["session", "user", "app"])
async def test_large_state_has_no_values_after_the_first_page_in_the_order_of_keys(store: Store, owner: str) -> None:
    """Whatever order they were written in; the entry that crosses the limit is complete, and all have versions."""
    await create(store)
    ops = [put(f"k{number}", "x" * 400_000) for number in (4, 2, 0, 3, 1)]
    answer = Answer("state", "the/state")
    record = once("request", answer)
    result: Any
    match owner:
        case "session":
            result = await add(store, changed(*ops), once=record)
        case "user":
            result = await store.update_state(USER_STATE, ops, None, record)
        case _:
            result = await store.update_state(APP_STATE, ops, None, record)
    with pytest.raises(Replayed) as caught:
        await store.recall(record)
    for state in (answers.of(answer, result), v1.State.FromString(caught.value.response)):
        assert state.name == "the/state"
        assert {key: entry.HasField("value") for key, entry in state.entries.items()} == {
            **dict.fromkeys(["k0", "k1", "k2"], True),
            **dict.fromkeys(["k3", "k4"], False),
        }
        assert {entry.version for entry in state.entries.values()} == {state.version} == {1}
    scope = {"session": KEY.state, "user": USER_STATE}.get(owner, APP_STATE)
    kept = await store.get_state(scope, [f"k{number}" for number in range(5)])
    assert all(entry.HasField("value") for entry in kept.entries.values())


async def test_a_state_of_a_page_or_less_is_returned_completely(store: Store) -> None:
    ops = [put("a", "x" * (PAGE_BYTES - 100)), put("b", "y")]
    state = answers.of(Answer("state", "app/state"), await store.update_state(APP_STATE, ops))
    assert all(entry.HasField("value") for entry in state.entries.values())


async def test_requests_of_two_subjects_do_not_meet(store: Store) -> None:
    """Each has its own ids, and its own answers."""
    await create(store)
    ada, eve = once("request")._replace(subject="ada"), once("request", digest=b"other")._replace(subject="eve")
    await add(store, said("m1"), once=ada)
    await store.recall(eve)
    await store.recall(once("request"))
    await add(store, said("m2"), once=eve)
    heads = []
    for record in (ada, eve):
        with pytest.raises(Replayed) as caught:
            await store.recall(record)
        heads.append(v1.Session.FromString(caught.value.response).last_sequence)
    assert heads == [1, 2]


async def test_a_write_that_cannot_be_repeated_leaves_a_record_too(store: Store) -> None:
    """Under an id of the engine, so that a lost answer can be looked up."""
    record, other = (Once.unnamed("acme", each, AGENT) for each in ("u1", "u2"))
    made = await store.create_agent("acme", "sherlock", SHERLOCK, record)
    with pytest.raises(Replayed) as caught:
        await store.recall(record)
    assert v1.Agent.FromString(caught.value.response) == made
    await store.recall(other)

"""Every store: what is kept of runs and messages, and what a run may not do."""

import pytest
from notecase import v1
from notecase_server.store.contract import ActiveRun, Query, RunRecord, StepKey, Store

from tests.store.build import (
    AGENT,
    EVERYTHING,
    KEY,
    RECORD,
    ManualClock,
    add,
    called,
    contents,
    create,
    ended,
    finished,
    names,
    refused,
    replied,
    said,
    session_key,
    start,
    started,
    used,
)


async def test_a_run_begins_with_its_session_claimed_and_busy(store: Store, clock: ManualClock) -> None:
    await create(store)
    committed = await start(store, "r1", said("m1", run="r1"), labels={"k": "v"})
    run = v1.Run(
        name="r1",
        agent="agents/sherlock",
        agent_revision=1,
        state=v1.Run.STATE_RUNNING,
        attempt=1,
        first_sequence=1,
        last_sequence=2,
        labels={"k": "v"},
    )
    run.create_time.FromMicroseconds(clock.now)
    run.state_time.FromMicroseconds(clock.now)
    assert committed.runs == {"r1": run}
    assert await store.get_run(KEY, "r1") == (run, b"digest")
    assert committed.session.active_run == "r1"
    assert committed.session.activity == v1.Session.ACTIVITY_RUNNING
    assert await store.active_runs() == [ActiveRun(KEY, run, AGENT, committed.epoch)]


async def test_a_session_has_one_run_at_a_time(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    before = await contents(store)
    with refused("RUN_ACTIVE") as caught:
        await start(store, "r2", said("m1", run="r2"))
    assert caught.value.metadata == {"run": "sessions/case/runs/r1"}
    assert await contents(store) == before
    await add(store, ended("r1"))
    assert (await start(store, "r2")).session.active_run == "r2"


@pytest.mark.parametrize("state", [v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED, v1.Run.STATE_CANCELLED])
async def test_a_run_ends_once_and_does_nothing_afterwards(
    store: Store, clock: ManualClock, state: v1.Run.State.ValueType
) -> None:
    await create(store)
    await start(store, "r1")
    clock.now += 3
    failure = ended("r1", state)
    failure.run_state_changed.error.message = "why"
    committed = await add(store, failure)
    run = committed.runs["r1"]
    assert (run.state, run.error.message, run.last_sequence) == (state, "why", 2)
    assert run.end_time.ToMicroseconds() == clock.now
    assert (committed.session.active_run, committed.session.activity) == ("", v1.Session.ACTIVITY_IDLE)
    assert await store.active_runs() == []
    before = await contents(store)
    for event in (ended("r1"), replied("m9", "r1"), used("r1")):
        with refused("RUN_ENDED"):
            await add(store, event)
    assert await contents(store) == before


async def test_a_run_id_is_used_once(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    await add(store, ended("r1"))
    with refused("ALREADY_EXISTS"):
        await start(store, "r1")
    with refused("RUN_NOT_FOUND"):
        await add(store, replied("m1", "nobody"))


async def test_a_run_needs_its_record(store: Store) -> None:
    await create(store)
    before = await contents(store)
    with pytest.raises(ValueError, match="start"):
        await add(store, said("m1"), started("r1"))
    assert await contents(store) == before


async def test_a_takeover_finds_the_agent_as_it_was(store: Store) -> None:
    other = session_key("globex", "case")
    await create(store)
    await create(store, other)
    record = RunRecord(b"d", v1.Agent(name="agents/poirot", revision=7))
    await add(store, started("r1"), key=other, claim=True, start=record)
    await start(store, "r1")
    active = {each.key: each for each in await store.active_runs()}
    assert set(active) == {KEY, other}
    assert (active[other].agent, active[KEY].agent) == (record.agent, RECORD.agent)
    epoch = await store.claim(other, active[other].epoch)
    change = v1.RunStateChanged(state=v1.Run.STATE_RUNNING, attempt=2)
    await add(store, v1.Event(run="r1", run_state_changed=change), key=other, if_epoch=epoch)
    again = {each.key: each for each in await store.active_runs()}[other]
    assert (again.run.attempt, again.epoch) == (2, epoch)


async def test_the_reply_is_the_last_message_completed_and_read_in_full(store: Store) -> None:
    await create(store)
    await start(store, "r1", said("question", run="r1"))
    await add(store, replied("first", "r1"))
    cut = replied("cut", "r1")
    cut.message_added.status = v1.Message.STATUS_INCOMPLETE
    committed = await add(store, replied("last", "r1", text="the end"), cut, ended("r1"))
    assert committed.runs["r1"].reply == v1.Message(name="last", sequence=4)
    found = await store.get_run(KEY, "r1")
    assert found is not None
    assert found[0].reply == await store.get_message(KEY, "last") == committed.messages["last"]
    listed = (await store.list_runs("acme", None, EVERYTHING)).rows[0]
    assert listed.reply == found[0].reply


async def test_usage_is_summed_for_the_run_and_the_session(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    await add(store, used("r1", "small", 1), used("r1", "small", 2))
    await add(store, ended("r1"))
    await start(store, "r2")
    committed = await add(store, used("r2", "large", 4))
    assert (await store.get_run(KEY, "r1") or [v1.Run()])[0].usage == v1.Usage(
        model="small", model_calls=2, input_tokens=3, output_tokens=6
    )
    assert committed.runs["r2"].usage.model == "large"
    assert committed.session.usage == v1.Usage(model_calls=3, input_tokens=7, output_tokens=14)


async def test_an_outcome_is_folded_into_the_message_of_its_call(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    added = await add(store, called("m1", "r1", "c1", "c2"))
    one = await add(store, finished("c2", "r1"))
    two = await add(store, finished("c1", "r1"))
    statuses = [commit.messages["m1"].status for commit in (added, one, two)]
    assert statuses == [v1.Message.STATUS_IN_PROGRESS, v1.Message.STATUS_IN_PROGRESS, v1.Message.STATUS_COMPLETED]
    message = await store.get_message(KEY, "m1")
    assert message == two.messages["m1"]
    assert (message.sequence, message.update_sequence) == (2, 4)
    assert [part.tool_call.error for part in message.parts[1:]] == ["broken", "broken"]
    assert (await store.list_messages(KEY, EVERYTHING)).rows == [message]
    logged = (await store.read_events(KEY, 1, limit=1))[0].message_added
    assert [part.tool_call.outcome for part in logged.parts[1:]] == [v1.ToolCall.OUTCOME_PENDING] * 2


async def test_an_outcome_in_the_commit_of_its_call_is_folded_too(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    committed = await add(store, called("m1", "r1", "c1"), finished("c1", "r1"))
    message = await store.get_message(KEY, "m1")
    assert message == committed.messages["m1"]
    assert (message.sequence, message.update_sequence, message.status) == (2, 3, v1.Message.STATUS_COMPLETED)
    await add(store, called("m2", "r1", "c2"))
    both = await add(store, finished("c2", "r1"))
    assert list(both.messages) == ["m2"]


async def test_messages_are_listed_by_sequence_both_ways(store: Store) -> None:
    await create(store)
    await add(store, *(said(f"m{number}") for number in range(5)))
    first = await store.list_messages(KEY, Query(2))
    assert (names(first.rows), first.next) == (["m0", "m1"], (2,))
    rest = await store.list_messages(KEY, Query(3, first.next))
    assert (names(rest.rows), rest.next) == (["m2", "m3", "m4"], None)
    newest = await store.list_messages(KEY, Query(2), newest_first=True)
    assert (names(newest.rows), newest.next) == (["m4", "m3"], (4,))
    older = await store.list_messages(KEY, Query(9, newest.next), newest_first=True)
    assert (names(older.rows), older.next) == (["m2", "m1", "m0"], None)
    assert (await store.list_messages(KEY, Query(9, (5,)))).rows == []
    assert (await store.list_messages(session_key("acme", "none"), Query(9))).rows == []


async def test_the_messages_of_one_run(store: Store) -> None:
    await create(store)
    await add(store, said("before"))
    await start(store, "r1", said("q1", run="r1"))
    await add(store, said("aside"))
    await add(store, replied("a1", "r1"), ended("r1"))
    await start(store, "r2", said("q2", run="r2"))
    assert names((await store.list_messages(KEY, EVERYTHING, step=StepKey("r1"))).rows) == ["q1", "a1"]
    page = await store.list_messages(KEY, Query(1), newest_first=True, step=StepKey("r1"))
    assert (names(page.rows), page.next) == (["a1"], (5,))
    assert names((await store.list_messages(KEY, Query(1, page.next), newest_first=True, step=StepKey("r1"))).rows) == [
        "q1"
    ]
    assert (await store.list_messages(KEY, EVERYTHING, step=StepKey("none"))).rows == []


async def test_a_page_of_messages_ends_at_a_mebibyte_and_continues_behind_it(store: Store) -> None:
    await create(store)
    await add(store, *(said(f"m{number}", "x" * 400_000) for number in range(5)))
    first = await store.list_messages(KEY, EVERYTHING)
    assert (names(first.rows), first.next) == (["m0", "m1", "m2"], (3,))
    rest = await store.list_messages(KEY, Query(1000, first.next))
    assert (names(rest.rows), rest.next) == (["m3", "m4"], None)


async def test_what_does_not_exist_is_none(store: Store) -> None:
    await create(store)
    assert await store.get_session(session_key("acme", "none")) is None
    assert await store.get_message(KEY, "none") is None
    assert await store.get_run(KEY, "none") is None
    assert await store.get_message(session_key("acme", "none"), "m1") is None
    assert await store.get_run(session_key("acme", "none"), "r1") is None

"""Every store: calls, questions to people, and queued commands."""

import pytest
from notecase import v1
from notecase_server.store.contract import CommandId, Commit, Duplicate, RunRecord, Store
from notecase_server.store.fold import MAX_QUEUED

from tests.store.build import (
    AGENT,
    EVERYTHING,
    KEY,
    LENS,
    RECORD,
    ManualClock,
    add,
    answered,
    asked,
    called,
    contents,
    create,
    dispatched,
    edit,
    ended,
    finished,
    moved,
    names,
    queued,
    queued_start,
    refused,
    replied,
    said,
    session_key,
    start,
    started,
    taken,
)

QUEUED, RUNNING, WAITING = v1.Run.STATE_QUEUED, v1.Run.STATE_RUNNING, v1.Run.STATE_WAITING
CANCELLED = v1.Run.STATE_CANCELLED


async def run_of(store: Store, run: str) -> v1.Run:
    found = await store.get_run(KEY, run)
    assert found is not None
    return found[0]


async def queue_of(store: Store) -> list[str]:
    session = await store.get_session(KEY)
    assert session is not None
    return [waiting.command_id for waiting in session.queued_commands]


@pytest.fixture
async def calling(store: Store) -> Store:
    """A session whose run r1 has made the calls c1 and c2."""
    await create(store)
    await start(store, "r1")
    await add(store, called("m1", "r1", "c1", "c2"))
    return store


async def test_a_call_at_its_caller_is_pending_until_it_has_an_outcome(calling: Store, clock: ManualClock) -> None:
    clock.now += 5
    committed = await add(calling, dispatched("c1", "r1"), dispatched("c2", "r1", client=False))
    (pending,) = committed.runs["r1"].pending_calls
    assert (pending.call_id, pending.outcome, pending.attempt) == ("c1", v1.ToolCall.OUTCOME_RUNNING, 1)
    assert pending.start_time.ToMicroseconds() == clock.now
    assert committed.runs["r1"].tool_calls == 2
    clock.now += 7
    committed = await add(calling, finished("c1", "r1"))
    assert list(committed.runs["r1"].pending_calls) == []
    (done,) = [event.tool_finished for event in committed.events]
    assert (done.elapsed.ToMicroseconds(), done.start_time) == (7, pending.start_time)
    assert (await run_of(calling, "r1")).tool_calls == 2
    message = await calling.get_message(KEY, "m1")
    assert message is not None
    outcomes = [part.tool_call.outcome for part in message.parts[1:]]
    assert outcomes == [v1.ToolCall.OUTCOME_FAILED, v1.ToolCall.OUTCOME_RUNNING]
    assert message.parts[1].tool_call == done


@pytest.mark.parametrize("kind", ["tool_started", "tool_finished"])
async def test_a_call_has_one_outcome_and_nothing_comes_after_it(calling: Store, kind: str) -> None:
    await add(calling, dispatched("c1", "r1"), finished("c1", "r1"))
    before = await contents(calling)
    event = dispatched("c1", "r1") if kind == "tool_started" else finished("c1", "r1")
    with refused("CALL_NOT_PENDING") as caught:
        await add(calling, said("m2"), event)
    assert caught.value.metadata == {"call_id": "c1"}
    assert await contents(calling) == before


async def test_of_two_results_in_one_commit_neither_is_kept(calling: Store) -> None:
    before = await contents(calling)
    with refused("CALL_NOT_PENDING"):
        await add(calling, finished("c1", "r1"), finished("c1", "r1"))
    assert await contents(calling) == before


@pytest.mark.parametrize("call_id", ["nobody", ""])
async def test_a_call_that_was_never_made_is_not_pending(calling: Store, call_id: str) -> None:
    for event in (dispatched(call_id, "r1"), finished(call_id, "r1")):
        with refused("CALL_NOT_PENDING"):
            await add(calling, event)


async def test_a_call_of_another_session_is_not_pending_here(calling: Store) -> None:
    other = session_key("acme", "other")
    await create(calling, other)
    await start(calling, "r1", key=other)
    with refused("CALL_NOT_PENDING"):
        await add(calling, finished("c1", "r1"), key=other)


async def test_a_call_that_is_run_again_counts_once_and_keeps_its_last_attempt(
    calling: Store, clock: ManualClock
) -> None:
    await add(calling, dispatched("c1", "r1"))
    again = dispatched("c1", "r1")
    again.tool_started.attempt = 2
    clock.now += 3
    committed = await add(calling, again)
    assert committed.runs["r1"].tool_calls == 1
    (pending,) = committed.runs["r1"].pending_calls
    assert (pending.attempt, pending.start_time.ToMicroseconds()) == (2, clock.now)


async def test_a_user_is_asked_until_somebody_answers(calling: Store) -> None:
    first, second = asked("i1", "c1", "r1"), asked("i2", "c2", "r1")
    committed = await add(calling, first, second)
    assert list(committed.runs["r1"].pending_inputs) == [first.input_requested, second.input_requested]
    await add(calling, answered("i1", "r1"))
    assert list((await run_of(calling, "r1")).pending_inputs) == [second.input_requested]
    before = await contents(calling)
    for input_id in ("i1", "nobody"):
        with refused("INPUT_NOT_PENDING"):
            await add(calling, said("m2"), answered(input_id, "r1"))
    assert await contents(calling) == before


def remembers(sequence: int, approved: bool = True) -> v1.RememberedApproval:
    return v1.RememberedApproval(
        agent=AGENT.name, tool="lens", digest=LENS.digest, approved=approved, sequence=sequence
    )


async def test_a_decision_is_remembered_for_as_long_as_it_says(calling: Store) -> None:
    """For the run or for the session; approved or denied; each under what it answered, with its place in the log."""
    approve, deny = v1.InputResponse.DECISION_APPROVE, v1.InputResponse.DECISION_DENY
    run, session = v1.InputResponse.REMEMBER_RUN, v1.InputResponse.REMEMBER_SESSION
    asking = await add(calling, *(asked(f"i{number}", "c1", "r1") for number in range(4)))
    head = asking.session.last_sequence
    committed = await add(calling, answered("i0", "r1", approve))
    assert (dict(committed.runs["r1"].remembered), dict(committed.session.remembered)) == ({}, {})
    committed = await add(calling, answered("i1", "r1", approve, run))
    of_run = {"i1": remembers(head + 2)}
    assert (dict(committed.runs["r1"].remembered), dict(committed.session.remembered)) == (of_run, {})
    committed = await add(calling, answered("i2", "r1", approve, session), answered("i3", "r1", deny, session))
    of_session = {"i2": remembers(head + 3), "i3": remembers(head + 4, approved=False)}
    assert dict(committed.session.remembered) == of_session
    assert dict((await run_of(calling, "r1")).remembered) == of_run
    await add(calling, finished("c1", "r1"), finished("c2", "r1"), ended("r1"))
    committed = await start(calling, "r2")
    assert dict(committed.runs["r2"].remembered) == {}
    assert dict(committed.session.remembered) == of_session


async def test_a_rewind_takes_back_what_was_remembered_after_it(calling: Store) -> None:
    """And with the last answer what it overruled is in force again."""
    approve, deny = v1.InputResponse.DECISION_APPROVE, v1.InputResponse.DECISION_DENY
    session = v1.InputResponse.REMEMBER_SESSION
    asking = await add(calling, asked("i1", "c1", "r1"), asked("i2", "c2", "r1"))
    head = asking.session.last_sequence
    await add(calling, answered("i1", "r1", approve, session), answered("i2", "r1", deny, session))
    await add(calling, finished("c1", "r1"), finished("c2", "r1"), ended("r1"))
    committed = await add(calling, v1.Event(rewound=v1.Rewound(to_sequence=head + 2)))
    assert dict(committed.session.remembered) == {
        "i1": remembers(head + 1),
        "i2": remembers(head + 2, approved=False),
    }
    committed = await add(calling, v1.Event(rewound=v1.Rewound(to_sequence=head + 1)))
    assert dict(committed.session.remembered) == {"i1": remembers(head + 1)}
    committed = await add(calling, v1.Event(rewound=v1.Rewound(to_sequence=head)))
    assert dict(committed.session.remembered) == {}
    found = await calling.get_session(KEY)
    assert found is not None
    assert dict(found.remembered) == {}


async def test_an_edit_takes_remembered_answers_back_and_adds_none(calling: Store) -> None:
    approve, session = v1.InputResponse.DECISION_APPROVE, v1.InputResponse.REMEMBER_SESSION
    asking = await add(calling, asked("i1", "c1", "r1"), asked("i2", "c2", "r1"))
    await add(calling, answered("i1", "r1", approve, session), answered("i2", "r1", approve, session))
    kept = {"i2": remembers(asking.session.last_sequence + 2)}
    given = {"i2": remembers(1, approved=False), "i3": remembers(2)}
    edited = await calling.edit_session(KEY, edit(remembered=given))
    assert kept == dict(edited.remembered)
    committed = await add(calling, said("m2"))
    assert kept == dict(committed.session.remembered)


async def test_an_edit_removes_no_answer_that_its_caller_had_not_read(calling: Store) -> None:
    """That is one after the last_sequence that it sends; without one, all that it leaves out are removed."""
    approve, session = v1.InputResponse.DECISION_APPROVE, v1.InputResponse.REMEMBER_SESSION
    await add(calling, asked("i1", "c1", "r1"), asked("i2", "c2", "r1"))
    read = (await add(calling, answered("i1", "r1", approve, session))).session.last_sequence
    await add(calling, answered("i2", "r1", approve, session))
    taking_back = edit(remembered={})._replace(session=v1.Session(last_sequence=read))
    assert {"i2": remembers(read + 1)} == dict((await calling.edit_session(KEY, taking_back)).remembered)
    assert {} == dict((await calling.edit_session(KEY, edit(remembered={}))).remembered)


async def test_an_answer_that_a_removed_one_overruled_does_not_apply_again(calling: Store) -> None:
    """Neither the session's nor the active run's; a newer one, and those for other tools, still do."""
    approve, deny = v1.InputResponse.DECISION_APPROVE, v1.InputResponse.DECISION_DENY
    run, session = v1.InputResponse.REMEMBER_RUN, v1.InputResponse.REMEMBER_SESSION
    other = asked("i5", "c2", "r1")
    other.input_requested.call.binding.digest = b"another tool"
    asking = await add(calling, *(asked(f"i{number}", "c1", "r1") for number in range(5)), other)
    head = asking.session.last_sequence
    await add(
        calling,
        answered("i0", "r1", approve, session),
        answered("i1", "r1", approve, run),
        answered("i5", "r1", approve, session),
        answered("i2", "r1", deny, session),
    )
    kept = {"i0": remembers(head + 1), "i5": remembers(head + 3)}
    edited = await calling.edit_session(KEY, edit(remembered=kept))
    assert ["i5"] == list(edited.remembered)
    assert {} == dict((await run_of(calling, "r1")).remembered)
    await add(calling, answered("i3", "r1", deny, session), answered("i4", "r1", approve, run))
    edited = await calling.edit_session(KEY, edit(remembered=dict(edited.remembered)))
    assert ["i5"] == list(edited.remembered)
    committed = await add(calling, moved("r1", v1.Run.STATE_RUNNING))
    assert {"i4": remembers(head + 6)} == dict(committed.runs["r1"].remembered)


@pytest.mark.parametrize("kind", [v1.InputRequest.KIND_QUESTION, v1.InputRequest.KIND_INTERRUPTED_CALL])
async def test_only_approvals_are_remembered(calling: Store, kind: v1.InputRequest.Kind.ValueType) -> None:
    await add(calling, asked("i1", "c1", "r1", kind))
    response = answered("i1", "r1", remember=v1.InputResponse.REMEMBER_SESSION)
    committed = await add(calling, response)
    assert dict(committed.session.remembered) == {}


async def test_a_waiting_run_is_active_and_its_time_is_paused(store: Store, clock: ManualClock) -> None:
    await create(store)
    await start(store, "r1")
    clock.now += 5
    committed = await add(store, moved("r1", WAITING))
    assert committed.session.activity == v1.Session.ACTIVITY_WAITING
    assert committed.session.active_run == "r1"
    run = committed.runs["r1"]
    assert (run.state, run.running_duration.ToMicroseconds(), run.state_time.ToMicroseconds()) == (
        WAITING,
        5,
        clock.now,
    )
    assert [active.run for active in await store.active_runs()] == [run]
    with refused("RUN_ACTIVE"):
        await start(store, "r2")
    clock.now += 100
    committed = await add(store, moved("r1", RUNNING))
    assert committed.session.activity == v1.Session.ACTIVITY_RUNNING
    assert committed.runs["r1"].running_duration.ToMicroseconds() == 5
    clock.now += 3
    committed = await add(store, ended("r1"))
    assert committed.runs["r1"].running_duration.ToMicroseconds() == 8
    assert committed.session.activity == v1.Session.ACTIVITY_IDLE


async def test_the_active_run_is_found_with_its_agent_until_it_has_ended(store: Store) -> None:
    await create(store)
    epoch = (await start(store, "r1")).epoch
    found = await store.active_run(KEY, "r1")
    assert found is not None
    assert (found.key, found.run.name, found.agent, found.epoch) == (KEY, "r1", AGENT, epoch)
    assert await store.active_run(KEY, "nobody") is None
    assert await store.active_run(KEY._replace(tenant="globex"), "r1") is None
    await add(store, ended("r1"))
    assert await store.active_run(KEY, "r1") is None


async def test_a_run_that_is_to_end_says_so(store: Store) -> None:
    """A cancel after the turn waits in the run, not in the queue."""
    await create(store)
    await start(store, "r1")
    event = v1.Event(run="r1", cause_id="stop")
    event.command_queued.cancel.mode = v1.CancelCommand.MODE_AFTER_TURN
    committed = await add(store, event)
    assert committed.runs["r1"].ending
    assert list(committed.session.queued_commands) == []


async def test_what_is_queued_is_taken_up_by_its_cause(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    committed = await add(store, queued("q1", "r1"), queued("q2", "r1"))
    assert list(committed.session.queued_commands) == [
        v1.QueuedCommand(command_id="q1", sequence=2, run="r1"),
        v1.QueuedCommand(command_id="q2", sequence=3, run="r1"),
    ]
    assert names((await store.list_messages(KEY, EVERYTHING)).rows) == [], "it is no message yet"
    await add(store, taken("q1", "m1", "r1"))
    assert await queue_of(store) == ["q2"]
    assert names((await store.list_messages(KEY, EVERYTHING)).rows) == ["m1"]


async def test_another_message_takes_up_nothing(store: Store) -> None:
    """Neither one with another cause or none, nor one of the same cause that is no run's: causes are also made by those
    who know nothing of commands."""
    await create(store)
    await start(store, "r1")
    await add(store, queued("q1", "r1"))
    await add(store, said("m1", run="r1"), taken("q2", "m2", "r1"), taken("q1", "m3", ""))
    assert await queue_of(store) == ["q1"]


async def test_the_end_of_a_run_empties_its_queue_and_no_other(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    await add(store, queued("q1", "r1"))
    await add(store, queued_start("r2", "q2"), start=RECORD)
    await add(store, queued("q3", "r1"))
    await add(store, ended("r1", CANCELLED))
    assert await queue_of(store) == ["q2"]


async def test_sixteen_commands_may_wait(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    await add(store, *(queued(f"q{number}", "r1") for number in range(MAX_QUEUED - 1)))
    await add(store, queued_start("r2"), start=RECORD)
    before = await contents(store)
    assert len(before["session"].queued_commands) == MAX_QUEUED == 16
    for event in (queued("late", "r1"), queued_start("r3")):
        with refused("QUEUE_FULL") as caught:
            await add(store, said("m1"), event, start=RECORD)
        assert caught.value.metadata == {"limit": "16"}
    assert await contents(store) == before
    await add(store, taken("q0", "m1", "r1"))
    await add(store, queued("q16", "r1"))
    assert len(await queue_of(store)) == MAX_QUEUED


async def test_a_queued_run_is_there_and_not_active(store: Store, clock: ManualClock) -> None:
    await create(store)
    await start(store, "r1")
    clock.now += 1
    event = queued_start("r2", "later")
    event.command_queued.start.labels["k"] = "v"
    committed = await add(store, event, start=RunRecord(b"other", AGENT))
    run = committed.runs["r2"]
    assert (run.state, run.agent, dict(run.labels)) == (QUEUED, AGENT.name, {"k": "v"})
    assert (run.first_sequence, run.last_sequence) == (2, 2)
    assert run.create_time.ToMicroseconds() == clock.now
    assert await store.get_run(KEY, "r2") == (run, b"other")
    assert committed.session.active_run == "r1"
    found = await store.active_run(KEY, "r2")
    assert found is not None
    assert (found.run, found.agent) == (run, AGENT)
    with refused("ALREADY_EXISTS"):
        await add(store, queued_start("r2"), start=RECORD)
    with refused("RUN_ACTIVE"):
        await add(store, started("r2"), claim=True)


async def test_a_queued_run_starts_under_its_cause_when_the_session_is_idle(store: Store, clock: ManualClock) -> None:
    await create(store)
    await start(store, "r1")
    queued_at = clock.now
    await add(store, queued_start("r2", "later"), start=RunRecord(b"other", AGENT))
    clock.now += 9
    await add(store, ended("r1"))
    event = started("r2")
    event.cause_id = "later"
    committed = await add(store, event, claim=True)
    run = committed.runs["r2"]
    assert (run.state, run.attempt, run.first_sequence, run.last_sequence) == (RUNNING, 1, 2, 4)
    assert (run.create_time.ToMicroseconds(), run.state_time.ToMicroseconds()) == (queued_at, clock.now)
    assert (committed.session.active_run, list(committed.session.queued_commands)) == ("r2", [])
    assert (await store.get_run(KEY, "r2"))[1] == b"other"  # type: ignore[index]
    clock.now += 2
    assert (await add(store, ended("r2"))).runs["r2"].running_duration.ToMicroseconds() == 2


async def test_a_queued_run_does_nothing_but_start_or_end(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    await add(store, queued_start("r2"), start=RECORD)
    before = await contents(store)
    for event in (moved("r2", RUNNING), moved("r2", WAITING), replied("m1", "r2"), queued("q1", "r2")):
        with refused("RUN_ACTIVE") as caught:
            await add(store, event)
        assert caught.value.metadata == {"run": "sessions/case/runs/r1"}
    assert await contents(store) == before
    committed = await add(store, ended("r2", CANCELLED))
    assert committed.session.active_run == "r1"
    assert await queue_of(store) == []
    await add(store, ended("r1"))
    with refused("ALREADY_EXISTS"):
        await start(store, "r2")


async def test_a_cancel_that_comes_first_is_the_runs_end(store: Store, clock: ManualClock) -> None:
    """It leaves a run that has ended, no agent, and an empty digest by which a later start is recognised."""
    await create(store)
    committed = await add(store, ended("r1", CANCELLED), start=RunRecord(b"", v1.Agent()))
    run = committed.runs["r1"]
    assert (run.state, run.first_sequence, run.last_sequence) == (CANCELLED, 1, 1)
    assert run.end_time.ToMicroseconds() == run.create_time.ToMicroseconds() == clock.now
    assert await store.get_run(KEY, "r1") == (run, b"")
    assert await store.active_run(KEY, "r1") is None
    assert committed.session.activity == v1.Session.ACTIVITY_IDLE
    with refused("ALREADY_EXISTS"):
        await start(store, "r1")


@pytest.mark.parametrize("queue", [True, False])
async def test_a_cancel_that_comes_just_after_the_start_changes_nothing(store: Store, queue: bool) -> None:
    """A run that exists has to be cancelled by its owner."""
    await create(store)
    await start(store, "r1")
    if queue:
        await add(store, queued_start("r2"), start=RECORD)
    before = await contents(store)
    with refused("ALREADY_EXISTS"):
        await add(store, ended("r2" if queue else "r1", CANCELLED), start=RunRecord(b"", v1.Agent()))
    assert await contents(store) == before


async def test_a_command_that_ends_one_run_and_starts_another_belongs_to_the_other(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    command = CommandId("c1", b"body")
    events = [ended("r1", CANCELLED), said("m1"), started("r2"), said("m2", run="r2"), said("m3")]
    await store.commit(Commit(key=KEY, command=command, claim=True, events=events, start=RECORD))
    with pytest.raises(Duplicate) as caught:
        await store.recall_command(KEY, command)
    assert (caught.value.sequence, caught.value.run) == (6, "r2")


async def test_a_command_that_is_queued_is_queued_once(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    command = CommandId("q1", b"body")
    await store.commit(Commit(key=KEY, command=command, events=[queued("q1", "r1")]))
    with pytest.raises(Duplicate) as caught:
        await store.commit(Commit(key=KEY, command=command, events=[queued("q1", "r1")]))
    assert (caught.value.sequence, caught.value.run) == (2, "r1")
    assert await queue_of(store) == ["q1"]

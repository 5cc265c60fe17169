"""Every store: a session as it was at any sequence, and a fork of it, are what the log up to there says."""

import asyncio
import io
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from notecase import v1
from notecase_server.engine import transfer
from notecase_server.engine.rewind import ended, rewound
from notecase_server.errors import NotecaseError
from notecase_server.store import fold
from notecase_server.store.contract import (
    PAGE_BYTES,
    CommandId,
    Commit,
    Committed,
    Fork,
    Query,
    Replayed,
    SessionKey,
    Store,
)

from tests.store.build import (
    EVERYTHING,
    KEY,
    RECORD,
    STATE,
    ManualClock,
    add,
    called,
    changed,
    create,
    dispatched,
    finished,
    increment,
    once,
    put,
    queued,
    reborn,
    refused,
    remove,
    replied,
    said,
    session_key,
    start,
    started,
    taken,
    used,
)
from tests.store.build import ended as over
from tests.store.fixtures import Open
from tests.store.test_fold import EVENTS, Made, event, state_by_hand

WHERE = st.integers(0, 60)
WHICH = st.integers(0, 3)
ACTIONS = st.one_of(
    st.tuples(st.just("commit"), WHICH, st.lists(EVENTS, min_size=1, max_size=3)),
    st.tuples(st.just("turn"), WHICH, st.integers(1, 5)),
    st.tuples(st.just("rewind"), WHICH, WHERE),
    st.tuples(st.just("fork"), WHICH, WHERE),
)


def turn(run: str) -> list[list[v1.Event]]:
    """The commits of a run with calls."""
    calls = [f"{run}-c", f"{run}-d"]
    return [
        [started(run), said(f"{run}-q", run=run)],
        [called(f"{run}-m", run, *calls), dispatched(calls[0], run)],
        [finished(calls[0], run), changed(increment("n", 1)), queued(f"{run}-more", run)],
        [finished(calls[1], run), taken(f"{run}-more", f"{run}-n", run)],
        [replied(f"{run}-a", run), used(run), over(run)],
    ]


@dataclass
class Told:
    """A session as its makers know it."""

    key: SessionKey
    commits: list[int] = field(default_factory=list)
    """The head after each."""
    made: Made = field(default_factory=lambda: Made([], [], []))

    async def add(self, store: Store, events: list[v1.Event], **conditions: Any) -> None:
        done = await add(store, *events, key=self.key, start=RECORD, **conditions)
        self.commits.append(done.session.last_sequence)


async def fork(store: Store, source: SessionKey, key: SessionKey, at: int, **fields: Any) -> Committed:
    past = await store.read_past(source, at)
    return await store.fork(
        Fork(key=key, source=source, past=past, session=v1.Session(), events=ended(past, "forked"), **fields)
    )


async def rows_of(store: Store, key: SessionKey) -> dict[str, Any]:
    """All that a session's log tells, as rows."""
    session = await store.get_session(key)
    assert session is not None
    state, _ = await store.list_state(key.state, EVERYTHING)
    runs = []
    for found in (await store.list_runs(key.tenant, key, EVERYTHING)).rows:
        found.name = found.name.rpartition("/")[2]
        runs.append(found)
    told = (
        *(session.last_sequence, session.activity, session.active_run, session.summary_sequence),
        list(session.queued_commands),
    )
    messages = (await store.list_messages(key, EVERYTHING, superseded=True)).rows
    active = sorted(active.run.name for active in await store.active_runs() if active.key == key)
    return {"session": told, "state": state, "runs": runs, "messages": messages, "active": active}


async def replayed(store: Store, key: SessionKey) -> dict[str, Any]:
    """The same, from the log alone."""
    rows = fold.Rows(v1.Session(), 0)
    scope = key.state
    for entry in await store.read_events(key, 0):
        fold.replay(rows, key, entry)
        for message in rows.messages.values() if entry.HasField("rewound") else ():
            if message.sequence > entry.rewound.to_sequence and message.status != v1.Message.STATUS_SUPERSEDED:
                message.status, message.update_sequence = v1.Message.STATUS_SUPERSEDED, entry.sequence
    session = rows.session
    activity = session.activity or v1.Session.ACTIVITY_IDLE
    state = v1.State(version=rows.versions.get(scope, 0))
    fold.show_entries(state, rows.state.get(scope, {}), list(rows.state.get(scope, {})))
    runs = sorted(rows.runs.values(), key=lambda run: (run.create_time.ToMicroseconds(), run.name), reverse=True)
    for run in runs:
        if run.HasField("reply"):
            run.reply.CopyFrom(rows.messages[run.reply.name])
    unended = sorted(run.name for run in runs if run.state not in fold.ENDED)
    told = (
        *(session.last_sequence, activity, session.active_run, session.summary_sequence),
        list(session.queued_commands),
    )
    return {
        "session": told,
        "state": state,
        "runs": runs,
        "messages": list(rows.messages.values()),
        "active": unended,
    }


async def fed(store: Store, clock: ManualClock, source: Told, at: int, key: SessionKey) -> None:
    """A session that got the same commits up to a sequence."""
    await create(store, key)
    log = (await store.read_events(source.key, 0))[:at]
    before = 0
    for head in source.commits:
        events = log[before:head]
        before = head
        if events:
            clock.now = events[0].create_time.ToMicroseconds()
            await add(store, *events, key=key, start=RECORD)


async def check_past(store: Store, told: Told) -> None:
    """State at every sequence, and all rows at the head."""
    log = await store.read_events(told.key, 0)
    scope = told.key.state
    for at in range(1, len(log) + 1):
        state, _ = await store.list_state(scope, EVERYTHING, at)
        version, _, versions = state_by_hand(log[:at], "")
        assert (state.version, {key: entry.version for key, entry in state.entries.items()}) == (version, versions)
        rows = fold.Rows(v1.Session(), 0)
        for entry in log[:at]:
            fold.replay(rows, told.key, entry)
        known = {key: entry for key, entry in rows.state.get(scope, {}).items() if entry is not None}
        assert dict(state.entries) == known
        assert await store.get_state(scope, sorted(known)[:1], at) == v1.State(
            version=version, entries=dict(sorted(known.items())[:1])
        )
    assert await rows_of(store, told.key) == await replayed(store, told.key)


async def check_moved(store: Store, key: SessionKey) -> None:
    """The export of a session without an active run becomes the same rows under another name, and the same bytes
    again."""
    try:
        file = b"".join([piece async for piece in transfer.exported(store, key)])
    except NotecaseError:
        return  # a run is under way or queued
    other = session_key("elsewhere", key.session)
    await store.restore(await transfer.read(io.BytesIO(file), other))
    assert await rows_of(store, other) == await rows_of(store, key)
    assert b"".join([piece async for piece in transfer.exported(store, other)]) == file


async def scenario(open_store: Open, actions: list[tuple[Any, ...]]) -> None:
    clock = ManualClock()
    async with open_store(clock) as store:
        await create(store)
        sessions = [Told(KEY)]
        latest = clock.now
        for number, (action, which, what) in enumerate(actions):
            told = sessions[which % len(sessions)]
            clock.now = latest = latest + 1
            head = told.commits[-1] if told.commits else 0
            if action == "fork":
                at = what % (head + 1)
                key, twin = session_key("acme", f"fork{number}"), session_key(f"twin{number}", f"fork{number}")
                await fork(store, told.key, key, at)
                await fed(store, clock, told, at, twin)
                clock.now = latest
                if events := ended(await store.read_past(twin, at), "forked"):
                    await add(store, *events, key=twin)
                assert await rows_of(store, key) == await rows_of(store, twin)
                assert await store.read_events(key, 0) == await store.read_events(twin, 0)
                commits = [min(one, at) for one in told.commits]
                made = Told(key, [*commits, at + len(events)], Made(*map(list, told.made)))
                sessions.append(made)
                continue
            known = Made(*map(list, told.made))
            try:
                if action == "rewind":
                    back = await rewound(store, told.key, what % (head + 1), "to_sequence")
                    await told.add(store, back.events, if_last_sequence=back.head)
                elif action == "turn":
                    for events in turn(f"t{number}")[:what]:
                        await told.add(store, events)
                else:
                    own = [("change", "", each[2]) if each[0] == "change" else each for each in what]
                    await told.add(store, [event(each, number * 10 + place, known) for place, each in enumerate(own)])
            except NotecaseError:
                continue
            told.made = known
        for told in sessions:
            await check_past(store, told)
            await check_moved(store, told.key)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=60,
    deadline=None,
    database=None,
)
@given(actions=st.lists(ACTIONS, max_size=25))
def test_the_past_is_what_the_log_says(open_store: Open, actions: list[tuple[Any, ...]]) -> None:
    """State at every sequence is the fold of the log up to it; a fork equals a session that got the same commits and
    whose runs were then ended; rows equal the fold, whatever was rewound and forked."""
    asyncio.run(scenario(open_store, actions))


async def test_a_fork_that_its_source_outran_is_right(store: Store) -> None:
    """What changed between the reading and the copying is as it was, too."""
    await create(store)
    await add(store, said("m1"), changed(put("a", 1)))
    await start(store, "r1", called("m2", "r1", "c1"), dispatched("c1", "r1"))
    past = await store.read_past(KEY, 5)
    await add(store, finished("c1", "r1"), changed(increment("a", 1), put("b", 2)))
    await add(store, over("r1"))
    await add(store, v1.Event(rewound=v1.Rewound(to_sequence=1)), changed(remove("a")))
    late, early = session_key("acme", "late"), session_key("acme", "early")
    await fork(store, KEY, late, 5)
    await store.fork(Fork(key=early, source=KEY, past=past, session=v1.Session(), events=ended(past, "forked")))
    assert await rows_of(store, early) == await rows_of(store, late)
    assert dict((await store.list_state(session_key("acme", "early").state, EVERYTHING))[0].entries).keys() == {"a"}
    statuses = {message.name: message.status for message in (await store.list_messages(early, EVERYTHING)).rows}
    assert statuses == {"m1": v1.Message.STATUS_COMPLETED, "m2": v1.Message.STATUS_COMPLETED}


async def test_a_fork_of_a_deleted_session_is_not_found(store: Store) -> None:
    """Another session of the same name is not its source either."""
    await create(store)
    await add(store, said("m1"))
    past = await store.read_past(KEY, 1)
    copy = Fork(key=session_key("acme", "copy"), source=KEY, past=past, session=v1.Session())
    await store.delete_session(KEY)
    with refused("SESSION_NOT_FOUND"):
        await store.fork(copy)
    other = reborn(KEY)
    await create(store, other)
    await add(store, said("other"), key=other)
    with refused("SESSION_NOT_FOUND"):
        await store.fork(copy)
    assert await store.get_session(copy.key) is None
    with refused("SEQUENCE_AHEAD"):
        await store.read_past(other, 2)
    with refused("SESSION_NOT_FOUND"):
        await store.read_past(copy.key, 0)


async def test_a_fork_keeps_no_ids_of_requests_and_commands(store: Store) -> None:
    """A command_id of the source is new in the fork, whose own request_id repeats."""
    await create(store)
    await store.commit(Commit(key=KEY, events=[said("m1")], command=CommandId("c", b"d")))
    key = session_key("acme", "copy")
    made = await fork(store, KEY, key, 1, once=once("f"))
    assert (made.session.parent_session, made.session.fork_sequence) == ("case", 1)
    with pytest.raises(Replayed):
        await fork(store, KEY, key, 1, once=once("f"))
    with refused("ALREADY_EXISTS"):
        await fork(store, KEY, key, 1)
    assert (await store.get_session(key)) == made.session
    await store.commit(Commit(key=key, events=[said("m2")], command=CommandId("c", b"another")))


async def test_either_of_a_fork_and_its_source_is_whole_without_the_other(store: Store) -> None:
    await create(store)
    await add(store, said("m1"), changed(put("a", 1)))
    key = session_key("acme", "copy")
    await fork(store, KEY, key, 2)
    before = await rows_of(store, key)
    await add(store, changed(put("a", 2)), said("m2"))
    assert await rows_of(store, key) == before
    await store.delete_session(KEY)
    assert await rows_of(store, key) == before
    await add(store, changed(put("a", 3)), said("m2"), key=key)
    assert (await store.get_session(KEY)) is None
    assert (await store.list_state(STATE, EVERYTHING))[0] == v1.State()


async def test_a_second_outcome_needs_a_rewind_right_before_it(store: Store) -> None:
    """A rewind also cancels calls in a message that it keeps; otherwise the one outcome of a call never changes."""
    await create(store)
    await start(store, "r1", called("m1", "r1", "c1"), called("m2", "r1", "c2"))
    mark = v1.Event(rewound=v1.Rewound(to_sequence=2))
    with refused("RUN_ACTIVE"):
        await add(store, mark)
    await add(store, finished("c1", "r1"), finished("c2", "r1"), over("r1"))
    seals = {call: v1.Event(tool_finished=v1.ToolCall(call_id=call, tool="lens")) for call in ("c1", "c2")}
    for seal in seals.values():
        seal.tool_finished.outcome = v1.ToolCall.OUTCOME_CANCELLED
    wrong = v1.Event(tool_finished=v1.ToolCall(call_id="c1", outcome=v1.ToolCall.OUTCOME_SUCCEEDED))
    before = await rows_of(store, KEY)
    for events in ([seals["c1"]], [mark, changed(put("a", 1)), seals["c1"]], [mark, wrong], [mark, seals["c2"]]):
        with refused("CALL_NOT_PENDING"):
            await add(store, *events)
    assert await rows_of(store, KEY) == before
    await add(store, mark, seals["c1"])
    message = await store.get_message(KEY, "m1")
    assert message is not None
    assert message.parts[1].tool_call.outcome == v1.ToolCall.OUTCOME_CANCELLED
    with refused("CALL_NOT_PENDING"):
        await add(store, seals["c1"])


async def test_a_call_is_its_own_runs_business(store: Store) -> None:
    await create(store)
    await start(store, "r1", called("m1", "r1", "c1"))
    await add(store, over("r1"))
    await start(store, "r2")
    for wrong in (finished("c1", "r2"), dispatched("c1", "r2")):
        with refused("CALL_NOT_PENDING"):
            await add(store, wrong)


async def test_pages_of_a_past_state_are_those_of_then(store: Store) -> None:
    await create(store)
    await add(store, changed(*(put(f"k{number}", number) for number in range(5))))
    first, page = await store.list_state(STATE, Query(2))
    await add(store, changed(remove("k1"), put("k7", 7)))
    assert await store.list_state(STATE, Query(2), 1) == (first, page)
    second, rest = await store.list_state(STATE, Query(9, page.next), 1)
    assert (rest.rows, rest.next, sorted(second.entries)) == (["k2", "k3", "k4"], None, ["k2", "k3", "k4"])


async def test_what_a_fork_drops_of_a_run_is_what_waited_then(store: Store) -> None:
    """Once, though it waits still, and nothing that came later."""
    await create(store)
    await start(store, "r1", queued("q1", "r1"), key=KEY)
    await add(store, queued("q2", "r1"))
    for at, dropped in ((1, []), (2, ["q1"]), (3, ["q1", "q2"])):
        (end,) = (await fork(store, KEY, session_key("acme", f"copy{at}"), at)).events
        assert list(end.run_state_changed.dropped_commands) == dropped


async def test_a_fork_at_a_sequence_that_was_rewound_twice_has_the_calls_of_that_time(store: Store) -> None:
    """A call that a rewind cancelled is cancelled still in a fork from before the next rewind."""
    await create(store)
    for events in turn("r1"):
        await add(store, *events, start=RECORD)
    back = await rewound(store, KEY, 4, "to_sequence")
    await add(store, *back.events)
    head = back.head + len(back.events)
    assert [event.WhichOneof("payload") for event in back.events] == [
        *("rewound", "tool_finished", "tool_finished", "state_changed"),
    ]
    before = await rows_of(store, KEY)
    await add(store, *(await rewound(store, KEY, 1, "to_sequence")).events)
    key = session_key("acme", "copy")
    await fork(store, KEY, key, head)
    assert await rows_of(store, key) == before


async def test_what_puts_a_large_state_back_comes_in_events_that_clients_can_receive(store: Store) -> None:
    """None is larger than a page, but for one value that is."""
    names, large = [f"k{number}" for number in range(8)], v1.Value(string_value="x" * 300_000)
    await create(store)
    for name in names:
        await add(store, changed(v1.StateOp(key=name, set=large)))
    await add(store, changed(*map(remove, names)))
    back = await rewound(store, KEY, len(names), "to_sequence")
    restored = [event.state_changed for event in back.events if event.HasField("state_changed")]
    assert [op.key for change in restored for op in change.ops] == names
    assert [len(change.ops) for change in restored] == [3, 3, 2]
    assert all(change.ByteSize() <= PAGE_BYTES for change in restored)

"""Every store: whatever is committed, the rows are what the log says, read again from its beginning."""

import asyncio
import tracemalloc
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import PAGE_BYTES, Commit, Store
from notecase_server.store.fold import ENDED, KINDS, Rows, add_usage, apply, can_hold, ops_fit

from tests.store.build import (
    APP_STATE,
    EVERYTHING,
    KEY,
    RECORD,
    STATE,
    USER_STATE,
    ManualClock,
    add,
    answered,
    append,
    asked,
    called,
    changed,
    contents,
    create,
    dispatched,
    ended,
    finished,
    increment,
    moved,
    plain,
    put,
    queued,
    queued_start,
    remove,
    replied,
    said,
    started,
    taken,
    used,
)
from tests.store.fixtures import Open
from tests.support.work import instructions

RUNS = st.sampled_from(["r1", "r2", "r3"])
KEYS = st.sampled_from(["a", "b", "c"])
REMEMBER = st.sampled_from(v1.InputResponse.Remember.values())
OPS = st.one_of(
    st.builds(put, KEYS, st.integers(-3, 3) | st.text(max_size=3) | st.lists(st.integers(0, 2), max_size=2)),
    st.builds(remove, KEYS),
    st.builds(increment, KEYS, st.integers(-5, 5)),
    st.builds(append, KEYS, st.integers(0, 9)),
)
EVENTS = st.one_of(
    st.tuples(st.just("say")),
    st.tuples(st.just("change"), st.sampled_from(["", "user", "app"]), st.lists(OPS, min_size=1, max_size=3)),
    st.tuples(st.just("start"), RUNS),
    st.tuples(st.just("reply"), RUNS),
    st.tuples(st.just("call"), RUNS),
    st.tuples(st.just("dispatch"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("finish"), st.integers(0, 5)),
    st.tuples(st.just("ask"), st.integers(0, 5)),
    st.tuples(st.just("answer"), st.integers(0, 5), REMEMBER),
    st.tuples(st.just("queue"), RUNS),
    st.tuples(st.just("queue start"), RUNS),
    st.tuples(st.just("take up"), st.integers(0, 5)),
    st.tuples(st.just("move"), RUNS, st.sampled_from([v1.Run.STATE_WAITING, v1.Run.STATE_RUNNING])),
    st.tuples(st.just("use"), RUNS, st.sampled_from(["small", "large"])),
    st.tuples(st.just("end"), RUNS, st.sampled_from(sorted(ENDED))),
)


class Made(NamedTuple):
    """Ids that were made so far, each with its run."""

    calls: list[tuple[str, str]]
    inputs: list[tuple[str, str]]
    commands: list[tuple[str, str]]


def one_of(made: list[tuple[str, str]], which: int) -> tuple[str, str]:
    return made[which % len(made)] if made else ("none", "r1")


def event(action: tuple[Any, ...], number: int, made: Made) -> v1.Event:
    """The event of an action; `number` makes ids that are new."""
    match action:
        case ("say",):
            return said(f"m{number}")
        case ("change", state, ops):
            return changed(*ops, state=state)
        case ("start", run):
            return started(run)
        case ("reply", run):
            return replied(f"m{number}", run)
        case ("call", run):
            made.calls.extend([(f"c{number}", run), (f"d{number}", run)])
            return called(f"m{number}", run, f"c{number}", f"d{number}")
        case ("dispatch", which, client):
            return dispatched(*one_of(made.calls, which), client)
        case ("finish", which):
            return finished(*one_of(made.calls, which))
        case ("ask", which):
            call_id, run = one_of(made.calls, which)
            made.inputs.append((f"i{number}", run))
            return asked(f"i{number}", call_id, run)
        case ("answer", which, remember):
            decision = v1.InputResponse.DECISION_DENY if number % 2 else v1.InputResponse.DECISION_APPROVE
            return answered(*one_of(made.inputs, which), decision, remember)
        case ("queue", run):
            made.commands.append((f"q{number}", run))
            return queued(f"q{number}", run)
        case ("queue start", run):
            return queued_start(run)
        case ("take up", which):
            command_id, run = one_of(made.commands, which)
            return taken(command_id, f"m{number}", run)
        case ("move", run, state):
            return moved(run, state)
        case ("use", run, model):
            return used(run, model)
        case ("end", run, state):
            return ended(run, state)
    raise AssertionError(action)


def state_by_hand(log: Sequence[v1.Event], state: str) -> tuple[int, dict[str, object], dict[str, int]]:
    """A state's version, values and versions of keys, as one would work them out on paper."""
    version = 0
    values: dict[str, Any] = {}
    versions: dict[str, int] = {}
    for entry in log:
        if entry.HasField("state_changed") and entry.state_changed.state == state:
            version += 1
            for op in entry.state_changed.ops:
                match op.WhichOneof("op"):
                    case "set":
                        values[op.key] = plain(op.set)
                    case "increment":
                        values[op.key] = values.get(op.key, 0) + op.increment
                    case "append":
                        values[op.key] = [*values.get(op.key, []), plain(op.append)]
                    case "remove":
                        values.pop(op.key, None)
                        versions.pop(op.key, None)
                        continue
                versions[op.key] = version
    return version, values, versions


def messages_by_hand(log: Sequence[v1.Event]) -> list[v1.Message]:
    messages: list[v1.Message] = []
    for entry in log:
        if entry.HasField("message_added"):
            message = v1.Message()
            message.CopyFrom(entry.message_added)
            message.sequence = message.update_sequence = entry.sequence
            messages.append(message)
        elif entry.HasField("tool_started") or entry.HasField("tool_finished"):
            told = entry.tool_started if entry.HasField("tool_started") else entry.tool_finished
            for message in messages:
                calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
                for call in calls:
                    if call.call_id == told.call_id:
                        call.CopyFrom(told)
                        message.update_sequence = entry.sequence
                if calls and all(call.outcome == v1.ToolCall.OUTCOME_FAILED for call in calls):
                    message.status = v1.Message.STATUS_COMPLETED
    return messages


def waiting_by_hand(log: Sequence[v1.Event], run: str) -> tuple[list[str], list[str], int]:
    """What a run waits for: its open inputs and the calls at its caller; and how many calls it made."""
    inputs: list[str] = []
    calls: list[str] = []
    dispatched: set[str] = set()
    for entry in log:
        if entry.run != run:
            continue
        if entry.HasField("input_requested"):
            inputs.append(entry.input_requested.input_id)
        elif entry.HasField("input_resolved"):
            inputs.remove(entry.input_resolved.response.input_id)
        call = entry.tool_started if entry.HasField("tool_started") else entry.tool_finished
        calls = [call_id for call_id in calls if call_id != call.call_id]
        if entry.HasField("tool_started"):
            dispatched.add(call.call_id)
            calls += [call.call_id] if call.client_executed else []
    return inputs, calls, len(dispatched)


def queue_by_hand(log: Sequence[v1.Event]) -> list[tuple[str, int, str]]:
    queue: list[tuple[str, int, str]] = []
    for entry in log:
        if entry.HasField("command_queued"):
            queue.append((entry.cause_id, entry.sequence, entry.run))
        elif entry.run_state_changed.state in ENDED:
            queue = [waiting for waiting in queue if waiting[2] != entry.run]
        elif entry.HasField("message_added") or entry.HasField("run_started"):
            queue = [waiting for waiting in queue if waiting[::2] != (entry.cause_id, entry.run)]
    return queue


def remembered_by_hand(log: Sequence[v1.Event], run: str = "") -> dict[str, tuple[bool, int]]:
    """What was decided for all of a run or, with "", of the session and not rewound since: by what was answered, with
    its place in the log."""
    scope = v1.InputResponse.REMEMBER_RUN if run else v1.InputResponse.REMEMBER_SESSION
    decided: dict[str, tuple[bool, int]] = {}
    for entry in log:
        response = entry.input_resolved.response
        if entry.HasField("input_resolved") and response.remember == scope and run in {"", entry.run}:
            decided[response.input_id] = (response.decision == v1.InputResponse.DECISION_APPROVE, entry.sequence)
        elif entry.HasField("rewound") and not run:
            kept = entry.rewound.to_sequence
            decided = {asked: answer for asked, answer in decided.items() if answer[1] <= kept}
    return decided


def running_by_hand(log: Sequence[v1.Event], run: str) -> int:
    """Microseconds in STATE_RUNNING up to the last change of state."""
    total, since = 0, 0
    for entry in log:
        at = entry.create_time.ToMicroseconds()
        if entry.run == run and entry.HasField("run_started"):
            since = at
        elif entry.run == run and entry.HasField("run_state_changed"):
            total += at - since if since else 0
            since = at if entry.run_state_changed.state == v1.Run.STATE_RUNNING else 0
    return total


def runs_by_hand(log: Sequence[v1.Event]) -> dict[str, tuple[object, ...]]:
    """State, first and last sequence, reply, model calls and tokens of each run."""
    runs: dict[str, tuple[object, ...]] = {}
    for name in {entry.run for entry in log if entry.run}:
        own = [entry for entry in log if entry.run == name]
        states = [v1.Run.STATE_QUEUED] if own[0].HasField("command_queued") else []
        states += [v1.Run.STATE_RUNNING for entry in own if entry.HasField("run_started")]
        states += [entry.run_state_changed.state for entry in own if entry.HasField("run_state_changed")]
        replies = [
            entry.message_added.name
            for entry in own
            if entry.message_added.role == v1.Message.ROLE_ASSISTANT
            and entry.message_added.status == v1.Message.STATUS_COMPLETED
        ]
        uses = [entry.usage for entry in own if entry.HasField("usage")]
        runs[name] = (
            states[-1],
            own[0].sequence,
            own[-1].sequence,
            (replies or [""])[-1],
            len(uses),
            sum(use.input_tokens for use in uses),
            *waiting_by_hand(log, name),
            running_by_hand(log, name),
        )
    return runs


async def check(store: Store) -> None:
    log = await store.read_events(KEY, 0)
    assert [entry.sequence for entry in log] == list(range(1, len(log) + 1))
    for scope, name in ((STATE, ""), (USER_STATE, "user"), (APP_STATE, "app")):
        state, page = await store.list_state(scope, EVERYTHING)
        values = {key: plain(entry.value) for key, entry in state.entries.items()}
        versions = {key: entry.version for key, entry in state.entries.items()}
        assert (state.version, values, versions) == state_by_hand(log, name)
        assert page.rows == sorted(values)
    messages = (await store.list_messages(KEY, EVERYTHING)).rows
    assert messages == messages_by_hand(log)
    by_name = {message.name: message for message in messages}
    runs = {run.name.rpartition("/")[2]: run for run in (await store.list_runs("acme", KEY, EVERYTHING)).rows}
    expected = runs_by_hand(log)
    assert {
        name: (
            run.state,
            run.first_sequence,
            run.last_sequence,
            run.reply.name,
            run.usage.model_calls,
            run.usage.input_tokens,
            [request.input_id for request in run.pending_inputs],
            [call.call_id for call in run.pending_calls],
            run.tool_calls,
            run.running_duration.ToMicroseconds(),
        )
        for name, run in runs.items()
    } == expected
    assert all(run.reply == by_name.get(run.reply.name, v1.Message()) for run in runs.values())
    session = await store.get_session(KEY)
    assert session is not None
    active = [name for name, facts in expected.items() if facts[0] in {v1.Run.STATE_RUNNING, v1.Run.STATE_WAITING}]
    assert ([session.active_run] if session.active_run else []) == active
    activity = v1.Session.ACTIVITY_RUNNING if active else v1.Session.ACTIVITY_IDLE
    waits = bool(active) and expected[active[0]][0] == v1.Run.STATE_WAITING
    assert session.activity == (v1.Session.ACTIVITY_WAITING if waits else activity)
    unended = {name for name, facts in expected.items() if facts[0] not in ENDED}
    assert {each.run.name for each in await store.active_runs()} == unended
    queue = [(waiting.command_id, waiting.sequence, waiting.run) for waiting in session.queued_commands]
    assert queue == queue_by_hand(log)
    for remembered, name in ((session.remembered, ""), *((run.remembered, name) for name, run in runs.items())):
        decided = {asked: (answer.approved, answer.sequence) for asked, answer in remembered.items()}
        assert decided == remembered_by_hand(log, name)
    assert session.last_sequence == len(log)
    assert session.usage.model_calls == sum(entry.HasField("usage") for entry in log)


async def scenario(open_store: Open, commits: list[list[tuple[Any, ...]]]) -> None:
    clock = ManualClock()
    async with open_store(clock) as store:
        await create(store)
        number, made = 0, Made([], [], [])
        for actions in commits:
            events, known = [], Made(*map(list, made))
            for action in actions:
                number += 1
                events.append(event(action, number, known))
            before = await contents(store)
            clock.now += 1
            try:
                await add(store, *events, claim=True, start=RECORD)
            except NotecaseError:
                assert await contents(store) == before
            else:
                made = known
        await check(store)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=100,
    deadline=None,
    database=None,
)
@given(commits=st.lists(st.lists(EVENTS, max_size=3), max_size=25))
def test_rows_are_the_fold_of_the_log(open_store: Open, commits: list[list[tuple[Any, ...]]]) -> None:
    asyncio.run(scenario(open_store, commits))


def test_a_sum_of_usage_ends_at_the_largest_number() -> None:
    """Any number may be in a log, and no session ends because of it."""
    one = v1.Usage(model_calls=2**31 - 1)
    for field in ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens"):
        setattr(one, field, 2**63 - 1)
    total = v1.Usage()
    add_usage(total, one)
    add_usage(total, one)
    assert total == one


def test_every_kind_of_event_is_known() -> None:
    """One that changes rows has an entry; the others are facts, or are not kept."""
    payloads = {field.name for field in v1.Event.DESCRIPTOR.oneofs_by_name["payload"].fields}
    others = {"summary_failed", "tools_unavailable", "block_delta", "message_discarded"}
    assert payloads - others == KINDS.keys()


def test_a_value_is_looked_into_item_by_item_and_only_if_a_page_holds_it() -> None:
    missing = v1.Value(list_value=v1.ValueList(values=[v1.Value()] * 300_000))
    tracemalloc.start()
    try:
        assert not can_hold(missing)
        assert tracemalloc.get_traced_memory()[1] < 100_000, "no list of all items is made"
    finally:
        tracemalloc.stop()
    for text, fits in (("x" * 1000, True), ("x" * PAGE_BYTES, False)):
        value = v1.Value(string_value=text)
        assert ops_fit([v1.StateOp(key="k", set=value)]) == fits
        assert ops_fit([v1.StateOp(key="k", append=value)]) == fits


def test_the_calls_of_a_reply_are_dispatched_asked_about_and_ended_in_time_that_grows_with_their_number() -> None:
    """A reply may have a thousand, and all others wait for the store meanwhile."""

    def taken(number: int) -> list[int]:
        ids = [f"c{n}" for n in range(number)]
        rows, told = Rows(v1.Session(name="s"), 0), []
        apply(rows, Commit(key=KEY, claim=True, start=RECORD, events=[started("r1")]), 0)
        for name, events in (
            ("m1", [dispatched(one, "r1") for one in ids]),
            ("m1", [finished(one, "r1") for one in ids]),
            ("m2", [asked(f"i-m2-{one}", f"m2-{one}", "r1") for one in ids]),
            ("m2", [answered(f"i-m2-{one}", "r1") for one in ids]),
        ):
            if name not in rows.messages:
                message = called(name, "r1", *(ids if name == "m1" else [f"{name}-{one}" for one in ids]))
                apply(rows, Commit(key=KEY, events=[message]), 0)
            rows.open.clear()  # as loaded for a commit
            told.append(instructions(partial(apply, rows, Commit(key=KEY, events=events), 0)))
        assert ([], []) == (list(rows.runs["r1"].pending_calls), list(rows.runs["r1"].pending_inputs))
        return told

    assert all(many < 6 * few for few, many in zip(taken(40), taken(160), strict=True))

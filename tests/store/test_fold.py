"""Every store: whatever is committed, the rows are what the log says, read again from its beginning."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Store
from notecase_server.store.fold import ENDED
from notecase_server.store.memory import MemoryStore
from notecase_server.store.sqlite import SqliteStore

from tests.store.build import (
    APP_STATE,
    EVERYTHING,
    KEY,
    RECORD,
    STATE,
    USER_STATE,
    ManualClock,
    add,
    append,
    called,
    changed,
    contents,
    create,
    ended,
    finished,
    increment,
    plain,
    put,
    remove,
    replied,
    said,
    started,
    used,
)

RUNS = st.sampled_from(["r1", "r2", "r3"])
KEYS = st.sampled_from(["a", "b", "c"])
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
    st.tuples(st.just("finish"), RUNS, st.integers(0, 5)),
    st.tuples(st.just("use"), RUNS, st.sampled_from(["small", "large"])),
    st.tuples(st.just("end"), RUNS, st.sampled_from(sorted(ENDED))),
)


def event(action: tuple[Any, ...], number: int, calls: list[str]) -> v1.Event | None:
    """The event of an action; `number` makes ids that are new, `calls` are those made so far."""
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
            calls += [f"c{number}", f"d{number}"]
            return called(f"m{number}", run, f"c{number}", f"d{number}")
        case ("finish", run, which):
            return finished(calls[which % len(calls)], run) if calls else None
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
        elif entry.HasField("tool_finished"):
            for message in messages:
                calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
                for call in calls:
                    if call.call_id == entry.tool_finished.call_id:
                        call.CopyFrom(entry.tool_finished)
                        message.update_sequence = entry.sequence
                if calls and all(call.outcome != v1.ToolCall.OUTCOME_PENDING for call in calls):
                    message.status = v1.Message.STATUS_COMPLETED
    return messages


def runs_by_hand(log: Sequence[v1.Event]) -> dict[str, tuple[object, ...]]:
    """State, first and last sequence, reply, model calls and tokens of each run."""
    runs: dict[str, tuple[object, ...]] = {}
    for name in {entry.run for entry in log if entry.run}:
        own = [entry for entry in log if entry.run == name]
        states = [entry.run_state_changed.state for entry in own if entry.HasField("run_state_changed")]
        replies = [
            entry.message_added.name
            for entry in own
            if entry.message_added.role == v1.Message.ROLE_ASSISTANT
            and entry.message_added.status == v1.Message.STATUS_COMPLETED
        ]
        uses = [entry.usage for entry in own if entry.HasField("usage")]
        runs[name] = (
            (states or [v1.Run.STATE_RUNNING])[-1],
            own[0].sequence,
            own[-1].sequence,
            (replies or [""])[-1],
            len(uses),
            sum(use.input_tokens for use in uses),
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
    runs = {run.name.rpartition("/")[2]: run for run in (await store.list_runs("acme", "case", EVERYTHING)).rows}
    expected = runs_by_hand(log)
    assert {
        name: (
            run.state,
            run.first_sequence,
            run.last_sequence,
            run.reply.name,
            run.usage.model_calls,
            run.usage.input_tokens,
        )
        for name, run in runs.items()
    } == expected
    assert all(run.reply == by_name.get(run.reply.name, v1.Message()) for run in runs.values())
    session = await store.get_session(KEY)
    assert session is not None
    active = [name for name, facts in expected.items() if facts[0] == v1.Run.STATE_RUNNING]
    assert ([session.active_run] if session.active_run else []) == active
    assert [each.run.name for each in await store.active_runs()] == active
    assert session.last_sequence == len(log)
    assert session.usage.model_calls == sum(entry.HasField("usage") for entry in log)


async def scenario(kind: Literal["memory", "sqlite"], commits: list[list[tuple[Any, ...]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clock = ManualClock()
        store: Store = (
            MemoryStore(clock) if kind == "memory" else await SqliteStore.open(Path(folder, "store.db"), clock)
        )
        await create(store)
        number, calls = 0, list[str]()
        for actions in commits:
            made, known = [], list(calls)
            for action in actions:
                number += 1
                made.append(event(action, number, known))
            before = await contents(store)
            clock.now += 1
            try:
                await add(store, *(each for each in made if each is not None), claim=True, start=RECORD)
            except NotecaseError:
                assert await contents(store) == before
            else:
                calls = known
        await check(store)
        await store.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@settings(max_examples=100, deadline=None, database=None)
@given(commits=st.lists(st.lists(EVENTS, max_size=5), max_size=10))
def test_rows_are_the_fold_of_the_log(kind: Literal["memory", "sqlite"], commits: list[list[tuple[Any, ...]]]) -> None:
    asyncio.run(scenario(kind, commits))

"""Every store: what state promises, in its three scopes."""

import asyncio
import tracemalloc
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any

import pytest
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.store import fold, steps
from notecase_server.store.contract import PAGE_BYTES, Answer, Query, Replayed, Scope, Store
from notecase_server.store.fold import MAX_APPENDED_BYTES

from tests.store.build import (
    APP_STATE,
    EVERYTHING,
    KEY,
    STATE,
    USER_STATE,
    ManualClock,
    add,
    append,
    changed,
    create,
    increment,
    once,
    plain,
    put,
    refused,
    remove,
    said,
    value,
)
from tests.store.fixtures import looks_inside
from tests.support.values import INT64_MAX, KEYS, VALUES, exactly

PUT = Answer("state", "users/ada/state")


async def test_a_state_without_writes_is_empty_at_version_0(store: Store) -> None:
    assert await store.get_state(USER_STATE, ["name"]) == v1.State()
    state, page = await store.list_state(USER_STATE, EVERYTHING)
    assert (state, page.rows, page.next) == (v1.State(), [], None)


async def test_each_operation_does_what_it_says(store: Store) -> None:
    await create(store)
    await add(store, changed(put("draft", "x"), increment("count", 2), append("clues", "ash"), put("old", 1)))
    committed = await add(
        store, changed(put("draft", "y"), increment("count", -5), append("clues", "mud"), remove("old"), remove("none"))
    )
    state, page = await store.list_state(STATE, EVERYTHING)
    assert page.rows == ["clues", "count", "draft"]
    assert {key: plain(entry.value) for key, entry in state.entries.items()} == {
        "draft": "y",
        "count": -3,
        "clues": ["ash", "mud"],
    }
    assert committed.state[STATE] == state


async def test_a_change_raises_the_states_version_by_one_whatever_it_touches(store: Store, clock: ManualClock) -> None:
    await create(store)
    await add(store, changed(put("a", 1), put("b", 1)))
    clock.now += 7
    await add(store, changed(put("b", 2)))
    state = await store.get_state(STATE, ["a", "b"])
    assert state.version == 2
    assert (state.entries["a"].version, state.entries["b"].version) == (1, 2)
    assert state.entries["b"].update_time.ToMicroseconds() == clock.now
    assert state.entries["a"].update_time.ToMicroseconds() == clock.now - 7


async def test_several_changes_in_one_commit_see_each_other(store: Store) -> None:
    await create(store)
    committed = await add(store, changed(increment("n", 1)), changed(increment("n", 1)), changed(remove("n")))
    assert committed.state[STATE] == v1.State(version=3)
    assert [event.state_changed.version for event in committed.events] == [1, 2, 3]
    assert await store.get_state(STATE, ["n"]) == v1.State(version=3)


async def test_several_changes_in_one_commit_are_all_kept(store: Store) -> None:
    await create(store)
    await add(store, changed(put("gone", 1), put("old", 1)))
    committed = await add(store, changed(put("a", 1), remove("gone")), changed(put("b", 2)), changed(remove("none")))
    state, page = await store.list_state(STATE, EVERYTHING)
    assert page.rows == ["a", "b", "old"]
    assert {key: entry.version for key, entry in state.entries.items()} == {"a": 2, "b": 3, "old": 1}
    assert (await store.get_state(STATE, ["a", "b", "gone", "none"])) == committed.state[STATE]


async def test_only_the_keys_named_are_read(store: Store) -> None:
    await store.update_state(USER_STATE, [put("a", 1), put("b", 2)])
    state = await store.get_state(USER_STATE, ["b", "missing", "b"])
    assert list(state.entries) == ["b"]
    assert state.version == 1


async def test_a_condition_on_a_key(store: Store) -> None:
    await store.update_state(APP_STATE, [put("k", 1, if_version=0)])
    for stale in (0, 2):
        with refused("STATE_VERSION_MISMATCH") as caught:
            await store.update_state(APP_STATE, [put("other", 1), put("k", 2, if_version=stale)])
        assert caught.value.metadata == {"version": "1"}
    assert (await store.update_state(APP_STATE, [put("k", 2, if_version=1)])).version == 2
    assert (await store.get_state(APP_STATE, ["other"])).entries == {}


async def test_versions_of_a_key_grow_over_removal_and_return(store: Store) -> None:
    await store.update_state(APP_STATE, [put("k", "first")])
    await store.update_state(APP_STATE, [remove("k", if_version=1)])
    with refused("STATE_VERSION_MISMATCH") as caught:
        await store.update_state(APP_STATE, [put("k", "stale", if_version=1)])
    assert caught.value.metadata == {"version": "0"}
    await store.update_state(APP_STATE, [put("k", "second", if_version=0)])
    assert (await store.get_state(APP_STATE, ["k"])).entries["k"].version == 3


async def test_a_condition_on_the_whole_state(store: Store) -> None:
    await create(store)
    await add(store, changed(put("k", 1)), if_state_version={"": 0, "user": 0, "app": 0})
    for state in ("", "user"):
        with refused("STATE_VERSION_MISMATCH") as caught:
            await add(store, said("m1"), if_state_version={state: 9})
        assert caught.value.metadata == {"version": "1" if state == "" else "0"}
    await store.update_state(USER_STATE, [put("k", 1)], if_version=0)
    with refused("STATE_VERSION_MISMATCH"):
        await store.update_state(USER_STATE, [put("k", 2)], if_version=0)
    assert len(await store.read_events(KEY, 0)) == 1


async def test_operations_that_a_value_does_not_have_are_refused(store: Store) -> None:
    await store.update_state(USER_STATE, [put("text", "x"), put("n", 1), put("list", [])])
    for op in (increment("text", 1), increment("list", 1), append("text", 1), append("n", 1)):
        with refused("STATE_TYPE_MISMATCH") as caught:
            await store.update_state(USER_STATE, [put("before", 1), op])
        assert caught.value.metadata == {"key": op.key}
    state, page = await store.list_state(USER_STATE, EVERYTHING)
    assert (state.version, page.rows) == (1, ["list", "n", "text"])


@pytest.mark.parametrize(("at", "by"), [(INT64_MAX, 1), (-INT64_MAX - 1, -1), (1, INT64_MAX)])
async def test_an_increment_beyond_64_bits_is_refused(store: Store, at: int, by: int) -> None:
    await store.update_state(USER_STATE, [put("n", at)])
    with refused("STATE_TYPE_MISMATCH"):
        await store.update_state(USER_STATE, [increment("n", by)])
    assert (await store.get_state(USER_STATE, ["n"])).entries["n"].value.int_value == at


async def test_a_value_cannot_outgrow_a_page(store: Store) -> None:
    half = "x" * (PAGE_BYTES // 2)
    await store.update_state(USER_STATE, [append("list", half)])
    with refused("PAYLOAD_TOO_LARGE"):
        await store.update_state(USER_STATE, [append("list", half)])
    assert len((await store.get_state(USER_STATE, ["list"])).entries["list"].value.list_value.values) == 1


async def test_one_change_may_append_to_a_long_list_often(store: Store) -> None:
    """The list is copied once, whatever the number of operations, and judged by its size after the last."""
    await store.update_state(USER_STATE, [append("list", "x" * 1_000_000)])
    await store.update_state(USER_STATE, [append("list", number) for number in range(3000)])
    with refused("PAYLOAD_TOO_LARGE"):
        await store.update_state(USER_STATE, [append("list", "y" * 20) for _ in range(2000)])
    again = [put("list", 1), remove("list"), append("list", 2), append("list", 3)]
    await store.update_state(USER_STATE, [append("list", "z"), *again])
    found = (await store.get_state(USER_STATE, ["list"])).entries["list"].value.list_value.values
    assert [2, 3] == [item.int_value for item in found]


def test_a_key_with_many_operations_is_shown_once() -> None:
    """A value may have a megabyte, and a change thousands of operations."""
    read = list[str]()

    class Noted(dict[str, v1.StateEntry | None]):
        def get(self, key: str, *_: Any) -> Any:
            read.append(key)
            return self[key]

    entries = Noted(a=v1.StateEntry(version=1), b=None)
    shown = v1.State()
    fold.show_entries(shown, entries, ["a", "b", "a", "a"])
    assert ["a", "b"] == read
    assert ["a"] == list(shown.entries)


async def test_the_lists_that_one_change_appends_to_are_bounded_together(store: Store) -> None:
    """Each is read and written whole."""
    number = MAX_APPENDED_BYTES // PAGE_BYTES + 1
    for index in range(number):
        await store.update_state(USER_STATE, [append(f"l{index}", "x" * (PAGE_BYTES - 100))])
    with refused("PAYLOAD_TOO_LARGE"):
        await store.update_state(USER_STATE, [append(f"l{index}", 1) for index in range(number)])
    await store.update_state(USER_STATE, [append(f"l{index}", 1) for index in range(number - 1)])
    state = await store.update_state(USER_STATE, [put(f"l{index}", 1) for index in range(number)])
    assert number == len(state.entries)


@looks_inside
async def test_a_page_of_named_keys_reads_few_more_than_it_has(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand may be named, and each may have a page."""
    monkeypatch.setattr(steps, "KEYS_AT_ONCE", 2)
    for number in range(10):
        await store.update_state(USER_STATE, [put(f"k{number}", "x" * (PAGE_BYTES // 2))])
    read, names = list[int](), [f"k{number}" for number in range(10)]
    named = steps._named

    def noted(*arguments: Any) -> Iterator[tuple[str, v1.StateEntry | None]]:
        for found in named(*arguments):
            read.append(1)
            yield found

    monkeypatch.setattr(steps, "_named", noted)
    after: tuple[str | int, ...] | None = None
    seen = list[str]()
    while True:
        read.clear()
        state, page = await store.list_state(USER_STATE, Query(100, after), keys=names)
        seen += sorted(state.entries)
        assert sum(read) <= len(state.entries) + 1
        after = page.next
        if after is None:
            break
    assert names == seen


STORED = {
    **VALUES,
    "unset": v1.Value(),
    "list with an unset value": v1.Value(list_value=v1.ValueList(values=[v1.Value(int_value=1), v1.Value()])),
}
"""A store is not the one that refuses what has no kind."""


@pytest.mark.parametrize("name", STORED)
async def test_a_value_comes_back_as_it_went_in(store: Store, name: str) -> None:
    await create(store)
    await add(store, changed(v1.StateOp(key="k", set=STORED[name])))
    stored = (await store.get_state(STATE, ["k"])).entries["k"]
    logged = (await store.read_events(KEY, 0))[0].state_changed.ops[0]
    assert exactly(stored.value) == exactly(STORED[name])
    assert stored.HasField("value")
    assert exactly(logged.set) == exactly(STORED[name])


@pytest.mark.parametrize("key", KEYS)
async def test_every_key_is_different(store: Store, key: str) -> None:
    await store.update_state(APP_STATE, [put(key, 1), put("k", 2)])
    assert (await store.get_state(APP_STATE, [key])).entries[key].value.int_value == 1
    await store.update_state(APP_STATE, [remove(key)])
    assert (await store.list_state(APP_STATE, EVERYTHING))[1].rows == ["k"]


async def test_keys_are_listed_in_the_order_of_their_bytes(store: Store) -> None:
    keys = ["a", "B", "é", "犬", "🔎", "\uffee", "a\u0000", "ab", "~"]
    await store.update_state(APP_STATE, [put(key, 1) for key in keys])
    listed: list[str] = []
    after: tuple[str | int, ...] | None = None
    while True:
        state, page = await store.list_state(APP_STATE, Query(2, after))
        assert sorted(state.entries) == sorted(page.rows)
        listed += page.rows
        after = page.next
        if after is None:
            break
    assert listed == sorted(keys, key=str.encode)


async def test_a_page_of_state_ends_at_a_mebibyte(store: Store) -> None:
    await store.update_state(APP_STATE, [put(f"k{number}", "x" * 400_000) for number in range(5)])
    state, page = await store.list_state(APP_STATE, EVERYTHING)
    assert (page.rows, page.next) == (["k0", "k1", "k2"], ("k2",))
    assert sorted(state.entries) == page.rows
    assert (await store.list_state(APP_STATE, Query(1000, page.next)))[1].rows == ["k3", "k4"]


async def test_eighty_writers_of_eighty_keys_lose_nothing(store: Store) -> None:
    await create(store)
    await asyncio.gather(*(add(store, changed(put(f"k{n}", n))) for n in range(80)))
    state, page = await store.list_state(STATE, EVERYTHING)
    assert {key: plain(entry.value) for key, entry in state.entries.items()} == {f"k{n}": n for n in range(80)}
    assert len(page.rows) == state.version == 80
    assert sorted(entry.version for entry in state.entries.values()) == list(range(1, 81))


async def test_eighty_increments_of_one_key_are_all_counted(store: Store) -> None:
    await asyncio.gather(*(store.update_state(APP_STATE, [increment("n", 1)]) for _ in range(80)))
    assert (await store.get_state(APP_STATE, ["n"])).entries["n"].value == value(80)


async def test_of_two_conditional_writers_one_wins_and_the_other_learns_the_version(store: Store) -> None:
    await store.update_state(APP_STATE, [put("k", "old")])
    done = await asyncio.gather(
        *(store.update_state(APP_STATE, [put("k", name, if_version=1)]) for name in ("one", "two")),
        return_exceptions=True,
    )
    winners = [each for each in done if isinstance(each, v1.State)]
    losers = [each for each in done if isinstance(each, NotecaseError)]
    assert [winner.version for winner in winners] == [2]
    assert [loser.metadata for loser in losers] == [{"version": "2"}]
    assert (await store.get_state(APP_STATE, ["k"])).entries["k"] == winners[0].entries["k"]


async def test_an_update_answers_with_the_keys_it_names(store: Store, clock: ManualClock) -> None:
    await store.update_state(USER_STATE, [put("a", 1), put("b", 1)])
    state = await store.update_state(USER_STATE, [remove("a"), increment("b", 1)])
    entry = v1.StateEntry(value=value(2), version=2)
    entry.update_time.FromMicroseconds(clock.now)
    assert state == v1.State(entries={"b": entry}, version=2)


async def test_a_repeated_update_is_not_made_again(store: Store) -> None:
    first = await store.update_state(USER_STATE, [increment("n", 1)], once=once("request", PUT))
    with pytest.raises(Replayed) as caught:
        await store.update_state(USER_STATE, [increment("n", 1)], once=once("request", PUT))
    first.name = PUT.name
    assert v1.State.FromString(caught.value.response) == first
    with refused("REQUEST_ID_REUSED"):
        await store.update_state(USER_STATE, [increment("n", 2)], once=once("request", PUT, digest=b"other"))
    assert (await store.get_state(USER_STATE, ["n"])).entries["n"].value == value(1)


async def test_states_of_other_users_and_kinds_are_apart(store: Store) -> None:
    scopes = [USER_STATE, APP_STATE, STATE._replace(id="ada"), Scope("acme", "user", "eve")]
    await create(store)
    for scope in scopes[:2] + scopes[3:]:
        await store.update_state(scope, [put("k", str(scope))])
    await add(store, changed(put("k", "session")))
    for scope in scopes[:2] + scopes[3:]:
        assert (await store.get_state(scope, ["k"])).entries["k"].value == value(str(scope))
    assert await store.get_state(scopes[2], ["k"]) == v1.State()


async def test_what_is_handed_in_and_out_is_not_kept(store: Store) -> None:
    op = put("k", "kept")
    made = await store.update_state(APP_STATE, [op])
    op.set.string_value = made.entries["k"].value.string_value = "changed"
    read = await store.get_state(APP_STATE, ["k"])
    assert read.entries["k"].value == value("kept")
    read.entries["k"].Clear()
    assert (await store.get_state(APP_STATE, ["k"])).entries["k"].value == value("kept")


async def _peak(work: Awaitable[object]) -> int:
    """Returns how many bytes of Python objects there were at most during the work, more than before it."""
    tracemalloc.start()
    try:
        await work
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LARGE = [f"k{number}" for number in range(20)]
"""Keys whose values are larger together than what one change may depend on."""


@pytest.mark.parametrize("scope", [STATE, USER_STATE])
async def test_values_that_a_change_replaces_or_removes_are_not_read(store: Store, scope: Scope) -> None:
    await _fill(store, scope)
    short = [put(key, "x") if number % 2 else remove(key) for number, key in enumerate(LARGE)]
    assert await _peak(_change(store, scope, short)) < 4 << 20
    state, _ = await store.list_state(scope, EVERYTHING)
    assert state.entries.keys() == set(LARGE[1::2])


@pytest.mark.parametrize("scope", [STATE, USER_STATE])
@pytest.mark.parametrize("op", [put("", "x", if_version=1), increment("", 1), append("", 1)], ids=str)
async def test_values_that_a_change_depends_on_are_bounded_together(store: Store, scope: Scope, op: v1.StateOp) -> None:
    await _fill(store, scope)
    ops = [v1.StateOp() for _ in LARGE]
    for key, one in zip(LARGE, ops, strict=True):
        one.CopyFrom(op)
        one.key = key

    async def refusal() -> None:
        with refused("PAYLOAD_TOO_LARGE"):
            await _change(store, scope, ops)

    assert await _peak(refusal()) < 4 << 20
    state = await store.get_state(scope, LARGE[:1])
    assert state.version == len(LARGE)


async def _fill(store: Store, scope: Scope) -> None:
    await create(store)
    for key in LARGE:
        await _change(store, scope, [put(key, "x" * (PAGE_BYTES - 1000))])


async def _change(store: Store, scope: Scope, ops: Sequence[v1.StateOp]) -> None:
    if scope.kind == "session":
        await add(store, changed(*ops))
    else:
        await store.update_state(scope, ops)

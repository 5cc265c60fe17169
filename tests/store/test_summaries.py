"""Every store: one summary is in effect, each continues the one before it, and a rewind goes back to that."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Fork, Store

from tests.store.build import (
    KEY,
    ManualClock,
    add,
    contents,
    create,
    refused,
    rewound,
    said,
    session_key,
    summarized,
    used,
)
from tests.store.fixtures import Open


async def in_effect(store: Store) -> int:
    session = await store.get_session(KEY)
    assert session is not None
    return session.summary_sequence


async def test_a_summary_is_in_effect_and_the_next_continues_it(store: Store) -> None:
    """Its usage counts in the session; the log and the messages are as they were."""
    await create(store)
    await add(store, said("m1"), said("m2"), said("m3"))
    await add(store, summarized(1, 2), v1.Event(usage=used("").usage))
    assert await in_effect(store) == 4
    await add(store, summarized(3, 3, previous=4))
    assert await in_effect(store) == 6
    rows = await contents(store)
    assert [message.name for message in rows["messages"]] == ["m1", "m2", "m3"]
    assert rows["events"][3].summarized == summarized(1, 2).summarized
    assert rows["session"].usage.model_calls == 1


async def test_a_summary_that_does_not_continue_the_one_in_effect_is_refused(store: Store) -> None:
    """Of two made for the same place the second is: as of a head that has moved on."""
    await create(store)
    await add(store, said("m1"), said("m2"))
    await add(store, summarized(1, 1))
    before = await contents(store)
    for previous in (0, 2):
        with refused("SEQUENCE_MISMATCH") as error:
            await add(store, summarized(1, 2, previous))
        assert error.value.metadata == {"last_sequence": "3"}
    assert await contents(store) == before


async def test_what_is_said_meanwhile_does_not_matter_to_a_summary(store: Store) -> None:
    await create(store)
    await add(store, said("m1"))
    await add(store, said("m2"))
    await add(store, summarized(1, 1))
    assert await in_effect(store) == 3


async def test_a_summary_of_messages_that_were_rewound_meanwhile_is_refused(store: Store) -> None:
    """Although none was in effect before or after."""
    await create(store)
    await add(store, said("m1"), said("m2"), said("m3"))
    await add(store, rewound(1))
    for last in (2, 3, 4, 99):
        with refused("SEQUENCE_MISMATCH"):
            await add(store, summarized(1, last))
    await add(store, summarized(1, 1))
    assert await in_effect(store) == 5


@pytest.mark.parametrize(("to_sequence", "expected"), [(7, 7), (6, 5), (5, 5), (4, 3), (3, 3), (2, 0), (0, 0)])
async def test_a_rewind_goes_back_to_the_newest_summary_that_is_left(
    store: Store, to_sequence: int, expected: int
) -> None:
    """However many it passes at once."""
    await create(store)
    await add(store, said("m1"), said("m2"))
    await add(store, summarized(1, 1))
    await add(store, said("m4"))
    await add(store, summarized(2, 2, previous=3))
    await add(store, said("m6"))
    await add(store, summarized(4, 4, previous=5))
    await add(store, rewound(to_sequence))
    assert await in_effect(store) == expected


ACTIONS = st.one_of(
    st.tuples(st.just("say"), st.just(0)),
    st.tuples(st.just("summarize"), st.integers(0, 6)),
    st.tuples(st.just("rewind"), st.integers(0, 12)),
)


def by_hand(log: list[v1.Event]) -> int:
    """The newest summary that no later rewind went behind."""
    for event in reversed(log):
        later = (other.rewound.to_sequence for other in log[event.sequence :] if other.HasField("rewound"))
        if event.HasField("summarized") and all(event.sequence <= to for to in later):
            return event.sequence
    return 0


async def scenario(open_store: Open, actions: list[tuple[str, int]]) -> None:
    clock = ManualClock()
    async with open_store(clock) as store:
        await create(store)
        for number, (action, back) in enumerate(actions):
            head = len(await store.read_events(KEY, 0))
            if action == "say":
                await add(store, said(f"m{number}"))
            elif action == "rewind":
                await add(store, rewound(max(head - back, 0)))
            else:
                previous = await in_effect(store)
                try:
                    await add(store, summarized(1, head - back, previous))
                except NotecaseError:
                    assert head == len(await store.read_events(KEY, 0))
            assert await in_effect(store) == by_hand(await store.read_events(KEY, 0))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=60,
    deadline=None,
    database=None,
)
@given(actions=st.lists(ACTIONS, max_size=20))
def test_the_summary_in_effect_is_what_the_log_says(open_store: Open, actions: list[tuple[str, int]]) -> None:
    asyncio.run(scenario(open_store, actions))


async def test_a_fork_has_the_summary_that_was_in_effect_where_it_leaves(store: Store) -> None:
    """Also in a stretch that was rewound since, and before the one that is in effect now."""
    await create(store)
    for entry in (
        *(said("m1"), said("m2"), summarized(1, 1)),
        *(said("m3"), summarized(2, 2, previous=3), rewound(3)),
        *(said("m4"), summarized(2, 7, previous=3)),
    ):
        await add(store, entry)
    assert await in_effect(store) == 8
    for at, summary in ((2, 0), (3, 3), (4, 3), (5, 5), (6, 3), (7, 3), (8, 8)):
        key = session_key("acme", f"fork-{at}")
        past = await store.read_past(KEY, at)
        made = await store.fork(Fork(key=key, source=KEY, past=past, session=v1.Session()))
        assert made.session.summary_sequence == summary, at

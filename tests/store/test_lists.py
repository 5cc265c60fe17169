"""Every store: pages and filters of lists over sessions, runs and agents."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from notecase import v1
from notecase_server.store.contract import And, Compare, Filter, Not, Or, Page, Query, SessionKey, Store
from notecase_server.store.steps import REPLIES

from tests.store.build import (
    AGENT,
    EVERYTHING,
    ManualClock,
    add,
    changed,
    create,
    edit,
    ended,
    names,
    put,
    remove,
    replied,
    session_key,
    start,
)


def key(session: str) -> SessionKey:
    return session_key("acme", session)


def newest(sessions: str) -> list[str]:
    """Sessions of one moment in the order of lists."""
    return sorted(sessions, key=lambda session: key(session).uid, reverse=True)


async def every(read: Callable[[Query], Awaitable[Page[Any]]], limit: int, where: Filter | None = None) -> list[str]:
    """The names on all pages, none of which is empty but the only one."""
    found: list[str] = []
    after: tuple[str | int, ...] | None = None
    while True:
        page = await read(Query(limit, after, where))
        assert len(page.rows) <= limit
        assert page.rows or (page.next is None and after is None)
        found += names(page.rows)
        after = page.next
        if after is None:
            return found


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
async def test_sessions_are_listed_last_created_first_and_ties_by_uid(
    store: Store, clock: ManualClock, limit: int
) -> None:
    for session in ("b", "d", "a"):
        await create(store, key(session))
    clock.now += 1
    for session in ("c", "0"):
        await create(store, key(session))
    clock.now -= 2
    await create(store, key("z"))
    assert await every(lambda query: store.list_sessions("acme", query), limit) == [
        *newest("c0"),
        *newest("bda"),
        "z",
    ]


async def test_pages_stay_exact_while_sessions_come_go_and_change(store: Store, clock: ManualClock) -> None:
    for session in "abcdef":
        await create(store, key(session))
        clock.now += 1
    first = await store.list_sessions("acme", Query(2))
    assert names(first.rows) == ["f", "e"]
    await create(store, key("new"))
    await store.delete_session(key("e"))
    await store.delete_session(key("c"))
    await store.edit_session(key("a"), edit(display_name="moved"))
    second = await store.list_sessions("acme", Query(2, first.next))
    assert names(second.rows) == ["d", "b"]
    assert names((await store.list_sessions("acme", Query(2, second.next))).rows) == ["a"]


async def test_a_page_of_sessions_ends_at_a_mebibyte(store: Store, clock: ManualClock) -> None:
    for session in "abc":
        await create(store, key(session), display_name="x" * 600_000)
        clock.now += 1
    page = await store.list_sessions("acme", EVERYTHING)
    assert names(page.rows) == ["c", "b"]
    assert names((await store.list_sessions("acme", Query(1000, page.next))).rows) == ["a"]


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_runs_are_listed_over_all_sessions_or_of_one(store: Store, clock: ManualClock, limit: int) -> None:
    """Those that have not ended between the others."""
    high, low = newest("ab")
    for session in (low, high):
        await create(store, key(session))
        for run in ("r2", "r1", "r3"):
            await start(store, run, *([] if run == "r3" else [ended(run)]), key=key(session))
            clock.now += run == "r1"
    assert await every(lambda query: store.list_runs("acme", None, query), limit) == [
        f"sessions/{high}/runs/r3",
        f"sessions/{high}/runs/r2",
        f"sessions/{high}/runs/r1",
        f"sessions/{low}/runs/r3",
        f"sessions/{low}/runs/r2",
        f"sessions/{low}/runs/r1",
    ]
    assert await every(lambda query: store.list_runs("acme", key(high), query), limit) == [
        f"sessions/{high}/runs/r3",
        f"sessions/{high}/runs/r2",
        f"sessions/{high}/runs/r1",
    ]
    assert await every(lambda query: store.list_runs("acme", key("none"), query), limit) == []


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_the_runs_of_a_users_sessions_fill_their_pages(store: Store, clock: ManualClock, limit: int) -> None:
    for session, user in (("a", "users/ada"), ("b", "users/eve"), ("c", "users/ada")):
        await create(store, key(session), user=user)
        clock.now += 1
        await start(store, "r", ended("r"), key=key(session))

    def of(user: str) -> Callable[[Query], Awaitable[Page[Any]]]:
        return lambda query: store.list_runs("acme", None, query, user)

    assert ["sessions/c/runs/r", "sessions/a/runs/r"] == await every(of("users/ada"), limit)
    assert ["sessions/b/runs/r"] == await every(of("users/eve"), limit)
    assert [] == await every(of("users/none"), limit)
    succeeded = Compare("state", "=", v1.Run.STATE_SUCCEEDED)
    assert ["sessions/c/runs/r", "sessions/a/runs/r"] == await every(of("users/ada"), limit, succeeded)
    waiting = Compare("state", "=", v1.Run.STATE_WAITING)
    assert [] == await every(of("users/ada"), limit, waiting)


async def sessions_to_filter(store: Store, clock: ManualClock) -> None:
    """a to e, created a second apart; c is at work, d has another agent and user, e no labels."""
    for number, session in enumerate("abcde"):
        labels = {"team": "night", "n": str(number)} if session != "e" else {}
        if session == "d":
            labels = {"team": "", "odd key.'\"\\": 'odd "value"\u0000'}
        who = "users/eve" if session == "d" else "users/ada"
        agent = "agents/poirot" if session == "d" else "agents/sherlock"
        await create(store, key(session), user=who, agent=agent, display_name=f"Case {session}", labels=labels)
        clock.now += 1_000_000
    await start(store, "r1", key=key("c"))


START = ManualClock().now

FILTERS: list[tuple[Filter, str]] = [
    (Compare("user", "=", "users/ada"), "ecba"),
    (Compare("user", "!=", "users/ada"), "d"),
    (Compare("agent", "=", "agents/poirot"), "d"),
    (Compare("activity", "=", v1.Session.ACTIVITY_RUNNING), "c"),
    (Compare("activity", "!=", v1.Session.ACTIVITY_RUNNING), "edba"),
    (Compare("display_name", "<", "Case c"), "ba"),
    (Compare("display_name", "<=", "Case c"), "cba"),
    (Compare("display_name", ">", "Case c"), "ed"),
    (Compare("display_name", ">=", "Case c"), "edc"),
    (Compare("create_time", "=", START + 1_000_000), "b"),
    (Compare("create_time", "<", START + 1_000_000), "a"),
    (Compare("create_time", ">=", START + 3_000_000), "ed"),
    (Compare("update_time", ">", START + 3_999_999), "ec"),
    (Compare("labels.team", "=", "night"), "cba"),
    (Compare("labels.team", "!=", "night"), "ed"),
    (Compare("labels.team", "=", ""), "ed"),
    (Compare("labels.team", ">", ""), "cba"),
    (Compare("labels.n", ">=", "1"), "cb"),
    (Compare("labels.none", "=", ""), "edcba"),
    (Compare("labels.odd key.'\"\\", "=", 'odd "value"\u0000'), "d"),
    (Compare("labels.odd key.'\"\\", ">", 'odd "value"'), "d"),
    (Compare("labels.odd key.'\"\\", "<", 'odd "value"\u0001'), "edcba"),
    (Compare("display_name", "=", "' OR 1=1 --"), ""),
    (Not(Compare("user", "=", "users/ada")), "d"),
    (Not(Compare("labels.none", "=", "x")), "edcba"),
    (Not(Not(Compare("user", "=", "users/eve"))), "d"),
    (And((Compare("user", "=", "users/ada"), Compare("labels.n", "=", "1"))), "b"),
    (Or((Compare("user", "=", "users/eve"), Compare("labels.n", "=", "1"))), "db"),
    (
        And((Or((Compare("labels.n", "=", "0"), Compare("labels.n", "=", "1"))), Not(Compare("labels.n", "=", "0")))),
        "b",
    ),
    (Not(And((Compare("labels.team", "=", "night"), Compare("activity", "=", 1)))), "edc"),
    (Not(Or((Compare("labels.n", "=", "0"), Compare("labels.n", "=", "1")))), "edc"),
    (And(()), "edcba"),
    (Or(()), ""),
]


@pytest.mark.parametrize(("where", "expected"), FILTERS, ids=[str(number) for number in range(len(FILTERS))])
async def test_a_filter_admits_what_it_says(store: Store, clock: ManualClock, where: Filter, expected: str) -> None:
    await sessions_to_filter(store, clock)
    for limit in (1, 2, 100):
        assert await every(lambda query: store.list_sessions("acme", query), limit, where) == list(expected)


async def test_a_filter_follows_what_changes(store: Store) -> None:
    await create(store, key("a"))
    idle = Compare("activity", "=", v1.Session.ACTIVITY_IDLE)
    night = Compare("labels.team", "=", "night")
    await start(store, "r1", key=key("a"))
    await store.edit_session(key("a"), edit(labels={"team": "night"}))
    assert names((await store.list_sessions("acme", Query(9, where=idle))).rows) == []
    assert names((await store.list_sessions("acme", Query(9, where=night))).rows) == ["a"]
    await add(store, ended("r1"), key=key("a"))
    await store.edit_session(key("a"), edit(labels={}))
    assert names((await store.list_sessions("acme", Query(9, where=idle))).rows) == ["a"]
    assert names((await store.list_sessions("acme", Query(9, where=night))).rows) == []


async def test_runs_are_filtered_by_state_agent_time_and_labels(store: Store, clock: ManualClock) -> None:
    other, one = map(key, newest("ab"))
    await create(store, one)
    await create(store, other)
    await start(store, "r1", ended("r1", v1.Run.STATE_FAILED), key=one, labels={"k": "v"})
    clock.now += 1
    await start(store, "r2", key=one, agent="agents/poirot")
    await start(store, "r3", key=other)
    found: dict[str, list[str]] = {}
    for session in (None, one):
        for where in (
            Compare("state", "=", v1.Run.STATE_RUNNING),
            Compare("state", "!=", v1.Run.STATE_RUNNING),
            Compare("agent", "=", AGENT.name),
            Compare("create_time", ">=", clock.now),
            Compare("labels.k", "=", "v"),
        ):
            rows = await every(partial(store.list_runs, "acme", session), 1, where)
            found[f"{'one' if session else ''} {where.field} {where.op}"] = [name[-2:] for name in rows]
    assert found == {
        " state =": ["r3", "r2"],
        " state !=": ["r1"],
        " agent =": ["r3", "r1"],
        " create_time >=": ["r3", "r2"],
        " labels.k =": ["r1"],
        "one state =": ["r2"],
        "one state !=": ["r1"],
        "one agent =": ["r1"],
        "one create_time >=": ["r2"],
        "one labels.k =": ["r1"],
    }


async def test_agents_are_filtered_by_their_newest_revision(store: Store, clock: ManualClock) -> None:
    for agent_id in "abc":
        await store.create_agent("acme", agent_id, v1.Agent(display_name=agent_id, labels={"team": "night"}))
        clock.now += 1
    await store.edit_agent("acme", "a", v1.Agent(display_name="a", labels={"team": "day"}), if_revision=1)

    async def found(where: Filter) -> list[str]:
        return [name[-1] for name in await every(lambda query: store.list_agents("acme", query), 1, where)]

    assert await found(Compare("labels.team", "=", "night")) == ["b", "c"]
    assert await found(Compare("display_name", "<", "b")) == ["a"]
    assert await found(Compare("create_time", "<", clock.now - 1)) == ["a", "b"]
    assert await found(Compare("update_time", "=", clock.now)) == ["a"]


@pytest.mark.parametrize("field", ["name", "body", "tenant", "epoch", "1=1 --", "create_time OR 1"])
async def test_no_other_column_can_be_named(store: Store, field: str) -> None:
    await create(store, key("a"))
    with pytest.raises(ValueError, match="column"):
        await store.list_sessions("acme", Query(9, where=Compare(field, "=", "x")))


async def test_what_is_deleted_is_gone_from_every_list(store: Store, clock: ManualClock) -> None:
    for session in "abc":
        await create(store, key(session))
        await start(store, f"r-{session}", ended(f"r-{session}"), key=key(session))
        clock.now += 1
    await store.delete_session(key("b"))
    assert ["c", "a"] == await every(lambda query: store.list_sessions("acme", query), 1)
    runs = ["sessions/c/runs/r-c", "sessions/a/runs/r-a"]
    assert runs == await every(lambda query: store.list_runs("acme", None, query), 1)
    assert [] == (await store.list_runs("acme", key("b"), Query(5))).rows


async def test_keys_of_a_state_stay_in_order_while_they_come_and_go(store: Store) -> None:
    await create(store)
    scope = session_key("acme", "case").state
    for number in (3, 1, 2, 0):
        await add(store, changed(put(f"k{number}", number)))
    await add(store, changed(remove("k1")))
    await add(store, changed(put("k2", 5)))
    seen: list[str] = []
    after: tuple[str | int, ...] | None = None
    while True:
        _, page = await store.list_state(scope, Query(1, after))
        seen += page.rows
        after = page.next
        if after is None:
            break
    assert ["k0", "k2", "k3"] == seen


async def test_a_page_of_runs_has_the_replies_of_all(store: Store) -> None:
    """However many are read at one go."""
    await create(store)
    for number in range(2 * REPLIES + 3):
        name = f"r{number}"
        await start(store, name, replied(f"m{number}", name, name), ended(name))
    page = await store.list_runs("acme", None, Query(1000))
    assert len(page.rows) == 2 * REPLIES + 3
    assert {row.name.rpartition("/")[2] for row in page.rows} == {row.reply.parts[0].text for row in page.rows}

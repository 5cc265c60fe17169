"""A change of a user's or the app's state reaches every session that reads it, and delays no other call."""

import asyncio

from notecase import v1
from notecase_server.engine.session import NOTICES, TAIL_BYTES, LiveSession
from notecase_server.engine.sessions import VISITS, Sessions
from notecase_server.serve import new_id, new_uid, now
from notecase_server.store.contract import Scope
from notecase_server.store.memory import MemoryStore


def lives(sessions: Sessions, number: int, user: str = "users/ada") -> list[LiveSession]:
    made = [sessions.live(sessions.new_key("acme", f"s{index}")) for index in range(number)]
    for live in made:
        live.user = user
    return made


def told(live: LiveSession) -> list[int]:
    return [notice.state_changed.version for notice in live.notices(0)]


async def test_many_sessions_hear_of_changes_in_steps_of_the_loop_and_in_the_order_of_the_changes() -> None:
    sessions = Sessions(MemoryStore(now), new_id, new_uid)
    made = lives(sessions, 3 * VISITS + 1)
    ops = [v1.StateOp(key="k", increment=1)]
    for version in (1, 2):
        sessions.state_changed(Scope("acme", "app", ""), ops, version)
    heard = [sum(told(live) != [] for live in made)]
    while heard[-1] < len(made) or any(told(live) != [1, 2] for live in made):
        await asyncio.sleep(0)
        heard.append(sum(told(live) != [] for live in made))
    assert [VISITS, 2 * VISITS, 3 * VISITS, len(made)] == sorted({*heard})
    assert {1} == {len({id(live.notices(0)[0]) for live in made})}


async def test_only_those_who_read_a_state_hear_of_it() -> None:
    sessions = Sessions(MemoryStore(now), new_id, new_uid)
    hers, his = lives(sessions, VISITS), lives(sessions, VISITS, "users/bob")
    ops = [v1.StateOp(key="k", increment=1, if_version=7)]
    sessions.state_changed(Scope("acme", "user", "bob"), ops, 1, besides=his[0])
    for _ in range(3):
        await asyncio.sleep(0)
    assert ([[]] * VISITS, [[], *[[1]] * (VISITS - 1)]) == ([*map(told, hers)], [*map(told, his)])
    assert not his[1].notices(0)[0].state_changed.ops[0].HasField("if_version")


async def test_the_notices_that_are_kept_are_bounded_by_number_and_by_bytes() -> None:
    sessions = Sessions(MemoryStore(now), new_id, new_uid)
    (live,) = lives(sessions, 1)
    large = [v1.StateOp(key="k", set=v1.Value(string_value="x" * (TAIL_BYTES // 2)))]
    larger = [v1.StateOp(key="k", set=v1.Value(string_value="x" * 2 * TAIL_BYTES))]
    small = [v1.StateOp(key="k", increment=1)]
    for version in range(1, NOTICES + 2):
        sessions.state_changed(Scope("acme", "app", ""), small, version)
    assert [*range(2, NOTICES + 2)] == told(live)
    for version in (101, 102):
        sessions.state_changed(Scope("acme", "app", ""), large, version)
    assert [102] == told(live)
    sessions.state_changed(Scope("acme", "app", ""), larger, 103)
    assert [103] == told(live), "the newest is always kept"
    sessions.state_changed(Scope("acme", "app", ""), small, 104)
    assert ([104], 69) == (told(live), live.noticed)

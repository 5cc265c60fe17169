"""Stores of tables: a session is deleted at once, and its rows go after it in small transactions that may be cut."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.store import steps
from notecase_server.store.base import TableStore
from notecase_server.store.contract import Answer, Commit, Quotas, Replayed, Store

from tests.store.build import (
    EVERYTHING,
    KEY,
    NOTHING,
    RECORD,
    USER_STATE,
    ManualClock,
    add,
    changed,
    create,
    edit,
    once,
    put,
    reborn,
    refused,
    remove,
    said,
    session_key,
    started,
)
from tests.store.test_identity import COMMAND, about, everything, fill, prepare
from tests.support.inside import rows_with, select, session_rows

NEXT = reborn(KEY)
Step = Callable[..., Any]


class Tally(NamedTuple):
    """The rows of sessions and states that a store has, and their bytes."""

    rows: int
    size: int


async def tally(store: Store) -> Tally:
    sizes: list[int] = []
    counted = [(table, size) for table, _, size in session_rows(store)]
    for table, size in [*counted, ("requests WHERE owner != ''", "length(response)")]:
        sizes += [size or 0 for (size,) in await select(store, f"SELECT {size} FROM {table}")]
    return Tally(len(sizes), sum(sizes))


async def sweep(store: Store) -> AsyncIterator[bool]:
    """Sweeps, one transaction at a time; yields before each of them whether it is the first."""
    first, done = True, False
    while not done:
        yield first
        done = await cast(TableStore, store)._write(partial(steps.sweep_sessions, tenant=None, user=""))
        first = False


async def test_no_transaction_removes_more_than_its_bound_of_rows_and_of_bytes(store: Store) -> None:
    """Of a session of some thousand events, some large ones among them; its deletion itself removes none of them."""
    await create(store)
    for batch in range(4):
        notes = [changed(put(f"k{number}", "v")) for number in range(500)]
        await add(store, *notes, once=once(f"notes {batch}"))
    for number in range(3):
        large = (said(f"large{number}-{each}", "x" * 300_000) for each in range(9))
        await add(store, *large, said(f"larger{number}", "y" * 1_500_000), once=once(f"large {number}"))
    for number in range(200):
        some = (said(f"m{number}-{each}", "z" * 300) for each in range(4))
        await add(store, *some, once=once(f"m{number}"))
    before = await tally(store)
    assert before.rows > 3500
    assert before.size > 10 << 20
    await store.delete_session(KEY)
    assert before == await tally(store)
    cuts = [*[await tally(store) async for _ in sweep(store)], await tally(store)]
    gone = [Tally(more.rows - less.rows, more.size - less.size) for more, less in pairwise(cuts)]
    assert (0, 0) == cuts[-1]
    assert [] == [each for each in gone if each.rows > steps.SWEEP_ROWS]
    assert [] == [each for each in gone if each.size > steps.SWEEP_BYTES and each.rows > 1]
    assert len(gone) > before.size // steps.SWEEP_BYTES


async def test_many_small_sessions_share_a_transaction(store: Store) -> None:
    keys = [session_key("acme", f"s{number}") for number in range(2 * steps.SWEEP_SESSIONS)]
    for key in keys:
        await create(store, key)
        await store.delete_session(key)
    assert [True, False, False] == [first async for first in sweep(store)]
    assert set() == set().union(*[await rows_with(store, key.uid) for key in keys])


async def test_nothing_of_a_deleted_session_is_seen_while_its_rows_go(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its key or in any list; another of its name begins at once, and stays whole."""
    monkeypatch.setattr(steps, "SWEEP_ROWS", 1)
    await prepare(store, "acme")
    await fill(store, KEY)
    await store.edit_session(KEY, edit(expiry=True, expire_time=about_now(clock)))
    there = len((await store.list_sessions("acme", EVERYTHING)).rows)
    await store.delete_session(KEY, once=once("delete", NOTHING))
    store.quotas = Quotas(sessions=there)
    await store.commit(Commit(key=NEXT, create=v1.Session(user="users/eve")))
    never, whole = await everything(store, NEXT._replace(uid="never")), await everything(store, NEXT)
    transactions = 0
    async for _ in sweep(store):
        transactions += 1
        assert never == await everything(store, KEY)
        assert whole == await everything(store, NEXT)
        assert [] == (await store.list_runs("acme", None, EVERYTHING)).rows
        assert [] == [run for run in (*await store.active_runs(), *await store.idle_runs()) if run.key == KEY]
        assert [] == await store.expired_sessions(clock.now, 10)
        assert not await store.expire_session(KEY)
        await store.recall_command(KEY, COMMAND)  # raises nothing
        for write in (
            add(store, said("m9")),
            add(store, said("m9"), command=COMMAND),
            add(store, started("r9"), start=RECORD),
            store.claim(KEY, 1),
            store.read_past(KEY, 1),
            store.get_state(KEY.state, ["k"], 1),
            store.recall(about("create", KEY)),
            store.delete_session(KEY),
        ):
            with refused("SESSION_NOT_FOUND"):
                await write
        with pytest.raises(Replayed):
            await store.delete_session(KEY, once=once("delete", NOTHING))
    assert transactions > 15
    assert await rows_with(store, KEY.uid) == set()
    assert whole == await everything(store, NEXT)


def about_now(clock: ManualClock) -> Any:
    session = v1.Session()
    session.expire_time.FromMicroseconds(clock.now)
    return session.expire_time


async def test_of_two_deletions_at_once_one_is_done_and_two_sweeps_are_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SWEEP_ROWS", 2)
    await fill(store, KEY)
    done = await asyncio.gather(*(store.delete_session(KEY) for _ in range(2)), return_exceptions=True)
    assert {type(None), errors.NotecaseError} == {type(each) for each in done}
    await create(store, NEXT)
    sweeps = store.sweep_sessions(), store.sweep_sessions("acme", "users/ada")
    await asyncio.gather(*sweeps, store.delete_session(NEXT))
    await store.sweep_sessions()
    assert await rows_with(store, KEY.uid) | await rows_with(store, NEXT.uid) == set()


@pytest.mark.parametrize("made", [False, True])
async def test_a_sweep_that_fails_goes_on_where_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    """At each transaction in turn, whether it was made or not."""
    monkeypatch.setattr(steps, "SWEEP_ROWS", 3)
    write = cast(TableStore, store)._write
    await fill(store, KEY)
    await store.delete_session(KEY)

    async def failing(step: Step, *within: str, **how: Any) -> Any:
        if made:
            await write(step, *within, **how)
        raise errors.store_unavailable()

    failures = 0
    while await rows_with(store, KEY.uid):
        monkeypatch.setattr(store, "_write", failing)
        with refused("STORE_UNAVAILABLE"):
            await store.sweep_sessions()
        failures += 1
        monkeypatch.setattr(store, "_write", write)
        if not made:
            await write(partial(steps.sweep_sessions, tenant=None, user=""))
    assert failures > 4
    await store.sweep_sessions()


async def test_only_the_sessions_of_one_user_are_swept_on_request(store: Store) -> None:
    mine, other, elsewhere = KEY, session_key("acme", "other"), KEY._replace(tenant="globex", uid=NEXT.uid)
    await create(store, mine)
    await create(store, other, user="users/eve")
    await create(store, elsewhere)
    for key in (mine, other, elsewhere):
        await store.delete_session(key)
    await store.sweep_sessions("acme", "users/ada")
    assert [set(), True, True] == [
        await rows_with(store, mine.uid),
        *[bool(await rows_with(store, k.uid)) for k in (other, elsewhere)],
    ]
    assert await store.erase_state("acme", "users/ada")
    assert not await store.erase_state("acme", "users/eve")


async def test_a_large_state_of_a_user_is_erased_in_small_transactions(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And recorded as erased with the last of them."""
    monkeypatch.setattr(steps, "SWEEP_ROWS", 2)
    await store.update_state(USER_STATE, [put(f"k{number}", number) for number in range(5)])
    erase = partial(store.erase_state, "acme", "users/ada", once("erase", NOTHING))
    for left in (3, 1):
        assert not await erase()
        await store.recall(once("erase", NOTHING))  # raises nothing
        assert left == len((await store.list_state(USER_STATE, EVERYTHING))[0].entries)
    assert await erase()
    assert v1.State() == await store.get_state(USER_STATE, ["k0"])
    with pytest.raises(Replayed):
        await erase()


async def test_answers_about_an_erased_user_are_blanked_in_the_order_of_their_requests(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many in a transaction as fit, and each transaction blanks some."""
    monkeypatch.setattr(steps, "SWEEP_ROWS", 3)
    monkeypatch.setattr(steps, "SWEEP_BYTES", 9_000)
    sizes = {"r4": 4_000, "r1": 100, "r5": 20_000, "r2": 8_000, "r3": 4_000, "r0": 100}
    for name, size in sizes.items():
        await store.update_state(USER_STATE, [put("k", "x" * size)], None, once(name, Answer("state")))
    await store.update_state(USER_STATE, [remove("k")])

    async def kept() -> list[str]:
        found = []
        for name in sorted(sizes):
            with pytest.raises(Replayed) as replayed:
                await store.recall(once(name, Answer("state")))
            found += [name] if replayed.value.response else []
        return found

    seen = [await kept()]
    while not await store.erase_state("acme", "users/ada"):
        seen.append(await kept())
    names = sorted(sizes)
    assert [names[0:], names[3:], names[5:], names[6:]] == [*seen, await kept()][:4]


async def test_others_have_their_turn_between_the_transactions_of_a_sweep(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a store that waits for nothing."""
    monkeypatch.setattr(steps, "SWEEP_ROWS", 2)
    await create(store)
    await add(store, *(said(f"m{number}") for number in range(20)))
    await store.delete_session(KEY)
    sweeping, turns = asyncio.create_task(store.sweep_sessions()), 0
    while not sweeping.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10

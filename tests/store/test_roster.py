"""Every store: which runs have not ended, which of them should have a worker, and what is known of each."""

import asyncio
from pathlib import Path

from notecase import v1
from notecase_server.store.contract import ActiveRun, SessionKey, Store
from notecase_server.store.sqlite.store import SqliteStore

from tests.store.build import (
    AGENT,
    KEY,
    RECORD,
    ManualClock,
    add,
    create,
    ended,
    moved,
    queued_start,
    reborn,
    said,
    session_key,
    start,
)

WAITING = v1.Run.STATE_WAITING


async def queue(store: Store, run: str, key: SessionKey) -> None:
    await add(store, queued_start(run), key=key, start=RECORD)


async def known(store: Store, run: str = "r1", key: SessionKey = KEY) -> tuple[int, bool] | None:
    found = await store.active_run(key, run)
    return (found.deaths, found.released) if found else None


async def idle(store: Store) -> set[tuple[SessionKey, str]]:
    found = await store.idle_runs()
    assert all(each.agent == AGENT for each in found)
    places = [(each.key, each.run.name) for each in found]
    assert len(places) == len(set(places))
    return set(places)


async def test_idle_runs_are_those_that_run_and_those_whose_turn_has_come(store: Store) -> None:
    """A waiting run needs no worker, and runs that are queued behind it, or behind a running one, wait."""
    assert await idle(store) == set()
    running, waiting, rested, done, elsewhere = (
        session_key("globex" if name == "elsewhere" else "acme", name)
        for name in ("running", "waiting", "rested", "done", "elsewhere")
    )
    for key in (running, waiting, rested, done, elsewhere):
        await create(store, key)
        await start(store, "r1", key=key)
    for key in (running, waiting, rested):
        await queue(store, "r2", key)
        await queue(store, "r3", key)
    await add(store, moved("r1", WAITING), key=waiting)
    await add(store, ended("r1"), key=rested)
    await add(store, ended("r1", v1.Run.STATE_FAILED), key=done)
    expected = {(running, "r1"), (rested, "r2"), (rested, "r3"), (elsewhere, "r1")}
    assert await idle(store) == expected

    await start(store, "r2", key=rested)
    assert await idle(store) == expected - {(rested, "r3")}
    await add(store, moved("r1", v1.Run.STATE_RUNNING), key=waiting)
    assert await idle(store) == expected - {(rested, "r3")} | {(waiting, "r1")}
    await add(store, ended("r3", v1.Run.STATE_CANCELLED), ended("r2"), key=rested)
    await store.delete_session(running)
    await store.delete_session(elsewhere)
    assert await idle(store) == {(waiting, "r1")}


async def test_runs_that_have_not_ended_are_paged_by_tenant_time_uid_and_run(store: Store, clock: ManualClock) -> None:
    keys = [session_key(tenant, name) for tenant in ("globex", "acme") for name in ("b", "a", "c")]
    for number, key in enumerate([*keys, KEY]):
        clock.now += number % 2
        await create(store, key)
        await start(store, "r2", key=key)
        await queue(store, "r1", key)
    await add(store, ended("r2"), ended("r1"))
    expected = sorted((*place(each), each.run.name) for each in await store.active_runs())
    assert {(key.tenant, key.uid, run) for key in keys for run in ("r1", "r2")} == {
        (tenant, uid, run) for tenant, _, uid, run in expected
    }
    for limit in (1, 2, 3, 12, 13):
        found = list[ActiveRun]()
        while page := await store.active_runs(found[-1] if found else None, limit):
            assert len(page) <= limit
            found += page
        assert [(*place(each), each.run.name) for each in found] == expected
    assert {each.key for each in await store.active_runs()} == set(keys)


def place(active: ActiveRun) -> tuple[str, int, str]:
    return active.key.tenant, active.run.create_time.ToMicroseconds(), active.key.uid


async def test_a_run_begins_without_deaths_at_work(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    assert await known(store) == (0, False)
    await queue(store, "r2", KEY)
    assert await known(store, "r2") == (0, False)


async def test_deaths_are_what_a_commit_says_and_stay_until_one_says_otherwise(store: Store) -> None:
    await create(store)
    epoch = (await start(store, "r1")).epoch
    await add(store, moved("r1", v1.Run.STATE_RUNNING), if_epoch=epoch, claim=True, deaths=2)
    assert await known(store) == (2, False)
    await add(store, said("m1", run="r1"))
    assert await known(store) == (2, False)
    await store.release_run(KEY, "r1")
    assert await known(store) == (2, True)
    await add(store, said("m2", run="r1"))
    assert await known(store) == (2, True)
    assert [(each.deaths, each.released) for each in await store.active_runs()] == [(2, True)]
    assert [(each.deaths, each.released) for each in await store.idle_runs()] == [(2, True)]
    await add(store, said("m3", run="r1"), deaths=0)
    assert await known(store) == (0, False)


async def test_a_refused_commit_leaves_what_is_known_of_a_run(store: Store) -> None:
    await create(store)
    epoch = (await start(store, "r1")).epoch
    await store.release_run(KEY, "r1")
    done = await asyncio.gather(add(store, said("m1", run="r1"), if_epoch=epoch + 1, deaths=3), return_exceptions=True)
    assert isinstance(done[0], Exception)
    assert await known(store) == (0, True)


async def test_deaths_belong_to_the_runs_of_the_commits_events(store: Store) -> None:
    await create(store)
    await start(store, "r1")
    await queue(store, "r2", KEY)
    await add(store, said("m1", run="r1"), deaths=1)
    assert (await known(store, "r1"), await known(store, "r2")) == ((1, False), (0, False))


async def test_nothing_is_kept_of_a_run_that_has_ended(store: Store) -> None:
    """Nor does it hurt to let go of one that has, or that is gone."""
    await create(store)
    await start(store, "r1")
    await add(store, ended("r1"), deaths=1)
    assert await known(store) is None
    for run in ("r1", "none"):
        await store.release_run(KEY, run)
        assert await known(store, run) is None
    await store.release_run(reborn(KEY), "r1")
    assert await store.active_runs() == []


async def test_what_is_known_of_a_run_survives_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    store = await SqliteStore.open(tmp_path / "store.db", clock)
    await create(store)
    await start(store, "r1", said("m1", run="r1"), deaths=1)
    await queue(store, "r2", KEY)
    await store.release_run(KEY, "r1")
    before = await store.active_runs()
    await store.close()
    store = await SqliteStore.open(tmp_path / "store.db", clock)
    assert await store.active_runs() == before
    assert await known(store) == (1, True)
    await add(store, said("m2", run="r1"), deaths=2)
    await store.close()
    store = await SqliteStore.open(tmp_path / "store.db", clock)
    assert await known(store) == (2, False)
    assert await known(store, "r2") == (0, False)
    await store.close()

"""The sessions of a process: watchers are woken by each write, and nothing is decided before the outcome of a commit is
known."""

import asyncio

import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import v1
from notecase_server import errors
from notecase_server.engine.session import ASKS, LiveSession
from notecase_server.engine.tenancy import Tenancy
from notecase_server.store.contract import Answer, Commit, Once, Replayed, SessionKey, Store

from tests.engine.rooms import TENANT, Model, house
from tests.store.build import APP_STATE, ManualClock, put, refused
from tests.support.failing import Failing, Mode


def note(key: SessionKey, text: str = "n") -> Commit:
    change = v1.StateChanged(ops=[put(text, 1)])
    return Commit(key=key, events=[v1.Event(state_changed=change)])


async def watching(live: LiveSession) -> asyncio.Task[None]:
    """Who waits for something new of a session."""
    task = asyncio.create_task(live.soon.wait())
    await asyncio.sleep(0)
    return task


async def test_a_session_here_is_one_and_hears_of_each_write_to_it(store: Store, clock: ManualClock) -> None:
    async with house(store, clock) as rooms:
        key, other = await rooms.prepare("s", "t")
        live, elsewhere = rooms.sessions.live(key), rooms.sessions.live(other)
        mine, others = await watching(live), await watching(elsewhere)
        await rooms.sessions.commit(note(key))
        await mine
        assert not others.done()
        assert (await rooms.log(key), []) == (live.tail(0), elsewhere.tail(elsewhere.head) or [])
        assert live is rooms.sessions.live(key)
        others.cancel()


async def test_a_change_of_the_app_is_sent_to_every_session_here(store: Store, clock: ManualClock) -> None:
    async with house(store, clock) as rooms:
        lives = [rooms.sessions.live(key) for key in await rooms.prepare("s", "t")]
        once = rooms.sessions.record(None, TENANT, Answer("state"))
        await rooms.sessions.update_state(None, APP_STATE, [put("policy", "kind")], None, once, "")
        assert [["app"]] * 2 == [[event.state_changed.state for event in live.notices(0)] for live in lives]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("mode", [Mode.AFTER, Mode.PASSING])
async def test_nothing_is_decided_before_the_outcome_of_a_commit_is_known(
    store: Store, clock: ManualClock, mode: Mode
) -> None:
    """What follows the commit comes first, once, and only where it was made; then what was put off until it is
    known."""
    silent = Failing(store, "find_commit", Mode.PASSING, times=ASKS + 1)
    failing = Failing(silent.store, "commit", mode, nth=2)
    done: list[str] = []
    async with asyncio.timeout(60), house(failing.store, clock) as rooms:
        (key,) = await rooms.prepare()
        rooms.sessions.unsure = lambda live: done.append("unsure")  # no other call asks
        live = rooms.sessions.live(key)
        with refused("STORE_UNAVAILABLE") as told:
            async with live.held():
                await live.commit(note(key), late=lambda made: done.append(f"late {made.session.last_sequence}"))
        assert errors.UNKNOWN in str(told.value)
        with refused("STORE_UNAVAILABLE") as told:
            async with live.held():
                raise AssertionError("it is not known yet")
        assert errors.UNCHANGED in str(told.value)
        live.once_known(lambda: done.append("known"))
        for _ in range(2):
            async with live.held():
                done.append("decided")
        late = ["late 1"] if mode is Mode.AFTER else []
        assert ["unsure", *late, "known", "decided", "decided"] == done


@pytest.mark.parametrize("mode", [Mode.AFTER, Mode.PASSING])
async def test_a_write_whose_answer_is_lost_is_announced_if_it_was_made(
    store: Store, clock: ManualClock, mode: Mode
) -> None:
    failing = Failing(store, "delete_session", mode)
    async with house(failing.store, clock) as rooms:
        (key,) = await rooms.prepare()
        if mode is Mode.AFTER:
            with pytest.raises(Replayed):
                await rooms.sessions.delete(key)
        else:
            with refused("STORE_UNAVAILABLE"):
                await rooms.sessions.delete(key)
        assert (mode is Mode.AFTER) == (await store.get_session(key) is None)


async def test_a_session_that_is_deleted_takes_its_work_and_watchers_with_it(store: Store, clock: ManualClock) -> None:
    model = Model()
    async with house(store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "hold")
        await model.arrived.acquire()
        live = rooms.sessions.live(key)
        work, watcher = list(live.work), await watching(live)
        await rooms.sessions.delete(key)
        await watcher
        await asyncio.wait(work)
        assert live.deleted
        with refused("SESSION_NOT_FOUND"):
            await rooms.sessions.watched(key)


async def test_sessions_go_when_their_time_has_come_and_a_user_s_with_the_user(
    store: Store, clock: ManualClock
) -> None:
    async with house(store, clock) as rooms:
        kept, mine = await rooms.prepare("kept"), await rooms.make("mine", "users/eve")
        short = rooms.sessions.new_key(TENANT, "short")
        session = v1.Session(agent="agents/clerk", user="users/ada")
        session.ttl.FromSeconds(60)
        await rooms.sessions.commit(Commit(key=short, create=session))
        assert 0 == await rooms.sessions.expire(clock.now)
        clock.now += 60_000_000
        assert 1 == await rooms.sessions.expire(clock.now)
        erased = Once.unnamed(TENANT, "erase", Answer("erased"))
        assert 1 == await rooms.sessions.erase_user(TENANT, "users/eve", erased)
        left = [key for key in (*kept, mine, short) if await store.get_session(key) is not None]
        assert kept == left


async def test_a_session_that_cannot_be_deleted_keeps_no_other_from_expiring(store: Store, clock: ManualClock) -> None:
    failing = Failing(store, "expire_session", Mode.PASSING)
    async with house(failing.store, clock) as rooms:
        keys = [rooms.sessions.new_key(TENANT, name) for name in ("s", "t", "u")]
        for seconds, key in enumerate(keys, 1):
            await rooms.sessions.commit(Commit(key=key, create=v1.Session(ttl=Duration(seconds=seconds))))
        clock.now += 3_600_000_000
        assert 2 == await rooms.sessions.expire(clock.now)
        assert keys[:1] == await store.expired_sessions(clock.now, 10)
        assert 1 == await rooms.sessions.expire(clock.now)


async def test_a_store_that_refuses_every_deletion_is_not_asked_without_end(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say: each refused session would have had all that are due read again."""
    monkeypatch.setattr("notecase_server.engine.sessions.REFUSALS", 2)
    failing = Failing(store, "expire_session", Mode.PASSING, times=None)
    async with house(failing.store, clock) as rooms:
        for name in ("s", "t", "u"):
            key = rooms.sessions.new_key(TENANT, name)
            await rooms.sessions.commit(Commit(key=key, create=v1.Session(ttl=Duration(seconds=1))))
        clock.now += 3_600_000_000
        with refused("STORE_UNAVAILABLE"):
            await rooms.sessions.expire(clock.now)
        assert 2 == failing.calls


async def test_a_write_does_not_wait_without_end_for_a_rewind_whose_store_is_away(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notecase_server.engine.sessions.QUIET_SECONDS", 0.01)
    async with house(store, clock) as rooms:
        (key,) = await rooms.prepare()
        live = rooms.sessions.live(key)
        async with live.quiet:
            change = v1.Event(state_changed=v1.StateChanged(ops=[put("k", 1)]))
            committed = await rooms.sessions.commit(Commit(key=key, events=[change]))
        assert 1 == committed.session.last_sequence


async def test_a_tenant_that_cannot_be_removed_keeps_no_other_from_its_removal(
    store: Store, clock: ManualClock
) -> None:
    failing = Failing(store, "erase_tenant", Mode.PASSING)
    removed = asyncio.Queue[str]()
    async with asyncio.timeout(60), house(failing.store, clock) as rooms:
        for tenant in ("abc", "xyz"):
            await store.create_tenant(tenant, "")
            await store.set_tenant_state(tenant, v1.Tenant.STATE_DELETING)
        removing = asyncio.create_task(
            Tenancy(failing.store, rooms.sessions, rooms.runs, removed.put_nowait).keep_removing()
        )
        assert "xyz" == await removed.get()
        assert failing.failed.is_set()
        removing.cancel()

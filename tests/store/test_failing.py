"""The store that fails once: it fails at the chosen call, in the chosen way, and at no other."""

from typing import Any

import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.store.contract import Commit, Store

from tests.store.build import KEY, refused
from tests.support.failing import FAULTS, METHODS, Failing, Fault, Mode, Unreliable, of_a_run

REASONS = {
    Mode.PASSING: "STORE_UNAVAILABLE",
    Mode.FOR_GOOD: "PAYLOAD_TOO_LARGE",
    Mode.AFTER: "STORE_UNAVAILABLE",
}


class Recorder:
    """Takes the place of a store, and notes which calls reach it."""

    kind = "memory"

    def __init__(self) -> None:
        self.reached: list[tuple[str, object]] = []

    def __getattr__(self, name: str) -> Any:
        async def call(argument: object) -> str:
            self.reached.append((name, argument))
            return f"{name} {argument}"

        return call


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_the_chosen_call_fails_once_and_no_other(fault: Fault) -> None:
    """In every method of the contract. Whether it reached the store is what the modes differ in."""
    inner: Any = Recorder()
    failing = Failing(inner, *fault, nth=2)
    store: Any = failing.store
    for name in METHODS:
        assert f"{name} first" == await getattr(store, name)("first")
    assert not failing.failed.is_set()
    with refused(REASONS[fault.mode]):
        await getattr(store, fault.method)("second")
    assert failing.failed.is_set()
    assert f"{fault.method} third" == await getattr(store, fault.method)("third")
    done = [argument for name, argument in inner.reached if name == fault.method]
    assert ["first", *(["second"] if fault.mode is Mode.AFTER else []), "third"] == done
    assert ("memory", 3) == (store.kind, failing.calls)


@pytest.mark.parametrize("mode", Mode)
async def test_a_lost_answer_is_of_a_commit_that_was_made(store: Store, mode: Mode) -> None:
    create = Commit(key=KEY, create=v1.Session(), events=[])
    with refused(REASONS[mode]):
        await Failing(store, "commit", mode).store.commit(create)
    assert (mode is Mode.AFTER) == (await store.get_session(KEY) is not None)


async def test_only_what_counts_is_counted_and_a_refusal_may_be_another(store: Store) -> None:
    def drained() -> errors.NotecaseError:
        return errors.queue_full(3)

    failing = Failing(store, "commit", Mode.FOR_GOOD, times=2, refuse=drained, counts=of_a_run)
    await failing.store.commit(Commit(key=KEY, create=v1.Session(), events=[]))
    ran = Commit(key=KEY, events=[v1.Event(run="r1", message_added=v1.Message(name="m1"))])
    for calls in (1, 2):
        assert not failing.failed.is_set()
        with refused("QUEUE_FULL"):
            await failing.store.commit(ran)
        assert calls == failing.calls
    assert failing.failed.is_set()
    session = await store.get_session(KEY)
    assert session is not None
    assert 0 == session.last_sequence


async def test_a_call_that_no_store_has_is_an_error_of_the_test(store: Store) -> None:
    with pytest.raises(ValueError, match="no call 'comit'"):
        Failing(store, "comit", Mode.PASSING)
    assert {"commit", "get_session", "put_blob", "scrub"} < set(METHODS)
    assert "close" not in METHODS


async def test_a_store_can_be_made_to_fail_again_and_again() -> None:
    inner: Any = Recorder()
    unreliable = Unreliable(inner)
    store: Any = unreliable.store
    await store.commit("one")
    for mode in (Mode.PASSING, Mode.AFTER):
        unreliable.fail("commit", mode)
        with refused("STORE_UNAVAILABLE"):
            await store.commit(mode)
        await store.commit("again")
    assert ["one", "again", Mode.AFTER, "again"] == [argument for _, argument in inner.reached]

"""Work without a caller: duties that are retried until they are done, and slots for which runs wait in turn."""

import asyncio
from collections.abc import Callable
from itertools import count

import pytest
from notecase_server import errors, supervisor
from notecase_server.engine.places import Places
from notecase_server.errors import NotecaseError
from notecase_server.supervisor import DUTY_TRIES, Supervisor

from tests.store.build import refused


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries are made at once."""
    monkeypatch.setattr(supervisor, "BACKOFF", (0.0, 0.0))


class Duty:
    """Work that fails in each of the ways given, and then is done."""

    def __init__(self, *ways: Callable[[], Exception]) -> None:
        self.ways = list(ways)
        self.tries = 0
        self.refusals: list[NotecaseError] = []
        self.over = asyncio.Event()

    async def act(self) -> None:
        self.tries += 1
        if self.ways:
            raise self.ways.pop(0)()
        self.over.set()

    async def refused(self, error: NotecaseError) -> None:
        self.refusals.append(error)
        self.over.set()


async def did(duty: Duty) -> Supervisor:
    numbers = count()
    owner = Supervisor(lambda: f"id-{next(numbers)}")
    owner.duty("duty", "about", duty.act, duty.refused)
    await duty.over.wait()
    await owner.drain(0)
    return owner


async def test_what_passes_is_tried_until_it_is_done() -> None:
    duty = Duty(*[errors.store_unavailable] * 20, *[ZeroDivisionError] * (DUTY_TRIES - 1))
    owner = await did(duty)
    assert (20 + DUTY_TRIES, []) == (duty.tries, duty.refusals)
    assert {"duty": 19 + DUTY_TRIES} == owner.restarts


async def test_a_permanent_refusal_is_recorded() -> None:
    duty = Duty(errors.store_unavailable, lambda: errors.queue_full(1))
    await did(duty)
    assert (2, ["QUEUE_FULL"]) == (duty.tries, [errors.reason_name(error.reason) for error in duty.refusals])


async def test_what_breaks_every_time_is_given_up() -> None:
    duty = Duty(*[ZeroDivisionError] * 100)
    await did(duty)
    told = [errors.reason_name(error.reason) for error in duty.refusals]
    assert (DUTY_TRIES, ["INTERNAL"]) == (duty.tries, told)


async def test_work_that_is_requested_while_it_runs_runs_once_more() -> None:
    owner, begun, go_on, twice = Supervisor(str), asyncio.Event(), asyncio.Event(), asyncio.Event()
    done: list[int] = []

    async def act() -> None:
        begun.set()
        await go_on.wait()
        done.append(1)
        if len(done) == 2:
            twice.set()

    async def never(error: NotecaseError) -> None:
        raise AssertionError(error)

    owner.duty("duty", "about", act, never)
    await begun.wait()
    for _ in range(3):
        owner.duty("duty", "about", act, never)
    go_on.set()
    await twice.wait()
    await owner.drain(0)
    assert 2 == len(done)


async def test_no_more_runs_are_at_work_than_there_are_places() -> None:
    places = Places(2)
    places.take()
    assert not await places.wait("a")
    with refused("RATE_LIMITED"):
        places.take()
    places.give_back()
    places.take()


async def test_tenants_wait_in_turn_and_a_waiter_that_leaves_takes_no_place() -> None:
    places, order = Places(1), list[str]()
    places.take()

    async def wait(tenant: str, name: str) -> None:
        assert await places.wait(tenant)
        order.append(name)
        places.give_back()

    queued = [asyncio.create_task(wait(name[0], name)) for name in ("a1", "a2", "a3", "b1", "c1")]
    await asyncio.sleep(0)  # each has taken its turn in the queue
    with refused("RATE_LIMITED"):
        places.take()
    queued[1].cancel()
    await asyncio.wait([queued[1]])
    places.give_back()
    await asyncio.gather(*(task for task in queued if task is not queued[1]))
    assert ["a1", "b1", "c1", "a3"] == order
    places.take()

"""The supervisor: what is begun is ended, what breaks is tried again, what cannot be done becomes a fact."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from notecase import v1
from notecase_server import errors, supervisor
from notecase_server.errors import NotecaseError
from notecase_server.supervisor import DUTY_TRIES, SERVICE_TRIES, Supervisor, Tasks


@pytest.fixture
async def supervised(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Supervisor]:
    monkeypatch.setattr(supervisor, "BACKOFF", (0.0, 0.0))
    ids = map(str, itertools.count())
    made = Supervisor(lambda: next(ids))
    yield made
    await made.drain(0)


class Duty:
    """Raises what it is given, one after the other, and is done then."""

    def __init__(self, *errors: BaseException) -> None:
        self._errors = list(errors)
        self.done = asyncio.Event()
        self.refusal: NotecaseError | None = None

    async def act(self) -> None:
        if self._errors:
            raise self._errors.pop(0)
        self.done.set()

    async def refused(self, error: NotecaseError) -> None:
        self.refusal = error
        self.done.set()


@pytest.mark.parametrize(
    "error",
    [errors.store_unavailable(), RuntimeError(), asyncio.CancelledError()],
    ids=lambda error: type(error).__name__,
)
async def test_a_duty_is_tried_until_it_is_done(supervised: Supervisor, error: BaseException) -> None:
    """Also after a CancelledError without a request."""
    duty = Duty(error, error)
    supervised.duty("a duty", 1, duty.act, duty.refused)
    await duty.done.wait()
    assert (None, 2) == (duty.refusal, supervised.restarts["a duty"])


async def test_a_duty_records_a_permanent_refusal(supervised: Supervisor) -> None:
    duty = Duty(errors.invalid([]))
    supervised.duty("a duty", 1, duty.act, duty.refused)
    await duty.done.wait()
    assert duty.refusal is not None
    assert v1.ERROR_REASON_INVALID_FIELD == duty.refusal.reason


async def test_a_duty_that_breaks_each_time_is_given_up(supervised: Supervisor) -> None:
    duty = Duty(*[RuntimeError()] * DUTY_TRIES)
    supervised.duty("a duty", 1, duty.act, duty.refused)
    await duty.done.wait()
    assert duty.refusal is not None
    assert v1.ERROR_REASON_INTERNAL == duty.refusal.reason


async def test_a_duty_that_is_requested_while_it_runs_runs_once_more(supervised: Supervisor) -> None:
    first, second = Duty(), Duty()
    supervised.duty("a duty", 1, first.act, first.refused)
    supervised.duty("a duty", 1, second.act, second.refused)
    await asyncio.wait_for(second.done.wait(), 60)
    assert first.done.is_set()


async def test_a_service_that_cannot_live_stops_the_process(supervised: Supervisor) -> None:
    async def dies() -> None:
        raise asyncio.CancelledError

    supervised.service("a service", dies)
    await supervised.broken.wait()
    assert SERVICE_TRIES == supervised.restarts["a service"]


async def test_work_is_carried_to_its_end_without_its_caller(supervised: Supervisor) -> None:
    let, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await let.wait()
        done.set()

    caller = asyncio.create_task(supervised.whole(work()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    let.set()
    await done.wait()


async def test_the_caller_of_cancelled_work_gets_an_error(supervised: Supervisor) -> None:
    async def odd() -> None:
        raise asyncio.CancelledError

    with pytest.raises(NotecaseError) as told:
        await supervised.whole(odd())
    assert v1.ERROR_REASON_INTERNAL == told.value.reason
    waiting = asyncio.create_task(supervised.whole(asyncio.Event().wait()))
    await asyncio.sleep(0)
    await supervised.drain(0)
    with pytest.raises(NotecaseError) as told:
        await waiting
    assert v1.ERROR_REASON_SERVER_DRAINING == told.value.reason


async def test_a_task_that_does_not_stop_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STUCK_SECONDS", 0.0)
    tasks, let = Tasks("a test"), asyncio.Event()

    async def cling() -> None:
        while not let.is_set():
            try:
                await let.wait()
            except asyncio.CancelledError:
                continue

    task = tasks.start(cling())
    await asyncio.sleep(0)
    assert 1 == await tasks.close()
    assert not task.done()
    let.set()
    await task

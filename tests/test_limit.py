"""A limit that moves: it ends what is awaited under it, at its time, and nothing else."""

import asyncio
import math
from typing import Any

import pytest
from notecase_server.limit import Limit


async def at(when: float) -> None:
    """Returns once every timer up to then has rung."""
    loop = asyncio.get_running_loop()
    rung = loop.create_future()
    loop.call_at(when, rung.set_result, None)
    await rung


async def test_what_is_awaited_ends_when_its_time_has_come() -> None:
    loop = asyncio.get_running_loop()
    limit = Limit()
    with pytest.raises(TimeoutError):
        async with limit:
            limit.due = loop.time() + 3600
            limit.due = loop.time() + 0.001
            await loop.create_future()
    assert limit.passed
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_a_limit_that_moves_on_sets_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    real, timers = loop.call_at, list[float]()

    def call_at(when: float, *arguments: Any, **named: Any) -> asyncio.TimerHandle:
        timers.append(when)
        return real(when, *arguments, **named)

    monkeypatch.setattr(loop, "call_at", call_at)
    async with Limit() as limit:
        for further in range(100):
            limit.due = 3600 + loop.time() + further
            limit.due = math.inf
    assert len(timers) == 1


async def test_a_limit_that_has_moved_on_is_looked_at_again() -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError):
        async with Limit() as limit:
            first = loop.time() + 0.001
            limit.due = first
            limit.due = first + 0.001
            await at(first)
            await loop.create_future()


async def test_what_is_done_after_it_was_set_back_does_not_end() -> None:
    loop = asyncio.get_running_loop()
    async with Limit() as limit:
        due = limit.due = loop.time() + 0.001
        limit.due = math.inf
        await at(due + 0.001)
        limit.due = loop.time() + 3600
        await asyncio.sleep(0)
    await at(loop.time())
    assert not limit.passed


async def test_it_ends_what_was_awaited_although_that_came_at_the_same_moment() -> None:
    loop = asyncio.get_running_loop()
    went_on = False
    with pytest.raises(TimeoutError):
        async with Limit() as limit:
            due = loop.time() + 0.001
            came = loop.create_future()
            loop.call_at(due, came.set_result, None)
            limit.due = due
            await came
            limit.due = math.inf
            went_on = True
    assert not went_on


async def test_a_cancellation_by_another_task_stays_one() -> None:
    entered = asyncio.Event()

    async def work() -> None:
        async with Limit() as limit:
            limit.due = asyncio.get_running_loop().time() + 3600
            entered.set()
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(work())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

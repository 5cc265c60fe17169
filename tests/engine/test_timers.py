"""Timers: what is due is told once, and follows the clock of the wall."""

import asyncio

from notecase_server.engine.timers import Timers
from notecase_server.store.contract import SessionKey

from tests.store.build import ManualClock

KEY = SessionKey("t", "s", "u")


async def test_a_deadline_is_told_once_and_only_when_it_has_come() -> None:
    clock, due = ManualClock(), asyncio.Queue[str]()
    timers = Timers(clock, lambda _, run: due.put_nowait(run))
    timers.arm(KEY, "later", clock.now + 3_600_000_000)
    timers.arm(KEY, "now", clock.now)
    timers.arm(KEY, "never", clock.now)
    timers.arm(KEY, "never", None)
    running = asyncio.create_task(timers.run())
    assert "now" == await due.get()
    clock.now += 3_600_000_000
    timers.arm(KEY, "other", clock.now)  # which makes it look
    assert ["later", "other"] == [await due.get(), await due.get()]
    running.cancel()
    assert due.empty()


async def test_a_clock_that_goes_back_puts_off_and_does_not_lose() -> None:
    clock, due = ManualClock(), asyncio.Queue[str]()
    timers = Timers(clock, lambda _, run: due.put_nowait(run))
    timers.arm(KEY, "one", clock.now)
    clock.now -= 1_000_000
    running = asyncio.create_task(timers.run())
    await asyncio.sleep(0)
    assert due.empty()
    clock.now += 1_000_000
    timers.arm(KEY, "two", clock.now)
    assert ["one", "two"] == [await due.get(), await due.get()]
    running.cancel()

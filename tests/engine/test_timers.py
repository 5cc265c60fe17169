"""Timers: each deadline fires once, by the wall clock."""

import asyncio

from notecase import v1
from notecase_server.engine.timers import SPARE, Timers, deadline, expired
from notecase_server.store.contract import SessionKey, Store

from tests.engine.rooms import client_tool, house
from tests.store.build import ManualClock
from tests.support.work import instructions

KEY = SessionKey("t", "s", "u")


async def test_a_deadline_fires_once_and_only_when_it_is_due() -> None:
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


async def test_a_deadline_that_was_moved_or_dropped_does_not_fire_and_is_not_kept() -> None:
    clock, due = ManualClock(), asyncio.Queue[str]()
    timers = Timers(clock, lambda _, run: due.put_nowait(run))
    gone = SessionKey("t", "s", "gone")
    for number in range(1000):
        timers.arm(KEY, "moved", clock.now + 1000 - number)
        timers.arm(gone, "gone", clock.now + 1000 - number)
    assert len(timers._heap) < 2 * 2 + SPARE + 2
    timers.arm(KEY, "moved", clock.now + 2000)
    timers.arm(KEY, "other", clock.now + 1500)
    timers.disarm(gone)
    running = asyncio.create_task(timers.run())
    for later, told in ((1400, set()), (100, {"other"}), (500, {"moved"})):
        clock.now += later
        timers.arm(gone, "look", clock.now)
        assert {"look", *told} == {await due.get() for _ in ("look", *told)}
    running.cancel()
    assert due.empty()


async def test_the_deadlines_of_a_thousand_calls_are_found_in_time_that_grows_with_their_number(
    store: Store, clock: ManualClock
) -> None:
    """Nobody else is served meanwhile."""
    async with house(store, clock) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool(f"t{n}") for n in range(40)])
        log = await rooms.run_log(key)

        def taken(number: int, answered: bool) -> tuple[int, int]:
            log.message = v1.Message()
            del log.run.pending_inputs[:]
            del log.run.pending_calls[:]
            log.run.limits.input_timeout.FromSeconds(1)
            for n in range(number):
                outcome = v1.ToolCall.OUTCOME_RUNNING if answered else v1.ToolCall.OUTCOME_PENDING
                call = v1.ToolCall(call_id=f"c{n}", outcome=outcome, binding=v1.ToolBinding(declaration=n % 40))
                log.message.parts.add(tool_call=call)
                if answered:
                    log.run.pending_calls.append(call)
                else:
                    log.run.pending_inputs.add(input_id=f"i{n}", kind=v1.InputRequest.KIND_APPROVAL, call=call)
                    log.run.pending_inputs[-1].expire_time.FromSeconds(1)
            assert deadline(log) is not None
            assert len(expired(log)) == (number if answered else 2 * number)
            return instructions(lambda: deadline(log)), instructions(lambda: expired(log))

        for answered in (False, True):
            few, many = taken(40, answered), taken(160, answered)
            assert (many[0] < 6 * few[0], many[1] < 6 * few[1]) == (True, True)

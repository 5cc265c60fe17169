"""A call's time-out is paused while its tool waits for a person."""

import asyncio

import pytest
from notecase_server.tools.clock import Clock

SECONDS = 0.02


async def test_what_takes_longer_than_its_time_is_cancelled() -> None:
    clock = Clock(SECONDS)
    with pytest.raises(TimeoutError):
        async with clock:
            await asyncio.Event().wait()
    assert clock.expired


async def test_it_is_paused_while_a_tool_waits_and_continues_afterwards() -> None:
    clock = Clock(SECONDS)
    longer = asyncio.Event()
    asyncio.get_running_loop().call_later(2 * SECONDS, longer.set)
    with pytest.raises(TimeoutError):
        async with clock:
            with clock.paused():
                with clock.paused():
                    pass
                await longer.wait()
            assert not clock.expired
            await asyncio.Event().wait()


@pytest.mark.parametrize("seconds", [None, SECONDS])
async def test_a_pause_that_ends_after_the_call_is_harmless(seconds: float | None) -> None:
    clock = Clock(seconds)
    async with clock:
        pause = clock.paused()
        pause.__enter__()
    pause.__exit__(None, None, None)
    assert not clock.expired

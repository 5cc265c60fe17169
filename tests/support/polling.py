"""Waits for what nothing announces: what another process, a database or grpc's own threads have come to."""

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isawaitable

PAUSE = 0.01
"""Seconds between two looks."""


async def until(reached: Callable[[], bool | Awaitable[bool]]) -> None:
    """Asks again and again, and returns once the answer is true. It has no bound, which would be one on how fast the
    machine is: a test that waits in vain ends with pytest's time-out, and with its own name."""
    while True:
        found = reached()
        if await found if isawaitable(found) else found:
            return
        await asyncio.sleep(PAUSE)

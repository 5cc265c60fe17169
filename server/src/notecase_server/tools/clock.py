"""Bounds how long a call takes, without the time in which its tool waits for a person; notices a clock that jumps."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from notecase import v1

JUMP_MICROSECONDS = 1_000_000
"""By which a clock has to be ahead to have jumped: what adjusts it moves it by less in a run's time."""


class Stopwatch:
    """Compares the clock with the time that has passed: the clock also moves on while the machine is suspended."""

    def __init__(self, clock: Callable[[], int]) -> None:
        """`clock` tells microseconds since 1970."""
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Compares from now on."""
        self._began, self._loop_began = self._clock(), asyncio.get_running_loop().time()

    def leave_out(self, change: v1.RunStateChanged) -> None:
        """Sets a change's `place_wait` to how far the clock has jumped. One that is set counts the jump already."""
        if not change.HasField("place_wait") and (jumped := self.jumped):
            change.place_wait.FromMicroseconds(jumped)

    @property
    def jumped(self) -> int:
        """By how many microseconds the clock has moved on further than time has passed; 0 if it has not jumped."""
        passed = round((asyncio.get_running_loop().time() - self._loop_began) * 1_000_000)
        ahead = self._clock() - self._began - passed
        return ahead if ahead > JUMP_MICROSECONDS else 0


class Clock:
    """A time-out as a context manager: when the time is up, the block is cancelled, and leaving it raises TimeoutError.
    Used from one event loop, entered once."""

    def __init__(self, seconds: float | None) -> None:
        """None sets no time-out."""
        self._seconds = seconds
        self._timeout = asyncio.timeout(seconds)
        self._entered = False
        self._pauses = 0

    @property
    def expired(self) -> bool:
        return self._timeout.expired()

    @property
    def until(self) -> float | None:
        """When the time is up, by the loop's clock. None while the clock is stopped, or without a time-out."""
        return self._timeout.when()

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        await self._timeout.__aexit__(kind, error, trace)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock, also from another task, while any task is in this block."""
        self._pauses += 1
        if self._pauses == 1:
            self._seconds = None if self.until is None else self.until - asyncio.get_running_loop().time()
            self._set(None)
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0 and self._seconds is not None:
                self._set(asyncio.get_running_loop().time() + self._seconds)

    def _set(self, until: float | None) -> None:
        if self._entered and not self.expired:
            self._timeout.reschedule(until)

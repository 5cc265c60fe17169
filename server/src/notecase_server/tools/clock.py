"""Bounds how long a call takes, without the time in which its tool waits for a person."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self


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

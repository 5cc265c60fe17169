"""A time limit that moves: code that waits for one thing after another sets it for each, which costs almost nothing."""

import asyncio
import math
from types import TracebackType
from typing import Self


class Limit:
    """Ends the awaited operation in its block with TimeoutError when the time is up, as asyncio.timeout does.
    asyncio.timeout creates and cancels a timer each time that it is moved, which takes a tenth of a token's cost. Here
    one timer checks whether the time is up, and is set again if not. Enter and leave the block in one task. Only
    operations that are awaited while `due` is set are ended, never what the task does after `due` was reset."""

    __slots__ = ("_cancelling", "_due", "_looks", "_loop", "_task", "_timer", "passed")

    def __init__(self) -> None:
        self.passed = False
        """It was this limit that ended the block."""
        self._loop = asyncio.get_running_loop()
        self._due = self._looks = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    @property
    def due(self) -> float:
        """The loop's time at which it has been too long; infinite for never, as at first."""
        return self._due

    @due.setter
    def due(self, due: float) -> None:
        self._due = due
        if due < self._looks:
            self._look_at(due)

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._looks = when
        self._timer = self._loop.call_at(when, self._look) if when < math.inf else None

    def _look(self) -> None:
        if self._due > self._loop.time():
            self._look_at(self._due)
        elif self._task is not None and not self.passed:
            self.passed = True
            self._task.cancel()

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        self._due = math.inf
        self._look_at(math.inf)
        if self.passed and task is not None and task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

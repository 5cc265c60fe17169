"""A worker's slot: the wait for it, how long the run had no active worker, and the return of the slot.

That time is read from the log, not from this process: a run may have waited with another worker, which was lost.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from notecase import v1

from notecase_server.engine.halt import Halts
from notecase_server.engine.run_log import RunLog
from notecase_server.store.contract import History, SessionKey

T = TypeVar("T")

LOOK_BACK = 32
"""Newest events among which the last one that a worker made is looked for: callers make few while a run waits."""


class Seat:
    """Holds one of the process's slots for a worker, once it has waited for it."""

    def __init__(self, run_log: RunLog, halts: Halts) -> None:
        self.taken = False
        self.worked_until = 0
        """When another worker last worked on the run, in microseconds: see `last_work`."""
        self._log = run_log
        self._services = run_log.services
        self._halts = halts
        self._suspect = False

    @property
    def idle(self) -> int:
        """How long a run that is RUNNING has had no active worker, in microseconds."""
        since = max(self._log.run.state_time.ToMicroseconds(), self.worked_until)
        return max(self._services.clock() - since, 0)

    async def take(self, *, suspect: bool) -> bool:
        """Takes a slot in turn; a suspect takes its turn among suspects first. Returns whether it had to wait. Raises
        Halted."""
        places, suspects = self._services.places, self._services.suspects
        waited = suspect and suspects.locked()
        if suspect:
            await self._get(suspects.acquire(), suspects.release)
            self._suspect = True
        try:
            waited |= await self._get(places.wait(self._log.live.key.tenant), places.give_back)
        except BaseException:
            if self._suspect:
                self._let_suspect()
            raise
        self.taken = True
        return waited

    async def _get(self, wait: Coroutine[Any, Any, T], give_back: Callable[[], None]) -> T:
        """Waits for something that is held from then on. It is given back when the worker ends at that very moment."""
        task = self._services.supervisor.start(wait, "place")
        try:
            return await self._halts.cut(_end_of(task))
        except BaseException:
            if task.done() and not task.cancelled() and task.exception() is None:
                give_back()
            raise

    def clear(self) -> None:
        """Lets another suspect run be active once this one has made progress."""
        if self._suspect and not self._log.deaths:
            self._let_suspect()

    def leave(self) -> None:
        """Returns its slots."""
        if self._suspect:
            self._let_suspect()
        if self.taken:
            self.taken = False
            self._services.places.give_back()

    def _let_suspect(self) -> None:
        self._suspect = False
        self._services.suspects.release()


async def _end_of(task: asyncio.Task[T]) -> T:
    return await task


async def last_work(store: History, key: SessionKey, run: v1.Run) -> int:
    """Returns when a worker last made an event of a run, in microseconds; 0 if the newest events have none. Events that
    callers caused do not count."""
    for sequence in range(run.last_sequence, max(run.last_sequence - LOOK_BACK, 0), -1):
        for event in await store.read_events(key, sequence - 1, 1):
            if event.run == run.name and not event.cause_id:
                return event.create_time.ToMicroseconds()
    return 0

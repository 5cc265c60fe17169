"""Who works on which run in this process, and the places for it: `max_runs` bounds the runs at work, however they came to
work.

A new start takes a place at once or is refused. What was accepted before, such as a queued start whose turn has come, a
run taken over or one that has waited, waits for a place: tenants in turn, each in the order in which it came.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from notecase_server import errors
from notecase_server.engine.worker import Worker
from notecase_server.store.contract import SessionKey, StepKey


class Places:
    """The places of one process. Used from one event loop only."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken = 0
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By tenant; the tenant whose turn is next comes first."""

    @property
    def free(self) -> bool:
        """Whether a place can be had at once. None can while others wait."""
        return self._taken < self.most and not self._waiting

    def take(self) -> None:
        """Takes a place at once; NotecaseError RATE_LIMITED when there is none."""
        if not self.free:
            raise errors.too_many_runs(self.most)
        self._taken += 1

    async def wait(self, tenant: str) -> None:
        """Takes a place as soon as it is this caller's turn."""
        if self.free:
            self._taken += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()
            else:
                self._forget(tenant, turn)
            raise

    def give_back(self) -> None:
        """Hands a place to the next that waits, or sets it free."""
        while self._waiting:
            tenant, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            if turns:
                self._waiting.move_to_end(tenant)
            else:
                del self._waiting[tenant]
            if not turn.done():
                turn.set_result(None)
                return
        self._taken -= 1

    def _forget(self, tenant: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(tenant)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[tenant]

    @contextmanager
    def taken(self) -> Iterator["Reserved"]:
        """Takes a place for the block, at once; it is given back at its end unless it was passed on meanwhile."""
        self.take()
        reserved = Reserved()
        try:
            yield reserved
        finally:
            if not reserved.passed_on:
                self.give_back()


class Reserved:
    """A place that is held, to be passed on to a worker."""

    def __init__(self) -> None:
        self.passed_on = False


class Entry(NamedTuple):
    """A worker with the task that it works in: at work, or waiting for its place."""

    worker: Worker
    task: asyncio.Task[None]


class Roster:
    """The workers of one process."""

    def __init__(self) -> None:
        self._entries: dict[tuple[SessionKey, StepKey], Entry] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def add(self, key: SessionKey, step: StepKey, entry: Entry) -> None:
        self._entries[key, step] = entry

    def remove(self, key: SessionKey, step: StepKey, task: asyncio.Task[None]) -> bool:
        """Strikes a worker off; whether it was still the one at work."""
        entry = self._entries.get((key, step))
        if entry is None or entry.task is not task:
            return False
        del self._entries[key, step]
        return True

    def at_work(self, key: SessionKey, run: str) -> Worker | None:
        """The worker of a run, unless it has turned to go: then nobody may count on it any more."""
        entry = self._entries.get((key, StepKey(run)))
        return None if entry is None or entry.task.done() else entry.worker

    def of(self, key: SessionKey) -> list[Entry]:
        """The workers of a session."""
        return [entry for (other, _), entry in self._entries.items() if other == key]

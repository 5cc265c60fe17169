"""Limits the active runs in one process to `max_runs`.

A new start takes a slot at once or is refused. Runs that were accepted before, such as a queued start whose turn has
come, a run that was taken over or one that has waited, wait for a slot: tenants in turn, and each tenant's runs in
order.
"""

import asyncio
from collections import OrderedDict, deque

from notecase_server import errors


class Places:
    """Counts the slots of one process. Used from one event loop only."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken = 0
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By tenant; the tenant whose turn is next comes first."""

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return sum(map(len, self._waiting.values()))

    @property
    def idle(self) -> bool:
        """No place is taken, and nobody waits for one."""
        return not (self._taken or self._waiting)

    def take(self) -> None:
        """Takes a slot at once. Raises NotecaseError RATE_LIMITED when there is none, or others wait for one."""
        if self._taken >= self.most or self._waiting:
            raise errors.too_many("run", self.most)
        self._taken += 1

    async def wait(self, tenant: str) -> bool:
        """Takes a slot as soon as it is this caller's turn. Returns whether it had to wait."""
        if self._taken < self.most and not self._waiting:
            self._taken += 1
            return False
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
        return True

    def give_back(self) -> None:
        """Hands a slot to the next that waits, or frees it."""
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

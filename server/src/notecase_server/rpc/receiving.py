"""Limits how many requests grpc receives at once.

grpc receives READ_AHEAD bytes of a request before it is read, and all of it as soon as it is. So a call waits for its
turn to read its request.
"""

import asyncio

from notecase_server.auth.principal import Principal
from notecase_server.engine.places import Places

READ_AHEAD = 64 << 10
"""Bytes of each stream that the transport receives before they are read."""

MOST = 128
"""Requests that the server receives at once."""

SHARE = 32
"""Requests of one principal that the server receives at once."""

PATIENCE = 2.0
"""Seconds after which a request that is not complete leaves its place to others. It is still received: a slow line
may need longer, and takes little memory meanwhile."""


class Receiving:
    """Counts for one server. Used from one event loop only."""

    def __init__(self) -> None:
        self._all = Places(MOST)
        self._own: dict[str, Places] = {}
        self._turns: dict[Turn, None] = {}
        """Those that were not ended, in the order of `due`."""
        self.draining = 0
        """Calls that were refused, and whose requests are received to be discarded."""

    @property
    def waiting(self) -> int:
        """How many calls wait for their turn."""
        return self._all.waiting + sum(places.waiting for places in self._own.values())

    async def turn(self, principal: Principal, peer: str) -> "Turn":
        """Waits until a request of this principal, from this peer, may be received. Principals have their turn one
        after the other, and so have the connections of each."""
        key = f"{principal.tenant}/{principal.subject}"
        own = self._own.setdefault(key, Places(SHARE))
        try:
            await own.wait(peer)
        except BaseException:
            self._forget(key)
            raise
        try:
            await self._all.wait(key)
        except BaseException:
            self._leave(key)
            raise
        turn = Turn(self, key, asyncio.get_running_loop().time() + PATIENCE)
        self._turns[turn] = None
        return turn

    def pass_on(self, now: float) -> None:
        """Ends the turns that are due at this time of the loop."""
        while self._turns and (turn := next(iter(self._turns))).due <= now:
            turn.end()

    def _leave(self, key: str) -> None:
        self._own[key].give_back()
        self._forget(key)

    def _forget(self, key: str) -> None:
        if self._own[key].idle:
            del self._own[key]


class Turn:
    """The place of one request that is being received."""

    __slots__ = ("_key", "_receiving", "due")

    def __init__(self, receiving: Receiving, key: str, due: float) -> None:
        """At `due`, in the loop's time, the place is left to others."""
        self._receiving = receiving
        self._key = key
        self.due = due

    def end(self) -> None:
        """Leaves the place to others. May be called again."""
        receiving = self._receiving
        if self in receiving._turns:
            del receiving._turns[self]
            receiving._all.give_back()
            receiving._leave(self._key)

"""Which writes of one server may run side by side: those of different sessions; all others run alone.

The server owns the database, so nobody else writes. PostgreSQL's own locks would tell, too, but only after the work is
done in vain."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Locks:
    """Locks that are waited for in the order of arrival."""

    def __init__(self) -> None:
        self._alone = asyncio.Lock()
        """Held by what runs alone, from when it waits for the others to end."""
        self._sharing = 0
        self._idle = asyncio.Event()
        """Set while nothing shares."""
        self._idle.set()
        self._sessions: dict[str, tuple[asyncio.Lock, int]] = {}
        """By uid, with how many hold or wait for it."""

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keeps every other write out within the block."""
        async with self._alone:
            await self._idle.wait()
            yield

    @asynccontextmanager
    async def session(self, uid: str) -> AsyncIterator[None]:
        """Keeps out, within the block, every other write of the session, and those that run alone."""
        lock, waiting = self._sessions.get(uid) or (asyncio.Lock(), 0)
        self._sessions[uid] = lock, waiting + 1
        try:
            async with lock:
                while self._alone.locked():
                    async with self._alone:  # in turn
                        pass
                self._sharing += 1
                self._idle.clear()
                try:
                    yield
                finally:
                    self._sharing -= 1
                    if not self._sharing:
                        self._idle.set()
        finally:
            _, waiting = self._sessions[uid]
            if waiting == 1:
                del self._sessions[uid]
            else:
                self._sessions[uid] = lock, waiting - 1

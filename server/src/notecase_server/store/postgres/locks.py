"""Decides which writes of one server may run concurrently: those to different sessions, or to other separate parts. All
others run alone. The server owns the database, so no other program writes. PostgreSQL's own locks would also find
conflicts, but only after the work was done."""

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
        self._parts: dict[str, tuple[asyncio.Lock, int]] = {}
        """By name, with how many hold or wait for it."""

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keeps every other write out within the block."""
        async with self._alone:
            await self._idle.wait()
            yield

    @asynccontextmanager
    async def within(self, part: str) -> AsyncIterator[None]:
        """Keeps out, within the block, every other write to that part, and those that run alone."""
        lock, waiting = self._parts.get(part) or (asyncio.Lock(), 0)
        self._parts[part] = lock, waiting + 1
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
            _, waiting = self._parts[part]
            if waiting == 1:
                del self._parts[part]
            else:
                self._parts[part] = lock, waiting - 1

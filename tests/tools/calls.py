"""What the engine is to a tool: a context for its call, and a place where what it does outside is seen."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from notecase import to_value, v1
from notecase_server.tools.contract import CallContext

Pose = Callable[[str, str], Awaitable[v1.InputResponse]]


async def nobody(question: str, schema: str) -> v1.InputResponse:
    raise AssertionError(f"nobody is there to be asked {question!r}")


def context(state: Mapping[str, v1.Value] | None = None, pose: Pose | None = None) -> CallContext:
    held = state or {}

    async def get_state(*keys: str) -> Mapping[str, v1.Value]:
        return {key: held[key] for key in keys if key in held}

    return CallContext(
        session="sessions/s",
        session_uid="00000000-0000-4000-8000-000000000000",
        user="users/u",
        run="sessions/s/runs/r",
        call_id="call-1",
        attempt=2,
        get_state=get_state,
        pose=pose or nobody,
    )


def state(**held: int | str | list[str]) -> dict[str, v1.Value]:
    return {key: to_value(value) for key, value in held.items()}


class Witness:
    """Hears over a unix socket what a tool in another process tells."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._lines: asyncio.Queue[str] = asyncio.Queue()

    async def heard(self) -> str:
        """The next line, once it is there; empty when the tool's end of the connection is gone."""
        return await self._lines.get()

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for line in reader:
                self._lines.put_nowait(line.decode().strip())
        finally:
            self._lines.put_nowait("")
            writer.close()

    @classmethod
    @asynccontextmanager
    async def listening(cls, path: Path) -> AsyncIterator["Witness"]:
        witness = cls(path)
        async with await asyncio.start_unix_server(witness._listen, witness.path):
            yield witness

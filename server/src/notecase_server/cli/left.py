"""A run that was left waiting, while the conversation goes on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from notecase import Client, NotecaseError, RunStream, v1
from prompt_toolkit.application import Application

from notecase_server.cli.waits import Wait, waits_of


class LeftRun:
    """Knows what the run was left waiting for, and how far it was shown."""

    def __init__(self, client: Client, waits: Sequence[Wait], sequence: int | None) -> None:
        """`waits` are at least one, all of one run. `sequence` is that of the last event that was shown, None when
        there was none."""
        self._client = client
        self._run = waits[0].run
        self._ids = {wait.id for wait in waits}
        self._sequence = sequence

    def stream(self) -> RunStream:
        """Returns the stream of what happened since."""
        return self._client.attach(self._run, self._sequence)

    async def goes_on(self) -> bool:
        """Returns whether the run waits for none of this any more. Raises NotecaseError."""
        return self._is_settled(await self._client.runs.GetRun(v1.GetRunRequest(name=self._run)))

    @contextlib.asynccontextmanager
    async def ending(self, prompt: Application[Any]) -> AsyncIterator[None]:
        """Ends a prompt, with the result None, when the run goes on during the block. While the server is away nothing
        ends it."""
        watching = asyncio.create_task(self._watch(prompt))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])
            prompt.erase_when_done = False

    async def _watch(self, prompt: Application[Any]) -> None:
        stream = self.stream()
        stream.warn_after = None
        with contextlib.suppress(NotecaseError):
            async with stream:
                async for _ in stream:
                    if self._is_settled(stream.view.runs.get(self._run, v1.Run())):
                        break
            if prompt.future is not None and not prompt.future.done():
                prompt.erase_when_done = True
                prompt.exit(result=None)

    def _is_settled(self, run: v1.Run) -> bool:
        return self._ids.isdisjoint(one.id for one in waits_of(run))

"""Watches a run that was left waiting while the conversation continues."""

from collections.abc import Sequence

from notecase import Client, NotecaseError, RunStream, v1

from notecase_server.cli.waits import Wait, waits_of


class LeftRun:
    """Keeps what the run was left waiting for, and the last event that was shown."""

    def __init__(self, client: Client, waits: Sequence[Wait], sequence: int | None) -> None:
        """`waits` has at least one, all of one run. `sequence` is that of the last shown event, or None."""
        self._client = client
        self._run = waits[0].run
        self._ids = {wait.id for wait in waits}
        self._sequence = sequence

    def stream(self) -> RunStream:
        """Returns the stream of later events."""
        return self._client.attach(self._run, self._sequence)

    async def goes_on(self) -> bool:
        """Returns whether the run waits for none of this any more. Raises NotecaseError."""
        return self._is_settled(await self._client.runs.GetRun(v1.GetRunRequest(name=self._run)))

    async def settled(self) -> bool:
        """Returns True once the run waits for none of this any more, and False when the server is lost."""
        stream = self.stream()
        stream.warn_after = None
        try:
            async with stream:
                async for _ in stream:
                    if self._is_settled(stream.view.runs.get(self._run, v1.Run())):
                        break
        except NotecaseError:
            return False
        return True

    def _is_settled(self, run: v1.Run) -> bool:
        return self._ids.isdisjoint(one.id for one in waits_of(run))

"""A run that was left waiting, while the conversation goes on."""

from notecase import Client, NotecaseError, RunStream, v1

from notecase_server.cli.waits import Wait, waits_of


class LeftRun:
    """Knows what the run was left waiting for, and how far it was shown."""

    def __init__(self, client: Client, wait: Wait, sequence: int | None) -> None:
        """`sequence` is that of the last event that was shown, None when there was none."""
        self._client = client
        self._wait = wait
        self._sequence = sequence

    def stream(self) -> RunStream:
        """Returns the stream of what happened since."""
        return self._client.attach(self._wait.run, self._sequence)

    async def goes_on(self) -> bool:
        """Returns whether the run no longer waits for this. Raises NotecaseError."""
        return self._is_settled(await self._client.runs.GetRun(v1.GetRunRequest(name=self._wait.run)))

    async def settled(self) -> bool:
        """Returns True once the run no longer waits for this, and False when the server is lost."""
        stream = self.stream()
        stream.warn_after = None
        try:
            async with stream:
                async for _ in stream:
                    if self._is_settled(stream.view.runs.get(self._wait.run, v1.Run())):
                        break
        except NotecaseError:
            return False
        return True

    def _is_settled(self, run: v1.Run) -> bool:
        return self._wait.id not in {one.id for one in waits_of(run)}

"""A provider whose library is loaded while the server already serves."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from notecase_server import errors
from notecase_server.models.contract import Delta, ModelRequest, Provider


class Deferred:
    """Calls that come before the provider is there wait for it; later ones go straight to it."""

    def __init__(self, name: str, loading: "asyncio.Task[Provider]") -> None:
        """`loading` makes the provider `name`. Its owner logs what goes wrong there."""
        self._name = name
        self._loading = loading

    def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        """See Provider.stream. Raises MODEL_ERROR where the provider could not be loaded."""
        if self._loading.done() and not self._loading.cancelled() and self._loading.exception() is None:
            return self._loading.result().stream(request)
        return self._late(request)

    async def _late(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        await asyncio.wait([self._loading])
        if self._loading.cancelled() or self._loading.exception() is not None:
            raise errors.model_error(f"The provider {self._name!r} could not be loaded; the server's log says why.")
        async with aclosing(self._loading.result().stream(request)) as stream:
            async for delta in stream:
                yield delta

    async def close(self) -> None:
        """See Provider.close. Waits until a provider that is being loaded is there, since its thread cannot be
        stopped."""
        await asyncio.wait([self._loading])
        if not self._loading.cancelled() and self._loading.exception() is None:
            await self._loading.result().close()

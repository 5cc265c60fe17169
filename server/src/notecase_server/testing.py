"""A server for the tests of a program, in the process that runs them: with a new store in memory, on a free port.

@pytest.fixture
def server():
    with serve() as server:
        yield server
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from notecase import v1

from notecase_server.config import Settings
from notecase_server.models.contract import Delta, ModelRequest
from notecase_server.models.offline import OfflineProvider
from notecase_server.serve import Server, now
from notecase_server.serve_stores import open_store
from notecase_server.tools.toolbox import make_toolbox


@dataclass
class Served:
    """A server that runs."""

    address: str
    """HOST:PORT, for `Client`."""
    replies: list[str] = field(default_factory=list)
    """The model's replies to its next calls, in order, as directives of the offline model: "/say Good morning." or
    '/call search {"what": "violin"}'. Each is removed when it is used. When the list is empty, the model answers the
    user's text, as the offline model does."""


class _Scripted(OfflineProvider):
    def __init__(self, served: Served) -> None:
        self._served = served

    def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        if self._served.replies:
            told = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text=self._served.replies.pop(0))])
            request = request._replace(messages=[told])
        return super().stream(request)


@contextmanager
def serve(provider: str = "offline") -> Iterator[Served]:
    """Serves until the block is left, on a separate thread. The offline model answers as the only provider, under the
    name `provider`, whatever model an agent names. Callers need no credentials. Everything ends with the block."""
    served = Served("")

    async def start() -> Server:
        settings = Settings(listen="127.0.0.1:0", store="memory:", grace=1)
        store = await open_store(settings.store, now)
        server = Server(settings, store, {provider: _Scripted(served)}, make_toolbox((), {}))
        served.address = f"127.0.0.1:{await server.start()}"
        return server

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="notecase server", daemon=True)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(start(), loop).result()
        try:
            yield served
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

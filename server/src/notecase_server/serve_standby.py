"""Runs a server while another one owns its store: it listens, and its health is NOT_SERVING."""

from collections.abc import Callable
from typing import Any

import structlog

from notecase_server.config import Settings
from notecase_server.rpc.peers import Peers
from notecase_server.rpc.standby import build_standby

log = structlog.get_logger()

LAST_CALLS_SECONDS = 0.5


class Standby:
    """Begun when the wait begins, and ended before the server itself listens on the same address."""

    def __init__(
        self, settings: Settings, peers: Peers, listen: Callable[[Any], int], new_id: Callable[[], str]
    ) -> None:
        """`listen` takes the address for a server of gRPC, and returns the port."""
        self._settings = settings
        self._peers = peers
        self._listen = listen
        self._new_id = new_id
        self._server: Any = None

    async def begin(self) -> None:
        """Raises ListenError when the address is taken."""
        server = await build_standby(self._peers, self._new_id)
        port = self._listen(server)
        await server.start()
        self._server = server
        log.info("server_waiting", listen=self._settings.listen, port=port)

    async def end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(LAST_CALLS_SECONDS)

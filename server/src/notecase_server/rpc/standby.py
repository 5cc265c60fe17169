"""Answers calls while another server owns the store: health is NOT_SERVING, and every call fails with
STORE_UNAVAILABLE."""

from collections.abc import Callable
from typing import Any, NoReturn

import grpc

from notecase_server import errors
from notecase_server.auth.chain import Chain
from notecase_server.auth.principal import AuthContext, Metadata
from notecase_server.rpc.gate import Gate
from notecase_server.rpc.interceptor import Doorway
from notecase_server.rpc.ops import Health
from notecase_server.rpc.paths import tolerate_any_path
from notecase_server.rpc.peers import Peers
from notecase_server.rpc.server import SERVICES, options

CALLS = 100
UNREAD_BYTES = REQUEST_BYTES = 1 << 20
"""Limits of a server that answers only health checks."""

STALL_SECONDS = 1.0


class _Nobody:
    """Refuses every caller, whatever its credential, since none can be looked up."""

    async def principal(self, metadata: Metadata, transport: AuthContext) -> NoReturn:
        raise errors.on_standby()


class _Doorway(Doorway):
    """Remembers no methods: callers may make up any number of paths."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        self._endpoints.clear()
        return await super().intercept_service(continuation, handler_call_details)


class _AnyMethod(grpc.GenericRpcHandler):
    """Handles every method, so that a caller gets STORE_UNAVAILABLE and not the error of an unknown method."""

    def service(self, handler_call_details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(_never)


def _never(frames: Any, context: Any) -> NoReturn:
    raise AssertionError("no caller is authenticated")


async def build_standby(peers: Peers, new_id: Callable[[], str]) -> grpc.aio.Server:
    """Makes the server, without a port yet."""
    doorway = _Doorway(Chain((_Nobody(),)), new_id, STALL_SECONDS, Gate(CALLS, UNREAD_BYTES, REQUEST_BYTES, peers))
    tolerate_any_path()
    server = grpc.aio.server(interceptors=[doorway], options=options(CALLS, CALLS))
    health = Health([f"notecase.v1.{name}" for name in SERVICES])
    await health.add_to(server)
    await health.tell(False)
    server.add_generic_rpc_handlers([_AnyMethod()])
    return server

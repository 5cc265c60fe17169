"""The health service (v1)."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from notecase_server import errors

SERVICE = "grpc.health.v1.Health"

MOST_WATCHERS = 1000
"""Streams of Watch at once: they need no credential."""

LIVENESS = "liveness"
"""Served as long as the process answers: a restart mends no store that refuses writes."""


class Health:
    """The health service. Every service of this server has the server's health; in addition there is `LIVENESS`."""

    def __init__(self, services: list[str]) -> None:
        self._names = ["", *services]
        self._servicer = _Servicer([*self._names, LIVENESS])

    async def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        await self._servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self.tell(True)

    async def tell(self, serving: bool) -> None:
        """SERVING or NOT_SERVING, from now on."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._servicer.set(name, status.SERVING if serving else status.NOT_SERVING)
        self._servicer.wake()

    async def stop(self) -> None:
        """Sets NOT_SERVING permanently."""
        await self._servicer.enter_graceful_shutdown()
        self._servicer.wake()


class _Servicer(health_aio.HealthServicer):
    """grpcio's, with the method List, which it describes and does not have, and another Watch: its own writes to a
    watcher while it holds the lock that each change of a status needs, so that one watcher that reads nothing would
    keep the server from stopping."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names
        self._changed = asyncio.Event()
        self.watchers = 0

    def wake(self) -> None:
        """Has watchers look at the statuses again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def Watch(  # type: ignore[override]  # noqa: N802  (its types know no generators)
        self, request: Any, context: Any
    ) -> AsyncIterator[Any]:
        """Raises NotecaseError RATE_LIMITED."""
        if self.watchers >= MOST_WATCHERS:
            raise errors.too_many("health stream", MOST_WATCHERS)
        self.watchers += 1
        try:
            told = None
            while True:
                changed = self._changed
                found = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if request.service in self._names:
                    found = await self.Check(request, context)
                if found.status != told:
                    yield found
                    told = found.status
                await changed.wait()
        finally:
            self.watchers -= 1

    async def List(self, _request: Any, context: Any) -> Any:  # noqa: N802  (named by gRPC)
        statuses = {
            name: await self.Check(health_pb2.HealthCheckRequest(service=name), context) for name in self._names
        }
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # missing in its types

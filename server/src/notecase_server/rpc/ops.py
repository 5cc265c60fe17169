"""What operators ask of any gRPC server: health (v1)."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

SERVICE = "grpc.health.v1.Health"


LIVENESS = "liveness"
"""Served as long as the process answers: a restart mends no store that refuses writes."""


class Health:
    """The health service; every service of this server has the server's own health, `LIVENESS` besides."""

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

    async def stop(self) -> None:
        """NOT_SERVING, for good."""
        await self._servicer.enter_graceful_shutdown()


class _Servicer(health_aio.HealthServicer):
    """grpcio's, with the method List, which it describes and does not have."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    async def List(self, _request: Any, context: Any) -> Any:  # noqa: N802  (named by gRPC)
        statuses = {
            name: await self.Check(health_pb2.HealthCheckRequest(service=name), context) for name in self._names
        }
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # missing in its types

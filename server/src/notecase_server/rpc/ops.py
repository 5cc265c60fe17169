"""What operators and tools ask of any gRPC server: health (v1) and reflection (v1 and v1alpha)."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
"""The name that newer tools ask for first. Its messages have the same bytes as v1alpha's; grpcio-reflection serves the
older name only."""


class Health:
    """The health service; every service of this server has the server's own health."""

    def __init__(self, services: list[str]) -> None:
        self._servicer = health_aio.HealthServicer()
        self._services = services

    async def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        for service in self._services:
            await self._servicer.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """NOT_SERVING, for good."""
        await self._servicer.enter_graceful_shutdown()


def add_reflection(server: grpc.aio.Server, services: list[str]) -> None:
    """Makes the server describe itself, so that a tool needs no proto files."""
    names = [
        *services,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection.SERVICE_NAME,
        REFLECTION_V1,
    ]
    reflection.enable_server_reflection(names, server)
    describe = grpc.stream_stream_rpc_method_handler(
        reflection_aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": describe}),)
    )

"""Builds the gRPC server: its services, its doorway, and how it treats a connection."""

import grpc
from notecase import v1

from notecase_server.rpc.agents import Agents
from notecase_server.rpc.blobs import Blobs
from notecase_server.rpc.desk import Desk
from notecase_server.rpc.frames import TRANSPORT_BYTES
from notecase_server.rpc.interceptor import Doorway
from notecase_server.rpc.messages import Messages
from notecase_server.rpc.ops import SERVICE as HEALTH
from notecase_server.rpc.ops import Health
from notecase_server.rpc.reflection import add_reflection
from notecase_server.rpc.runs import RunsService
from notecase_server.rpc.servers import Servers
from notecase_server.rpc.sessions import SessionsService
from notecase_server.rpc.states import States

OPTIONS = (
    ("grpc.max_receive_message_length", TRANSPORT_BYTES),
    # A client behind a proxy that drops idle connections pings, with or without a call open. The default server takes
    # pings more often than every five minutes for an attack and cuts the connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers on one port would each get half of the calls.
    ("grpc.so_reuseport", 0),
)

SERVICES = (
    "ServerService",
    "AgentService",
    "SessionService",
    "StateService",
    "MessageService",
    "RunService",
    "BlobService",
)


async def build(desk: Desk, doorway: Doorway) -> tuple[grpc.aio.Server, Health]:
    """Makes a server with every service added and no port yet."""
    server = grpc.aio.server(interceptors=[doorway], options=OPTIONS)
    v1.add_ServerServiceServicer_to_server(Servers(desk), server)
    v1.add_AgentServiceServicer_to_server(Agents(desk), server)
    v1.add_SessionServiceServicer_to_server(SessionsService(desk), server)
    v1.add_StateServiceServicer_to_server(States(desk), server)
    v1.add_MessageServiceServicer_to_server(Messages(desk), server)
    v1.add_RunServiceServicer_to_server(RunsService(desk), server)
    v1.add_BlobServiceServicer_to_server(Blobs(desk), server)
    services = [f"notecase.v1.{name}" for name in SERVICES]
    health = Health(services)
    await health.add_to(server)
    add_reflection(server, [*services, HEALTH])
    return server, health

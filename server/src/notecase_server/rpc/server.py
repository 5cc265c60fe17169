"""Builds the gRPC server: its services, its doorway, and how it treats a connection."""

from collections.abc import Sequence
from typing import Any

import grpc
from notecase import v1

from notecase_server.auth.keys import Keys
from notecase_server.auth.tenants import Tenants
from notecase_server.engine.tenancy import Tenancy
from notecase_server.rpc.agents import Agents
from notecase_server.rpc.audit import AuditsService
from notecase_server.rpc.blobs import Blobs
from notecase_server.rpc.desk import Desk
from notecase_server.rpc.frames import TRANSPORT_BYTES
from notecase_server.rpc.interceptor import Doorway
from notecase_server.rpc.keys import KeysService
from notecase_server.rpc.messages import Messages
from notecase_server.rpc.ops import SERVICE as HEALTH
from notecase_server.rpc.ops import Health
from notecase_server.rpc.paths import tolerate_any_path
from notecase_server.rpc.receiving import READ_AHEAD
from notecase_server.rpc.reflection import add_reflection
from notecase_server.rpc.runs import RunsService
from notecase_server.rpc.servers import Servers
from notecase_server.rpc.sessions import SessionsService
from notecase_server.rpc.states import States
from notecase_server.rpc.tenants import TenantsService
from notecase_server.store.contract import Store

FIXED = {
    "grpc.max_receive_message_length": TRANSPORT_BYTES,
    # What a stream may send before it is read: without a fixed size, grpc receives up to 16 MiB of each ahead.
    "grpc.http2.bdp_probe": 0,
    "grpc.http2.lookahead_bytes": READ_AHEAD,
    # Only "identity": grpc decompresses a request before the caller is known, and a frame of 15 KiB may hold 15 MiB.
    "grpc.compression_enabled_algorithms_bitset": 1,
    # Headers: refused at random above the first, always above the second.
    "grpc.max_metadata_size": 16 << 10,
    "grpc.absolute_max_metadata_size": 32 << 10,
    # Calls that no handler has been given yet: refused at random above the first, always above the second.
    "grpc.server.max_pending_requests": 1000,
    "grpc.server.max_pending_requests_hard_limit": 3000,
    # A connection that says nothing to begin with, or does not answer the settings.
    "grpc.server_handshake_timeout_ms": 20_000,
    "grpc.http2.settings_timeout": 20_000,
    # A connection whose other end is gone is noticed, and one without a call is let go; a client opens another.
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.max_connection_idle_ms": 30 * 60_000,
    # A client behind a proxy that drops idle connections pings, with or without an open call. grpc's default server
    # treats pings more often than every five minutes as an attack and cuts the connection.
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_ping_strikes": 0,
    # Two servers on one port would each get half of the calls.
    "grpc.so_reuseport": 0,
}
"""How the transport is bounded, whatever the settings: see docs/limits.md."""


def options(max_calls: int, max_connections: int) -> tuple[tuple[str, int], ...]:
    """Returns the arguments of grpc's server. A connection may open more streams than the gate allows, so that these
    are refused with a reason, but not any number."""
    chosen = {"grpc.max_concurrent_streams": max_calls, "grpc.max_allowed_incoming_connections": max_connections}
    return tuple((FIXED | chosen).items())


class _Unregistered:
    """Adds services by their generic handlers alone. For each method that is registered as well, grpc's asyncio server
    keeps a task, and every call waits for all of them again."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Registers none."""


SERVICES = (
    "ServerService",
    "AgentService",
    "SessionService",
    "StateService",
    "MessageService",
    "RunService",
    "BlobService",
    "KeyService",
    "AuditService",
    "TenantService",
)


async def build(
    desk: Desk,
    store: Store,
    keys: Keys,
    tenants: Tenants,
    tenancy: Tenancy,
    doorway: Doorway,
    channel: Sequence[tuple[str, int]],
) -> tuple[grpc.aio.Server, Health]:
    """Makes a server with every service added and no port yet. `channel` are grpc's arguments, as `options` makes
    them."""
    tolerate_any_path()
    server = grpc.aio.server(interceptors=[doorway], options=channel)
    methods: Any = _Unregistered(server)
    v1.add_ServerServiceServicer_to_server(Servers(desk, store.kind), methods)
    v1.add_AgentServiceServicer_to_server(Agents(desk, store), methods)
    v1.add_SessionServiceServicer_to_server(SessionsService(desk, store), methods)
    v1.add_StateServiceServicer_to_server(States(desk, store), methods)
    v1.add_MessageServiceServicer_to_server(Messages(desk, store), methods)
    v1.add_RunServiceServicer_to_server(RunsService(desk, store), methods)
    v1.add_BlobServiceServicer_to_server(Blobs(desk, store), methods)
    v1.add_KeyServiceServicer_to_server(KeysService(desk, store, keys), methods)
    v1.add_AuditServiceServicer_to_server(AuditsService(desk, store), methods)
    v1.add_TenantServiceServicer_to_server(TenantsService(desk, store, tenants, tenancy), methods)
    services = [f"notecase.v1.{name}" for name in SERVICES]
    health = Health(services)
    await health.add_to(methods)
    add_reflection(server, [*services, HEALTH])
    return server, health

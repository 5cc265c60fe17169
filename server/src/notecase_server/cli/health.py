"""`notecase health`."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from notecase_server.cli.connection import Exit, Refusal, connection, unreachable
from notecase_server.cli.options import OUTPUT, SERVER
from notecase_server.loopback import is_loopback

LIVENESS = "liveness"
"""The service that is healthy as long as the process answers, named as `rpc.ops` names it."""


@click.command()
@click.option("--liveness", is_flag=True, help="Ask only whether the process answers: for a probe that restarts it.")
@OUTPUT
@SERVER
def health(liveness: bool, form: str) -> None:
    """Show whether a server is healthy.

    The exit code is 0 if the server serves, 1 if it answers that it does not, and 4 if it does not answer. A server
    that waits for its store serves nothing, but is healthy with --liveness.
    """
    server, given = connection()
    ca = given.get("ca")
    credentials = None
    if not given.get("plaintext") and (ca or not is_loopback(server)):
        credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes() if ca else None)

    async def check() -> int:
        channel = grpc.aio.secure_channel(server, credentials) if credentials else grpc.aio.insecure_channel(server)
        async with channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=LIVENESS if liveness else ""), timeout=3)
        _print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status), form)
        return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1

    try:
        sys.exit(asyncio.run(check()))
    except grpc.RpcError as error:
        told = f"{server} does not answer ({error.code().name})."
        if error.code().name == "UNAVAILABLE":
            told = unreachable(server, error.details() or "")
        raise Refusal(told, Exit.UNREACHABLE) from None


def _print(status: str, form: str) -> None:
    if form == "table":
        click.echo(status)
        return
    from notecase_server.cli import output  # noqa: PLC0415  # imports the client, which a check every few seconds spares

    output.print_data({"status": status}, form)

"""`notecase health`."""

import asyncio
import sys
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from notecase_server.cli.options import SERVER


@click.command()
@SERVER
def health(server: str) -> None:
    """Ask a server how it is.

    The exit code is 0 when it serves and 1 otherwise.
    """

    async def check() -> int:
        async with grpc.aio.insecure_channel(server) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=3)
        click.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
        return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1

    try:
        sys.exit(asyncio.run(check()))
    except grpc.RpcError as error:
        raise click.ClickException(f"{server} does not answer ({error.code().name}).") from None

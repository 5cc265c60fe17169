"""The `notecase` command: serve, and look around from a terminal."""

import asyncio
import sys
from typing import Any, Literal

import click
import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from notecase_server import __version__
from notecase_server.config import (
    DEFAULT_LISTEN,
    Settings,
    configure_logging,
    is_loopback,
    openai_from_environment,
)
from notecase_server.serve import serve as serve_forever
from notecase_server.store.sqlite_file import StoreOpenError

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name="notecase")
def main() -> None:
    """A self-hosted gRPC agent service: agents, their sessions, state, messages and runs."""


@main.command()
@click.option(
    "--listen",
    default=DEFAULT_LISTEN,
    envvar="NOTECASE_LISTEN",
    show_envvar=True,
    metavar="HOST:PORT",
    help="Where to serve; port 0 takes a free one and prints it.",
)
@click.option(
    "--store",
    default="sqlite:notecase.db",
    envvar="NOTECASE_STORE",
    show_envvar=True,
    metavar="URL",
    help="Where everything is kept: sqlite:PATH, or memory: to forget it all at the end.",
)
@click.option(
    "--insecure",
    is_flag=True,
    envvar="NOTECASE_INSECURE",
    show_envvar=True,
    help="Serve beyond this machine, with no TLS and no credentials: whoever reaches the port may do all.",
)
@click.option(
    "--max-runs",
    type=click.IntRange(1),
    default=1000,
    envvar="NOTECASE_MAX_RUNS",
    show_envvar=True,
    help="Runs under way at once; a start above it is refused with RESOURCE_EXHAUSTED.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=10.0,
    envvar="NOTECASE_GRACE",
    show_envvar=True,
    metavar="SECONDS",
    help="How long runs may take to their next commit when the server stops; the rest goes on at the next start.",
)
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    default="console",
    envvar="NOTECASE_LOG_FORMAT",
    show_envvar=True,
    help="For people, or one JSON object a line. Logs go to standard error and hold no message contents.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    envvar="NOTECASE_LOG_LEVEL",
    show_envvar=True,
    help="The least that is logged.",
)
def serve(
    listen: str,
    store: str,
    insecure: bool,
    max_runs: int,
    grace: float,
    log_format: Literal["console", "json"],
    log_level: str,
) -> None:
    """Serve until SIGTERM or SIGINT.

    The model's provider is `openai` when OPENAI_API_KEY or OPENAI_BASE_URL is set (OPENAI_MODEL names the default
    model), and the built-in `offline` one otherwise.
    """
    if not insecure and not is_loopback(listen):
        raise click.ClickException(
            f"{listen} can be reached from other machines, and this server has no TLS and no credentials yet. "
            f"Listen on {DEFAULT_LISTEN}, or say --insecure where the network itself is trusted."
        )
    configure_logging(log_format, log_level)
    settings = Settings(listen=listen, store=store, max_runs=max_runs, grace=grace, openai=openai_from_environment())
    try:
        uvloop.run(serve_forever(settings, lambda port: click.echo(f"listening on port {port}")))
    except StoreOpenError as error:
        raise click.ClickException(str(error)) from None
    except RuntimeError as error:
        if "bind" not in str(error):
            raise
        raise click.ClickException(f"{listen} cannot be listened on; another server may have it.") from None


@main.command()
@click.option("--server", default=DEFAULT_LISTEN, envvar="NOTECASE_SERVER", show_envvar=True, metavar="HOST:PORT")
def health(server: str) -> None:
    """Ask a server how it is; exit with 0 when it serves and 1 otherwise."""

    async def ask() -> int:
        async with grpc.aio.insecure_channel(server) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=3)
        click.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
        return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1

    try:
        sys.exit(asyncio.run(ask()))
    except grpc.RpcError as error:
        raise click.ClickException(f"{server} does not answer ({error.code().name}).") from None

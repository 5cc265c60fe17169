"""`notecase serve`."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

import notecase_server.cli.bare_structlog  # noqa: F401  # before others import structlog
from notecase_server.auth.tables import MOST, MOST_RETRIES, SettingsError
from notecase_server.cli.options import DEFAULT_ADDRESS, PASSWORD_FILE, STORE, address
from notecase_server.cli.serve_settings import load, settings
from notecase_server.config import Settings, configure_logging
from notecase_server.serve import ProviderSettingsError, Server, ServerBrokenError
from notecase_server.serve import run as serve_forever
from notecase_server.serve_ports import ListenError
from notecase_server.store.contract import StoreOpenError
from notecase_server.tools.contract import ToolSettingsError

F = TypeVar("F", bound=Callable[..., Any])

MOST_BYTES = 1 << 50

MOST_CONNECTIONS = 1000
"""To PostgreSQL."""

MOST_DAYS = 36_500

DEFAULTS = {each.name: each.default for each in fields(Settings)}

EXPECTED = (
    *(SettingsError, StoreOpenError, ToolSettingsError, ProviderSettingsError),
    *(ListenError, ServerBrokenError),
)
"""Failures whose texts are for the operator."""


class _Seconds(click.FloatRange):
    """Seconds up to MOST. A number that is none (`nan`) is within every range of click's."""

    def __init__(self, least: float = 0, *, min_open: bool = False) -> None:
        super().__init__(least, MOST, min_open=min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return seconds


_listens = partial(address, targets=False)


def _number(name: str, told: str, least: int = 1, most: int = 0) -> Callable[[F], F]:
    """The option for a setting that bounds something, with the setting's name and default."""
    setting = name.replace("-", "_")
    return click.option(
        f"--{name}",
        type=click.IntRange(least, most or (MOST_BYTES if name.endswith("bytes") else MOST)),
        default=DEFAULTS[setting],
        envvar=f"NOTECASE_{setting.upper()}",
        show_envvar=True,
        help=told,
    )


def _flag(name: str, told: str) -> Callable[[F], F]:
    """The option for a setting that is off unless it is said."""
    variable = f"NOTECASE_{name.replace('-', '_').upper()}"
    return click.option(f"--{name}", is_flag=True, envvar=variable, show_envvar=True, help=told)


def _file(name: str, told: str) -> Callable[[F], F]:
    """The option for a file that is read, and found wrong, with all others."""
    kind = click.Path(path_type=Path)
    variable = f"NOTECASE_{name.replace('-', '_').upper()}"
    return click.option(f"--{name}", type=kind, envvar=variable, show_envvar=True, metavar="FILE", help=told)


class _Serve(click.Command):
    """Names the option that other programs call --port."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as missing:
            if missing.option_name not in {"--port", "--host", "--address", "--bind"}:
                raise
            told = f"There is no {missing.option_name}; use --listen HOST:PORT."
            raise click.UsageError(told, ctx) from None


@click.command(cls=_Serve)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="NOTECASE_CONFIG",
    show_envvar=True,
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=load,
    help="The configuration file: TOML with a key for each of these options, and tables of providers, identity "
    "providers and MCP servers. Options and their variables take precedence.",
)
@click.option(
    "--listen",
    default=DEFAULT_ADDRESS,
    envvar="NOTECASE_LISTEN",
    show_envvar=True,
    metavar="HOST:PORT",
    callback=_listens,
    help="The address to listen on; port 0 chooses a free port and prints it.",
)
@click.option(
    "--listen-mtls",
    default="",
    show_default=False,
    envvar="NOTECASE_LISTEN_MTLS",
    show_envvar=True,
    metavar="HOST:PORT",
    callback=lambda context, option, value: _listens(context, option, value) if value else value,
    help="An additional address, for callers with client certificates.",
)
@_file("tls-cert", "The server's certificate with its intermediate certificates: PEM. Read again when it changes.")
@_file("tls-key", "The certificate's private key: PEM, not encrypted.")
@_file("tls-client-ca", "The CA certificates for client certificates: PEM.")
@_file("client-principals", "Maps names in client certificates to a tenant, role and user. TOML or JSON.")
@_file("issuers", "Identity providers whose tokens are accepted: TOML with a table [[issuer]] for each.")
@click.option(
    "--behind-tls-proxy",
    default="",
    show_default=False,
    envvar="NOTECASE_BEHIND_TLS_PROXY",
    show_envvar=True,
    metavar="ADDRESSES",
    help="Serve other machines without TLS, but only these: the proxies that terminate TLS, as comma-separated "
    "addresses and networks.",
)
@_flag("insecure", "Serve other machines without credentials: everybody who reaches the port may do everything.")
@click.option(
    "--auth",
    type=click.Choice(["auto", "keys"]),
    default="auto",
    envvar="NOTECASE_AUTH",
    show_envvar=True,
    help="Whether callers need a credential: with `keys` always, with `auto` if the store has ever had a key.",
)
@STORE
@PASSWORD_FILE
@_number(
    "store-connections", "Connections to PostgreSQL, in addition to one for the lease.", least=2, most=MOST_CONNECTIONS
)
@click.option(
    "--store-lease",
    type=_Seconds(1),
    default=DEFAULTS["store_lease"],
    envvar="NOTECASE_STORE_LEASE",
    show_envvar=True,
    metavar="SECONDS",
    help="How long the owner of a PostgreSQL store may fail to renew its lease before another server takes over.",
)
@_flag("no-wait", "Exit with an error if another server owns the store, instead of waiting.")
@_flag("no-migrate", "Refuse a PostgreSQL store with an older schema; upgrade it with `notecase migrate`.")
@_flag(
    "no-prepared",
    "Do not use prepared statements, even if the pooler supports them; each statement costs another round trip.",
)
@_number("max-runs", "Concurrent runs. More starts are refused; runs accepted earlier wait.")
@_number("max-calls", "Concurrent calls and streams; one connection has at most half of them.")
@_number("max-connections", "Concurrent connections; more are closed.")
@_number(
    "max-request-bytes", "Bytes of requests that the server is working on; one connection has at most half of them."
)
@_number(
    "max-unread-bytes", "Bytes of answers that clients have not read yet; one connection has at most an eighth of them."
)
@_number("max-imports", "Concurrent imports of sessions.")
@_number("max-import-bytes", "Disk space for files that are being imported.")
@_number(
    "max-heavy-reads",
    "Concurrent heavy calls: forks, rewinds, reads of past states, large writes and pages. More wait.",
)
@_number("max-blob-bytes", "The size of one blob.")
@_number("max-session-bytes", "The total size of the blobs that one session refers to.")
@_number("max-sessions", "Sessions per tenant. 0: no limit.", least=0)
@_number("max-agents", "Agents per tenant. 0: no limit.", least=0)
@_number("max-revisions", "Revisions per agent. 0: no limit.", least=0)
@_number("max-state-keys", "Keys per state. 0: no limit.", least=0)
@_number(
    "max-session-events",
    "Events in a session's log; above it, nothing new may start in the session. 0: no limit.",
    least=0,
)
@_number(
    "max-session-log-bytes",
    "Bytes of a session's log; above it, nothing new may start in the session. 0: no limit.",
    least=0,
)
@_number("max-tenant-blob-bytes", "Total size of a tenant's blobs. 0: no limit.", least=0)
@_number("max-uploads", "Uploads per tenant, in progress or remembered. 0: no limit.", least=0)
@_number("max-requests", "Requests per tenant that are remembered for a day. 0: no limit.", least=0)
@_number("audit-days", "How many days audit entries are kept. 0: forever.", least=0, most=MOST_DAYS)
@click.option(
    "--grace",
    type=_Seconds(0),
    default=10.0,
    envvar="NOTECASE_GRACE",
    show_envvar=True,
    metavar="SECONDS",
    help="How long runs may take to reach their next commit when the server stops; the next start continues them.",
)
@click.option(
    "--provider-profile",
    "profile",
    default="",
    show_default=False,
    envvar="NOTECASE_PROVIDER_PROFILE",
    show_envvar=True,
    metavar="PROFILE",
    help="How the provider's API differs, if its address and model do not show it: the name of a built-in "
    "profile, a JSON object of overrides, or a file with one.",
)
@click.option(
    "--connect-timeout",
    type=_Seconds(0, min_open=True),
    default=10.0,
    envvar="NOTECASE_CONNECT_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long connecting to a model provider may take.",
)
@click.option(
    "--first-timeout",
    type=_Seconds(0, min_open=True),
    default=600.0,
    envvar="NOTECASE_FIRST_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long the provider may take to send the first chunk of a reply.",
)
@click.option(
    "--idle-timeout",
    type=_Seconds(0, min_open=True),
    default=300.0,
    envvar="NOTECASE_IDLE_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long the provider may pause between two chunks; comments do not count as chunks.",
)
@click.option(
    "--whole-timeout",
    type=_Seconds(0, min_open=True),
    default=3600.0,
    envvar="NOTECASE_WHOLE_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long a whole reply may take.",
)
@click.option(
    "--max-retries",
    type=click.IntRange(0, MOST_RETRIES),
    default=2,
    envvar="NOTECASE_MAX_RETRIES",
    show_envvar=True,
    metavar="NUMBER",
    help="How often a model call is retried after a transient error.",
)
@click.option(
    "--retry-time",
    type=_Seconds(0),
    default=60.0,
    envvar="NOTECASE_RETRY_TIME",
    show_envvar=True,
    metavar="SECONDS",
    help="The total wait between these retries.",
)
@click.option(
    "--tools",
    multiple=True,
    envvar="NOTECASE_TOOLS",
    show_envvar=True,
    metavar="MODULE",
    help="A Python module whose @tool functions agents may call; may be repeated.",
)
@click.option(
    "--mcp-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="NOTECASE_MCP_CONFIG",
    show_envvar=True,
    metavar="FILE",
    help="MCP servers whose tools agents may call: JSON or TOML with `mcpServers`.",
)
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    default="console",
    envvar="NOTECASE_LOG_FORMAT",
    show_envvar=True,
    help="Readable text, or one JSON object per line. Logs go to standard error and contain no message contents.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    envvar="NOTECASE_LOG_LEVEL",
    show_envvar=True,
    help="The lowest level that is logged.",
)
def serve(listen: str, log_format: Literal["console", "json"], log_level: str, **others: Any) -> None:
    """Run a server until SIGTERM or SIGINT.

    NOTECASE_ADMIN_KEY sets a key of your choice for an admin of the tenant `default`.

    Without providers in the configuration file, the model provider is `openai` if OPENAI_API_KEY or OPENAI_BASE_URL is
    set (OPENAI_MODEL names the default model), else the built-in `offline` provider.
    """
    configure_logging(log_format, log_level)
    try:
        serve_forever(settings({"listen": listen, **others}), _announce)
    except EXPECTED as error:
        raise click.ClickException(str(error)) from None


def _announce(server: Server) -> None:
    click.echo(f"listening on port {server.port}")
    if server.mtls_port:
        click.echo(f"listening for client certificates on port {server.mtls_port}")

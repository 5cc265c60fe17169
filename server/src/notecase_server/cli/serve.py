"""`notecase serve`."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

import notecase_server.cli.bare_structlog  # noqa: F401  # before others import structlog
from notecase_server.auth.tables import SettingsError
from notecase_server.cli.options import DEFAULT_ADDRESS, PASSWORD_FILE, STORE, address
from notecase_server.cli.serve_settings import load, settings
from notecase_server.config import Settings, configure_logging
from notecase_server.serve import ProviderSettingsError, Server, ServerBrokenError
from notecase_server.serve import run as serve_forever
from notecase_server.serve_ports import ListenError
from notecase_server.store.contract import StoreOpenError
from notecase_server.tools.contract import ToolSettingsError

F = TypeVar("F", bound=Callable[..., Any])

DEFAULTS = {each.name: each.default for each in fields(Settings)}

EXPECTED = (
    *(SettingsError, StoreOpenError, ToolSettingsError, ProviderSettingsError),
    *(ListenError, ServerBrokenError),
)
"""Failures whose texts are for the operator."""


def _number(name: str, told: str, least: int = 1) -> Callable[[F], F]:
    """The option for a setting that bounds something, with the setting's name and default."""
    setting = name.replace("-", "_")
    return click.option(
        f"--{name}",
        type=click.IntRange(least),
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
            told = f"There is no {missing.option_name}; --listen HOST:PORT says where to serve."
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
    "providers and MCP servers. What an option or its variable says wins over it.",
)
@click.option(
    "--listen",
    default=DEFAULT_ADDRESS,
    envvar="NOTECASE_LISTEN",
    show_envvar=True,
    metavar="HOST:PORT",
    callback=address,
    help="Where to serve; port 0 takes a free one and prints it.",
)
@click.option(
    "--listen-mtls",
    default="",
    show_default=False,
    envvar="NOTECASE_LISTEN_MTLS",
    show_envvar=True,
    metavar="HOST:PORT",
    callback=lambda context, option, value: address(context, option, value) if value else value,
    help="Where to serve callers who have client certificates, besides the others.",
)
@_file(
    "tls-cert", "The server's certificate, with those between it and its authority: PEM. Read again when it changes."
)
@_file("tls-key", "The key of that certificate: PEM, not encrypted.")
@_file("tls-client-ca", "The authorities that sign client certificates: PEM.")
@_file("client-principals", "Which names of client certificates are whose: tenant, role, user. TOML or JSON.")
@_file("issuers", "Identity providers whose tokens callers may have: TOML with a table [[issuer]] for each.")
@click.option(
    "--behind-tls-proxy",
    default="",
    show_default=False,
    envvar="NOTECASE_BEHIND_TLS_PROXY",
    show_envvar=True,
    metavar="ADDRESSES",
    help="Serve plain text beyond this machine, but to these only: the proxies that do TLS, as addresses and networks "
    "with commas between them.",
)
@_flag("insecure", "Serve without credentials, beyond this machine too: everybody who reaches the port may do all.")
@click.option(
    "--auth",
    type=click.Choice(["auto", "keys"]),
    default="auto",
    envvar="NOTECASE_AUTH",
    show_envvar=True,
    help="Whether callers need a key: always, or with `auto` once the store has ever had one.",
)
@STORE
@PASSWORD_FILE
@_number("store-connections", "Connections to PostgreSQL, besides one for the lease.", least=2)
@click.option(
    "--store-lease",
    type=click.FloatRange(1),
    default=DEFAULTS["store_lease"],
    envvar="NOTECASE_STORE_LEASE",
    show_envvar=True,
    metavar="SECONDS",
    help="How long a server that owns a PostgreSQL store may be silent before another one takes the store over.",
)
@_flag("no-wait", "End with an error when another server owns the store, instead of waiting for its end.")
@_flag("no-migrate", "Refuse a PostgreSQL store of an older schema, which `notecase migrate` brings up to date.")
@_flag(
    "no-prepared", "Prepare no statements in PostgreSQL, for a pooler that keeps none; each costs a round trip more."
)
@_number("max-runs", "Runs at work at once; a new start above it is refused, and what was accepted before waits.")
@_number("max-calls", "Calls and streams open at once, of all callers; one connection has at most half of them.")
@_number("max-connections", "Connections at once; one above it is closed.")
@_number("max-unread-bytes", "Answers that wait for their readers, together; a connection has at most an eighth of it.")
@_number("max-imports", "Files of sessions that are taken in at once.")
@_number("max-import-bytes", "Files of sessions that wait on this machine's disk while they are taken in, together.")
@_number(
    "max-heavy-reads", "Heavy calls at once: forks, rewinds, states as they were, large writes and pages; others wait."
)
@_number("max-blob-bytes", "The largest content that is stored.")
@_number("max-session-bytes", "The most content, in all, that one session refers to.")
@_number("max-sessions", "Sessions of a tenant. 0: as many as the disk holds.", least=0)
@_number("max-agents", "Agents of a tenant. 0: any number.", least=0)
@_number("max-revisions", "Revisions of an agent. 0: any number.", least=0)
@_number("max-state-keys", "Keys of one state. 0: any number.", least=0)
@_number(
    "max-session-events", "Entries of a session's log, above which nothing is begun in it. 0: any number.", least=0
)
@_number("max-session-log-bytes", "Bytes of a session's log, in the same way.", least=0)
@_number("max-tenant-blob-bytes", "All content of a tenant. 0: as much as the disk holds.", least=0)
@_number("max-uploads", "Uploads of a tenant, under way or remembered. 0: any number.", least=0)
@_number("max-requests", "Requests of a tenant that are remembered for a day. 0: any number.", least=0)
@_number("audit-days", "How long it is kept who did what (AuditService), in days. 0: for ever.", least=0)
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
    "--provider-profile",
    "profile",
    default="",
    show_default=False,
    envvar="NOTECASE_PROVIDER_PROFILE",
    show_envvar=True,
    metavar="PROFILE",
    help="What the model's provider takes, where its address and model do not tell: the name of a built-in profile, a "
    "JSON object of what to override, or a file with one.",
)
@click.option(
    "--connect-timeout",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    envvar="NOTECASE_CONNECT_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long connecting to a model's provider may take.",
)
@click.option(
    "--first-timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    envvar="NOTECASE_FIRST_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long the provider may take to the first piece of a reply.",
)
@click.option(
    "--idle-timeout",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    envvar="NOTECASE_IDLE_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long it may be silent between two pieces; comments count as silence.",
)
@click.option(
    "--whole-timeout",
    type=click.FloatRange(0, min_open=True),
    default=3600.0,
    envvar="NOTECASE_WHOLE_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long an answer may take in all.",
)
@click.option(
    "--max-retries",
    type=click.IntRange(0),
    default=2,
    envvar="NOTECASE_MAX_RETRIES",
    show_envvar=True,
    metavar="NUMBER",
    help="How often a call of the model is repeated when what went wrong may pass.",
)
@click.option(
    "--retry-time",
    type=click.FloatRange(0),
    default=60.0,
    envvar="NOTECASE_RETRY_TIME",
    show_envvar=True,
    metavar="SECONDS",
    help="How long may be waited between all of these tries together.",
)
@click.option(
    "--tools",
    multiple=True,
    envvar="NOTECASE_TOOLS",
    show_envvar=True,
    metavar="MODULE",
    help="A Python module whose functions marked with @tool agents may call; may be given several times.",
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
def serve(listen: str, log_format: Literal["console", "json"], log_level: str, **others: Any) -> None:
    """Serve until SIGTERM or SIGINT.

    NOTECASE_ADMIN_KEY is a key that you choose: who calls with it is an admin of the tenant `default`.

    Without providers in the configuration file, the model's provider is `openai` when OPENAI_API_KEY or OPENAI_BASE_URL
    is set (OPENAI_MODEL names the default model), and the built-in `offline` one otherwise.
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

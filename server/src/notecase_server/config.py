"""Defines the settings of a server, and reads the environment, as only the options of the command line do besides."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO, cast

import structlog

from notecase_server.auth.keys import MAX_KEY, MIN_ADMIN_KEY
from notecase_server.auth.principal import Principal
from notecase_server.auth.settings import IssuerSettings
from notecase_server.auth.tables import Mistake
from notecase_server.log_lines import PlainRenderer
from notecase_server.loopback import is_loopback
from notecase_server.tools.mcp_settings import McpServerSettings

DEFAULT_MODEL = "gpt-4.1-mini"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderSettings:
    """Where the models of one provider are, and who pays."""

    name: str
    """What agents call it."""
    kind: Literal["openai", "offline"] = "openai"
    """`offline` is the built-in provider, which uses only `max_concurrent` and the settings of the breaker."""
    api_key: str = field(default="none", repr=False)
    key_source: str = ""
    """The setting that has the key, as the error for a key that the provider refuses names it."""
    base_url: str | None = None
    default_model: str = DEFAULT_MODEL
    model_source: str = ""
    """The setting that has the default model, for the error that there is no such model."""
    profile: str = ""
    """The name of a built-in profile, a JSON object of overrides, or the path of a file with one."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with every request, in addition to the provider's own headers."""
    connect_timeout: float = 10.0
    first_timeout: float = 600.0
    idle_timeout: float = 300.0
    whole_timeout: float = 3600.0
    """Seconds: to connect, until the first piece of a reply, between two pieces, and for a whole answer."""
    max_retries: int = 2
    retry_time: float = 60.0
    """Repeats of a model call that failed in a way that may pass, and the seconds to wait between all of them."""
    max_concurrent: int = 0
    """Calls at once; others wait for their turn. 0: any number."""
    breaker_failures: int = 0
    breaker_seconds: float = 30.0
    """After so many failures in a row that may pass, calls are refused for so many seconds. 0 failures: never."""


OFFLINE = ProviderSettings(name="offline", kind="offline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a server."""

    listen: str
    """HOST:PORT: TLS where `tls` is set, and plain text otherwise."""
    listen_mtls: str = ""
    """HOST:PORT for callers with a certificate that `tls_client_ca` signed; empty for none."""
    tls_cert: Path | None = None
    """The certificate of the server, followed by the chain to a CA that callers trust."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """All three are PEM, and read again when they change."""
    client_principals: Path | None = None
    """A file for `read_client_principals`."""
    issuers: Path | None = None
    """A file for `read_issuers`."""
    listed_principals: Mapping[str, Principal] = field(default_factory=dict)
    listed_issuers: tuple[IssuerSettings, ...] = ()
    """Those of the configuration file, in place of a separate file."""
    behind_tls_proxy: str = ""
    """The only other machines that are served, for `read_networks`, since they do TLS; empty where none does."""
    auth: Literal["auto", "keys"] = "auto"
    """With "auto" callers need a credential when the store had ever had a key at the start."""
    admin_key: str = ""
    """A key that the operator chose, for an admin of the tenant `default`; empty for none."""
    insecure: bool = False
    """Everybody who reaches the address may do all, and may be listened to."""
    store: str = field(default="memory:", repr=False)
    """memory:, sqlite:PATH or a URL of PostgreSQL, which may hold a password."""
    store_password_file: Path | None = None
    """The password of that URL, read again for each connection."""
    store_connections: int = 10
    """The most connections to PostgreSQL, in addition to the one for the lease."""
    store_lease: float = 10.0
    """Seconds after which a server that does not renew its lease of a PostgreSQL store is taken for dead."""
    no_wait: bool = False
    """Do not wait for the end of another server that owns the store."""
    no_migrate: bool = False
    """Refuse a PostgreSQL store of an older schema."""
    no_prepared: bool = False
    """Do not use prepared statements in PostgreSQL, even if its pooler supports them."""
    max_runs: int = 1000
    max_calls: int = 10_000
    max_connections: int = 10_000
    max_request_bytes: int = 256 << 20
    max_unread_bytes: int = 256 << 20
    max_imports: int = 8
    max_import_bytes: int = 4 << 30
    max_heavy_reads: int = 2
    max_blob_bytes: int = 256 << 20
    max_session_bytes: int = 1 << 30
    max_sessions: int = 0
    max_agents: int = 0
    max_revisions: int = 0
    max_state_keys: int = 0
    max_session_events: int = 0
    max_session_log_bytes: int = 0
    max_tenant_blob_bytes: int = 0
    max_uploads: int = 0
    max_requests: int = 0
    """From max_sessions on, 0 means no limit. docs/limits.md describes each limit."""
    audit_days: int = 90
    """How long audit entries are kept. 0: they are not deleted."""
    grace: float = 10.0
    """Seconds that runs and streams have to reach a stopping point when the server stops."""
    providers: tuple[ProviderSettings, ...] = ()
    """The first is the default; without any there is the built-in one, `offline`."""
    tools: tuple[str, ...] = ()
    """Modules whose functions are tools."""
    mcp_servers: Mapping[str, McpServerSettings] = field(default_factory=dict)

    @property
    def has_tls(self) -> bool:
        return bool(self.tls_cert or self.tls_key)

    @property
    def has_credentials(self) -> bool:
        """Whether callers need a credential, as far as is known without the store."""
        return self.auth == "keys" or bool(self.admin_key or self.has_issuers or self.has_principals)

    @property
    def credentials(self) -> tuple[str, ...]:
        """The kinds of credentials that are accepted; empty if none is needed."""
        more = {"tokens": self.has_issuers, "certificates": self.has_principals}
        return ("keys", *(kind for kind, given in more.items() if given)) if self.has_credentials else ()

    @property
    def tls_by(self) -> str:
        """What terminates TLS: "server", "proxy" or "none"."""
        return "server" if self.has_tls else "proxy" if self.behind_tls_proxy else "none"

    @property
    def has_issuers(self) -> bool:
        return bool(self.issuers or self.listed_issuers)

    @property
    def has_principals(self) -> bool:
        return bool(self.client_principals or self.listed_principals)


def admin_key_from_environment() -> str:
    """Returns NOTECASE_ADMIN_KEY, or "" if it is not set. It is not an option, because other users of the machine can
    see options."""
    return os.environ.get("NOTECASE_ADMIN_KEY", "")


def exposure_mistakes(settings: Settings) -> Iterator[Mistake]:
    """Yields what does not go together of where a server listens, what protects it there, and who may call."""
    if (key := settings.admin_key) and not (
        MIN_ADMIN_KEY <= len(key) <= MAX_KEY and key.isascii() and key.isprintable() and " " not in key
    ):
        rule = f"use {MIN_ADMIN_KEY} to {MAX_KEY} printable ASCII characters without spaces"
        text = f"This is not a valid key: {rule}."
        yield Mistake("NOTECASE_ADMIN_KEY", text)
    if settings.tls_cert and not settings.tls_key:
        yield Mistake("--tls-key", "--tls-cert needs its key; set this.")
    if settings.tls_key and not settings.tls_cert:
        yield Mistake("--tls-cert", "--tls-key needs its certificate; set this.")
    if settings.listen_mtls:
        for option, given, why in (
            ("--tls-cert", settings.tls_cert, "needs a certificate of the server"),
            ("--tls-client-ca", settings.tls_client_ca, "needs the CA certificates of its callers"),
            ("--client-principals", settings.has_principals, "needs to know whom certificates name"),
        ):
            if not given:
                yield Mistake(option, f"This is missing: --listen-mtls {why}.")
    else:
        for option, given in (
            ("--tls-client-ca", settings.tls_client_ca),
            ("--client-principals", settings.has_principals),
        ):
            if given:
                yield Mistake(option, "This is for --listen-mtls, which is missing.")
    if settings.behind_tls_proxy and settings.has_tls:
        yield Mistake("--behind-tls-proxy", "Use either a proxy or --tls-cert for TLS.")
    if settings.insecure and (settings.has_credentials or settings.behind_tls_proxy):
        yield Mistake("--insecure", "This cannot be combined with credentials or with --behind-tls-proxy.")
    if not settings.insecure and not is_loopback(settings.listen):
        yield from _unprotected(settings)


def _unprotected(settings: Settings) -> Iterator[Mistake]:
    beyond = f"{settings.listen} can be reached from other machines, and"
    if not settings.has_tls and not settings.behind_tls_proxy:
        text = f"{beyond} calls would be plain text: set --tls-cert and --tls-key, or --behind-tls-proxy for a proxy."
        yield Mistake("--listen", text)
    if not settings.has_credentials:
        text = f"{beyond} anybody could call: set --auth keys or --issuers, or --insecure to try things out."
        yield Mistake("--listen", text)


def providers_from_environment() -> tuple[ProviderSettings, ...]:
    """Returns the provider that OPENAI_API_KEY, OPENAI_BASE_URL and OPENAI_MODEL describe, and the built-in one after
    it. Returns none if neither the key nor the address is set; a self-hosted endpoint often needs no key."""
    api_key = os.environ.get("OPENAI_API_KEY", "")
    base_url = os.environ.get("OPENAI_BASE_URL") or None
    if not api_key and not base_url:
        return ()
    model = os.environ.get("OPENAI_MODEL") or DEFAULT_MODEL
    source = "OPENAI_API_KEY" if api_key else "OPENAI_API_KEY, which is not set"
    openai = ProviderSettings(
        name="openai",
        api_key=api_key or "none",
        key_source=source,
        base_url=base_url,
        default_model=model,
        model_source="OPENAI_MODEL",
    )
    return openai, OFFLINE


def variable(name: str) -> str:
    """Returns a variable of the environment that the configuration file names; empty where it is not set."""
    return os.environ.get(name, "")


class _Lossy:
    """A stream that loses what cannot be written: the log may be on a disk that is full, or a pipe without a reader,
    and the server goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def configure_logging(form: Literal["console", "json"], level: str) -> None:
    """Sends every log line to standard error: for people, or one JSON object a line."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Both leave out the values of local variables, which contain messages, state and keys.
    tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    console: structlog.typing.Processor = PlainRenderer()
    if sys.stderr.isatty():
        console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    last: list[structlog.typing.Processor] = (
        [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]
        if form == "json"
        else [console]
    )
    structlog.configure(
        processors=shared + last,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Lossy(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request to an MCP server
    foreign = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(foreign)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("grpc._cython.cygrpc").addFilter(_quotes_no_header)


def _quotes_no_header(record: logging.LogRecord) -> bool:
    """False for grpc's lines about headers that are not UTF-8: they quote the header, which may be a credential, and
    callers without one can make any number of them."""
    return not record.getMessage().startswith("Invalid encoding on")

"""Reads the configuration file: every option of `serve` by its key, and tables of what no option says. Finds all
mistakes of a file at once."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from notecase_server.auth.principal import Principal
from notecase_server.auth.settings import IssuerSettings, listed_issuers, listed_principals
from notecase_server.auth.tables import MOST_RETRIES, Mistake, Table, load
from notecase_server.config import variable
from notecase_server.tools.mcp_settings import McpServerSettings, reference_problem

LIMITS = (
    *("max_runs", "max_calls", "max_connections", "max_request_bytes", "max_unread_bytes"),
    *(
        "max_imports",
        "max_import_bytes",
        "max_heavy_reads",
        "max_blob_bytes",
        "max_session_bytes",
        "max_sessions",
        "max_agents",
        "max_revisions",
    ),
    *("max_state_keys", "max_session_events", "max_session_log_bytes", "max_tenant_blob_bytes", "max_uploads"),
    "max_requests",
)

PROVIDER_DEFAULTS = (
    *("profile", "connect_timeout", "first_timeout", "idle_timeout", "whole_timeout", "max_retries", "retry_time"),
)

KEYS: Mapping[str, str] = {
    **{name: f"server.{name}" for name in ("listen", "listen_mtls", "grace", "tools", "mcp_config")},
    **{name: f"server.{name}" for name in ("log_format", "log_level")},
    "store": "store.url",
    "store_password_file": "store.password_file",
    "store_connections": "store.connections",
    "store_lease": "store.lease",
    **{name: f"store.{name}" for name in ("no_wait", "no_migrate", "no_prepared")},
    "tls_cert": "tls.cert",
    "tls_key": "tls.key",
    "tls_client_ca": "tls.client_ca",
    "behind_tls_proxy": "tls.behind_proxy",
    "auth": "auth.mode",
    "insecure": "auth.insecure",
    "issuers": "auth.issuers",
    "client_principals": "auth.client_principals",
    "audit_days": "audit.days",
    **{name: f"limits.{name}" for name in LIMITS},
    **{name: f"provider_defaults.{name}" for name in PROVIDER_DEFAULTS},
}
"""The key of each option, by the option's name."""

SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "api-key", "x-api-key"})
"""Headers whose values may not be in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """The valid part of a configuration file."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """The values of options by name, as the file has them."""
    providers: tuple[Mapping[str, Any], ...] = ()
    """The arguments of ProviderSettings that the file has, the default provider first."""
    issuers: tuple[IssuerSettings, ...] = ()
    principals: Mapping[str, Principal] = field(default_factory=dict)
    mcp_servers: Mapping[str, McpServerSettings] = field(default_factory=dict)
    exposed: tuple[Path, ...] = ()
    """The files of `key_file` that all users of this machine can read."""
    mistakes: tuple[Mistake, ...] = ()


def read_config(path: Path, complaint: Callable[[str, object], str]) -> ConfigFile:
    """Reads a file and the secrets that it names. `complaint` takes an option's name and value, and returns what is
    wrong with the value, or "". Raises SettingsError for a file that cannot be read or is not TOML; all other mistakes
    are in the result."""
    top = load(path, "--config", toml=True)
    secrets = _Secrets()
    options = dict(_options(top, complaint))
    names: set[str] = set()
    providers = []
    for place, table in top.tables("provider"):
        given = _provider(table, secrets)
        top.check(given["name"] not in names, f"{place}.name", f"{given['name']} is in the file twice.")
        names.add(given["name"])
        providers.append(given)
    servers = _mcp_servers(top, secrets)
    issuers, principals = listed_issuers(top), listed_principals(top)
    for listed, option, key in (
        (issuers, "issuers", "issuer"),
        (principals, "client_principals", "client_principal"),
    ):
        top.check(not (listed and option in options), KEYS[option], f"Set either this or tables [[{key}]], not both.")
    top.done()
    return ConfigFile(
        options=options,
        providers=tuple(providers),
        issuers=issuers,
        principals=principals,
        mcp_servers=servers,
        exposed=tuple(secrets.exposed),
        mistakes=tuple(top.mistakes),
    )


def is_exposed(path: Path) -> bool:
    """Whether all users of this machine can read a file. False for one that is missing."""
    try:
        return bool(path.stat().st_mode & 0o004)
    except OSError:
        return False


def by_key(mistake: Mistake) -> Mistake:
    """Returns a mistake about options as one about their keys."""
    setting, text = mistake
    for name in sorted(KEYS, key=len, reverse=True):
        option = f"--{name.replace('_', '-')}"
        setting, text = setting.replace(option, KEYS[name]), text.replace(option, KEYS[name])
    return Mistake(setting, text)


def _options(top: Table, complaint: Callable[[str, object], str]) -> Iterator[tuple[str, Any]]:
    """Takes the tables of options."""
    sections: dict[str, dict[str, str]] = {}
    for name, key in KEYS.items():
        section, _, inner = key.partition(".")
        sections.setdefault(section, {})[inner] = name
    for section, keys in sections.items():
        table = top.inner(section, top.take(section, dict) or {})
        for key, name in keys.items():
            value = table.take(key, object)
            if value is None:
                continue
            wrong = complaint(name, value)
            if table.check(not wrong, key, wrong):
                yield name, value
        table.done()


class _Secrets:
    """Reads the secrets that the file refers to but does not contain."""

    def __init__(self) -> None:
        self.exposed: list[Path] = []

    def key(self, table: Table, provider: str) -> dict[str, str]:
        """What `key_env` or `key_file` of a provider names, and which of them does; no key where there is neither."""
        name, file = table.text("key_env", needed=False), table.text("key_file", needed=False)
        table.check(not (name and file), "key_file", "Set either key_env or key_file, not both.")
        if name:
            key = self.variable(table, "key_env", name)
            return {"api_key": key, "key_source": f"{name}, which is key_env of the provider {provider!r}"}
        if file:
            return {"api_key": self._file(table, Path(file)), "key_source": f"key_file of the provider {provider!r}"}
        return {"key_source": f"the provider {provider!r}, which has neither key_env nor key_file"}

    def variable(self, table: Table, key: str, name: str) -> str:
        value = variable(name)
        table.check(bool(value), key, f"The variable {name} is not set.")
        return value

    def _file(self, table: Table, path: Path) -> str:
        try:
            value = path.read_text(encoding="utf-8-sig").strip()
            if is_exposed(path):
                self.exposed.append(path)
        except (OSError, UnicodeError):
            table.check(False, "key_file", f"{path} cannot be read as text.")
            return ""
        table.check(bool(value), "key_file", f"{path} is empty.")
        return value

    def headers(self, table: Table) -> dict[str, str]:
        """`headers`, and those of `header_env`, whose values are the names of variables."""
        plain, named = table.named_texts("headers"), table.named_texts("header_env")
        inner = table.inner("headers", plain)
        for name in plain:
            text = "This is a secret: put it in a variable, and name that in header_env."
            inner.check(name.lower() not in SECRET_HEADERS, name, text)
        inner = table.inner("header_env", named)
        return {**plain, **{name: self.variable(inner, name, value) for name, value in named.items()}}


def _provider(table: Table, secrets: _Secrets) -> dict[str, Any]:
    kinds = ("openai", "offline")
    name = table.text("name")
    given: dict[str, Any] = {
        "name": name,
        "kind": table.matching("kind", kinds.__contains__, "This must be openai or offline.", needed=False),
        **secrets.key(table, name),
        "base_url": table.text("base_url", needed=False),
        "default_model": table.text("model", needed=False),
        "model_source": f"model of the provider {name!r}",
        "profile": table.text("profile", needed=False),
        "headers": secrets.headers(table),
        "retry_time": table.number("retry_time"),
        "breaker_seconds": table.number("breaker_seconds", above=True),
    }
    for key in ("connect_timeout", "first_timeout", "idle_timeout", "whole_timeout"):
        given[key] = table.number(key, above=True)
    given["max_retries"] = table.number("max_retries", whole=True, most=MOST_RETRIES)
    for key in ("max_concurrent", "breaker_failures"):
        given[key] = table.number(key, whole=True)
    table.done()
    return {key: value for key, value in given.items() if key == "name" or value not in ("", None, {})}


def _mcp_servers(top: Table, secrets: _Secrets) -> dict[str, McpServerSettings]:
    values = top.take("mcp", dict) or {}
    servers = top.inner("mcp", values)
    found = {}
    for name in values:
        if (inner := servers.take(name, dict)) is not None:
            table = servers.inner(name, inner)
            if (server := _mcp_server(table, secrets)) is not None:
                found[name] = server
    return found


def _mcp_server(table: Table, secrets: _Secrets) -> McpServerSettings | None:
    passed = table.texts("pass_env", needed=False)
    given: dict[str, Any] = {key: table.text(key, needed=False) for key in ("command", "cwd", "stderr", "url")}
    given["protocol"] = table.matching("protocol", "2026-07-28".__eq__, "This must be 2026-07-28.", needed=False)
    given["args"] = table.texts("args", needed=False)
    given["headers"] = secrets.headers(table)
    env = table.named_texts("env")
    given["env"] = {**env, **{name: secrets.variable(table, "pass_env", name) for name in passed}}
    named = table.values.get("header_env")
    written = given["headers"].keys() - (named if isinstance(named, dict) else {})
    problem = reference_problem(given["url"], {name: given["headers"][name] for name in written}, env)
    key = "url" if given["url"] and not given["command"] else "command"
    table.check(not problem, key, f"{problem}.")
    for name in ("connect_timeout", "timeout"):
        given[name] = table.number(name, above=True)
    table.done()
    try:
        return McpServerSettings(**{name: value for name, value in given.items() if value})
    except ValueError as error:
        table.check(False, key, f"{error}.")
        return None

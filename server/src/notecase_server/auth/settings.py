"""The operator's settings for credentials: the files for TLS, client certificates and identity providers."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from urllib.parse import urlsplit

from notecase_server.auth.principal import Principal, Role
from notecase_server.auth.tables import Mistake, SettingsError, Table, load

ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
"""All are asymmetric: a key that everybody can fetch must never be the secret of a signature."""

SAN = re.compile(r"(uri|dns|email):.+")

Network = IPv4Network | IPv6Network


Claim = tuple[str, ...]
"""Where a claim is: its name, or several names where it is within others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerSettings:
    """One identity provider, and what its tokens say of their callers. Tenant and role are a fixed value or a claim; a
    user may be neither, and then the caller is not bound to one."""

    issuer: str
    """The claim `iss`, exactly."""
    audiences: tuple[str, ...]
    """The claim `aud` holds one of them."""
    algorithms: tuple[str, ...]
    jwks_url: str = ""
    jwks_file: Path | None = None
    """Where the issuer's keys are; without either, the issuer's OpenID Connect configuration says it."""
    tenant: str = ""
    tenant_claim: Claim = ()
    role: Role | None = None
    role_claim: Claim = ()
    roles: Mapping[str, Role] = field(default_factory=dict)
    """What the values of `role_claim` mean. Without any, they are names of roles; operator is not one of these."""
    user: str = ""
    user_claim: Claim = ()
    subject_claim: Claim = ("sub",)


def read_issuers(path: Path) -> tuple[IssuerSettings, ...]:
    """Reads identity providers: a table [[issuer]] for each. Raises SettingsError."""
    top = load(path, "--issuers")
    found = listed_issuers(top)
    top.check("issuer" in top.values, "issuer", "The file has no table [[issuer]].")
    top.done()
    top.raise_mistakes()
    return found


def listed_issuers(top: Table) -> tuple[IssuerSettings, ...]:
    """Takes the tables [[issuer]] of a file that is being read."""
    found: list[IssuerSettings] = []
    for place, table in top.tables("issuer"):
        issuer = _issuer(table)
        known = any(issuer.issuer == other.issuer for other in found)
        top.check(not known, f"{place}.issuer", f"{issuer.issuer} is in the file twice.")
        found.append(issuer)
    return tuple(found)


def _issuer(table: Table) -> IssuerSettings:
    file = table.text("jwks_file", needed=False)
    settings = IssuerSettings(
        issuer=table.text("issuer"),
        audiences=table.texts("audience"),
        algorithms=table.texts("algorithms"),
        jwks_url=table.text("jwks_url", needed=False),
        jwks_file=Path(file) if file else None,
        tenant=table.tenant(needed=False),
        tenant_claim=table.texts("tenant_claim", needed=False),
        role=table.role(needed=False),
        role_claim=table.texts("role_claim", needed=False),
        roles=table.roles("roles"),
        user=table.user(),
        user_claim=table.texts("user_claim", needed=False),
        subject_claim=table.texts("subject_claim", needed=False) or ("sub",),
    )
    table.done()
    for key, wrong in _wrong(settings, table.values.keys()):
        table.check(False, key, wrong)
    return settings


def _wrong(settings: IssuerSettings, given: Collection[str]) -> Iterator[tuple[str, str]]:
    """The keys whose values do not go together, each with a sentence."""
    for name in settings.algorithms:
        if name not in ALGORITHMS:
            yield "algorithms", f"{name} is none of {', '.join(sorted(ALGORITHMS))}."
    if {"jwks_url", "jwks_file"} <= set(given):
        yield "jwks_url", "Give jwks_url or jwks_file, and not both."
    if not {"jwks_url", "jwks_file"} & set(given) and settings.issuer and not is_safe(settings.issuer):
        yield "issuer", "Without jwks_url this must begin with https://, or with http:// on this machine only."
    if settings.jwks_url and not is_safe(settings.jwks_url):
        yield "jwks_url", "This must begin with https://, or with http:// on this machine only."
    for name in ("tenant", "role", "user"):
        if name in given and f"{name}_claim" in given:
            yield name, f"Give {name} or {name}_claim, not both."
    if settings.roles and not settings.role_claim:
        yield "roles", "This needs role_claim, which is missing."
    if not {"role", "role_claim"} & set(given):
        yield "role", "Give role or role_claim."
    belongs = {"tenant", "tenant_claim"} & set(given)
    if settings.role is Role.OPERATOR and (belongs or {"user", "user_claim"} & set(given)):
        yield "role", "An operator has no tenant and no user."
    if settings.role is not Role.OPERATOR and not belongs:
        yield "tenant", "Give tenant or tenant_claim."


def is_safe(url: str) -> bool:
    """Whether data from that address cannot be changed on the way."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    here = {"localhost", "127.0.0.1", "::1"}
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and host in here))


def read_client_principals(path: Path) -> Mapping[str, Principal]:
    """Reads who the callers with client certificates are: for each name that a certificate may hold (`uri:`, `dns:` or
    `email:` and the name) a table with tenant, role and, for a caller that is bound to one, user. Raises
    SettingsError."""
    top = load(path, "--client-principals")
    top.check(bool(top.values), "", "The file is empty.")
    found: dict[str, Principal] = {}
    for name in top.values:
        if _is_san(top, name, name) and (values := top.take(name, dict)) is not None:
            _add_principal(found, name, top, name, top.inner(name, values))
    top.raise_mistakes()
    return found


def listed_principals(top: Table) -> Mapping[str, Principal]:
    """Takes the tables [[client_principal]] of a file that is being read; `name` in them is the certificate's."""
    found: dict[str, Principal] = {}
    for place, table in top.tables("client_principal"):
        name = table.text("name")
        if name and _is_san(table, "name", name):
            _add_principal(found, name, top, place, table)
    return found


def _is_san(table: Table, key: str, name: str) -> bool:
    return table.check(SAN.fullmatch(name) is not None, key, "A name must begin with uri:, dns: or email:.")


def _add_principal(found: dict[str, Principal], name: str, top: Table, place: str, table: Table) -> None:
    role = table.role()
    tenant, user = table.tenant(needed=role is not Role.OPERATOR), table.user()
    if role is Role.OPERATOR:
        table.check(not tenant and not user, "role", "An operator has no tenant and no user.")
    table.done()
    key = san(*name.split(":", 1))
    top.check(key not in found, place, "This name is in the file twice.")
    found[key] = Principal(tenant, key, role or Role.VIEWER, user)


def san(kind: str, name: str) -> str:
    """Returns a name of a certificate in the form of `read_client_principals`. Only host names are case-insensitive."""
    return f"{kind}:{name.lower() if kind == 'dns' else name}"


def read_networks(text: str) -> tuple[Network, ...]:
    """Reads addresses and networks, such as 10.0.0.0/8, with commas between them; none of an empty text. Raises
    SettingsError."""
    found: list[Network] = []
    mistakes = []
    for one in (part.strip() for part in text.split(",") if text):
        try:
            found.append(ip_network(one))
        except ValueError:
            mistakes.append(
                Mistake("--behind-tls-proxy", f"{one} is neither an address nor a network such as 10.0.0.0/8.")
            )
    if mistakes:
        raise SettingsError(mistakes)
    return tuple(found)

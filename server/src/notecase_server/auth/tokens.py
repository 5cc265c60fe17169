"""Tokens of identity providers as credentials: JSON Web Tokens (OpenID Connect), verified by the issuers' keys."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import jwt

from notecase_server import errors, names
from notecase_server.auth.jwks import Key, KeySet, Load, discovered, from_file, from_url
from notecase_server.auth.keys import bearer
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.auth.settings import Claim, IssuerSettings
from notecase_server.auth.tables import ROLES
from notecase_server.supervisor import Tasks

T = TypeVar("T")

TOKEN_BYTES = 8 << 10
"""The longest token that is read. Longer ones contain all groups of a user, which a provider can leave out."""

SUBJECT_CHARACTERS = 255
"""The longest subject that the standard allows."""

LEEWAY_SECONDS = 60
"""How much the clocks of this machine and of an issuer may differ."""

REMEMBERED = 10_000
"""Tokens that are remembered as verified, so that each costs its signature once."""

MOST_TRIED = 8
"""Keys that one token is tried with."""

LATEST = 1e12
"""Seconds since 1970 that no token's time is beyond: what is, was not meant as a time."""

TENANT_ROLES: Mapping[str, Role] = {name: role for name, role in ROLES.items() if role is not Role.OPERATOR}

VERIFIER = jwt.PyJWT(
    {
        "require": ["iss", "aud", "exp"],
        "enforce_minimum_key_length": True,
        # Judged here, by the clock that is handed in.
        "verify_exp": False,
        "verify_nbf": False,
        "verify_iat": False,
    }
)


class _RefusedError(Exception):
    """A token is not valid. The text says why, for the operator's log, and quotes nothing of the token."""


class _Issuer(NamedTuple):
    settings: IssuerSettings
    keys: KeySet


class _Verified(NamedTuple):
    principal: Principal
    expires: float
    issuer: _Issuer
    key: Key


class Tokens:
    """Judges `authorization: Bearer` with a JSON Web Token of one of several issuers."""

    def __init__(
        self,
        issuers: Sequence[IssuerSettings],
        tasks: Tasks,
        clock: Callable[[], int],
        monotonic: Callable[[], float],
    ) -> None:
        """`tasks` own the fetches of keys. `clock` returns microseconds since 1970, `monotonic` seconds."""
        self._clock = clock
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()
        self._issuers: dict[str, _Issuer] = {}
        for one in issuers:
            self._issuers[one.issuer] = _Issuer(one, KeySet(one.issuer, _load(one), tasks, monotonic))

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        """Returns the caller, or None if the call has no credential of this form. Raises NotecaseError UNAUTHENTICATED
        for a token that is not valid, and ISSUER_UNAVAILABLE without keys to verify it."""
        token = _token(metadata)
        if token is None:
            return None
        try:
            return await self._judge(token)
        except _RefusedError as refused:
            raise errors.unauthenticated(f"The token is not valid: {refused}.") from None

    async def _judge(self, token: str) -> Principal:
        _need(len(token) <= TOKEN_BYTES, f"it has more than {TOKEN_BYTES} bytes")
        digest = hashlib.sha256(token.encode()).digest()
        verified = self._verified.pop(digest, None)
        if verified is None or not self._still(verified):
            verified = await self._verify(token)
        if self._still(verified):  # by now: it may be valid by the leeway alone
            self._verified[digest] = verified
            if len(self._verified) > REMEMBERED:
                self._verified.popitem(last=False)
        return verified.principal

    def _still(self, verified: _Verified) -> bool:
        """Whether a token needs not be verified again: it has not expired, and its key is not withdrawn."""
        return self._now() < verified.expires and verified.issuer.keys.vouches_for(verified.key)

    def _now(self) -> float:
        return self._clock() / 1e6

    async def _verify(self, token: str) -> _Verified:
        """Verifies a token. Raises _RefusedError."""
        told = _decoded(lambda: jwt.decode_complete(token, options={"verify_signature": False}))
        name, header = told["payload"].get("iss"), told["header"]
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise _RefusedError("its issuer is unknown")
        settings, algorithm = issuer.settings, header.get("alg")
        _need(algorithm in settings.algorithms, "its algorithm is not one of its issuer's")
        keys = await issuer.keys.find(header.get("kid", ""))
        _need(bool(keys), "its issuer has no such key, or could not be asked")
        keys = [key for key in keys if key.fits(algorithm)][:MOST_TRIED]
        _need(bool(keys), "its key is for another algorithm")
        key, claims = _signed(token, keys, algorithm, settings)
        now = self._now()
        expires = _time(claims["exp"])
        _need(now < expires + LEEWAY_SECONDS, "it has expired")
        for begin in (claims.get("nbf"), claims.get("iat")):
            _need(begin is None or _time(begin) <= now + LEEWAY_SECONDS, "it is not valid yet")
        return _Verified(_principal(settings, claims), expires, issuer, key)


def _load(settings: IssuerSettings) -> Load:
    if settings.jwks_file:
        return from_file(settings.jwks_file)
    return from_url(settings.jwks_url) if settings.jwks_url else discovered(settings.issuer)


def _token(metadata: Metadata) -> str | None:
    """Returns a call's JSON Web Token: three parts, the first of which is a JSON object. Other keys do not have this
    form."""
    token = bearer(metadata)
    return token if token is not None and token.startswith("ey") and token.count(".") == 2 else None


def _need(right: bool, problem: str) -> None:
    if not right:
        raise _RefusedError(problem)


def _signed(token: str, keys: Sequence[Key], algorithm: str, settings: IssuerSettings) -> tuple[Key, dict[str, Any]]:
    """Returns the first of some keys that verifies a token, and the token's claims. Raises _RefusedError."""

    def decode(key: Key) -> dict[str, Any]:
        return VERIFIER.decode(
            token, key.value, algorithms=[algorithm], audience=settings.audiences, issuer=settings.issuer
        )

    def tried() -> tuple[Key, dict[str, Any]]:
        *others, last = keys
        for key in others:
            with suppress(jwt.InvalidSignatureError, jwt.InvalidKeyError):  # a key of another curve is not for it
                return key, decode(key)
        return last, decode(last)

    return _decoded(tried)


def _decoded(decode: Callable[[], T]) -> T:
    try:
        return decode()
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        # PyJWT's own sentences may quote a token's claims.
        raise _RefusedError(f"it is not well formed or not its issuer's ({type(error).__name__})") from None


def _time(value: object) -> float:
    """Returns a time in seconds since 1970. JSON has numbers that are none, and that no comparison finds late."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LATEST:
        raise _RefusedError("a time in it is not a number of seconds")
    return float(value)


def _principal(settings: IssuerSettings, claims: Mapping[str, Any]) -> Principal:
    subject = _claim(claims, settings.subject_claim)
    if not isinstance(subject, str) or not subject.isprintable() or not 0 < len(subject) <= SUBJECT_CHARACTERS:
        raise _RefusedError("it names no subject")
    subject = f"{settings.issuer}#{subject}"
    role = settings.role or _role(settings, claims)
    if role is Role.OPERATOR:
        return Principal("", subject, role)
    tenant, user = settings.tenant, settings.user
    if settings.tenant_claim:
        tenant = _text(claims, settings.tenant_claim)
        _need(names.is_id(tenant), "its tenant cannot be one")
    if settings.user_claim:
        user = _text(claims, settings.user_claim)
        _need(names.USER.fullmatch(user) is not None, "its user cannot be one")
    return Principal(tenant, subject, role, user)


def _role(settings: IssuerSettings, claims: Mapping[str, Any]) -> Role:
    """Returns the role with the most rights of those that a token names."""
    given = _claim(claims, settings.role_claim)
    meanings = settings.roles or TENANT_ROLES
    values = given if isinstance(given, list) else [given]
    found = {meanings[value] for value in values if isinstance(value, str) and value in meanings}
    _need(bool(found), "it names no role")
    _need(found == {Role.OPERATOR} or Role.OPERATOR not in found, "it names operator and another role")
    return max(found)


def _claim(claims: Mapping[str, Any], place: Claim) -> Any:
    found: Any = claims
    for name in place:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _text(claims: Mapping[str, Any], place: Claim) -> str:
    value = _claim(claims, place)
    return value if isinstance(value, str) else ""

"""Fetches the keys of an identity provider when they are needed, and keeps them while the provider is unavailable."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import jwt
import structlog

from notecase_server import errors
from notecase_server.auth.settings import ALGORITHMS, is_safe
from notecase_server.supervisor import Tasks

log = structlog.get_logger()

MOST_BYTES = 256 << 10
FETCH_SECONDS = 5.0
"""Limits of a fetch: its size and its time."""

FRESH_SECONDS = 300.0
"""How long keys are used without being fetched again: a key that was withdrawn counts no longer than that."""

PATIENCE_SECONDS = 30.0
"""How long after a fetch that failed, or that was for an unknown key, the next may be."""

FIRST_SECONDS = 1.0
"""The same while there are no keys, so that no token can be verified."""

KEPT_SECONDS = 24 * 3600.0
"""How long keys count whose place is away."""

Load = Callable[[], Awaitable[bytes]]


KINDS = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
"""The kind of key that an algorithm takes, by how its name begins."""


class Key(NamedTuple):
    """A public key, with the id and the algorithm that its issuer names for it; either may be empty."""

    id: str
    algorithm: str
    kind: str
    value: Any

    def fits(self, algorithm: str) -> bool:
        """Whether it may be the key of a signature by that algorithm."""
        return self.kind == KINDS[algorithm[:2]] and self.algorithm in {"", algorithm}


def from_url(url: str) -> Load:
    """Fetches over HTTP, from exactly there: a redirect is a failure."""
    return partial(_fetch, url)


def discovered(issuer: str) -> Load:
    """Fetches the keys from where the issuer's OpenID Connect configuration says that they are."""

    async def load() -> bytes:
        told = json.loads(await _fetch(f"{issuer.removesuffix('/')}/.well-known/openid-configuration"))
        if not isinstance(told, dict) or told.get("issuer") != issuer:
            raise ValueError("the OpenID Connect configuration names another issuer")
        url = told.get("jwks_uri")
        # Only an issuer on this machine may send us to plain text on this machine.
        if not isinstance(url, str) or not is_safe(url) or (issuer.startswith("https:") and url.startswith("http:")):
            raise ValueError("the OpenID Connect configuration has no jwks_uri that begins with https://")
        return await _fetch(url)

    return load


async def _fetch(url: str) -> bytes:
    headers = {"accept": "application/json", "accept-encoding": "identity"}
    async with (
        aiohttp.ClientSession(headers=headers, auto_decompress=False) as session,
        session.get(url, allow_redirects=False) as response,
    ):
        if response.status != 200:
            raise ValueError(f"the status is {response.status}")
        content = bytearray()
        async for piece in response.content.iter_any():
            content += piece
            if len(content) > MOST_BYTES:
                raise ValueError(f"there are more than {MOST_BYTES} bytes")
        return bytes(content)


def from_file(path: Path) -> Load:
    """Reads a file."""

    async def load() -> bytes:
        return await asyncio.to_thread(_read, path)

    return load


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"there are more than {MOST_BYTES} bytes")
    return content


def file_problem(path: Path) -> str:
    """Says in a sentence why keys cannot be read from a file now; empty if they can."""
    try:
        parse(_read(path))
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    except (ValueError, RecursionError) as error:
        return f"{path} cannot be used: {error}."
    return ""


class KeySet:
    """The keys of one issuer."""

    def __init__(self, issuer: str, load: Load, tasks: Tasks, monotonic: Callable[[], float]) -> None:
        """Fetches nothing yet. `tasks` own the fetches, which do not end with the caller that needed one; `monotonic`
        returns seconds."""
        self._issuer = issuer
        self._load = load
        self._tasks = tasks
        self._monotonic = monotonic
        self._keys: Sequence[Key] = ()
        self._fetched = self._failed = self._searched = -math.inf
        self._fetch: asyncio.Task[None] | None = None

    async def find(self, key_id: str) -> Sequence[Key]:
        """Returns the keys with that id, which need not be unique, or all keys for an empty id. Raises NotecaseError
        ISSUER_UNAVAILABLE while there are no keys. Waits for a fetch when there are no keys, when they are old, and
        when the id is unknown, in this case at most every PATIENCE_SECONDS. While the keys cannot be fetched, the last
        ones are used for KEPT_SECONDS, and no caller waits."""
        self._forget()
        now = self._monotonic()
        if now - self._fetched > FRESH_SECONDS:
            failing = self._failed > self._fetched
            if now - self._failed > (PATIENCE_SECONDS if self._keys else FIRST_SECONDS):
                self._begin()
            if self._fetch is not None and not (failing and self._keys):
                await asyncio.shield(self._fetch)
        keys = self._known(key_id)
        if not keys and self._keys and self._fetched <= now and now - self._searched > PATIENCE_SECONDS:
            self._searched = now
            self._begin()
        if not keys and self._fetch is not None:
            await asyncio.shield(self._fetch)
            keys = self._known(key_id)
        if not self._keys:
            raise errors.issuer_unavailable()
        return keys

    def vouches_for(self, key: Key) -> bool:
        """Whether that is a key of the issuer, as far as is known without waiting for a fetch. One begins here, too,
        every PATIENCE_SECONDS while the place of the keys is away."""
        self._forget()
        now = self._monotonic()
        if now - self._fetched > FRESH_SECONDS:
            if self._failed <= self._fetched:
                return False
            if now - self._failed > PATIENCE_SECONDS:
                self._begin()
        return key in self._keys

    def _known(self, key_id: str) -> Sequence[Key]:
        return [key for key in self._keys if key_id in {"", key.id}]

    def _forget(self) -> None:
        if self._keys and self._monotonic() - self._fetched > KEPT_SECONDS:
            log.error("issuer_keys_too_old", issuer=self._issuer)
            self._keys = ()

    def _begin(self) -> None:
        if self._fetch is None:
            self._fetch = self._tasks.start(self._renew(), f"keys of {self._issuer}", fresh=True)

    async def _renew(self) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                keys = await asyncio.to_thread(parse, await self._load())
        except (OSError, ValueError, RecursionError, aiohttp.ClientError) as error:
            self._failed = self._monotonic()
            log.warning("issuer_keys_unavailable", issuer=self._issuer, problem=str(error) or type(error).__name__)
        else:
            if [key.id for key in keys] != [key.id for key in self._keys]:
                log.info("issuer_keys", issuer=self._issuer, keys=[key.id for key in keys])
            self._keys, self._fetched = keys, self._monotonic()
        finally:
            self._fetch = None


def parse(content: bytes) -> Sequence[Key]:
    """Returns the keys of a JWKS that verify signatures; others are left out. Raises ValueError when there are none."""
    top = json.loads(content)
    given = top.get("keys") if isinstance(top, dict) else None
    keys = [key for one in given if (key := _key(one)) is not None] if isinstance(given, list) else []
    if not keys:
        raise ValueError("there is no JSON Web Key Set with a public key for signatures")
    return keys


def _key(given: Any) -> Key | None:
    if not isinstance(given, dict) or given.get("use") not in (None, "sig"):
        return None
    try:
        key = jwt.PyJWK(given)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    key_id, algorithm = given.get("kid") or "", given.get("alg") or ""
    if key.algorithm_name not in ALGORITHMS or not isinstance(key_id, str):
        return None
    return Key(key_id, algorithm, given["kty"], key.key)

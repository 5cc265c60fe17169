"""Keys that this server makes and knows again: 256 random bits, of which it keeps a digest.

A key ends in a tag that only the store's secret makes. The tag opens nothing. It tells a key of this store from any
other text, so that callers who guess keys cost the store no reads.
"""

import base64
import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol, TypeVar

from notecase import v1

from notecase_server import errors, names
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.errors import Violation
from notecase_server.store.contract import Clock, KeyRow, KeyStore, Once

T = TypeVar("T")

PREFIX = "nck_"
SECRET_BYTES = 32
TAG_BYTES = 12
TAG_CHARACTERS = 16
"""Of a tag in base64."""

MAX_KEY = 256
"""Characters of a key: what is longer is none of ours."""

MIN_ADMIN_KEY = 32
"""Characters of a key that an operator chose."""

CACHED_KEYS = 10_000
CACHED_SECONDS = 5.0
"""How many keys are remembered, and for how long: only another process on the same store changes one meanwhile."""

ADMIN_KEY = Principal("default", "admin-key", Role.ADMIN)
"""Calls with the key that the operator chose."""


class KeysStore(KeyStore, Protocol):
    """Keeps callers' keys, and has a secret."""

    secret: bytes


class _Cached(NamedTuple):
    found: tuple[KeyRow, Principal] | None
    """None for a key that was revoked."""
    until: float
    """By the monotonic clock."""


def bearer(metadata: Metadata) -> str | None:
    """Returns the token of `authorization: Bearer TOKEN`; None where there is no such."""
    held = metadata.get("authorization")
    if not isinstance(held, str):
        return None
    scheme, _, token = held.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


class Keys:
    """Makes keys, and is the authenticator that knows them."""

    def __init__(
        self,
        store: KeysStore,
        new_id: Callable[[], str],
        clock: Clock,
        monotonic: Callable[[], float],
        admin_key: str = "",
    ) -> None:
        """`admin_key` is one that an operator chose, of at least MIN_ADMIN_KEY characters; empty for none."""
        self._store = store
        self._new_id = new_id
        self._clock = clock
        self._monotonic = monotonic
        self._admin_digest = _digest(admin_key) if admin_key else b""
        self._cached: OrderedDict[str, _Cached] = OrderedDict()
        self._changes = 0
        self.has_had_key = False
        """Whether the store is known to have had a key."""

    async def look(self) -> None:
        """Finds out whether the store has ever had a key. Raises NotecaseError STORE_UNAVAILABLE."""
        self.has_had_key = self.has_had_key or await self._store.is_keyed()

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        """Returns whose key a call holds; None where it holds none that looks like one. Raises NotecaseError
        UNAUTHENTICATED, and STORE_UNAVAILABLE."""
        token = bearer(metadata)
        if not token or len(token) > MAX_KEY:
            return None
        digest = _digest(token)
        if self._admin_digest and hmac.compare_digest(digest, self._admin_digest):
            return ADMIN_KEY
        if not token.startswith(PREFIX):
            return None
        body, tag = token[:-TAG_CHARACTERS], token[-TAG_CHARACTERS:]
        if not hmac.compare_digest(self._tag(body).encode(), tag.encode()):
            raise errors.unauthenticated()
        found = await self._found(body.removeprefix(PREFIX).partition("_")[0])
        if found is None or not self._opens(found[0], digest):
            raise errors.unauthenticated()
        return found[1]

    def _tag(self, body: str) -> str:
        """Returns what ends a key that begins with `body`."""
        made = hmac.digest(self._store.secret, f"key {body}".encode(), "sha256")
        return base64.urlsafe_b64encode(made[:TAG_BYTES]).decode()

    def _opens(self, row: KeyRow, digest: bytes) -> bool:
        """Whether a key of that digest is valid. Takes the same time for each digest."""
        now = self._clock()
        current = hmac.compare_digest(digest, row.digest)
        former = hmac.compare_digest(digest, row.former) and now < row.key.overlap_end_time.ToMicroseconds()
        lasts = not row.key.HasField("expire_time") or now < row.key.expire_time.ToMicroseconds()
        return (current or former) and lasts

    async def _found(self, key_id: str) -> tuple[KeyRow, Principal] | None:
        known = self._cached.get(key_id)
        if known is not None and self._monotonic() < known.until:
            return known.found
        changes = self._changes
        row = await self._store.find_key(key_id)
        found = None if row is None else (row, _principal(row))
        if changes == self._changes:  # else the row may be from before the change
            self._cached[key_id] = _Cached(found, self._monotonic() + CACHED_SECONDS)
            self._cached.move_to_end(key_id)
            if len(self._cached) > CACHED_KEYS:
                self._cached.popitem(last=False)
        return found

    async def create(self, tenant: str, key: v1.Key, once: Once | None = None) -> tuple[v1.Key, str]:
        """Makes a key with the display name, the role, the user and the expiry of `key`, and returns it with what is
        to be sent. Raises NotecaseError INVALID_FIELD for an expiry that has passed, and what the store raises;
        Replayed for a repeat."""
        if key.HasField("expire_time") and key.expire_time.ToMicroseconds() <= self._clock():
            raise errors.invalid([Violation("key.expire_time", "has passed")])
        key_id = self._new_id()
        token = self._new_token(key_id)
        given = v1.Key(display_name=key.display_name, role=key.role, user=key.user)
        if key.HasField("expire_time"):
            given.expire_time.CopyFrom(key.expire_time)
        if once is not None and once.audit is not None:
            once.audit.entry.resource = names.key(key_id)
        made = await self._store.add_key(KeyRow(tenant, key_id, given, _digest(token), b""), once)
        self.has_had_key = True
        return made, token

    async def rotate(self, tenant: str, key_id: str, overlap: int, once: Once | None = None) -> tuple[v1.Key, str]:
        """Gives a key another secret, and takes the one before for `overlap` microseconds more. Returns as `create`
        does. Raises NotecaseError KEY_NOT_FOUND; Replayed for a repeat."""
        token = self._new_token(key_id)
        rotating = self._store.rotate_key(tenant, key_id, _digest(token), overlap, once)
        return await self._changed(key_id, rotating), token

    async def revoke(self, tenant: str, key_id: str, once: Once | None = None) -> None:
        """Takes a key back: no call with it is let in after this has returned. Raises NotecaseError KEY_NOT_FOUND;
        Replayed for a repeat."""
        await self._changed(key_id, self._store.delete_key(tenant, key_id, once))

    def forget(self) -> None:
        """Forgets every key: some are gone by another way than `revoke`."""
        self._changes += 1
        self._cached.clear()

    def _new_token(self, key_id: str) -> str:
        body = f"{PREFIX}{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
        return body + self._tag(body)

    async def _changed(self, key_id: str, change: Awaitable[T]) -> T:
        """Makes a change of a key, and forgets what was known of it, whether the change is known to be made or not."""
        try:
            return await change
        finally:
            self._changes += 1
            self._cached.pop(key_id, None)


def _principal(row: KeyRow) -> Principal:
    role = Role[v1.Key.Role.Name(row.key.role).removeprefix("ROLE_")]
    return Principal(row.tenant, row.key.name, role, row.key.user.removeprefix("users/"), row.key.display_name)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()

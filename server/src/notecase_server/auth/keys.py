"""Creates and recognises API keys: 256 random bits, of which the store has a digest.

A key ends in a tag that can be made only with the store's secret. The tag grants nothing: it distinguishes a key of
this store from any other text, so that callers who guess keys cause no reads of the store.
"""

import base64
import hashlib
import hmac
import math
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
"""Characters of a key: anything longer was not made here."""

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


class _Judged(NamedTuple):
    principal: Principal | None
    """None for a key that is not valid."""
    ends: float
    """When it is not valid any more: microseconds since 1970."""
    until: float
    """How long this may be believed, by the monotonic clock."""


def bearer(metadata: Metadata) -> str | None:
    """Returns the token of `authorization: Bearer TOKEN`, or None if there is none."""
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
        self._judged: OrderedDict[bytes, _Judged] = OrderedDict()
        """Keys that end in a right tag, by their digests."""
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
        judged = self._judged.get(digest)
        if judged is None or self._monotonic() >= judged.until:
            judged = await self._judge(token, digest)
        if judged.principal is None or self._clock() >= judged.ends:
            raise errors.unauthenticated()
        return judged.principal

    async def _judge(self, token: str, digest: bytes) -> _Judged:
        """Looks a key up and caches the result. Raises NotecaseError UNAUTHENTICATED, without reading the store, for a
        text that is not a key of this store."""
        body, tag = token[:-TAG_CHARACTERS], token[-TAG_CHARACTERS:]
        if not hmac.compare_digest(self._tag(body).encode(), tag.encode()):
            raise errors.unauthenticated()
        changes = self._changes
        row = await self._store.find_key(body.removeprefix(PREFIX).partition("_")[0])
        principal, ends = (None, 0.0) if row is None else _opened(row, digest)
        judged = _Judged(principal, ends, self._monotonic() + CACHED_SECONDS)
        if changes == self._changes:  # else the row may be from before the change
            self._judged[digest] = judged
            self._judged.move_to_end(digest)
            if len(self._judged) > CACHED_KEYS:
                self._judged.popitem(last=False)
        return judged

    def _tag(self, body: str) -> str:
        """Returns what ends a key that begins with `body`."""
        made = hmac.digest(self._store.secret, f"key {body}".encode(), "sha256")
        return base64.urlsafe_b64encode(made[:TAG_BYTES]).decode()

    async def create(self, tenant: str, key: v1.Key, once: Once | None = None) -> tuple[v1.Key, str]:
        """Creates a key with the display name, role, user and expiry of `key`, and returns it with the text to send in
        calls. Raises NotecaseError INVALID_FIELD for an expiry that has passed, and the errors of the store; Replayed
        for a repeat."""
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
        return await self._changed(rotating), token

    async def revoke(self, tenant: str, key_id: str, once: Once | None = None) -> None:
        """Revokes a key: after this has returned, every call with it is refused. Raises NotecaseError KEY_NOT_FOUND;
        Replayed for a repeat."""
        await self._changed(self._store.delete_key(tenant, key_id, once))

    def forget(self) -> None:
        """Empties the cache of keys, since some have changed."""
        self._changes += 1
        self._judged.clear()

    def _new_token(self, key_id: str) -> str:
        body = f"{PREFIX}{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
        return body + self._tag(body)

    async def _changed(self, change: Awaitable[T]) -> T:
        """Changes a key and empties the cache, even if it is not known whether the change was made."""
        try:
            return await change
        finally:
            self.forget()


def _opened(row: KeyRow, digest: bytes) -> tuple[Principal | None, float]:
    """Returns the caller with the key of that digest, or None, and until when this applies. Takes the same time for
    each digest."""
    ends = row.key.expire_time.ToMicroseconds() if row.key.HasField("expire_time") else math.inf
    current = hmac.compare_digest(digest, row.digest)
    former = hmac.compare_digest(digest, row.former)
    if not current:
        ends = min(ends, row.key.overlap_end_time.ToMicroseconds())
    role = Role[v1.Key.Role.Name(row.key.role).removeprefix("ROLE_")]
    user = row.key.user.removeprefix("users/")
    principal = Principal(row.tenant, row.key.name, role, user, row.key.display_name)
    return (principal if current or former else None), ends


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()

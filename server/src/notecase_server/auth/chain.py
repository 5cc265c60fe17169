"""Finds the principal of a call: exactly one authenticator of the server must recognise the caller."""

from collections.abc import Sequence
from typing import Protocol

import structlog

from notecase_server import errors
from notecase_server.auth.principal import AuthContext, Authenticator, Principal, Role

log = structlog.get_logger()

DEVELOPMENT = Principal("default", "", Role.ADMIN)
"""Makes every call of a server that asks for no credentials."""

Pairs = Sequence[tuple[str, str | bytes]]
"""A call's metadata as it came: a name may come twice."""


class Keyed(Protocol):
    """Knows whether the store has ever had a key."""

    has_had_key: bool
    """Once true, always true."""

    async def look(self) -> None:
        """Finds out whether another process has made one. Raises NotecaseError STORE_UNAVAILABLE."""
        ...


class Chain:
    """The authenticators of one server."""

    def __init__(self, authenticators: Sequence[Authenticator] = (), open_until: Keyed | None = None) -> None:
        """With `open_until`, every caller is DEVELOPMENT until there is a key. Without it no caller is, unless there
        are no authenticators."""
        self._authenticators = tuple(authenticators)
        self._open_until = open_until

    async def principal(self, pairs: Pairs, transport: AuthContext) -> Principal:
        """Returns who makes a call. Raises NotecaseError UNAUTHENTICATED for a call without a credential or with more
        than one, and what an authenticator raises."""
        if self._is_open():
            return DEVELOPMENT
        if sum(name == "authorization" for name, _ in pairs) > 1:
            raise errors.several_credentials()
        metadata = dict(pairs)
        found = None
        for authenticator in self._authenticators:
            principal = await authenticator.principal(metadata, transport)
            if principal is not None and found is not None:
                raise errors.several_credentials()
            found = found or principal
        if found is None:
            raise errors.no_credential()
        return found

    async def look(self) -> None:
        """Finds out whether a server that is open has to ask for credentials from now on. Raises NotecaseError
        STORE_UNAVAILABLE."""
        if self._open_until is not None and self._is_open():
            await self._open_until.look()

    def _is_open(self) -> bool:
        if self._open_until is not None and self._open_until.has_had_key:
            self._open_until = None
            log.warning("credentials_required", problem="The store has a key now, so calls without one are refused.")
        return self._open_until is not None or not self._authenticators

"""Finds the principal of a call: every authenticator of the server is asked, and exactly one may know the caller."""

from collections.abc import Sequence

from notecase_server import errors
from notecase_server.auth.principal import AuthContext, Authenticator, Principal, Role

DEVELOPMENT = Principal("default", "", Role.ADMIN)
"""Makes every call of a server that has no authenticators."""

Pairs = Sequence[tuple[str, str | bytes]]
"""A call's metadata as it came: a name may come twice."""


class Chain:
    """The authenticators of one server."""

    def __init__(self, authenticators: Sequence[Authenticator] = ()) -> None:
        """Without any, everybody is DEVELOPMENT."""
        self._authenticators = tuple(authenticators)

    async def principal(self, pairs: Pairs, transport: AuthContext) -> Principal:
        """Returns who makes a call. Raises NotecaseError UNAUTHENTICATED for a call without a credential or with more
        than one, and what an authenticator raises."""
        if not self._authenticators:
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

"""Callers of a server that takes their word for who they are, where a test is about what they may."""

import asyncio
from collections import Counter
from collections.abc import Sequence

from notecase_server import errors
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role

Words = Sequence[tuple[str, str]]


def word(principal: Principal) -> Words:
    """The metadata of that principal's calls."""
    held = (principal.tenant, principal.subject, principal.role.name, principal.user)
    return (("authorization", f"Word {' '.join(part or '-' for part in held)}"),)


def who(role: Role, tenant: str = "acme", subject: str = "", user: str = "") -> Principal:
    return Principal("" if role is Role.OPERATOR else tenant, subject or role.name.lower(), role, user)


class ByWord:
    """Accepts a caller's word, unless it is revoked or belongs to another principal by now."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()
        """Subjects."""
        self.roles: dict[str, Role] = {}
        """By subject, another role than the word has."""
        self.error: Exception | None = None
        """Raised in place of every answer."""
        self._asked = Counter[str]()
        self._more = asyncio.Condition()

    async def asked(self, subject: str, times: int) -> None:
        """Returns once it was asked so many times who that is."""
        async with self._more:
            await self._more.wait_for(lambda: self._asked[subject] >= times)

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        if self.error is not None:
            raise self.error
        kind, _, held = str(metadata.get("authorization", "")).partition(" ")
        if kind != "Word":
            return None
        tenant, subject, role, user = ("" if part == "-" else part for part in held.split())
        async with self._more:
            self._asked[subject] += 1
            self._more.notify_all()
        if subject in self.revoked:
            raise errors.unauthenticated()
        return Principal(tenant, subject, self.roles.get(subject, Role[role]), user)

"""Defines the principal of a call, and the interface that finds it from a credential."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol


class Role(IntEnum):
    """The rights of a principal. Each of the first four roles has the rights of those before it. OPERATOR is separate:
    it has no tenant, and reads no content except by ExportTenant."""

    VIEWER = 1
    USER = 2
    DEVELOPER = 3
    ADMIN = 4
    OPERATOR = 10


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, as its credential says. Two calls with equal principals are the same caller's."""

    tenant: str
    """Empty for the role OPERATOR alone."""
    subject: str
    """Stays the same when the credential is renewed."""
    role: Role
    user: str = ""
    """The id of the user whose sessions and state are all that this principal sees; empty when it is bound to none."""
    display_name: str = field(default="", compare=False)
    """For people."""


Metadata = Mapping[str, str | bytes]
"""What came with a call; the names are in lower case."""

AuthContext = Callable[[], Mapping[str, Sequence[bytes]]]
"""Returns what the transport knows about the client: grpc's `ServicerContext.auth_context`, which takes longer than
verifying most credentials."""


class Authenticator(Protocol):
    """Judges one kind of credential."""

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        """Returns the caller, or None if the call has no credential of this kind. Raises NotecaseError UNAUTHENTICATED
        for one that is bad, expired or revoked, with a sentence that does not say which, and quotes nothing of it."""
        ...

"""Who makes the call that is being answered."""

from contextvars import ContextVar
from typing import NamedTuple

from notecase_server.auth.principal import Principal, Role

NOBODY = Principal("", "", Role.VIEWER)
"""Makes the calls that need no credential, and those that were not judged yet."""


class Caller(NamedTuple):
    """A call's principal, and what tells the call apart."""

    principal: Principal
    request_id: str
    method: str
    """The path, such as /notecase.v1.RunService/Run."""
    principal_name: str = ""
    """How events name the principal: principals/{principal}. Empty without credentials, and in calls that only
    read."""

    @property
    def tenant(self) -> str:
        return self.principal.tenant

    @property
    def user(self) -> str:
        """The user that the caller is bound to, by its whole name; empty when it is bound to none."""
        return f"users/{self.principal.user}" if self.principal.user else ""


caller: ContextVar[Caller] = ContextVar("caller")
"""Set by the doorway, for all that a call does."""

"""The caller of the current call."""

from contextvars import ContextVar

import msgspec
from notecase import v1

from notecase_server.auth.principal import Principal, Role
from notecase_server.store.contract import AuditRow

NOBODY = Principal("", "", Role.VIEWER)
"""The caller of calls that need no credential, and of those that are not authenticated yet."""


class Caller(msgspec.Struct, frozen=True):
    """A call's principal, and what identifies the call."""

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

    def audit(self, resource: str = "") -> AuditRow | None:
        """Returns the entry of this call in the audit of the caller's tenant, or None for a caller without
        credentials."""
        return audit_row(self, self.tenant, self.principal_name, resource)


def audit_row(who: Caller, tenant: str, principal_name: str, resource: str) -> AuditRow | None:
    """Returns the entry of a call in the audit of a tenant, in which its principal has that name. None without a
    name."""
    if not principal_name:
        return None
    entry = v1.AuditEntry(
        principal=principal_name,
        method=who.method.removeprefix("/"),
        resource=resource,
        outcome="OK",
        request_id=who.request_id,
        call_count=1,
    )
    return AuditRow(tenant, entry)


caller: ContextVar[Caller] = ContextVar("caller")
"""Set by the doorway, for all that a call does."""

frame_bytes: ContextVar[int] = ContextVar("frame_bytes", default=0)
"""Size of the frame that is being answered: asked for it, a message would be serialised."""

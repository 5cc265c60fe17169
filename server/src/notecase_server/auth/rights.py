"""Says what each role may do: which methods it may call, and which fields it may set."""

from collections.abc import Mapping
from typing import NamedTuple

from notecase import v1

from notecase_server import errors
from notecase_server.auth.principal import Principal, Role
from notecase_server.errors import NotecaseError

VIEWER, USER, DEVELOPER, ADMIN, OPERATOR = Role


class Right(NamedTuple):
    """Who may call a method."""

    least: Role
    """The least role of a tenant; OPERATOR where no role of a tenant may."""
    operators: bool = False
    """Operators may, too."""
    bound: bool = False
    """Methods that callers bound to a user may call, too, whatever their role: they can use only that user's
    resources."""


def _service(name: str, **methods: Role) -> Mapping[str, Right]:
    return {f"/notecase.v1.{name}/{method}": Right(least) for method, least in methods.items()}


METHODS: Mapping[str, Right] = {
    **_service("ServerService", GetServerInfo=VIEWER),
    **_service(
        "AgentService",
        CreateAgent=DEVELOPER,
        GetAgent=VIEWER,
        ListAgents=VIEWER,
        UpdateAgent=DEVELOPER,
        ListAgentRevisions=VIEWER,
        DeleteAgent=DEVELOPER,
    ),
    **_service(
        "SessionService",
        CreateSession=USER,
        GetSession=VIEWER,
        ListSessions=VIEWER,
        UpdateSession=USER,
        DeleteSession=USER,
        CompactSession=USER,
        ForkSession=USER,
        RewindSession=USER,
        EraseUser=ADMIN,
        ExportSession=DEVELOPER,
        ImportSession=DEVELOPER,
    ),
    **_service("StateService", GetState=VIEWER, PutState=USER, UpdateState=USER),
    **_service("MessageService", ListMessages=VIEWER, GetMessage=VIEWER, AppendMessages=USER),
    **_service(
        "RunService",
        Run=USER,
        Invoke=USER,
        CreateRun=USER,
        GetRun=VIEWER,
        ListRuns=VIEWER,
        WaitRun=VIEWER,
        CancelRun=USER,
        SendCommand=USER,
        WatchEvents=VIEWER,
    ),
    **{
        f"/notecase.v1.KeyService/{method}": Right(ADMIN, operators=True)
        for method in ("CreateKey", "GetKey", "ListKeys", "RevokeKey", "RotateKey")
    },
    **{
        f"/notecase.v1.TenantService/{method}Tenant{'s' if method == 'List' else ''}": Right(OPERATOR)
        for method in ("Create", "Get", "List", "Suspend", "Resume", "Delete", "Export")
    },
    "/notecase.v1.AuditService/GetPrincipal": Right(DEVELOPER, operators=True, bound=True),
    "/notecase.v1.AuditService/ListAuditEntries": Right(ADMIN, operators=True),
    **_service("BlobService", UploadBlob=USER, DownloadBlob=VIEWER, GetUpload=VIEWER, GetBlob=VIEWER),
    **{
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo": Right(VIEWER, operators=True)
        for version in ("v1", "v1alpha")
    },
}
"""By the method's path. Health is not here: it needs no credential."""

UNBOUND = (
    "/notecase.v1.AgentService/",
    "/notecase.v1.AuditService/ListAuditEntries",
    "/notecase.v1.KeyService/",
    "/notecase.v1.TenantService/",
    "/notecase.v1.SessionService/EraseUser",
    "/notecase.v1.SessionService/ImportSession",
)
"""How the methods begin that are not for principals that are bound to a user, whatever their role."""

UNKNOWN = Right(ADMIN)
"""Holds for a method without a row."""

LABELS = DEVELOPER
APP_STATE = DEVELOPER
RUN_SETTINGS = DEVELOPER
"""Roles that may set labels, change the state of the whole tenant, and set how one run differs from its agent."""


def has(role: Role, least: Role) -> bool:
    """Returns whether a role has the rights of another one. An operator has only its own."""
    return role is least if OPERATOR in (role, least) else role >= least


def leaves_traces(method: str) -> bool:
    """Returns whether the effects of a method name its principal, which those of reads do not."""
    return METHODS.get(method, UNKNOWN).least is not VIEWER


def approver(principal: Principal) -> v1.Tool.Approver.ValueType:
    """Returns as which approver a principal counts that may call the methods by which approvals are answered."""
    if principal.user:
        return v1.Tool.APPROVER_USER
    return _APPROVERS.get(principal.role, v1.Tool.APPROVER_UNSPECIFIED)


_APPROVERS = {DEVELOPER: v1.Tool.APPROVER_DEVELOPER, ADMIN: v1.Tool.APPROVER_ADMIN}


def refusal(principal: Principal, method: str) -> NotecaseError | None:
    """Returns the error ROLE_MISSING if the principal may not call the method."""
    right = METHODS.get(method, UNKNOWN)
    if principal.user and (method not in METHODS or method.startswith(UNBOUND)):
        return errors.bound_to_user(right.least.name)
    if has(principal.role, right.least) or (right.bound and principal.user):
        return None
    if principal.role is OPERATOR:
        return None if right.operators else errors.tenant_needed(right.least.name)
    return errors.role_missing(right.least.name)

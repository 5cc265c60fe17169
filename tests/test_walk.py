"""The walk: every method by every role, on what is the caller's own, another user's and another tenant's. A method
without a row fails it.

One server carries out all of it. What a caller may not do changes nothing, which is seen by reading everything before
and after.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any, NamedTuple

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2
from notecase import v1
from notecase_server.auth import rights
from notecase_server.auth.keys import Keys
from notecase_server.auth.principal import Role
from notecase_server.rpc.server import SERVICES
from notecase_server.serve import now
from notecase_server.serve_stores import open_store

from tests.support import postgres, raw
from tests.support.server import Running, running

TENANTS = [Role.VIEWER, Role.USER, Role.DEVELOPER, Role.ADMIN]
MARK = "acme-only"
"""Stands in everything of the tenant `acme`, and in nothing that another tenant may read."""

ADA, EVE = "users/ada", "users/eve"

Metadata = dict[str, str]
Frames = Message | Sequence[Message]


class Case(NamedTuple):
    """What is there for one call: each by its name."""

    agent: str
    session: str
    run: str
    message: str
    user: str
    blob: str
    upload_id: str
    key: str
    principal: str
    """One that is bound to the user."""
    file: bytes
    """The session, exported without its content."""
    spare: str
    """An id that nothing has."""


class Row(NamedTuple):
    """A method, as the walk calls it."""

    frames: Callable[[Case], Frames]
    elsewhere: str
    """The reason for which another tenant is refused that names the same; empty where it is answered, with its own."""
    operator: str = ""
    """The same of an operator, where operators may call the method."""
    stranger: str | None = None
    """The same of a caller in the tenant that is bound to another user; None where it is as for another tenant."""
    bound: str = ""
    """The same of one that is bound to the user whose all of this is."""


def text(said: str) -> v1.Message:
    return v1.Message(parts=[v1.Part(text=said)])


def start(case: Case) -> v1.StartRun:
    return v1.StartRun(session=case.session, run_id=case.spare, messages=[text("/say done")])


def imported(case: Case) -> Sequence[Message]:
    header = v1.ImportHeader(session_id=case.spare)
    return [v1.ImportSessionRequest(header=header), v1.ImportSessionRequest(chunk=case.file)]


OP = v1.StateOp(key="note", set=v1.Value(string_value="changed"))

REFLECTION = Row(lambda case: [reflection_pb2.ServerReflectionRequest(list_services="")], "")

ROWS: dict[str, Row] = {
    "ServerService/GetServerInfo": Row(lambda case: v1.GetServerInfoRequest(), ""),
    "AgentService/CreateAgent": Row(
        lambda case: v1.CreateAgentRequest(agent_id=case.spare, agent=v1.Agent(llm=v1.LlmAgent())), ""
    ),
    "AgentService/GetAgent": Row(lambda case: v1.GetAgentRequest(name=case.agent), "AGENT_NOT_FOUND"),
    "AgentService/ListAgents": Row(lambda case: v1.ListAgentsRequest(), ""),
    "AgentService/UpdateAgent": Row(
        lambda case: v1.UpdateAgentRequest(agent=v1.Agent(name=case.agent, display_name="changed")), "AGENT_NOT_FOUND"
    ),
    "AgentService/ListAgentRevisions": Row(
        lambda case: v1.ListAgentRevisionsRequest(name=case.agent), "AGENT_NOT_FOUND"
    ),
    "AgentService/DeleteAgent": Row(lambda case: v1.DeleteAgentRequest(name=case.agent), "AGENT_NOT_FOUND"),
    "SessionService/CreateSession": Row(
        lambda case: v1.CreateSessionRequest(session_id=case.spare, session=v1.Session(agent=case.agent)),
        "AGENT_NOT_FOUND",
        stranger="",
    ),
    "SessionService/GetSession": Row(lambda case: v1.GetSessionRequest(name=case.session), "SESSION_NOT_FOUND"),
    "SessionService/ListSessions": Row(lambda case: v1.ListSessionsRequest(filter=f"user = {case.user}"), ""),
    "SessionService/UpdateSession": Row(
        lambda case: v1.UpdateSessionRequest(session=v1.Session(name=case.session, display_name="changed")),
        "SESSION_NOT_FOUND",
    ),
    "SessionService/DeleteSession": Row(lambda case: v1.DeleteSessionRequest(name=case.session), "SESSION_NOT_FOUND"),
    "SessionService/CompactSession": Row(
        lambda case: v1.CompactSessionRequest(name=case.session, agent=case.agent, keep_recent=1), "SESSION_NOT_FOUND"
    ),
    "SessionService/ForkSession": Row(
        lambda case: v1.ForkSessionRequest(name=case.session, session_id=case.spare), "SESSION_NOT_FOUND"
    ),
    "SessionService/RewindSession": Row(
        lambda case: v1.RewindSessionRequest(name=case.session, to_sequence=1), "SESSION_NOT_FOUND"
    ),
    "SessionService/EraseUser": Row(lambda case: v1.EraseUserRequest(name=case.user), ""),
    "SessionService/ExportSession": Row(
        lambda case: v1.ExportSessionRequest(name=case.session, with_blobs=True), "SESSION_NOT_FOUND"
    ),
    "SessionService/ImportSession": Row(imported, "BLOB_NOT_FOUND"),
    "StateService/GetState": Row(lambda case: v1.GetStateRequest(name=f"{case.session}/state"), "SESSION_NOT_FOUND"),
    "StateService/GetState, a user's": Row(
        lambda case: v1.GetStateRequest(name=f"{case.user}/state"), "", stranger="USER_NOT_FOUND"
    ),
    "StateService/GetState, the tenant's": Row(
        lambda case: v1.GetStateRequest(name="app/state"), "", stranger="ROLE_MISSING", bound="ROLE_MISSING"
    ),
    "StateService/PutState": Row(
        lambda case: v1.PutStateRequest(name=f"{case.session}/state", key="note", value=OP.set), "SESSION_NOT_FOUND"
    ),
    "StateService/PutState, a user's": Row(
        lambda case: v1.PutStateRequest(name=f"{case.user}/state", key="note", value=OP.set),
        "",
        stranger="USER_NOT_FOUND",
    ),
    "StateService/PutState, a user's, with content": Row(
        lambda case: v1.PutStateRequest(
            name=f"{case.user}/state",
            key="plan",
            value=v1.Value(blob_value=v1.Blob(name=case.blob, media_type="text/plain")),
        ),
        "BLOB_NOT_FOUND",
    ),
    "StateService/UpdateState": Row(
        lambda case: v1.UpdateStateRequest(name=f"{case.session}/state", ops=[OP]), "SESSION_NOT_FOUND"
    ),
    "MessageService/ListMessages": Row(lambda case: v1.ListMessagesRequest(parent=case.session), "SESSION_NOT_FOUND"),
    "MessageService/GetMessage": Row(lambda case: v1.GetMessageRequest(name=case.message), "SESSION_NOT_FOUND"),
    "MessageService/AppendMessages": Row(
        lambda case: v1.AppendMessagesRequest(parent=case.session, messages=[text("Hello.")]), "SESSION_NOT_FOUND"
    ),
    "RunService/Run": Row(lambda case: [v1.RunRequest(start=start(case))], "SESSION_NOT_FOUND"),
    "RunService/Run, attached": Row(
        lambda case: [v1.RunRequest(attach=v1.AttachRun(name=case.run, after_sequence=0))], "SESSION_NOT_FOUND"
    ),
    "RunService/Run, a new session": Row(
        lambda case: [
            v1.RunRequest(
                start=v1.StartRun(
                    new_session=v1.Session(name=f"sessions/{case.spare}", agent=case.agent),
                    messages=[text("/say done")],
                )
            )
        ],
        "AGENT_NOT_FOUND",
        stranger="",
    ),
    "RunService/Invoke": Row(lambda case: v1.InvokeRequest(start=start(case)), "SESSION_NOT_FOUND"),
    "RunService/CreateRun": Row(lambda case: v1.CreateRunRequest(start=start(case)), "SESSION_NOT_FOUND"),
    "RunService/GetRun": Row(lambda case: v1.GetRunRequest(name=case.run), "SESSION_NOT_FOUND"),
    "RunService/ListRuns": Row(lambda case: v1.ListRunsRequest(parent=case.session), "SESSION_NOT_FOUND"),
    "RunService/ListRuns, of all sessions": Row(lambda case: v1.ListRunsRequest(parent="sessions/-"), ""),
    "RunService/WaitRun": Row(lambda case: v1.WaitRunRequest(name=case.run), "SESSION_NOT_FOUND"),
    "RunService/CancelRun": Row(
        lambda case: v1.CancelRunRequest(name=f"{case.session}/runs/{case.spare}", allow_missing=True),
        "SESSION_NOT_FOUND",
    ),
    "RunService/SendCommand": Row(
        lambda case: v1.SendCommandRequest(
            session=case.session, command=v1.RunRequest(update_state=v1.StateUpdate(ops=[OP]))
        ),
        "SESSION_NOT_FOUND",
    ),
    "RunService/WatchEvents": Row(
        lambda case: v1.WatchEventsRequest(name=case.session, after_sequence=0), "SESSION_NOT_FOUND"
    ),
    "KeyService/CreateKey": Row(
        lambda case: v1.CreateKeyRequest(key=v1.Key(role=v1.Key.ROLE_USER)), "", "INVALID_FIELD"
    ),
    "KeyService/GetKey": Row(lambda case: v1.GetKeyRequest(name=case.key), "KEY_NOT_FOUND", "KEY_NOT_FOUND"),
    "KeyService/ListKeys": Row(lambda case: v1.ListKeysRequest(), ""),
    "KeyService/RevokeKey": Row(lambda case: v1.RevokeKeyRequest(name=case.key), "KEY_NOT_FOUND", "KEY_NOT_FOUND"),
    "KeyService/RotateKey": Row(lambda case: v1.RotateKeyRequest(name=case.key), "KEY_NOT_FOUND", "KEY_NOT_FOUND"),
    "AuditService/GetPrincipal": Row(
        lambda case: v1.GetPrincipalRequest(name=case.principal), "PRINCIPAL_NOT_FOUND", "PRINCIPAL_NOT_FOUND"
    ),
    "AuditService/ListAuditEntries": Row(lambda case: v1.ListAuditEntriesRequest(), ""),
    "TenantService/CreateTenant": Row(lambda case: v1.CreateTenantRequest(tenant_id=case.spare), ""),
    "TenantService/GetTenant": Row(lambda case: v1.GetTenantRequest(name="tenants/acme"), ""),
    "TenantService/ListTenants": Row(lambda case: v1.ListTenantsRequest(), ""),
    "TenantService/SuspendTenant": Row(
        lambda case: v1.SuspendTenantRequest(name=f"tenants/{case.spare}"), "", "TENANT_NOT_FOUND"
    ),
    "TenantService/ResumeTenant": Row(
        lambda case: v1.ResumeTenantRequest(name=f"tenants/{case.spare}"), "", "TENANT_NOT_FOUND"
    ),
    "TenantService/DeleteTenant": Row(
        lambda case: v1.DeleteTenantRequest(name=f"tenants/{case.spare}"), "", "TENANT_NOT_FOUND"
    ),
    "TenantService/ExportTenant": Row(
        lambda case: v1.ExportTenantRequest(name=f"tenants/{case.spare}"), "", "TENANT_NOT_FOUND"
    ),
    "BlobService/UploadBlob": Row(
        lambda case: [v1.UploadBlobRequest(blob=v1.Blob(name=case.blob, media_type="text/plain"))], "BLOB_CORRUPT"
    ),
    "BlobService/DownloadBlob": Row(lambda case: v1.DownloadBlobRequest(name=case.blob), "BLOB_NOT_FOUND"),
    "BlobService/GetUpload": Row(
        lambda case: v1.GetUploadRequest(upload_id=case.upload_id), "BLOB_NOT_FOUND", bound="BLOB_NOT_FOUND"
    ),
    "BlobService/GetBlob": Row(lambda case: v1.GetBlobRequest(name=case.blob), "BLOB_NOT_FOUND"),
}
"""By the method, and what of it."""

PATHS = {name: f"notecase.v1.{name.partition(',')[0]}" for name in ROWS}
ALL = {
    **{name: (PATHS[name], row) for name, row in ROWS.items()},
    **{path: (path, REFLECTION) for path in (raw.REFLECTION, raw.REFLECTION.replace("v1.", "v1alpha."))},
}


def test_every_method_has_a_row() -> None:
    """But for health, which anybody may ask."""
    methods = {path for path in raw.METHODS if not path.startswith("grpc.health.")}
    assert methods == {path for path, _ in ALL.values()}


def test_a_right_follows_from_what_a_method_does() -> None:
    """Readers are viewers and writers users, but for what is named here: the table of rights, said in another way."""
    higher = {
        **{f"AgentService/{name}Agent": Role.DEVELOPER for name in ("Create", "Update", "Delete")},
        "SessionService/ExportSession": Role.DEVELOPER,
        "SessionService/ImportSession": Role.DEVELOPER,
        "SessionService/EraseUser": Role.ADMIN,
        "AuditService/GetPrincipal": Role.DEVELOPER,
        "AuditService/ListAuditEntries": Role.ADMIN,
        **{f"KeyService/{name}": Role.ADMIN for name in ("CreateKey", "GetKey", "ListKeys", "RevokeKey", "RotateKey")},
    }
    pool, found = descriptor_pool.Default(), {}
    for service in SERVICES:
        for method in pool.FindServiceByName(f"notecase.v1.{service}").methods:
            reads = method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
            usual = Role.VIEWER if reads else Role.USER
            if service == "TenantService":
                usual = Role.OPERATOR
            found[f"/notecase.v1.{service}/{method.name}"] = higher.get(f"{service}/{method.name}", usual)
    assert found == {path: right.least for path, right in rights.METHODS.items() if path in found}


class Walk:
    """A server with two tenants, with a key of each role in both, and an operator's."""

    def __init__(self, served: Running, keys: Keys) -> None:
        self.served = served
        self.keys = keys
        self.callers: dict[tuple[str, Role], Metadata] = {}
        self.bound: dict[tuple[str, Role], Metadata] = {}
        """In acme, those that are bound to a user."""
        self._numbers = count()

    async def hire(self) -> None:
        for tenant in ("acme", "other"):
            for role in TENANTS:
                key = v1.Key(display_name=MARK if tenant == "acme" else "", role=v1.Key.Role.Value(f"ROLE_{role.name}"))
                await self._hire(tenant, role, key)
        await self._hire("", Role.OPERATOR, v1.Key(role=v1.Key.ROLE_OPERATOR))
        for user in (ADA, EVE):
            for role in (Role.VIEWER, Role.USER):
                key = v1.Key(display_name=MARK, role=v1.Key.Role.Value(f"ROLE_{role.name}"), user=user)
                self.bound[user, role] = await self._made("acme", key)

    async def _hire(self, tenant: str, role: Role, key: v1.Key) -> None:
        self.callers[tenant, role] = await self._made(tenant, key)

    async def _made(self, tenant: str, key: v1.Key) -> Metadata:
        _, secret = await self.keys.create(tenant, key)
        return {"authorization": f"Bearer {secret}"}

    async def call(self, name: str, case: Case, metadata: Metadata) -> raw.Outcome:
        path, row = ALL[name]
        frames = row.frames(case)
        sent = [frames] if isinstance(frames, Message) else frames
        bodies = [frame.SerializeToString() for frame in sent]
        while (outcome := await raw.call(self.served.channel, path, bodies, metadata=metadata)).cut:
            assert raw.LOST == outcome.message  # of a stream that was refused while its frame was written
        return outcome

    async def case(self) -> Case:
        """Something of acme's for one call: all of it new."""
        on, by = self.served, tuple(self.callers["acme", Role.ADMIN].items())
        number = next(self._numbers)
        content = f"{MARK} {number}".encode()
        upload = v1.UploadBlobRequest(
            blob=v1.Blob(media_type="text/plain"), chunk=content, last=True, upload_id=f"upload-{number}"
        )
        blob = await on.blobs.UploadBlob(iter([upload]), metadata=by)
        assert blob.name == f"blobs/{hashlib.sha256(content).hexdigest()}"
        llm = v1.LlmAgent(instruction=MARK)
        agent = await on.agents.CreateAgent(
            v1.CreateAgentRequest(agent_id=f"agent-{number}", agent=v1.Agent(display_name=MARK, llm=llm)), metadata=by
        )
        new = v1.Session(
            name=f"sessions/session-{number}", agent=agent.name, user=ADA, display_name=MARK, labels={"team": MARK}
        )
        said = v1.Message(parts=[v1.Part(text=f"/say {MARK}"), v1.Part(blob=blob)])
        first = v1.StartRun(new_session=new, run_id="first", messages=[said])
        first.state["note"].string_value = MARK
        done = await on.runs.Invoke(v1.InvokeRequest(start=first), metadata=by)
        assert v1.Run.STATE_SUCCEEDED == done.run.state
        for name in (f"{ADA}/state", "app/state"):
            request = v1.PutStateRequest(name=name, key="note", value=v1.Value(string_value=MARK))
            await on.state.PutState(request, metadata=by)
        key, _ = await self.keys.create("acme", v1.Key(display_name=MARK, role=v1.Key.ROLE_USER))
        export = on.sessions.ExportSession(v1.ExportSessionRequest(name=new.name), metadata=by)
        file = b"".join([response.chunk async for response in export])
        ada = tuple(self.bound[ADA, Role.USER].items())
        await on.messages.AppendMessages(
            v1.AppendMessagesRequest(parent=new.name, messages=[text("Me.")]), metadata=ada
        )
        watch = v1.WatchEventsRequest(name=new.name, after_sequence=0)
        events = [each async for frame in on.runs.WatchEvents(watch, metadata=by) for each in frame.batch.events]
        return Case(
            *(agent.name, new.name, done.run.name, done.reply.name, ADA, blob.name, upload.upload_id, key.name),
            principal=events[-1].principal,
            file=file,
            spare=f"spare-{number}",
        )

    async def world(self) -> list[str]:
        """All that acme has, as text, but for what the walk's callers make for themselves."""
        on, by = self.served, tuple(self.callers["acme", Role.ADMIN].items())
        listed = await on.sessions.ListSessions(v1.ListSessionsRequest(page_size=1000), metadata=by)
        sessions = [session for session in listed.sessions if session.user != EVE]
        runs = await on.runs.ListRuns(v1.ListRunsRequest(parent="sessions/-", page_size=1000), metadata=by)
        found: list[Any] = [
            *sessions,
            *(await on.agents.ListAgents(v1.ListAgentsRequest(page_size=1000), metadata=by)).agents,
            *[run for run in runs.runs if "/spare-" not in run.name],
            *(await on.keys.ListKeys(v1.ListKeysRequest(page_size=1000), metadata=by)).keys,
            await on.state.GetState(v1.GetStateRequest(name="app/state"), metadata=by),
        ]
        for session in sessions:
            found.append(await on.state.GetState(v1.GetStateRequest(name=f"{session.user}/state"), metadata=by))
            found += [
                response
                async for response in on.sessions.ExportSession(
                    v1.ExportSessionRequest(name=session.name, with_blobs=True), metadata=by
                )
            ]
        return [str(each) for each in found]


@asynccontextmanager
async def walking(url: str) -> AsyncIterator[Walk]:
    store = await open_store(url, now)
    async with running(store, authenticators=(), auth="keys") as served:
        walk = Walk(served, served.server._keys)
        await walk.hire()
        yield walk


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def walk(request: pytest.FixtureRequest, tmp_path: Any) -> AsyncIterator[Walk]:
    async with AsyncExitStack() as stack:
        url = "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"
        if request.param == "postgresql":
            url = await stack.enter_async_context(postgres.shared().empty_store())
        yield await stack.enter_async_context(walking(url))


UNBOUND = {
    *("AgentService", "KeyService", "TenantService"),
    *("AuditService/ListAuditEntries", "SessionService/EraseUser", "SessionService/ImportSession"),
}
"""Services and methods that are not for callers that are bound to a user."""


def expected(name: str, role: Role, bound: bool = False) -> str:
    """The reason for which a role is refused; empty where it may call the method."""
    path, _ = ALL[name]
    method = path.removeprefix("notecase.v1.")
    if bound and {method, method.partition("/")[0]} & UNBOUND:
        return "ROLE_MISSING"
    right = rights.METHODS[f"/{path}"]
    if bound and right.bound:
        return ""
    if role is Role.OPERATOR:
        return "" if right.operators or right.least is role else "ROLE_MISSING"
    return "" if role >= right.least else "ROLE_MISSING"


async def test_what_a_caller_may_not_do_is_refused_and_changes_nothing(walk: Walk) -> None:
    """Without a credential, with a role that is too low, of another tenant and bound to another user. Their answers
    contain nothing of the named resources."""
    case = await walk.case()
    before, wrong, spare = await walk.world(), list[str](), count()
    for name, (_, row) in ALL.items():
        asked: list[tuple[str, Metadata, str]] = [("nobody", {}, "UNAUTHENTICATED")]
        for (tenant, role), metadata in walk.callers.items():
            reason = expected(name, role)
            if tenant != "acme" or reason:  # else it is its own, which it may change
                allowed = row.elsewhere if tenant else row.operator
                asked.append((f"{tenant} {role.name}", metadata, reason or allowed))
        for role in (Role.VIEWER, Role.USER):
            stranger = row.elsewhere if row.stranger is None else row.stranger
            reason = expected(name, role, bound=True) or stranger
            asked.append((f"acme {role.name} bound to eve", walk.bound[EVE, role], reason))
        for who, metadata, reason in asked:
            outcome = await walk.call(name, case._replace(spare=f"spare-of-{next(spare)}"), metadata)
            if outcome.reason != reason:
                wrong.append(f"{name} by {who}: {outcome.reason or outcome.code}, not {reason or 'OK'}")
            if MARK.encode() in b"".join(outcome.answers):
                wrong.append(f"{name} by {who}: is told what is acme's")
    assert [] == wrong
    assert before == await walk.world()


async def test_what_a_caller_may_do_is_done(walk: Walk) -> None:
    wrong = []
    for name in ALL:
        for role in TENANTS:
            if expected(name, role):
                continue
            outcome = await walk.call(name, await walk.case(), walk.callers["acme", role])
            if outcome.code.name != "OK":
                wrong.append(f"{name} by {role.name}: {outcome.reason or outcome.code} {outcome.message}")
        for role in (Role.VIEWER, Role.USER):
            reason = expected(name, role, bound=True) or ALL[name][1].bound
            outcome = await walk.call(name, await walk.case(), walk.bound[ADA, role])
            if outcome.reason != reason:
                wrong.append(f"{name} by {role.name}, bound: {outcome.reason or outcome.code} {outcome.message}")
    assert [] == wrong

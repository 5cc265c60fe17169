"""Requests that a client may well send, for every method: changed a little, they come further in than what is made of
nothing."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import NULL_VALUE
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from notecase import v1

from tests.fuzz.making import Maker
from tests.hostile.making import export_of, spoken, varint
from tests.support import raw

INSTRUCTIONS = ("", "Be brief.", "{{ mood }} {{ user.mood }}", "{% for a in list %}{{ a }}{% endfor %}")

FILTERS = ("", "user = users/ada", "activity = IDLE", "state = WAITING", "labels.a = b OR NOT create_time < 1970")

USERS = ("users/ada", "users/bob")

SAID = (
    *("Good evening.", "/say hello", "/call lens {}", "/call knock {}", "/call lens {} /call knock {} /say both"),
    *('/call ask_user {"question":"Who?"}', "/call nobody {}", "/refuse no", "/fail error", "/chunks 30", "/pause 20"),
    *("/pause 20000 /say late", "/stop length /say cut", "/dialect gemini /call lens {}", "/reason because /say so"),
)

PARTS: Sequence[Callable[[Maker], v1.Part]] = (
    lambda make: v1.Part(text=make.chance.choice(SAID)),
    lambda make: v1.Part(text=make.chance.choice(SAID)),
    lambda make: v1.Part(json='{"a":[1,2]}'),
    lambda make: v1.Part(data=v1.InlineData(data=b"pixels", media_type="image/png", filename="a.png")),
    lambda make: v1.Part(file=v1.FileUri(uri="https://example.org/a.png", media_type="image/png")),
    lambda make: v1.Part(state_key="mood"),
    lambda make: v1.Part(blob=v1.Blob(name=blob(make), media_type="image/png", size_bytes=6)),
)

TOOLS = (
    v1.Tool(name="knock", client=v1.ClientTool(), parameters='{"type":"object"}'),
    v1.Tool(name="knock", client=v1.ClientTool(), requires_approval=True),
    v1.Tool(name="lens", server=v1.ServerTool(function="lens")),
    v1.Tool(name="lens", server=v1.ServerTool(function="lens"), requires_approval=True),
    v1.Tool(name="ask_user", server=v1.ServerTool(function="ask_user")),
)


def value(make: Maker) -> v1.Value:
    return make.chance.choice(
        (
            v1.Value(null_value=NULL_VALUE),
            v1.Value(bool_value=True),
            v1.Value(int_value=(1 << 63) - 1),
            v1.Value(double_value=0.5),
            v1.Value(string_value="wary"),
            v1.Value(bytes_value=b"\0\xff"),
            v1.Value(list_value=v1.ValueList(values=[v1.Value(int_value=1), v1.Value(string_value="x")])),
            v1.Value(map_value=v1.ValueMap(values={"k": v1.Value(list_value=v1.ValueList())})),
        )
    )


def message(make: Maker) -> v1.Message:
    parts = [make.chance.choice(PARTS)(make) for _ in range(make.chance.choice((1, 1, 1, 3)))]
    return v1.Message(parts=parts)


def op(make: Maker) -> v1.StateOp:
    key = make.chance.choice(("mood", "n", "list", "k\0y"))
    return make.chance.choice(
        (
            v1.StateOp(key=key, set=value(make)),
            v1.StateOp(key="n", increment=make.chance.choice((1, -1, 1 << 62))),
            v1.StateOp(key="list", append=value(make)),
            v1.StateOp(key=key, set=value(make), if_version=make.chance.choice((0, 1, 2))),
        )
    )


def ops(make: Maker) -> list[v1.StateOp]:
    return list({each.key: each for each in (op(make) for _ in range(3))}.values())


def state(make: Maker) -> str:
    return make.chance.choice((f"{session(make)}/state", f"{make.chance.choice(USERS)}/state", "app/state"))


def session(make: Maker) -> str:
    return one(make, "sessions/none", lambda name: name.startswith("sessions/") and name.count("/") == 1)


def agent(make: Maker) -> str:
    return one(make, "agents/none", lambda name: name.startswith("agents/"))


def run(make: Maker) -> str:
    return one(make, "sessions/none/runs/none", lambda name: "/runs/" in name)


def message_name(make: Maker) -> str:
    return one(make, "sessions/none/messages/none", lambda name: "/messages/" in name)


def blob(make: Maker) -> str:
    return one(make, f"blobs/{'0' * 64}", lambda name: name.startswith("blobs/"))


def key(make: Maker) -> str:
    return one(make, "keys/none", lambda name: name.startswith("keys/"))


def one(make: Maker, none: str, fits: Callable[[str], bool]) -> str:
    """A name that the server said lately."""
    return make.chance.choice(list(filter(fits, make.world.known("name")))[-8:] or [none])


def token(make: Maker) -> str:
    return make.chance.choice(["", *make.world.known("page_token")])


def llm(make: Maker) -> v1.LlmAgent:
    some = make.chance.sample(TOOLS, make.chance.choice((0, 1, 2)))
    made = v1.LlmAgent(
        provider="offline",
        instruction=make.chance.choice(INSTRUCTIONS),
        tools={tool.name: tool for tool in some}.values(),
        output_schema=make.chance.choice(("", "", '{"type":"object","properties":{"a":{"type":"string"}}}')),
    )
    if make.chance.random() < 0.2:
        made.context.max_messages = 3
    return made


def start(make: Maker) -> v1.StartRun:
    made = v1.StartRun(messages=[message(make)], on_busy=make.chance.choice(v1.StartRun.OnBusy.values()))
    if make.chance.random() < 0.5:
        made.session = session(make)
        if make.chance.random() < 0.3:
            made.agent = agent(make)
    else:
        made.new_session.agent, made.new_session.user = agent(make), make.chance.choice(USERS)
        made.state["mood"].CopyFrom(value(make))
    if make.chance.random() < 0.2:
        made.run_id = make.chance.choice("rst")
    if make.chance.random() < 0.2:
        made.client_tools.append(TOOLS[0])
    if make.chance.random() < 0.2:
        made.limits.CopyFrom(v1.Limits(timeout=Duration(nanos=50_000_000), max_model_calls=3))
    return made


def command(make: Maker) -> v1.RunRequest:
    call_id, when = make.text("call_id"), make.chance.choice(v1.UserInput.When.values())
    response = v1.InputResponse(
        input_id=make.text("input_id"),
        decision=make.chance.choice(v1.InputResponse.Decision.values()),
        remember=make.chance.choice(v1.InputResponse.Remember.values()),
    )
    if response.decision == v1.InputResponse.DECISION_ANSWER:
        response.answer = "The butler."
    made = make.chance.choice(
        (
            v1.RunRequest(input=v1.UserInput(messages=[message(make)], when=when)),
            v1.RunRequest(tool_result=v1.ToolResult(call_id=call_id, result=[v1.Part(text="seen")])),
            v1.RunRequest(tool_result=v1.ToolResult(call_id=call_id, error="nobody there")),
            v1.RunRequest(input_response=response),
            v1.RunRequest(input_response=response),
            v1.RunRequest(update_state=v1.StateUpdate(ops=ops(make))),
            v1.RunRequest(cancel=v1.CancelCommand(mode=make.chance.choice(v1.CancelCommand.Mode.values()))),
            v1.RunRequest(start=start(make)),
        )
    )
    made.command_id = make.chance.choice(("", "c1", "c2"))
    return made


def attach(make: Maker) -> v1.RunRequest:
    return v1.RunRequest(attach=v1.AttachRun(name=make.chance.choice((session(make), run(make)))))


def watch(make: Maker) -> v1.WatchEventsRequest:
    made = v1.WatchEventsRequest(name=make.chance.choice((session(make), run(make))))
    if make.chance.random() < 0.7:
        made.after_sequence = make.chance.choice((0, 0, 1, 3))
    made.options.keep_open = make.chance.random() < 0.2
    return made


def upload(make: Maker) -> list[Message]:
    data = make.chance.choice((b"pixels", b"", b"x" * 300_000))
    named = v1.Blob(name=f"blobs/{hashlib.sha256(data).hexdigest()}", size_bytes=len(data), media_type="image/png")
    first = v1.UploadBlobRequest(blob=named if make.chance.random() < 0.5 else None, chunk=data[:9])
    first.upload_id = make.chance.choice(("", "u1", "u2"))
    return [first, v1.UploadBlobRequest(chunk=data[9:], last=True)]


def exported(make: Maker) -> list[Message]:
    """A session's file, in which some records are changed, and which is whole by its digest nevertheless."""
    file = make.chance.choice([*make.world.files, export_of([spoken(1), spoken(2)])])
    records = list(_records(file))
    for _ in range(make.chance.choice((0, 0, 1, 2))):
        place = make.chance.randrange(len(records))
        records[place] = make.changed(records[place])  # type: ignore[call-overload]
        if make.chance.random() < 0.2:
            records.insert(make.chance.randint(0, len(records)), records[place])
    framed = [varint(len(body)) + body for body in (record.SerializeToString() for record in records)]
    whole = b"notecase" + make.chance.choice((b"\x02", b"\x02", b"\x01")) + b"".join(framed) + b"\0"
    whole += hashlib.sha256(whole).digest()
    if make.chance.random() < 0.1:
        whole = make.damaged(whole)
    header = v1.ImportSessionRequest(header=v1.ImportHeader(session_id=make.chance.choice(("", "imported"))))
    half = len(whole) // 2
    return [header, v1.ImportSessionRequest(chunk=whole[:half]), v1.ImportSessionRequest(chunk=whole[half:])]


def _records(file: bytes) -> Iterator[v1.ExportRecord]:
    """Those of a file as the server writes it."""
    at = len(b"notecase") + 1
    while file[at]:
        size = shift = 0
        while True:
            byte, at = file[at], at + 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        yield v1.ExportRecord.FromString(file[at : at + size])
        at += size


def updated_agent(make: Maker) -> v1.UpdateAgentRequest:
    changed = v1.Agent(name=agent(make), display_name="Clerk", llm=llm(make))
    paths = make.chance.choice(([], ["*"], ["llm"], ["llm.instruction", "display_name"], ["labels"]))
    return v1.UpdateAgentRequest(agent=changed, update_mask=FieldMask(paths=paths), allow_missing=True)


def updated_session(make: Maker) -> v1.UpdateSessionRequest:
    changed = v1.Session(name=session(make), display_name="Case", labels={"a": "b"}, idle_ttl=Duration(seconds=3600))
    paths = make.chance.choice(([], ["*"], ["labels"], ["idle_ttl"], ["agent"]))
    return v1.UpdateSessionRequest(session=changed, update_mask=FieldMask(paths=paths))


Frames = Callable[[Maker], Message | list[Message]]

_FRAMES: Mapping[str, Frames] = {
    "ServerService/GetServerInfo": lambda make: v1.GetServerInfoRequest(),
    "AgentService/CreateAgent": lambda make: v1.CreateAgentRequest(
        agent_id=make.chance.choice(("", "a", "b")), agent=v1.Agent(llm=llm(make), output_key="mood")
    ),
    "AgentService/GetAgent": lambda make: v1.GetAgentRequest(name=agent(make)),
    "AgentService/ListAgents": lambda make: v1.ListAgentsRequest(page_size=2, page_token=token(make)),
    "AgentService/UpdateAgent": updated_agent,
    "AgentService/ListAgentRevisions": lambda make: v1.ListAgentRevisionsRequest(name=agent(make), page_size=2),
    "AgentService/DeleteAgent": lambda make: v1.DeleteAgentRequest(name=agent(make)),
    "SessionService/CreateSession": lambda make: v1.CreateSessionRequest(
        session_id=make.chance.choice(("", "s", "t")),
        session=v1.Session(agent=agent(make), user=make.chance.choice(USERS)),
        state={"mood": value(make)},
    ),
    "SessionService/GetSession": lambda make: v1.GetSessionRequest(name=session(make)),
    "SessionService/ListSessions": lambda make: v1.ListSessionsRequest(page_size=2, filter=make.chance.choice(FILTERS)),
    "SessionService/UpdateSession": updated_session,
    "SessionService/DeleteSession": lambda make: v1.DeleteSessionRequest(name=session(make)),
    "SessionService/CompactSession": lambda make: v1.CompactSessionRequest(name=session(make), keep_recent=1),
    "SessionService/ForkSession": lambda make: v1.ForkSessionRequest(
        name=session(make), at_sequence=make.chance.choice((0, 1, 3))
    ),
    "SessionService/RewindSession": lambda make: v1.RewindSessionRequest(
        name=session(make), to_sequence=make.chance.choice((0, 1, 3))
    ),
    "SessionService/EraseUser": lambda make: v1.EraseUserRequest(name=make.chance.choice(USERS)),
    "SessionService/ExportSession": lambda make: v1.ExportSessionRequest(name=session(make), with_blobs=True),
    "SessionService/ImportSession": exported,
    "StateService/GetState": lambda make: v1.GetStateRequest(name=state(make), page_size=1),
    "StateService/PutState": lambda make: v1.PutStateRequest(name=state(make), key="mood", value=value(make)),
    "StateService/UpdateState": lambda make: v1.UpdateStateRequest(name=state(make), ops=ops(make)),
    "MessageService/ListMessages": lambda make: v1.ListMessagesRequest(parent=session(make), page_size=2),
    "MessageService/GetMessage": lambda make: v1.GetMessageRequest(name=message_name(make)),
    "MessageService/AppendMessages": lambda make: v1.AppendMessagesRequest(
        parent=session(make), messages=[message(make) for _ in range(2)]
    ),
    "RunService/Run": lambda make: [
        v1.RunRequest(start=start(make)) if make.chance.random() < 0.7 else attach(make),
        *(command(make) for _ in range(make.chance.choice((0, 1, 3)))),
    ],
    "RunService/Invoke": lambda make: v1.InvokeRequest(start=start(make), timeout=Duration(nanos=100_000_000)),
    "RunService/CreateRun": lambda make: v1.CreateRunRequest(start=start(make)),
    "RunService/GetRun": lambda make: v1.GetRunRequest(name=run(make)),
    "RunService/ListRuns": lambda make: v1.ListRunsRequest(
        parent=make.chance.choice(("sessions/-", session(make))), page_size=3, filter=make.chance.choice(FILTERS)
    ),
    "RunService/WaitRun": lambda make: v1.WaitRunRequest(name=run(make), timeout=Duration(nanos=50_000_000)),
    "RunService/CancelRun": lambda make: v1.CancelRunRequest(name=run(make), allow_missing=make.chance.random() < 0.5),
    "RunService/SendCommand": lambda make: v1.SendCommandRequest(session=session(make), command=command(make)),
    "RunService/WatchEvents": watch,
    "KeyService/CreateKey": lambda make: v1.CreateKeyRequest(key=v1.Key(display_name="ci", role=v1.Key.ROLE_USER)),
    "KeyService/GetKey": lambda make: v1.GetKeyRequest(name=key(make)),
    "KeyService/ListKeys": lambda make: v1.ListKeysRequest(page_size=2, page_token=token(make)),
    "KeyService/RevokeKey": lambda make: v1.RevokeKeyRequest(name=key(make)),
    "KeyService/RotateKey": lambda make: v1.RotateKeyRequest(name=key(make), overlap=Duration(seconds=60)),
    "AuditService/GetPrincipal": lambda make: v1.GetPrincipalRequest(name=f"principals/{key(make)[5:]}"),
    "AuditService/ListAuditEntries": lambda make: v1.ListAuditEntriesRequest(
        page_size=2, page_token=token(make), filter=make.chance.choice(FILTERS)
    ),
    "TenantService/CreateTenant": lambda make: v1.CreateTenantRequest(tenant_id=make.chance.choice(("t", "u"))),
    "TenantService/GetTenant": lambda make: v1.GetTenantRequest(name="tenants/t"),
    "TenantService/ListTenants": lambda make: v1.ListTenantsRequest(page_size=1, page_token=token(make)),
    "TenantService/SuspendTenant": lambda make: v1.SuspendTenantRequest(name="tenants/t"),
    "TenantService/ResumeTenant": lambda make: v1.ResumeTenantRequest(name="tenants/t"),
    "TenantService/DeleteTenant": lambda make: v1.DeleteTenantRequest(name="tenants/t"),
    "TenantService/ExportTenant": lambda make: v1.ExportTenantRequest(name="tenants/t", page_token=token(make)),
    "BlobService/UploadBlob": upload,
    "BlobService/DownloadBlob": lambda make: v1.DownloadBlobRequest(name=blob(make), offset=1, limit=3),
    "BlobService/GetUpload": lambda make: v1.GetUploadRequest(upload_id=make.chance.choice(("u1", "u2"))),
    "BlobService/GetBlob": lambda make: v1.GetBlobRequest(name=blob(make)),
}

FRAMES: Mapping[str, Frames] = {
    **{f"notecase.v1.{method}": frames for method, frames in _FRAMES.items()},
    "grpc.health.v1.Health/Check": lambda make: health_pb2.HealthCheckRequest(service="liveness"),
    "grpc.health.v1.Health/List": lambda make: health_pb2.HealthListRequest(),  # type: ignore[attr-defined]
    "grpc.health.v1.Health/Watch": lambda make: health_pb2.HealthCheckRequest(service=""),
    **dict.fromkeys(
        (raw.REFLECTION, raw.REFLECTION.replace("v1.", "v1alpha.")),
        lambda make: [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="notecase.v1.RunService.Run"),
        ],
    ),
}
"""By the path of the method."""

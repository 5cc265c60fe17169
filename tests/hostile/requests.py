"""The list of hostile requests: what nothing on the wire forbids, refused or accepted."""

import json
import os

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from notecase import v1

from tests.hostile.making import (
    ADA,
    ALBUM,
    ARMED,
    BIG,
    BRIEF,
    CASE,
    CLERK,
    EYES,
    INT32_MAX,
    INT64_MAX,
    LONG,
    LOOPER,
    NESTED,
    PARTS,
    SEED,
    agent,
    append,
    changed,
    deep,
    doubling_references,
    empties,
    endless,
    export_of,
    file,
    imported,
    inline,
    integer,
    invoke,
    labelled,
    large_object,
    new_id,
    new_session,
    parts,
    picture_name,
    put,
    said,
    spoken,
    template,
    text,
    tools,
    update,
    upload,
    wide_list,
    wide_map,
    wire,
)
from tests.hostile.row import INVALID, KIB, MIB, Hostile, accepted, flood, refused
from tests.support import raw

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
FAILED = grpc.StatusCode.FAILED_PRECONDITION

PUT, UPDATE, STATE = "StateService/PutState", "StateService/UpdateState", "StateService/GetState"
APPEND, CREATE = "MessageService/AppendMessages", "SessionService/CreateSession"
AGENT, CHANGE = "AgentService/CreateAgent", "AgentService/UpdateAgent"
SESSIONS, RUNS = "SessionService/ListSessions", "RunService/ListRuns"
INVOKE, COMMAND, IMPORT = "RunService/Invoke", "RunService/SendCommand", "SessionService/ImportSession"

LLM = v1.Agent.DESCRIPTOR.fields_by_name["llm"].number
TOOL = wire(v1.LlmAgent.DESCRIPTOR.fields_by_name["tools"].number, b"")
CLIENT_TOOL = wire(v1.StartRun.DESCRIPTOR.fields_by_name["client_tools"].number, b"")

VALUES = {
    "2,000,000 empty values in a start": flood(
        INVOKE,
        lambda: wire(1, wire(3, wire(1, b"k") + wire(2, empties(2 * MIB - 64)))),
        steps=30,
        violations=3,
        handovers=0,
    ),
    "100,000 keys in a start": flood(
        INVOKE, lambda: invoke(state={f"k{n}": integer(1) for n in range(100_000)}), steps=30, handovers=0
    ),
    "500,000 empty values in 1 MiB": flood(
        PUT, lambda: put(v1.Value.FromString(empties(MIB // 2 - 64))), steps=10, violations=1, handovers=0
    ),
    "a list of 10,000 values": accepted(PUT, lambda: put(wide_list(9_998))),
    "a map of 10,000 keys": accepted(PUT, lambda: put(wide_map(9_998))),
    "a map of 10,000 values that are not numbers": refused(
        PUT, lambda: put(wide_map(9_998, v1.Value(double_value=float("nan")))), steps=1000, handovers=0
    ),
    "lists of lists, 5,000 in all": accepted(PUT, lambda: put(wide_list(70, wide_list(70, wide_list(0))))),
    "17 levels": accepted(PUT, lambda: put(deep(16))),
    "40 levels": refused(PUT, lambda: put(deep(40)), steps=100, violations=1),
    "10,000 levels": refused(PUT, lambda: wire(3, endless(10_000)), steps=0),
    "text of more than 1 MiB": refused(
        PUT, lambda: put(text("x" * (MIB + 100)), request_id="text"), steps=10, violations=1, handovers=0, bytes=0
    ),
    "text of nearly 1 MiB, with a request_id": accepted(PUT, lambda: put(text("x" * (MIB - 100)), request_id=new_id())),
    "a frame of 4 MiB where no message is said": Hostile(
        PUT, lambda: [put(text("x" * (4 * MIB - 100)))], EXHAUSTED, "PAYLOAD_TOO_LARGE", {"steps": 0, "handovers": 0}
    ),
    "a frame of 5 MiB": Hostile(
        APPEND, lambda: [append([said("x" * (5 * MIB))])], EXHAUSTED, "PAYLOAD_TOO_LARGE", {"steps": 0, "handovers": 0}
    ),
    "a key of 256 bytes of emoji": accepted(PUT, lambda: put(integer(1), "🔎" * 64)),
    "a key of 1 MiB": refused(PUT, lambda: put(integer(1), "k" * MIB), steps=10),
    "U+0000 in key and text": accepted(PUT, lambda: put(text("a\0b"), "k\0y")),
    "text that is not UTF-8": refused(PUT, lambda: wire(1, b"\xff\xfe" * (MIB // 2)), steps=0),
    "1,000 operations": accepted(
        UPDATE, lambda: update(v1.StateOp(key=f"o{n}", increment=1) for n in range(1000)), statements=2500
    ),
    "1,000 operations that say nothing": refused(UPDATE, lambda: update([v1.StateOp()] * 1000), steps=200),
    "200,000 operations": flood(UPDATE, lambda: update([v1.StateOp(key="k")] * 200_000), steps=10, violations=1),
    "increments of text, and beyond 64 bits": Hostile(
        UPDATE,
        lambda: [update([v1.StateOp(key="seed", increment=INT64_MAX), v1.StateOp(key="n", increment=-INT64_MAX - 1)])],
        FAILED,
        "STATE_TYPE_MISMATCH",
    ),
    "10,000 keys, one page of them": accepted(STATE, lambda: v1.GetStateRequest(name=f"{BIG}/state", page_size=1000)),
    "10,000 keys as they were": accepted(
        STATE, lambda: v1.GetStateRequest(name=f"{BIG}/state", at_sequence=10, page_size=1000), calls=100_000
    ),
    "100,000 keys asked for": refused(
        STATE, lambda: v1.GetStateRequest(name=f"{BIG}/state", keys=[f"k{n}" for n in range(100_000)]), steps=10
    ),
    "1,000 keys of 1 KiB asked for": accepted(
        STATE,
        lambda: v1.GetStateRequest(name=f"{BIG}/state", keys=[f"{n}" * 300 for n in range(1000)]),
        statements=1100,
    ),
    "a user's state, with many watchers": accepted(PUT, lambda: put(integer(1), name=f"{ADA}/state")),
    "1 MiB of the tenant's state, with many watchers": accepted(
        UPDATE,
        lambda: update((v1.StateOp(key=f"o{n}", set=text("x" * 900)) for n in range(1000)), "app/state"),
        statements=3500,
    ),
}

MESSAGES = {
    "100 messages of 20 parts": accepted(APPEND, lambda: append([parts(20)] * 100), statements=150),
    "100 messages of 1,000 parts": refused(APPEND, lambda: append([parts(1000)] * 100), steps=10, violations=1),
    "10,000 messages": refused(APPEND, lambda: append([said("x")] * 10_000), steps=10, violations=1),
    "1,000,000 empty messages": flood(
        APPEND, lambda: append([]).SerializeToString() + b"\x12\x00" * 1_000_000, steps=10, violations=1
    ),
    "2,000 files": accepted(APPEND, lambda: append([parts(1000, file(20))] * 2), calls=25_000),
    "2,000 files with long names": accepted(
        APPEND, lambda: append([parts(500, file(800))] * 4, request_id=new_id()), calls=25_000
    ),
    "100 messages without parts": refused(APPEND, lambda: append([v1.Message()] * 100), steps=700),
    "bad labels in 15 messages": refused(
        APPEND, lambda: append([v1.Message(labels={f"!{n}": "x" * 300 for n in range(64)})] * 15), steps=200
    ),
    "100 messages with 10 labels": accepted(APPEND, lambda: append([labelled(10)] * 100), statements=150),
    "100 messages with 64 labels": refused(APPEND, lambda: append([labelled(64)] * 100), steps=10, violations=1),
    "a message of 100 pieces of content": accepted(
        APPEND,
        lambda: append([v1.Message(parts=[inline(b"%d" % n) for n in range(100)])]),
        handovers=120,
        writes=110,
        statements=1000,
    ),
    "a message of 1,000 pieces of content": refused(
        APPEND, lambda: append([v1.Message(parts=[inline(b"%d" % n) for n in range(1000)])]), steps=20, violations=1
    ),
    "an author of 4 MiB": refused(
        APPEND, lambda: append([v1.Message(author="é" * (2 * MIB - 200), parts=[v1.Part(text="x")])]), steps=10
    ),
    "a message of 1,000 keys of state": refused(
        APPEND, lambda: append([parts(1000, v1.Part(state_key="seed"))]), steps=20, violations=1
    ),
    "inline data of 4 MiB": accepted(
        APPEND,
        lambda: append([v1.Message(parts=[inline(os.urandom(4 * MIB - 200))])], request_id=new_id()),
        statements=60,
    ),
    "text of 4 MiB": accepted(APPEND, lambda: append([said(f"{new_id()} {'é' * (2 * MIB - 200)}")]), statements=60),
    "JSON of 4 MiB": accepted(
        APPEND, lambda: append([parts(1, v1.Part(json=large_object(4 * MIB - 200)))]), statements=60
    ),
    "JSON of 250,000 levels": refused(APPEND, lambda: append([parts(1, v1.Part(json="[" * 250_000 + "]" * 250_000))])),
    "a page of 1,000 messages": accepted(
        "MessageService/ListMessages", lambda: v1.ListMessagesRequest(parent=BIG, page_size=1000)
    ),
}

AGENTS = {
    "a template of 64 KiB of text": accepted(AGENT, lambda: template("x" * 64 * KIB)),
    "a template of as many outputs as it may have": accepted(AGENT, lambda: template("{{ user.name }}" * 400)),
    "a template of as many tags as it may have": accepted(AGENT, lambda: template("{% if a %}{% endif %}" * 280)),
    "a template of 300 filters": accepted(AGENT, lambda: template("{{ a " + "| append: b " * 300 + "}}")),
    "a template of 12,000 outputs": refused(AGENT, lambda: template("{{a}}" * 12_000), "TEMPLATE_ERROR"),
    "a template of 64 KiB of open tags": refused(AGENT, lambda: template("{%" * 32 * KIB), "TEMPLATE_ERROR"),
    "a template of brackets": refused(AGENT, lambda: template("{{ a" + "[" * 30_000), "TEMPLATE_ERROR"),
    "a template of 3,000 blocks within each other": refused(
        AGENT, lambda: template("{% if a %}" * 3000 + "{% endif %}" * 3000), "TEMPLATE_ERROR"
    ),
    "a template of nearly 1 MiB": refused(AGENT, lambda: template("{{a}}" * 200_000), "TEMPLATE_ERROR"),
    "a template that takes more work than it may": accepted(INVOKE, lambda: invoke(LOOPER, state=SEED)),
    "a template of loops that come to nothing": accepted(INVOKE, lambda: invoke(NESTED, state=SEED)),
    "a schema of references that double": accepted(AGENT, lambda: agent(output_schema=doubling_references(40))),
    "a schema of a pattern that backtracks": accepted(
        AGENT, lambda: agent(output_schema=json.dumps({"type": "string", "pattern": "^(a+)+$" * 20}))
    ),
    "a schema of 64 KiB of lists": accepted(AGENT, lambda: agent(output_schema=large_object(64 * KIB))),
    "a schema of nearly 1 MiB": refused(AGENT, lambda: agent(output_schema=large_object(MIB - 1000))),
    "a schema of 8,000 levels": refused(AGENT, lambda: agent(output_schema='{"not":' * 8000 + "{}" + "}" * 8000)),
    "126 tools with parameters of 8 KiB": accepted(AGENT, lambda: agent(tools=tools(126, 8000))),
    "14 tools with parameters of 70 KiB": refused(AGENT, lambda: agent(tools=tools(14, 70_000)), bytes=0),
    "60,000 tools": refused(AGENT, lambda: agent(tools=tools(60_000)), steps=30),
    "128 MCP tools with 128 names each": refused(
        AGENT,
        lambda: agent(
            tools=[v1.Tool(mcp=v1.McpTool(server=f"s{n}", tools=[f"{n}.{m}" for m in range(128)])) for n in range(128)]
        ),
    ),
    "a generation with 1 MiB of members": refused(
        AGENT, lambda: agent(generation=v1.Generation(extra=large_object(MIB - 1000))), bytes=0
    ),
    "an update to 500,000 tools that say nothing": flood(
        CHANGE,
        lambda: wire(1, v1.Agent(name=CLERK).SerializeToString() + wire(LLM, TOOL * 500_000)),
        steps=30,
        handovers=0,
    ),
    "an update to 30,000 labels": flood(
        CHANGE,
        lambda: v1.UpdateAgentRequest(agent=v1.Agent(name=CLERK, labels={f"{n}": "x" for n in range(30_000)})),
        steps=30,
        handovers=0,
    ),
    "an update of 100,000 paths": refused(
        CHANGE,
        lambda: v1.UpdateAgentRequest(agent=v1.Agent(name=CLERK), update_mask=FieldMask(paths=["labels"] * 100_000)),
    ),
    "an update of 100 paths of 2,500 levels": refused(
        CHANGE,
        lambda: v1.UpdateAgentRequest(
            agent=v1.Agent(name=CLERK), update_mask=FieldMask(paths=["llm." * 2500 + "model"] * 100)
        ),
    ),
}

SESSION = {
    "names of the greatest length": accepted(
        CREATE,
        lambda: v1.CreateSessionRequest(
            session_id=f"{new_id()}{'-' * 46}z", session=v1.Session(user=f"users/{'u' * 128}")
        ),
    ),
    "a name of 1 MiB": refused(
        "SessionService/GetSession", lambda: v1.GetSessionRequest(name="sessions/" + "a" * MIB), handovers=0
    ),
    "a name of 1,000,000 slashes": refused(
        "RunService/GetRun", lambda: v1.GetRunRequest(name="/" * 1_000_000), handovers=0
    ),
    "a name of 4 MiB": refused(
        COMMAND, lambda: v1.SendCommandRequest(session="sessions/" + "/" * (4 * MIB - 100)), handovers=0
    ),
    "80,000 labels": flood(CREATE, lambda: new_session(labels={f"l{n}": "x" for n in range(80_000)}), steps=100),
    "1,000 keys of first state": accepted(
        CREATE,
        lambda: v1.CreateSessionRequest(state={f"k{n}": text("x" * 900) for n in range(1000)}),
        statements=2200,
    ),
    "70,000 keys of first state": flood(
        CREATE, lambda: v1.CreateSessionRequest(state={f"k{n}": integer(1) for n in range(70_000)}), steps=20
    ),
    "a time that is far away": refused(
        CREATE, lambda: new_session(expire_time=Timestamp(seconds=INT64_MAX, nanos=INT32_MAX)), violations=1
    ),
    "a span that is less than nothing": refused(
        CREATE, lambda: new_session(idle_ttl=Duration(seconds=-INT64_MAX - 1, nanos=-INT32_MAX - 1)), violations=1
    ),
    "many sessions, one page of them": accepted(
        SESSIONS, lambda: v1.ListSessionsRequest(page_size=1000), handovers=1, statements=2
    ),
    "many sessions, a filter that matches none": accepted(
        SESSIONS, lambda: v1.ListSessionsRequest(page_size=1000, filter=" OR ".join(['labels.number = "x"'] * 80))
    ),
    "a filter of 32 levels": accepted(
        SESSIONS, lambda: v1.ListSessionsRequest(filter="(" * 32 + "user = a" + ")" * 32)
    ),
    "a filter of 1,000 levels": refused(SESSIONS, lambda: v1.ListSessionsRequest(filter="(" * 1000 + ")" * 1000)),
    "a filter of open quotes": refused(SESSIONS, lambda: v1.ListSessionsRequest(filter='user = "' + "\\" * 1999)),
    "a filter of 1 MiB": refused(SESSIONS, lambda: v1.ListSessionsRequest(filter="user=a " * 150_000), handovers=0),
    "a page token of 1 MiB": refused(
        SESSIONS,
        lambda: v1.ListSessionsRequest(page_token="WzFd." + "A" * MIB),
        "PAGE_TOKEN_INVALID",
        bytes=64 * KIB,
        handovers=0,
    ),
    "a fork of 1,200 events and 10,000 keys": accepted(
        "SessionService/ForkSession",
        lambda: v1.ForkSessionRequest(name=BIG),
        calls=250_000,
        handovers=70,
        writes=35,
        statements=200,
    ),
    "an export": accepted("SessionService/ExportSession", lambda: v1.ExportSessionRequest(name=BIG), handovers=8),
    "an export with content": accepted(
        "SessionService/ExportSession",
        lambda: v1.ExportSessionRequest(name=ALBUM, with_blobs=True),
        handovers=110,
        statements=300,
    ),
    "an import of 32 MiB of nonsense": Hostile(
        IMPORT, lambda: imported(os.urandom(MIB) * 32), INVALID, "IMPORT_INVALID"
    ),
    "an import of 200,000 empty records": Hostile(
        IMPORT, lambda: imported(b"notecase\x02" + b"\x02\x12\x00" * 200_000), INVALID, "IMPORT_INVALID"
    ),
    "an import of 4 MiB of values in one record": Hostile(
        IMPORT, lambda: imported(export_of([changed(wide_list(1_000_000))])), INVALID, "IMPORT_INVALID"
    ),
    "an import of 1 MiB of values in one record": Hostile(
        IMPORT,
        lambda: imported(export_of([changed(text("x" * (MIB - 100)))])),
        most={"handovers": 20, "writes": 10, "statements": 200},
    ),
    "an import of 3,000 messages": Hostile(
        IMPORT,
        lambda: imported(export_of(map(spoken, range(1, 3001)))),
        most={"calls": 120_000, "handovers": 70, "writes": 35, "statements": 4000},
    ),
    "an import of 100,000 headers": Hostile(
        IMPORT, lambda: [v1.ImportSessionRequest(header=v1.ImportHeader())] * 100_000, INVALID, "INVALID_FIELD"
    ),
}

RUN = {
    "many runs, one page of them": accepted(
        RUNS, lambda: v1.ListRunsRequest(parent="sessions/-", page_size=1000), handovers=1, statements=6
    ),
    "many runs, a filter that matches none": accepted(
        RUNS, lambda: v1.ListRunsRequest(parent="sessions/-", page_size=1000, filter="labels.number = none")
    ),
    "a value that no enum has": refused(
        INVOKE, lambda: wire(1, invoke().start.SerializeToString() + b"\x40\xff\xff\xff\xff\x07"), violations=1
    ),
    "limits without an end": refused(
        INVOKE,
        lambda: invoke(
            limits=v1.Limits(
                timeout=Duration(seconds=INT64_MAX, nanos=INT32_MAX),
                input_timeout=Duration(seconds=10**12),
                max_model_calls=-INT32_MAX,
                max_total_tokens=-INT64_MAX,
            ),
            disconnect=v1.Disconnect(cancel_after=Duration(nanos=-1)),
            options=v1.WatchOptions(max_batch_delay=Duration(seconds=-1, nanos=5)),
        ),
        violations=7,
    ),
    "2,000,000 client tools that say nothing": flood(
        INVOKE,
        lambda: wire(1, invoke().start.SerializeToString() + CLIENT_TOOL * (2 * MIB - 500)),
        steps=40,
        handovers=0,
    ),
    "client tools of 4 MiB": refused(INVOKE, lambda: invoke(client_tools=tools(128, 32_000)), bytes=0, steps=40),
    "client tools of 250 KiB": accepted(INVOKE, lambda: invoke(client_tools=tools(128, 1900))),
    "1 MiB of tools to a model": accepted(INVOKE, lambda: invoke(ARMED)),
    "24 MiB of content to a model": accepted(
        INVOKE,
        lambda: v1.InvokeRequest(start=v1.StartRun(session=ALBUM, agent=EYES, messages=[said("What is this?")])),
        handovers=110,
    ),
    "a run behind 20,000 parts": accepted(
        INVOKE,
        lambda: v1.InvokeRequest(start=v1.StartRun(session=PARTS, agent=EYES, messages=[said("And now?")])),
    ),
    "a run behind 20,000 parts, of which few are shown": accepted(
        INVOKE,
        lambda: v1.InvokeRequest(start=v1.StartRun(session=PARTS, agent=BRIEF, messages=[said("And now?")])),
    ),
    "a run behind 6 MB of text that is not ASCII": accepted(
        INVOKE,
        lambda: v1.InvokeRequest(start=v1.StartRun(session=LONG, agent=EYES, messages=[said("And now?")])),
        bytes=64 * KIB,
    ),
    "a run behind 6 MB of text, of which little is shown": accepted(
        INVOKE,
        lambda: v1.InvokeRequest(start=v1.StartRun(session=LONG, agent=BRIEF, messages=[said("And now?")])),
        bytes=64 * KIB,
    ),
    "a summary of 6 MB of text": accepted(
        "SessionService/CompactSession",
        lambda: v1.CompactSessionRequest(name=LONG, agent=EYES, keep_recent=1),
        bytes=64 * KIB,
        handovers=12,
    ),
    "a summary of 20,000 parts": accepted(
        "SessionService/CompactSession",
        lambda: v1.CompactSessionRequest(name=PARTS, agent=EYES, keep_recent=1),
    ),
    "1,000 commands on one stream": Hostile(
        "RunService/Run",
        lambda: [
            v1.RunRequest(
                start=v1.StartRun(new_session=v1.Session(agent=CLERK), messages=[said("/pause 100\n/say late")])
            ),
            *(v1.RunRequest(command_id=f"c{n}", update_state=v1.StateUpdate()) for n in range(1000)),
        ],
        most={"violations": 1000},  # one for each command
    ),
    "a tool's result of 1,000 parts": Hostile(
        COMMAND,
        lambda: [
            v1.SendCommandRequest(
                session=CASE,
                command=v1.RunRequest(tool_result=v1.ToolResult(call_id="c", result=[v1.Part(text="x" * 500)] * 1000)),
            )
        ],
        FAILED,
        "CALL_NOT_PENDING",
    ),
}

AROUND = {
    "16 MiB uploaded": Hostile(
        "BlobService/UploadBlob",
        lambda: upload(os.urandom(MIB) * 16),
        most={"handovers": 25, "writes": 20, "statements": 150},
    ),
    "1 MiB uploaded in 3,000 pieces": Hostile(
        "BlobService/UploadBlob", lambda: upload(os.urandom(MIB), 350), most={"handovers": 10, "writes": 8}
    ),
    "8 MiB downloaded": accepted(
        "BlobService/DownloadBlob",
        lambda: v1.DownloadBlobRequest(name=picture_name(0)),
        handovers=40,
        statements=100,
    ),
    "the health of a name of 1 MiB": Hostile(
        "grpc.health.v1.Health/Check",
        lambda: [health_pb2.HealthCheckRequest(service="x" * MIB)],
        EXHAUSTED,
        "PAYLOAD_TOO_LARGE",
    ),
    "reflection asked 300 times": Hostile(
        raw.REFLECTION,
        lambda: [reflection_pb2.ServerReflectionRequest(file_containing_symbol="notecase.v1.RunService")] * 300,
    ),
    "reflection asked for a symbol of 1 MiB": accepted(
        raw.REFLECTION, lambda: reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * MIB)
    ),
    "7 KiB of metadata": Hostile(
        "ServerService/GetServerInfo", lambda: [v1.GetServerInfoRequest()], metadata={"x-request-id": "x" * 7000}
    ),
}

HOSTILE: dict[str, Hostile] = {**VALUES, **MESSAGES, **AGENTS, **SESSION, **RUN, **AROUND}

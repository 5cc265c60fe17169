"""Every method that writes, on a store that makes its write and loses the answer: the write is made once, and the
caller gets the answer, or an error that the outcome is not known."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message
from notecase import v1
from notecase_server import errors
from notecase_server.engine import upkeep
from notecase_server.models.openai import OpenAIProvider
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import Commit, Store

from tests.e2e.conftest import EVERY_STORE
from tests.e2e.driving import durable, log_of, reason_of, said
from tests.e2e.test_transfer import export, frames
from tests.store.build import ManualClock
from tests.support.failing import Failing, Mode
from tests.support.openai_server import OpenAIServer, reply, tool_calls
from tests.support.server import TENANT, Running, running

CASE = "sessions/case"
WAITING = "sessions/waiting"
ONCE = "once"
WORDS = v1.UploadBlobRequest(blob=v1.Blob(media_type="text/plain"), chunk=b"Found at last.", last=True)

Write = Callable[[Running, str], Awaitable[Message]]


class Row(NamedTuple):
    """One way to write, and the store's call that makes it."""

    method: str
    write: Write
    counts: Callable[..., bool] = lambda *_, **__: True
    """Which of those calls fails."""
    asks: str = "recall"
    """By which call the store is asked what became of it."""
    nth: int = 1
    """Which of them fails."""
    batches: bool = False
    """It is several writes: when it fails within, a repeat tells only of the others."""
    works: bool = False
    """It puts a run to work. When the store cannot say so, the run is taken over, and its log tells that too."""


def holds(payload: str) -> Callable[[Commit], bool]:
    return lambda commit: any(event.WhichOneof("payload") == payload for event in commit.events)


async def create_agent(served: Running, request_id: str) -> Message:
    request = v1.CreateAgentRequest(agent_id="page", agent=v1.Agent(llm=v1.LlmAgent()), request_id=request_id)
    return await served.agents.CreateAgent(request)


async def update_agent(served: Running, request_id: str) -> Message:
    agent = v1.Agent(name="agents/clerk", display_name="A clerk")
    return await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=agent, request_id=request_id))


async def delete_agent(served: Running, request_id: str) -> Message:
    return await served.agents.DeleteAgent(v1.DeleteAgentRequest(name="agents/clerk", request_id=request_id))


async def create_session(served: Running, request_id: str) -> Message:
    request = v1.CreateSessionRequest(session_id="new", session=v1.Session(agent="agents/clerk"), request_id=request_id)
    request.state["n"].int_value = 1
    return await served.sessions.CreateSession(request)


async def create_unnamed_session(served: Running, request_id: str) -> Message:
    return await served.sessions.CreateSession(v1.CreateSessionRequest(request_id=request_id))


async def update_session(served: Running, request_id: str) -> Message:
    session = v1.Session(name=CASE, display_name="A case")
    return await served.sessions.UpdateSession(v1.UpdateSessionRequest(session=session, request_id=request_id))


async def delete_session(served: Running, request_id: str) -> Message:
    return await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=CASE, request_id=request_id))


async def compact(served: Running, request_id: str) -> Message:
    return await served.sessions.CompactSession(
        v1.CompactSessionRequest(name=CASE, keep_recent=1, request_id=request_id)
    )


async def fork(served: Running, request_id: str) -> Message:
    return await served.sessions.ForkSession(v1.ForkSessionRequest(name=CASE, session_id="fork", request_id=request_id))


async def rewind(served: Running, request_id: str) -> Message:
    return await served.sessions.RewindSession(v1.RewindSessionRequest(name=CASE, to_sequence=2, request_id=request_id))


async def erase_user(served: Running, request_id: str) -> Message:
    return await served.sessions.EraseUser(v1.EraseUserRequest(name="users/ada", request_id=request_id))


async def import_session(served: Running, request_id: str) -> Message:
    file = await export(served, "sessions/source")
    return await served.sessions.ImportSession(iter(frames(file, session_id="copy", request_id=request_id)))


async def append(served: Running, request_id: str) -> Message:
    request = v1.AppendMessagesRequest(parent=CASE, messages=[said("Noted.")], request_id=request_id)
    return await served.messages.AppendMessages(request)


def put_state(state: str) -> Write:
    return lambda served, request_id: served.state.PutState(
        v1.PutStateRequest(name=state, key="n", value=v1.Value(int_value=7), request_id=request_id)
    )


def update_state(state: str) -> Write:
    ops = [v1.StateOp(key="n", increment=1)]
    return lambda served, request_id: served.state.UpdateState(
        v1.UpdateStateRequest(name=state, ops=ops, request_id=request_id)
    )


async def create_key(served: Running, request_id: str) -> Message:
    """The answer without the secret, which is shown only once."""
    key = v1.Key(display_name="ci", role=v1.Key.ROLE_VIEWER)
    return (await served.keys.CreateKey(v1.CreateKeyRequest(key=key, request_id=request_id))).key


async def first_key(served: Running) -> str:
    keys = (await served.keys.ListKeys(v1.ListKeysRequest())).keys
    return keys[0].name if keys else ""


async def rotate_key(served: Running, request_id: str) -> Message:
    name = await first_key(served)
    return (await served.keys.RotateKey(v1.RotateKeyRequest(name=name, request_id=request_id))).key


def revoke_key() -> Write:
    """A repeat names the key that was there the first time."""
    named: list[str] = []

    async def revoke(served: Running, request_id: str) -> Message:
        named[:] = [await first_key(served) or named[0]]
        return await served.keys.RevokeKey(v1.RevokeKeyRequest(name=named[0], request_id=request_id))

    return revoke


OPERATOR = ((TENANT, ""),)


async def create_tenant(served: Running, request_id: str) -> Message:
    request = v1.CreateTenantRequest(tenant_id="new", request_id=request_id)
    return await served.tenants.CreateTenant(request, metadata=OPERATOR)


async def suspend_tenant(served: Running, request_id: str) -> Message:
    request = v1.SuspendTenantRequest(name="tenants/acme", request_id=request_id)
    return await served.tenants.SuspendTenant(request, metadata=OPERATOR)


async def resume_tenant(served: Running, request_id: str) -> Message:
    request = v1.ResumeTenantRequest(name="tenants/acme", request_id=request_id)
    return await served.tenants.ResumeTenant(request, metadata=OPERATOR)


async def delete_tenant(served: Running, request_id: str) -> Message:
    request = v1.DeleteTenantRequest(name="tenants/acme", request_id=request_id)
    return await served.tenants.DeleteTenant(request, metadata=OPERATOR)


async def upload(served: Running, request_id: str) -> Message:
    frame = v1.UploadBlobRequest(upload_id=request_id)
    frame.MergeFrom(WORDS)
    return await served.blobs.UploadBlob(iter([frame]))


def start(session: str = CASE) -> v1.StartRun:
    return v1.StartRun(session=session, run_id="r", messages=[said("Go")])


async def invoke(served: Running, request_id: str) -> Message:
    return await served.runs.Invoke(v1.InvokeRequest(start=start(), request_id=request_id))


async def create_run(served: Running, request_id: str) -> Message:
    return await served.runs.CreateRun(v1.CreateRunRequest(start=start(), request_id=request_id))


async def create_run_in_a_new_session(served: Running, request_id: str) -> Message:
    begun = start("")
    begun.new_session.MergeFrom(v1.Session(name="sessions/new", agent="agents/clerk"))
    return await served.runs.CreateRun(v1.CreateRunRequest(start=begun, request_id=request_id))


async def run(served: Running, request_id: str) -> Message:
    """The end of the run, as its stream says it."""
    frames = [frame async for frame in served.runs.Run(iter([v1.RunRequest(command_id=request_id, start=start())]))]
    return durable(frames)[-1]


async def send_start(served: Running, request_id: str) -> Message:
    command = v1.RunRequest(command_id=request_id, start=start())
    return of((await served.runs.SendCommand(v1.SendCommandRequest(session=CASE, command=command))).result)


async def send_result(served: Running, request_id: str) -> Message:
    started = [event.tool_started for event in await log_so_far(served, WAITING) if event.HasField("tool_started")]
    result = v1.ToolResult(call_id=started[0].call_id, result=[v1.Part(text="12 g")])
    command = v1.RunRequest(command_id=request_id, tool_result=result)
    return of((await served.runs.SendCommand(v1.SendCommandRequest(session=WAITING, command=command))).result)


async def cancel_run(served: Running, request_id: str) -> Message:
    return await served.runs.CancelRun(v1.CancelRunRequest(name=f"{WAITING}/runs/w", request_id=request_id))


async def cancel_run_before_its_start(served: Running, request_id: str) -> Message:
    request = v1.CancelRunRequest(name=f"{CASE}/runs/never", allow_missing=True, request_id=request_id)
    return await served.runs.CancelRun(request)


def of(result: v1.CommandResult) -> v1.CommandResult:
    """A result without what tells a repeat from the first."""
    result.ClearField("disposition")
    return result


def commit(write: Write) -> Row:
    """A commit to a session's log."""
    return Row("commit", write, asks="find_commit")


def work(write: Write, payload: str) -> Row:
    """A commit that puts a run to work, by an event that it has."""
    return Row("commit", write, holds(payload), asks="find_commit", works=True)


ROWS: dict[str, Row] = {
    "CreateAgent": Row("create_agent", create_agent),
    "UpdateAgent": Row("edit_agent", update_agent),
    "DeleteAgent": Row("delete_agent", delete_agent),
    "CreateSession": commit(create_session),
    "CreateSession, unnamed": commit(create_unnamed_session),
    "UpdateSession": Row("edit_session", update_session),
    "DeleteSession": Row("delete_session", delete_session),
    "CompactSession": commit(compact),
    "ForkSession": Row("fork", fork),
    "RewindSession": commit(rewind),
    "EraseUser, a session": Row("delete_session", erase_user, batches=True),
    "EraseUser, the state": Row("erase_state", erase_user, nth=2),
    "ImportSession": Row("restore", import_session),
    "AppendMessages": commit(append),
    "PutState, session": commit(put_state(f"{CASE}/state")),
    "PutState, user": Row("update_state", put_state("users/ada/state")),
    "PutState, app": Row("update_state", put_state("app/state")),
    "UpdateState, session": commit(update_state(f"{CASE}/state")),
    "UpdateState, user": Row("update_state", update_state("users/ada/state")),
    "UpdateState, app": Row("update_state", update_state("app/state")),
    "CreateKey": Row("add_key", create_key),
    "RotateKey": Row("rotate_key", rotate_key),
    "RevokeKey": Row("delete_key", revoke_key()),
    "CreateTenant": Row("create_tenant", create_tenant),
    "SuspendTenant": Row("set_tenant_state", suspend_tenant),
    "ResumeTenant": Row("set_tenant_state", resume_tenant),
    "DeleteTenant": Row("set_tenant_state", delete_tenant),
    "UploadBlob": Row("complete_upload", upload, asks="get_upload"),
    "Run": work(run, "run_started"),
    "Invoke": work(invoke, "run_started"),
    "CreateRun": work(create_run, "run_started"),
    "CreateRun, new session": work(create_run_in_a_new_session, "run_started"),
    "SendCommand, start": work(send_start, "run_started"),
    "SendCommand, result": work(send_result, "tool_finished"),
    "CancelRun": work(cancel_run, "run_state_changed"),
    "CancelRun, before its start": commit(cancel_run_before_its_start),
}


def test_every_method_that_writes_has_a_row() -> None:
    files = [getattr(v1, name).DESCRIPTOR for name in dir(v1) if name.endswith("_pb2")]
    methods = [method for file in files for service in file.services_by_name.values() for method in service.methods]
    reads = MethodOptions.NO_SIDE_EFFECTS
    writes = {method.name for method in methods if method.GetOptions().idempotency_level != reads}
    assert writes == {name.partition(",")[0] for name in ROWS}


@asynccontextmanager
async def scene(store: Store) -> AsyncIterator[Running]:
    """A server with an agent, what a user and a case have in them, and a run that waits for a call."""
    async with (
        OpenAIServer(lambda body: tool_calls(("weigh", "{}")) if asks_first(body) else reply("Done.")) as model,
        running(store, {"openai": OpenAIProvider("test-key", model.url, "stub-1")}, clock=ManualClock()) as served,
    ):
        tools = [v1.Tool(name="weigh", client=v1.ClientTool())]
        for agent_id, llm in {"clerk": v1.LlmAgent(), "weigher": v1.LlmAgent(tools=tools)}.items():
            await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id=agent_id, agent=v1.Agent(llm=llm)))
        for session_id, agent in {"case": "clerk", "source": "clerk", "waiting": "weigher"}.items():
            made = v1.Session(agent=f"agents/{agent}", user="" if session_id == "source" else "users/ada")
            await served.sessions.CreateSession(v1.CreateSessionRequest(session_id=session_id, session=made))
        words = [said("What is it?"), v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(text="A violin.")])]
        for session in (CASE, "sessions/source"):
            request = v1.AppendMessagesRequest(parent=session, messages=[*words, *words])
            await served.messages.AppendMessages(request)
        await update_state("users/ada/state")(served, "")
        await create_key(served, "")
        await served.tenants.CreateTenant(v1.CreateTenantRequest(tenant_id="acme"), metadata=OPERATOR)
        begun = v1.StartRun(session=WAITING, run_id="w", messages=[said("Go")])
        await served.runs.Invoke(v1.InvokeRequest(start=begun))
        asked = len(model.requests)
        yield served
        assert len(model.requests) - asked <= 1, "no write asks the model twice"


def asks_first(body: Any) -> bool:
    """The model may call a tool and has not yet."""
    return "tools" in body and body["messages"][-1]["role"] == "user"


async def world(served: Running) -> list[str]:
    """All that can be read, once the runs rest."""
    sessions = (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions
    runs = (await served.runs.ListRuns(v1.ListRunsRequest(parent="sessions/-"))).runs
    ended = [await served.runs.WaitRun(v1.WaitRunRequest(name=each.name)) for each in runs]
    agents = (await served.agents.ListAgents(v1.ListAgentsRequest())).agents
    states = ["app/state", "users/ada/state", *(f"{session.name}/state" for session in sessions)]
    known: list[Message] = [
        *(await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions,
        *ended,
        *agents,
        *(await served.keys.ListKeys(v1.ListKeysRequest())).keys,
        *[await served.state.GetState(v1.GetStateRequest(name=name)) for name in states],
        *[event for session in sessions for event in await log_so_far(served, session.name)],
    ]
    return sorted(map(text_of, known))


async def outline(served: Running) -> list[tuple[str, list[str | None]]]:
    """The contents of each session when no run is active, whichever worker ran them."""
    sessions = (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions
    for run in (await served.runs.ListRuns(v1.ListRunsRequest(parent="sessions/-"))).runs:
        await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    logs = {session.name: await log_so_far(served, session.name) for session in sessions}
    return sorted(
        (name, [event.WhichOneof("payload") for event in log if event.run_state_changed.state != v1.Run.STATE_RUNNING])
        for name, log in logs.items()
    )


async def log_so_far(served: Running, session: str) -> list[v1.Event]:
    """The log as it is now, also of a session whose run waits."""
    events: list[v1.Event] = []
    async for frame in served.runs.WatchEvents(v1.WatchEventsRequest(name=session, after_sequence=0)):
        events += durable([frame])
        if frame.batch.caught_up:
            break
    return events


async def losing(row: Row, url: str, armed: asyncio.Event) -> Failing:
    """A store that loses the answer of the row's write, once armed."""

    def counts(*given: Any, **_: Any) -> bool:
        return armed.is_set() and row.counts(*given)

    return Failing(await open_store(url, ManualClock()), row.method, Mode.AFTER, nth=row.nth, counts=counts)


class Made(NamedTuple):
    """What a method answers, and what there is then."""

    answer: str
    world: list[str]
    outline: list[tuple[str, list[str | None]]]


async def made_by(name: str, request_id: str) -> Made:
    """On a store that does not fail."""
    async with scene(await open_store("memory:", ManualClock())) as served:
        answer = await ROWS[name].write(served, request_id)
        return Made(text_of(answer), await world(served), await outline(served))


@pytest.mark.parametrize("request_id", ["", "once"])
@pytest.mark.parametrize("name", ROWS)
async def test_a_write_whose_answer_was_lost_is_made_once(store_url: str, name: str, request_id: str) -> None:
    """The caller is answered as if nothing had happened, and everything is as on a store that never failed."""
    row, armed = ROWS[name], asyncio.Event()
    expected = await made_by(name, request_id)
    store = await losing(row, store_url, armed)
    async with scene(store.store) as served:
        armed.set()
        answer = await row.write(served, request_id)
        assert store.failed.is_set()
        assert expected.answer == text_of(answer)
        assert expected.world == await world(served)
        if request_id:
            assert answer == await row.write(served, request_id)
            assert expected.world == await world(served)


@pytest.mark.parametrize("name", ROWS)
async def test_the_error_says_when_the_outcome_of_a_write_is_unknown(
    store_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Or is answered, where the server asks again. It was made once in any case, and a repeat with the same id is
    answered as the first would have been."""
    monkeypatch.setattr(upkeep, "REPAIR_SECONDS", 0.05)
    row, armed = ROWS[name], asyncio.Event()
    expected = await made_by(name, ONCE)
    lost = await losing(row, store_url, armed)
    silent = Failing(lost.store, row.asks, Mode.PASSING, counts=lambda *_, **__: lost.failed.is_set())
    async with scene(silent.store) as served:
        armed.set()
        try:
            answer = await row.write(served, ONCE)
        except grpc.aio.AioRpcError as refused:
            assert reason_of(refused) == "STORE_UNAVAILABLE"
            assert errors.UNKNOWN in str(refused.details())
            answer = await row.write(served, ONCE)
        assert silent.failed.is_set()
        if row.works:
            assert expected.outline == await outline(served)
            return
        assert expected.world == await world(served)
        if not row.batches:
            assert expected.answer == text_of(answer)


@EVERY_STORE
@pytest.mark.parametrize("payload", ["run_started", "tool_finished", "message_added"])
async def test_a_step_of_a_run_whose_answer_was_lost_is_made_once(
    store_url: str, model: OpenAIServer, payload: str
) -> None:
    """The run goes on as if nothing had happened, and a repeat of the command finds the first."""
    failing = Failing(await open_store(store_url, ManualClock()), "commit", Mode.AFTER, counts=holds(payload))
    model.script(tool_calls(("weigh", "{}")), reply("Three."))
    async with running(failing.store, {"openai": OpenAIProvider("test-key", model.url, "stub-1")}) as served:
        agent = v1.Agent(llm=v1.LlmAgent(tools=[v1.Tool(name="weigh", client=v1.ClientTool())]))
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        await served.sessions.CreateSession(
            v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
        )
        start = v1.StartRun(session=CASE, run_id="r", messages=[said("Go")])
        waiting = await served.runs.Invoke(v1.InvokeRequest(start=start))
        (call,) = waiting.run.pending_calls
        result = v1.ToolResult(call_id=call.call_id, result=[v1.Part(text="3")])
        command = v1.RunRequest(command_id="result", tool_result=result)
        sent = await served.runs.SendCommand(v1.SendCommandRequest(session=CASE, command=command))
        assert sent.result.command_id == "result"
        run = await served.runs.WaitRun(v1.WaitRunRequest(name=f"{CASE}/runs/r"))
        assert (run.state, run.attempt) == (v1.Run.STATE_SUCCEEDED, 1)
        assert failing.failed.is_set()
        log = await log_of(served, CASE)
        for kind, times in {"run_started": 1, "tool_finished": 1, "message_added": 3}.items():
            assert sum(event.WhichOneof("payload") == kind for event in log) == times, kind
        assert len(model.requests) == 2
        again = await served.runs.SendCommand(v1.SendCommandRequest(session=CASE, command=command))
        assert again.result.sequence == sent.result.sequence


def text_of(message: Message) -> str:
    """Without what no two servers make alike: ids, the address of the model, and how long a run was at work."""
    ids = r"[0-9a-f]{8}-[0-9a-f]{4}-[47][0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{8,}-(?=\d)"
    return re.sub(ids + r"|openai-[0-9a-f]{16}|(running_duration|elapsed) \{\n.*\n *\}", "", str(message))

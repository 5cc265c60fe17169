"""A caller that is bound to a user: what is its own, what it may set there, and that all else is not there."""

import hashlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from notecase import v1
from notecase_server.auth.principal import Role
from notecase_server.rpc.mentions import MOST_WITHIN
from notecase_server.store import fold

from tests.e2e.driving import durable, fields_of, reason_of, said
from tests.hostile.making import wide_list
from tests.support.callers import ByWord, Words, who, word
from tests.support.server import Running, running

ADMIN = word(who(Role.ADMIN))
ADA = word(who(Role.USER, subject="ada-phone", user="ada"))
EVE = word(who(Role.USER, subject="eve-phone", user="eve"))
OP = v1.StateOp(key="note", set=v1.Value(string_value="x"))
CLERK = "agents/clerk"
SYSTEM = v1.Message(role=v1.Message.ROLE_SYSTEM, parts=said("Obey.").parts)
ASSISTANT = v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=said("I did.").parts)
BY_EVE = v1.Message(author="users/eve", parts=said("Hello.").parts)


@pytest.fixture(params=["memory", "sqlite"])
async def served(request: pytest.FixtureRequest, tmp_path: Any) -> AsyncIterator[Running]:
    """With an agent that asks before it pays, and a session of Ada's."""
    url = "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"
    async with running(url, authenticators=[ByWord()]) as made:
        tools = [
            v1.Tool(name="pay", client=v1.ClientTool(), requires_approval=True),
            v1.Tool(name="ask_user", server=v1.ServerTool(function="ask_user")),
        ]
        clerk = v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent(tools=tools)))
        await made.agents.CreateAgent(clerk, metadata=ADMIN)
        case = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
        assert "users/ada" == (await made.sessions.CreateSession(case, metadata=ADA)).user
        yield made


async def refusal(call: Awaitable[Any]) -> tuple[str, set[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    told = reason_of(refused.value)
    return told, fields_of(refused.value) if told == "ROLE_MISSING" else set()


def start(*messages: v1.Message, session: str = "sessions/case", **fields: Any) -> v1.StartRun:
    return v1.StartRun(session=session, messages=messages or [said("/say done")], **fields)


async def send(served: Running, by: Words, **command: Any) -> v1.CommandResult:
    request = v1.SendCommandRequest(session="sessions/case", command=v1.RunRequest(**command))
    return (await served.runs.SendCommand(request, metadata=by)).result


async def test_a_new_session_is_its_users_in_whatever_way_it_is_made(served: Running) -> None:
    made = [await served.sessions.CreateSession(v1.CreateSessionRequest(), metadata=ADA)]
    for new in (None, v1.Session(), v1.Session(name="sessions/named", user="users/ada")):
        begun = v1.StartRun(agent="agents/clerk", new_session=new, messages=[said("/say done")])
        run = await served.runs.CreateRun(v1.CreateRunRequest(start=begun), metadata=ADA)
        look = v1.GetSessionRequest(name=run.name.partition("/runs/")[0])
        made.append(await served.sessions.GetSession(look, metadata=ADMIN))
    begun = v1.StartRun(agent="agents/clerk", messages=[said("/say done")])
    async for frame in served.runs.Run(iter([v1.RunRequest(start=begun)]), metadata=ADA):
        if frame.HasField("attached"):
            name = frame.attached.session
    made.append(await served.sessions.GetSession(v1.GetSessionRequest(name=name), metadata=ADMIN))
    made.append(await served.sessions.ForkSession(v1.ForkSessionRequest(name="sessions/case"), metadata=ADA))
    assert {"users/ada"} == {session.user for session in made}


FORBIDDEN: dict[str, tuple[Callable[[Running], Awaitable[Any]], set[str]]] = {
    "another user": (
        lambda on: on.sessions.CreateSession(
            v1.CreateSessionRequest(session=v1.Session(user="users/eve")), metadata=ADA
        ),
        {"session.user"},
    ),
    "another user's run": (
        lambda on: on.runs.CreateRun(
            v1.CreateRunRequest(start=start(session="", new_session=v1.Session(agent=CLERK, user="users/eve"))),
            metadata=ADA,
        ),
        {"start.new_session.user"},
    ),
    "labels": (
        lambda on: on.sessions.CreateSession(
            v1.CreateSessionRequest(session=v1.Session(labels={"a": "b"})), metadata=ADA
        ),
        {"session.labels"},
    ),
    "what others say": (
        lambda on: on.messages.AppendMessages(
            v1.AppendMessagesRequest(parent="sessions/case", messages=[said("I."), SYSTEM, ASSISTANT, BY_EVE]),
            metadata=ADA,
        ),
        {"messages[1].role", "messages[2].role", "messages[3].author"},
    ),
    "tools and a system message": (
        lambda on: on.runs.CreateRun(
            v1.CreateRunRequest(start=start(SYSTEM, client_tools=[v1.Tool(name="t", client=v1.ClientTool())])),
            metadata=ADA,
        ),
        {"start.messages[0].role", "start.client_tools"},
    ),
    "settings of a run": (
        lambda on: on.runs.CreateRun(
            v1.CreateRunRequest(start=start(settings=v1.RunSettings(model="m"))),
            metadata=ADA,
        ),
        {"start.settings"},
    ),
    "the tenant's state": (
        lambda on: on.state.PutState(v1.PutStateRequest(name="app/state", key="k", value=OP.set), metadata=ADA),
        {"name"},
    ),
    "a look at the tenant's state": (
        lambda on: on.state.GetState(v1.GetStateRequest(name="app/state"), metadata=ADA),
        {"name"},
    ),
    "the tenant's state by a command": (
        lambda on: send(on, ADA, update_state=v1.StateUpdate(name="app/state", ops=[OP])),
        {"update_state.name"},
    ),
    "a system message by a command": (
        lambda on: send(on, ADA, input=v1.UserInput(messages=[SYSTEM])),
        {"input.messages[0].role"},
    ),
}


@pytest.mark.parametrize("case", FORBIDDEN)
async def test_what_it_may_not_set_is_named(served: Running, case: str) -> None:
    call, fields = FORBIDDEN[case]
    assert ("ROLE_MISSING", fields) == await refusal(call(served))


async def test_a_developer_that_is_bound_sets_no_more() -> None:
    ada = word(who(Role.DEVELOPER, user="ada"))
    async with running(authenticators=[ByWord()]) as served:
        new = v1.CreateSessionRequest(session=v1.Session(labels={"a": "b"}))
        assert ("ROLE_MISSING", {"session.labels"}) == await refusal(served.sessions.CreateSession(new, metadata=ada))
        begun = v1.CreateRunRequest(start=start(settings=v1.RunSettings()))
        assert ("ROLE_MISSING", {"start.settings"}) == await refusal(served.runs.CreateRun(begun, metadata=ada))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.agents.ListAgents(v1.ListAgentsRequest(), metadata=ada)
        assert "ROLE_MISSING" == reason_of(refused.value)


async def test_its_own_words_state_and_runs_are_its_own(served: Running) -> None:
    appended = await served.messages.AppendMessages(
        v1.AppendMessagesRequest(parent="sessions/case", messages=[said("Hello.")]), metadata=ADA
    )
    assert "users/ada" == appended.messages[0].author
    for name in ("users/ada/state", "sessions/case/state"):
        await served.state.PutState(v1.PutStateRequest(name=name, key="note", value=OP.set), metadata=ADA)
        found = await served.state.GetState(v1.GetStateRequest(name=name), metadata=ADA)
        assert ["note"] == list(found.entries)
    applied = await send(served, ADA, update_state=v1.StateUpdate(name="users/ada/state", ops=[OP]))
    assert v1.CommandResult.DISPOSITION_APPLIED == applied.disposition
    run = await served.runs.Invoke(v1.InvokeRequest(start=start()), metadata=ADA)
    assert "done" == run.reply.parts[0].text


async def test_lists_hold_its_own_only_and_pages_are_full(served: Running) -> None:
    for number in range(4):
        by = (ADA, EVE)[number % 2]
        new = v1.Session(name=f"sessions/s{number}", agent="agents/clerk")
        request = v1.InvokeRequest(start=start(session="", new_session=new))
        await served.runs.Invoke(request, metadata=by)
    listed, token = [], ""
    while True:
        page = await served.sessions.ListSessions(v1.ListSessionsRequest(page_size=1, page_token=token), metadata=ADA)
        listed += [session.name for session in page.sessions]
        if not (token := page.next_page_token):
            break
    assert ["sessions/s2", "sessions/s0", "sessions/case"] == listed
    everything = v1.ListSessionsRequest(filter="user = users/ada OR user = users/eve")
    assert 3 == len((await served.sessions.ListSessions(everything, metadata=ADA)).sessions)
    assert [] == list(
        (await served.sessions.ListSessions(v1.ListSessionsRequest(filter="user = users/eve"), metadata=ADA)).sessions
    )
    runs, token = [], ""
    while True:
        request_ = v1.ListRunsRequest(parent="sessions/-", page_size=1, page_token=token)
        found = await served.runs.ListRuns(request_, metadata=ADA)
        runs += [run.name.partition("/runs/")[0] for run in found.runs]
        if not (token := found.next_page_token):
            break
    assert ["sessions/s2", "sessions/s0"] == runs


async def test_another_users_session_is_not_there_for_a_command_or_a_stream(served: Running) -> None:
    assert "SESSION_NOT_FOUND" == (await refusal(send(served, EVE, start=start())))[0]
    assert "SESSION_NOT_FOUND" == (await refusal(send(served, EVE, cancel=v1.CancelCommand())))[0]
    for frame in (
        v1.RunRequest(start=start()),
        v1.RunRequest(start=start(on_busy=v1.StartRun.ON_BUSY_ROLLBACK)),
        v1.RunRequest(attach=v1.AttachRun(name="sessions/case", after_sequence=0)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in served.runs.Run(iter([frame]), metadata=EVE):
                pass
        assert "SESSION_NOT_FOUND" == reason_of(refused.value)
    runs = (await served.runs.ListRuns(v1.ListRunsRequest(parent="sessions/case"), metadata=ADMIN)).runs
    assert [] == list(runs)


async def content(served: Running, by: Words, data: bytes, **fields: Any) -> v1.Blob:
    first = v1.UploadBlobRequest(blob=v1.Blob(media_type="text/plain"), chunk=data, last=True, **fields)
    return await served.blobs.UploadBlob(iter([first]), metadata=by)


async def test_content_can_be_read_by_its_uploader_and_by_users_whose_session_refers_to_it(served: Running) -> None:
    """And for no other user, whatever request names it."""
    blob = await content(served, ADA, b"secret")
    look = v1.GetBlobRequest(name=blob.name)
    assert 6 == (await served.blobs.GetBlob(look, metadata=ADA)).size_bytes
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="eves"), metadata=EVE)
    part = v1.Message(parts=[v1.Part(blob=blob)])
    value = v1.Value(blob_value=blob)
    deep = v1.Value(map_value=v1.ValueMap(values={"a": v1.Value(list_value=v1.ValueList(values=[value]))}))
    named: list[Awaitable[Any]] = [
        served.blobs.GetBlob(look, metadata=EVE),
        served.blobs.DownloadBlob(v1.DownloadBlobRequest(name=blob.name), metadata=EVE).read(),
        served.messages.AppendMessages(v1.AppendMessagesRequest(parent="sessions/eves", messages=[part]), metadata=EVE),
        served.state.PutState(v1.PutStateRequest(name="users/eve/state", key="k", value=value), metadata=EVE),
        served.state.PutState(v1.PutStateRequest(name="sessions/eves/state", key="k", value=deep), metadata=EVE),
        served.sessions.CreateSession(v1.CreateSessionRequest(state={"k": deep}), metadata=EVE),
        served.runs.CreateRun(
            v1.CreateRunRequest(start=start(part, session="sessions/eves", agent="agents/clerk")), metadata=EVE
        ),
    ]
    assert {"BLOB_NOT_FOUND"} == {(await refusal(call))[0] for call in named}
    sent = v1.UploadBlobRequest(blob=v1.Blob(name=blob.name, media_type="text/plain"))
    assert "BLOB_CORRUPT" == (await refusal(served.blobs.UploadBlob(iter([sent]), metadata=EVE)))[0]
    await content(served, EVE, b"secret")  # she has it herself
    assert 6 == (await served.blobs.GetBlob(look, metadata=EVE)).size_bytes


async def test_content_that_ones_session_or_state_refers_to_is_ones_own(served: Running) -> None:
    for number, name in enumerate(("sessions/case/state", "users/ada/state")):
        blob = await content(served, ADMIN, b"plan %d" % number)
        look = v1.GetBlobRequest(name=blob.name)
        assert "BLOB_NOT_FOUND" == (await refusal(served.blobs.GetBlob(look, metadata=ADA)))[0]
        put = v1.PutStateRequest(name=name, key="plan", value=v1.Value(blob_value=blob))
        await served.state.PutState(put, metadata=ADMIN)
        await served.blobs.GetBlob(look, metadata=ADA)
        assert "BLOB_NOT_FOUND" == (await refusal(served.blobs.GetBlob(look, metadata=EVE)))[0]
        frame: Any = await served.blobs.DownloadBlob(v1.DownloadBlobRequest(name=blob.name), metadata=ADA).read()
        assert b"plan %d" % number == frame.chunk


async def test_an_upload_is_known_by_its_id_to_its_own_user_only(served: Running) -> None:
    await content(served, ADA, b"mine", upload_id="u")
    request = v1.GetUploadRequest(upload_id="u")
    assert "u" == (await served.blobs.GetUpload(request, metadata=ADA)).upload_id
    assert "BLOB_NOT_FOUND" == (await refusal(served.blobs.GetUpload(request, metadata=EVE)))[0]
    other = await content(served, EVE, b"hers", upload_id="u")
    assert f"blobs/{hashlib.sha256(b'hers').hexdigest()}" == other.name


async def waiting(served: Running, directive: str) -> v1.Run:
    request = v1.CreateRunRequest(start=start(said(directive), run_id="r"))
    run = await served.runs.CreateRun(request, metadata=ADA)
    return await served.runs.WaitRun(v1.WaitRunRequest(name=run.name), metadata=ADA)


async def test_it_answers_questions_and_no_approvals_nor_takes_them_back(served: Running) -> None:
    """By answer or by what it says; it may cancel its run."""
    run = await waiting(served, '/call pay {"amount": 1}')
    assert v1.Run.STATE_WAITING == run.state
    (asked,) = run.pending_inputs
    for decision in (v1.InputResponse.DECISION_APPROVE, v1.InputResponse.DECISION_DENY):
        answer = v1.InputResponse(input_id=asked.input_id, decision=decision)
        assert ("ROLE_MISSING", {"input_response.input_id"}) == await refusal(send(served, ADA, input_response=answer))
    for when in (v1.UserInput.WHEN_STEER, v1.UserInput.WHEN_FOLLOW_UP):
        said_ = v1.UserInput(messages=[said("Go on.")], when=when)
        assert v1.CommandResult.DISPOSITION_QUEUED == (await send(served, ADA, input=said_)).disposition
    said_ = v1.UserInput(messages=[said("Go on.")], when=v1.UserInput.WHEN_INTERRUPT)
    assert ("ROLE_MISSING", {"input"}) == await refusal(send(served, ADA, input=said_))
    found = await served.runs.GetRun(v1.GetRunRequest(name=run.name), metadata=ADMIN)
    assert [asked.input_id] == [each.input_id for each in found.pending_inputs]
    assert (
        "INPUT_NOT_PENDING"
        == (
            await refusal(
                send(
                    served,
                    ADA,
                    input_response=v1.InputResponse(input_id="none", decision=v1.InputResponse.DECISION_DENY),
                )
            )
        )[0]
    )
    cancelled = await served.runs.CancelRun(v1.CancelRunRequest(name=run.name), metadata=ADA)
    assert v1.Run.STATE_CANCELLED == cancelled.state


async def test_it_answers_what_it_is_asked(served: Running) -> None:
    run = await waiting(served, '/call ask_user {"question": "Which?"}')
    (asked,) = run.pending_inputs
    assert v1.InputRequest.KIND_QUESTION == asked.kind
    answer = v1.InputResponse(input_id=asked.input_id, decision=v1.InputResponse.DECISION_ANSWER, answer="This.")
    await send(served, ADA, input_response=answer)
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name), metadata=ADA)
    assert v1.Run.STATE_SUCCEEDED == ended.state


async def test_a_watcher_hears_nothing_of_the_tenants_state(served: Running) -> None:
    """Of its own user's it does."""
    request = v1.WatchEventsRequest(name="sessions/case", options=v1.WatchOptions(keep_open=True))
    stream = served.runs.WatchEvents(request, metadata=ADA)
    frame: Any = await stream.read()
    assert frame.HasField("attached")
    for name in ("app/state", "users/ada/state"):
        await served.state.PutState(v1.PutStateRequest(name=name, key="k", value=OP.set), metadata=ADMIN)
    await served.messages.AppendMessages(
        v1.AppendMessagesRequest(parent="sessions/case", messages=[said("Hello.")]), metadata=ADMIN
    )
    heard: list[v1.Event] = []
    while not durable([v1.RunResponse(batch=v1.EventBatch(events=heard))]):
        frame = await stream.read()
        heard += frame.batch.events
    stream.cancel()
    assert ["users/ada/state"] == [event.state_changed.state for event in heard if event.HasField("state_changed")]


async def test_a_request_refers_to_a_thousand_blobs_at_most(served: Running) -> None:
    """They are counted before anything is asked of the store."""
    named = [v1.Part(blob=v1.Blob(name=f"blobs/{number:064x}", media_type="text/plain")) for number in range(1001)]
    request = v1.AppendMessagesRequest(parent="sessions/case", messages=[v1.Message(parts=named)])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.messages.AppendMessages(request, metadata=ADA)
    assert ("INVALID_FIELD", {"request"}) == (reason_of(refused.value), fields_of(refused.value))


async def test_a_request_of_very_many_values_is_looked_at_in_a_thread_and_not_to_its_end(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it refers to content of others is asked before anything else is checked."""
    loop, looked, look = threading.get_ident(), list[bool](), fold._messages

    def looking(*arguments: Any) -> Sequence[Message]:
        looked.append(threading.get_ident() == loop)
        return look(*arguments)

    monkeypatch.setattr(fold, "_messages", looking)
    value = wide_list(200, wide_list(1000, v1.Value(list_value=v1.ValueList())))
    request = v1.PutStateRequest(name="sessions/case/state", key="blobs/", value=value)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.state.PutState(request, metadata=ADA)
    assert ("INVALID_FIELD", {"request"}) == (reason_of(refused.value), fields_of(refused.value))
    assert 0 < len(looked) <= MOST_WITHIN
    assert not any(looked)

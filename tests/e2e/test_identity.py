"""A session is its uid: two sessions of one name are two to everybody."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from notecase import v1
from notecase_server.models.openai import OpenAIProvider
from notecase_server.store.contract import CommandId, SessionKey

from tests.e2e.driving import events_of, fields_of, log_of, reason_of, said
from tests.e2e.test_transfer import export, load
from tests.store.build import ManualClock
from tests.support.openai_server import OpenAIServer, reply
from tests.support.server import TENANT, Running, running

CASE = "sessions/case"
SECRET = "What only the old session knows."
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
KEEP_OPEN = v1.WatchOptions(keep_open=True)
CLERK = v1.Session(agent="agents/clerk", user="users/ada")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def served(store_url: str, model: OpenAIServer, clock: ManualClock) -> AsyncIterator[Running]:
    """A server with a clock that only the test advances, an agent and a session to copy."""
    async with running(store_url, {"openai": OpenAIProvider("test-key", model.url, "stub-1")}, clock=clock) as server:
        await server.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent())))
        source = v1.CreateSessionRequest(session_id="source", session=v1.Session(agent="agents/clerk"))
        await server.sessions.CreateSession(source)
        yield server


async def create(served: Running) -> v1.Session:
    return await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=CLERK))


async def start_new(served: Running) -> v1.Session:
    new = v1.Session(name=CASE, agent="agents/clerk", user="users/ada")
    start = v1.StartRun(new_session=new, run_id="made", messages=[said("Hello")])
    await served.runs.Invoke(v1.InvokeRequest(start=start))
    return await found(served)


async def fork(served: Running) -> v1.Session:
    return await served.sessions.ForkSession(v1.ForkSessionRequest(name="sessions/source", session_id="case"))


async def import_file(served: Running) -> v1.Session:
    return await load(served, await export(served, "sessions/source"), session_id="case")


Make = Callable[[Running], Awaitable[v1.Session]]
WAYS: list[Make] = [create, start_new, fork, import_file]


async def delete(served: Running, clock: ManualClock) -> None:
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=CASE))


async def expire(served: Running, clock: ManualClock) -> None:
    clock.now += 61_000_000


async def erase(served: Running, clock: ManualClock) -> None:
    await served.sessions.EraseUser(v1.EraseUserRequest(name="users/ada"))


async def found(served: Running) -> v1.Session:
    return await served.sessions.GetSession(v1.GetSessionRequest(name=CASE))


async def refusal_of(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value


async def drained(stream: Any) -> list[v1.RunResponse]:
    return [frame async for frame in stream]


async def old_session(served: Running) -> v1.Session:
    """Messages, state and a run that has ended, more than a page of one holds."""
    request = v1.CreateSessionRequest(session_id="case", session=CLERK)
    request.session.ttl.seconds = 60
    for key in ("a", "b"):
        request.state[key].string_value = SECRET
    session = await served.sessions.CreateSession(request)
    for run in ("first", "second"):
        await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=CASE, run_id=run, messages=[said(SECRET)])))
    return session


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("end", [delete, expire, erase])
async def test_a_session_made_again_under_its_name_is_another(
    served: Running,
    model: OpenAIServer,
    clock: ManualClock,
    end: Callable[[Running, ManualClock], Awaitable[None]],
    make: Make,
) -> None:
    """While one stream follows the old one and a run is at work in it. The new one can at once be read, watched and
    run, and nothing of the old one shows in it."""
    old = await old_session(served)
    asked = len(model.requests)
    model.script(reply(SECRET, chunks=3).held(asyncio.Event(), after=2))
    start = v1.StartRun(session=CASE, run_id="busy", messages=[said(SECRET)])
    at_work = aiter(served.runs.Run(iter([v1.RunRequest(start=start)])))
    watch = aiter(served.runs.WatchEvents(v1.WatchEventsRequest(name=CASE, after_sequence=0, options=KEEP_OPEN)))
    assert (await anext(watch)).attached.session_uid == old.uid
    assert (await anext(at_work)).attached.session_uid == old.uid
    await model.request(asked)

    await end(served, clock)
    for stream in (watch, at_work):
        assert reason_of(await refusal_of(drained(stream))) == "SESSION_NOT_FOUND"
    new = await make(served)

    assert new.uid != old.uid
    assert UUID4.fullmatch(new.uid)
    seen: list[Message] = [new, await found(served), *await log_of(served, CASE)]
    following = v1.WatchEventsRequest(name=CASE, after_sequence=0, options=KEEP_OPEN, if_session_uid=new.uid)
    call = served.runs.WatchEvents(following)
    watch = aiter(call)
    assert (await anext(watch)).attached.session_uid == new.uid
    model.script(reply("Streamed."), reply("Invoked."))
    streamed = await drained(
        served.runs.Run(iter([v1.RunRequest(start=v1.StartRun(session=CASE, run_id="busy", messages=[said("Go")]))]))
    )
    assert streamed[0].attached.session_uid == new.uid
    (said_then,) = [event.message_added for event in events_of(streamed) if event.message_added.role == 2]
    assert said_then.parts[0].text == "Streamed."
    invoked = await served.runs.Invoke(
        v1.InvokeRequest(start=v1.StartRun(session=CASE, run_id="second", messages=[said("Go")]))
    )
    assert invoked.run.state == v1.Run.STATE_SUCCEEDED
    head = (await found(served)).last_sequence
    watched = 0
    while watched < head:
        frame = await anext(watch)
        seen.append(frame)
        watched = max([watched, *(event.sequence for event in frame.batch.events)])
    call.cancel()
    runs = await served.runs.ListRuns(v1.ListRunsRequest(parent=CASE))
    state = await served.state.GetState(v1.GetStateRequest(name=f"{CASE}/state"))
    seen += [*streamed, invoked, runs, state, await served.messages.ListMessages(v1.ListMessagesRequest(parent=CASE))]
    assert [message for message in seen if SECRET.encode() in message.SerializeToString()] == []
    assert {run.name.rpartition("/")[2] for run in runs.runs} - {"made"} == {"busy", "second"}
    assert dict(state.entries) == {}
    asked_for = v1.GetRunRequest(name=f"{CASE}/runs/first")
    assert reason_of(await refusal_of(served.runs.GetRun(asked_for))) == "RUN_NOT_FOUND"


Named = Callable[[Running, str, tuple[tuple[str, str], ...]], Awaitable[Any]]


def attach(served: Running, uid: str, metadata: tuple[tuple[str, str], ...]) -> Awaitable[Any]:
    attach = v1.AttachRun(name=CASE, if_session_uid=uid)
    return drained(served.runs.Run(iter([v1.RunRequest(attach=attach)]), metadata=metadata))


def watch_events(served: Running, uid: str, metadata: tuple[tuple[str, str], ...]) -> Awaitable[Any]:
    return drained(served.runs.WatchEvents(v1.WatchEventsRequest(name=CASE, if_session_uid=uid), metadata=metadata))


def send(served: Running, uid: str, metadata: tuple[tuple[str, str], ...]) -> Awaitable[Any]:
    command = v1.RunRequest(update_state=v1.StateUpdate(ops=[v1.StateOp(key="n", increment=1)]))
    request = v1.SendCommandRequest(session=CASE, command=command, if_session_uid=uid)
    return served.runs.SendCommand(request, metadata=metadata)


def start_run(served: Running, uid: str, metadata: tuple[tuple[str, str], ...]) -> Awaitable[Any]:
    start = v1.StartRun(session=CASE, messages=[said("Go")], if_session_uid=uid)
    return served.runs.CreateRun(v1.CreateRunRequest(start=start), metadata=metadata)


def start_on_a_stream(served: Running, uid: str, metadata: tuple[tuple[str, str], ...]) -> Awaitable[Any]:
    start = v1.StartRun(session=CASE, messages=[said("Go")], if_session_uid=uid)
    return drained(served.runs.Run(iter([v1.RunRequest(start=start)]), metadata=metadata))


def start_by_command(served: Running, uid: str, metadata: tuple[tuple[str, str], ...]) -> Awaitable[Any]:
    start = v1.StartRun(session=CASE, messages=[said("Go")], if_session_uid=uid)
    request = v1.SendCommandRequest(session=CASE, command=v1.RunRequest(start=start))
    return served.runs.SendCommand(request, metadata=metadata)


@pytest.mark.parametrize("call", [attach, watch_events, send, start_run, start_on_a_stream, start_by_command])
async def test_a_caller_may_say_which_session_is_meant(served: Running, call: Named) -> None:
    """By its uid: the old one's, another session's and another tenant's are SESSION_NOT_FOUND, and change nothing."""
    old = await create(served)
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=CASE))
    new = await create(served)
    source = await served.sessions.GetSession(v1.GetSessionRequest(name="sessions/source"))
    other = ((TENANT, "other"),)
    theirs = await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"), metadata=other)
    strangers = [(old.uid, ()), (source.uid, ()), (theirs.uid, ()), (new.uid, other)]
    for uid, metadata in strangers:
        assert reason_of(await refusal_of(call(served, uid, metadata))) == "SESSION_NOT_FOUND"
    for malformed in ("case", new.uid.upper(), new.uid + "0", "{" + new.uid + "}"):
        refused = await refusal_of(call(served, malformed, ()))
        assert reason_of(refused) == "INVALID_FIELD"
        assert [field.rpartition(".")[2] for field in fields_of(refused)] == ["if_session_uid"]
    assert (await found(served)).last_sequence == new.last_sequence
    await call(served, new.uid, ())


async def test_a_page_token_is_good_for_one_session(served: Running) -> None:
    """Not for the next one of the name."""
    await old_session(served)

    async def messages(token: str) -> str:
        request = v1.ListMessagesRequest(parent=CASE, page_size=1, page_token=token)
        return (await served.messages.ListMessages(request)).next_page_token

    async def state(token: str) -> str:
        request = v1.GetStateRequest(name=f"{CASE}/state", page_size=1, page_token=token)
        return (await served.state.GetState(request)).next_page_token

    async def keys(token: str) -> str:
        request = v1.GetStateRequest(name=f"{CASE}/state", keys=["a", "b"], page_size=1, page_token=token)
        return (await served.state.GetState(request)).next_page_token

    async def runs(token: str) -> str:
        request = v1.ListRunsRequest(parent=CASE, page_size=1, page_token=token)
        return (await served.runs.ListRuns(request)).next_page_token

    lists = [messages, state, keys, runs]
    tokens = [await page("") for page in lists]
    for page, token in zip(lists, tokens, strict=True):
        assert token != ""
        await page(token)
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=CASE))
    await old_session(served)
    for page, token in zip(lists, tokens, strict=True):
        assert reason_of(await refusal_of(page(token))) == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize("make", WAYS)
async def test_of_two_made_at_once_during_a_deletion_one_is_there(served: Running, make: Make) -> None:
    """Whichever of the three comes first; and it is not the old one."""
    for _ in range(5):
        old = await create(served)

        async def made(old: v1.Session) -> str:
            """The uid of the created session; empty when another new session took the name."""
            while True:
                try:
                    return (await make(served)).uid
                except grpc.aio.AioRpcError as error:
                    assert reason_of(error) in {"ALREADY_EXISTS", "REQUEST_ID_REUSED", "RUN_ACTIVE"}
                try:
                    if (await found(served)).uid != old.uid:
                        return ""
                except grpc.aio.AioRpcError as error:
                    assert reason_of(error) == "SESSION_NOT_FOUND"

        deletion = served.sessions.DeleteSession(v1.DeleteSessionRequest(name=CASE))
        uids = await asyncio.gather(made(old), made(old), deletion)
        there = await found(served)
        assert {uid for uid in uids[:2] if uid} == {there.uid}
        assert there.uid != old.uid
        listed = await served.sessions.ListSessions(v1.ListSessionsRequest())
        assert [session.uid for session in listed.sessions if session.name == CASE] == [there.uid]
        await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=CASE))


async def test_a_start_that_makes_a_session_never_takes_a_uid_over(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the one that had the name is deleted between the look at it and the commit."""
    old = await create(served)
    store = served.server._store
    recall = store.recall_command

    async def deleted_meanwhile(key: SessionKey, command: CommandId | None) -> None:
        if key.uid == old.uid:
            await served.server._sessions.delete(key)
        await recall(key, command)

    monkeypatch.setattr(store, "recall_command", deleted_meanwhile)
    new = await start_new(served)
    assert UUID4.fullmatch(new.uid)
    assert new.uid != old.uid


async def test_an_import_has_a_new_uid(served: Running) -> None:
    """The file knows none, and a caller cannot choose one."""
    chosen = v1.Session(agent="agents/clerk", uid="00000000-0000-4000-8000-000000000000")
    source = await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=chosen))
    file = await export(served, CASE)
    copies = [await load(served, file), await load(served, file)]
    uids = {session.uid for session in (source, *copies)}
    assert len(uids) == 3
    assert chosen.uid not in uids
    assert all(UUID4.fullmatch(uid) for uid in uids)
    assert [uid for uid in uids if uid.encode() in file] == []

"""Who calls and what they may: one credential a call, a role for each method and field, and streams that end when what
they were opened with does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.field_mask_pb2 import FieldMask
from notecase import v1
from notecase_server import errors
from notecase_server.auth import rights
from notecase_server.auth.chain import Chain
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.errors import NotecaseError
from notecase_server.models.openai import OpenAIProvider
from notecase_server.rpc import interceptor
from notecase_server.rpc.server import SERVICES

from tests.e2e.driving import fields_of, metadata_of, reason_of, said
from tests.support.callers import ByWord, Words, who, word
from tests.support.openai_server import OpenAIServer, reply
from tests.support.polling import until
from tests.support.server import Running, running

TENANTS = [Role.VIEWER, Role.USER, Role.DEVELOPER, Role.ADMIN]


@asynccontextmanager
async def serving(words: ByWord | None = None, **settings: Any) -> AsyncIterator[Running]:
    async with running(authenticators=[words or ByWord()], **settings) as served:
        yield served


async def reason(call: Awaitable[Any]) -> str:
    """Returns the reason for which a call is refused, with its details; empty when it is answered."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        told = reason_of(error)
        if told == "ROLE_MISSING":
            assert grpc.StatusCode.PERMISSION_DENIED == error.code()
            return f"needs {metadata_of(error)['role']}"
        return told
    return ""


def test_every_method_of_the_server_has_a_right() -> None:
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(f"notecase.v1.{name}") for name in SERVICES]
    paths = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    reflection = {path for path in rights.METHODS if path.startswith("/grpc.reflection.")}
    assert paths | reflection == set(rights.METHODS)
    assert 2 == len(reflection)


@pytest.mark.parametrize("method", rights.METHODS)
def test_a_role_has_the_rights_of_those_before_it(method: str) -> None:
    refused = [role for role in TENANTS if rights.refusal(who(role), method)]
    assert refused == TENANTS[: len(refused)]


def test_a_method_without_a_right_is_the_admins() -> None:
    assert [None] == [rights.refusal(who(Role.ADMIN), "/notecase.v1.RunService/Unheard")]
    for role in (*TENANTS[:-1], Role.OPERATOR):
        assert rights.refusal(who(role), "/notecase.v1.RunService/Unheard")


class Fixed:
    """Knows every caller, or none."""

    def __init__(self, principal: Principal | None) -> None:
        self.answer = principal

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        return self.answer


async def test_exactly_one_authenticator_may_know_the_caller() -> None:
    ada, eve = who(Role.USER, subject="ada"), who(Role.USER, subject="eve")
    assert ada == await Chain([Fixed(None), Fixed(ada)]).principal((), dict)
    for known in ([Fixed(ada), Fixed(eve)], [Fixed(ada), Fixed(ada)], [Fixed(None)]):
        with pytest.raises(NotecaseError) as refused:
            await Chain(known).principal((), dict)
        assert v1.ERROR_REASON_UNAUTHENTICATED == refused.value.reason


async def test_a_call_holds_one_credential() -> None:
    mine = word(who(Role.VIEWER))
    async with serving() as served:
        ask: Callable[[Words], Awaitable[str]] = lambda metadata: reason(  # noqa: E731
            served.info.GetServerInfo(v1.GetServerInfoRequest(), metadata=metadata)
        )
        assert "" == await ask(mine)
        assert "UNAUTHENTICATED" == await ask(())
        assert "UNAUTHENTICATED" == await ask((("authorization", "Bearer unheard-of"),))
        assert "UNAUTHENTICATED" == await ask((*mine, *mine))
        assert "UNAUTHENTICATED" == await ask((*mine, ("authorization", "Bearer unheard-of")))


async def test_without_authenticators_a_caller_is_the_admin_of_one_tenant() -> None:
    async with running(authenticators=()) as served:
        request = v1.EraseUserRequest(name="users/ada")
        assert "" == await reason(served.sessions.EraseUser(request))
        assert "" == await reason(served.sessions.EraseUser(request, metadata=(("authorization", "Bearer x"),)))


async def test_a_refused_upload_gets_the_reason() -> None:
    """Although its caller writes on."""

    async def chunks() -> AsyncIterator[v1.UploadBlobRequest]:
        for _ in range(30):
            yield v1.UploadBlobRequest(chunk=bytes(1 << 20))

    async with serving() as served:
        assert "UNAUTHENTICATED" == await reason(served.blobs.UploadBlob(chunks()))
        assert "needs USER" == await reason(served.blobs.UploadBlob(chunks(), metadata=word(who(Role.VIEWER))))


LABELS = {"team": "night"}
LABELLED = v1.Message(labels=LABELS, parts=said("Hello.").parts)
NEW = v1.Session(agent="agents/clerk", labels=LABELS)
PUT = v1.PutStateRequest(name="app/state", key="policy", value=v1.Value(bool_value=True))
OP = v1.StateOp(key="policy", set=v1.Value(bool_value=True))
SETTLED = v1.StartRun(session="sessions/case", messages=[said("/say done")], settings=v1.RunSettings(instruction=""))


async def drained(call: Any) -> list[v1.RunResponse]:
    return [frame async for frame in call]


FIELDS: dict[str, tuple[Callable[[Running, Words], Awaitable[Any]], set[str]]] = {
    "labels of a new session": (
        lambda on, by: on.sessions.CreateSession(v1.CreateSessionRequest(session=NEW), metadata=by),
        {"session.labels"},
    ),
    "labels of a session": (
        lambda on, by: on.sessions.UpdateSession(
            v1.UpdateSessionRequest(session=v1.Session(name="sessions/case", labels=LABELS)), metadata=by
        ),
        {"session.labels"},
    ),
    "labels taken away": (
        lambda on, by: on.sessions.UpdateSession(
            v1.UpdateSessionRequest(
                session=v1.Session(name="sessions/case"), update_mask=FieldMask(paths=["display_name", "labels"])
            ),
            metadata=by,
        ),
        {"session.labels"},
    ),
    "labels of a fork": (
        lambda on, by: on.sessions.ForkSession(
            v1.ForkSessionRequest(name="sessions/case", session=v1.Session(labels=LABELS)), metadata=by
        ),
        {"session.labels"},
    ),
    "labels of a run, its session and its messages": (
        lambda on, by: on.runs.CreateRun(
            v1.CreateRunRequest(start=v1.StartRun(new_session=NEW, labels=LABELS, messages=[LABELLED])),
            metadata=by,
        ),
        {"start.labels", "start.new_session.labels", "start.messages[0].labels"},
    ),
    "settings of a run": (
        lambda on, by: on.runs.CreateRun(v1.CreateRunRequest(start=SETTLED), metadata=by),
        {"start.settings"},
    ),
    "settings of a run by a command": (
        lambda on, by: on.runs.SendCommand(
            v1.SendCommandRequest(session="sessions/case", command=v1.RunRequest(start=SETTLED)), metadata=by
        ),
        {"start.settings"},
    ),
    "settings of a run on a stream": (
        lambda on, by: drained(on.runs.Run(iter([v1.RunRequest(start=SETTLED)]), metadata=by)),
        {"start.settings"},
    ),
    "settings of a run that is waited for": (
        lambda on, by: on.runs.Invoke(v1.InvokeRequest(start=SETTLED), metadata=by),
        {"start.settings"},
    ),
    "labels of a message": (
        lambda on, by: on.messages.AppendMessages(
            v1.AppendMessagesRequest(parent="sessions/case", messages=[LABELLED]),
            metadata=by,
        ),
        {"messages[0].labels"},
    ),
    "a key of the tenant's state": (lambda on, by: on.state.PutState(PUT, metadata=by), {"name"}),
    "the tenant's state": (
        lambda on, by: on.state.UpdateState(v1.UpdateStateRequest(name="app/state", ops=[OP]), metadata=by),
        {"name"},
    ),
    "the tenant's state by a command": (
        lambda on, by: on.runs.SendCommand(
            v1.SendCommandRequest(
                session="sessions/case",
                command=v1.RunRequest(update_state=v1.StateUpdate(name="app/state", ops=[OP])),
            ),
            metadata=by,
        ),
        {"update_state.name"},
    ),
}
"""Requests with fields that only developers may set, and the fields in the error."""


@pytest.mark.parametrize("case", FIELDS)
async def test_a_field_that_the_role_may_not_set_is_named(case: str) -> None:
    call, fields = FIELDS[case]
    developer = word(who(Role.DEVELOPER))
    async with serving() as served:
        clerk = v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent()))
        await served.agents.CreateAgent(clerk, metadata=developer)
        await served.sessions.CreateSession(
            v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk")), metadata=developer
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(served, word(who(Role.USER)))
        assert ("ROLE_MISSING", fields) == (reason_of(refused.value), fields_of(refused.value))
        await call(served, developer)


async def test_a_user_changes_a_session_that_has_labels() -> None:
    """What came along when it was read is not set."""
    async with serving() as served:
        made = await served.sessions.CreateSession(
            v1.CreateSessionRequest(session=v1.Session(labels=LABELS)), metadata=word(who(Role.DEVELOPER))
        )
        made.display_name = "Night"
        request = v1.UpdateSessionRequest(session=made, update_mask=FieldMask(paths=["display_name"]))
        changed = await served.sessions.UpdateSession(request, metadata=word(who(Role.USER)))
        assert ("Night", LABELS) == (changed.display_name, dict(changed.labels))


async def test_a_request_id_and_a_page_token_are_the_subjects_own() -> None:
    ada, eve = (word(who(Role.USER, subject=subject)) for subject in ("ada", "eve"))
    async with serving() as served:
        for number in range(2):
            new = v1.CreateSessionRequest(session_id=f"s{number}")
            await served.sessions.CreateSession(new, metadata=ada)
        request = v1.CreateSessionRequest(request_id="once")
        first, repeat, other = [await served.sessions.CreateSession(request, metadata=by) for by in (ada, ada, eve)]
        assert first.name == repeat.name
        assert first.name != other.name
        page = await served.sessions.ListSessions(v1.ListSessionsRequest(page_size=1), metadata=ada)
        onward = v1.ListSessionsRequest(page_size=1, page_token=page.next_page_token)
        assert "PAGE_TOKEN_INVALID" == await reason(served.sessions.ListSessions(onward, metadata=eve))
        assert "" == await reason(served.sessions.ListSessions(onward, metadata=ada))


# ---- streams


class Lasting:
    """Calls of one caller that do not end by themselves, on a server whose judge is called by the test."""

    def __init__(self, served: Running, words: ByWord, by: Words) -> None:
        self.served = served
        self.words = words
        self.by = by

    async def judge(self) -> None:
        await self.served.server._doorway.judge()

    async def watch(self) -> AsyncIterator[Any]:
        request = v1.WatchEventsRequest(name="sessions/case", options=v1.WatchOptions(keep_open=True))
        stream = self.served.runs.WatchEvents(request, metadata=self.by)
        async for frame in stream:
            yield frame

    async def run(self) -> AsyncIterator[Any]:
        async def frames() -> AsyncIterator[v1.RunRequest]:
            options = v1.WatchOptions(keep_open=True)
            yield v1.RunRequest(attach=v1.AttachRun(name="sessions/case", options=options))
            await asyncio.Event().wait()

        async for frame in self.served.runs.Run(frames(), metadata=self.by):
            yield frame


@pytest.fixture
async def lasting(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lasting]:
    monkeypatch.setattr(interceptor, "JUDGE_SECONDS", 3600)
    words, by = ByWord(), word(who(Role.USER, subject="ada"))
    async with serving(words) as served:
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"), metadata=by)
        yield Lasting(served, words, by)


async def next_event(stream: Any) -> str:
    """The kind of the next event; heartbeats come in between."""
    while not (events := (await anext(stream)).batch.events):
        pass
    return str(events[0].WhichOneof("payload"))


CHANGES: dict[str, Callable[[ByWord], Any]] = {
    "revoked": lambda words: words.revoked.add("ada"),
    "another role": lambda words: words.roles.update(ada=Role.VIEWER),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", ["watch", "run"])
async def test_a_stream_ends_when_its_credential_does(lasting: Lasting, shape: str, change: str) -> None:
    """Until then it is left alone, however often it is judged; and others go on."""
    stream, other = (
        getattr(lasting, shape)(),
        Lasting(lasting.served, lasting.words, word(who(Role.USER, subject="eve"))),
    )
    going_on = other.watch()
    assert {"attached"} == {(await anext(each)).WhichOneof("frame") for each in (stream, going_on)}
    await lasting.judge()
    CHANGES[change](lasting.words)
    await lasting.judge()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in stream:
            pass
    assert (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED") == (ended.value.code(), reason_of(ended.value))
    request = v1.AppendMessagesRequest(parent="sessions/case", messages=[said("Go on.")])
    await lasting.served.messages.AppendMessages(request, metadata=other.by)
    assert await next_event(going_on) == "message_added"


@pytest.mark.parametrize("away", [errors.store_unavailable, errors.issuer_unavailable])
async def test_a_stream_goes_on_while_its_credential_cannot_be_looked_up(
    lasting: Lasting, away: Callable[[], NotecaseError]
) -> None:
    stream = lasting.watch()
    await anext(stream)
    lasting.words.error = away()
    await lasting.judge()
    lasting.words.error = None
    request = v1.AppendMessagesRequest(parent="sessions/case", messages=[said("Go on.")])
    await lasting.served.messages.AppendMessages(request, metadata=lasting.by)
    assert await next_event(stream) == "message_added"


async def test_a_call_without_its_request_ends_with_its_credential(lasting: Lasting) -> None:
    """Otherwise the request could come, and be carried out, long after that."""
    judged, doorway = asyncio.Event(), lasting.served.server._doorway

    async def late() -> AsyncIterator[v1.GetSessionRequest]:
        await judged.wait()
        yield v1.GetSessionRequest(name="sessions/case")

    method: Any = lasting.served.channel.stream_unary(
        "/notecase.v1.SessionService/GetSession",
        request_serializer=v1.GetSessionRequest.SerializeToString,
        response_deserializer=v1.Session.FromString,
    )
    for revoked in (False, True):
        call = method(late(), metadata=lasting.by)
        await until(lambda: any(one.principal is not None for one in doorway._under_way.values()))
        if revoked:
            lasting.words.revoked.add("ada")
        await lasting.judge()
        judged.set()
        assert ("UNAUTHENTICATED" if revoked else "") == await reason(call)
        judged.clear()
        await until(lambda: not doorway._under_way)


@pytest.mark.parametrize("method", ["WaitRun", "Invoke"])
async def test_a_call_that_waits_ends_as_a_stream_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor's loop finds it; the run goes on."""
    monkeypatch.setattr(interceptor, "JUDGE_SECONDS", 0.01)
    words, by, never = ByWord(), word(who(Role.DEVELOPER, subject="ada")), asyncio.Event()
    other = word(who(Role.DEVELOPER, subject="eve"))
    async with OpenAIServer() as model:
        provider = OpenAIProvider("test-key", model.url, "stub-1")
        async with serving(words, providers={"openai": provider}) as served:
            model.script(reply("Late.").held(never))
            clerk = v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent()))
            await served.agents.CreateAgent(clerk, metadata=other)
            start = v1.StartRun(new_session=v1.Session(name="sessions/case", agent="agents/clerk"), run_id="first")
            start.messages.append(said("Hello."))
            if method == "Invoke":
                calling: Any = served.runs.Invoke(v1.InvokeRequest(start=start), metadata=by)
            else:
                run = await served.runs.CreateRun(v1.CreateRunRequest(start=start), metadata=other)
                calling = served.runs.WaitRun(v1.WaitRunRequest(name=run.name), metadata=by)
            await model.request(0)
            await words.asked("ada", 2)  # at its start, and then by the judge
            words.revoked.add("ada")
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await calling
            assert "UNAUTHENTICATED" == reason_of(ended.value)
            never.set()
            waited = v1.WaitRunRequest(name="sessions/case/runs/first")
            assert v1.Run.STATE_SUCCEEDED == (await served.runs.WaitRun(waited, metadata=other)).state


async def test_a_caller_can_read_what_its_credential_says() -> None:
    """So that a program can tell beforehand what it may do; without credentials everybody may do everything."""
    for principal in (who(Role.DEVELOPER), who(Role.USER, user="ada")):
        async with serving() as served:
            info = await served.info.GetServerInfo(v1.GetServerInfoRequest(), metadata=word(principal))
        user = f"users/{principal.user}" if principal.user else ""
        assert v1.ServerInfo.Caller(role=v1.Key.Role.Value(f"ROLE_{principal.role.name}"), user=user) == info.caller
    async with running() as served:
        assert not (await served.info.GetServerInfo(v1.GetServerInfoRequest())).HasField("caller")

"""The doorway: every service's calls are guarded alike, and a stop of the server is an answer, too."""

import asyncio
import sqlite3
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from notecase import v1
from notecase_server import errors, serve
from notecase_server.auth.chain import DEVELOPMENT, Chain
from notecase_server.auth.principal import AuthContext, Metadata, Principal
from notecase_server.errors import NotecaseError, Violation
from notecase_server.models.openai import OpenAIProvider
from notecase_server.rpc import interceptor
from notecase_server.rpc.caller import caller
from notecase_server.rpc.gate import Gate
from notecase_server.rpc.interceptor import Doorway
from notecase_server.rpc.standby import _AnyMethod, _Doorway
from notecase_server.store.memory import MemoryStore
from notecase_server.store.sqlite import writer as sqlite_writer
from structlog.testing import capture_logs

from tests.e2e.driving import detail_of, fields_of, reason_of, said
from tests.store.test_sqlite import full_disk
from tests.support.openai_server import OpenAIServer, reply
from tests.support.polling import until
from tests.support.server import Running, running

GARBAGE = {"not UTF-8": b"\x0a\x03\xff\xfe\xfd", "cut off": b"\x0a\x7f", "no message": b"\xff\xff\xff"}

Shape = Callable[[Any, str, bytes], Awaitable[Any]]


async def unary_unary(channel: Any, method: str, frame: bytes) -> Any:
    return await channel.unary_unary(method)(frame)


async def unary_stream(channel: Any, method: str, frame: bytes) -> Any:
    return await channel.unary_stream(method)(frame).read()


async def stream_unary(channel: Any, method: str, frame: bytes) -> Any:
    return await channel.stream_unary(method)(iter([frame]))


async def stream_stream(channel: Any, method: str, frame: bytes) -> Any:
    return await channel.stream_stream(method)(iter([frame])).read()


METHODS: dict[str, Shape] = {
    "/notecase.v1.SessionService/GetSession": unary_unary,
    "/notecase.v1.RunService/WatchEvents": unary_stream,
    "/notecase.v1.SessionService/ImportSession": stream_unary,
    "/notecase.v1.RunService/Run": stream_stream,
    "/grpc.health.v1.Health/Check": unary_unary,
    "/grpc.health.v1.Health/Watch": unary_stream,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": stream_stream,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": stream_stream,
}


@pytest.mark.parametrize("frame", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("method", METHODS)
async def test_garbage_is_an_invalid_argument_to_every_service(method: str, frame: bytes) -> None:
    """The log has a line for it, without a traceback and without the garbage."""
    async with running() as served:
        with capture_logs() as lines, pytest.raises(grpc.aio.AioRpcError) as refused:
            await METHODS[method](served.channel, method, frame)
        assert grpc.StatusCode.INVALID_ARGUMENT == refused.value.code()
        assert ("INVALID_FIELD", {"request"}) == (reason_of(refused.value), fields_of(refused.value))
        (line,) = [line for line in lines if line["event"].startswith("rpc_")]
        assert {"event", "log_level", "reason", "problem"} == line.keys()
        assert ("rpc_refused", "INVALID_FIELD") == (line["event"], line["reason"])


@pytest.mark.parametrize("method", ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"])
async def test_every_service_refuses_requests_that_are_too_large(method: str) -> None:
    frame = health_pb2.HealthCheckRequest(service="x" * (5 << 20)).SerializeToString()
    async with running() as served:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await METHODS[method](served.channel, method, frame)
        assert "PAYLOAD_TOO_LARGE" == reason_of(refused.value)


async def test_health_answers_as_its_protocol_says() -> None:
    async with running() as served:
        health: Any = health_pb2_grpc.HealthStub(served.channel)  # its types know no methods
        for service in ("", "notecase.v1.RunService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health_pb2.HealthCheckResponse.SERVING == (await health.Check(request)).status
            assert health_pb2.HealthCheckResponse.SERVING == (await health.Watch(request).read()).status
        unknown = health_pb2.HealthCheckRequest(service="acme.v1.Unknown")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health.Check(unknown)
        assert grpc.StatusCode.NOT_FOUND == refused.value.code()
        assert health_pb2.HealthCheckResponse.SERVICE_UNKNOWN == (await health.Watch(unknown).read()).status


async def test_health_follows_whether_the_store_takes_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told on a stream as well, with the reason in the log; the process is alive all the while, and reads go on."""
    monkeypatch.setattr(serve, "PROBE_SECONDS", 0.01)
    states = health_pb2.HealthCheckResponse
    path = tmp_path / "store.db"
    async with running(f"sqlite:{path}") as served:
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(service="notecase.v1.RunService"))
        assert states.SERVING == (await watching.read()).status
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s"))
        for _ in range(2):
            with capture_logs() as lines, full_disk(1):
                assert states.NOT_SERVING == (await watching.read()).status
                assert states.NOT_SERVING == (await health.Check(health_pb2.HealthCheckRequest())).status
                alive = health_pb2.HealthCheckRequest(service="liveness")
                assert states.SERVING == (await health.Check(alive)).status
                assert "sessions/s" == (await served.sessions.GetSession(v1.GetSessionRequest(name="sessions/s"))).name
            assert "health_not_serving" in [line["event"] for line in lines]
            assert states.SERVING == (await watching.read()).status
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="later"))
        watching.cancel()


async def test_health_is_not_serving_while_the_probe_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PROBE_SECONDS", 0.01)
    states = health_pb2.HealthCheckResponse
    async with running() as served:
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        watching = health.Watch(health_pb2.HealthCheckRequest())
        assert states.SERVING == (await watching.read()).status
        with monkeypatch.context() as patch:
            patch.setattr(MemoryStore, "probe", Mock(side_effect=ZeroDivisionError))
            assert states.NOT_SERVING == (await watching.read()).status
        assert states.SERVING == (await watching.read()).status
        watching.cancel()


def test_a_full_disk_is_reported_to_callers() -> None:
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorname = "SQLITE_FULL"
    with capture_logs() as lines:
        failure = sqlite_writer.caller_error(full)
    assert "STORE_UNAVAILABLE: The disk of the store is full; this call changed nothing." == (
        f"{errors.reason_name(failure.reason)}: {failure.message}"  # type: ignore[attr-defined]
    )
    assert "SQLITE_FULL" == lines[0]["error"]


class Refusing:
    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal:
        raise errors.unauthenticated()


async def test_a_probe_needs_no_credential() -> None:
    """Health is checked by programs that do not know this service."""

    async with running(authenticators=[Refusing()]) as served:
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        assert health_pb2.HealthCheckResponse.SERVING == (await health.Check(health_pb2.HealthCheckRequest())).status
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.info.GetServerInfo(v1.GetServerInfoRequest())
        assert (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED") == (refused.value.code(), reason_of(refused.value))


def start() -> v1.StartRun:
    return v1.StartRun(new_session=v1.Session(agent="agents/a"), messages=[said("Go on.")])


async def wait_run(served: Running, begun: asyncio.Event) -> None:
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=start()))
    await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))


async def invoke(served: Running, begun: asyncio.Event) -> None:
    calling = served.runs.Invoke(v1.InvokeRequest(start=start()))
    while not (await served.runs.ListRuns(v1.ListRunsRequest(parent="sessions/-", filter="state = RUNNING"))).runs:
        pass
    begun.set()
    await calling


async def import_session(served: Running, begun: asyncio.Event) -> None:
    await served.sessions.ImportSession(held(v1.ImportSessionRequest(chunk=b"notecase")))


async def upload(served: Running, begun: asyncio.Event) -> None:
    await served.blobs.UploadBlob(held(v1.UploadBlobRequest(blob=v1.Blob(media_type="text/plain"), chunk=b"x")))


async def run(served: Running, begun: asyncio.Event) -> None:
    await told(served.runs.Run(held(v1.RunRequest(start=start()))), begun)


async def run_without_a_frame(served: Running, begun: asyncio.Event) -> None:
    await told(served.runs.Run(held()), begun)


async def watch(served: Running, begun: asyncio.Event) -> None:
    session = await served.sessions.CreateSession(v1.CreateSessionRequest())
    options = v1.WatchOptions(keep_open=True)
    await told(served.runs.WatchEvents(v1.WatchEventsRequest(name=session.name, options=options)), begun)


async def watch_health(served: Running, begun: asyncio.Event) -> None:
    health: Any = health_pb2_grpc.HealthStub(served.channel)
    await told(health.Watch(health_pb2.HealthCheckRequest()), begun)


async def told(stream: AsyncIterable[Any], begun: asyncio.Event) -> None:
    """Reads a stream to its end; it has begun with its first frame."""
    async for _ in stream:
        begun.set()


async def held(*frames: Any) -> AsyncIterator[Any]:
    """The frames, and no end."""
    for frame in frames:
        yield frame
    await asyncio.Event().wait()


CALLS: dict[str, tuple[Callable[[Running, asyncio.Event], Awaitable[None]], str]] = {
    "WaitRun": (wait_run, "RunService/WaitRun"),
    "Invoke": (invoke, ""),
    "ImportSession": (import_session, "SessionService/ImportSession"),
    "UploadBlob": (upload, "BlobService/UploadBlob"),
    "Run": (run, ""),
    "Run without a frame": (run_without_a_frame, "RunService/Run"),
    "WatchEvents": (watch, ""),
    "Health.Watch": (watch_health, ""),
}
"""Calls that do not end by themselves, with the method whose handler, once it is reached, is as far as they get; where
that is empty they say themselves when they have begun."""


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_that_is_cut_by_the_stop_of_the_server_gets_that_reason(call: str) -> None:
    make, method = CALLS[call]
    begun = asyncio.Event()

    class Noticing:
        async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal:
            if method and caller.get().method.endswith(method):
                begun.set()
            return DEVELOPMENT

    never = asyncio.Event()
    with capture_logs() as lines:
        async with (
            OpenAIServer() as model,
            running(
                providers={"openai": OpenAIProvider("test-key", model.url, "stub-1")},
                grace=0.1,
                authenticators=[Noticing()],
            ) as served,
        ):
            model.script(reply("Never.").held(never))
            agent = v1.Agent(llm=v1.LlmAgent())
            await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=agent))
            calling = asyncio.ensure_future(make(served, begun))
            await begun.wait()
            await served.server.stop()
            with pytest.raises(grpc.aio.AioRpcError) as cut:
                await calling
            never.set()
    require_draining(cut.value)
    assert [] == [line for line in lines if line["event"] == "rpc_crashed"]


def require_draining(error: grpc.aio.AioRpcError) -> None:
    assert (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING") == (error.code(), reason_of(error))
    assert 1 == detail_of(error, error_details_pb2.RetryInfo).retry_delay.seconds


class Waiting:
    """Methods that wait at a gate and count how they end, one of each shape, behind a separate interceptor."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        self.ended: list[str] = []
        self.door = Doorway(Chain(), lambda: "id", stall=60, gate=Gate(100, 1 << 20, 1 << 20))

    async def wait(self) -> health_pb2.HealthCheckResponse:
        try:
            self.begun.set()
            await self.gate.wait()
            self.ended.append("answered")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def single(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        return await self.wait()

    async def streaming(self, request: Any, context: Any) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        yield await self.wait()

    async def writing(self, request: Any, context: Any) -> None:
        await context.write(await self.wait())

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[grpc.aio.Channel]:
        forms = (health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString)
        methods = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(self.single, *forms),
            "unary_stream": grpc.unary_stream_rpc_method_handler(self.streaming, *forms),
            "stream_unary": grpc.stream_unary_rpc_method_handler(self.single, *forms),
            "stream_stream": grpc.stream_stream_rpc_method_handler(self.streaming, *forms),
            "writing": grpc.unary_stream_rpc_method_handler(self.writing, *forms),
        }
        server = grpc.aio.server(interceptors=[self.door])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Waiting", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield channel
        finally:
            await server.stop(None)


WAITING: dict[str, Shape] = {
    "unary_unary": unary_unary,
    "unary_stream": unary_stream,
    "stream_unary": stream_unary,
    "stream_stream": stream_stream,
    "writing": unary_stream,
}


@pytest.mark.parametrize("shape", WAITING)
async def test_a_call_in_any_shape_is_cut_once_the_patience_is_over(shape: str) -> None:
    """Its handler has ended before the doorway is closed."""
    waiting = Waiting()
    async with waiting.serving() as channel:
        calling = asyncio.ensure_future(WAITING[shape](channel, f"/test.Waiting/{shape}", b""))
        await waiting.begun.wait()
        await waiting.door.close(patience=0.1)
        assert ["cancelled"] == waiting.ended
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await calling
        require_draining(cut.value)


@pytest.mark.parametrize("shape", WAITING)
async def test_a_call_that_ends_within_the_patience_is_answered_and_a_new_one_is_refused(shape: str) -> None:
    waiting = Waiting()
    async with waiting.serving() as channel:
        calling = asyncio.ensure_future(WAITING[shape](channel, f"/test.Waiting/{shape}", b""))
        await waiting.begun.wait()
        closing = asyncio.create_task(waiting.door.close(patience=3600))
        await asyncio.sleep(0)  # the task has begun, and refuses what comes
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await WAITING[shape](channel, f"/test.Waiting/{shape}", b"")
        require_draining(refused.value)
        waiting.gate.set()
        assert b"\x08\x01" == await calling
        await closing
        await waiting.door.close(patience=3600)
    assert ["answered"] == waiting.ended


@pytest.mark.parametrize("shape", WAITING)
async def test_a_call_that_is_being_refused_when_the_doorway_closes_ends_with_its_own_error(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop of the server neither fails with it nor takes its word, however often it asks."""
    waiting = Waiting()
    refusing, told = asyncio.Event(), asyncio.Event()
    abort = interceptor.abort

    async def slowly(context: Any, error: NotecaseError) -> None:
        refusing.set()
        await told.wait()
        await abort(context, error)

    async def refused() -> health_pb2.HealthCheckResponse:
        raise errors.invalid([Violation("service", "is unknown")])

    monkeypatch.setattr(interceptor, "abort", slowly)
    monkeypatch.setattr(waiting, "wait", refused)
    async with waiting.serving() as channel:
        calling = asyncio.ensure_future(WAITING[shape](channel, f"/test.Waiting/{shape}", b""))
        await refusing.wait()
        await waiting.door.close(patience=0)
        await waiting.door.close(patience=0)
        told.set()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await calling
        assert "INVALID_FIELD" == reason_of(ended.value)
        await waiting.door.close(patience=3600)


@pytest.mark.parametrize(
    ("method", "frame"),
    [
        ("/notecase.v1.SessionService/GetSession", v1.GetSessionRequest(name="sessions/s")),
        ("/notecase.v1.RunService/WatchEvents", v1.WatchEventsRequest(name="sessions/s")),
        ("/notecase.v1.RunService/Run", v1.RunRequest(attach=v1.AttachRun(name="sessions/s"))),
    ],
)
async def test_a_cancellation_that_nobody_requested_is_a_defect(
    method: str, frame: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library raises it, for example. The call was not answered."""
    async with running() as served:
        monkeypatch.setattr(served.server._store, "find_session", AsyncMock(side_effect=asyncio.CancelledError))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await METHODS[method](served.channel, method, frame.SerializeToString())
    assert "INTERNAL" == reason_of(refused.value)


async def test_a_caller_that_leaves_is_not_taken_for_the_stop() -> None:
    """Its handler is cancelled as usual, and the log has no refusal."""
    waiting = Waiting()
    with capture_logs() as lines:
        async with waiting.serving() as channel:
            method: Any = channel.unary_unary("/test.Waiting/unary_unary")
            calling = method(b"")
            await waiting.begun.wait()
            calling.cancel()
            await waiting.door.close(patience=3600)
    assert (["cancelled"], []) == (waiting.ended, lines)


async def test_a_caller_that_leaves_before_its_request_has_come_is_not_refused() -> None:
    """To grpc's stream of requests that is an end like any other."""
    never = asyncio.Event()

    async def late() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    async with running() as served:
        doorway = served.server._doorway
        method: Any = served.channel.stream_unary("/notecase.v1.SessionService/GetSession")
        with capture_logs() as lines:
            call = method(late())
            await until(lambda: any(one.principal is not None for one in doorway._under_way.values()))
            call.cancel()
            await until(lambda: not doorway._under_way)
            assert [] == [line for line in lines if line["event"] == "rpc_refused"]


async def test_a_waiting_server_does_not_remember_the_paths_that_callers_make_up() -> None:
    doorway = _Doorway(Chain(), lambda: "id", 1.0, Gate(1, 1, 1))
    handler = _AnyMethod().service(None)

    async def found(details: object) -> Any:
        return handler

    for number in range(5):
        call = SimpleNamespace(method=f"/made.Up/{number}")
        assert await doorway.intercept_service(found, call) is not handler
    assert len(doorway._endpoints) == 1


async def test_a_refusal_whose_caller_is_gone_raises_nothing() -> None:
    """grpc would log it with its whole traceback, which quotes names, as often as a caller repeats it."""
    abort = AsyncMock(side_effect=grpc.aio.InternalError("It is gone."))
    await interceptor.abort(SimpleNamespace(abort=abort), errors.not_found("session", "sessions/s"))
    assert 1 == abort.await_count

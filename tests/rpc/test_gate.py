"""The gate: how many calls are open, and how much waits for a reader, of all callers and of each connection."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any
from unittest.mock import AsyncMock

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.rpc import gate as gate_module
from notecase_server.rpc import ops
from notecase_server.rpc import receiving as receiving_module
from notecase_server.rpc.gate import Gate, Outlet
from structlog.testing import capture_logs

from tests.e2e.driving import detail_of, reason_of, said
from tests.support.http2 import Deaf
from tests.support.polling import until
from tests.support.server import Running, running

GET_STATE = "/notecase.v1.StateService/GetState"
WATCH = "/notecase.v1.RunService/WatchEvents"
UPDATE = "/notecase.v1.StateService/UpdateState"

Lines = list[MutableMapping[str, Any]]


@asynccontextmanager
async def connection(served: Running) -> AsyncIterator[grpc.aio.Channel]:
    """Another one than every other channel's."""
    own = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(served.address, options=own) as channel:
        yield channel


async def opened(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamCall[v1.WatchEventsRequest, v1.RunResponse]:
    """A stream that the server has taken."""
    options = v1.WatchOptions(keep_open=True)
    stream = v1.RunServiceStub(channel).WatchEvents(v1.WatchEventsRequest(name="sessions/s", options=options))
    await stream.read()
    return stream


async def refusal(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as found:
        await call
    return found.value


def reasons(lines: Lines) -> list[str]:
    return [line["reason"] for line in lines if line["event"] == "rpc_refused"]


async def test_calls_are_bounded_for_a_connection_and_for_the_server() -> None:
    async with running(max_calls=4) as served, connection(served) as first, connection(served) as second:
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s"))
        held = [await opened(first), await opened(first)]
        get = v1.GetSessionRequest(name="sessions/s")
        own = await refusal(v1.SessionServiceStub(first).GetSession(get))
        assert ("RATE_LIMITED", "2 calls at once on one connection" in (own.details() or "")) == (reason_of(own), True)
        assert 1 == detail_of(own, error_details_pb2.RetryInfo).retry_delay.seconds
        held += [await opened(second), await opened(second)]
        of_all = await refusal(served.sessions.GetSession(get))
        assert ("RATE_LIMITED", "4 calls at once;" in (of_all.details() or "")) == (reason_of(of_all), True)
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        await health.Check(health_pb2.HealthCheckRequest())
        for stream in held:
            stream.cancel()
        gate = served.server.gate
        await until(lambda: not gate.calls)
        await served.sessions.GetSession(get)
        await until(lambda: not gate.calls)


@pytest.mark.parametrize("method", [GET_STATE, WATCH, UPDATE])
async def test_a_caller_without_a_credential_is_refused_before_its_request_is_read(method: str) -> None:
    """Otherwise such callers could fill the server's memory with requests that they never complete."""
    async with (
        running(authenticators=(), admin_key="a-key-that-is-as-long-as-it-has-to-be") as served,
        Deaf(served.address) as deaf,
    ):
        with capture_logs() as lines:
            await deaf.begin(method, b"the beginning of a request")
            await until(lambda: reasons(lines) == ["UNAUTHENTICATED"])
        await until(lambda: not served.server.gate.calls)


async def test_the_bytes_of_requests_are_bounded_for_a_connection_and_for_the_server() -> None:
    """Large ones wait for their turn, and are held meanwhile. Small ones are taken all the same."""
    async with running(max_request_bytes=4 << 20, max_heavy_reads=1) as served, connection(served) as first:
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s"))
        put = v1.PutStateRequest(name="sessions/s/state", key="k", value=v1.Value(bytes_value=bytes(900 << 10)))
        gate, heavy = served.server.gate, served.server.heavy
        heavy.take()
        one = v1.StateServiceStub(first)
        waiting = [one.PutState(put), one.PutState(put)]
        await until(lambda: heavy.waiting == len(waiting))
        own = await refusal(one.PutState(put))
        assert ("RATE_LIMITED", "on one connection have 2097152 bytes" in str(own.details())) == (reason_of(own), True)
        async with connection(served) as second:
            waiting += [v1.StateServiceStub(second).PutState(put) for _ in range(2)]
            await until(lambda: heavy.waiting == len(waiting))
            of_all = await refusal(served.state.PutState(put))
            expected = ("RATE_LIMITED", "is working on have 4194304 bytes" in str(of_all.details()))
            assert expected == (reason_of(of_all), True)
            assert 1 == detail_of(of_all, error_details_pb2.RetryInfo).retry_delay.seconds
            await served.state.GetState(v1.GetStateRequest(name="sessions/s/state"))
            heavy.give_back()
            await asyncio.gather(*waiting)
        await until(lambda: not gate.requested)
        await served.state.PutState(put)


async def test_requests_of_a_principal_are_received_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All others' bytes stay with their senders, but for the first ones; and a request that is never complete keeps
    its turn for a time only."""
    monkeypatch.setattr(receiving_module, "SHARE", 2)
    monkeypatch.setattr(receiving_module, "PATIENCE", 3600.0)
    async with running() as served, Deaf(served.address) as deaf:
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s"))
        receiving = served.server.gate.receiving
        for _ in range(3):
            await deaf.begin(UPDATE, b"the beginning of a request")
        await until(lambda: receiving.waiting == 1)
        opened = await deaf.windows()
        assert {1, 3} == opened.keys() - {0}
        assert min(opened[1], opened[3]) > 900 << 10
        for _ in range(2):
            await deaf.begin(UPDATE, b"the beginning of a request")
        await until(lambda: receiving.waiting == 3)
        get = asyncio.ensure_future(served.sessions.GetSession(v1.GetSessionRequest(name="sessions/s")))
        await until(lambda: receiving.waiting == 4)
        receiving.pass_on(asyncio.get_running_loop().time() + receiving_module.PATIENCE)
        await get  # in the turn of its connection, not behind all of the other's
        await until(lambda: receiving.waiting == 1)
        assert 5 in await deaf.windows()
    await until(lambda: not (receiving.waiting or receiving._own))


async def test_a_frame_of_a_stream_counts_until_the_next_is_read() -> None:
    async with running(max_heavy_reads=1) as served:
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="echo", agent=v1.Agent(llm=v1.LlmAgent())))
        messages = [said("x" * (100 << 10)), said("/pause 600000")]
        start = v1.StartRun(agent="agents/echo", new_session=v1.Session(name="sessions/s"), messages=messages)
        stream = served.runs.Run()
        await stream.write(v1.RunRequest(start=start))
        attached = await stream.read()
        assert isinstance(attached, v1.RunResponse)
        gate = served.server.gate
        await until(lambda: not gate.requested)
        assert 1 == gate.calls
        stream.cancel()
        await until(lambda: not gate.calls)


async def test_a_request_of_any_size_is_taken_where_no_other_is() -> None:
    gate = Gate(100, 100, 1)
    one, other = gate.enter(_Context("a"), probe=False), gate.enter(_Context("b"), probe=False)
    one.takes(1 << 20)
    one.takes(2 << 20)
    with pytest.raises(NotecaseError, match="have 1 bytes already"):
        other.takes(1 << 20)
    other.takes(64 << 10)
    assert (2 << 20) + (64 << 10) == gate.requested
    one.left(None)
    other.takes(1 << 20)
    other.left(None)
    assert not gate.requested


async def test_probes_are_bounded_and_take_no_places_of_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need no credential."""
    monkeypatch.setattr(gate_module, "PROBES", 2)
    monkeypatch.setattr(ops, "MOST_WATCHERS", 4)
    request = health_pb2.HealthCheckRequest()
    async with running(max_calls=4) as served, connection(served) as first, connection(served) as second:
        one: Any = health_pb2_grpc.HealthStub(first)
        other: Any = health_pb2_grpc.HealthStub(second)
        held = [one.Watch(request), one.Watch(request), other.Watch(request), other.Watch(request)]
        for stream in held:
            await stream.read()
        of_connection = await refusal(one.Check(request))
        assert "2 probes at once on one connection" in str(of_connection.details())
        third: Any = health_pb2_grpc.HealthStub(served.channel)
        of_all = await refusal(third.Watch(request).read())
        assert ("RATE_LIMITED", True) == (reason_of(of_all), "4 health streams at once;" in str(of_all.details()))
        await third.Check(request)
        for channel in (first, second):
            await v1.ServerServiceStub(channel).GetServerInfo(v1.GetServerInfoRequest())
        held.pop().cancel()
        await until(lambda: served.server._health._servicer.watchers == 3)
        assert await third.Watch(request).read()


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_a_probe_holds_no_large_request(method: str) -> None:
    """Anybody may send one, and those of watchers would leave no room for the requests of callers."""
    async with running() as served:
        probe: Any = served.channel.unary_stream(f"/grpc.health.v1.Health/{method}")
        frame = health_pb2.HealthCheckRequest(service="x" * (4 << 10)).SerializeToString()
        assert "PAYLOAD_TOO_LARGE" == reason_of(await refusal(probe(frame).read()))


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_a_probe_whose_request_does_not_come_ends(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no credential, and what came of its request would be held as long as its connection."""
    monkeypatch.setattr(gate_module, "PATIENCE", 0.0)
    async with running() as served, Deaf(served.address) as deaf:
        with capture_logs() as lines:
            await deaf.begin(f"/grpc.health.v1.Health/{method}", b"the beginning")
            await until(lambda: reasons(lines) == ["INVALID_FIELD"])
        await until(lambda: not served.server.gate._connections)


async def test_a_watcher_of_health_that_reads_nothing_delays_no_other_caller() -> None:
    """Neither other watchers nor the stop of the server."""
    status = health_pb2.HealthCheckResponse
    async with running(grace=0.1) as served, Deaf(served.address, window=0) as deaf:
        await deaf.call("/grpc.health.v1.Health/Watch", b"")
        await until(lambda: served.server._health._servicer.watchers == 1)
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        watching = health.Watch(health_pb2.HealthCheckRequest())
        assert status.SERVING == (await watching.read()).status
        await served.server._health.tell(False)
        assert status.NOT_SERVING == (await watching.read()).status


async def test_unread_answers_are_limited_and_delay_no_other_caller() -> None:
    """One of a megabyte waits; the others are refused before they do, and the calls after them before they are made."""
    async with running(max_unread_bytes=8 << 20) as served, connection(served) as other:
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s"))
        big = v1.Value(bytes_value=bytes(900 << 10))
        await served.state.PutState(v1.PutStateRequest(name="sessions/s/state", key="k", value=big))
        long = v1.Value(list_value=v1.ValueList(values=[v1.Value(string_value="x" * (200 << 10))]))
        await served.state.PutState(v1.PutStateRequest(name="sessions/s/state", key="list", value=long))
        get = v1.GetStateRequest(name="sessions/s/state", keys=["k"])
        gate = served.server.gate
        async with Deaf(served.address) as deaf:
            with capture_logs() as lines:
                await deaf.call(GET_STATE, get.SerializeToString(), times=40)
                await until(lambda: len(reasons(lines)) >= 39)
            assert {"RATE_LIMITED"} == set(reasons(lines))
            assert big.ByteSize() < gate.unread < 1 << 20
            answer = await v1.StateServiceStub(other).GetState(get)
            assert big == answer.entries["k"].value
            # The answer of a write is sent whatever waits: its caller has to receive it.
            append = v1.UpdateStateRequest(name="sessions/s/state")
            append.ops.add(key="list", append=v1.Value(bool_value=True))
            await until(lambda: gate.unread < 1 << 20)
            before = gate.unread
            await deaf.call(UPDATE, append.SerializeToString())
            await until(lambda: gate.unread > before + (200 << 10))
            with capture_logs() as lines:
                await deaf.call(UPDATE, append.SerializeToString())
                await until(lambda: bool(reasons(lines)))
        await until(lambda: not (gate.unread or gate.calls))
        listed = (await served.state.GetState(v1.GetStateRequest(name="sessions/s/state", keys=["list"]))).entries
        assert 2 == len(listed["list"].value.list_value.values), "the second was refused before it did anything"


async def test_a_stream_ends_as_too_slow_when_too_much_waits_on_its_connection() -> None:
    async with running(max_unread_bytes=8 << 20) as served:
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s"))
        for _ in range(4):
            text = said("x" * (200 << 10))
            await served.messages.AppendMessages(v1.AppendMessagesRequest(parent="sessions/s", messages=[text]))
        watch = v1.WatchEventsRequest(name="sessions/s", after_sequence=0, options=v1.WatchOptions(keep_open=True))
        gate = served.server.gate
        async with Deaf(served.address) as deaf:
            with capture_logs() as lines:
                await deaf.call(WATCH, watch.SerializeToString(), times=10)
                await until(lambda: len(reasons(lines)) >= 9)
            assert {"WATCHER_TOO_SLOW"} <= set(reasons(lines)) <= {"WATCHER_TOO_SLOW", "RATE_LIMITED"}
            assert gate.unread < 2 << 20
            gc.collect()  # what earlier tests left
            traces = [each.tb_frame.f_code for each in gc.get_objects() if isinstance(each, TracebackType)]
            assert Outlet.write.__code__ not in traces, "a status that waits for its reader holds no frame"
        await until(lambda: not (gate.unread or gate.calls))


async def test_a_reader_may_leave_something_unread_whatever_others_do() -> None:
    """Above the server's bound, a connection has what HTTP/2 sends ahead, and no more."""
    gate = Gate(100, 100, 100)
    calls = [gate.enter(_Context("a"), probe=False), gate.enter(_Context("b"), probe=False)]
    calls[0].waits(1 << 20)
    assert calls[1].has_room(1 << 20)
    calls[1].waits(60 << 10)
    assert calls[1].has_room(4 << 10)
    assert not calls[1].has_room(5 << 10)
    gate.enter(_Context("b"), probe=False)
    calls[1].read(60 << 10)
    assert calls[1].has_room(1 << 20)


async def test_a_write_that_fails_because_the_caller_is_gone_ends_the_call_as_its_cancel_does() -> None:
    """It was logged as a defect when grpc's cancel came later than that."""
    gate = Gate(100, 100, 100)
    context: Any = _Context("a")
    call = gate.enter(context, probe=False)
    context.write = AsyncMock(side_effect=grpc.aio.InternalError("Failed"))
    with pytest.raises(asyncio.CancelledError):
        await Outlet(call, bytes, context, 60.0).write(b"frame")
    call.left(None)
    assert not gate.unread


class _Context:
    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """This call lasts."""

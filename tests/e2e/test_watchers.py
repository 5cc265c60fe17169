"""Watchers that read slowly, or not at all: they cost the run nothing and the server next to nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from notecase import SessionView, v1
from notecase_server.engine.session import LiveSession
from notecase_server.errors import NotecaseError
from notecase_server.rpc import interceptor
from notecase_server.rpc.watch import Pace

from tests.e2e.driving import durable, log_of, reason_of, said
from tests.support.server import Running, Spawned, running

SMALL_WINDOW = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 64 << 10),
    ("grpc.max_receive_message_length", 16 << 20),
)
"""A transport that takes little in advance, so that a reader that pauses is felt at once. The usual one grows to some
megabytes for each stream."""

TEXT = 900_000
"""Bytes of one reply: about as much as a reply may hold."""


@pytest.fixture(params=["memory", "sqlite"])
async def offline(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Running]:
    store = "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"
    async with running(store) as server:
        await open_session(server.channel)
        yield server


async def open_session(channel: grpc.aio.Channel) -> None:
    """Session "case" of an agent whose model is shown the newest question only."""
    agent = v1.Agent(llm=v1.LlmAgent(provider="offline", context=v1.Context(stateless=True)))
    await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
    session = v1.Session(agent="agents/clerk")
    await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id="case", session=session))


async def ask(channel: grpc.aio.Channel, text: str) -> v1.Run:
    start = v1.StartRun(session="sessions/case", messages=[said(text)])
    return (await v1.RunServiceStub(channel).Invoke(v1.InvokeRequest(start=start))).run


class Watcher:
    """A stream of the whole session from its beginning, read a frame at a time and folded into a view, which raises at
    a gap or a repeat."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        options = v1.WatchOptions(keep_open=True)
        request = v1.WatchEventsRequest(name="sessions/case", after_sequence=0, options=options)
        self.call = v1.RunServiceStub(channel).WatchEvents(request)
        self.view = SessionView(0)
        self.log: list[v1.Event] = []
        self.frames = 0

    async def read(self) -> None:
        frame = await self.call.read()
        assert isinstance(frame, v1.RunResponse), "the stream goes on"
        self.frames += 1
        self.log += durable([frame])
        for event in frame.batch.events:
            self.view.apply(event)

    async def read_to(self, sequence: int) -> None:
        while not self.log or self.log[-1].sequence < sequence:
            await self.read()


@asynccontextmanager
async def slow_reader(address: str) -> AsyncIterator[Watcher]:
    async with grpc.aio.insecure_channel(address, options=SMALL_WINDOW) as channel:
        watcher = Watcher(channel)
        await watcher.read()
        yield watcher
        watcher.call.cancel()


async def test_a_run_does_not_wait_for_a_slow_watcher_who_gets_larger_batches(offline: Running) -> None:
    """A frame is read for every reply of 20,000 tokens, and in the end the watcher has seen what everybody has."""
    async with slow_reader(offline.address) as slow:
        for _ in range(5):
            seen = len(slow.log)
            run = await ask(offline.channel, "/chunks 20000")
            assert run.state == v1.Run.STATE_SUCCEEDED
            assert run.usage.output_tokens == 20_000
            assert len(slow.log) == seen, "the run ended, and nobody had read of it"
            await slow.read()
        await slow.read_to(run.last_sequence)
    log = await log_of(offline, "sessions/case")
    assert slow.log == log
    assert list(slow.view.messages.values()) == [
        event.message_added for event in log if event.HasField("message_added")
    ]
    assert slow.view.open == {}
    assert slow.frames < 100, "a hundred thousand tokens"


async def test_the_servers_memory_is_flat_whatever_its_watchers_leave_unread(tmp_path: Path) -> None:
    """Twenty megabytes of text, and three watchers that read the first frame of it."""
    server = await Spawned.start(f"sqlite:{tmp_path / 'notecase.db'}", tmp_path / "log")
    async with grpc.aio.insecure_channel(server.address, options=SMALL_WINDOW) as channel:
        await open_session(channel)
        watchers = [Watcher(channel) for _ in range(3)]
        for watcher in watchers:
            await watcher.read()
        process = psutil.Process(server.process.pid)
        sizes = []
        for _ in range(40):
            assert (await ask(channel, f"/big {TEXT}")).state == v1.Run.STATE_SUCCEEDED
            sizes.append(process.memory_info().rss)
        for watcher in watchers:
            watcher.call.cancel()
    assert await server.stop() == 0
    grown = max(sizes[10:]) - sizes[9]
    assert grown < 12 << 20, f"resident bytes after each run: {sizes}"


async def test_a_watcher_that_never_reads_is_let_go_with_a_typed_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server forgets it at once, and does not wait until it is told. The status waits in the transport behind the
    frames that nobody took, so whoever begins to read after all finds both; attached again it gets the rest."""
    gone, told = asyncio.Event(), asyncio.Event()
    leave, abort = LiveSession.leave, interceptor.abort

    async def abort_and_tell(context: Any, error: NotecaseError) -> None:
        try:
            await abort(context, error)
        finally:
            told.set()

    def leave_and_tell(live: LiveSession) -> None:
        leave(live)
        gone.set()

    async with running(f"sqlite:{tmp_path / 'notecase.db'}", pace=Pace(stall=0.1)) as served:
        await open_session(served.channel)
        async with slow_reader(served.address) as never:
            monkeypatch.setattr(LiveSession, "leave", leave_and_tell)
            monkeypatch.setattr(interceptor, "abort", abort_and_tell)
            for _ in range(2):
                run = await ask(served.channel, f"/big {TEXT}")
            await gone.wait()
            await told.wait()
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await never.read_to(run.last_sequence)
            assert ended.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert reason_of(ended.value) == "WATCHER_TOO_SLOW"
            again = v1.WatchEventsRequest(name="sessions/case", after_sequence=never.view.last_sequence)
            rest = durable([frame async for frame in served.runs.WatchEvents(again)])
        assert [*never.log, *rest] == await log_of(served, "sessions/case")


async def test_a_stream_with_nothing_to_say_is_not_slow(offline: Running, tmp_path: Path) -> None:
    """Heartbeats come for four times as long as a frame may wait for its reader."""
    async with running(pace=Pace(heartbeat=0.1, stall=0.5)) as served:
        await open_session(served.channel)
        watch = v1.WatchEventsRequest(name="sessions/case", options=v1.WatchOptions(keep_open=True))
        heard = 0
        async for frame in served.runs.WatchEvents(watch):
            heard += frame.HasField("heartbeat")
            if heard == 20:
                break
    assert heard == 20


async def test_a_watcher_that_never_reads_does_not_hold_up_the_servers_end(tmp_path: Path) -> None:
    server = await Spawned.start(f"sqlite:{tmp_path / 'notecase.db'}", tmp_path / "log")
    async with grpc.aio.insecure_channel(server.address, options=SMALL_WINDOW) as channel:
        await open_session(channel)
        never = Watcher(channel)
        await never.read()
        for _ in range(2):
            await ask(channel, f"/big {TEXT}")
        assert await server.stop() == 0
        never.call.cancel()

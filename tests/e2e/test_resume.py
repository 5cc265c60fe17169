"""A stream cut at any point and attached again with one integer: what was seen is what happened, each entry of the log
once and each open block exact to the byte."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import Client, Retry, SessionView, v1
from notecase_server import errors
from notecase_server.models.contract import Call, Delta, Finish, ModelRequest, Reasoning, Text
from notecase_server.rpc.watch import Pace
from notecase_server.store.contract import Commit, Committed
from notecase_server.store.fold import ENDED

from tests.client.proxy import Proxy
from tests.e2e.driving import durable, reason_of, said
from tests.support.server import Running, running

SEEDS = 100
CUTS = 10
"""In each of so many sessions; a thousand in all."""

ALPHABET = "aé→漢字🎻 \u0000\n"
"""One to four bytes a character, so that a cut between bytes would show."""

AT_ONCE = v1.WatchOptions(max_batch_delay=Duration(), keep_open=True)
WHEN: list[v1.UserInput.When.ValueType] = [
    v1.UserInput.WHEN_STEER,
    v1.UserInput.WHEN_FOLLOW_UP,
    v1.UserInput.WHEN_INTERRUPT,
]
TOOLS = [v1.Tool(name="weigh", client=v1.ClientTool())]


class Babbler:
    """A model that says random things, calls a tool now and then, and is cut off now and then."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.said: list[str] = []
        """Every text, argument and thought that was begun, as far as it came."""

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        chance = self._chance
        kinds = ["reasoning", "text", "call"] if request.tools else ["reasoning", "text"]
        for key, kind in enumerate(chance.sample(kinds, k=chance.randrange(1, len(kinds) + 1))):
            if kind == "call":
                self.said.append("{}")
                yield Call(key, "weigh", "")
                await asyncio.sleep(0)
                yield Call(key, "", "{")
                await asyncio.sleep(0)
                yield Call(key, "", "}")
                continue
            self.said.append("")
            for _ in range(chance.randrange(1, 12)):
                piece = "".join(chance.choices(ALPHABET, k=chance.randrange(1, 6)))
                self.said[-1] += piece
                yield Text(piece) if kind != "reasoning" else Reasoning(piece)
                await asyncio.sleep(0)
            if chance.random() < 0.05:
                raise errors.model_unavailable("The model hung up.")
        yield Finish("stop", v1.Usage(model_calls=1, input_tokens=1, output_tokens=1))

    async def close(self) -> None: ...


class Follower:
    """One who follows a session, loses the stream, and comes back after the last entry of the log that it has."""

    def __init__(self, served: Running, babbler: Babbler, seed: int) -> None:
        self.runs = served.runs
        self.view = SessionView(0)
        self.log: list[v1.Event] = []
        self._babbler = babbler
        self._chance = random.Random(seed)
        self._commands = 0
        self.cuts = 0

    async def follow(self, session: str) -> None:
        """Until all cuts have happened and the last known run has ended."""
        while self.cuts < CUTS:
            frames = self._chance.randrange(1, 12)
            call = self.runs.Run()
            attach = v1.AttachRun(name=session, after_sequence=self.view.last_sequence, options=AT_ONCE)
            await call.write(v1.RunRequest(attach=attach))
            for _ in range(frames):
                frame = await call.read()
                assert isinstance(frame, v1.RunResponse)
                await self._take(session, frame, call)
            call.cancel()
            self.cuts += 1
        await self._finish(session)

    async def _finish(self, session: str) -> None:
        ending = v1.WatchEventsRequest(name=session, after_sequence=self.view.last_sequence)
        async for frame in self.runs.WatchEvents(ending):
            await self._take(session, frame, None)

    async def _take(self, session: str, frame: v1.RunResponse, call: Any) -> None:
        if frame.HasField("attached"):
            self.view.attach(frame.attached)
        for event in frame.batch.events:
            self._check_blocks(event)
            assert self.view.apply(event), "each entry of the log comes once"
            assert len(self.view.open) <= 1, "one reply is made at a time"
            self.log += [event] if event.sequence else []
            await self._react(session, event, call)

    def _check_blocks(self, event: v1.Event) -> None:
        """What was seen of a message is how it begins; of a discarded one, how something began that was said."""
        opened = self.view.open.get(event.message_added.name or event.message_discarded.message, {})
        for index, block in opened.items():
            assert block.end == len(block.text.encode())
            if event.HasField("message_discarded"):
                assert any(whole.startswith(block.text) for whole in self._babbler.said)
            else:
                part = event.message_added.parts[index]
                whole = part.text or part.reasoning.text or part.tool_call.arguments
                assert whole.encode()[: block.end] == block.text.encode()

    async def _react(self, session: str, event: v1.Event, call: Any) -> None:
        if event.tool_started.client_executed:
            told = v1.ToolResult(call_id=event.tool_started.call_id, result=[v1.Part(text="3 kg")])
            await self._send(session, v1.RunRequest(tool_result=told), call)
        elif call is None:
            return
        elif event.HasField("usage") and self._chance.random() < 0.3:
            words = v1.UserInput(messages=[said("Môre!")], when=self._chance.choice(WHEN))
            await self._send(session, v1.RunRequest(input=words), call)
        elif event.HasField("message_added") and self._chance.random() < 0.3:
            op = v1.StateOp(key=self._chance.choice("äöü"), increment=1)
            await self._send(session, v1.RunRequest(update_state=v1.StateUpdate(ops=[op])), call)
        elif event.run_state_changed.state in ENDED:
            await self._send(session, v1.RunRequest(start=opening(session)), call)

    async def _send(self, session: str, command: v1.RunRequest, call: Any) -> None:
        """On the stream, perhaps during its end; then as a separate call, which is a repeat if the first one
        arrived."""
        self._commands += 1
        command.command_id = f"c{self._commands}"
        if call is not None:
            await call.write(command)
        try:
            await self.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
        except grpc.aio.AioRpcError as error:
            passed = {"CALL_NOT_PENDING", "RUN_ENDED", "RUN_NOT_FOUND", "RUN_ACTIVE", "QUEUE_FULL"}
            assert reason_of(error) in passed, error


def opening(session: str) -> v1.StartRun:
    return v1.StartRun(session=session, messages=[said("Gø")], client_tools=TOOLS)


async def whole_log(served: Running, session: str) -> list[v1.Event]:
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=session, after_sequence=0))
    return durable([frame async for frame in watch])


async def check(served: Running, session: str, view: SessionView, log: Sequence[v1.Event]) -> None:
    """The view is that of one who never lost the stream, and is what the service says when asked."""
    assert await whole_log(served, session) == log
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    untroubled = SessionView(0)
    for event in log:
        untroubled.apply(event)
    assert view == untroubled
    assert view.open == {}
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session}/state", page_size=1000))
    assert view.state == {key: entry.value for key, entry in state.entries.items()}
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session, page_size=1000))
    assert not listed.next_page_token
    assert list(view.messages.values()) == list(listed.messages)
    for name, run in view.runs.items():
        assert run == await served.runs.GetRun(v1.GetRunRequest(name=name))


@pytest.fixture
def babblers() -> dict[str, Babbler]:
    return {f"b{seed}": Babbler(seed) for seed in range(SEEDS)}


@pytest.fixture
async def served(tmp_path: Path, babblers: dict[str, Babbler]) -> AsyncIterator[Running]:
    async with running(
        f"sqlite:{tmp_path / 'notecase.db'}", babblers, pace=Pace(heartbeat=0.05, poll=3600.0)
    ) as server:
        for name in babblers:
            agent = v1.Agent(llm=v1.LlmAgent(provider=name, max_model_calls=1000), output_key="last")
            await server.agents.CreateAgent(v1.CreateAgentRequest(agent_id=name, agent=agent))
        yield server


async def open_session(served: Running, name: str) -> str:
    """A session of the babbler of that name, with a run under way."""
    created = v1.CreateSessionRequest(session_id=name, session=v1.Session(agent=f"agents/{name}"))
    session = (await served.sessions.CreateSession(created)).name
    await served.runs.CreateRun(v1.CreateRunRequest(start=opening(session)))
    return session


async def test_a_thousand_cuts_leave_no_gap_and_no_repeat(served: Running, babblers: dict[str, Babbler]) -> None:
    """Over seeded schedules: tools, steering, interruptions and state changes in between, sent into streams that end;
    replies that are discarded; runs that follow each other."""
    at_once = asyncio.Semaphore(8)

    async def one(seed: int, name: str) -> int:
        async with at_once:
            session = await open_session(served, name)
            follower = Follower(served, babblers[name], seed)
            await follower.follow(session)
            await check(served, session, follower.view, follower.log)
            return follower.cuts

    assert sum(await asyncio.gather(*(one(seed, name) for seed, name in enumerate(babblers)))) == 1000


async def test_hundreds_of_broken_connections_are_mended_by_the_client(
    served: Running, babblers: dict[str, Babbler]
) -> None:
    """The Python client alone, through a hop that resets its connections: it gives out each entry of the log once, and
    its view is the session."""
    quick = (("grpc.initial_reconnect_backoff_ms", 1), ("grpc.min_reconnect_backoff_ms", 1))
    patient = Retry(tries=100, first_delay=0.001, max_delay=0.02)

    async def weigh() -> str:
        return "3 kg"

    async def one(seed: int, name: str) -> int:
        chance = random.Random(seed)
        session = await open_session(served, name)
        log: list[v1.Event] = []
        cuts = 0
        async with (
            Proxy(served.address) as proxy,
            Client(proxy.address, options=quick, retry=patient) as client,
            client.attach(session, 0, tools=[weigh], options=AT_ONCE) as stream,
        ):
            async for event in stream:
                log += [event] if event.sequence else []
                if cuts < 30 and chance.random() < 0.2:
                    proxy.cut()
                    cuts += 1
                if event.run_state_changed.state in ENDED:
                    if cuts == 30:
                        break
                    await served.runs.CreateRun(v1.CreateRunRequest(start=opening(session)))
            await check(served, session, stream.view, log)
        return cuts

    assert sum(await asyncio.gather(*(one(seed, name) for seed, name in enumerate(list(babblers)[:10])))) == 300


class Held:
    """A model that says the given text piece by piece, and fails on request."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        while True:
            piece = await self.pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if isinstance(piece, Finish):
                return

    def say(self, *pieces: Delta) -> None:
        for piece in pieces:
            self.pieces.put_nowait(piece)

    def fail(self, error: Exception) -> None:
        self.pieces.put_nowait(error)

    async def close(self) -> None: ...


END = Finish("stop", v1.Usage(model_calls=1))


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
async def case(store_url: str, held: Held) -> AsyncIterator[Running]:
    """A server with a session "case" whose model is held."""
    async with running(store_url, {"held": held}, pace=Pace(poll=3600.0), grace=0.1) as server:
        await server.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent())))
        session = v1.Session(agent="agents/clerk")
        await server.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
        yield server


CASE = "sessions/case"


async def read_until(call: Any, view: SessionView, kind: str) -> v1.Event:
    """Reads the stream into the view, up to the next event of that kind."""
    while True:
        frame = await call.read()
        assert isinstance(frame, v1.RunResponse), "the stream goes on"
        if frame.HasField("attached"):
            view.attach(frame.attached)
        for event in frame.batch.events:
            view.apply(event)
        for event in frame.batch.events:
            if event.WhichOneof("payload") == kind:
                return event


async def test_a_reply_that_is_cut_with_nothing_to_keep_is_forgotten(case: Running, held: Held) -> None:
    """A call of which only the name had come: its watchers never hear of it, nor of its end."""
    call = case.runs.Run()
    view = SessionView(0)
    await call.write(v1.RunRequest(start=opening(CASE)))
    held.say(Call(0, "weigh", ""))
    while not held.pieces.empty():
        await case.info.GetServerInfo(v1.GetServerInfoRequest())
    now = v1.UserInput(messages=[said("Wait!")], when=v1.UserInput.WHEN_INTERRUPT)
    await call.write(v1.RunRequest(input=now))
    held.say(Text("Yes?"))
    assert (await read_until(call, view, "block_delta")).block_delta.text == "Yes?"
    assert len(view.open) == 1
    held.say(END)
    await read_until(call, view, "run_state_changed")
    call.cancel()


@pytest.mark.parametrize("what", ["start", "tool_result"])
async def test_a_command_whose_stream_breaks_while_it_commits_is_carried_out_whole(
    case: Running, held: Held, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The run continues by itself: the command need not be sent again."""
    store = case.server._store
    commit, reached, go_on = store.commit, asyncio.Event(), asyncio.Event()

    async def slow(given: Commit) -> Committed:
        committed = await commit(given)
        if any(event.HasField("tool_finished" if what == "tool_result" else "run_started") for event in given.events):
            reached.set()
            await go_on.wait()
        return committed

    monkeypatch.setattr(store, "commit", slow)
    held.say(Call(0, "weigh", "{}"), END, Text("Light."), END)
    start = opening(CASE)
    start.run_id = "r1"
    call = case.runs.Run()
    await call.write(v1.RunRequest(start=start))
    if what == "tool_result":
        event = await read_until(call, SessionView(0), "tool_started")
        told = v1.ToolResult(call_id=event.tool_started.call_id, result=[v1.Part(text="3 kg")])
        await call.write(v1.RunRequest(tool_result=told))
    await reached.wait()
    call.cancel()
    for _ in range(3):  # what comes behind the reset on the connection is answered after it
        await case.info.GetServerInfo(v1.GetServerInfoRequest())
    go_on.set()
    run = await case.runs.WaitRun(v1.WaitRunRequest(name=f"{CASE}/runs/r1"))
    if run.state == v1.Run.STATE_WAITING:
        assert what == "start"
        assert [pending.tool for pending in run.pending_calls] == ["weigh"]
        told = v1.ToolResult(call_id=run.pending_calls[0].call_id, result=[v1.Part(text="3 kg")])
        await case.runs.SendCommand(v1.SendCommandRequest(session=CASE, command=v1.RunRequest(tool_result=told)))
    while run.state not in ENDED:
        run = await case.runs.WaitRun(v1.WaitRunRequest(name=f"{CASE}/runs/r1", after_sequence=run.last_sequence))
    assert run.state == v1.Run.STATE_SUCCEEDED


async def test_the_time_without_company_begins_when_the_last_stream_has_left(case: Running, held: Held) -> None:
    """However long it was attached. Other runs without a stream measure the time: one lasts longer than the first run
    may be alone, one is cancelled long before that time has passed again."""

    async def alone(name: str, seconds: float) -> v1.Run:
        start = v1.StartRun(new_session=v1.Session(name=f"sessions/{name}", agent="agents/clerk"), run_id=name)
        start.messages.add().CopyFrom(said("Go"))
        start.disconnect.cancel_after.FromMilliseconds(round(seconds * 1000))
        run: v1.Run = await case.runs.CreateRun(v1.CreateRunRequest(start=start))
        return run

    followed = await alone("followed", 3)
    watch = case.runs.WatchEvents(v1.WatchEventsRequest(name=followed.name))
    await watch.read()
    for name, seconds in (("outlasts", 3.2), ("soon", 0.05)):
        if name == "soon":
            watch.cancel()
        told = await alone(name, seconds)
        assert (await case.runs.WaitRun(v1.WaitRunRequest(name=told.name))).state == v1.Run.STATE_CANCELLED
    still = await case.runs.GetRun(v1.GetRunRequest(name=followed.name))
    assert still.state == v1.Run.STATE_RUNNING

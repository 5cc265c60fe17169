"""Deltas joined are the text: a client that prints deltas, and drops what it printed of a discarded message, is right
on every stream."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import SessionView, v1
from notecase_server import errors
from notecase_server.engine.draft import Draft
from notecase_server.engine.session import LiveSession
from notecase_server.models.contract import Call, Delta, Reasoning, Refusal, Text
from notecase_server.models.offline import OfflineProvider
from notecase_server.rpc.watch import Cursor, Pace
from notecase_server.store.contract import PAGE_BYTES, Commit, Committed, StepKey

from tests.e2e.driving import BySendCommand, OnStream, durable, events_of, said
from tests.e2e.test_resume import END, Held
from tests.support.openai_server import OpenAIServer, chunk, reply, stream
from tests.support.server import Running, running

EIGHT = "One two three four five six seven eight."
CASE = "sessions/case"


class Printer:
    """A client that uses only deltas; it fails if they break a promise of BlockDelta."""

    def __init__(self) -> None:
        self.printed: dict[str, dict[int, bytes]] = defaultdict(dict)
        self._kinds: dict[tuple[str, int], str] = {}
        self._discarded: set[str] = set()
        self._head = 0
        self.whole: list[str] = []
        """The messages that came after their deltas."""

    def take(self, frame: v1.RunResponse) -> None:
        assert frame.ByteSize() < 3.5 * (1 << 20)
        if frame.HasField("attached"):
            self.printed.clear()
            self._kinds.clear()
            self._head = frame.attached.last_sequence
        for event in frame.batch.events:
            if event.HasField("block_delta"):
                self._print(event)
            elif event.HasField("message_discarded"):
                assert self.printed.pop(event.message_discarded.message), "nothing of it was printed"
                self._discarded.add(event.message_discarded.message)
            elif event.message_added.role == v1.Message.ROLE_ASSISTANT and event.sequence > self._head:
                self._compare(event.message_added)

    def _print(self, event: v1.Event) -> None:
        delta = event.block_delta
        assert event.run == "" or event.run.rpartition("/runs/")[2], "a message of no run names none"
        assert delta.message not in {*self._discarded, *self.whole}
        kind = delta.WhichOneof("delta") or ""
        text = getattr(delta, kind).encode()
        begun = delta.block in self.printed[delta.message]
        had = self.printed[delta.message].get(delta.block, b"")
        assert bool(delta.start) == begun, "start 0 comes once a block, and nothing else begins one"
        assert (delta.start, delta.end) == (len(had), len(had + text))
        assert self._kinds.setdefault((delta.message, delta.block), kind) == kind
        self.printed[delta.message][delta.block] = had + text

    def _compare(self, message: v1.Message) -> None:
        expected = {
            index: (part.text or part.json or part.reasoning.text or part.refusal or part.tool_call.arguments).encode()
            for index, part in enumerate(message.parts)
            if part.WhichOneof("kind") not in {"blob", "file"}
        }
        assert self.printed[message.name] == expected
        self.whole.append(message.name)

    @property
    def texts(self) -> list[str]:
        """The screen, a message in each line."""
        return [b"".join(blocks[index] for index in sorted(blocks)).decode() for blocks in self.printed.values()]


async def frame_of(call: Any) -> v1.RunResponse:
    frame = await call.read()
    assert isinstance(frame, v1.RunResponse), "the stream goes on"
    return frame


def replies(events: list[v1.Event]) -> list[v1.Message]:
    return [event.message_added for event in events if event.message_added.role == v1.Message.ROLE_ASSISTANT]


@pytest.fixture(params=["offline", "openai"])
async def agent(request: pytest.FixtureRequest, served: Running) -> str:
    """An agent on a model that says eight words as fast as it can."""
    llm = v1.LlmAgent(instruction="Answer briefly.", provider=request.param)
    return (await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=llm)))).name


@pytest.mark.parametrize("delay", [None, Duration(), Duration(seconds=10)], ids=["30 ms", "at once", "late"])
@pytest.mark.parametrize("way", [OnStream, BySendCommand])
async def test_a_fast_reply_is_printed_whole_from_deltas_alone(
    served: Running, session: str, model: OpenAIServer, way: Callable[[], OnStream | BySendCommand], delay: Duration
) -> None:
    """On its own stream always; on another one if the watch began before the reply."""
    for _ in range(5):
        model.script(reply(EIGHT, chunks=8))
        options = v1.WatchOptions(max_batch_delay=delay)
        start = v1.StartRun(session=session, messages=[said(f"/say {EIGHT}")], options=options)
        frames = [frame async for frame in way().start(served, start)]
        printer = Printer()
        for frame in frames:
            printer.take(frame)
        (message,) = replies(durable(frames))
        new = message.sequence > frames[0].attached.last_sequence
        assert printer.texts == ([EIGHT] if new else [])
        assert new or way is BySendCommand


async def test_a_watch_of_the_session_prints_every_reply_to_come(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Attached before them, whatever it is behind: also what is appended without a run."""
    options = v1.WatchOptions(keep_open=True)
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=session, after_sequence=0, options=options))
    printer = Printer()
    printer.take(await frame_of(watch))
    for _ in range(5):
        model.script(reply(EIGHT, chunks=8))
        start = v1.StartRun(session=session, messages=[said(f"/say {EIGHT}")])
        await served.runs.Invoke(v1.InvokeRequest(start=start))
    remembered = v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(text="As I said: "), v1.Part(json="[8]")])
    await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[remembered]))
    while len(printer.whole) < 6:
        printer.take(await frame_of(watch))
    watch.cancel()
    assert printer.texts == [EIGHT] * 5 + ["As I said: [8]"]


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
async def case(store_url: str, held: Held) -> AsyncIterator[Running]:
    """A server with a session "case" whose model is held; nothing is found by polling."""
    async with running(store_url, {"held": held}, pace=Pace(poll=3600.0), grace=0.1) as server:
        agent = v1.Agent(llm=v1.LlmAgent(max_model_calls=100))
        await server.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        session = v1.Session(agent="agents/clerk")
        await server.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
        yield server


PIECES: list[Delta] = [
    Reasoning("Hm… "),
    Text("One "),
    Text("two 🎻 "),
    Call(0, "weigh", ""),
    Text("three "),
    Call(1, "mea", ""),
    Call(1, "sure", '{"a"'),
    Call(0, "", "{}"),
    Reasoning("so"),
    Refusal("I "),
    Call(1, "", ": 1}"),
    Refusal("won't."),
]
"""Every kind, blocks begun before they have text and grown side by side."""


@pytest.mark.parametrize("ending", ["finish", "cancel", "interrupt", "fail"])
async def test_attached_at_every_moment(case: Running, held: Held, ending: str) -> None:
    """A stream that comes after each piece prints the reply whole, also where it is kept incomplete, or is repeated
    under another message."""
    call = case.runs.Run()
    options = v1.WatchOptions(max_batch_delay=Duration())
    tools = [v1.Tool(name=name, client=v1.ClientTool()) for name in ("weigh", "measure")]
    start = v1.StartRun(session=CASE, run_id="r", messages=[said("Go")], options=options, client_tools=tools)
    await call.write(v1.RunRequest(start=start))
    kept = asyncio.Event()
    streams: list[tuple[Printer, asyncio.Task[None]]] = []

    async def follow(printer: Printer, frames: AsyncIterable[v1.RunResponse], came: asyncio.Event) -> None:
        async for frame in frames:
            printer.take(frame)
            if frame.batch.caught_up:
                came.set()
            if printer.whole:
                kept.set()
            for event in frame.batch.events:
                if event.tool_started.client_executed and printer is streams[0][0]:
                    told = v1.ToolResult(call_id=event.tool_started.call_id, result=[v1.Part(text="3")])
                    await call.write(v1.RunRequest(tool_result=told))

    async def attach(frames: AsyncIterable[v1.RunResponse]) -> None:
        printer, came = Printer(), asyncio.Event()
        streams.append((printer, asyncio.create_task(follow(printer, frames, came))))
        await came.wait()

    await attach(call)
    for piece in PIECES:
        held.say(piece)
        await attach(case.runs.WatchEvents(v1.WatchEventsRequest(name=f"{CASE}/runs/r", options=options)))
    match ending:
        case "finish":
            held.say(END, Text(EIGHT), END)
        case "cancel":
            await case.runs.CancelRun(v1.CancelRunRequest(name=f"{CASE}/runs/r"))
        case "interrupt":
            now = v1.UserInput(messages=[said("Wait!")], when=v1.UserInput.WHEN_INTERRUPT)
            await call.write(v1.RunRequest(input=now))
            await kept.wait()
            held.say(Text(EIGHT), END)
        case "fail":
            held.fail(errors.model_unavailable("The model hung up."))
            held.say(Text(EIGHT), END)
    await asyncio.gather(*(following for _, following in streams))
    first = streams[0][0]
    assert len(first.whole) == {"finish": 2, "cancel": 1, "interrupt": 2, "fail": 1}[ending]
    assert ending == "cancel" or first.texts[-1] == EIGHT
    for printer, _ in streams:
        assert printer.whole == first.whole
        assert printer.printed == first.printed


async def test_json_before_calls_keeps_the_kind_of_its_first_delta(served: Running, model: OpenAIServer) -> None:
    """It is text in the message. A stream that saw it as JSON gets the rest as JSON; one that comes later has it made
    from the message, as text. Its bytes are the same."""
    schema = '{"type": "object"}'
    agent = v1.Agent(llm=v1.LlmAgent(output_schema=schema, provider="openai"))
    agent.llm.tools.add(name="look", client=v1.ClientTool())
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="judge", agent=agent))
    session = v1.Session(agent="agents/judge")
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
    hold = asyncio.Event()
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    answer = stream(
        chunk({"content": '{"a": '}), chunk({"content": "1}"}), chunk({"tool_calls": [call]}), finish="tool_calls"
    )
    model.script(answer.held(hold, after=2))
    start = v1.StartRun(session=CASE, messages=[said("Go")], options=v1.WatchOptions(max_batch_delay=Duration()))
    kinds, printer = set(), Printer()
    async for frame in served.runs.Run(iter([v1.RunRequest(start=start)])):
        printer.take(frame)
        for event in frame.batch.events:
            if event.HasField("block_delta") and event.block_delta.block == 0:
                kinds.add(event.block_delta.WhichOneof("delta"))
                hold.set()
        if printer.whole:
            break
    assert kinds == {"json"}
    (blocks,) = printer.printed.values()
    assert blocks == {0: b'{"a": 1}', 1: b"{}"}
    (made,) = replies(await log_so_far(served))
    assert [part.WhichOneof("kind") for part in made.parts] == ["text", "tool_call"]


async def log_so_far(served: Running) -> list[v1.Event]:
    events: list[v1.Event] = []
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=CASE, after_sequence=0))
    async for frame in watch:
        events += frame.batch.events
        if frame.batch.caught_up:
            break
    watch.cancel()
    return events


async def test_long_replies_are_cut_into_batches_of_about_a_page(store_url: str) -> None:
    """A watcher that is behind gets four replies of 900 KB with their deltas: every batch ends at a page, and no slice
    within a character."""
    text = "é🎻" * 37_500
    async with running(store_url, {"offline": OfflineProvider()}) as served:
        agent = v1.Agent(llm=v1.LlmAgent(provider="offline", context=v1.Context(stateless=True)))
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        session = v1.Session(agent="agents/clerk")
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
        options = v1.WatchOptions(keep_open=True)
        watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=CASE, after_sequence=0, options=options))
        printer = Printer()
        printer.take(await frame_of(watch))
        for _ in range(2):
            start = v1.StartRun(session=CASE, messages=[said("/big 900000")])
            await served.runs.Invoke(v1.InvokeRequest(start=start))
            said_before = v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(text=text)] * 4)
            await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=CASE, messages=[said_before]))
        while len(printer.whole) < 4:
            frame = await frame_of(watch)
            assert frame.ByteSize() <= PAGE_BYTES + 100
            printer.take(frame)
        watch.cancel()
    assert [len(said) for said in printer.texts] == [900_000, 300_000] * 2
    assert printer.texts[1] == text * 4


async def test_a_draft_is_not_sent_again_behind_its_message(
    case: Running, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream may come when the reply is in the log and the process has not heard of it yet."""
    store = case.server._store
    commit, reached, go_on = store.commit, asyncio.Event(), asyncio.Event()

    async def slow(given: Commit) -> Committed:
        committed = await commit(given)
        if any(event.message_added.role == v1.Message.ROLE_ASSISTANT for event in given.events):
            reached.set()
            await go_on.wait()
        return committed

    monkeypatch.setattr(store, "commit", slow)
    await case.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=CASE, run_id="r", messages=[said("Go")])))
    held.say(Text("Whole."), END)
    await reached.wait()
    views = []
    options = v1.WatchOptions(keep_open=True, max_batch_delay=Duration())
    for after in (0, None):
        watch = case.runs.WatchEvents(v1.WatchEventsRequest(name=CASE, after_sequence=after, options=options))
        view = SessionView(after)
        events: list[v1.Event] = []
        while True:
            frame = await frame_of(watch)
            if frame.HasField("attached"):
                view = SessionView(after if after is not None else frame.attached.last_sequence)
                view.attach(frame.attached)
            events += frame.batch.events
            for event in frame.batch.events:
                view.apply(event)
            if frame.batch.caught_up:
                break
        assert [event for event in events if event.HasField("block_delta")] == []
        views.append((view, watch))
    go_on.set()
    held.say(Text("Another."), END)
    await case.runs.WaitRun(v1.WaitRunRequest(name=f"{CASE}/runs/r"))
    start = v1.StartRun(session=CASE, run_id="s", messages=[said("And?")])
    await case.runs.CreateRun(v1.CreateRunRequest(start=start))
    ended = await case.runs.WaitRun(v1.WaitRunRequest(name=f"{CASE}/runs/s"))
    for view, watch in views:
        while view.last_sequence != ended.last_sequence:
            for event in (await frame_of(watch)).batch.events:
                view.apply(event)
                assert len(view.open) <= 1
        assert view.open == {}
        watch.cancel()


async def test_a_stream_that_comes_after_a_discard_is_spared_it(case: Running, held: Held) -> None:
    """The sequence before is given; a client forgets the open blocks at `Attached`, and the new stream begins with the
    blocks that are open now."""
    call = case.runs.Run()
    options = v1.WatchOptions(max_batch_delay=Duration())
    await call.write(v1.RunRequest(start=v1.StartRun(session=CASE, messages=[said("Go")], options=options)))
    held.say(Text("Half a"))
    printer, view = Printer(), SessionView(0)
    while not view.open:
        frame = await frame_of(call)
        printer.take(frame)
        for event in frame.batch.events:
            view.apply(event)
    call.cancel()
    held.fail(errors.model_unavailable("The model hung up."))
    held.say(Text("A whole "))
    while not held.pieces.empty():
        await case.info.GetServerInfo(v1.GetServerInfoRequest())
    request = v1.WatchEventsRequest(name=CASE, after_sequence=view.last_sequence, options=options)
    frames = []
    async for frame in case.runs.WatchEvents(request):
        frames.append(frame)
        printer.take(frame)
        if frame.HasField("attached"):
            view.attach(frame.attached)
        for event in frame.batch.events:
            view.apply(event)
            assert len(view.open) <= 1
        if frame.batch.caught_up:
            held.say(Text("one."), END)
    assert printer.texts == ["A whole one."]
    assert not any(event.HasField("message_discarded") for event in events_of(frames))


async def test_two_drafts_are_open_in_one_session(case: Running) -> None:
    """Two steps of a run write at once: both are streamed, one ends whole and one is discarded, and neither closes the
    other; a stream that comes in between gets both from their beginning."""
    sessions = case.server._sessions
    key, row = await sessions.find("default", "case")
    live = sessions.live(key)
    await case.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=CASE, run_id="r", messages=[said("Go")])))
    started = live.head
    one, two = StepKey("r", "draft"), StepKey("r", "review")

    def cursor(after: int) -> Cursor:
        options = v1.WatchOptions(keep_open=True, max_batch_delay=Duration())
        return Cursor(live, sessions.store, after, live.head, options, Pace())

    early, view = cursor(row.last_sequence), SessionView(row.last_sequence)
    await drained(early, view)
    first, second = Draft("m1", "r", sessions.new_id), Draft("m2", "r", sessions.new_id)
    live.begin(one, first)
    live.begin(two, second)
    grow(live, first, "One ")
    grow(live, second, "Two ")
    await drained(early, view)
    grow(live, first, "and one.")
    late, other = cursor(started), SessionView(started)
    await drained(late, other)
    await drained(early, view)
    assert view.open == other.open
    assert texts(view) == {"m1": "One and one.", "m2": "Two "}

    whole = v1.Message(name="m1", role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(text="One and one.")])
    await live.commit(Commit(key=live.key, events=[v1.Event(run="r", message_added=whole)]))
    grow(live, second, "more")
    for watcher, seen in ((early, view), (late, other)):
        await drained(watcher, seen)
        assert texts(seen) == {"m2": "Two more"}
    assert one not in live.drafts
    live.discard(two)
    for watcher, seen in ((early, view), (late, other)):
        assert [event.WhichOneof("payload") for event in await drained(watcher, seen)] == ["message_discarded"]
        assert seen.open == {}


async def test_a_discard_right_before_the_end_of_a_run_is_sent_before_the_end(case: Running) -> None:
    """Nobody has looked in between, so that the end comes with the same batch."""
    sessions = case.server._sessions
    key, row = await sessions.find("default", "case")
    live = sessions.live(key)
    await case.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=CASE, run_id="r", messages=[said("Go")])))
    watcher = Cursor(
        live,
        sessions.store,
        row.last_sequence,
        live.head,
        v1.WatchOptions(max_batch_delay=Duration()),
        Pace(),
        "r",
    )
    view = SessionView(row.last_sequence)
    await drained(watcher, view)
    draft = Draft("m1", "r", sessions.new_id)
    live.begin(StepKey("r", "draft"), draft)
    grow(live, draft, "One ")
    await drained(watcher, view)
    live.discard(StepKey("r", "draft"))
    ended = v1.RunStateChanged(state=v1.Run.STATE_CANCELLED)
    await live.commit(Commit(key=live.key, events=[v1.Event(run="r", run_state_changed=ended)]))
    told = [event.WhichOneof("payload") for event in await drained(watcher, view)]
    assert ["message_discarded", "run_state_changed"] == told
    assert watcher.finished


def grow(live: LiveSession, draft: Draft, text: str) -> None:
    live.written(draft.feed(Text(text)))


async def drained(cursor: Cursor, view: SessionView) -> list[v1.Event]:
    """Takes what is due now."""
    events: list[v1.Event] = []
    while (frame := await cursor.next(lambda: True)) is not None:
        for event in frame.batch.events:
            view.apply(event)
            events.append(event)
    return events


def texts(view: SessionView) -> dict[str, str]:
    return {name.rpartition("/")[2]: blocks[0].text for name, blocks in view.open.items()}

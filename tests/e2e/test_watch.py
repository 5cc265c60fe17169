"""Attaching: one integer resumes a stream exactly, whatever was missed."""

import asyncio
from asyncio import events
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import Client, SessionView, v1
from notecase_server.engine import session as live
from notecase_server.models.openai import OpenAIProvider
from notecase_server.rpc import watch as watching
from notecase_server.rpc.watch import Pace
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import Commit, SessionKey, Store

from tests.e2e.driving import durable, events_of, kinds, log_of, metadata_of, reason_of, said
from tests.support.openai_server import OpenAIServer, chunk, reply, stream, tool_calls
from tests.support.server import TENANT, Running, running


@pytest.fixture
async def store(store_url: str) -> Store:
    """An open store, which the server that it is handed to closes."""
    return await open_store(store_url, now)


async def frames_of(
    served: Running, name: str, after: int | None = None, options: v1.WatchOptions | None = None
) -> list[v1.RunResponse]:
    request = v1.WatchEventsRequest(name=name, after_sequence=after, options=options)
    return [frame async for frame in served.runs.WatchEvents(request)]


async def frame_of(watch: grpc.aio.UnaryStreamCall[v1.WatchEventsRequest, v1.RunResponse]) -> v1.RunResponse:
    frame = await watch.read()
    assert isinstance(frame, v1.RunResponse), "the stream goes on"
    return frame


async def turns(served: Running, session: str, model: OpenAIServer, count: int) -> None:
    for number in range(count):
        model.script(reply(f"Answer {number}."))
        start = v1.StartRun(session=session, run_id=f"r{number}", messages=[said(f"Question {number}?")])
        await served.runs.Invoke(v1.InvokeRequest(start=start))


async def test_every_place_to_attach_gives_the_rest_of_the_same_log(
    served: Running, session: str, model: OpenAIServer
) -> None:
    await turns(served, session, model, 2)
    log = await log_of(served, session)
    assert [event.sequence for event in log] == list(range(1, 11))
    for after in range(11):
        frames = await frames_of(served, session, after)
        assert durable(frames) == log[after:]
        assert [frame.batch.caught_up for frame in frames if frame.HasField("batch")].count(True) == 1
    assert durable(await frames_of(served, session)) == []
    assert durable(await frames_of(served, f"{session}/runs/r0")) == log[:5]
    assert durable(await frames_of(served, f"{session}/runs/r1")) == log[5:]
    assert durable(await frames_of(served, f"{session}/runs/r0", after=3)) == log[3:5]
    assert durable(await frames_of(served, f"{session}/runs/r0", after=7)) == []


async def test_beyond_the_head_is_refused_with_the_head(served: Running, session: str, model: OpenAIServer) -> None:
    await turns(served, session, model, 1)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await frames_of(served, session, 6)
    assert refused.value.code() == grpc.StatusCode.OUT_OF_RANGE
    assert (reason_of(refused.value), metadata_of(refused.value)) == ("SEQUENCE_AHEAD", {"last_sequence": "5"})


async def test_a_watcher_in_mid_stream_gets_the_log_then_the_open_blocks_then_the_rest(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Watchers that came at different times end with equal views, byte for byte, with text that is not ASCII."""
    words = [f"ẅörd{number}🎻 " for number in range(30)]
    gates = [asyncio.Event() for _ in range(3)]
    answer = stream(*[chunk({"content": word}) for word in words])
    for number, gate in enumerate(gates):
        answer = answer.held(gate, after=10 * number + 5 + number)
    model.script(answer)
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=session, messages=[said("Go")])))
    watchers: list[tuple[SessionView, asyncio.Task[list[v1.RunResponse]]]] = []
    for gate in gates:
        view = SessionView(0)
        reached = asyncio.Event()
        watchers.append((view, asyncio.create_task(follow(served, run.name, view, reached))))
        await reached.wait()
        gate.set()
    followed = [await task for _, task in watchers]
    log = await log_of(served, session)
    for (view, _), frames in zip(watchers, followed, strict=True):
        assert durable(frames) == log
        assert view.messages == watchers[0][0].messages
        assert view.open == {}
        first = next(index for index, frame in enumerate(frames) if frame.batch.caught_up)
        before = [event for frame in frames[: first + 1] for event in frame.batch.events]
        passing = [bool(event.sequence) for event in before]
        assert passing == sorted(passing, reverse=True), "the log comes before the open blocks"
    assert list(watchers[0][0].messages.values())[-1].parts[0].text == "".join(words)


async def follow(served: Running, name: str, view: SessionView, reached: asyncio.Event) -> list[v1.RunResponse]:
    """Applies every event to the view, which raises at a gap; sets `reached` at the first open block."""
    frames = []
    async for frame in served.runs.WatchEvents(v1.WatchEventsRequest(name=name, after_sequence=0)):
        frames.append(frame)
        for event in frame.batch.events:
            view.apply(event)
        if view.open:
            reached.set()
    return frames


async def test_durable_only_brings_no_passing_event(served: Running, session: str, model: OpenAIServer) -> None:
    model.script(reply("Word by word by word.", chunks=5))
    start = v1.StartRun(session=session, messages=[said("Go")], options=v1.WatchOptions(durable_only=True))
    frames = [frame async for frame in served.runs.Run(iter([v1.RunRequest(start=start)]))]
    assert events_of(frames) == durable(frames) == await log_of(served, session)


async def test_keep_open_goes_on_after_the_run_and_takes_the_next_start(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("One."), reply("Two."))
    call = served.runs.Run()
    options = v1.WatchOptions(keep_open=True)
    await call.write(v1.RunRequest(start=v1.StartRun(session=session, messages=[said("1?")], options=options)))
    ended, results = 0, []
    async for frame in call:
        if frame.HasField("result"):
            results.append(frame.result)
        ended += kinds(list(frame.batch.events)).count("run_state_changed")
        if ended == 1 and not results:
            start = v1.StartRun(session=session, messages=[said("2?")])
            await call.write(v1.RunRequest(command_id="second", start=start))
            ended += 10
        if ended == 12 and results:
            break
    call.cancel()
    assert [(result.command_id, result.disposition, result.sequence) for result in results] == [
        ("second", v1.CommandResult.DISPOSITION_APPLIED, 6)
    ]


@pytest.mark.parametrize("attached", [False, True])
async def test_commands_reach_the_later_runs_of_a_stream_that_stays_open(
    served: Running, session: str, model: OpenAIServer, *, attached: bool
) -> None:
    """Of one that has started a run and queued another, and of one that follows a session in which others did so: the
    result of the second run's call and then a cancel."""
    go_on = asyncio.Event()
    model.script(reply("One.").held(go_on), *[tool_calls(("weigh", "{}"))] * 2)
    tool = v1.Tool(name="weigh", client=v1.ClientTool())
    first = v1.StartRun(session=session, messages=[said("1?")], options=v1.WatchOptions(keep_open=True))
    second = v1.StartRun(session=session, messages=[said("2?")], client_tools=[tool], on_busy=v1.StartRun.ON_BUSY_QUEUE)
    call = served.runs.Run()
    if attached:
        await served.runs.CreateRun(v1.CreateRunRequest(start=first))
        await call.write(v1.RunRequest(attach=v1.AttachRun(name=session, after_sequence=0, options=first.options)))
        await served.runs.CreateRun(v1.CreateRunRequest(start=second))
    else:
        await call.write(v1.RunRequest(start=first))
        await call.write(v1.RunRequest(command_id="second", start=second))
    results: dict[str, v1.CommandResult] = {}
    dispatched = 0
    async for frame in call:
        if frame.HasField("result"):
            results[frame.result.command_id] = frame.result
        for event in frame.batch.events:
            dispatched += event.HasField("tool_started")
            if event.HasField("command_queued"):
                go_on.set()
            if event.HasField("tool_started") and dispatched == 1:
                given = v1.ToolResult(call_id=event.tool_started.call_id, result=[v1.Part(text="3 kg")])
                await call.write(v1.RunRequest(command_id="given", tool_result=given))
            elif event.HasField("tool_started"):
                await call.write(v1.RunRequest(command_id="cancel", cancel=v1.CancelCommand()))
        if "cancel" in results or any(result.error.code for result in results.values()):
            break
    call.cancel()
    assert {name: result.disposition for name, result in results.items() if name != "second"} == {
        "given": v1.CommandResult.DISPOSITION_APPLIED,
        "cancel": v1.CommandResult.DISPOSITION_APPLIED,
    }


async def test_half_close_is_no_cancel(served: Running, session: str, model: OpenAIServer) -> None:
    go_on = asyncio.Event()
    model.script(reply("Still here.").held(go_on))
    call = served.runs.Run()
    await call.write(v1.RunRequest(start=v1.StartRun(session=session, messages=[said("Go")])))
    await call.done_writing()
    await model.request(0)
    go_on.set()
    frames = [frame async for frame in call]
    assert durable(frames)[-1].run_state_changed.state == v1.Run.STATE_SUCCEEDED
    assert await call.code() == grpc.StatusCode.OK


async def test_state_changed_elsewhere_reaches_the_sessions_of_that_user_as_a_passing_event(
    served: Running, session: str
) -> None:
    """Sequence 0 with the version; the log does not move; a session of another user hears nothing."""
    other = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(user="users/bob")))
    options = v1.WatchOptions(keep_open=True)
    watches = [
        served.runs.WatchEvents(v1.WatchEventsRequest(name=name, options=options)) for name in (session, other.name)
    ]
    for watch in watches:
        assert (await frame_of(watch)).HasField("attached")
        assert (await frame_of(watch)).batch.caught_up
    for name, value in (("users/ada/state", 1), ("app/state", 2)):
        put = v1.PutStateRequest(name=name, key="n", value=v1.Value(int_value=value))
        await served.state.PutState(put)
    heard: list[list[tuple[str, int]]] = []
    for watch, count in zip(watches, (2, 1), strict=True):
        events: list[v1.Event] = []
        while len(events) < count:
            events += (await frame_of(watch)).batch.events
        assert {event.sequence for event in events} == {0}
        heard.append([(event.state_changed.state, event.state_changed.version) for event in events])
        watch.cancel()
    assert heard == [[("users/ada/state", 1), ("app/state", 1)], [("app/state", 1)]]


async def test_an_idle_stream_has_a_heartbeat(store_url: str) -> None:
    async with running(store_url, pace=Pace(heartbeat=0.01)) as served:
        session = await served.sessions.CreateSession(v1.CreateSessionRequest())
        watch = v1.WatchEventsRequest(name=session.name, options=v1.WatchOptions(keep_open=True))
        async for frame in served.runs.WatchEvents(watch):
            if frame.HasField("heartbeat"):
                assert frame.heartbeat.last_sequence == 0
                break


async def test_without_any_bell_everything_still_arrives(
    store_url: str, model: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live delivery is a hint: what is durable reaches a watcher whose bells are all cut, only later."""
    monkeypatch.setattr(live.Bell, "ring", lambda self: None)
    provider = OpenAIProvider("key", model.url, "stub-1")
    async with running(store_url, {"openai": provider}, pace=Pace(poll=0.02)) as served:
        await served.agents.CreateAgent(
            v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent(instruction="Hi.")))
        )
        model.script(reply("Heard.", chunks=3), reply("Again."))
        start = v1.StartRun(new_session=v1.Session(name="sessions/s", agent="agents/a"), messages=[said("Go")])
        frames = [frame async for frame in served.runs.Run(iter([v1.RunRequest(start=start)]))]
        assert durable(frames) == await log_of(served, "sessions/s")
        again = v1.InvokeRequest(start=v1.StartRun(session="sessions/s", messages=[said("?")]))
        assert (await served.runs.Invoke(again)).reply.parts[0].text == "Again."


async def test_what_is_written_past_this_server_is_found_by_a_look_into_the_store(store: Store) -> None:
    """Nothing in the process hears of it: neither a bell nor the session's live side."""
    async with running(store, pace=Pace(poll=0.02)) as served:
        made = await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"))
        key = SessionKey("default", "case", made.uid)
        watch = served.runs.WatchEvents(
            v1.WatchEventsRequest(name=made.name, after_sequence=0, options=v1.WatchOptions(keep_open=True))
        )
        assert (await frame_of(watch)).HasField("attached")
        assert (await frame_of(watch)).batch.caught_up
        note = v1.Event(message_added=v1.Message(name="m1", role=v1.Message.ROLE_USER, parts=[v1.Part(text="Psst.")]))
        await store.commit(Commit(key=key, events=[note]))
        (event,) = (await frame_of(watch)).batch.events
        assert ("sessions/case/messages/m1", 1) == (event.message_added.name, event.sequence)
        await store.delete_session(key)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await watch.read()
        assert "SESSION_NOT_FOUND" == reason_of(ended.value)


class Asked:
    """A store that reports when a run was read."""

    def __init__(self, store: Store) -> None:
        self.told = asyncio.Event()
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get_run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        found = await self._store.get_run(key, run)
        self.told.set()
        return found


async def test_the_end_of_a_run_that_is_written_past_this_server_ends_a_wait(store: Store, model: OpenAIServer) -> None:
    provider = OpenAIProvider("key", model.url, "stub-1")
    model.script(tool_calls(("weigh", "{}")))
    asked = Asked(store)
    async with running(cast(Store, asked), {"openai": provider}, pace=Pace(poll=0.02)) as served:
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent())))
        session = v1.Session(name="sessions/case", agent="agents/a")
        tool = v1.Tool(name="weigh", client=v1.ClientTool())
        start = v1.StartRun(new_session=session, run_id="r1", messages=[said("Go")], client_tools=[tool])
        waiting = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
        assert v1.Run.STATE_WAITING == waiting.state
        asked.told.clear()
        wait = served.runs.WaitRun(v1.WaitRunRequest(name=waiting.name, after_sequence=waiting.last_sequence))
        await asked.told.wait()
        made = await served.sessions.GetSession(v1.GetSessionRequest(name="sessions/case"))
        call = v1.ToolCall(call_id=waiting.pending_calls[0].call_id, outcome=v1.ToolCall.OUTCOME_CANCELLED)
        ended = v1.RunStateChanged(state=v1.Run.STATE_CANCELLED)
        events = [v1.Event(run="r1", tool_finished=call), v1.Event(run="r1", run_state_changed=ended)]
        await store.commit(Commit(key=SessionKey("default", "case", made.uid), events=events))
        assert v1.Run.STATE_CANCELLED == (await wait).state


async def test_a_change_of_app_state_is_sent_only_to_sessions_of_the_tenant(served: Running) -> None:
    """Each tenant's sessions receive a change of their own app's state first, even if another tenant's changed
    before."""
    watches = []
    for tenant in ("default", "other"):
        metadata = ((TENANT, tenant),)
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"), metadata=metadata)
        request = v1.WatchEventsRequest(name="sessions/case", options=v1.WatchOptions(keep_open=True))
        watch = served.runs.WatchEvents(request, metadata=metadata)
        assert (await frame_of(watch)).HasField("attached")
        assert (await frame_of(watch)).batch.caught_up
        watches.append(watch)
    for tenant in ("default", "other"):
        put = v1.PutStateRequest(name="app/state", key="whose", value=v1.Value(string_value=tenant))
        await served.state.PutState(put, metadata=((TENANT, tenant),))
    for tenant, watch in zip(("default", "other"), watches, strict=True):
        (event, *more) = (await frame_of(watch)).batch.events
        assert [tenant] == [op.set.string_value for op in event.state_changed.ops]
        assert [] == more
        watch.cancel()


async def test_deleting_a_session_ends_its_streams_with_not_found(served: Running, session: str) -> None:
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=session, options=v1.WatchOptions(keep_open=True)))
    await watch.read()
    await watch.read()
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=session))
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await watch.read()
    assert reason_of(ended.value) == "SESSION_NOT_FOUND"


async def test_a_long_delay_gathers_deltas_into_few_batches(served: Running, session: str, model: OpenAIServer) -> None:
    """The first delta of a block never waits; the rest goes with the commit when the delay is longer than the reply."""
    begun = asyncio.Event()
    model.script(stream(*[chunk({"content": f"{n} "}) for n in range(200)]).held(begun, after=2))
    options = v1.WatchOptions(max_batch_delay=Duration(seconds=10))
    start = v1.StartRun(session=session, messages=[said("Go")], options=options)
    slices, frames = [], 0
    async for frame in served.runs.Run(iter([v1.RunRequest(start=start)])):
        pieces = [event.block_delta.text for event in frame.batch.events if event.HasField("block_delta")]
        slices += pieces
        frames += bool(pieces)
        if pieces:
            begun.set()
    assert "".join(slices) == "".join(f"{n} " for n in range(200))
    assert (len(slices), frames) == (2, 2)


async def test_the_python_client_rebuilds_the_log_it_watched(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("Hello, Ada.", chunks=4))
    async with Client(served.address) as client, client.run("Hi", session=session) as run:
        text = "".join([piece async for piece in _texts(run.text())])
    assert text == "Hello, Ada."
    assert run.result.reply.parts[0].text == "Hello, Ada."


async def _texts(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    async for piece in pieces:
        yield piece


async def test_events_are_copied_few_at_a_time(served: Running, session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn between them, and before the frame is sent."""
    for _ in range(8):
        request = v1.AppendMessagesRequest(parent=session, messages=[said("é" * 50_000)])
        await served.messages.AppendMessages(request)
    most, added, add, run = 0, 0, watching._Batch.add, events.Handle._run

    def adding(batch: watching._Batch, event: v1.Event) -> bool:
        nonlocal added, most
        added += event.ByteSize()
        most = max(most, added)
        return add(batch, event)

    def running_one(handle: asyncio.Handle) -> None:
        nonlocal added
        added = 0
        run(handle)

    monkeypatch.setattr(watching._Batch, "add", adding)
    monkeypatch.setattr(events.Handle, "_run", running_one)
    frames = await frames_of(served, session, after=0)
    assert 8 <= sum(len(frame.batch.events) for frame in frames)
    assert 0 < most <= watching.AT_ONCE_BYTES + 101_000

"""A server killed at each commit of a run, and the next one on its store: what was done stays done and is not done
again, what was under way goes on as its tool's policy says, what waits still waits."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from notecase import v1
from notecase_server.models.openai import OpenAIProvider
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import SessionKey, Store
from notecase_server.store.fold import ENDED, state_scope
from notecase_server.store.postgres.store import PostgresStore
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.conftest import STORES
from tests.e2e.driving import said
from tests.support import postgres
from tests.support.crashing import EFFECTS, GATE, TOOLS, Crashing, Gate, effects_of
from tests.support.openai_server import Answer, Json, OpenAIServer, reply, tool_calls
from tests.support.server import running

SESSION, R1, R2 = "sessions/case", "sessions/case/runs/r1", "sessions/case/runs/r2"

RETRY, ASK, FAIL = v1.Tool.ON_INTERRUPT_RETRY, v1.Tool.ON_INTERRUPT_UNSPECIFIED, v1.Tool.ON_INTERRUPT_FAIL
APPROVE, DENY, ANSWER = (
    v1.InputResponse.DECISION_APPROVE,
    v1.InputResponse.DECISION_DENY,
    v1.InputResponse.DECISION_ANSWER,
)
SUCCEEDED, FAILED, DENIED, CANCELLED = (
    v1.ToolCall.OUTCOME_SUCCEEDED,
    v1.ToolCall.OUTCOME_FAILED,
    v1.ToolCall.OUTCOME_DENIED,
    v1.ToolCall.OUTCOME_CANCELLED,
)

Decision: TypeAlias = v1.InputResponse.Decision.ValueType
Policy: TypeAlias = v1.Tool.OnInterrupt.ValueType


def server_tool(name: str, policy: Policy, function: str = "act") -> v1.Tool:
    return v1.Tool(name=name, server=v1.ServerTool(function=function), on_interrupt=policy)


def client_tool(name: str, requires_approval: bool = False) -> v1.Tool:
    return v1.Tool(name=name, client=v1.ClientTool(), requires_approval=requires_approval)


def model_that_calls(*tools: str) -> OpenAIServer:
    """Calls these tools at once if the message says so, and replies with text otherwise."""

    def answer(body: Json) -> Answer:
        last = body["messages"][-1]
        if last == {"role": "user", "content": "Go"}:
            return tool_calls(*[(name, "{}") for name in tools])
        return reply(f"Answer to the {last['role']}.")

    return OpenAIServer(answer)


def check_well_formed(request: Json) -> None:
    """Each call is followed by its one result, and no result comes without a call."""
    waiting: list[str] = []
    for message in request["messages"]:
        if message["role"] == "tool":
            waiting.remove(message["tool_call_id"])
        else:
            assert waiting == [], request
            waiting = [call["id"] for call in message.get("tool_calls", ())]
    assert waiting == [], request


def results_of(request: Json) -> list[str]:
    return [message["content"] for message in request["messages"] if message["role"] == "tool"]


async def prepare(address: str, tools: Sequence[v1.Tool]) -> None:
    """An agent with these tools, and a session of it."""
    async with grpc.aio.insecure_channel(address) as channel:
        agent = v1.Agent(llm=v1.LlmAgent(model="stub-1", tools=tools))
        await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        session = v1.Session(agent="agents/clerk")
        await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id="case", session=session))


@asynccontextmanager
async def new_store(kind: str, directory: Path) -> AsyncIterator[str]:
    """The URL of a store of that kind, which is in the directory if it is a file."""
    if kind == "postgresql":
        async with postgres.shared().empty_store() as url:
            yield url
    else:
        yield f"sqlite:{directory / 'notecase.db'}"


class Stored(NamedTuple):
    """What is in the store while no server has it."""

    log: list[v1.Event]
    runs: dict[str, v1.Run]
    session: v1.Session
    acted: int


async def stored(place: Path | str) -> Stored:
    """Reads a store by its URL, or the file in a directory. The lease that a killed server has left is ended."""
    store: Store
    if by_url(place).startswith("postgresql:"):
        store = await PostgresStore.open(by_url(place), now)
        await store._pool.execute("UPDATE owner SET name = ''")
    else:
        store = await open_store(by_url(place), now)
    try:
        session = await store.find_session("default", "case")
        assert session is not None
        key = SessionKey("default", session.name, session.uid)
        log = await store.read_events(key, 0)
        found = {name: await store.get_run(key, name) for name in ("r1", "r2")}
        runs = {name: row[0] for name, row in found.items() if row is not None}
        state = await store.get_state(state_scope(key, "", ""), ["acted"])
        return Stored(log, runs, session, state.entries["acted"].value.int_value)
    finally:
        await store.close()


def by_url(place: Path | str) -> str:
    return place if isinstance(place, str) else f"sqlite:{place / 'notecase.db'}"


@asynccontextmanager
async def restarted(place: Path | str, model: OpenAIServer) -> AsyncIterator[str]:
    """The next server on the store, until the block is left: its address."""
    providers = {"openai": OpenAIProvider("test-key", model.url, "stub-1")}
    async with running(by_url(place), providers, toolbox=make_toolbox((TOOLS,), {})) as server:
        yield server.address


class Caller:
    """A caller that answers what a run waits for. Everything has an id, so that another caller can repeat it at any
    time."""

    def __init__(self, channel: grpc.aio.Channel, interrupted: Decision = APPROVE) -> None:
        self.runs = v1.RunServiceStub(channel)
        self.interrupted = interrupted
        self.seen = 0

    async def start(self, run_id: str, text: str, **fields: Any) -> v1.Run:
        start = v1.StartRun(session=SESSION, run_id=run_id, messages=[said(text)], **fields)
        run: v1.Run = await self.runs.CreateRun(v1.CreateRunRequest(start=start))
        return run

    async def send(self, command: v1.RunRequest) -> v1.CommandResult:
        sent = await self.runs.SendCommand(v1.SendCommandRequest(session=SESSION, run=R1, command=command))
        return sent.result

    async def rest(self, name: str = R1) -> v1.Run:
        """The run once it has ended, or waits for something since it was looked at last."""
        run: v1.Run = await self.runs.WaitRun(v1.WaitRunRequest(name=name, after_sequence=self.seen))
        self.seen = run.last_sequence
        return run

    async def answer(self, request: v1.InputRequest, decision: Decision) -> None:
        response = v1.InputResponse(input_id=request.input_id, decision=decision)
        if decision == ANSWER:
            response.answer = "somebody looked"
        await self.send(v1.RunRequest(command_id=f"input-{request.input_id}", input_response=response))

    async def answer_all(self, run: v1.Run) -> None:
        for request in run.pending_inputs:
            again = request.kind == v1.InputRequest.KIND_INTERRUPTED_CALL
            await self.answer(request, self.interrupted if again else APPROVE)

    async def give_results(self, run: v1.Run) -> None:
        for call in run.pending_calls:
            told = v1.ToolResult(call_id=call.call_id, result=[v1.Part(text=f"{call.tool} done")])
            await self.send(v1.RunRequest(command_id=f"result-{call.call_id}", tool_result=told))

    async def say(self, text: str, when: v1.UserInput.When.ValueType) -> None:
        await self.send(v1.RunRequest(command_id="said", input=v1.UserInput(messages=[said(text)], when=when)))


async def work(caller: Caller) -> None:
    """Approves, asks for more and queues another run while the caller's tools are out, then gives their results."""
    run = await caller.start("r1", "Go")
    while run.state not in ENDED:
        run = await caller.rest()
        if run.pending_inputs:
            await caller.answer_all(run)
        elif run.pending_calls:
            await caller.say("And then?", v1.UserInput.WHEN_FOLLOW_UP)
            await caller.start("r2", "Another", on_busy=v1.StartRun.ON_BUSY_QUEUE)
            await caller.give_results(run)
    assert (await caller.rest(R2)).state == v1.Run.STATE_SUCCEEDED


async def speak(caller: Caller) -> None:
    """Says no instead of approving, while a tool of the caller is out: it counts once the tool's result is in."""
    run = await caller.start("r1", "Go")
    while run.state not in ENDED:
        run = await caller.rest()
        if run.pending_calls:
            await caller.say("Rather not.", v1.UserInput.WHEN_STEER)
            await caller.give_results(run)


async def leave(caller: Caller) -> None:
    """Cancels the run after its turn, then gives the result that it waits for."""
    run = await caller.start("r1", "Go")
    while run.state not in ENDED:
        run = await caller.rest()
        if run.pending_calls:
            cancel = v1.CancelCommand(mode=v1.CancelCommand.MODE_AFTER_TURN, reason="enough")
            request = v1.CancelRunRequest(name=R1, cancel=cancel, request_id="leave")
            await caller.runs.CancelRun(request)
            await caller.give_results(run)


class Story(NamedTuple):
    """What callers do, with which tools, and in how many commits when nothing goes wrong."""

    tell: Callable[[Caller], Awaitable[None]]
    tools: Sequence[v1.Tool]
    commits: int
    end: v1.Run.State.ValueType
    outcomes: dict[str, v1.ToolCall.Outcome.ValueType]


CLIENTS = (client_tool("weigh"), client_tool("pay", requires_approval=True))
STORIES = {
    "work": Story(
        work,
        (server_tool("retry", RETRY), server_tool("ask", ASK), server_tool("fail", FAIL), *CLIENTS),
        14,
        v1.Run.STATE_SUCCEEDED,
        dict.fromkeys(("retry", "ask", "fail", "weigh", "pay"), SUCCEEDED),
    ),
    "speak": Story(speak, CLIENTS, 6, v1.Run.STATE_SUCCEEDED, {"weigh": SUCCEEDED, "pay": DENIED}),
    "leave": Story(leave, CLIENTS, 5, v1.Run.STATE_CANCELLED, {"weigh": SUCCEEDED, "pay": CANCELLED}),
}


class Call(NamedTuple):
    """The events of one call in a log."""

    attempts: list[int]
    ends: list[v1.ToolCall]
    asked: list[v1.InputRequest]


def calls_of(log: Sequence[v1.Event]) -> dict[str, tuple[str, Call]]:
    """By id: the tool, and what became of the call."""
    calls = {
        part.tool_call.call_id: (part.tool_call.tool, Call([], [], []))
        for event in log
        for part in event.message_added.parts
        if part.HasField("tool_call")
    }
    for event in log:
        if event.HasField("tool_started"):
            calls[event.tool_started.call_id][1].attempts.append(event.tool_started.attempt)
        elif event.HasField("tool_finished"):
            calls[event.tool_finished.call_id][1].ends.append(event.tool_finished)
        elif event.input_requested.kind == v1.InputRequest.KIND_INTERRUPTED_CALL:
            calls[event.input_requested.call.call_id][1].asked.append(event.input_requested)
    return calls


def check_calls(story: Story, before: Stored, after: Stored, effects: Counter[str], decision: Decision) -> None:
    """Each call came to its one end: as it would have without the kill, or as its policy says if it was under way."""
    known = {call_id: call for call_id, (_, call) in calls_of(before.log).items()}
    for call_id, (tool, call) in calls_of(after.log).items():
        (end,) = call.ends
        was = known.get(call_id, Call([], [], []))
        here = tool in {"retry", "ask", "fail"}
        interrupted = here and bool(was.attempts) and not was.ends
        again = interrupted and (tool == "retry" or (tool == "ask" and decision == APPROVE))
        expected = story.outcomes[tool]
        if interrupted and (tool == "fail" or (tool == "ask" and decision == DENY)):
            expected = FAILED
        assert expected == end.outcome, end
        assert (interrupted and tool == "ask") == bool(call.asked)
        dispatched = expected not in {DENIED, CANCELLED}
        assert call.attempts == ([1, 2] if again else [1] if dispatched else [])
        effect = effects[f"{after.session.uid}/{call_id}"]
        if interrupted:
            assert again <= effect <= 1 + again, "it may or may not have come to its effect before the kill"
        else:
            assert effect == here
    acted = [end for _, call in calls_of(after.log).values() for end in call.ends if "acted" in str(end.result)]
    assert after.acted == len(acted), "a change of state commits with its result"


def check_runs(before: Stored, after: Stored) -> None:
    """The log only grew, without a gap, and each run has one end; one that was at work says that it was taken over."""
    assert after.log[: len(before.log)] == before.log
    assert [event.sequence for event in after.log] == list(range(1, len(after.log) + 1))
    ends = Counter(event.run for event in after.log if event.run_state_changed.state in ENDED)
    assert ends == dict.fromkeys(after.runs, 1)
    for name, run in after.runs.items():
        at_work = name in before.runs and before.runs[name].state == v1.Run.STATE_RUNNING
        assert run.attempt == 1 + at_work
    assert not after.session.active_run
    assert not after.session.queued_commands


SOME = {("work", "after", 5), ("work", "before", 9), ("leave", "after", 3), ("speak", "before", 4)}
"""At which a server on PostgreSQL is killed where it is not one of STORES."""

POINTS = [
    pytest.param(kind, name, side, number, id=f"{kind}-{name}-{side}-{number}")
    for kind in ("sqlite", "postgresql")
    for name, story in STORIES.items()
    for number in range(1, story.commits + 1)
    for side in ("before", "after")
    if kind in STORES or (kind == "postgresql" and (name, side, number) in SOME)
]


@pytest.mark.parametrize(("kind", "name", "side", "number"), POINTS)
async def test_killed_at_a_commit_the_next_server_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, side: str, number: int
) -> None:
    story = STORIES[name]
    decision = (APPROVE, DENY, ANSWER)[number % 3]
    monkeypatch.setenv(EFFECTS, str(tmp_path / "effects"))
    tools = [tool.name for tool in story.tools]
    async with new_store(kind, tmp_path) as store, model_that_calls(*tools) as model:
        env = {"OPENAI_API_KEY": "test-key", "OPENAI_BASE_URL": model.url}
        server = await Crashing.launch(tmp_path, f"--{side}", str(number), env=env, store=store)
        async with server, grpc.aio.insecure_channel(server.address) as channel:
            await prepare(server.address, story.tools)
            try:
                await story.tell(Caller(channel))
            except grpc.aio.AioRpcError as cut:
                assert cut.code() == grpc.StatusCode.UNAVAILABLE, cut
            # Not cut if the end was in the store and was sent just before the kill.
            await server.death()
        before = await stored(store)
        async with restarted(store, model) as address, grpc.aio.insecure_channel(address) as channel:
            if (waiting := before.runs.get("r1")) is not None and waiting.state == v1.Run.STATE_WAITING:
                found = await v1.RunServiceStub(channel).GetRun(v1.GetRunRequest(name=R1))
                assert list(found.pending_calls) == list(waiting.pending_calls)
                assert "speak" == name or list(found.pending_inputs) == list(waiting.pending_inputs)
            await story.tell(Caller(channel, decision))
        after = await stored(store)
        requests = model.requests
    assert after.runs["r1"].state == story.end
    check_runs(before, after)
    check_calls(story, before, after, effects_of(tmp_path / "effects"), decision)
    for request in requests:
        check_well_formed(request)


@pytest.mark.parametrize("name", STORIES)
async def test_unharmed_a_story_has_the_commits_at_which_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """So that none is missed when the engine learns to make more of them: commits differ in their time."""
    story = STORIES[name]
    monkeypatch.setenv(EFFECTS, str(tmp_path / "effects"))
    async with model_that_calls(*[tool.name for tool in story.tools]) as model:
        async with restarted(tmp_path, model) as address, grpc.aio.insecure_channel(address) as channel:
            await prepare(address, story.tools)
            await story.tell(Caller(channel))
        after = await stored(tmp_path)
    assert len({event.create_time.ToMicroseconds() for event in after.log}) == story.commits
    check_calls(story, Stored([], {}, v1.Session(), 0), after, effects_of(tmp_path / "effects"), APPROVE)
    assert "speak" != name or "Rather not." in str(after.log)


# The table of cancel: A has finished, B is at work, and then the run or its server is stopped.


class Cut(NamedTuple):
    """How it was stopped, and where B is: what becomes of B, how often it was begun, and how the run ends."""

    how: str
    b: v1.Tool
    outcome: v1.ToolCall.Outcome.ValueType
    begun: int = 1
    decision: Decision = APPROVE

    @property
    def end(self) -> v1.Run.State.ValueType:
        return v1.Run.STATE_SUCCEEDED if self.how == "kill" else v1.Run.STATE_CANCELLED


def held(policy: Policy = ASK) -> v1.Tool:
    return server_tool("b", policy, "linger")


TABLE = {
    "immediate-server": Cut("immediate", held(), CANCELLED),
    "immediate-client": Cut("immediate", client_tool("b"), CANCELLED),
    "after_turn-server": Cut("after_turn", held(), SUCCEEDED),
    "after_turn-client": Cut("after_turn", client_tool("b"), SUCCEEDED),
    "disconnect-server": Cut("disconnect", held(), CANCELLED),
    "disconnect-client": Cut("disconnect", client_tool("b"), CANCELLED),
    "kill-retry": Cut("kill", held(RETRY), SUCCEEDED, begun=2),
    "kill-fail": Cut("kill", held(FAIL), FAILED),
    "kill-ask-approve": Cut("kill", held(ASK), SUCCEEDED, begun=2, decision=APPROVE),
    "kill-ask-deny": Cut("kill", held(ASK), FAILED, decision=DENY),
    "kill-ask-answer": Cut("kill", held(ASK), SUCCEEDED, decision=ANSWER),
    "kill-client": Cut("kill", client_tool("b"), SUCCEEDED),
}


async def until_a_is_done(
    frames: grpc.aio.StreamStreamCall[v1.RunRequest, v1.RunResponse], gate: Gate, cut: Cut
) -> None:
    """Reads the stream until A's result and B's dispatch are in the log, and B is at work if it is the server's."""
    missing = {"tool_finished a", "tool_started b"}
    while missing:
        frame = await frames.read()
        assert isinstance(frame, v1.RunResponse), "the stream goes on until the run ends"
        for event in frame.batch.events:
            kind = event.WhichOneof("payload") or ""
            missing.discard(f"{kind} {getattr(event, kind).tool}" if kind.startswith("tool_") else "")
    if cut.b.HasField("server"):
        assert (await gate.arrival())[1] == 1


async def stop_by_cancel(caller: Caller, gate: Gate, cut: Cut) -> v1.Run:
    """Cancels in the mode that the table says; what is awaited after the turn is given."""
    mode = v1.CancelCommand.MODE_AFTER_TURN if cut.how == "after_turn" else v1.CancelCommand.MODE_IMMEDIATE
    cancel = v1.CancelCommand(mode=mode, reason="enough")
    run: v1.Run = await caller.runs.CancelRun(v1.CancelRunRequest(name=R1, cancel=cancel))
    if run.state not in ENDED:
        gate.open()
        await caller.give_results(run)
        caller.seen = max(caller.seen, run.last_sequence)
        run = await caller.rest()
    return run


async def finish_after_kill(caller: Caller, gate: Gate) -> v1.Run:
    """Does what the run waits for after the restart; a call that is begun again is let through."""
    gate.open()
    run = await caller.rest()
    while run.state not in ENDED:
        await caller.answer_all(run)
        await caller.give_results(run)
        run = await caller.rest()
    return run


@pytest.mark.parametrize("cut", TABLE.values(), ids=TABLE.keys())
async def test_a_is_kept_and_b_treated_as_its_policy_says(tmp_path: Path, cut: Cut) -> None:
    """A's result is a success and its effect happened once; B is sealed, awaited or interrupted; the next turn shows
    the model one result for each."""
    tools = [server_tool("a", ASK), cut.b]
    async with model_that_calls("a", "b") as model, Gate() as gate:
        env = {"OPENAI_API_KEY": "test-key", "OPENAI_BASE_URL": model.url, GATE: str(gate.port)}
        async with await Crashing.launch(tmp_path, env=env) as server:
            await prepare(server.address, tools)
            async with grpc.aio.insecure_channel(server.address) as channel:
                caller = Caller(channel)
                start = v1.StartRun(session=SESSION, run_id="r1", messages=[said("Go")])
                if cut.how == "disconnect":
                    start.disconnect.cancel_after.CopyFrom(Duration(nanos=50_000_000))
                frames = caller.runs.Run()
                await frames.write(v1.RunRequest(start=start))
                await until_a_is_done(frames, gate, cut)
                if cut.how == "kill":
                    await server.kill()
                elif cut.how == "disconnect":
                    frames.cancel()
                    run = await caller.rest()
                    while run.state not in ENDED:
                        run = await caller.rest()
                else:
                    run = await stop_by_cancel(caller, gate, cut)
                frames.cancel()
            if cut.how != "kill":
                assert await server.stop() == 0
        async with await Crashing.launch(tmp_path, env=env) as server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                caller = Caller(channel, cut.decision)
                if cut.how == "kill":
                    run = await finish_after_kill(caller, gate)
                next_turn = v1.StartRun(session=SESSION, messages=[said("Go on")])
                await caller.runs.Invoke(v1.InvokeRequest(start=next_turn))
            assert await server.stop() == 0
        request = model.requests[-1]
    after = await stored(tmp_path)
    log, uid = after.log, after.session.uid
    assert run.state == cut.end
    calls = dict(calls_of(log).values())
    assert [end.outcome for end in calls["a"].ends] == [SUCCEEDED]
    assert [end.outcome for end in calls["b"].ends] == [cut.outcome]
    asks = cut.how == "kill" and cut.b.HasField("server") and cut.b.on_interrupt == ASK
    assert len(calls["b"].asked) == asks, "of the policies only one asks"
    effects = effects_of(tmp_path / "effects")
    assert effects[f"{uid}/{calls['a'].ends[0].call_id}"] == 1
    assert effects[f"{uid}/{calls['b'].ends[0].call_id}"] == (cut.begun if cut.b.HasField("server") else 0)
    check_well_formed(request)
    assert request["messages"][-1] == {"role": "user", "content": "Go on"}
    results = results_of(request)
    assert results[0] == "acted at attempt 1"
    assert len(results) == 2


async def test_a_server_that_stops_in_good_order_lets_its_tools_finish(tmp_path: Path) -> None:
    """SIGTERM while a tool runs: its result is recorded before the process ends, and no person has to be asked about
    it."""
    async with model_that_calls("b") as model, Gate() as gate:
        env = {"OPENAI_API_KEY": "test-key", "OPENAI_BASE_URL": model.url, GATE: str(gate.port)}
        async with await Crashing.launch(tmp_path, env=env) as server:
            await prepare(server.address, [held()])
            async with grpc.aio.insecure_channel(server.address) as channel:
                frames = v1.RunServiceStub(channel).Run()
                start = v1.StartRun(session=SESSION, run_id="r1", messages=[said("Go")])
                await frames.write(v1.RunRequest(start=start))
                await gate.arrival()
                stopping = asyncio.create_task(server.stop())
                while not v1.RunResponse.HasField(await frames.read(), "go_away"):  # type: ignore[arg-type]
                    pass
                gate.open()
                assert await stopping == 0
    log = (await stored(tmp_path)).log
    assert [call.outcome for _, made in calls_of(log).values() for call in made.ends] == [SUCCEEDED]


async def test_a_waiting_run_without_a_stream_is_cancelled_after_a_restart_too(tmp_path: Path) -> None:
    """A stream follows it for as long as the first server lives, and none the second's."""
    async with model_that_calls("b") as model:
        async with restarted(tmp_path, model) as address, grpc.aio.insecure_channel(address) as channel:
            await prepare(address, [client_tool("b")])
            start = v1.StartRun(session=SESSION, run_id="r1", messages=[said("Go")])
            start.disconnect.cancel_after.CopyFrom(Duration(nanos=500_000_000))
            frames = v1.RunServiceStub(channel).Run()
            await frames.write(v1.RunRequest(start=start))
            await frames.read()
            run = await Caller(channel).rest()
        assert (await stored(tmp_path)).runs["r1"].state == v1.Run.STATE_WAITING
        async with restarted(tmp_path, model) as address, grpc.aio.insecure_channel(address) as channel:
            caller = Caller(channel)
            caller.seen = run.last_sequence
            assert (await caller.rest()).state == v1.Run.STATE_CANCELLED

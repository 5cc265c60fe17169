"""Halts of a run at bad moments: finished results are kept, every caller gets an answer, and a refusal changes
nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.engine.calls import Calls
from notecase_server.engine.worker import Worker
from notecase_server.models.contract import Provider
from notecase_server.models.openai import OpenAIProvider
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import Commit, Committed, Store
from notecase_server.store.fold import ENDED
from notecase_server.tools.clock import Clock
from notecase_server.tools.contract import Outcome
from notecase_server.tools.functions import CallContext, tool
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import log_of, reason_of, said
from tests.support.openai_server import Answer, OpenAIServer, chunk, reply, stream, tool_calls
from tests.support.server import Running, running

INTERRUPT, ROLLBACK = v1.StartRun.ON_BUSY_INTERRUPT, v1.StartRun.ON_BUSY_ROLLBACK
SUCCEEDED = v1.ToolCall.OUTCOME_SUCCEEDED


class Observed:
    """A store whose commits a test sees before they are made; what `before` raises is what the store answers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.before: Callable[[Commit], Awaitable[None]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, commit: Commit) -> Committed:
        if self.before is not None:
            await self.before(commit)
        return await self._store.commit(commit)


def ends(commit: Commit) -> bool:
    """Whether a run that was under way ends by it."""
    cancelled_unstarted = commit.start is not None and not commit.start.digest
    return not cancelled_unstarted and any(event.run_state_changed.state in ENDED for event in commit.events)


gate = asyncio.Event()


@pytest.fixture(autouse=True)
def _gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "gate", asyncio.Event())


@tool
async def first(context: CallContext) -> str:
    context.put("first", True)
    return "first done"


@tool
async def second(context: CallContext) -> str:
    """Waits for the gate."""
    await gate.wait()
    context.put("second", context.attempt)
    return "second done"


def providers_of(model: OpenAIServer) -> dict[str, Provider]:
    return {"openai": OpenAIProvider("test-key", model.url, "stub-1")}


@pytest.fixture
async def store(store_url: str) -> Observed:
    return Observed(await open_store(store_url, now))


@pytest.fixture
async def served(store: Observed, model: OpenAIServer) -> AsyncIterator[Running]:
    """A server on the observed store, with an agent of the tools above."""
    async with running(store, providers_of(model), toolbox=make_toolbox((__name__,), {})) as server:
        names = ("first", "second")
        tools = [v1.Tool(name=name, server=v1.ServerTool(function=name)) for name in names]
        agent = v1.Agent(llm=v1.LlmAgent(tools=tools, max_model_calls=2))
        await server.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        yield server


@pytest.fixture
async def session(served: Running) -> str:
    request = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
    return (await served.sessions.CreateSession(request)).name


async def started(served: Running, session: str, **fields: Any) -> v1.Run:
    start = v1.StartRun(session=session, run_id="one", messages=[said("Go")], **fields)
    return await served.runs.CreateRun(v1.CreateRunRequest(start=start))


async def until(served: Running, run: v1.Run, seen: Callable[[v1.Event], bool]) -> None:
    """Watches the run until such an event."""
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=run.name))
    async for frame in watch:
        if any(seen(event) for event in frame.batch.events):
            break
    watch.cancel()


async def test_a_result_that_is_there_when_a_halt_comes_is_kept_with_what_it_changed(
    served: Running, session: str, store: Observed, model: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is away as the first result is to be committed; then the second one is there, then the cancel, and only
    then is the store back."""
    model.script(tool_calls(("first", "{}"), ("second", "{}")))
    away, there, halted = asyncio.Event(), asyncio.Event(), asyncio.Event()
    execute, halt = Calls._execute, Worker.halt

    async def executed(calls: Calls, call: v1.ToolCall, clock: Clock) -> tuple[Outcome, Sequence[v1.StateOp]]:
        result = await execute(calls, call, clock)
        if call.tool == "second":
            there.set()
        return result

    def halt_and_tell(worker: Worker, asked: Any) -> None:
        halt(worker, asked)
        halted.set()

    async def refuse(commit: Commit) -> None:
        if any(event.HasField("tool_finished") for event in commit.events) and not halted.is_set():
            away.set()
            raise errors.store_unavailable()

    monkeypatch.setattr(Calls, "_execute", executed)
    monkeypatch.setattr(Worker, "halt", halt_and_tell)
    store.before = refuse
    run = await started(served, session)
    await away.wait()
    gate.set()
    await there.wait()
    ended = await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    assert ended.state == v1.Run.STATE_CANCELLED
    finished = [event.tool_finished for event in await log_of(served, session) if event.HasField("tool_finished")]
    assert [(call.tool, call.outcome) for call in finished] == [("first", SUCCEEDED), ("second", SUCCEEDED)]
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session}/state"))
    assert set(state.entries) == {"first", "second"}


async def test_a_call_cancelled_while_another_ones_result_waits_for_the_store_has_no_side_effect(
    served: Running, session: str, store: Observed, model: OpenAIServer
) -> None:
    """Its own result is there as well, and comes too late."""
    model.script(tool_calls(("second", "{}"), ("second", "{}")), reply("One of them."))
    away, cancelled = asyncio.Event(), asyncio.Event()

    async def refuse(commit: Commit) -> None:
        ended = [event.tool_finished.outcome for event in commit.events if event.HasField("tool_finished")]
        if ended == [SUCCEEDED] and not cancelled.is_set():
            away.set()
            raise errors.store_unavailable()

    store.before = refuse
    run = await started(served, session)
    begun: list[str] = []

    def both(event: v1.Event) -> bool:
        begun.extend(event.tool_started.call_id for _ in range(event.HasField("tool_started")))
        return len(begun) == 2

    await until(served, run, both)
    gate.set()
    await away.wait()
    cancel = v1.RunRequest(cancel=v1.CancelCommand(call_id=begun[1], reason="not that one"))
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=cancel))
    cancelled.set()
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    assert (ended.state, ended.error.message) == (v1.Run.STATE_SUCCEEDED, "")
    log = await log_of(served, session)
    outcomes = {event.tool_finished.call_id: event.tool_finished.outcome for event in log}
    assert [outcomes[call_id] for call_id in begun] == [SUCCEEDED, v1.ToolCall.OUTCOME_CANCELLED]


@pytest.mark.parametrize(("broken_for", "reason", "end"), [(1, "RUN_ENDED", True), (2, "OWNER_LOST", False)])
async def test_the_caller_of_a_halt_is_answered_although_the_worker_fails(
    store: Observed, model: OpenAIServer, broken_for: int, reason: str, end: bool
) -> None:
    """By a defect, in the commit that seals. The run fails on record where that can be written; where it cannot,
    another worker goes on with it. Neither the caller nor the stop of the server waits forever."""
    model.script(stream(chunk({"content": "Half"})).held(asyncio.Event(), after=2), reply("Whole."))
    left = broken_for

    async def break_down(commit: Commit) -> None:
        nonlocal left
        if ends(commit) and left:
            left -= 1
            raise RuntimeError("a defect")

    store.before = break_down
    async with asyncio.timeout(60):
        async with running(store, providers_of(model)) as served:
            await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent())))
            created = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
            await served.sessions.CreateSession(created)
            run = await started(served, "sessions/case")
            await until(served, run, lambda event: event.HasField("block_delta"))
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await served.runs.CancelRun(v1.CancelRunRequest(name=run.name), timeout=60)
            assert reason_of(told.value) == reason
            found = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
            assert found.state == (v1.Run.STATE_FAILED if end else v1.Run.STATE_SUCCEEDED)
            assert (found.error.reason == v1.ERROR_REASON_INTERNAL) == end
            assert found.attempt == (1 if end else 2)


@pytest.mark.parametrize("on_busy", [INTERRUPT, ROLLBACK])
@pytest.mark.parametrize("at_work", ["model", "tool", "caller"])
async def test_a_start_cancelled_just_as_it_stops_another_run_leaves_that_one_as_it_was(
    served: Running,
    session: str,
    store: Observed,
    model: OpenAIServer,
    on_busy: v1.StartRun.OnBusy.ValueType,
    at_work: str,
) -> None:
    """The cancel of a run that has not started is recorded between the last check for it and the commit that would
    start it. The start is refused; the model is called once more, within the agent's limit of calls, the tool
    continues, and the caller's call keeps waiting."""
    scripts: dict[str, list[Answer]] = {
        "model": [
            stream(chunk({"content": "Half"})).held(asyncio.Event(), after=2),
            tool_calls(("first", "{}")),
            reply("Whole."),
        ],
        "tool": [tool_calls(("second", "{}")), reply("Whole.")],
        "caller": [tool_calls(("weigh", "{}")), reply("Whole.")],
    }
    model.script(*scripts[at_work])
    run = await started(served, session, client_tools=[v1.Tool(name="weigh", client=v1.ClientTool())])
    kind = {"model": "block_delta", "tool": "tool_started", "caller": "run_state_changed"}[at_work]
    await until(served, run, lambda event: event.HasField(kind))  # type: ignore[arg-type]
    arrived, let_in, recorded = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def put_between(commit: Commit) -> None:
        if commit.start is not None and not commit.start.digest:
            arrived.set()
            await let_in.wait()
        elif ends(commit) and commit.start is not None:
            let_in.set()
            await recorded.wait()

    store.before = put_between
    cancel = v1.CancelRunRequest(name=f"{session}/runs/two", allow_missing=True)

    async def cancel_two() -> v1.Run:
        cancelled: v1.Run = await served.runs.CancelRun(cancel)
        recorded.set()
        return cancelled

    cancelling = asyncio.create_task(cancel_two())
    await arrived.wait()
    other = v1.StartRun(session=session, run_id="two", messages=[said("Better")], on_busy=on_busy)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.CreateRun(v1.CreateRunRequest(start=other))
    assert reason_of(refused.value) == "RUN_CANCELLED_BEFORE_START"
    assert (await cancelling).state == v1.Run.STATE_CANCELLED
    found = await served.runs.GetRun(v1.GetRunRequest(name=run.name))
    for call in found.pending_calls:
        result = v1.ToolResult(call_id=call.call_id, result=[v1.Part(text="1 kg")])
        command = v1.SendCommandRequest(session=session, command=v1.RunRequest(tool_result=result))
        await served.runs.SendCommand(command)
    gate.set()
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=found.last_sequence))
    assert (ended.state, ended.reply.parts[0].text) == (v1.Run.STATE_SUCCEEDED, "Whole.")
    log = await log_of(served, session)
    calls = [event.tool_finished for event in log if event.HasField("tool_finished")]
    assert [(call.outcome, call.attempt) for call in calls] == [(SUCCEEDED, 1)]
    assert not [event for event in log if event.HasField("rewound")]


async def test_what_a_call_took_is_counted_that_a_refused_halt_cut(
    served: Running, session: str, store: Observed, model: OpenAIServer
) -> None:
    """The model is asked again: both calls count, each once, in the run and in the session."""
    told = chunk({"content": "Half"}, usage={"prompt_tokens": 50, "completion_tokens": 4})
    model.script(Answer((told, asyncio.Event())), reply("Whole."))
    run = await started(served, session)
    await until(served, run, lambda event: event.HasField("block_delta"))

    async def refuse(commit: Commit) -> None:
        if ends(commit):
            store.before = None
            raise errors.reused("request_id", "r")

    store.before = refuse
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    assert reason_of(refused.value) == "REQUEST_ID_REUSED"
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=10**6))
    assert (ended.state, ended.reply.parts[0].text) == (v1.Run.STATE_SUCCEEDED, "Whole.")
    both = v1.Usage(input_tokens=50 + 11, output_tokens=4 + 7, model_calls=2, model="stub-1", provider="openai")
    assert [both, both] == [ended.usage, (await served.sessions.GetSession(v1.GetSessionRequest(name=session))).usage]
    log = await log_of(served, session)
    assert [50, 11] == [event.usage.input_tokens for event in log if event.HasField("usage")]

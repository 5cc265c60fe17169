"""A store that fails at the worst moment: what was promised holds afterwards."""

import asyncio
from typing import Any

import pytest
from notecase import v1
from notecase_server import supervisor
from notecase_server.engine.session import ASKS
from notecase_server.models.openai import OpenAIProvider
from notecase_server.serve import new_uid, now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import Commit, RunRecord, SessionKey, Store

from tests.e2e.conftest import EVERY_STORE
from tests.e2e.driving import said
from tests.support.failing import Failing, Mode
from tests.support.openai_server import Answer, OpenAIServer, reply, tool_calls
from tests.support.server import Running, running

pytestmark = EVERY_STORE


@pytest.fixture
async def store(store_url: str) -> Store:
    """An open store, which the server that it is handed to closes."""
    return await open_store(store_url, now)


async def set_up(served: Running) -> None:
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent())))
    await served.sessions.CreateSession(
        v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/a"))
    )


def replies(commit: Any) -> bool:
    """Counts the commits that bring a reply."""
    return any(event.message_added.role == v1.Message.ROLE_ASSISTANT for event in commit.events)


@pytest.mark.parametrize(
    ("answer", "state"),
    [(reply("Once."), v1.Run.STATE_SUCCEEDED), (tool_calls(("weigh", "{}")), v1.Run.STATE_WAITING)],
    ids=["the end", "a call"],
)
async def test_a_reply_whose_commit_has_an_unknown_outcome_is_in_the_log_once(
    store: Store,
    model: OpenAIServer,
    answer: Answer,
    state: v1.Run.State.ValueType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer of the commit is lost, and so is that of the question what became of it, for a while."""
    monkeypatch.setattr(supervisor, "BACKOFF", (0.0, 0.0))
    model.script(answer)
    silent = Failing(store, "find_commit", Mode.PASSING, times=ASKS + 2)
    failing = Failing(silent.store, "commit", Mode.AFTER, counts=replies)
    async with running(failing.store, {"openai": OpenAIProvider("key", model.url, "stub-1")}) as served:
        await set_up(served)
        start = v1.StartRun(session="sessions/case", run_id="r1", messages=[said("Go")])
        start.client_tools.add(name="weigh").client.SetInParent()
        run = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
        assert failing.failed.is_set()
        assert silent.failed.is_set()
        assert (state, False) == (run.state, run.HasField("error"))
        session = await served.sessions.GetSession(v1.GetSessionRequest(name="sessions/case"))
        log = await store.read_events(SessionKey("default", "case", session.uid), 0)
        assert 1 == sum(event.message_added.role == v1.Message.ROLE_ASSISTANT for event in log)
        assert 1 == sum(event.run_state_changed.state == state for event in log)
        assert (state == v1.Run.STATE_WAITING) == (1 == sum(event.HasField("tool_started") for event in log))
    assert 1 == len(model.requests)


async def test_a_queued_start_that_is_permanently_refused_fails_and_the_next_one_follows(
    store: Store, model: OpenAIServer
) -> None:
    def begins_r2(commit: Any) -> bool:
        return any(event.run == "r2" and event.HasField("run_started") for event in commit.events)

    go_on = asyncio.Event()
    model.script(reply("First.").held(go_on), reply("Third."))
    failing = Failing(store, "commit", Mode.FOR_GOOD, counts=begins_r2)
    async with running(failing.store, {"openai": OpenAIProvider("key", model.url, "stub-1")}) as served:
        await set_up(served)
        for number in (1, 2, 3):
            start = v1.StartRun(session="sessions/case", run_id=f"r{number}", messages=[said("Go")])
            start.on_busy = v1.StartRun.ON_BUSY_QUEUE
            start.state["n"].int_value = number
            await served.runs.CreateRun(v1.CreateRunRequest(start=start))
        go_on.set()
        runs = [await served.runs.WaitRun(v1.WaitRunRequest(name=f"sessions/case/runs/r{n}")) for n in (1, 2, 3)]
        assert [v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED, v1.Run.STATE_SUCCEEDED] == [run.state for run in runs]
        assert v1.ERROR_REASON_PAYLOAD_TOO_LARGE == runs[1].error.reason
        state = await served.state.GetState(v1.GetStateRequest(name="sessions/case/state"))
        assert 3 == state.entries["n"].value.int_value


@pytest.mark.parametrize(("deaths", "state"), [(1, v1.Run.STATE_SUCCEEDED), (2, v1.Run.STATE_FAILED)])
async def test_a_run_that_its_process_dies_of_fails(
    store: Store, model: OpenAIServer, deaths: int, state: v1.Run.State.ValueType
) -> None:
    """The process died so often before, and once more: it was not left in good order."""
    go_on = asyncio.Event()
    model.script(reply("At last.").held(go_on))
    agent = await store.create_agent("default", "a", v1.Agent(llm=v1.LlmAgent()))
    key = SessionKey("default", "case", new_uid())
    begun = v1.Event(run="r1", run_started=v1.RunStarted(agent="agents/a"))
    asked = v1.Event(
        run="r1", message_added=v1.Message(name="m1", role=v1.Message.ROLE_USER, parts=[v1.Part(text="?")])
    )
    create = v1.Session(agent="agents/a")
    record = RunRecord(b"digest", agent)
    await store.commit(Commit(key=key, create=create, claim=True, events=[begun, asked], start=record, deaths=deaths))
    async with running(store, {"openai": OpenAIProvider("key", model.url, "stub-1")}) as served:
        if state == v1.Run.STATE_SUCCEEDED:
            await model.request(0)
            active = await store.active_run(key, "r1")
            assert active is not None
            assert deaths + 1 == active.deaths
        go_on.set()
        ended = await served.runs.WaitRun(v1.WaitRunRequest(name="sessions/case/runs/r1"))
        assert state == ended.state
        assert (state == v1.Run.STATE_SUCCEEDED) == bool(model.requests)

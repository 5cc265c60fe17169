"""A repeat returns the first answer, a changed body is refused, and no tenant sees another."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
import pytest
from notecase import v1
from notecase_server.models.openai import OpenAIProvider
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import SessionKey, Store

from tests.e2e.driving import kinds, log_of, reason_of, said
from tests.support.openai_server import OpenAIServer, reply
from tests.support.server import TENANT, Running, running

Write = Callable[[Running, str], Awaitable[Any]]

WRITES: dict[str, tuple[Write, Write]] = {
    "CreateAgent": (
        lambda s, r: s.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent()), request_id=r)),
        lambda s, r: s.agents.CreateAgent(
            v1.CreateAgentRequest(agent_id="x", agent=v1.Agent(llm=v1.LlmAgent()), request_id=r)
        ),
    ),
    "CreateSession": (
        lambda s, r: s.sessions.CreateSession(v1.CreateSessionRequest(request_id=r)),
        lambda s, r: s.sessions.CreateSession(v1.CreateSessionRequest(session_id="y", request_id=r)),
    ),
    "UpdateSession": (
        lambda s, r: s.sessions.UpdateSession(
            v1.UpdateSessionRequest(session=v1.Session(name="sessions/case", display_name="A"), request_id=r)
        ),
        lambda s, r: s.sessions.UpdateSession(
            v1.UpdateSessionRequest(session=v1.Session(name="sessions/case", display_name="B"), request_id=r)
        ),
    ),
    "UpdateState": (
        lambda s, r: s.state.UpdateState(
            v1.UpdateStateRequest(name="sessions/case/state", ops=[v1.StateOp(key="n", increment=1)], request_id=r)
        ),
        lambda s, r: s.state.UpdateState(
            v1.UpdateStateRequest(name="sessions/case/state", ops=[v1.StateOp(key="n", increment=2)], request_id=r)
        ),
    ),
    "UpdateState of a user": (
        lambda s, r: s.state.UpdateState(
            v1.UpdateStateRequest(name="users/ada/state", ops=[v1.StateOp(key="n", increment=1)], request_id=r)
        ),
        lambda s, r: s.state.UpdateState(
            v1.UpdateStateRequest(name="users/ada/state", ops=[v1.StateOp(key="n", increment=2)], request_id=r)
        ),
    ),
    "PutState": (
        lambda s, r: s.state.PutState(
            v1.PutStateRequest(name="app/state", key="k", value=v1.Value(int_value=1), request_id=r)
        ),
        lambda s, r: s.state.PutState(
            v1.PutStateRequest(name="app/state", key="k", value=v1.Value(int_value=2), request_id=r)
        ),
    ),
    "AppendMessages": (
        lambda s, r: s.messages.AppendMessages(
            v1.AppendMessagesRequest(parent="sessions/case", messages=[said("once")], request_id=r)
        ),
        lambda s, r: s.messages.AppendMessages(
            v1.AppendMessagesRequest(parent="sessions/case", messages=[said("twice")], request_id=r)
        ),
    ),
    "CreateRun": (
        lambda s, r: s.runs.CreateRun(
            v1.CreateRunRequest(start=v1.StartRun(session="sessions/case", messages=[said("a")]), request_id=r)
        ),
        lambda s, r: s.runs.CreateRun(
            v1.CreateRunRequest(start=v1.StartRun(session="sessions/case", messages=[said("b")]), request_id=r)
        ),
    ),
    "CompactSession": (
        lambda s, r: s.sessions.CompactSession(v1.CompactSessionRequest(name="sessions/case", request_id=r)),
        lambda s, r: s.sessions.CompactSession(
            v1.CompactSessionRequest(name="sessions/case", keep_recent=3, request_id=r)
        ),
    ),
    "DeleteSession": (
        lambda s, r: s.sessions.DeleteSession(v1.DeleteSessionRequest(name="sessions/case", request_id=r)),
        lambda s, r: s.sessions.DeleteSession(v1.DeleteSessionRequest(name="sessions/other", request_id=r)),
    ),
    "DeleteAgent": (
        lambda s, r: s.agents.DeleteAgent(v1.DeleteAgentRequest(name="agents/clerk", request_id=r)),
        lambda s, r: s.agents.DeleteAgent(v1.DeleteAgentRequest(name="agents/other", request_id=r)),
    ),
}


@pytest.mark.parametrize("method", WRITES)
async def test_a_repeat_returns_the_first_answer_and_another_body_is_refused(
    served: Running, session: str, model: OpenAIServer, method: str
) -> None:
    model.script(reply("ok"))
    write, other = WRITES[method]
    first = await write(served, "req-1")
    if method == "CreateRun":
        await served.runs.WaitRun(v1.WaitRunRequest(name=first.name))
    head = len(await log_of(served, session)) if method != "DeleteSession" else 0
    assert await write(served, "req-1") == first
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await other(served, "req-1")
    assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert reason_of(refused.value) == "REQUEST_ID_REUSED"
    if head:
        assert len(await log_of(served, session)) == head


async def test_a_repeated_invoke_waits_for_the_same_run(served: Running, session: str, model: OpenAIServer) -> None:
    go_on = asyncio.Event()
    model.script(reply("Once.").held(go_on))
    request = v1.InvokeRequest(start=v1.StartRun(session=session, messages=[said("Go")]), request_id="req-1")
    calls = [asyncio.ensure_future(served.runs.Invoke(request))]
    await model.request(0)
    calls.append(asyncio.ensure_future(served.runs.Invoke(request)))
    go_on.set()
    answers = await asyncio.gather(*calls)
    assert answers[0] == answers[1]
    assert kinds(await log_of(served, session)).count("run_started") == 1


async def test_the_same_run_id_attaches_and_another_body_is_refused(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("Once."))
    start = v1.StartRun(session=session, run_id="mine", messages=[said("Go")])
    runs = [[f async for f in served.runs.Run(iter([v1.RunRequest(start=start)]))] for _ in range(2)]
    assert [frames[0].attached.existing for frames in runs] == [False, True]
    logs = [[e for f in frames for e in f.batch.events if e.sequence] for frames in runs]
    assert logs[0] == logs[1]
    start.messages[0].parts[0].text = "Stop"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    assert reason_of(refused.value) == "REQUEST_ID_REUSED"


class Met:
    """A store that lets the first two reads of a run continue together, after both have found none."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._both = asyncio.Barrier(2)
        self._asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get_run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        found = await self._store.get_run(key, run)
        self._asked += 1
        if self._asked <= 2:
            assert found is None
            await self._both.wait()
        return found


@pytest.mark.parametrize("on_busy", [v1.StartRun.ON_BUSY_INTERRUPT, v1.StartRun.ON_BUSY_ROLLBACK])
async def test_a_repeat_does_not_stop_the_very_run_that_it_asks_for(
    store_url: str, model: OpenAIServer, on_busy: v1.StartRun.OnBusy.ValueType
) -> None:
    """Two that come at once, under one run_id: one starts the run, and the other finds it at work."""
    go_on = asyncio.Event()
    model.script(reply("Once.").held(go_on), reply("Twice."))
    store = cast(Store, Met(await open_store(store_url, now)))
    async with running(store, {"openai": OpenAIProvider("key", model.url, "stub-1")}) as served:
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent())))
        session = v1.Session(agent="agents/a")
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
        start = v1.StartRun(session="sessions/case", run_id="r1", messages=[said("Go")], on_busy=on_busy)
        request = v1.CreateRunRequest(start=start)
        both = await asyncio.gather(served.runs.CreateRun(request), served.runs.CreateRun(request))
        assert ["sessions/case/runs/r1"] * 2 == [run.name for run in both]
        go_on.set()
        ended = await served.runs.WaitRun(v1.WaitRunRequest(name=both[0].name))
        assert (v1.Run.STATE_SUCCEEDED, 1) == (ended.state, len(model.requests))
        assert not any(event.HasField("rewound") for event in await log_of(served, "sessions/case"))


async def test_the_same_command_twice_takes_effect_once(served: Running, session: str) -> None:
    """The second answer is DUPLICATE at the first one's sequence; another body under the id is refused."""
    update = v1.StateUpdate(ops=[v1.StateOp(key="n", increment=1)])
    command = v1.RunRequest(command_id="c1", update_state=update)
    request = v1.SendCommandRequest(session=session, command=command)
    results = [(await served.runs.SendCommand(request)).result for _ in range(2)]
    assert [(r.disposition, r.sequence) for r in results] == [
        (v1.CommandResult.DISPOSITION_APPLIED, 1),
        (v1.CommandResult.DISPOSITION_DUPLICATE, 1),
    ]
    request.command.update_state.ops[0].increment = 2
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.SendCommand(request)
    assert reason_of(refused.value) == "REQUEST_ID_REUSED"
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session}/state"))
    assert state.entries["n"].value.int_value == 1


async def test_two_conditional_writers_have_one_winner_and_the_loser_learns_the_version(
    served: Running, session: str
) -> None:
    async def write() -> v1.StateEntry | grpc.aio.AioRpcError:
        put = v1.PutStateRequest(name=f"{session}/state", key="k", value=v1.Value(int_value=1), if_version=0)
        try:
            return await served.state.PutState(put)
        except grpc.aio.AioRpcError as error:
            return error

    outcomes = await asyncio.gather(*[write() for _ in range(20)])
    lost = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(lost) == 19
    assert {(error.code(), reason_of(error)) for error in lost} == {(grpc.StatusCode.ABORTED, "STATE_VERSION_MISMATCH")}


async def test_a_stale_head_is_refused_with_the_current_one(served: Running, session: str) -> None:
    request = v1.AppendMessagesRequest(parent=session, messages=[said("a")], if_last_sequence=0)
    await served.messages.AppendMessages(request)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.messages.AppendMessages(request)
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.ABORTED, "SEQUENCE_MISMATCH")


async def test_a_stale_etag_is_refused(served: Running, session: str, agent: str) -> None:
    first = await served.sessions.GetSession(v1.GetSessionRequest(name=session))
    changed = v1.Session(name=session, display_name="B", etag=first.etag)
    await served.sessions.UpdateSession(v1.UpdateSessionRequest(session=changed))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.sessions.UpdateSession(v1.UpdateSessionRequest(session=changed))
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")


async def test_an_update_makes_a_revision_and_the_old_one_stays_readable(served: Running, agent: str) -> None:
    changed = v1.Agent(name=agent, display_name="Chief clerk")
    second = await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=changed))
    assert (second.revision, second.llm.instruction) == (2, "Answer briefly.")
    first = await served.agents.GetAgent(v1.GetAgentRequest(name=f"{agent}@1"))
    assert (first.revision, first.display_name) == (1, "")
    listed = await served.agents.ListAgentRevisions(v1.ListAgentRevisionsRequest(name=agent))
    assert [revision.revision for revision in listed.agents] == [2, 1]


async def test_runs_under_way_keep_their_revision_and_outlive_their_agent(
    served: Running, session: str, agent: str, model: OpenAIServer
) -> None:
    go_on = asyncio.Event()
    model.script(reply("As I was.").held(go_on))
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=session, messages=[said("Go")])))
    await model.request(0)
    await served.agents.DeleteAgent(v1.DeleteAgentRequest(name=agent))
    go_on.set()
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    assert (ended.state, ended.agent_revision) == (v1.Run.STATE_SUCCEEDED, 1)


async def test_another_tenants_resource_is_not_found(
    served: Running, session: str, agent: str, model: OpenAIServer
) -> None:
    """The same ids are free for the other tenant, and every read of the first one's is NOT_FOUND or empty."""
    model.script(reply("Mine."))
    start = v1.StartRun(session=session, run_id="r1", messages=[said("Go")])
    mine = await served.runs.Invoke(v1.InvokeRequest(start=start))
    value = v1.Value(string_value="secret")
    await served.state.PutState(v1.PutStateRequest(name="users/ada/state", key="k", value=value))
    other = ((TENANT, "other"),)
    frames = iter([v1.UploadBlobRequest(blob=v1.Blob(media_type="text/plain"), chunk=b"secret", last=True)])
    blob = (await served.blobs.UploadBlob(frames)).name
    attempts: list[Awaitable[Any]] = [
        served.blobs.GetBlob(v1.GetBlobRequest(name=blob), metadata=other),
        served.blobs.DownloadBlob(v1.DownloadBlobRequest(name=blob), metadata=other).read(),
        served.sessions.GetSession(v1.GetSessionRequest(name=session), metadata=other),
        served.agents.GetAgent(v1.GetAgentRequest(name=agent), metadata=other),
        served.runs.GetRun(v1.GetRunRequest(name=mine.run.name), metadata=other),
        served.runs.CancelRun(v1.CancelRunRequest(name=mine.run.name), metadata=other),
        served.runs.WaitRun(v1.WaitRunRequest(name=mine.run.name), metadata=other),
        served.messages.GetMessage(v1.GetMessageRequest(name=mine.reply.name), metadata=other),
        served.messages.ListMessages(v1.ListMessagesRequest(parent=session), metadata=other),
        served.state.GetState(v1.GetStateRequest(name=f"{session}/state"), metadata=other),
        served.runs.WatchEvents(v1.WatchEventsRequest(name=session), metadata=other).read(),
        served.sessions.DeleteSession(v1.DeleteSessionRequest(name=session), metadata=other),
    ]
    for attempt in attempts:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    theirs = await served.state.GetState(v1.GetStateRequest(name="users/ada/state"), metadata=other)
    assert dict(theirs.entries) == {}
    for listed in (
        await served.sessions.ListSessions(v1.ListSessionsRequest(), metadata=other),
        await served.runs.ListRuns(v1.ListRunsRequest(parent="sessions/-"), metadata=other),
        await served.agents.ListAgents(v1.ListAgentsRequest(), metadata=other),
    ):
        assert listed.ByteSize() == 0
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"), metadata=other)
    assert len(await log_of(served, session)) == 5


async def test_pages_walk_the_whole_list_and_a_token_is_bound_to_its_list(served: Running) -> None:
    for number in range(7):
        session = v1.Session(labels={"odd": str(number % 2)})
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id=f"s{number}", session=session))
    names: list[str] = []
    request = v1.ListSessionsRequest(page_size=2, filter='labels.odd = "1"')
    while True:
        page = await served.sessions.ListSessions(request)
        names += [session.name for session in page.sessions]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert names == ["sessions/s5", "sessions/s3", "sessions/s1"]
    for other in (
        v1.ListSessionsRequest(page_token=request.page_token),
        v1.ListSessionsRequest(page_token=request.page_token[:-2] + "zz", filter=request.filter),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.sessions.ListSessions(other)
        assert reason_of(refused.value) == "PAGE_TOKEN_INVALID"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.sessions.ListSessions(request, metadata=((TENANT, "other"),))
    assert reason_of(refused.value) == "PAGE_TOKEN_INVALID"


async def test_a_repeated_update_is_answered_as_the_first_one_though_its_agent_is_gone(
    served: Running, session: str, agent: str
) -> None:
    request = v1.UpdateSessionRequest(session=v1.Session(name=session, agent=agent), request_id="req-1")
    request.update_mask.paths.append("agent")
    first = await served.sessions.UpdateSession(request)
    await served.agents.DeleteAgent(v1.DeleteAgentRequest(name=agent))
    assert await served.sessions.UpdateSession(request) == first

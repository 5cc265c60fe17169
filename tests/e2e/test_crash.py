"""kill -9 at any moment: nothing announced is lost, and the run goes on from its last commit."""

import asyncio
import random
from pathlib import Path

import grpc
import pytest
from notecase import Client, NotecaseError, SessionView, v1

from tests.e2e.driving import durable, kinds, said
from tests.support.openai_server import Answer, OpenAIServer, chunk, reply, stream
from tests.support.ports import free_port
from tests.support.server import Spawned


async def start(tmp_path: Path, model: OpenAIServer, port: int = 0, *, forked: bool = False) -> Spawned:
    env = {"OPENAI_API_KEY": "test-key", "OPENAI_BASE_URL": model.url}
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    return await Spawned.start(store, tmp_path / "log", port=port, env=env, forked=forked)


async def log_of(address: str, session: str) -> list[v1.Event]:
    async with grpc.aio.insecure_channel(address) as channel:
        runs = v1.RunServiceStub(channel)
        watch = runs.WatchEvents(v1.WatchEventsRequest(name=session, after_sequence=0))
        return durable([frame async for frame in watch])


async def test_a_run_killed_in_mid_stream_is_taken_over_and_its_log_only_grows(
    tmp_path: Path, model: OpenAIServer
) -> None:
    """The log before the kill is the beginning of the log after it; the model call is repeated under another message; a
    client that held on sees one dense log and the whole reply."""
    model.script(
        reply("Half of it is lost.", chunks=4).held(asyncio.Event(), after=3), reply("All of it is here.", chunks=4)
    )
    port = free_port()
    server = await start(tmp_path, model, port)
    async with Client(server.address) as client:
        await client.agents.CreateAgent(
            v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=v1.LlmAgent(instruction="Be brief.")))
        )
        session = await client.create_session("agents/clerk", session_id="case", state={"seen": "harbour"})
        async with client.run("Where?", session=session.name, run_id="r1") as run:
            events: list[v1.Event] = []
            killed = False
            before: list[v1.Event] = []
            async for event in run:
                events.append(event)
                if event.HasField("block_delta") and not killed:
                    killed = True
                    before = [event for event in events if event.sequence]
                    await server.kill()
                    server = await start(tmp_path, model, port)
        after = await log_of(server.address, session.name)
    assert await server.stop() == 0
    assert kinds(before) == ["run_started", "message_added"]
    assert after[1:3] == before, "after event 1, the first notes"
    assert kinds(after[3:]) == ["run_state_changed", "message_added", "usage", "run_state_changed"]
    assert after[3].run_state_changed.attempt == 2
    assert [event for event in events if event.sequence] == after[1:]
    lost = next(event.block_delta.message for event in events if event.HasField("block_delta"))
    whole = after[4].message_added
    assert whole.parts[0].text == "All of it is here."
    assert whole.name != lost
    assert run.result.attempt == 2
    assert model.requests[0] == model.requests[1], "the repeat asks the same"


@pytest.mark.parametrize("seed", range(6))
async def test_killed_at_random_moments_nothing_announced_is_lost(
    tmp_path: Path, seed: int, model: OpenAIServer
) -> None:
    """A client that saw an event always finds it in the log, at its sequence; every run ends exactly once; sequences
    stay dense. The kill comes after a random number of frames."""
    chance = random.Random(seed)

    def answer(body: dict[str, object]) -> Answer:
        return stream(*[chunk({"content": f"wört{n} "}) for n in range(20)])

    async with OpenAIServer(answer) as busy:
        seen: dict[int, v1.Event] = {}
        server = await start(tmp_path, busy, forked=True)
        async with grpc.aio.insecure_channel(server.address) as channel:
            agents = v1.AgentServiceStub(channel)
            await agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent(model="m"))))
            sessions = v1.SessionServiceStub(channel)
            await sessions.CreateSession(v1.CreateSessionRequest(session_id="s", session=v1.Session(agent="agents/a")))
        for _ in range(3):
            left = chance.randrange(1, 12)
            async with grpc.aio.insecure_channel(server.address) as channel:
                runs = v1.RunServiceStub(channel)
                try:
                    while left > 0:
                        request = v1.RunRequest(start=v1.StartRun(session="sessions/s", messages=[said("Go")]))
                        async for frame in runs.Run(iter([request])):
                            seen.update({event.sequence: event for event in frame.batch.events if event.sequence})
                            left -= 1
                            if left == 0:
                                await server.kill()
                except grpc.aio.AioRpcError as error:
                    refused_busy = error.code() == grpc.StatusCode.FAILED_PRECONDITION
                    assert left <= 0 or refused_busy, error  # below 0: more had arrived before the kill than was read
                    if left > 0:
                        await server.kill()
            server = await start(tmp_path, busy, forked=True)
            async with Client(server.address) as client:
                view = SessionView(0)
                async with client.attach("sessions/s", 0) as stream_:
                    async for event in stream_:
                        view.apply(event)
        log = await log_of(server.address, "sessions/s")
        assert await server.stop() == 0
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    for sequence, event in seen.items():
        assert log[sequence - 1] == event
    ends: dict[str, int] = {}
    for event in log:
        if event.run_state_changed.state == v1.Run.STATE_SUCCEEDED:
            ends[event.run] = ends.get(event.run, 0) + 1
    started = [event.run for event in log if event.HasField("run_started")]
    assert ends == dict.fromkeys(started, 1)


async def test_sigterm_lets_streams_know_and_leaves_the_run_to_the_next_start(
    tmp_path: Path, model: OpenAIServer
) -> None:
    """GoAway, then UNAVAILABLE SERVER_DRAINING; exit code 0; the next start finishes what was under way."""
    model.script(reply("Never whole.", chunks=3).held(asyncio.Event(), after=2), reply("Whole."))
    server = await Spawned.start(
        f"sqlite:{tmp_path / 'notecase.db'}",
        tmp_path / "log",
        *("--grace", "0.2"),
        env={"OPENAI_BASE_URL": model.url},
    )
    frames: list[v1.RunResponse] = []
    async with grpc.aio.insecure_channel(server.address) as channel:
        agents = v1.AgentServiceStub(channel)
        await agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent(model="m"))))
        start_run = v1.StartRun(new_session=v1.Session(name="sessions/s", agent="agents/a"), messages=[said("Go")])
        stopping: asyncio.Task[int] | None = None
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for frame in v1.RunServiceStub(channel).Run(iter([v1.RunRequest(start=start_run)])):
                frames.append(frame)
                if stopping is None and any(event.HasField("block_delta") for event in frame.batch.events):
                    stopping = asyncio.create_task(server.stop())
    assert stopping is not None
    assert await stopping == 0
    assert frames[-1].go_away.sequence == 2 or any(frame.go_away.sequence == 2 for frame in frames)
    assert NotecaseError.from_rpc_error(ended.value).reason == "SERVER_DRAINING"
    server = await start(tmp_path, model)
    async with Client(server.address) as client, client.attach("sessions/s", 0) as stream_:
        log = [event async for event in stream_ if event.sequence]
    assert await server.stop() == 0
    assert log[:2] == durable(frames)
    assert log[-1].run_state_changed.state == v1.Run.STATE_SUCCEEDED


async def test_a_second_server_on_the_file_is_refused_with_a_sentence(tmp_path: Path, model: OpenAIServer) -> None:
    server = await start(tmp_path, model)
    with pytest.raises(AssertionError, match="is in use: a SQLite store has one owner at a time"):
        await Spawned.start(f"sqlite:{tmp_path / 'notecase.db'}", tmp_path / "log2")
    assert await server.stop() == 0

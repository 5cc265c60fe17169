"""One server at a time owns a PostgreSQL store: others wait, one that is silent is replaced, and can do no harm."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from notecase import to_value, v1

from tests.cli.command import COMMAND, notecase, spawn
from tests.e2e.driving import reason_of, said
from tests.support import postgres
from tests.support.freezing import Freezing
from tests.support.openai_server import OpenAIServer, reply
from tests.support.polling import until
from tests.support.ports import free_port
from tests.support.server import Spawned

SHORT = ("--store-lease", "4")
"""For what waits until a lease is over. An owner that gets no turn for so long loses the store."""


@pytest.fixture
async def store() -> str:
    return await postgres.shared().new_database()


async def logged(log: Path, what: str) -> str:
    """Waits for a line of a server's log that has these words, and returns it."""
    await until(lambda: log.exists() and what in log.read_text())
    return next(line for line in log.read_text().splitlines() if what in line)


@asynccontextmanager
async def waiting(
    store: str, log: Path, *arguments: str, **env: str
) -> AsyncIterator[tuple[asyncio.Task[Spawned], int]]:
    """A server that waits for the store: the task returns it once it serves; its port."""
    port = free_port()
    second = asyncio.create_task(Spawned.start(store, log, *arguments, port=port, env=env, forked=True))
    try:
        await logged(log, "store_owned")
        yield second, port
    finally:
        if second.done():
            await second.result().kill()
        second.cancel()


async def health(port: int, service: str = "") -> int:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def test_a_second_server_waits_for_the_end_of_the_first(store: str, tmp_path: Path) -> None:
    """It is alive and NOT_SERVING, refuses calls for now, and names the owner. One that is not to wait ends with that.
    When the first one stops, the second serves on the port that it had."""
    first = await Spawned.start(store, tmp_path / "first", forked=True)
    owner = f"{socket.gethostname()}:{first.process.pid}"
    async with waiting(store, tmp_path / "second") as (second, port):
        assert owner in await logged(tmp_path / "second", "store_owned")
        serving = health_pb2.HealthCheckResponse
        assert (serving.NOT_SERVING, serving.SERVING) == (await health(port), await health(port, "liveness"))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await v1.SessionServiceStub(channel).ListSessions(v1.ListSessionsRequest())
        assert "STORE_UNAVAILABLE" == reason_of(refused.value)
        assert "on standby" in str(refused.value.details())
        third = await notecase("serve", "--listen", "127.0.0.1:0", "--store", store, "--no-wait")
        assert 1 == third.code
        assert third.err.splitlines()[-1].startswith(f"Error: The store is in use: {owner} (")
        assert not second.done()
        assert 0 == await first.stop()
        server = await second
        assert f"127.0.0.1:{port}" == server.address
        assert serving.SERVING == await health(port)
        assert 0 == await server.stop()


async def test_a_server_that_waits_is_stopped(store: str, tmp_path: Path) -> None:
    first = await Spawned.start(store, tmp_path / "first", forked=True)
    second = await spawn(*COMMAND, "serve", "--listen", "127.0.0.1:0", "--store", store)
    assert second.stderr is not None
    while b"server_waiting" not in await second.stderr.readline():
        pass
    second.terminate()
    assert (b"", 0) == ((await second.communicate())[0], second.returncode)
    assert 0 == await first.stop()


@pytest.mark.parametrize("at", ["transaction", "commit"])
async def test_a_frozen_owner_is_replaced_and_can_do_no_harm(
    at: str, store: str, tmp_path: Path, model: OpenAIServer
) -> None:
    """While it is frozen its rows come free, and another server goes on from the last commit. Thawed, the first one
    writes nothing, asks no model, and ends. How soon is counted where no machine can be too slow:
    tests/store/test_postgres_lease.py."""
    held = asyncio.Event()
    model.script(reply("Half of it is lost.", chunks=4).held(held, after=3), reply("All of it is here."))
    env = {"OPENAI_API_KEY": "test-key", "OPENAI_BASE_URL": model.url}
    first = await Freezing.launch(at, store, tmp_path, *SHORT, **env)
    async with first, grpc.aio.insecure_channel(first.address) as channel:
        agent = v1.Agent(llm=v1.LlmAgent(model="m"))
        await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=agent))
        case = v1.Session(agent="agents/a", user="users/ada")
        await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id="s", session=case))
        await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id="other"))
        put = v1.UpdateStateRequest(name="users/ada/state", ops=[v1.StateOp(key="k", set=to_value("before"))])
        await v1.StateServiceStub(channel).UpdateState(put)
        start = v1.CreateRunRequest(start=v1.StartRun(session="sessions/s", run_id="r", messages=[said("Go")]))
        await v1.RunServiceStub(channel).CreateRun(start)
        await model.request(0)
        async with waiting(store, tmp_path / "second", *SHORT, **env) as (second, _):
            first.file.touch()
            put.ops[0].set.CopyFrom(to_value("never"))
            append = v1.AppendMessagesRequest(parent="sessions/other", messages=[said("Never")])
            lost = asyncio.create_task(
                _refused(v1.StateServiceStub(channel).UpdateState(put))
                if at == "transaction"
                else _refused(v1.MessageServiceStub(channel).AppendMessages(append))
            )
            await first.frozen()
            await _locked(store)
            server = await second
            async with grpc.aio.insecure_channel(server.address) as other:
                run = await v1.RunServiceStub(other).WaitRun(v1.WaitRunRequest(name="sessions/s/runs/r"))
                assert (v1.Run.STATE_SUCCEEDED, 2) == (run.state, run.attempt)
                first.thaw()
                held.set()
                assert 1 == await first.end()
                assert "now owns the store." in first.log.read_text().splitlines()[-1]
                assert "STORE_UNAVAILABLE" == await lost
                state = await v1.StateServiceStub(other).GetState(v1.GetStateRequest(name="users/ada/state"))
                assert to_value("before") == state.entries["k"].value
                session = await v1.SessionServiceStub(other).GetSession(v1.GetSessionRequest(name="sessions/other"))
                assert 0 == session.last_sequence
                again = await v1.RunServiceStub(other).GetRun(v1.GetRunRequest(name="sessions/s/runs/r"))
                assert run == again
    assert 2 == len(model.requests)


async def _refused(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return reason_of(refused.value)


async def _locked(store: str) -> None:
    """Takes the lock of the rows that the frozen server may have locked."""
    connection = await asyncpg.connect(store)
    async with connection.transaction():
        await connection.execute("SELECT FROM states FOR UPDATE")
        await connection.execute("SELECT FROM sessions FOR UPDATE")
        await connection.execute("SELECT FROM owner FOR UPDATE")
    await connection.close()

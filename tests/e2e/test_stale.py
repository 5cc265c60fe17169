"""An owner that was away while another took its run over: every commit of it is refused, and it stops at once.

On one machine the locks of a SQLite file, which die with its owner, make this impossible. Here the servers run without
the lock on a byte of the database, and the file of the other lock is removed while its owner is stopped, so that a
second process can own the store. Then the epoch alone protects the run, as it does wherever owners are known by leases.
"""

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import grpc
import pytest
from notecase import v1
from notecase_server.engine.content import Contents, Limits
from notecase_server.engine.places import Places
from notecase_server.engine.runs import Runs
from notecase_server.engine.schema import Schemas
from notecase_server.engine.services import NamedProvider, Services
from notecase_server.engine.sessions import Sessions
from notecase_server.models.contract import Delta, Finish, ModelRequest, Text
from notecase_server.serve import new_id, new_uid, now
from notecase_server.store.contract import Commit, SessionKey
from notecase_server.store.fold import ENDED
from notecase_server.store.memory import MemoryStore
from notecase_server.supervisor import Supervisor
from notecase_server.tools.toolbox import make_toolbox
from structlog.testing import capture_logs

from tests.e2e.driving import durable, kinds, reason_of, said
from tests.support.openai_server import OpenAIServer, chunk, reply, stream
from tests.support.server import Spawned

SESSION, RUN = "sessions/case", "sessions/case/runs/r1"


async def spawn(tmp_path: Path, model: OpenAIServer, log: str) -> Spawned:
    (tmp_path / "sitecustomize.py").write_text("import fcntl\nvars(fcntl).pop('F_OFD_SETLK', None)\n")
    env = {"OPENAI_API_KEY": "test-key", "OPENAI_BASE_URL": model.url, "PYTHONPATH": str(tmp_path)}
    return await Spawned.start(f"sqlite:{tmp_path / 'notecase.db'}", tmp_path / log, env=env)


class Caller:
    """Stubs of one server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.agents = v1.AgentServiceStub(channel)
        self.runs = v1.RunServiceStub(channel)

    async def begin(self) -> None:
        agent = v1.Agent(llm=v1.LlmAgent(instruction="Be brief."))
        await self.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        session = v1.Session(name=SESSION, agent="agents/clerk")
        start = v1.StartRun(new_session=session, run_id="r1", messages=[said("Where?")])
        await self.runs.CreateRun(v1.CreateRunRequest(start=start))

    async def log(self) -> list[v1.Event]:
        """Of an idle session."""
        watch = self.runs.WatchEvents(v1.WatchEventsRequest(name=SESSION, after_sequence=0))
        return durable([frame async for frame in watch])


@asynccontextmanager
async def calling(server: Spawned) -> AsyncIterator[Caller]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Caller(channel)


def stop_between_writes(server: Spawned, file: Path) -> None:
    """Stops a process at a moment at which it is not within a transaction: one that is would keep the file's lock."""
    with closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN IMMEDIATE")
        server.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)
        other.execute("ROLLBACK")


def ends_of(log: list[v1.Event]) -> list[v1.Event]:
    return [event for event in log if event.run_state_changed.state in ENDED]


@pytest.mark.parametrize("over", [True, False], ids=["taken-over-and-finished", "taken-over-and-under-way"])
async def test_a_process_that_was_stopped_finds_its_run_taken_over(
    tmp_path: Path, model: OpenAIServer, over: bool
) -> None:
    """It is woken in the middle of a reply. Of what it makes of that nothing comes into the log, a command given to it
    is refused, and it can still be stopped in good order."""
    first, second = asyncio.Event(), asyncio.Event()
    model.script(
        stream(chunk({"content": "Stale "}), chunk({"content": "words."})).held(first, after=2),
        reply("The new owner's words.").held(second),
    )
    stale = await spawn(tmp_path, model, "stale")
    async with calling(stale) as to_stale:
        await to_stale.begin()
        await model.request(0)
        stop_between_writes(stale, tmp_path / "notecase.db")
        (tmp_path / "notecase.db-lock").unlink()
        owner = await spawn(tmp_path, model, "owner")
        async with calling(owner) as to_owner:
            await model.request(1)
            if over:
                second.set()
                await to_owner.runs.WaitRun(v1.WaitRunRequest(name=RUN))
            stale.process.send_signal(signal.SIGCONT)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await to_stale.runs.CancelRun(v1.CancelRunRequest(name=RUN))
            first.set()
            assert await stale.stop() == 0
            second.set()
            ended = await to_owner.runs.WaitRun(v1.WaitRunRequest(name=RUN))
            log = await to_owner.log()
        assert await owner.stop() == 0
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert reason_of(refused.value) == "OWNER_LOST"
    left = [line for line in stale.log.read_text().splitlines() if "run_abandoned" in line]
    assert len(left) == 1
    assert "OWNER_LOST" in left[0]
    assert "run_finished" not in stale.log.read_text()
    assert (ended.state, ended.attempt) == (v1.Run.STATE_SUCCEEDED, 2)
    assert kinds(log) == [
        *("run_started", "message_added", "run_state_changed"),
        *("message_added", "usage", "run_state_changed"),
    ]
    assert log[3].message_added.parts[0].text == "The new owner's words."
    assert len(ends_of(log)) == 1


class GatedProvider:
    """Says one word once its gate is open."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        self.asked.set()
        await self.gate.wait()
        yield Text(self.word)
        yield Finish("stop", v1.Usage(model_calls=1, model=self.word))

    async def close(self) -> None:
        """There is nothing to close."""


async def test_of_two_owners_in_one_process_the_later_one_wins() -> None:
    """The same on one store in memory, where only the epoch separates the two."""
    store = MemoryStore(now)
    key = SessionKey("default", "case", new_uid())
    await store.create_agent("default", "clerk", v1.Agent(llm=v1.LlmAgent()))
    await store.commit(Commit(key=key, create=v1.Session(agent="agents/clerk")))
    stale, later = GatedProvider("stale"), GatedProvider("later")
    contents = Contents(store, new_id, now, Limits())
    first, second = (
        Runs(
            Sessions(store, new_id, new_uid),
            Services(
                store=store,
                providers={"": NamedProvider("openai", provider)},
                toolbox=make_toolbox((), {}),
                contents=contents,
                schemas=Schemas(),
                supervisor=Supervisor(new_id),
                places=Places(9),
                new_id=new_id,
                clock=now,
            ),
        )
        for provider in (stale, later)
    )
    with capture_logs() as told:
        await first.admission.start("default", v1.StartRun(session=SESSION, run_id="r1", messages=[said("Where?")]))
        await stale.asked.wait()
        assert await second.upkeep.take_over() == 1
        await later.asked.wait()
        stale.gate.set()
        await first.drain(grace=60.0)
        before = await store.read_events(key, 0)
        later.gate.set()
        ended = await second.commands.wait(key, "r1", None)
        await second.drain(grace=60.0)
    assert kinds(before) == ["run_started", "message_added", "run_state_changed"]
    assert ended.state == v1.Run.STATE_SUCCEEDED
    assert ended.reply.parts[0].text == "later"
    log = await store.read_events(key, 0)
    assert log[:3] == before
    assert len(ends_of(log)) == 1
    facts = [(line["event"], line.get("reason")) for line in told if line["event"] in {"run_abandoned", "run_finished"}]
    assert facts == [("run_abandoned", "OWNER_LOST"), ("run_finished", "")]
    await store.close()

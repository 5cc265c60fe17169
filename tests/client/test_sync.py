"""The client without asyncio does what the asynchronous one does, by the same names."""

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import notecase
import notecase.sync
import pytest
from notecase import CallContext, NotecaseError, Retry, RunWaiting, Tool, v1
from notecase.sync import Client

from tests.client.proxy import Proxy
from tests.support.server import Running, running


@pytest.fixture
async def offline() -> AsyncIterator[Running]:
    async with running() as served:
        yield served


def public(kind: type) -> dict[str, Any]:
    return {name: held for name, held in inspect.getmembers(kind) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("blocking", "asynchronous"),
    [(notecase.sync.Client, notecase.Client), (notecase.sync.RunStream, notecase.RunStream)],
    ids=["Client", "RunStream"],
)
def test_all_names_and_arguments_are_the_same(blocking: type, asynchronous: type) -> None:
    ours, theirs = public(blocking), public(asynchronous)
    assert set(ours) - {"view", "warn_after"} == set(theirs) - {"unanswered"}
    for name, method in ours.items():
        if callable(method):
            assert inspect.signature(method) == inspect.signature(theirs[name]), name
    assert inspect.signature(notecase.sync.Client) == inspect.signature(notecase.Client)


async def test_a_conversation_without_a_loop(offline: Running) -> None:
    """Agents, tools, streams, state, lists and commands."""
    called_in: list[str] = []

    def search(what: str, call: CallContext) -> str:
        """Searches."""
        assert call.idempotency_key.endswith(f"/{call.call_id}")
        called_in.append(threading.current_thread().name)
        return f"{what} {client.get_state('app', 'place')['place']}"

    async def weigh() -> str:
        with pytest.raises(RuntimeError, match="an asynchronous tool cannot use this client"):
            client.get_state("app")
        return "heavy"

    def pay() -> str:
        raise AssertionError

    def converse() -> None:
        client.put_agent("finder", "You find things.", tools=[search, weigh, Tool(pay, requires_approval=True)])
        client.put_state("app", "place", "harbour")
        first = client.invoke('/call search {"what": "violin"}\n/call weigh', agent="finder")
        assert "search gave: violin harbour" in first.text
        assert "weigh gave: heavy" in first.text
        with client.run("/say Hello there.", session=first.session) as run:
            assert "Hello there." == "".join(run.text())
        assert (True, "Hello there.", None) == (run.name.startswith(first.session), run.reply.text, run.parsed)
        with client.attach(run.name, 0) as again:
            events = list(again)
        assert again.last_sequence == run.last_sequence == events[-1].sequence
        with pytest.raises(RunWaiting) as waiting:
            client.invoke("/call pay", session=first.session)
        assert [waiting.value.run] == list(client.waiting())
        client.deny(waiting.value.run, waiting.value.run.pending_inputs[0].input_id, "Too late.")
        client.runs.WaitRun(v1.WaitRunRequest(name=waiting.value.run.name))
        assert 8 == len(list(client.list_messages(first.session)))
        assert "agents/finder" == client.agents.GetAgent(v1.GetAgentRequest(name="agents/finder")).name
        assert b"content" == b"".join(client.download(client.upload(b"content", "text/plain")))

    client = await asyncio.to_thread(Client, offline.address)
    await asyncio.to_thread(converse)
    await asyncio.to_thread(client.close)
    assert 1 == len(called_in)
    assert "notecase" != called_in[0]


FORKED = """
import os, sys
from notecase.sync import Client

client = Client("127.0.0.1:1")
if not os.fork():
    try:
        client.get_state("app")
    except RuntimeError as error:
        sys.exit(str(error))
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) - 1)
"""


def test_a_forked_process_is_refused() -> None:
    """As where a server forks its workers after the program is loaded; both can end."""
    words = [sys.executable, "-W", "ignore", "-c", FORKED]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}  # `notecase` sets some
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert "a forked process cannot use the client of its parent: create another after the fork\n" == done.stderr


async def test_a_task_that_exits_does_not_end_the_loop(offline: Running, caplog: pytest.LogCaptureFixture) -> None:
    def work() -> str:
        with Client(offline.address) as client:
            client._loop._loop.call_soon_threadsafe(sys.exit)
            return client.server.GetServerInfo(v1.GetServerInfoRequest()).version

    assert await asyncio.to_thread(work)
    assert "asked the program to exit" in caplog.text


async def test_errors_are_the_same(offline: Running) -> None:
    def ask() -> None:
        with Client(offline.address) as client:
            with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND: There is no session 'sessions/nowhere'"):
                client.put_state("sessions/nowhere", "key", 1)
            with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND"):
                client.sessions.GetSession(v1.GetSessionRequest(name="sessions/nowhere"))
            with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND"):
                list(client.runs.WatchEvents(v1.WatchEventsRequest(name="sessions/nowhere")))
            with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND"), client.attach("sessions/nowhere"):
                pass
            with pytest.raises(ValueError, match="is a URL"):
                Client("http://127.0.0.1:7420")
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.get_state("app")
        client.close()

    before = {thread for thread in threading.enumerate() if thread.name == "notecase"}
    await asyncio.to_thread(ask)
    assert before >= {thread for thread in threading.enumerate() if thread.name == "notecase"}


async def test_what_is_left_early_is_closed(offline: Running) -> None:
    """An iterator that is not read to its end, and a stream whose block is left."""

    def ask() -> None:
        with Client(offline.address) as client:
            session = client.create_session(client.put_agent("counter", "You count."))
            events = client.runs.WatchEvents(
                v1.WatchEventsRequest(name=session.name, options=v1.WatchOptions(keep_open=True))
            )
            client.put_state(session, "n", 1)
            first: Iterator[v1.RunResponse] = iter(events)
            assert next(first).HasField("attached")
            events.close()  # type: ignore[attr-defined]
            with client.run("/pause 10 /chunks 1000", session=session) as run:
                next(run)
            client.cancel(run.name)
            assert v1.Run.STATE_CANCELLED == client.runs.WaitRun(v1.WaitRunRequest(name=run.name)).state

    await asyncio.to_thread(ask)


INTERRUPTED = """
import sys, threading, _thread
from notecase.sync import Client
client = Client(sys.argv[1])
client.put_agent("counter", "You count.")
try:
    with client.run("/pause 10000 /chunks 5", agent="counter") as run:
        for event in run:
            if event.HasField("message_added"):
                threading.Thread(target=_thread.interrupt_main).start()
except KeyboardInterrupt:
    print(client.get_state("app"), run.name != "")
"""


async def test_ctrl_c_interrupts_a_call_and_the_client_goes_on(offline: Running) -> None:
    """A program that does not close its client ends, too."""
    done = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", INTERRUPTED, offline.address), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await done.communicate()
    assert (0, b"{} True\n", b"") == (done.returncode, out, err)


INTERRUPTED_INVOKE = """
import signal, sys, threading
import notecase
from notecase.sync import Client

def interrupt(call: notecase.CallContext) -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    with client.attach(call.run) as run:
        run.warn_after = None
        list(run)
    print(notecase.state_of(run.result))
    told.set()

told = threading.Event()
client = Client(sys.argv[1])
client.put_agent("stopper", "You stop.", tools=[interrupt])
try:
    if sys.argv[2] == "invoke":
        client.invoke("/call interrupt", agent="stopper")
    else:
        with client.run("/call interrupt", agent="stopper") as run:
            list(run)
except KeyboardInterrupt:
    told.wait()
"""


@pytest.mark.parametrize("method", ["invoke", "run"])
async def test_ctrl_c_cancels_the_run_that_is_waited_for(offline: Running, method: str) -> None:
    program = (sys.executable, "-c", INTERRUPTED_INVOKE, offline.address, method)
    done = await asyncio.create_subprocess_exec(*program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (b"cancelled\n", b"") == await done.communicate()


UNANSWERED = """
import sys
from notecase.sync import Client

client = Client(sys.argv[1])
session = client.create_session(client.put_agent("counter", "You count."))
print(session.name, flush=True)
sys.stdin.readline()
try:
    if sys.argv[2] == "invoke":
        client.invoke("/pause 10000", session=session)
    else:
        with client.run("/pause 10000", session=session):
            print("entered")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("method", ["invoke", "run"])
async def test_ctrl_c_cancels_a_run_whose_start_is_not_answered(offline: Running, method: str) -> None:
    async with Proxy(offline.address) as proxy, notecase.Client(offline.address) as client:
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", UNANSWERED, proxy.address, method), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert program.stdin is not None
        assert program.stdout is not None
        session = (await program.stdout.readline()).decode().strip()
        proxy.passes.clear()
        program.stdin.write(b"\n")
        async with client.attach(session, 0, options=v1.WatchOptions(keep_open=True)) as log:
            async for event in log:
                if event.HasField("run_started"):
                    program.send_signal(signal.SIGINT)
                if event.run_state_changed.state == v1.Run.STATE_CANCELLED:
                    break
        proxy.passes.set()
        assert b"interrupted\n" == (await program.communicate())[0]


async def test_a_server_that_is_away_is_an_error() -> None:
    def ask() -> None:
        with Client("127.0.0.1:1", retry=Retry(tries=0)) as client:
            client.get_state("app")

    with pytest.raises(NotecaseError, match=r"127\.0\.0\.1:1 cannot be reached"):
        await asyncio.to_thread(ask)

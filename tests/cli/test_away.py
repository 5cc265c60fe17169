"""What has begun, a run or a command that follows a session, while its server is away or lets it go."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from notecase import NotecaseError, Retry, v1
from notecase.client import Client
from notecase.commands import Commands
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.cli import answering, follow, keyboard, logs, notes, screen, terminal
from notecase_server.cli.options import Given
from notecase_server.cli.waits import Wait, caller_of
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from tests.client.proxy import Proxy
from tests.support.server import Running, running


async def clerk(served: Running) -> None:
    agent = v1.Agent(llm=v1.LlmAgent(instruction=""))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "AGAIN_SECONDS", 0.01)


async def test_a_run_is_attached_to_again_after_the_clients_own_tries(
    served: Running, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    await clerk(served)
    called = asyncio.Event()

    async def search() -> str:
        called.set()
        await asyncio.Event().wait()
        return ""

    async with (
        Client(served.address) as direct,
        Proxy(served.address) as proxy,
        Client(proxy.address, retry=Retry(tries=0)) as client,
    ):
        stream = client.run("/call search {}", agent="clerk", tools=[search])
        following = asyncio.create_task(follow.Follower(client, stream, patience=600).follow())
        await called.wait()
        proxy.cut()
        (call,) = (await direct.runs.GetRun(v1.GetRunRequest(name=stream.name))).pending_calls
        await direct.give_result(stream.name, call.call_id, "found")
        assert await following
        assert proxy.opened >= 2
    assert "succeeded: found" in capsys.readouterr().err


async def test_a_run_that_is_given_up_is_named(
    served: Running, impatient: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "AWAY_SECONDS", -1)
    await clerk(served)
    called = asyncio.Event()

    async def search() -> str:
        called.set()
        await asyncio.Event().wait()
        return ""

    async with Client(served.address) as direct:
        await direct.create_session("clerk", session_id="case")
    async with Proxy(served.address) as proxy, Client(proxy.address, retry=Retry(tries=0)) as client:
        stream = client.run("/call search {}", session="case", tools=[search])
        following = asyncio.create_task(follow.Follower(client, stream, patience=600).follow())
        await called.wait()
        proxy.cut()
        with pytest.raises(NotecaseError, match="UNAVAILABLE"):
            await following
    told = f"{stream.name} continues there; `notecase chat --session case` shows it."
    assert told in capsys.readouterr().err


Following = Callable[[Client], Coroutine[Any, Any, None]]

FOLLOWING = pytest.mark.parametrize(
    "following",
    [lambda client: logs._print(client, "case", True, 0, "table"), lambda client: notes.watch(client, "case")],
    ids=["logs", "state watch"],
)
"""The commands that follow a session until Ctrl-C."""


class Renewed:
    """Accepts one token at a time, which the client fetches before each call."""

    def __init__(self) -> None:
        self.token = "one"

    def __call__(self) -> str:
        return self.token

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        word = metadata.get("authorization")
        return Principal("default", "ada", Role.ADMIN) if word == f"Bearer {self.token}" else None


@pytest.fixture
def renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Renewed]:
    """The token of the command that is under way."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with click.Context(logs.logs) as context:
        context.meta["notecase.connection"] = Given({"token": (tokens := Renewed())}, {})
        yield tokens


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[str]:
    """The lines that the command prints."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    monkeypatch.setattr(click, "echo", lines.put_nowait)
    monkeypatch.setattr(screen, "aside", lines.put_nowait)
    return lines


@FOLLOWING
async def test_what_is_followed_goes_on_with_the_next_token(
    following: Following, renewed: Renewed, told: asyncio.Queue[str]
) -> None:
    async with running(authenticators=[renewed]) as served, Client(served.address, token=renewed) as client:
        await client.create_session(session_id="case")
        await client.put_state("case", "n", 1)
        task = asyncio.create_task(following(client))
        await told.get()
        renewed.token = "two"
        await served.server._doorway.judge()
        await client.put_state("case", "n", 2)
        assert "2" in await told.get()
        task.cancel()


@FOLLOWING
async def test_another_session_of_the_same_name_is_not_followed(
    served: Running, following: Following, renewed: Renewed, told: asyncio.Queue[str]
) -> None:
    async with Client(served.address) as direct, Proxy(served.address) as proxy, Client(proxy.address) as client:
        await direct.create_session(session_id="case")
        await direct.put_state("case", "n", 1)
        task = asyncio.create_task(following(client))
        await told.get()
        proxy.away = True
        proxy.cut()
        await direct.sessions.DeleteSession(v1.DeleteSessionRequest(name="sessions/case"))
        await direct.create_session(session_id="case")
        for number in (2, 3):
            await direct.put_state("case", "n", number)
        proxy.away = False
        with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND"):
            await task
        assert told.empty()


async def test_a_log_is_printed_completely_for_a_slow_reader(
    served: Running, renewed: Renewed, told: asyncio.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends a stream that is not read, and the command continues after the last event."""
    async with Client(served.address) as client:
        await client.create_session(session_id="case")
        for number in range(3):
            await client.put_state("case", "n", number)
        watch, after = client.runs.WatchEvents, []

        async def slow(request: v1.WatchEventsRequest) -> Any:
            after.append(request.after_sequence)
            async for frame in watch(request):
                if frame.HasField("batch") and len(after) == 1:
                    yield v1.RunResponse(batch=v1.EventBatch(events=frame.batch.events[:1]))
                    raise NotecaseError(grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCHER_TOO_SLOW", "Nobody reads.")
                yield frame

        monkeypatch.setattr(client.runs, "WatchEvents", slow)
        await logs._print(client, "case", False, 0, "table")
        assert (after, told.qsize()) == ([0, 1], 3)


@pytest.mark.parametrize("asks", [False, True], ids=["pipe", "terminal"])
async def test_a_run_that_waits_is_answered_once_the_server_is_back(
    served: Running, impatient: None, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    """Who the caller is, and what he answers, is sent again as long as the run is attached to again."""
    monkeypatch.setattr(follow, "PATIENT", Retry(tries=1000, first_delay=0.01, max_delay=0.01))
    tools = [v1.Tool(name="ask_user", server=v1.ServerTool(function="ask_user"))]
    agent = v1.Agent(llm=v1.LlmAgent(tools=tools))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
    tries = 0

    def cut() -> None:
        nonlocal tries
        proxy.away = (tries := tries + 1) < 3
        proxy.cut()

    async def caller(client: Client) -> None:
        cut()
        await caller_of(client)

    async def answer(commands: Commands, wait: Wait, sending: Callable[[bool], None]) -> bool:
        send = commands._stub.SendCommand

        def late(request: v1.SendCommandRequest) -> Any:
            cut()
            return send(request)

        monkeypatch.setattr(commands._stub, "SendCommand", late)
        await commands.answer(wait.run, wait.id, "The butler.")
        return True

    if asks:
        monkeypatch.setattr(answering, "answer", answer)
        monkeypatch.setattr(keyboard, "hushed", lambda asks: nullcontext())
    else:
        monkeypatch.setattr(follow, "caller_of", caller)
    async with Proxy(served.address) as proxy, Client(proxy.address, retry=Retry(tries=0)) as client:
        stream = client.run('/call ask_user {"question": "Who?"}', agent="clerk")
        follower = follow.Follower(client, stream, patience=0)
        if asks:
            follower._asks = True
            assert await follower.follow()
        else:
            with pytest.raises(follow.Left, match="Who"):
                await follower.follow()
    assert tries >= 3


async def test_ctrl_c_ends_an_answer_that_waits_for_the_server(
    served: Running, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt handles Ctrl-C, and does not pass it on."""
    monkeypatch.setattr(follow, "PATIENT", Retry(tries=20, first_delay=0.01, max_delay=0.01))
    monkeypatch.setattr(keyboard, "hushed", lambda asks: nullcontext())
    monkeypatch.setattr(terminal, "_drop_earlier", lambda app: None)
    tools = [v1.Tool(name="ask_user", server=v1.ServerTool(function="ask_user"))]
    agent = v1.Agent(llm=v1.LlmAgent(tools=tools))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
    async with Proxy(served.address) as proxy, Client(proxy.address, retry=Retry(tries=0)) as client:

        def press(request: v1.SendCommandRequest) -> Any:
            proxy.away = True
            proxy.cut()
            os.kill(os.getpid(), signal.SIGINT)
            return send(request)

        send = client.runs.SendCommand
        monkeypatch.setattr(client.runs, "SendCommand", press)
        stream = client.run('/call ask_user {"question": "Who?"}', agent="clerk")
        follower = follow.Follower(client, stream, patience=0)
        follower._asks = True
        with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
            keys.send_text("The butler.\r")
            with pytest.raises(follow.Left, match=r"Who\?"):
                await follower.follow()

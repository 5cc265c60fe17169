"""What users do, as fast as they are asked to: conversations over a few connections, each answer checked."""

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Self, TypeVar

import grpc
from notecase import v1

from benchmarks import stub

T = TypeVar("T")

CONNECTIONS = 8
"""Over which all load comes. One would let the transport put many streams' frames into one write; one for each stream
is more than a caller opens who has many users."""

SAID = "Tell me what you saw at the harbour, and when; leave nothing out, however small it seems to you now."
"""A hundred bytes, as long as people's messages mostly are."""


class Caller(ABC):
    """A caller of one server that holds conversations, whatever the server speaks."""

    @abstractmethod
    async def agent(self, tokens: int, pause_ms: int = 0) -> str:
        """The name of an agent whose model answers so."""

    @abstractmethod
    async def session(self) -> str:
        """The name of a new session."""

    @abstractmethod
    async def turn(self, session: str, agent: str, tokens: int, lane: int = 0) -> float:
        """One user message and its reply, to the end of the stream; returns the seconds to the first token. Raises
        WrongError when the reply is not what the model said."""

    async def new_sessions(self, count: int) -> list[str]:
        return await lanes(8, [self.session] * count)

    async def conversations(self, sessions: Iterable[str], turns: int, agent: str, tokens: int, at_once: int) -> None:
        """So many turns in each session, `at_once` sessions at a time."""
        lane = itertools.count()

        async def converse(session: str) -> None:
            number = next(lane)
            for _ in range(turns):
                await self.turn(session, agent, tokens, number)

        await lanes(at_once, (partial(converse, session) for session in sessions))


class Load(Caller):
    """A caller of notecase, or of a server with the same methods."""

    def __init__(self, channels: list[grpc.aio.Channel]) -> None:
        self._channels = channels
        self._agents: set[str] = set()
        self._numbers = itertools.count()
        self.runs = [v1.RunServiceStub(channel) for channel in channels]
        self.agents = v1.AgentServiceStub(channels[0])
        self.sessions = v1.SessionServiceStub(channels[0])
        self.messages = v1.MessageServiceStub(channels[0])
        self.state = v1.StateServiceStub(channels[0])
        self.info = [v1.ServerServiceStub(channel) for channel in channels]

    @classmethod
    @asynccontextmanager
    async def connect(cls, port: int, key: str = "") -> AsyncIterator[Self]:
        """`key` goes with each call."""
        async with connections(port, key) as channels:
            yield cls(channels)

    async def agent(self, tokens: int, pause_ms: int = 0, window: int = 0) -> str:
        """The name of an agent whose model answers so, and that shows it `window` messages, 0 for all."""
        model = stub.model(tokens, pause_ms)
        agent_id = f"{model}-of-{window}"
        if agent_id not in self._agents:
            llm = v1.LlmAgent(model=model, instruction="You are a detective.", context=v1.Context(max_messages=window))
            await self.agents.CreateAgent(v1.CreateAgentRequest(agent_id=agent_id, agent=v1.Agent(llm=llm)))
            self._agents.add(agent_id)
        return f"agents/{agent_id}"

    async def session(self, messages: int = 0, name: str = "") -> str:
        """The name of a new session with a history of so many messages, users' and replies by turns."""
        session_id = name.removeprefix("sessions/") or f"s{next(self._numbers)}"
        created = await self.sessions.CreateSession(v1.CreateSessionRequest(session_id=session_id))
        roles = (v1.Message.ROLE_USER, v1.Message.ROLE_ASSISTANT)
        parts = [v1.Part(text=SAID)]
        said = [v1.Message(role=role, author="users/ada", parts=parts) for role in roles] * 50
        while messages:
            batch = said[: min(messages, len(said))]
            await self.messages.AppendMessages(v1.AppendMessagesRequest(parent=created.name, messages=batch))
            messages -= len(batch)
        return created.name

    async def new_sessions(self, count: int, messages: int = 0) -> list[str]:
        return await lanes(8, (lambda: self.session(messages) for _ in range(count)))

    async def turn(self, session: str, agent: str, tokens: int, lane: int = 0) -> float:
        said = v1.Message(parts=[v1.Part(text=SAID)])
        start = v1.RunRequest(start=v1.StartRun(session=session, agent=agent, messages=[said]))
        first = 0.0
        streamed, kept = "", ""
        begun = time.perf_counter()
        call: Any = self.runs[lane % CONNECTIONS].Run(iter([start]))
        ended = v1.RunStateChanged()
        async for response in call:
            for event in response.batch.events:
                match event.WhichOneof("payload"):
                    case "block_delta":
                        first = first or time.perf_counter() - begun
                        streamed += event.block_delta.text
                    case "message_added" if event.message_added.role == v1.Message.ROLE_ASSISTANT:
                        # A short reply may be whole before anything of it is due to be streamed.
                        first = first or time.perf_counter() - begun
                        kept = event.message_added.parts[0].text
                    case "run_state_changed":
                        ended = event.run_state_changed
        right = kept == stub.TOKEN * tokens and kept.startswith(streamed)
        if ended.state != v1.Run.STATE_SUCCEEDED or not right:
            state = v1.Run.State.Name(ended.state)
            raise WrongError(f"A turn ended as {state} with {len(kept)} characters. {ended.error.message}")
        return first

    async def read_all(self, session: str, at_once: int) -> None:
        """Reads the session's messages page by page, so many readers at once."""

        async def read() -> None:
            request = v1.ListMessagesRequest(parent=session, page_size=1000)
            while True:
                page = await self.messages.ListMessages(request)
                if not page.next_page_token:
                    return
                request.page_token = page.next_page_token

        await lanes(at_once, [read] * at_once)

    async def bare_calls(self, count: int, at_once: int) -> None:
        """So many of the call that does the least."""
        stubs = itertools.cycle(self.info)
        ask = v1.GetServerInfoRequest()
        await lanes(at_once, (partial(next(stubs).GetServerInfo, ask) for _ in range(count)))


class _Key(grpc.aio.UnaryUnaryClientInterceptor):
    """Sends a key with each call."""

    def __init__(self, key: str) -> None:
        self._metadata = grpc.aio.Metadata(("authorization", f"Bearer {key}"))

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(details._replace(metadata=self._metadata), request)


class _StreamKey(grpc.aio.StreamStreamClientInterceptor):
    """As _Key, with each stream."""

    def __init__(self, key: str) -> None:
        self._metadata = grpc.aio.Metadata(("authorization", f"Bearer {key}"))

    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await continuation(details._replace(metadata=self._metadata), requests)


@asynccontextmanager
async def connections(port: int, key: str = "") -> AsyncIterator[list[grpc.aio.Channel]]:
    """The channels over which all load comes, each with a separate connection."""
    keys = [_Key(key), _StreamKey(key)] if key else []
    async with AsyncExitStack() as stack:
        # Channels of one process to one address share a connection by default.
        own = (("grpc.use_local_subchannel_pool", 1),)
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", own, interceptors=keys) for _ in range(CONNECTIONS)]
        for channel in channels:
            await stack.enter_async_context(channel)
        yield channels


class WrongError(Exception):
    """The server answered, and not as it should have."""


async def lanes(width: int, tasks: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Carries out all, `width` at a time, each lane taking the next when it is free. Returns the results in no
    promised order; the first that fails fails all."""
    waiting = iter(tasks)
    results: list[T] = []

    async def lane() -> None:
        results.extend([await task() for task in waiting])

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(lane())
    return results

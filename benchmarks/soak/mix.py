"""What many users do in the course of a day, each action checked to its end."""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from notecase import v1

from benchmarks import stub
from benchmarks.load import CONNECTIONS, SAID, Load, WrongError

TOKENS = 20
"""Of a reply as fast as it comes, and of one behind a tool call."""

SLOW_TOKENS, SLOW_PAUSE_MS = 50, 10
"""Of a reply that is long enough to be watched and left."""

LONG_TOKENS = 3_000
"""Of a reply that is always cancelled: half a minute of it, which no busy server outlasts."""

WINDOW = 10
"""Messages that the model is shown, so that an action costs the same in an old session."""

SESSIONS = 64

ERRORS_KEPT = 5


class Mix:
    """One action after the other, chosen by a seed, each in a session that no other action uses at the time."""

    def __init__(self, load: Load, seed: int = 1) -> None:
        self._load = load
        self._random = random.Random(seed)
        self._idle: deque[str] = deque()
        self._fast = self._slow = self._long = self._calling = ""
        self.done: Counter[str] = Counter()
        """Actions that ended as they should have, by their name."""
        self.wrong: Counter[str] = Counter()
        self.errors: list[str] = []
        """The first few of what went wrong, in words."""
        self.actions: dict[str, tuple[int, Callable[[str], Awaitable[None]]]] = {
            "turn": (50, self.turn),
            "tool call": (15, self.tool_call),
            "attach": (10, self.attach),
            "cancel": (10, self.cancel),
            "disconnect": (10, self.disconnect),
            "deletion": (5, self.deletion),
        }
        """How many of a hundred are that action, and the action in a session."""

    async def prepare(self) -> None:
        """Makes the agents and the sessions."""
        self._fast = await self._load.agent(TOKENS, window=WINDOW)
        self._slow = await self._load.agent(SLOW_TOKENS, SLOW_PAUSE_MS, window=WINDOW)
        self._long = await self._load.agent(LONG_TOKENS, SLOW_PAUSE_MS, window=WINDOW)
        tool = v1.Tool(name=stub.TOOL, description="Looks at a place.", client=v1.ClientTool())
        llm = v1.LlmAgent(model=f"calls-{TOKENS}", tools=[tool], context=v1.Context(max_messages=WINDOW))
        agent = await self._load.agents.CreateAgent(v1.CreateAgentRequest(agent_id="calling", agent=v1.Agent(llm=llm)))
        self._calling = agent.name
        self._idle.extend(await self._load.new_sessions(SESSIONS))

    async def one(self) -> None:
        """Carries out one action. What goes wrong is counted, and the session is not used again."""
        weights = [weight for weight, _ in self.actions.values()]
        name = self._random.choices(list(self.actions), weights)[0]
        try:
            session = self._idle.popleft() if self._idle else await self._load.session()
            await self.actions[name][1](session)
        except (WrongError, grpc.aio.AioRpcError) as error:
            self.wrong[name] += 1
            if len(self.errors) < ERRORS_KEPT:
                self.errors.append(f"{name}: {_words(error)}")
            return
        self.done[name] += 1
        if name != "deletion":
            self._idle.append(session)

    async def turn(self, session: str) -> None:
        await self._load.turn(session, self._fast, TOKENS, self._lane())

    async def tool_call(self, session: str) -> None:
        """A turn whose tool is this caller's."""
        async with aclosing(_Stream(self._run(), self._start(session, self._calling))) as stream:
            await stream.until("tool_started")
            result = v1.ToolResult(
                call_id=stream.event.tool_started.call_id, result=[v1.Part(text="Fog, and a light.")]
            )
            await stream.write(v1.RunRequest(command_id=f"result.{result.call_id}", tool_result=result))
            await stream.ended(v1.Run.STATE_SUCCEEDED, TOKENS)

    async def attach(self, session: str) -> None:
        """A run in the background, which two follow: one from its beginning, one from the session's."""
        started = await self._runs().CreateRun(v1.CreateRunRequest(start=self._start(session, self._slow).start))
        attach = v1.RunRequest(attach=v1.AttachRun(name=started.name))
        watch = self._runs().WatchEvents(v1.WatchEventsRequest(name=started.name, after_sequence=0))
        async with aclosing(_Stream(self._run(), attach)) as one, aclosing(_Stream(watch)) as other:
            await asyncio.gather(*(each.ended(v1.Run.STATE_SUCCEEDED, SLOW_TOKENS) for each in (one, other)))

    async def cancel(self, session: str) -> None:
        """A turn that is cancelled once its reply has begun."""
        async with aclosing(_Stream(self._run(), self._start(session, self._long))) as stream:
            await stream.until("block_delta")
            stop = v1.CancelCommand(mode=v1.CancelCommand.MODE_IMMEDIATE)
            await stream.write(v1.RunRequest(cancel=stop))
            await stream.ended(v1.Run.STATE_CANCELLED)

    async def disconnect(self, session: str) -> None:
        """A turn whose caller goes away; the run goes on, and is asked for later."""
        async with aclosing(_Stream(self._run(), self._start(session, self._slow))) as stream:
            await stream.until("block_delta")
        request = v1.WaitRunRequest(name=stream.run, timeout=Duration(seconds=60))
        run = await self._runs().WaitRun(request)
        if run.state != v1.Run.STATE_SUCCEEDED or run.reply.parts[0].text != stub.TOKEN * SLOW_TOKENS:
            raise WrongError(f"A run whose caller left ended as {v1.Run.State.Name(run.state)}.")

    async def deletion(self, session: str) -> None:
        """Replaces a session by a new one."""
        await self._load.sessions.DeleteSession(v1.DeleteSessionRequest(name=session))
        self._idle.append(await self._load.session())

    def _lane(self) -> int:
        return self._random.randrange(CONNECTIONS)

    def _runs(self) -> Any:
        return self._load.runs[self._lane()]

    def _run(self) -> Any:
        return self._runs().Run()

    @staticmethod
    def _start(session: str, agent: str) -> v1.RunRequest:
        said = v1.Message(parts=[v1.Part(text=SAID)])
        return v1.RunRequest(start=v1.StartRun(session=session, agent=agent, messages=[said]))


def _words(error: WrongError | grpc.aio.AioRpcError) -> str:
    return str(error) if isinstance(error, WrongError) else f"{error.code().name} {error.details()}"


class _Stream:
    """A call that yields the events of a run; closing it before its end is a caller that disconnects."""

    def __init__(self, call: Any, first: v1.RunRequest | None = None) -> None:
        self._call = call
        self._first = first
        self._events = self._read()
        self.run = ""
        self.event = v1.Event()
        """The event that was waited for last."""

    async def write(self, request: v1.RunRequest) -> None:
        await self._call.write(request)

    async def until(self, payload: str) -> None:
        """Reads up to such an event. Raises WrongError when the stream ends before."""
        async for event in self._events:
            if event.WhichOneof("payload") == payload:
                self.event = event
                return
        raise WrongError(f"A stream ended without {payload}.")

    async def ended(self, state: v1.Run.State.ValueType, tokens: int = 0) -> None:
        """Reads to the end. Raises WrongError when the run of this stream ends otherwise, or with another reply."""
        reply, last = "", v1.RunStateChanged()
        async for event in self._events:
            if event.run == self.run:
                if event.message_added.role == v1.Message.ROLE_ASSISTANT:
                    reply = event.message_added.parts[0].text
                if event.HasField("run_state_changed"):
                    last = event.run_state_changed
        if last.state != state or (tokens and reply != stub.TOKEN * tokens):
            name = v1.Run.State.Name(last.state)
            raise WrongError(f"A run ended as {name} with {len(reply)} characters. {last.error.message}")

    async def aclose(self) -> None:
        await self._events.aclose()
        self._call.cancel()

    async def _read(self) -> Any:
        if self._first is not None:
            await self.write(self._first)
        async for response in self._call:
            self.run = response.attached.run.name or self.run
            for event in response.batch.events:
                yield event

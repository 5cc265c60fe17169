"""The rooms of the engine, put together as a server does: only the store, the clock and the ids are the test's."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from notecase import v1
from notecase_server.engine import ledger, model_turn
from notecase_server.engine.admission import Started
from notecase_server.engine.content import Contents, Limits
from notecase_server.engine.halt import Halts
from notecase_server.engine.opening import opening
from notecase_server.engine.places import Places
from notecase_server.engine.run_log import RunLog
from notecase_server.engine.runs import Runs
from notecase_server.engine.schema import Schemas
from notecase_server.engine.services import NamedProvider, Services
from notecase_server.engine.sessions import Sessions
from notecase_server.models.contract import Call, Delta, Finish, ModelRequest, Provider, Text
from notecase_server.models.offline import OfflineProvider
from notecase_server.store.contract import ActiveRun, Clock, Commit, RunRecord, SessionKey, Store
from notecase_server.store.fold import ENDED
from notecase_server.supervisor import Supervisor
from notecase_server.tools.contract import Toolbox
from notecase_server.tools.toolbox import make_toolbox

TENANT = "acme"
AGENT = "agents/clerk"

_numbers = itertools.count(1)


def new_id() -> str:
    """Ids that no two houses make alike."""
    return f"id-{next(_numbers)}"


class Model:
    """Holds its reply to a text that begins with "hold" until `let` is set, calls the tool that a text "call NAME"
    names, and says "Done." to everything else."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.arrived = asyncio.Semaphore(0)
        """Released once for each request."""
        self.asked: list[str] = []
        """The last text of each request."""

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        last = request.messages[-1]
        text = "".join(part.text for part in last.parts)
        self.asked.append(text)
        self.arrived.release()
        if text.startswith("hold"):
            await self.let.wait()
        if text.startswith("call ") and last.role == v1.Message.ROLE_USER:
            for number, name in enumerate(text.split()[1:]):
                yield Call(number, name, "{}")
        else:
            yield Text("Done.")
        yield Finish("stop", v1.Usage())

    async def close(self) -> None:
        pass


class House:
    """The engine of one process. Its upkeep rests until a test starts it."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        provider: Provider,
        tools: Sequence[str],
        max_runs: int,
        poll: float,
        toolbox: Toolbox | None = None,
        schemas: Schemas | None = None,
    ) -> None:
        self.store = store
        self.clock = clock
        self.supervisor = Supervisor(new_id)
        self.services = Services(
            store=store,
            providers={"": NamedProvider("first", provider)},
            toolbox=toolbox or make_toolbox(tools, {}),
            contents=Contents(store, new_id, clock, Limits()),
            schemas=schemas or Schemas(),
            supervisor=self.supervisor,
            places=Places(max_runs),
            new_id=new_id,
            clock=clock,
            lease=store.lease,
        )
        self.sessions = Sessions(store, new_id, new_id)
        self.runs = Runs(self.sessions, self.services, poll)

    async def prepare(self, *sessions: str, **llm: Any) -> list[SessionKey]:
        """Makes the agent, and empty sessions of users/ada."""
        await self.store.create_agent(TENANT, "clerk", v1.Agent(llm=v1.LlmAgent(**llm)))
        return [await self.make(session) for session in sessions or ("s",)]

    async def make(self, session: str, user: str = "users/ada") -> SessionKey:
        key = self.sessions.new_key(TENANT, session)
        await self.sessions.commit(Commit(key=key, create=v1.Session(agent=AGENT, user=user)))
        return key

    async def start(self, key: SessionKey, text: str, run_id: str = "r", **fields: Any) -> Started:
        """Starts a run as a caller does."""
        messages = [v1.Message(parts=[v1.Part(text=text)])] if text else []
        start = v1.StartRun(session=f"sessions/{key.session}", run_id=run_id, messages=messages, **fields)
        return await self.runs.admission.start(key.tenant, start)

    async def rests(self, key: SessionKey, run: str = "r", after: int = 0) -> v1.Run:
        """The run once it waits or has ended."""
        return await self.runs.commands.wait(key, run, None, after)

    async def ended(self, key: SessionKey, run: str = "r") -> v1.Run:
        found = await self.rests(key, run)
        while found.state not in ENDED:
            found = await self.rests(key, run, found.last_sequence)
        return found

    async def log(self, key: SessionKey) -> list[v1.Event]:
        return await self.store.read_events(key, 0)

    # ---- parts of a run, for the rooms within it

    async def run_log(self, key: SessionKey, run_id: str = "r", **fields: Any) -> RunLog:
        """A run that has started, and has no worker."""
        agent = await self.store.get_agent(TENANT, "clerk")
        assert agent is not None
        start = v1.StartRun(messages=[v1.Message(parts=[v1.Part(text="Go")])], **fields)
        events = opening(start, "users/ada", agent, run_id, "", new_id)
        live = self.sessions.live(key)
        made = await live.commit(Commit(key=key, claim=True, events=events, start=RunRecord(b"digest", agent)))
        return RunLog(live, self.services, made.session, ActiveRun(key, made.runs[run_id], agent, made.epoch))

    async def call(self, log: RunLog, *tools: str) -> list[v1.ToolCall]:
        """Commits a reply that calls these tools, with what follows."""
        bound = await model_turn.bind(log, Halts())
        pending = v1.ToolCall.OUTCOME_PENDING
        calls = [
            v1.ToolCall(call_id=new_id(), tool=name, outcome=pending, binding=bound[name].binding) for name in tools
        ]
        reply = v1.Message(
            name=new_id(),
            role=v1.Message.ROLE_ASSISTANT,
            status=v1.Message.STATUS_IN_PROGRESS,
            parts=[v1.Part(tool_call=call) for call in calls],
        )
        events = ledger.triage(calls, bound, {}, new_id, lambda _: None)
        await log.durably(lambda: [v1.Event(message_added=reply), *events])
        return calls


@asynccontextmanager
async def house(
    store: Store,
    clock: Clock,
    provider: Provider | None = None,
    *,
    tools: Sequence[str] = (),
    max_runs: int = 100,
    poll: float = 3600.0,
    toolbox: Toolbox | None = None,
    schemas: Schemas | None = None,
) -> AsyncIterator[House]:
    """Builds the rooms, and leaves them as a server that stops without grace does. The store stays open. The model is
    the offline one if no other is given; `tools` are modules of functions."""
    made = House(store, clock, provider or OfflineProvider(), tools, max_runs, poll, toolbox, schemas)
    try:
        yield made
    finally:
        await made.runs.drain(0)
        await made.services.schemas.close()


def kinds(events: Sequence[v1.Event]) -> list[str]:
    return [event.WhichOneof("payload") or "" for event in events]


def server_tool(name: str, **fields: Any) -> v1.Tool:
    return v1.Tool(name=name, server=v1.ServerTool(function=name), **fields)


def client_tool(name: str, **fields: Any) -> v1.Tool:
    return v1.Tool(name=name, client=v1.ClientTool(), **fields)

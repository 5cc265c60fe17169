"""The sessions of two tenants with all kinds of calls, in any order and concurrently, through restarts and
kills of their server, failures of its store and deletions: a log only grows, each run ends once, each call is answered
once, and everything that watchers receive follows from the log."""

import asyncio
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from notecase import SessionView, v1
from notecase.view import ENDED
from notecase_server.models.openai import OpenAIProvider
from notecase_server.serve import now
from notecase_server.store.contract import SessionKey, Store
from notecase_server.store.postgres.store import PostgresStore
from notecase_server.store.sqlite.store import SqliteStore
from notecase_server.tools.functions import CallContext, tool
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import reason_of, said
from tests.e2e.test_takeover import SESSION, check_well_formed, client_tool, server_tool
from tests.support import postgres
from tests.support.failing import Mode, Unreliable
from tests.support.openai_server import Answer, Json, OpenAIServer, chunk, error, reply, tool_calls
from tests.support.server import TENANT, Running, running

T = TypeVar("T")
Fields = Mapping[str, Any]

STATE = f"{SESSION}/state"
APP = "app/state"
TENANTS = ("default", "other")
PATIENCE = 60.0
"""Seconds after which what is waited for will not come."""


# What the model and the tools of the server do.


class Doors:
    """Where the model in mid-reply and the tools at work wait, until they are let through."""

    def __init__(self) -> None:
        self.always = False
        self.changed = asyncio.Condition()
        self.effects: list[tuple[str, int]] = []
        self.lingering: set[tuple[str, int]] = set()
        self._open = asyncio.Event()
        self._held: list[tuple[Json, asyncio.Event]] = []

    def hold(self, body: Json) -> asyncio.Event:
        """What the answer to that request waits for."""
        if not self.always:
            self._held.append((body, self._open))
        return self._open

    def busy(self, model: OpenAIServer) -> bool:
        """Whether a call waits here that was neither released nor cancelled."""
        gone = [received.body for received in model.received if received.left.is_set()]
        waits = [body for body, event in self._held if not event.is_set() and not any(body is left for left in gone)]
        return bool(waits or self.lingering)

    def open(self, always: bool = False) -> None:
        """Releases the waiting calls; with `always` later calls do not wait."""
        self.always = always
        self._open.set()
        if not always:
            self._open = asyncio.Event()

    async def linger(self, context: CallContext) -> None:
        place = (context.call_id, context.attempt)
        self.lingering.add(place)
        async with self.changed:
            self.changed.notify_all()
        try:
            await self._open.wait()
        finally:
            self.lingering.discard(place)

    def answer(self, body: Json) -> Answer:
        """Does what the last message says, in words: the names of tools to call, "wait" to stop in mid-reply, "fail" to
        refuse. To anything else it talks."""
        last = body["messages"][-1]
        words = last["content"].split() if last["role"] == "user" else []
        if words[:1] == ["fail"]:
            return error(400)
        calls = [(word, '{"question": "Which?"}' if word == "ask" else "{}") for word in words if word in TOOLS]
        calls += [("weigh", '{"half') for word in words if word == "broken"]
        calls += [("nothing", "{}") for word in words if word == "unknown"]
        answer = tool_calls(*calls) if calls else reply(f"Answer to the {last['role']}.", chunks=3)
        if calls and "talk" in words:
            answer = Answer((chunk({"role": "assistant", "content": "Let me see."}), *answer.pieces[1:]))
        return answer.held(self.hold(body), after=3) if "wait" in words else answer


class Lasting(OpenAIProvider):
    """Outlives its servers, since to make one takes longer than the rest of a restart."""

    async def close(self) -> None:
        """A server that stops has let go of its replies before."""

    async def end(self) -> None:
        await super().close()


the: dict[str, Doors] = {}
"""Under "doors", those of the example at hand, for the tools."""


@tool
async def act(context: CallContext) -> str:
    """Takes effect at once, and says so in the state."""
    the["doors"].effects.append((context.call_id, context.attempt))
    context.increment("acted")
    return "acted"


@tool
async def linger(context: CallContext) -> str:
    """Takes effect, then waits to be let through."""
    the["doors"].effects.append((context.call_id, context.attempt))
    await the["doors"].linger(context)
    context.append("lingered", context.attempt)
    return "lingered"


TOOLS: Mapping[str, v1.Tool] = {
    "weigh": client_tool("weigh"),
    "pay": client_tool("pay", requires_approval=True),
    "ask": v1.Tool(name="ask", server=v1.ServerTool(function="ask_user")),
    "act": server_tool("act", v1.Tool.ON_INTERRUPT_RETRY),
    "again": server_tool("again", v1.Tool.ON_INTERRUPT_RETRY, "linger"),
    "doubt": server_tool("doubt", v1.Tool.ON_INTERRUPT_ASK, "linger"),
    "lose": server_tool("lose", v1.Tool.ON_INTERRUPT_FAIL, "linger"),
}

# What callers say. Texts tell the model what to do.

TEXTS = st.lists(
    st.sampled_from([*TOOLS, "wait", "wait", "talk", "broken", "unknown", "fail"]), min_size=1, max_size=4
).map(" ".join)
NUMBERS = st.integers(0, 3)
IDS = st.sampled_from(["", "", "a", "b", "c"])
"""Chosen by callers, so that they meet; mostly none."""
QUEUE, INTERRUPT, ROLLBACK = (
    v1.StartRun.ON_BUSY_QUEUE,
    v1.StartRun.ON_BUSY_INTERRUPT,
    v1.StartRun.ON_BUSY_ROLLBACK,
)
STARTS = st.fixed_dictionaries(
    {
        "text": TEXTS,
        "on_busy": st.sampled_from([*v1.StartRun.OnBusy.values(), ROLLBACK, ROLLBACK]),
        "run_id": IDS,
        "state": st.sampled_from([None, 1, 2]),
    }
)
SAYS = st.fixed_dictionaries({"text": TEXTS, "when": st.sampled_from(sorted(v1.UserInput.When.values()))})
RESULTS = st.fixed_dictionaries({"which": NUMBERS, "late": st.booleans(), "error": st.sampled_from(["", "", "broke"])})
RESPONSES = st.fixed_dictionaries(
    {
        "which": NUMBERS,
        "late": st.booleans(),
        "decision": st.sampled_from(sorted(v1.InputResponse.Decision.values())[1:]),
        "edited": st.booleans(),
        "remember": st.sampled_from(sorted(v1.InputResponse.Remember.values())),
    }
)
CANCELS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(sorted(v1.CancelCommand.Mode.values())),
        "call": st.none() | NUMBERS,
        "run_id": IDS,
    }
)
UPDATES = st.fixed_dictionaries(
    {
        "op": st.sampled_from(["set", "increment", "append", "remove"]),
        "key": st.sampled_from(["n", "acted"]),
        "if_version": st.sampled_from([None, None, "now", "before"]),
    }
)
COMMANDS = st.one_of(
    st.tuples(st.just("start"), STARTS),
    st.tuples(st.just("say"), SAYS),
    st.tuples(st.just("result"), RESULTS),
    st.tuples(st.just("response"), RESPONSES),
    st.tuples(st.just("cancel"), CANCELS),
    st.tuples(st.just("update"), UPDATES),
    st.tuples(st.just("append"), st.fixed_dictionaries({"text": TEXTS, "if_last": st.sampled_from([None, 0, -1])})),
    st.tuples(st.just("repeat"), st.fixed_dictionaries({"which": st.integers(0, 30)})),
    st.tuples(st.just("app"), st.just({})),
)
ANSWERS = st.one_of(st.tuples(st.just("result"), RESULTS), st.tuples(st.just("response"), RESPONSES))
FORMS = st.sampled_from(["SendCommand", "Run"])
WHOSE = st.sampled_from(["default", "default", "other"])
FAULTS = st.tuples(
    st.sampled_from(
        [
            *("commit", "commit", "commit", "find_commit", "claim", "recall", "recall_command", "update_state"),
            *(
                "get_session",
                "find_session",
                "find_session_key",
                "delete_session",
                "get_run",
                "active_run",
                "active_runs",
                "idle_runs",
            ),
            *("read_events", "list_messages", "get_state", "get_agent"),
        ]
    ),
    st.sampled_from([Mode.PASSING, Mode.AFTER]),
    st.integers(1, 3),
    st.integers(1, 3),
)
"""The call of the store that fails, how, at which time and how often from then on."""

REFUSALS: Mapping[str, set[str]] = {
    "start": {"RUN_ACTIVE", "REQUEST_ID_REUSED", "RUN_CANCELLED_BEFORE_START", "QUEUE_FULL"},
    "input": {"RUN_NOT_FOUND", "RUN_ENDED", "QUEUE_FULL"},
    "tool_result": {"CALL_NOT_PENDING"},
    "input_response": {"INPUT_NOT_PENDING", "INVALID_FIELD"},
    "update_state": {"STATE_VERSION_MISMATCH", "STATE_TYPE_MISMATCH"},
    "cancel": {"RUN_NOT_FOUND", "RUN_ENDED", "CALL_NOT_PENDING", "RUN_ACTIVE"},
}
"""What each command may be answered with; anything else is a defect."""

ACCEPTED = {
    v1.CommandResult.DISPOSITION_APPLIED,
    v1.CommandResult.DISPOSITION_QUEUED,
    v1.CommandResult.DISPOSITION_DUPLICATE,
}


class Case:
    """A session of one tenant, as its callers know it. Two watchers follow it: one from the beginning of the log, again
    after each start of the server, and a slow one, which reads now and then and resumes where it was."""

    def __init__(self, tenant: str, doors: Doors) -> None:
        self.tenant = tenant
        self.metadata = ((TENANT, tenant),)
        self.doors = doors
        self.uid = ""
        self.log: list[v1.Event] = []
        self.told: list[v1.Event] = []
        self.view = SessionView(0)
        self.late = SessionView(0)
        self.reads = asyncio.Event()
        """Set while the laggard reads."""
        self.sent: list[tuple[v1.RunRequest, str]] = []
        self.results: dict[str, tuple[v1.RunRequest, int]] = {}
        self.number = 0
        self.app_version = 0
        self.deleting = False
        self.watching: list[asyncio.Task[None]] = []

    async def ask(self, call: Callable[..., Any], request: Any) -> Any:
        """Calls as this tenant, again for as long as the store is away; what changes something has an id."""
        while True:
            try:
                return await call(request, metadata=self.metadata)
            except grpc.aio.AioRpcError as refused:
                if reason_of(refused) != "STORE_UNAVAILABLE":
                    raise

    async def make(self, served: Running) -> None:
        """Makes the session, under the one name that it always has, and follows it."""
        self.served = served
        self.number += 1
        self.log, self.told, self.results = [], [], {}
        self.view, self.late = SessionView(0), SessionView(0)
        session = v1.Session(agent="agents/clerk")
        create = v1.CreateSessionRequest(session_id="case", session=session, request_id=f"create-{self.number}")
        made = await self.ask(served.sessions.CreateSession, create)
        assert made.uid != self.uid, "a session made again is another one"
        self.uid = made.uid
        self.follow(served)

    async def delete(self) -> None:
        """Deletes it, by whose streams that is noticed; then nothing of it is found."""
        self.number += 1
        self.reads.set()
        request = v1.DeleteSessionRequest(name=SESSION, request_id=f"delete-{self.number}")
        await self.ask(self.served.sessions.DeleteSession, request)
        for task in self.watching:
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await task
            assert reason_of(ended.value) == "SESSION_NOT_FOUND"
        for method, about in (
            (self.served.sessions.GetSession, v1.GetSessionRequest(name=SESSION)),
            (self.served.messages.ListMessages, v1.ListMessagesRequest(parent=SESSION)),
            (self.served.state.GetState, v1.GetStateRequest(name=STATE)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as missing:
                await self.ask(method, about)
            assert reason_of(missing.value) == "SESSION_NOT_FOUND"

    def follow(self, served: Running) -> None:
        """Watches from the beginning: it must receive the same events as before. The slow watcher resumes where it
        was."""
        self.served = served
        self.told = []
        self.view = SessionView(0)
        loop = asyncio.get_running_loop()
        self.watching = [
            loop.create_task(self._watch(self.view, None, v1.WatchOptions(keep_open=True))),
            loop.create_task(self._watch(self.late, self.reads, self._lagging())),
        ]

    def _lagging(self) -> v1.WatchOptions:
        options = v1.WatchOptions(keep_open=True)
        options.max_batch_delay.FromMilliseconds(500)
        return options

    async def _watch(self, view: SessionView, gate: asyncio.Event | None, options: v1.WatchOptions) -> None:
        """Reads into the view, and comes back where it was when the store is away."""
        try:
            while True:
                watch = v1.WatchEventsRequest(name=SESSION, after_sequence=view.last_sequence, options=options)
                try:
                    async for frame in self.served.runs.WatchEvents(watch, metadata=self.metadata):
                        if gate is not None:
                            await gate.wait()
                        self._take(view, frame)
                        await self._tell()
                except grpc.aio.AioRpcError as ended:
                    if reason_of(ended) != "STORE_UNAVAILABLE":
                        raise
        finally:
            await self._tell()

    def _take(self, view: SessionView, frame: v1.RunResponse) -> None:
        if frame.HasField("attached"):
            view.attach(frame.attached)
        for event in frame.batch.events:
            for index, block in view.open.get(event.message_added.name, {}).items():
                part = event.message_added.parts[index]
                whole = part.text or part.reasoning.text or part.tool_call.arguments
                assert whole.encode() == block.text.encode(), "the deltas joined are the text"
            if event.state_changed.state == APP and not event.sequence:
                assert {op.set.string_value for op in event.state_changed.ops} == {self.tenant}
            assert view.apply(event), "each entry of the log comes once"
            if event.sequence and view is self.view:
                self.told.append(event)

    async def _tell(self) -> None:
        async with self.doors.changed:
            self.doors.changed.notify_all()

    async def leave(self) -> None:
        """The watchers go, with what they know."""
        for task in self.watching:
            task.cancel()
        for ended in await asyncio.gather(*self.watching, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended
        self.keep()

    def keep(self) -> None:
        """The log as it was known is the beginning of the log as it is sent now."""
        assert self.told[: len(self.log)] == self.log[: len(self.told)]
        if len(self.told) > len(self.log):
            self.log = list(self.told)

    def cut(self, count: int) -> None:
        """The server was killed when it had so many events; those that were sent are among them."""
        self.log = self.log[:count]
        if (self.late.last_sequence or 0) > count:  # it went on reading from the server that was taken for dead
            self.late = SessionView(0)

    async def head(self) -> int:
        return int((await self.ask(self.served.sessions.GetSession, v1.GetSessionRequest(name=SESSION))).last_sequence)

    def moves(self) -> bool:
        """Whether something of it goes on by itself."""
        states = {run.state for run in self.view.runs.values()}
        queued = v1.Run.STATE_QUEUED in states and v1.Run.STATE_WAITING not in states
        return v1.Run.STATE_RUNNING in states or queued or self._speaks()

    def _speaks(self) -> bool:
        """The run waits only for people, and a user has sent new input: that will be their answer."""
        run = self.view.run
        waits = run is not None and run.state == v1.Run.STATE_WAITING and not run.pending_calls
        said = [queued for queued in self.view.queued if run is not None and queued.run == run.name]
        return waits and bool(said)

    # ---- what callers do

    async def carry_out(self, kind: str, fields: Fields, form: str) -> None:
        self.number += 1
        if kind == "append":
            await self.append(fields)
        elif kind == "repeat":
            if self.sent:
                command, run = self.sent[fields["which"] % len(self.sent)]
                await self.send(command, run, form)
        elif kind == "app":
            await self.put_app()
        else:
            command, run = getattr(self, f"make_{kind}")(**fields)
            command.command_id = f"command-{self.number}"
            self.sent.append((command, run))
            await self.send(command, run, form)

    async def put_app(self) -> None:
        """Changes the state of this tenant's app, to the name of the tenant."""
        value = v1.Value(string_value=self.tenant)
        put = v1.PutStateRequest(name=APP, key="whose", value=value, request_id=f"app-{self.number}")
        await self.ask(self.served.state.PutState, put)
        self.app_version += 1

    def make_start(self, text: str, on_busy: v1.StartRun.OnBusy.ValueType, run_id: str, state: int | None) -> Any:
        start = v1.StartRun(session=SESSION, messages=[said(text)], on_busy=on_busy, run_id=run_id)
        if state is not None:
            start.state["n"].int_value = state
        return v1.RunRequest(start=start), ""

    def make_say(self, text: str, when: v1.UserInput.When.ValueType) -> Any:
        return v1.RunRequest(input=v1.UserInput(messages=[said(text)], when=when)), ""

    def calls(self, late: bool) -> list[v1.ToolCall]:
        """Those that wait for a caller, or all that ever were."""
        if late or self.view.run is None:
            messages = self.view.messages.values()
            return [part.tool_call for message in messages for part in message.parts if part.HasField("tool_call")]
        return list(self.view.run.pending_calls)

    def make_result(self, which: int, late: bool, error: str) -> Any:
        calls = self.calls(late) or [v1.ToolCall(call_id="nobodys")]
        parts = [] if error else [v1.Part(text=f"result {self.number}")]
        call_id = calls[which % len(calls)].call_id
        return v1.RunRequest(tool_result=v1.ToolResult(call_id=call_id, result=parts, error=error)), ""

    def make_response(self, which: int, late: bool, edited: bool, **fields: Any) -> Any:
        run = self.view.run
        asked = [request.input_id for request in run.pending_inputs] if run is not None else []
        if late or not asked:
            asked = [event.input_requested.input_id for event in self.log if event.HasField("input_requested")]
        asked = asked or ["nobodys"]
        response = v1.InputResponse(input_id=asked[which % len(asked)], **fields)
        if response.decision == v1.InputResponse.DECISION_ANSWER:
            response.answer = "That one."
            response.remember = v1.InputResponse.REMEMBER_ONCE
        elif response.decision == v1.InputResponse.DECISION_APPROVE and edited:
            response.edited_arguments = '{"edited": true}'
        return v1.RunRequest(input_response=response), ""

    def make_cancel(self, mode: v1.CancelCommand.Mode.ValueType, call: int | None, run_id: str) -> Any:
        cancel = v1.CancelCommand(mode=mode, reason="enough")
        if call is not None:
            calls = self.calls(late=call == 3) or [v1.ToolCall(call_id="nobodys")]
            cancel.call_id = calls[call % len(calls)].call_id
        return v1.RunRequest(cancel=cancel), f"{SESSION}/runs/{run_id}" if run_id else ""

    def make_update(self, op: str, key: str, if_version: str | None) -> Any:
        made = v1.StateOp(key=key)
        if op == "set":
            made.set.int_value = self.number
        elif op == "append":
            made.append.int_value = self.number
        elif op == "increment":
            made.increment = 2
        else:
            made.remove.SetInParent()
        update = v1.StateUpdate(ops=[made])
        if if_version is not None:
            update.if_version = version_of(self.log) - (if_version == "before")
        return v1.RunRequest(update_state=update), ""

    async def append(self, fields: Fields) -> None:
        request = v1.AppendMessagesRequest(
            parent=SESSION, messages=[said(fields["text"])], request_id=f"append-{self.number}"
        )
        if fields["if_last"] is not None:
            request.if_last_sequence = max(len(self.log) + fields["if_last"], 0)
        try:
            first = await self.ask(self.served.messages.AppendMessages, request)
        except grpc.aio.AioRpcError as refused:
            assert reason_of(refused) in {"SEQUENCE_MISMATCH", *self.gone()}
        else:
            try:
                assert await self.ask(self.served.messages.AppendMessages, request) == first
            except grpc.aio.AioRpcError as refused:
                assert reason_of(refused) in self.gone()

    def gone(self) -> set[str]:
        """How anything may be refused while the session is being deleted."""
        return {"SESSION_NOT_FOUND"} if self.deleting else set()

    async def send(self, command: v1.RunRequest, run: str, form: str) -> None:
        kind = command.WhichOneof("command") or ""
        known = command.command_id in self.results
        result: v1.CommandResult | str = "STORE_UNAVAILABLE"
        while result == "STORE_UNAVAILABLE":
            result = await (self.by_call if form == "SendCommand" else self.on_stream)(command, run)
        if isinstance(result, str) and result in self.gone():
            return
        if isinstance(result, str):
            assert result in REFUSALS[kind], f"{kind} was refused with {result}"
            assert not known, f"{kind} was accepted before, and its repeat refused with {result}"
            return
        assert result.disposition in ACCEPTED
        assert 0 < result.sequence
        try:
            assert result.sequence <= await self.head()
        except grpc.aio.AioRpcError as refused:
            assert reason_of(refused) in self.gone()
        again = result.disposition == v1.CommandResult.DISPOSITION_DUPLICATE
        assert again or not known
        if command.start.run_id and again and not known:
            return  # the run of another command was found
        assert self.results.setdefault(command.command_id, (command, result.sequence))[1] == result.sequence

    async def by_call(self, command: v1.RunRequest, run: str) -> v1.CommandResult | str:
        request = v1.SendCommandRequest(session=SESSION, run=run, command=command)
        try:
            return (await self.served.runs.SendCommand(request, metadata=self.metadata)).result
        except grpc.aio.AioRpcError as refused:
            return reason_of(refused)

    async def on_stream(self, command: v1.RunRequest, run: str) -> v1.CommandResult | str:
        """On a separate stream, attached to the run if there is one."""
        options = v1.WatchOptions(keep_open=True)
        call = self.served.runs.Run(metadata=self.metadata)
        await call.write(v1.RunRequest(attach=v1.AttachRun(name=run or SESSION, options=options)))
        try:
            await call.write(command)
            async for frame in call:
                if frame.HasField("result"):
                    refused = frame.result.disposition == v1.CommandResult.DISPOSITION_REFUSED
                    name = v1.ErrorReason.Name(frame.result.error.reason).removeprefix("ERROR_REASON_")
                    return name if refused else frame.result
        except grpc.aio.AioRpcError as missing:
            return reason_of(missing)
        finally:
            call.cancel()
        raise AssertionError("the stream ended without the command's result")

    async def answer_all(self, run: v1.Run) -> None:
        for request in list(run.pending_inputs):
            response = v1.InputResponse(input_id=request.input_id, decision=v1.InputResponse.DECISION_DENY)
            await self.by_call(v1.RunRequest(input_response=response), run.name)
        for call in list(run.pending_calls):
            await self.by_call(v1.RunRequest(tool_result=v1.ToolResult(call_id=call.call_id)), run.name)


class SqliteFiles:
    """Where the store is: in the last of a few files."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._files = 0

    def _file(self) -> Path:
        return self._folder / f"{self._files}.db"

    async def open(self) -> Store:
        """Opens the store as it is, or as it was at the last kill."""
        return await SqliteStore.open(self._file(), now)

    async def kill(self, uids: Sequence[str]) -> list[int]:
        """Lets the process that has the store open be as good as killed: whatever it still does to it is not seen by
        the next. Returns how many events each session has at that moment."""
        source = self._file()
        self._files += 1
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(self._file())) as new:
            old.backup(new)
            counting = "SELECT count(*) FROM events WHERE uid = ?"
            return [count for uid in uids for (count,) in new.execute(counting, (uid,))]

    async def remove(self) -> None:
        shutil.rmtree(self._folder)


class PostgresDatabase:
    """As SqliteFiles, in a database of PostgreSQL: the next owner refuses all that the one before still does."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._url = ""
        self._next: PostgresStore | None = None

    async def open(self) -> Store:
        if not self._url:
            self._url = await self._stack.enter_async_context(postgres.shared().empty_store())
        opened, self._next = self._next or await PostgresStore.open(self._url, now), None
        return opened

    async def kill(self, uids: Sequence[str]) -> list[int]:
        self._next = await PostgresStore.open(self._url, now)
        keys = [SessionKey(tenant, "case", uid) for tenant, uid in zip(TENANTS, uids, strict=True)]
        return [len(await read_all(self._next, key)) for key in keys]

    async def remove(self) -> None:
        await self._stack.aclose()


async def read_all(store: Store, key: SessionKey) -> list[v1.Event]:
    """The whole log of a session."""
    found = list[v1.Event]()
    while more := await store.read_events(key, len(found)):
        found += more
    return found


class SessionMachine(RuleBasedStateMachine):
    """Everything happens while a rule runs: in between, the loop does not run."""

    place: type[SqliteFiles | PostgresDatabase] = SqliteFiles

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.place()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.serving = AsyncExitStack()
        self.checked = 0
        self.do(self.begin())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, PATIENCE))

    # ---- the server

    async def begin(self) -> None:
        self.doors = the["doors"] = Doors()
        self.model = await self.stack.enter_async_context(OpenAIServer(self.doors.answer))
        self.provider = Lasting("test-key", self.model.url, "stub-1")
        self.stack.push_async_callback(self.provider.end)
        self.cases = {tenant: Case(tenant, self.doors) for tenant in TENANTS}
        await self.serve()
        agent = v1.Agent(llm=v1.LlmAgent(model="stub-1", tools=TOOLS.values(), max_model_calls=50))
        for case in self.cases.values():
            await case.ask(self.served.agents.CreateAgent, v1.CreateAgentRequest(agent_id="clerk", agent=agent))
            await case.make(self.served)

    async def serve(self) -> None:
        providers = {"openai": self.provider}
        toolbox = make_toolbox((__name__,), {})
        self.store = Unreliable(await self.kept.open())
        self.serving = AsyncExitStack()
        self.served: Running = await self.serving.enter_async_context(
            running(self.store.store, providers, toolbox=toolbox, grace=0.0)
        )

    async def until(self, come: Callable[[], bool]) -> None:
        watching = [task for case in self.cases.values() for task in case.watching]
        async with self.doors.changed:
            await self.doors.changed.wait_for(lambda: any(task.done() for task in watching) or come())
        for task in watching:
            if task.done():
                task.result()
                raise AssertionError("a watcher's stream ended")

    async def settle(self) -> None:
        """Waits until nothing continues by itself: the runs have ended or wait, or a call is held at a gate."""
        heads = [(case, await case.head()) for case in self.cases.values()]

        def still() -> bool:
            behind = any((case.view.last_sequence or 0) < head for case, head in heads)
            moves = any(case.moves() for case, _ in heads)
            return not behind and (not moves or self.doors.busy(self.model))

        await self.until(still)
        for case, _ in heads:
            case.keep()

    async def next_server(self, kill: bool) -> None:
        """Stops the server and opens the next one on its store; one that is killed on the store as it was at that
        moment, whatever the process still does to it afterwards."""
        counts = list[int]()
        cases = self.cases.values()
        for case in cases:
            case.keep()
        if kill:
            counts = await self.kept.kill([case.uid for case in cases])
            for case, count in zip(cases, counts, strict=True):
                assert count >= max(len(case.log), case.late.last_sequence or 0), "what was told is kept"
        for case in cases:
            await case.leave()
        await self.serving.aclose()
        if kill:
            for case, count in zip(cases, counts, strict=True):
                case.cut(count)
        await self.serve()
        for case in cases:
            case.follow(self.served)

    # ---- rules

    @rule(whose=WHOSE, command=COMMANDS, form=FORMS)
    def somebody_does(self, whose: str, command: tuple[str, Fields], form: str) -> None:
        async def work() -> None:
            await self.cases[whose].carry_out(*command, form)
            await self.settle()

        self.do(work())

    @rule(commands=st.lists(st.tuples(WHOSE, COMMANDS, FORMS), min_size=2, max_size=4))
    def several_do_at_once(self, commands: list[tuple[str, tuple[str, Fields], str]]) -> None:
        async def work() -> None:
            await asyncio.gather(*(self.cases[whose].carry_out(*command, form) for whose, command, form in commands))
            await self.settle()

        self.do(work())

    @rule(whose=WHOSE, text=TEXTS, on_busy=st.sampled_from([QUEUE, INTERRUPT, ROLLBACK]), state=st.none() | NUMBERS)
    def a_run_begins(self, whose: str, text: str, on_busy: v1.StartRun.OnBusy.ValueType, state: int | None) -> None:
        """Besides `somebody_does`, so that there is mostly one."""
        fields = {"text": text, "on_busy": on_busy, "run_id": "", "state": state}
        self.do(self.in_peace(whose, "start", fields))

    @rule(whose=WHOSE, starts=st.lists(st.tuples(TEXTS, NUMBERS), min_size=2, max_size=3))
    def starts_wait_in_line(self, whose: str, starts: list[tuple[str, int]]) -> None:
        """Each has its own state, which is set when it starts."""

        async def work() -> None:
            for text, state in starts:
                fields = {"text": text, "on_busy": QUEUE, "run_id": "", "state": state}
                await self.cases[whose].carry_out("start", fields, "SendCommand")
            await self.settle()

        self.do(work())

    @rule(whose=WHOSE, answer=ANSWERS)
    def what_waits_is_answered(self, whose: str, answer: tuple[str, Fields]) -> None:
        """Besides `somebody_does`, so that runs go on."""
        kind, fields = answer
        self.do(self.in_peace(whose, kind, {**fields, "late": False}))

    async def in_peace(self, whose: str, kind: str, fields: Fields) -> None:
        await self.cases[whose].carry_out(kind, fields, "SendCommand")
        await self.settle()

    @rule()
    def the_doors_open(self) -> None:
        async def work() -> None:
            self.doors.open()
            await self.settle()

        self.do(work())

    @rule(whose=WHOSE, reads=st.booleans())
    def the_laggard_stops_or_reads_on(self, whose: str, reads: bool) -> None:
        case = self.cases[whose]
        (case.reads.set if reads else case.reads.clear)()

    @rule(fault=FAULTS, whose=WHOSE, command=COMMANDS, form=FORMS)
    def the_store_fails_meanwhile(
        self, fault: tuple[str, Mode, int, int], whose: str, command: tuple[str, Fields], form: str
    ) -> None:
        """At this command, or at what follows from it, now or later."""
        method, mode, nth, times = fault
        self.store.fail(method, mode, nth=nth, times=times)
        self.somebody_does(whose, command, form)

    @rule(whose=WHOSE, work=st.none() | TEXTS, meanwhile=st.lists(st.tuples(COMMANDS, FORMS), max_size=2))
    def the_session_is_deleted_and_made_again(
        self, whose: str, work: str | None, meanwhile: list[tuple[tuple[str, Fields], str]]
    ) -> None:
        """Under its name, while callers still mean the one before."""

        async def again() -> None:
            case = self.cases[whose]
            if work is not None:
                await self.in_peace(whose, "start", {"text": work, "on_busy": INTERRUPT, "run_id": "", "state": 1})
            case.deleting = True
            await asyncio.gather(case.delete(), *(case.carry_out(*command, form) for command, form in meanwhile))
            case.deleting = False
            await case.make(self.served)
            await self.settle()

        self.do(again())

    @rule(kill=st.booleans(), whose=WHOSE, work=st.none() | TEXTS, command=st.none() | COMMANDS)
    def the_server_is_started_again(
        self, kill: bool, whose: str, work: str | None, command: tuple[str, Fields] | None
    ) -> None:
        """Perhaps when there is work for sure, or when a command has just been answered and all is still on its way."""

        async def again() -> None:
            if work is not None:
                await self.in_peace(whose, "start", {"text": work, "on_busy": INTERRUPT, "run_id": "", "state": None})
            if command is not None:
                await self.cases[whose].carry_out(*command, "SendCommand")
            await self.next_server(kill)
            await self.settle()

        self.do(again())

    # ---- what always holds

    @invariant()
    def everything_sent_is_in_the_log(self) -> None:
        self.do(self.compare_all())

    async def compare_all(self) -> None:
        for case in self.cases.values():
            await self.compare(case)
        requests = self.model.requests
        for request in requests[self.checked :]:
            check_well_formed(request)
        self.checked = len(requests)
        assert len(self.doors.effects) == len(set(self.doors.effects)), "an attempt takes effect once"

    async def compare(self, case: Case) -> None:
        """With what the services tell, at one moment at which nothing happens in between."""
        served, view = self.served, case.view
        while True:
            session = await case.ask(served.sessions.GetSession, v1.GetSessionRequest(name=SESSION))
            listing = v1.ListMessagesRequest(parent=SESSION, page_size=1000, show_superseded=True)
            messages = list((await case.ask(served.messages.ListMessages, listing)).messages)
            state = await case.ask(served.state.GetState, v1.GetStateRequest(name=STATE))
            runs = (await case.ask(served.runs.ListRuns, v1.ListRunsRequest(parent=SESSION, page_size=1000))).runs
            head = session.last_sequence
            await self.until(lambda head=head: (view.last_sequence or 0) >= head)  # type: ignore[misc]
            if view.last_sequence == head == await case.head():
                break
        case.keep()
        assert [event.sequence for event in case.log] == list(range(1, head + 1))
        assert list(view.messages.values()) == messages
        assert view.state == {key: entry.value for key, entry in state.entries.items()}
        assert version_of(case.log) == state.version
        assert view.runs == {run.name: run for run in runs}
        assert view.queued == list(session.queued_commands)
        assert view.remembered == dict(session.remembered)
        under_way = [run.name for run in runs if run.state in {v1.Run.STATE_RUNNING, v1.Run.STATE_WAITING}]
        assert under_way == ([session.active_run] if session.active_run else [])
        check_log(case.log)
        if case.reads.is_set():
            await self.until(lambda: (case.late.last_sequence or 0) >= head)
            assert known(case.late) == known(view), "who lags comes to the same"
        app = await case.ask(served.state.GetState, v1.GetStateRequest(name=APP))
        assert app.version == case.app_version, "the state of an app is its tenant's"
        sessions = await case.ask(served.sessions.ListSessions, v1.ListSessionsRequest())
        assert [row.uid for row in sessions.sessions] == [case.uid]

    # ---- the end

    def teardown(self) -> None:
        try:
            self.do(self.finish())
        finally:
            self.do(self.kept.remove())
            self.runner.close()

    async def finish(self) -> None:
        """Brings every run to an end, as callers would who answer all that they are asked."""
        cases = self.cases.values()
        try:
            self.doors.open(always=True)
            for case in cases:
                case.reads.set()
                while waiting := [run for run in case.view.runs.values() if run.state not in ENDED]:
                    for run in waiting:
                        await case.answer_all(run)
                    await self.settle()
            await self.compare_all()
            for case in cases:
                check_ends(case.log, case.results)
        finally:
            for case in cases:
                await case.leave()
            await self.serving.aclose()
            await self.stack.aclose()
        store = await self.kept.open()
        try:
            for case in cases:
                session = await store.find_session(case.tenant, "case")
                assert session is not None
                kept = await read_all(store, SessionKey(case.tenant, "case", session.uid))
                assert [event.sequence for event in kept] == [event.sequence for event in case.log]
        finally:
            await store.close()


def known(view: SessionView) -> list[Any]:
    """What a view knows of the log."""
    return [view.last_sequence, view.messages, view.state, view.runs, view.queued, view.remembered]


def version_of(log: list[v1.Event]) -> int:
    return sum(event.state_changed.state == STATE for event in log)


def check_log(log: list[v1.Event]) -> None:
    """A run has at most one end and does nothing after it; a call is in a message before it starts or ends, ends at
    most once, and does not start after that."""
    asked: dict[str, str] = {}
    done: set[str] = set()
    ended: set[str] = set()
    for event in log:
        assert not event.run or event.run not in ended, f"{event.run} goes on after its end"
        if event.run_state_changed.state in ENDED:
            ended.add(event.run)
        for part in event.message_added.parts:
            if part.HasField("tool_call"):
                assert part.tool_call.call_id not in asked
                asked[part.tool_call.call_id] = event.run
                if part.tool_call.outcome not in {v1.ToolCall.OUTCOME_PENDING, v1.ToolCall.OUTCOME_RUNNING}:
                    done.add(part.tool_call.call_id)
        for call in calls_told(event):
            assert asked.get(call.call_id) == event.run, "a call is its run's, and was asked for"
            assert call.call_id not in done, f"{call.call_id} has its end"
            if event.HasField("tool_finished"):
                done.add(call.call_id)


def calls_told(event: v1.Event) -> Iterator[v1.ToolCall]:
    if event.HasField("tool_started"):
        yield event.tool_started
    elif event.HasField("tool_finished"):
        yield event.tool_finished


def plain_state(view: SessionView) -> dict[str, bytes]:
    return {key: value.SerializeToString() for key, value in view.state.items()}


def check_ends(log: list[v1.Event], results: Mapping[str, tuple[v1.RunRequest, int]]) -> None:
    """When all runs have ended: each once, every call with its one outcome, all that was queued taken up or dropped by
    name, and what a rewind took back is what was since its run began."""
    runs = {event.run for event in log if event.run}
    assert Counter(event.run for event in log if event.run_state_changed.state in ENDED) == dict.fromkeys(runs, 1)
    view = SessionView()
    was: dict[int, dict[str, bytes]] = {0: {}}
    begun: dict[str, int] = {}
    taken = {(event.run, event.cause_id) for event in log if event.HasField("message_added")}
    dropped = {(event.run, name) for event in log for name in event.run_state_changed.dropped_commands}
    rewound = None
    for event in log:
        if event.HasField("run_started"):
            begun[event.run] = event.sequence
            if rewound is not None:
                assert plain_state(view) == was[rewound], "the state is as it was"
                rewound = None
        view.apply(event)
        was[event.sequence] = plain_state(view)
        if event.HasField("rewound"):
            assert event.rewound.to_sequence == begun[event.rewound.run] - 1
            rewound = event.rewound.to_sequence
        if event.command_queued.HasField("input"):
            place = (event.run, event.cause_id)
            assert (place in taken) != (place in dropped), f"{place} is taken up or named as dropped"
    for message in view.messages.values():
        assert message.status != v1.Message.STATUS_IN_PROGRESS
        for part in message.parts:
            open_outcomes = {v1.ToolCall.OUTCOME_PENDING, v1.ToolCall.OUTCOME_RUNNING}
            assert part.tool_call.outcome not in open_outcomes, f"{part.tool_call.call_id} has no outcome"
    for command_id, (command, sequence) in results.items():
        causes = [event for event in log if event.cause_id == command_id]
        assert causes, f"{command.WhichOneof('command')} was accepted at {sequence} and is not in the log"


class PostgresMachine(SessionMachine):
    """The same on PostgreSQL."""

    place = PostgresDatabase


def played(examples: int) -> settings:
    """So many histories of twenty steps."""
    return settings(
        max_examples=examples,
        stateful_step_count=20,
        deadline=None,
        phases=[Phase.generate],  # to shrink what goes wrong takes many minutes; it is shown as it was found
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


TestSession = SessionMachine.TestCase
TestSession.settings = played(12)
TestSessionOnPostgres = PostgresMachine.TestCase
TestSessionOnPostgres.settings = played(4)

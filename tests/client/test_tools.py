"""Tools, people and steering through the client, against a real server: what a function sees, and how often."""

import asyncio
import dataclasses
import json
import logging
import pickle
import threading
import typing
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import grpc
import pytest
from notecase import (
    CallContext,
    Client,
    NotecaseError,
    Retry,
    RunStream,
    RunWaiting,
    Tool,
    ToolFailure,
    calls,
    text_of,
    v1,
)
from notecase.calls import Turns
from notecase_server.tools import functions as tools_in_the_server
from pydantic import BaseModel, field_validator

from tests.client.conftest import QUICK
from tests.client.proxy import Proxy
from tests.support.openai_server import OpenAIServer, reply, tool_calls
from tests.support.server import Running

KEEP_OPEN = v1.WatchOptions(keep_open=True)


class Paper(NamedTuple):
    """What a test's function was called with."""

    query: str
    limit: int


class Desk:
    """A tool that tells when it is called and answers when it may."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[Paper] = asyncio.Queue()
        self.release = asyncio.Event()
        self.cancelled = 0
        self.answered = 0

    async def search(self, query: Annotated[str, "a word"], limit: int = 3) -> str:
        """Searches the papers."""
        self.asked.put_nowait(Paper(query, limit))
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.answered += 1
        return f"{query}: nothing"

    @property
    def calls(self) -> int:
        return self.asked.qsize() + self.answered + self.cancelled


@pytest.fixture
def desk() -> Desk:
    return Desk()


SEARCH = tool_calls(("search", '{"query": "violin"}'))
PAY = tool_calls(("pay", '{"cents": 900}'))


def pay(cents: int) -> str:
    """Pays."""
    return f"paid {cents}"


ASKED_PAY = Tool(pay, requires_approval=True)


def results(model: OpenAIServer, request: int = -1) -> list[str]:
    """Returns the results of its calls that the model got."""
    return [message["content"] for message in model.requests[request]["messages"] if message["role"] == "tool"]


async def until(stream: RunStream, kind: str) -> v1.Event:
    async for event in stream:
        if event.WhichOneof("payload") == kind:
            return event
    raise AssertionError(f"the stream ended without {kind}")


async def finish(stream: RunStream) -> str:
    async for _ in stream:
        pass
    return text_of(stream.result.reply)


async def held(client: Client, session: str) -> v1.Run:
    """The session's newest run, as the server has it."""
    return (await client.runs.ListRuns(v1.ListRunsRequest(parent=session))).runs[0]


async def test_functions_are_declared_called_and_answered(client: Client, session: str, model: OpenAIServer) -> None:
    """The model gets a schema from their hints; they are called with Python's values; their results are sent back."""
    seen: list[object] = []

    def weigh(thing: Annotated[str, "what to weigh"], times: float = 1) -> dict[str, float]:
        """Weighs a thing."""
        seen.append((thing, times, threading.current_thread() is threading.main_thread()))
        return {"kg": 0.5}

    async def ask(whom: list[str]) -> str:
        seen.append(whom)
        return "Nobody knows."

    model.script(
        tool_calls(("weigh", '{"thing": "violin", "times": 2}'), ("ask", '{"whom": ["Ada", "Zoë"]}')), reply("Light.")
    )
    async with client.run("How heavy?", session=session, tools=[weigh, ask]) as run:
        kinds = [event.WhichOneof("payload") async for event in run if event.sequence]
    assert text_of(run.result.reply) == "Light."
    assert sorted(seen, key=str) == [("violin", 2.0, False), ["Ada", "Zoë"]]
    assert results(model) == ['{"kg": 0.5}', "Nobody knows."]
    assert kinds.count("tool_started") == kinds.count("tool_finished") == 2
    told = {tool["function"]["name"]: tool["function"] for tool in model.requests[0]["tools"]}
    assert told["weigh"]["description"] == "Weighs a thing."
    assert told["weigh"]["parameters"]["properties"]["thing"] == {"type": "string", "description": "what to weigh"}
    assert run.result.tool_calls == 2
    assert await client.runs.GetRun(v1.GetRunRequest(name=run.name)) == run.result


async def test_a_function_may_know_which_call_it_answers(client: Client, model: OpenAIServer) -> None:
    """By a parameter that the model does not see: whose it is, the same key on every attempt, and another for each
    call."""
    session = (await client.create_session("detective", user="ada")).name
    seen: list[CallContext] = []

    def pay(cents: int, call: CallContext) -> str:
        """Pays."""
        seen.append(call)
        return call.idempotency_key

    async def refund(cents: int, call: CallContext | None = None) -> None:
        assert call is not None
        seen.append(call)

    model.script(
        tool_calls(("pay", '{"cents": 9}'), ("pay", '{"cents": 7}'), ("refund", '{"cents": 2}')), reply("Paid.")
    )
    async with client.run("Pay.", session=session, tools=[pay, refund]) as run:
        started = {event.tool_started.call_id async for event in run if event.HasField("tool_started")}
    uid = (await client.sessions.GetSession(v1.GetSessionRequest(name=session))).uid
    assert started == {call.call_id for call in seen}
    assert 3 == len(started)
    assert {(session, uid, "users/ada", run.name, 1)} == {
        (call.session, call.session_uid, call.user, call.run, call.attempt) for call in seen
    }
    assert {f"{uid}/{call_id}" for call_id in started} == {call.idempotency_key for call in seen}
    told = {
        tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in model.requests[0]["tools"]
    }
    assert [["cents"], ["cents"]] == [list(told["pay"]), list(told["refund"])]

    def misplaced(call: tools_in_the_server.CallContext) -> None:
        raise AssertionError(call)

    with pytest.raises(TypeError, match=r"a tool here takes notecase\.CallContext"):
        client.run("Hello", session=session, tools=[misplaced])


async def test_calls_at_once_run_at_once(client: Client, session: str, model: OpenAIServer) -> None:
    """Coroutines and threads: each of these waits for the other of its kind."""
    both, threads = asyncio.Barrier(2), threading.Barrier(2)

    async def meet(name: str) -> str:
        await both.wait()
        return name

    def block(name: str) -> str:
        threads.wait()
        return name

    calls = [(tool, f'{{"name": "{name}"}}') for tool in ("meet", "block") for name in "ab"]
    model.script(tool_calls(*calls), reply("Met."))
    answer = await client.invoke("Meet", session=session, tools=[meet, block])
    assert answer.text == "Met."
    assert results(model) == ["a", "b", "a", "b"]


async def test_what_goes_wrong_in_a_function_is_for_the_model(
    client: Client, session: str, model: OpenAIServer
) -> None:
    """An exception, arguments that do not fit, a result that the service refuses: the run goes on with an error."""

    def broken() -> str:
        raise ValueError("no such paper")

    def strange() -> v1.Part:
        return v1.Part(refusal="I would rather not.")

    model.script(tool_calls(("broken", "{}"), ("broken", '{"x": 1}'), ("strange", "{}")), reply("So be it."))
    async with client.run("Try", session=session, tools=[broken, strange]) as run:
        finished = [event.tool_finished async for event in run if event.HasField("tool_finished")]
    assert {call.outcome for call in finished} == {v1.ToolCall.OUTCOME_FAILED}
    errors = {call.call_id: call.error for call in finished}
    calls = [part.tool_call for message in run.view.messages.values() for part in message.parts]
    first, second, third = (errors[call.call_id] for call in calls if call.call_id)
    assert first == "ValueError: no such paper"
    assert second == "The arguments do not fit: 'x' is not a property of the object, which may have none."
    assert third.startswith("The result was refused: ")


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("raised", "arguments", "told"),
    [
        (ToolFailure("x\udcff"), "{}", "x?"),
        (ExceptionGroup("", [ToolFailure("x"), ExceptionGroup("", [ToolFailure("y")])]), "{}", "x\ny"),
        (ExceptionGroup("two", [ToolFailure("x"), KeyError("y")]), "{}", "ExceptionGroup: two"),
        (ValueError("x\udcff"), "{}", "ValueError: x?"),
        (Speechless(), "{}", "Speechless"),
        (None, "{}", "TypeError: the result, of type str, cannot be sent: "),
        (None, r'{"\udcff": 1}', "The arguments do not fit: "),
        (None, r'{"word": 1, "\udcff": 1}', "The arguments do not fit: "),
    ],
)
async def test_an_answer_is_text_whatever_the_function_does(
    raised: Exception | None, arguments: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what has surrogates, which UTF-8 cannot encode: in an exception, a result and the arguments."""

    def work() -> str:
        if raised is not None:
            raise raised
        return "\udcff"

    # What pytest captures of the log goes from process to process as UTF-8.
    monkeypatch.setattr(logging.getLogger("notecase"), "disabled", True)
    call = v1.ToolCall(call_id="c", arguments=arguments)
    answer = await Tool(work).answer(call, CallContext(**PLACE, call_id="c", attempt=1))
    assert answer.error.startswith(told)
    assert not answer.result


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "raised",
    [SystemExit("usage"), BaseExceptionGroup("both", [SystemExit(1)]), KeyboardInterrupt(), GeneratorExit()],
    ids=repr,
)
async def test_a_function_cannot_end_the_program(
    raised: BaseException, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As argparse would at wrong arguments. Ctrl-C ends it, and what closes a coroutine closes it."""

    def work() -> str:
        raise raised

    async def work_here() -> str:
        raise raised

    answering = Tool(work_here if asynchronous else work).answer(
        v1.ToolCall(call_id="c", arguments="{}"), CallContext(**PLACE, call_id="c", attempt=1)
    )
    if asynchronous and isinstance(raised, KeyboardInterrupt | GeneratorExit):
        with pytest.raises(type(raised)):
            await answering
    else:
        assert type(raised).__name__ in (await answering).error
        assert "raised" in caplog.text


class Refused(BaseModel):
    word: str

    @field_validator("word")
    @classmethod
    def check(cls, word: str) -> str:
        return {"known": word}[word]


@dataclass
class Checked:
    word: str

    def __post_init__(self) -> None:
        if self.word != "known":
            raise LookupError("unknown word")


@pytest.mark.parametrize(
    ("hint", "argument", "told"),
    [
        (int, "1e999", "x must be an integer, not Infinity."),
        (Checked, '{"word": "other"}', "unknown word."),
        (list[Checked], '[{"word": "other"}]', "unknown word."),
        (Refused, '{"word": "other"}', "x: 'other'."),
    ],
)
async def test_arguments_that_cannot_be_read_are_for_the_model(hint: Any, argument: str, told: str) -> None:
    """Whatever the type's own code raises."""

    def work(x: Any) -> None:
        raise AssertionError(x)

    work.__annotations__["x"] = hint
    call = v1.ToolCall(call_id="c", arguments=f'{{"x": {argument}}}')
    answer = await Tool(work).answer(call, CallContext(**PLACE, call_id="c", attempt=1))
    assert f"The arguments do not fit: {told}" == answer.error


async def test_functions_that_hang_or_need_the_client_have_threads_of_their_own(served: Running) -> None:
    """asyncio's own pool, of one thread here, is for what the client itself does."""
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asyncio.get_running_loop().set_default_executor(pool)
        async with Client(served.address) as client:
            loop = asyncio.get_running_loop()

            def hang() -> None:
                release.wait()

            def upload() -> str:
                return asyncio.run_coroutine_threadsafe(client.upload(b"a", "text/plain"), loop).result().name

            context = CallContext(**PLACE, call_id="c", attempt=1)
            hanging = asyncio.create_task(Tool(hang).answer(v1.ToolCall(call_id="c"), context))
            uploads = [Tool(upload).answer(v1.ToolCall(call_id="c"), context) for _ in range(2)]
            assert {"blobs"} == {one.result[0].text.partition("/")[0] for one in await asyncio.gather(*uploads)}
            release.set()
            assert not (await hanging).error


async def test_calls_of_one_stream_in_threads_are_bounded(
    client: Client, session: str, model: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further calls wait. One that is cancelled has no place any more, although its thread goes on."""
    monkeypatch.setattr(calls, "THREADS", 2)
    release, before = threading.Event(), set(threading.enumerate())

    def hang(number: int) -> None:
        if number == 3:
            release.set()
        release.wait()

    async def count() -> int:
        return len([one for one in threading.enumerate() if one not in before and one.name == "notecase tool"])

    each = [("hang", f'{{"number": {number}}}') for number in (1, 2, 3)]
    model.script(tool_calls(*each, ("count", "{}")), reply("Done."))
    began: list[str] = []
    results: dict[str, str] = {}
    try:
        async with asyncio.timeout(60), client.run("Go", session=session, tools=[hang, count]) as run:
            async for event in run:
                if event.HasField("tool_started"):
                    began.append(event.tool_started.call_id)
                elif event.HasField("tool_finished"):
                    finished = event.tool_finished
                    results[finished.call_id] = finished.result[0].text if finished.result else "cancelled"
                    if len(results) == 1:
                        assert {began[-1]: "2"} == results
                        await run.cancel(call_id=began[0])
    finally:
        release.set()
    assert ["cancelled", "null", "null", "2"] == [results[call_id] for call_id in began]


PLACE = {"session": "sessions/s", "session_uid": "u", "user": "", "run": "sessions/s/runs/r"}

Alias = typing.NewType("Alias", CallContext)


@pytest.mark.parametrize(
    "hint",
    [
        Annotated[CallContext, "whose call it is"],
        Annotated[CallContext | None, "whose call it is"],
        Annotated[CallContext, "whose call it is"] | None,
        "Annotated[CallContext, 'whose call it is']",
        "CallContext | None",
    ],
    ids=str,
)
async def test_a_context_is_never_an_argument(hint: Any) -> None:
    def work(word: str, call: Any) -> str:
        assert isinstance(call, CallContext)
        return call.call_id

    work.__annotations__["call"] = hint
    tool = Tool(work)
    assert ["word"] == list(json.loads(tool.definition.parameters)["properties"])
    given = v1.ToolCall(call_id="c", arguments='{"word": "x"}')
    answer = await tool.answer(given, CallContext(**PLACE, call_id="c", attempt=1))
    assert [v1.Part(text="c")] == list(answer.result)
    assert ["word"] == list(json.loads(tools_in_the_server.PythonTool(work).parameters)["properties"])


@dataclasses.dataclass
class Order:
    call: CallContext


@pytest.mark.parametrize("hint", [list[CallContext], CallContext | int, tuple[CallContext, int], Alias, Order], ids=str)
def test_a_context_within_another_type_is_refused(hint: Any) -> None:
    """A model would write its fields."""

    def work(call: Any) -> None:
        raise AssertionError(call)

    work.__annotations__["call"] = hint
    with pytest.raises(TypeError, match=r"work cannot be a tool: .*has no JSON Schema"):
        Tool(work)


def test_results_are_kept_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with an outcome are forgotten first, and those never of which a stream has a task."""
    monkeypatch.setattr(calls, "KEPT_BYTES", 1000)
    monkeypatch.setattr(calls, "REMEMBERED", 4)
    turns = Turns()
    keys = [calls._Key("sessions/s/runs/r", f"c{number}", 1) for number in range(6)]

    def finish(key: calls._Key, size: int) -> None:
        turn = turns.begin(key)
        turn.result, turn.answered = (v1.ToolResult(error="x" * size) if size else None), not size
        turns.end(turn)

    executing = turns.begin(keys[0])
    executing.result = v1.ToolResult(error="x" * 900)
    finish(keys[1], 400)
    assert [keys[0]] == list(turns._turns)
    executing.result = None
    finish(keys[1], 400)
    finish(keys[2], 0)
    finish(keys[3], 400)
    assert keys[:4] == list(turns._turns)
    finish(keys[4], 400)
    assert [keys[0], keys[3], keys[4]] == list(turns._turns)
    finish(keys[2], 0)
    finish(keys[5], 0)
    assert [keys[0], keys[3], keys[4], keys[5]] == list(turns._turns)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ("x" * 10_000_000, "larger than 524288 bytes"),
        (object(), "of type object, cannot be sent"),
        (float("nan"), "of type float, cannot be sent"),
    ],
    ids=["10 MB", "no-JSON", "nan"],
)
async def test_the_model_reads_why_a_result_cannot_be_made(
    client: Client, session: str, model: OpenAIServer, made: object, told: str
) -> None:
    """The other functions are still called."""

    def make() -> Any:
        return made

    model.script(tool_calls(("make", "{}"), ("pay", '{"cents": 5}')), reply("So be it."))
    answer = await client.invoke("Try", session=session, tools=[make, pay])
    assert answer.text == "So be it."
    first, second = results(model)
    assert told in first
    assert second == "paid 5"


async def test_the_stream_goes_on_while_a_function_works(
    client: Client, session: str, model: OpenAIServer, desk: Desk
) -> None:
    """Events are handed out, and commands may be sent, between the call and its result."""
    model.script(SEARCH, reply("Done."))
    async with client.run("Search", session=session, tools=[desk.search]) as run:
        await until(run, "tool_started")
        assert await desk.asked.get() == Paper("violin", 3)
        sequence = await run.update_state({"seen": 1})
        assert (await until(run, "state_changed")).sequence == sequence
        desk.release.set()
        assert await finish(run) == "Done."
    assert results(model) == ["violin: nothing"]


async def test_only_functions_that_were_handed_in_are_called(
    client: Client, session: str, model: OpenAIServer, desk: Desk
) -> None:
    """Another call stays pending for a program that has its function; here the test answers it."""
    model.script(tool_calls(("search", '{"query": "a"}'), ("weigh", "{}")), reply("Done."))
    weigh = v1.Tool(name="weigh", client=v1.ClientTool())
    start = v1.StartRun(session=session, run_id="r1", client_tools=[Tool(desk.search).definition, weigh])
    start.messages.add(parts=[v1.Part(text="Go")])
    desk.release.set()
    async with RunStream(client.runs, v1.RunRequest(start=start), QUICK, tools=[desk.search]) as run:
        await until(run, "tool_finished")
        (pending,) = (await held(client, session)).pending_calls
        assert pending.tool == "weigh"
        assert run.waits_for_others
        first = await client.give_result(run.name, pending.call_id, {"kg": 1})
        assert await client.give_result(run.name, pending.call_id, {"kg": 1}) == first
        assert await finish(run) == "Done."
    assert results(model) == ["a: nothing", '{"kg": 1}']


async def test_a_tool_that_the_agent_declares_is_answered(client: Client, model: OpenAIServer, desk: Desk) -> None:
    """Not declared again by the run, and answered on attaching to a session too."""
    desk.release.set()
    search = Tool(desk.search, declare=False)
    llm = v1.LlmAgent(tools=[search.definition])
    await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="reader", agent=v1.Agent(llm=llm)))
    session = await client.create_session("agents/reader")
    model.script(SEARCH, reply("One."), SEARCH, reply("Two."))
    assert (await client.invoke("Search", session=session.name, tools=[search])).text == "One."
    async with client.attach(session.name, tools=[search], options=KEEP_OPEN) as watching:
        invoked = asyncio.create_task(client.invoke("Again", session=session.name))
        await until(watching, "tool_finished")
        await asyncio.gather(invoked, return_exceptions=True)
        while (await until(watching, "run_state_changed")).run_state_changed.state != v1.Run.STATE_SUCCEEDED:
            pass
    assert text_of(watching.result.reply) == "Two."
    assert desk.answered == 2


async def test_leaving_cancels_the_function_and_attaching_calls_it_again(
    client: Client, session: str, model: OpenAIServer, desk: Desk
) -> None:
    """The call waits in the server; a client that attaches with the function finds it."""
    model.script(SEARCH, reply("Done."))
    async with client.run("Search", session=session, tools=[desk.search]) as run:
        await until(run, "tool_started")
        await desk.asked.get()
    assert desk.cancelled == 1
    assert (await held(client, session)).state == v1.Run.STATE_WAITING
    desk.release.set()
    async with client.attach(run.name, run.last_sequence, tools=[desk.search]) as again:
        assert await finish(again) == "Done."
    assert (desk.answered, results(model)) == (1, ["violin: nothing"])


async def test_reading_a_log_calls_nothing(client: Client, session: str, model: OpenAIServer, desk: Desk) -> None:
    """Calls of the past are no calls."""
    model.script(SEARCH, reply("Done."))
    desk.release.set()
    await client.invoke("Search", session=session, tools=[desk.search])
    async with client.attach(session, 0, tools=[desk.search]) as log:
        kinds = [event.WhichOneof("payload") async for event in log]
    assert "tool_started" in kinds
    assert desk.answered == 1


async def test_a_call_that_is_sent_again_is_executed_once(
    client: Client, session: str, served: Running, model: OpenAIServer, desk: Desk
) -> None:
    """The connection breaks between the call and its result; the stream attaches again and receives the pending
    call."""
    model.script(SEARCH, reply("Done."))
    async with (
        Proxy(served.address) as proxy,
        Client(proxy.address, retry=QUICK) as behind,
        behind.run("Search", session=session, tools=[desk.search]) as run,
    ):
        await until(run, "tool_started")
        await desk.asked.get()
        proxy.cut()
        await client.put_state(session, "cut", True)
        await until(run, "state_changed")
        desk.release.set()
        assert await finish(run) == "Done."
    assert proxy.opened > 1
    assert (desk.answered, desk.cancelled, desk.asked.qsize()) == (1, 0, 0)


async def test_a_result_whose_answer_is_lost_counts_once(
    client: Client, session: str, served: Running, model: OpenAIServer, desk: Desk
) -> None:
    """It is sent again under the call's own id."""
    model.script(SEARCH, reply("Done."))
    async with (
        Proxy(served.address) as proxy,
        Client(proxy.address, retry=QUICK) as behind,
        behind.run("Search", session=session, tools=[desk.search]) as run,
    ):
        await until(run, "tool_started")
        await desk.asked.get()
        async with client.attach(run.name) as watching:
            proxy.deaf = True
            desk.release.set()
            await until(watching, "tool_finished")
            proxy.deaf = False
            proxy.cut()
        assert await finish(run) == "Done."
    assert desk.answered == 1
    assert results(model) == ["violin: nothing"]


@pytest.mark.parametrize("outage", [False, True], ids=["cut", "outage"])
async def test_a_result_that_could_not_be_sent_is_sent_again(
    client: Client, session: str, served: Running, model: OpenAIServer, outage: bool
) -> None:
    """The connection breaks after the function's end. When it stays broken for longer than the client tries, the stream
    raises; a new one sends the result that is there, and does not execute the function again."""
    model.script(SEARCH, reply("Done."))
    async with Proxy(served.address) as proxy:
        executed = 0

        async def search(query: str) -> str:
            nonlocal executed
            executed += 1
            if executed == 1:
                proxy.away = outage
                proxy.cut()
            return f"{query}: nothing"

        soon = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100)]
        async with Client(proxy.address, retry=Retry(tries=5, first_delay=0.05), options=soon) as behind:
            async with behind.run("Search", session=session, tools=[search]) as run:
                if outage:
                    with pytest.raises(NotecaseError):
                        await finish(run)
                else:
                    assert await finish(run) == "Done."
            proxy.away = False
            if outage:
                async with behind.attach(run.name, tools=[search]) as again:
                    assert await finish(again) == "Done."
    assert executed == 1
    assert results(model) == ["violin: nothing"]


async def test_a_result_waits_until_the_server_has_room(
    client: Client, session: str, model: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results of many calls may come at once."""
    send, full = client.runs.SendCommand, [NotecaseError(grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED", "Full.")]

    def refused(request: v1.SendCommandRequest) -> Any:
        if full:
            raise full.pop()
        return send(request)

    def search(query: str) -> str:
        return query

    model.script(SEARCH, reply("Done."))
    monkeypatch.setattr(client.runs, "SendCommand", refused)
    assert (await client.invoke("Search", session=session, tools=[search])).text == "Done."
    full.append(NotecaseError(grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED", "Full."))
    with pytest.raises(NotecaseError, match="Full"):
        await client.cancel(session)


async def test_two_streams_of_a_client_execute_a_call_once(
    client: Client, session: str, model: OpenAIServer, desk: Desk
) -> None:
    """The second waits: it takes over when the first one leaves before the answer."""
    model.script(SEARCH, reply("Done."))
    async with client.attach(session, tools=[desk.search], options=KEEP_OPEN) as watching:
        async with client.run("Search", session=session, tools=[desk.search]) as run:
            await until(run, "tool_started")
            await desk.asked.get()
            await until(watching, "tool_started")
            assert desk.asked.empty()
        assert desk.cancelled == 1
        assert await desk.asked.get() == Paper("violin", 3)
        desk.release.set()
        while (await until(watching, "run_state_changed")).run_state_changed.state != v1.Run.STATE_SUCCEEDED:
            pass
    assert (desk.answered, desk.asked.qsize()) == (1, 0)


async def test_the_first_result_wins_and_the_others_are_let_go(
    client: Client, session: str, served: Running, model: OpenAIServer, desk: Desk
) -> None:
    """Two processes have the function; one is still at it when the other has answered, and is cancelled."""
    model.script(SEARCH, reply("Done."))
    quick = Desk()
    async with (
        Client(served.address, retry=QUICK) as other,
        client.run("Search", session=session, tools=[desk.search]) as run,
    ):
        await until(run, "tool_started")
        await desk.asked.get()
        quick.release.set()
        async with other.attach(run.name, tools=[quick.search]) as theirs:
            assert await finish(theirs) == "Done."
        assert await finish(run) == "Done."
    assert (desk.cancelled, desk.answered, quick.answered) == (1, 0, 1)


class Overheard:
    """The run stub, of whose refusals a test hears; or with commands that all fail."""

    def __init__(self, client: Client, failure: NotecaseError | None = None) -> None:
        self.WatchEvents = client.runs.WatchEvents
        self.refusals: asyncio.Queue[str] = asyncio.Queue()
        self._client = client
        self._failure = failure

    async def SendCommand(self, request: v1.SendCommandRequest) -> v1.SendCommandResponse:  # noqa: N802
        try:
            if self._failure is not None:
                raise self._failure
            return await self._client.runs.SendCommand(request)
        except NotecaseError as error:
            self.refusals.put_nowait(error.reason)
            raise

    def attach(self, run: str, *tools: Callable[..., Any], retry: Retry = QUICK) -> RunStream:
        first = v1.RunRequest(attach=v1.AttachRun(name=run))
        return RunStream(self, first, retry, tools=tools)  # type: ignore[arg-type]


async def test_a_result_that_comes_late_is_nothing(
    client: Client, session: str, model: OpenAIServer, desk: Desk
) -> None:
    """The function answers after the run was cancelled and before its stream knows: the result is refused, which is not
    an error."""
    model.script(SEARCH)
    overheard = Overheard(client)
    async with client.run("Search", session=session, tools=[desk.search]) as started:
        await until(started, "tool_started")
    async with overheard.attach(started.name, desk.search) as run:
        await desk.asked.get()
        await client.cancel(run.name, "enough")
        desk.release.set()
        assert await overheard.refusals.get() == "CALL_NOT_PENDING"
        assert await finish(run) == ""
    assert run.result.state == v1.Run.STATE_CANCELLED
    assert desk.answered == 1


async def test_a_cancelled_call_cancels_its_function(
    client: Client, session: str, model: OpenAIServer, desk: Desk
) -> None:
    """Only that call fails; the model reads the error, and the run continues."""
    model.script(SEARCH, reply("Without it, then."))
    async with client.run("Search", session=session, tools=[desk.search]) as run:
        started = await until(run, "tool_started")
        await desk.asked.get()
        await run.cancel("too slow", call_id=started.tool_started.call_id)
        assert await finish(run) == "Without it, then."
    assert (desk.cancelled, desk.answered) == (1, 0)


async def test_an_answer_that_cannot_be_sent_is_raised(
    client: Client, session: str, model: OpenAIServer, desk: Desk
) -> None:
    """By the iteration that waits for what will never come; the call stays open for others."""
    model.script(SEARCH)
    async with client.run("Search", session=session, tools=[desk.search]) as started:
        await until(started, "tool_started")
    away = NotecaseError(grpc.StatusCode.UNAVAILABLE, "", "nobody there")
    desk.release.set()
    async with Overheard(client, away).attach(started.name, desk.search, retry=Retry(tries=0)) as run:
        with pytest.raises(NotecaseError) as raised:
            await finish(run)
    assert raised.value is away
    assert (await held(client, session)).state == v1.Run.STATE_WAITING


async def test_a_function_that_cannot_be_a_tool_is_refused_when_handed_in(client: Client) -> None:
    """Before anything is sent."""

    def many(*words: str) -> None:
        raise AssertionError(words)

    with pytest.raises(TypeError, match="many cannot be a tool"):
        client.run("Hello", session="sessions/s", tools=[many])
    with pytest.raises(TypeError, match="many cannot be a tool"):
        client.attach("sessions/s", tools=[many])
    for declared in (v1.Tool(name="ask"), {"name": "ask"}):
        with pytest.raises(TypeError, match="with put_agent"):
            client.run("Hello", session="sessions/s", tools=[declared])  # type: ignore[list-item]


async def test_a_function_that_the_agent_has_names_its_cure(client: Client, session: str, model: OpenAIServer) -> None:
    """Another program put the agent, so this one does not know that it declares the function."""
    await client.put_agent("clerk", tools=[pay])
    async with Client(client.address, retry=QUICK) as other:
        with pytest.raises(NotecaseError, match=r"pass Tool\(function, declare=False\)") as refused:
            await other.invoke("Pay", agent="clerk", tools=[pay])
        assert "INVALID_FIELD" == refused.value.reason
        model.script(PAY, reply("Paid."))
        assert "Paid." == (await other.invoke("Pay", agent="clerk", tools=[Tool(pay, declare=False)])).text


@pytest.mark.parametrize(
    ("decide", "told"),
    [
        (lambda run, asked: run.approve(asked), "paid 900"),
        (lambda run, asked: run.approve(asked, {"cents": 8}), "paid 8"),
        (lambda run, asked: run.approve(asked, '{"cents": 7}'), "paid 7"),
        (lambda run, asked: run.deny(asked, "too much"), "too much"),
    ],
    ids=["approved", "edited", "edited as text", "denied"],
)
async def test_a_call_waits_for_approval_in_the_stream(
    client: Client,
    session: str,
    model: OpenAIServer,
    decide: Callable[[RunStream, str], Awaitable[int]],
    told: str,
) -> None:
    """The stream stays open; the loop can decide on an event `input_requested`."""
    model.script(PAY, reply("So be it."))
    async with client.run("Pay", session=session, tools=[ASKED_PAY]) as run:
        async for event in run:
            if event.HasField("input_requested"):
                await decide(run, event.input_requested.input_id)
    assert text_of(run.result.reply) == "So be it."
    (result,) = results(model)
    assert told in result
    assert await client.runs.GetRun(v1.GetRunRequest(name=run.name)) == run.result


async def test_what_waits_is_found_and_answered_from_elsewhere(
    client: Client, session: str, served: Running, model: OpenAIServer
) -> None:
    """Another process sees it among all that waits, decides, and needs neither the stream nor the function."""
    model.script(PAY, PAY, reply("Paid twice."))
    with pytest.raises(RunWaiting) as raised:
        await client.invoke("Pay", session=session, tools=[ASKED_PAY])
    async with Client(served.address, retry=QUICK) as other:
        (waiting,) = [run async for run in other.waiting()]
        assert waiting == raised.value.run
        (asked,) = waiting.pending_inputs
        assert (asked.kind, asked.call.tool) == (v1.InputRequest.KIND_APPROVAL, "pay")
        await other.approve(waiting.name, asked.input_id, remember=v1.InputResponse.REMEMBER_RUN)
        with pytest.raises(NotecaseError, match="INPUT_NOT_PENDING"):
            await other.deny(waiting.name, asked.input_id)
    async with client.attach(waiting.name, tools=[ASKED_PAY]) as run:
        assert await finish(run) == "Paid twice."
    (remembered,) = run.result.remembered.items()
    assert (remembered[0], remembered[1].tool, remembered[1].approved) == (asked.input_id, "pay", True)
    assert [found async for found in client.waiting()] == []


async def test_a_question_is_answered(client: Client, model: OpenAIServer) -> None:
    """The answer is the result of the call that asked."""
    tool = v1.Tool(name="ask", server=v1.ServerTool(function="ask_user"))
    agent = v1.Agent(llm=v1.LlmAgent(tools=[tool]))
    await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="curious", agent=agent))
    session = await client.create_session("agents/curious")
    model.script(tool_calls(("ask", '{"question": "Which violin?"}')), reply("That one."))
    async with client.run("Find it", session=session.name) as run:
        asked = (await until(run, "input_requested")).input_requested
        assert asked.prompt == "Which violin?"
        await run.answer(asked.input_id, "Près du quai 🎻")
        assert await finish(run) == "That one."
    assert results(model) == ["Près du quai 🎻"]


async def test_invoking_tells_when_a_run_waits_for_others(
    client: Client, session: str, model: OpenAIServer, desk: Desk
) -> None:
    """It waits for functions that were passed to it; for others and for people it would wait forever."""
    model.script(tool_calls(("search", '{"query": "a"}'), ("pay", '{"cents": 1}')), reply("Never."))
    desk.release.set()
    with pytest.raises(RunWaiting, match=r"waits for approval of pay: call approve or deny$") as raised:
        await client.invoke("Go", session=session, tools=[desk.search, ASKED_PAY])
    assert [one.call.tool for one in raised.value.run.pending_inputs] == ["pay"]
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


class Logged(logging.Handler):
    """Keeps the records of the logger "notecase", and wakes tasks that wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.facts: list[tuple[str, str]] = []
        """The run and the session of each."""
        self.any = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())
        self.facts.append((getattr(record, "run", ""), getattr(record, "session", "")))
        self.any.set()


@pytest.fixture
def logged() -> Iterator[Logged]:
    handler = Logged()
    logging.getLogger("notecase").addHandler(handler)
    yield handler
    logging.getLogger("notecase").removeHandler(handler)


async def test_a_wait_that_this_program_cannot_end_is_logged_once(
    client: Client, session: str, model: OpenAIServer, logged: Logged
) -> None:
    """A stream that waits in silence says for what, as the exception of `invoke` does."""
    model.script(PAY, reply("Paid."))
    with pytest.raises(RunWaiting) as raised:
        await client.invoke("Go", session=session, tools=[ASKED_PAY])
    async with client.attach(raised.value.run, tools=[ASKED_PAY]) as run:
        run.warn_after = 0
        following = asyncio.create_task(finish(run))
        await logged.any.wait()
        await client.put_state(session, "looked", True)  # an event that ends no wait
        await client.approve(run.name, raised.value.run.pending_inputs[0].input_id)
        assert "Paid." == await following
    assert [f"{raised.value}."] == logged.told
    assert [(run.name, session)] == logged.facts


async def test_a_wait_that_ends_soon_is_not_logged(
    client: Client, session: str, model: OpenAIServer, logged: Logged
) -> None:
    """An event in time prevents the warning, and a program that shows what a run waits for turns it off."""
    model.script(PAY, PAY, reply("Paid."))
    async with client.run("Go", session=session, tools=[ASKED_PAY]) as run:
        run.warn_after = 3600
        asked = (await until(run, "input_requested")).input_requested
        await run.approve(asked.input_id)
        asked = (await until(run, "input_requested")).input_requested
        run.warn_after = None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                while True:
                    await anext(run)
        await run.approve(asked.input_id)
        assert "Paid." == await finish(run)
    assert [] == logged.told


async def test_a_run_is_steered(client: Client, session: str, model: OpenAIServer, desk: Desk) -> None:
    """What is said comes before the next model call, or when the run would have ended."""
    model.script(SEARCH, reply("Found."), reply("And again."))
    async with client.run("Search", session=session, tools=[desk.search]) as run:
        await until(run, "tool_started")
        await run.say("Only at night.")
        await client.say(run.name, "Thank you.", when=v1.UserInput.WHEN_FOLLOW_UP)
        desk.release.set()
        assert await finish(run) == "And again."
    said = [[m["content"] for m in request["messages"] if m["role"] == "user"] for request in model.requests]
    assert said == [["Search"], ["Search", "Only at night."], ["Search", "Only at night.", "Thank you."]]
    assert run.view.queued == []


async def test_a_run_stops_after_its_turn(client: Client, session: str, model: OpenAIServer, desk: Desk) -> None:
    """The call under way is awaited, the model is not asked again."""
    model.script(SEARCH)
    async with client.run("Search", session=session, tools=[desk.search]) as run:
        await until(run, "tool_started")
        await run.cancel("enough", after_turn=True)
        desk.release.set()
        await finish(run)
    assert (run.result.state, run.result.ending) == (v1.Run.STATE_CANCELLED, True)
    assert (desk.answered, len(model.requests)) == (1, 1)


async def test_a_run_waits_behind_another(client: Client, session: str, model: OpenAIServer, desk: Desk) -> None:
    """The stream of a queued run also has the events of the run before it, calls none of that run's functions, and ends
    with its own run."""
    model.script(SEARCH, reply("One."), reply("Two."))
    async with client.run("First", session=session, tools=[desk.search]) as first:
        await until(first, "tool_started")
        idle = Desk()
        queue = client.run("Second", session=session, tools=[idle.search], on_busy=v1.StartRun.ON_BUSY_QUEUE)
        async with queue as second:
            assert second.name != first.name
            desk.release.set()
            assert await finish(first) == "One."
            assert await finish(second) == "Two."
    assert list(second.view.runs)[-1] == second.name
    assert idle.calls == 0


async def test_limits_and_company_are_set(client: Client, session: str, model: OpenAIServer, desk: Desk) -> None:
    """As given to `run`; here the model may be asked once only."""
    model.script(SEARCH)
    desk.release.set()
    limits = v1.Limits(max_tool_calls=1, max_model_calls=1)
    with pytest.raises(NotecaseError, match="LIMIT_EXCEEDED"):
        await client.invoke("Search", session=session, tools=[desk.search], limits=limits, cancel_after=90.5)
    run = await held(client, session)
    assert (run.limits, run.disconnect.cancel_after.ToMilliseconds()) == (limits, 90_500)

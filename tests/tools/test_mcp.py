"""MCP servers as real processes: what their tools give, and that nothing of theirs takes the server with it."""

import asyncio
import json
import os
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import structlog
from notecase import v1
from notecase_server.errors import NotecaseError, tool_error
from notecase_server.tools import mcp_pipes
from notecase_server.tools.clock import Clock
from notecase_server.tools.contract import Function, Outcome, Toolbox
from notecase_server.tools.mcp_settings import McpServerSettings
from notecase_server.tools.outcome import MAX_ERROR, MAX_MEDIA, MAX_RESULT
from notecase_server.tools.toolbox import make_toolbox
from structlog.testing import capture_logs

from tests.support.mcp_process import TRANSPORTS, Http, at, over, stdio
from tests.support.mcp_server import PIXEL
from tests.tools.calls import Pose, Witness, context, nobody


@pytest.fixture(scope="module")
def http() -> Iterator[Http]:
    """Shared by all tests that leave it alive."""
    served = Http()
    yield served
    served.kill()


@asynccontextmanager
async def tools(settings: McpServerSettings) -> AsyncIterator[Toolbox]:
    box = make_toolbox([], {"t": settings})
    try:
        yield box
    finally:
        await box.close()


async def resolved(box: Toolbox, *only: str, prefix: str = "") -> dict[str, Function]:
    found = await box.resolve(v1.Tool(name=prefix, mcp=v1.McpTool(server="t", tools=only)))
    return {function.name: function for function in found}


async def call(box: Toolbox, name: str, /, **arguments: object) -> Outcome:
    return await run(box, (await resolved(box, name))[name], **arguments)


async def run(box: Toolbox, function: Function, /, **arguments: object) -> Outcome:
    return await box.call(function.implementation, arguments, context())


async def ask(box: Toolbox, name: str, pose: Pose, /, **arguments: object) -> Outcome:
    """Calls a tool that asks `pose`."""
    return await box.call((await resolved(box, name))[name].implementation, arguments, context(pose=pose))


@pytest.fixture(params=TRANSPORTS)
async def box(request: pytest.FixtureRequest, http: Http) -> AsyncIterator[Toolbox]:
    """The same server behind each transport."""
    async with tools(over(request.param, http)) as made:
        yield made


@pytest.fixture
def facts() -> Iterator[asyncio.Queue[str]]:
    """The names of log events, as they are logged."""
    heard: asyncio.Queue[str] = asyncio.Queue()

    def hear(logger: object, method: str, entry: structlog.typing.EventDict) -> structlog.typing.EventDict:
        heard.put_nowait(entry["event"])
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[hear])
    yield heard
    structlog.configure(**before)


@pytest.fixture
async def witness(tmp_path: Path) -> AsyncIterator[Witness]:
    async with Witness.listening(tmp_path / "witness") as listening:
        yield listening


async def test_a_tool_is_offered_with_its_description_and_schema_and_answers_text(box: Toolbox) -> None:
    function = (await resolved(box, "echo"))["echo"]
    assert "Says it again." == function.description
    assert {"text"} == set(json.loads(function.parameters)["properties"])
    assert Outcome([v1.Part(text="Grüße")]) == await run(box, function, text="Grüße")


async def test_content_of_every_kind_becomes_a_part(box: Toolbox) -> None:
    def data(media_type: str, filename: str = "") -> v1.Part:
        return v1.Part(data=v1.InlineData(data=PIXEL, media_type=media_type, filename=filename))

    plan = v1.FileUri(uri="https://example.org/plan.png", media_type="image/png", filename="plan")
    expected = [
        v1.Part(text="a text"),
        data("image/png"),
        data("audio/wav"),
        v1.Part(text="a memo"),
        data("application/octet-stream", "plan.pdf"),
        v1.Part(file=plan),
        v1.Part(text="notes: memo://notes\nAll of them."),
    ]
    assert Outcome(expected) == await call(box, "content")
    assert Outcome([v1.Part(text='{"found": 3}')]) == await call(box, "structured")


async def test_what_fails_is_an_error_for_the_model_and_the_connection_serves_on(box: Toolbox) -> None:
    """A tool that raises, one that raises a novel, one whose content is broken, one that is not called as it says, and
    one that is gone since it was listed."""
    assert Outcome(error="Error executing tool fail: no such page ") == await call(box, "fail")
    assert MAX_ERROR + 1 == len((await call(box, "fail", size=1000)).error)
    assert Outcome(error="The MCP server 't' gave content that cannot be read.") == await call(box, "broken_image")
    assert "Field required" in (await call(box, "echo")).error
    assert "surrogate" in (await call(box, "echo", text="\ud800")).error
    assert Outcome([v1.Part(text="still here")]) == await call(box, "echo", text="still here")


async def test_a_result_larger_than_the_log_takes_is_an_error(box: Toolbox) -> None:
    largest = 2 * MAX_RESULT - v1.Part(text="x" * MAX_RESULT).ByteSize()
    assert 1 == len((await call(box, "flood", size=largest)).parts)
    assert f"at most {MAX_RESULT}" in (await call(box, "flood", size=largest + 1)).error
    assert () == (await call(box, "flood", size=10_000_000)).parts
    assert Outcome([v1.Part(text="still here")]) == await call(box, "echo", text="still here")


async def test_an_image_may_be_larger_than_text(box: Toolbox) -> None:
    (part,) = (await call(box, "photograph", size=MAX_MEDIA)).parts
    assert ("image/jpeg", MAX_MEDIA) == (part.data.media_type, len(part.data.data))
    assert f"at most {MAX_MEDIA}" in (await call(box, "photograph", size=MAX_MEDIA + 1)).error


async def test_a_call_that_is_cancelled_is_cancelled_at_the_server(box: Toolbox, witness: Witness) -> None:
    waiting = asyncio.create_task(call(box, "wait", witness=witness.path))
    assert (await witness.heard()).startswith("started ")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert "cancelled" == await witness.heard()
    assert Outcome([v1.Part(text="still here")]) == await call(box, "echo", text="still here")


async def test_calls_run_side_by_side_and_each_gets_its_own_answer(box: Toolbox, witness: Witness) -> None:
    """A call that hangs holds up no other."""
    waiting = asyncio.create_task(call(box, "wait", witness=witness.path))
    assert (await witness.heard()).startswith("started ")
    texts = [f"text {number}" for number in range(10)]
    echoed = await asyncio.gather(*(call(box, "echo", text=text) for text in texts))
    assert [Outcome([v1.Part(text=text)]) for text in texts] == echoed
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_the_list_of_tools_is_requested_once(box: Toolbox) -> None:
    before = await call(box, "listings")
    await resolved(box)
    assert before == await call(box, "listings")


async def test_a_tool_that_is_added_later_is_found_at_once_if_the_server_announces_it(box: Toolbox) -> None:
    """The list is cached, and requested again on the server's notice."""
    name = f"grown_{uuid.uuid4().hex}"
    assert name not in await resolved(box)
    assert Outcome([v1.Part(text="grown")]) == await call(box, "grow", name=name)
    # By HTTP the notice comes on a separate stream, so it may come a moment later than the answer.
    while name not in await resolved(box):
        await call(box, "echo", text="")
    assert Outcome([v1.Part(text="here")]) == await call(box, name, text="here")
    assert [True, False] == [box.changes([server]) > 0 for server in ("t", "another")]


async def test_names_are_filtered_prefixed_and_refused_when_unknown(box: Toolbox) -> None:
    assert ["pages_echo", "pages_flood"] == list(await resolved(box, "flood", "echo", prefix="pages"))
    with pytest.raises(NotecaseError, match=r"The MCP server 't' has no tool 'absent', 'gone'\.") as refused:
        await resolved(box, "gone", "echo", "absent")
    assert v1.ERROR_REASON_TOOL_ERROR == refused.value.reason
    for function in (await resolved(box, "flood", prefix="pages")).values():
        assert v1.ToolBinding(mcp=v1.McpBinding(server="t", tool="flood")) == function.implementation


async def test_a_name_that_is_too_long_is_shortened_and_called_by_its_own(box: Toolbox) -> None:
    (name,) = await resolved(box, "echo", prefix="p" * 64)
    assert (64, True) == (len(name), name.startswith("ppp"))
    function = (await resolved(box, "echo", prefix="p" * 64))[name]
    assert Outcome([v1.Part(text="there")]) == await run(box, function, text="there")


async def test_a_tool_that_its_server_no_longer_has_fails_the_call(box: Toolbox) -> None:
    gone = v1.ToolBinding(mcp=v1.McpBinding(server="t", tool="renamed_since"))
    assert "renamed_since" in (await box.call(gone, {}, context())).error


async def test_a_process_killed_in_mid_call_is_an_error_and_the_next_call_has_a_new_one(witness: Witness) -> None:
    async with tools(stdio()) as box:
        waiting = asyncio.create_task(call(box, "wait", witness=witness.path))
        pid = int((await witness.heard()).removeprefix("started "))
        os.kill(pid, signal.SIGKILL)
        lost = "The answer of the MCP server 't' was lost; the call may have taken effect, or not."
        assert Outcome(error=lost) == await waiting
        assert Outcome([v1.Part(text="back")]) == await call(box, "echo", text="back")


async def test_a_process_that_ends_between_calls_is_started_again_unnoticed(facts: asyncio.Queue[str]) -> None:
    """Not one call is lost to it."""
    async with tools(stdio()) as box:
        found = await resolved(box, "crash", "echo")
        assert "mcp_connected" == await facts.get()
        await run(box, found["crash"])
        assert "mcp_disconnected" == await facts.get()
        assert Outcome([v1.Part(text="back")]) == await run(box, found["echo"], text="back")
        assert "mcp_connected" == await facts.get()


@pytest.mark.parametrize(("transport", "then"), [("http", "was lost"), ("http 2026-07-28", "cannot be reached")])
async def test_a_url_that_dies_in_mid_call_is_an_error_and_serves_again_once_it_is_back(
    witness: Witness, transport: str, then: str
) -> None:
    """With sessions, what is asked next finds out that the server is gone."""
    served = Http()
    async with tools(over(transport, served)) as box:
        echo, wait = (await resolved(box, "echo", "wait")).values()
        waiting = asyncio.ensure_future(run(box, wait, witness=witness.path))
        assert (await witness.heard()).startswith("started ")
        served.kill()
        assert "may have taken effect, or not" in (await waiting).error
        assert then in (await run(box, echo, text="nobody is there")).error
        served.start()
        assert Outcome([v1.Part(text="back")]) == await run(box, echo, text="back")
    served.kill()


async def test_a_session_that_the_server_forgot_is_opened_again(facts: asyncio.Queue[str]) -> None:
    """A server of the protocol's earlier versions answers 404 after a restart."""
    served = Http("--sessions")
    async with tools(at(served.url)) as box:
        echo = (await resolved(box, "echo"))["echo"]
        assert "mcp_connected" == await facts.get()
        served.kill()
        served.start()
        assert "" != (await run(box, echo, text="to the old session")).error
        assert {"mcp_session_gone", "mcp_disconnected"} == {await facts.get(), await facts.get()}
        assert Outcome([v1.Part(text="back")]) == await run(box, echo, text="back")
    served.kill()


async def test_a_list_is_requested_again_when_the_connection_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("notecase_server.tools.mcp.LIST_SECONDS", 0)
    served = Http("--sessions")
    async with tools(at(served.url)) as box:
        before = list(await resolved(box))
        served.kill()
        served.start()
        assert before == list(await resolved(box))
    served.kill()


async def test_a_url_is_sent_the_configured_headers_and_what_makes_an_effect_happen_once(http: Http) -> None:
    async with tools(at(http.url, headers={"Authorization": "Bearer secret"})) as box:
        told = json.loads((await call(box, "about")).parts[0].text)
    assert "Bearer secret" == told["headers"]["authorization"]
    assert f"{context().session_uid}/call-1" == told["meta"]["notecase/idempotency_key"]
    assert 2 == told["meta"]["notecase/attempt"]


async def test_a_process_has_what_the_operator_gave_it_and_none_of_this_ones_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("NOTECASE_STORE", "secret")
    async with tools(stdio(env={"TOKEN": "given"})) as box:
        held = json.loads((await call(box, "environment")).parts[0].text)
    assert "given" == held["TOKEN"]
    assert os.environ["PATH"] == held["PATH"]
    basics = {"HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER"}
    python = {"LC_CTYPE"}  # set by the interpreter itself
    assert set() == set(held) - basics - python - {"TOKEN"}


async def test_other_output_of_a_process_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The protocol's library would quote it; the operator may have it in a file."""
    kept = tmp_path / "stderr"
    async with tools(stdio(stderr=str(kept))) as box:
        assert Outcome([v1.Part(text="said")]) == await call(box, "babble")
    assert "to standard error\n" == kept.read_text()
    async with tools(stdio()) as box:
        await call(box, "babble")
    assert [] == caplog.records
    assert "to standard error" not in capfd.readouterr().err


ANSWERS = {
    "accept red": v1.InputResponse(decision=v1.InputResponse.DECISION_ANSWER, answer='{"colour": "red"}'),
    "decline": v1.InputResponse(decision=v1.InputResponse.DECISION_DENY, reason="none"),
    "cancel": v1.InputResponse(decision=v1.InputResponse.DECISION_CANCEL),
}


@pytest.mark.parametrize("told", [*ANSWERS, "withdrawn"])
async def test_a_question_of_a_tool_has_a_flat_form_and_three_answers(http: Http, told: str) -> None:
    posed: list[tuple[str, dict[str, Any]]] = []

    async def pose(question: str, schema: str) -> v1.InputResponse:
        posed.append((question, json.loads(schema)))
        return ANSWERS.get(told, v1.InputResponse())

    async with tools(over("http", http)) as box:
        outcome = await ask(box, "paint", pose, what="fence")
    assert Outcome([v1.Part(text="cancel" if told == "withdrawn" else told)]) == outcome
    ((question, schema),) = posed
    assert "Which colour for the fence?" == question
    assert ("object", False, ["colour"]) == (schema["type"], schema["additionalProperties"], schema["required"])
    assert ["red", "blue"] == schema["properties"]["colour"]["enum"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_tool_that_returns_its_question_is_called_again_with_the_answer(http: Http, transport: str) -> None:
    """Written so, it asks whatever the version of the protocol."""

    async def pose(question: str, schema: str) -> v1.InputResponse:
        return ANSWERS["accept red"]

    async with tools(over(transport, http)) as box:
        assert Outcome([v1.Part(text="red varnish")]) == await ask(box, "varnish", pose)


async def test_a_tool_that_sends_its_question_cannot_where_the_settings_ask_for_the_next_protocol(http: Http) -> None:
    async with tools(over("http 2026-07-28", http)) as box:
        assert "elicitation/create" in (await ask(box, "paint", nobody)).error


async def test_a_server_without_a_handshake_is_spoken_to_in_the_next_protocol() -> None:
    served = Http("--sessionless")
    async with tools(over("http", served)) as box:
        assert Outcome([v1.Part(text="here")]) == await call(box, "echo", text="here")
    served.kill()


async def test_a_question_that_leads_to_a_url_is_declined_and_one_with_a_deep_form_refused(http: Http) -> None:
    async with tools(over("http", http)) as box:
        assert Outcome([v1.Part(text="decline")]) == await ask(box, "pay", nobody)
        assert "'address'" in (await ask(box, "deliver", nobody)).error
        assert Outcome([v1.Part(text="still here")]) == await call(box, "echo", text="still here")


async def test_a_question_that_cannot_be_asked_is_an_error_for_its_tool(http: Http) -> None:
    async def pose(question: str, schema: str) -> v1.InputResponse:
        raise tool_error("A call may ask 32 questions.")

    async with tools(over("http", http)) as box:
        assert "A call may ask 32 questions." in (await ask(box, "paint", pose)).error


@pytest.mark.parametrize("transport", ["http", "stdio"])
async def test_the_time_for_a_call_is_paused_while_its_tool_asks(
    http: Http, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks: list[Clock] = []

    class Seen(Clock):
        def __init__(self, seconds: float | None) -> None:
            super().__init__(seconds)
            clocks.append(self)

    async def pose(question: str, schema: str) -> v1.InputResponse:
        assert [None] == [clock.until for clock in clocks]
        return ANSWERS["cancel"]

    monkeypatch.setattr("notecase_server.tools.mcp.Clock", Seen)
    async with tools(over(transport, http)) as box:
        assert Outcome([v1.Part(text="cancel")]) == await ask(box, "paint", pose)


@pytest.mark.parametrize("transport", ["http", "stdio"])
async def test_each_of_several_calls_asks_its_own_user(http: Http, transport: str) -> None:
    """Both are under way before either asks, and the answers come in the other order."""
    asked: dict[str, str] = {}
    both = asyncio.Barrier(2)

    def user(name: str) -> Pose:
        async def pose(question: str, schema: str) -> v1.InputResponse:
            asked[name] = question
            await both.wait()
            return v1.InputResponse(decision=v1.InputResponse.DECISION_ANSWER, answer=f'{{"colour": "{name}"}}')

        return pose

    async with tools(over(transport, http)) as box:
        paint = (await resolved(box, "paint"))["paint"].implementation
        of = {name: replace(context(pose=user(name)), session_uid=name, call_id=name) for name in ("red", "blue")}
        outcomes = await asyncio.gather(*(box.call(paint, {"what": name}, where) for name, where in of.items()))
    assert {"red": "Which colour for the red?", "blue": "Which colour for the blue?"} == asked
    assert ["accept red", "accept blue"] == [outcome.parts[0].text for outcome in outcomes]


async def test_over_pipes_that_tell_nothing_only_the_calls_of_one_run_may_ask(witness: Witness) -> None:
    """A server that does not hand on the trace of a request. A question of one user is never shown to another."""

    async def pose(question: str, schema: str) -> v1.InputResponse:
        return ANSWERS["accept red"]

    async with tools(stdio(env={"OTEL_PROPAGATORS": "none"})) as box:
        wait = (await resolved(box, "wait"))["wait"].implementation
        waiting = asyncio.create_task(box.call(wait, {"witness": witness.path}, context(pose=pose)))
        assert (await witness.heard()).startswith("started ")
        assert Outcome([v1.Part(text="accept red")]) == await ask(box, "paint", pose)
        paint = (await resolved(box, "paint"))["paint"].implementation
        other = replace(context(pose=nobody), session_uid="another")
        refused = await box.call(paint, {}, other)
        assert "it is not known which of them asks" in refused.error
        waiting.cancel()
        await asyncio.wait([waiting])
        assert "cancelled" == await witness.heard()
        assert Outcome([v1.Part(text="accept red")]) == await box.call(paint, {}, replace(other, pose=pose))


async def test_a_question_that_was_taken_for_another_calls_is_asked_again_when_that_has_ended(witness: Witness) -> None:
    async def pose(question: str, schema: str) -> v1.InputResponse:
        return ANSWERS["accept red"]

    async def ended(question: str, schema: str) -> v1.InputResponse:
        waiting.cancel()
        await asyncio.wait([waiting])
        return v1.InputResponse()

    async with tools(stdio(env={"OTEL_PROPAGATORS": "none"})) as box:
        wait = (await resolved(box, "wait"))["wait"].implementation
        waiting = asyncio.create_task(box.call(wait, {"witness": witness.path}, context(pose=ended)))
        assert (await witness.heard()).startswith("started ")
        assert Outcome([v1.Part(text="accept red")]) == await ask(box, "paint", pose)


@pytest.mark.parametrize(
    "settings",
    [
        McpServerSettings(command="a-command-that-is-not-there"),
        McpServerSettings(command=sys.executable, args=("-c", "print('no protocol at all')")),
        McpServerSettings(command=sys.executable, args=("-c", "import sys; sys.stdin.read()"), connect_timeout=0.2),
        stdio(cwd="/a/folder/that/is/not/there"),
        stdio(stderr="/a/folder/that/is/not/there"),
    ],
    ids=["no command", "no protocol", "no answer", "no folder", "no file"],
)
async def test_a_process_that_cannot_be_started_is_a_tool_error_without_the_cause(
    settings: McpServerSettings,
) -> None:
    async with tools(settings) as box:
        with pytest.raises(NotecaseError) as refused:
            await resolved(box)
        assert v1.ERROR_REASON_TOOL_ERROR == refused.value.reason
        assert "The MCP server 't' cannot be reached." == refused.value.message


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; sys.exit(3)", {"errors": ["OutputEnded"], "exit_code": 3}),
        ("import os, sys; os.close(1); sys.stdin.read()", {"errors": ["OutputEnded"], "exit_code": 0}),
        ("import os, signal; os.close(1); signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.pause()", {}),
    ],
    ids=["ends", "closes its output", "has to be killed"],
)
async def test_the_log_says_that_a_program_ended_and_with_which_exit_code(
    monkeypatch: pytest.MonkeyPatch, code: str, told: dict[str, object]
) -> None:
    monkeypatch.setattr(mcp_pipes, "EXIT_SECONDS", 60 if told else 0.2)
    with capture_logs() as lines:
        async with tools(McpServerSettings(command=sys.executable, args=("-c", code), connect_timeout=60)) as box:
            with pytest.raises(NotecaseError, match="cannot be reached"):
                await resolved(box)
    (line,) = [line for line in lines if line["event"] == "mcp_unreachable"]
    expected = {"event": "mcp_unreachable", "log_level": "warning", "server": "t", "errors": ["OutputEnded"]}
    assert expected | told == line


async def test_the_log_says_that_there_is_no_such_program() -> None:
    with capture_logs() as lines:
        async with tools(McpServerSettings(command="./clock-mcp", connect_timeout=60)) as box:
            with pytest.raises(NotecaseError, match="cannot be reached"):
                await resolved(box)
    (line,) = [line for line in lines if line["event"] == "mcp_unreachable"]
    assert (["FileNotFoundError"], "There is no program ./clock-mcp.") == (line["errors"], line["problem"])


@pytest.mark.parametrize("answers", [True, False], ids=["silent", "refused"])
async def test_a_url_that_cannot_be_reached_is_a_tool_error(answers: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if not answers:
            listening.close()
        url = f"http://127.0.0.1:{listening.getsockname()[1] if answers else 9}/mcp"
        async with tools(McpServerSettings(url=url, connect_timeout=0.2)) as box:
            with pytest.raises(NotecaseError, match="cannot be reached"):
                await resolved(box)


async def test_a_call_that_takes_longer_than_its_server_is_given_fails_and_is_cancelled(witness: Witness) -> None:
    began = asyncio.create_task(witness.heard())
    for seconds in (0.2, 2, 20):
        async with tools(stdio(timeout=seconds)) as box:
            outcome = await call(box, "wait", witness=witness.path)
            assert Outcome(error=f"The MCP server 't' did not answer within {seconds} seconds.") == outcome
            if began.done():
                assert (await began).startswith("started ")
                assert "cancelled" == await witness.heard()
                break
            # The machine was so slow that the call was given up before it had begun.
    assert began.done()


async def test_closing_ends_the_process_and_the_calls_and_refuses_later_ones(witness: Witness) -> None:
    async with tools(stdio()) as box:
        waiting = asyncio.create_task(call(box, "wait", witness=witness.path))
        pid = int((await witness.heard()).removeprefix("started "))
        await asyncio.gather(box.close(), box.close())
        assert "" != (await waiting).error
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        with pytest.raises(NotecaseError, match="stopping"):
            await resolved(box)


async def test_closing_does_not_wait_for_a_server_that_never_answers() -> None:
    async with tools(McpServerSettings(command=sys.executable, args=("-c", "import sys; sys.stdin.read()"))) as box:
        waiting = asyncio.create_task(resolved(box))
        await asyncio.sleep(0)  # it has requested a connection
        await box.close()
        with pytest.raises(NotecaseError, match="cannot be reached"):
            await waiting


async def test_closing_while_its_program_is_started_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    program, begun, go = "import sys; sys.stdin.read(-7)", asyncio.Event(), asyncio.Event()
    connect = asyncio.open_unix_connection

    async def slow(**how: Any) -> Any:
        begun.set()
        await go.wait()
        return await connect(**how)

    monkeypatch.setattr(asyncio, "open_unix_connection", slow)
    async with tools(McpServerSettings(command=sys.executable, args=("-c", program))) as box:
        waiting = asyncio.create_task(resolved(box))
        await begun.wait()
        closing = asyncio.create_task(box.close())
        for _ in range(3):  # the caller of close has requested the end by then
            await asyncio.sleep(0)
        go.set()
        await closing
        with pytest.raises(NotecaseError):
            await waiting
        assert not [child for child in psutil.Process().children() if program in child.cmdline()]


async def test_many_who_come_at_once_share_one_connection(facts: asyncio.Queue[str]) -> None:
    async with tools(stdio()) as box:
        waiting = [asyncio.create_task(resolved(box, "echo")) for _ in range(8)]
        await asyncio.sleep(0)
        waiting.pop().cancel()  # who leaves takes nothing from the others
        found = await asyncio.gather(*waiting)
        assert 7 == len(found)
    assert ["mcp_connected", "mcp_disconnected"] == [await facts.get(), await facts.get()]
    assert facts.empty()

"""Results that are larger than a model takes: a turn goes on, the log keeps all of them, and the model reads on."""

import json
import re
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from notecase import v1
from notecase_server.engine.results import PREVIEW_BYTES, READ_BYTES, READ_RESULT, SHOWN_BYTES, TOGETHER_BYTES
from notecase_server.models.openai import OpenAIProvider
from notecase_server.store.contract import PAGE_BYTES
from notecase_server.tools.functions import tool
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import log_of, reason_of, said
from tests.support.openai_server import Answer, Json, OpenAIServer, error, reply, tool_calls
from tests.support.server import Running, running

TAKEN = 60_000
"""Bytes of messages that the model takes."""


def page(number: int, size: int) -> str:
    """A page: its characters are of several lengths in UTF-8."""
    line = f"page {number} · ünïcödé 😀\n"
    return line * (size // len(line.encode()))


@tool(name="page")
def turned(number: int, size: int) -> str:
    """Turns to that page."""
    return page(number, size)


@pytest.fixture
async def served(store_url: str, model: OpenAIServer) -> AsyncIterator[Running]:
    providers = {"openai": OpenAIProvider("test-key", model.url, "stub-1")}
    async with running(store_url, providers, toolbox=make_toolbox((__name__,), {})) as server:
        yield server


def asks(*pages: tuple[int, int]) -> Answer:
    return tool_calls(*(("page", json.dumps({"number": number, "size": size})) for number, size in pages))


def reads(result: str, **span: object) -> Answer:
    return tool_calls((READ_RESULT, json.dumps({"result": result, **span})))


def results_in(body: Json) -> list[str]:
    return [message["content"] for message in body["messages"] if message["role"] == "tool"]


def names_in(body: Json) -> list[str]:
    return re.findall(r"result '([^']+)'", "\n".join(results_in(body)))


def offered(body: Json) -> list[str]:
    return [tool["function"]["name"] for tool in body.get("tools", [])]


def limited(answer: Callable[[Json], Answer]) -> Callable[[Json], Answer]:
    """A model that refuses what is longer than it takes."""

    def told(body: Json) -> Answer:
        size = len(json.dumps(body["messages"], ensure_ascii=False).encode())
        refusal = f"This model's maximum context length is {TAKEN} bytes, your messages have {size}."
        return error(400, refusal, code="context_length_exceeded") if size > TAKEN else answer(body)

    return told


async def opened(served: Running, *tools: v1.Tool) -> str:
    function = v1.Tool(name="page", server=v1.ServerTool(function="page"))
    agent = v1.Agent(llm=v1.LlmAgent(tools=[function, *tools], max_model_calls=100))
    made = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=agent))
    session = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=made.name)))
    return str(session.name)


async def ask(served: Running, session: str) -> v1.Run:
    start = v1.StartRun(session=session, messages=[said("Read them.")])
    answer: v1.InvokeResponse = await served.runs.Invoke(v1.InvokeRequest(start=start))
    return answer.run


@pytest.mark.parametrize(
    ("at_once", "size"),
    [(1, 20_000), (1, 200_000), (1, 300_000), (4, 200_000), (20, 20_000), (20, 200_000), (20, 300_000)],
)
async def test_a_turn_of_twenty_large_results_goes_on(at_once: int, size: int, store_url: str) -> None:
    """One after the other and in one reply; some are shown, some in part, some left out; the log has them whole."""
    read: list[str] = []

    def answer(body: Json) -> Answer:
        results = results_in(body)
        if len(results) < 20:
            return asks(*((len(results) + number, size) for number in range(at_once)))
        if len(results) == 20:
            assert READ_RESULT in offered(body)
            return reads(names_in(body)[0], offset=0, length=100)
        read.append(results[-1])
        return reply("Done.")

    async with OpenAIServer(limited(answer)) as model:
        providers = {"openai": OpenAIProvider("test-key", model.url, "stub-1")}
        async with running(store_url, providers, toolbox=make_toolbox((__name__,), {})) as served:
            session = await opened(served)
            run = await ask(served, session)
            assert v1.Run.STATE_SUCCEEDED == run.state, run.error
            assert read[0].startswith(page(0, size).encode()[:90].decode())
            log = await log_of(served, session)
            kept = [event.tool_finished for event in log if event.tool_finished.tool == "page"]
            for number, call in enumerate(kept):
                (part,) = call.result
                whole = page(number, size)
                assert (part.blob.size_bytes or len(part.text.encode())) == len(whole.encode())
                assert part.text in ("", whole)


def whole_of(call: v1.ToolCall) -> int:
    """Bytes of a call's result, wherever they are kept."""
    return sum(part.blob.size_bytes or len((part.text or part.json).encode()) for part in call.result)


async def calls_of(served: Running, session: str) -> list[v1.ToolCall]:
    """The calls of the first reply, which fits into a page with what they came to."""
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    (message, *_) = [message for message in listed.messages if message.role == v1.Message.ROLE_ASSISTANT]
    assert message.ByteSize() < PAGE_BYTES
    return [part.tool_call for part in message.parts]


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ([SHOWN_BYTES - 50] * 4, [None] * 4),
        ([SHOWN_BYTES - 100 * number for number in range(1, 21)], [PREVIEW_BYTES] * 19 + [None]),
        (
            [100, 31_000, 30_000, 5_000, 31_500, 20_000, 29_000],
            [None, None, None, None, PREVIEW_BYTES, None, None],
        ),
        ([900] * 300, [436] * 300),
    ],
    ids=["as much as fits", "twenty", "the largest first", "hundreds"],
)
async def test_results_of_one_reply_are_shown_together_within_a_bound(
    served: Running, model: OpenAIServer, sizes: list[int], shown: list[int | None]
) -> None:
    """Of the largest it is shown how they begin, each time the same; the log has them whole, in one page."""
    session = await opened(served)
    model.script(asks(*enumerate(sizes)), reply("ok"), reply("ok"))
    for _ in range(2):
        assert v1.Run.STATE_SUCCEEDED == (await ask(served, session)).state
    told = results_in(model.requests[1])
    texts = [text.rsplit("\n[Bytes", 1)[0] for text in told]
    assert sum(len(text.encode()) for text in texts) <= TOGETHER_BYTES
    expected = [page(number, size) for number, size in enumerate(sizes)]
    for text, whole, most in zip(texts, expected, shown, strict=True):
        assert whole.startswith(text)
        assert 0 <= (most or len(whole.encode())) - len(text.encode()) < 4
    assert told == results_in(model.requests[2])
    assert [len(whole.encode()) for whole in expected] == [whole_of(call) for call in await calls_of(served, session)]


@pytest.mark.parametrize("by", ["tools", "a caller", "a person"])
async def test_results_of_one_reply_fit_into_a_page_together(served: Running, model: OpenAIServer, by: str) -> None:
    """Each just below what a message keeps to itself; what does not fit is kept aside, and nothing fails."""
    tools = {
        "a caller": v1.Tool(name="weigh", client=v1.ClientTool()),
        "a person": v1.Tool(name="weigh", server=v1.ServerTool(function="ask_user")),
    }
    session = await opened(served, *([tools[by]] if by in tools else []))
    size = 250_000
    model.script(asks(*[(7, size)] * 20) if by == "tools" else tool_calls(*[("weigh", "{}")] * 20), reply("ok"))
    run = await ask(served, session)
    for call in run.pending_calls:
        given = v1.ToolResult(call_id=call.call_id, result=[v1.Part(json=f'"{"x" * size}"')])
        await send(served, session, v1.RunRequest(tool_result=given))
    for asked in run.pending_inputs:
        answer = v1.InputResponse(input_id=asked.input_id, decision=v1.InputResponse.DECISION_ANSWER, answer="y" * size)
        await send(served, session, v1.RunRequest(input_response=answer))
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=10**6))
    assert v1.Run.STATE_SUCCEEDED == ended.state, ended.error
    calls = await calls_of(served, session)
    assert {v1.ToolCall.OUTCOME_SUCCEEDED} == {call.outcome for call in calls}
    assert [{"tools": len(page(7, size).encode()), "a caller": size + 2, "a person": size}[by]] * 20 == [
        whole_of(call) for call in calls
    ]


async def send(served: Running, session: str, command: v1.RunRequest) -> None:
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))


async def test_errors_of_one_reply_fit_into_a_page_together(served: Running, model: OpenAIServer) -> None:
    """Those that come when it is full are cut."""
    session = await opened(served, v1.Tool(name="weigh", client=v1.ClientTool()))
    model.script(tool_calls(*[("weigh", "{}")] * 20), reply("ok"))
    run = await ask(served, session)
    for call in run.pending_calls:
        await send(served, session, v1.RunRequest(tool_result=v1.ToolResult(call_id=call.call_id, error="e" * 65_000)))
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name, after_sequence=10**6))
    assert v1.Run.STATE_SUCCEEDED == ended.state
    errors = [call.error for call in await calls_of(served, session)]
    assert ({"e" * 65_000}, {"e" * 100 + "…"}) == (set(errors[:15]), set(errors[16:]))


async def test_edited_arguments_fit_into_a_page_with_their_reply(served: Running, model: OpenAIServer) -> None:
    """Those that come when it is full are refused, and their calls go on waiting for an answer."""
    session = await opened(served, v1.Tool(name="weigh", client=v1.ClientTool(), requires_approval=True))
    model.script(tool_calls(*[("weigh", "{}")] * 4), reply("ok"))
    run = await ask(served, session)
    approve = v1.InputResponse.DECISION_APPROVE
    reasons = []
    for asked in run.pending_inputs:
        edited = json.dumps({"text": "x" * 400_000})
        answer = v1.InputResponse(input_id=asked.input_id, decision=approve, edited_arguments=edited)
        try:
            await send(served, session, v1.RunRequest(input_response=answer))
        except grpc.aio.AioRpcError as refused:
            reasons.append(reason_of(refused))
    assert ["PAYLOAD_TOO_LARGE"] * 2 == reasons
    waiting = await served.runs.GetRun(v1.GetRunRequest(name=run.name))
    assert (2, 2) == (len(waiting.pending_inputs), len(waiting.pending_calls))
    answer = v1.InputResponse(
        input_id=waiting.pending_inputs[0].input_id, decision=approve, edited_arguments='{"a": 1}'
    )
    await send(served, session, v1.RunRequest(input_response=answer))
    await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))


async def test_what_is_read_at_once_is_bounded(served: Running, model: OpenAIServer) -> None:
    session = await opened(served)
    model.script(asks((7, 400_000)), reply("ok"))
    await ask(served, session)
    (name,) = names_in(model.requests[-1])
    spans = [json.dumps({"result": name, "offset": at * READ_BYTES}) for at in range(6)]
    model.script(tool_calls(*((READ_RESULT, span) for span in spans)), reply("ok"))
    await ask(served, session)
    read = results_in(model.requests[-1])[1:]
    assert (
        page(7, 400_000).encode().startswith("".join(text.rsplit("\n[", 1)[0] for text in read[:4]).encode()[:99_999])
    )
    assert {"That is too much for one reply. Read it in the next one."} == set(read[4:])


@pytest.mark.parametrize("size", [SHOWN_BYTES + 100, 300_000], ids=["text", "a blob"])
async def test_a_result_is_read_whole_piece_by_piece(served: Running, model: OpenAIServer, size: int) -> None:
    """Between characters, whatever the requested bytes; the part that was read is shown completely."""
    session = await opened(served)
    whole = page(7, size)
    model.script(asks((7, size)), reply("ok"))
    await ask(served, session)
    (shown,) = results_in(model.requests[-1])
    text, told = shown.rsplit("\n", 1)
    assert whole.startswith(text)
    assert PREVIEW_BYTES - 4 < len(text.encode()) <= PREVIEW_BYTES
    match = re.fullmatch(r"\[Bytes 0 to (\d+) of (\d+)\. Read on with read_result: result '(.+)', offset \1\.\]", told)
    assert match is not None
    assert (len(text.encode()), len(whole.encode())) == (int(match[1]), int(match[2]))
    while len(text.encode()) < len(whole.encode()):
        model.script(reads(match[3], offset=len(text.encode())), reply("ok"))
        await ask(served, session)
        piece, told = results_in(model.requests[-1])[-1].rsplit("\n", 1)
        assert READ_BYTES - 4 < len(piece.encode()) or told.endswith(", its end.]")
        text += piece
    assert text == whole


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"result": "{name}", "offset": 10**9}, "The offset is outside the result, which has "),
        ({"result": "{name}", "offset": -1}, "The offset is outside the result, which has "),
        ({"result": "{name}", "offset": "many"}, "The arguments do not match the tool's parameters."),
        ({"result": "{name}9"}, "There is no result "),
        ({"result": "{other}"}, "There is no result "),
        ({"result": "blobs/" + "0" * 64}, "There is no result "),
        ({"result": ["x"]}, "There is no result "),
        ({}, "There is no result ''"),
        ([], "There is no result ''"),
        ({"result": "{name}", "offset": "1", "length": 7.0}, "age 7 \n[Bytes 1 to "),
        ({"result": "{name}", "length": 1}, "page\n[Bytes 0 to 4 of "),
    ],
)
async def test_the_model_reads_why_read_result_failed(
    served: Running, model: OpenAIServer, arguments: object, told: str
) -> None:
    names = []
    for _ in range(2):
        session = await opened(served)
        model.script(asks((7, 40_000)), reply("ok"))
        await ask(served, session)
        names += names_in(model.requests[-1])
    text = json.dumps(arguments).replace("{other}", names[0]).replace("{name}", names[1])
    model.script(tool_calls((READ_RESULT, text)), reply("ok"))
    run = await ask(served, session)
    assert v1.Run.STATE_SUCCEEDED == run.state
    assert results_in(model.requests[-1])[-1].startswith(told)


async def test_the_tool_is_offered_where_something_was_left_out_alone(served: Running, model: OpenAIServer) -> None:
    session = await opened(served)
    model.script(asks((1, SHOWN_BYTES - 100)), reads("x.0"), reply("ok"))
    await ask(served, session)
    assert ["page"] == offered(model.requests[-1])
    assert f"There is no tool '{READ_RESULT}'." == results_in(model.requests[-1])[-1]


async def test_a_tool_of_that_name_takes_its_place(served: Running, model: OpenAIServer) -> None:
    """Then results are shown whole, there being no way to read on."""
    session = await opened(served, v1.Tool(name=READ_RESULT, client=v1.ClientTool()))
    model.script(asks((1, 100_000)), reply("ok"))
    await ask(served, session)
    assert ["page", READ_RESULT] == offered(model.requests[-1])
    assert [page(1, 100_000)] == results_in(model.requests[-1])

"""Transient failures of a provider are retried in the same way, whenever they come; others fail the run at once. A
reply that was cut at a limit runs none of its calls."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from notecase import v1
from notecase_server.models.contract import Delta, Finish, ModelRequest, Text, Used

from tests.support.openai_server import DONE, Answer, OpenAIServer, chunk, error, event, reply, stream, tool_calls
from tests.support.server import Running, running

OVERLOADED = event({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
ROLE = chunk({"role": "assistant", "content": ""})


async def invoke(served: Running, session: str, text: str = "Go", **start: Any) -> v1.InvokeResponse:
    message = v1.Message(parts=[v1.Part(text=text)])
    return await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session, messages=[message], **start)))


@pytest.mark.parametrize(
    "trouble",
    [
        error(503, "Loading model"),
        error(429, "slow down", headers={"retry-after": "0"}),
        Answer((ROLE,)).cut(after=0),
        Answer((ROLE,)).cut(after=1),
        Answer((ROLE, chunk({"content": "Hi"}))).cut(after=2),
        Answer((OVERLOADED,)),
        Answer((b": wait\n\n", ROLE, OVERLOADED)),
        Answer((chunk({"content": "Hi"}) + OVERLOADED,)),
        Answer((chunk({"content": "Hi"}), OVERLOADED, DONE)),
        Answer((chunk({"content": "Hi"}), chunk(finish="abort"), DONE)),
        Answer((DONE,)),
        stream(),
        stream(finish="tool_calls"),
        Answer((b'{"error": {"message": "busy", "code": 503}}',), headers={"Content-Type": "application/json"}),
    ],
    ids=[
        "status 503",
        "status 429",
        "cut before the head",
        "cut behind the role",
        "cut behind text",
        "an event first",
        "an event behind comments",
        "an event in one read with text",
        "an event behind text",
        "a finish reason",
        "done alone",
        "an empty reply",
        "calls that never came",
        "a document with status 200",
    ],
)
async def test_what_passes_is_repeated_whenever_it_comes(
    served: Running, session: str, model: OpenAIServer, trouble: Answer
) -> None:
    model.script(trouble, reply("Hi there"))
    done = await invoke(served, session)
    assert (done.run.state, done.reply.parts[0].text) == (v1.Run.STATE_SUCCEEDED, "Hi there")
    assert model.requests[0] == model.requests[1]


async def test_a_call_that_the_provider_could_not_read_is_requested_again(
    served: Running, session: str, model: OpenAIServer
) -> None:
    unread = error(400, "Failed to call a function.", code="tool_use_failed")
    model.script(unread, unread, reply("never asked for"))
    done = await invoke(served, session)
    assert (done.run.error.reason, done.run.error.metadata["code"]) == (v1.ERROR_REASON_MODEL_ERROR, "tool_use_failed")
    assert len(model.requests) == 2


async def test_an_empty_reply_that_stays_is_a_typed_failure_that_names_the_reason(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """And what it took is counted, each time."""
    model.script(*[stream(finish="stop", usage={"prompt_tokens": 7, "completion_tokens": 1})] * 3)
    done = await invoke(served, session)
    assert done.run.error.reason == v1.ERROR_REASON_MODEL_UNAVAILABLE
    assert done.run.error.metadata["finish_reason"] == "stop"
    assert (done.run.usage.input_tokens, done.run.usage.output_tokens, done.run.usage.model_calls) == (21, 3, 3)


async def test_a_try_that_returned_nothing_does_not_count_as_a_model_call(served: Running, model: OpenAIServer) -> None:
    agent = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(max_model_calls=1))))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    model.script(error(500), error(500), reply("Hi"))
    done = await invoke(served, made.name)
    assert (done.run.state, done.run.usage.model_calls) == (v1.Run.STATE_SUCCEEDED, 1)


@pytest.mark.parametrize(
    ("headers", "message"),
    [({"retry-after": "3600"}, "wait"), ({}, "Rate limit reached. Please try again in 1h2m3.5s.")],
)
async def test_a_provider_that_asks_for_more_time_than_there_is_is_not_asked_again(
    served: Running, session: str, model: OpenAIServer, headers: dict[str, str], message: str
) -> None:
    model.script(error(429, message, headers=headers), reply("never asked for"))
    done = await invoke(served, session)
    assert done.run.error.reason == v1.ERROR_REASON_MODEL_UNAVAILABLE
    assert len(model.requests) == 1


async def test_a_limit_that_can_never_be_met_fails_at_once(served: Running, session: str, model: OpenAIServer) -> None:
    words = "Rate limit reached on tokens per min (TPM): Limit 10000, Requested 12000."
    model.script(error(429, words, code="rate_limit_exceeded"))
    done = await invoke(served, session)
    assert done.run.error.reason == v1.ERROR_REASON_MODEL_ERROR
    assert done.run.error.message == f"The request is larger than the provider allows: {words}"
    assert len(model.requests) == 1


async def test_a_run_can_be_cancelled_while_it_waits_to_repeat(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(error(503, headers={"retry-after": "50"}), reply("never asked for"))
    message = v1.Message(parts=[v1.Part(text="Go")])
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=session, messages=[message])))
    await model.request(0)
    await model.received[0].sent.wait()
    await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    assert ended.state == v1.Run.STATE_CANCELLED
    assert len(model.requests) == 1


@pytest.mark.parametrize("by", ["a cancel", "another start"])
async def test_what_a_call_took_that_a_halt_cuts_is_counted(
    served: Running, session: str, model: OpenAIServer, by: str
) -> None:
    """As far as its provider reported it: the newest report counts, once."""
    told = {"prompt_tokens": 50, "completion_tokens": 1}, {"prompt_tokens": 50, "completion_tokens": 4}
    counts = b"".join(chunk({"content": ""}, usage=usage) for usage in told)
    model.script(Answer((counts, chunk({"content": "Hi"}), asyncio.Event())), reply("Done."))
    call = served.runs.Run()
    await call.write(
        v1.RunRequest(start=v1.StartRun(session=session, messages=[v1.Message(parts=[v1.Part(text="Go")])]))
    )
    async for frame in call:
        if any(event.HasField("block_delta") for event in frame.batch.events):
            break
    (run,) = (await served.runs.ListRuns(v1.ListRunsRequest(parent=session))).runs
    if by == "a cancel":
        await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    else:
        await invoke(served, session, on_busy=v1.StartRun.ON_BUSY_INTERRUPT)
    ended = await served.runs.GetRun(v1.GetRunRequest(name=run.name))
    assert ended.state == v1.Run.STATE_CANCELLED
    assert ended.usage == v1.Usage(input_tokens=50, output_tokens=4, model_calls=1, model="stub-1", provider="openai")
    whole = (await served.sessions.GetSession(v1.GetSessionRequest(name=session))).usage
    assert whole.model_calls == (1 if by == "a cancel" else 2)


@pytest.mark.parametrize("finish", ["length", "MAX_TOKENS", "content_filter"])
async def test_a_reply_that_was_cut_runs_none_of_its_calls_and_the_model_is_shown_why(
    served: Running, model: OpenAIServer, finish: str
) -> None:
    """Not even those that are whole."""
    tool = v1.Tool(name="look", client=v1.ClientTool())
    agent = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(tools=[tool]))))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    cut = tool_calls(("look", '{"q":1}'), ("look", '{"q":'))
    pieces = tuple(
        piece.replace(b'"tool_calls"}', json.dumps(finish).encode() + b"}")
        for piece in cut.pieces
        if isinstance(piece, bytes)
    )
    model.script(Answer(pieces), reply("Shorter."))
    done = await invoke(served, made.name)
    assert (done.run.state, done.reply.parts[0].text) == (v1.Run.STATE_SUCCEEDED, "Shorter.")
    answers = [message["content"] for message in model.requests[1]["messages"] if message["role"] == "tool"]
    assert answers == [f"The reply was cut off ({finish}), so that no call in it was run; call again, with less."] * 2


async def test_behind_finished_calls_a_model_may_say_nothing_more(served: Running, model: OpenAIServer) -> None:
    agent = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent())))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    model.script(tool_calls(("nothing", "{}")), stream())
    done = await invoke(served, made.name)
    assert (done.run.state, len(done.reply.parts)) == (v1.Run.STATE_SUCCEEDED, 0)
    assert len(model.requests) == 2


async def test_a_summary_is_repeated_as_a_reply_is(served: Running, model: OpenAIServer) -> None:
    context = v1.Context(summary=v1.Context.Summary(keep_recent=1, batch=1))
    agent = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(context=context))))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    model.script(reply("a1"), error(503), stream(), reply("In short."), reply("a2"))
    await invoke(served, made.name, "q1")
    await invoke(served, made.name, "q2")
    assert "In short." in str(model.requests[-1]["messages"])


COUNTED = {"prompt_tokens": 50, "completion_tokens": 4}
USED = v1.Usage(input_tokens=50, output_tokens=4, model_calls=1, model="stub-1", provider="openai")


def used(*calls: v1.Usage) -> v1.Usage:
    """What these calls of one model took together; those of the stub's own are `reply`."""
    total = v1.Usage(model="stub-1", provider="openai", model_calls=len(calls))
    total.input_tokens = sum(call.input_tokens for call in calls)
    total.output_tokens = sum(call.output_tokens for call in calls)
    return total


REPLIED = v1.Usage(input_tokens=11, output_tokens=7)


async def summarising(served: Running, model: OpenAIServer) -> str:
    """A session whose next run begins with a summary."""
    context = v1.Context(summary=v1.Context.Summary(keep_recent=1, batch=1))
    agent = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(context=context))))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    model.script(reply("a1"))
    await invoke(served, made.name, "q1")
    return str(made.name)


@pytest.mark.parametrize(
    ("trouble", "failed"),
    [
        (Answer((chunk({"content": "In "}, usage=COUNTED),)).cut(after=1), False),
        (Answer((chunk({"content": "In "}, usage=COUNTED) + OVERLOADED,)), False),
        (stream(usage=COUNTED), False),
        (Answer((chunk({"content": ""}, usage=COUNTED), chunk({"content": "x" * 70_000}), asyncio.Event())), True),
        (stream(chunk({"content": ""}, usage=COUNTED), finish="content_filter", usage=None), True),
    ],
    ids=["cut", "an error", "empty", "too long", "withheld"],
)
async def test_what_a_summary_took_that_came_to_nothing_is_counted(
    served: Running, model: OpenAIServer, trouble: Answer, failed: bool
) -> None:
    """Whether it is requested again or given up, in the run and in the session."""
    session = await summarising(served, model)
    model.script(trouble, *([] if failed else [reply("In short.")]), reply("a2"))
    done = await invoke(served, session, "q2")
    assert (done.run.state, done.reply.parts[0].text) == (v1.Run.STATE_SUCCEEDED, "a2")
    expected = used(USED, *([] if failed else [REPLIED]), REPLIED)
    assert expected == done.run.usage
    whole = (await served.sessions.GetSession(v1.GetSessionRequest(name=session))).usage
    assert used(expected, REPLIED).input_tokens == whole.input_tokens


class Halfway:
    """A model that reports usage in its second reply, and then sends nothing more."""

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self._replies = 0

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        self._replies += 1
        if self._replies == 2:
            yield Used(USED)
            self.told.set()
            await asyncio.Event().wait()
        yield Text("a")
        yield Finish("stop", v1.Usage(model_calls=1, model="stub-1"))

    async def close(self) -> None:
        """Nothing is open."""


async def test_what_a_summary_took_that_a_cancel_cuts_is_counted(store_url: str, model: OpenAIServer) -> None:
    halfway = Halfway()
    async with running(store_url, {"openai": halfway}) as served:
        session = await summarising(served, model)
        message = v1.Message(parts=[v1.Part(text="q2")])
        run = await served.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=session, messages=[message])))
        await halfway.told.wait()
        await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
        ended = await served.runs.GetRun(v1.GetRunRequest(name=run.name))
        assert (v1.Run.STATE_CANCELLED, USED) == (ended.state, ended.usage)


def saying(text: str) -> bytes:
    return chunk({"content": text})


def calling(arguments: str) -> bytes:
    return chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"arguments": arguments}}]})


@pytest.mark.parametrize("piece", [saying, calling])
async def test_what_a_reply_took_that_is_too_large_is_counted(
    served: Running, session: str, model: OpenAIServer, piece: Callable[[str], bytes]
) -> None:
    """As far as its provider reported before; nothing more is read from it."""
    counts = chunk({"content": ""}, usage=COUNTED)
    model.script(Answer((counts, piece('{"a": "' + "x" * 600_000), piece("x" * 600_000), asyncio.Event())))
    done = await invoke(served, session)
    assert (v1.Run.STATE_FAILED, "reply_bytes") == (done.run.state, done.run.error.metadata["limit"])
    assert USED == done.run.usage
    assert 1 == len(model.requests)


async def test_json_behind_words_tags_and_fences_is_the_reply(served: Running, model: OpenAIServer) -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    agent = await served.agents.CreateAgent(
        v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(output_schema=schema)))
    )
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    said = [
        '<think>{"b": 2}</think>\n{"a": 1}',
        'hm { hm\n</think>\n\n{"a": 1}',
        'Here you are:\n\n```json\n{"a": 1}\n```\nI hope it helps.',
        '<think>hm</think>It is:\n```\n{"a": 1}\n```',
        "I weigh it. " * 2000 + '\n</think>\n{"a": 1}',
        'Here you are: {"a": 1}',
        '{"a": 1}\n\nI hope it helps.',
    ]
    for text in said:
        model.script(reply(text, chunks=7))
        done = await invoke(served, made.name)
        assert json.loads(done.reply.parts[-1].json) == {"a": 1}
    assert len(model.requests) == len(said)


async def test_a_finish_reason_of_no_shape_is_not_kept(served: Running, session: str, model: OpenAIServer) -> None:
    model.script(reply("Hi", finish="s" * 500))
    done = await invoke(served, session)
    assert done.reply.finish_reason == "stop"

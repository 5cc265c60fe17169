"""What the model is shown, compared in full: windows, summaries, and what becomes of a request that was too long."""

import asyncio
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from notecase import v1
from notecase_server.engine import model_turn, tokens
from notecase_server.engine.context import FEW
from notecase_server.engine.halt import Halts
from notecase_server.engine.ledger import Bound
from notecase_server.engine.run_log import RunLog
from notecase_server.engine.summary import INSTRUCTION, PAGE
from notecase_server.models.contract import MUCH_BYTES
from notecase_server.models.request import BEGIN

from tests.e2e.driving import durable, kinds, log_of, metadata_of, reason_of, said
from tests.support.crashing import Crashing
from tests.support.openai_server import USAGE, Answer, Json, OpenAIServer, chunk, error, reply, stream, tool_calls
from tests.support.server import Running, running

TOO_LONG = error(400, "This model's maximum context length is 100 tokens.", code="context_length_exceeded")
USER, ASSISTANT, SYSTEM = v1.Message.ROLE_USER, v1.Message.ROLE_ASSISTANT, v1.Message.ROLE_SYSTEM
ASK = "Sum it up."


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def system(text: str) -> Json:
    return {"role": "system", "content": text}


def summary(text: str, instruction: str = "") -> Json:
    told = f"A summary of the conversation so far:\n\n{text}"
    return system(f"{instruction}\n\n{told}" if instruction else told)


def body(*messages: Json, model: str = "stub-1", **members: Any) -> Json:
    """A whole request."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "messages": list(messages), **options, **members}


def exchange(*numbers: int) -> list[Json]:
    """What was said in those turns."""
    return [each for number in numbers for each in (user(f"q{number}"), assistant(f"a{number}"))]


def counted(tokens: int, reasoning: int = 0) -> Mapping[str, Any]:
    """A reply's usage."""
    details = {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    return {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens, **details}


async def opened(served: Running, context: v1.Context | None = None, **llm: Any) -> str:
    """A session of an agent with that context."""
    agent = v1.Agent(llm=v1.LlmAgent(instruction="Be brief.", context=context, **llm))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
    session = v1.Session(agent="agents/clerk")
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
    return str(made.name)


async def ask(served: Running, session: str, text: str, **start: Any) -> v1.Run:
    request = v1.StartRun(session=session, messages=[said(text)], **start)
    answer: v1.InvokeResponse = await served.runs.Invoke(v1.InvokeRequest(start=request))
    return answer.run


async def talk(served: Running, model: OpenAIServer, session: str, *numbers: int) -> None:
    """Turns without any ado, each a question and its answer."""
    for number in numbers:
        model.script(reply(f"a{number}"))
        run = await ask(served, session, f"q{number}")
        assert run.state == v1.Run.STATE_SUCCEEDED, run.error


async def append(served: Running, session: str, *messages: v1.Message) -> None:
    await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=messages))


async def session_of(served: Running, name: str) -> v1.Session:
    session: v1.Session = await served.sessions.GetSession(v1.GetSessionRequest(name=name))
    return session


async def texts(served: Running, session: str) -> list[str]:
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session, page_size=1000))
    return [message.parts[0].text for message in listed.messages]


def summaries(log: Sequence[v1.Event]) -> dict[int, v1.Summarized]:
    return {event.sequence: event.summarized for event in log if event.HasField("summarized")}


# ---- windows


async def test_a_window_of_messages_begins_with_a_question(served: Running, model: OpenAIServer) -> None:
    """Of the four newest the first is a reply, whose question is out of the window: it goes, too."""
    session = await opened(served, v1.Context(max_messages=4))
    await talk(served, model, session, 1, 2, 3)
    assert model.requests[-1] == body(system("Be brief."), *exchange(2), user("q3"))


async def test_a_history_of_several_pages_is_shown_whole(served: Running, model: OpenAIServer) -> None:
    """Its newest messages come with the commit of the start, the others are read after it."""
    session = await opened(served)
    await append(served, session, *(said(f"m{number}") for number in range(2 * FEW)))
    await talk(served, model, session, 1)
    said_first = [f"m{number}" for number in range(2 * FEW)]
    assert [user("\n\n".join([*said_first, "q1"]))] == model.requests[-1]["messages"][1:]


async def test_what_is_said_between_a_start_and_its_model_call_is_shown(
    served: Running, model: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await opened(served)
    bind = model_turn.bind

    async def late(run_log: RunLog, halts: Halts, found: Any) -> Mapping[str, Bound]:
        await append(served, session, said("And quickly."))
        return await bind(run_log, halts, found)

    monkeypatch.setattr(model_turn, "bind", late)
    await talk(served, model, session, 1)
    assert [user("q1\n\nAnd quickly.")] == model.requests[-1]["messages"][1:]


async def test_a_window_holds_the_newest_question_and_all_that_follows_it(served: Running, model: OpenAIServer) -> None:
    """However small: a call never parts from its result, nor a turn under way from its question."""
    session = await opened(served, v1.Context(max_messages=1))
    await talk(served, model, session, 1)
    model.script(tool_calls(("lens", "{}")), tool_calls(("lens", '{"n": 2}')), reply("a2"))
    await ask(served, session, "q2")
    asked, again, last = model.requests[1:]
    assert asked == body(system("Be brief."), user("q2"))
    shown = last["messages"]
    assert [each["role"] for each in shown] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert again["messages"] == shown[:4]
    assert shown[:2] == [system("Be brief."), user("q2")]
    for call, result in ((shown[2], shown[3]), (shown[4], shown[5])):
        assert result == {
            "role": "tool",
            "tool_call_id": call["tool_calls"][0]["id"],
            "content": "There is no tool 'lens'.",
        }


async def test_a_window_of_tokens_counts_what_nothing_was_reported_of_by_its_bytes(
    served: Running, model: OpenAIServer
) -> None:
    """Appended messages of 60 bytes are 15 tokens and 4 for the frame: three and the question fit into 64, not four."""
    session = await opened(served, v1.Context(max_tokens=64))
    roles = [USER, ASSISTANT] * 3
    past = [v1.Message(role=role, parts=[v1.Part(text=f"{n}" * 60)]) for n, role in enumerate(roles)]
    await append(served, session, *past)
    model.script(reply("ok"))
    await ask(served, session, "now?")  # 1 + 4
    assert model.requests[-1] == body(system("Be brief."), user("4" * 60), assistant("5" * 60), user("now?"))


async def test_a_window_of_tokens_counts_a_reply_as_its_provider_did(served: Running, model: OpenAIServer) -> None:
    """Its output without reasoning, exactly: 30 tokens and a frame, with 5 + 5 for the questions, are exactly 44."""
    answer = "a" * 120
    for most, shown in ((44, [user("who?"), assistant(answer), user("why?")]), (43, [user("why?")])):
        context = v1.Context(max_tokens=most)
        agent = v1.Agent(llm=v1.LlmAgent(context=context))
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id=f"most-{most}", agent=agent))
        session = v1.Session(agent=f"agents/most-{most}")
        made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=session))
        model.script(reply(answer, usage=counted(80, reasoning=50)), reply("a2"))
        await ask(served, made.name, "who?")
        await ask(served, made.name, "why?")
        assert model.requests[-1] == body(*shown)


async def test_other_text_is_counted_as_this_conversations_replies_fall_into_tokens(
    served: Running, model: OpenAIServer
) -> None:
    """A reply of 60 bytes in 40 tokens: 60 bytes that a user says count as 40 from then on, and no longer as 15."""
    session = await opened(served, v1.Context(max_tokens=96))
    question, answer = "q" * 60, "a" * 60
    model.script(*[reply(answer, usage=counted(40))] * 3)
    await ask(served, session, question)
    await ask(served, session, "2")  # 44 + 44 + 5 fit
    assert model.requests[-1] == body(system("Be brief."), user(question), assistant(answer), user("2"))
    await ask(served, session, "three")  # 44 + 5 + 44 would, and the first turn's 88 do not
    assert model.requests[-1] == body(system("Be brief."), user("2"), assistant(answer), user("three"))


async def test_stateless_is_shown_its_own_run_and_no_summary(served: Running, model: OpenAIServer) -> None:
    session = await opened(served)
    await talk(served, model, session, 1, 2)
    model.script(reply("Two exchanges."))
    await served.sessions.CompactSession(v1.CompactSessionRequest(name=session, keep_recent=1))
    alone = v1.Agent(llm=v1.LlmAgent(context=v1.Context(stateless=True)))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="alone", agent=alone))
    model.script(reply("a3"))
    await ask(served, session, "q3", agent="agents/alone")
    assert model.requests[-1] == body(user("q3"))


@pytest.mark.parametrize("instruction", ["{% if tone %}Be {{ tone }}.{% endif %} \n", " \n"], ids=["template", "text"])
async def test_an_instruction_that_comes_to_blanks_is_none(
    served: Running, model: OpenAIServer, instruction: str
) -> None:
    """Providers refuse a message of blanks."""
    agent = v1.Agent(llm=v1.LlmAgent(instruction=instruction))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="plain", agent=agent))
    session = await opened(served)
    model.script(reply("a1"))
    await ask(served, session, "q1", agent="agents/plain")
    assert model.requests[-1] == body(user("q1"))


async def test_a_stateless_run_without_messages_is_shown_what_it_answers(served: Running, model: OpenAIServer) -> None:
    """The newest message of a user and what followed it, before its own messages, whatever its author and however often
    it was answered: without them the request would be empty."""
    session = await opened(served, v1.Context(stateless=True))
    await talk(served, model, session, 1)
    await append(served, session, said("q2"), v1.Message(role=SYSTEM, parts=[v1.Part(text="Now.")]))
    model.script(error(400, "no"), tool_calls(("lens", "{}")), reply("a2"))
    for state in (v1.Run.STATE_FAILED, v1.Run.STATE_SUCCEEDED):
        request = v1.InvokeRequest(start=v1.StartRun(session=session))
        assert (await served.runs.Invoke(request)).run.state == state
    shown = [system("Be brief.\n\nNow."), user("q2")]
    assert model.requests[1]["messages"] == model.requests[2]["messages"] == shown
    assert model.requests[3]["messages"][:2] == shown
    assert [each["role"] for each in model.requests[3]["messages"][2:]] == ["assistant", "tool"]


# ---- long histories


@pytest.mark.parametrize(
    ("part", "context"),
    [
        (lambda text: v1.Part(text=text), None),
        (lambda text: v1.Part(json=f'"{text}"'), None),
        (lambda text: v1.Part(json=f'"{text}"'), v1.Context(max_tokens=10_000_000)),
        (lambda text: v1.Part(text=text), v1.Context(summary=v1.Context.Summary(keep_recent=2, batch=3))),
    ],
    ids=["text", "json", "window", "summary"],
)
async def test_a_history_of_megabytes_is_looked_at_and_written_in_threads(
    served: Running,
    model: OpenAIServer,
    monkeypatch: pytest.MonkeyPatch,
    part: Callable[[str], v1.Part],
    context: v1.Context | None,
) -> None:
    loop, most = threading.get_ident(), {"written": 0, "counted": 0}
    encode, count = msgspec.json.encode, tokens._text_bytes

    def noted(what: str, size: int) -> None:
        if threading.get_ident() == loop:
            most[what] = max(most[what], size)

    def writing(value: Any, **options: Any) -> bytes:
        made = encode(value, **options)
        noted("written", len(made))
        return made

    def counting(message: v1.Message) -> int:
        size = count(message)
        noted("counted", size)
        return size

    session = await opened(served, context)
    for _ in range(2):
        await append(served, session, *(v1.Message(parts=[part("é" * 120_000)]) for _ in range(12)))
    monkeypatch.setattr(msgspec.json, "encode", writing)
    monkeypatch.setattr(tokens, "_text_bytes", counting)
    await talk(served, model, session, *((1,) if context is None else ()))
    if context is not None:
        model.script(*[reply("Summed up.")] * 8 if context.HasField("summary") else (), reply("a1"))
        await ask(served, session, "q1")
    assert sum(len(str(request["messages"])) for request in model.requests) > 2_000_000
    assert {"written": True, "counted": True} == {what: size < MUCH_BYTES // 4 for what, size in most.items()}, most


# ---- summaries

SUMMARY = v1.Context(summary=v1.Context.Summary(keep_recent=2, batch=3, instruction=ASK))


async def test_older_messages_are_summarised_once_there_are_enough(served: Running, model: OpenAIServer) -> None:
    """With the fifth message that none covers, before the model is asked: it is shown the summary in their place. The
    summary ends with a turn, is committed by itself, and counts as a call of the run. Log and list stay whole."""
    session = await opened(served, SUMMARY)
    await talk(served, model, session, 1, 2)
    model.script(reply("They met.", usage=counted(9)), reply("a3", usage=counted(5)))
    run = await ask(served, session, "q3")
    assert model.requests[2:] == [
        body(*exchange(1), user(ASK)),
        body(summary("They met.", "Be brief."), *exchange(2), user("q3")),
    ]
    log = await log_of(served, session)
    messages = [event.sequence for event in log if event.HasField("message_added")]
    (sequence, made), *more = summaries(log).items()
    assert not more
    assert made == v1.Summarized(first_sequence=messages[0], last_sequence=messages[1], text="They met.")
    assert kinds(log)[sequence - 3 :] == [
        *("run_started", "message_added"),
        *("summarized", "usage"),
        *("message_added", "usage", "run_state_changed"),
    ]
    assert log[sequence - 1].run == run.name
    assert (run.usage.model_calls, run.usage.input_tokens, run.usage.output_tokens) == (2, 20, 14)
    row = await session_of(served, session)
    assert row.summary_sequence == sequence
    assert row.usage.model_calls == 4
    assert await texts(served, session) == ["q1", "a1", "q2", "a2", "q3", "a3"]


async def test_the_next_summary_continues_the_one_before(served: Running, model: OpenAIServer) -> None:
    """It is made from that one and the later messages, and replaces it; requests in between have the first."""
    session = await opened(served, SUMMARY)
    await talk(served, model, session, 1, 2)
    model.script(reply("First."), reply("a3"))
    await ask(served, session, "q3")
    model.script(reply("Second."), reply("a4"))
    await ask(served, session, "q4")
    model.script(reply("Third."), reply("a5"))
    await ask(served, session, "q5")
    assert model.requests[4:] == [
        body(summary("First."), *exchange(2), user(ASK)),
        body(summary("Second.", "Be brief."), *exchange(3), user("q4")),
        body(summary("Second."), *exchange(3), user(ASK)),
        body(summary("Third.", "Be brief."), *exchange(4), user("q5")),
    ]
    log = await log_of(served, session)
    first, second, third = summaries(log).items()
    assert [made.previous for _, made in (first, second, third)] == [0, first[0], second[0]]
    added = [event.sequence for event in log if event.HasField("message_added")]
    covered = [(made.first_sequence, made.last_sequence) for _, made in (first, second, third)]
    assert covered == [(added[0], added[1]), (added[2], added[3]), (added[4], added[5])]


async def test_a_rewind_shows_what_the_summary_before_it_left(served: Running, model: OpenAIServer) -> None:
    """A run is rolled back that had made the second summary: the first is in effect again, and the messages that only
    the second covered are shown themselves."""
    session = await opened(served, SUMMARY)
    await talk(served, model, session, 1, 2)
    model.script(reply("First."), reply("a3"))
    await ask(served, session, "q3")
    before = (await session_of(served, session)).summary_sequence
    never = asyncio.Event()
    model.script(reply("Second."), reply("lost").held(never, after=1))
    start = v1.StartRun(session=session, messages=[said("q4")])
    await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    await model.request(5)
    assert (await session_of(served, session)).summary_sequence > before
    model.script(reply("Again."), reply("a4"))
    await ask(served, session, "q4 otherwise", on_busy=v1.StartRun.ON_BUSY_ROLLBACK)
    assert model.requests[6:] == [
        body(summary("First."), *exchange(2), user(ASK)),
        body(summary("Again.", "Be brief."), *exchange(3), user("q4 otherwise")),
    ]
    made = list(summaries(await log_of(served, session)).items())
    assert [each.previous for _, each in made] == [0, before, before]
    assert (await session_of(served, session)).summary_sequence == made[2][0]


async def test_a_turn_under_way_is_not_summarised(served: Running, model: OpenAIServer) -> None:
    """However many messages it has: what is covered ends with a turn before it."""
    session = await opened(served, SUMMARY)
    model.script(*[tool_calls(("lens", "{}"))] * 5, reply("a1"))
    run = await ask(served, session, "q1")
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert not summaries(await log_of(served, session))
    assert len(model.requests) == 6


async def test_content_is_named_in_what_is_summarised(served: Running, model: OpenAIServer) -> None:
    """An image is not sent again for a summary's sake; calls and what they came to are."""
    session = await opened(served, SUMMARY)
    image = v1.Part(data=v1.InlineData(data=b"\x89PNG", media_type="image/png", filename="violin.png"))
    model.script(tool_calls(("lens", '{"on": 1}')), reply("a1"))
    request = v1.StartRun(session=session, messages=[v1.Message(parts=[v1.Part(text="What is it?"), image])])
    await served.runs.Invoke(v1.InvokeRequest(start=request))
    await talk(served, model, session, 2)
    model.script(reply("A violin."), reply("a3"))
    await ask(served, session, "q3")
    what, called, result, *rest = model.requests[3]["messages"]
    assert what == {
        "role": "user",
        "content": "What is it?\n\n[image/png: violin.png]",
    }
    assert (called["tool_calls"][0]["function"], result["content"]) == (
        {"name": "lens", "arguments": '{"on": 1}'},
        "There is no tool 'lens'.",
    )
    assert rest == [assistant("a1"), user(ASK)]


async def test_a_summary_has_a_separate_model_and_no_limits_of_replies(served: Running, model: OpenAIServer) -> None:
    """And the server's own instruction where the agent has none."""
    context = v1.Context(summary=v1.Context.Summary(keep_recent=1, batch=1, model="small"))
    generation = v1.Generation(temperature=0.5, max_output_tokens=7, stop=["."])
    session = await opened(served, context, model="large", generation=generation)
    await talk(served, model, session, 1)
    model.script(reply("Short."), reply("a2"))
    await ask(served, session, "q2")
    assert model.requests[1] == body(*exchange(1), user(INSTRUCTION), model="small", temperature=0.5)
    assert model.requests[2]["model"] == "large"
    assert model.requests[2]["max_tokens"] == 7


async def test_a_summary_of_calls_declares_their_tools_and_no_choice(served: Running, model: OpenAIServer) -> None:
    """Bedrock and what is in front of it refuse calls without declarations, others a choice among none. What the agent
    forces is for its replies."""
    extra = '{"tool_choice": "required", "response_format": {"type": "json_object"}, "top_k": 4}'
    lens = v1.Tool(name="lens", description="Looks.", client=v1.ClientTool())
    session = await opened(served, SUMMARY, tools=[lens], generation=v1.Generation(extra=extra))
    model.script(tool_calls(("lens", "{}")), tool_calls(("gone", "{}")), reply("a1"))
    start = v1.StartRun(session=session, messages=[said("q1")])
    waiting = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
    answer = v1.ToolResult(call_id=waiting.pending_calls[0].call_id, result=[v1.Part(text="a hair")])
    command = v1.RunRequest(tool_result=answer)
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    await served.runs.WaitRun(v1.WaitRunRequest(name=waiting.name, after_sequence=1000))
    await talk(served, model, session, 2)
    model.script(reply("They looked."), reply("a3"))
    await ask(served, session, "q3")
    forced, loosened, *_, summarising, _ = model.requests
    assert ("required", "auto") == (forced["tool_choice"], loosened["tool_choice"])
    assert {"model", "messages", "stream", "stream_options", "tools", "top_k"} == set(summarising)
    empty = {"type": "object", "properties": {}}
    assert summarising["tools"] == [
        {"type": "function", "function": {"name": "lens", "description": "Looks.", "parameters": empty}},
        {"type": "function", "function": {"name": "gone", "parameters": empty}},
    ]
    assert len(summaries(await log_of(served, session))) == 1


@pytest.mark.parametrize(
    "answer",
    [
        error(500, headers={"retry-after-ms": "1"}),
        error(400, "no"),
        TOO_LONG,
        reply("  "),
        tool_calls(("lens", "{}")),
        reply("x" * 70_000),
        reply("Half.", chunks=2).cut(after=2),
    ],
    ids=["unavailable", "refused", "too long", "empty", "a call", "endless", "cut"],
)
async def test_a_run_goes_on_without_a_summary_that_fails(served: Running, model: OpenAIServer, answer: Answer) -> None:
    """Nothing is lost, so there is no event; the next run tries again."""
    session = await opened(served, SUMMARY, max_model_calls=2)
    await talk(served, model, session, 1, 2)
    model.script(answer)
    model._answer = lambda request: answer if request["messages"][-1] == user(ASK) else reply("a3")
    run = await ask(served, session, "q3")
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert model.requests[-1] == body(system("Be brief."), *exchange(1, 2), user("q3"))
    assert not summaries(await log_of(served, session))
    model.script(reply("Better."), reply("a4"))
    await ask(served, session, "q4")
    assert model.requests[-1] == body(summary("Better.", "Be brief."), *exchange(3), user("q4"))


async def test_a_summary_of_more_than_the_model_takes_covers_less(served: Running, model: OpenAIServer) -> None:
    """A quarter of the messages at a time, and the next ones after it, while half of the run's calls are left."""
    session = await opened(served, SUMMARY)
    for number in range(1, 9):
        await append(
            served, session, said(f"q{number}"), v1.Message(role=ASSISTANT, parts=[v1.Part(text=f"a{number}")])
        )

    def small(request: Json) -> Answer:
        messages = request["messages"]
        if messages[-1] != user(ASK):
            return reply("a9")
        return TOO_LONG if len(messages) > 6 else reply(f"After {messages[-2]['content']}.")

    model._answer = small
    run = await ask(served, session, "q9")
    assert run.state == v1.Run.STATE_SUCCEEDED, run.error
    log = await log_of(served, session)
    assert [made.text for made in summaries(log).values()] == [f"After a{number}." for number in range(1, 6)]
    assert model.requests[-1] == body(summary("After a5.", "Be brief."), *exchange(6, 7, 8), user("q9"))


async def test_a_turn_of_more_than_a_page_is_summarised_in_parts(served: Running, model: OpenAIServer) -> None:
    """No turn ends among the messages that one summary may cover, so it ends within that turn, and the model is shown
    the rest of it."""
    session = await opened(served, SUMMARY)
    replied = [v1.Message(role=ASSISTANT, parts=[v1.Part(text=f"r{number}")]) for number in range(PAGE + 20)]
    await append(served, session, said("Long ago"))
    for at in range(0, len(replied), 100):
        await append(served, session, *replied[at : at + 100])
    model.script(reply("Long ago."), reply("a1"))
    run = await ask(served, session, "q1")
    assert run.state == v1.Run.STATE_SUCCEEDED, run.error
    (made,) = summaries(await log_of(served, session)).values()
    covered = PAGE - 2
    rest = "\n\n".join(f"r{number}" for number in range(covered - 1, PAGE + 20))
    assert (1, covered) == (made.first_sequence, made.last_sequence)
    assert model.requests[-1] == body(summary("Long ago.", "Be brief."), user(BEGIN), assistant(rest), user("q1"))
    model.script(reply("And so on."), reply("a2"))
    await ask(served, session, "q2")
    assert model.requests[-1] == body(summary("And so on.", "Be brief."), *exchange(1), user("q2"))


async def test_a_summary_of_one_long_turn_covers_less_if_the_model_takes_no_more(
    served: Running, model: OpenAIServer
) -> None:
    session = await opened(served, SUMMARY, max_model_calls=20)
    replied = [v1.Message(role=ASSISTANT, parts=[v1.Part(text=f"r{number}")]) for number in range(40)]
    await append(served, session, said("Long ago"), *replied, said("Thanks"), *replied[:1])
    await append(served, session, said("Well"), *replied[:1])
    model.script(TOO_LONG, *[reply(f"s{number}") for number in range(5)], reply("a1"))
    run = await ask(served, session, "q1")
    assert (v1.Run.STATE_SUCCEEDED, "a1") == (run.state, run.reply.parts[0].text), run.error
    log = await log_of(served, session)
    assert "summary_failed" not in kinds(log)
    covered = [made.last_sequence - made.first_sequence + 1 for made in summaries(log).values()]
    assert covered == [10, 10, 10, 10, 3]


async def test_the_newest_turn_is_not_summarised_however_long(served: Running, model: OpenAIServer) -> None:
    session = await opened(served, SUMMARY)
    replied = [v1.Message(role=ASSISTANT, parts=[v1.Part(text=f"r{number}")]) for number in range(100)]
    await append(served, session, said("q1"))
    for _ in range(PAGE // 100 + 1):
        await append(served, session, *replied)
    await served.sessions.CompactSession(v1.CompactSessionRequest(name=session, keep_recent=2))
    assert not summaries(await log_of(served, session))


async def test_a_summary_that_is_too_long_and_not_asked_for_again_is_a_fact(
    served: Running, model: OpenAIServer
) -> None:
    """With one call left, which is the reply's."""
    session = await opened(served, SUMMARY, max_model_calls=2)
    for number in range(1, 6):
        await append(served, session, said(f"q{number}"), v1.Message(role=ASSISTANT, parts=[v1.Part(text="a")]))
    model.script(TOO_LONG, reply("a6"))
    run = await ask(served, session, "q6")
    assert run.state == v1.Run.STATE_SUCCEEDED, run.error
    assert "summary_failed" in kinds(await log_of(served, session))


async def test_a_compaction_of_more_than_the_model_takes_covers_less(served: Running, model: OpenAIServer) -> None:
    session = await opened(served)
    await talk(served, model, session, *range(1, 6))
    model.script(TOO_LONG, reply("They met."))
    made = await served.sessions.CompactSession(v1.CompactSessionRequest(name=session, keep_recent=2))
    assert model.requests[5:] == [body(*exchange(1, 2, 3, 4), user(INSTRUCTION)), body(*exchange(1), user(INSTRUCTION))]
    assert made.summary_sequence
    assert made.usage.model_calls == 6


async def test_a_summary_has_no_text_that_turned_out_to_be_reasoning(served: Running, model: OpenAIServer) -> None:
    session = await opened(served)
    await talk(served, model, session, 1, 2)
    model.script(reply("They may have met.\n</think>\n\nThey met.", chunks=9))
    await served.sessions.CompactSession(v1.CompactSessionRequest(name=session, keep_recent=1))
    (text,) = (event.summarized.text for event in await log_of(served, session) if event.HasField("summarized"))
    assert text == "They met."


async def test_large_results_are_summarised_as_they_were_shown(served: Running, model: OpenAIServer) -> None:
    """Whole they would be more than the model takes, although each turn fitted."""
    context = v1.Context(summary=v1.Context.Summary(keep_recent=1, batch=2, instruction=ASK))
    session = await opened(served, context, tools=[v1.Tool(name="lens", client=v1.ClientTool())])
    model.script(tool_calls(("lens", "{}")), reply("a1"))
    waiting = await ask(served, session, "q1")
    result = v1.ToolResult(call_id=waiting.pending_calls[0].call_id, result=[v1.Part(text="x" * 200_000)])
    command = v1.RunRequest(tool_result=result)
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    await served.runs.WaitRun(v1.WaitRunRequest(name=waiting.name, after_sequence=1000))
    model.script(reply("They looked."), reply("a2"))
    await ask(served, session, "q2")
    shown, summarising = model.requests[1], model.requests[2]
    assert summarising["messages"][-1] == user(ASK)
    assert summarising["messages"][2]["content"] == shown["messages"][-1]["content"]
    assert len(summarising["messages"][2]["content"]) < 5_000


async def test_no_summary_is_made_in_place_of_the_reply(served: Running, model: OpenAIServer) -> None:
    """A run with one call left answers with it."""
    session = await opened(served, SUMMARY, max_model_calls=1)
    await talk(served, model, session, 1, 2, 3)
    assert [request["messages"][-1] for request in model.requests] == [user("q1"), user("q2"), user("q3")]


async def test_an_unfinished_summary_is_cut_by_a_cancel_and_not_shown(served: Running, model: OpenAIServer) -> None:
    """No delta of it reaches a watcher, and nothing of it is kept."""
    session = await opened(served, SUMMARY)
    await talk(served, model, session, 1, 2)
    never = asyncio.Event()
    model.script(stream(chunk({"content": "Half "}), chunk({"content": "said"})).held(never, after=2))
    call = served.runs.Run()
    await call.write(v1.RunRequest(start=v1.StartRun(session=session, messages=[said("q3")])))
    frames = []
    async for frame in call:
        frames.append(frame)
        if len(frames) == 1:
            await model.request(2)
            await call.write(v1.RunRequest(command_id="stop", cancel=v1.CancelCommand(reason="enough")))
    await model.received[2].left.wait()
    seen = kinds([event for frame in frames for event in frame.batch.events])
    assert "block_delta" not in seen
    assert "message_discarded" not in seen
    assert durable(frames)[-1].run_state_changed.state == v1.Run.STATE_CANCELLED
    assert not summaries(await log_of(served, session))


async def test_a_summary_that_was_not_committed_is_requested_again(tmp_path: Path) -> None:
    """kill -9 between the model's summary and its commit: the next server requests it again, and there is one
    summary."""

    def answer(request: Json) -> Answer:
        return reply("They met.") if request["messages"][-1] == user(ASK) else reply("Answer.")

    async with OpenAIServer(answer) as model:
        env = {"OPENAI_API_KEY": "test-key", "OPENAI_BASE_URL": model.url, "OPENAI_MODEL": "stub-1"}
        # Two commits a turn, the third's start, and then its summary.
        first = await Crashing.launch(tmp_path, "--before", "6", env=env)
        async with first, grpc.aio.insecure_channel(first.address) as channel:
            agent = v1.Agent(llm=v1.LlmAgent(context=SUMMARY))
            await v1.AgentServiceStub(channel).CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
            await v1.SessionServiceStub(channel).CreateSession(
                v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
            )
            runs = v1.RunServiceStub(channel)
            for number in (1, 2):
                start = v1.StartRun(session="sessions/case", messages=[said(f"q{number}")])
                await runs.Invoke(v1.InvokeRequest(start=start))
            start = v1.StartRun(session="sessions/case", run_id="r3", messages=[said("q3")])
            with suppress(grpc.aio.AioRpcError):  # it may die before it answers
                await runs.CreateRun(v1.CreateRunRequest(start=start))
            await first.death()
        assert [request["messages"][-1] for request in model.requests] == [user("q1"), user("q2"), user(ASK)]
        second = await Crashing.launch(tmp_path, env=env)
        async with second, grpc.aio.insecure_channel(second.address) as channel:
            runs = v1.RunServiceStub(channel)
            run = await runs.WaitRun(v1.WaitRunRequest(name="sessions/case/runs/r3"))
            watch = v1.WatchEventsRequest(name="sessions/case", after_sequence=0)
            log = durable([frame async for frame in runs.WatchEvents(watch)])
    assert (run.state, run.attempt) == (v1.Run.STATE_SUCCEEDED, 2)
    assert model.requests[3] == model.requests[2]
    past = [user("q2"), assistant("Answer."), user("q3")]
    assert model.requests[4:] == [body(summary("They met."), *past)]
    assert len(summaries(log)) == 1
    assert run.usage.model_calls == 2


# ---- too long


async def test_a_request_that_is_too_long_is_asked_again_with_a_summary(served: Running, model: OpenAIServer) -> None:
    """Of all but the newest turn, although the agent has no summaries; the tries that failed left nothing behind."""
    session = await opened(served)
    await talk(served, model, session, 1, 2)
    model.script(TOO_LONG, reply("They met."), reply("a3"))
    run = await ask(served, session, "q3")
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert model.requests[2:] == [
        body(system("Be brief."), *exchange(1, 2), user("q3")),
        body(*exchange(1, 2), user(INSTRUCTION)),
        body(summary("They met.", "Be brief."), user("q3")),
    ]
    await talk(served, model, session, 4)
    assert model.requests[-1] == body(summary("They met.", "Be brief."), *exchange(3), user("q4"))
    log = await log_of(served, session)
    assert len(summaries(log)) == 1
    assert not [event for event in log if event.message_added.status == v1.Message.STATUS_INCOMPLETE]
    assert run.usage.model_calls == 2


async def test_a_request_that_is_too_long_without_a_summary_leaves_out_its_older_half(
    served: Running, model: OpenAIServer
) -> None:
    """So does the rest of the run, without a second event."""
    session = await opened(served)
    await talk(served, model, session, 1, 2, 3)
    model.script(TOO_LONG, TOO_LONG, tool_calls(("lens", "{}"), usage=None), reply("a4"))
    run = await ask(served, session, "q4")
    assert run.state == v1.Run.STATE_SUCCEEDED
    first, summarising, second, third = model.requests[3:]
    assert first == body(system("Be brief."), *exchange(1, 2, 3), user("q4"))
    assert summarising == body(*exchange(1, 2, 3), user(INSTRUCTION))
    assert second == body(system("Be brief."), *exchange(3), user("q4"))
    assert third["messages"][:2] == [system("Be brief."), user("q4")]
    assert len(third["messages"]) == 4
    log = await log_of(served, session)
    assert (0, 1) == (len(summaries(log)), kinds(log).count("summary_failed"))


async def test_a_request_that_is_still_too_long_fails_the_run(served: Running, model: OpenAIServer) -> None:
    """Once, in the typed words of the first refusal's kind."""
    session = await opened(served)
    await talk(served, model, session, 1)
    model.script(TOO_LONG, reply("They met."), TOO_LONG)
    run = await ask(served, session, "q2")
    assert (run.state, run.error.reason) == (v1.Run.STATE_FAILED, v1.ERROR_REASON_MODEL_ERROR)
    assert run.error.metadata["code"] == "context_length_exceeded"
    assert len(model.requests) == 4


@pytest.mark.parametrize("context", [v1.Context(), v1.Context(stateless=True)], ids=["first turn", "stateless"])
async def test_a_single_turn_that_is_too_long_fails_at_once(
    served: Running, model: OpenAIServer, context: v1.Context
) -> None:
    """Nothing of it can be spared, and of a stateless run nothing but its own messages is looked at."""
    session = await opened(served, context)
    if context.stateless:
        await talk(served, model, session, 1)
    model.script(TOO_LONG)
    before = len(model.requests)
    run = await ask(served, session, "q2")
    assert run.error.metadata["code"] == "context_length_exceeded"
    assert len(model.requests) == before + 1


async def test_a_request_that_is_too_long_is_not_asked_again_beyond_the_runs_calls(
    served: Running, model: OpenAIServer
) -> None:
    """With two calls the older half is left out, since a summary would need a third; with one the run fails, and says
    why rather than that its calls are used up."""
    session = await opened(served)
    await talk(served, model, session, 1, 2, 3)
    model.script(TOO_LONG, reply("a4"))
    run = await ask(served, session, "q4", limits=v1.Limits(max_model_calls=2))
    assert run.state == v1.Run.STATE_SUCCEEDED
    assert model.requests[-1] == body(system("Be brief."), *exchange(3), user("q4"))
    model.script(TOO_LONG)
    run = await ask(served, session, "q5", limits=v1.Limits(max_model_calls=1))
    assert run.error.metadata["code"] == "context_length_exceeded"


# ---- by hand


async def test_a_session_is_compacted_by_hand(served: Running, model: OpenAIServer) -> None:
    """No limit needs to be reached; usage counts in the session; a repeat calls no model, and neither does a call that
    finds nothing to cover."""
    session = await opened(served)
    await talk(served, model, session, 1, 2, 3)
    model.script(reply("They met.", usage=counted(9)))
    request = v1.CompactSessionRequest(name=session, keep_recent=2, request_id="once")
    first = await served.sessions.CompactSession(request)
    assert first == await served.sessions.CompactSession(request)
    assert first == await served.sessions.CompactSession(v1.CompactSessionRequest(name=session, keep_recent=2))
    assert model.requests[3:] == [body(*exchange(1, 2), user(INSTRUCTION))]
    log = await log_of(served, session)
    (sequence,) = summaries(log)
    assert first.summary_sequence == sequence
    assert kinds(log)[-2:] == ["summarized", "usage"]
    assert {(event.run, event.cause_id) for event in log[-2:]} == {("", "once")}
    assert (first.usage.model_calls, first.usage.output_tokens) == (4, 3 * USAGE["completion_tokens"] + 9)
    await talk(served, model, session, 4)
    assert model.requests[-1] == body(summary("They met.", "Be brief."), *exchange(3), user("q4"))


async def test_a_compaction_that_cannot_be_is_refused(served: Running, model: OpenAIServer) -> None:
    """Each with its reason, and nothing is kept: a repeat with the same id may yet succeed."""
    session = await opened(served, v1.Context(summary=v1.Context.Summary(instruction=ASK)))
    await talk(served, model, session, 1, 2)
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="empty"))
    request = v1.CompactSessionRequest(name=session, keep_recent=1, request_id="again")

    async def refusal(request: v1.CompactSessionRequest) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.sessions.CompactSession(request)
        return refused.value

    for wrong, reason in (
        (v1.CompactSessionRequest(name="sessions/nobody"), "SESSION_NOT_FOUND"),
        (v1.CompactSessionRequest(name=session, agent="agents/nobody"), "AGENT_NOT_FOUND"),
        (v1.CompactSessionRequest(name="sessions/empty"), "INVALID_FIELD"),
        (v1.CompactSessionRequest(name=session, keep_recent=-1), "INVALID_FIELD"),
        (v1.CompactSessionRequest(name=session, agent="clerk"), "INVALID_FIELD"),
    ):
        assert reason_of(await refusal(wrong)) == reason
    model.script(error(400, "no"))
    refused = await refusal(request)
    assert (refused.code(), reason_of(refused)) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_ERROR")
    model.script(*[error(500, headers={"retry-after-ms": "1"})] * 3)
    refused = await refusal(request)
    assert (refused.code(), reason_of(refused)) == (grpc.StatusCode.UNAVAILABLE, "MODEL_UNAVAILABLE")
    go_on = asyncio.Event()
    model.script(reply("a3").held(go_on))
    start = v1.StartRun(session=session, messages=[said("q3")])
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    refused = await refusal(request)
    assert (reason_of(refused), metadata_of(refused)) == ("RUN_ACTIVE", {"run": run.name})
    go_on.set()
    await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    model.script(reply("At last."))
    assert (await served.sessions.CompactSession(request)).summary_sequence > 0


async def test_messages_during_a_compaction_stay_next_to_the_summary(served: Running, model: OpenAIServer) -> None:
    """A run that starts and ends meanwhile does not change what is covered."""
    session = await opened(served)
    await talk(served, model, session, 1, 2)
    go_on = asyncio.Event()
    model.script(reply("They met.").held(go_on))
    request = v1.CompactSessionRequest(name=session, keep_recent=1)
    compacting = asyncio.ensure_future(served.sessions.CompactSession(request))
    await model.request(2)
    await talk(served, model, session, 3)
    go_on.set()
    await compacting
    await talk(served, model, session, 4)
    assert model.requests[-1] == body(summary("They met.", "Be brief."), *exchange(2, 3), user("q4"))


async def test_of_two_compactions_at_once_the_second_is_refused(served: Running, model: OpenAIServer) -> None:
    session = await opened(served)
    await talk(served, model, session, 1, 2)
    go_on = asyncio.Event()
    model.script(reply("Late.").held(go_on), reply("Soon."))
    request = v1.CompactSessionRequest(name=session, keep_recent=1)
    late = asyncio.ensure_future(served.sessions.CompactSession(request))
    await model.request(2)
    soon = await served.sessions.CompactSession(request)
    go_on.set()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await late
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.ABORTED, "SEQUENCE_MISMATCH")
    assert summaries(await log_of(served, session))[soon.summary_sequence].text == "Soon."


async def test_a_run_whose_summary_came_second_goes_on_with_the_first(served: Running, model: OpenAIServer) -> None:
    """A compaction by hand that began before the run commits while the run's own summary is being written."""
    session = await opened(served, SUMMARY)
    await talk(served, model, session, 1, 2)
    by_hand, by_run = asyncio.Event(), asyncio.Event()
    model.script(reply("By hand.").held(by_hand), reply("By the run.").held(by_run), reply("a3"))
    request = v1.CompactSessionRequest(name=session, keep_recent=2)
    compacting = asyncio.ensure_future(served.sessions.CompactSession(request))
    await model.request(2)
    start = v1.StartRun(session=session, messages=[said("q3")])
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    await model.request(3)
    by_hand.set()
    await compacting
    by_run.set()
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    assert ended.state == v1.Run.STATE_SUCCEEDED
    assert model.requests[-1] == body(summary("By hand.", "Be brief."), *exchange(2), user("q3"))
    assert [made.text for made in summaries(await log_of(served, session)).values()] == ["By hand."]


async def test_a_summary_outlives_the_server(tmp_path: Path) -> None:
    """What is shown after a restart is what would have been shown before it. The offline model writes what the
    instruction of its summary says."""
    url = f"sqlite:{tmp_path / 'notecase.db'}"
    context = v1.Context(summary=v1.Context.Summary(keep_recent=1, batch=2, instruction="/say They met."))
    async with running(url) as served:
        session = await opened(served, context)
        await ask(served, session, "/say a1")
        await ask(served, session, "/say a2")
        assert (await session_of(served, session)).summary_sequence > 0
    async with running(url) as served:
        run = await ask(served, session, "And?")
        shown = re.search(r"This request had (\d+) messages", run.reply.parts[0].text)
        assert shown is not None
        assert shown[1] == "2"  # the newer summary, and the question


@pytest.mark.parametrize(
    ("context", "field"),
    [
        (v1.Context(stateless=True, summary=v1.Context.Summary()), "summary"),
        (v1.Context(summary=v1.Context.Summary(keep_recent=-1)), "summary.keep_recent"),
        (v1.Context(summary=v1.Context.Summary(batch=501)), "summary.batch"),
        (v1.Context(summary=v1.Context.Summary(model="m" * 5000)), "summary.model"),
        (v1.Context(max_messages=29, summary=v1.Context.Summary()), "max_messages"),
        (v1.Context(max_messages=4, summary=v1.Context.Summary(keep_recent=2, batch=3)), "max_messages"),
    ],
)
async def test_a_context_that_would_hide_messages_is_refused(served: Running, context: v1.Context, field: str) -> None:
    """Messages that a window cuts off before any summary covers them would be lost to the model."""
    agent = v1.Agent(llm=v1.LlmAgent(context=context))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent=agent))
    assert reason_of(refused.value) == "INVALID_FIELD"
    assert f"agent.llm.context.{field}" in (refused.value.details() or "")

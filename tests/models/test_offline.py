"""The offline model: what it says on its own, and every path a client can ask it for."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import (
    Call,
    Cited,
    Delta,
    Finish,
    Media,
    ModelRequest,
    Provider,
    Reasoning,
    Refusal,
    Returned,
    Source,
    Text,
)
from notecase_server.models.offline import DIALECTS, OfflineProvider


def user(*parts: str | v1.Part) -> v1.Message:
    return v1.Message(
        role=v1.Message.ROLE_USER, parts=[v1.Part(text=part) if isinstance(part, str) else part for part in parts]
    )


def assistant(*parts: v1.Part) -> v1.Message:
    return v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=parts or [v1.Part(text="Hm.")])


def request(*messages: v1.Message, instruction: str = "", max_tokens: int = 0) -> ModelRequest:
    return ModelRequest("any", instruction, messages, v1.Generation(max_output_tokens=max_tokens))


async def replied(*messages: v1.Message, instruction: str = "", max_tokens: int = 0) -> list[Delta]:
    provider: Provider = OfflineProvider()
    asked = request(*messages, instruction=instruction, max_tokens=max_tokens)
    deltas = [delta async for delta in provider.stream(asked)]
    await provider.close()
    assert [isinstance(delta, Finish) for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return deltas


async def text(*messages: v1.Message, instruction: str = "") -> str:
    return "".join(d.text for d in await replied(*messages, instruction=instruction) if isinstance(d, Text))


def finish(deltas: list[Delta]) -> Finish:
    assert isinstance(deltas[-1], Finish)
    return deltas[-1]


async def test_the_first_reply_says_what_it_is_and_shows_what_it_was_given() -> None:
    assert (await text(user("Where could she be?"), instruction="You are a detective.")) == (
        "I am the offline model. I repeat my input and follow directives: /help lists all of them.\n\n"
        "You said: Where could she be?\n"
        "My instruction is: You are a detective.\n"
        "This request had 1 message."
    )


async def test_a_note_in_the_instruction_shows_in_the_next_reply() -> None:
    """So that a demonstration without a key shows what state is for."""
    told = "You look for Irene. Last seen: at the harbour."
    assert (await text(user("Where?"), assistant(), user("And now?"), instruction=told)) == (
        f"You said: And now?\nMy instruction is: {told}\nThis request had 3 messages."
    )


async def test_replies_come_in_words_and_are_the_same_each_time() -> None:
    once, again = await replied(user("/say one two  three\n")), await replied(user("/say one two  three\n"))
    assert once == again
    assert [Text("one"), Text(" two"), Text("  three")] == once[:-1]


@given(st.text(st.characters(codec="utf-8", exclude_characters="/")))
def test_what_is_said_arrives_whole(said: str) -> None:
    """Cutting a text into pieces loses nothing of it."""
    reply = asyncio.run(text(user(said), assistant(), user(said)))
    assert reply.startswith(f"You said: {said.strip() or 'nothing'}\nMy instruction is: nothing\n")


async def test_a_long_message_is_repeated_in_part() -> None:
    assert f"You said: {'x' * 2000} … (5000 characters)\n" in await text(user("x" * 5000))


async def test_media_are_acknowledged_by_type_and_size() -> None:
    """Nothing that a message carries is dropped in silence, whichever message since the last reply it came in."""
    data = v1.Part(data=v1.InlineData(data=b"12345", media_type="application/pdf", filename="plan.pdf"))
    file = v1.Part(file=v1.FileUri(uri="https://example.org/a.png", media_type="image/png"))
    reply = await text(assistant(), user("Look", data), user(file))
    assert "You showed me: application/pdf of 5 B (plan.pdf), which I cannot see\n" in reply
    assert "You showed me: image/png at https://example.org/a.png, which I did not fetch\n" in reply


async def test_help_tells_every_directive() -> None:
    told = await text(user("/help"))
    for name in ("say", "reason", "call", "chunks", "big", "refuse", "stop", "dialect", "pause", "fail", "help"):
        assert f"/{name}" in told


async def test_directives_take_effect_in_their_order() -> None:
    deltas = await replied(user("Please /reason let me see /say first\n/say second /refuse not this"))
    kinds = [type(delta) for delta in deltas[:-1]]
    assert kinds == [Reasoning] * 3 + [Text] * 2 + [Refusal] * 2
    assert "first\nsecond" == "".join(d.text for d in deltas if isinstance(d, Text))
    assert "not this" == "".join(d.text for d in deltas if isinstance(d, Refusal))


def calls(deltas: list[Delta]) -> dict[int, tuple[str, str]]:
    told: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        if isinstance(delta, Call):
            tool, arguments = told.get(delta.key, ("", ""))
            told[delta.key] = (tool + delta.tool, arguments + delta.arguments)
    return told


async def test_calls_are_made_with_their_arguments_in_pieces() -> None:
    """JSON may span lines and hold what would be a directive; broken, it is passed on as it is."""
    arguments = json.dumps({"city": "Brest", "note": "a /say b"}, indent=1)
    deltas = await replied(user(f'/call weather {arguments} /call clock /call broken {{"a": /say done'))
    assert calls(deltas) == {1: ("weather", arguments), 2: ("clock", "{}"), 3: ("broken", '{"a":')}
    assert max(len(delta.arguments) for delta in deltas if isinstance(delta, Call)) == 8
    assert finish(deltas).reason == "tool_calls"


async def test_outcomes_of_calls_are_reported_and_the_directives_not_repeated() -> None:
    failed = v1.ToolCall(tool="weather", outcome=v1.ToolCall.OUTCOME_FAILED, error="There is no such tool.")
    cancelled = v1.ToolCall(tool="clock", outcome=v1.ToolCall.OUTCOME_CANCELLED)
    given = v1.ToolCall(tool="map", result=[v1.Part(text="a map"), v1.Part(data=v1.InlineData(data=b"1"))])
    parts = [v1.Part(tool_call=call) for call in (failed, cancelled, given)]
    assert await text(user("/call weather /call clock /call map"), assistant(*parts)) == (
        "The tools are done.\n"
        "weather failed: There is no such tool.\n"
        "clock cancelled: nothing\n"
        "map gave: a map, data of 1 B, which I cannot see"
    )


async def test_chunks_are_numbered_tokens() -> None:
    deltas = await replied(user("/chunks 3"))
    assert deltas[:-1] == [Text("1 "), Text("2 "), Text("3")]


@pytest.mark.parametrize("size", [0, 1, 1024, 3000])
async def test_big_has_the_requested_size(size: int) -> None:
    assert size == len((await text(user(f"/say x /big {size}"))).encode()) - 1


@pytest.mark.parametrize(
    "wrong",
    [
        "/chunks many",
        "/chunks 100001",
        "/chunks -1",
        "/big 4194305",
        "/pause 10001",
        "/fail",
        "/fail x",
        "/call",
        "/dialect",
        "/dialect x",
        "/cite",
        "/cite ftp://example.org",
    ],
)
async def test_a_directive_that_cannot_be_carried_out_is_answered_in_words(wrong: str) -> None:
    assert (await text(user(wrong))).startswith(f"{wrong.split(maxsplit=1)[0]} takes ")


async def test_images_are_made_and_sources_named() -> None:
    deltas = await replied(user("/say a /cite https://example.org/x?y /image /say b /image"))
    names = [delta.filename for delta in deltas if isinstance(delta, Media)]
    assert ["image-1.png", "image-2.png"] == names
    assert Cited([Source("https://example.org/x?y", "example.org")]) == deltas[-2]
    assert (await text(user("/cite https://example.org/x"))).startswith("I am the offline model.")


async def test_a_message_full_of_directives_has_a_reply_of_limited_length() -> None:
    """Directives beyond the first 16 KiB, or once there are 10000 pieces, are not begun."""
    assert len(calls(await replied(user("/call x " * 100_000)))) == 2048
    assert len(await replied(user("/chunks 10001 " * 1000))) == 10_002


async def test_the_finish_reason_can_be_requested() -> None:
    assert finish(await replied(user("/say x /stop content_filter"))).reason == "content_filter"
    assert finish(await replied(user("/say x"))).reason == "stop"


@pytest.mark.parametrize("name", sorted(DIALECTS))
async def test_each_dialect_has_the_data_that_its_provider_needs_back(name: str) -> None:
    """With each call and with the reasoning, after all that is said."""
    deltas = await replied(user(f"/dialect {name} /reason hm /call weather /call clock /say x"))
    returned = [delta for delta in deltas if isinstance(delta, Returned)]
    assert returned == deltas[-1 - len(returned) : -1]
    ids = [delta.data.call_id for delta in returned if delta.key is not None]
    assert (2, 2) == (len(ids), len(set(filter(None, ids))))
    for delta in returned:
        assert ("offline", "offline") == (delta.data.provider, delta.data.model)
        assert isinstance(json.loads(delta.data.members or b"{}"), dict)
    assert any(delta.key is None for delta in returned) == (name in {"deepseek", "kimi", "openrouter"})
    assert not [delta for delta in await replied(user(f"/dialect {name} /say x")) if isinstance(delta, Call)]


async def test_usage_counts_words() -> None:
    deltas = await replied(user("/reason a b /say c d e"), instruction="be kind")
    assert finish(deltas).usage == v1.Usage(
        input_tokens=9, output_tokens=5, reasoning_tokens=2, model_calls=1, model="offline"
    )


async def test_max_output_tokens_end_the_reply() -> None:
    deltas = await replied(user("/chunks 10"), max_tokens=4)
    assert [Text("1 "), Text("2 "), Text("3 "), Text("4 ")] == deltas[:-1]
    assert (finish(deltas).reason, finish(deltas).usage.output_tokens) == ("length", 4)


@pytest.mark.parametrize(
    ("how", "pieces", "reason"),
    [
        ("error", 0, v1.ERROR_REASON_MODEL_ERROR),
        ("unavailable", 0, v1.ERROR_REASON_MODEL_UNAVAILABLE),
        ("midway", 3, v1.ERROR_REASON_MODEL_UNAVAILABLE),
    ],
)
async def test_each_failure_can_be_requested(how: str, pieces: int, reason: v1.ErrorReason.ValueType) -> None:
    seen: list[Delta] = []

    async def listen() -> None:
        async for delta in OfflineProvider().stream(request(user(f"/chunks 6 /fail {how}"))):
            seen.append(delta)  # noqa: PERF401 - what came before the failure counts

    with pytest.raises(NotecaseError) as raised:
        await listen()
    assert reason == raised.value.reason
    assert [Text(f"{n} ") for n in range(1, pieces + 1)] == seen


async def test_a_pause_lies_before_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await replied(user("/pause 250 /chunks 3"))
    assert slept == [0.25] * 3


async def test_other_tasks_get_their_turn_between_pieces() -> None:
    """Without a pause too: the engine shares one event loop with every other run."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await replied(user("/chunks 50"))
    task.cancel()
    assert turns >= 50


async def test_a_reply_can_be_abandoned() -> None:
    """Closing the iterator ends the request, also in the middle of a pause."""
    stream = OfflineProvider().stream(request(user("/pause 10000 /chunks 5")))
    task = asyncio.ensure_future(anext(aiter(stream)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(StopAsyncIteration):
        await anext(aiter(stream))


WRITTEN = [*'/sayreasoncallchunks {}"0123456789\n', "/call x ", "/say ", "/big ", '{"a":', "/chunks 3", "/fail midway"]


@given(st.lists(st.sampled_from(WRITTEN), max_size=30))
def test_any_message_is_answered(pieces: list[str]) -> None:
    """Whatever is written, the reply ends with one Finish or one typed failure."""
    try:
        asyncio.run(replied(user("".join(pieces)), max_tokens=50))
    except NotecaseError as error:
        assert error.reason in {v1.ERROR_REASON_MODEL_ERROR, v1.ERROR_REASON_MODEL_UNAVAILABLE}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a", "b"]},
        {"type": "array", "items": {"type": ["integer", "null"], "minimum": 3}, "minItems": 2},
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"properties": {"next": {"$ref": "#/$defs/tree"}}}}},
        {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        {"properties": {"kind": {"const": 1}, "mood": {"enum": ["calm"]}}, "required": ["kind", "mood"]},
        {"type": "number", "maximum": -2.5},
        {"type": "string", "minLength": 30},
        {"allOf": [{"type": "object", "required": ["a"]}]},
        {},
    ],
    ids=str,
)
async def test_json_by_a_schema_is_made_up_and_valid(schema: dict[str, Any]) -> None:
    """Unless the message says what to reply; what the tools gave is not JSON either."""
    asked = request(user("Go"))._replace(output_schema=json.dumps(schema))
    done = v1.Part(tool_call=v1.ToolCall(tool="look", outcome=v1.ToolCall.OUTCOME_SUCCEEDED))
    for one in (asked, asked._replace(messages=[user("Go"), assistant(done)])):
        made = "".join([delta.text async for delta in OfflineProvider().stream(one) if isinstance(delta, Text)])
        Draft202012Validator(schema).validate(json.loads(made))
    told = asked._replace(messages=[user("/say [1]")])
    assert [Text("[1]")] == [delta async for delta in OfflineProvider().stream(told)][:-1]

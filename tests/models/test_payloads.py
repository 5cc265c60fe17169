"""Every kind of answer that a server may give, as bytes, with what it comes to: a reply, or one typed failure. None of
it depends on how the bytes were cut on their way."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.models.answers.redaction import Redactor
from notecase_server.models.chat_stream import ChatReply
from notecase_server.models.contract import Call, Delta, Finish, Reasoning, Refusal, Text

from tests.support.openai_server import DONE, chunk, event

MODEL_ERROR, UNAVAILABLE = v1.ERROR_REASON_MODEL_ERROR, v1.ERROR_REASON_MODEL_UNAVAILABLE


class Came(NamedTuple):
    """What an answer came to; of a failure its reason, code and words, behind what was said before it."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    finish: str = "stop"
    cut: bool = False
    tokens: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Input, cached input, output, reasoning."""
    reason: int = 0
    code: str = ""
    words: str = ""
    repeats: int | None = None


def failed(reason: int, words: str = "", *, code: str = "", repeats: int | None = None, **said: Any) -> Came:
    return Came(finish="", reason=reason, words=words, code=code, repeats=repeats, **said)


def come(pieces: Iterable[Delta], failure: NotecaseError | None) -> Came:
    calls: dict[int, tuple[str, str]] = {}
    said: dict[type, str] = {Text: "", Reasoning: "", Refusal: ""}
    finish = Finish("", v1.Usage())
    for piece in pieces:
        match piece:
            case Call(key, tool, arguments):
                before = calls.get(key, ("", ""))
                calls[key] = (before[0] + tool, before[1] + arguments)
            case Finish():
                finish = piece
            case Text() | Reasoning() | Refusal():
                said[type(piece)] += piece.text
    used = (failure.usage if failure else finish.usage) or v1.Usage()
    return Came(
        text=said[Text],
        reasoning=said[Reasoning],
        refusal=said[Refusal],
        calls=tuple(calls.values()),
        finish=finish.reason,
        cut=finish.cut,
        tokens=(used.input_tokens, used.cached_input_tokens, used.output_tokens, used.reasoning_tokens),
        reason=failure.reason if failure else 0,
        code=failure.metadata.get("code", "") if failure else "",
        words=failure.message if failure else "",
        repeats=failure.repeats if failure else None,
    )


def read(chunks: Iterable[bytes], *, behind_calls: bool = False) -> Came:
    reply = ChatReply("asked", Redactor(""), behind_calls=behind_calls)
    pieces: list[Delta] = []
    try:
        for data in chunks:
            pieces += reply.feed(data)
            if reply.done:
                break
        pieces += reply.end()
    except NotecaseError as failure:
        return come(pieces, failure)
    return come(pieces, None)


def call(name: str | None = None, arguments: Any = None, **members: Any) -> bytes:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return chunk({"tool_calls": [{**members, "function": function}]})


HI = chunk({"content": "Grüß "}) + chunk({"content": "dich"})
SAID = "Grüß dich"
STOP = chunk(finish="stop")
CALLS = chunk(finish="tool_calls")
END = STOP + DONE


def whole(data: bytes) -> bytes:
    """An event's JSON alone."""
    return data.removeprefix(b"data: ").rstrip()


LOOK = (("look", '{"q":"x"}'),)

REPLIES: dict[str, tuple[bytes, Came]] = {
    "a byte order mark": (b"\xef\xbb\xbf" + HI + END, Came(SAID)),
    "a byte order mark before JSON": (
        b"\xef\xbb\xbf" + json.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}).encode(),
        Came("a"),
    ),
    "no space behind the colon, CR LF": (
        (HI + END).replace(b"data: ", b"data:").replace(b"\n", b"\r\n"),
        Came(SAID),
    ),
    "CR alone": ((HI + END).replace(b"\n", b"\r"), Came(SAID)),
    "one line feed between events": ((HI + END).replace(b"\n\n", b"\n"), Came(SAID)),
    "two documents in one event": (HI.replace(b"\n\n", b"\n", 1) + END, Came(SAID)),
    "one document on three lines": (
        b'data: {"choices": [{"delta":\ndata: {"content": "a"},\ndata: "finish_reason": "stop"}]}\n\n' + DONE,
        Came("a"),
    ),
    "three documents without data": (
        b"\n".join(map(whole, (chunk({"content": "a"}), chunk({"content": "b"}), STOP))),
        Came("ab"),
    ),
    "the last event without an end": (HI + STOP.rstrip(), Came(SAID)),
    "comments, names, ids and pings between": (
        b": hello\n\nevent: ping\ndata: {}\n\nid: 3\nevent: message\n" + HI + b"retry: 5\n\n" + END,
        Came(SAID),
    ),
    "a whole completion": (
        json.dumps(
            {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}},
            indent=1,
        ).encode(),
        Came("a", tokens=(3, 0, 0, 0)),
    ),
    "a whole completion in a list": (
        json.dumps([{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}]).encode(),
        Came("a"),
    ),
    "a whole message behind the pieces": (
        HI + event({"object": "chat.completion", "choices": [{"message": {"content": SAID}, "finish_reason": "stop"}]}),
        Came(SAID),
    ),
    "a whole message that says more": (
        HI + event({"choices": [{"message": {"content": SAID + "!"}, "finish_reason": "stop"}]}),
        Came(SAID + "!"),
    ),
    "all of it so far each time": (
        b"".join(event({"choices": [{"message": {"content": SAID[:end]}}]}) for end in (2, 6, 9)) + END,
        Came(SAID),
    ),
    "pieces called messages": (
        b"".join(
            event({"object": "chat.completion.chunk", "choices": [{"message": {"content": text}}]})
            for text in ("a", "b")
        )
        + END,
        Came("ab"),
    ),
    "a whole message with the call of the pieces": (
        call("look", '{"q":"x"}', index=0, id="a")
        + event(
            {
                "object": "chat.completion",
                "choices": [
                    {
                        "message": {
                            "tool_calls": [{"id": "a", "function": {"name": "look", "arguments": '{"q":"x"}'}}]
                        },
                        "finish_reason": "tool_calls",
                    }
                ],
            }
        ),
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "content as parts": (
        chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]})
        + chunk({"content": [{"type": "text", "text": "a"}, {"type": "new", "x": 1}, "b"]})
        + END,
        Came("ab", "hm"),
    ),
    "content as one part": (chunk({"content": {"type": "text", "text": {"value": "a"}}}) + END, Came("a")),
    "a delta that is a string": (event({"choices": [{"delta": "a"}]}) + END, Came("a")),
    "choices that are one object": (event({"choices": {"delta": {"content": "a"}}}) + END, Came("a")),
    "members of odd types": (
        event(
            {"id": 7, "created": "x", "model": 5, "choices": [{"index": "0", "delta": {"content": "a"}, "logprobs": 3}]}
        ).replace(b'"index":"0",', b"")
        + END,
        Came("a"),
    ),
    "reasoning under its names": (
        b"".join(
            chunk({name: name[0]})
            for name in ("reasoning_content", "reasoning", "reasoning_text", "thinking", "thought")
        )
        + HI
        + END,
        Came(SAID, "rrrtt"),
    ),
    "reasoning as an object": (chunk({"reasoning": {"content": "hm"}}) + HI + END, Came(SAID, "hm")),
    "reasoning in details alone": (
        chunk(
            {
                "content": "",
                "reasoning_details": [
                    {"type": "reasoning.text", "text": "h", "signature": "s"},
                    {"type": "reasoning.encrypted", "data": "zz"},
                    {"type": "reasoning.summary", "summary": "m"},
                ],
            }
        )
        + HI
        + END,
        Came(SAID, "hm"),
    ),
    "reasoning in details and in words": (
        chunk({"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}) + HI + END,
        Came(SAID, "hm"),
    ),
    "content marked as a thought": (
        chunk({"content": "hm", "extra_content": {"google": {"thought": True}}}) + HI + END,
        Came(SAID, "hm"),
    ),
    "reasoning in tags": (
        b"".join(chunk({"content": text}) for text in ("\n<th", "ink>h", "m</thi", "nk>\n", "\nGrüß dich <think>"))
        + END,
        Came(SAID + " <think>", "hm"),
    ),
    "what only begins as a tag": (chunk({"content": "<th"}) + chunk({"content": "ree>"}) + END, Came("<three>")),
    "an opened tag alone": (chunk({"content": "<thi"}) + END, Came("<thi")),
    "a refusal": (chunk({"refusal": "I will not."}) + END, Came(refusal="I will not.")),
    "a refusal as a part": (
        chunk({"refusal": [{"type": "refusal", "text": "no"}]}) + END,
        Came(refusal="no"),
    ),
    "audio with its transcript": (
        chunk({"audio": {"id": "x", "transcript": "Grüß "}})
        + chunk({"audio": {"data": "AAAA", "transcript": "dich"}})
        + END,
        Came(SAID),
    ),
    "an image beside text": (
        chunk({"content": "Here:", "images": [{"image_url": {"url": "data:image/png;base64," + "A" * 3000}}]}) + END,
        Came("Here:"),
    ),
    "cut at a limit": (HI + chunk(finish="MAX_TOKENS") + DONE, Came(SAID, finish="MAX_TOKENS", cut=True)),
    "cut at the context window": (
        HI + chunk(finish="model_context_window_exceeded"),
        Came(SAID, finish="model_context_window_exceeded", cut=True),
    ),
    "withheld half-way": (HI + chunk(finish="sensitive"), Came(SAID, finish="sensitive", cut=True)),
    "a finish reason of its own": (HI + chunk(finish="because"), Came(SAID, finish="because")),
    "a finish reason that has no shape": (HI + chunk(finish="x\n" * 90), Came(SAID)),
    "calls without a finish reason": (call("look", '{"q":"x"}') + DONE, Came(calls=LOOK, finish="tool_calls")),
    "arguments as an object": (
        call("look", {"q": "x"}, index=0, id="a") + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "arguments as an empty object": (
        call("look", {}, id="a") + CALLS,
        Came(calls=(("look", "{}"),), finish="tool_calls"),
    ),
    "arguments in a JSON string": (
        call("look", json.dumps('{"q":"x"}'), id="a") + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "arguments that are none": (
        b"".join(
            call("look", text, index=n, id=f"c{n}") for n, text in enumerate(("null", "", None, "None", '""', "[]"))
        )
        + CALLS,
        Came(calls=(("look", ""),) * 6, finish="tool_calls"),
    ),
    "arguments sent again at the end": (
        call("look", "", index=0, id="a")
        + call(None, '{"q":', index=0)
        + call(None, '"x"}', index=0)
        + call("look", '{"q":"x"}', index=0, id="a")
        + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "arguments sent again, spaced otherwise": (
        call("look", '{"q":"x"}', index=0, id="a")
        + call("look", {"q": "x"}, index=0, id="a")
        + call("look", '{"q": "x"}', index=0, id="a")
        + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "all arguments so far each time": (
        b"".join(call("look", '{"q":"x"}'[:end], index=0, id="a") for end in (2, 5, 8, 9)) + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "arguments that only look sent again": (
        call("look", '{"q":', index=0, id="a") + call(None, '{"q":1}}', index=0) + CALLS,
        Came(calls=(("look", '{"q":{"q":1}}'),), finish="tool_calls"),
    ),
    "an id and an index of other types": (
        call("look", '{"q":"x"}', index="first", id=17) + call("look", '{"q":"y"}', index=1.5, id=["odd"]) + CALLS,
        Came(calls=(*LOOK, ("look", '{"q":"y"}')), finish="tool_calls"),
    ),
    "two calls without arguments under one index": (
        call("ping", "", index=0, id="a") + call("pong", "", index=0, id="b") + CALLS,
        Came(calls=(("ping", ""), ("pong", "")), finish="tool_calls"),
    ),
    "two calls under one index, arguments late": (
        call("ping", "", index=0, id="a")
        + call("look", "", index=0, id="b")
        + call(None, '{"q":"x"}', index=0)
        + CALLS,
        Came(calls=(("ping", ""), *LOOK), finish="tool_calls"),
    ),
    "one call that is no list": (
        chunk({"tool_calls": {"id": "a", "function": {"name": "look", "arguments": '{"q":"x"}'}}}) + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "a call without its function": (
        chunk({"tool_calls": [{"id": "a", "name": "look", "arguments": {"q": "x"}}]}) + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "the call of former times": (
        chunk({"function_call": {"name": "look", "arguments": ""}})
        + chunk({"function_call": {"arguments": '{"q":"x"}'}})
        + chunk(finish="function_call"),
        Came(calls=LOOK, finish="function_call"),
    ),
    "usage in the choice": (
        HI + event({"choices": [{"delta": {}, "finish_reason": "stop", "usage": {"prompt_tokens": 3}}]}),
        Came(SAID, tokens=(3, 0, 0, 0)),
    ),
    "usage in parts, and a later 0": (
        chunk({"content": "a"}, usage={"prompt_tokens": 3, "completion_tokens": 0})
        + STOP
        + chunk(usage={"prompt_tokens": 0, "completion_tokens": "5"}),
        Came("a", tokens=(3, 0, 5, 0)),
    ),
    "usage of Groq": (
        HI + chunk(finish="stop", x_groq={"id": "x", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
        Came(SAID, tokens=(3, 0, 2, 0)),
    ),
    "usage of odd types": (
        HI + chunk(finish="stop", usage=[1]) + chunk(usage={"prompt_tokens": {}, "completion_tokens": True}) + DONE,
        Came(SAID),
    ),
    "cached tokens, and reasoning": (
        HI
        + STOP
        + chunk(
            usage={"prompt_tokens": 9, "prompt_cache_hit_tokens": 4, "completion_tokens": 3, "reasoning_tokens": 2}
        ),
        Came(SAID, tokens=(9, 4, 3, 2)),
    ),
}

ENDED = "The model provider ended its answer before the reply was whole."
NOW = "The model provider cannot answer just now"
LONG = "The conversation is longer than the model 'asked' takes: "

FAILURES: dict[str, tuple[bytes, Came]] = {
    "nothing": (b"", failed(UNAVAILABLE, ENDED)),
    "an end without one": (HI, failed(UNAVAILABLE, ENDED, text=SAID)),
    "an end within a document": (HI + STOP[:-9], failed(UNAVAILABLE, ENDED, text=SAID)),
    "a completion that was cut": (b'{"choices": [{"message": {"content": "a', failed(UNAVAILABLE, ENDED)),
    "done and nothing else": (
        DONE,
        failed(UNAVAILABLE, "The model provider ended its answer without a reply (no finish reason)."),
    ),
    "stop and nothing else": (
        chunk({"role": "assistant", "content": ""}) + STOP + chunk(usage={"prompt_tokens": 3}) + DONE,
        failed(
            UNAVAILABLE,
            "The model provider ended its answer without a reply (finish reason 'stop').",
            tokens=(3, 0, 0, 0),
        ),
    ),
    "white space and nothing else": (
        chunk({"content": "\n"}) + END,
        failed(UNAVAILABLE, "The model provider ended its answer without a reply (finish reason 'stop')."),
    ),
    "calls that never came": (
        chunk({"role": "assistant"}) + CALLS,
        failed(UNAVAILABLE, "The model provider ended its answer without a reply (finish reason 'tool_calls')."),
    ),
    "reasoning and nothing else": (
        chunk({"reasoning": "hm"}) + STOP,
        failed(
            UNAVAILABLE, "The model provider ended its answer without a reply (finish reason 'stop').", reasoning="hm"
        ),
    ),
    "reasoning up to the limit": (
        chunk({"content": "<think>hm"}) + chunk(finish="length"),
        failed(
            MODEL_ERROR,
            "The model used all the tokens that it may before it said anything (finish reason 'length').",
            reasoning="hm",
        ),
    ),
    "all of it withheld": (
        chunk(finish="content_filter") + DONE,
        failed(MODEL_ERROR, "The model provider withheld the reply (finish reason 'content_filter')."),
    ),
    "no room in the context window": (
        chunk(finish="model_context_window_exceeded"),
        failed(
            MODEL_ERROR,
            LONG.removesuffix(": ") + " (finish reason 'model_context_window_exceeded').",
            code="context_length_exceeded",
        ),
    ),
    "cut by a failure": (
        HI + chunk(finish="abort") + DONE,
        failed(
            UNAVAILABLE,
            "The model provider cut the reply because of a failure (finish reason 'abort').",
            text=SAID,
        ),
    ),
    "a call that could not be read": (
        chunk(finish="MALFORMED_FUNCTION_CALL"),
        failed(
            MODEL_ERROR,
            "The model provider could not read a call that the model wrote (finish reason 'MALFORMED_FUNCTION_CALL').",
            repeats=1,
        ),
    ),
    "a web page": (
        b"<html>Sign in</html>",
        failed(
            MODEL_ERROR, "The model provider answered with a web page in place of a reply; its base URL may be wrong."
        ),
    ),
    "images and nothing else": (
        chunk({"content": "", "images": [{"image_url": {"url": "data:image/png;base64,AAAA"}}]}) + END,
        failed(v1.ERROR_REASON_CONTENT_UNSUPPORTED, "The model answered with images alone; only its words are kept."),
    ),
    "an image as a part and nothing else": (
        chunk({"content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}) + END,
        failed(v1.ERROR_REASON_CONTENT_UNSUPPORTED, "The model answered with images alone; only its words are kept."),
    ),
    "audio without a transcript": (
        chunk({"audio": {"id": "x", "data": "AAAA"}}) + END,
        failed(v1.ERROR_REASON_CONTENT_UNSUPPORTED, "The model answered with audio alone; only its words are kept."),
    ),
    "what is not JSON": (
        HI + b"data: oops\n\n" + END,
        failed(
            MODEL_ERROR, "The model provider sent something that is no part of a Chat Completions reply.", text=SAID
        ),
    ),
}

TROUBLE = {"message": "The pump is broken.", "type": "InternalServerError", "code": 500}
"""In each shape and place below the same error."""

SHAPES: dict[str, bytes] = {
    "in `error`": event({"error": TROUBLE}),
    "flat": event({"object": "error", **TROUBLE}),
    "flat, by another name": event({"error_code": 1000, "error_msg": "The pump is broken.", "id": "x"}),
    "flat, with a status": event({"status": 500, "msg": "The pump is broken."}),
    "flat, words alone": event({"message": "The pump is broken."}),
    "in a list": event([{"error": TROUBLE}]),
    "in an error": event({"error": {"error": TROUBLE}}),
    "in `errors`": event({"errors": [TROUBLE]}),
    "as words": event({"error": "The pump is broken."}),
    "in a choice": event(
        {"choices": [{"index": 0, "delta": {"content": ""}, "error": TROUBLE, "finish_reason": "error"}]}
    ),
    "beside choices": event({"error": TROUBLE, "choices": [{"delta": {"content": ""}, "finish_reason": "error"}]}),
    "of MiniMax": event({"choices": None, "base_resp": {"status_code": 1000, "status_msg": "The pump is broken."}}),
    "of Groq": event({"choices": [], "x_groq": {"id": "x", "error": "The pump is broken."}}),
    "named, without a member": b"event: error\n" + event({"message": "The pump is broken."}),
    "named, behind its data": event({"message": "The pump is broken.", "id": "x", "type": "error"}),
    "named, plain words": b"event: error\ndata: The pump is broken.\n\n",
    "without data": json.dumps({"error": TROUBLE}).encode() + b"\n",
    "without data and end": json.dumps({"error": TROUBLE}).encode(),
    "in the raw words of another": event(
        {
            "error": {
                "message": "The pump is broken.",
                "code": 502,
                "metadata": {"raw": '{"error": "The pump is broken."}'},
            }
        }
    ),
    "as FastAPI tells": event({"detail": "The pump is broken."}),
    "not successful": event({"success": False, "msg": "The pump is broken."}),
}

EVERYTHING = {
    **REPLIES,
    **FAILURES,
    **{f"error {name}": (HI + shape + DONE, None) for name, shape in SHAPES.items()},
    **{f"error {name}, first": (shape + DONE, None) for name, shape in SHAPES.items()},
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_is_what_it_says(name: str) -> None:
    data, expected = REPLIES[name]
    assert expected == read([data])


@pytest.mark.parametrize("name", FAILURES)
def test_what_is_no_reply_is_one_typed_failure(name: str) -> None:
    data, expected = FAILURES[name]
    assert expected == read([data])


@pytest.mark.parametrize("name", SHAPES)
def test_an_error_is_found_in_any_shape_and_place(name: str) -> None:
    """Behind text and before any, with the announced end behind it: never half a reply, and with the server's words."""
    for before in (b"", HI, HI + STOP):
        for after in (b"", DONE, END):
            came = read([before + SHAPES[name] + (b"\n\n" if after else b"") + after])
            assert (UNAVAILABLE, "") == (came.reason, came.finish)
            assert came.words.startswith(NOW)
            assert came.words.endswith(": The pump is broken.")


@pytest.mark.parametrize("shape", SHAPES)
def test_an_error_is_found_where_the_answer_is_one_document(shape: str) -> None:
    data = SHAPES[shape]
    if data.startswith(b"data: "):
        came = read([whole(data)])
        assert (UNAVAILABLE, True) == (came.reason, came.words.endswith(": The pump is broken."))


@pytest.mark.parametrize(
    "data",
    [
        event({"type": "ping"}),
        event({"code": 0, "message": "success"}),
        event({"base_resp": {"status_code": 0, "status_msg": "success"}}),
        event({"error": None, "errors": []}),
        event({"id": "x", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]}),
        event({"id": "x", "message": "queued"}),
        event({"object": "chat.completion.chunk", "x_groq": {"id": "x"}}),
        b"event: status\n" + event({"type": "status", "id": "x"}),
    ],
)
def test_what_is_no_error_is_none(data: bytes) -> None:
    assert Came(SAID) == read([data + HI + data + END + data])


def test_behind_finished_calls_a_model_may_have_nothing_more_to_say() -> None:
    """But only where it says that it is done."""
    assert Came() == read([END], behind_calls=True)
    assert Came(reasoning="hm") == read([chunk({"reasoning": "hm"}) + END], behind_calls=True)
    for data in (DONE, CALLS, chunk(finish="because"), chunk(finish="abort")):
        assert read([data], behind_calls=True).reason == UNAVAILABLE


def test_a_choice_beyond_the_first_is_another_reply() -> None:
    other = event({"choices": [{"index": 1, "delta": {"content": "other"}, "finish_reason": "length"}]})
    assert Came(SAID) == read([HI + other + END])


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    ends = [*sorted({offset for offset in at if offset < len(data)}), len(data)]
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_cut_changes_what_an_answer_comes_to(name: str) -> None:
    """Cut in two at every byte, and into single bytes."""
    data = EVERYTHING[name][0]
    expected = read([data])
    assert expected == read(data[at : at + 1] for at in range(len(data)))
    for at in range(len(data)):
        assert expected == read([data[:at], data[at:]]), f"cut at {at}"


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(EVERYTHING)), st.lists(st.integers(0, 2000), max_size=40))
def test_no_way_to_join_the_cuts_changes_it(name: str, at: list[int]) -> None:
    data = EVERYTHING[name][0]
    assert read([data]) == read(cut(data, at))

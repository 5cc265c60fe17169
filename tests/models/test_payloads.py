"""Every kind of answer that a server may give, as bytes, with what it comes to: a reply, or one typed failure. None of
it depends on how the bytes were cut on their way."""

import base64
import io
import json
import wave
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.models.answers.media import Encoded, decoded
from notecase_server.models.answers.redaction import Redactor
from notecase_server.models.chat_stream import ChatReply, Piece
from notecase_server.models.contract import Call, Cited, Finish, Link, Reasoning, Refusal, Source, Text, Thought

from tests.support.openai_server import DONE, chunk, event

MODEL_ERROR, UNAVAILABLE = v1.ERROR_REASON_MODEL_ERROR, v1.ERROR_REASON_MODEL_UNAVAILABLE


class Came(NamedTuple):
    """What an answer came to; of a failure its reason, code and words, behind what was said before it."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    made: tuple[tuple[str, bytes | str], ...] = ()
    """Images and clips: media type, and content or address."""
    sources: tuple[Source, ...] = ()
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


def come(pieces: Iterable[Piece], failure: NotecaseError | None) -> Came:
    calls: dict[int, tuple[str, str]] = {}
    said: dict[type, str] = {Text: "", Reasoning: "", Refusal: ""}
    made: list[tuple[str, bytes | str]] = []
    sources: tuple[Source, ...] = ()
    finish = Finish("", v1.Usage())
    for piece in pieces:
        match piece:
            case Encoded():
                data, media_type, _ = decoded(piece, 1)
                made.append((media_type, data))
            case Link(uri, media_type):
                made.append((media_type, uri))
            case Cited(found):
                sources = tuple(found)
            case Call(key, tool, arguments):
                before = calls.get(key, ("", ""))
                calls[key] = (before[0] + tool, before[1] + arguments)
            case Finish():
                finish = piece
            case Thought(text):
                assert said[Text] == text[: len(said[Text])], "it begins with all text so far"
                said[Text], said[Reasoning] = "", text
            case Text() | Reasoning() | Refusal():
                said[type(piece)] += piece.text
    used = (failure.usage if failure else finish.usage) or v1.Usage()
    return Came(
        text=said[Text],
        reasoning=said[Reasoning],
        refusal=said[Refusal],
        calls=tuple(calls.values()),
        made=tuple(made),
        sources=sources,
        finish=finish.reason,
        cut=finish.cut,
        tokens=(used.input_tokens, used.cached_input_tokens, used.output_tokens, used.reasoning_tokens),
        reason=failure.reason if failure else 0,
        code=failure.metadata.get("code", "") if failure else "",
        words=failure.message if failure else "",
        repeats=failure.repeats if failure else None,
    )


def read(chunks: Iterable[bytes], *, behind_calls: bool = False, think_tags: bool = True) -> Came:
    reply = ChatReply("asked", Redactor(""), behind_calls=behind_calls, think_tags=think_tags, audio_format="pcm16")
    pieces: list[Piece] = []
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


def said_in(*pieces: str) -> bytes:
    return b"".join(chunk({"content": piece}) for piece in pieces)


def whole(data: bytes) -> bytes:
    """An event's JSON alone."""
    return data.removeprefix(b"data: ").rstrip()


LOOK = (("look", '{"q":"x"}'),)
PNG = b"\x89PNG\r\n\x1a\n and so on"
PNG_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
OTHER_URL = "data:image/png;base64," + base64.b64encode(PNG + b"2").decode()
THIRD_URL = "data:;base64," + base64.b64encode(PNG + b"3").decode()
IMAGE = (("image/png", PNG),)
ELSEWHERE = "https://images.example/a.webp?sign=x"
SAMPLES = bytes(range(40))


def images(*entries: Any, **members: Any) -> bytes:
    return chunk({"images": list(entries), **members})


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def wav(samples: bytes) -> tuple[tuple[str, bytes | str], ...]:
    """A clip of 24,000 samples a second, 16 bits each, as Python writes one."""
    file = io.BytesIO()
    with wave.open(file, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(24_000)
        made.writeframes(samples)
    return (("audio/wav", file.getvalue()),)


MORE = chunk({"content": "!"})

REPLIES: dict[str, tuple[bytes, Came]] = {
    **{
        f"data that keeps the connection: {data}": (HI + f"data: {data}\n\n".encode() + MORE + END, Came(SAID + "!"))
        for data in (": keepalive", "ping", "[PING]", "null", '""', "   ", "keep-alive", "2026-11-30T10:00:00Z", "{}")
    },
    "a beat of the heart, named": (HI + b"event: heartbeat\ndata: 17\n\n" + MORE + END, Came(SAID + "!")),
    "events within events": ((HI + END).replace(b"data: ", b"data: data: "), Came(SAID)),
    "a mark before each event": ((HI + END).replace(b"data: ", b"\xef\xbb\xbfdata: "), Came(SAID)),
    "NUL behind each event": ((HI + END).replace(b"\n\n", b"\n\n\0"), Came(SAID)),
    "a field of its own": (HI + b"time: 17\n\n" + DONE, Came(SAID)),
    "fields with a capital": ((HI + END).replace(b"data: ", b"Data: "), Came(SAID)),
    **{
        f"the end as {data}": (HI + f"data:{data}\n\n".encode(), Came(SAID))
        for data in ("  [DONE]", " [done]", " DONE", ' "[DONE]"')
    },
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
    "the closing tag alone": (
        said_in("I weigh ", "<it>.\n</th", "ink>\n", "\nGrüß dich </think>") + END,
        Came(SAID + " </think>", "I weigh <it>.\n"),
    ),
    "the closing tag alone, within a line": (
        said_in("Answer ", "briefly.</think>", SAID) + END,
        Came(SAID, "Answer briefly."),
    ),
    "the closing tag alone, behind a mention of it": (
        said_in("Do I write `</think>`? ", "No. </think>\n", SAID) + END,
        Came(SAID, "Do I write `</think>`? No. "),
    ),
    "another closing tag alone": (said_in("hm[/THI", "NK]", SAID) + END, Came(SAID, "hm")),
    "the closing tag first": (said_in("</think>", "\n\n", SAID) + END, Came(SAID)),
    "the closing tag first, behind reasoning": (
        chunk({"reasoning": "hm"}) + said_in("</think>\n", SAID) + END,
        Came(SAID, "hm"),
    ),
    "the closing tag alone, before a call": (
        said_in("hm\n</think>") + call("look", '{"q":"x"}', index=0, id="a") + CALLS,
        Came(reasoning="hm\n", calls=LOOK, finish="tool_calls"),
    ),
    "the channels of gpt-oss": (
        said_in(
            "<|channel|>", "analysis", "<|message|>hm", "<|end|><|start|>assistant<|channel|>final<|message|>", SAID
        )
        + END,
        Came(SAID, "hm"),
    ),
    "what only begins as a closing tag": (said_in("a </thi", "s> b <") + END, Came("a </this> b <")),
    "what only begins as a closing tag, before a call": (
        said_in("a </thi") + call("look", '{"q":"x"}', index=0, id="a") + CALLS,
        Came("a </thi", calls=LOOK, finish="tool_calls"),
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
        + chunk({"audio": {"data": base64_of(SAMPLES[:7]), "transcript": "dich"}})
        + chunk({"audio": {"data": base64_of(SAMPLES[7:])}})
        + chunk({"audio": {"expires_at": 1_900_000_000}})
        + END,
        Came(SAID, made=wav(SAMPLES)),
    ),
    "audio whose base64 is cut anywhere": (
        b"".join(
            chunk({"audio": {"data": base64_of(SAMPLES)[start:end]}})
            for start, end in ((0, 1), (1, 7), (7, 26), (26, 99))
        )
        + END,
        Came(made=wav(SAMPLES)),
    ),
    "audio that ends with its expiry and no reason": (
        chunk({"audio": {"data": base64_of(SAMPLES), "transcript": SAID}}) + chunk({"audio": {"expires_at": 1}}),
        Came(SAID, made=wav(SAMPLES)),
    ),
    "audio in a whole message": (
        event(
            {
                "choices": [
                    {
                        "message": {
                            "content": None,
                            "audio": {"id": "x", "data": base64_of(b"RIFF\0\0\0\0WAVEfmt "), "transcript": SAID},
                        },
                        "finish_reason": "stop",
                    }
                ]
            }
        ),
        Came(SAID, made=(("audio/wav", b"RIFF\0\0\0\0WAVEfmt "),)),
    ),
    "audio that a whole message repeats": (
        chunk({"audio": {"transcript": "Grüß "}})
        + chunk({"audio": {"data": base64_of(SAMPLES), "transcript": "dich"}})
        + event({"choices": [{"message": {"audio": {"data": base64_of(SAMPLES), "transcript": SAID}}}]})
        + END,
        Came(SAID, made=wav(SAMPLES)),
    ),
    "audio without a transcript": (
        chunk({"audio": {"id": "x", "data": base64_of(SAMPLES + b"?")}}) + END,
        Came(made=wav(SAMPLES)),
    ),
    "MP3 in a data URL": (
        chunk({"audio": {"data": "data:audio/mp3;base64," + base64_of(b"ID3")}}) + END,
        Came(made=(("audio/mp3", b"ID3"),)),
    ),
    "an image beside text": (
        images({"type": "image_url", "image_url": {"url": PNG_URL}}, content="Here:") + END,
        Came("Here:", made=IMAGE),
    ),
    "an image alone": (images({"image_url": {"url": PNG_URL}}, content="") + END, Came(made=IMAGE)),
    "an image behind finished text, repeated in a whole message": (
        HI
        + images({"type": "image_url", "index": 0, "image_url": {"url": PNG_URL}})
        + event(
            {"choices": [{"message": {"content": SAID, "images": [{"image_url": {"url": PNG_URL}}]}}]},
        )
        + END,
        Came(SAID, made=IMAGE),
    ),
    "two images": (
        images({"image_url": {"url": PNG_URL}}, {"image_url": {"url": "data:image/jpeg;base64,/9j/"}}) + END,
        Came(made=(*IMAGE, ("image/jpeg", b"\xff\xd8\xff"))),
    ),
    "images in every known shape": (
        images(
            {"image_url": PNG_URL},
            OTHER_URL,
            {"url": THIRD_URL},
            {"b64_json": base64_of(PNG + b"c")},
            {"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": base64_of(PNG + b"d")}},
            {"inline_data": {"mime_type": "IMAGE/AVIF", "data": base64_of(PNG + b"e")}},
            {"inlineData": {"mimeType": "image/bmp; q=1", "data": base64_of(PNG + b"f")}},
            {"type": "image_generation_call", "result": base64_of(PNG + b"g")},
            {"type": "image", "data": base64_of(PNG + b"h"), "mimeType": "text/html"},
        )
        + END,
        Came(
            made=(
                ("image/png", PNG),
                ("image/png", PNG + b"2"),
                ("image/png", PNG + b"3"),
                ("image/png", PNG + b"c"),
                ("image/tiff", PNG + b"d"),
                ("image/avif", PNG + b"e"),
                ("image/bmp", PNG + b"f"),
                ("image/png", PNG + b"g"),
                ("image/png", PNG + b"h"),
            )
        ),
    ),
    "one image that is no list": (chunk({"image": {"url": PNG_URL, "detail": "auto"}}) + END, Came(made=IMAGE)),
    "images as parts": (
        chunk(
            {
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "output_image", "image_url": PNG_URL},
                    {"inline_data": {"data": base64_of(PNG + b"!")}},
                    {"type": "text", "text": "b"},
                ]
            }
        )
        + END,
        Came("ab", made=(*IMAGE, ("image/png", PNG + b"!"))),
    ),
    "an image in a whole completion": (
        json.dumps(
            {
                "choices": [
                    {"message": {"content": "a", "images": [{"image_url": {"url": PNG_URL}}]}, "finish_reason": "stop"}
                ]
            }
        ).encode(),
        Came("a", made=IMAGE),
    ),
    "base64 for URLs, with line breaks and without padding": (
        images({"image_url": {"url": "data:image/gif;base64,R0lG\r\nOD_-\n_w"}}) + END,
        Came(made=(("image/gif", b"GIF8?\xfe\xff"),)),
    ),
    "content of no known kind": (
        images({"image_url": {"url": "data:application/x-thing;base64,AAAA"}}) + END,
        Came(made=(("application/octet-stream", b"\0\0\0"),)),
    ),
    "an image elsewhere": (
        images({"image_url": {"url": ELSEWHERE}}, {"image_url": {"url": "http://images.example/b"}}, content="a") + END,
        Came("a", made=(("image/webp", ELSEWHERE), ("image/*", "http://images.example/b"))),
    ),
    "an image of no known shape beside text": (
        images({"file": "a.png"}, {"image_url": {"url": "files/a.png"}}, 7, content="a") + END,
        Came("a"),
    ),
    "citations of places": (
        HI
        + chunk(
            {
                "annotations": [
                    {
                        "type": "url_citation",
                        "url_citation": {"url": "https://a.example", "title": "A", "start_index": 2},
                    },
                    {
                        "type": "url_citation",
                        "url_citation": {"url": "https://b.example", "title": "B", "start_index": 5, "end_index": 9},
                    },
                    {"type": "url_citation", "url": "https://c.example", "start_index": 0, "end_index": 4},
                    {"type": "file_citation", "file_citation": {"file_id": "x"}},
                    "odd",
                ]
            }
        )
        + chunk({"annotations": [{"url_citation": {"url": "https://c.example", "start_index": 0, "end_index": 4}}]})
        + END,
        Came(
            SAID,
            sources=(
                Source("https://a.example", "A"),
                Source("https://b.example", "B", 5, 9),
                Source("https://c.example", "", 0, 4),
            ),
        ),
    ),
    "citations behind reasoning in tags": (
        chunk({"content": "<think>hm</think>\n\nGrüß dich"})
        + chunk({"annotations": [{"url": "https://a.example", "start_index": 25, "end_index": 29}]})
        + END,
        Came(SAID, "hm", sources=(Source("https://a.example", "", 6, 10),)),
    ),
    "citations in a list, with each chunk": (
        b"".join(
            chunk({"content": text}, citations=["https://a.example", "https://b.example"], search_results=results)
            for text, results in (
                ("Grüß ", None),
                ("dich", [{"title": "B", "url": "https://b.example", "date": None}, {"url": "https://c.example"}]),
            )
        )
        + END,
        Came(
            SAID,
            sources=(
                Source("https://a.example", ""),
                Source("https://b.example", "B"),
                Source("https://c.example", ""),
            ),
        ),
    ),
    "citations of odd types": (
        chunk(
            {"content": SAID, "annotations": {"url": "x"}},
            citations="x",
            search_results=[7, {"url": 7}, {"url": "ftp://x"}],
        )
        + END,
        Came(SAID),
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
    **{
        f"arguments under another name, {where}: {name}": (
            chunk({"tool_calls": [{"index": 0, "id": "a", **entry}]}) + CALLS,
            Came(calls=LOOK, finish="tool_calls"),
        )
        for name in ("input", "parameters")
        for where, entry in (
            ("next to the id", {"name": "look", name: {"q": "x"}}),
            ("in the function", {"function": {"name": "look", name: '{"q":"x"}'}}),
        )
        if (name, where) != ("input", "in the function")
    },
    "a call within the content": (
        chunk({"content": [{"type": "text", "text": "a"}, {"type": "tool_use", "name": "look", "input": {"q": "x"}}]})
        + chunk(finish="tool_use"),
        Came("a", calls=LOOK, finish="tool_use"),
    ),
    "a call within the content, as OpenAI's Responses have it": (
        chunk({"content": {"type": "function_call", "call_id": "a", "name": "look", "arguments": '{"q":"x"}'}}) + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "calls within the content and next to it": (
        chunk(
            {
                "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {"q": "x"}}],
                "tool_calls": [{"id": "a", "function": {"name": "look", "arguments": '{"q":"x"}'}}],
            }
        )
        + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "JSON as an object": (chunk({"content": {"a": "ü"}}) + STOP, Came('{"a": "ü"}')),
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
    **{
        f"space around a tool's name: {name!r}": (
            call(name, '{"q":', index=0, id="a") + call(None, '"x"}', index=0) + CALLS,
            Came(calls=LOOK, finish="tool_calls"),
        )
        for name in (" look", "look\n", "\tlook ")
    },
    "a name in pieces, the first of them space": (
        call(" ", "", index=0, id="a") + call("look", '{"q":"x"}', index=0) + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "arguments before the name": (
        call(None, '{"q":"x"}', index=0) + call("look", index=0, id="a") + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    **{
        f"one tool twice without arguments, in one list: {members}": (
            chunk({"tool_calls": [{"id": each, "function": {"name": "ping"}} | members for each in "ab"]})
            + chunk({"tool_calls": [{"id": each, "function": {"name": "ping"}} | members for each in "ab"]})
            + CALLS,
            Came(calls=(("ping", ""), ("ping", "")), finish="tool_calls"),
        )
        for members in ({"index": 0}, {})
    },
    "numbers that are another call's, behind ids that are known": (
        call("look", '{"q":', index=0, id="a")
        + call("look", '{"q":', index=1, id="b")
        + call(None, '"y"}', index=0, id="b")
        + call(None, '"x"}', index=0, id="a")
        + CALLS,
        Came(calls=(*LOOK, ("look", '{"q":"y"}')), finish="tool_calls"),
    ),
    "one id for two numbers": (
        call("look", '{"q":', index=0, id="a")
        + call("ping", "{", index=1, id="a")
        + call(None, '"x"}', index=0, id="a")
        + call(None, "}", index=1, id="a")
        + CALLS,
        Came(calls=(*LOOK, ("ping", "{}")), finish="tool_calls"),
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
    "two calls of one tool under one index, arguments late": (
        call("look", "", index=0, id="a")
        + call(None, '{"q":"x"}', index=0)
        + call("look", "", index=0, id="b")
        + call(None, '{"q":"y"}', index=0)
        + CALLS,
        Came(calls=(*LOOK, ("look", '{"q":"y"}')), finish="tool_calls"),
    ),
    "two calls of one tool without an index, arguments late": (
        call("look", "", id="a") + call(None, '{"q":"x"}') + call("look", "", id="b") + call(None, '{"q":"y"}') + CALLS,
        Came(calls=(*LOOK, ("look", '{"q":"y"}')), finish="tool_calls"),
    ),
    "a name sent again at the end, with another id": (
        call("look", '{"q":"x"}', index=0, id="a") + call("look", "", index=0, id="b") + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "an index as text": (
        call("look", '{"q":', index="0", id="a") + call(None, '"x"}', index=0) + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "an index for each piece": (
        call("look", "", index=0, id="a")
        + call("", '{"q":', index=1, id="")
        + call("", '"x"}', index=2, id="")
        + call("ping", "", index=3, id="b")
        + CALLS,
        Came(calls=(*LOOK, ("ping", "")), finish="tool_calls"),
    ),
    "an index for each piece, with id and name": (
        call("look", '{"q":', index=0, id="a") + call("look", '"x"}', index=1, id="a") + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "an empty call beside text": (
        chunk({"content": SAID, "tool_calls": [{"index": 0, "id": "", "function": {"name": "", "arguments": ""}}]})
        + END,
        Came(SAID),
    ),
    "an empty call behind another": (
        call("look", '{"q":"x"}', index=0, id="a") + call("", "", index=1, id="b") + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "a call in both forms": (
        chunk(
            {
                "tool_calls": [{"index": 0, "id": "a", "function": {"name": "look", "arguments": '{"q":"x"}'}}],
                "function_call": {"name": "look", "arguments": '{"q":"x"}'},
            }
        )
        + CALLS,
        Came(calls=LOOK, finish="tool_calls"),
    ),
    "messages without `object` for deltas": (
        event({"choices": [{"message": {"content": "Grüß "}}]})
        + event({"choices": [{"message": {"content": "dich"}, "finish_reason": "stop"}]}),
        Came(SAID),
    ),
    "thinking blocks alone": (
        chunk({"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}]}) + HI + END,
        Came(SAID, "hm"),
    ),
    "a refusal as a part of the content": (
        chunk({"content": [{"type": "refusal", "refusal": "No."}]}) + END,
        Came(refusal="No."),
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
    "timings of llama.cpp": (
        HI + chunk(finish="stop", timings={"prompt_n": 3, "predicted_n": 2}) + DONE,
        Came(SAID, tokens=(3, 0, 2, 0)),
    ),
    "timings of llama.cpp, and the usage": (
        HI
        + chunk(finish="stop", timings={"prompt_n": 1, "predicted_n": 2})
        + chunk(usage={"prompt_tokens": 3, "completion_tokens": 2}, timings={"prompt_n": 1, "predicted_n": 2}),
        Came(SAID, tokens=(3, 0, 2, 0)),
    ),
    "reasoning counted apart from the output": (
        HI
        + STOP
        + chunk(
            usage={
                "prompt_tokens": 9,
                "completion_tokens": 3,
                "total_tokens": 17,
                "prompt_tokens_details": {"cached_tokens": 4},
                "completion_tokens_details": {"reasoning_tokens": 5},
            }
        ),
        Came(SAID, tokens=(9, 4, 8, 5)),
    ),
    "reasoning counted in the total alone": (
        HI + STOP + chunk(usage={"promptTokenCount": 9, "candidatesTokenCount": 3, "totalTokenCount": 17}),
        Came(SAID, tokens=(9, 0, 8, 0)),
    ),
    "more reasoning than output": (
        HI + STOP + chunk(usage={"prompt_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 5}}),
        Came(SAID, tokens=(9, 0, 5, 5)),
    ),
    "the total and the output alone": (
        HI + STOP + chunk(usage={"completion_tokens": 3, "total_tokens": 17}),
        Came(SAID, tokens=(0, 0, 3, 0)),
    ),
    "cached input apart from the input": (
        HI
        + chunk(
            finish="stop",
            usage={"input_tokens": 9, "cache_read_input_tokens": 4, "output_tokens": 3, "total_tokens": 16},
        )
        + DONE,
        Came(SAID, tokens=(13, 4, 3, 0)),
    ),
    "cached input apart from the input, in two reports": (
        chunk(usage={"input_tokens": 2, "cache_read_input_tokens": 9, "cache_creation_input_tokens": 4})
        + HI
        + chunk(finish="end_turn", usage={"output_tokens": 3}),
        Came(SAID, tokens=(15, 9, 3, 0), finish="end_turn"),
    ),
    "cached input apart from the input, of Bedrock": (
        HI + STOP + chunk(usage={"inputTokens": 2, "cacheReadInputTokens": 9, "outputTokens": 3, "totalTokens": 14}),
        Came(SAID, tokens=(11, 9, 3, 0)),
    ),
    "cached input apart from the input, under OpenAI's names": (
        HI + STOP + chunk(usage={"prompt_tokens": 2, "cache_read_input_tokens": 9, "completion_tokens": 3}),
        Came(SAID, tokens=(11, 9, 3, 0)),
    ),
    "cached input within the input, as the total says": (
        HI
        + STOP
        + chunk(usage={"input_tokens": 9, "cache_read_input_tokens": 4, "output_tokens": 3, "total_tokens": 12}),
        Came(SAID, tokens=(9, 4, 3, 0)),
    ),
    "newly cached input apart from the input": (
        HI
        + chunk(usage={"input_tokens": 9, "cache_creation_input_tokens": 4, "output_tokens": 3, "total_tokens": 16})
        + END,
        Came(SAID, tokens=(13, 0, 3, 0)),
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

ENDED = "The model provider ended its answer before the reply was complete."
NOW = "The model provider cannot answer just now"
LONG = "The conversation is too long for the model 'asked': "

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
            "The model reached its token limit before it wrote any text (finish reason 'length').",
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
    "an empty call and nothing else": (
        call("", "", index=0, id="a") + END,
        failed(UNAVAILABLE, "The model provider ended its answer without a reply (finish reason 'stop')."),
    ),
    "a web page": (
        b"<html>Sign in</html>",
        failed(
            MODEL_ERROR, "The model provider answered with a web page in place of a reply; its base URL may be wrong."
        ),
    ),
    "an image of no known shape and nothing else": (
        images({"file": "a.png"}, content="") + END,
        failed(
            v1.ERROR_REASON_CONTENT_UNSUPPORTED,
            "The model answered only with an image that cannot be read.",
        ),
    ),
    "half a chunk": (
        HI + b'data: {"choices": [{"delta": {"con\n\n' + END,
        failed(UNAVAILABLE, "The model provider sent a part of the reply that cannot be read.", text=SAID),
    ),
    "half a chunk, and an error behind it": (
        HI + b'data: {"choices": [{"delta": {"con\n\n' + event({"error": {"message": "Gone."}}) + DONE,
        failed(UNAVAILABLE, "The model provider cannot answer just now (an error): Gone.", text=SAID),
    ),
    "half a chunk, and an error in the same event": (
        HI + b'data: {"choices": [{"delta": {"con\n' + event({"error": {"message": "Gone."}}) + DONE,
        failed(UNAVAILABLE, "The model provider cannot answer just now (an error): Gone.", text=SAID),
    ),
    "words of a failure as data": (
        HI + b"data: error: the pump is broken\n\n" + END,
        failed(
            UNAVAILABLE, "The model provider cannot answer just now (an error): error: the pump is broken", text=SAID
        ),
    ),
    "words as data, and no end": (
        HI + b"data: oops\n\n" + DONE,
        failed(UNAVAILABLE, "The model provider cannot answer just now (an error): oops", text=SAID),
    ),
    "words in place of an event": (
        HI + b"Internal Server Error",
        failed(UNAVAILABLE, "The model provider cannot answer just now (an error): Internal Server Error", text=SAID),
    ),
    "words in place of a reply": (
        b"Rate limit exceeded\n",
        failed(UNAVAILABLE, "The model provider cannot answer just now (an error): Rate limit exceeded"),
    ),
    "a page in place of an event": (
        HI + b"<html>Bad gateway</html>",
        failed(UNAVAILABLE, "The model provider cannot answer just now (an error).", text=SAID),
    ),
    "an error as a field of llama.cpp": (
        HI + b'error: {"code":400,"message":"the request exceeds the available context size"}\n\n',
        failed(
            MODEL_ERROR,
            "The conversation is too long for the model 'asked': the request exceeds the available context size",
            code="context_length_exceeded",
            text=SAID,
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
    **{
        f"in `{name}`": event({name: held})
        for name, held in (
            ("Error", {"Code": "InternalError", "Message": "The pump is broken."}),
            ("err", "The pump is broken."),
            ("exception", "The pump is broken."),
            ("fault", {"faultstring": "The pump is broken."}),
        )
    },
    "of Tencent": event({"Response": {"Error": {"Code": "InternalError", "Message": "The pump is broken."}}}),
    "of Spark": event({"header": {"code": 10013, "message": "The pump is broken."}}),
    "in a choice": event(
        {"choices": [{"index": 0, "delta": {"content": ""}, "error": TROUBLE, "finish_reason": "error"}]}
    ),
    "beside choices": event({"error": TROUBLE, "choices": [{"delta": {"content": ""}, "finish_reason": "error"}]}),
    "beside choices, in `errors`": event({"errors": [TROUBLE], "choices": [{"delta": {"content": ""}}]}),
    "beside choices, by another name": event(
        {"error_code": 1000, "error_msg": "The pump is broken.", "choices": [{"delta": {"content": ""}}]}
    ),
    "beside choices, words alone": event(
        {"error_message": "The pump is broken.", "choices": [{"delta": {"content": ""}}]}
    ),
    "beside choices, of MiniMax": event(
        {
            "base_resp": {"status_code": 1000, "status_msg": "The pump is broken."},
            "choices": [{"delta": {"content": ""}}],
        }
    ),
    "beside choices, of Groq": event(
        {"x_groq": {"error": "The pump is broken."}, "choices": [{"delta": {"content": ""}}]}
    ),
    "in a delta": event({"choices": [{"index": 0, "delta": {"error": TROUBLE}}]}),
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
def test_an_answer_that_is_not_a_reply_is_one_typed_failure(name: str) -> None:
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
        event({"error": {"code": 0, "message": "", "details": []}}),
        event({"error": {"code": 0, "message": ""}, "error_code": 0, "choices": [{"delta": {"content": ""}}]}),
        event(
            {
                "error_msg": "",
                "base_resp": {"status_code": 0, "status_msg": ""},
                "choices": [{"index": "0", "delta": {"content": ""}}],
            }
        ),
        event({"id": "x", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]}),
        event({"id": "x", "message": "queued"}),
        event({"object": "chat.completion.chunk", "x_groq": {"id": "x"}}),
        b"event: status\n" + event({"type": "status", "id": "x"}),
    ],
)
def test_other_documents_are_not_taken_for_errors(data: bytes) -> None:
    assert Came(SAID) == read([data + HI + data + END + data])


def test_behind_finished_calls_a_model_may_have_nothing_more_to_say() -> None:
    """But only where it says that it is done."""
    assert Came() == read([END], behind_calls=True)
    assert Came(reasoning="hm") == read([chunk({"reasoning": "hm"}) + END], behind_calls=True)
    for data in (DONE, CALLS, chunk(finish="because"), chunk(finish="abort")):
        assert read([data], behind_calls=True).reason == UNAVAILABLE


def test_tags_are_text_where_no_profile_says_otherwise() -> None:
    """And places in the text are those that the provider counted."""
    said = "<think>hm</think>Hi"
    annotation = {"url": "https://a.example", "start_index": 17, "end_index": 19}
    data = chunk({"content": said, "annotations": [annotation]}) + END
    assert Came(said, sources=(Source("https://a.example", "", 17, 19),)) == read([data], think_tags=False)


@pytest.mark.parametrize(
    "said",
    [
        "The tag </think> closes it.",
        "It ends with </think>",
        "It ends with </think>\n\nAnd so on.",
        "`</think>` closes it.",
        "Write `a\u00a0</think>b`.",
        "```\nhm\n</think>\n\nHi\n```",
        'print("a</think>")',
        '{"a": "hm</think>"}',
        "(</think>)",
        "Use <think>\nhm\n</think>\n\nHi",
        "</think>",
        "</think>\n",
        "- </think>: the end",
        "\u201c</think>\u201d",
        "a\n</think> is the end",
        'It prints "so</think>yes" then.',
        '<thought id="1">\nhm\n</thought>\n\nHi',
        "<",
        " [",
        "<|",
    ],
)
def test_a_tag_that_is_mentioned_is_text(said: str) -> None:
    assert Came(said) == read([said_in(said) + END])
    assert Came(said) == read([said_in(*said) + END])


@settings(deadline=None)
@given(st.lists(st.sampled_from(["</think>", "<think>", "[/THINK]", "</thi", "<", "`", "```", "a", ".", " ", "\n"])))
def test_what_tags_mean_does_not_depend_on_how_the_text_was_cut(pieces: list[str]) -> None:
    said = "".join(pieces)
    whole = read([said_in(said) + END])
    assert whole == read([said_in(*pieces) + END])
    assert whole == read([said_in(*said) + END])


def test_text_next_to_a_reasoning_field_is_text() -> None:
    said = "hm\n</think>\n\nHi"
    assert Came(said, "so") == read([chunk({"reasoning": "so"}) + said_in(said) + END])


def test_mentions_of_a_tag_are_looked_at_a_few_times() -> None:
    said = "a </think> b" * 9 + "\n</think>\nHi"
    assert Came(said) == read([said_in(said) + END])
    assert Came("Hi", said[72:-11]) == read([said_in(said[72:]) + END])


@pytest.mark.parametrize("reason", ["null", "None", "undefined"])
def test_a_word_for_no_finish_reason_is_none(reason: str) -> None:
    """So that what is cut behind it is not whole."""
    said = event({"choices": [{"index": 0, "delta": {"content": SAID}, "finish_reason": reason}]})
    assert UNAVAILABLE == read([said]).reason
    assert Came(SAID) == read([said + END])
    assert Came(SAID) == read([said + DONE])


def test_a_number_of_a_choice_may_be_text() -> None:
    said = event({"choices": [{"index": "0", "delta": {"content": SAID}}]})
    other = event({"choices": [{"index": "1", "delta": {"content": "other"}}]})
    assert Came(SAID) == read([said + other + END])


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

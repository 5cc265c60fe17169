"""The provider `openai` against a server over a real socket: what it sends, and what each answer comes to."""

import asyncio
import base64
import contextlib
import gc
import json
import logging
import random
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
import structlog
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.models import openai as openai_provider
from notecase_server.models.contract import Delta, Finish, ModelRequest, Provider, Text, Tool
from notecase_server.models.openai import OpenAIProvider
from notecase_server.models.pieces import BASE64_BYTES, Pieces, encoded
from notecase_server.models.request_content import MAX_CONTENT_BYTES

from tests.support.openai_server import (
    DONE,
    EVENT_STREAM,
    MODEL,
    USAGE,
    Answer,
    OpenAIServer,
    chunk,
    error,
    event,
    reply,
    stream,
    tool_calls,
)
from tests.support.replies import Reply, fold

KEY = "test-Secret.0123/456+789=="
IDS = {"c1": "XdQuk2KUI", "c2": "fAGnJD6gb", "c3": "azMoO96ud"}
"""Ids that are made for calls of no provider's."""


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as started:
        yield started


@pytest.fixture
async def provider(server: OpenAIServer) -> AsyncIterator[OpenAIProvider]:
    made = OpenAIProvider(KEY, server.url, "default-model")
    yield made
    await made.close()


def user(*parts: v1.Part | str) -> v1.Message:
    return message(v1.Message.ROLE_USER, *parts)


def assistant(*parts: v1.Part | str) -> v1.Message:
    return message(v1.Message.ROLE_ASSISTANT, *parts)


def message(role: v1.Message.Role.ValueType, *parts: v1.Part | str) -> v1.Message:
    return v1.Message(role=role, parts=[v1.Part(text=part) if isinstance(part, str) else part for part in parts])


def data(content: bytes, media_type: str, filename: str = "") -> v1.Part:
    return v1.Part(data=v1.InlineData(data=content, media_type=media_type, filename=filename))


def ask(*messages: v1.Message, instruction: str = "", model: str = "", **generation: Any) -> ModelRequest:
    return ModelRequest(model, instruction, messages or (user("Hello"),), v1.Generation(**generation))


async def pieces_of(provider: Provider, request: ModelRequest | None = None) -> list[Delta]:
    return [piece async for piece in provider.stream(request or ask())]


async def failure(provider: Provider, request: ModelRequest | None = None) -> NotecaseError:
    with pytest.raises(NotecaseError) as caught:
        await pieces_of(provider, request)
    return caught.value


async def client_left(server: OpenAIServer) -> None:
    """Waits until the first request's client is gone. The time-out is for a test that would wait in vain."""
    async with asyncio.timeout(60):
        await server.received[0].left.wait()


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


class TestRequest:
    async def test_the_smallest_request_in_full(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(reply("Hi"))
        await pieces_of(provider)
        expected = {
            "model": "default-model",
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        assert [expected] == server.requests
        assert "/v1/chat/completions" == server.received[0].path
        assert f"Bearer {KEY}" == server.received[0].headers["Authorization"]

    async def test_a_conversation_with_every_kind_of_content_in_full(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(reply("Hi"))
        png = b"\x89PNG"
        image = v1.FileUri(uri="https://example.org/plan.png?a=1", media_type="Image/PNG")
        done = v1.ToolCall(
            call_id="c1",
            tool="search",
            arguments='{"q": "é"}',
            outcome=v1.ToolCall.OUTCOME_FAILED,
            result=[v1.Part(text="3 "), v1.Part(text="hits")],
        )
        failed = v1.ToolCall(call_id="c2", tool="search", arguments="", outcome=v1.ToolCall.OUTCOME_FAILED, error="no")
        cancelled = v1.ToolCall(
            call_id="c3", tool="a b/ü", arguments='{"q": "cut', outcome=v1.ToolCall.OUTCOME_CANCELLED
        )
        conversation = (
            user("Look:", v1.Part(file=image), data(png, "image/png; charset=x")),
            user(data(b"%PDF-1", "application/pdf", "plan.pdf"), data(b"%PDF-2", "application/pdf")),
            user(data(b"RIFF", "audio/x-wav"), data(b"ID3", "audio/mpeg")),
            message(v1.Message.ROLE_SYSTEM, "Be ", "brief."),
            assistant(
                v1.Part(reasoning=v1.Reasoning(text="hm")),
                "I search.",
                v1.Part(tool_call=done),
                v1.Part(tool_call=failed),
                v1.Part(tool_call=cancelled),
            ),
            assistant(v1.Part(refusal="I will not.")),
            assistant("Half a", " word"),
            user("One", "Two", ""),
        )
        await pieces_of(provider, ask(*conversation, instruction="Be kind."))

        def call(call_id: str, name: str, arguments: str) -> dict[str, object]:
            return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

        def file(name: str, content: bytes) -> dict[str, object]:
            url = f"data:application/pdf;base64,{b64(content)}"
            return {"type": "file", "file": {"filename": name, "file_data": url}}

        expected = [
            {"role": "system", "content": "Be kind.\n\nBe brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Look:"},
                    {"type": "image_url", "image_url": {"url": "https://example.org/plan.png?a=1"}},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(png)}"}},
                    file("plan.pdf", b"%PDF-1"),
                    file("file.pdf", b"%PDF-2"),
                    {"type": "input_audio", "input_audio": {"data": b64(b"RIFF"), "format": "wav"}},
                    {"type": "input_audio", "input_audio": {"data": b64(b"ID3"), "format": "mp3"}},
                ],
            },
            {
                "role": "assistant",
                "content": "I search.",
                "tool_calls": [
                    call(IDS["c1"], "search", '{"q": "é"}'),
                    call(IDS["c2"], "search", "{}"),
                    call(IDS["c3"], "a_b__", '{"malformed":"{\\"q\\": \\"cut"}'),
                ],
            },
            {"role": "tool", "tool_call_id": IDS["c1"], "content": "3 hits"},
            {"role": "tool", "tool_call_id": IDS["c2"], "content": "no"},
            {"role": "tool", "tool_call_id": IDS["c3"], "content": "cancelled"},
            {"role": "assistant", "content": "I will not.\n\nHalf a word"},
            {"role": "user", "content": "One\n\nTwo"},
        ]
        assert expected == server.requests[0]["messages"]

    async def test_a_large_body_is_sent_whole(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        """With its length, as servers require; content of some megabytes is sent in the same way."""
        large = bytes(range(256)) * 12_000
        server.script(reply("A plan."))
        assert fold(await pieces_of(provider, ask(user(data(large, "application/pdf"))))).text == "A plan."
        (part,) = server.requests[0]["messages"][0]["content"]
        assert part["file"]["file_data"] == f"data:application/pdf;base64,{base64.b64encode(large).decode()}"
        assert "Content-Length" in server.received[0].headers

    @pytest.mark.parametrize("media_type", ["application/pdf", "image/png", "audio/wav"])
    async def test_content_is_encoded_in_pieces_and_not_on_the_loop(
        self, server: OpenAIServer, provider: OpenAIProvider, media_type: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever its length, and as one whole."""
        large, encode = bytes(range(256)) * 12_001, base64.b64encode
        encoded: list[tuple[int, bool]] = []

        def noted(piece: bytes) -> bytes:
            encoded.append((len(piece), threading.current_thread() is threading.main_thread()))
            return encode(piece)

        async def load(blob: v1.Blob) -> bytes:
            return large

        monkeypatch.setattr(base64, "b64encode", noted)
        server.script(reply("A plan."))
        request = ask(user(v1.Part(blob=v1.Blob(media_type=media_type, size_bytes=len(large)))))
        await pieces_of(provider, request._replace(load=load))
        (part,) = server.requests[0]["messages"][0]["content"]
        assert encode(large).decode() in json.dumps(part)
        assert len(large) == sum(size for size, _ in encoded)
        assert {(True, False)} == {(size <= BASE64_BYTES, on_loop) for size, on_loop in encoded}

    async def test_what_holds_nothing_is_left_out(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(reply("Hi"))
        thought = v1.Part(reasoning=v1.Reasoning(text="hm"))
        system = message(v1.Message.ROLE_SYSTEM, "")
        cut_off = v1.Message(role=v1.Message.ROLE_ASSISTANT, status=v1.Message.STATUS_INCOMPLETE)
        await pieces_of(provider, ask(user(), user(""), system, cut_off, assistant(thought), assistant(""), user("Go")))
        assert [{"role": "user", "content": "Go"}] == server.requests[0]["messages"]

    @pytest.mark.parametrize(
        "unsupported",
        [
            user(data(b"x", "video/mp4")),
            user(data(b"x", "audio/ogg")),
            user(data(b"x", "")),
            user(v1.Part(file=v1.FileUri(uri="https://example.org/a.pdf", media_type="application/pdf"))),
            user(v1.Part(file=v1.FileUri(uri="https://example.org/a"))),
            user("a", v1.Part(tool_call=v1.ToolCall(call_id="c"))),
            user(v1.Part()),
            message(v1.Message.ROLE_SYSTEM, data(b"x", "image/png")),
        ],
    )
    async def test_what_the_model_cannot_take_is_refused_and_nothing_is_sent(
        self, server: OpenAIServer, provider: OpenAIProvider, unsupported: v1.Message
    ) -> None:
        caught = await failure(provider, ask(user("a"), unsupported))
        assert v1.ERROR_REASON_CONTENT_UNSUPPORTED == caught.reason
        assert [] == server.requests

    @pytest.mark.parametrize(
        "blobs",
        [
            [v1.Blob(media_type="image/png", size_bytes=3), v1.Blob(media_type="video/mp4", size_bytes=3)],
            [v1.Blob(media_type="image/png", size_bytes=size) for size in (MAX_CONTENT_BYTES, 1)],
        ],
    )
    @pytest.mark.parametrize("messages", [1, 2, 3])
    async def test_content_that_cannot_be_sent_is_not_even_read(
        self, server: OpenAIServer, provider: OpenAIProvider, blobs: list[v1.Blob], messages: int
    ) -> None:
        """Of a kind that there is no place for, or too much of it, in the newest messages of a user: in one, in two, or
        before one without content."""
        read: list[v1.Blob] = []

        async def load(blob: v1.Blob) -> bytes:
            read.append(blob)
            return b"png"

        parts = [v1.Part(blob=blob) for blob in blobs]
        said = [user(*parts)] if messages == 1 else [user(part) for part in parts]
        said += [user("What is it?")] if messages == 3 else []
        for message in said:
            message.run = "sessions/s/runs/r"
        request = ask(user("Hello"), *said)._replace(load=load)
        assert v1.ERROR_REASON_CONTENT_UNSUPPORTED == (await failure(provider, request)).reason
        assert [] == read == server.requests

    async def test_content_of_the_history_that_cannot_be_sent_is_named_and_ends_no_session(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        """Of a kind that there is no place for; where there is too much of it, the oldest."""

        def blob(name: str, size: int, media_type: str = "image/png") -> v1.Part:
            return v1.Part(blob=v1.Blob(name=name, filename=name, media_type=media_type, size_bytes=size))

        async def load(blob: v1.Blob) -> bytes:
            read.append(blob.name)
            return b"png"

        read: list[str] = []
        results = [data(b"x", "audio/ogg", "a"), data(b"x", ""), blob("old", 1), blob("new", 6 << 20)]
        call = v1.ToolCall(call_id="c", tool="look", outcome=v1.ToolCall.OUTCOME_SUCCEEDED, result=results)
        uri = v1.Part(file=v1.FileUri(uri="https://example.org/a", media_type="text/html"))
        long = blob("long", 9, "text/plain")
        request = ask(
            message(v1.Message.ROLE_SYSTEM, long),
            user(blob("film", 9, "video/mp4"), uri, v1.Part(reasoning=v1.Reasoning(text="hm")), blob("tiny", 9)),
            assistant(long),
            user("Look", blob("asked", MAX_CONTENT_BYTES - (6 << 20))),
            assistant(v1.Part(tool_call=call)),
        )._replace(load=load)
        server.script(reply("Hi"))
        await pieces_of(provider, request)
        assert ["asked", "new"] == read
        system, before, replied, asked, _, result, bridge, shown = server.requests[0]["messages"]
        assert "[text/plain: long, not shown]" == system["content"]
        names = ("video/mp4: film", "text/html", "reasoning", "image/png: tiny")
        assert "\n\n".join(f"[{name}, not shown]" for name in names) == before["content"]
        assert "[text/plain: long]" == replied["content"]
        assert ["text", "image_url"] == [part["type"] for part in asked["content"]]
        assert "[audio/ogg: a, not shown][data, not shown][image/png: old, not shown]" == result["content"]
        assert "assistant" == bridge["role"]
        assert ["text", "image_url"] == [part["type"] for part in shown["content"]]

    async def test_content_that_a_run_failed_for_fails_no_later_run(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        failed, said = user(data(b"x", "video/mp4", "film")), user("Then do without.")
        failed.run, said.run = "sessions/s/runs/a", "sessions/s/runs/b"
        server.script(reply("Hi"))
        await pieces_of(provider, ask(failed, said))
        (message,) = server.requests[0]["messages"]
        assert "[video/mp4: film, not shown]\n\nThen do without." == message["content"]

    async def test_generation_in_full(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(reply("Hi"))
        extra = '{"seed": 8, "logit_bias": {"50256": -100}, "stream_options": null}'
        request = ask(
            model="named-model",
            temperature=0.0,
            top_p=0.5,
            max_output_tokens=64,
            seed=2**53 + 1,
            stop=["END", "\n"],
            reasoning_effort="low",
            extra=extra,
        )
        await pieces_of(provider, request)
        expected = {
            "model": "named-model",
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": True,
            "temperature": 0.0,
            "top_p": 0.5,
            "max_tokens": 64,
            "seed": 8,
            "stop": ["END", "\n"],
            "reasoning_effort": "low",
            "logit_bias": {"50256": -100},
        }
        assert [expected] == server.requests

    async def test_large_integers_stay_whole(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(reply("Hi"))
        await pieces_of(provider, ask(seed=2**53 + 1))
        assert 2**53 + 1 == server.requests[0]["seed"]

    @pytest.mark.parametrize("extra", ["[]", "{", "7", '{"a": NaN}', '{"a": "\\ud800"}', '{"a":' + "[" * 100_000])
    async def test_extra_that_is_not_a_json_object_is_a_model_error(self, provider: OpenAIProvider, extra: str) -> None:
        assert v1.ERROR_REASON_MODEL_ERROR == (await failure(provider, ask(extra=extra))).reason

    async def test_no_model_to_ask_is_a_model_error(self, server: OpenAIServer) -> None:
        async with contextlib.aclosing(OpenAIProvider(KEY, server.url, "").stream(ask())) as answer:
            with pytest.raises(NotecaseError) as caught:
                await anext(answer)
        assert v1.ERROR_REASON_MODEL_ERROR == caught.value.reason
        assert [] == server.requests

    async def test_openai_itself_gets_the_names_that_its_models_need(
        self, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The stub takes its place as the HTTP proxy, which the environment may name."""
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
        provider = OpenAIProvider(KEY, "http://api.openai.com/v1", "m")
        server.script(reply("Hi"))
        await pieces_of(provider, ask(max_output_tokens=64))
        await provider.close()
        assert 64 == server.requests[0]["max_completion_tokens"]
        assert "max_tokens" not in server.requests[0]
        assert "org-1" == server.received[0].headers["OpenAI-Organization"]


class TestSettings:
    async def test_the_environment_cannot_replace_key_and_url_nor_name_the_organization_elsewhere(
        self, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "other")
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer other\nX-Team: night")
        monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
        monkeypatch.setenv("OPENAI_PROJECT_ID", "project-1")
        provider = OpenAIProvider(KEY, server.url, "m")
        server.script(reply("Hi"))
        await pieces_of(provider)
        await provider.close()
        headers = server.received[0].headers
        assert f"Bearer {KEY}" == headers["Authorization"]
        assert "OpenAI-Organization" not in headers
        assert "OpenAI-Project" not in headers

    async def test_a_server_without_keys_needs_none(self, server: OpenAIServer) -> None:
        provider = OpenAIProvider("", server.url, "m")
        server.script(reply("Hi"))
        assert "Hi" == fold(await pieces_of(provider)).text
        await provider.close()

    @pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY} ", f"{KEY}\u00e9", f"a {KEY}", f"{KEY}\x00"])
    def test_a_key_that_no_header_can_hold_is_refused_without_telling_it(self, key: str) -> None:
        with pytest.raises(ValueError, match="the API key contains") as caught:
            OpenAIProvider(key, None, "m")
        assert KEY not in str(caught.value)

    @pytest.mark.parametrize(
        "url",
        [
            "localhost:8000/v1",
            "ftp://h/v1",
            "http://",
            "http://h:port/v1",
            "http://h..example/v1",
            f"http://me:{KEY}@h/v1",
            f"http://h/v1#{KEY}",
        ],
    )
    def test_a_base_url_that_cannot_work_or_holds_a_secret_is_refused(self, url: str) -> None:
        with pytest.raises(ValueError, match="the base URL") as caught:
            OpenAIProvider("", url, "m")
        assert KEY not in str(caught.value)


class TestReply:
    async def test_a_reply_with_its_usage(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(reply("Good évening 😀", chunks=4))
        usage = v1.Usage(input_tokens=11, output_tokens=7, model_calls=1, model=MODEL)
        assert Reply(text="Good évening 😀", reason="stop", usage=usage) == fold(await pieces_of(provider))

    async def test_a_piece_is_given_out_before_the_next_is_sent(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        gate = asyncio.Event()
        server.script(reply("ab", chunks=2).held(gate, after=2))
        answer = provider.stream(ask())
        assert Text("a") == await anext(answer)
        gate.set()
        assert Text("b") == await anext(answer)
        assert "stop" == fold([piece async for piece in answer]).reason

    async def test_one_connection_serves_one_call_after_the_other(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(reply("a"), error(400), tool_calls(("f", "{}")))
        await pieces_of(provider)
        await failure(provider)
        await pieces_of(provider)
        assert 1 == len({received.client_port for received in server.received})

    async def test_a_body_that_ends_after_its_reply_keeps_its_connection(
        self, server: OpenAIServer, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("notecase_server.models.wire.DRAIN_SECONDS", 30.0)  # a busy machine must not matter
        answer, gate = reply("a"), asyncio.Event()
        server.script(answer.held(gate, after=len(answer.pieces)), reply("b"))
        async for piece in provider.stream(ask()):
            if isinstance(piece, Finish):
                gate.set()
        await pieces_of(provider)
        assert server.received[0].client_port == server.received[1].client_port

    async def test_a_whole_completion_in_place_of_a_stream(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        body = {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}], "usage": USAGE}
        server.script(Answer((json.dumps(body).encode(),), headers={"Content-Type": "application/json"}))
        usage = v1.Usage(input_tokens=11, output_tokens=7, model_calls=1, model="default-model")
        said = await pieces_of(provider, ask(extra='{"stream": false}'))
        assert Reply(text="Hi", reason="stop", usage=usage) == fold(said)
        assert server.requests[0]["stream"] is False

    async def test_calls_side_by_side_do_not_mix(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        async with OpenAIServer(lambda body: reply(body["messages"][0]["content"] * 50, chunks=25)) as echo:
            provider = OpenAIProvider(KEY, echo.url, "m")
            replies = await asyncio.gather(*(pieces_of(provider, ask(user(f"<{number}>"))) for number in range(30)))
            await provider.close()
        assert [f"<{number}>" * 50 for number in range(30)] == [fold(pieces).text for pieces in replies]


class TestLeaving:
    async def test_closing_the_iterator_drops_the_connection(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(reply("ab", chunks=2).held(asyncio.Event(), after=2))
        answer = provider.stream(ask())
        await anext(answer)
        await answer.aclose()
        await client_left(server)

    async def test_cancelling_the_reader_drops_the_connection(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(reply("ab", chunks=2).held(asyncio.Event(), after=2))
        first = asyncio.Event()

        async def watch() -> None:
            async for _ in provider.stream(ask()):
                first.set()

        task = asyncio.create_task(watch())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client_left(server)

    async def test_cancelling_before_the_answer_drops_the_connection(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(reply("a").held(asyncio.Event(), after=0))
        task = asyncio.create_task(pieces_of(provider))
        await server.request(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client_left(server)

    @pytest.mark.parametrize(
        "refused",
        [(), (error(400, "unknown variant `image_url`"),), (error(413, "The image is too large."),)],
        ids=["first", "refused", "too large"],
    )
    async def test_the_request_is_let_go_of_once_its_answer_has_begun(
        self, server: OpenAIServer, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch, refused: tuple[Answer]
    ) -> None:
        """It may have megabytes, and a reply may take minutes. So may the one that was refused before it."""
        made: list[weakref.ref[Pieces]] = []

        def remembered(body: Any, **settings: Any) -> Pieces:
            pieces = encoded(body, **settings)
            made.append(weakref.ref(pieces))
            return pieces

        monkeypatch.setattr(openai_provider, "encoded", remembered)
        server.script(*refused, reply("ab", chunks=2).held(asyncio.Event(), after=2))
        answer = provider.stream(ask(user(data(b"png", "image/png")), assistant("A plan."), user("x" * (1 << 20))))
        await anext(answer)
        gc.collect()
        assert [None, *(None for _ in refused)] == [each() for each in made]
        await answer.aclose()

    async def test_a_slow_end_of_the_body_does_not_hold_up_the_reply(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        """The body never ends after [DONE]: its connection is given up."""
        answer = reply("a")
        server.script(answer.held(asyncio.Event(), after=len(answer.pieces)))
        assert "a" == fold(await pieces_of(provider)).text
        await client_left(server)

    async def test_closing_the_provider_fails_what_is_under_way_and_what_comes_later(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(reply("ab", chunks=2).held(asyncio.Event(), after=2))
        answer = provider.stream(ask())
        await anext(answer)
        waiting = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0)
        await provider.close()
        await provider.close()
        with pytest.raises(NotecaseError) as caught:
            await asyncio.wait_for(waiting, 60)
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.value.reason
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == (await failure(provider)).reason


class TestRefused:
    """Each status; the key is not shown if the provider echoes it."""

    @pytest.mark.parametrize(
        ("answer", "message", "metadata"),
        [
            (
                error(401, f"Incorrect API key provided: {KEY}", code="invalid_api_key"),
                "The model provider refused the server's credential (status 401).",
                {"status": "401", "code": "invalid_api_key"},
            ),
            (
                error(403, "Not for you"),
                "The model provider refused the call of 'default-model' (status 403): Not for you",
                {"status": "403", "code": "stub_error"},
            ),
            (
                error(404, "The model `default-model` does not exist", code="model_not_found"),
                "The model provider refused the call of 'default-model' (status 404): "
                "The model `default-model` does not exist",
                {"status": "404", "code": "model_not_found"},
            ),
            (
                error(400, f"Bad\n header:  Authorization: Bearer {KEY[:9]}… and {KEY} and sk-proj-abc*******xyz\x00!"),
                "The model provider refused the call of 'default-model' (status 400): "
                "Bad header: Authorization: [key] and [key] and [key]\ufffd!",
                {"status": "400", "code": "stub_error"},
            ),
            (
                Answer((b'{"detail": "no"}',), 422, {"Content-Type": "application/json"}),
                "The model provider refused the call of 'default-model' (status 422): no",
                {"status": "422"},
            ),
            (
                Answer((b'{"error": "no such model"}',), 404, {"Content-Type": "application/json"}),
                "The model provider refused the call of 'default-model' (status 404): no such model",
                {"status": "404"},
            ),
            (
                Answer((b"<html>404</html>",), 404, {"Content-Type": "text/html"}),
                "The model provider refused the call of 'default-model' (status 404; its base URL may be wrong).",
                {"status": "404"},
            ),
            (
                Answer((b'{"detail": "Not Found"}',), 404, {"Content-Type": "application/json"}),
                "The model provider refused the call of 'default-model' (status 404; its base URL may be wrong): "
                "Not Found",
                {"status": "404"},
            ),
            (
                error(404, "Unknown request URL: POST /chat/completions.", code="unknown_url"),
                "The model provider refused the call of 'default-model' (status 404; its base URL may be wrong): "
                "Unknown request URL: POST /chat/completions.",
                {"status": "404", "code": "unknown_url"},
            ),
            (
                Answer((b"",), 405),
                "The model provider refused the call of 'default-model' (status 405; its base URL may be wrong).",
                {"status": "405"},
            ),
            (
                error(400, "This model's maximum context length is 8 tokens", code="context_length_exceeded"),
                "The conversation is too long for the model 'default-model': "
                "This model's maximum context length is 8 tokens",
                {"status": "400", "code": "context_length_exceeded"},
            ),
            (
                error(400, "the request exceeds the available context size"),
                "The conversation is too long for the model 'default-model': "
                "the request exceeds the available context size",
                {"status": "400", "code": "context_length_exceeded"},
            ),
            (
                error(429, "Check your plan", code="insufficient_quota", headers={"x-should-retry": "false"}),
                "The server's account with the model provider is used up: Check your plan",
                {"status": "429", "code": "insufficient_quota"},
            ),
            (
                error(302, headers={"x-should-retry": "false"}),
                "The model provider refused the call of 'default-model' (status 302): refused by the stub",
                {"status": "302", "code": "stub_error"},
            ),
        ],
    )
    async def test_a_refusal_is_a_model_error_and_not_repeated(
        self,
        server: OpenAIServer,
        provider: OpenAIProvider,
        answer: Answer,
        message: str,
        metadata: dict[str, str],
    ) -> None:
        server.script(answer)
        caught = await failure(provider)
        assert (v1.ERROR_REASON_MODEL_ERROR, message, metadata) == (caught.reason, caught.message, caught.metadata)
        assert 1 == len(server.requests)
        assert KEY not in "".join(traceback.format_exception(caught))

    @pytest.mark.parametrize(
        ("words", "members"),
        [
            ("This response_format type is unavailable now", {"response_format"}),
            ("does not support 'json_schema' response format", {"response_format"}),
            ("Function calling with a response mime type: 'application/json' is unsupported", {"response_format"}),
            ("json mode cannot be combined with tool/function calling", {"response_format"}),
            ("Structured outputs are not supported by this model", {"response_format"}),
            ("Extra inputs are not permitted, field: 'stream_options'", {"stream_options"}),
            ("Unsupported parameter(s): max_tokens", {"max_tokens"}),
            ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", {"max_tokens"}),
        ],
    )
    async def test_a_form_that_is_refused_is_changed_once(
        self, server: OpenAIServer, provider: OpenAIProvider, words: str, members: set[str]
    ) -> None:
        """The schema is then described in words, and the limit has its other name."""
        request = ask(max_output_tokens=9)._replace(
            output_schema='{"type": "object", "title": "Plan"}', texts=["Hello"]
        )
        server.script(error(400, words), reply("{}"), error(400, words), error(400, words))
        assert "{}" == fold(await pieces_of(provider, request)).text
        first, second = server.requests
        assert members == first.keys() - second.keys()
        assert ("response_format" in members) == ('"title": "Plan"' in str(second["messages"]))
        assert ("max_tokens" in members) == (second.get("max_completion_tokens") == 9)
        assert words in (await failure(provider, request)).message
        assert 4 == len(server.requests)

    @pytest.mark.parametrize(
        "words",
        [
            "Unrecognized request argument supplied: max_completion_tokens",
            "Extra inputs are not permitted, field: 'max_completion_tokens', value: 9",
            "Unsupported parameter: 'max_completion_tokens'. Use 'max_tokens' instead.",
        ],
    )
    async def test_a_limit_under_its_new_name_may_be_refused(
        self, server: OpenAIServer, provider: OpenAIProvider, words: str
    ) -> None:
        server.script(error(400, words), reply("Hi"))
        request = ask(model="gpt-5-mini", max_output_tokens=9)
        assert "Hi" == fold(await pieces_of(provider, request)).text
        assert [(None, 9), (9, None)] == [
            (sent.get("max_tokens"), sent.get("max_completion_tokens")) for sent in server.requests
        ]
        server.script(error(400, "max_completion_tokens is too large: 9. The model supports at most 8."))
        assert "too large" in (await failure(provider, request)).message
        assert 3 == len(server.requests)

    async def test_a_server_may_refuse_each_form_once(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        refusals = [
            error(400, words)
            for words in (
                "stream_options: Extra inputs are not permitted",
                "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
                "System role not supported",
            )
        ]
        request = ask(instruction="Be brief.", max_output_tokens=9)
        server.script(*refusals, reply("Hi"), *refusals, refusals[0])
        assert "Hi" == fold(await pieces_of(provider, request)).text
        last = server.requests[3]
        assert (True, 9, "user") == (
            "stream_options" not in last,
            last["max_completion_tokens"],
            last["messages"][0]["role"],
        )
        assert "stream_options" in (await failure(provider, request)).message
        assert 8 == len(server.requests)

    @pytest.mark.parametrize(
        "words",
        [
            "System role not supported",
            "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
            "Developer instruction is not enabled for models/gemma-3-27b-it",
            "Only user and assistant roles are supported!",
            "'system' role not supported by this model",
            'messages: Unexpected role "system". The Messages API accepts a top-level `system` parameter',
            "role 'system' is not allowed",
            "Conversation roles must alternate user/assistant/user/assistant/...",
        ],
    )
    @pytest.mark.parametrize("status", [400, 500])
    async def test_a_template_without_a_system_role_has_the_instruction_in_the_first_message(
        self, server: OpenAIServer, provider: OpenAIProvider, words: str, status: int
    ) -> None:
        server.script(error(status, words), reply("Hi"))
        request = ask(instruction="Be brief.")._replace(texts=["Hello"])
        assert "Hi" == fold(await pieces_of(provider, request)).text
        assert [{"role": "user", "content": "Be brief.\n\nHello"}] == server.requests[1]["messages"]

    @pytest.mark.parametrize(
        "words",
        [
            "litellm.UnsupportedParamsError: Anthropic doesn't support tool calling without `tools=` param specified.",
            "The toolConfig field must be defined when using toolUse and toolResult content blocks.",
            "Requests which include `tool_use` or `tool_result` blocks must define tools",
        ],
    )
    async def test_tools_that_only_the_history_calls_are_declared_for_a_server_that_asks_for_them(
        self, server: OpenAIServer, provider: OpenAIProvider, words: str
    ) -> None:
        """Tools of a run are not the next one's, and an MCP server may be away. Others do without: Ollama refuses any
        tool for a model that calls none."""
        done = v1.ToolCall.OUTCOME_SUCCEEDED
        calls = [v1.Part(tool_call=v1.ToolCall(tool=name, outcome=done)) for name in ("ping", "a b", "ping")]
        server.script(error(400, words), reply("Hi"))
        asked = ask(user("Hello"), v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=calls))
        assert "Hi" == fold(await pieces_of(provider, asked)).text
        assert [None, ["a_b", "ping"]] == [
            sent.get("tools") and [tool["function"]["name"] for tool in sent["tools"]] for sent in server.requests
        ]

    @pytest.mark.parametrize(
        "words",
        [
            "tools.0.custom.input_schema: input_schema does not support oneOf, allOf, or anyOf at the top level",
            "Invalid schema for function 'pick': schema must have type 'object' and not have "
            "'oneOf'/'anyOf'/'allOf'/'enum'/'not' at the top level.",
        ],
    )
    async def test_parameters_that_combine_schemas_are_merged_for_a_server_that_refuses_them(
        self, server: OpenAIServer, provider: OpenAIProvider, words: str
    ) -> None:
        server.script(error(400, words), reply("Hi"))
        schema = '{"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}'
        assert "Hi" == fold(await pieces_of(provider, ask()._replace(tools=[Tool("pick", "", schema)]))).text
        first, second = (sent["tools"][0]["function"]["parameters"] for sent in server.requests)
        assert 2 == len(first["anyOf"])
        assert {"type": "object", "properties": {"a": {}, "b": {}}} == second

    @pytest.mark.parametrize(
        "words",
        [
            "[Server Error] Invalid 'content': 'content' field must be a string or an array of objects.",
            "invalid message content type: <nil>",
            "openai-chat: messages[1].content must be a string or an object (was null)",
            "1 validation error: body -> messages -> 1 -> content: none is not an allowed value",
            "1.content.str: Input should be a valid string: 1.content.list: Input should be a valid list",
            "Missing required field 'content' in messages[1]",
            'Error rendering prompt with jinja template: "Cannot apply filter "string" to type: NullValue".',
            'TypeError: can only concatenate str (not "NoneType") to str',
        ],
    )
    @pytest.mark.parametrize("status", [400, 500])
    async def test_a_server_that_takes_no_null_as_content_gets_an_empty_one(
        self, server: OpenAIServer, provider: OpenAIProvider, words: str, status: int
    ) -> None:
        call = v1.ToolCall(tool="ping", outcome=v1.ToolCall.OUTCOME_SUCCEEDED)
        server.script(error(status, words), reply("Hi"))
        asked = ask(user("Hello"), v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(tool_call=call)]))
        assert "Hi" == fold(await pieces_of(provider, asked)).text
        assert [None, ""] == [sent["messages"][1]["content"] for sent in server.requests]

    @pytest.mark.parametrize("only_text", [True, False])
    async def test_a_form_may_be_refused_within_an_answer(
        self, server: OpenAIServer, provider: OpenAIProvider, only_text: bool
    ) -> None:
        """As LM Studio does where a template fails; but not once there is something of a reply."""
        words = 'Error rendering prompt with jinja template: "Conversation roles must alternate".'
        refused = event({"error": {"message": words}})
        request = ask(instruction="Be brief.")._replace(texts=["Hello"] if only_text else None)
        server.script(error(400, "stream_options: Extra inputs are not permitted"), stream(refused), reply("Hi"))
        assert "Hi" == fold(await pieces_of(provider, request)).text
        last = server.requests[2]
        assert (False, "user") == ("stream_options" in last, last["messages"][0]["role"])
        for answer in (stream(refused), stream(chunk({"content": "a"}), refused)):
            server.script(*[answer] * 2)
            assert words in (await failure(provider, request)).message
        assert 6 == len(server.requests)

    @pytest.mark.parametrize(
        ("status", "words"),
        [
            (400, "Your organization must be verified to stream this model. Please go to: https://openai.example/"),
            (400, "Unsupported value: 'stream' does not support true with this model."),
            (400, "This model doesn't support tool use in streaming mode."),
            (400, "Streaming is not supported for this model."),
            (500, "Cannot use tools with stream"),
        ],
    )
    async def test_a_reply_that_may_not_be_streamed_comes_whole(
        self, server: OpenAIServer, provider: OpenAIProvider, status: int, words: str
    ) -> None:
        choices = [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]
        whole = json.dumps({"object": "chat.completion", "choices": choices, "usage": USAGE}).encode()
        server.script(error(status, words), Answer((whole,), 200, {"Content-Type": "application/json"}))
        made = fold(await pieces_of(provider))
        assert ("Hi", USAGE["prompt_tokens"]) == (made.text, made.usage.input_tokens)
        assert [(True, True), (False, False)] == [
            (sent["stream"], "stream_options" in sent) for sent in server.requests
        ]

    @pytest.mark.parametrize("status", [400, 500])
    async def test_descriptions_are_cut_for_a_server_that_takes_no_long_ones(
        self, server: OpenAIServer, provider: OpenAIProvider, status: int
    ) -> None:
        """Many MCP servers have such tools."""
        words = "Invalid 'tools[0].function.description': string too long. Expected a string with maximum length 1024."
        server.script(error(status, words), reply("Hi"))
        tools = [Tool("long", "é" * 1025, ""), Tool("short", "e" * 1024, "")]
        assert "Hi" == fold(await pieces_of(provider, ask()._replace(tools=tools))).text
        declared = [[tool["function"]["description"] for tool in sent["tools"]] for sent in server.requests]
        assert [["é" * 1025, "e" * 1024], ["é" * 1023 + "…", "e" * 1024]] == declared

    @pytest.mark.parametrize("refused", [error(500, "Invalid response format."), error(400, "max_completion_tokens")])
    async def test_a_request_that_has_no_other_form_is_sent_once(
        self, server: OpenAIServer, provider: OpenAIProvider, refused: Answer
    ) -> None:
        server.script(refused, reply("Hi"))
        await failure(provider)
        assert 1 == len(server.requests)

    @pytest.mark.parametrize(
        "refused",
        [
            error(400, "temperature is not supported"),
            error(401),
            stream(event({"error": {"message": "an image is not allowed", "code": 400}, "usage": USAGE})),
        ],
        ids=["for another reason", "the key", "once it was read"],
    )
    async def test_images_stay_unless_the_provider_refuses_them(self, server: OpenAIServer, refused: Answer) -> None:
        """Whatever the model and the setting of the key are called."""
        provider = OpenAIProvider(KEY, server.url, "m", key_source="IMAGE KEY")
        server.script(refused, reply("Hi"))
        image = user(data(b"png", "image/png"))
        await failure(provider, ask(image, assistant("A plan."), user("And now?"), model="a-vision-model"))
        await provider.close()
        assert 1 == len(server.requests)

    async def test_an_invalid_schema_is_reported(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(error(400, "Invalid schema for response_format 'reply': no type"))
        assert "no type" in (await failure(provider, ask()._replace(output_schema="{}"))).message

    async def test_a_long_message_is_cut(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(error(400, f"{KEY} " + "x" * 100_000))
        caught = await failure(provider)
        assert caught.message.endswith("x…")
        assert len(caught.message) < 400
        assert KEY not in caught.message


class TestUnavailable:
    @pytest.mark.parametrize("status", [408, 409, 425, 429, 498, 500, 502, 503, 529])
    async def test_passing_trouble_is_unavailable_and_repeated_by_the_engine_alone(
        self, server: OpenAIServer, provider: OpenAIProvider, status: int
    ) -> None:
        server.script(error(status, f"slow down, {KEY}"), reply("never asked for"))
        caught = await failure(provider)
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.reason
        assert f"The model provider cannot answer just now (status {status}): slow down, [key]" == caught.message
        assert 1 == len(server.requests)

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"retry-after": "7"}, 7.0),
            ({"retry-after": "1.5"}, 1.5),
            ({"retry-after": "9" * 8000}, 86400.0),
            ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
            ({"retry-after": "-1"}, 0.0),
            ({"retry-after": "1e300"}, 86400.0),
            (
                {"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT", "date": "Fri, 31 Dec 1999 23:59:29 GMT"},
                30.0,
            ),
            ({"retry-after-ms": "120000"}, 120.0),
            ({"retry-after": "5s"}, 5.0),
            ({"retry-after": "1m30s"}, 90.0),
            ({"retry-after": "500ms"}, 0.5),
            ({"retry-after": "5, 7"}, 5.0),
            ({"retry-after": "1999-12-31T23:59:59Z", "date": "Fri, 31 Dec 1999 23:59:29 GMT"}, 30.0),
            ({"retry-after": "1796000030", "date": "Mon, 30 Nov 2026 00:53:20 GMT"}, 30.0),
            ({"retry-after": "1796000030000", "date": "Mon, 30 Nov 2026 00:53:20 GMT"}, 30.0),
            ({"retry-after": "soon"}, None),
            ({"retry-after": "nan"}, None),
            ({}, None),
        ],
    )
    async def test_the_client_learns_how_long_the_provider_asks_to_wait(
        self, server: OpenAIServer, headers: dict[str, str], seconds: float | None
    ) -> None:
        provider = OpenAIProvider(KEY, server.url, "m")
        server.script(error(429, headers=headers))
        caught = await failure(provider)
        await provider.close()
        assert (v1.ERROR_REASON_MODEL_UNAVAILABLE, seconds) == (caught.reason, caught.retry_after)

    async def test_no_server_listening(self) -> None:
        async with OpenAIServer() as gone:
            provider = OpenAIProvider(KEY, gone.url, "m")
        caught = await failure(provider)
        await provider.close()
        assert "The model provider cannot be reached." == caught.message
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.reason

    @pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b""])
    async def test_something_that_does_not_speak_http(self, greeting: bytes) -> None:
        async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(greeting)
            writer.close()
            await writer.wait_closed()

        other = await asyncio.start_server(greet, "127.0.0.1", 0)
        async with other:
            port = other.sockets[0].getsockname()[1]
            provider = OpenAIProvider(KEY, f"http://127.0.0.1:{port}/v1", "m")
            caught = await failure(provider)
            await provider.close()
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.reason

    async def test_a_connection_cut_before_the_answer_is_unavailable(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(reply("lost").cut(after=0))
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == (await failure(provider)).reason

    async def test_a_limit_on_tokens_a_minute_is_not_a_conversation_too_long(self, server: OpenAIServer) -> None:
        provider = OpenAIProvider(KEY, server.url, "m")
        server.script(error(429, "The context window of this minute is full"))
        caught = await failure(provider)
        await provider.close()
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.reason

    @pytest.mark.parametrize("after", [1, 3])
    async def test_a_connection_cut_within_the_reply_is_not_repeated(
        self, server: OpenAIServer, provider: OpenAIProvider, after: int
    ) -> None:
        server.script(reply("abcd", chunks=4).cut(after))
        caught = await failure(provider)
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.reason
        assert 1 == len(server.requests)

    async def test_a_connection_cut_after_the_finish_reason_leaves_a_whole_reply(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(reply("a").cut(after=3))
        usage = v1.Usage(model_calls=1, model=MODEL)
        assert Reply(text="a", reason="stop", usage=usage) == fold(await pieces_of(provider))

    @pytest.mark.parametrize("after", [0, 1, 2])
    async def test_silence_is_unavailable(self, server: OpenAIServer, after: int) -> None:
        """Of a second, in which a busy machine connects and sends, too; and the request is not sent again."""
        provider = OpenAIProvider(KEY, server.url, "m", first_timeout=1.0, idle_timeout=1.0)
        server.script(reply("ab", chunks=2).held(asyncio.Event(), after))
        caught = await failure(provider)
        await provider.close()
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.reason
        assert "The model provider sent nothing for 1 seconds." == caught.message
        await client_left(server)


class TestErrorWithinTheReply:
    @pytest.mark.parametrize(
        ("told", "reason"),
        [
            ({"message": "Overloaded", "type": "overloaded_error"}, v1.ERROR_REASON_MODEL_UNAVAILABLE),
            ({"message": "wait", "code": "rate_limit_exceeded"}, v1.ERROR_REASON_MODEL_UNAVAILABLE),
            ({"message": "oops", "type": "server_error"}, v1.ERROR_REASON_MODEL_UNAVAILABLE),
            ({"message": "bad gateway", "code": 502}, v1.ERROR_REASON_MODEL_UNAVAILABLE),
            ({"message": "slow down", "code": "429"}, v1.ERROR_REASON_MODEL_UNAVAILABLE),
            ("The server is overloaded", v1.ERROR_REASON_MODEL_UNAVAILABLE),
            ({"message": "overloaded term", "type": "invalid_request_error"}, v1.ERROR_REASON_MODEL_ERROR),
            ({"message": "bad", "code": 400}, v1.ERROR_REASON_MODEL_ERROR),
            ({"message": "no key", "type": "authentication_error"}, v1.ERROR_REASON_MODEL_ERROR),
            ("It broke", v1.ERROR_REASON_MODEL_UNAVAILABLE),
            (["odd"], v1.ERROR_REASON_MODEL_UNAVAILABLE),
        ],
    )
    async def test_an_error_object_is_judged_by_its_code_then_by_its_words(
        self, server: OpenAIServer, provider: OpenAIProvider, told: object, reason: v1.ErrorReason.ValueType
    ) -> None:
        server.script(Answer((chunk({"content": "a"}), event({"error": told}), DONE)))
        assert reason == (await failure(provider)).reason
        assert 1 == len(server.requests)

    async def test_it_does_not_tell_the_key(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(Answer((chunk({"content": "a"}), event({"error": {"message": f"bad {KEY}", "code": KEY}}))))
        caught = await failure(provider)
        assert "The model provider cannot answer just now (an error): bad [key]" == caught.message
        assert {} == caught.metadata

    async def test_a_conversation_that_is_too_long_is_recognisable(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(Answer((event({"error": {"message": "x", "type": "exceed_context_size_error"}}),)))
        assert {"code": "context_length_exceeded"} == (await failure(provider)).metadata


@pytest.fixture
def printed_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logs are printed as by default, whatever an earlier test of this process has set."""
    before = structlog.get_config()
    structlog.reset_defaults()
    monkeypatch.setattr("notecase_server.models.openai.log", structlog.get_logger())
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("printed_logs")
async def test_logs_hold_neither_the_key_nor_what_is_said(
    server: OpenAIServer, provider: OpenAIProvider, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """At debug level too, through a reply, a repeat, a refusal that echoes both, and a cut."""
    caplog.set_level(logging.DEBUG)
    server.script(
        reply("private reply"),
        error(500, f"{KEY} private"),
        error(400, f"{KEY} private"),
        reply("private").cut(after=2),
    )
    request = ask(user("private question"), instruction="private instruction")
    await pieces_of(provider, request)
    await failure(provider, request)
    await failure(provider, request)
    await failure(provider, request)
    printed = capsys.readouterr()
    logged = caplog.text + printed.out + printed.err
    assert "model_unreachable" in logged
    assert KEY not in logged
    assert "private" not in logged


@pytest.mark.usefixtures("printed_logs")
async def test_the_log_holds_no_password_of_a_proxy(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A proxy that refuses to connect is named with its address."""
    monkeypatch.setenv("HTTPS_PROXY", server.url.removesuffix("/v1").replace("//", "//me:p@ss-word@"))
    provider = OpenAIProvider(KEY, "https://models.example/v1", "m")
    assert v1.ERROR_REASON_MODEL_UNAVAILABLE == (await failure(provider)).reason
    await provider.close()
    logged = capsys.readouterr()
    assert "model_unreachable" in logged.out + logged.err
    assert "ss-word" not in logged.out + logged.err


RECORDED = {
    "text": reply("Grüße, 世界 😀\n\u2028" * 5, chunks=9),
    "calls": tool_calls(("search", '{"q": "naïve 😀", "n": 3}'), ("noop", "{}")),
    "crlf": Answer((reply("a\r\nb\rc" * 4, chunks=8).body.replace(b"\n\n", b"\r\n\r\n: ping\r\n\r\n"),)),
    "several data lines": Answer((reply("split", chunks=2).body.replace(b',"model"', b',\ndata: "model"'),)),
    "usage with the final content": stream(
        chunk({"content": "a"}, finish="length", usage={**USAGE, "prompt_tokens_details": {"cached_tokens": 5}}),
        finish="length",
        usage=None,
    ),
    "no usage": reply("plain", chunks=5, usage=None),
    "refusal": stream(chunk({"refusal": "I will "}), chunk({"refusal": "not."})),
    "reasoning": stream(
        chunk({"reasoning_content": "hm, "}), chunk({"reasoning_content": "so"}), chunk({"content": "!"})
    ),
}


async def as_the_sdk_reads_it(client: openai.AsyncOpenAI) -> Reply:
    """The reply that the SDK's own iterator comes to."""
    said = {"content": "", "reasoning_content": "", "refusal": ""}
    calls: dict[int, tuple[str, str]] = {}
    reason = ""
    usage = v1.Usage(model_calls=1)
    create = client.chat.completions.create
    async for read in await create(model="m", messages=[{"role": "user", "content": "Hello"}], stream=True):
        usage.model = read.model
        if read.usage is not None:
            cached = read.usage.prompt_tokens_details and read.usage.prompt_tokens_details.cached_tokens
            usage.input_tokens, usage.cached_input_tokens = read.usage.prompt_tokens, cached or 0
            usage.output_tokens = read.usage.completion_tokens
        for choice in read.choices:
            for name in said:
                said[name] += getattr(choice.delta, name, None) or ""
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                tool, arguments = calls.get(call.index, ("", ""))
                calls[call.index] = (tool + (call.function.name or ""), arguments + (call.function.arguments or ""))
            reason = choice.finish_reason or reason
    return Reply(said["content"], said["reasoning_content"], said["refusal"], tuple(calls.values()), reason, usage)


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED.keys())
async def test_replies_are_what_the_sdks_own_iterator_makes_of_the_same_bytes(
    server: OpenAIServer, provider: OpenAIProvider, recorded: Answer
) -> None:
    """Over the same socket, for seeded ways to split the bytes."""
    assert EVENT_STREAM == recorded.headers
    dice = random.Random(20261122)
    size = len(recorded.body)
    async with openai.AsyncOpenAI(api_key=KEY, base_url=server.url, max_retries=0) as client:
        for _ in range(20):
            answer = recorded.split(sorted(dice.sample(range(1, size), dice.randint(0, 40))))
            server.script(answer, answer)
            expected = await as_the_sdk_reads_it(client)
            assert expected == fold(await pieces_of(provider))

"""Providers that send too much, nothing, or somewhere else: each call ends bounded, as one typed failure, and the key
goes nowhere that it was not meant for."""

import asyncio
import base64
import gzip
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Delta, ModelRequest
from notecase_server.models.openai import OpenAIProvider

from tests.support.openai_server import DONE, Answer, OpenAIServer, chunk, error, event, reply
from tests.support.replies import fold

KEY = "live-Secret.0123/456+789"
JSON = {"Content-Type": "application/json"}
PACKED = reply("Hi").body
MODEL_ERROR, UNAVAILABLE = v1.ERROR_REASON_MODEL_ERROR, v1.ERROR_REASON_MODEL_UNAVAILABLE


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as started:
        yield started


@pytest.fixture
async def provider(server: OpenAIServer) -> AsyncIterator[OpenAIProvider]:
    made = OpenAIProvider(KEY, server.url, "default-model")
    yield made
    await made.close()


async def ask(provider: OpenAIProvider) -> list[Delta]:
    message = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text="Hello")])
    return [piece async for piece in provider.stream(ModelRequest("", "", (message,), v1.Generation()))]


async def failure(provider: OpenAIProvider) -> NotecaseError:
    with pytest.raises(NotecaseError) as caught:
        await ask(provider)
    return caught.value


def refused(body: Any, status: int = 400, **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer((data,), status, {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}})


def redirect(status: int, target: str) -> Answer:
    return Answer((b"",), status, {"Location": target})


class TestRedirects:
    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    async def test_the_same_origin_is_asked_again_with_the_same_request(
        self, server: OpenAIServer, provider: OpenAIProvider, status: int
    ) -> None:
        server.script(redirect(status, "/v2/chat"), redirect(status, f"{server.url}/v3"), reply("Hi"))
        assert "Hi" == fold(await ask(provider)).text
        assert ["/v1/chat/completions", "/v2/chat", "/v1/v3"] == [received.path for received in server.received]
        assert [server.requests[0]] * 3 == server.requests

    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    async def test_another_origin_gets_neither_the_conversation_nor_the_key(
        self, server: OpenAIServer, provider: OpenAIProvider, status: int
    ) -> None:
        async with OpenAIServer() as other:
            for target in (
                f"{other.url}/chat/completions",
                f"//127.0.0.1:{other.url.split(':')[2]}",
                other.url.replace("http:", "https:"),
            ):
                server.script(redirect(status, target))
                caught = await failure(provider)
                assert MODEL_ERROR == caught.reason
                assert (
                    "The model provider redirects the call to another origin, which is not followed "
                    f"(status {status}); its base URL may be wrong." == caught.message
                )
            assert [] == other.received

    async def test_a_circle_ends_at_once(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(redirect(307, "/a"), redirect(307, "/v1/chat/completions"), reply("never asked for"))
        caught = await failure(provider)
        assert MODEL_ERROR == caught.reason
        assert "in a circle" in caught.message
        assert 2 == len(server.requests)

    async def test_a_spiral_ends_too(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(*[redirect(307, f"/{number}") for number in range(60)])
        assert MODEL_ERROR == (await failure(provider)).reason
        assert len(server.requests) < 6

    @pytest.mark.parametrize("target", ["http://[", "http://a..b/", "mailto:x"])
    async def test_an_address_that_is_none(self, server: OpenAIServer, provider: OpenAIProvider, target: str) -> None:
        server.script(redirect(307, target))
        caught = await failure(provider)
        assert MODEL_ERROR == caught.reason
        assert target not in caught.message


class TestTooMuch:
    async def test_no_more_is_read_of_a_refusal_than_its_words_take(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        first = b'{"error": {"code": "bad_thing", "message": "The pump is broken. '
        server.script(Answer((first, *[b"x" * 65536] * 800), 400, JSON))
        caught = await failure(provider)
        assert (MODEL_ERROR, "bad_thing") == (caught.reason, caught.metadata["code"])
        assert ": The pump is broken. xxx" in caught.message
        async with asyncio.timeout(60):
            await server.received[0].left.wait()

    @pytest.mark.parametrize("status", [400, 500])
    async def test_a_refusal_that_unpacks_to_a_gigabyte_takes_no_memory(
        self, server: OpenAIServer, provider: OpenAIProvider, status: int
    ) -> None:
        packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
        block = packer.compress(b"[" * (1 << 20))
        bomb = b"".join([block, *(packer.compress(b"[" * (1 << 20)) for _ in range(127)), packer.flush()])
        server.script(refused(bomb, status, Content_Encoding="gzip"))
        tracemalloc.start()
        try:
            caught = await failure(provider)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (MODEL_ERROR if status == 400 else UNAVAILABLE) == caught.reason
        assert peak < 16 << 20

    async def test_a_reply_of_packed_comments_ends_and_lets_others_go_on_meanwhile(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        headers = {"Content-Type": "text/event-stream", "Content-Encoding": "gzip"}
        server.script(Answer((gzip.compress(b": \n\n" * (8 << 20)),), 200, headers))
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        caught = await failure(provider)
        task.cancel()
        assert MODEL_ERROR == caught.reason
        assert "without any part of a reply" in caught.message
        assert turns > 10

    @pytest.mark.parametrize(
        ("encoding", "packed"),
        [
            ("gzip", gzip.compress(PACKED)),
            ("gzip", gzip.compress(PACKED[:100]) + gzip.compress(PACKED[100:])),
            ("deflate", zlib.compress(PACKED)),
            ("deflate", zlib.compress(PACKED)[2:-4]),
        ],
        ids=["gzip", "two members", "deflate", "deflate without a head"],
    )
    async def test_a_packed_reply_is_read(
        self, server: OpenAIServer, provider: OpenAIProvider, encoding: str, packed: bytes
    ) -> None:
        """However it is cut."""
        whole = Answer((packed,), 200, {"Content-Type": "text/event-stream", "Content-Encoding": encoding})
        server.script(whole, whole.split(range(1, len(packed))))
        assert ["Hi", "Hi"] == [fold(await ask(provider)).text for _ in range(2)]

    async def test_a_packing_that_is_broken(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        headers = {"Content-Type": "text/event-stream", "Content-Encoding": "gzip"}
        server.script(Answer((b"no gzip at all",), 200, headers), refused(b"no gzip", 400, Content_Encoding="gzip"))
        assert UNAVAILABLE == (await failure(provider)).reason
        assert MODEL_ERROR == (await failure(provider)).reason

    async def test_an_event_that_never_ends(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        server.script(Answer((b"data: {", *[b"x" * (1 << 20)] * 100)))
        assert MODEL_ERROR == (await failure(provider)).reason

    async def test_a_head_that_proxies_have_added_to(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        policy = {"Content-Security-Policy": "x" * 40_000, **{f"X-Trace-{n}": "1" for n in range(300)}}
        server.script(Answer(reply("Hi").pieces, 200, policy))
        assert "Hi" == fold(await ask(provider)).text

    async def test_endless_comments(self, server: OpenAIServer) -> None:
        """Between two pieces there is no time at all, so that the first comment is one too many."""
        provider = OpenAIProvider(KEY, server.url, "m", first_timeout=30.0, idle_timeout=0.0)
        server.script(Answer((chunk({"content": "a"}), *[b": still here\n\n"] * 1000)).held(asyncio.Event(), after=500))
        caught = await failure(provider)
        await provider.close()
        assert UNAVAILABLE == caught.reason
        assert "The model provider sent nothing for 0 seconds." == caught.message


class TestWords:
    @pytest.mark.parametrize(
        ("body", "told"),
        [
            ([{"error": {"code": 400, "message": "Bad tool.", "status": "INVALID_ARGUMENT"}}], "Bad tool."),
            ({"error": {"error": {"message": "Deep."}}}, "Deep."),
            ({"errors": [{"message": "One."}, {"message": "Two."}]}, "One.: Two."),
            (
                {"message": {"detail": [{"loc": ["body", "top_k"], "msg": "not permitted"}]}},
                "body.top_k: not permitted",
            ),
            ({"detail": [{"loc": ["body", 0], "msg": "odd", "input": "private"}]}, "body.0: odd"),
            ({"detail": "No."}, "No."),
            ({"errors": {"top_k": ["is not known", "x"], "n": "is large"}}, "top_k: is not known: n: is large"),
            ({"errors": ["One.", "Two."]}, "One.: Two."),
            ({"error": {"message": ["One.", {"msg": "Two."}]}}, "One.: Two."),
            ({"msg": "In msg.", "code": 40001}, "In msg."),
            ({"errorMessage": "Camel."}, "Camel."),
            ({"title": "Titled", "status": 400}, "Titled"),
            ({"fault": {"faultstring": "Gate closed."}}, "Gate closed."),
            (
                {
                    "error": {
                        "message": "Provider returned error",
                        "metadata": {"raw": '{"error": {"message": "Inner."}}'},
                    }
                },
                "Provider returned error: Inner.",
            ),
            ({"error": {"message": "Outer", "metadata": {"raw": "plain inner"}}}, "Outer: plain inner"),
            ({"error": {"message": '{"error": {"message": "Within."}}'}}, "Within."),
            (b"only words", "only words"),
            (event({"error": {"message": "As an event."}}), "As an event."),
            (b'"a JSON string"', "a JSON string"),
        ],
    )
    async def test_the_text_of_a_refusal_is_found_wherever_it_is(
        self, server: OpenAIServer, provider: OpenAIProvider, body: Any, told: str
    ) -> None:
        server.script(refused(body))
        caught = await failure(provider)
        assert f"The model provider refused the call of 'default-model' (status 400): {told}" == caught.message

    @pytest.mark.parametrize(
        "body", [b"", b"<html>no</html>", b"<!DOCTYPE html>", {}, [], [[]], None, 7, {"error": []}]
    )
    async def test_what_says_nothing(self, server: OpenAIServer, provider: OpenAIProvider, body: Any) -> None:
        server.script(refused(body))
        told = "" if body == 7 else "."
        caught = await failure(provider)
        assert f"The model provider refused the call of 'default-model' (status 400){told or '.'}" == caught.message

    async def test_what_nests_or_repeats_without_end_is_bounded(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        deep: Any = "deep"
        for _ in range(400):
            deep = {"error": deep}
        wide = {"errors": [{"errors": [{"message": f"m{row}{column}"} for column in range(90)]} for row in range(90)]}
        for body in (deep, wide):
            server.script(refused(body))
            assert len((await failure(provider)).message) < 400

    async def test_a_body_that_a_proxy_finds_too_large_is_a_conversation_that_is_too_long(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(refused(b"<html>413 Request Entity Too Large</html>", 413))
        assert {"status": "413", "code": "context_length_exceeded"} == (await failure(provider)).metadata

    async def test_moderation_is_not_taken_for_a_bad_credential(
        self, server: OpenAIServer, provider: OpenAIProvider
    ) -> None:
        server.script(refused({"error": {"code": 403, "message": "Your input was flagged."}}, 403))
        assert (await failure(provider)).message.endswith("(status 403): Your input was flagged.")

    async def test_the_key_is_kept_of_no_member(self, server: OpenAIServer, provider: OpenAIProvider) -> None:
        for told in (KEY, KEY.upper(), base64.b64encode(KEY.encode()).decode(), KEY.encode().hex()):
            server.script(Answer((chunk({"content": "a"}, finish=told, model=told), DONE)))
            said = fold(await ask(provider))
            assert ("stop", "default-model") == (said.reason, said.usage.model)
            server.script(refused({"error": {"message": f"Key {told}!", "code": told, "type": told}}))
            caught = await failure(provider)
            assert "[key]" in caught.message
            assert told not in str((caught.message, caught.metadata))

    @pytest.mark.parametrize("key", ["x", "none", "e"])
    async def test_a_placeholder_key_changes_no_code_and_no_result(self, server: OpenAIServer, key: str) -> None:
        provider = OpenAIProvider(key, server.url, "m")
        server.script(error(400, "Please reduce the length of the messages.", code="context_length_exceeded"))
        caught = await failure(provider)
        await provider.close()
        assert {"status": "400", "code": "context_length_exceeded"} == caught.metadata
        assert "The conversation is too long for the model 'm': Please reduce the length of the messages." == (
            caught.message
        )

    @pytest.mark.parametrize(
        ("body", "seconds"),
        [
            ({"error": {"message": "Please try again in 6.5s."}}, 6.5),
            ({"error": {"message": "Please try again in 1m2.5s."}}, 62.5),
            ({"error": {"message": "Please try again in 250ms."}}, 0.25),
            ({"error": {"message": "Retry after 20 seconds."}}, 20.0),
            ([{"error": {"status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": "34s"}]}}], 34.0),
            ({"error": {"message": "no"}, "retry_after": 7}, 7.0),
            ({"error": {"message": "Please wait 1 minute before you try again."}}, 60.0),
            ({"error": {"message": "Try again in 2 minutes and 5 seconds"}}, 125.0),
            ({"error": {"message": "The rate limit resets in 12 seconds."}}, 12.0),
            ({"error": {"message": "no", "retry_after_ms": 1500}}, 1.5),
            ({"error": {"message": "no", "resets_in_seconds": 9}}, 9.0),
            ({"error": "The model is currently loading", "estimated_time": 20.5}, 20.5),
            ({"error": {"message": "Try again later."}}, None),
        ],
    )
    async def test_a_refusal_may_say_in_its_body_how_long_to_wait(
        self, server: OpenAIServer, provider: OpenAIProvider, body: Any, seconds: float | None
    ) -> None:
        server.script(refused(body, 429), refused(body, 429, Retry_After="3"))
        assert seconds == (await failure(provider)).retry_after
        assert 3.0 == (await failure(provider)).retry_after

    @pytest.mark.parametrize(
        ("date", "seconds"),
        [
            ("Thu, 01 Jan 1970 00:00:40 GMT", 30.0),
            ("Thursday, 01-Jan-70 00:00:40 GMT", 30.0),
            ("Thu, 01 Jan 1970 00:00:05 GMT", 0.0),
            ("soon", None),
        ],
    )
    async def test_a_date_without_a_date_of_the_answer_counts_from_our_clock(
        self, date: str, seconds: float | None
    ) -> None:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(f"HTTP/1.1 429 No\r\nRetry-After: {date}\r\nContent-Length: 0\r\n\r\n".encode())
            writer.close()
            await writer.wait_closed()

        bare = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with bare:
            url = f"http://127.0.0.1:{bare.sockets[0].getsockname()[1]}/v1"
            provider = OpenAIProvider(KEY, url, "m", clock=lambda: 10_000_000)
            assert seconds == (await failure(provider)).retry_after
            await provider.close()

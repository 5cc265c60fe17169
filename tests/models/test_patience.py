"""How long a provider is waited for, and how often it is asked again."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from notecase import Client, v1
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import ModelRequest
from notecase_server.models.openai import OpenAIProvider

from tests.support.openai_server import EVENT_STREAM, Answer, OpenAIServer, chunk, error, reply
from tests.support.replies import fold
from tests.support.server import Spawned

REQUEST = ModelRequest("m", "", [v1.Message(parts=[v1.Part(text="Hello")])], v1.Generation())


@asynccontextmanager
async def endless(first: bytes, again: bytes) -> AsyncIterator[str]:
    """A server that answers with `first` and then with `again`, over and over, until its client is gone. It is left
    when the last client is."""
    answering: set[asyncio.Task[None]] = set()

    def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(asyncio.ensure_future(serve(reader, writer)))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + first)
        try:
            while not reader.at_eof():
                writer.write(again)
                await writer.drain()
                await asyncio.sleep(0.02)  # the pace of the server, and nothing that a test waits for
        except ConnectionError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        await asyncio.gather(*answering)


async def failure(url: str, **settings: Any) -> NotecaseError:
    provider = OpenAIProvider("key", url, "m", **settings)
    with pytest.raises(NotecaseError) as caught:
        async for _ in provider.stream(REQUEST):
            pass
    await provider.close()
    return caught.value


async def answered(url: str, **settings: Any) -> str:
    provider = OpenAIProvider("key", url, "m", **settings)
    text = fold([piece async for piece in provider.stream(REQUEST)]).text
    await provider.close()
    return text


@pytest.mark.parametrize(
    ("first", "settings"),
    [(b"", {"first_timeout": 0.3}), (chunk({"content": "Hi"}), {"idle_timeout": 0.3})],
    ids=["before the reply", "within it"],
)
@pytest.mark.parametrize(
    "again",
    [b": ping\n\n", b"\n\n", b"event: ping\n\n", chunk({"content": ""}), chunk({"role": "assistant", "content": None})],
    ids=["comments", "empty lines", "events without data", "empty pieces", "roles"],
)
async def test_what_says_nothing_is_silence(first: bytes, again: bytes, settings: dict[str, float]) -> None:
    async with endless(first, again) as url:
        caught = await failure(url, **settings)
    assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.reason
    assert "The model provider sent nothing for 0.3 seconds." == caught.message


async def test_a_reply_without_an_end_ends() -> None:
    async with endless(b"", chunk({"content": "and "})) as url:
        caught = await failure(url, whole_timeout=0.3)
    assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.reason
    assert "The model provider's answer did not end within 0.3 seconds." == caught.message


@pytest.mark.parametrize("head", [b"", b": loading\n\n"], ids=["no head", "a comment"])
async def test_a_first_piece_may_take_longer_than_the_next(head: bytes) -> None:
    """A local model is loaded, or reads a long prompt, and the request is not sent again meanwhile."""
    gate = asyncio.Event()
    whole = reply("Hi").body
    async with OpenAIServer() as server:
        server.script(Answer((*filter(None, [head]), gate, whole), headers=EVENT_STREAM))
        asyncio.get_running_loop().call_later(0.3, gate.set)
        assert "Hi" == await answered(server.url, idle_timeout=0.1, first_timeout=60.0)
        assert 1 == len(server.requests)


@asynccontextmanager
async def served(url: str, log: Path, *arguments: str) -> AsyncIterator[Callable[[], Awaitable[v1.Run]]]:
    """Returns a function that starts a separate server with these arguments."""
    env = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "key", "OPENAI_MODEL": "m"}
    server = await Spawned.start("memory:", log, *arguments, env=env, forked=True)
    try:
        async with Client(server.address) as client:
            agent = await client.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent())))

            async def run() -> v1.Run:
                session = v1.Session(agent=agent.name)
                made = await client.sessions.CreateSession(v1.CreateSessionRequest(session=session))
                start = v1.StartRun(session=made.name, messages=[v1.Message(parts=[v1.Part(text="Hello")])])
                answer: v1.InvokeResponse = await client.runs.Invoke(v1.InvokeRequest(start=start))
                return answer.run

            yield run
    finally:
        await server.stop()


async def test_a_server_that_was_silent_is_not_asked_again(tmp_path: Path) -> None:
    """It may be at work on the request, and would do it twice."""
    async with OpenAIServer() as model:
        model.script(reply("Hi").held(asyncio.Event(), after=0))
        async with served(model.url, tmp_path / "log", "--first-timeout", "0.3", "--max-retries", "5") as run:
            ended = await run()
        assert "The model provider sent nothing for 0.3 seconds." == ended.error.message
        assert 1 == len(model.requests)


@pytest.mark.parametrize("retries", [0, 1, 3])
async def test_the_number_of_repeats_is_a_setting(retries: int, tmp_path: Path) -> None:
    async with (
        OpenAIServer(lambda body: error(503, "Loading model")) as model,
        served(model.url, tmp_path / "log", "--max-retries", str(retries)) as run,
    ):
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == (await run()).error.reason
        assert retries + 1 == len(model.requests)
        model.script(*(error(503) for _ in range(retries)), reply("Hi"))
        assert v1.Run.STATE_SUCCEEDED == (await run()).state


async def test_the_time_of_repeats_is_a_setting(tmp_path: Path) -> None:
    """A wait that ends after it is not begun."""
    async with OpenAIServer(lambda body: error(429, headers={"retry-after": "7"})) as model:
        assert 7.0 == (await failure(model.url)).retry_after
        async with served(model.url, tmp_path / "log", "--max-retries", "5", "--retry-time", "5") as run:
            assert v1.ERROR_REASON_MODEL_UNAVAILABLE == (await run()).error.reason
        assert 2 == len(model.requests)


async def test_a_provider_that_says_so_is_not_asked_again(tmp_path: Path) -> None:
    async with OpenAIServer(lambda body: error(503, headers={"x-should-retry": "false"})) as model:
        async with served(model.url, tmp_path / "log", "--max-retries", "5") as run:
            assert v1.ERROR_REASON_MODEL_UNAVAILABLE == (await run()).error.reason
        assert 1 == len(model.requests)

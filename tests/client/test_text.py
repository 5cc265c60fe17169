"""What `RunStream.text` yields: the words of its run, of whatever else the stream has events."""

import asyncio

import grpc
import pytest
from notecase import Client, NotecaseError, RunStream
from notecase.client import DURABLE

from tests.client.test_client import EAGER
from tests.support.openai_server import OpenAIServer, chunk, error, reply, stream


def think() -> str:
    return "Thought."


async def words(run: RunStream) -> str:
    return "".join([text async for text in run.text()])


async def heard(client: Client, name: str, after_sequence: int | None = None) -> str:
    async with client.attach(name, after_sequence) as run:
        return await words(run)


async def test_the_text_of_a_queued_run_is_its_own(client: Client, session: str, model: OpenAIServer) -> None:
    """It has nothing of the run before it: neither live, nor after both have ended, nor when that run failed. A stream
    of the session has all."""
    release = asyncio.Event()
    model.script(reply("The first.", chunks=2).held(release, 2), reply("The second."), error(400), reply("The third."))
    one = client.run("One", session=session, options=EAGER)
    async with one as first, client.run("Two", session=session, on_busy="queue", options=EAGER) as second:
        reading = asyncio.create_task(words(second))
        async for event in first:
            if event.HasField("block_delta"):
                release.set()
        assert "The second." == await reading
    assert "The second." == await heard(client, second.name) == second.reply.text
    try:
        await client.invoke("Fail", session=session)
    except NotecaseError:
        third = await client.invoke("Three", session=session)
    assert "The third." == await heard(client, third.run.name, 0)
    assert "The first.\n\nThe second.\n\nThe third." == await heard(client, session, 0)


async def test_a_text_goes_on_in_the_middle_of_a_sentence(client: Client, session: str, model: OpenAIServer) -> None:
    """For a program that kept the last delta it has shown, while the reply is made and after it has ended."""
    read, release = asyncio.Event(), asyncio.Event()
    model.script(reply("Grün war der Wald.", chunks=4).held(read, 2).held(release, 4))
    async with client.run("Speak", session=session, options=EAGER) as run:
        async for event in run:
            if event.HasField("block_delta"):
                break
    delta, kept, shown = event.block_delta, run.last_sequence, event.block_delta.text
    assert len(shown.encode()) == delta.end > len(shown) > 0
    read.set()
    async with client.attach(run.name, kept, options=EAGER) as again:
        texts = again.text(delta)
        live = await anext(texts)
        release.set()
        live += "".join([text async for text in texts])
    async with client.attach(run.name, kept) as later:
        ended = "".join([text async for text in later.text(after=delta)])
    assert ["Grün war der Wald."] * 2 == [shown + live, shown + ended]
    assert "Grün war der Wald." == await heard(client, run.name, kept)


async def test_a_text_after_a_delta_leaves_out_the_messages_before(
    client: Client, session: str, model: OpenAIServer
) -> None:
    """While the reply of that delta is made and after it has ended. If the stream has no such message, nothing is left
    out."""
    release = asyncio.Event()
    call = {"index": 0, "id": "call_a", "type": "function", "function": {"name": "think", "arguments": "{}"}}
    asks = stream(chunk({"content": "I think."}), chunk({"tool_calls": [call]}), finish="tool_calls")
    model.script(asks, reply("Grün war der Wald.", chunks=4).held(release, 2), reply("Unrelated."))
    async with client.run("Speak", session=session, tools=[think], options=EAGER) as run:
        async for event in run:
            if event.block_delta.text.startswith("Gr"):
                break
    delta = event.block_delta
    async with client.attach(run.name, options=EAGER) as again:
        texts = again.text(delta)
        live = await anext(texts) if delta.end < 4 else ""
        release.set()
        live += "".join([text async for text in texts])
    async with client.attach(run.name) as later:
        ended = "".join([text async for text in later.text(delta)])
    assert ["Grün war der Wald."] * 2 == [delta.text + live, delta.text + ended]
    other = await client.invoke("Again", session=session)
    async with client.attach(other.run.name) as elsewhere:
        assert "\n\nUnrelated." == "".join([text async for text in elsewhere.text(delta)])


async def test_a_cancelled_run_ends_its_text_with_an_error(client: Client, session: str, model: OpenAIServer) -> None:
    """So that half a reply is not taken for the whole, neither live nor by a stream that attaches later."""
    model.script(reply("Grün war der Wald.", chunks=2).held(asyncio.Event(), 2))
    shown = ""
    with pytest.raises(NotecaseError) as live:
        async with client.run("Speak", session=session, options=EAGER) as run:
            async for text in run.text():
                shown += text
                await run.cancel()
    assert shown
    assert "Grün war der Wald.".startswith(shown)
    with pytest.raises(NotecaseError) as later:
        await heard(client, run.name)
    for raised in (live.value, later.value):
        assert (grpc.StatusCode.CANCELLED, "") == (raised.code, raised.reason)
        assert f"{run.name} was cancelled." == raised.message
    assert shown == await heard(client, session, 0)


async def test_a_stream_without_deltas_has_the_text_of_whole_messages(
    client: Client, session: str, model: OpenAIServer
) -> None:
    model.script(reply("At the harbour. 🎻", chunks=5))
    async with client.run("Where?", session=session, options=DURABLE) as run:
        assert await words(run) == "At the harbour. 🎻" == run.reply.text

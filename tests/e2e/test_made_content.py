"""Images and sound that a model makes are content of its message, its sources are kept, and all of it goes along."""

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from notecase import v1
from notecase_server.engine.draft import MAX_MEDIA
from notecase_server.models.contract import MAX_MEDIA_BYTES
from notecase_server.models.offline import PIXEL
from notecase_server.models.openai import OpenAIProvider

from tests.e2e.driving import OnStream, durable, fields_of, log_of, reason_of, said
from tests.e2e.test_content import digest, download, noise
from tests.e2e.test_deltas import Printer, replies
from tests.e2e.test_earlier import exported
from tests.e2e.test_past import fork, rewind, turn
from tests.e2e.test_transfer import load
from tests.support.openai_server import Answer, OpenAIServer, chunk, reply, stream
from tests.support.server import Running, running

PNG = b"\x89PNG\r\n\x1a\n" + noise(400_000)
FAILED, SUCCEEDED = v1.Run.STATE_FAILED, v1.Run.STATE_SUCCEEDED


def image(data: bytes = PNG) -> bytes:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return chunk({"images": [{"type": "image_url", "image_url": {"url": url}}]})


def text(words: str) -> bytes:
    return chunk({"content": words})


def reference(data: bytes = PNG, number: int = 1) -> v1.Blob:
    name = f"blobs/{digest(data)}"
    return v1.Blob(name=name, media_type="image/png", size_bytes=len(data), filename=f"image-{number}.png")


async def last_reply(served: Running, session: str) -> v1.Message:
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    return [message for message in listed.messages if message.role == v1.Message.ROLE_ASSISTANT][-1]


async def test_an_image_is_a_blob_of_the_message_that_made_it(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Between the texts around it, which come as deltas; with its name, type and size, in the same event."""
    model.script(stream(text("Here"), text(":"), image(), text("Nice?")))
    frames = [frame async for frame in OnStream().start(served, v1.StartRun(session=session, messages=[said("Draw.")]))]
    printer = Printer()
    for frame in frames:
        printer.take(frame)
    (message,) = replies(durable(frames))
    assert ["text", "blob", "text"] == [part.WhichOneof("kind") for part in message.parts]
    assert ("Here:", reference(), "Nice?") == (message.parts[0].text, message.parts[1].blob, message.parts[2].text)
    assert [message.name] == printer.whole
    assert PNG == await download(served, message.parts[1].blob.name)
    (run,) = (await served.runs.ListRuns(v1.ListRunsRequest(parent=session))).runs
    assert (SUCCEEDED, message.parts) == (run.state, run.reply.parts)


async def test_an_image_alone_is_a_reply_and_text_alone_is_the_note(served: Running, model: OpenAIServer) -> None:
    agent = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(), output_key="said")))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    model.script(stream(image()), stream(text("Here:"), image()))
    for note in (None, "Here:"):
        done = await turn(served, made.name, "Draw.")
        assert (SUCCEEDED, reference()) == (done.run.state, done.reply.parts[-1].blob)
        state = await served.state.GetState(v1.GetStateRequest(name=f"{made.name}/state"))
        assert note == (state.entries["said"].value.string_value if "said" in state.entries else None)


async def test_sound_is_a_blob_behind_its_transcript(served: Running, session: str, model: OpenAIServer) -> None:
    """The transcript is the reply's text, as deltas, and all that a model is shown of it later."""
    samples = noise(50_001)
    pieces = [
        chunk({"audio": {"id": "a", "transcript": "Good "}}),
        chunk({"audio": {"data": base64.b64encode(samples[:7000]).decode(), "transcript": "evening."}}),
        chunk({"audio": {"data": base64.b64encode(samples[7000:]).decode()}}),
        chunk({"audio": {"expires_at": 1_900_000_000}}),
    ]
    model.script(stream(*pieces), reply("Bye."))
    frames = [frame async for frame in OnStream().start(served, v1.StartRun(session=session, messages=[said("Hi")]))]
    printer = Printer()
    for frame in frames:
        printer.take(frame)
    assert ["Good evening."] == printer.texts
    (message,) = replies(durable(frames))
    spoken, sound = message.parts
    assert ("Good evening.", "audio/wav", "audio-1.wav") == (spoken.text, sound.blob.media_type, sound.blob.filename)
    wav = await download(served, sound.blob.name)
    assert (b"RIFF", samples[:50_000]) == (wav[:4], wav[44:])
    await turn(served, session, "Bye")
    assert {"role": "assistant", "content": "Good evening."} == model.requests[-1]["messages"][2]


async def test_a_model_that_makes_images_gets_its_newest_and_others_get_a_description(
    served: Running, session: str, model: OpenAIServer
) -> None:
    await served.agents.CreateAgent(
        v1.CreateAgentRequest(agent_id="painter", agent=v1.Agent(llm=v1.LlmAgent(model="some-image-1")))
    )
    model.script(
        stream(text("One:"), image()), stream(text("Two:"), image(PNG + b"2")), reply("Three."), reply("Four.")
    )
    for words in ("Draw.", "Again.", "And?"):
        await turn(served, session, words, agent="agents/painter")
    await turn(served, session, "Well?")
    shown = model.requests[2]["messages"]
    assert ["One:", "Two:"] == [message["content"] for message in shown if message["role"] == "assistant"]
    url = f"data:image/png;base64,{base64.b64encode(PNG + b'2').decode()}"
    assert [
        {"type": "text", "text": "From your reply:"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "And?"},
    ] == shown[4]["content"]
    told = [message["content"] for message in model.requests[3]["messages"] if message["role"] == "assistant"]
    assert ["One:\n[image/png: image-1.png]", "Two:\n[image/png: image-1.png]", "Three."] == told


async def test_an_image_elsewhere_is_a_file_that_is_not_fetched(
    served: Running, session: str, model: OpenAIServer
) -> None:
    url = f"{model.url}/made/a.png"
    model.script(stream(text("Here:"), chunk({"images": [{"image_url": {"url": url}}]})))
    done = await turn(served, session, "Draw.")
    assert v1.FileUri(uri=url, media_type="image/png") == done.reply.parts[1].file
    assert 1 == len(model.received)


async def test_sources_are_kept_with_the_text_that_rests_on_them(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Their places are in bytes of the part's own text; a list is in its order, behind the last text."""
    told = [
        {
            "type": "url_citation",
            "url_citation": {"url": "https://a.example", "title": "Ä", "start_index": 2, "end_index": 4},
        },
        {"type": "url_citation", "url_citation": {"url": "https://b.example", "start_index": 5, "end_index": 9}},
        {"type": "url_citation", "url_citation": {"url": "https://c.example", "start_index": 8, "end_index": 99}},
    ]
    model.script(
        stream(text("Grüß "), image(), text("dich 😀[1]"), chunk({"annotations": told})),
        stream(text("Hi[1]"), chunk(citations=["https://a.example", "https://b.example"])),
    )
    first, _, second = (await turn(served, session, "Hi")).reply.parts
    assert [v1.Citation(uri="https://a.example", title="Ä", start=2, end=6)] == list(first.citations)
    assert [
        v1.Citation(uri="https://b.example", start=0, end=4),
        v1.Citation(uri="https://c.example"),
    ] == list(second.citations)
    (only,) = (await turn(served, session, "Hi")).reply.parts
    assert ["https://a.example", "https://b.example"] == [citation.uri for citation in only.citations]


async def test_sources_of_json_have_no_places(served: Running, model: OpenAIServer) -> None:
    llm = v1.LlmAgent(output_schema='{"type": "object"}')
    agent = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=llm)))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    cited = {"url_citation": {"url": "https://a.example", "start_index": 8, "end_index": 9}}
    model.script(stream(text("```json\n{}\n```"), image(), chunk({"annotations": [cited]})))
    json, blob = (await turn(served, made.name, "Hi")).reply.parts
    assert ("{}", [v1.Citation(uri="https://a.example")]) == (json.json, list(json.citations))
    assert reference() == blob.blob


async def test_a_caller_names_no_sources(served: Running, session: str) -> None:
    part = v1.Part(text="Hi", citations=[v1.Citation(uri="https://a.example")])
    message = v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[part])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[message]))
    assert {"messages[0].parts[0].citations"} == fields_of(refused.value)


async def test_what_was_made_goes_along_with_an_export_a_fork_and_a_rewind(
    served: Running, session: str, model: OpenAIServer, tmp_path: Path
) -> None:
    """And is gone with the last that refers to it; where a rewind leaves it behind, the log still does."""
    cited = chunk({"annotations": [{"url": "https://a.example", "title": "A"}]})
    model.script(stream(text("Here:"), image(), cited), reply("Ok."))
    await turn(served, session, "Draw.")
    made = await last_reply(served, session)
    file = await exported(served, session, with_blobs=True)
    async with running(f"sqlite:{tmp_path / 'elsewhere.db'}") as elsewhere:
        there = await load(elsewhere, file, session_id="there")
        assert made.parts == (await last_reply(elsewhere, there.name)).parts
        assert PNG == await download(elsewhere, made.parts[1].blob.name)
        assert file == await exported(elsewhere, there.name, with_blobs=True)
    copy = await fork(served, session)
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=session))
    assert made.parts == (await last_reply(served, copy.name)).parts
    await rewind(served, copy.name, 0)
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=copy.name))
    assert [] == list(listed.messages)
    assert PNG == await download(served, made.parts[1].blob.name)
    await turn(served, copy.name, "Well?")
    assert ["Well?"] == [message["content"] for message in model.requests[-1]["messages"] if message["role"] == "user"]


async def test_a_reply_that_is_requested_again_leaves_nothing_of_the_first_try(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(Answer((text("One:"), image(PNG + b"1"))).cut(after=2), stream(text("Two:"), image(PNG + b"2")))
    done = await turn(served, session, "Draw.")
    assert ("Two:", reference(PNG + b"2")) == (done.reply.parts[0].text, done.reply.parts[1].blob)
    log = b"".join(event.SerializeToString() for event in await log_of(served, session))
    assert (1, 0) == (log.count(digest(PNG + b"2").encode()), log.count(digest(PNG + b"1").encode()))


async def test_a_reply_that_is_stopped_keeps_what_was_made(served: Running, session: str, model: OpenAIServer) -> None:
    model.script(Answer((text("Here:"), image(), text("Ni"), asyncio.Event())))
    call = served.runs.Run()
    await call.write(v1.RunRequest(start=v1.StartRun(session=session, messages=[said("Draw.")])))
    await until_block(call, 2)
    (run,) = (await served.runs.ListRuns(v1.ListRunsRequest(parent=session))).runs
    await served.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    kept = await last_reply(served, session)
    assert (v1.Message.STATUS_INCOMPLETE, "Here:", "Ni") == (kept.status, kept.parts[0].text, kept.parts[2].text)
    assert reference() == kept.parts[1].blob


async def until_block(call: Any, block: int) -> None:
    async for frame in call:
        if any(event.block_delta.block == block for event in frame.batch.events):
            return


@pytest.mark.parametrize(
    ("answer", "limit", "most"),
    [
        (stream(*(image(PNG[:99] + bytes([number])) for number in range(MAX_MEDIA + 1))), "reply_media", MAX_MEDIA),
        (
            stream(chunk({"images": [f"https://images.example/{number}" for number in range(MAX_MEDIA + 1)]})),
            "reply_media",
            MAX_MEDIA,
        ),
        (
            stream(*(image(PNG + noise(11 << 20, number)) for number in range(3))),
            "reply_media_bytes",
            MAX_MEDIA_BYTES,
        ),
    ],
    ids=["too many", "too many elsewhere", "too large together"],
)
async def test_what_a_reply_may_make_is_bounded(
    served: Running, session: str, model: OpenAIServer, answer: Answer, limit: str, most: int
) -> None:
    """What came before is kept with the half reply."""
    model.script(answer)
    run = (await turn(served, session, "Draw.")).run
    assert (FAILED, v1.ERROR_REASON_LIMIT_EXCEEDED) == (run.state, run.error.reason)
    assert (limit, str(most)) == (run.error.metadata["limit"], run.error.metadata["value"])
    kept = await last_reply(served, session)
    assert v1.Message.STATUS_INCOMPLETE == kept.status
    assert (2 if limit == "reply_media_bytes" else most) == len(kept.parts)


@pytest.fixture(params=["a blob", "a session"])
async def small(request: pytest.FixtureRequest, store_url: str, model: OpenAIServer) -> AsyncIterator[Running]:
    """A server that keeps less than the image, of one blob or of all."""
    limits = (200_000, 1 << 30) if request.param == "a blob" else (256 << 20, 200_000)
    providers = {"openai": OpenAIProvider("test-key", model.url, "stub-1")}
    async with running(store_url, providers, max_blob_bytes=limits[0], max_session_bytes=limits[1]) as server:
        agent = v1.Agent(llm=v1.LlmAgent())
        await server.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        await server.sessions.CreateSession(
            v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
        )
        yield server


async def test_what_there_is_no_room_for_ends_the_run_typed(small: Running, model: OpenAIServer) -> None:
    """The half reply says in words what was there, and the session goes on."""
    model.script(stream(text("Here:"), image(), text("Nice?")), reply("Ok."))
    done = await turn(small, "sessions/case", "Draw.")
    assert (FAILED, v1.ERROR_REASON_PAYLOAD_TOO_LARGE) == (done.run.state, done.run.error.reason)
    kept = await last_reply(small, "sessions/case")
    assert v1.Message.STATUS_INCOMPLETE == kept.status
    assert "Here:" == kept.parts[0].text
    assert {"text"} == {part.WhichOneof("kind") for part in kept.parts}
    assert SUCCEEDED == (await turn(small, "sessions/case", "Well?")).run.state


@pytest.mark.parametrize("small", ["a session"], indirect=True)
async def test_a_run_can_be_stopped_though_there_is_no_room_for_what_it_made(
    small: Running, model: OpenAIServer
) -> None:
    model.script(Answer((text("Here:"), image(), text("Ni"), asyncio.Event())))
    call = small.runs.Run()
    await call.write(v1.RunRequest(start=v1.StartRun(session="sessions/case", messages=[said("Draw.")])))
    await until_block(call, 2)
    (run,) = (await small.runs.ListRuns(v1.ListRunsRequest(parent="sessions/case"))).runs
    await small.runs.CancelRun(v1.CancelRunRequest(name=run.name))
    assert v1.Run.STATE_CANCELLED == (await small.runs.GetRun(v1.GetRunRequest(name=run.name))).state
    kept = await last_reply(small, "sessions/case")
    assert ["Here:", f"[image/png, {len(PNG)} bytes, not kept]", "Ni"] == [part.text for part in kept.parts]


async def test_the_offline_model_makes_an_image_and_names_a_source(served: Running) -> None:
    """So that a client in any language can be tried against it."""
    agent = v1.Agent(llm=v1.LlmAgent(provider="offline"))
    made = await served.agents.CreateAgent(v1.CreateAgentRequest(agent=agent))
    session = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=made.name)))
    done = await turn(served, session.name, "/say Here: /image /cite https://example.org/a")
    words, pixel = done.reply.parts
    assert ("Here:", reference(PIXEL)) == (words.text, pixel.blob)
    assert [v1.Citation(uri="https://example.org/a", title="example.org")] == list(words.citations)
    assert PIXEL == await download(served, pixel.blob.name)
    too_many = await turn(served, session.name, "/image " * (MAX_MEDIA + 1))
    assert "reply_media" == too_many.run.error.metadata["limit"]


async def test_content_of_another_tenants_model_cannot_be_read(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(stream(image()))
    blob = (await turn(served, session, "Draw.")).reply.parts[0].blob
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.blobs.GetBlob(v1.GetBlobRequest(name=blob.name), metadata=(("x-test-tenant", "other"),))
    assert "BLOB_NOT_FOUND" == reason_of(refused.value)

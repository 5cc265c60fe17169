"""Content over a real channel: sent in pieces and cut anywhere, read by range, put into state and shown to a model."""

import asyncio
import base64
import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from notecase import Client, NotecaseError, Retry, v1
from notecase_server import errors
from notecase_server.models.openai import OpenAIProvider
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import CHUNK_BYTES
from notecase_server.tools.functions import tool
from notecase_server.tools.toolbox import make_toolbox

from tests.client.proxy import Proxy
from tests.e2e.driving import fields_of, log_of, metadata_of, reason_of, said
from tests.store.build import ManualClock
from tests.support.openai_server import Answer, OpenAIServer, reply, tool_calls
from tests.support.openai_server import error as refusal
from tests.support.ports import free_port
from tests.support.server import Running, Spawned, running

PDF = v1.Blob(media_type="application/pdf", filename="plan.pdf")
MIB = 1 << 20


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def frames(first: v1.UploadBlobRequest, *chunks: bytes) -> AsyncIterator[v1.UploadBlobRequest]:
    """The last one says so."""
    yield first
    for chunk in chunks:
        yield v1.UploadBlobRequest(chunk=chunk, last=chunk is chunks[-1])


async def upload(served: Running, *chunks: bytes, **first: Any) -> v1.Blob:
    blob: v1.Blob = await served.blobs.UploadBlob(frames(v1.UploadBlobRequest(**{"blob": PDF, **first}), *chunks))
    return blob


async def download(served: Running, name: str, **span: int) -> bytes:
    at, read = span.get("offset", 0), b""
    async for piece in served.blobs.DownloadBlob(v1.DownloadBlobRequest(name=name, **span)):
        assert piece.offset == at + len(read)
        read += piece.chunk
    return read


def noise(size: int, seed: int = 0) -> bytes:
    return b"".join(hashlib.sha256(f"{seed}-{n}".encode()).digest() for n in range(-(-size // 32)))[:size]


async def test_what_is_uploaded_is_downloaded_whole_or_by_range(served: Running) -> None:
    data = noise(3 * MIB + 5)
    blob = await upload(served, *(data[at : at + 700_000] for at in range(0, len(data), 700_000)))
    assert blob == v1.Blob(
        name=f"blobs/{digest(data)}", size_bytes=len(data), media_type="application/pdf", filename="plan.pdf"
    )
    assert await download(served, blob.name) == data
    for offset, limit in ((0, 1), (1, 0), (262_143, 2), (len(data) - 1, 10), (len(data), 0), (5, 2 * MIB)):
        expected = data[offset : offset + limit if limit else None]
        assert await download(served, blob.name, offset=offset, limit=limit) == expected
    found = await served.blobs.GetBlob(v1.GetBlobRequest(name=blob.name))
    assert found == v1.Blob(name=blob.name, size_bytes=len(data)), "media type and filename belong to the reference"


async def test_what_is_not_as_it_was_said_to_be_is_refused_and_forgotten(served: Running) -> None:
    wrong = v1.Blob(name=f"blobs/{digest(b'other')}")
    for said_to_be, problem in ((wrong, "SHA-256"), (v1.Blob(size_bytes=2), "3 bytes"), (v1.Blob(size_bytes=4), "4")):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await upload(served, b"abc", blob=said_to_be, upload_id="u1")
        assert reason_of(refused.value) == "BLOB_CORRUPT"
        assert problem in str(refused.value.details())
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await served.blobs.GetUpload(v1.GetUploadRequest(upload_id="u1"))
        assert reason_of(gone.value) == "BLOB_NOT_FOUND"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.blobs.GetBlob(v1.GetBlobRequest(name=f"blobs/{digest(b'abc')}"))
    assert reason_of(refused.value) == "BLOB_NOT_FOUND"


@pytest.mark.parametrize("whole", [v1.Blob(size_bytes=6), v1.Blob(name=f"blobs/{digest(b'abcdef')}"), v1.Blob()])
async def test_the_end_of_a_stream_alone_completes_nothing(served: Running, whole: v1.Blob) -> None:
    """A cut stream ends, too, so a size, a name or the last frame marks the end, and the received bytes are kept until
    then."""

    async def send(chunk: bytes, **first: Any) -> v1.Blob:
        request = v1.UploadBlobRequest(blob=whole, chunk=chunk, upload_id="u1", **first)
        blob: v1.Blob = await served.blobs.UploadBlob(frames(request))
        return blob

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await send(b"abc")
    assert reason_of(refused.value) == "BLOB_CORRUPT"
    assert metadata_of(refused.value) == {"committed_bytes": "3"}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await upload(served, blob=whole, upload_id="")
    assert metadata_of(refused.value) == {}, "nobody goes on with an upload that has no id"
    blob = await send(b"def", offset=3, last=whole == v1.Blob())
    assert await download(served, blob.name) == b"abcdef"


@pytest.mark.parametrize("at", [0, 1, 262_143, 262_144, 262_145, 1_000_000])
async def test_an_upload_cut_at_any_byte_goes_on_from_there(served: Running, at: int) -> None:
    """Nothing that arrived is lost, and the rest makes the same blob."""
    data = noise(1_000_001)

    async def cut() -> AsyncIterator[v1.UploadBlobRequest]:
        yield v1.UploadBlobRequest(blob=PDF, upload_id="u1")
        for start in range(0, at, 100_000):
            yield v1.UploadBlobRequest(chunk=data[start : min(start + 100_000, at)])
        written.set()
        await asyncio.Event().wait()

    written = asyncio.Event()
    call = served.blobs.UploadBlob(cut())
    await written.wait()
    while (await committed(served)) < at // CHUNK_BYTES * CHUNK_BYTES:
        pass
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    # The server stores what had arrived when it learns of the cut; frames still on their way then are lost with it.
    arrived = await committed(served)
    assert arrived <= at
    blob = await upload_from(served, data)
    assert blob.name == f"blobs/{digest(data)}"
    assert await download(served, blob.name) == data


async def test_a_server_that_stops_keeps_what_has_come(tmp_path: Path) -> None:
    """Also what it had not stored yet, and it says so: the same upload goes on at the next one."""
    data = noise(CHUNK_BYTES + 1000)
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    async with running(store) as served:

        async def waiting() -> AsyncIterator[v1.UploadBlobRequest]:
            yield v1.UploadBlobRequest(blob=PDF, upload_id="u1", chunk=data)
            await asyncio.Event().wait()

        call = served.blobs.UploadBlob(waiting())
        while not await committed(served):
            pass
        await served.server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert reason_of(refused.value) == "SERVER_DRAINING"
    async with running(store) as served:
        assert await committed(served) == len(data)


async def committed(served: Running) -> int:
    try:
        return (await served.blobs.GetUpload(v1.GetUploadRequest(upload_id="u1"))).committed_bytes
    except grpc.aio.AioRpcError as error:
        assert reason_of(error) == "BLOB_NOT_FOUND"
        return 0


async def upload_from(served: Running, data: bytes) -> v1.Blob:
    """Goes on as a client does: where the server says."""
    offset = await committed(served)
    while True:
        try:
            return await upload(served, data[offset:MIB], upload_id="u1", offset=offset)
        except grpc.aio.AioRpcError as error:
            assert reason_of(error) == "UPLOAD_OFFSET_MISMATCH"
            offset = int(metadata_of(error)["committed_bytes"])


async def test_what_the_server_has_need_not_be_sent_again(served: Running) -> None:
    blob = await upload(served, b"abc", upload_id="u1")
    assert await upload(served, upload_id="u1") == blob, "a repeat of what is complete"
    assert await upload(served, blob=v1.Blob(name=blob.name, media_type="text/plain")) == v1.Blob(
        name=blob.name, size_bytes=3, media_type="text/plain"
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await upload(served, b"d", upload_id="u2", offset=3)
    assert reason_of(refused.value) == "UPLOAD_OFFSET_MISMATCH"
    assert metadata_of(refused.value) == {"committed_bytes": "0"}


async def test_two_uploads_of_the_same_content_at_once_make_one_blob(served: Running) -> None:
    data = noise(2 * MIB)
    chunks = [data[at : at + 500_000] for at in range(0, len(data), 500_000)]
    blobs = await asyncio.gather(*(upload(served, *chunks) for _ in range(4)))
    assert {blob.name for blob in blobs} == {f"blobs/{digest(data)}"}
    assert await download(served, blobs[0].name) == data


async def test_of_two_who_send_under_one_id_only_one_goes_on(served: Running) -> None:
    """The bytes of two uploads are never mixed: the digest of the result is that of one of them."""
    one, two = noise(2 * MIB, 1), noise(2 * MIB, 2)
    chunks = [[data[at : at + 300_000] for at in range(0, len(data), 300_000)] for data in (one, two)]
    ended = await asyncio.gather(*(upload(served, *each, upload_id="u1") for each in chunks), return_exceptions=True)
    blobs = [end for end in ended if isinstance(end, v1.Blob)]
    refused = [end for end in ended if isinstance(end, grpc.aio.AioRpcError)]
    assert len(blobs) + len(refused) == 2
    for error in refused:
        assert reason_of(error) == "UPLOAD_OFFSET_MISMATCH"
    for blob in blobs:
        assert await download(served, blob.name) in {one, two}


async def test_who_is_refused_under_an_id_adds_nothing_to_what_another_has_sent(served: Running) -> None:
    """Two calls began at byte 0. Of the one that comes second with its first piece no byte is stored, though it has
    more than that piece."""
    one, two = noise(2 * CHUNK_BYTES, 1), noise(2 * CHUNK_BYTES, 2)
    comes_first, comes_late = asyncio.Event(), asyncio.Event()

    async def held(go_on: asyncio.Event, *chunks: bytes) -> AsyncIterator[v1.UploadBlobRequest]:
        yield v1.UploadBlobRequest(blob=PDF, upload_id="u1", chunk=chunks[0])
        await go_on.wait()
        yield v1.UploadBlobRequest(chunk=chunks[1], last=True)

    late = served.blobs.UploadBlob(held(comes_late, b"", two[: CHUNK_BYTES + 1000]))
    while not await is_known(served):
        pass
    first = served.blobs.UploadBlob(held(comes_first, one[:CHUNK_BYTES], one[CHUNK_BYTES:]))
    while await committed(served) < CHUNK_BYTES:
        pass
    comes_late.set()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await late
    assert reason_of(refused.value) == "UPLOAD_OFFSET_MISMATCH"
    assert metadata_of(refused.value)["committed_bytes"] == str(CHUNK_BYTES)
    comes_first.set()
    blob: v1.Blob = await first
    assert await download(served, blob.name) == one


async def is_known(served: Running) -> bool:
    try:
        await served.blobs.GetUpload(v1.GetUploadRequest(upload_id="u1"))
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_all_problems_of_a_bad_request_are_reported(served: Running, session: str) -> None:
    async def violations(call: Any) -> set[str]:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert reason_of(refused.value) == "INVALID_FIELD", refused.value
        return fields_of(refused.value)

    bad = v1.Blob(name="blobs/ABC", media_type="pdf", size_bytes=-1)
    wanted = {"blob.name", "blob.media_type", "blob.size_bytes", "offset"}
    assert await violations(upload(served, b"x", blob=bad, offset=-1)) == wanted
    assert await violations(upload(served, b"x", offset=3)) == {"offset"}
    assert await violations(upload(served, b"x" * (MIB + 1))) == {"chunk"}
    assert await violations(download(served, "plan.pdf", offset=-1, limit=-1)) == {"name", "offset", "limit"}
    blob = await upload(served, b"abc")
    assert await violations(download(served, blob.name, offset=4)) == {"offset"}
    parts = [v1.Part(blob=v1.Blob(name="plan.pdf")), v1.Part(state_key="user"), v1.Part()]
    append = v1.AppendMessagesRequest(parent=session, messages=[v1.Message(parts=parts)])
    at = "messages[0].parts"
    expected = {f"{at}[0].blob.name", f"{at}[0].blob.media_type", f"{at}[1].state_key", f"{at}[2]"}
    assert await violations(served.messages.AppendMessages(append)) == expected


async def test_content_has_limits(tmp_path: Path) -> None:
    """The size of a blob, announced or sent, and of all blobs to which one session refers."""
    async with running(f"sqlite:{tmp_path / 'notecase.db'}", max_blob_bytes=1000, max_session_bytes=1500) as served:
        for chunks, blob in (([b"x" * 600, b"y" * 600], PDF), ([], v1.Blob(size_bytes=1001))):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await upload(served, *chunks, blob=blob)
            assert reason_of(refused.value) == "PAYLOAD_TOO_LARGE"
        info = await served.info.GetServerInfo(v1.GetServerInfoRequest())
        assert (info.max_blob_bytes, info.max_session_bytes) == (1000, 1500)
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"))

        async def say(data: bytes) -> None:
            part = v1.Part(data=v1.InlineData(data=data, media_type="image/png"))
            message = v1.Message(parts=[part])
            await served.messages.AppendMessages(v1.AppendMessagesRequest(parent="sessions/case", messages=[message]))

        await say(b"a" * 1000)
        await say(b"a" * 1000)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await say(b"b" * 501)
        assert reason_of(refused.value) == "PAYLOAD_TOO_LARGE"
        await say(b"b" * 500)
        found = await served.sessions.GetSession(v1.GetSessionRequest(name="sessions/case"))
        assert (found.content_bytes, found.last_sequence) == (1500, 3)


async def test_inline_data_and_long_text_become_blobs_at_the_edge(served: Running, session: str) -> None:
    """In every way in; pages of messages carry references only."""
    image = v1.Part(data=v1.InlineData(data=b"png", media_type="image/png", filename="a.png"))
    long = "é" * 200_000
    message = v1.Message(parts=[v1.Part(text="Look"), image, v1.Part(text=long)])
    await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[message]))
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    parts = listed.messages[0].parts
    assert [part.WhichOneof("kind") for part in parts] == ["text", "blob", "blob"]
    assert parts[1].blob == v1.Blob(
        name=f"blobs/{digest(b'png')}", media_type="image/png", filename="a.png", size_bytes=3
    )
    assert parts[2].blob.media_type == "text/plain; charset=utf-8"
    assert await download(served, parts[2].blob.name) == long.encode()
    (event,) = await log_of(served, session)
    assert event.message_added.parts == parts


async def start_and_see(served: Running, model: OpenAIServer, session: str, *parts: v1.Part) -> Any:
    """The content of the last message that the model was shown."""
    model.script(reply("Seen."))
    start = v1.StartRun(session=session, messages=[v1.Message(parts=parts)])
    done = await served.runs.Invoke(v1.InvokeRequest(start=start))
    assert done.run.state == v1.Run.STATE_SUCCEEDED, done.run.error
    return model.requests[-1]["messages"][-1]["content"]


def url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


async def test_a_model_gets_content_in_the_form_of_its_api(served: Running, session: str, model: OpenAIServer) -> None:
    """A PDF as a file, an image as an image, audio as audio, a text file as text: by blob or inline, all in one."""
    pdf = await upload(served, b"%PDF-1.7")
    wav = await upload(served, b"RIFF", blob=v1.Blob(media_type="audio/wav"))
    csv = await upload(served, "a;ü\n".encode(), blob=v1.Blob(media_type="text/csv", filename="a.csv"))
    shown = await start_and_see(
        served,
        model,
        session,
        v1.Part(text="What is this?"),
        v1.Part(blob=pdf),
        v1.Part(data=v1.InlineData(data=b"png", media_type="image/png")),
        v1.Part(blob=wav),
        v1.Part(blob=csv),
    )
    request = model.requests[-1]
    assert request == {
        "model": "stub-1",
        "messages": [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": shown}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert shown == [
        {"type": "text", "text": "What is this?"},
        {"type": "file", "file": {"filename": "plan.pdf", "file_data": url(b"%PDF-1.7", "application/pdf")}},
        {"type": "image_url", "image_url": {"url": url(b"png", "image/png")}},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}},
        {"type": "text", "text": "a.csv:\na;ü\n"},
    ]


async def test_state_is_said_by_its_key(served: Running, session: str, model: OpenAIServer) -> None:
    """A PDF in state is sent to the model with every message that names its key; so is every other value, as of the
    time when the message is added."""
    pdf = await upload(served, b"%PDF-1.7")
    client = served.client()
    async with client:
        note: dict[str, Any] = {
            "blob": pdf,
            "text": "a note",
            "bytes": b"\x00\x01",
            "map": {"n": [1, 2.5, None, b"x", pdf]},
        }
        for key, value in note.items():
            await client.put_state(session, key, value)
    shown = await start_and_see(served, model, session, *(v1.Part(state_key=key) for key in note))
    assert shown == [
        {"type": "file", "file": {"filename": "plan.pdf", "file_data": url(b"%PDF-1.7", "application/pdf")}},
        {"type": "text", "text": "a note"},
        {
            "type": "file",
            "file": {"filename": "file.bin", "file_data": url(b"\x00\x01", "application/octet-stream")},
        },
        {"type": "text", "text": f'{{"n": [1, 2.5, null, "1 bytes", "{pdf.name}"]}}'},
    ]
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    assert listed.messages[0].parts[0].blob == pdf
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await start_and_see(served, model, session, v1.Part(state_key="missing"))
    assert reason_of(refused.value) == "STATE_KEY_NOT_FOUND"
    model.requests.clear()


async def test_a_start_that_goes_back_says_the_state_as_it_is_then(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """By a rewind, also to the beginning, and by a rollback of a run. What the start sets comes before that."""
    model.script(*[reply("Fine.")] * 2, tool_calls(("look", "{}")), reply("Fine."))

    async def put(text: str) -> int:
        value = v1.Value(string_value=text)
        await served.state.PutState(v1.PutStateRequest(name=f"{session}/state", key="draft", value=value))
        return (await served.sessions.GetSession(v1.GetSessionRequest(name=session))).last_sequence

    async def said_to_the_model(**fields: Any) -> str:
        draft = v1.Message(parts=[v1.Part(state_key="draft")])
        start = v1.StartRun(session=session, messages=[draft], **fields)
        await served.runs.Invoke(v1.InvokeRequest(start=start))
        return str(model.requests[-1]["messages"][-1]["content"])

    old = await put("old")
    await put("new")
    assert await said_to_the_model(rewind_to_sequence=old) == "old"
    await put("new")
    assert await said_to_the_model(rewind_to_sequence=0, state={"draft": v1.Value(string_value="given")}) == "given"
    await put("old")
    look = v1.Tool(name="look", client=v1.ClientTool())
    waits = v1.StartRun(session=session, messages=[said("Look")], client_tools=[look])
    await served.runs.Invoke(v1.InvokeRequest(start=waits))
    await put("new")
    assert await said_to_the_model(on_busy=v1.StartRun.ON_BUSY_ROLLBACK) == "old"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await said_to_the_model(rewind_to_sequence=0)
    assert reason_of(refused.value) == "STATE_KEY_NOT_FOUND"


async def test_the_state_that_a_start_sets_can_be_said_in_it(served: Running, agent: str, model: OpenAIServer) -> None:
    model.script(reply("Seen."))
    start = v1.StartRun(
        new_session=v1.Session(agent=agent),
        state={"draft": v1.Value(string_value="Once upon a time")},
        messages=[v1.Message(parts=[v1.Part(state_key="draft")])],
    )
    await served.runs.Invoke(v1.InvokeRequest(start=start))
    assert model.requests[-1]["messages"][-1] == {"role": "user", "content": "Once upon a time"}


async def test_what_a_model_cannot_take_is_a_typed_failure_and_nothing_is_dropped(
    served: Running, session: str, model: OpenAIServer
) -> None:
    video = await upload(served, b"mp4", blob=v1.Blob(media_type="video/mp4"))
    start = v1.StartRun(session=session, messages=[v1.Message(parts=[v1.Part(text="Look"), v1.Part(blob=video)])])
    done = await served.runs.Invoke(v1.InvokeRequest(start=start))
    assert done.run.state == v1.Run.STATE_FAILED
    assert done.run.error.reason == v1.ERROR_REASON_CONTENT_UNSUPPORTED
    assert "video/mp4" in done.run.error.message
    assert model.requests == []


async def test_a_tools_content_is_a_blob_in_the_log_and_shown_behind_its_answer(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(tool_calls(("draw", "{}")), reply("A fine drawing."))
    tool = v1.Tool(name="draw", client=v1.ClientTool())
    start = v1.StartRun(session=session, messages=[said("Draw")], client_tools=[tool])
    waiting = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
    (call,) = waiting.pending_calls
    parts = [v1.Part(text="drawn"), v1.Part(data=v1.InlineData(data=b"png", media_type="image/png"))]
    command = v1.RunRequest(tool_result=v1.ToolResult(call_id=call.call_id, result=parts))
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    await served.runs.WaitRun(v1.WaitRunRequest(name=waiting.name, after_sequence=waiting.last_sequence))
    shown = model.requests[-1]["messages"][-3:]
    assert shown[0] == {"role": "tool", "tool_call_id": "call_0", "content": "drawn"}
    assert shown[1] == {"role": "assistant", "content": "I have the result."}
    assert shown[2] == {
        "role": "user",
        "content": [
            {"type": "text", "text": "From the result of draw:"},
            {"type": "image_url", "image_url": {"url": url(b"png", "image/png")}},
        ],
    }
    (finished,) = [event.tool_finished for event in await log_of(served, session) if event.HasField("tool_finished")]
    assert finished.result[1].blob.name == f"blobs/{digest(b'png')}"


NO_IMAGES = refusal(400, "messages[0]: unknown variant `image_url`, expected `text`")


async def test_an_image_that_the_model_does_not_take_fails_no_later_run(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """The run that begins with it fails; after that it is named."""
    image = v1.Message(parts=[v1.Part(data=v1.InlineData(data=b"png", media_type="image/png", filename="plan.png"))])
    model.script(NO_IMAGES, NO_IMAGES, reply("Nothing."))
    runs = [
        (await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session, messages=[message])))).run
        for message in (image, said("What is on it?"))
    ]
    assert [v1.Run.STATE_FAILED, v1.Run.STATE_SUCCEEDED] == [run.state for run in runs]
    assert "expected `text`" in runs[0].error.message
    assert 3 == len(model.requests)
    assert "[image/png: plan.png, not shown]\n\nWhat is on it?" == model.requests[-1]["messages"][-1]["content"]


@pytest.mark.parametrize(
    "refused",
    [
        NO_IMAGES,
        refusal(500, "image input is not supported - hint: you may need to provide the mmproj"),
        refusal(404, "No endpoints found that support image input"),
        refusal(400, "'messages.0.content' : value must be a string"),
    ],
    ids=["DeepSeek", "llama.cpp", "OpenRouter", "Groq"],
)
async def test_an_image_of_a_result_that_the_model_does_not_take_is_named(
    served: Running, session: str, model: OpenAIServer, refused: Answer
) -> None:
    model.script(tool_calls(("draw", "{}")), refused, reply("A fine drawing."))
    tool = v1.Tool(name="draw", client=v1.ClientTool())
    start = v1.StartRun(session=session, messages=[said("Draw")], client_tools=[tool])
    waiting = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
    parts = [v1.Part(text="drawn "), v1.Part(data=v1.InlineData(data=b"png", media_type="image/png"))]
    command = v1.RunRequest(tool_result=v1.ToolResult(call_id=waiting.pending_calls[0].call_id, result=parts))
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    await served.runs.WaitRun(v1.WaitRunRequest(name=waiting.name, after_sequence=waiting.last_sequence))
    shown = {"role": "tool", "tool_call_id": "call_0", "content": "drawn [image/png, not shown]"}
    assert shown == model.requests[-1]["messages"][-1]


async def test_a_tools_media_may_be_larger_than_text(served: Running, session: str, model: OpenAIServer) -> None:
    """Also what a caller gives back; it becomes a blob, and the log holds the reference."""
    model.script(tool_calls(("draw", "{}")), reply("A fine photograph."))
    tool = v1.Tool(name="draw", client=v1.ClientTool())
    start = v1.StartRun(session=session, messages=[said("Draw")], client_tools=[tool])
    waiting = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
    image = noise(3 * MIB)
    result = [v1.Part(data=v1.InlineData(data=image, media_type="image/jpeg"))]
    command = v1.RunRequest(tool_result=v1.ToolResult(call_id=waiting.pending_calls[0].call_id, result=result))
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    await served.runs.WaitRun(v1.WaitRunRequest(name=waiting.name, after_sequence=waiting.last_sequence))
    assert model.requests[-1]["messages"][-1]["content"][1] == {
        "type": "image_url",
        "image_url": {"url": url(image, "image/jpeg")},
    }


async def test_what_came_at_once_is_downloaded_in_frames_of_their_size(served: Running, session: str) -> None:
    data = noise(3 * MIB)
    part = v1.Part(data=v1.InlineData(data=data, media_type="image/png"))
    append = v1.AppendMessagesRequest(parent=session, messages=[v1.Message(parts=[part])])
    name = (await served.messages.AppendMessages(append)).messages[0].parts[0].blob.name
    pieces = [piece.chunk async for piece in served.blobs.DownloadBlob(v1.DownloadBlobRequest(name=name))]
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= 2 * MIB


async def test_keys_of_state_make_no_message_larger_than_one_may_be(served: Running, session: str) -> None:
    """A key is a few bytes to name and up to a megabyte to hold."""
    note = v1.Value(string_value="x" * 250_000)
    await served.state.PutState(v1.PutStateRequest(name=f"{session}/state", key="note", value=note))
    part = v1.Part(state_key="note")
    for messages in ([v1.Message(parts=[part] * 4)], [v1.Message(parts=[part] * 3)] * 6):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=messages))
        assert reason_of(refused.value) == "PAYLOAD_TOO_LARGE"
    fine = v1.AppendMessagesRequest(parent=session, messages=[v1.Message(parts=[part] * 3)] * 3)
    assert len((await served.messages.AppendMessages(fine)).messages) == 3


async def test_large_json_is_a_blob_too(served: Running, session: str, model: OpenAIServer) -> None:
    """Said, or what state comes to in JSON, where one byte may be six; the model reads it as it reads all JSON."""
    text = "\x01" * 200_000
    note = v1.Value(map_value=v1.ValueMap(values={"a": v1.Value(string_value=text)}))
    await served.state.PutState(v1.PutStateRequest(name=f"{session}/state", key="note", value=note))
    said_json = json.dumps("y" * 300_000)
    shown = await start_and_see(served, model, session, v1.Part(state_key="note"), v1.Part(json=said_json))
    assert shown == f"{json.dumps({'a': text})}\n\n{said_json}"
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    assert [part.blob.media_type for part in listed.messages[0].parts] == ["application/json"] * 2


async def test_in_every_role_text_is_text_and_what_is_none_is_refused(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """A system's or an assistant's message is words to a model: long ones, too, which are blobs here."""
    long = "é" * 200_000
    roles = (v1.Message.ROLE_SYSTEM, v1.Message.ROLE_ASSISTANT)
    texts = [v1.Message(role=role, parts=[v1.Part(text="a"), v1.Part(text=long)]) for role in roles]
    await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=texts))
    await start_and_see(served, model, session, v1.Part(text="Hi"))
    contents = [shown["content"] for shown in model.requests[-1]["messages"]]
    assert contents == [f"Answer briefly.\n\na{long}", "Begin.", f"a{long}", "Hi"]
    sent = len(model.requests)
    image = v1.Part(data=v1.InlineData(data=b"png", media_type="image/png"))
    shown = v1.Message(role=v1.Message.ROLE_SYSTEM, parts=[image])
    request = v1.AppendMessagesRequest(parent=session, messages=[said("Hi"), shown, said("Well?")])
    await served.messages.AppendMessages(request)
    done = await served.runs.Invoke(v1.InvokeRequest(start=v1.StartRun(session=session)))
    assert done.run.error.reason == v1.ERROR_REASON_CONTENT_UNSUPPORTED
    assert (
        done.run.error.message == "A system message contains media type 'image/png'; the model accepts only text there."
    )
    assert len(model.requests) == sent, "nothing was asked"


async def test_what_nothing_refers_to_is_forgotten_by_the_server_after_a_day(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload that was left as well; what a message refers to stays."""
    monkeypatch.setattr("notecase_server.serve.SWEEP_SECONDS", 0.01)
    clock = ManualClock()
    async with running(store_url, clock=clock) as served:
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"))
        kept, loose = await upload(served, b"kept"), await upload(served, b"loose")
        message = v1.Message(parts=[v1.Part(blob=kept)])
        await served.messages.AppendMessages(v1.AppendMessagesRequest(parent="sessions/case", messages=[message]))
        with pytest.raises(grpc.aio.AioRpcError):
            await upload(served, blob=PDF, upload_id="left")
        clock.now += 24 * 3600 * 1_000_000 + 1
        for gone in (
            lambda: served.blobs.GetBlob(v1.GetBlobRequest(name=loose.name)),
            lambda: served.blobs.GetUpload(v1.GetUploadRequest(upload_id="left")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                while True:
                    await gone()
            assert reason_of(refused.value) == "BLOB_NOT_FOUND"
        assert await download(served, kept.name) == b"kept"


async def test_every_way_into_state_holds_what_it_refers_to(served: Running, session: str, model: OpenAIServer) -> None:
    """However deep; what is not there is refused, and what no state and no log refers to any more can go."""

    def value(blob: v1.Blob) -> v1.Value:
        inner = v1.ValueMap(values={"deep": v1.Value(blob_value=blob)})
        return v1.Value(list_value=v1.ValueList(values=[v1.Value(map_value=inner)]))

    def put(owner: str) -> Callable[[v1.Blob], Awaitable[object]]:
        return lambda blob: served.state.PutState(
            v1.PutStateRequest(name=f"{owner}/state", key="put", value=value(blob))
        )

    def update(owner: str) -> Callable[[v1.Blob], Awaitable[object]]:
        return lambda blob: served.state.UpdateState(
            v1.UpdateStateRequest(name=f"{owner}/state", ops=[v1.StateOp(key="append", append=value(blob))])
        )

    def command(blob: v1.Blob) -> Awaitable[object]:
        ops = [v1.StateOp(key="command", set=value(blob))]
        sent = v1.RunRequest(update_state=v1.StateUpdate(ops=ops))
        return cast("Awaitable[object]", served.runs.SendCommand(v1.SendCommandRequest(session=session, command=sent)))

    def start(blob: v1.Blob) -> Awaitable[object]:
        model.script(reply("Yes."))
        begun = v1.StartRun(session=session, messages=[said("Hi")], state={"start": value(blob)})
        return cast("Awaitable[object]", served.runs.Invoke(v1.InvokeRequest(start=begun)))

    def create(blob: v1.Blob) -> Awaitable[object]:
        request = v1.CreateSessionRequest(session_id="other", state={"create": value(blob)})
        return cast("Awaitable[object]", served.sessions.CreateSession(request))

    owners = (session, "users/ada", "app")
    ways: list[tuple[str, str, Callable[[v1.Blob], Awaitable[object]]]] = [
        *((owner, "put", put(owner)) for owner in owners),
        *((owner, "append", update(owner)) for owner in owners),
        (session, "command", command),
        (session, "start", start),
        ("sessions/other", "create", create),
    ]
    blobs = []
    for number, (owner, key, way) in enumerate(ways):
        missing = v1.Blob(name=f"blobs/{digest(b'missing')}", media_type="application/pdf")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await way(missing)
        assert reason_of(refused.value) == "BLOB_NOT_FOUND"
        blob = await upload(served, f"content {number}".encode())
        blobs.append(blob)
        await way(v1.Blob(name=blob.name, media_type=blob.media_type))
        state = await served.state.GetState(v1.GetStateRequest(name=f"{owner}/state", keys=[key]))
        items = state.entries[key].value.list_value.values
        found = items[0].list_value.values[0] if key == "append" else items[0]
        assert found.map_value.values["deep"].blob_value.size_bytes == len(f"content {number}")
    assert await forgotten(served) == 0
    for owner in ("users/ada", "app"):
        ops = [v1.StateOp(key="put", set=v1.Value(int_value=1)), v1.StateOp(key="append", remove=Empty())]
        await served.state.UpdateState(v1.UpdateStateRequest(name=f"{owner}/state", ops=ops))
    assert await forgotten(served) == 4, "what was overwritten, and what was removed"
    for name in (session, "sessions/other"):
        await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=name))
    assert await forgotten(served) == len(ways) - 4


async def forgotten(served: Running) -> int:
    """How many blobs a day later would find without anybody who needs them."""
    later = now() + 25 * 3600 * 1_000_000
    await served.server._store.sweep_sessions()
    return await served.server._store.sweep_blobs(later, later)


@tool
async def draw() -> v1.Part:
    return v1.Part(data=v1.InlineData(data=b"png", media_type="image/png"))


async def test_a_tools_content_waits_for_a_store_that_is_away(model: OpenAIServer, tmp_path: Path) -> None:
    """What the tool did is done, so that its result is worth waiting for."""
    store = await open_store(f"sqlite:{tmp_path / 'notecase.db'}", now)
    put_blob = store.put_blob
    away = [errors.store_unavailable(), errors.store_unavailable()]

    async def sometimes(tenant: str, subject: str, sha256: str, data: bytes, *, of_run: bool = False) -> None:
        if away:
            raise away.pop()
        await put_blob(tenant, subject, sha256, data, of_run=of_run)

    store.put_blob = sometimes  # type: ignore[method-assign]
    providers = {"openai": OpenAIProvider("test-key", model.url, "stub-1")}
    async with running(store, providers, toolbox=make_toolbox((__name__,), {})) as served:
        tools = [v1.Tool(name="draw", server=v1.ServerTool(function="draw"))]
        agent = v1.Agent(llm=v1.LlmAgent(tools=tools))
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        model.script(tool_calls(("draw", "{}")), reply("A fine drawing."))
        session = v1.Session(name="sessions/case", agent="agents/clerk")
        start = v1.StartRun(new_session=session, messages=[said("Draw")])
        done = await served.runs.Invoke(v1.InvokeRequest(start=start))
        assert done.run.state == v1.Run.STATE_SUCCEEDED
        log = await log_of(served, "sessions/case")
    (finished,) = [event.tool_finished for event in log if event.HasField("tool_finished")]
    assert finished.outcome == v1.ToolCall.OUTCOME_SUCCEEDED
    assert finished.result[0].blob.name == f"blobs/{digest(b'png')}"
    assert away == []


async def test_two_hundred_megabytes_pass_through_a_server_that_stays_small(tmp_path: Path) -> None:
    """Sent by the Python client from a file, its server killed on the way and its connection cut; what is sent twice
    is bounded by what was under way."""
    path = tmp_path / "large.bin"
    size = 200 * MIB
    block = noise(MIB)
    expected = hashlib.sha256()
    with path.open("wb") as file:
        for n in range(200):
            piece = n.to_bytes(4, "big") + block[4:]
            file.write(piece)
            expected.update(piece)
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    port = free_port()
    server = await Spawned.start(store, tmp_path / "log", port=port)
    patient = Retry(tries=1000, max_delay=0.5)  # a restart may take a busy machine longer than the usual tries do
    async with Proxy(server.address) as proxy, Client(proxy.address, retry=patient) as client:
        sending = asyncio.create_task(client.upload(path, "application/octet-stream", upload_id="large"))
        await arrived(client, 60 * MIB)
        await server.kill()
        server = await Spawned.start(store, tmp_path / "log", port=port)
        before = peak(server)
        await arrived(client, 120 * MIB)
        proxy.cut()
        blob = await sending
        assert blob.name == f"blobs/{expected.hexdigest()}"
        read, count = hashlib.sha256(), 0
        async for piece in client.download(blob):
            read.update(piece)
            count += len(piece)
        assert (count, read.hexdigest()) == (size, expected.hexdigest())
        grown = peak(server) - before
        assert grown < 100 * MIB, f"the server grew by {grown >> 20} MiB"
        assert proxy.sent < size + 40 * MIB, f"{proxy.sent >> 20} MiB went over the wire"
    assert await server.stop() == 0


def peak(server: Spawned) -> int:
    """The most memory that the process has held so far, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def arrived(client: Client, size: int) -> None:
    """Waits until so much of the upload is stored."""
    request = v1.GetUploadRequest(upload_id="large")
    while True:
        try:
            if (await client.blobs.GetUpload(request)).committed_bytes >= size:
                return
        except Exception as error:  # noqa: BLE001 - the server is on its way up, or has not heard of it
            assert getattr(error, "reason", "") in {"", "BLOB_NOT_FOUND"}, error


DAMAGE = {
    "a byte flips": "UPDATE chunks SET data = CAST(substr(data, 1, 9) || X'00' || substr(data, 11) AS BLOB)",
    "a piece is shorter": "UPDATE chunks SET data = substr(data, 1, 9) WHERE start = (SELECT max(start) FROM chunks)",
    "a piece is gone": "DELETE FROM chunks WHERE start = (SELECT max(start) FROM chunks)",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_damaged_content_in_the_store_is_reported_when_it_is_read_completely(damage: str, tmp_path: Path) -> None:
    path, data = tmp_path / "store.db", noise(MIB)
    async with running(f"sqlite:{path}") as served:
        blob = await upload(served, data[: MIB // 2], data[MIB // 2 :])
        put = v1.StateOp(key="plan", set=v1.Value(blob_value=blob))
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s", session=v1.Session()))
        await served.state.UpdateState(v1.UpdateStateRequest(name="sessions/s/state", ops=[put]))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(damage).rowcount > 0
        connection.commit()
    async with running(f"sqlite:{path}") as served:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await download(served, blob.name)
        assert reason_of(refused.value) == "BLOB_CORRUPT"
        assert await download(served, blob.name, limit=9) == data[:9]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in served.sessions.ExportSession(v1.ExportSessionRequest(name="sessions/s", with_blobs=True)):
                pass
        assert reason_of(refused.value) == "BLOB_CORRUPT"


class Damaged(v1.BlobServiceServicer):
    """Sends other bytes than were requested, in frames of one byte."""

    async def DownloadBlob(  # noqa: N802  (named by the service)
        self, request: v1.DownloadBlobRequest, context: Any
    ) -> AsyncIterator[v1.DownloadBlobResponse]:
        for at, byte in enumerate(b"plam"):
            yield v1.DownloadBlobResponse(chunk=bytes([byte]), offset=at)


async def test_a_client_compares_what_comes_with_its_name() -> None:
    server = grpc.aio.server()
    v1.add_BlobServiceServicer_to_server(Damaged(), server)  # type: ignore[abstract]  # it has the one that is called
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Client(f"127.0.0.1:{port}") as client:
            read = b""
            with pytest.raises(NotecaseError) as damaged:
                async for piece in client.download(f"blobs/{digest(b'plan')}"):
                    read += piece
            assert (damaged.value.reason, damaged.value.code) == ("BLOB_CORRUPT", grpc.StatusCode.DATA_LOSS)
            assert read == b"plam"
            right = [piece async for piece in client.download(f"blobs/{digest(b'plam')}")]
            assert b"".join(right) == b"plam"
    finally:
        await server.stop(None)

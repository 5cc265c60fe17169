"""Taking a session elsewhere and back, across stores: the same bytes, and what is not whole leaves nothing."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from notecase import Client, NotecaseError, v1
from notecase_server.serve_stores import open_store

from tests.e2e.driving import fields_of, log_of, reason_of
from tests.e2e.test_past import agree, fork, numbers, put, rewind, texts, turn
from tests.e2e.test_tools import client_tool, result, start_with
from tests.store.build import ManualClock
from tests.support.openai_server import OpenAIServer, reply, tool_calls
from tests.support.server import Running, Spawned, running

LARGE = 120
"""Messages of 900 kB."""


async def export(served: Running, session: str) -> bytes:
    call = served.sessions.ExportSession(v1.ExportSessionRequest(name=session))
    pieces = [response.chunk async for response in call]
    assert max(map(len, pieces)) <= 1 << 20
    return b"".join(pieces)


def frames(file: bytes, size: int = 100_000, **header: str) -> list[v1.ImportSessionRequest]:
    chunks = [file[start : start + size] for start in range(0, len(file), size)]
    first = v1.ImportSessionRequest(header=v1.ImportHeader(**header))
    return [first, *(v1.ImportSessionRequest(chunk=chunk) for chunk in chunks)]


async def load(served: Running, file: bytes, size: int = 100_000, **header: str) -> v1.Session:
    return await served.sessions.ImportSession(iter(frames(file, size, **header)))


async def refusal(served: Running, sent: list[v1.ImportSessionRequest]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.sessions.ImportSession(iter(sent))
    return refused.value


@pytest.fixture
async def case(served: Running, session: str, model: OpenAIServer) -> str:
    """A session with notes, a call, a run cancelled before its start, a note to the app, and a rewind."""
    model.script(tool_calls(("weigh", "{}")), reply("Light."), reply("Once."), reply("Twice."))
    await put(served, session, "n", 1)
    await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, client_tool("weigh"), run_id="r1")))
    waiting = await served.runs.GetRun(v1.GetRunRequest(name=f"{session}/runs/r1"))
    answer = v1.SendCommandRequest(session=session, command=result(waiting.pending_calls[0].call_id, "12 g"))
    await served.runs.SendCommand(answer)
    await served.runs.WaitRun(v1.WaitRunRequest(name=f"{session}/runs/r1", after_sequence=1000))
    never = v1.CancelRunRequest(name=f"{session}/runs/never", allow_missing=True)
    await served.runs.CancelRun(never)
    update = v1.StateUpdate(name="app/state", ops=[v1.StateOp(key="motto", set=v1.Value(string_value="Look."))])
    command = v1.RunRequest(command_id="u", update_state=update)
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command))
    before = (await turn(served, session, "More", state={"n": v1.Value(int_value=2)})).run.first_sequence - 1
    await rewind(served, session, before)
    await turn(served, session, "Again")
    return session


@pytest.fixture(params=["memory", "sqlite"])
async def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Running]:
    """Another server."""
    url = "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'elsewhere.db'}"
    async with running(url) as server:
        yield server


async def test_export_import_export_gives_the_same_bytes(served: Running, case: str, elsewhere: Running) -> None:
    """There under another name, and back under a third; messages, runs, state and usage are the same."""
    file = await export(served, case)
    there = await load(elsewhere, file, session_id="moved")
    assert await export(elsewhere, there.name) == file
    back = await load(served, await export(elsewhere, there.name), size=7, session_id="back")
    assert await export(served, back.name) == file
    original = await served.sessions.GetSession(v1.GetSessionRequest(name=case))
    for field in ("agent", "user", "labels", "usage", "last_sequence", "activity", "display_name"):
        assert getattr(there, field) == getattr(back, field) == getattr(original, field)
    first, second, third = [
        await agree(*place) for place in ((served, case), (elsewhere, there.name), (served, back.name))
    ]
    assert _relative(first) == _relative(second) == _relative(third)
    assert await numbers(elsewhere, there.name) == {"n": 1}
    app = await elsewhere.state.GetState(v1.GetStateRequest(name="app/state"))
    assert app == v1.GetStateResponse(name="app/state"), "the log tells of it, and it stays where it was"


def _relative(told: object) -> str:
    return re.sub(r"sessions/[a-z]+", "", str(told))


async def test_what_was_imported_goes_on(served: Running, case: str, model: OpenAIServer) -> None:
    """With its history, its numbers, its forks and its past; a run_id of then is taken."""
    file = await export(served, case)
    made = await load(served, file)
    model.script(reply("Later."))
    assert (await turn(served, made.name, "And?")).reply.parts[0].text == "Later."
    assert [entry["role"] for entry in model.requests[-1]["messages"]][-3:] == ["user", "assistant", "user"]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await turn(served, made.name, "Again", run_id="r1")
    assert reason_of(refused.value) == "REQUEST_ID_REUSED"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await turn(served, made.name, "Again", run_id="never")
    assert reason_of(refused.value) == "RUN_CANCELLED_BEFORE_START"
    await rewind(served, made.name, 1)
    assert await texts(served, made.name) == []
    assert await texts(served, (await fork(served, made.name, made.last_sequence)).name) == await texts(served, case)
    log = await log_of(served, made.name)
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))


async def test_a_session_with_a_run_is_not_exported(served: Running, session: str, model: OpenAIServer) -> None:
    model.script(reply("Never.").held(asyncio.Event()))
    await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session)))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await export(served, session)
    assert reason_of(refused.value) == "RUN_ACTIVE"


async def test_what_is_not_whole_leaves_nothing(served: Running, case: str) -> None:
    """Nor does what comes under a name that is taken, too large a piece, or a header in the wrong place."""
    file = await export(served, case)
    sessions = (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions
    for broken in (file[:-1], file[: len(file) // 2], b"", file + b"\0", b"PK" + file[2:], _flipped(file)):
        refused = await refusal(served, frames(broken, session_id="new"))
        assert (reason_of(refused), refused.code()) == ("IMPORT_INVALID", grpc.StatusCode.INVALID_ARGUMENT)
        assert "nothing was imported" in str(refused.details())
    assert reason_of(await refusal(served, frames(file, session_id="case"))) == "ALREADY_EXISTS"
    assert fields_of(await refusal(served, frames(file, session_id="No!"))) == {"header.session_id"}
    twice = [*frames(file), *frames(file)[:1]]
    assert fields_of(await refusal(served, twice)) == {"header"}
    large = [v1.ImportSessionRequest(chunk=bytes((1 << 20) + 1))]
    assert fields_of(await refusal(served, large)) == {"chunk"}
    assert (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions == sessions


def _flipped(file: bytes) -> bytes:
    middle = len(file) // 2
    return file[:middle] + bytes([file[middle] ^ 1]) + file[middle + 1 :]


async def test_a_repeated_import_returns_the_first_answer(served: Running, case: str) -> None:
    file = await export(served, case)
    made = await load(served, file, session_id="moved", request_id="once")
    assert await load(served, file, session_id="moved", request_id="once") == made
    another = file[:-1] + bytes([file[-1] ^ 1])
    refused = await refusal(served, frames(another, session_id="moved", request_id="once"))
    assert reason_of(refused) == "REQUEST_ID_REUSED"
    assert (await served.sessions.ImportSession(iter(frames(file)[1:]))).last_sequence == made.last_sequence


async def test_the_client_takes_a_session_along(served: Running, case: str) -> None:
    async with served.client() as client:
        pieces = [piece async for piece in client.export_session(case)]
        made = await client.import_session(pieces, session_id="moved")
        assert b"".join(pieces) == await export(served, made.name)
        with pytest.raises(NotecaseError, match="cut off"):
            await client.import_session(pieces[:-1])


async def test_memory_does_not_grow_with_the_session(tmp_path: Path) -> None:
    """It is written and read in pieces, waits on disk, and is not held while its log is replayed."""
    server = await Spawned.start(f"sqlite:{tmp_path / 'large.db'}", tmp_path / "log")
    try:
        async with Client(server.address) as client:
            session = (await client.create_session()).name
            for _ in range(LARGE):
                said = v1.Message(parts=[v1.Part(text="x" * 900_000)])
                await client.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[said]))
            before = _peak(server)
            with (tmp_path / "file").open("wb") as file:
                async for piece in client.export_session(session):
                    file.write(piece)
            with (tmp_path / "file").open("rb") as file:
                made = await client.import_session(iter(lambda: file.read(1 << 18), b""))
            assert made.last_sequence == LARGE
            assert _peak(server) - before < LARGE * 900_000 / 2
    finally:
        await server.stop()


def _peak(server: Spawned) -> int:
    """The most that a server was resident at any time, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def test_content_goes_along_or_must_be_there(served: Running, session: str, tmp_path: Path) -> None:
    """Each blob is in it once, however it was uploaded; if the file has no content, a server without the blob refuses
    the import."""
    large = bytes(range(256)) * 3000
    parts = [v1.Part(data=v1.InlineData(data=data, media_type="application/pdf")) for data in (large, b"a", large)]
    for part in parts:
        message = v1.Message(parts=[v1.Part(text="Look"), part])
        await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[message]))
    async with served.client() as client:
        whole = b"".join([piece async for piece in client.export_session(session)])
        bare = b"".join([piece async for piece in client.export_session(session, with_blobs=False)])
    assert len(bare) < 10_000
    assert len(large) < len(whole) < len(large) + 20_000
    async with running(f"sqlite:{tmp_path / 'other.db'}") as other, other.client() as client:
        with pytest.raises(NotecaseError) as missing:
            await client.import_session([bare], session_id="copy")
        assert missing.value.reason == "BLOB_NOT_FOUND"
        made = await client.import_session([whole], session_id="copy")
        assert made.content_bytes == len(large) + 1
        assert whole == b"".join([piece async for piece in client.export_session(made.name)])
        again = await client.import_session([bare], session_id="again")
        assert again.content_bytes == made.content_bytes
        listed = await client.messages.ListMessages(v1.ListMessagesRequest(parent="sessions/copy"))
        read = b"".join([piece async for piece in client.download(listed.messages[0].parts[1].blob)])
        assert read == large


async def test_content_that_is_not_what_its_name_says_is_refused(served: Running, session: str) -> None:
    """A file that was changed, with a correct checksum."""
    part = v1.Part(data=v1.InlineData(data=b"honest", media_type="application/pdf"))
    message = v1.Message(parts=[part])
    await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[message]))
    async with served.client() as client:
        whole = b"".join([piece async for piece in client.export_session(session)])
        forged = whole[:-32].replace(b"honest", b"forged")
        forged += hashlib.sha256(forged).digest()
    async with running() as other, other.client() as client:
        with pytest.raises(NotecaseError) as refused:
            await client.import_session([forged], session_id="copy")
        assert refused.value.reason == "IMPORT_INVALID"
        assert (await client.sessions.ListSessions(v1.ListSessionsRequest())).sessions == []


async def test_imported_content_is_held_and_bounded(tmp_path: Path, served: Running, session: str) -> None:
    """As a session's own: it stays for as long as the session, and no session refers to more than it may."""
    part = v1.Part(data=v1.InlineData(data=b"x" * 1000, media_type="application/pdf"))
    append = v1.AppendMessagesRequest(parent=session, messages=[v1.Message(parts=[part])])
    await served.messages.AppendMessages(append)
    async with served.client() as client:
        file = b"".join([piece async for piece in client.export_session(session)])
    clock = ManualClock()
    store = await open_store(f"sqlite:{tmp_path / 'other.db'}", clock)
    async with running(store, clock=clock) as other, other.client() as client:
        made = await client.import_session([file], session_id="copy")
        listed = await client.messages.ListMessages(v1.ListMessagesRequest(parent=made.name))
        blob = listed.messages[0].parts[0].blob
        clock.now += 25 * 3600 * 1_000_000
        assert await store.sweep_blobs(clock.now, clock.now) == 0
        assert b"".join([piece async for piece in client.download(blob)]) == b"x" * 1000
        await client.sessions.DeleteSession(v1.DeleteSessionRequest(name=made.name))
        await store.sweep_sessions()
        assert await store.sweep_blobs(clock.now, clock.now) == 1
    async with running(max_session_bytes=999) as small, small.client() as client:
        with pytest.raises(NotecaseError) as refused:
            await client.import_session([file], session_id="copy")
        assert refused.value.reason == "PAYLOAD_TOO_LARGE"
        assert (await client.sessions.ListSessions(v1.ListSessionsRequest())).sessions == []

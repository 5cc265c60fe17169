"""Each bound that an operator sets, reached by a low setting; and those that are fixed, each reached by a request."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from notecase import v1
from notecase_server.auth.principal import Principal, Role
from notecase_server.engine.opening import incoming
from notecase_server.rpc import messages
from notecase_server.rpc.caller import Caller, caller
from notecase_server.rpc.run import MAX_RESULTS, Results

from tests.e2e.driving import detail_of, fields_of, reason_of, said
from tests.support.http2 import Deaf
from tests.support.polling import until
from tests.support.server import Running, Spawned, running

Call = Callable[[Running, int], Awaitable[object]]

LIST_MESSAGES = "/notecase.v1.MessageService/ListMessages"

VALUE = v1.Value(string_value="x")


async def create(served: Running, n: int) -> object:
    return await served.sessions.CreateSession(v1.CreateSessionRequest(session_id=f"s{n}"))


async def create_one(served: Running, n: int) -> None:
    """The session that is the same for all."""
    if n == 0:
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s"))


async def fork(served: Running, n: int) -> object:
    await create_one(served, n)
    return await served.sessions.ForkSession(v1.ForkSessionRequest(name="sessions/s", session_id=f"f{n}"))


async def load(served: Running, n: int) -> object:
    await create_one(served, n)
    file = [piece async for piece in served.sessions.ExportSession(v1.ExportSessionRequest(name="sessions/s"))]
    frames = [v1.ImportSessionRequest(chunk=piece.chunk) for piece in file]
    return await served.sessions.ImportSession(iter(frames))


async def agent(served: Running, n: int) -> object:
    return await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id=f"a{n}", agent=v1.Agent(llm=v1.LlmAgent())))


async def revision(served: Running, n: int) -> object:
    changed = v1.Agent(name="agents/a", display_name=str(n), llm=v1.LlmAgent())
    return await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=changed, allow_missing=True))


def key_of(state: str) -> Call:
    async def put(served: Running, n: int) -> object:
        await create_one(served, n)
        return await served.state.PutState(v1.PutStateRequest(name=state, key=f"k{n}", value=VALUE))

    return put


async def entry(served: Running, n: int) -> object:
    await create_one(served, n)
    return await served.messages.AppendMessages(v1.AppendMessagesRequest(parent="sessions/s", messages=[said("Hi")]))


async def start(served: Running, n: int) -> object:
    if n == 0:
        await agent(served, 0)
    await create_one(served, n)
    begun = v1.StartRun(session="sessions/s", agent="agents/a0", messages=[said("Hi")])
    return await served.runs.Invoke(v1.InvokeRequest(start=begun))


async def content(served: Running, n: int) -> object:
    frame = v1.UploadBlobRequest(blob=v1.Blob(media_type="text/plain"), chunk=f"{n:04}".encode(), last=True)
    return await served.blobs.UploadBlob(iter([frame]))


async def unfinished(served: Running, n: int) -> object:
    """What has come of it stays."""
    blob = v1.Blob(media_type="text/plain", size_bytes=8)
    frame = v1.UploadBlobRequest(upload_id=f"u{n}", blob=blob, chunk=b"half")
    with pytest.raises(grpc.aio.AioRpcError) as cut:
        await served.blobs.UploadBlob(iter([frame]))
    if reason_of(cut.value) == "QUOTA_EXCEEDED":
        raise cut.value
    return cut.value


async def remembered(served: Running, n: int) -> object:
    await create_one(served, n)
    put = v1.PutStateRequest(name="sessions/s/state", key="k", value=VALUE, request_id=f"r{n}")
    return await served.state.PutState(put)


QUOTAS: dict[str, tuple[str, int, Call, int]] = {
    "sessions": ("max_sessions", 3, create, 3),
    "forks": ("max_sessions", 3, fork, 2),
    "imports": ("max_sessions", 3, load, 2),
    "agents": ("max_agents", 2, agent, 2),
    "revisions": ("max_revisions", 2, revision, 2),
    "keys of a session": ("max_state_keys", 2, key_of("sessions/s/state"), 2),
    "keys of a user": ("max_state_keys", 2, key_of("users/ada/state"), 2),
    "keys of the app": ("max_state_keys", 2, key_of("app/state"), 2),
    "entries": ("max_session_events", 2, entry, 2),
    "entries of runs": ("max_session_events", 7, start, 2),
    "bytes of a log": ("max_session_log_bytes", 100, entry, 2),
    "content": ("max_tenant_blob_bytes", 8, content, 2),
    "content under way": ("max_tenant_blob_bytes", 12, unfinished, 2),
    "uploads": ("max_uploads", 2, unfinished, 2),
    "requests": ("max_requests", 2, remembered, 2),
}
"""The setting, its value, what is done again and again, and how often that is let through."""


@pytest.mark.parametrize("case", QUOTAS)
async def test_an_operator_bounds_what_is_kept(case: str, store_url: str) -> None:
    setting, value, call, fine = QUOTAS[case]
    async with running(store_url, **{setting: value}) as served:  # type: ignore[arg-type]
        for n in range(fine):
            await call(served, n)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(served, fine)
        assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") == (
            refused.value.code(),
            reason_of(refused.value),
        )
        (violation,) = detail_of(refused.value, error_details_pb2.QuotaFailure).violations
        assert str(value) in violation.description
        noun = (refused.value.details() or "").partition(f" allows {value} ")[2].partition(" ")[0]
        assert noun in {"sessions", "agents", "revisions", "keys", "events", "bytes", "uploads", "requests"}
        assert detail_of(refused.value, error_details_pb2.RetryInfo).retry_delay.seconds > 1


async def test_a_run_keeps_what_it_made_though_the_tenant_may_upload_no_more(store_url: str) -> None:
    """Its reply is paid for."""
    async with running(store_url, max_tenant_blob_bytes=8) as served:
        for n in range(2):
            await content(served, n)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await content(served, 2)
        assert reason_of(refused.value) == "QUOTA_EXCEEDED"
        painter = v1.Agent(llm=v1.LlmAgent(model="offline/echo"))
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="painter", agent=painter))
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="drawn"))
        asked = v1.StartRun(session="sessions/drawn", agent="agents/painter", messages=[said("/image")])
        run = (await served.runs.Invoke(v1.InvokeRequest(start=asked))).run
        assert run.state == v1.Run.STATE_SUCCEEDED, run.error
        assert any(part.HasField("blob") for part in run.reply.parts)


async def test_what_callers_send_as_results_counts_for_the_tenant(store_url: str) -> None:
    """Unlike what a run makes: a caller may send an error instead."""
    async with running(store_url, max_tenant_blob_bytes=1000) as served:
        tool = v1.Tool(name="look", client=v1.ClientTool())
        agent = v1.Agent(llm=v1.LlmAgent(model="offline/echo", tools=[tool]))
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))

        async def answer(session: str, size: int) -> None:
            new = v1.Session(name=f"sessions/{session}", agent="agents/clerk")
            start = v1.StartRun(new_session=new, messages=[said("/call look {}")])
            run = (await served.runs.Invoke(v1.InvokeRequest(start=start))).run
            part = v1.Part(data=v1.InlineData(data=b"x" * size, media_type="text/plain"))
            result = v1.ToolResult(call_id=run.pending_calls[0].call_id, result=[part])
            command = v1.RunRequest(tool_result=result)
            await served.runs.SendCommand(v1.SendCommandRequest(session=new.name, run=run.name, command=command))

        await answer("first", 1000)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answer("second", 999)
        assert reason_of(refused.value) == "QUOTA_EXCEEDED"


@pytest.mark.parametrize("size", [1200, 0], ids=["declared", "not declared"])
async def test_a_refused_upload_leaves_no_bytes_that_count(size: int, store_url: str) -> None:
    """Before, its bytes were kept for a day, and no caller of the tenant could upload anything."""
    piece = 1 << 18

    async def send(served: Running, upload_id: str, pieces: int, offset: int = 0, size: int = 0) -> v1.Blob:
        frames = [v1.UploadBlobRequest(chunk=b"x" * piece, last=n == pieces - 1) for n in range(pieces)]
        frames[0].upload_id, frames[0].offset = upload_id, offset
        frames[0].blob.CopyFrom(v1.Blob(media_type="text/plain", size_bytes=size))
        blob: v1.Blob = await served.blobs.UploadBlob(iter(frames))
        return blob

    async with running(store_url, max_tenant_blob_bytes=3 * piece) as served:
        await send(served, "small", 1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await send(served, "large", 4, size=size and 4 * piece)
        assert "QUOTA_EXCEEDED" == reason_of(refused.value)
        of_it = f"{piece} are stored and 0 belong to unfinished uploads, and this needs {4 * piece} more."
        of_them = f"{piece} are stored and {2 * piece} belong to unfinished uploads."
        assert str(refused.value.details()).endswith(of_it if size else of_them)
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await served.blobs.GetUpload(v1.GetUploadRequest(upload_id="large"))
        assert "BLOB_NOT_FOUND" == reason_of(gone.value)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            half = v1.UploadBlobRequest(upload_id="half", blob=v1.Blob(media_type="text/plain"), chunk=b"x" * piece)
            await served.blobs.UploadBlob(iter([half]))
        assert "BLOB_CORRUPT" == reason_of(cut.value)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await send(served, "half", 1, offset=piece, size=4 * piece)
        assert "QUOTA_EXCEEDED" == reason_of(refused.value)
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await served.blobs.GetUpload(v1.GetUploadRequest(upload_id="half"))
        assert "BLOB_NOT_FOUND" == reason_of(gone.value)


async def test_a_quota_refuses_neither_a_repeat_nor_the_end_of_a_run(store_url: str) -> None:
    """Who asks again gets the first answer, what takes back is let through, and what is deleted makes room."""
    async with running(store_url, max_sessions=1, max_session_events=4, max_state_keys=1) as served:
        again = v1.CreateSessionRequest(session_id="s", request_id="once")
        made = await served.sessions.CreateSession(again)
        assert made == await served.sessions.CreateSession(again)
        await agent(served, 0)
        begun = v1.StartRun(session="sessions/s", agent="agents/a0", messages=[said("Hi")], run_id="r")
        run = (await served.runs.Invoke(v1.InvokeRequest(start=begun))).run
        assert v1.Run.STATE_SUCCEEDED == run.state, "it came to its end"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await entry(served, 1)
        assert "QUOTA_EXCEEDED" == reason_of(refused.value)
        await served.sessions.RewindSession(v1.RewindSessionRequest(name="sessions/s", to_sequence=0))
        await served.sessions.DeleteSession(v1.DeleteSessionRequest(name="sessions/s"))
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s2"))
        put = v1.PutStateRequest(name="sessions/s2/state", key="k", value=VALUE)
        await served.state.PutState(put)
        await served.state.PutState(put)


async def test_connections_are_bounded() -> None:
    async with running(max_connections=2) as served:
        port = int(served.address.rpartition(":")[2])
        await served.info.GetServerInfo(v1.GetServerInfoRequest())
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        ends = [asyncio.create_task(reader.read()) for reader, _ in opened]
        ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        assert ended
        await served.info.GetServerInfo(v1.GetServerInfoRequest())
        for end in ends:
            end.cancel()
        for _, writer in opened:
            writer.close()


async def test_a_compressed_request_is_refused_before_it_is_unpacked() -> None:
    gzip = (("grpc.default_compression_algorithm", grpc.Compression.Gzip.value),)
    async with running() as served, grpc.aio.insecure_channel(served.address, options=gzip) as channel:
        call: Any = channel.unary_unary("/notecase.v1.ServerService/GetServerInfo")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(bytes(1 << 20))
        assert (grpc.StatusCode.UNIMPLEMENTED, True) == (refused.value.code(), "gzip" in str(refused.value.details()))
        await served.info.GetServerInfo(v1.GetServerInfoRequest())


async def held(frames: list[v1.ImportSessionRequest], release: asyncio.Event) -> Any:
    for frame in frames:
        yield frame
    await release.wait()


async def exported(served: Running) -> bytes:
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s"))
    await served.messages.AppendMessages(v1.AppendMessagesRequest(parent="sessions/s", messages=[said("x" * 5000)]))
    return b"".join(
        [piece.chunk async for piece in served.sessions.ExportSession(v1.ExportSessionRequest(name="sessions/s"))]
    )


async def test_imports_at_once_are_bounded(store_url: str) -> None:
    release = asyncio.Event()
    async with running(store_url, max_imports=1) as served:
        file = await exported(served)
        begun = v1.ImportSessionRequest(chunk=file)
        first = served.sessions.ImportSession(held([begun], release))
        arrivals = served.server.arrivals
        await until(lambda: arrivals.size > 0)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.sessions.ImportSession(iter([begun]))
        assert "RATE_LIMITED" == reason_of(refused.value)
        release.set()
        await first
        await served.sessions.ImportSession(iter([begun]))
        assert 0 == arrivals.size


async def test_files_to_import_are_bounded_together(store_url: str) -> None:
    async with running(store_url, max_import_bytes=1000) as served:
        file = await exported(served)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.sessions.ImportSession(iter([v1.ImportSessionRequest(chunk=file)]))
        assert "RATE_LIMITED" == reason_of(refused.value)
        assert 0 == served.server.arrivals.size


PARTS = v1.ExportRecord(event=v1.Event(sequence=1, message_added=v1.Message(parts=[v1.Part()] * 20_001)))

NONSENSE = {
    "no magic": b"garbage!" + bytes(100),
    "no header": b"notecase\x02" + b"\x02\x22\x00",
    "a length without end": b"notecase\x02" + b"\xff\xff\xff\xff\xff",
    "a length beyond a record's": b"notecase\x02" + b"\xff\xff\xff\x7f",
    "a record that does not decode": b"notecase\x02" + b"\x03\x0a\x7f\x00",
    "a record that says nothing": b"notecase\x02" + b"\x02\x0a\x00" + b"\x02\x30\x01",
    "an entry out of place": b"notecase\x02" + b"\x02\x0a\x00" + b"\x04\x12\x02\x08\x05",
    "content that nobody told": b"notecase\x02" + b"\x02\x0a\x00" + b"\x03\x22\x01x",
    "a record of very many parts": b"notecase\x02" + b"\x02\x0a\x00" + b"\xcc\xb8\x02" + PARTS.SerializeToString(),
    "more behind the end": b"notecase\x02" + b"\x02\x0a\x00" + b"\x00" + bytes(33),
}


@pytest.mark.parametrize("begun", NONSENSE.values(), ids=NONSENSE)
async def test_nonsense_is_refused_as_it_comes(begun: bytes) -> None:
    """With the stream still open, and with two gigabytes to come."""
    async with running() as served:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.sessions.ImportSession(held([v1.ImportSessionRequest(chunk=begun)], asyncio.Event()))
        assert "IMPORT_INVALID" == reason_of(refused.value)


async def test_a_read_of_the_past_waits_for_its_turn_and_delays_no_other_call(store_url: str) -> None:
    async with running(store_url, max_heavy_reads=1) as served:
        for n in range(2):
            await entry(served, n)
        heavy = served.server.heavy
        heavy.take()
        past = v1.GetStateRequest(name="sessions/s/state", at_sequence=1)
        waiting: list[Any] = [
            served.sessions.ForkSession(v1.ForkSessionRequest(name="sessions/s", session_id="f")),
            served.state.GetState(past),
            served.sessions.RewindSession(v1.RewindSessionRequest(name="sessions/s", to_sequence=1)),
        ]
        await until(lambda: heavy.waiting == len(waiting))
        await served.sessions.GetSession(v1.GetSessionRequest(name="sessions/s"))
        await served.state.GetState(v1.GetStateRequest(name="sessions/s/state"))
        assert not any(call.done() for call in waiting)
        heavy.give_back()
        await asyncio.gather(*waiting)
        heavy.take()


async def test_a_large_write_and_a_large_page_wait_for_their_turn_and_small_ones_do_not(store_url: str) -> None:
    async with running(store_url, max_heavy_reads=1) as served:
        await create_one(served, 0)
        large = v1.Value(string_value="x" * (65 << 10))
        heavy = served.server.heavy
        heavy.take()
        waiting: list[Any] = [
            served.sessions.CreateSession(v1.CreateSessionRequest(session_id="f", state={"k": large})),
            served.state.PutState(v1.PutStateRequest(name="sessions/s/state", key="k", value=large)),
            served.messages.AppendMessages(
                v1.AppendMessagesRequest(parent="sessions/s", messages=[said(large.string_value)])
            ),
            served.messages.ListMessages(v1.ListMessagesRequest(parent="sessions/s", page_size=101)),
        ]
        await until(lambda: heavy.waiting == len(waiting))
        await served.state.PutState(v1.PutStateRequest(name="sessions/s/state", key="k", value=VALUE))
        await served.messages.ListMessages(v1.ListMessagesRequest(parent="sessions/s", page_size=100))
        assert not any(call.done() for call in waiting)
        heavy.give_back()
        await asyncio.gather(*waiting)
        heavy.take()


async def test_messages_that_wait_for_their_turn_are_not_copied_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy would have the size of the request, and many may wait."""
    copied: list[str] = []

    def count(new_id: Callable[[], str], said: Sequence[v1.Message], user: str) -> list[v1.Message]:
        copied.append(user)
        return incoming(new_id, said, user)

    monkeypatch.setattr(messages, "incoming", count)
    async with running(max_heavy_reads=1) as served:
        await create_one(served, 0)
        heavy = served.server.heavy
        heavy.take()
        append = v1.AppendMessagesRequest(parent="sessions/s", messages=[said("x" * (65 << 10))])
        waiting = asyncio.ensure_future(served.messages.AppendMessages(append))
        await until(lambda: heavy.waiting == 1)
        assert not copied
        heavy.give_back()
        await waiting
        assert 1 == len(copied)


async def test_results_that_wait_for_their_reader_are_bounded(store_url: str) -> None:
    """The next command is then left unread, so that the transport holds its sender back."""
    async with running(store_url) as served:
        await create_one(served, 0)
        streams = served.server.streams
        caller.set(Caller(Principal("default", "", Role.ADMIN), "", ""))
        attachment, _ = await streams.attach("default", "sessions/s", None, v1.WatchOptions(keep_open=True), "")
        read = 0

        async def commands() -> AsyncIterator[v1.RunRequest]:
            nonlocal read
            while True:
                read += 1
                yield v1.RunRequest(update_state=v1.StateUpdate(ops=[v1.StateOp(key="n", increment=1)]))

        results = Results()
        reader = asyncio.create_task(streams.read(attachment, commands(), results))
        key = v1.GetStateRequest(name="sessions/s/state")
        for taken in range(3):
            more = MAX_RESULTS + 1 + taken
            carried_out = 0
            while carried_out < more:
                carried_out = (await served.state.GetState(key)).entries["n"].value.int_value
            assert (more, more) == (carried_out, read)
            results.take()
        reader.cancel()


def starting(**fields: Any) -> v1.InvokeRequest:
    return v1.InvokeRequest(start=v1.StartRun(session="sessions/s", agent="agents/a0", **fields))


def client_tool(name: str, description: str) -> v1.Tool:
    return v1.Tool(name=name, description=description, client=v1.ClientTool())


LONG = "x" * (100 << 10)
WIDE = {f"k{n}": v1.Value(string_value=LONG) for n in range(8)}

FIXED: dict[str, tuple[str, Any, str, str]] = {
    "labels": (
        "SessionService/CreateSession",
        v1.CreateSessionRequest(session=v1.Session(labels={f"k{n}": "v" for n in range(65)})),
        "INVALID_FIELD",
        "session.labels",
    ),
    "the value of a label": (
        "SessionService/CreateSession",
        v1.CreateSessionRequest(session=v1.Session(labels={"k": "v" * 257})),
        "INVALID_FIELD",
        "session.labels['k']",
    ),
    "a display name": (
        "SessionService/CreateSession",
        v1.CreateSessionRequest(session=v1.Session(display_name="x" * 4097)),
        "INVALID_FIELD",
        "session.display_name",
    ),
    "what is said at once": (
        "MessageService/AppendMessages",
        v1.AppendMessagesRequest(parent="sessions/s", messages=[said(LONG)] * 39),
        "PAYLOAD_TOO_LARGE",
        "",
    ),
    "client tools": (
        "RunService/Invoke",
        starting(messages=[said("Hi")], client_tools=[client_tool(f"t{n}", "x" * 4000) for n in range(100)]),
        "INVALID_FIELD",
        "start.client_tools",
    ),
    "a state and tools that come with a start": (
        "RunService/Invoke",
        starting(
            messages=[said("Hi")],
            state=WIDE,
            client_tools=[client_tool(f"t{n}", "x" * 3500) for n in range(70)],
        ),
        "INVALID_FIELD",
        "start",
    ),
    "a schema": (
        "AgentService/CreateAgent",
        v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(output_schema='{"title": "' + "x" * (64 << 10) + '"}'))),
        "INVALID_FIELD",
        "agent.llm.output_schema",
    ),
    "a template": (
        "AgentService/CreateAgent",
        v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(instruction="x" * ((64 << 10) + 1)))),
        "TEMPLATE_ERROR",
        "agent.llm.instruction",
    ),
    "a filter": (
        "SessionService/ListSessions",
        v1.ListSessionsRequest(filter='user = "' + "x" * 2048 + '"'),
        "INVALID_FIELD",
        "filter",
    ),
    "recent messages": (
        "SessionService/CompactSession",
        v1.CompactSessionRequest(name="sessions/s", keep_recent=501),
        "INVALID_FIELD",
        "keep_recent",
    ),
    "a batch's delay": (
        "RunService/WatchEvents",
        v1.WatchEventsRequest(
            name="sessions/s", options=v1.WatchOptions(max_batch_delay=duration_pb2.Duration(seconds=11))
        ),
        "INVALID_FIELD",
        "options.max_batch_delay",
    ),
    "a piece of an upload": (
        "BlobService/UploadBlob",
        v1.UploadBlobRequest(blob=v1.Blob(media_type="text/plain"), chunk=bytes((1 << 20) + 1)),
        "INVALID_FIELD",
        "chunk",
    ),
    "a piece of a file": (
        "SessionService/ImportSession",
        v1.ImportSessionRequest(chunk=bytes((1 << 20) + 1)),
        "INVALID_FIELD",
        "chunk",
    ),
}


@pytest.mark.parametrize("case", FIXED)
async def test_what_one_request_may_hold_is_bounded(case: str) -> None:
    method, request, reason, field = FIXED[case]
    async with running() as served:
        await agent(served, 0)
        await create_one(served, 0)
        channel: Any = served.channel
        call = channel.stream_stream(f"/notecase.v1.{method}")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(iter([request.SerializeToString()])).read()
        assert reason == reason_of(refused.value)
        if field:
            assert {field} == fields_of(refused.value)


async def test_memory_that_callers_leave_behind_is_given_back(tmp_path: Path) -> None:
    """Some 300 MB of answers wait for readers that never come, and then the readers are gone."""
    server = await Spawned.start(f"sqlite:{tmp_path / 'notecase.db'}", tmp_path / "log")
    process = psutil.Process(server.process.pid)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id="s"))
            messages = v1.MessageServiceStub(channel)
            append = v1.AppendMessagesRequest(parent="sessions/s", messages=[said("x" * 120_000)] * 8)
            await messages.AppendMessages(append)
            page = v1.ListMessagesRequest(parent="sessions/s")
            await messages.ListMessages(page)
            before = process.memory_info().rss
            async with AsyncExitStack() as stack:
                for _ in range(12):
                    deaf = await stack.enter_async_context(Deaf(server.address))
                    await deaf.call(LIST_MESSAGES, page.SerializeToString(), times=30)
                await until(lambda: process.memory_info().rss > before + (200 << 20))
            await until(lambda: process.memory_info().rss < before + (20 << 20))
    finally:
        assert await server.stop() == 0

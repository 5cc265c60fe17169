"""Content as the engine holds it: what is being read stays, whatever the sweep, and what has come is kept."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from notecase import v1
from notecase_server.engine import values
from notecase_server.engine.content import MAX_PART_BYTES, Contents, Limits, is_large
from notecase_server.store.contract import CHUNK_BYTES, Quotas, Store
from notecase_server.store.memory import MemoryStore
from notecase_server.store.sqlite.store import SqliteStore

from tests.store.build import KEY, ManualClock, refused

SIZES = {"one": 1, "many": 30_000}
DAY = 24 * 3600 * 1_000_000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
    opened: Store = (
        MemoryStore(clock) if request.param == "memory" else await SqliteStore.open(tmp_path / "store.db", clock)
    )
    yield opened
    await opened.close()


@pytest.fixture
def contents(store: Store, clock: ManualClock) -> Contents:
    return Contents(store, lambda: "made", clock, Limits())


async def endless(*frames: v1.UploadBlobRequest) -> AsyncIterator[v1.UploadBlobRequest]:
    """Frames, and then a caller who neither says more nor leaves."""
    for frame in frames:
        yield frame
    await asyncio.Event().wait()


async def sent(contents: Contents, *chunks: bytes, upload_id: str = "") -> v1.Blob:
    async def frames() -> AsyncIterator[v1.UploadBlobRequest]:
        for chunk in chunks:
            yield v1.UploadBlobRequest(chunk=chunk, last=chunk is chunks[-1])

    return await contents.upload("acme", v1.UploadBlobRequest(upload_id=upload_id), frames())


@pytest.mark.parametrize("character", ["a", "é", "€", "𝄞"], ids=["1", "2", "3", "4"])
def test_a_part_is_large_by_its_bytes(character: str) -> None:
    for size in (MAX_PART_BYTES // 4, MAX_PART_BYTES // 3, MAX_PART_BYTES // 2, MAX_PART_BYTES):
        for length in (size - 1, size, size + 1):
            text = character * length
            expected = len(text.encode()) > MAX_PART_BYTES
            assert [expected] * 2 == [is_large(v1.Part(text=text)), is_large(v1.Part(json=text))], length


async def test_what_is_being_read_is_removed_only_afterwards(contents: Contents, clock: ManualClock) -> None:
    blob = await sent(contents, b"a" * 300_000, b"b" * 300_000)
    reading = contents.download("acme", blob.name.removeprefix("blobs/"))
    read = (await anext(reading)).chunk
    clock.now += DAY + 1
    assert await contents.sweep() == 0
    read += b"".join([piece.chunk async for piece in reading])
    assert read == b"a" * 300_000 + b"b" * 300_000
    assert await contents.sweep() == 1
    with refused("BLOB_NOT_FOUND"):
        await contents.load("acme", blob)


async def test_an_upload_does_not_go_on_behind_bytes_that_another_call_has_sent_since(
    contents: Contents, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come when the upload was opened, and before what it has is read."""
    read = store.read_upload

    async def later(tenant: str, upload_id: str, offset: int) -> bytes:
        monkeypatch.undo()
        await store.add_chunk(tenant, upload_id, 0, b"theirs")
        return await read(tenant, upload_id, offset)

    monkeypatch.setattr(store, "read_upload", later)
    with refused("UPLOAD_OFFSET_MISMATCH"):
        await sent(contents, b"mine", upload_id="u")
    upload = await store.get_upload("acme", "u")
    assert upload is not None
    assert upload.committed_bytes == len(b"theirs")


async def test_a_reader_that_leaves_holds_nothing(contents: Contents, clock: ManualClock) -> None:
    blob = await sent(contents, b"a" * 300_000, b"b" * 300_000)
    reading = contents.download("acme", blob.name.removeprefix("blobs/"))
    await anext(reading)
    await reading.aclose()
    clock.now += DAY + 1
    assert await contents.sweep() == 1


async def test_an_upload_that_breaks_off_leaves_what_has_come_or_nothing(contents: Contents, store: Store) -> None:
    """Nobody can come back to an upload without a name, so that nothing of it is kept."""

    async def broken() -> AsyncIterator[v1.UploadBlobRequest]:
        yield v1.UploadBlobRequest(chunk=b"abc")
        raise ConnectionResetError

    for upload_id, kept in (("mine", 3), ("", None)):
        with pytest.raises(ConnectionResetError):
            await contents.upload("acme", v1.UploadBlobRequest(upload_id=upload_id), broken())
        upload = await store.get_upload("acme", upload_id or "made")
        assert (upload.committed_bytes if upload else None) == kept


@pytest.mark.parametrize("said", [v1.Blob(size_bytes=6), v1.Blob()])
async def test_content_ends_where_it_was_said_to_end(contents: Contents, said: v1.Blob) -> None:
    """And not where the stream does: with its last byte, or with the frame that is last, whatever may follow."""
    first = v1.UploadBlobRequest(blob=said, chunk=b"abc")
    rest = v1.UploadBlobRequest(chunk=b"def", last=not said.size_bytes)
    more = v1.UploadBlobRequest(chunk=b"ghi")
    async with asyncio.timeout(60):
        blob = await contents.upload("acme", first, endless(first, rest, more))
    assert await contents.load("acme", blob) == b"abcdef"


async def test_what_is_stored_is_compared_with_what_is_said(contents: Contents) -> None:
    """No caller gets other content than requested because it has the same name or id."""
    abc, other = await sent(contents, b"abc", upload_id="mine"), await sent(contents, b"defg")
    with refused("BLOB_CORRUPT"):
        await contents.upload("acme", v1.UploadBlobRequest(blob=v1.Blob(name=abc.name, size_bytes=4)), endless())
    for wrong in (v1.Blob(size_bytes=4), v1.Blob(name=f"blobs/{'0' * 64}")):
        with refused("REQUEST_ID_REUSED") as caught:
            await contents.upload("acme", v1.UploadBlobRequest(blob=wrong, upload_id="mine"), endless())
        assert caught.value.metadata == {"upload_id": "mine"}
    again = v1.UploadBlobRequest(blob=v1.Blob(size_bytes=3), upload_id="mine")
    assert (await contents.upload("acme", again, endless())).name == abc.name
    assert await contents.load("acme", other) == b"defg"


async def test_a_caller_who_is_wrong_takes_nothing_from_one_who_was_right(contents: Contents, store: Store) -> None:
    """Both send under one id; what the first has completed stays on record."""
    begun = asyncio.Event()

    async def late() -> AsyncIterator[v1.UploadBlobRequest]:
        begun.set()
        await done.wait()
        yield v1.UploadBlobRequest(last=True)

    done = asyncio.Event()
    first = v1.UploadBlobRequest(upload_id="mine", blob=v1.Blob(size_bytes=7))
    wrong = asyncio.create_task(contents.upload("acme", first, late()))
    await begun.wait()
    blob = await sent(contents, b"abc", upload_id="mine")
    done.set()
    with refused("BLOB_CORRUPT"):
        await wrong
    upload = await store.get_upload("acme", "mine")
    assert upload is not None
    assert upload.blob.name == blob.name


async def test_an_upload_that_is_refused_at_its_start_is_dropped_only_for_who_knows_how_far_it_is(
    contents: Contents, store: Store
) -> None:
    """That is the caller that sent it: another one that chooses the same upload_id begins at 0, or guesses."""

    async def broken() -> AsyncIterator[v1.UploadBlobRequest]:
        yield v1.UploadBlobRequest(chunk=b"abc")
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await contents.upload("acme", v1.UploadBlobRequest(upload_id="mine"), broken())
    store.quotas = Quotas(blob_bytes=10)
    for offset, kept in ((0, True), (2, True), (3, False)):
        first = v1.UploadBlobRequest(upload_id="mine", offset=offset, blob=v1.Blob(size_bytes=20))
        with refused("QUOTA_EXCEEDED"):
            await contents.upload("acme", first, endless())
        assert kept == (await store.get_upload("acme", "mine") is not None)


async def test_an_upload_cancelled_while_it_writes_keeps_all_that_has_come(
    contents: Contents, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, add_chunk = asyncio.Event(), store.add_chunk

    async def told(tenant: str, upload_id: str, offset: int, data: bytes) -> None:
        writing.set()
        await add_chunk(tenant, upload_id, offset, data)

    monkeypatch.setattr(store, "add_chunk", told)
    data = b"x" * CHUNK_BYTES + b"the rest"
    first = v1.UploadBlobRequest(upload_id="mine", chunk=data)
    upload = asyncio.create_task(contents.upload("acme", first, endless(first)))
    await writing.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    again = v1.UploadBlobRequest(upload_id="mine", offset=len(data), last=True)
    blob = await contents.upload("acme", again, endless(again))
    assert await contents.load("acme", blob) == data


async def test_a_drain_ends_uploads_and_keeps_what_has_come(contents: Contents, store: Store) -> None:
    come = asyncio.Event()

    async def slow() -> AsyncIterator[v1.UploadBlobRequest]:
        yield v1.UploadBlobRequest(chunk=b"abc")
        come.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(contents.upload("acme", v1.UploadBlobRequest(upload_id="mine"), slow()))
    await come.wait()
    await contents.drain()
    kept = await store.get_upload("acme", "mine")
    assert kept is not None
    assert kept.committed_bytes == 3
    with refused("SERVER_DRAINING"):
        await upload
    with refused("SERVER_DRAINING"):
        await sent(contents, b"abc")


async def test_a_large_value_of_state_becomes_json_in_a_thread(
    contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, plain = list[str](), values.plain

    def seen(value: v1.Value, content: Callable[[v1.Value], str]) -> object:
        if value.HasField("list_value"):
            names.append(threading.current_thread().name)
        return plain(value, content)

    monkeypatch.setattr(values, "plain", seen)
    state = {key: v1.Value(list_value=v1.ValueList(values=[v1.Value(int_value=1)] * n)) for key, n in SIZES.items()}
    parts = [v1.Part(state_key=key) for key in SIZES]
    kept = await contents.parts(KEY, parts, state)
    assert ["[1]", "[" + "1, " * 29_999 + "1]"] == [part.json for part in kept]
    assert ["MainThread"] == names[:1]
    assert "MainThread" != names[1]

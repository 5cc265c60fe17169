"""Content as the engine holds it: what is being read stays, whatever the sweep."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from notecase import v1
from notecase_server.engine.content import Contents, Limits
from notecase_server.store.contract import Store
from notecase_server.store.memory import MemoryStore
from notecase_server.store.sqlite import SqliteStore

from tests.store.build import ManualClock, refused

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


async def sent(contents: Contents, *chunks: bytes, upload_id: str = "") -> v1.Blob:
    async def frames() -> AsyncIterator[v1.UploadBlobRequest]:
        for chunk in chunks:
            yield v1.UploadBlobRequest(chunk=chunk, last=chunk is chunks[-1])

    return await contents.upload("acme", v1.UploadBlobRequest(upload_id=upload_id), frames())


async def test_what_is_being_read_is_removed_only_afterwards(contents: Contents, clock: ManualClock) -> None:
    blob = await sent(contents, b"a" * 300_000, b"b" * 300_000)
    reading = contents.download("acme", blob.name.removeprefix("blobs/"))
    assert (await anext(reading)).chunk == b"a" * 300_000
    clock.now += DAY + 1
    assert await contents.sweep() == 0
    assert [piece.chunk for piece in [piece async for piece in reading]] == [b"b" * 300_000]
    assert await contents.sweep() == 1
    with refused("BLOB_NOT_FOUND"):
        await contents.load("acme", blob)


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

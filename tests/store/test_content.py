"""Every store: content lies once under its digest, is resumable at any piece, and there while anything refers to it."""

import hashlib
from typing import Any, cast

import pytest
from notecase import v1
from notecase_server.store.base import TableStore
from notecase_server.store.contract import CHUNK_BYTES, Commit, Fork, Store

from tests.store.build import (
    APP_STATE,
    KEY,
    USER_STATE,
    ManualClock,
    add,
    changed,
    create,
    put,
    refused,
    remove,
    said,
    session_key,
    value,
)
from tests.store.fixtures import looks_inside

HOUR = 3600 * 1_000_000


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> v1.Blob:
    return v1.Blob(name=f"blobs/{digest(data)}", media_type="application/pdf", filename="plan.pdf")


def showing(name: str, data: bytes) -> v1.Event:
    """A message that refers to content."""
    event = said(name)
    event.message_added.parts.add().blob.CopyFrom(blob(data))
    return event


def noting(key: str, data: bytes, state: str = "") -> v1.Event:
    """The reference is deep inside of a value."""
    inner = v1.Value(map_value=v1.ValueMap(values={"plan": v1.Value(blob_value=blob(data))}))
    op = v1.StateOp(key=key, set=v1.Value(list_value=v1.ValueList(values=[value(1), inner])))
    return changed(op, state=state)


async def stored(store: Store, data: bytes) -> str:
    await store.put_blob("acme", "", digest(data), data)
    return digest(data)


async def whole(store: Store, tenant: str, sha256: str) -> bytes:
    read = b""
    while piece := await store.read_blob(tenant, sha256, len(read)):
        read += piece
    return read


async def test_an_upload_in_pieces_is_a_blob_once_complete(store: Store) -> None:
    pieces = [b"a" * 300_000, b"", b"b", b"c" * 300_000]
    data = b"".join(pieces)
    opened = await store.open_upload("acme", "u1", 5)
    assert (opened.committed_bytes, opened.expire_time.ToMicroseconds()) == (0, 5)
    at = 0
    for piece in pieces:
        if piece:
            await store.add_chunk("acme", "u1", at, piece)
        at += len(piece)
    upload = await store.get_upload("acme", "u1")
    assert upload is not None
    assert (upload.committed_bytes, upload.HasField("blob")) == (at, False)
    assert await store.get_blob("acme", digest(data)) is None, "it is no blob yet"
    read = b""
    while piece := await store.read_upload("acme", "u1", len(read)):
        read += piece
    assert read == data
    made = await store.complete_upload("acme", "", "u1", at, digest(data))
    assert made == v1.Blob(name=f"blobs/{digest(data)}", size_bytes=at)
    assert await store.get_blob("acme", digest(data)) == made
    assert await whole(store, "acme", digest(data)) == data
    assert await store.read_blob("acme", digest(data), 300_000) == b"b"
    assert (await store.read_blob("acme", digest(data), 300_002))[:2] == b"cc"
    assert len(await store.read_blob("acme", digest(data), 0)) == CHUNK_BYTES, "however it was written"
    assert await store.read_blob("acme", digest(data), at) == b""
    again = await store.complete_upload("acme", "", "u1", at, digest(data))
    assert again == made, "completing is safe to repeat"
    told = await store.open_upload("acme", "u1", 9)
    assert told.blob == made
    assert told.expire_time.ToMicroseconds() == 5, "a complete one is not kept any longer"


async def test_an_upload_goes_on_only_where_it_ends(store: Store) -> None:
    await store.open_upload("acme", "u1", 5)
    await store.add_chunk("acme", "u1", 0, b"abc")
    for offset in (0, 2, 4):
        with refused("UPLOAD_OFFSET_MISMATCH") as caught:
            await store.add_chunk("acme", "u1", offset, b"d")
        assert caught.value.metadata["committed_bytes"] == "3"
    with refused("UPLOAD_OFFSET_MISMATCH"):
        await store.complete_upload("acme", "", "u1", 4, digest(b"abcd"))
    await store.complete_upload("acme", "", "u1", 3, digest(b"abc"))
    with refused("UPLOAD_OFFSET_MISMATCH"):
        await store.add_chunk("acme", "u1", 3, b"d")
    assert await whole(store, "acme", digest(b"abc")) == b"abc"
    with refused("BLOB_NOT_FOUND"):
        await store.add_chunk("acme", "u2", 0, b"d")
    with refused("BLOB_NOT_FOUND"):
        await store.complete_upload("acme", "", "u2", 0, digest(b""))


async def test_content_stored_at_once_lies_in_pieces_too(store: Store) -> None:
    """So a reader never gets more than fits into a frame."""
    data = b"a" * CHUNK_BYTES + b"b" * CHUNK_BYTES + b"c"
    sha256 = await stored(store, data)
    assert await store.read_blob("acme", sha256, 1) == data[1:CHUNK_BYTES]
    assert await whole(store, "acme", sha256) == data
    empty = await stored(store, b"")
    assert await whole(store, "acme", empty) == b""


async def test_the_same_content_is_stored_once_in_a_tenant(store: Store) -> None:
    sha256 = await stored(store, b"abc")
    await store.open_upload("acme", "u1", 5)
    await store.add_chunk("acme", "u1", 0, b"abc")
    await store.complete_upload("acme", "", "u1", 3, sha256)
    await stored(store, b"abc")
    await store.drop_upload("acme", "u1")
    assert await store.get_upload("acme", "u1") is not None, "what is complete is not dropped"
    assert await whole(store, "acme", sha256) == b"abc"
    assert await store.get_blob("globex", sha256) is None
    with refused("BLOB_NOT_FOUND"):
        await store.read_blob("globex", sha256, 0)
    assert await store.get_upload("globex", "u1") is None


async def test_a_commit_refers_only_to_what_is_there_and_learns_its_size(store: Store) -> None:
    await create(store)
    with refused("BLOB_NOT_FOUND") as caught:
        await add(store, showing("m1", b"abc"))
    assert caught.value.resource is not None
    assert caught.value.resource.name == f"blobs/{digest(b'abc')}"
    with refused("BLOB_NOT_FOUND"):
        await add(store, noting("k", b"abc"))
    with refused("BLOB_NOT_FOUND"):
        await store.update_state(APP_STATE, [*noting("k", b"abc").state_changed.ops])
    await stored(store, b"abc")
    given = showing("m1", b"abc")
    done = await add(store, given, noting("k", b"abc"))
    assert given.message_added.parts[1].blob.size_bytes == 0, "the caller's own is left as it was"
    assert done.events[0].message_added.parts[1].blob.size_bytes == 3
    message = await store.get_message(KEY, "m1")
    assert message is not None
    assert message.parts[1].blob == done.events[0].message_added.parts[1].blob
    state = await store.get_state(session_key("acme", "case").state, ["k"])
    noted = state.entries["k"].value.list_value.values[1].map_value.values["plan"].blob_value
    assert noted.size_bytes == 3
    assert [event.sequence for event in await store.read_events(KEY, 0)] == [1, 2], "what was refused left nothing"


async def test_a_session_counts_each_content_once_and_is_bounded(store: Store) -> None:
    await create(store)
    await stored(store, b"abc")
    await stored(store, b"de")
    assert (await add(store, showing("m1", b"abc"), noting("k", b"abc"))).session.content_bytes == 3
    assert (await add(store, showing("m2", b"abc"))).session.content_bytes == 3
    with refused("PAYLOAD_TOO_LARGE") as caught:
        await add(store, showing("m3", b"de"), content_limit=4)
    assert (caught.value.metadata["size"], caught.value.metadata["limit"]) == ("5", "4")
    assert (await add(store, showing("m3", b"abc"), content_limit=2)).session.content_bytes == 3, "nothing is added"
    assert (await add(store, showing("m4", b"de"), content_limit=5)).session.content_bytes == 5


async def swept(store: Store, clock: ManualClock, held: set[tuple[str, str]] | None = None) -> int:
    await store.sweep_sessions()
    return await store.sweep_blobs(clock.now, clock.now - 24 * HOUR, held or set())


async def test_what_nothing_refers_to_is_removed_after_its_time(store: Store, clock: ManualClock) -> None:
    """Each way to refer keeps it: a message, a note in a log that was removed since, another state's entry."""
    await create(store)
    names = {name: await stored(store, name.encode()) for name in ("loose", "said", "noted", "app", "held", "fresh")}
    await add(store, showing("m1", b"said"), noting("k", b"noted"))
    await add(store, changed(remove("k")))
    await store.update_state(APP_STATE, [*noting("k", b"app").state_changed.ops])
    clock.now += 24 * HOUR
    assert await swept(store, clock) == 0, "a day is not over until it is"
    clock.now += 1
    assert await store.touch_blob("acme", "", names["fresh"]) is not None
    assert await swept(store, clock, {("acme", names["held"])}) == 1
    there = {name for name, sha256 in names.items() if await store.get_blob("acme", sha256)}
    assert there == {"said", "noted", "app", "held", "fresh"}
    with refused("BLOB_NOT_FOUND"):
        await store.read_blob("acme", names["loose"], 0)
    await store.update_state(APP_STATE, [put("k", "something else")])
    await store.delete_session(KEY)
    assert await swept(store, clock) == 4
    there = {name for name, sha256 in names.items() if await store.get_blob("acme", sha256)}
    assert there == {"fresh"}
    assert await store.touch_blob("acme", "", names["said"]) is None


async def test_what_one_of_two_sessions_refers_to_stays(store: Store, clock: ManualClock) -> None:
    other = session_key("acme", "other")
    sha256 = await stored(store, b"abc")
    for key in (KEY, other):
        await create(store, key)
        await add(store, showing("m1", b"abc"), key=key)
    clock.now += 25 * HOUR
    await store.delete_session(KEY)
    assert await swept(store, clock) == 0
    assert await whole(store, "acme", sha256) == b"abc"
    await store.delete_session(other)
    assert await swept(store, clock) == 1


async def test_an_upload_that_is_left_expires_with_its_bytes(store: Store, clock: ManualClock) -> None:
    await store.open_upload("acme", "left", clock.now + HOUR)
    await store.add_chunk("acme", "left", 0, b"abc")
    await store.open_upload("acme", "done", clock.now + HOUR)
    await store.add_chunk("acme", "done", 0, b"abc")
    await store.complete_upload("acme", "", "done", 3, digest(b"abc"))
    await store.open_upload("acme", "gone on with", clock.now + HOUR)
    await store.open_upload("acme", "gone on with", clock.now + 2 * HOUR)
    clock.now += HOUR
    await swept(store, clock)
    assert await store.get_upload("acme", "left") is None
    assert await store.get_upload("acme", "done") is None
    assert await store.get_upload("acme", "gone on with") is not None
    assert await whole(store, "acme", digest(b"abc")) == b"abc", "a blob outlives the upload that made it"
    await store.drop_upload("acme", "gone on with")
    await store.drop_upload("acme", "gone on with")
    assert await store.get_upload("acme", "gone on with") is None


@pytest.mark.parametrize("pieces", [15, 16, 17, 40])
async def test_much_is_removed_in_small_steps(store: Store, clock: ManualClock, pieces: int) -> None:
    """And what is uploaded afterwards lies where it should."""
    for name in ("one", "two"):
        await store.open_upload("acme", name, clock.now + HOUR)
        for number in range(pieces):
            await store.add_chunk("acme", name, number, b"x")
    clock.now += HOUR
    await swept(store, clock)
    sha256 = await stored(store, b"abc")
    await store.open_upload("acme", "three", clock.now + HOUR)
    await store.add_chunk("acme", "three", 0, b"de")
    assert await whole(store, "acme", sha256) == b"abc"
    assert await store.read_upload("acme", "three", 0) == b"de"


async def test_a_fork_holds_on_to_what_its_own_log_refers_to(store: Store, clock: ManualClock) -> None:
    """Of what came after it, and of what its source lets go of, it knows nothing."""
    await create(store)
    first, later = await stored(store, b"abc"), await stored(store, b"de")
    await add(store, showing("m1", b"abc"))
    await add(store, said("m2"))
    await add(store, showing("m3", b"de"))
    fork = session_key("acme", "fork")
    past = await store.read_past(KEY, 2)
    made = await store.fork(Fork(key=fork, source=KEY, past=past, session=v1.Session()))
    assert made.session.content_bytes == 3
    await store.delete_session(KEY)
    clock.now += 25 * HOUR
    assert await swept(store, clock) == 1
    assert await store.get_blob("acme", later) is None
    assert await whole(store, "acme", first) == b"abc"
    message = await store.get_message(fork, "m1")
    assert message is not None
    assert message.parts[1].blob.size_bytes == 3
    await store.delete_session(fork)
    assert await swept(store, clock) == 1


@looks_inside
async def test_uploads_without_a_byte_are_removed_in_small_steps_too(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[object] = []
    write = cast("TableStore", store)._write

    async def counted(step: Any, *within: str, **how: Any) -> Any:
        removed.append(await write(step, *within, **how))
        return removed[-1]

    for number in range(40):
        await store.open_upload("acme", f"u{number}", clock.now + HOUR)
    clock.now += HOUR
    monkeypatch.setattr(store, "_write", counted)
    await store.sweep_blobs(clock.now, clock.now)
    assert removed == [16, 16, 8, 16, 16, 8], "the uploads, then where their content was"


async def uploaders(store: Store, sha256: str, tenant: str = "acme") -> set[str]:
    """Who of some is recorded as having uploaded a blob."""
    return {
        who
        for who in ("", "ada", "eve", "bob")
        if await store.known_blobs(tenant, who, "users/nobody", [sha256]) == {sha256}
    }


@looks_inside
async def test_each_who_uploads_a_blob_is_recorded_with_it(store: Store, clock: ManualClock) -> None:
    """By whichever way; in its tenant, and for as long as the blob is there."""
    data = b"a portrait"
    sha256 = hashlib.sha256(data).hexdigest()
    assert await store.touch_blob("acme", "bob", sha256) is None
    assert await uploaders(store, sha256) == set()
    await store.put_blob("acme", "ada", sha256, data)
    assert await uploaders(store, sha256) == {"ada"}
    await store.touch_blob("acme", "eve", sha256)
    await store.touch_blob("acme", "eve", sha256)
    assert await uploaders(store, sha256) == {"ada", "eve"}
    await store.open_upload("acme", "u1", clock.now + 100)
    await store.add_chunk("acme", "u1", 0, data)
    assert await uploaders(store, sha256) == {"ada", "eve"}, "nothing was uploaded yet"
    for _ in range(2):
        await store.complete_upload("acme", "bob", "u1", len(data), sha256)
    await store.put_blob("acme", "", sha256, data)
    assert await uploaders(store, sha256) == {"ada", "eve", "bob", ""}
    assert await uploaders(store, sha256, "globex") == set()
    await store.get_blob("acme", sha256)
    clock.now += 1
    assert await store.sweep_blobs(clock.now, clock.now) == 1
    assert await uploaders(store, sha256) == set()
    await store.put_blob("acme", "eve", sha256, data)
    assert await uploaders(store, sha256) == {"eve"}


@looks_inside
async def test_the_caller_who_completes_an_upload_of_new_content_is_recorded(store: Store, clock: ManualClock) -> None:
    sha256 = hashlib.sha256(b"new").hexdigest()
    await store.open_upload("acme", "u1", clock.now + 100)
    await store.add_chunk("acme", "u1", 0, b"new")
    with refused("UPLOAD_OFFSET_MISMATCH"):
        await store.complete_upload("acme", "ada", "u1", 2, sha256)
    assert await uploaders(store, sha256) == set()
    await store.complete_upload("acme", "ada", "u1", 3, sha256)
    assert await uploaders(store, sha256) == {"ada"}


async def test_a_blob_is_known_to_its_uploader_and_to_the_user_whose_sessions_and_state_refer_to_it(
    store: Store,
) -> None:
    sha256 = hashlib.sha256(b"x").hexdigest()
    await store.put_blob("acme", "somebody", sha256, b"x")
    assert {sha256} == await store.known_blobs("acme", "somebody", "users/eve", [sha256, "0" * 64])
    assert set() == await store.known_blobs("acme", "ada", "users/ada", [sha256])
    assert set() == await store.known_blobs("other", "somebody", "users/ada", [sha256])
    note = v1.StateOp(key="k", set=v1.Value(blob_value=v1.Blob(name=f"blobs/{sha256}", media_type="text/plain")))
    await create(store)
    change = v1.Event(state_changed=v1.StateChanged(ops=[note]))
    await store.commit(Commit(key=KEY, events=[change]))
    assert {sha256} == await store.known_blobs("acme", "ada", "users/ada", [sha256])
    assert set() == await store.known_blobs("acme", "ada", "users/eve", [sha256])
    await store.delete_session(KEY)
    assert set() == await store.known_blobs("acme", "ada", "users/ada", [sha256])
    await store.update_state(APP_STATE, [note])
    assert set() == await store.known_blobs("acme", "ada", "users/ada", [sha256])
    await store.update_state(USER_STATE, [note])
    assert {sha256} == await store.known_blobs("acme", "ada", "users/ada", [sha256])

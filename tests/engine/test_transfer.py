"""An exported session is read only when it is whole, and only when a log could be so."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
from notecase import v1
from notecase_server.engine import transfer
from notecase_server.engine.content import Contents
from notecase_server.errors import NotecaseError
from notecase_server.store import copies
from notecase_server.store.contract import Query, Restore
from notecase_server.store.memory import MemoryStore

from tests.store.build import (
    KEY,
    ManualClock,
    add,
    answered,
    asked,
    called,
    changed,
    create,
    ended,
    finished,
    moved,
    put,
    refused,
    replied,
    rewound,
    said,
    session_key,
    start,
    started,
    summarized,
)

OTHER = session_key("acme", "other")


async def export(store: MemoryStore) -> bytes:
    return b"".join([piece async for piece in transfer.exported(store, KEY)])


async def read(file: bytes) -> Restore:
    return await transfer.read(io.BytesIO(file), OTHER)


async def stored(file: bytes) -> MemoryStore:
    store = MemoryStore(ManualClock())
    await store.restore(await read(file))
    return store


async def head_of(file: bytes) -> int:
    session = await (await stored(file)).get_session(OTHER)
    assert session is not None
    return session.last_sequence


async def problem_of(file: bytes) -> str:
    with refused("IMPORT_INVALID") as caught:
        await read(file)
    return caught.value.message


async def problem_of_log(file: bytes) -> str:
    with refused("IMPORT_INVALID") as caught:
        await stored(file)
    return caught.value.message


@pytest.fixture
async def file() -> bytes:
    """A small session with a bit of everything."""
    store = MemoryStore(ManualClock())
    await create(store, display_name="The violin", labels={"b": "2", "a": "1"})
    await add(store, changed(put("n", 1)))
    await start(store, "r1", called("m1", "r1", "c1"))
    await add(store, finished("c1", "r1"), replied("m2", "r1"), ended("r1"))
    return await export(store)


def made_of(events: Sequence[v1.Event], header: v1.ExportHeader | None = None, magic: bytes = b"notecase\2") -> bytes:
    """A file as it might be made by hand, with a correct trailer."""
    records = [v1.ExportRecord(header=header)] if header is not None else []
    records += [v1.ExportRecord(event=event) for event in events]
    body = magic + b"".join(map(framed, [record.SerializeToString() for record in records])) + b"\0"
    return body + hashlib.sha256(body).digest()


def framed(body: bytes) -> bytes:
    assert len(body) < 1 << 14
    return bytes([len(body) & 0x7F | 0x80, len(body) >> 7]) + body


def numbered(*events: v1.Event) -> list[v1.Event]:
    for number, event in enumerate(events, 1):
        event.sequence = number
        event.create_time.FromSeconds(1_700_000_000)
        if event.HasField("message_added"):
            event.message_added.sequence = event.message_added.update_sequence = number
            event.message_added.create_time.CopyFrom(event.create_time)
    return list(events)


def at(seconds: int, *events: v1.Event) -> list[v1.Event]:
    for event in numbered(*events):
        event.create_time.seconds = seconds
        event.message_added.create_time.seconds = seconds
    return list(events)


def limited(run: str, seconds: int) -> v1.Event:
    event = started(run)
    event.run_started.limits.timeout.seconds = seconds
    return event


def versioned(value: v1.Value, key: str = "n") -> v1.Event:
    """A change of state as a store would have numbered it."""
    event = changed(v1.StateOp(key=key, set=value))
    event.state_changed.version = 1
    return event


def nested(levels: int) -> v1.Value:
    value = v1.Value(int_value=1)
    for _ in range(levels):
        value = v1.Value(list_value=v1.ValueList(values=[value]))
    return value


async def test_a_whole_file_is_read(file: bytes) -> None:
    restore, store = await read(file), await stored(file)
    added = (await store.list_messages(OTHER, Query(10))).rows
    assert [(message.name, message.update_sequence, len(message.parts)) for message in added] == [
        ("m1", 4, 2),
        ("m2", 5, 1),
    ]
    assert (await head_of(file), dict(restore.session.labels)) == (6, {"a": "1", "b": "2"})
    assert [event.sequence for event in restore.events()] == list(range(1, 7))


async def test_a_file_cut_at_any_byte_is_refused(file: bytes) -> None:
    told = {await problem_of(file[:length]) for length in range(len(file))}
    assert told == {"The file ends before its trailer: it was cut off, or is damaged; nothing was imported."}


async def test_a_file_with_any_bit_flipped_is_refused(file: bytes) -> None:
    told = set()
    for place in range(len(file)):
        for bit in range(8):
            flipped = bytearray(file)
            flipped[place] ^= 1 << bit
            told.add((await problem_of(bytes(flipped))).partition(":")[0].partition(",")[0])
    assert told == {
        "The file is not an export of a session; nothing was imported.",
        "The file was written by a newer notecase",
        "The file is in format 0",
        "The file ends before its trailer",
        "The file is damaged",
    }


async def test_a_file_that_goes_on_is_refused(file: bytes) -> None:
    assert "is damaged" in await problem_of(file + b"\0")
    assert "is damaged" in await problem_of(file + file)


async def test_a_foreign_and_a_newer_file_have_different_errors() -> None:
    assert (await problem_of(b"PK\3\4 something else")).startswith("The file is not an export of a session")
    newer = made_of([], v1.ExportHeader(), magic=b"notecase\3")
    assert (await problem_of(newer)).startswith(
        "The file was written by a newer notecase, in format 3; this one reads up to 2"
    )
    older = made_of([], v1.ExportHeader(), magic=b"notecase\0")
    assert (await problem_of(older)).startswith(
        "The file is in format 0, which no notecase writes; this one reads 1 to 2"
    )
    assert await head_of(made_of([], v1.ExportHeader())) == 0
    by_hand = numbered(said("m1"), started("r1"), said("m2", run="r1"), ended("r1"), versioned(nested(16)))
    assert await head_of(made_of(by_hand, v1.ExportHeader())) == 5


async def test_keys_that_tools_once_could_set_are_read() -> None:
    keys = ("", "k" * 1024, "user")
    change = v1.StateChanged(version=1, ops=[put(key, 1) for key in keys])
    store = await stored(made_of(numbered(v1.Event(state_changed=change)), v1.ExportHeader()))
    assert set(keys) == (await store.get_state(OTHER.state, keys)).entries.keys()


async def test_keys_and_ids_that_not_every_store_can_hold_are_refused_on_all() -> None:
    """A SQLite file would take them, and an index of PostgreSQL would not."""
    for problem, event in (
        ("a key of state of more than 1024 bytes", versioned(v1.Value(int_value=1), "é" * 513)),
        ("the id of a call of more than 1024 bytes", called("m1", "", "c" * 1025)),
    ):
        file = made_of(numbered(said("m0"), event), v1.ExportHeader())
        assert f"The file has {problem} in event 2; nothing was imported." == await problem_of_log(file)


@pytest.mark.parametrize(("version", "kept"), [(1, []), (2, ["i1"])])
async def test_an_answer_that_the_first_format_remembered_is_dropped(version: int, kept: list[str]) -> None:
    """It named only a tool, and an answer holds for what a call is bound to."""
    store = MemoryStore(ManualClock())
    await create(store)
    await start(store, "r1", called("m1", "r1", "c1"))
    answer = answered("i1", "r1", remember=v1.InputResponse.REMEMBER_RUN)
    await add(store, asked("i1", "c1", "r1"), answer, finished("c1", "r1"), ended("r1"))
    body = b"notecase" + bytes([version]) + (await export(store))[9:-32]
    there = await stored(body + hashlib.sha256(body).digest())
    run = await there.get_run(OTHER, "r1")
    assert run is not None
    assert list(run[0].remembered) == kept
    assert [
        event.input_resolved.response.remember
        for event in await there.read_events(OTHER, 0)
        if event.HasField("input_resolved")
    ] == [v1.InputResponse.REMEMBER_RUN]


@pytest.mark.parametrize(
    "events",
    [
        numbered(said("m1"), said("m2"))[1:],
        numbered(said("m1"), said("m1")),
        numbered(said("M 1")),
        numbered(said("m1", run="r1")),
        numbered(started("r1"), started("r2")),
        numbered(started("r1"), said("m1", run="r1")),
        numbered(started("r1"), finished("c1", "r1"), ended("r1")),
        numbered(started("r1"), ended("r1"), moved("r1", v1.Run.STATE_RUNNING)),
        numbered(started("")),
        numbered(v1.Event(input_requested=v1.InputRequest(input_id="i1"))),
        numbered(v1.Event(block_delta=v1.BlockDelta(text="passing"))),
        numbered(v1.Event()),
        numbered(changed(v1.StateOp(key="n", increment=1), v1.StateOp(key="n", append=v1.Value(int_value=1)))),
        numbered(changed(put("n", 1))),
        numbered(versioned(v1.Value(double_value=float("nan")))),
        numbered(versioned(nested(17))),
        numbered(said("m1"), summarized(1, 2)),
        numbered(said("m1"), summarized(1, 1, previous=1)),
        numbered(*(said(f"m{number}") for number in range(9)), rewound(-1)),
        numbered(rewound(1)),
        numbered(v1.Event(state_changed=v1.StateChanged(version=1, ops=[v1.StateOp(key="k")]))),
        at(10**13, said("m1")),
        at(-1, said("m1")),
        numbered(limited("r1", -1), ended("r1")),
        numbered(limited("r1", 2**62), ended("r1")),
        numbered(said("m1"), summarized(1, -(2**63))),
        numbered(said("m1"), summarized(1, 1, previous=-1)),
        numbered(said("m1"), summarized(1, 1, previous=2**63 - 1)),
    ],
)
@pytest.mark.parametrize("rows", [2, copies.COPY_ROWS])
async def test_what_no_log_holds_is_refused(events: list[v1.Event], rows: int) -> None:
    """Though the trailer holds: gaps, ids used twice, two runs at once, runs without an end, versions that are none."""
    with mock.patch.object(copies, "COPY_ROWS", rows):
        assert "The file has" in await problem_of_log(made_of(events, v1.ExportHeader()))


async def test_files_without_a_header_or_with_invalid_records_are_refused() -> None:
    assert "does not begin with its header" in await problem_of(made_of(numbered(said("m1"))))
    body = b"notecase\2" + framed(b"\xff\xff\xff") + b"\0"
    assert "cannot be decoded" in await problem_of(body + hashlib.sha256(body).digest())


async def test_a_file_is_read_in_pieces_by_few_steps_of_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn between two of them, and hardly within one that asks for the interpreter all the time."""
    file, steps = made_of(numbered(*(said(f"m{number}", "x" * 1000) for number in range(3000))), v1.ExportHeader()), 0
    read = list[int]()

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            read.append(len(data))
            return data

    async def stepped(does: Any, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return does(*arguments)

    monkeypatch.setattr(transfer, "asyncio", SimpleNamespace(to_thread=stepped))
    restore = await transfer.read(Counted(file), OTHER)
    contents = cast("Contents", SimpleNamespace(limits=SimpleNamespace(session=1)))
    await transfer.keep_content(contents, Counted(file), replace(restore, blobs={"none": (1, 1)}))
    pieces = len(file) // transfer.CHUNK_BYTES
    assert pieces > 10
    assert 2 * pieces <= steps <= 2 * pieces + 6
    assert 2 * pieces <= len(read) <= 2 * pieces + 10
    assert transfer.CHUNK_BYTES == max(read)


async def test_a_session_at_work_is_not_exported() -> None:
    store = MemoryStore(ManualClock())
    with refused("SESSION_NOT_FOUND"):
        await export(store)
    await create(store)
    await start(store, "r1")
    with refused("RUN_ACTIVE"):
        await export(store)


async def test_pieces_are_of_a_size_and_events_written_meanwhile_stay_out() -> None:
    store = MemoryStore(ManualClock())
    await create(store)
    for number in range(8):
        await add(store, said(f"m{number}", "x" * 200_000))
    before = await export(store)
    pieces = []
    async for piece in transfer.exported(store, KEY):
        pieces.append(piece)
        if len(pieces) == 1:
            await add(store, said("late"))
    assert b"".join(pieces) == before
    assert {len(piece) for piece in pieces[:-2]} == {transfer.CHUNK_BYTES}
    with pytest.raises(NotecaseError):
        async for _ in transfer.exported(store, KEY):
            if await store.get_session(KEY):
                await store.delete_session(KEY)

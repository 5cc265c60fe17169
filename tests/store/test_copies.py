"""A fork or an import is written in small transactions, on any tables, and is all there or not at all."""

import asyncio
import gc
import io
import sqlite3
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notecase import v1
from notecase_server import errors
from notecase_server.engine import transfer
from notecase_server.engine.rewind import ended as put_to_rest
from notecase_server.engine.rewind import rewound
from notecase_server.errors import NotecaseError
from notecase_server.store import copies, fold
from notecase_server.store.base import TableStore
from notecase_server.store.contract import (
    ActiveRun,
    Compare,
    Fork,
    Once,
    Query,
    Quotas,
    Replayed,
    Restore,
    SessionKey,
    Store,
)
from notecase_server.store.imports import PIECE, Replay
from notecase_server.store.memory import MemoryStore
from notecase_server.store.sql.tables import Tables
from notecase_server.store.sqlite.store import SqliteStore

from tests.store.build import (
    EVERYTHING,
    KEY,
    RECORD,
    ManualClock,
    add,
    called,
    changed,
    create,
    dispatched,
    edit,
    ended,
    finished,
    increment,
    once,
    put,
    queued,
    queued_start,
    reborn,
    refused,
    remove,
    replied,
    said,
    session_key,
    start,
    started,
)
from tests.store.test_fold import EVENTS, Made, event
from tests.store.test_identity import PORTRAIT, everything
from tests.store.test_past import Told, rows_of, turn
from tests.store.test_sweep import Tally, tally
from tests.support.copying import transactions
from tests.support.inside import rows_with

COPY = session_key("acme", "copy")
HOUR = 3600 * 1_000_000
Way = Literal["fork", "restore"]
WAYS: list[Way] = ["fork", "restore"]
Make = Callable[..., Awaitable[Any]]


async def fork_of(store: Store, source: SessionKey, key: SessionKey, at: int, **fields: Any) -> Fork:
    past = await store.read_past(source, at)
    fields = {"session": v1.Session(), **fields}
    return Fork(key=key, source=source, past=past, events=put_to_rest(past, "forked"), **fields)


async def maker(store: Store, way: Way, key: SessionKey = COPY, record: Once | None = None) -> Make:
    """Ways to copy the session KEY, which has no active run."""
    session = await store.get_session(KEY)
    assert session is not None
    if way == "fork":
        fork = await fork_of(store, KEY, key, session.last_sequence, once=record)
        return lambda: store.fork(fork)
    file = b"".join([piece async for piece in transfer.exported(store, KEY)])
    read = await transfer.read(io.BytesIO(file), key)
    restore = Restore(**{name: getattr(read, name) for name in Restore.__slots__} | {"once": record})
    return lambda: store.restore(restore)


async def fill(store: Store) -> None:
    """A session without an active run, with rows of every kind that copies have."""
    await store.put_blob("acme", "", PORTRAIT, b"a portrait")
    await create(store)
    portrait = v1.Value(blob_value=v1.Blob(name=f"blobs/{PORTRAIT}"))
    await add(store, said("m1"), changed(put("k", 1), v1.StateOp(key="portrait", set=portrait)))
    await start(store, "r1", called("m2", "r1", "c1", "c2"), dispatched("c1", "r1"))
    await add(store, finished("c1", "r1"), finished("c2", "r1"), replied("m3", "r1"), ended("r1"))
    await add(store, said("m4"))
    await add(store, v1.Event(rewound=v1.Rewound(to_sequence=9)))
    await add(store, said("m5"), changed(put("k", 2), put("l", 3)))
    await start(store, "r2", replied("m6", "r2"), ended("r2"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction has two rows."""
    monkeypatch.setattr(copies, "COPY_ROWS", 2)


async def require_nothing_left(store: Store, *keys: SessionKey) -> None:
    """Nothing is seen of these, and once the sweeper was there nothing is left."""
    for key in keys:
        assert await store.get_session(key) is None
    await store.sweep_sessions()
    assert set() == set().union(*[await rows_with(store, key.uid) for key in keys])


@pytest.mark.parametrize("way", WAYS)
async def test_no_transaction_writes_more_than_its_bound_of_rows_and_of_bytes(store: Store, way: Way) -> None:
    """Of a session of some thousand events, some large ones among them, and many keys, calls and runs."""
    await create(store)
    for number in range(3):
        await add(store, *(changed(put(f"k{number}-{each}", "v")) for each in range(300)))
        large = (said(f"large{number}-{each}", "x" * 300_000) for each in range(9))
        await add(store, *large, said(f"larger{number}", "y" * 1_500_000))
        await add(store, changed(*(put(f"large{number}-{each}", "z" * 100_000) for each in range(9))))
    for number in range(300):
        run, calls = f"r{number}", [f"c{number}-{each}" for each in range(3)]
        done = (finished(call, run) for call in calls)
        await start(store, run, called(f"m{number}", run, *calls), *done, ended(run))
    make, before = await maker(store, way), await tally(store)
    cuts = [before]

    async def look(_: int) -> None:
        cuts.append(await tally(store))

    with transactions(store, after=look):
        await make()
    written = [Tally(more.rows - less.rows, more.size - less.size) for less, more in pairwise(cuts)]
    assert (before.rows * 2, before.size * 2) == cuts[-1]
    assert before.rows > 4000
    assert [] == [each for each in written if each.rows > copies.COPY_ROWS]
    assert [] == [each for each in written if each.size > copies.COPY_BYTES and each.rows > 1]
    assert (0, 0) == written[-1], "the last one only makes it a session"
    assert len(written) < 3 * (before.rows // copies.COPY_ROWS + before.size // copies.COPY_BYTES)


async def test_an_import_is_replayed_in_small_pieces_that_are_not_kept(store: Store) -> None:
    """However long the log is; each piece builds on the rows of the earlier ones."""
    await create(store)
    for number in range(10):
        run = f"r{number}"
        await start(store, run, called(f"m{number}", run, f"c{number}"), *(said(f"{run}-{each}") for each in range(95)))
        await add(store, finished(f"c{number}", run), changed(put("k", number)), ended(run))
        await add(store, said(f"large{number}", "x" * 400_000))
    make, pieces, held = await maker(store, "restore"), list[int](), list[int]()
    load = Replay.load

    def counted(self: Replay, tables: Tables, events: list[v1.Event]) -> Any:
        pieces.append(len(events))
        assert sum(event.ByteSize() for event in events) <= copies.COPY_BYTES
        held.append(sum(isinstance(each, v1.Event | v1.Message) for each in gc.get_objects()))
        return load(self, tables, events)

    with mock.patch.object(Replay, "load", counted):
        await make()
    assert (1010, copies.COPY_ROWS // PIECE) == (sum(pieces), max(pieces))
    assert max(held[1:]) < held[0] + 3 * max(pieces)
    assert await rows_of(store, KEY) == await rows_of(store, COPY)


async def test_an_import_takes_an_event_that_changes_more_keys_than_a_statement_has_variables(store: Store) -> None:
    many, log = 3000, [v1.Event(sequence=number) for number in (1, 2)]
    for number, each in enumerate(log, 1):
        each.state_changed.version = number
        for key in range(many):
            each.state_changed.ops.add(key=f"{key}", increment=number)
    if isinstance(store, SqliteStore):
        for connection in (store._connections.writer, *store._connections.readers):
            connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, many // 2)
    await store.restore(Restore(key=COPY, session=v1.Session(), blobs={}, events=lambda: iter(log)))
    state = await store.get_state(COPY.state, ["0", f"{many - 1}"])
    assert [3, 3] == [entry.value.int_value for entry in state.entries.values()]


async def test_a_log_is_replayed_in_threads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every store: that of PostgreSQL and that in memory take their steps on the event loop."""
    loop, replayed, replay = threading.get_ident(), list[bool](), fold.replay

    def noted(*arguments: Any) -> None:
        replayed.append(threading.get_ident() == loop)
        replay(*arguments)

    monkeypatch.setattr(fold, "replay", noted)
    log = [v1.Event(sequence=1, state_changed=v1.StateChanged(version=1, ops=[put("k", 1)]))]
    await store.restore(Restore(key=COPY, session=v1.Session(), blobs={}, events=lambda: iter(log)))
    assert replayed == [False]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["a\0b", "a\0", "\0", "\U0001f50d\0\ud7ff", '"\\'])
async def test_a_fork_has_every_key_of_the_state(store: Store, way: Way, key: str) -> None:
    """Also one with U+0000, next to the key that ends there."""
    await create(store)
    await add(store, changed(put(key, 1), put(key[:1], 2), put(key[0] + key, 3)))
    await (await maker(store, way))()
    assert await rows_of(store, KEY) == await rows_of(store, COPY)


@pytest.mark.parametrize("way", WAYS)
async def test_nothing_of_a_copy_is_seen_until_its_last_transaction(
    store: Store, clock: ManualClock, small: None, way: Way
) -> None:
    """By its key, its name or in any list; a sweep meanwhile takes nothing of it, nor the content that it needs."""
    await fill(store)
    make, seen = await maker(store, way), 0
    never, whole = await everything(store, reborn(COPY)), await rows_of(store, KEY)
    user = Query(10, where=Compare("user", "=", "users/ada"))

    async def look(_: int) -> None:
        nonlocal seen
        if await store.get_session(COPY) is not None:
            return
        seen += 1
        clock.now += 25 * HOUR
        await store.sweep_sessions()
        assert 0 == await store.sweep_blobs(clock.now, clock.now)
        assert never == await everything(store, COPY)
        assert None is await store.find_session("acme", "copy")
        for query in (EVERYTHING, user):
            assert ["case"] == [each.name for each in (await store.list_sessions("acme", query)).rows]
        assert ["sessions/case/runs/r2", "sessions/case/runs/r1"] == [
            each.name for each in (await store.list_runs("acme", None, EVERYTHING)).rows
        ]
        nobody: list[ActiveRun] = []
        assert nobody == await store.active_runs() == await store.idle_runs()
        assert [] == await store.expired_sessions(clock.now, 10)
        assert not await store.expire_session(COPY)
        for write in (
            add(store, said("m9"), key=COPY),
            add(store, started("r9"), key=COPY, start=RECORD),
            store.claim(COPY, 1),
            store.read_past(COPY, 1),
            store.delete_session(COPY),
            store.get_state(COPY.state, ["k"], 1),
        ):
            with refused("SESSION_NOT_FOUND"):
                await write

    store.quotas = Quotas(sessions=2)
    with transactions(store, after=look):
        await make()
    assert seen > 12
    assert whole == await rows_of(store, COPY)
    await store.delete_session(KEY)
    await store.sweep_sessions()
    assert whole == await rows_of(store, COPY)
    assert 0 == await store.sweep_blobs(clock.now, clock.now)


Later = list[list[v1.Event]]
LATER: dict[str, Later] = {
    "a tool's result": [[finished("open", "r2")]],
    "the results, and the end of the run": [[finished("open", "r2"), replied("m9", "r2"), ended("r2")]],
    "an answer that is queued": [[queued("more", "r2")]],
    "the end, and the next run": [[finished("open", "r2"), ended("r2")], [started("later"), said("m9", run="later")]],
    "a value": [[changed(put("a", "other"))]],
    "a key that goes": [[changed(remove("b"))]],
    "a key that comes": [[changed(put("aa", 1), put("zz", 1))]],
    "keys that come, go and come back": [
        [changed(remove("a"), put("c", 1))],
        [changed(put("a", 1), remove("c"), increment("n", 1))],
    ],
    "messages and content": [[said("m9"), changed(put("z", "x" * 1000))]],
    "a rewind that cancels a call": [[finished("open", "r2"), ended("r2")], []],
}


@pytest.mark.parametrize("what", LATER)
@pytest.mark.parametrize("early", [False, True])
async def test_a_source_that_moves_on_between_two_transactions_changes_nothing_in_its_fork(
    store: Store, small: None, what: str, early: bool
) -> None:
    """At each of them in turn: the fork is what it is when nothing happens meanwhile. `early` has the past read before
    something else changed, too."""

    async def source(name: str) -> tuple[SessionKey, Fork]:
        key = session_key("acme", name)
        await create(store, key)
        await add(store, said("m1"), changed(put("a", 1), put("b", 2), put("n", 1)), key=key)
        await start(store, "r1", called("m2", "r1", "c1", "c2"), key=key)
        await add(store, finished("c1", "r1"), finished("c2", "r1"), replied("m3", "r1"), ended("r1"), key=key)
        await start(store, "r2", called("m4", "r2", "open"), dispatched("open", "r2"), key=key)
        done = await add(store, queued_start("later"), key=key, start=RECORD)
        fork = await fork_of(store, key, session_key("acme", f"fork of {name}"), done.session.last_sequence)
        if early:
            await add(store, changed(put("a", 2), put("m", 1)), key=key)
        return key, fork

    async def go_on(key: SessionKey) -> None:
        for events in LATER[what]:
            await add(store, *events, key=key)
        if "rewind" in what:
            back = await rewound(store, key, 5, "to_sequence")
            await add(store, *back.events, key=key)

    _, quiet = await source("quiet")
    await store.fork(quiet)
    expected, log = await rows_of(store, quiet.key), await store.read_events(quiet.key, 0)
    for number in count(1):
        key, fork = await source(f"case{number}")

        async def act(made: int, key: SessionKey = key, number: int = number) -> None:
            if made == number:
                await go_on(key)

        with transactions(store, after=act) as made:
            await store.fork(fork)
        assert expected == await rows_of(store, fork.key)
        assert log == await store.read_events(fork.key, 0)
        if made.count < number:
            break
    assert number > 12


@pytest.mark.parametrize("expires", [False, True])
async def test_a_source_that_goes_while_it_is_forked_leaves_nothing(
    store: Store, clock: ManualClock, small: None, expires: bool
) -> None:
    """Before each transaction in turn."""
    over = v1.Session()
    over.expire_time.FromMicroseconds(clock.now)
    for number in count(1):
        key, copy = KEY._replace(uid=f"source {number}"), COPY._replace(uid=f"copy {number}")
        await create(store, key)
        await add(store, *(said(f"m{each}") for each in range(3)), changed(put("a", 1)), key=key)
        fork = await fork_of(store, key, copy, 4)

        async def go(made: int, key: SessionKey = key, number: int = number) -> None:
            if made == number and expires:
                await store.edit_session(key, edit(expiry=True, expire_time=over.expire_time))
                assert await store.expire_session(key)
            elif made == number:
                await store.delete_session(key)

        try:
            with transactions(store, before=go):
                await store.fork(fork)
        except NotecaseError as error:
            assert "SESSION_NOT_FOUND" == errors.reason_name(error.reason)
        else:
            break
        await require_nothing_left(store, key, copy)
    assert number > 5


@pytest.mark.parametrize("one", WAYS)
@pytest.mark.parametrize("other", WAYS)
async def test_of_two_copies_that_take_a_name_one_has_it_and_nothing_is_left_of_the_other(
    store: Store, small: None, one: Way, other: Way
) -> None:
    await fill(store)
    keys = [COPY, reborn(COPY)]
    makes = [await maker(store, way, key) for way, key in zip((one, other), keys, strict=True)]
    done = await asyncio.gather(*(make() for make in makes), return_exceptions=True)
    (lost,) = [each for each in done if isinstance(each, BaseException)]
    assert isinstance(lost, NotecaseError)
    assert "ALREADY_EXISTS" == errors.reason_name(lost.reason)
    await require_nothing_left(store, keys[done.index(lost)])
    assert await rows_of(store, KEY) == await rows_of(store, keys[1 - done.index(lost)])


@pytest.mark.parametrize("way", WAYS)
async def test_a_name_that_is_taken_meanwhile_is_refused_and_nothing_is_left(
    store: Store, small: None, way: Way
) -> None:
    """Before each transaction in turn; so is one session more than there may be."""
    await fill(store)
    name, quota = COPY.session, "more"
    for reason, other in (("ALREADY_EXISTS", name), ("QUOTA_EXCEEDED", quota)):
        for number in count(1):
            copy, taken_by = COPY._replace(uid=f"{reason} {number}"), session_key("acme", other)._replace(uid="other")
            make = await maker(store, way, copy)
            store.quotas = Quotas(sessions=2 if other == quota else 0)

            async def take(made: int, taken_by: SessionKey = taken_by, number: int = number) -> None:
                if made == number:
                    await create(store, taken_by)

            try:
                with transactions(store, before=take):
                    await make()
            except NotecaseError as error:
                assert reason == errors.reason_name(error.reason)
            else:
                break
            await store.delete_session(taken_by)
            await require_nothing_left(store, copy, taken_by)
        assert number > 10
        await store.delete_session(copy)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("same_name", [False, True])
async def test_one_request_twice_at_once_makes_one_session(
    store: Store, small: None, way: Way, same_name: bool
) -> None:
    """And is answered the same, as a repeat is afterwards."""
    await fill(store)
    second = reborn(COPY) if same_name else session_key("acme", "second")
    makes = [await maker(store, way, key, once("copy")) for key in (COPY, second, second._replace(uid="third"))]
    done = await asyncio.gather(*(make() for make in makes[:2]), return_exceptions=True)
    (repeat,) = [each for each in done if isinstance(each, Replayed)]
    (made,) = [each for each in done if each is not repeat]
    assert not isinstance(made, BaseException)
    session = made.session if way == "fork" else made
    told = v1.Session.FromString(repeat.response)
    assert (f"sessions/{session.name}", session.uid) == (told.name, told.uid)
    with pytest.raises(Replayed) as again:
        await makes[2]()
    assert repeat.response == again.value.response
    lost = (COPY, second)[done.index(repeat)]
    await require_nothing_left(store, lost, second._replace(uid="third"))
    assert 2 == len((await store.list_sessions("acme", EVERYTHING)).rows)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", ["not made", "made", "cancelled"])
async def test_a_copy_that_is_cut_at_any_transaction_is_all_there_or_swept(
    store: Store, small: None, way: Way, cut: str
) -> None:
    """By a store that fails once, whether it made the transaction or not, or by a caller who goes away while it is
    made. A repeat makes the session, or tells that it is there."""
    await fill(store)
    whole, there = await rows_of(store, KEY), 0
    for number in count(1):
        record = once(f"copy {number}")
        key, again = COPY._replace(uid=f"copy {number}"), COPY._replace(uid=f"again {number}")
        make, repeat = await maker(store, way, key, record), await maker(store, way, again, record)

        async def fail(made: int, number: int = number) -> None:
            task = asyncio.current_task()
            assert task is not None
            if made == number and cut == "cancelled":
                task.cancel()  # which comes with what it awaits next
            elif made == number:
                raise errors.store_unavailable()

        with transactions(store, after=fail) if cut == "made" else transactions(store, before=fail):
            done: Any = (await asyncio.gather(asyncio.ensure_future(make()), return_exceptions=True))[0]
        if not isinstance(done, BaseException):
            break
        assert isinstance(done, asyncio.CancelledError if cut == "cancelled" else NotecaseError)
        await store.probe()  # behind what is still being written
        if await store.get_session(key) is None:
            await require_nothing_left(store, key)
            await repeat()
            key = again
        else:
            there += 1
            with pytest.raises(Replayed):
                await repeat()
        assert whole == await rows_of(store, key)
        await store.delete_session(key)
        await store.forget_requests(1 << 60)
        await require_nothing_left(store, key, again)
    assert number > 10
    assert there == (0 if cut == "not made" else 1)


@pytest.mark.parametrize("way", WAYS)
async def test_a_transaction_that_comes_after_the_sweep_writes_nothing(store: Store, small: None, way: Way) -> None:
    """When no process protects the copy any more."""
    await fill(store)
    for number in count(2):
        key = COPY._replace(uid=f"copy {number}")
        make = await maker(store, way, key)

        async def forget(made: int, key: SessionKey = key, number: int = number) -> None:
            if made == number:
                under_way = cast(TableStore, store)._copies._under_way
                end = under_way.pop(key.state)
                await store.sweep_sessions()
                under_way[key.state] = end

        try:
            with transactions(store, before=forget):
                await make()
        except NotecaseError as error:
            assert "SESSION_NOT_FOUND" == errors.reason_name(error.reason)
        else:
            break
        await require_nothing_left(store, key)
    assert number > 10


async def test_an_import_holds_its_content_before_anything_else_is_written(
    store: Store, clock: ManualClock, small: None
) -> None:
    """What is not there by then is missed at once; what is stays, whatever is swept meanwhile."""
    await fill(store)
    makes = [await maker(store, "restore", COPY._replace(uid=f"copy {number}")) for number in range(3)]
    whole = await rows_of(store, KEY)
    await store.delete_session(KEY)
    await store.sweep_sessions()
    clock.now += 25 * HOUR

    async def sweep(made: int) -> None:
        assert (made == 1) == (await store.sweep_blobs(clock.now, clock.now) == 1)

    with transactions(store, after=sweep) as made, refused("BLOB_NOT_FOUND"):
        await makes[0]()
    assert 1 == made.count
    await store.put_blob("acme", "", PORTRAIT, b"a portrait of another size")
    with transactions(store) as made, refused("IMPORT_INVALID"):
        await makes[1]()
    assert 1 == made.count
    clock.now += 1
    assert 1 == await store.sweep_blobs(clock.now, clock.now)
    await store.put_blob("acme", "", PORTRAIT, b"a portrait")

    async def hold(made: int) -> None:
        clock.now += 1
        assert made == 1 or 0 == await store.sweep_blobs(clock.now, clock.now)

    with transactions(store, after=hold):
        await makes[2]()
    assert whole == await rows_of(store, COPY._replace(uid="copy 2"))
    await require_nothing_left(store, *(COPY._replace(uid=f"copy {number}") for number in range(2)))


@pytest.mark.parametrize("way", WAYS)
async def test_an_erasure_waits_for_the_copies_of_its_user_and_leaves_nothing(
    store: Store, small: None, way: Way
) -> None:
    """Begun before each transaction in turn."""
    mine = Query(10, where=Compare("user", "=", "users/ada"))
    for number in count(1):
        await fill(store)
        make = await maker(store, way)
        begun, erasing = asyncio.Event(), list[asyncio.Task[None]]()

        async def erase(begun: asyncio.Event = begun) -> None:
            while not await store.erase_state("acme", "users/ada"):
                for row in (await store.list_sessions("acme", mine)).rows:
                    await store.delete_session(SessionKey("acme", row.name, row.uid))
                begun.set()
                await store.sweep_sessions("acme", "users/ada")

        async def act(
            made: int,
            number: int = number,
            begun: asyncio.Event = begun,
            erasing: list[asyncio.Task[None]] = erasing,
            erase: Callable[[], Any] = erase,
        ) -> None:
            if made == number:
                erasing.append(asyncio.ensure_future(erase()))
                await begun.wait()

        with transactions(store, before=act) as made, suppress(NotecaseError):
            await make()
        if not erasing:
            break
        assert made.count == number - 1 or way == "restore"
        await erasing[0]
        assert set() == await rows_with(store, KEY.uid) | await rows_with(store, COPY.uid)
    assert number > 10


ACTIONS = st.one_of(
    st.tuples(st.just("commit"), st.lists(EVENTS, min_size=1, max_size=3)),
    st.tuples(st.just("turn"), st.integers(1, 5)),
    st.tuples(st.just("rewind"), st.integers(0, 60)),
)
Action = tuple[str, Any]


async def play(store: Store, told: Told, number: int, action: Action) -> None:
    """Does this to a session, if it can be done."""
    known = Made(*map(list, told.made))
    kind, what = action
    head = told.commits[-1] if told.commits else 0
    with suppress(NotecaseError):
        if kind == "rewind":
            back = await rewound(store, told.key, what % (head + 1), "to_sequence")
            await told.add(store, back.events, if_last_sequence=back.head)
        elif kind == "turn":
            for events in turn(f"t{number}")[:what]:
                await told.add(store, events)
        else:
            own = [("change", "", each[2]) if each[0] == "change" else each for each in what]
            await told.add(store, [event(each, number * 10 + place, known) for place, each in enumerate(own)])
        told.made = known


async def scenario(
    kind: Literal["memory", "sqlite"], before: list[Action], meanwhile: list[Action], at: int, begun: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clock = ManualClock()
        store: Store = (
            MemoryStore(clock) if kind == "memory" else await SqliteStore.open(Path(folder, "store.db"), clock)
        )
        await create(store)
        told, numbers = Told(KEY), count()
        for action in before:
            await play(store, told, next(numbers), action)
        at %= 1 + (told.commits[-1] if told.commits else 0)
        quiet = await fork_of(store, KEY, session_key("acme", "quiet"), at)
        await store.fork(quiet)
        later = iter(meanwhile)
        for action in islice(later, begun):
            await play(store, told, next(numbers), action)
        busy = await fork_of(store, KEY, COPY, at)

        async def go_on(_: int) -> None:
            for action in islice(later, 1):
                await play(store, told, next(numbers), action)

        with transactions(store, after=go_on):
            await store.fork(busy)
        assert await rows_of(store, quiet.key) == await rows_of(store, COPY)
        assert await store.read_events(quiet.key, 0) == await store.read_events(COPY, 0)
        sessions = [await store.get_session(key) for key in (quiet.key, COPY)]
        assert 1 == len({(each.log_bytes, each.content_bytes) for each in sessions if each})
        await store.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@settings(max_examples=40, deadline=None, database=None)
@given(
    before=st.lists(ACTIONS, max_size=12),
    meanwhile=st.lists(ACTIONS, max_size=12),
    at=st.integers(0, 60),
    begun=st.integers(0, 3),
)
def test_a_fork_is_what_the_log_says_whatever_is_committed_meanwhile(
    kind: Literal["memory", "sqlite"], before: list[Action], meanwhile: list[Action], at: int, begun: int
) -> None:
    """Before its past is read and between any two of its transactions."""
    with mock.patch.object(copies, "COPY_ROWS", 2):
        asyncio.run(scenario(kind, before, meanwhile, at, begun))

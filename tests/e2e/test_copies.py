"""A fork or an import is all there or not at all, whatever becomes of its server, its store or its caller."""

import asyncio
import hashlib
import io
import os
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import grpc
import pytest
from notecase import v1
from notecase_server import errors, serve
from notecase_server.engine import transfer
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store import copies
from notecase_server.store.contract import Fork, SessionKey, Store
from notecase_server.store.sql.pieces import STATE_ROWS
from notecase_server.store.sqlite.tables import SqliteTables

from tests.e2e.driving import reason_of
from tests.e2e.test_deletion import Swept
from tests.e2e.test_transfer import frames
from tests.store.build import add, changed, create, ended, put, replied, said, start
from tests.support.copying import Act, transactions
from tests.support.crashing import Crashing
from tests.support.inside import select
from tests.support.server import Running, running

SOURCE = SessionKey("default", "source", "00000000-dead-4000-8000-000000000000")
Way = Literal["fork", "import"]
WAYS: list[Way] = ["fork", "import"]
KILLS = "NOTECASE_KILLS"
"""The variable that, when it is set, has a server killed after every transaction of long copies."""
PARTS = 4
"""Into which the transactions of a long copy are divided: tests that can go side by side."""
SWEEPER_SECONDS = 60.0
"""How long the sweeper is waited for before it is taken for lost."""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeper runs more often than every second, so that tests need not wait for it."""
    monkeypatch.setattr(serve, "EXPIRY_SECONDS", 0.02)


async def fill(store: Store, turns: int, messages: int = 0) -> bytes:
    """A session of five events a turn and one a message, and its export."""
    await create(store, SOURCE)
    for number in range(turns):
        run = f"r{number}"
        told = (said(f"m{number}", run=run), replied(f"a{number}", run), changed(put(f"k{number % 20}", number)))
        await start(store, run, *told[:2], key=SOURCE)
        await add(store, told[2], ended(run), key=SOURCE)
    for begin in range(0, messages, 1000):
        await add(store, *(said(f"s{number}") for number in range(begin, begin + 1000)), key=SOURCE)
    return await exported(store, SOURCE)


async def exported(store: Store, key: SessionKey) -> bytes:
    return b"".join([piece async for piece in transfer.exported(store, key)])


def call(sessions: v1.SessionServiceStub, way: Way, file: bytes, copy: str) -> Any:
    """Asks for a copy of that id; the same request each time."""
    if way == "fork":
        return sessions.ForkSession(
            v1.ForkSessionRequest(name="sessions/source", session_id=copy, request_id=f"make {copy}")
        )
    return sessions.ImportSession(iter(frames(file, session_id=copy, request_id=f"make {copy}")))


async def orphans(store: Any) -> set[str]:
    """The uids that have rows and no session."""
    found = {uid for (uid,) in await select(store, "SELECT uid FROM deleted_sessions")}
    for table, *_ in SqliteTables.session_rows:
        found |= {uid for (uid,) in await select(store, f"SELECT DISTINCT uid FROM {table}")}
    for table, *_ in STATE_ROWS:
        found |= {uid for (uid,) in await select(store, f"SELECT DISTINCT id FROM {table} WHERE kind = 'session'")}
    return found - {uid for (uid,) in await select(store, "SELECT uid FROM sessions")}


@asynccontextmanager
async def swept(store: Store) -> AsyncIterator[tuple[Running, Callable[[], Awaitable[None]]]]:
    """A server, and what waits until its sweeper has left no orphan."""
    telling = Swept(store)

    async def clean() -> None:
        while await orphans(store):
            telling.done.clear()
            async with asyncio.timeout(SWEEPER_SECONDS):
                await telling.done.wait()

    async with running(cast(Store, telling)) as served:
        yield served, clean


async def require_nothing(served: Running, copy: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.sessions.GetSession(v1.GetSessionRequest(name=f"sessions/{copy}"))
    assert "SESSION_NOT_FOUND" == reason_of(refused.value)
    listed = await served.sessions.ListSessions(v1.ListSessionsRequest())
    assert ["sessions/source"] == [session.name for session in listed.sessions]


async def require_whole(store: Store, served: Running, way: Way, file: bytes, copy: str) -> None:
    """The request, repeated, is answered with the one session that there is, and that is all of it."""
    made = await call(served.sessions, way, file, copy)
    assert f"sessions/{copy}" == made.name
    assert made == await call(served.sessions, way, file, copy)
    assert file == await exported(store, SessionKey("default", copy, made.uid))
    listed = await served.sessions.ListSessions(v1.ListSessionsRequest())
    assert {"sessions/source", made.name} == {session.name for session in listed.sessions}
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=made.name))


async def died(folder: Path, way: Way, file: bytes, copy: str, after: int, *arguments: str) -> bool:
    """Returns whether a server finishes a copy after so many transactions."""
    async with (
        await Crashing.launch(folder, "--copies", str(after), *arguments, env={}) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        try:
            await call(v1.SessionServiceStub(channel), way, file, copy)
        except grpc.aio.AioRpcError:
            await server.death()
            return True
    return False


async def require_all_or_nothing(path: str, way: Way, file: bytes, copy: str) -> bool:
    """Nothing is there and no row stays, or all is; returns whether it was there."""
    store = await open_store(path, now)
    left = await orphans(store)
    async with swept(store) as (served, clean):
        there = await store.find_session("default", copy) is not None
        assert there or left
        if not there:
            await require_nothing(served, copy)
        await clean()
        await require_whole(store, served, way, file, copy)
        await clean()
    return there


@pytest.mark.parametrize("way", WAYS)
async def test_a_server_killed_after_any_transaction_leaves_all_or_nothing(tmp_path: Path, way: Way) -> None:
    path = f"sqlite:{tmp_path / 'notecase.db'}"
    store = await open_store(path, now)
    file = await fill(store, 50)
    await store.close()
    there = list[bool]()
    for number in count(1):
        copy = f"copy{number}"
        if not await died(tmp_path, way, file, copy, number, "--copy-rows", "90"):
            break
        there.append(await require_all_or_nothing(path, way, file, copy))
    assert len(there) > 5
    assert [*([False] * (len(there) - 1)), True] == there


PORTRAIT = hashlib.sha256(b"a portrait").hexdigest()


class Prepared(NamedTuple):
    """A session of ten thousand events without an active run, in a store that no server has open."""

    store: Path
    file: bytes
    transactions: dict[Way, int]
    """How many each way of copying it takes."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return asyncio.run(prepare(tmp_path_factory.mktemp("prepared")))


async def prepare(folder: Path) -> Prepared:
    store = await open_store(f"sqlite:{folder / 'notecase.db'}", now)
    await fill(store, 10, 9_900)
    await store.put_blob("default", "", PORTRAIT, b"a portrait")
    portrait = v1.Value(blob_value=v1.Blob(name=f"blobs/{PORTRAIT}"))
    done = await add(store, changed(v1.StateOp(key="portrait", set=portrait)), key=SOURCE)
    file, counts = await exported(store, SOURCE), dict[Way, int]()
    for way in WAYS:
        key = SOURCE._replace(session=way, uid=way)
        with transactions(store) as made:
            if way == "fork":
                past = await store.read_past(SOURCE, done.session.last_sequence)
                await store.fork(Fork(key=key, source=SOURCE, past=past, session=v1.Session()))
            else:
                await store.restore(await transfer.read(io.BytesIO(file), key))
        assert file == await exported(store, key)
        await store.delete_session(key)
        counts[way] = made.count
    await store.sweep_sessions()
    await store.close()
    assert min(counts.values()) > done.session.last_sequence // copies.COPY_ROWS
    return Prepared(folder / "notecase.db", file, counts)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", range(PARTS))
async def test_a_server_killed_in_a_copy_of_ten_thousand_events_leaves_all_or_nothing(
    tmp_path: Path, prepared: Prepared, way: Way, part: int
) -> None:
    """After one transaction of each part, by the run's seed, and after the last; `make test-kills` takes them all."""
    last = prepared.transactions[way]
    points = list(range(1 + part, last + 1, PARTS))
    if not os.environ.get(KILLS):
        chosen = random.Random(f"{os.environ.get('NOTECASE_SEED')} {way} {part}").choice(points)
        points = sorted({chosen, *({last} & set(points))})
    for number in points:
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(prepared.store, folder)
        assert await died(folder, way, prepared.file, "copy", number)
        store = await open_store(f"sqlite:{folder / 'notecase.db'}", now)
        left = await orphans(store)
        async with swept(store) as (served, clean):
            made = await store.find_session("default", "copy")
            assert (number == last) == (made is not None)
            if made is None:
                assert left
                await require_nothing(served, "copy")
            else:
                listed = await served.sessions.ListSessions(v1.ListSessionsRequest())
                assert {"sessions/source", "sessions/copy"} == {session.name for session in listed.sessions}
                assert prepared.file == await exported(store, SessionKey("default", "copy", made.uid))
                assert len(b"a portrait") == made.content_bytes
            await clean()
            assert b"a portrait" == await store.read_blob("default", PORTRAIT, 0)
            for session in ["source", "copy"] if made else ["source"]:
                await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=f"sessions/{session}"))
            await clean()
            assert 1 == await store.sweep_blobs(1 << 60, 1 << 60)
        shutil.rmtree(folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["passing", "for good", "after", "gone"])
async def test_a_copy_that_is_cut_is_swept_by_the_server(
    store_url: str, way: Way, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any transaction, by a store that fails once or by a caller who goes away; the request can be repeated."""
    monkeypatch.setattr(copies, "COPY_ROWS", 20)
    store = await open_store(store_url, now)
    file = await fill(store, 10)
    async with swept(store) as (served, clean):
        for number in count(1):
            copy = f"copy{number}"
            asked = call(served.sessions, way, file, copy)

            async def cut(made: int, number: int = number, asked: Any = asked) -> None:
                if made != number:
                    return
                if mode == "gone":
                    asked.cancel()
                    await asyncio.Event().wait()  # ends with the call
                raise errors.too_large("The copy", 2, 1) if mode == "for good" else errors.store_unavailable()

            acts: dict[str, Act] = {"after" if mode == "after" else "before": cut}
            with transactions(store, **acts) as made:
                done: Any = (await asyncio.gather(asked, return_exceptions=True))[0]
            if isinstance(done, BaseException):
                await clean()
                await require_nothing(served, copy)
            await require_whole(store, served, way, file, copy)
            if made.count < number and not isinstance(done, BaseException):
                break
        await clean()
    assert number > 6

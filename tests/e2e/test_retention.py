"""Sessions that expire, users that are erased: what callers and watchers see of it, on every store."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from notecase import v1
from notecase_server.models.openai import OpenAIProvider
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import SessionKey
from structlog.testing import capture_logs

from tests.e2e.driving import fields_of, reason_of, said
from tests.store.build import ManualClock
from tests.support.openai_server import OpenAIServer, reply
from tests.support.server import Running, running

SECOND = 1_000_000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def served(store_url: str, model: OpenAIServer, clock: ManualClock) -> AsyncIterator[Running]:
    """A server with a clock that only the test advances."""
    async with running(store_url, {"openai": OpenAIProvider("test-key", model.url, "stub-1")}, clock=clock) as server:
        yield server


async def opened(served: Running, **fields: Any) -> v1.Session:
    return await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(**fields)))


async def updated(served: Running, name: str, *paths: str, **fields: Any) -> v1.Session:
    mask = FieldMask(paths=paths)
    request = v1.UpdateSessionRequest(session=v1.Session(name=name, **fields), update_mask=mask)
    return await served.sessions.UpdateSession(request)


def in_seconds(clock: ManualClock, seconds: int) -> Timestamp:
    at = Timestamp()
    at.FromMicroseconds(clock.now + seconds * SECOND)
    return at


async def gone(stream: Any) -> None:
    """Reads to the end of a stream, which must be that the session is gone."""
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in stream:
            pass
    assert reason_of(ended.value) == "SESSION_NOT_FOUND"


async def exists(served: Running, name: str) -> bool:
    try:
        await served.sessions.GetSession(v1.GetSessionRequest(name=name))
    except grpc.aio.AioRpcError as error:
        assert reason_of(error) == "SESSION_NOT_FOUND"
        return False
    return True


async def test_a_session_is_deleted_when_its_time_has_come(served: Running, clock: ManualClock) -> None:
    """Its watchers receive an error, and other sessions stay."""
    short, long = await opened(served, ttl=Duration(seconds=60)), await opened(served, ttl=Duration(seconds=61))
    assert short.expire_time == in_seconds(clock, 60)
    assert not short.HasField("ttl")
    keep = v1.WatchOptions(keep_open=True)
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=short.name, options=keep))
    clock.now += 60 * SECOND
    await gone(watch)
    assert not await exists(served, short.name)
    assert await exists(served, long.name)


async def test_an_absolute_end_stops_the_run(
    served: Running, agent: str, model: OpenAIServer, clock: ManualClock
) -> None:
    """Also in the middle of a reply: the model is let go at once, and nothing more is asked of it."""
    session = await opened(served, agent=agent, expire_time=in_seconds(clock, 60))
    model.script(reply("Never whole.", chunks=3).held(asyncio.Event(), after=2))
    start = v1.StartRun(session=session.name, messages=[said("Go on")])
    stream = served.runs.Run(iter([v1.RunRequest(start=start)]))
    asked = await model.request(0)
    clock.now += 60 * SECOND
    await gone(stream)
    await asked.left.wait()
    assert len(model.requests) == 1


async def test_an_idle_time_waits_for_the_run_and_begins_with_its_end(
    served: Running, agent: str, model: OpenAIServer, clock: ManualClock
) -> None:
    session = await opened(served, agent=agent, idle_ttl=Duration(seconds=60))
    assert session.expire_time == in_seconds(clock, 60)
    go_on = asyncio.Event()
    model.script(reply("At last.", chunks=3).held(go_on, after=2))
    start = v1.StartRun(session=session.name, run_id="r", messages=[said("Take your time")])
    run = await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    await model.request(0)
    other = await opened(served, ttl=Duration(seconds=60))
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=other.name, options=v1.WatchOptions(keep_open=True)))
    clock.now += 1000 * SECOND
    await gone(watch)  # so it was looked for what has expired
    busy = await served.sessions.GetSession(v1.GetSessionRequest(name=session.name))
    assert not busy.HasField("expire_time")
    go_on.set()
    ended = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    assert ended.state == v1.Run.STATE_SUCCEEDED
    rests = await served.sessions.GetSession(v1.GetSessionRequest(name=session.name))
    assert rests.expire_time == in_seconds(clock, 60)


async def test_updates_set_and_clear_when_a_session_expires(served: Running, clock: ManualClock) -> None:
    name = (await opened(served)).name
    minute = Duration(seconds=60)
    session = await updated(served, name, ttl=minute)
    assert session.expire_time == in_seconds(clock, 60)
    session = await updated(served, name, "display_name", display_name="Kept")
    assert session.expire_time == in_seconds(clock, 60)
    session = await updated(served, name, "idle_ttl", idle_ttl=Duration(seconds=5))
    assert (session.idle_ttl.seconds, session.expire_time) == (5, in_seconds(clock, 5))
    clock.now += SECOND
    session.display_name = "Read, changed, written"
    written = await served.sessions.UpdateSession(v1.UpdateSessionRequest(session=session))
    assert (written.idle_ttl.seconds, written.expire_time) == (5, in_seconds(clock, 5))
    session = await updated(served, name, "expire_time", expire_time=in_seconds(clock, 9))
    assert (session.HasField("idle_ttl"), session.expire_time) == (False, in_seconds(clock, 9))
    for path in ("expire_time", "ttl", "idle_ttl", "*"):
        await updated(served, name, "idle_ttl", idle_ttl=minute)
        session = await updated(served, name, path)
        assert not session.HasField("expire_time")
        assert not session.HasField("idle_ttl")
    clock.now += 10_000 * SECOND
    watched = await opened(served, expire_time=in_seconds(clock, -1))
    await gone(
        served.runs.WatchEvents(v1.WatchEventsRequest(name=watched.name, options=v1.WatchOptions(keep_open=True)))
    )
    assert await exists(served, name)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"ttl": Duration()}, "ttl"),
        ({"ttl": Duration(seconds=-1)}, "ttl"),
        ({"idle_ttl": Duration(seconds=1 << 40)}, "idle_ttl"),
        ({"idle_ttl": Duration(seconds=1, nanos=-1)}, "idle_ttl"),
        ({"expire_time": Timestamp(seconds=1 << 60)}, "expire_time"),
        ({"expire_time": Timestamp(seconds=-1)}, "expire_time"),
        ({"ttl": Duration(seconds=1), "idle_ttl": Duration(seconds=1)}, "ttl"),
        ({"expire_time": Timestamp(seconds=1), "idle_ttl": Duration(seconds=1)}, "expire_time"),
    ],
)
async def test_a_time_that_cannot_be_is_refused(served: Running, agent: str, fields: Any, wrong: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await opened(served, **fields)
    assert fields_of(refused.value) == {f"session.{wrong}"}
    start = v1.StartRun(new_session=v1.Session(agent=agent, **fields), messages=[said("Hello")])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    assert fields_of(refused.value) == {f"start.new_session.{wrong}"}


async def test_a_fork_and_its_source_expire_separately(served: Running, clock: ManualClock) -> None:
    """The source's is not its own, and one that cannot be is refused as at a creation."""
    source = await opened(served, ttl=Duration(seconds=60))
    fork = await served.sessions.ForkSession(v1.ForkSessionRequest(name=source.name))
    assert not fork.HasField("expire_time")
    given = v1.Session(idle_ttl=Duration(seconds=5))
    fork = await served.sessions.ForkSession(v1.ForkSessionRequest(name=source.name, session=given))
    assert fork.expire_time == in_seconds(clock, 5)
    given.expire_time.CopyFrom(in_seconds(clock, 5))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.sessions.ForkSession(v1.ForkSessionRequest(name=source.name, session=given))
    assert fields_of(refused.value) == {"session.expire_time"}


async def test_a_user_is_erased_with_sessions_runs_and_state(served: Running, agent: str, model: OpenAIServer) -> None:
    """More sessions than one batch, one of them at work; another user keeps all; a repeat tells the same."""
    mine = [await opened(served, user="users/ada", agent=agent) for _ in range(105)]
    other = await opened(served, user="users/bob")
    for user in ("users/ada", "users/bob"):
        put = v1.PutStateRequest(name=f"{user}/state", key="name", value=v1.Value(string_value=user), request_id=user)
        await served.state.PutState(put)
    model.script(reply("Never whole.", chunks=3).held(asyncio.Event(), after=2))
    start = v1.StartRun(session=mine[50].name, messages=[said("Go on")])
    stream = served.runs.Run(iter([v1.RunRequest(start=start)]))
    asked = await model.request(0)
    erase = v1.EraseUserRequest(name="users/ada", request_id="erase")
    assert (await served.sessions.EraseUser(erase)).sessions_deleted == 105
    await gone(stream)
    await asked.left.wait()
    left = await served.sessions.ListSessions(v1.ListSessionsRequest())
    assert [session.name for session in left.sessions] == [other.name]
    ada = await served.state.GetState(v1.GetStateRequest(name="users/ada/state"))
    assert (dict(ada.entries), ada.version) == ({}, 0)
    bob = await served.state.GetState(v1.GetStateRequest(name="users/bob/state"))
    assert bob.entries["name"].value.string_value == "users/bob"
    late = v1.PutStateRequest(
        name="users/ada/state", key="name", value=v1.Value(string_value="users/ada"), request_id="users/ada"
    )
    assert await served.state.PutState(late) == v1.StateEntry(), "a repeat that comes late brings nothing back"
    await opened(served, user="users/ada")
    assert (await served.sessions.EraseUser(erase)).sessions_deleted == 105, "a repeat erases nothing more"
    assert len((await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions) == 2
    assert (await served.sessions.EraseUser(v1.EraseUserRequest(name="users/ada"))).sessions_deleted == 1
    assert (await served.sessions.EraseUser(v1.EraseUserRequest(name="users/nobody"))).sessions_deleted == 0


async def test_what_is_made_for_a_user_meanwhile_is_erased_too(served: Running) -> None:
    """Afterwards there is none, however starts and the erasure fell."""
    names = [f"users/ada{number}" for number in range(5)]

    async def keep_making(user: str) -> None:
        for _ in range(20):
            await opened(served, user=user)

    async def erase(user: str) -> int:
        return (await served.sessions.EraseUser(v1.EraseUserRequest(name=user))).sessions_deleted

    async def both(user: str) -> int:
        _, erased = await asyncio.gather(keep_making(user), erase(user))
        return erased

    done = await asyncio.gather(*(both(user) for user in names))
    last = [await erase(user) for user in names]
    assert sum(done) + sum(last) == 100
    assert len((await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions) == 0


async def test_a_request_that_made_a_deleted_session_makes_it_no_more(served: Running) -> None:
    request = v1.CreateSessionRequest(session_id="case", request_id="r")
    await served.sessions.CreateSession(request)
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name="sessions/case"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.sessions.CreateSession(request)
    assert reason_of(refused.value) == "SESSION_NOT_FOUND"


async def test_within_seconds_nothing_of_a_deleted_session_is_on_disk(
    served: Running, clock: ManualClock, tmp_path: Path, store_url: str
) -> None:
    """The sweeper of a server at work sees to it."""
    secret = "a-secret-that-was-told"

    def on_disk() -> bool:
        return any(secret.encode() in file.read_bytes() for file in tmp_path.iterdir())

    name = (await opened(served, display_name=secret)).name
    told = v1.AppendMessagesRequest(parent=name, messages=[said(secret * 50)], request_id="told")
    await served.messages.AppendMessages(told)
    assert on_disk() == store_url.startswith("sqlite:")
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=name))
    for _ in range(4):  # each is seen by another round of the sweeper, and the second comes after the end of the first
        passing = await opened(served, ttl=Duration(seconds=1))
        clock.now += SECOND
        keep = v1.WatchOptions(keep_open=True)
        await gone(served.runs.WatchEvents(v1.WatchEventsRequest(name=passing.name, options=keep)))
    assert not on_disk()


async def test_a_defect_ends_neither_the_sweeper_nor_the_server(clock: ManualClock) -> None:
    """It is logged, and what has had its time goes in the next round."""
    store = await open_store("memory:", clock)
    expired_sessions, broken = store.expired_sessions, [RuntimeError("a defect")]

    async def sometimes(now: int, limit: int) -> list[SessionKey]:
        found = await expired_sessions(now, limit)
        if found and broken:
            raise broken.pop()
        return found

    store.expired_sessions = sometimes  # type: ignore[method-assign]
    async with running(store, clock=clock) as served:
        passing = await opened(served, ttl=Duration(seconds=1))
        watch = v1.WatchEventsRequest(name=passing.name, options=v1.WatchOptions(keep_open=True))
        stream = served.runs.WatchEvents(watch)
        with capture_logs() as told:
            clock.now += SECOND
            await gone(stream)
        assert [event["event"] for event in told].count("service_restarted") == 1
    assert broken == []

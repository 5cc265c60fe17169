"""A session without an active run: the usage of a requested summary is counted, and a rewind completes."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from typing import Any, cast

import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.engine import rewind
from notecase_server.engine.caused import Caused
from notecase_server.engine.rewind import RACES
from notecase_server.models.contract import Delta, Finish, ModelRequest, Text, Used
from notecase_server.store.contract import Commit, Past, Query, SessionKey, Store

from tests.engine.rooms import House, Model, house, kinds
from tests.store.build import ManualClock, changed, put, refused, said
from tests.support.failing import Failing, Mode

TOOK = v1.Usage(input_tokens=5000, output_tokens=7, model_calls=1, model="m")


class Writer(Model):
    """Says what a summary has taken so far, and ends as `how` says."""

    how = "whole"

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        if not request.plain:
            async for delta in super().stream(request):
                yield delta
            return
        yield Text("They met.")
        yield Used(TOOK)
        self.arrived.release()
        match self.how:
            case "broken":
                raise errors.model_error("It broke.")
            case "waits":
                await asyncio.Event().wait()
        yield Finish("stop", TOOK)


async def talked(rooms: House) -> SessionKey:
    (key,) = await rooms.prepare()
    for run in ("one", "two"):
        await rooms.start(key, "Go", run)
        await rooms.ended(key, run)
    return key


@pytest.mark.parametrize("how", ["broken", "waits", "refused"])
async def test_what_a_summary_by_hand_took_is_counted_although_there_is_none(
    store: Store, clock: ManualClock, how: str
) -> None:
    model = Writer()

    def summarizes(commit: Commit) -> bool:
        return any(event.HasField("summarized") for event in commit.events)

    opened = store
    if how == "refused":
        refuse = partial(errors.sequence_mismatch, 9)
        opened = Failing(store, "commit", Mode.FOR_GOOD, refuse=refuse, counts=summarizes).store
    async with asyncio.timeout(60), house(opened, clock, model) as rooms:
        key = await talked(rooms)
        model.arrived, model.how = asyncio.Semaphore(0), how
        compacting = asyncio.create_task(rooms.runs.at_rest.compact(key, 1, "", Caused("c")))
        await model.arrived.acquire()
        if how == "waits":
            compacting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await compacting
        else:
            with refused("SEQUENCE_MISMATCH" if how == "refused" else "MODEL_ERROR"):
                await compacting
        session = await store.get_session(key)
        assert session is not None
        assert (5000, 7, 0) == (session.usage.input_tokens, session.usage.output_tokens, session.summary_sequence)
        last = (await rooms.log(key))[-1]
        assert (["usage"], "c", "first") == (kinds([last]), last.cause_id, last.usage.provider)


async def test_a_summary_by_hand_counts_once(store: Store, clock: ManualClock) -> None:
    async with asyncio.timeout(60), house(store, clock, Writer()) as rooms:
        key = await talked(rooms)
        made = await rooms.runs.at_rest.compact(key, 1, "", Caused("c"))
        assert ["summarized", "usage"] == kinds(made.events)
        assert (5000, 7) == (made.session.usage.input_tokens, made.session.usage.output_tokens)


class Written:
    """A store in which another caller writes to the session whenever its past has been read."""

    def __init__(self, store: Store) -> None:
        self.read = 0
        self.writes: list[asyncio.Task[object]] = []
        self.write: Callable[[int], Coroutine[Any, Any, object]] | None = None
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def read_past(self, key: SessionKey, at: int) -> Past:
        past = await self._store.read_past(key, at)
        if self.write is not None:
            self.read += 1
            self.writes.append(asyncio.create_task(self.write(self.read)))
            for _ in range(100):  # as far as it comes
                await asyncio.sleep(0)
        return past


@pytest.mark.parametrize("way", ["rewind", "start", "rollback"])
async def test_a_way_back_is_found_although_others_write_all_the_time(
    store: Store, clock: ManualClock, way: str
) -> None:
    """After a few tries they wait, and then go on."""
    written, model = Written(store), Model()
    async with asyncio.timeout(60), house(cast(Store, written), clock, model) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "Go", "one")
        await rooms.ended(key, "one")
        if way == "rollback":
            await rooms.start(key, "hold", "held")
            for _ in range(2):
                await model.arrived.acquire()

        def write(number: int) -> Coroutine[Any, Any, object]:
            change = v1.StateChanged(ops=[put(f"k{number}", number)])
            return rooms.sessions.commit(Commit(key=key, events=[v1.Event(state_changed=change)]))

        written.write = write
        match way:
            case "rewind":
                made = await rooms.runs.at_rest.rewind(key, 1, None, Caused())
                assert "rewound" in kinds(made.events)
            case "start":
                await rooms.start(key, "Go", "two", rewind_to_sequence=1)
            case _:
                await rooms.start(key, "Go", "two", on_busy=v1.StartRun.ON_BUSY_ROLLBACK)
        last = await asyncio.gather(*written.writes)
        written.write = None
        if way != "rewind":
            await rooms.ended(key, "two")
        assert RACES + 1 + (way == "rollback") == written.read
        assert len(last) == written.read
        log = await rooms.log(key)
        (mark,) = [number for number, event in enumerate(log) if event.HasField("rewound")]
        after = [op.key for event in log[mark:] for op in event.state_changed.ops if op.HasField("set")]
        assert [f"k{written.read}"] == after


async def test_what_puts_a_state_back_is_made_in_a_thread(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has an operation for each key that has changed since."""
    loop, made, make = threading.get_ident(), list[bool](), rewind._back

    def noted(*arguments: Any) -> rewind.Rewind:
        made.append(threading.get_ident() == loop)
        return make(*arguments)

    monkeypatch.setattr(rewind, "_back", noted)
    async with asyncio.timeout(60), house(store, clock) as rooms:
        (key,) = await rooms.prepare()
        await rooms.sessions.commit(Commit(key=key, events=[said("m1")]))
        head = (await rooms.log(key))[-1].sequence
        await rooms.sessions.commit(Commit(key=key, events=[changed(put(f"k{n}", n)) for n in range(3)]))
        await rooms.runs.at_rest.rewind(key, head, None, Caused())
        assert not (await store.list_state(key.state, Query(10)))[0].entries
    assert made == [False]

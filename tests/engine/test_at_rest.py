"""A session at rest: what a summary made by hand took is counted, whatever becomes of it."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.engine.roster import Caused
from notecase_server.models.contract import Delta, Finish, ModelRequest, Text, Used
from notecase_server.store.contract import Commit, SessionKey, Store

from tests.engine.rooms import House, Model, house, kinds
from tests.store.build import ManualClock, refused
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

    mismatch = {"refuse": lambda: errors.sequence_mismatch(9), "counts": summarizes}
    opened = Failing(store, "commit", Mode.FOR_GOOD, **mismatch).store if how == "refused" else store
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

"""Halts: each is answered, and cuts what is under way."""

import asyncio

import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.engine.halt import Halt, Halted, Halts
from notecase_server.errors import NotecaseError


async def test_a_halt_cuts_what_is_under_way() -> None:
    halts, ended = Halts(), list[str]()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("closed")

    async def worker() -> None:
        for _ in range(2):
            with pytest.raises(Halted):
                await halts.cut(work())
        ended.append("goes on")
        await asyncio.sleep(0)

    working = asyncio.create_task(worker())
    await asyncio.sleep(0)
    halts.add(Halt())
    halts.add(Halt())
    await working
    assert ["closed", "goes on"] == ended, "the second was never begun, since the halt still waits"
    assert not working.cancelling(), "the halts' own cancels are taken back"


async def test_an_interrupt_cuts_once_and_halts_nothing() -> None:
    halts = Halts()

    async def worker() -> str:
        with pytest.raises(Halted):
            await halts.cut(asyncio.Event().wait())
        return await halts.cut(asyncio.sleep(0, "done"))

    working = asyncio.create_task(worker())
    await asyncio.sleep(0)
    halts.interrupt()
    assert "done" == await working
    halts.interrupt()  # nothing is under way


async def test_cancelling_the_worker_is_not_taken_for_a_halt() -> None:
    halts = Halts()
    working = asyncio.create_task(halts.cut(asyncio.Event().wait()))
    await asyncio.sleep(0)
    halts.add(Halt())
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert working.cancelled()


async def test_work_that_is_done_although_it_was_cut_is_not_lost() -> None:
    halts = Halts()

    async def stubborn() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "done"
        raise AssertionError("it was cut")

    async def worker() -> str:
        done = await halts.cut(stubborn())
        await asyncio.sleep(0)  # no cancel is left for what comes next
        return done

    working = asyncio.create_task(worker())
    await asyncio.sleep(0)
    halts.add(Halt())
    assert "done" == await working


async def test_what_ends_as_cancelled_by_itself_has_failed() -> None:
    async def odd() -> None:
        raise asyncio.CancelledError

    with pytest.raises(NotecaseError) as failed:
        await Halts().cut(odd())
    assert v1.ERROR_REASON_MODEL_UNAVAILABLE == failed.value.reason


async def test_halts_without_a_worker_are_answered_once() -> None:
    halts, first, second = Halts(), Halt(), Halt()
    halts.add(first)
    halts.add(second)
    assert [first, second] == halts.pending
    second.refuse(errors.draining())
    halts.refuse_all(errors.worker_lost("s"))
    assert not halts.pending
    reasons = [error.reason for halt in (first, second) if isinstance(error := halt.done.exception(), NotecaseError)]
    assert [v1.ERROR_REASON_OWNER_LOST, v1.ERROR_REASON_SERVER_DRAINING] == reasons

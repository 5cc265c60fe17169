"""Halts: each is answered, and cuts what is under way."""

import asyncio

import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.engine.halt import Halt, Halted, Halts
from notecase_server.errors import NotecaseError


async def test_a_halt_cuts_what_is_under_way() -> None:
    halts = Halts()
    under_way = asyncio.create_task(asyncio.Event().wait())
    cutting = asyncio.create_task(halts.cut(under_way))
    await asyncio.sleep(0)
    halts.add(Halt())
    with pytest.raises(Halted):
        await cutting
    assert under_way.cancelled()
    with pytest.raises(Halted):
        await halts.cut(asyncio.create_task(asyncio.Event().wait()))


async def test_what_ends_as_cancelled_by_itself_has_failed() -> None:
    async def odd() -> None:
        raise asyncio.CancelledError

    with pytest.raises(NotecaseError) as failed:
        await Halts().cut(asyncio.create_task(odd()))
    assert v1.ERROR_REASON_MODEL_UNAVAILABLE == failed.value.reason


async def test_halts_that_nobody_carries_out_are_answered_once() -> None:
    halts, first, second = Halts(), Halt(), Halt()
    halts.add(first)
    halts.add(second)
    assert halts.first is first
    second.refuse(errors.draining())
    halts.refuse_all(errors.worker_lost("s"))
    assert not halts
    reasons = [error.reason for halt in (first, second) if isinstance(error := halt.done.exception(), NotecaseError)]
    assert [v1.ERROR_REASON_OWNER_LOST, v1.ERROR_REASON_SERVER_DRAINING] == reasons

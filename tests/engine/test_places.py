"""Places: no more are taken than there are, and who waits has a turn."""

import asyncio

import pytest
from notecase_server.engine.places import Places
from notecase_server.errors import NotecaseError


async def waiting(places: Places, tenant: str, order: list[str]) -> asyncio.Task[None]:
    async def wait() -> None:
        await places.wait(tenant)
        order.append(tenant)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    return task


async def test_a_place_is_taken_at_once_or_refused() -> None:
    places = Places(1)
    places.take()
    with pytest.raises(NotecaseError, match="1"):
        places.take()
    places.give_back()
    places.take()


async def test_tenants_have_their_turn_one_after_the_other() -> None:
    places, order = Places(1), list[str]()
    places.take()
    tasks = [await waiting(places, tenant, order) for tenant in ("a", "a", "a", "b", "c")]
    while tasks:
        places.give_back()
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        tasks = [left for left in tasks if not left.done()]
    assert ["a", "b", "c", "a", "a"] == order


async def test_a_new_run_does_not_overtake_waiting_ones() -> None:
    places, order = Places(1), list[str]()
    places.take()
    task = await waiting(places, "a", order)
    places.give_back()
    with pytest.raises(NotecaseError):
        places.take()
    await task
    places.give_back()
    assert not await places.wait("b")


@pytest.mark.parametrize("given", [False, True])
async def test_a_place_is_not_lost_with_its_waiter(given: bool) -> None:
    """Also when it was handed over just before the waiter went away."""
    places, order = Places(1), list[str]()
    places.take()
    task = await waiting(places, "a", order)
    if given:
        places.give_back()
    task.cancel()
    await asyncio.wait([task])
    if not given:
        places.give_back()
    places.take()
    assert [] == order

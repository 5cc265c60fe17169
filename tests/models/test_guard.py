"""Calls of one provider at once are bounded, and one that is down is left alone for a while."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import pytest
from notecase import v1
from notecase_server import errors
from notecase_server.config import ProviderSettings, Settings
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Delta, Finish, ModelRequest, Provider, Text
from notecase_server.models.guard import Breaker, Guarded
from notecase_server.serve import make_providers

REQUEST = ModelRequest("m", "", (), v1.Generation())


class Scripted:
    """A provider whose calls wait until the test releases them, with the given end."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: list[NotecaseError | None] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.closed = False

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        self.begun.append(request.model)
        await self.gate.wait()
        yield Text("a")
        end = self.ends.pop(0) if self.ends else None
        if end is not None:
            raise end
        yield Finish("stop", v1.Usage())

    async def close(self) -> None:
        self.closed = True


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


async def call(provider: Provider, model: str = "m") -> Sequence[Delta]:
    return [delta async for delta in provider.stream(REQUEST._replace(model=model))]


async def fails(provider: Provider) -> NotecaseError:
    with pytest.raises(NotecaseError) as failure:
        await call(provider)
    return failure.value


def down() -> NotecaseError:
    return errors.model_unavailable("It is down.")


async def rest() -> None:
    """Lets the others take all the steps that they can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_calls_above_the_bound_wait_for_their_turn_in_order() -> None:
    provider = Scripted()
    provider.gate.clear()
    guarded = Guarded(provider, 2, None)
    async with asyncio.TaskGroup() as group:
        for name in "abcd":
            group.create_task(call(guarded, name))
        await rest()
        assert ["a", "b"] == provider.begun
        provider.gate.set()
    assert ["a", "b", "c", "d"] == provider.begun


async def test_a_call_that_is_cut_while_it_waits_gives_its_turn_to_the_next() -> None:
    provider = Scripted()
    provider.gate.clear()
    guarded = Guarded(provider, 1, None)
    async with asyncio.TaskGroup() as group:
        group.create_task(call(guarded, "a"))
        await rest()
        cut = group.create_task(call(guarded, "b"))
        await rest()
        group.create_task(call(guarded, "c"))
        await rest()
        cut.cancel()
        provider.gate.set()
    assert ["a", "c"] == provider.begun


async def test_a_call_that_is_closed_in_the_middle_makes_room() -> None:
    provider = Scripted()
    guarded = Guarded(provider, 1, None)
    async with aclosing(guarded.stream(REQUEST)) as stream:
        await anext(stream)
    assert 2 == len(await asyncio.wait_for(call(guarded), 60))


async def test_a_provider_that_fails_again_and_again_is_left_alone_and_then_tried_once() -> None:
    provider, clock = Scripted(), Clock()
    guarded = Guarded(provider, 0, Breaker("big", 2, 30.0, clock))
    provider.ends = [down(), None, down(), down()]
    assert "It is down." == (await fails(guarded)).message
    await call(guarded)  # it is failures in a row that count
    assert "It is down." == (await fails(guarded)).message
    assert "It is down." == (await fails(guarded)).message
    clock.seconds = 10.0
    refused = await fails(guarded)
    assert (v1.ERROR_REASON_MODEL_UNAVAILABLE, 20.0, 0) == (refused.reason, refused.retry_after, refused.repeats)
    assert 4 == len(provider.begun)

    clock.seconds = 30.0
    provider.gate.clear()
    provider.ends = [down()]
    async with asyncio.TaskGroup() as group:
        tried = group.create_task(fails(guarded))
        await rest()
        assert 1.0 == (await fails(guarded)).retry_after  # one is tried, and no other meanwhile
        provider.gate.set()
    assert "It is down." == tried.result().message
    assert 5 == len(provider.begun)
    assert 30.0 == (await fails(guarded)).retry_after

    clock.seconds = 60.0
    await call(guarded)
    provider.ends = [down()]
    assert "It is down." == (await fails(guarded)).message
    await call(guarded)
    assert 8 == len(provider.begun)


async def test_a_try_that_is_cut_leaves_the_next_to_try() -> None:
    provider, clock = Scripted(), Clock()
    guarded = Guarded(provider, 0, Breaker("big", 1, 30.0, clock))
    provider.ends = [down()]
    await fails(guarded)
    clock.seconds = 30.0
    async with aclosing(guarded.stream(REQUEST)) as stream:
        await anext(stream)
    assert 2 == len(await call(guarded))


async def test_a_call_that_waited_for_its_turn_is_refused_when_the_breaker_opened_meanwhile() -> None:
    provider, clock = Scripted(), Clock()
    provider.gate.clear()
    provider.ends = [down()]
    guarded = Guarded(provider, 1, Breaker("big", 1, 30.0, clock))
    async with asyncio.TaskGroup() as group:
        first = group.create_task(fails(guarded))
        await rest()
        second = group.create_task(fails(guarded))
        await rest()
        provider.gate.set()
    assert ["It is down.", 30.0] == [first.result().message, second.result().retry_after]
    assert ["m"] == provider.begun


async def test_a_request_that_is_wrong_says_nothing_against_its_provider() -> None:
    provider = Scripted()
    guarded = Guarded(provider, 0, Breaker("big", 1, 30.0, Clock()))
    provider.ends = [errors.model_error("No such model.")]
    assert v1.ERROR_REASON_MODEL_ERROR == (await fails(guarded)).reason
    await call(guarded)
    await guarded.close()
    assert provider.closed


def never(make: Callable[[], Provider]) -> "asyncio.Task[Provider]":
    raise AssertionError("Nothing here takes long to load.")


async def test_what_the_settings_of_a_provider_bound_is_bounded() -> None:
    """A call that began before another one, and is not bound, has ended when that one has."""
    small = ProviderSettings(name="small", kind="offline", max_concurrent=1)
    other = ProviderSettings(name="other", kind="offline")
    provider, unbound = make_providers(Settings(listen="", providers=(small, other)), never).values()
    request = REQUEST._replace(messages=[v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text="Hello.")])])
    async with asyncio.TaskGroup() as group, aclosing(provider.stream(request)) as stream:
        await anext(stream)
        second = group.create_task(call(provider))
        await rest()
        await call(unbound)
        await rest()
        assert not second.done()

"""A process whose lease of the store does not hold starts no call of a model or a tool."""

import asyncio
from collections.abc import AsyncGenerator

from notecase import v1
from notecase_server.models.contract import Delta, ModelRequest
from notecase_server.store.contract import Unshared
from notecase_server.store.memory import MemoryStore
from notecase_server.tools.functions import tool

from tests.engine.rooms import Model, house, server_tool
from tests.store.build import ManualClock

acted: list[str] = []


class Shared(Unshared):
    """A lease that a test gives and takes."""

    def __init__(self) -> None:
        self.holds = False
        self.missed = asyncio.Semaphore(0)
        """Released each time that a task begins to wait for it."""
        self._given = asyncio.Event()

    async def held(self) -> None:
        self.missed.release()
        await self._given.wait()

    def give(self) -> None:
        self.holds = True
        self._given.set()

    def take(self) -> None:
        self.holds = False
        self._given.clear()


class Taking(Model):
    """Takes the lease while it replies."""

    def __init__(self, lease: Shared) -> None:
        super().__init__()
        self._lease = lease

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        self._lease.take()
        async for delta in super().stream(request):
            yield delta


@tool
async def act() -> str:
    acted.append("act")
    return "done"


async def test_calls_wait_until_the_lease_holds(store: MemoryStore, clock: ManualClock) -> None:
    """The call of the model, and that of the tool which it then makes."""
    acted.clear()
    store.lease = lease = Shared()
    model = Taking(lease)
    async with house(store, clock, model, tools=[__name__]) as rooms:
        (key,) = await rooms.prepare(tools=[server_tool("act")])
        await rooms.start(key, "call act")
        await lease.missed.acquire()
        assert [] == model.asked
        lease.give()
        await lease.missed.acquire()
        assert (["call act"], []) == (model.asked, acted)
        lease.give()
        run = await rooms.ended(key)
        assert v1.Run.STATE_SUCCEEDED == run.state
        assert (2, ["act"]) == (len(model.asked), acted)


async def test_a_run_that_waits_for_the_lease_is_cancelled(store: MemoryStore, clock: ManualClock) -> None:
    store.lease = lease = Shared()
    model = Model()
    async with house(store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        await rooms.start(key, "Hello")
        await lease.missed.acquire()
        await rooms.runs.commands.cancel(key, "r", v1.CancelCommand())
        assert v1.Run.STATE_CANCELLED == (await rooms.ended(key)).state
        assert [] == model.asked

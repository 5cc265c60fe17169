"""A caller with wrong keys, a thousand a second: `python -m benchmarks.guesses PORT`."""

import asyncio
import contextlib
import itertools
import secrets
import signal
import sys
import uuid

import grpc
import uvloop
from notecase import v1

A_SECOND = 1000

STEP = 0.01
"""Seconds between two bursts."""


class Guesser:
    """Calls with another wrong key each time."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.refused = self.wrong = 0
        self._sessions = v1.SessionServiceStub(channel)

    async def guess(self) -> None:
        key = f"nck_{uuid.uuid4()}_{secrets.token_urlsafe(44)}"
        try:
            await self._sessions.ListSessions(
                v1.ListSessionsRequest(), metadata=(("authorization", f"Bearer {key}"),), timeout=10
            )
            self.wrong += 1
        except grpc.aio.AioRpcError as error:
            refused = error.code() is grpc.StatusCode.UNAUTHENTICATED
            self.refused += refused
            self.wrong += not refused

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with asyncio.TaskGroup() as group:
            for burst in itertools.count():
                await asyncio.sleep(begun + burst * STEP - loop.time())
                for _ in range(round(A_SECOND * STEP)):
                    group.create_task(self.guess())


async def _call(port: int) -> None:
    loop = asyncio.get_running_loop()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        guesser = Guesser(channel)
        task, begun = asyncio.create_task(guesser.run()), loop.time()
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        sys.stdout.write(f"calling port {port}\n")
        sys.stdout.flush()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        seconds = loop.time() - begun
    sys.stdout.write(f"{guesser.refused / seconds:.0f} refusals a second, {guesser.wrong} other answers\n")


if __name__ == "__main__":
    uvloop.run(_call(int(sys.argv[1])))

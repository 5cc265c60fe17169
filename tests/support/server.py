"""Real servers for tests: one in this process over a real channel, or a spawned one that can be killed."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
from notecase import Client, v1
from notecase_server.auth.files import Files
from notecase_server.auth.principal import AuthContext, Authenticator, Metadata, Principal, Role
from notecase_server.config import Settings
from notecase_server.models.contract import Provider
from notecase_server.models.offline import OfflineProvider
from notecase_server.rpc.watch import Pace
from notecase_server.serve import Server, new_id, now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import Clock, Store
from notecase_server.tools.contract import Toolbox
from notecase_server.tools.toolbox import make_toolbox

from tests.support.forking import Forked

TENANT = "x-test-tenant"
"""The metadata by which a test says whose call it is, where it is not about credentials."""


class ByTenant:
    """Takes a caller's word for its tenant; with an empty one it is an operator."""

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal:
        tenant = str(metadata.get(TENANT, "default"))
        return Principal(tenant, "", Role.ADMIN if tenant else Role.OPERATOR)


@dataclass
class Running:
    """A server in this process, with stubs on a real channel."""

    server: Server
    address: str
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.agents = v1.AgentServiceStub(self.channel)
        self.sessions = v1.SessionServiceStub(self.channel)
        self.state = v1.StateServiceStub(self.channel)
        self.messages = v1.MessageServiceStub(self.channel)
        self.runs = v1.RunServiceStub(self.channel)
        self.blobs = v1.BlobServiceStub(self.channel)
        self.keys = v1.KeyServiceStub(self.channel)
        self.audit = v1.AuditServiceStub(self.channel)
        self.tenants = v1.TenantServiceStub(self.channel)
        self.info = v1.ServerServiceStub(self.channel)

    def client(self) -> Client:
        return Client(self.address)


@asynccontextmanager
async def running(
    store: str | Store = "memory:",
    providers: Mapping[str, Provider] | None = None,
    *,
    grace: float = 5.0,
    pace: Pace | None = None,
    toolbox: Toolbox | None = None,
    clock: Clock = now,
    authenticators: Sequence[Authenticator] = (ByTenant(),),
    files: Files | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    **others: Any,
) -> AsyncIterator[Running]:
    """Serves until the block is left, then stops as SIGTERM would. `store` by its address, or open; `credentials` are
    those of the channel, none for plain text; `others` are further settings by name."""
    kind = store if isinstance(store, str) else store.kind
    settings = Settings(store=kind, grace=grace, **{"listen": "127.0.0.1:0", "max_runs": 100, **others})
    server = Server(
        settings,
        await open_store(store, clock) if isinstance(store, str) else store,
        providers or {"offline": OfflineProvider()},
        toolbox or make_toolbox((), {}),
        authenticators=authenticators,
        pace=pace,
        make_id=new_id,
        clock=clock,
        files=files,
    )
    address = f"127.0.0.1:{await server.start()}"
    try:
        async with (
            grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
        ) as channel:
            yield Running(server, address, channel)
    finally:
        await server.stop()


class Spawned:
    """`notecase serve` as a separate process."""

    def __init__(self, process: asyncio.subprocess.Process | Forked, log: Path, address: str) -> None:
        self.process = process
        self.log = log
        self.address = address

    @classmethod
    async def start(
        cls,
        store: str,
        log: Path,
        *arguments: str,
        port: int = 0,
        env: Mapping[str, str] | None = None,
        forked: bool = False,
    ) -> Self:
        """Returns once it serves; its log goes to the file. Fails with the log when it ends before that.

        With `forked` it is not the command that is started; see tests/support/forking.py."""
        words = ("serve", "--listen", f"127.0.0.1:{port}", "--store", store, *arguments)
        if forked:
            return await cls.fork("notecase_server.cli", words, env or {}, log)
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "notecase_server", *words),
                env={**_environment(), **(env or {})},
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
            )
        return await cls._serving(process, log)

    @classmethod
    async def fork(cls, module: str, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> Self:
        """As `start`, of any module whose `main` serves, without the price of its imports."""
        return await cls._serving(await Forked.start(module, arguments, {**_environment(), **env}, log), log)

    @classmethod
    async def _serving(cls, process: asyncio.subprocess.Process | Forked, log: Path) -> Self:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        if not line.startswith("listening on port "):
            await process.wait()
            raise AssertionError(f"the server ended with {process.returncode}: {log.read_text()}")
        return cls(process, log, f"127.0.0.1:{line.split()[-1]}")

    async def kill(self) -> None:
        """SIGKILL: no time for anything."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
        await self._gone()

    async def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        await self._gone()
        assert self.process.returncode is not None
        return self.process.returncode

    async def _gone(self) -> None:
        assert self.process.stdout is not None
        await self.process.stdout.read()
        await self.process.wait()


def _environment() -> dict[str, str]:
    """The variables of this process, without settings of the user who runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "NOTECASE_"))}

"""Composition and life: opens the store, takes over what was left, serves, and stops without losing anything."""

import asyncio
import gc
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import structlog
import uuid_utils

from notecase_server import __version__, errors
from notecase_server.config import Settings
from notecase_server.engine.content import Contents, Limits
from notecase_server.engine.runs import Runs
from notecase_server.engine.schema import Schemas
from notecase_server.engine.session import Sessions
from notecase_server.engine.turn import Services
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Provider, Repeats
from notecase_server.models.offline import OfflineProvider
from notecase_server.rpc.interceptor import Authenticate, development
from notecase_server.rpc.pages import Pages
from notecase_server.rpc.run import Streams
from notecase_server.rpc.server import build
from notecase_server.rpc.services import Desk
from notecase_server.rpc.watch import Pace
from notecase_server.store import sqlite_file
from notecase_server.store.contract import Clock, Store, StoreOpenError
from notecase_server.store.memory import MemoryStore
from notecase_server.store.sqlite import SqliteStore
from notecase_server.tools.contract import Toolbox
from notecase_server.tools.toolbox import make_toolbox

log = structlog.get_logger()

REQUESTS_KEPT = 24 * 60 * 60 * 1_000_000
"""Microseconds that the record of a request_id is kept: longer than any client tries again."""

SWEEP_SECONDS = 600.0

EXPIRY_SECONDS = 1.0
"""How often it is looked for sessions whose time has come, and for what is left of deleted ones on disk."""


def now() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


def new_id() -> str:
    """A UUIDv7: names made by the server sort by the time they were made."""
    return str(uuid_utils.uuid7())


async def open_store(url: str, clock: Clock) -> Store:
    """`memory:` or `sqlite:PATH`. Raises StoreOpenError with a sentence for whoever started the server."""
    kind, _, path = url.partition(":")
    if kind == "memory" and not path:
        return MemoryStore(clock)
    if kind == "sqlite" and path:
        return await SqliteStore.open(path, clock)
    raise StoreOpenError(f"{url!r} is no store; want memory: or sqlite:PATH.")


def backup(url: str, destination: Path, force: bool) -> None:
    """Copies a store to a file while a server owns it. Raises StoreOpenError with a sentence for whoever asked."""
    kind, _, path = url.partition(":")
    if kind != "sqlite" or not path:
        raise StoreOpenError(f"{url!r} is no store with a file; want sqlite:PATH.")
    sqlite_file.backup(Path(path), destination, force)


def make_providers(settings: Settings) -> dict[str, Provider]:
    """By name, the default one first: the configured one, or else the offline one."""
    providers: dict[str, Provider] = {}
    if settings.openai is not None:
        # Its SDK takes most of a second to import; a server without it starts without it.
        from notecase_server.models.openai import OpenAIProvider  # noqa: PLC0415
        from notecase_server.models.profiles import read  # noqa: PLC0415

        given = settings.openai
        providers["openai"] = OpenAIProvider(
            given.api_key,
            given.base_url,
            given.default_model,
            connect_timeout=given.connect_timeout,
            first_timeout=given.first_timeout,
            idle_timeout=given.idle_timeout,
            whole_timeout=given.whole_timeout,
            profile=read(given.profile),
            clock=now,
        )
    providers["offline"] = OfflineProvider()
    return providers


class Server:
    """One server, from an open store to a closed one."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        providers: Mapping[str, Provider],
        toolbox: Toolbox,
        authenticate: Authenticate = development,
        pace: Pace | None = None,
        make_id: Callable[[], str] = new_id,
        clock: Clock = now,
    ) -> None:
        """`providers` by name, the default one first. The server closes them, the toolbox and the store."""
        pace = pace or Pace()
        self.port = 0
        self._settings = settings
        self._store = store
        self._providers = dict(providers)
        self._clock = clock
        self._authenticate = authenticate
        self._new_id = make_id
        self._stall = pace.stall
        limits = Limits(settings.max_blob_bytes, settings.max_session_bytes)
        self._contents = Contents(store, make_id, clock, limits)
        sessions = self._sessions = Sessions(store, limits.session)
        default = next(iter(self._providers.values()))
        self._toolbox = toolbox
        self._schemas = Schemas()
        given = settings.openai
        services = Services(
            store,
            {"": default, **self._providers},
            toolbox,
            self._contents,
            self._schemas,
            make_id,
            clock,
            Repeats(given.max_retries, given.retry_time) if given else Repeats(),
        )
        self._runs = Runs(sessions, services, settings.max_runs, pace.poll)
        self._streams = Streams(sessions, self._runs, pace)
        self._desk = Desk(
            version=__version__,
            store=store,
            sessions=sessions,
            runs=self._runs,
            streams=self._streams,
            providers=tuple(self._providers),
            toolbox=toolbox,
            schemas=self._schemas,
            pages=Pages(store.secret),
            contents=self._contents,
            new_id=make_id,
        )

    async def start(self) -> int:
        """Takes over the runs that were left, and serves; returns the port. Raises RuntimeError when the address is
        taken."""
        self._grpc, self._health = await build(self._desk, self._authenticate, self._new_id, self._stall)
        self.port = self._grpc.add_insecure_port(self._settings.listen)
        await self._runs.take_over()
        await self._grpc.start()
        self._sweeper = asyncio.create_task(self._sweep())
        log.info("server_started", listen=self._settings.listen, port=self.port, store=self._store.kind)
        return self.port

    async def stop(self) -> None:
        """Takes nothing new, brings runs to their next commit or leaves them to the next start, tells the streams, and
        closes the store. At most about `grace` seconds."""
        grace = self._settings.grace
        log.info("server_draining", grace=grace)
        await self._health.stop()
        self._streams.drain.begin(grace)
        await self._runs.drain(grace)
        await self._contents.drain()
        self._streams.drain.close()
        await self._grpc.stop(1.0)
        self._sweeper.cancel()
        with suppress(asyncio.CancelledError):
            await self._sweeper
        for provider in self._providers.values():
            await provider.close()
        await self._toolbox.close()
        await self._schemas.close()
        await self._store.close()
        log.info("server_stopped")

    async def _sweep(self) -> None:
        """Deletes what has had its time, and what is left of it on disk."""
        loop = asyncio.get_running_loop()
        next_sweep = loop.time()
        while True:
            try:
                if gone := await self._sessions.expire(self._clock()):
                    log.info("sessions_expired", sessions=gone)
                if loop.time() >= next_sweep:
                    await self._store.forget_requests(self._clock() - REQUESTS_KEPT)
                    if removed := await self._contents.sweep():
                        log.info("blobs_removed", blobs=removed)
                    next_sweep = loop.time() + SWEEP_SECONDS
                await self._store.scrub()
            except NotecaseError as error:
                log.warning("sweep_failed", reason=errors.reason_name(error.reason))
            except Exception:  # a defect here is no reason to keep everything for ever
                log.exception("sweep_crashed")
            await asyncio.sleep(EXPIRY_SECONDS)


async def serve(settings: Settings, ready: Callable[[int], None] = lambda port: None) -> None:
    """Serves until SIGTERM or SIGINT."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    providers = make_providers(settings)  # first, since a bad key or address is no reason to open the store
    toolbox = make_toolbox(settings.tools, settings.mcp_servers)
    server = Server(settings, await open_store(settings.store, now), providers, toolbox)
    port = await server.start()
    # What is loaded by here stays for good, and need not be looked at each time that garbage is collected.
    gc.collect()
    gc.freeze()
    ready(port)
    await asked.wait()
    await server.stop()

"""Composes a server and runs it: opens the store, takes over unfinished runs, serves, and stops without losing
anything."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import structlog
import uuid_utils
from notecase import v1

from notecase_server import __version__, allocator, names
from notecase_server.auth.certificates import Certificates
from notecase_server.auth.chain import Chain
from notecase_server.auth.files import Files, Watched
from notecase_server.auth.keys import Keys
from notecase_server.auth.principal import Authenticator
from notecase_server.auth.principals import Principals
from notecase_server.auth.settings import read_client_principals, read_issuers, read_networks
from notecase_server.auth.tables import Mistake, SettingsError
from notecase_server.auth.tenants import Tenants
from notecase_server.config import OFFLINE, ProviderSettings, Settings, exposure_mistakes, variable
from notecase_server.engine.arrivals import Arrivals
from notecase_server.engine.content import Contents, Limits
from notecase_server.engine.places import Places
from notecase_server.engine.runs import Runs
from notecase_server.engine.schema import Schemas
from notecase_server.engine.services import NamedProvider, Services
from notecase_server.engine.sessions import Sessions
from notecase_server.engine.tenancy import Tenancy
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Provider, Repeats
from notecase_server.models.deferred import Deferred
from notecase_server.models.guard import Breaker, Guarded
from notecase_server.models.offline import OfflineProvider
from notecase_server.rpc.desk import Desk
from notecase_server.rpc.gate import Gate
from notecase_server.rpc.interceptor import Doorway
from notecase_server.rpc.mentions import Mentions
from notecase_server.rpc.pages import Pages
from notecase_server.rpc.peers import Peers
from notecase_server.rpc.refusals import Refusals
from notecase_server.rpc.run import Streams
from notecase_server.rpc.server import build, options
from notecase_server.rpc.watch import Pace
from notecase_server.serve_ports import ListenError, listen
from notecase_server.serve_standby import Standby
from notecase_server.serve_stores import DATABASE, Database, open_store
from notecase_server.store.contract import Answer, AuditRow, Clock, Once, Quotas, Store, StoreOpenError
from notecase_server.supervisor import STUCK_SECONDS, Supervisor, Tasks, is_passing, patiently, to_the_end
from notecase_server.tools.contract import Toolbox
from notecase_server.tools.toolbox import make_toolbox

if TYPE_CHECKING:
    from notecase_server.auth.tls import Identity

log = structlog.get_logger()

REQUESTS_KEPT = 24 * 60 * 60 * 1_000_000
"""Microseconds that the record of a request_id is kept: longer than any client retries."""

DAY = 24 * 60 * 60 * 1_000_000
"""Microseconds."""

SWEEP_SECONDS = 600.0

EXPIRY_SECONDS = 1.0
"""How often expired sessions are deleted, and the remains of deleted sessions on disk."""

SWITCH_SECONDS = 0.001
"""How long a thread may go on while another waits for the interpreter, a fifth of Python's default. A commit takes the
interpreter again after each of its statements, so while a thread replays an import it can wait that long each time."""

TRIM_SECONDS = 10.0
"""How often free memory is returned to the system. Otherwise glibc keeps the memory of a burst of answers or
connections forever. Takes about 2 ms of a thread."""

PROBE_SECONDS = 5.0
"""How often a small write checks whether the store accepts writes. Health depends on it."""

YOUNG_OBJECTS = 3000
"""New objects after which garbage is looked for among them. With Python's own 700 that takes a hundredth of a turn."""

OLD_COLLECTIONS = 1
"""After how many collections of young objects the old ones are searched for garbage, too. A call that was open during
such a collection becomes old garbage in a cycle when it ends, and keeps memory of grpc's. With Python's default of 10,
and with the objects of the start counted as old, the calls of half an hour stayed in memory, some 15 MiB."""

LAST_CALLS_SECONDS = 0.5
"""How long calls may continue after the runs have stopped, and how long clients may take to receive the status of the
others."""


BOOTSTRAP = "notecase keys bootstrap"
"""How the audit names what made a first key: no method did."""


class ProviderSettingsError(Exception):
    """A provider cannot be used as it is configured; the text is a sentence for the user who starts the server."""


def now() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


def new_id() -> str:
    """A UUIDv7: names made by the server sort by the time they were made."""
    return str(uuid_utils.uuid7())


def new_uid() -> str:
    """Returns a UUIDv4, which reveals nothing, not even when the session was created."""
    return str(uuid_utils.uuid4())


def tenant_problem(tenant: str) -> str:
    """Says what is wrong with the id of a tenant; empty where nothing is."""
    return "" if names.is_id(tenant) else f"A tenant {names.ID_RULE}."


def bootstrap(url: str, tenant: str, name: str, database: Database = DATABASE) -> tuple[v1.Key, str]:
    """Creates an admin's key for the tenant, or an operator's if the tenant is empty, in a store that no server has
    open. Returns the key, and the text to send in calls. Raises StoreOpenError."""
    if url == "memory:":
        raise StoreOpenError("A store in memory has no keys at first; set NOTECASE_ADMIN_KEY.")

    async def make() -> tuple[v1.Key, str]:
        store = await open_store(url, now, database)
        try:
            key = v1.Key(display_name=name, role=v1.Key.ROLE_ADMIN if tenant else v1.Key.ROLE_OPERATOR)
            told = AuditRow(tenant, v1.AuditEntry(method=BOOTSTRAP, outcome="OK", call_count=1))
            once = Once.unnamed(tenant, new_id(), Answer("made_key"))._replace(audit=told)
            return await Keys(store, new_id, now, time.monotonic).create(tenant, key, once)
        except NotecaseError as error:
            raise StoreOpenError(error.message) from None
        finally:
            await store.close()

    return asyncio.run(make())


MAKING = threading.Lock()

Later = Callable[[Callable[[], Provider]], "asyncio.Task[Provider]"]
"""Begins a task that makes a provider, once there is time for that."""


def make_providers(settings: Settings, later: Later) -> dict[str, Provider]:
    """Makes the providers by name, the default one first; what takes long is made `later`. Raises ProviderSettingsError
    for a key or an address that cannot be used."""
    return {one.name: _guarded(_made(one, later), one) for one in settings.providers or (OFFLINE,)}


def _made(given: ProviderSettings, later: Later) -> Provider:
    check_provider(given)
    if given.kind == "offline":
        return make_provider(given)
    return Deferred(given.name, later(partial(_make_alone, given)))


def _make_alone(given: ProviderSettings) -> Provider:
    """Makes one provider at a time: msgspec crashes the process when two threads use one of its types for the first
    time (17 of 30 starts with four providers and a short switch interval; 0 of 30 so)."""
    with MAKING:
        return make_provider(given)


def _guarded(provider: Provider, given: ProviderSettings) -> Provider:
    """Wraps a provider in its limits if it has any. Without limits there is no wrapper, which would cost a step for
    each piece of a reply."""
    name, failures = given.name, given.breaker_failures
    breaker = Breaker(name, failures, given.breaker_seconds, time.monotonic) if failures else None
    return Guarded(provider, given.max_concurrent, breaker) if breaker or given.max_concurrent else provider


def check_provider(given: ProviderSettings) -> None:
    """Raises ProviderSettingsError for a key, a header, an address or a profile that cannot be used."""
    if given.kind == "offline":
        return
    from notecase_server.models.endpoint import endpoint_of  # noqa: PLC0415  # as in `make_provider`
    from notecase_server.models.profiles import read  # noqa: PLC0415

    try:
        endpoint_of(given.api_key, given.base_url, given.headers)
        read(given.profile)
    except ValueError as error:
        raise ProviderSettingsError(f"The {given.name} provider cannot be used: {error}.") from None


def make_provider(given: ProviderSettings) -> Provider:
    """Makes one provider. Raises ProviderSettingsError as `check_provider` does."""
    check_provider(given)
    if given.kind == "offline":
        return OfflineProvider()
    # Its SDK takes half a second to import; a server without it never does.
    from notecase_server.models.openai import OpenAIProvider  # noqa: PLC0415
    from notecase_server.models.profiles import read  # noqa: PLC0415

    return OpenAIProvider(
        given.api_key,
        given.base_url,
        given.default_model,
        key_source=given.key_source,
        model_source=given.model_source,
        headers=given.headers,
        connect_timeout=given.connect_timeout,
        first_timeout=given.first_timeout,
        idle_timeout=given.idle_timeout,
        whole_timeout=given.whole_timeout,
        profile=read(given.profile),
        clock=now,
    )


def settings_mistakes(settings: Settings) -> list[Mistake]:
    """Returns all that is wrong with how a server is exposed, and with the files that this takes."""
    found = list(exposure_mistakes(settings))
    reads: list[Callable[[], object]] = [
        lambda: _watch_identity(settings, Files()),
        lambda: settings.client_principals and read_client_principals(settings.client_principals),
        lambda: settings.issuers and read_issuers(settings.issuers),
        lambda: read_networks(settings.behind_tls_proxy),
    ]
    for read in reads:
        try:
            read()
        except SettingsError as error:
            found.extend(error.mistakes)
    return found


def _watch_identity(settings: Settings, files: Files) -> "Watched[Identity] | None":
    """Reads the server's certificate, if it has one, now and when it changes. Raises SettingsError."""
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if cert is None or key is None:
        return None
    from notecase_server.auth.tls import read_identity  # noqa: PLC0415  # cryptography is imported where there is TLS

    paths = [path for path in (cert, key, client_ca) if path is not None]
    return files.watch(paths, lambda: read_identity(cert, key, client_ca, now))


def make_authenticators(settings: Settings, files: Files, fetches: Tasks) -> list[Authenticator]:
    """Makes what judges the credentials of calls. Watches their files, and fetches keys in tasks that `fetches` owns.
    Raises SettingsError."""
    found: list[Authenticator] = []
    if (path := settings.client_principals) is not None:
        found.append(Certificates(files.watch([path], lambda: read_client_principals(path)), now))
    elif settings.listed_principals:
        found.append(Certificates(files.watch([], lambda: settings.listed_principals), now))
    if settings.has_issuers:
        from notecase_server.auth.jwks import file_problem  # noqa: PLC0415  # as for cryptography
        from notecase_server.auth.tokens import Tokens  # noqa: PLC0415

        issuers = read_issuers(settings.issuers) if settings.issuers else settings.listed_issuers
        found.append(Tokens(issuers, fetches, now, time.monotonic))
        for issuer in issuers:
            # Not an error: the file is read again when a token needs it.
            if issuer.jwks_file is not None and (problem := file_problem(issuer.jwks_file)):
                log.warning("issuer_keys_unavailable", issuer=issuer.issuer, problem=problem)
    return found


class ServerBrokenError(Exception):
    """What ended the server: a part that it cannot do without broke again and again, or another server has become the
    owner of its store. The text is for the operator."""


class Server:
    """One server, from an open store to a closed one."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        providers: Mapping[str, Provider],
        toolbox: Toolbox,
        authenticators: Sequence[Authenticator] = (),
        pace: Pace | None = None,
        make_id: Callable[[], str] = new_id,
        clock: Clock = now,
        files: Files | None = None,
    ) -> None:
        """`providers` are by name, the default one first. The server closes them, the toolbox and the store, and
        watches `files`. Without `authenticators`, and if the settings require no credentials, every caller is the admin
        of one tenant until the store has a key; otherwise the keys of the store are accepted, too. Raises SettingsError
        for the files of TLS and for proxies that are not addresses."""
        pace = pace or Pace()
        self.port = 0
        self.mtls_port = 0
        """The port for callers with certificates; 0 where there is none."""
        self._settings = settings
        self._store = store
        store.quotas = Quotas(
            sessions=settings.max_sessions,
            agents=settings.max_agents,
            revisions=settings.max_revisions,
            state_keys=settings.max_state_keys,
            events=settings.max_session_events,
            log_bytes=settings.max_session_log_bytes,
            blob_bytes=settings.max_tenant_blob_bytes,
            uploads=settings.max_uploads,
            requests=settings.max_requests,
        )
        self._providers = dict(providers)
        self._clock = clock
        self.arrivals = Arrivals(settings.max_imports, settings.max_import_bytes)
        self.heavy = Places(settings.max_heavy_reads)
        peers = Peers(read_networks(settings.behind_tls_proxy))
        self.gate = Gate(settings.max_calls, settings.max_unread_bytes, settings.max_request_bytes, peers)
        self._files = files or Files()
        self._identity = _watch_identity(settings, self._files)
        self._keys = Keys(store, make_id, clock, time.monotonic, settings.admin_key)
        is_open = not (authenticators or settings.has_credentials)
        chain = Chain((self._keys, *authenticators), open_until=self._keys if is_open else None)
        self._tenants = Tenants(store, time.monotonic)
        own = Mentions(store).require_own
        self._principals = Principals(store, make_id)
        self._refusals = Refusals(store, self._principals)
        self._doorway = Doorway(
            chain, make_id, pace.stall, self.gate, own, self._tenants, self._principals, self._refusals.note
        )
        limits = Limits(settings.max_blob_bytes, settings.max_session_bytes)
        self._contents = Contents(store, make_id, clock, limits)
        sessions = self._sessions = Sessions(store, make_id, new_uid, limits.session)
        self._toolbox = toolbox
        self._schemas = Schemas()
        self._supervisor = Supervisor(make_id)
        repeats = {given.name: Repeats(given.max_retries, given.retry_time) for given in settings.providers}
        named = {
            name: NamedProvider(name, provider, repeats.get(name, Repeats()))
            for name, provider in self._providers.items()
        }
        services = Services(
            store=store,
            providers={"": next(iter(named.values())), **named},
            toolbox=toolbox,
            contents=self._contents,
            schemas=self._schemas,
            supervisor=self._supervisor,
            places=Places(settings.max_runs),
            new_id=make_id,
            clock=clock,
            lease=store.lease,
        )
        self._runs = Runs(sessions, services, pace.poll)
        self._tenancy = Tenancy(store, sessions, self._runs, self._removed)
        self.streams = Streams(sessions, self._runs, self._supervisor, pace, self._refusals)
        self._desk = Desk(
            version=__version__,
            requests=store,
            sessions=sessions,
            runs=self._runs,
            max_runs=settings.max_runs,
            streams=self.streams,
            providers=tuple(self._providers),
            toolbox=toolbox,
            schemas=self._schemas,
            pages=Pages(store.secret),
            contents=self._contents,
            arrivals=self.arrivals,
            principals=self._principals,
            heavy=self.heavy,
            new_id=make_id,
        )

    def _removed(self, tenant: str) -> None:
        self._keys.forget()
        self._principals.forget()
        self._tenants.changed(tenant)

    @property
    def broken(self) -> asyncio.Event:
        """Set when a part of the server that it cannot do without has given up."""
        return self._supervisor.broken

    async def lost(self) -> str:
        """Returns the name of another server, or nothing, once that owns the store: this one can write nothing more."""
        return await self._store.lease.lost()

    async def start(self) -> int:
        """Serves, and takes over the runs that were left; returns the port. Raises ListenError when an address is
        taken, and lets go of the store then."""
        channel = options(self._settings.max_calls, self._settings.max_connections)
        self._grpc, self._health = await build(
            self._desk, self._store, self._keys, self._tenants, self._tenancy, self._doorway, channel
        )
        try:
            self.port, self.mtls_port = listen(self._grpc, self._settings, self._identity)
        except ListenError:
            await self._store.close()
            raise
        await self._grpc.start()
        self._runs.upkeep.start()
        self._supervisor.service("sweeper", self._sweep)
        self._supervisor.service("prober", self._probe)
        self._supervisor.service("judge", self._doorway.keep_judging)
        self._supervisor.service("mover", self._doorway.keep_moving)
        self._supervisor.service("refusals", self._refusals.keep_writing)
        self._supervisor.service("files", self._files.keep_looking)
        self._supervisor.service("tenancy", self._tenancy.keep_looking)
        self._supervisor.service("removals", self._tenancy.keep_removing)
        log.info(
            "server_started",
            version=__version__,
            listen=self._settings.listen,
            port=self.port,
            store=self._store.kind,
            providers=", ".join(self._providers),
            tls=self._settings.tls_by,
            auth=", ".join(self._settings.credentials) or "none",
        )
        if self._settings.insecure:
            log.warning("server_insecure", problem="Everybody who reaches the port may do all.")
        return self.port

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """Accepts nothing new, brings runs to their next commit or leaves them to the next start, notifies the streams
        and all other calls, and closes the store, even if one of these steps fails. Takes about `grace` seconds at
        most; runs are left at once when `hurry` is set."""
        grace = self._settings.grace
        log.info("server_draining", grace=grace)
        async with AsyncExitStack() as then:
            then.push_async_callback(self._store.close)
            then.push_async_callback(self._refusals.close)
            then.push_async_callback(self._schemas.close)
            then.push_async_callback(self._toolbox.close)
            for provider in self._providers.values():
                then.push_async_callback(provider.close)
            then.push_async_callback(self._grpc.stop, LAST_CALLS_SECONDS)
            then.push_async_callback(self._doorway.close, LAST_CALLS_SECONDS)
            await self._health.stop()
            self.streams.drain.begin(grace)
            await self._drain(grace, hurry or asyncio.Event())
            await self._contents.drain()
            self.streams.drain.close()
        log.info("server_stopped")

    async def _drain(self, grace: float, hurry: asyncio.Event) -> None:
        waits = Tasks("stop")
        try:
            draining = waits.start(self._runs.drain(grace), "drain")
            await asyncio.wait([draining, waits.start(hurry.wait(), "hurry")], return_when=asyncio.FIRST_COMPLETED)
            if not draining.done():
                log.info("server_draining", grace=0)
                await self._runs.drain(0)
            await draining
        finally:
            await waits.close()

    async def _probe(self) -> None:
        """Tells health whether the store takes writes."""
        serving = True
        while True:
            problem, broken = "", None
            try:
                await self._store.probe()
            except NotecaseError as error:
                problem = error.message
            except Exception as error:  # noqa: BLE001 - health shows it, and it is logged
                problem, broken = "The store cannot be asked; this is a defect.", error
            if bool(problem) == serving:
                serving = not problem
                await self._health.tell(serving)
                if serving:
                    log.info("health_serving")
                else:
                    log.error("health_not_serving", problem=problem, exc_info=broken)
            await asyncio.sleep(PROBE_SECONDS)

    async def _sweep(self) -> None:
        """Deletes expired data and its remains on disk, and returns free memory to the system."""
        loop = asyncio.get_running_loop()
        next_sweep = next_trim = loop.time()
        while True:
            if gone := await self._sessions.expire(self._clock()):
                log.info("sessions_expired", sessions=gone)
            await self._store.sweep_sessions()
            await self._store.sweep_agents()
            if loop.time() >= next_sweep:
                next_sweep = loop.time() + SWEEP_SECONDS
                await self._store.forget_requests(self._clock() - REQUESTS_KEPT)
                if self._settings.audit_days:
                    await self._store.forget_audit(self._clock() - self._settings.audit_days * DAY)
                if removed := await self._contents.sweep():
                    log.info("blobs_removed", blobs=removed)
            await self._store.scrub()
            if loop.time() >= next_trim:
                next_trim = loop.time() + TRIM_SECONDS
                await asyncio.to_thread(allocator.trim)
            await asyncio.sleep(EXPIRY_SECONDS)


def run(settings: Settings, ready: Callable[[Server], None] = lambda server: None) -> None:
    """Serves until a signal, as `serve` does. Code of tools that will not stop does not keep the process from ending:
    what matters is on record by then. Raises what `serve` raises."""
    import uvloop  # noqa: PLC0415  # what else is here needs no loop of its own: a backup is made without one

    if not variable("MALLOC_ARENA_MAX"):
        allocator.share_arenas()
    sys.setswitchinterval(SWITCH_SECONDS)
    failed = True
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    try:
        to_the_end(runner.get_loop(), serve(settings, ready))
        failed = False
    finally:
        if stuck := to_the_end(runner.get_loop(), _end_everything()):
            log.error("server_left", stuck=stuck, exc_info=failed)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(failed))
        runner.close()


async def _end_everything() -> list[str]:
    """Ends everything left in the process after a server has stopped. Returns the names of tasks that do not end."""
    left = Tasks("process")
    threads = left.start(asyncio.get_running_loop().shutdown_default_executor(), "threads")
    tasks = asyncio.all_tasks() - {asyncio.current_task(), threads}
    for task in tasks:
        task.cancel()
    _, stuck = await asyncio.wait({threads, *tasks}, timeout=STUCK_SECONDS)
    return sorted(task.get_name() for task in stuck)


async def make_server(settings: Settings, fetches: Tasks, later: Later) -> Server:
    """Makes the server that the settings describe, over its store, once it owns that. `fetches` owns what gets the keys
    of identity providers; providers that take long to load are made `later`.

    Raises SettingsError, StoreOpenError, ProviderSettingsError and ToolSettingsError, whose texts are for the
    operator."""
    providers = make_providers(settings, later)  # first: a bad key or address must fail before the store is opened
    toolbox = make_toolbox(settings.tools, settings.mcp_servers)
    files = Files()
    authenticators = make_authenticators(settings, files, fetches)
    identity, peers = _watch_identity(settings, Files()), Peers(read_networks(settings.behind_tls_proxy))
    standby = Standby(settings, peers, lambda server: listen(server, settings, identity)[0], new_id)

    async def wait() -> None:
        gc.enable()  # this may take days
        await standby.begin()

    async with AsyncExitStack() as failing:
        failing.push_async_callback(standby.end)
        store = await open_store(settings.store, now, _database(settings), None if settings.no_wait else wait)
        failing.push_async_callback(store.close)
        await standby.end()
        try:
            keyed = await patiently(store.is_keyed, is_passing, settings.store_lease)
        except NotecaseError as error:
            raise StoreOpenError(error.message) from None
        if keyed:
            settings = replace(settings, auth="keys")
            if settings.insecure:
                text = "This store has had keys, and would be open to everybody: leave this out, or use another store."
                raise SettingsError([Mistake("--insecure", text)])
        server = Server(settings, store, providers, toolbox, authenticators=authenticators, files=files)
        failing.pop_all()
        return server


def _database(settings: Settings) -> Database:
    return Database(
        password_file=settings.store_password_file,
        connections=settings.store_connections,
        lease=settings.store_lease,
        migrate=not settings.no_migrate,
        prepared=not settings.no_prepared,
    )


async def _load(make: Callable[[], Provider], serving: asyncio.Event) -> Provider:
    """Makes a provider in a thread, once the server serves: modules are loaded in pieces of some milliseconds."""
    await serving.wait()
    gc.disable()  # see `Lazy`: nothing of this is garbage
    try:
        return await asyncio.to_thread(make)
    finally:
        gc.freeze()
        gc.enable()


async def serve(settings: Settings, ready: Callable[[Server], None] = lambda server: None) -> None:
    """Serves until SIGTERM, SIGINT or, unless that is ignored, SIGHUP, and calls `ready` once it does; a second signal
    ends the time that runs have to come to their next commit. Raises ServerBrokenError for what ended it, and what
    `make_server` raises."""
    asked, serving = asyncio.Event(), asyncio.Event()
    fetches, loads, ends = Tasks("auth"), Tasks("models"), Tasks("serve")
    loop = asyncio.get_running_loop()
    stopping = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it: the server outlives its terminal
        stopping.append(signal.SIGHUP)
    gc.disable()
    try:
        async with asyncio.timeout(None) as making:
            for number in stopping:
                loop.add_signal_handler(number, making.reschedule, 0)
            server = await make_server(settings, fetches, lambda make: loads.start(_load(make, serving)))
        for number in stopping:
            loop.add_signal_handler(number, asked.set)
        await server.start()
        # Objects loaded by now stay as long as the process: garbage collections need not look at them.
        gc.collect()
        gc.freeze()
        gc.collect()  # old objects are searched once a quarter as many have become old; frozen objects do not count
        gc.set_threshold(YOUNG_OBJECTS, 10, OLD_COLLECTIONS)
    except TimeoutError:
        if not making.expired():
            raise
        await fetches.close()
        await loads.close()
        return
    finally:
        gc.enable()
    ready(server)
    serving.set()
    lost = ends.start(server.lost(), "lost")
    await asyncio.wait(
        [ends.start(asked.wait(), "asked"), ends.start(server.broken.wait(), "broken"), lost],
        return_when=asyncio.FIRST_COMPLETED,
    )
    await ends.close()
    hurry = asyncio.Event()
    for number in stopping:
        loop.add_signal_handler(number, hurry.set)
    await server.stop(hurry)
    await fetches.close()
    await loads.close()
    if not lost.cancelled():
        raise ServerBrokenError(f"{lost.result() or 'Another server'} now owns the store.")
    if server.broken.is_set():
        raise ServerBrokenError("A part of the server failed repeatedly; the log says which.")

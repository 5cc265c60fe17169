"""The client for programs without an event loop: the same names, arguments and errors, and every call blocks.

    from notecase.sync import Client

    with Client() as client:
        client.put_agent("detective", "You are a detective.")
        print(client.invoke("Where is the violin?", agent="detective").text)

It runs the asynchronous client on an event loop in a separate thread, with the same promises.
"""

import asyncio
import atexit
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from os import PathLike
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, cast

import grpc
from google.protobuf import descriptor_pool

from notecase import client as aio
from notecase import stream as aio_stream
from notecase import v1
from notecase.connection import Token
from notecase.errors import NotecaseError
from notecase.reply import Parsed, Reply
from notecase.retry import Retry
from notecase.view import SessionView

P = ParamSpec("P")
T = TypeVar("T")

_END: Any = object()

log = logging.getLogger("notecase")

CANCEL_SECONDS = 2.0
"""How long a program that is ended by Ctrl-C waits for the server to cancel its run."""


class _Loop:
    """An event loop in a separate thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="notecase", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._loop.run_forever()
                return
            except (SystemExit, KeyboardInterrupt):
                log.exception("A task in the client's event loop asked the program to exit.")

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end; whatever interrupts the wait, Ctrl-C for example, cancels it.

        Raises RuntimeError when the loop is closed, and on the loop's own thread and in a forked process, where the
        wait would have no end."""
        if problem := self._problem():
            coroutine.close()
            raise RuntimeError(problem)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _problem(self) -> str:
        if self._loop.is_closed():
            return "the client is closed"
        if not self._thread.is_alive():
            return "a forked process cannot use the client of its parent: create another after the fork"
        if threading.current_thread() is self._thread:
            return "an asynchronous tool cannot use this client"
        return ""

    def iterate(self, iterator: AsyncIterator[T]) -> Iterator[T]:
        """Yields what an asynchronous iterator yields, and closes it when it is left early."""

        async def advance() -> T:
            return await anext(iterator, cast("T", _END))

        async def close() -> None:
            end = getattr(iterator, "aclose", None)
            await end() if end else cast("Any", iterator).cancel()

        entry = _END
        try:
            while (entry := self.run(advance())) is not _END:
                yield entry
        finally:
            if entry is not _END:
                with suppress(RuntimeError):  # the client is closed, or its own thread collects what was left
                    self.run(close())

    def close(self) -> None:
        """Cancels what is under way and ends the thread. May be called twice."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return

        async def finish() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.run(finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Facade(Protocol):
    _loop: _Loop
    _inner: Any


def _blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["_Facade", P], T]:
    """Makes a blocking method of an asynchronous one."""

    @wraps(method)
    def call(self: _Facade, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.run(method(self._inner, *args, **kwargs))

    return call


def _iterating(
    method: Callable[Concatenate[Any, P], AsyncIterator[T]],
) -> Callable[Concatenate["_Facade", P], Iterator[T]]:
    """Makes a method that returns an iterator of one that returns an asynchronous one."""

    @wraps(method)
    def call(self: _Facade, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._loop.iterate(method(self._inner, *args, **kwargs))

    return call


def _following(
    method: Callable[Concatenate[Any, P], aio_stream.RunStream[Parsed]], *, starts: bool = False
) -> Callable[Concatenate["_Facade", P], "RunStream[Parsed]"]:
    @wraps(method)
    def call(self: _Facade, /, *args: P.args, **kwargs: P.kwargs) -> RunStream[Parsed]:
        return RunStream(self._loop, method(self._inner, *args, **kwargs), starts=starts)

    return call


def _invoking(
    method: Callable[Concatenate[aio.Client, P], Coroutine[Any, Any, Reply[Parsed]]],
) -> Callable[Concatenate["_Facade", P], Reply[Parsed]]:
    """Makes the blocking `invoke`, in which Ctrl-C cancels the run."""

    @wraps(method)
    def call(self: _Facade, /, *args: P.args, **kwargs: P.kwargs) -> Reply[Parsed]:
        stream = self._inner.run(*args, **kwargs, options=aio.DURABLE)
        try:
            reply: Reply[Parsed] = self._loop.run(self._inner._reply_of(stream))
            return reply
        except KeyboardInterrupt:
            _cancel(self._loop, stream)
            raise

    return call


def _cancel(loop: _Loop, stream: aio_stream.RunStream[Any]) -> None:
    """Cancels a run that Ctrl-C has interrupted, unless it has ended or the server does not answer in time."""
    with suppress(NotecaseError, TimeoutError, RuntimeError):
        loop.run(asyncio.wait_for(stream._cancel_started("Ctrl-C"), CANCEL_SECONDS))


class RunStream(Generic[Parsed]):
    """A run being followed: `with` attaches, `for` gives its `v1.Event`s; see `notecase.RunStream`. Calls of its tools
    are executed in threads while the block is entered, also between two events.

    Ctrl-C during the entry or in the block cancels the run if `Client.run` has started it, and leaves it alone after
    `attach`. A start that the server has not answered is cancelled, too, unless it creates a session that does not
    exist yet; the program waits for this for up to two seconds."""

    def __init__(self, loop: _Loop, inner: aio_stream.RunStream[Parsed], *, starts: bool = False) -> None:
        self._loop = loop
        self._inner = inner
        self._starts = starts

    def __enter__(self) -> Self:
        try:
            self._loop.run(self._inner.__aenter__())
        except KeyboardInterrupt:
            if self._starts:
                _cancel(self._loop, self._inner)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(self._inner.__aexit__(kind, error, trace))
        if self._starts and isinstance(error, KeyboardInterrupt):
            _cancel(self._loop, self._inner)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> v1.Event:
        with suppress(StopAsyncIteration):
            return self._loop.run(self._inner.__anext__())
        raise StopIteration

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def session(self) -> str:
        return self._inner.session

    @property
    def last_sequence(self) -> int | None:
        return self._inner.last_sequence

    @property
    def view(self) -> SessionView:
        return self._inner.view

    @property
    def warn_after(self) -> float | None:
        return self._inner.warn_after

    @warn_after.setter
    def warn_after(self, seconds: float | None) -> None:
        self._inner.warn_after = seconds

    @property
    def waits_for_others(self) -> bool:
        return self._inner.waits_for_others

    @property
    def result(self) -> v1.Run:
        return self._inner.result

    @property
    def reply(self) -> Reply[Parsed]:
        return self._inner.reply

    @property
    def parsed(self) -> Parsed:
        return self._inner.parsed

    text = _iterating(aio_stream.RunStream.text)
    say = _blocking(aio_stream.RunStream.say)
    approve = _blocking(aio_stream.RunStream.approve)
    deny = _blocking(aio_stream.RunStream.deny)
    answer = _blocking(aio_stream.RunStream.answer)
    dismiss = _blocking(aio_stream.RunStream.dismiss)
    cancel = _blocking(aio_stream.RunStream.cancel)
    update_state = _blocking(aio_stream.RunStream.update_state)


class Client:
    """A client of one server: `with Client("127.0.0.1:7420") as client`; see `notecase.Client` for its arguments and
    methods. The stubs `agents`, `sessions` and so on take `v1` requests and block, too.

    Threads may share it, forked processes may not. Tools run in threads, too, and may use it; an asynchronous tool runs
    on the client's own loop, and may not use it. A client that is not closed is closed when the program ends."""

    def __init__(
        self,
        target: str | None = None,
        *,
        token: Token | None = None,
        ca: str | PathLike[str] | bytes | None = None,
        plaintext: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
        retry: Retry | None = None,
    ) -> None:
        async def make() -> aio.Client:
            return aio.Client(
                target,
                token=token,
                ca=ca,
                plaintext=plaintext,
                credentials=credentials,
                options=options,
                retry=retry,
            )

        self._loop = _Loop()
        try:
            self._inner = self._loop.run(make())
        except BaseException:
            self._loop.close()
            raise
        self.agents = cast("v1.AgentServiceStub", _Stub(self._loop, self._inner.agents))
        self.sessions = cast("v1.SessionServiceStub", _Stub(self._loop, self._inner.sessions))
        self.state = cast("v1.StateServiceStub", _Stub(self._loop, self._inner.state))
        self.messages = cast("v1.MessageServiceStub", _Stub(self._loop, self._inner.messages))
        self.runs = cast("v1.RunServiceStub", _Stub(self._loop, self._inner.runs))
        self.server = cast("v1.ServerServiceStub", _Stub(self._loop, self._inner.server))
        self.blobs = cast("v1.BlobServiceStub", _Stub(self._loop, self._inner.blobs))
        self.keys = cast("v1.KeyServiceStub", _Stub(self._loop, self._inner.keys))
        self.audit = cast("v1.AuditServiceStub", _Stub(self._loop, self._inner.audit))
        self.tenants = cast("v1.TenantServiceStub", _Stub(self._loop, self._inner.tenants))
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and every call on it; runs continue in the server. May be called twice."""
        atexit.unregister(self.close)
        with suppress(RuntimeError):  # closed before
            self._loop.run(self._inner.close())
        self._loop.close()

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return self._inner.address

    run = _following(aio.Client.run, starts=True)
    attach = _following(aio.Client.attach)
    invoke = _invoking(aio.Client.invoke)
    put_agent = _blocking(aio.Client.put_agent)
    create_session = _blocking(aio.Client.create_session)
    fork = _blocking(aio.Client.fork)
    rewind = _blocking(aio.Client.rewind)
    export_session = _iterating(aio.Client.export_session)
    import_session = _blocking(aio.Client.import_session)
    get_state = _blocking(aio.Client.get_state)
    get_state_entries = _blocking(aio.Client.get_state_entries)
    put_state = _blocking(aio.Client.put_state)
    upload = _blocking(aio.Client.upload)
    download = _iterating(aio.Client.download)
    list_agents = _iterating(aio.Client.list_agents)
    list_sessions = _iterating(aio.Client.list_sessions)
    list_messages = _iterating(aio.Client.list_messages)
    list_runs = _iterating(aio.Client.list_runs)
    waiting = _iterating(aio.Client.waiting)
    say = _blocking(aio.Client.say)
    approve = _blocking(aio.Client.approve)
    deny = _blocking(aio.Client.deny)
    answer = _blocking(aio.Client.answer)
    dismiss = _blocking(aio.Client.dismiss)
    give_result = _blocking(aio.Client.give_result)
    cancel = _blocking(aio.Client.cancel)
    send = _blocking(aio.Client.send)
    send_result = _blocking(aio.Client.send_result)


class _Stub:
    """A generated stub whose calls block: one answer is returned, several are iterated."""

    def __init__(self, loop: _Loop, inner: Any) -> None:
        self._loop = loop
        self._inner = inner
        service = f"notecase.v1.{type(inner).__name__.removesuffix('Stub')}"
        self._methods = descriptor_pool.Default().FindServiceByName(service).methods_by_name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._inner, name)
        several = self._methods[name].server_streaming

        def call(*args: Any, **kwargs: Any) -> Any:
            async def begin() -> Any:
                begun = method(*args, **kwargs)
                return begun if several else await begun

            made = self._loop.run(begin())
            return self._loop.iterate(aiter(made)) if several else made

        return call

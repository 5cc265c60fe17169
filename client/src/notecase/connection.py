"""Connects a client to its server, in plain text or by TLS, and adds a token to each call."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from os import PathLike
from typing import Any, Self, cast

import grpc
from grpc import aio

from notecase.address import DEFAULT_ADDRESS, is_loopback, with_port
from notecase.arguments import shown
from notecase.errors import NotecaseError

log = logging.getLogger("notecase")

TOLD_AFTER = 1.0
"""Seconds after which the log says that the first connection is not made yet. gRPC itself waits 20 s for a host that
does not answer."""

STATUS_SECONDS = 1.0
"""How long to wait for the status of a call whose write failed."""

_WRITE_FAILED = "Internal error from Core"
"""What grpc says of it."""

Token = str | Callable[[], str | Awaitable[str]]
"""A token, or a function that returns a valid one. It is called before each call, so it should keep a token until that
expires."""

_OPTIONS: Mapping[str, int] = {
    "grpc.keepalive_time_ms": 20_000,  # notices a peer that vanished; the server allows a ping every 10 s
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.max_pings_without_data": 0,  # the connection of a silent stream is to be watched still
    "grpc.max_reconnect_backoff_ms": 2_000,  # grpc's own two minutes would outlast every retry here
}


class Connection:
    """One connection to a server. Stubs on its `channel` send the token and raise NotecaseError."""

    def __init__(
        self,
        address: str | None = None,
        *,
        token: Token | None = None,
        ca: str | PathLike[str] | bytes | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        plaintext: bool = False,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """See Client. Raises ValueError for an invalid address, and for a token that cannot be sent, or only in plain
        text; TypeError for arguments of other types; OSError for a file of `ca` that cannot be read."""
        _judge(address, token, credentials)
        if address is None:
            address = os.environ.get("NOTECASE_ADDRESS") or DEFAULT_ADDRESS
        self.address = address = with_port(address)
        if plaintext and (credentials or ca):
            raise ValueError("plaintext cannot be combined with ca or credentials")
        ca = ca or os.environ.get("NOTECASE_CA")
        here = is_loopback(address)
        if credentials is None and not plaintext and (ca or not here):
            credentials = grpc.ssl_channel_credentials(ca if isinstance(ca, bytes) else _pem(ca))
        found = os.environ.get("NOTECASE_TOKEN") if token is None else None
        if found and credentials is None and not here:
            raise ValueError(f"NOTECASE_TOKEN would be sent to {address} in plain text; pass it as token to allow that")
        self._token = token or found
        if isinstance(self._token, str):
            _bearer(self._token)  # refused here rather than by every call
        # A proxy from the environment would see the plain text of calls that should stay on this machine.
        own = {**_OPTIONS, "grpc.enable_http_proxy": 0} if here else _OPTIONS
        merged = [*{**own, **dict(options)}.items()]

        def open_channel() -> aio.Channel:
            return (
                aio.secure_channel(address, credentials, merged)
                if credentials
                else aio.insecure_channel(address, merged)
            )

        self._channel = _Channel(open_channel, self._token, address)
        self.channel = cast(aio.Channel, self._channel)

    @property
    def renews_token(self) -> bool:
        """Whether a repeated call may have another token."""
        return callable(self._token)

    async def close(self) -> None:
        """Closes the connection and every call on it. May be called twice."""
        await self._channel.close()


def _judge(address: Any, token: Any, credentials: Any) -> None:
    if not isinstance(address, str | None):
        raise TypeError(f"target must be a string such as {DEFAULT_ADDRESS!r}, not {shown(address)}")
    if not isinstance(token, str | None) and not callable(token):
        raise TypeError(f"token must be a string, or a function that returns one, not a {type(token).__name__}")
    if not isinstance(credentials, grpc.ChannelCredentials | None):
        raise TypeError(f"credentials must be grpc.ChannelCredentials, not a {type(credentials).__name__}")


def _pem(path: str | PathLike[str] | None) -> bytes | None:
    """Returns a file's content, or None for the authorities that grpc knows."""
    from pathlib import Path  # noqa: PLC0415 - needed with `ca` alone, and takes 3 ms

    return Path(path).read_bytes() if path else None


def _bearer(token: str) -> tuple[str, str]:
    """Returns the metadata that carries a token. Raises ValueError, which does not quote it."""
    token = token.strip()  # a file that holds one often ends with a line's end
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token is empty or contains a space or a character that is not ASCII")
    return "authorization", f"Bearer {token}"


class _Channel:
    """The channel that the stubs use.

    It does not use grpc's interceptors, which put a task and a queue between caller and call and lose the call's
    metadata, nor grpc's call credentials, which need TLS on loopback too and hide what a token's function raises.

    grpc's channel belongs to the event loop in which it is opened, so it is opened by the first call."""

    def __init__(self, open_channel: Callable[[], aio.Channel], token: Token | None, address: str) -> None:
        self._open = open_channel
        self._token = token
        self._address = address
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.unary_unary = self._called("unary_unary")
        self.unary_stream = self._called("unary_stream")
        self.stream_unary = self._called("stream_unary")
        self.stream_stream = self._called("stream_stream")

    @cached_property
    def _channel(self) -> aio.Channel:
        return self._open()

    async def close(self) -> None:
        self._closed = True
        if "_channel" in vars(self):
            await self._channel.close()

    def _called(self, shape: str) -> Callable[..., Callable[..., Any]]:
        def multicallable(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            @cache
            def method() -> Callable[..., Any]:
                opened: Callable[..., Any] = getattr(self._channel, shape)(*args, **kwargs)
                if shape.startswith("stream_"):
                    return lambda *args, **kwargs: _keep_status(opened(*args, **kwargs))
                return opened

            return lambda *args, **kwargs: self._call(method, args, kwargs)

        return multicallable

    def _call(self, opened: Callable[[], Callable[..., Any]], args: Iterable[Any], kwargs: dict[str, Any]) -> "_Call":
        if self._closed:
            raise RuntimeError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            loop.call_later(TOLD_AFTER, self._tell)
        if self._loop is not loop:
            raise RuntimeError("this client made its first call in another event loop: create one client for each loop")
        method = opened()
        metadata = tuple(kwargs.pop("metadata", None) or ())
        if self._token is None or any(name == "authorization" for name, _ in metadata):
            return _Call(method(*args, metadata=metadata, **kwargs), self._address)
        token = self._token if isinstance(self._token, str) else self._token()
        if isinstance(token, str):
            return _Call(method(*args, metadata=(*metadata, _bearer(token)), **kwargs), self._address)

        def begin(token: str, timeout: float | None) -> Any:
            return method(*args, metadata=(*metadata, _bearer(token)), **{**kwargs, "timeout": timeout})

        return _LateCall(token, begin, kwargs.get("timeout"), self._address)

    def _tell(self) -> None:
        """Logs that the connection is not made yet. A connection that fails is logged where it is repeated."""
        if self._channel.get_state() in {grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING}:
            log.warning("%s has not answered for %g s; still connecting.", self._address, TOLD_AFTER)


class _Call:
    """Wraps a call of grpc's and raises its errors as NotecaseError."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._responses: AsyncIterator[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def _begun(self) -> Any:
        return self._call

    def __await__(self) -> Generator[Any, None, Any]:
        call = yield from self._begun().__await__()
        try:
            return (yield from call.__await__())
        except aio.AioRpcError as error:
            raise (yield from self._translated(error).__await__()) from error

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._responses is None:
            self._responses = aiter(await self._begun())
        try:
            return await anext(self._responses)
        except aio.AioRpcError as error:
            raise await self._translated(error) from error

    async def read(self) -> Any:
        call = await self._begun()
        try:
            return await call.read()
        except aio.AioRpcError as error:
            raise await self._translated(error) from error

    async def write(self, request: Any) -> None:
        call = await self._begun()
        try:
            await call.write(request)
        except aio.AioRpcError as error:
            raise await self._translated(error) from error

    async def wait_for_connection(self) -> None:
        call = await self._begun()
        try:
            await call.wait_for_connection()
        except aio.AioRpcError as error:
            raise await self._translated(error) from error

    async def _translated(self, error: aio.AioRpcError) -> NotecaseError:
        """Returns the error to raise for grpc's."""
        if error.details() == _WRITE_FAILED:
            error = await _ended(self._call) or error
        return NotecaseError.from_rpc_error(error, self._address)


class _LateCall(_Call):
    """A call that starts when it is first awaited, read or written and its token has arrived. Before that it can only
    be cancelled."""

    def __init__(
        self, token: Awaitable[str], begin: Callable[[str, float | None], Any], seconds: float | None, address: str
    ) -> None:
        """`begin` makes the call with a token and the time that is left of the caller's `seconds`."""
        super().__init__(None, address)
        self._time = asyncio.get_running_loop().time
        self._due = None if seconds is None else self._time() + seconds
        self._token = asyncio.ensure_future(token)
        self._begin = begin

    async def _begun(self) -> Any:
        if self._call is None:
            token = await self._asked()
            if self._call is None:  # another task may have waited, too
                self._call = self._begin(token, None if self._due is None else self._due - self._time())
        return self._call

    async def _asked(self) -> str:
        bound = asyncio.timeout_at(self._due)
        try:
            async with bound:
                return await self._token
        except TimeoutError:
            if not bound.expired():
                raise
            message = "The token did not come in time."
            raise NotecaseError(grpc.StatusCode.DEADLINE_EXCEEDED, "", message) from None

    def cancel(self) -> bool:
        return bool(self._token.cancel() if self._call is None else self._call.cancel())


def _keep_status(call: Any) -> Any:
    """Has a call with a stream of requests remember the status that the server sent. When the server ends such a call
    while it is written to, grpc's write fails, and grpc puts INTERNAL in the place of the status, before or after it
    was received."""
    call.kept_status = asyncio.get_running_loop().create_future()

    def keep(call: Any) -> None:
        details = _present(call.details())
        if details != _WRITE_FAILED and not call.kept_status.done():
            metadata = _present(call.trailing_metadata())
            call.kept_status.set_result(aio.AioRpcError(_present(call.code()), aio.Metadata(), metadata, details))

    call.add_done_callback(keep)
    return call


async def _ended(call: Any) -> aio.AioRpcError | None:
    """Returns the error that a server ended a call with, or None if it sent none within STATUS_SECONDS."""
    with suppress(TimeoutError):
        async with asyncio.timeout(STATUS_SECONDS):
            return cast(aio.AioRpcError, await call.kept_status)
    return None


def _present(value: Coroutine[Any, Any, Any]) -> Any:
    """Returns what a coroutine of a call that is done returns; it does not wait."""
    try:
        value.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("the call is not done")

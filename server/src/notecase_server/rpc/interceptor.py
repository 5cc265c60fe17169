"""The doorway of every call: who calls, decoding, the log's context, and the one place where a failure becomes a
status.

grpc would send an exception's class and text to the client, and a frame that does not decode would never reach a
handler. So each handler is handed to grpc without its deserializer and wrapped: frames are parsed inside the guarded
body, and whatever is raised there leaves as one of the catalog's errors.
"""

import asyncio
import functools
import inspect
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError, Violation
from notecase_server.store.contract import Replayed

log = structlog.get_logger()

HEALTH = "/grpc.health.v1.Health/"
"""The methods that need no credential: a probe has none."""

MAX_MESSAGE_BYTES = 4 << 20
"""The largest frame the server takes. The transport takes 16 MiB, so that a frame in between is refused with
details."""

TRANSPORT_BYTES = 16 << 20

STATUS_BYTES = 4 << 10
"""What details may weigh: they travel in trailers, of which clients accept 8 KiB."""

STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Caller(NamedTuple):
    """Who calls, as the transport knows it."""

    tenant: str
    request_id: str
    method: str


Authenticate = Callable[[Mapping[str, str | bytes]], str]
"""From a call's metadata to the caller's tenant. Raises NotecaseError for a credential that is missing or bad."""

caller: ContextVar[Caller] = ContextVar("caller")


def development(_metadata: Mapping[str, str | bytes]) -> str:
    """Everybody is one tenant: for a server that only its own machine can reach."""
    return "default"


class Doorway(grpc.aio.ServerInterceptor):
    """Wraps every handler once."""

    def __init__(self, authenticate: Authenticate, new_id: Callable[[], str], stall: float) -> None:
        """A stream on which one frame waits for its reader for `stall` seconds ends with WATCHER_TOO_SLOW."""
        self._authenticate = authenticate
        self._new_id = new_id
        self._stall = stall
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, method: str, handler: Any) -> Any:
        def decode(frame: bytes) -> Any:
            if len(frame) > MAX_MESSAGE_BYTES:
                raise errors.too_large("The request", len(frame), MAX_MESSAGE_BYTES)
            try:
                return handler.request_deserializer(frame)
            except DecodeError:
                problem = "does not decode as the method's message; a string may not be UTF-8, or the nesting endless"
                raise errors.invalid([Violation("request", problem)]) from None

        async def frames(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
            async for frame in requests:
                yield decode(frame)

        async def unary(request: bytes, context: Any, *, stream: bool) -> Any:
            argument = frames(request) if stream else decode(request)  # type: ignore[arg-type]
            act = handler.stream_unary if stream else handler.unary_unary
            return await act(argument, context)

        def streaming(request: Any, context: Any, *, stream: bool) -> AsyncGenerator[Any, None] | Awaitable[None]:
            act = handler.stream_stream if stream else handler.unary_stream
            responses: AsyncGenerator[Any, None] | Awaitable[None]
            responses = act(frames(request) if stream else decode(request), context)
            return responses

        def guard_unary(*, stream: bool) -> Callable[[Any, Any], Awaitable[Any]]:
            async def guarded(request: Any, context: Any) -> Any:
                try:
                    self._enter(method, context)
                    return await unary(request, context, stream=stream)
                except Replayed as replayed:
                    return replayed.response
                except grpc.aio.AbortError:
                    raise
                except Exception as error:  # noqa: BLE001  (nothing internal may reach the client)
                    await abort(context, error)

            return guarded

        def guard_streaming(*, stream: bool) -> Callable[[Any, Any], Awaitable[None]]:
            async def guarded(request: Any, context: Any) -> None:
                try:
                    self._enter(method, context)
                    responses = streaming(request, context, stream=stream)
                    if inspect.isawaitable(responses):  # health's Watch writes its responses by itself
                        await responses
                    else:
                        await deliver(responses, context, self._stall)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:  # noqa: BLE001  (nothing internal may reach the client)
                    with suppress(TimeoutError):  # the status is on its way, behind the frames that nobody reads
                        async with asyncio.timeout(self._stall):
                            await abort(context, error)

            return guarded

        incoming, outgoing = handler.request_streaming, handler.response_streaming
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[incoming, outgoing]
        behaviour = guard_streaming(stream=incoming) if outgoing else guard_unary(stream=incoming)
        return make(behaviour, None, functools.partial(_encode, handler.response_serializer))

    def _enter(self, method: str, context: Any) -> None:
        metadata = dict(context.invocation_metadata() or ())
        given = metadata.get("x-request-id", "")
        request_id = (
            given if isinstance(given, str) and given.isprintable() and 0 < len(given) <= 128 else self._new_id()
        )
        caller.set(Caller("", request_id, method))
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id, method=method, peer=context.peer())
        if not method.startswith(HEALTH):
            caller.set(Caller(self._authenticate(metadata), request_id, method))


def _encode(serializer: Callable[[Any], bytes], response: Any) -> bytes:
    """A replayed answer is bytes already."""
    return response if isinstance(response, bytes) else serializer(response)


async def deliver(responses: AsyncGenerator[Any, None], context: Any, stall: float) -> None:
    """Sends responses as they come. Raises NotecaseError WATCHER_TOO_SLOW when one waits `stall` seconds for room.

    Room is what the reader's transport takes in advance, a few megabytes: a stream with less to say is never too slow.
    One clock looks after the whole stream, because one for each response would cost a tenth of sending it."""
    loop = asyncio.get_running_loop()
    since = math.inf  # when the write under way began
    alarm: asyncio.TimerHandle

    def look() -> None:
        nonlocal alarm
        left = min(since + stall - loop.time(), stall)
        if left > 0:
            alarm = loop.call_later(left, look)
        else:
            patience.reschedule(loop.time())

    alarm = loop.call_later(stall, look)
    try:
        async with aclosing(responses), asyncio.timeout(None) as patience:
            async for response in responses:
                since = loop.time()
                await context.write(response)
                since = math.inf
    except TimeoutError:
        if not patience.expired():
            raise
        raise errors.watcher_too_slow(stall) from None
    finally:
        alarm.cancel()


async def abort(context: Any, error: Exception) -> None:
    """Ends the call with the failure's status; a failure that no room foresaw is logged and told as INTERNAL."""
    if not isinstance(error, NotecaseError):
        request_id = caller.get().request_id
        log.error("rpc_crashed", exc_info=error)
        error = errors.internal(request_id)
    else:
        log.info("rpc_refused", reason=errors.reason_name(error.reason), problem=error.message[:300])
    status = to_status(error)
    await context.abort(STATUS[status.code], status.message, (("grpc-status-details-bin", status.SerializeToString()),))


def to_status(error: NotecaseError) -> status_pb2.Status:
    """The failure as google.rpc.Status, ErrorInfo first. Long lists of violations are cut to what a trailer holds."""
    status = status_pb2.Status(code=error.code, message=error.message[:1000])
    info = error_details_pb2.ErrorInfo(
        domain=v1.ERROR_DOMAIN,
        reason=errors.reason_name(error.reason),
        metadata={key: value[:300] for key, value in error.metadata.items()},
    )
    _add(status, info)
    if error.retry_after is not None:
        seconds = math.floor(error.retry_after)
        nanos = int((error.retry_after - seconds) * 1e9)
        _add(status, error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds, nanos=nanos)))
    if error.resource is not None:
        _add(
            status,
            error_details_pb2.ResourceInfo(
                resource_type=f"notecase.v1.{error.resource.kind.title()}", resource_name=error.resource.name[:300]
            ),
        )
    if error.quota:
        violation = error_details_pb2.QuotaFailure.Violation(subject="server", description=error.quota)
        _add(status, error_details_pb2.QuotaFailure(violations=[violation]))
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for found in error.violations:
            bad.field_violations.add(field=found.field[:200], description=found.description[:300])
            if bad.ByteSize() + status.ByteSize() > STATUS_BYTES:
                bad.field_violations[-1].CopyFrom(
                    error_details_pb2.BadRequest.FieldViolation(
                        description=f"and {len(error.violations) - len(bad.field_violations) + 1} more"
                    )
                )
                break
        _add(status, bad)
    return status


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)

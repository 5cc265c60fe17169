"""The doorway of every call: it finds out who calls, decodes, gives the log its context, and turns a failure into a
status.

grpc would send an exception's class and text to the client, and a frame that does not decode would never reach a
handler. So grpc gets each handler wrapped, and without its deserializer: frames are parsed inside the guarded body, and
everything that is raised there leaves as one of the catalog's errors.
"""

import asyncio
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.limit import Limit
from notecase_server.rpc.frames import Decoder
from notecase_server.rpc.gate import Call, Gate, deliver
from notecase_server.store.contract import Replayed

log = structlog.get_logger()

HEALTH = "/grpc.health.v1.Health/"
"""The methods that need no credential: a probe has none."""

STATUS_BYTES = 4 << 10
"""The size of the details at most: they travel in trailers, of which clients accept 8 KiB."""

DRAIN_BYTES = 64 << 20
DRAIN_SECONDS = 0.5
"""What is still read of a stream that was refused, and for how long."""

READS = ("Get", "List")
"""How the names of methods begin that change nothing."""

STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Caller(NamedTuple):
    """Who calls, as the transport knows it."""

    tenant: str
    request_id: str
    method: str


Authenticate = Callable[[Mapping[str, str | bytes]], str]
"""Returns the caller's tenant from a call's metadata. Raises NotecaseError for a credential that is missing or bad."""

caller: ContextVar[Caller] = ContextVar("caller")


def development(_metadata: Mapping[str, str | bytes]) -> str:
    """Takes everybody for one tenant, on a server that only its own machine can reach."""
    return "default"


class Doorway(grpc.aio.ServerInterceptor):
    """Wraps the handler of every method once, as an endpoint of its shape."""

    def __init__(self, authenticate: Authenticate, new_id: Callable[[], str], stall: float, gate: Gate) -> None:
        """A stream on which one frame waits for its reader for `stall` seconds ends with WATCHER_TOO_SLOW."""
        self.stall = stall
        self._gate = gate
        self._authenticate = authenticate
        self._new_id = new_id
        self._endpoints: dict[str, Any] = {}
        self._under_way: dict[asyncio.Task[Any], Limit] = {}
        self._closing = False

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        if method not in self._endpoints:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            shape = SHAPES[handler.request_streaming, handler.response_streaming]
            self._endpoints[method] = shape(self, method, handler).handler()
        return self._endpoints[method]

    async def close(self, patience: float) -> None:
        """Refuses new calls, lets those under way go on for `patience` seconds, and then ends them with
        SERVER_DRAINING; one that is being refused already ends with what it was refused for. A call whose status
        nobody reads is waited for once more as long. May be called again."""
        self._closing = True
        if self._under_way:
            await asyncio.wait(list(self._under_way), timeout=patience)
        cut = dict(self._under_way)
        for limit in cut.values():
            limit.due = asyncio.get_running_loop().time()
        if cut:
            await asyncio.wait(list(cut), timeout=patience)

    def enter(self, method: str, context: Any) -> tuple[Limit, Call]:
        """Admits a call: finds out who calls, and gives the log its context. Returns the limit to work within, which
        passes when the server cuts the call, and its place at the gate; `leave` ends it. Raises NotecaseError
        SERVER_DRAINING and RATE_LIMITED, and what `authenticate` raises."""
        metadata = dict(context.invocation_metadata() or ())
        given = metadata.get("x-request-id", "")
        request_id = (
            given if isinstance(given, str) and given.isprintable() and 0 < len(given) <= 128 else self._new_id()
        )
        caller.set(Caller("", request_id, method))
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id, method=method, peer=context.peer())
        if self._closing:
            raise errors.draining()
        probe = method.startswith(HEALTH)
        if not probe:
            caller.set(Caller(self._authenticate(metadata), request_id, method))
        call = self._gate.enter(context, probe=probe)
        limit = self._under_way[_this_task()] = Limit()
        return limit, call

    def leave(self) -> None:
        """Ends what `enter` began in this task."""
        self._under_way.pop(_this_task(), None)


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


class Endpoint(ABC):
    """One method of the server: decodes its frames, calls its handler, and turns what is raised into a status."""

    make: ClassVar[Callable[..., Any]]
    """grpc's handler for this shape of call."""

    def __init__(self, door: Doorway, method: str, handler: Any) -> None:
        """`handler` is the one that grpc made for the servicer's method."""
        self._door = door
        self._method = method
        self._wrapped = handler
        self._decode = Decoder(method, handler.request_deserializer)

    def handler(self) -> Any:
        """Makes the handler that takes the place of the wrapped one. It decodes by itself."""
        return type(self).make(self._handle, None, functools.partial(_encode, self._wrapped.response_serializer))

    async def _handle(self, request: Any, context: Any) -> Any:
        limit = None
        try:
            limit, call = self._door.enter(self._method, context)
            async with limit:
                return await self._answer(request, context, call)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  (nothing internal may reach the client)
            await self._refuse(context, errors.cut() if limit and limit.passed else error)
        finally:
            self._door.leave()

    @abstractmethod
    def _answer(self, request: Any, context: Any, call: Call) -> Awaitable[Any]:
        """Carries the call out. `request` is a frame, or an iterator of frames, as they came."""

    async def _refuse(self, context: Any, error: Exception) -> None:
        await abort(context, error)

    async def _decoded(self, frames: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for frame in frames:
            yield await self._decode(frame)


class Single(Endpoint):
    """Answers with one message."""

    async def _respond(self, answer: Awaitable[Any], call: Call) -> bytes:
        """Returns what the handler returns, or the bytes that answered the same request before.

        Raises NotecaseError RATE_LIMITED for what was only read when too much waits on the connection already: of a
        write the caller has to hear."""
        try:
            frame: bytes = self._wrapped.response_serializer(await answer)
        except Replayed as replayed:
            frame = replayed.response
        if not call.has_room(len(frame)) and self._method.rpartition("/")[2].startswith(READS):
            raise errors.unread_answers()
        call.waits(len(frame))
        return frame


class Streaming(Endpoint):
    """Answers with a stream of messages."""

    def _respond(self, answers: Any, context: Any, call: Call) -> Awaitable[None]:
        """Sends what the handler yields. A handler that yields nothing, such as that of health, writes by itself."""
        if not inspect.isasyncgen(answers):
            return answers  # type: ignore[no-any-return]
        responses: Any = answers
        return deliver(responses, self._wrapped.response_serializer, context, self._door.stall, call)

    async def _refuse(self, context: Any, error: Exception) -> None:
        """Waits at most the doorway's `stall`: the status is sent behind the frames, which nobody may be reading."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._door.stall):
                await abort(context, error)


class UnaryUnary(Single):
    make = grpc.unary_unary_rpc_method_handler

    async def _answer(self, request: Any, context: Any, call: Call) -> Any:
        return await self._respond(self._wrapped.unary_unary(await self._decode(request), context), call)


class StreamUnary(Single):
    make = grpc.stream_unary_rpc_method_handler

    async def _answer(self, request: Any, context: Any, call: Call) -> Any:
        try:
            return await self._respond(self._wrapped.stream_unary(self._decoded(request), context), call)
        except NotecaseError:
            await _drain(request)
            raise


class UnaryStream(Streaming):
    make = grpc.unary_stream_rpc_method_handler

    async def _answer(self, request: Any, context: Any, call: Call) -> None:
        await self._respond(self._wrapped.unary_stream(await self._decode(request), context), context, call)


class StreamStream(Streaming):
    make = grpc.stream_stream_rpc_method_handler

    def _answer(self, request: Any, context: Any, call: Call) -> Awaitable[None]:
        return self._respond(self._wrapped.stream_stream(self._decoded(request), context), context, call)


SHAPES: Mapping[tuple[bool, bool], type[Endpoint]] = {
    (False, False): UnaryUnary,
    (False, True): UnaryStream,
    (True, False): StreamUnary,
    (True, True): StreamStream,
}
"""By whether the requests stream, and whether the answers do."""


async def _drain(frames: AsyncIterator[bytes]) -> None:
    """Lets go of what a caller sends on, up to a bound: some clients lose the status of a call that ends while they
    write."""
    left = DRAIN_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for frame in frames:
                left -= len(frame)
                if left < 0:
                    break


def _encode(serializer: Callable[[Any], bytes], response: Any) -> bytes:
    """Serializes an answer, unless it is a replayed one, which is bytes already."""
    return response if isinstance(response, bytes) else serializer(response)


async def abort(context: Any, error: Exception) -> None:
    """Ends the call with the failure's status. A failure that is not a NotecaseError is logged, and the caller gets
    INTERNAL."""
    if not isinstance(error, NotecaseError):
        request_id = caller.get().request_id
        log.error("rpc_crashed", exc_info=error)
        error = errors.internal(request_id)
    else:
        log.info("rpc_refused", reason=errors.reason_name(error.reason), problem=error.message[:300])
    status = to_status(error)
    await context.abort(STATUS[status.code], status.message, (("grpc-status-details-bin", status.SerializeToString()),))


def to_status(error: NotecaseError) -> status_pb2.Status:
    """Returns the failure as google.rpc.Status, ErrorInfo first. Long lists of violations are cut to what a trailer
    holds."""
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

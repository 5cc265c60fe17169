"""Wraps every call: authenticates the caller, decodes the request, sets the context of the log, and turns failures into
statuses.

grpc would send an exception's class and text to the client, and a frame that does not decode would never reach a
handler. So grpc gets each handler wrapped, and without its deserializer: frames are parsed inside the guarded body, and
everything that is raised there leaves as one of the catalog's errors.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
import structlog

from notecase_server import errors
from notecase_server.auth import rights
from notecase_server.auth.chain import Chain
from notecase_server.auth.principal import Principal
from notecase_server.auth.principals import Principals
from notecase_server.auth.tenants import Tenants
from notecase_server.errors import NotecaseError
from notecase_server.rpc.caller import NOBODY, Caller, caller
from notecase_server.rpc.frames import HEALTH, Decoded, Decoder, drain
from notecase_server.rpc.gate import Call, Gate, Outlet
from notecase_server.rpc.status import to_status
from notecase_server.store.contract import Replayed
from notecase_server.supervisor import is_own_end, is_passing

log = structlog.get_logger()

READS = ("Get", "List")
"""How the names of methods begin that change nothing."""

JUDGE_SECONDS = 2.0
"""How long a stream may go on after its credential has expired, was revoked or has changed."""

LOOK_SECONDS = 1.0
"""How often streams are looked at whose readers may be too slow, at least."""

JUDGED_AT_ONCE = 100
"""Calls that are judged in one step of the loop, at most."""

WAITS = ("Invoke", "WaitRun")
"""Methods that answer once, and may take as long as a stream."""

STATUS = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(slots=True, eq=False)
class UnderWay:
    """A call from its admission to its end."""

    task: asyncio.Task[Any]
    call: Call
    context: Any
    metadata: Any
    lasts: bool
    """It is judged again while it lasts, others until their request has come."""
    principal: Principal | None = None
    """None until the call was judged, and of a probe."""
    ends: bool = False
    why: NotecaseError | None = None
    """Says why the server ends the call, if it does."""

    def end(self, why: NotecaseError) -> None:
        """Cuts the call, unless it ends already."""
        if not self.ends:
            self.ends, self.why = True, why
            self.task.cancel()

    def ended(self, error: BaseException) -> BaseException:
        """Returns the error that the caller receives for a call that has ended with an error. Afterwards the call
        cannot be cut."""
        self.ends = True
        if self.why is None or (self.task.uncancel() and isinstance(error, asyncio.CancelledError)):
            return error
        return self.why


class Doorway(grpc.aio.ServerInterceptor):
    """Wraps the handler of every method once, as an endpoint of its shape."""

    def __init__(
        self,
        chain: Chain,
        new_id: Callable[[], str],
        stall: float,
        gate: Gate,
        judge: Callable[[Any], Awaitable[None]] | None = None,
        tenants: Tenants | None = None,
        principals: Principals | None = None,
        note: Callable[[NotecaseError], None] = lambda error: None,
    ) -> None:
        """A stream on which one frame waits for its reader for `stall` seconds ends with WATCHER_TOO_SLOW, at most
        LOOK_SECONDS later. `judge` looks at each request of a caller that is bound to a user; `note` is called with
        each refusal, and logs it."""
        self.note = note
        self._principals = principals
        self.stall = stall
        self.judge_request = judge
        self._tenants = tenants
        self.gate = gate
        self._chain = chain
        self._new_id = new_id
        self._endpoints: dict[str, Any] = {}
        self._under_way: dict[asyncio.Task[Any], UnderWay] = {}
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
        """Refuses new calls, waits `patience` seconds for the open ones, and then ends them with SERVER_DRAINING; a
        call that is being refused already keeps its error. Waits as long again for calls whose status is not read. May
        be called again."""
        self._closing = True
        if self._under_way:
            await asyncio.wait(list(self._under_way), timeout=patience)
        cut = dict(self._under_way)
        for one in cut.values():
            one.end(errors.cut())
        if cut:
            await asyncio.wait(list(cut), timeout=patience)

    def enter(self, method: str, lasts: bool, context: Any) -> UnderWay:
        """Takes a call in and gives the log its context; `leave` ends it. Raises NotecaseError SERVER_DRAINING and
        RATE_LIMITED."""
        metadata = context.invocation_metadata() or ()
        request_id: Any = dict(metadata).get("x-request-id", "")
        if not (isinstance(request_id, str) and 0 < len(request_id) <= 128 and request_id.isprintable()):
            request_id = self._new_id()
        caller.set(Caller(NOBODY, request_id, method))
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id, method=method, peer=context.peer())
        if self._closing:
            raise errors.draining()
        task = asyncio.current_task()
        assert task is not None
        call = self.gate.enter(context, probe=method.startswith(HEALTH))
        one = self._under_way[task] = UnderWay(task, call, context, metadata, lasts)
        return one

    async def admit(self, one: UnderWay) -> None:
        """Finds out who makes a call that was taken in, and whether they may. Raises NotecaseError UNAUTHENTICATED,
        ROLE_MISSING, and STORE_UNAVAILABLE when a credential cannot be looked up."""
        who = caller.get()
        if who.method.startswith(HEALTH):
            return
        principal = await self._principal(one)
        caller.set(Caller(principal, who.request_id, who.method))
        if principal.subject:
            structlog.contextvars.bind_contextvars(tenant=principal.tenant, subject=principal.subject)
        if (refusal := rights.refusal(principal, who.method)) is not None:
            raise refusal
        one.principal = principal
        if not principal.subject:
            return
        if self._principals is not None and rights.leaves_traces(who.method):
            name = await self._principals.name(principal, principal.tenant)
            caller.set(Caller(principal, who.request_id, who.method, name))

    async def _principal(self, one: UnderWay) -> Principal:
        found = await self._chain.principal(one.metadata, one.context.auth_context)
        if self._tenants is not None:
            await self._tenants.require_open(found)
        return found

    async def keep_judging(self) -> None:
        """Authenticates long calls again and again, without end."""
        while True:
            await asyncio.sleep(JUDGE_SECONDS)
            await self.judge()

    async def judge(self) -> None:
        """Authenticates every call that lasts or has no request yet once more, and ends each whose credential is
        missing, not valid any more or another principal's, or whose tenant is not open. While the store is away, no
        call is ended."""
        with suppress(NotecaseError):
            await self._chain.look()
        known = [one for one in self._under_way.values() if one.principal is not None]
        lasting = [one for one in known if one.lasts or not one.call.whole]
        for number, one in enumerate(lasting, 1):
            try:
                if await self._principal(one) != one.principal:
                    one.end(errors.unauthenticated())
            except NotecaseError as error:
                if not is_passing(error):
                    one.end(error)
            if number % JUDGED_AT_ONCE == 0:
                await asyncio.sleep(0)

    async def keep_moving(self) -> None:
        """Ends the streams whose readers are too slow, and the turns of slow requests, without end."""
        time = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, self.stall))
            now = time()
            self.gate.receiving.pass_on(now)
            for one in self._under_way.values():
                if one.call.due <= now:
                    one.end(one.call.overdue(self.stall))

    def leave(self, one: UnderWay) -> None:
        """Ends what `enter` began."""
        del self._under_way[one.task]


class Endpoint(ABC):
    """One method of the server: decodes its frames, calls its handler, and turns errors into a status."""

    make: ClassVar[Callable[..., Any]]
    """grpc's handler. It streams requests in every shape: a single one would be read before its caller is known."""
    drains: ClassVar[bool] = True
    """What the caller of a call that was refused still sends is read and let go of."""

    def __init__(self, door: Doorway, method: str, handler: Any) -> None:
        """`handler` is the one that grpc made for the servicer's method."""
        self._door = door
        self._method = method
        self._wrapped = handler
        streams = handler.request_streaming or handler.response_streaming
        self._lasts = streams or method.rpartition("/")[2] in WAITS
        self._decode = Decoder(method, handler.request_deserializer, door.judge_request)

    def handler(self) -> Any:
        """Makes the handler that takes the place of the wrapped one. It decodes by itself."""
        return type(self).make(self._handle, None, None)

    async def _handle(self, request: Any, context: Any) -> Any:
        one = None
        try:
            one = self._door.enter(self._method, self._lasts, context)
            await self._door.admit(one)
            return await self._carry_out(request, context, one.call)
        except grpc.aio.AbortError:
            raise
        except (Exception, asyncio.CancelledError) as error:  # nothing internal may reach the client
            why = error if one is None else one.ended(error)
            if not isinstance(why, Exception) and is_own_end():
                raise
            if isinstance(why, NotecaseError):
                self._door.note(why)
            else:
                log.error("rpc_crashed", exc_info=why)
                why = errors.internal(caller.get().request_id)
            error.__traceback__ = error.__context__ = error.__cause__ = None  # the status may wait, and hold frames
            if self.drains and why is error and one is not None and not one.call.whole:
                await drain(request, self._door.gate.receiving)
            await self._refuse(context, why)
        finally:
            if one is not None:
                self._door.leave(one)

    @abstractmethod
    def _carry_out(self, request: Any, context: Any, call: Call) -> Awaitable[Any]:
        """Calls the handler. `request` is a frame, or an iterator of frames, as they came."""

    async def _refuse(self, context: Any, error: NotecaseError) -> None:
        await abort(context, error)


class Single(Endpoint):
    """Answers with one message."""

    async def _respond(self, answer: Awaitable[Any], call: Call) -> bytes:
        """Returns the handler's answer, or the bytes that answered the same request before.

        Raises NotecaseError RATE_LIMITED for the answer of a read when too much waits on the connection already. The
        answer of a write is sent in any case."""
        try:
            frame: bytes = self._wrapped.response_serializer(await answer)
        except Replayed as replayed:
            frame = replayed.response
        if not call.has_room(len(frame)) and self._method.rpartition("/")[2].startswith(READS):
            raise errors.unread_answers()
        call.waits(len(frame))
        return frame


class Streaming(Endpoint):
    """Answers with a stream of messages, which the handler yields, or writes to the context that it is given."""

    def _outlet(self, context: Any, call: Call) -> Outlet:
        return Outlet(call, self._wrapped.response_serializer, context, self._door.stall)

    async def _refuse(self, context: Any, error: NotecaseError) -> None:
        """Waits at most the doorway's `stall`: the status is sent after the frames, which may not be read."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._door.stall):
                await abort(context, error)


class UnaryUnary(Single):
    make = grpc.stream_unary_rpc_method_handler

    async def _carry_out(self, request: Any, context: Any, call: Call) -> Any:
        message = await Decoded(self._decode, context, call).only()
        return await self._respond(self._wrapped.unary_unary(message, context), call)


class StreamUnary(Single):
    make = grpc.stream_unary_rpc_method_handler

    async def _carry_out(self, request: Any, context: Any, call: Call) -> Any:
        return await self._respond(self._wrapped.stream_unary(Decoded(self._decode, context, call), context), call)


class UnaryStream(Streaming):
    make = grpc.stream_stream_rpc_method_handler

    async def _carry_out(self, request: Any, context: Any, call: Call) -> None:
        outlet, message = self._outlet(context, call), await Decoded(self._decode, context, call).only()
        await outlet.sent(self._wrapped.unary_stream(message, outlet))


class StreamStream(Streaming):
    make = grpc.stream_stream_rpc_method_handler
    drains = False

    def _carry_out(self, request: Any, context: Any, call: Call) -> Awaitable[None]:
        outlet = self._outlet(context, call)
        return outlet.sent(self._wrapped.stream_stream(Decoded(self._decode, context, call), outlet))


SHAPES: Mapping[tuple[bool, bool], type[Endpoint]] = {
    (False, False): UnaryUnary,
    (False, True): UnaryStream,
    (True, False): StreamUnary,
    (True, True): StreamStream,
}
"""By whether the requests stream, and whether the answers do."""


async def abort(context: Any, error: NotecaseError) -> None:
    """Ends the call with the failure's status."""
    status = to_status(error)
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    with suppress(grpc.aio.InternalError):  # the caller is gone
        await context.abort(STATUS[status.code], status.message, details)

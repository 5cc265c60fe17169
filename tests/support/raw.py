"""Calls of every method by the bytes of its frames, as a client in any language can send them."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from notecase_server.rpc.server import SERVICES

STANDARD = (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
"""The files of the services that gRPC servers have in common."""

REFLECTION = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
"""Its messages are those of v1alpha: only the package differs."""


LOST = "Internal error from Core"
"""What grpc's client says when it writes to a call that has just ended: the status is lost."""

TOO_LONG = "The call went on for too long."


class Method(NamedTuple):
    """A method of the server."""

    path: str
    """Without the leading slash: `notecase.v1.SessionService/GetSession`."""
    request: type[Message]
    answer: type[Message]
    client_streams: bool
    server_streams: bool


class Outcome(NamedTuple):
    """How a call ended."""

    code: grpc.StatusCode
    message: str = ""
    status: status_pb2.Status | None = None
    """The details; None where there are none."""
    answers: Sequence[bytes] = ()
    cut: bool = False
    """It was ended by its caller, or by the caller's library, and not by the server."""

    @property
    def reason(self) -> str:
        """Of its ErrorInfo in the domain notecase.dev; empty without one."""
        found = error_details_pb2.ErrorInfo()
        for detail in self.status.details if self.status else ():
            if detail.Is(found.DESCRIPTOR):
                detail.Unpack(found)
        return found.reason if found.domain == "notecase.dev" else ""

    @property
    def fields(self) -> list[str]:
        """Of its BadRequest."""
        found = error_details_pb2.BadRequest()
        for detail in self.status.details if self.status else ():
            if detail.Is(found.DESCRIPTOR):
                detail.Unpack(found)
        return [violation.field for violation in found.field_violations]


def methods() -> dict[str, Method]:
    """All methods of the server, the standard services' too, by their paths."""
    pool = descriptor_pool.Default()
    services: list[Any] = [pool.FindServiceByName(f"notecase.v1.{name}") for name in SERVICES]
    services += [service for file in STANDARD for service in file.services_by_name.values()]
    found = {}
    for method in (method for service in services for method in service.methods):
        path = f"{method.containing_service.full_name}/{method.name}"
        request, answer = (message_factory.GetMessageClass(of) for of in (method.input_type, method.output_type))
        found[path] = Method(path, request, answer, method.client_streaming, method.server_streaming)
    alpha = found[REFLECTION.replace("v1.", "v1alpha.")]
    return found | {REFLECTION: alpha._replace(path=REFLECTION)}


METHODS = methods()


async def call(
    channel: grpc.aio.Channel,
    path: str,
    frames: Iterable[bytes],
    *,
    most: int | None = None,
    seconds: float = 60.0,
    metadata: Mapping[str, str] | None = None,
) -> Outcome:
    """Sends these frames and reads the answers to their end, or until `most` have come: then the call is cancelled,
    and its code is OK if nothing has gone wrong by then. A call that goes on for longer is cancelled, too."""
    method, sent = METHODS[path], list(frames)
    shape = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streams, method.server_streams]
    given: Any = _stream(sent) if method.client_streams else sent[0]
    started: Any = shape(f"/{path}")(given, metadata=tuple((metadata or {}).items()))  # type: ignore[operator]
    answers: list[bytes] = []
    try:
        async with asyncio.timeout(seconds):
            if not method.server_streams:
                answers.append(await started)
            else:
                async for answer in started:
                    answers.append(answer)
                    if len(answers) == most:
                        break
    except TimeoutError:
        return Outcome(grpc.StatusCode.CANCELLED, TOO_LONG, None, answers, cut=True)
    except grpc.aio.AioRpcError as error:
        if error.details() == LOST:
            return Outcome(grpc.StatusCode.CANCELLED, LOST, None, answers, cut=True)
        return Outcome(error.code(), error.details() or "", _details(error), answers)
    finally:
        started.cancel()
    return Outcome(grpc.StatusCode.OK, answers=answers)


async def _stream(frames: Sequence[bytes]) -> AsyncIterator[bytes]:
    for frame in frames:
        yield frame


def _details(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return None

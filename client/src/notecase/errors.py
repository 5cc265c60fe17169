"""One exception with a stable reason for every refusal and failure: `NotecaseError`.

It is not a `grpc.RpcError`, because a refused command and a failed run are data, not failed calls, and have the same
information. For a failed call, its `RpcError` is the `__cause__`.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Self

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from notecase import v1

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_REASONS = {number: name.removeprefix("ERROR_REASON_") for name, number in v1.ErrorReason.items() if number}


_HINTS = {
    "AGENT_NOT_FOUND": "In Python: put_agent(…) creates an agent, list_agents() lists them.",
    "SESSION_NOT_FOUND": "In Python: create_session(…) creates a session, list_sessions() lists them.",
    "RUN_ACTIVE": 'In Python: on_busy="queue", "interrupt" or "rollback" for run and invoke; attach(…), cancel(…).',
    "UNAUTHENTICATED": "In Python: Client(token=…), or the variable NOTECASE_TOKEN. With a client certificate: unset "
    "NOTECASE_TOKEN.",
}
"""What to do in Python, by reason: the service's messages name calls of the API."""

_OVERSIZED = re.compile(r"Received message larger than max \((\d+) vs\. (\d+)\)")
"""What grpc's server says of a request that it does not even receive: the service cannot give it a reason."""

_CLIENT_TOOL = re.compile(r"(start\.)?client_tools\[\d+\]\.name")


class Violation(NamedTuple):
    """One invalid field of a request, and what would be valid."""

    field: str
    description: str


class Resource(NamedTuple):
    """The resource that an error is about: `Resource("notecase.v1.Session", "sessions/s1")`."""

    type: str
    name: str


class NotecaseError(Exception):
    """The service refused a request or failed, or could not be reached.

    Programs should check `reason`: a `v1.ErrorReason` without its prefix, such as "RUN_ACTIVE". It is empty when the
    error does not come from the service: the connection broke, the deadline passed, or something else answered. `code`
    is always set. `message` is for people, as the service wrote it; `str(error)` adds what to do in Python, where that
    differs. `retry_after` is in seconds, or None.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[Violation] = (),
        resource: Resource | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(code, reason, message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.resource = resource
        self.retry_after = retry_after

    def __str__(self) -> str:
        hint = _HINTS.get(self.reason, "")
        if any(_CLIENT_TOOL.fullmatch(one.field) for one in self.violations):
            hint = "In Python: pass Tool(function, declare=False) for a tool that the agent declares."
        return f"{self.reason or self.code.name}: {self.message} {hint}".rstrip()

    @classmethod
    def from_rpc_error(cls, error: grpc.RpcError, address: str = "") -> Self:
        """Decodes what a stub raised, synchronous or not.

            try:
                stub.GetSession(request)
            except grpc.RpcError as error:
                raise NotecaseError.from_rpc_error(error) from error

        Details that are absent, of an unknown type or do not decode are left out; this never fails. With `address`, the
        message of a server that cannot be reached names it."""
        decoded = cls(error.code(), "", error.details() or "")
        # A proxy may rewrite a status: then only its code and message are known.
        with contextlib.suppress(ValueError, DecodeError):
            # Typed for calls, it takes their errors too.
            status: status_pb2.Status | None = rpc_status.from_call(error)  # type: ignore[arg-type]
            for detail in status.details if status else ():
                decoded._add(detail)
        if address and decoded.code is grpc.StatusCode.UNAVAILABLE and not decoded.reason:
            if "Failed parsing HTTP/2" in decoded.message:
                found = "it speaks HTTP/1" if "http1" in decoded.message else "it does not speak HTTP/2"
                return cls(decoded.code, "", f"{address} is not a gRPC server: {found}")
            return cls(decoded.code, "", f"{address} cannot be reached: {_cause(decoded.message)}")
        oversized = _OVERSIZED.search(decoded.message)
        if oversized and not decoded.reason and not decoded.message.startswith("CLIENT"):
            size, most = oversized.groups()
            limit = f"The request has {size} bytes; the server receives at most {most}."
            return cls(decoded.code, "PAYLOAD_TOO_LARGE", f"{limit} Upload large content, and refer to it.")
        return decoded

    @classmethod
    def from_proto(cls, error: v1.Error) -> Self:
        """The error of a failed run or a refused command."""
        code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
        return cls(code, _REASONS.get(error.reason, ""), error.message, metadata=error.metadata)

    def _add(self, detail: any_pb2.Any) -> None:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            if info.domain == v1.ERROR_DOMAIN:
                self.reason, self.metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest.FromString(detail.value)
            self.violations = tuple(Violation(v.field, v.description) for v in request.field_violations)
        elif detail.Is(error_details_pb2.ResourceInfo.DESCRIPTOR):
            info = error_details_pb2.ResourceInfo.FromString(detail.value)
            self.resource = Resource(info.resource_type, info.resource_name)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
            self.retry_after = retry.retry_delay.ToTimedelta().total_seconds()


@contextlib.contextmanager
def as_written(*prefixes: str) -> Iterator[None]:
    """Names the fields of a request as its caller wrote them: without the first of `prefixes` that fits. A caller of a
    method with arguments does not see their paths in the request."""
    try:
        yield
    except NotecaseError as error:
        if not error.violations:
            raise
        told = {_without(prefixes, one.field): one.description for one in error.violations}
        message = "; ".join(f"{field}: {description}" for field, description in told.items())
        raise NotecaseError(
            error.code,
            error.reason,
            message if message.endswith(".") else f"{message}.",
            metadata=error.metadata,
            violations=[Violation(*one) for one in told.items()],
            resource=error.resource,
            retry_after=error.retry_after,
        ) from error.__cause__


def _without(prefixes: Iterable[str], field: str) -> str:
    return next((field.removeprefix(prefix) for prefix in prefixes if field.startswith(prefix)), field)


def _cause(details: str) -> str:
    """The cause in what gRPC says of a connection: "failed to connect to all addresses; last error: UNKNOWN:
    ipv4:127.0.0.1:7420: Failed to connect to remote host: Connection refused"."""
    last = details.rpartition("last error: ")[2]
    return re.sub(r"^[A-Z_]+: |(ipv4|ipv6|unix):\S+: ", "", last)

"""Writes a failure as google.rpc.Status."""

import math

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError

STATUS_BYTES = 4 << 10
"""The most bytes of the details. They are sent in trailers, of which clients accept 8 KiB."""

MESSAGE_BYTES = 1000
"""The size of the message at most, as the other trailer has it."""


def to_status(error: NotecaseError) -> status_pb2.Status:
    """Returns the failure as google.rpc.Status, ErrorInfo first. Long texts and lists of violations are cut to what
    trailers hold."""
    status = status_pb2.Status(code=error.code, message=_quotable(error.message))
    info = error_details_pb2.ErrorInfo(
        domain=v1.ERROR_DOMAIN,
        reason=errors.reason_name(error.reason),
        metadata={key: _cut(value, 300) for key, value in error.metadata.items()},
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
                resource_type=f"notecase.v1.{error.resource.kind.title()}", resource_name=_cut(error.resource.name, 300)
            ),
        )
    if error.quota:
        violation = error_details_pb2.QuotaFailure.Violation(subject="server", description=error.quota)
        _add(status, error_details_pb2.QuotaFailure(violations=[violation]))
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for found in error.violations:
            bad.field_violations.add(field=_cut(found.field, 200), description=_cut(found.description, 300))
            if bad.ByteSize() + status.ByteSize() > STATUS_BYTES:
                bad.field_violations[-1].CopyFrom(
                    error_details_pb2.BadRequest.FieldViolation(
                        description=f"and {len(error.violations) - len(bad.field_violations) + 1} more"
                    )
                )
                break
        _add(status, bad)
    return status


def _quotable(text: str) -> str:
    """Cuts a text to MESSAGE_BYTES, where each byte that is not printable ASCII takes three: gRPC quotes it."""
    if len(text) * 12 <= MESSAGE_BYTES:  # however it is quoted
        return text
    size = 0
    for index, character in enumerate(text):
        plain = " " <= character <= "~" and character != "%"
        size += 1 if plain else 3 * len(character.encode())
        if size > MESSAGE_BYTES:
            return text[:index]
    return text


def _cut(text: str, size: int) -> str:
    """Cuts a text to that many bytes of UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)

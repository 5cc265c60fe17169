"""What the service says about a failure reaches the program, and what is not said is not made up."""

import pickle

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2, message, wrappers_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio
from notecase import Client, NotecaseError, Resource, Retry, Violation, v1

from tests.support.ports import free_port
from tests.support.server import running

_KEY = "grpc-status-details-bin"


def _rpc_error(code: int, text: str, *details: message.Message) -> aio.AioRpcError:
    """As grpc raises it for a status with these details."""
    status = status_pb2.Status(code=code, message=text)
    for detail in details:
        status.details.add().Pack(detail)
    found = next(c for c in grpc.StatusCode if c.value[0] == code)
    return aio.AioRpcError(found, aio.Metadata(), aio.Metadata((_KEY, status.SerializeToString())), details=text)


def test_every_detail_is_decoded() -> None:
    """Reason, metadata, fields, resource and the time to wait come out of the status."""
    error = NotecaseError.from_rpc_error(
        _rpc_error(
            code_pb2.INVALID_ARGUMENT,
            "Two fields are wrong.",
            error_details_pb2.ErrorInfo(domain="notecase.dev", reason="INVALID_FIELD", metadata={"a": "b"}),
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field="name", description="is empty"),
                    error_details_pb2.BadRequest.FieldViolation(field="page_size", description="is negative"),
                ]
            ),
            error_details_pb2.ResourceInfo(resource_type="notecase.v1.Session", resource_name="sessions/s"),
            error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
        )
    )
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.reason, error.message) == ("INVALID_FIELD", "Two fields are wrong.")
    assert error.metadata == {"a": "b"}
    assert error.violations == (Violation("name", "is empty"), Violation("page_size", "is negative"))
    assert error.resource == Resource("notecase.v1.Session", "sessions/s")
    assert error.retry_after == 1.5
    assert str(error) == "INVALID_FIELD: Two fields are wrong."


def test_an_error_survives_pickling() -> None:
    """With all it knows: it may cross to another process."""
    error = NotecaseError(
        grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "It changed.", metadata={"etag": "7"}, retry_after=2.0
    )
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


@pytest.mark.parametrize(
    "detail",
    [
        error_details_pb2.ErrorInfo(domain="example.org", reason="RUN_ACTIVE"),
        wrappers_pb2.StringValue(value="of a type nobody expects"),
    ],
)
def test_details_of_others_are_left_out(detail: message.Message) -> None:
    """A reason is only the service's own: a proxy's may mean anything."""
    error = NotecaseError.from_rpc_error(_rpc_error(code_pb2.UNAVAILABLE, "Away.", detail))
    assert (error.code, error.reason, error.message) == (grpc.StatusCode.UNAVAILABLE, "", "Away.")
    assert (error.metadata, error.violations, error.resource, error.retry_after) == ({}, (), None, None)


_BROKEN_ANY = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")


@pytest.mark.parametrize(
    "trailing",
    [
        None,
        aio.Metadata(),
        aio.Metadata((_KEY, b"\xff\xff")),
        aio.Metadata((_KEY, status_pb2.Status(code=3, message="Other words.").SerializeToString())),
        aio.Metadata((_KEY, status_pb2.Status(code=14, message="Away.", details=[_BROKEN_ANY]).SerializeToString())),
    ],
    ids=["none", "empty", "garbage", "another status", "a garbled detail"],
)
def test_without_usable_details_code_and_words_remain(trailing: aio.Metadata | None) -> None:
    """Decoding an error never fails with another."""
    raised = aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, None, trailing, details="Away.")
    error = NotecaseError.from_rpc_error(raised)
    assert (error.code, error.reason, error.message) == (grpc.StatusCode.UNAVAILABLE, "", "Away.")


def test_the_error_of_a_run_is_the_same_exception() -> None:
    """A failed run and a refused command are data; as exceptions they read like a refused call."""
    error = NotecaseError.from_proto(
        v1.Error(
            code=code_pb2.FAILED_PRECONDITION, reason=v1.ERROR_REASON_RUN_ACTIVE, message="Busy.", metadata={"run": "r"}
        )
    )
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RUN_ACTIVE")
    assert (error.message, error.metadata) == ("Busy.", {"run": "r"})


@pytest.mark.parametrize(
    ("reason", "cure"),
    [
        ("RUN_ACTIVE", 'on_busy="queue"'),
        ("UNAUTHENTICATED", "With a client certificate: unset NOTECASE_TOKEN"),
        ("AGENT_NOT_FOUND", "put_agent(…) creates"),
        ("SESSION_NOT_FOUND", "list_sessions() lists"),
    ],
)
def test_an_error_says_what_to_do_in_python(reason: str, cure: str) -> None:
    """The service's words stay in `message`, for programs that show them elsewhere."""
    error = NotecaseError(grpc.StatusCode.FAILED_PRECONDITION, reason, "The service's words.")
    assert str(error).startswith(f"{reason}: The service's words. In Python: ")
    assert cure in str(error)
    assert "The service's words." == error.message


def test_an_unknown_reason_or_code_can_be_read() -> None:
    """A newer server may know more of both."""
    error = NotecaseError.from_proto(
        v1.Error.FromString(v1.Error(code=99, message="New.").SerializeToString() + b"\x10\xe7\x07")
    )
    assert (error.code, error.reason, error.message) == (grpc.StatusCode.UNKNOWN, "", "New.")


async def test_every_kind_of_call_reports_a_server_that_cannot_be_reached() -> None:
    """One exception for all: unary, streamed, read by hand, and the client's own methods; grpc's is its cause."""
    async with Client(f"127.0.0.1:{free_port()}", retry=Retry(tries=1, first_delay=0)) as client:
        raised = []
        with pytest.raises(NotecaseError) as unary:
            await client.server.GetServerInfo(v1.GetServerInfoRequest())
        with pytest.raises(NotecaseError) as streamed:
            async for _ in client.runs.WatchEvents(v1.WatchEventsRequest(name="sessions/s")):
                pass
        with pytest.raises(NotecaseError) as read:
            await client.runs.WatchEvents(v1.WatchEventsRequest(name="sessions/s")).read()
        with pytest.raises(NotecaseError) as entered:
            await client.run("Hello", session="sessions/s").__aenter__()
        with pytest.raises(NotecaseError) as method:
            await client.put_state("sessions/s", "key", 1)
        raised = [info.value for info in (unary, streamed, read, entered, method)]
    assert [error.code for error in raised] == [grpc.StatusCode.UNAVAILABLE] * 5
    assert [error.reason for error in raised] == [""] * 5
    assert all(isinstance(error.__cause__, aio.AioRpcError) for error in raised)


async def test_a_request_that_the_server_does_not_receive_is_an_error_with_a_way_out() -> None:
    """Above 16 MiB the transport refuses it; its reason is that of a request that the server itself finds too large."""
    async with running() as served, served.client() as client:
        with pytest.raises(
            NotecaseError, match=r"20000\d+ bytes; the server receives at most 16777216\. Upload"
        ) as raised:
            await client.invoke("." * 20_000_000, agent="detective")
    assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE") == (raised.value.code, raised.value.reason)


def test_a_synchronous_stub_is_decoded_alike() -> None:
    """`from_rpc_error` serves those who use the generated stubs without asyncio."""
    with grpc.insecure_channel(f"127.0.0.1:{free_port()}") as channel:
        with pytest.raises(grpc.RpcError) as raised:
            v1.ServerServiceStub(channel).GetServerInfo(v1.GetServerInfoRequest())
        error = NotecaseError.from_rpc_error(raised.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "")

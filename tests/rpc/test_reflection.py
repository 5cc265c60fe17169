"""A server describes itself to a client that has nothing but the reflection protocol, in both of its versions."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor
from google.protobuf.descriptor_pool import Default, DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st
from notecase import NotecaseError
from notecase_server.rpc.reflection import Catalog, Reflection

from tests.support.server import Running, Spawned, running

SERVICES = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    *(f"notecase.v1.{name}Service" for name in ("Agent", "Audit", "Blob", "Key", "Message")),
    *(f"notecase.v1.{name}Service" for name in ("Run", "Server", "Session", "State", "Tenant")),
]

Request = reflection_pb2.ServerReflectionRequest
Response = reflection_pb2.ServerReflectionResponse

GARBAGE = [b"\xff\xff\xff", b"\x0a\x03\xff\xfe\xfd"]
"""A tag that never ends, and a string that is not UTF-8: field 1 is one in both protocols."""


@pytest.fixture
async def served() -> AsyncIterator[Running]:
    async with running("memory:") as server:
        yield server


class Asking:
    """A reflection client by hand: the bytes of v1 and v1alpha are the same."""

    def __init__(self, channel: grpc.aio.Channel, version: str) -> None:
        self._ask = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=Request.SerializeToString,
            response_deserializer=Response.FromString,
        )

    async def all(self, *requests: Request) -> list[Response]:
        """The responses to requests on one stream."""
        return [response async for response in self._ask(iter(requests))]

    async def services(self) -> list[str]:
        (listed,) = await self.all(Request(list_services="*"))
        return [service.name for service in listed.list_services_response.service]


@pytest.fixture(params=["v1", "v1alpha"])
def asking(request: pytest.FixtureRequest, served: Running) -> Asking:
    return Asking(served.channel, request.param)


def pool_of(response: Response) -> DescriptorPool:
    """The descriptors of one response, in a separate pool; it fails for a file whose imports are missing."""
    assert response.WhichOneof("message_response") == "file_descriptor_response", response.error_response
    packed = response.file_descriptor_response.file_descriptor_proto
    waiting = [descriptor_pb2.FileDescriptorProto.FromString(file) for file in packed]
    pool, added = DescriptorPool(), set[str]()
    while waiting:
        ready = [file for file in waiting if set(file.dependency) <= added]
        assert ready, f"imports are missing for {[file.name for file in waiting]}"
        for file in ready:
            pool.Add(file)
        added |= {file.name for file in ready}
        waiting = [file for file in waiting if file.name not in added]
    return pool


def messages_in(message: Descriptor) -> list[Descriptor]:
    return [message, *(inner for nested in message.nested_types for inner in messages_in(nested))]


async def test_what_is_listed_can_be_described_with_all_that_it_needs(asking: Asking) -> None:
    """Health and reflection themselves, too; each answer alone makes the service, its methods and their messages."""
    assert SERVICES == await asking.services()
    for name in SERVICES:
        (response,) = await asking.all(Request(file_containing_symbol=name))
        pool = pool_of(response)
        service = pool.FindServiceByName(name)
        assert service.methods
        for method in service.methods:
            assert method.input_type.full_name == pool.FindMessageTypeByName(method.input_type.full_name).full_name


async def test_every_symbol_of_every_file_resolves(asking: Asking) -> None:
    """Methods, fields, oneofs, enums and their values in both scopes, however deep: to the file that declares them."""
    responses = await asking.all(*(Request(file_containing_symbol=name) for name in SERVICES))
    pools = {name: pool_of(response) for name, response in zip(SERVICES, responses, strict=True)}
    expected: dict[str, str] = {}
    for name, pool in pools.items():
        file = pool.FindServiceByName(name).file
        messages = [inner for top in file.message_types_by_name.values() for inner in messages_in(top)]
        enums: list[EnumDescriptor] = [
            *file.enum_types_by_name.values(),
            *(enum for message in messages for enum in message.enum_types),
        ]
        methods = [method for service in file.services_by_name.values() for method in service.methods]
        members: list[Any] = [member for message in messages for member in (*message.fields, *message.oneofs)]
        declared: list[Any] = [*messages, *enums, *methods, *members]
        expected |= {each.full_name: file.name for each in declared}
        for enum in enums:
            for scope in (enum.full_name, enum.full_name.rpartition(".")[0]):
                expected |= {f"{scope}.{value.name}": file.name for value in enum.values}
    assert {
        "notecase.v1.RunService.Run",
        "notecase.v1.Run.STATE_RUNNING",
        "notecase.v1.Session.LabelsEntry.key",
    } <= set(expected)
    responses = await asking.all(*(Request(file_containing_symbol=symbol) for symbol in expected))
    found = {
        symbol: descriptor_pb2.FileDescriptorProto.FromString(
            response.file_descriptor_response.file_descriptor_proto[0]
        ).name
        for symbol, response in zip(expected, responses, strict=True)
    }
    assert expected == found


async def test_files_are_found_by_their_names(asking: Asking) -> None:
    """Those that come with an answer, by the names that it gives them."""
    (response,) = await asking.all(Request(file_containing_symbol="notecase.v1.RunService"))
    packed = list(response.file_descriptor_response.file_descriptor_proto)
    names = [descriptor_pb2.FileDescriptorProto.FromString(file).name for file in packed]
    assert {"notecase/v1/run.proto", "google/protobuf/timestamp.proto"} <= set(names)
    responses = await asking.all(*(Request(file_by_filename=name) for name in names))
    assert packed == [response.file_descriptor_response.file_descriptor_proto[0] for response in responses]


async def test_what_an_error_carries_is_described(asking: Asking) -> None:
    for name in ("Status", "ErrorInfo", "BadRequest", "RetryInfo", "ResourceInfo", "QuotaFailure"):
        (response,) = await asking.all(Request(file_containing_symbol=f"google.rpc.{name}"))
        assert pool_of(response).FindMessageTypeByName(f"google.rpc.{name}")


async def test_a_server_describes_nothing_else_that_its_process_has_loaded(asking: Asking) -> None:
    loaded = "google/protobuf/unittest_of_somebody.proto"
    Default().AddSerializedFile(
        descriptor_pb2.FileDescriptorProto(
            name=loaded, package="somebody", message_type=[descriptor_pb2.DescriptorProto(name="Secret")]
        ).SerializeToString()
    )
    responses = await asking.all(Request(file_by_filename=loaded), Request(file_containing_symbol="somebody.Secret"))
    assert [grpc.StatusCode.NOT_FOUND.value[0]] * 2 == [response.error_response.error_code for response in responses]


NOT_FOUND = [
    Request(file_containing_symbol=""),
    Request(file_containing_symbol="notecase.v1"),
    Request(file_containing_symbol="notecase.v1.Nobody"),
    Request(file_containing_symbol="notecase.v1.RunService.Nothing"),
    Request(file_containing_symbol="notecase.v1.Run.nothing"),
    Request(file_containing_symbol="notecase.v1.Run.STATE_NONE"),
    Request(file_containing_symbol="notecase.v1.runservice"),
    Request(file_by_filename=""),
    Request(file_by_filename="../../etc/passwd"),
    Request(file_by_filename="run.proto"),
    Request(all_extension_numbers_of_type="notecase.v1.Nobody"),
    Request(all_extension_numbers_of_type="notecase.v1.RunService"),
    Request(
        file_containing_extension=reflection_pb2.ExtensionRequest(containing_type="notecase.v1.Run", extension_number=1)
    ),
    Request(
        file_containing_extension=reflection_pb2.ExtensionRequest(containing_type="nobody.Here", extension_number=-1)
    ),
    Request(file_containing_extension=reflection_pb2.ExtensionRequest()),
]


async def test_a_missing_symbol_is_an_error_in_the_stream_which_continues(asking: Asking) -> None:
    """Each with a sentence and the request that it answers."""
    *responses, last = await asking.all(*NOT_FOUND, Request(list_services=""))
    for request, response in zip(NOT_FOUND, responses, strict=True):
        assert request == response.original_request
        assert response.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        assert response.error_response.error_message.startswith("There is no ")
    assert len(SERVICES) == len(last.list_services_response.service)


async def test_a_request_that_asks_nothing_or_too_much_is_invalid(asking: Asking) -> None:
    """A long one does not come back: a response could grow past what a client takes."""
    requests = [Request(), Request(host="here"), Request(file_containing_symbol="x" * 900_000)]
    responses = await asking.all(*requests)
    assert [grpc.StatusCode.INVALID_ARGUMENT.value[0]] * 3 == [each.error_response.error_code for each in responses]
    assert [requests[0], requests[1], Request()] == [each.original_request for each in responses]
    assert ("here", "set one of file_by_filename" in responses[1].error_response.error_message) == (
        responses[1].valid_host,
        True,
    )
    assert responses[2].error_response.error_message == "The request has 900004 bytes; the limit is 4096."


async def test_a_message_without_extensions_has_none(asking: Asking) -> None:
    (response,) = await asking.all(Request(all_extension_numbers_of_type="notecase.v1.Run"))
    answer = response.all_extension_numbers_response
    assert response.WhichOneof("message_response") == "all_extension_numbers_response"
    assert ("notecase.v1.Run", []) == (answer.base_type_name, list(answer.extension_number))


def test_extensions_are_found_by_their_message_and_number() -> None:
    """At the top of a file and in a message. The contract has none, so this asks about files of its own."""
    pool = DescriptorPool()
    field = descriptor_pb2.FieldDescriptorProto
    base = descriptor_pb2.FileDescriptorProto(name="base.proto", package="p", syntax="proto2")
    base.message_type.add(name="Base").extension_range.add(start=100, end=200)
    more = descriptor_pb2.FileDescriptorProto(
        name="more.proto", package="p", syntax="proto2", dependency=["base.proto"]
    )
    wide = {"label": field.LABEL_OPTIONAL, "type": field.TYPE_STRING, "extendee": ".p.Base"}
    more.extension.add(name="top", number=120, **wide)
    more.message_type.add(name="Holder").extension.add(name="inner", number=110, **wide)
    for file in (base, more):
        pool.Add(file)
    reflection = Reflection(["p.Base"], Catalog([pool.FindFileByName("more.proto")]))
    numbers = reflection.answer(Request(all_extension_numbers_of_type="p.Base")).all_extension_numbers_response
    assert [110, 120] == list(numbers.extension_number)
    for request in (
        *(
            Request(file_containing_extension={"containing_type": "p.Base", "extension_number": number})
            for number in (110, 120)
        ),
        Request(file_containing_symbol="p.top"),
        Request(file_containing_symbol="p.Holder.inner"),
    ):
        found = pool_of(reflection.answer(request))
        assert {"p.top", "p.Holder.inner"} == {
            found.FindExtensionByName(name).full_name for name in ("p.top", "p.Holder.inner")
        }


@given(data=st.data())
def test_no_request_is_without_an_answer(data: st.DataObject) -> None:
    """Whatever decodes: bytes by chance, and names that are nearly right in every kind of question."""
    file = health_pb2.DESCRIPTOR
    reflection = Reflection(["grpc.health.v1.Health"], Catalog([Default().FindFileByName(file.name)]))
    near = st.sampled_from([file.name, "grpc.health.v1.Health.Check", "grpc.health.v1.HealthCheckRequest"])
    name = near.flatmap(lambda whole: st.integers(0, len(whole)).map(lambda cut: whole[:cut])) | st.text()
    kind = st.sampled_from(["file_by_filename", "file_containing_symbol", "all_extension_numbers_of_type"])
    frame = data.draw(
        st.binary() | st.builds(lambda field, text: Request(**{field: text}).SerializeToString(), kind, name)
    )
    try:
        request = Request.FromString(frame)
    except DecodeError:
        return
    answer = reflection.answer(request)
    assert Response.FromString(answer.SerializeToString()).WhichOneof("message_response") is not None


@pytest.mark.parametrize("frame", GARBAGE, ids=["garbage", "not UTF-8"])
async def test_garbage_is_an_invalid_argument_for_health_and_reflection_too(tmp_path: Path, frame: bytes) -> None:
    """By a status with details; and the log has neither a traceback nor a crash."""
    server = await Spawned.start("memory:", tmp_path / "log", forked=True)
    try:
        async with grpc.aio.insecure_channel(server.address) as opened:
            channel: Any = opened
            attempts = [
                channel.unary_unary("/grpc.health.v1.Health/Check")(frame),
                channel.unary_stream("/grpc.health.v1.Health/Watch")(frame).read(),
                *(
                    channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")(
                        iter([frame])
                    ).read()
                    for version in ("v1", "v1alpha")
                ),
            ]
            for attempt in attempts:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await attempt
                error = NotecaseError.from_rpc_error(refused.value)
                assert (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") == (error.code, error.reason)
    finally:
        await server.stop()
    log = (tmp_path / "log").read_text()
    assert ([], 4) == (
        [word for word in ("Traceback", "rpc_crashed", "DecodeError") if word in log],
        log.count("refused"),
    )


async def test_health_keeps_its_own_protocol(served: Running) -> None:
    """An unknown service is NOT_FOUND for Check and a state for Watch; List knows all of them."""
    channel: Any = served.channel
    health: Any = health_pb2_grpc.HealthStub(channel)
    unknown = health_pb2.HealthCheckRequest(service="nobody")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await health.Check(unknown)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    watch = health.Watch(unknown)
    assert health_pb2.HealthCheckResponse.SERVICE_UNKNOWN == (await watch.read()).status
    watch.cancel()
    listed = await channel.unary_unary("/grpc.health.v1.Health/List")(b"")
    statuses = health_pb2.HealthListResponse.FromString(listed).statuses  # type: ignore[attr-defined]  # as in ops.py
    ours = [name for name in SERVICES if name.startswith("notecase.")]
    assert dict.fromkeys(["", "liveness", *ours], health_pb2.HealthCheckResponse.SERVING) == {
        name: held.status for name, held in statuses.items()
    }


async def test_a_watch_of_health_sees_the_end() -> None:
    async with running("memory:") as server:
        health: Any = health_pb2_grpc.HealthStub(server.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert health_pb2.HealthCheckResponse.SERVING == (await watch.read()).status
        stopping = asyncio.create_task(server.server.stop())
        assert health_pb2.HealthCheckResponse.NOT_SERVING == (await watch.read()).status
        watch.cancel()
        await stopping

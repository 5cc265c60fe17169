"""The service that describes the others, as grpc.reflection.v1 and v1alpha, so that a tool needs no proto files.

grpcio-reflection's own servicer looks symbols up in protobuf's pool, which finds no methods, and whatever else the
process has loaded. This one indexes the files of what it lists, and describes nothing else.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
from google.protobuf.descriptor_pool import Default, DescriptorPool
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection_pb2

V1 = "grpc.reflection.v1"

V1ALPHA = "grpc.reflection.v1alpha"

MAX_REQUEST_BYTES = 4 << 10
"""A name is far shorter. Each response repeats its request, and must not exceed a client's limit."""

IN_ERRORS = (status_pb2.DESCRIPTOR, error_details_pb2.DESCRIPTOR)
"""The messages in an error's details. No service's file imports them, but a tool that prints an error asks for them."""

Request = reflection_pb2.ServerReflectionRequest
Response = reflection_pb2.ServerReflectionResponse


class Refused(Exception):
    """A question without an answer: it becomes the response's error_response."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Catalog:
    """Files with all that they import, by their names, by the symbols they declare and by the messages they extend."""

    def __init__(self, files: Iterable[FileDescriptor]) -> None:
        self._files: dict[str, FileDescriptor] = {}
        self._symbols: dict[str, FileDescriptor] = {}
        self._extensions: dict[str, dict[int, FileDescriptor]] = {}
        for file in files:
            for each in _with_imports(file).values():
                if each.name not in self._files:
                    self._add(each)

    def file(self, name: str) -> FileDescriptor:
        """Finds a file by its name. Raises Refused NOT_FOUND."""
        if name not in self._files:
            raise Refused(code_pb2.NOT_FOUND, f"There is no file {name!r}.")
        return self._files[name]

    def symbol(self, name: str) -> FileDescriptor:
        """Finds the file that declares a service, method, message, field, oneof, enum, value or extension.
        Raises Refused NOT_FOUND."""
        if name not in self._symbols:
            raise Refused(code_pb2.NOT_FOUND, f"There is no symbol {name!r}.")
        return self._symbols[name]

    def extensions(self, message: str) -> dict[int, FileDescriptor]:
        """Finds the files that extend a message, by the extension's number. Raises Refused NOT_FOUND when there is no
        such message."""
        if message not in self._extensions:
            raise Refused(code_pb2.NOT_FOUND, f"There is no message {message!r}.")
        return self._extensions[message]

    def extension(self, message: str, number: int) -> FileDescriptor:
        """Finds the file that extends a message by that number. Raises Refused NOT_FOUND."""
        found = self.extensions(message)
        if number not in found:
            raise Refused(code_pb2.NOT_FOUND, f"There is no extension {number} of {message!r}.")
        return found[number]

    def _add(self, file: FileDescriptor) -> None:
        self._files[file.name] = file
        services = file.services_by_name.values()
        messages = [message for top in file.message_types_by_name.values() for message in _with_nested(top)]
        enums = [*file.enum_types_by_name.values(), *(enum for message in messages for enum in message.enum_types)]
        nested = [extension for message in messages for extension in message.extensions]
        extensions: list[Any] = [*file.extensions_by_name.values(), *nested]
        members = [member for message in messages for member in (*message.fields, *message.oneofs)]
        methods = [method for service in services for method in service.methods]
        declared: list[Any] = [*services, *methods, *messages, *members, *extensions]
        names = [each.full_name for each in declared] + [name for enum in enums for name in _names(enum)]
        self._symbols.update(dict.fromkeys(names, file))
        for message in messages:
            self._extensions.setdefault(message.full_name, {})
        for extension in extensions:
            self._extensions.setdefault(extension.containing_type.full_name, {})[extension.number] = file


class Reflection:
    """Answers questions about a catalog. A question without an answer does not end the stream."""

    def __init__(self, services: list[str], catalog: Catalog) -> None:
        """Raises Refused when one of the services is not in the catalog, since everything that is listed must be
        described."""
        for name in services:
            catalog.symbol(name)
        self._services = sorted(services)
        self._catalog = catalog

    async def answers(self, requests: AsyncIterator[Request], _context: object) -> AsyncIterator[Response]:
        """Answers each request, in their order."""
        async for request in requests:
            yield self.answer(request)

    def answer(self, request: Request) -> Response:
        """Answers one request, which comes back in the response unless it is too large."""
        try:
            size = request.ByteSize()
            if size > MAX_REQUEST_BYTES:
                problem = f"The request has {size} bytes; the limit is {MAX_REQUEST_BYTES}."
                return _failed(Request(), code_pb2.INVALID_ARGUMENT, problem)
            return self._found(request)
        except Refused as refused:
            return _failed(request, refused.code, refused.message)

    def _found(self, request: Request) -> Response:
        catalog, response = self._catalog, _response(request)
        match request.WhichOneof("message_request"):
            case "list_services":
                for name in self._services:
                    response.list_services_response.service.add(name=name)
            case "all_extension_numbers_of_type":
                name = request.all_extension_numbers_of_type
                numbers = sorted(catalog.extensions(name))
                response.all_extension_numbers_response.base_type_name = name
                response.all_extension_numbers_response.extension_number.extend(numbers)
            case "file_by_filename":
                _put(response, catalog.file(request.file_by_filename))
            case "file_containing_symbol":
                _put(response, catalog.symbol(request.file_containing_symbol))
            case "file_containing_extension":
                extension = request.file_containing_extension
                _put(response, catalog.extension(extension.containing_type, extension.extension_number))
            case _:
                known = [field.name for field in Request.DESCRIPTOR.oneofs_by_name["message_request"].fields]
                raise Refused(code_pb2.INVALID_ARGUMENT, f"The request is empty: set one of {', '.join(known)}.")
        return response


def add_reflection(server: grpc.aio.Server, services: list[str]) -> None:
    """Makes the server describe the services, reflection itself, and what errors carry. Raises KeyError for a service
    whose stubs are not loaded."""
    own = [f"{package}.ServerReflection" for package in (V1, V1ALPHA)]
    files = [Default().FindServiceByName(name).file for name in services]
    files += [_v1(), Default().FindFileByName(reflection_pb2.DESCRIPTOR.name), *IN_ERRORS]
    method = grpc.stream_stream_rpc_method_handler(
        Reflection([*services, *own], Catalog(files)).answers,
        request_deserializer=Request.FromString,
        response_serializer=Response.SerializeToString,
    )
    for name in own:
        handler = grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
        server.add_generic_rpc_handlers((handler,))


def _response(request: Request) -> Response:
    return Response(valid_host=request.host, original_request=request)


def _failed(request: Request, code: int, message: str) -> Response:
    response = _response(request)
    response.error_response.error_code = code
    response.error_response.error_message = message
    return response


def _put(response: Response, file: FileDescriptor) -> None:
    files = _with_imports(file).values()
    response.file_descriptor_response.file_descriptor_proto.extend(each.serialized_pb for each in files)


def _v1() -> FileDescriptor:
    """Makes the file of v1 from that of v1alpha: only the package differs, and the messages have the same bytes. Its
    pool is its own, because tools of an operator in this process may load the real one into the default pool."""
    file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    file.name, file.package = "grpc/reflection/v1/reflection.proto", V1
    file.ClearField("options")
    for field in (field for message in file.message_type for field in message.field if field.type_name):
        field.type_name = field.type_name.replace(V1ALPHA, V1)
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(V1ALPHA, V1)
            method.output_type = method.output_type.replace(V1ALPHA, V1)
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindFileByName(file.name)


def _with_imports(file: FileDescriptor, found: dict[str, FileDescriptor] | None = None) -> dict[str, FileDescriptor]:
    found = {} if found is None else found
    if file.name not in found:
        found[file.name] = file
        for each in file.dependencies:
            _with_imports(each, found)
    return found


def _with_nested(message: Descriptor) -> Iterator[Descriptor]:
    yield message
    for nested in message.nested_types:
        yield from _with_nested(nested)


def _names(enum: EnumDescriptor) -> Iterator[str]:
    """Yields the full names of an enum and its values. A value has two: next to the enum, where protobuf defines it,
    and within it, where people look for it."""
    yield enum.full_name
    scope = enum.full_name.rpartition(".")[0]
    for value in enum.values:
        yield f"{scope}.{value.name}" if scope else value.name
        yield f"{enum.full_name}.{value.name}"

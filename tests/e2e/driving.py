"""Two ways to drive a run that must come to the same: the Run stream, and SendCommand with WatchEvents."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from notecase import v1

from tests.support.server import Running

D = TypeVar("D", bound=Message)


class OnStream:
    """Commands and events on one Run stream."""

    def __init__(self) -> None:
        self._writing = asyncio.Lock()

    async def start(self, served: Running, start: v1.StartRun, command_id: str = "") -> AsyncIterator[v1.RunResponse]:
        self._call = served.runs.Run()
        await self._call.write(v1.RunRequest(command_id=command_id, start=start))
        async for frame in self._call:
            yield frame

    async def send(self, command: v1.RunRequest) -> None:
        """The result comes as a frame. Commands sent at once follow each other: a stream takes one write at a time."""
        async with self._writing:
            await self._call.write(command)


class BySendCommand:
    """Sends commands as separate calls, and reads events by WatchEvents."""

    async def start(self, served: Running, start: v1.StartRun, command_id: str = "") -> AsyncIterator[v1.RunResponse]:
        self._served, self._session = served, start.session
        command = v1.RunRequest(command_id=command_id, start=start)
        sent = await served.runs.SendCommand(v1.SendCommandRequest(session=start.session, command=command))
        watch = v1.WatchEventsRequest(
            name=start.session, after_sequence=sent.result.sequence - 1, options=start.options
        )
        async for frame in served.runs.WatchEvents(watch):
            yield frame

    async def send(self, command: v1.RunRequest) -> None:
        await self._served.runs.SendCommand(v1.SendCommandRequest(session=self._session, command=command))


def events_of(frames: list[v1.RunResponse]) -> list[v1.Event]:
    return [event for frame in frames for event in frame.batch.events]


def durable(frames: list[v1.RunResponse]) -> list[v1.Event]:
    return [event for event in events_of(frames) if event.sequence]


def kinds(events: list[v1.Event]) -> list[str]:
    return [event.WhichOneof("payload") or "" for event in events]


def said(text: str) -> v1.Message:
    return v1.Message(parts=[v1.Part(text=text)])


async def log_of(served: Running, session: str) -> list[v1.Event]:
    """The whole log, as WatchEvents prints it for an idle session."""
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=session, after_sequence=0))
    return durable([frame async for frame in watch])


def reason_of(error: grpc.RpcError) -> str:
    """The ErrorInfo's reason, which every refusal carries under the domain notecase."""
    info = detail_of(error, error_details_pb2.ErrorInfo)
    assert info.domain == "notecase.dev"
    return str(info.reason)


def metadata_of(error: grpc.RpcError) -> dict[str, str]:
    return dict(detail_of(error, error_details_pb2.ErrorInfo).metadata)


def fields_of(error: grpc.RpcError) -> set[str]:
    """The fields that BadRequest names."""
    return {violation.field for violation in detail_of(error, error_details_pb2.BadRequest).field_violations}


def detail_of(error: grpc.RpcError, kind: type[D]) -> D:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, "a refusal carries details"
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    raise AssertionError(f"no {kind.DESCRIPTOR.name} among the details of {status}")

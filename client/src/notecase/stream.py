"""A run as it happens, whole: each event once and in order, whatever becomes of the connection."""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Self

import grpc

from notecase import v1
from notecase.errors import NotecaseError
from notecase.retry import Backoff, Retry, repeat
from notecase.values import Plain, to_value
from notecase.view import ENDED, Gap, SessionView


class RunStream:
    """A run, or a session, being followed: `async with` attaches, `async for` gives its `v1.Event`s.

    `Client.run` and `Client.attach` make it. Directly it is made from any `v1.RunRequest` that starts or attaches; a
    start is to name its session (or new_session) and its run_id, which make it safe to repeat.

    Events of the log come in the order of their sequence, each exactly once; passing events (sequence 0) in between.
    When the connection breaks, the server restarts or another process takes the run over, the stream attaches again
    after the last entry it gave out, as patiently as `Retry` says. Open blocks then come again whole; `view` knows.

    Entering raises NotecaseError when the service refuses the start or cannot be reached, iterating when it can no
    longer be reached or the session is deleted. A run that fails is no error of the stream: see `result`. The stream
    ends when the run does; with `keep_open` it does not.

    Leaving, cancelling the task, or losing the process closes the stream and nothing else: the run goes on, and
    `attach` finds it. After a cancelled `anext` (a timeout, for example) iteration goes on where it was. One task
    iterates at a time; `cancel` and `update_state` may be called from any, also inside the loop.
    """

    def __init__(self, stub: "v1.RunServiceAsyncStub", first: v1.RunRequest, retry: Retry | None = None) -> None:
        self._stub = stub
        self._first = first
        self._retry = retry or Retry()
        self._backoff = Backoff(self._retry)
        self._frames: AsyncIterator[v1.RunResponse] | None = None
        self._call: grpc.aio.StreamStreamCall[v1.RunRequest, v1.RunResponse] | None = None
        self._attached: v1.Attached | None = None
        self._waiting: deque[v1.Event] = deque()
        self._over = False
        attach = first.attach
        known = attach.after_sequence if attach.HasField("after_sequence") else None
        self.view = SessionView(known)
        """The session as far as the events given out tell."""

    @property
    def name(self) -> str:
        """sessions/{session}/runs/{run}: the run being followed; empty before entering and in an idle session."""
        return self._attached.run.name if self._attached else ""

    @property
    def session(self) -> str:
        """sessions/{session}; empty before entering."""
        return self._attached.session if self._attached else ""

    @property
    def last_sequence(self) -> int | None:
        """Of the newest entry of the log given out: where `attach` goes on, in this process or another. None before
        the first."""
        return self.view.last_sequence

    @property
    def result(self) -> v1.Run:
        """The run as it ended: succeeded, failed or cancelled, with its reply, usage and error.

        Raises RuntimeError while it has not, as far as the events given out tell."""
        run = self.view.run
        if run is None or run.state not in ENDED:
            raise RuntimeError("the run has not ended yet: iterate to the end of the stream first")
        return run

    async def __aenter__(self) -> Self:
        try:
            while self._attached is None:
                await self._receive()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> v1.Event:
        while True:
            while self._waiting:
                event = self._waiting.popleft()
                try:
                    fresh = self.view.apply(event)
                except Gap as gap:
                    await self._mend(gap)
                    continue
                if event.sequence and fresh:
                    self._backoff.progress()
                if fresh:
                    return event
            if self._over:
                raise StopAsyncIteration
            await self._receive()

    async def text(self) -> AsyncIterator[str]:
        """What the agent says, in pieces as they come, up to the end of the run; joined, the pieces of one message are
        its text exactly.

        What was yielded cannot be taken back. When a model call is repeated, after its failure or a takeover, the
        reply begins anew as another message; as between any two messages, "\\n\\n" comes first. Who wants to erase
        what was discarded iterates the events and shows `view`.

        Raises NotecaseError with the run's error when it fails; when it is cancelled, the text just ends."""
        told: dict[tuple[str, int], int] = {}
        speaking = ""
        async for event in self:
            for message, block, start, text in _texts(event):
                data = text.encode()
                have = told.get((message, block), start)
                told[message, block] = max(have, start + len(data))
                piece = data[max(have - start, 0) :].decode()
                if piece and speaking not in {"", message}:
                    yield "\n\n"
                if piece:
                    speaking = message
                    yield piece
        if self.name and self.result.state == v1.Run.STATE_FAILED:
            raise NotecaseError.from_proto(self.result.error)

    async def cancel(self, reason: str = "") -> int:
        """Stops the run, keeps what was generated, and returns the sequence of that; the stream then tells of it.

        Safe to repeat and repeated when the connection breaks. Raises NotecaseError RUN_ENDED when the run has
        ended."""
        return await self._send(v1.RunRequest(cancel=v1.CancelCommand(reason=reason)))

    async def update_state(
        self,
        values: Mapping[str, Plain] | None = None,
        *,
        ops: Iterable[v1.StateOp] = (),
        if_version: int | None = None,
    ) -> int:
        """Sets session state, applies further operations, all or none, and returns the sequence of the change.

        Safe to repeat and repeated when the connection breaks. Raises NotecaseError STATE_VERSION_MISMATCH when a
        condition misses, STATE_TYPE_MISMATCH when a value's type does not have the operation."""
        sets = [v1.StateOp(key=key, set=to_value(value)) for key, value in (values or {}).items()]
        update = v1.StateUpdate(ops=[*sets, *ops], if_version=if_version)
        return await self._send(v1.RunRequest(update_state=update))

    async def _send(self, command: v1.RunRequest) -> int:
        """Commands go beside the stream, not on it: their results arrive even while nobody iterates."""
        command.command_id = uuid.uuid4().hex
        run = self.name if command.HasField("cancel") else ""
        request = v1.SendCommandRequest(session=self.session, command=command, run=run)
        answer = await repeat(self._retry, lambda: self._stub.SendCommand(request))
        return answer.result.sequence

    async def _receive(self) -> None:
        """Takes one frame, or mends the stream; sets `_over` at its right end."""
        try:
            if self._frames is None:
                self._call = self._stub.Run(iter([self._opening()]))
                self._frames = aiter(self._call)
            frame = await anext(self._frames)
        except StopAsyncIteration:  # ended with OK: all is told; whatever cuts a stream makes it an error
            self._over = True
            return
        except NotecaseError as error:
            await self._mend(error)
            return
        except asyncio.CancelledError:
            self._close()  # grpc has given the call up with the read; the next one attaches again
            raise
        # A go_away needs no answer: until the server cuts the stream, what is under way may well come to its end.
        match frame.WhichOneof("frame"):
            case "attached":
                self._take_attached(frame.attached)
            case "batch":
                self._waiting.extend(frame.batch.events)
            case "heartbeat":
                self._backoff.progress()

    def _opening(self) -> v1.RunRequest:
        """The first frame: the start itself until it is known to have arrived, then where it is to go on."""
        if self._attached is None:
            return self._first
        again = v1.RunRequest(attach=v1.AttachRun(name=self.name, after_sequence=self.last_sequence))
        if self._first.HasField("attach"):
            again.attach.name = self._first.attach.name
            again.attach.options.CopyFrom(self._first.attach.options)
        else:
            again.attach.options.CopyFrom(self._first.start.options)
        return again

    def _take_attached(self, attached: v1.Attached) -> None:
        attach = self._first.attach
        if self.last_sequence is None and attach.name == attached.session:
            self.view = SessionView(attached.last_sequence)  # such a stream begins at the session's head
        self._attached = attached
        self.view.attach(attached)

    async def _mend(self, error: NotecaseError | Gap) -> None:
        self._close()
        await self._backoff.wait(error)

    def _close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        self._call = self._frames = None
        self._waiting.clear()


def _texts(event: v1.Event) -> Iterable[tuple[str, int, int, str]]:
    """The agent's words in an event: message, part index, the byte of the part they start at, text."""
    delta, message = event.block_delta, event.message_added
    if delta.text:
        yield delta.message, delta.block, delta.start, delta.text
    if message.role == v1.Message.ROLE_ASSISTANT:
        for block, part in enumerate(message.parts):
            yield message.name, block, 0, part.text

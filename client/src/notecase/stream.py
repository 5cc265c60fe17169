"""A run as it happens, whole: each event once and in order, whatever becomes of the connection."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import grpc

from notecase import v1
from notecase.agents import Local
from notecase.calls import Calls, Turns
from notecase.commands import Commands
from notecase.errors import NotecaseError, as_written
from notecase.hints import Kind
from notecase.names import Remember, When
from notecase.reply import Reply
from notecase.retry import Backoff, Retry
from notecase.tools import Tool, as_tools
from notecase.values import Plain, to_value
from notecase.view import ENDED, Gap, SessionView


class RunStream:
    """A run, or a session, being followed: `async with` attaches, `async for` gives its `v1.Event`s.

    `Client.run` and `Client.attach` make it. Directly it is made from any `v1.RunRequest` that starts or attaches; a
    start is to name its session (or new_session) and its run_id, which make it safe to repeat.

    Events of the log come in the order of their sequence, each exactly once; passing events (sequence 0) in between.
    When the connection breaks, the server restarts, another process takes the run over, or the token expires and is one
    that is renewed, the stream attaches again after the last entry it gave out, as patiently as `Retry` says. Open
    blocks then come again whole; `view` knows.

    Entering raises NotecaseError when the service refuses the start or cannot be reached, iterating when it can no
    longer be reached or the session is deleted. A run that fails is no error of the stream: see `result`. The stream
    ends when the run does; with `keep_open` it does not.

    Calls of the `tools` handed in are executed as iteration comes to them, several at once and beside it, and answered;
    those that waited when the stream came, too, and each once in this client, however often it is told. They are those
    of the run followed, or of any run when a session is followed. A call that gets its outcome elsewhere, by a cancel
    for example, is cancelled here. Iterating raises what kept an answer from being sent.

    A run that waits for a person keeps the stream open: `input_requested` tells what for, and `approve`, `deny`,
    `answer`, `dismiss` or `say` let it go on, from here or from anywhere.

    Leaving, cancelling the task, or losing the process closes the stream, cancels its calls, and nothing else: the run
    goes on, and `attach` finds it and the calls that wait. After a cancelled `anext` (a timeout, for example) iteration
    goes on where it was. One task iterates at a time; commands may be sent from any, also inside the loop.
    """

    def __init__(
        self,
        stub: "v1.RunServiceAsyncStub",
        first: v1.RunRequest,
        retry: Retry | None = None,
        *,
        tools: Iterable[Callable[..., Any] | Tool] = (),
        output: Kind | None = None,
        local: Mapping[str, Local] | None = None,
        turns: Turns | None = None,
        renews_token: bool = False,
    ) -> None:
        """`tools` are answered here; the start declares those that the agent does not. `output` reads the reply.
        `local` has further tools, and outputs, by the name of the agent whose run this is. Streams with the same
        `turns` share out their calls. With `renews_token` the next call of the stub may have another token."""
        self._stub = stub
        self._first = first
        retry = retry or Retry()
        self._backoff = Backoff(retry, renews_token)
        self._commands = Commands(stub, retry)
        self._tools = as_tools(tools)
        self._output = output
        self._local = local or {}
        self._calls = Calls(self._commands, turns or Turns(), self._fail)
        self._failure: BaseException | None = None
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
        """sessions/{session}/runs/{run}: the run being followed, of a session the newest that was told of; empty before
        entering and in an idle session."""
        if self._attached is None:
            return ""
        newest = self.view.run if self._follows_session else None
        return newest.name if newest else self._attached.run.name

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
        run = self.view.runs.get(self.name)
        if run is None or run.state not in ENDED:
            raise RuntimeError("the run has not ended yet: iterate to the end of the stream first")
        return run

    @property
    def reply(self) -> Reply:
        """What came of the run, as `Client.invoke` returns it. Raises RuntimeError while it has not ended, and
        NotecaseError when it failed or was cancelled."""
        result = self.result
        return Reply(result, self._output or self._local_of(result).output)

    @property
    def parsed(self) -> Any:
        """The reply's JSON; see `Reply.parsed`. Raises as `reply` does."""
        return self.reply.parsed

    async def __aenter__(self) -> Self:
        try:
            with as_written("start.new_session.", "start.settings.", "start.", "attach."):
                while self._attached is None:
                    await self._receive()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()

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
                    self._follow_calls(event)
                    return event
            if self._failure is not None:
                raise self._failure
            if self._over:
                raise StopAsyncIteration
            await self._receive()

    async def text(self) -> AsyncIterator[str]:
        """What the agent says, in pieces as they come, up to the end of the run; joined, the pieces of one message are
        its text exactly.

        What was yielded cannot be taken back. When a model call is repeated, after its failure or a takeover, the
        reply begins anew as another message; as between any two messages, "\\n\\n" comes first. Who wants to erase
        what was discarded iterates the events and shows `view`.

        Raises NotecaseError with the run's error when it fails; when it is cancelled, the text just ends, and while it
        waits for a person, nothing comes."""
        told: dict[tuple[str, int], int] = {}
        speaking = ""
        async for event in self:
            for message, block, start, text in self._texts(event):
                data = text.encode()
                have = told.get((message, block), start)
                told[message, block] = max(have, start + len(data))
                piece = data[max(have - start, 0) :].decode()
                if piece and speaking not in {"", message}:
                    yield "\n\n"
                if piece:
                    speaking = message
                    yield piece
        run = self.view.runs.get(self._attached.run.name) if self._attached else None
        if run is not None and run.state == v1.Run.STATE_FAILED:
            raise NotecaseError.from_proto(run.error)

    async def say(self, *said: str | v1.Message, when: When = "steer") -> int:
        """Says something to the run under way; see `Commands.say`."""
        return await self._commands.say(self._target, *said, when=when)

    async def approve(
        self,
        input_id: str,
        arguments: str | Mapping[str, Any] | None = None,
        *,
        remember: Remember = "once",
    ) -> int:
        """Lets a call run, with other arguments where given; see `Commands.approve`."""
        return await self._commands.approve(self._target, input_id, arguments, remember=remember)

    async def deny(
        self,
        input_id: str,
        reason: str = "",
        *,
        remember: Remember = "once",
    ) -> int:
        """Does not let a call run; see `Commands.deny`."""
        return await self._commands.deny(self._target, input_id, reason, remember=remember)

    async def answer(self, input_id: str, answer: str | Mapping[str, Any]) -> int:
        """Answers a question; see `Commands.answer`."""
        return await self._commands.answer(self._target, input_id, answer)

    async def dismiss(self, input_id: str, reason: str = "") -> int:
        """Closes a tool's question without a choice; see `Commands.dismiss`."""
        return await self._commands.dismiss(self._target, input_id, reason)

    async def cancel(self, reason: str = "", *, after_turn: bool = False, call_id: str = "") -> int:
        """Stops the run, or one of its calls; see `Commands.cancel`."""
        return await self._commands.cancel(self._target, reason, after_turn=after_turn, call_id=call_id)

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
        # State is the session's: it can be changed in every state of the run.
        return await self._commands.send(self.session, v1.RunRequest(update_state=update))

    @property
    def waits_for_others(self) -> bool:
        """Whether the run waits, as far as the events given out tell, for something that no function here answers: for
        a person, or for a tool in another process."""
        run = self.view.runs.get(self.name)
        return run is not None and self.cannot_answer(run)

    def cannot_answer(self, run: v1.Run) -> bool:
        """Whether a run waits for something other than the results of the functions here."""
        here = {*self._tools, *self._local_of(run).tools}
        called = {call.tool for call in run.pending_calls}
        return run.state == v1.Run.STATE_WAITING and bool(run.pending_inputs or called - here)

    def _local_of(self, run: v1.Run) -> Local:
        return self._local.get(run.agent.partition("@")[0], Local())

    @property
    def _follows_session(self) -> bool:
        return self._attached is not None and self._first.attach.name == self._attached.session

    @property
    def _target(self) -> str:
        """Commands go beside the stream, not on it: their results arrive even while nobody iterates."""
        return self.name or self.session

    def _follow_calls(self, event: v1.Event) -> None:
        if event.HasField("tool_finished"):
            self._calls.end(event.tool_finished.call_id)
        elif event.tool_started.client_executed and self._attached is not None:
            run, head = self._attached.run, self._attached.last_sequence
            # Up to there `Attached` told which calls wait still; the events before tell also of those that do not.
            if event.sequence > (run.last_sequence if event.run == run.name else head):
                self._begin(event.run, event.tool_started)

    def _begin(self, run: str, call: v1.ToolCall) -> None:
        if self._attached is not None and (self._follows_session or run == self.name):
            tool = self._tools.get(call.tool) or self._local_of(self._attached.run).tools.get(call.tool)
            if tool is not None:
                self._calls.begin(run, call, tool)

    def _fail(self, error: BaseException) -> None:
        """Iteration is to raise it, also when it is waiting for a frame."""
        self._failure = error
        if self._call is not None:
            self._call.cancel()

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
            task = asyncio.current_task()
            if self._failure is not None and task is not None and not task.cancelling():
                raise self._failure from None  # it was no one else who cancelled the call
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
        for call in attached.run.pending_calls:
            self._begin(attached.run.name, call)

    async def _mend(self, error: NotecaseError | Gap) -> None:
        self._close()
        await self._backoff.wait(error)

    async def _leave(self) -> None:
        self._close()
        await self._calls.close()

    def _texts(self, event: v1.Event) -> Iterable[tuple[str, int, int, str]]:
        """The agent's words in an event: message, part index, the byte of the part they start at, text. They come as
        deltas, but for replies that were whole before the stream was attached."""
        delta, message = event.block_delta, event.message_added
        if piece := delta.text or delta.json:
            yield delta.message, delta.block, delta.start, piece
        elif message.role == v1.Message.ROLE_ASSISTANT and self._attached is not None:
            for block, part in enumerate(message.parts if event.sequence <= self._attached.last_sequence else ()):
                yield message.name, block, 0, part.text or part.json

    def _close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        self._call = self._frames = None
        self._waiting.clear()

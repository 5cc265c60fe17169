"""Follows a run: yields each event once and in order, across broken connections."""

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeAlias

import grpc

from notecase import v1
from notecase.agents import Local
from notecase.arguments import made, shown
from notecase.calls import Calls, Turns
from notecase.commands import Commands
from notecase.context import CallContext
from notecase.errors import NotecaseError, as_written
from notecase.hints import Kind
from notecase.names import Remember, When
from notecase.reply import Parsed, Reply, raise_unsuccessful
from notecase.retry import Backoff, Retry, repeat
from notecase.text import Piece, Text
from notecase.tools import Tool, as_tools
from notecase.values import Plain, to_values
from notecase.view import ENDED, Gap, SessionView
from notecase.waits import sentence, unanswered

_Call: TypeAlias = (
    "grpc.aio.StreamStreamCall[v1.RunRequest, v1.RunResponse]"
    " | grpc.aio.UnaryStreamCall[v1.WatchEventsRequest, v1.RunResponse]"
)

log = logging.getLogger("notecase")


class RunStream(Generic[Parsed]):
    """Follows a run or a session: `async with` attaches, `async for` yields its `v1.Event`s.

    `Client.run` and `Client.attach` return one. It can also be made from any `v1.RunRequest` that starts or attaches; a
    start must name its session (or new_session) and its run_id, so that it can be repeated safely.

    Events of the log are yielded in the order of their sequence, each exactly once, with transient events (sequence 0)
    between them. When the connection breaks, the server restarts, another process takes the run over, or a renewable
    token expires, the stream attaches again after the last event that it yielded, as `Retry` says. So does one that is
    read too slowly, or that is refused because of too many calls. The blocks of an unfinished message are then sent
    again from their start; `view` handles that. A session that was deleted and created again with the same name is not
    followed: SESSION_NOT_FOUND.

    Entering raises NotecaseError when the service refuses the start or cannot be reached; iterating raises it when the
    service can no longer be reached or the session is deleted. A run that fails does not raise here: see `result` and
    `reply`. The stream ends when the run ends, unless `keep_open` is set.

    While the stream is iterated, calls of the given `tools` are executed and answered, several at once. That includes
    calls that were pending before the stream attached. Each is executed once in this client, even when several events
    or streams report it. A stream of a run executes calls of that run, a stream of a session those of any run. A call
    that is resolved elsewhere, for example by a cancel, is cancelled here. A result that cannot be sent raises its
    error from the iteration; a later stream of the client with the function sends it, without executing it again.

    A run that waits for a person keeps the stream open. `input_requested` says what it waits for; `approve`, `deny`,
    `answer`, `dismiss` or `say` let it continue, here or in any other process.

    Leaving the block, cancelling the task or losing the process closes the stream and cancels its calls. The run
    continues, and `attach` finds it with the calls that are pending. After a cancelled `anext`, for example by a
    timeout, iteration can continue. One task may iterate at a time; any task may send commands, also inside the loop.
    """

    def __init__(
        self,
        stub: "v1.RunServiceAsyncStub",
        first: v1.RunRequest,
        retry: Retry | None = None,
        *,
        tools: Iterable[Callable[..., Any] | Tool] | None = None,
        output: Kind | None = None,
        local: Mapping[str, Local] | None = None,
        turns: Turns | None = None,
        renews_token: bool = False,
    ) -> None:
        """`tools` are executed here; the start declares those that its agent does not declare. `output` reads the
        reply. `local` has further tools and outputs by the name of the run's agent. Streams that share `turns` do not
        execute a call twice. `renews_token` says that the next call of the stub may have another token."""
        self._stub = stub
        self._first = first
        self._retry = retry = retry or Retry()
        self._backoff = Backoff(retry, renews_token, lambda: {"run": self.name, "session": self.session})
        self._commands = Commands(stub, retry, lambda: self._attached.session_uid if self._attached else "")
        self._tools = as_tools(tools)
        self._output = output
        self._local = local or {}
        self._calls = Calls(self._commands, turns or Turns(), self._fail)
        self._failure: BaseException | None = None
        self._frames: AsyncIterator[v1.RunResponse] | None = None
        self._call: _Call | None = None
        self._attached: v1.Attached | None = None
        self._waiting: deque[v1.Event] = deque()
        self._over = False
        self._warned: set[str] = set()
        self.warn_after: float | None = 1.0
        """The seconds after which the logger "notecase" warns that the run waits for something that no function here
        answers, once for each; None for no warning. Events that arrive in that time prevent it."""
        attach = first.attach
        known = attach.after_sequence if attach.HasField("after_sequence") else None
        self.view = SessionView(known)
        """The session as the events yielded so far describe it."""

    @property
    def name(self) -> str:
        """The run that is followed, sessions/{session}/runs/{run}; in a stream of a session its newest run. Empty
        before entering, and in a session without runs."""
        if self._attached is None:
            return ""
        newest = self.view.run if self._follows_session else None
        return newest.name if newest else self._attached.run.name

    @property
    def session(self) -> str:
        """The session, sessions/{session}. Empty before entering."""
        return self._attached.session if self._attached else ""

    @property
    def last_sequence(self) -> int | None:
        """The sequence of the last event of the log that was yielded, after which `attach` continues, in this process
        or another. None before the first."""
        return self.view.last_sequence

    @property
    def result(self) -> v1.Run:
        """The run as it ended: succeeded, failed or cancelled, with its reply, usage and error.

        Raises RuntimeError before its end was yielded."""
        run = self.view.runs.get(self.name)
        if run is None or run.state not in ENDED:
            raise RuntimeError("the run has not ended yet: iterate to the end of the stream first")
        return run

    @property
    def reply(self) -> Reply[Parsed]:
        """The run's reply, as `Client.invoke` returns it. Raises RuntimeError before the run's end was yielded, and
        NotecaseError when it failed or was cancelled."""
        result = self.result
        return Reply(result, self._output or self._local_of(result).output)

    @property
    def parsed(self) -> Parsed:
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
            with self._warning():
                await self._receive()

    async def text(self, after: v1.BlockDelta | None = None) -> AsyncIterator[str]:
        """Yields the agent's text in this run in pieces as they arrive, up to the run's end; for a stream of a session,
        the text of all its runs. Joined, the pieces of one message are exactly its text. Between two messages it yields
        "\\n\\n".

        A model call that is repeated, after a failure or a takeover, starts its reply again as another message, and so
        does a reply whose text has turned out to be reasoning. To remove the text that was discarded from a screen,
        iterate the events and show `view` instead.

        A stream that attaches in the middle of a reply yields it from its start. With `after`, the last delta that was
        read before, by an earlier stream, it begins where that ended, and leaves out the messages before that one.

        Raises NotecaseError with the run's error when it fails, and with code CANCELLED when it is cancelled; the text
        of a session continues with the next run. Nothing is yielded while the run waits for a person or for a tool that
        is not here; the logger "notecase" then warns, see `warn_after`."""
        if not isinstance(after, v1.BlockDelta | None):
            raise TypeError(f"after must be the block_delta of an event, not {shown(after)}")
        text = Text(after or v1.BlockDelta())
        async for event in self:
            for piece in text.add(event, self._texts(event), self._is_old(event)):
                yield piece
        for piece in text.end():
            yield piece
        run = self.view.runs.get(self._attached.run.name) if self._attached else None
        if run is not None and not self._follows_session:
            raise_unsuccessful(run)

    async def say(self, *said: str | v1.Message, when: When = "steer") -> int:
        """Sends input to the active run; see `Commands.say`."""
        return await self._commands.say(self._target, *said, when=when)

    async def approve(
        self,
        input_id: str,
        arguments: str | Mapping[str, Any] | None = None,
        *,
        remember: Remember = "once",
    ) -> int:
        """Approves a call; see `Commands.approve`."""
        return await self._commands.approve(self._target, input_id, arguments, remember=remember)

    async def deny(
        self,
        input_id: str,
        reason: str = "",
        *,
        remember: Remember = "once",
    ) -> int:
        """Denies a call; see `Commands.deny`."""
        return await self._commands.deny(self._target, input_id, reason, remember=remember)

    async def answer(self, input_id: str, answer: str | Mapping[str, Any]) -> int:
        """Answers a question; see `Commands.answer`."""
        return await self._commands.answer(self._target, input_id, answer)

    async def dismiss(self, input_id: str, reason: str = "") -> int:
        """Closes a tool's question without a choice; see `Commands.dismiss`."""
        return await self._commands.dismiss(self._target, input_id, reason)

    async def cancel(self, reason: str = "", *, after_turn: bool = False, call_id: str = "") -> int:
        """Cancels the run, or one of its calls; see `Commands.cancel`."""
        return await self._commands.cancel(self._target, reason, after_turn=after_turn, call_id=call_id)

    async def _cancel_started(self, reason: str) -> None:
        """Cancels the run that this stream starts, also before the server has answered the start. A start that arrives
        after this is refused."""
        if self.name:
            await self.cancel(reason)
            return
        start = self._first.start
        request = v1.CancelRunRequest(
            name=f"{start.session or start.new_session.name}/runs/{start.run_id}",
            cancel=v1.CancelCommand(mode=v1.CancelCommand.MODE_IMMEDIATE, reason=reason),
            allow_missing=True,
            request_id=uuid.uuid4().hex,
        )
        await repeat(self._retry, lambda: self._stub.CancelRun(request))

    async def update_state(
        self,
        values: Mapping[str, Plain] | None = None,
        *,
        ops: Iterable[v1.StateOp] = (),
        if_version: int | None = None,
    ) -> int:
        """Sets keys of the session's state and applies further operations, all or none. Returns the sequence of the
        change. It is repeated when the connection breaks, without a second effect.

        Raises NotecaseError STATE_VERSION_MISMATCH when a condition does not hold, STATE_TYPE_MISMATCH when an
        operation does not apply to the value's type."""
        sets = [v1.StateOp(key=key, set=value) for key, value in to_values(values, "values").items()]
        update = made(v1.StateUpdate, ops=[*sets, *ops], if_version=if_version)
        # State is the session's: it can be changed in every state of the run.
        return await self._commands.send(self.session, v1.RunRequest(update_state=update))

    @property
    def waits_for_others(self) -> bool:
        """Whether the run waits for something that no function here answers, according to the events yielded so far:
        for a person, or for a tool in another process."""
        run = self.view.runs.get(self.name)
        return run is not None and bool(self.unanswered(run))

    def unanswered(self, run: v1.Run) -> dict[str, str]:
        """Describes what a run waits for other than the results of the functions here, by input_id or call_id."""
        return unanswered(run, {*self._tools, *self._local_of(run).tools})

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Logs what the run waits for when the body takes longer than `warn_after`."""
        run = self.view.runs.get(self.name)
        waits = self.unanswered(run) if run is not None else {}
        if run is None or self.warn_after is None or waits.keys() <= self._warned:
            yield
            return

        def warn() -> None:
            self._warned.update(waits)
            log.warning("%s.", told, extra={"run": run.name, "session": self.session})

        told = sentence(run, waits)
        timer = asyncio.get_running_loop().call_later(self.warn_after, warn)
        try:
            yield
        finally:
            timer.cancel()

    def _local_of(self, run: v1.Run) -> Local:
        return self._local.get(run.agent.partition("@")[0], Local())

    @property
    def _follows_session(self) -> bool:
        return self._attached is not None and self._first.attach.name == self._attached.session

    @property
    def _target(self) -> str:
        """Commands are separate calls, so that their results arrive even while the stream is not iterated."""
        return self.name or self.session

    def _follow_calls(self, event: v1.Event) -> None:
        if event.HasField("tool_finished"):
            self._calls.end(event.tool_finished.call_id)
        elif event.tool_started.client_executed and self._attached is not None:
            run, head = self._attached.run, self._attached.last_sequence
            # `Attached` listed the calls that are pending at that sequence; earlier events also report resolved ones.
            if event.sequence > (run.last_sequence if event.run == run.name else head):
                self._begin(event.run, event.tool_started)

    def _begin(self, run: str, call: v1.ToolCall) -> None:
        if self._attached is not None and (self._follows_session or run == self.name):
            tool = self._tools.get(call.tool) or self._local_of(self._attached.run).tools.get(call.tool)
            if tool is not None:
                context = CallContext(
                    session=self._attached.session,
                    session_uid=self._attached.session_uid,
                    user=self._attached.user,
                    run=run,
                    call_id=call.call_id,
                    attempt=call.attempt,
                )
                self._calls.begin(call, tool, context)

    def _fail(self, error: BaseException) -> None:
        """Makes the iteration raise an error, also while it waits for a frame."""
        self._failure = error
        if self._call is not None:
            self._call.cancel()

    async def _receive(self) -> None:
        """Receives one frame, or attaches again. Sets `_over` when the server ended the stream with OK."""
        try:
            if self._frames is None:
                self._call = self._opened()
                self._frames = aiter(self._call)
            frame = await anext(self._frames)
        except StopAsyncIteration:  # ended with OK; a stream that is cut ends with an error
            self._over = True
            return
        except NotecaseError as error:
            await self._mend(error)
            return
        except asyncio.CancelledError:
            self._close()  # grpc cancelled the call together with the read; the next one attaches again
            task = asyncio.current_task()
            if self._failure is not None and task is not None and not task.cancelling():
                raise self._failure from None  # only _fail has cancelled the call
            raise
        # A go_away needs no answer: until the server cuts the stream, what is under way may well come to its end.
        match frame.WhichOneof("frame"):
            case "attached":
                self._take_attached(frame.attached)
            case "batch":
                self._waiting.extend(frame.batch.events)
            case "heartbeat":
                self._backoff.progress()

    def _opened(self) -> _Call:
        """Makes a call: with the start until the server has answered it, then one that only watches, as a viewer
        may."""
        first, attached = self._first, self._attached
        if first.HasField("start") and attached is None:
            return self._stub.Run(iter([first]))
        attach = first.attach
        request = v1.WatchEventsRequest(
            name=attach.name or self.name,
            options=attach.options if first.HasField("attach") else first.start.options,
            if_session_uid=attached.session_uid if attached else attach.if_session_uid,
        )
        if attached is not None and self.last_sequence is not None:
            request.after_sequence = self.last_sequence
        elif attached is None and attach.HasField("after_sequence"):
            request.after_sequence = attach.after_sequence
        return self._stub.WatchEvents(request)

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
        await self._backoff.wait(error, limited=self._attached is not None)

    async def _leave(self) -> None:
        self._close()
        await self._calls.close()

    def _is_old(self, event: v1.Event) -> bool:
        """Whether an event precedes the deltas of the message that was unfinished when the stream attached."""
        if event.HasField("block_delta") or self._attached is None:
            return False
        last, running = self._attached.last_sequence, self._attached.run.state == v1.Run.STATE_RUNNING
        return event.sequence < last or (event.sequence == last and running)

    def _texts(self, event: v1.Event) -> Iterable[Piece]:
        """Yields the agent's text in an event: in deltas, and again in the message that they make, which is all that a
        stream without deltas has. The events of a queued run include those of the runs before it."""
        delta, message = event.block_delta, event.message_added
        if not self._follows_session and event.run != self.name:
            return
        if piece := delta.text or delta.json:
            yield Piece(delta.message, delta.block, delta.start, piece)
        elif message.role == v1.Message.ROLE_ASSISTANT:
            for block, part in enumerate(message.parts):
                yield Piece(message.name, block, 0, part.text or part.json)

    def _close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        self._call = self._frames = None
        self._waiting.clear()

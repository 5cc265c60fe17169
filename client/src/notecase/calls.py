"""Executes the calls that a run dispatches to its caller, each once and several concurrently, in separate tasks."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from notecase import v1
from notecase.commands import Commands
from notecase.context import CallContext
from notecase.errors import NotecaseError
from notecase.tools import Tool

REMEMBERED = 1000
"""How many calls are remembered as answered. A call is reported again within moments, by another stream of the process
or by the same one after a broken connection."""

KEPT_BYTES = 64 << 20
"""How many bytes of results are kept that could not be sent."""

THREADS = 64
"""How many calls of one stream have a thread; further ones wait. With one number for all streams of a client, calls
that hang, or that start another run and wait for it, would keep its other runs from executing any."""

_SETTLED = frozenset({"CALL_NOT_PENDING", "REQUEST_ID_REUSED"})
"""The call has an outcome already: by another process that has the function too, or by a cancel."""

_UNFIT = frozenset({"INVALID_FIELD", "PAYLOAD_TOO_LARGE"})


class _Key(NamedTuple):
    run: str
    call_id: str
    attempt: int


@dataclass(eq=False)
class _Turn:
    """One call at one attempt, among all streams of a client."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    result: v1.ToolResult | None = None
    """What the function returned, until it is sent: a stream that attaches after a broken connection sends it."""
    answered: bool = False
    streams: int = 0
    """How many streams execute the function, send its result or wait to do so."""

    @property
    def size(self) -> int:
        return 0 if self.result is None else self.result.ByteSize()


class Turns:
    """Keeps two streams of one client from executing the same call; the second waits for the first.

    Beyond REMEMBERED calls, or KEPT_BYTES of results, it forgets the oldest of which no stream has a task: those
    without a result first, then those whose result could not be sent. Such a call would be executed again."""

    def __init__(self) -> None:
        self._turns: dict[_Key, _Turn] = {}

    def begin(self, key: _Key) -> _Turn:
        turn = self._turns.setdefault(key, _Turn())
        turn.streams += 1
        self._forget()
        return turn

    def end(self, turn: _Turn) -> None:
        turn.streams -= 1
        self._forget()

    def _forget(self) -> None:
        kept = sum(turn.size for turn in self._turns.values())
        if len(self._turns) <= REMEMBERED and kept <= KEPT_BYTES:
            return
        idle = [(key, turn) for key, turn in self._turns.items() if not turn.streams]
        for key, turn in sorted(idle, key=lambda one: one[1].result is not None):
            if len(self._turns) > REMEMBERED or (kept > KEPT_BYTES and turn.size):
                kept -= turn.size
                del self._turns[key]


class Calls:
    """Executes the calls of one stream."""

    def __init__(self, commands: Commands, turns: Turns, failed: Callable[[BaseException], None]) -> None:
        """`failed` is called with the error of an answer that could not be sent."""
        self._commands = commands
        self._turns = turns
        self._failed = failed
        self._threads = asyncio.Semaphore(THREADS)
        self._begun: set[_Key] = set()
        self._tasks: dict[str, tuple[asyncio.Task[None], _Turn]] = {}

    def begin(self, call: v1.ToolCall, tool: Tool, context: CallContext) -> None:
        """Executes a dispatched call by a function, unless it was begun before. A result that another stream of the
        client could not send is sent without executing the function again."""
        key = _Key(context.run, call.call_id, call.attempt)
        if key in self._begun:
            return
        self._begun.add(key)
        turn = self._turns.begin(key)
        task = asyncio.create_task(self._answer(call, tool, context, turn), name=f"tool call {call.call_id}")
        self._tasks[call.call_id] = (task, turn)
        task.add_done_callback(lambda done: self._done(call.call_id, done, turn))

    def end(self, call_id: str) -> None:
        """Cancels what still works on a call that has its outcome, from here or from elsewhere."""
        if call_id in self._tasks:
            task, turn = self._tasks[call_id]
            turn.answered, turn.result = True, None
            task.cancel()

    async def close(self) -> None:
        """Cancels the calls under way and waits for their end. Threads cannot be cancelled, and are not waited for."""
        tasks = [task for task, _ in self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, call_id: str, task: asyncio.Task[None], turn: _Turn) -> None:
        self._turns.end(turn)
        if call_id in self._tasks and self._tasks[call_id][0] is task:
            del self._tasks[call_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    async def _answer(self, call: v1.ToolCall, tool: Tool, context: CallContext, turn: _Turn) -> None:
        async with turn.lock:
            if not turn.answered:
                if turn.result is None:
                    turn.result = await tool.answer(call, context, self._threads)
                await self._send(context.run, turn.result)
                turn.answered, turn.result = True, None

    async def _send(self, run: str, told: v1.ToolResult) -> None:
        try:
            await self._commands.send_result(run, told)
        except NotecaseError as error:
            if error.reason in _UNFIT and not told.error:
                refused = v1.ToolResult(call_id=told.call_id, error=f"The result was refused: {error.message}")
                await self._send(run, refused)
            elif error.reason not in _SETTLED:
                raise

"""Holds the questions of running tools to a person, from the question to its answer.

A tool waits in this process, and its question is in the rows like any other input. Only the worker commits it, and
passes the answer on when the run is active again. Who answered, and whether it was a person or a time limit, does not
matter here.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from notecase import v1

from notecase_server import errors
from notecase_server.engine import ledger
from notecase_server.engine.run_log import RunLog
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import PAGE_BYTES
from notecase_server.tools.clock import Clock

MAX_QUESTIONS = 32
"""Questions that one call may ask: a person is asked a few things, and a tool that goes on and on is broken."""

MAX_QUESTION_BYTES = 16 << 10
"""Of the question's text: a person is to read it."""

MAX_SCHEMA_BYTES = 64 << 10
"""Of its schema, as for every other schema."""

Pose = Callable[[str, str], Awaitable[v1.InputResponse]]


@dataclass(slots=True)
class _Question:
    request: v1.InputRequest
    answer: asyncio.Future[v1.InputResponse]
    """Cancelled when the tool no longer waits for it."""
    committed: bool = False

    def give(self, response: v1.InputResponse) -> None:
        if not self.answer.done():
            self.answer.set_result(response)

    def refuse(self, error: NotecaseError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Questions:
    """Holds the questions of one worker's calls, one of each call at a time."""

    def __init__(self, run_log: RunLog, stirred: asyncio.Event) -> None:
        """`stirred` is set when there is something to commit."""
        self._log = run_log
        self._stirred = stirred
        self._open: dict[str, _Question] = {}

    def of(self, call_id: str, clock: Clock) -> Pose:
        """Returns the function with which the tool of a call asks: see CallContext.ask. `clock` is stopped while a
        question is open."""
        turn, asked = asyncio.Lock(), itertools.count(1)

        async def pose(question: str, schema: str) -> v1.InputResponse:
            async with turn:
                if next(asked) > MAX_QUESTIONS:
                    raise errors.tool_error(f"A call may ask {MAX_QUESTIONS} questions.")
                await self._require(question, schema)
                with clock.paused():
                    return await self._answer(call_id, question, schema)

        return pose

    async def _require(self, question: str, schema: str) -> None:
        """Raises NotecaseError TOOL_ERROR for a question that cannot be asked."""
        for what, text, most in (("question", question, MAX_QUESTION_BYTES), ("schema", schema, MAX_SCHEMA_BYTES)):
            if (size := len(text.encode())) > most:
                raise errors.tool_error(f"The {what} has {size} bytes; a question to a person has at most {most}.")
        if schema and (problem := await self._log.services.schemas.problem(schema, None)):
            raise errors.tool_error(f"The question's schema is not a JSON Schema (draft 2020-12): {problem}.")

    async def _answer(self, call_id: str, question: str, schema: str) -> v1.InputResponse:
        request = v1.InputRequest(
            input_id=self._log.services.new_id(),
            kind=v1.InputRequest.KIND_QUESTION,
            prompt=question,
            call=v1.ToolCall(call_id=call_id),
            schema=schema,
        )
        if all(call.call_id != call_id for call in self._log.open):  # a part of the tool that outlived its call
            return v1.InputResponse(input_id=request.input_id)
        posed = _Question(request, asyncio.get_running_loop().create_future())
        self._open[request.input_id] = posed
        self._stirred.set()
        try:
            return await posed.answer
        finally:
            self._stirred.set()

    async def keep(self) -> None:
        """Commits new questions, and withdraws those that no tool waits for any more."""
        for input_id, question in list(self._open.items()):
            if question.answer.done():
                del self._open[input_id]
                if question.committed:
                    await self._log.durably(partial(self._withdrawn, input_id))
            elif not question.committed:
                await self._log.durably(partial(self._asked, question))
                question.committed = True

    def _asked(self, question: _Question) -> list[v1.Event]:
        """Returns the event of a question, unless its call has ended or the run is about to end: then it is not
        asked."""
        run, request = self._log.run, question.request
        call = next((call for call in self._log.started if call.call_id == request.call.call_id), None)
        if call is None or run.ending:
            question.give(v1.InputResponse(input_id=request.input_id, reason="The question can no longer be asked."))
            return []
        request.call.CopyFrom(call)
        ledger.expire(request, run, self._log.services.clock())
        size = sum(pending.ByteSize() for pending in (*run.pending_inputs, request))
        if size > PAGE_BYTES:
            question.refuse(errors.tool_error("The run asks too many questions at once."))
            return []
        return [v1.Event(input_requested=request)]

    def _withdrawn(self, input_id: str) -> list[v1.Event]:
        pending = [request for request in self._log.run.pending_inputs if request.input_id == input_id]
        return ledger.unasked(pending, "The tool no longer waits for an answer.")

    def hand_out(self) -> None:
        """Passes the answers to the tools, which continue."""
        for input_id, response in self._log.resolved.items():
            if (question := self._open.pop(input_id, None)) is not None:
                question.give(response)
        self._log.resolved.clear()

    def close(self, call_id: str) -> None:
        """Tells the tool of a call that has an outcome that its question will not be answered."""
        for input_id, question in list(self._open.items()):
            if question.request.call.call_id == call_id:
                del self._open[input_id]
                question.give(v1.InputResponse(input_id=input_id))

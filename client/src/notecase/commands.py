"""Commands to a run, from the process that started it or from any other."""

import uuid
from collections.abc import Callable, Mapping
from typing import Any

from notecase import v1
from notecase.arguments import made, shown
from notecase.hints import dump
from notecase.names import Named, Remember, When, choice, name_of
from notecase.retry import Retry, repeat
from notecase.tools import parts_of
from notecase.values import to_message


class Commands:
    """Commands to a run, `sessions/{session}/runs/{run}`, or to a session's active run, `sessions/{session}`, given by
    name, or by the `v1.Run` or `v1.Session` that the service returned.

    Each returns the sequence of the log at which it was committed. Most have taken effect by then; one that is queued,
    such as a follow-up, is durable and takes effect later. They are sent with a command_id and repeated while the
    connection is broken, without a second effect. All raise NotecaseError SESSION_NOT_FOUND, RUN_NOT_FOUND, and
    RUN_ENDED once the run has ended.
    """

    def __init__(self, stub: "v1.RunServiceAsyncStub", retry: Retry, session_uid: Callable[[], str] = str) -> None:
        """`session_uid` returns the uid that the session must have; empty for any."""
        self._stub = stub
        self._patience = retry
        self._session_uid = session_uid

    async def say(
        self,
        name: str | Named,
        *said: str | v1.Message,
        when: When = "steer",
    ) -> int:
        """Sends input to an active run: "steer" before the next model call, "follow_up" when it would otherwise end,
        "interrupt" now. It denies open approvals and questions.

        Raises NotecaseError QUEUE_FULL when too many commands are queued."""
        said_then = v1.UserInput(
            messages=[to_message(one) for one in said], when=choice(v1.UserInput.When, when, "when")
        )
        return await self.send(name, v1.RunRequest(input=said_then))

    async def approve(
        self,
        name: str | Named,
        input_id: str,
        arguments: str | Mapping[str, Any] | None = None,
        *,
        remember: Remember = "once",
    ) -> int:
        """Approves a call. `arguments`, JSON text or a mapping, replace the model's. An interrupted call is run again.

        With `remember` "run" or "session" later calls of the tool there are approved, too. Raises NotecaseError
        INPUT_NOT_PENDING when it was answered before."""
        edited = "" if arguments is None else _json("arguments", arguments)
        response = made(
            v1.InputResponse,
            input_id=input_id,
            decision=v1.InputResponse.DECISION_APPROVE,
            edited_arguments=edited,
            remember=choice(v1.InputResponse.Remember, remember, "remember"),
        )
        return await self.send(name, v1.RunRequest(input_response=response))

    async def deny(
        self,
        name: str | Named,
        input_id: str,
        reason: str = "",
        *,
        remember: Remember = "once",
    ) -> int:
        """Denies a call; the model reads the reason. An interrupted call is treated as failed.

        `remember` and errors are those of `approve`."""
        response = made(
            v1.InputResponse,
            input_id=input_id,
            decision=v1.InputResponse.DECISION_DENY,
            reason=reason,
            remember=choice(v1.InputResponse.Remember, remember, "remember"),
        )
        return await self.send(name, v1.RunRequest(input_response=response))

    async def answer(self, name: str | Named, input_id: str, answer: str | Mapping[str, Any]) -> int:
        """Answers a question; one with a `schema` needs JSON text or a mapping. For an interrupted call, gives its
        result.

        Raises NotecaseError INVALID_FIELD for an answer that does not match the schema; the question then stays open.
        Other errors are those of `approve`."""
        text = _json("answer", answer)
        response = made(v1.InputResponse, input_id=input_id, decision=v1.InputResponse.DECISION_ANSWER, answer=text)
        return await self.send(name, v1.RunRequest(input_response=response))

    async def dismiss(self, name: str | Named, input_id: str, reason: str = "") -> int:
        """Closes a tool's question without an answer; `deny` declines it. Errors are those of `approve`, and
        INVALID_FIELD when it is not a tool's question."""
        response = made(v1.InputResponse, input_id=input_id, decision=v1.InputResponse.DECISION_CANCEL, reason=reason)
        return await self.send(name, v1.RunRequest(input_response=response))

    async def give_result(self, name: str | Named, call_id: str, result: Any = None, *, error: str = "") -> int:
        """Answers a call that was dispatched to callers (`Run.pending_calls`), with the result that a function of that
        name would return, or with an error for the model.

        The same result may be given again. Raises NotecaseError CALL_NOT_PENDING or REQUEST_ID_REUSED when the call has
        another outcome, TypeError or ValueError for a result that cannot be written as JSON."""
        parts = [] if error else parts_of(result)
        return await self.send_result(name, made(v1.ToolResult, call_id=call_id, result=parts, error=error))

    async def cancel(self, name: str | Named, reason: str = "", *, after_turn: bool = False, call_id: str = "") -> int:
        """Cancels the run and keeps its output so far. With `after_turn` it stops when the running calls have their
        results, and the model is not called again; with `call_id` only that call is cancelled.

        Raises NotecaseError CALL_NOT_PENDING for a call that has its outcome."""
        mode = v1.CancelCommand.MODE_AFTER_TURN if after_turn else v1.CancelCommand.MODE_IMMEDIATE
        stop = made(v1.CancelCommand, mode=mode, call_id=call_id, reason=reason)
        return await self.send(name, v1.RunRequest(cancel=stop))

    async def send_result(self, name: str | Named, told: v1.ToolResult) -> int:
        """Sends a tool's result with a command_id made from the call's id, so that any repeat is a duplicate. If the
        server has too many calls, it waits and tries again, so that the result is not lost."""
        return await self._send(name, v1.RunRequest(command_id=f"result.{told.call_id}", tool_result=told), True)

    async def send(self, name: str | Named, command: v1.RunRequest) -> int:
        """Sends a copy of any command, with a new command_id where it has none."""
        return await self._send(name, command)

    async def _send(self, name: str | Named, command: v1.RunRequest, limited: bool = False) -> int:
        if not isinstance(command, v1.RunRequest):
            raise TypeError(f"command must be a v1.RunRequest, not {shown(command)}")
        name = name_of(name, "sessions", "name")
        session = "/".join(name.split("/")[:2])
        request = v1.SendCommandRequest(
            session=session, run=name if name != session else "", command=command, if_session_uid=self._session_uid()
        )
        request.command.command_id = command.command_id or uuid.uuid4().hex
        answer = await repeat(self._patience, lambda: self._stub.SendCommand(request), limited=limited)
        return answer.result.sequence


def _json(argument: str, given: str | Mapping[str, Any]) -> str:
    """Returns JSON text as it is, and that of a mapping."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument} must be a mapping or JSON text, not {shown(given)}")
    return dump(dict(given))

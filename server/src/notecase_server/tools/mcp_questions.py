"""Passes on questions of MCP tools to their user (elicitation), and finds the call that asks.

If a question comes within its call's exchange (over HTTP, or as an answer that needs input), the call's context
identifies it. Over a process's pipes the protocol does not identify it, but a server that passes on the trace of a
request (`traceparent`) does. Otherwise a question is accepted only while all calls of the connection belong to one run,
since it might be another user's.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import structlog
from mcp import types
from mcp.client.session import ClientRequestContext
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.tools.clock import Clock
from notecase_server.tools.contract import CallContext

log = structlog.get_logger()

FLAT = frozenset({"string", "number", "integer", "boolean", "array"})
"""Types of a form's fields: what an answer may hold is flat."""


@dataclass(slots=True, eq=False)
class Call:
    """A call under way."""

    run: tuple[str, str]
    trace: str
    """In the form of a `traceparent`; its second member is the call's alone."""
    ask: Callable[[str, str], Awaitable[v1.InputResponse]]
    asks: int = 0
    """Questions of it that are open."""


_calling: ContextVar[Call | None] = ContextVar("calling", default=None)


class Questions:
    """The calls under way on one connection."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._calls: list[Call] = []

    @property
    def idle(self) -> bool:
        """No call is under way."""
        return not self._calls

    @contextmanager
    def of(self, context: CallContext, clock: Clock) -> Iterator[Call]:
        """Lets a call ask questions within the block; `clock` is paused while it asks."""

        async def ask(question: str, schema: str) -> v1.InputResponse:
            with clock.paused():
                call.asks += 1
                try:
                    return await context.pose(question, schema)
                finally:
                    call.asks -= 1

        digest = hashlib.sha256(f"{context.session_uid}/{context.call_id}/{context.attempt}".encode()).hexdigest()
        call = Call((context.session_uid, context.run), f"00-{digest[:32]}-{digest[32:48]}-01", ask)
        self._calls.append(call)
        token = _calling.set(call)
        try:
            yield call
        finally:
            _calling.reset(token)
            self._calls.remove(call)

    async def answer(
        self, context: ClientRequestContext, params: types.ElicitRequestParams
    ) -> types.ElicitResult | types.ErrorData:
        """Answers a question of the server, once a person has. Never raises but when it is cancelled."""
        if isinstance(params, types.ElicitRequestURLParams):
            # Where it leads is for the user's own browser, and nothing comes back that a log could hold.
            return types.ElicitResult(action="decline")
        form = {"type": "object", "additionalProperties": False, **_without_nulls(params.requested_schema)}
        fields = form.get("properties") or {}
        if not isinstance(fields, dict):
            return _refused("The form's `properties` are no object.")
        form["properties"] = {name: _without_nulls(field) for name, field in fields.items()}
        if strange := [name for name, field in fields.items() if not _is_flat(field)]:
            return _refused(f"The field {strange[0]!r} is neither text, a number, a boolean nor a list of choices.")
        try:
            response = await self._ask(params, json.dumps(form, ensure_ascii=False))
        except NotecaseError as error:
            return _refused(error.message)
        match response.decision:
            case v1.InputResponse.DECISION_ANSWER:
                return types.ElicitResult(action="accept", content=json.loads(response.answer))
            case v1.InputResponse.DECISION_DENY:
                return types.ElicitResult(action="decline")
            case _:
                return types.ElicitResult(action="cancel")

    async def _ask(self, params: types.ElicitRequestFormParams, schema: str) -> v1.InputResponse:
        while (call := self._asking(params.meta)) is not None:
            response = await call.ask(params.message, schema)
            if response.decision or call in self._calls:
                return response  # otherwise the call has ended that the question was taken for
        log.warning("mcp_question_refused", server=self._server, calls=len(self._calls))
        raise errors.tool_error("Calls for several users are under way, and it is not known which of them asks.")

    def _asking(self, meta: Any) -> Call | None:
        trace = str((meta or {}).get("traceparent", "")).split("-")
        call = _calling.get() or next((call for call in self._calls if call.trace.split("-")[1:2] == trace[1:2]), None)
        if call is not None:
            return call if call in self._calls else None
        runs = {call.run for call in self._calls}
        return min(self._calls, key=lambda call: call.asks) if len(runs) == 1 else None


def _without_nulls(schema: Any) -> Any:
    """Returns a schema without the keywords that are null, as servers in Go write empty ones."""
    if not isinstance(schema, dict):
        return schema
    return {name: value for name, value in schema.items() if value is not None or name in {"default", "const", "type"}}


def _is_flat(field: Any) -> bool:
    if not isinstance(field, dict):
        return False
    told = field.get("type", "string")
    names = told if isinstance(told, list) else [told]
    return all(isinstance(name, str) and name in FLAT | {"null"} for name in names)


def _refused(told: str) -> types.ErrorData:
    return types.ErrorData(code=types.INVALID_REQUEST, message=told)

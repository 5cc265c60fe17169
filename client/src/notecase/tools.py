"""Python functions that a model may call, executed in the process that follows the run."""

import asyncio
import concurrent.futures
import contextvars
import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from notecase import v1
from notecase.arguments import duration, made, shown
from notecase.context import CallContext, context_parameters
from notecase.hints import Mismatch, dump, of_arguments, parse
from notecase.names import Approver, choice

RESULT_BYTES = 512 << 10
"""The longest text of a result; a longer one is an error. It stays in the log, and is in every later request to the
model."""

DATA_BYTES = 3 << 20
"""The most data in a result, which the server keeps as blobs. Larger data can be uploaded and referred to."""

ERROR_CHARACTERS = 4000
"""The longest error that a model reads. An exception may quote anything."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

log = logging.getLogger("notecase")


class ToolFailure(Exception):
    """Raised by a tool's function: the model reads its text as it is, and nothing is logged. So it does of a group of
    nothing else, as a task group raises."""


def failures_of(error: BaseException) -> list[ToolFailure]:
    """Returns the failures that an exception consists of; none for any other exception."""
    if not isinstance(error, BaseExceptionGroup):
        return [error] if isinstance(error, ToolFailure) else []
    each = [failures_of(inner) for inner in error.exceptions]
    return [failure for inner in each for failure in inner] if all(each) else []


class Tool:
    """A function that a model may call, for `tools` of `Client.put_agent`, `run`, `invoke` and `attach`.

    A function without options is passed directly: `tools=[search]`. The tool's name is that of the function, its
    description is the docstring, and its JSON Schema comes from the type hints:

        def search(query: Annotated[str, "words to look for"], limit: int = 10) -> list[str]:
            \"""Searches the newspapers.\"""

    The arguments may be str, int, float, bool, None, Any, Literal, Enum, list[X], tuple[X, ...], dict[str, X],
    TypedDict, dataclasses, and unions of these; with notecase[pydantic] installed also pydantic models and every type
    that pydantic has a schema for. Arguments with a default are optional. A parameter annotated
    `notecase.CallContext` receives the call's context, with its idempotency key, and is not in the schema. The
    function is called with arguments of those types. It may be async; otherwise it runs in a daemon thread, which
    continues even if its call is cancelled, but ends with the program, in the middle of what it does: the program must
    wait for the run, or for what the function writes. At most 64 calls of a stream are in threads at once; others wait.

    The result is the return value: text unchanged, bytes as data, a `v1.Part` or a list of them as parts, and
    everything else as JSON: JSON values, enums, dataclasses and pydantic models. An exception, SystemExit too, becomes
    the call's `error`, such as "ValueError: no such paper", which the model reads and the log keeps; the traceback goes
    only to the logger "notecase". If the exception is a `ToolFailure`, the model reads only its text, and nothing is
    logged here. Arguments that do not match the schema, and a result of more than 512 KiB of text or 3 MiB of data, are
    errors for the model, too.

    Raises TypeError for a function whose arguments have no JSON Schema.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str = "",
        description: str = "",
        requires_approval: bool = False,
        approver: Approver = "user",
        timeout: float | None = None,
        declare: bool = True,
    ) -> None:
        """`approver` is the lowest role that may approve a call: "user", "developer" or "admin". `timeout` is in
        seconds, from the dispatch of a call to its outcome. A tool with `declare` False is not declared by the run,
        because its agent declares it, for example by `put_agent` in another process."""
        if not callable(function):
            raise TypeError(f"a tool is a function, not {shown(function)}")
        self.function = function
        self.declare = declare
        name = name or getattr(function, "__name__", "")
        if not _NAME.fullmatch(name):
            raise TypeError(f'{function!r} needs a name of up to 64 letters, digits, "_" and "-"')
        try:
            self._context = context_parameters(function, CallContext)
            self._arguments = of_arguments(function, leave_out=self._context)
        except TypeError as error:
            raise TypeError(f"{name} cannot be a tool: {error}") from error
        self.definition = made(
            v1.Tool,
            name=name,
            description=description or inspect.getdoc(function) or "",
            parameters=dump(self._arguments.schema),
            client=v1.ClientTool(),
            requires_approval=requires_approval,
            approver=choice(v1.Tool.Approver, approver, "approver"),
            timeout=duration("timeout", timeout),
        )
        """The declaration, for an agent or a run."""

    async def answer(
        self, call: v1.ToolCall, context: CallContext, threads: asyncio.Semaphore | None = None
    ) -> v1.ToolResult:
        """Calls the function and returns its result or error. A function that is not async waits for a place among
        `threads`. Raises nothing but CancelledError and Ctrl-C."""

        def failed(text: str) -> v1.ToolResult:
            # An exception, or the arguments that it quotes, may have surrogates, which UTF-8 cannot encode.
            return v1.ToolResult(call_id=call.call_id, error=text.encode(errors="replace").decode())

        try:
            arguments = self._arguments.read(parse(call.arguments), "")
        except Mismatch as mismatch:
            return failed(f"The arguments do not fit: {mismatch}.")
        except Exception as error:  # noqa: BLE001 - of a type that is made of them
            return failed(f"The arguments do not fit: {_said(error)}.")
        arguments.update(dict.fromkeys(self._context, context))
        try:
            told = v1.ToolResult(call_id=call.call_id, result=_sendable(await self._call(arguments, threads)))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return failed(_said(error))  # the function's own: something it waited for was cancelled
        except GeneratorExit:  # this coroutine is closed
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C
            if failures := failures_of(error):
                return failed("\n".join(map(_text, failures))[:ERROR_CHARACTERS] or "The tool failed.")
            log.exception(
                "The tool %s raised.",
                self.definition.name,
                extra={"run": context.run, "session": context.session, "call_id": call.call_id},
            )
            return failed(_said(error))
        data = sum(len(part.data.data) for part in told.result)
        if data > DATA_BYTES:
            return failed(f"The result has more than {DATA_BYTES} bytes of data.")
        if told.ByteSize() - data > RESULT_BYTES:
            return failed(f"The result is larger than {RESULT_BYTES} bytes.")
        return told

    async def _call(self, arguments: dict[str, Any], threads: asyncio.Semaphore | None) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**arguments)
        async with threads or nullcontext():  # cancelled, this leaves its place, whatever becomes of the thread
            returned = await _in_thread(lambda: self.function(**arguments))
        return await returned if inspect.isawaitable(returned) else returned


def _in_thread(call: Callable[[], Any]) -> asyncio.Future[Any]:
    """Runs `call` in a new daemon thread. The threads of a pool would be used up by functions that hang, or that wait
    for this client, which needs them, too; and the program would wait for them at its end."""
    done: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(call())
        except (StopIteration, GeneratorExit, KeyboardInterrupt) as error:
            # A future cannot hold the first, and where it is awaited the others mean something else.
            text = f"the function raised {type(error).__name__}"
            done.set_exception(RuntimeError(text).with_traceback(error.__traceback__))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the call fails
            done.set_exception(error)

    done.set_running_or_notify_cancel()
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name="notecase tool", daemon=True).start()
    return asyncio.wrap_future(done)


def each_of(tools: Iterable[Any] | None) -> Iterable[Any]:
    """Returns the entries of an argument `tools`; None has none. Raises TypeError for what is not a list of tools."""
    if tools is None:
        return ()
    if isinstance(tools, str | bytes | Mapping | Tool | v1.Tool) or not isinstance(tools, Iterable):
        raise TypeError(f"tools must be a list, for example tools=[search], not {shown(tools)}")
    return tools


def as_tools(functions: Iterable[Callable[..., Any] | Tool] | None) -> dict[str, Tool]:
    """Returns tools by name. Raises TypeError for two of one name, for a declaration of a tool, and as `Tool` does."""
    tools: dict[str, Tool] = {}
    for function in each_of(functions):
        if isinstance(function, v1.Tool | Mapping):
            raise TypeError(
                "a run accepts only functions; declare a tool that the server runs with put_agent(…, tools=[…])"
            )
        tool = function if isinstance(function, Tool) else Tool(function)
        if tools.setdefault(tool.definition.name, tool) is not tool:
            raise TypeError(f"two tools have the name {tool.definition.name}")
    return tools


def parts_of(returned: Any) -> list[v1.Part]:
    """Converts what a function returned to the parts of a result. Raises TypeError or ValueError for a value that
    cannot be written as JSON."""
    match returned:
        case v1.Part():
            return [returned]
        case [v1.Part(), *_]:
            return list(returned)
        case str():
            return [v1.Part(text=returned)]
        case bytes() | bytearray() | memoryview():
            return [v1.Part(data=v1.InlineData(data=bytes(returned), media_type="application/octet-stream"))]
        case _:
            return [v1.Part(text=dump(returned))]


def _sendable(returned: Any) -> list[v1.Part]:
    """Converts as `parts_of` does. Raises TypeError, which names the type of a result that cannot be sent."""
    try:
        return parts_of(returned)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the result, of type {type(returned).__name__}, cannot be sent: {error}") from error


def _said(error: BaseException) -> str:
    text = _text(error)
    return f"{type(error).__name__}: {text}"[:ERROR_CHARACTERS] if text else type(error).__name__


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - its class has a __str__ that raises
        return ""

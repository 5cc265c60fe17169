"""Python functions as tools: how an operator writes them, and how the model's arguments become a call.

A module of tools is named in the server's settings, or by an entry point of the group `notecase.tools`:

    from notecase_server.tools.functions import CallContext, ToolFailure, tool

    @tool
    async def remember(fact: str, context: CallContext) -> str:
        \"\"\"Keeps a fact for later turns.\"\"\"
        context.append("facts", fact)
        return "Noted."

Arguments are validated against the annotations, whatever the model wrote. The model reads the docstring, and the
description of a parameter in `Annotated[int, "how many"]`. A parameter annotated `CallContext` receives the call's
context, and the model does not see it. The model reads the text of a `ToolFailure`; of any other exception it learns
only that the tool failed, because the text may hold what no model should see.
"""

import asyncio
import concurrent.futures
import contextvars
import importlib
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, overload

import structlog
from notecase import ToolFailure, v1
from notecase.context import context_parameters
from notecase.hints import Mismatch, dump, of_arguments
from notecase.tools import failures_of
from pydantic import ConfigDict, TypeAdapter

from notecase_server.tools.contract import CallContext, Function, Outcome, ToolSettingsError
from notecase_server.tools.outcome import failed, succeeded

__all__ = ["CallContext", "PythonTool", "ToolFailure", "load", "tool"]

log = structlog.get_logger()

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What every model's API takes as the name of a function."""

_JSON: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_bytes="base64", ser_json_inf_nan="strings"))
"""Writes a result as JSON: values that JSON does not have become text."""

Written = TypeVar("Written", bound=Callable[..., Any])


class _Mark(NamedTuple):
    name: str
    description: str


_MARK = "__notecase_tool__"


@overload
def tool(function: Written, /) -> Written: ...
@overload
def tool(*, name: str = "", description: str = "") -> Callable[[Written], Written]: ...
def tool(function: Callable[..., Any] | None = None, /, *, name: str = "", description: str = "") -> Callable[..., Any]:
    """Makes a function a tool of every server whose settings name its module. The function itself is not changed.

    It may be async, or plain: then it runs in a thread, which nothing can stop. When a call is cancelled, the call ends
    at once, the thread continues, and its result is dropped. Parameters are passed by name and need types. It may
    return text, anything that is JSON (pydantic models and dataclasses are), bytes, None, or a `v1.Part` or a list of
    them with text, a file or data; at most 512 KiB of text and 8 MiB of media. `name` replaces the function's own name,
    `description` its docstring."""

    def mark(written: Written) -> Written:
        setattr(written, _MARK, _Mark(name, description))
        return written

    return mark if function is None else mark(function)


def load(modules: Sequence[str], entries: Iterable[EntryPoint] = ()) -> dict[str, "PythonTool"]:
    """Returns the tools of these modules and entry points, by name. An entry point names a module, or one function.
    Raises ToolSettingsError, whose text is for the operator."""
    found: dict[str, PythonTool] = {}
    for origin, function in _functions(modules, entries):
        made = PythonTool(function)
        known = found.setdefault(made.name, made)
        if known.function is not function:
            raise ToolSettingsError(f"{origin} has a tool {made.name!r}, and so has {known.function.__module__!r}.")
    return found


def _functions(modules: Sequence[str], entries: Iterable[EntryPoint]) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in modules:
        origin = f"The module {name!r}"
        yield from _marked(origin, _imported(origin, partial(importlib.import_module, name)))
    for entry in entries:
        origin = f"The entry point {entry.name!r} ({entry.value})"
        loaded = _imported(origin, entry.load)
        if isinstance(loaded, ModuleType):
            yield from _marked(origin, loaded)
        else:
            yield origin, loaded


def _imported(origin: str, load_it: Callable[[], Any]) -> Any:
    try:
        return load_it()
    except Exception as error:
        where = "; PYTHONPATH lists the directories of modules" if isinstance(error, ModuleNotFoundError) else ""
        raise ToolSettingsError(f"{origin} cannot be imported: {type(error).__name__}: {error}{where}") from error


def _marked(origin: str, module: ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    marked = [held for held in vars(module).values() if inspect.isfunction(held) and hasattr(held, _MARK)]
    if not marked:
        raise ToolSettingsError(f"{origin} has no function that is decorated with @tool.")
    yield from ((origin, function) for function in marked)


class PythonTool:
    """One function with its schema."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Raises ToolSettingsError when no model could call it."""
        if not inspect.isfunction(function):
            raise ToolSettingsError(f"{function!r} is not a function, so it cannot be a tool.")
        mark: _Mark = getattr(function, _MARK, _Mark("", ""))
        self.function = function
        self.name = mark.name or function.__name__
        self.description = mark.description or inspect.getdoc(function) or ""
        if not NAME.fullmatch(self.name):
            raise ToolSettingsError(
                f"{self.name!r} is not a name for a tool: use letters, digits, _ and -, at most 64."
            )
        try:
            self._context = context_parameters(function, CallContext)
            self._arguments = of_arguments(function, leave_out=self._context)
        except TypeError as error:
            raise ToolSettingsError(f"The tool {self.name!r} cannot be declared: {error}.") from error
        self.parameters = dump(self._arguments.schema)

    def offered(self, name: str, description: str, parameters: str) -> Function:
        """Returns the tool as it is declared to the model. Empty arguments mean the tool's own values."""
        implementation = v1.ToolBinding(function=self.name)
        return Function(
            name or self.name, description or self.description, parameters or self.parameters, implementation
        )

    async def call(self, arguments: Mapping[str, Any], context: CallContext) -> Outcome:
        """As Toolbox.call promises. A tool cannot end the server: SystemExit is a defect like any other."""
        try:
            values = self._arguments.read(arguments, "")
        except Mismatch as mismatch:
            return failed(f"The arguments do not fit: {mismatch}.")
        values.update(dict.fromkeys(self._context, context))
        try:
            result = await self._run(values)
        except (ToolFailure, BaseExceptionGroup) as error:
            if not (failures := failures_of(error)):
                raise
            return failed("\n".join(map(str, failures)))
        except SystemExit as end:
            raise RuntimeError("the tool asked the server to exit") from end
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise RuntimeError("the tool cancelled itself") from error
        try:
            return succeeded(_parts(result))
        except ValueError as error:
            log.warning("tool_result_unusable", tool=self.name, kind=type(result).__name__, error=type(error).__name__)
            return failed("The tool gave back something that is neither text nor JSON nor content.")

    async def _run(self, values: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**values)
        result = await _in_thread(lambda: self.function(**values))
        return await result if inspect.isawaitable(result) else result


def _in_thread(call: Callable[[], Any]) -> asyncio.Future[Any]:
    """Runs `call` in a new thread. A pool's threads would be used up by tools that hang, and would keep the process
    from ending; starting a daemon thread costs nothing compared with a model's call."""
    done: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(call())
        except StopIteration as error:
            # Set as it is, it would be refused by the loop's future, and the call would never end.
            done.set_exception(RuntimeError("the tool raised StopIteration").with_traceback(error.__traceback__))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller gets it
            done.set_exception(error)

    done.set_running_or_notify_cancel()
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name="tool", daemon=True).start()
    return asyncio.wrap_future(done)


def _parts(result: Any) -> Sequence[v1.Part]:
    """Converts a tool's result to parts. Raises ValueError for a value that cannot be converted, and for text that is
    not UTF-8."""
    match result:
        case None:
            return [v1.Part(text="")]
        case str():
            return [v1.Part(text=result)]
        case bytes() | bytearray() | memoryview():
            return [v1.Part(data=v1.InlineData(data=bytes(result), media_type="application/octet-stream"))]
        case v1.Part():
            return _content([result])
        case [v1.Part(), *_] if all(isinstance(held, v1.Part) for held in result):
            return _content(result)
        case Iterator():
            raise ValueError("an iterator may have no end")
        case _:
            return [v1.Part(text=_JSON.dump_json(result).decode())]


def _content(parts: Sequence[v1.Part]) -> Sequence[v1.Part]:
    if any(part.WhichOneof("kind") not in {"text", "file", "data"} for part in parts):
        raise ValueError("a result holds text, files and data only")
    return parts

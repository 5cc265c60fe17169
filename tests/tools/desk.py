"""Tools as an operator writes them, good and bad."""

import asyncio
import contextvars
import queue
import threading
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

from notecase import v1
from notecase_server.tools.functions import CallContext, ToolFailure, tool
from pydantic import BaseModel, Field

caller = contextvars.ContextVar("caller", default="nobody")

blocked: "queue.SimpleQueue[threading.Event]" = queue.SimpleQueue()
"""One event for each call of `block`, by which it is let go."""

held: "queue.SimpleQueue[str]" = queue.SimpleQueue()
"""What `hold` reports about itself."""


class Place(BaseModel):
    name: str
    floor: int = 0


@dataclass
class Found:
    what: str
    where: Place
    on: date


@tool
def find(
    what: str,
    place: Place,
    kind: Literal["letter", "key"] = "key",
    limit: Annotated[int, Field(ge=1, description="How many.")] = 3,
) -> list[Found]:
    """Looks for a thing.

    In every drawer."""
    return [Found(f"{kind} {what}", place, date(2026, 11, 22))] * limit


@tool
async def remember(fact: str, context: CallContext) -> str:
    """Keeps a fact."""
    known = await context.read("facts", "absent")
    context.append("facts", fact)
    context.increment("count")
    context.put("last", {"fact": fact, "attempt": context.attempt})
    context.remove("draft")
    return f"{known}"


@tool(name="odd-names", description="Its own words.")
def odd_names(schema: str, model_config: int, copy: bool, self: str, parameter_1: float) -> list[Any]:
    return [schema, model_config, copy, self, parameter_1]


@tool
def anything(kind: str) -> Any:
    picture = v1.Part(data=v1.InlineData(data=b"\x89PNG", media_type="image/png"))
    circle: list[Any] = []
    circle.append(circle)
    results: dict[str, Any] = {
        "none": None,
        "text": "Grüße",
        "bytes": b"\x00\x01",
        "part": picture,
        "parts": [v1.Part(text="see:"), picture],
        "no parts": [],
        "json": {"a": [1, 2.5, None, True], "b": "ü", "c": b"\xff", "d": float("nan")},
        "object": object(),
        "mixed": [v1.Part(text="see:"), "words"],
        "iterator": iter([1]),
        "surrogate": "\ud800",
        "inner surrogate": ["\ud800"],
        "reasoning": v1.Part(reasoning=v1.Reasoning(text="so")),
        "circle": circle,
    }
    return results[kind]


@tool
def flood(size: int) -> str:
    return "x" * size


@tool
def flood_of_data(size: int, media_type: str) -> v1.Part:
    return v1.Part(data=v1.InlineData(data=b"x" * size, media_type=media_type))


def _error(kind: str) -> BaseException:
    errors: dict[str, BaseException] = {
        "failure": ToolFailure("The drawer is locked."),
        "novel": ToolFailure("x" * 100_000),
        "empty": ToolFailure(),
        "group": ExceptionGroup("", [ToolFailure("No key."), ExceptionGroup("", [ToolFailure("No light.")])]),
        "mixed": ExceptionGroup("", [ToolFailure("No key."), KeyError("secret")]),
        "defect": KeyError("secret"),
        "exit": SystemExit(3),
        "stop": StopIteration(),
        "cancelled": asyncio.CancelledError(),
    }
    return errors[kind]


@tool
async def fail(kind: str) -> str:
    raise _error(kind)


@tool
def fail_in_thread(kind: str) -> str:
    raise _error(kind)


@tool
def block() -> str:
    """Hangs in a thread until it is let go."""
    going = threading.Event()
    blocked.put(going)
    going.wait()
    return f"called by {caller.get()}"


@tool
async def hold() -> str:
    """Hangs until it is cancelled."""
    held.put("started")
    try:
        await asyncio.Event().wait()
    finally:
        held.put("cancelled")
    return ""

"""Asks the user at the terminal for the answer that a run waits for, and sends it."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import click
from notecase import NotecaseError
from notecase.commands import Commands

from notecase_server.cli import screen, terminal
from notecase_server.cli.waits import APPROVAL, INTERRUPTED, QUESTION, Wait, too_late

LEAVE = "Leave it waiting"

TOOL_HEADING = "The agent called this tool of a client program, and none has answered. You can give its result:"

_ONE_LINE = 60
"""Arguments that are no longer are edited on one line."""


class _Wrong(Exception):
    """What was typed cannot be sent; the message says why."""


async def answer(commands: Commands, wait: Wait, sending: Callable[[bool], None]) -> bool:
    """Shows what the run waits for and sends the user's answer. Returns False when the user leaves it waiting. An
    answer that cannot be sent is explained, and requested again. `sending` is called with True once the user has
    answered, and with False when the answer is refused; before the first and after the second call this may be
    cancelled. Raises NotecaseError for any other refusal."""
    _show(wait)
    while True:
        try:
            way = await _choose(wait)
            if way is None:
                return False
            command = await way(commands, wait)
            sending(True)
            await command
            return True
        except EOFError:
            return False
        except _Wrong as wrong:
            screen.failure(str(wrong))
        except NotecaseError as error:
            if too_late(error):
                screen.aside("Somebody else has answered.")
                return True
            if error.reason != "INVALID_FIELD":
                raise
            sending(False)
            screen.failure(error.message)


def _show(wait: Wait) -> None:
    """Shows everything that the answer is about, in full: users must see what they approve."""
    if wait.kind == QUESTION and wait.asked is not None:
        click.secho(screen.harmless(wait.question), bold=True)
        return
    headings = {APPROVAL: "Approve this call?", INTERRUPTED: "This call was running when its server stopped."}
    click.secho(headings.get(wait.kind, TOOL_HEADING), bold=True)
    click.echo(f"{screen.one_line(wait.call.tool)} {screen.harmless(pretty(wait.call.arguments))}")


async def _choose(wait: Wait) -> "_Way | None":
    """Returns the user's answer, or None."""
    if wait.kind == QUESTION and not wait.of_tool:
        screen.aside("Enter sends your answer, Ctrl-C leaves the question waiting.")
        return _say
    ways = {APPROVAL: _APPROVAL, INTERRUPTED: _INTERRUPTED, QUESTION: _TOOLS_QUESTION}.get(wait.kind, _TOOL)
    labels = [label.format(tool=screen.one_line(wait.call.tool, 40)) for label in ways]
    chosen = await terminal.choose("", [*labels, LEAVE], start=len(labels))
    return list(ways.values())[chosen] if chosen < len(ways) else None


Command = Awaitable[int]
"""A command that is sent once it is awaited."""

_Way = Callable[[Commands, Wait], Awaitable[Command]]
"""Asks for the further input that an answer needs."""


async def _approve(commands: Commands, wait: Wait) -> Command:
    return commands.approve(wait.run, wait.id)


async def _approve_all(commands: Commands, wait: Wait) -> Command:
    return commands.approve(wait.run, wait.id, remember="session")


async def _edit(commands: Commands, wait: Wait) -> Command:
    typed = _editable(wait.call.arguments)
    while True:
        typed = await terminal.line("arguments> ", typed)
        try:
            return commands.approve(wait.run, wait.id, _json(typed))
        except _Wrong as wrong:
            screen.failure(str(wrong))


async def _deny(commands: Commands, wait: Wait) -> Command:
    return commands.deny(wait.run, wait.id, await terminal.line("why (Enter for no reason)> "))


async def _dismiss(commands: Commands, wait: Wait) -> Command:
    return commands.dismiss(wait.run, wait.id)


async def _say(commands: Commands, wait: Wait) -> Command:
    """Answers a question, with JSON where it has a schema."""
    schema = wait.asked.schema if wait.asked else ""
    if not schema:
        return commands.answer(wait.run, wait.id, await _typed("answer> ", unasked=not wait.of_tool))
    fields = _fields(schema)
    if fields is None:
        screen.aside(f"Answer with JSON that matches this schema: {screen.harmless(schema)}")
        answer = _json(await _typed("answer> "))
    else:
        answer = json.dumps({key: value for key, value in [await _field(*one) for one in fields] if key})
    return commands.answer(wait.run, wait.id, answer)


async def _typed(sign: str, default: str = "", unasked: bool = False) -> str:
    """Returns what the user types. Asks again at an Enter alone, which would otherwise be a final, empty answer."""
    while not (typed := await terminal.line(sign, default, unasked)):
        screen.aside("Nothing was typed; Ctrl-C leaves it waiting.")
    return typed


async def _give(commands: Commands, wait: Wait) -> Command:
    typed = await _typed("result> ")
    if wait.asked is not None:
        return commands.answer(wait.run, wait.id, typed)
    return commands.give_result(wait.run, wait.id, typed)


async def _fail(commands: Commands, wait: Wait) -> Command:
    why = await terminal.line("what went wrong> ")
    if wait.asked is not None:
        return commands.deny(wait.run, wait.id, why)
    return commands.give_result(wait.run, wait.id, error=why or "The tool failed.")


_APPROVAL: Mapping[str, _Way] = {
    "Approve": _approve,
    "Approve, and all further calls of {tool} in this session": _approve_all,
    "Edit the arguments, then approve": _edit,
    "Deny": _deny,
}
_INTERRUPTED: Mapping[str, _Way] = {"Run it again": _approve, "It failed": _fail, "Give its result": _give}
_TOOLS_QUESTION: Mapping[str, _Way] = {"Answer": _say, "Decline": _deny, "Dismiss": _dismiss}
_TOOL: Mapping[str, _Way] = {"Give its result": _give, "It failed": _fail}


def pretty(text: str) -> str:
    """Returns JSON text with one member per line; other text unchanged."""
    try:
        return screen.as_json(json.loads(text or "{}"), indent=2)
    except (ValueError, RecursionError):
        return text


def _editable(arguments: str) -> str:
    return screen.escaped(arguments) if len(arguments) <= _ONE_LINE else pretty(arguments)


def _json(text: str) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"This is not JSON: {error}.") from None
    return text


_PLAIN = ("string", "integer", "number", "boolean")
"""Types of members for which there is a separate prompt."""


def _fields(schema: str) -> list[tuple[str, dict[str, Any], bool]] | None:
    """Returns the members that a flat object has, each with its name and its schema and whether it is required; None
    for any other schema."""
    try:
        properties: dict[str, dict[str, Any]] = json.loads(schema)["properties"]
        required = json.loads(schema).get("required", [])
        flat = all(one.get("enum") or one["type"] in _PLAIN for one in properties.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return [(name, held, name in required) for name, held in properties.items()] if flat else None


async def _field(name: str, schema: Mapping[str, Any], required: bool) -> tuple[str, Any]:
    """Returns the name and the value that the user gives a member; no name for one that is left out."""
    for told in (schema.get("title"), schema.get("description")):
        if told:
            screen.aside(screen.one_line(str(told), 200))
    choices = schema.get("enum")
    if isinstance(choices, list) and choices:
        labels = [screen.one_line(str(one)) for one in choices]
        return name, choices[await terminal.choose(screen.one_line(name), labels)]
    if schema["type"] == "boolean":
        return name, await terminal.choose(screen.one_line(name), ["Yes", "No"]) == 0
    default = "" if schema.get("default") is None else str(schema["default"])
    if required:
        typed = await _typed(f"{screen.one_line(name)}> ", default)
    else:
        typed = await terminal.line(f"{screen.one_line(name)} (may be empty)> ", default)
    if not typed and not required:
        return "", None
    if schema["type"] == "string":
        return name, typed
    try:
        return name, int(typed) if schema["type"] == "integer" else float(typed)
    except ValueError:
        raise _Wrong(f"{screen.one_line(name)} must be a number.") from None

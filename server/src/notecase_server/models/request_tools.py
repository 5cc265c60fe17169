"""Writes tools, their calls and JSON Schemas in the forms that Chat Completions servers accept."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec
from notecase import v1

from notecase_server.models.contract import Tool

Json = dict[str, Any]

_MAPS_OF_SCHEMAS = frozenset({"properties", "$defs", "definitions", "patternProperties", "dependentSchemas"})
_LISTS_OF_SCHEMAS = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_SCHEMAS = frozenset(
    {
        *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
        *("unevaluatedItems", "unevaluatedProperties"),
    }
)
"""Keywords that hold schemas, in the three ways in which they do."""

_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_NINE = re.compile(r"[a-zA-Z0-9]{9}")
_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


_COMBINED = ("allOf", "anyOf", "oneOf")
_NOT_AT_TOP = frozenset({*_COMBINED, "$ref", "not", "enum", "const", "if", "then", "else", "properties", "required"})
"""Keywords that some servers do not take at the top of a tool's parameters, and those that are made anew."""

_DESCRIPTION = 1024
"""Characters of a description where it is cut: what OpenAI takes."""

_MOST_COMBINED = 100
"""Schemas of one combination that are looked at: references may repeat a few without end."""


@lru_cache(1024)
def declared(
    tool: Tool, schemas: str, without: tuple[str, ...], combined: Literal["kept", "merged"], descriptions: str
) -> Json:
    """Returns a tool as a request declares it. `schemas` and so on as in Profile."""
    function: Json = {"name": tool_name(tool.name)}
    if description := tool.description:
        cut = descriptions == "cut" and len(description) > _DESCRIPTION
        function["description"] = f"{description[: _DESCRIPTION - 1]}…" if cut else description
    function["parameters"] = shaped(tool.parameters or "{}", schemas, without, combined)
    if schemas == "strict":
        function["strict"] = True
    return {"type": "function", "function": function}


@lru_cache(1024)
def shaped(
    text: str, schemas: str, without: tuple[str, ...], combined: Literal["kept", "merged"] | None = None
) -> msgspec.Raw:
    """Returns a schema in the shape that servers take: a list names its items. A tool's parameters, for which
    `combined` is given, are an object with `properties`. A schema with a number that no double can hold, or with
    hundreds of levels, is not changed."""
    try:
        schema = _decoded(text)
        if combined and isinstance(schema, dict):
            schema = {name: value for name, value in schema.items() if _is_meant(name, value)}
            schema = _merged(schema) if combined == "merged" else schema
            schema["type"] = "object"
            if schema.keys().isdisjoint({"$ref", *_COMBINED}):
                schema.setdefault("properties", {})
        return msgspec.Raw(msgspec.json.encode(_shaped(schema, schemas == "strict", without)))
    except (ValueError, RecursionError):
        return msgspec.Raw(text.encode())


def _decoded(text: str) -> Any:
    """Reads NaN and Infinity, too: Python's own writer, by which a schema may have come, has them, and JSON does not.
    Raises ValueError."""
    try:
        return msgspec.json.decode(text)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return json.loads(text, parse_constant=lambda _: None)


def _is_meant(keyword: str, value: Any) -> bool:
    """Whether a keyword has a value of a valid type. Servers in Go and PHP write null or a list for empty values."""
    if value is None:
        return keyword in {"default", "const"}
    if keyword in _MAPS_OF_SCHEMAS:
        return isinstance(value, dict)
    if keyword in _LISTS_OF_SCHEMAS or keyword in {"required", "enum"}:
        return isinstance(value, list)
    return keyword not in _SCHEMAS or bool(value) or not isinstance(value, list)


def _merged(schema: Json) -> Json:
    """Returns the schema of an object with all properties of those that it combines, and those required that each
    alternative requires."""
    found: dict[str, list[Any]] = {}
    needed = _collect(schema, schema, found, [_MOST_COMBINED])
    made = {name: value for name, value in schema.items() if name not in _NOT_AT_TOP}
    made["properties"] = {name: kinds[0] if len(kinds) == 1 else {"anyOf": kinds} for name, kinds in found.items()}
    if required := [name for name in found if name in needed]:
        made["required"] = required
    return made


def _collect(schema: Any, root: Json, found: dict[str, list[Any]], left: list[int]) -> set[str]:
    """Adds each property of a schema, and of those that it combines, to `found`, and returns which are required."""
    left[0] -= 1
    if left[0] < 0 or not isinstance(schema, dict):
        return set()
    properties, required = schema.get("properties"), schema.get("required")
    for name, kind in properties.items() if isinstance(properties, dict) else ():
        kinds = found.setdefault(name, [])
        if kind not in kinds:
            kinds.append(kind)
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set[str]()
    if isinstance(reference := schema.get("$ref"), str):
        needed |= _collect(_referred(root, reference), root, found, left)
    for keyword in _COMBINED:
        if isinstance(held := schema.get(keyword), list) and held:
            each = [_collect(inner, root, found, left) for inner in held]
            needed |= set.union(*each) if keyword == "allOf" else set.intersection(*each)
    return needed


def _referred(root: Any, reference: str) -> Any:
    """The part of a schema that a reference within it names; None if there is none."""
    for name in reference.removeprefix("#").split("/")[1:]:
        root = root.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root


def _shaped(schema: Any, strict: bool, without: Sequence[str]) -> Any:
    if not isinstance(schema, dict):
        return schema
    made: Json = {}
    for name, value in schema.items():
        if name in without or not _is_meant(name, value):
            continue
        if name in _MAPS_OF_SCHEMAS:
            made[name] = {key: _shaped(inner, strict, without) for key, inner in value.items()}
        elif name in _LISTS_OF_SCHEMAS:
            made[name] = [_shaped(inner, strict, without) for inner in value]
        else:
            made[name] = _shaped(value, strict, without) if name in _SCHEMAS else value
    types = made.get("type")
    types = types if isinstance(types, list) else [types]
    if "array" in types and "prefixItems" not in made:
        made.setdefault("items", {})
    if strict and ("object" in types or "properties" in made):
        made |= {"additionalProperties": False, "required": list(made.setdefault("properties", {}))}
    return made


def loosen(made: Json, messages: Sequence[v1.Message]) -> None:
    """Takes out of a request without tools what it says of their calls, and ends a forced choice with the result of the
    call that it forced: otherwise the model could never speak."""
    if not made.get("tools"):
        made.pop("tool_choice", None)
        made.pop("parallel_tool_calls", None)
        return
    if "tool_choice" not in made:
        return
    choice, name = made["tool_choice"], ""
    forced = choice in ("required", "any")
    if isinstance(choice, dict):
        function, allowed = choice.get("function"), choice.get("allowed_tools", choice)
        name = str((function if isinstance(function, dict) else choice).get("name") or "")
        forced = bool(name) or (isinstance(allowed, dict) and allowed.get("mode") in ("required", "any"))
    if forced and any(not name or tool_name(call.tool) == name for call in _calls_of_turn(messages)):
        limited = isinstance(choice, dict) and isinstance(choice.get("allowed_tools"), dict)
        made["tool_choice"] = choice | {"allowed_tools": allowed | {"mode": "auto"}} if limited else "auto"


def _calls_of_turn(messages: Sequence[v1.Message]) -> Iterator[v1.ToolCall]:
    for message in reversed(messages):
        if message.role == v1.Message.ROLE_USER:
            return
        yield from (part.tool_call for part in message.parts if part.HasField("tool_call"))


def tool_name(tool: str) -> str:
    """Returns a name that providers take. A model may have called what no tool can be named, and a provider refuses the
    history that says so."""
    return _NAME.sub("_", tool)[:64] or "_"


def arguments(text: str) -> str:
    """Returns a call's arguments as the model wrote them. Some servers parse the history's arguments and refuse all of
    it for one call that was cut off, so that what is not a JSON object is put into one."""
    if not text:
        return "{}"
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        return msgspec.json.encode({"malformed": text}).decode()
    return text


def is_nine(call_id: str) -> bool:
    """Whether an id is 9 letters and digits, which every server takes."""
    return _NINE.fullmatch(call_id) is not None


@lru_cache(4096)
def made_id(call_id: str) -> str:
    """Returns an id of 9 letters and digits for a call that the provider did not make, the same each time."""
    number = int.from_bytes(hashlib.sha256(call_id.encode()).digest()[:8], "big")
    return "".join(_LETTERS[number // 62**place % 62] for place in range(9))

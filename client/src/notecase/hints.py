"""Converts type hints to JSON Schema, and JSON to values of these types. Client and server declare functions with this
module, so that a function has one schema and gets the same values in both."""

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, NamedTuple

Schema = dict[str, Any]

_MISSING: Any = inspect.Parameter.empty


PROBLEMS = 5
"""How many mistakes in one value are reported at once. A model corrects all that it reads of, and needs no more."""


class Mismatch(ValueError):
    """A value does not fit its hint. The message says where and why, in words that a model can act on."""


class Kind(NamedTuple):
    """What one hint allows."""

    schema: Schema
    read: Callable[[Any, str], Any]
    """Returns the Python value of a JSON value; the text is its place. Raises Mismatch."""


class Field(NamedTuple):
    """One member of an object: an argument of a function, a key of a TypedDict, a field of a dataclass."""

    name: str
    hint: Any
    required: bool = True
    default: Any = _MISSING


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the type hints of a function by name, "return" among them. Raises TypeError for those that cannot be
    read."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(f"its type hints cannot be read: {error}") from error


def of_arguments(function: Callable[..., Any], leave_out: Container[str] = ()) -> Kind:
    """Describes the arguments of a function as one object, which is read into a dict of keyword arguments. Parameters
    named in `leave_out` are not among them.

    Hints may be str, int, float, bool, None, Any, Literal, Enum, list[X], tuple[X, ...], dict[str, X], TypedDict, a
    dataclass, unions of these, and Annotated[X, "a description"]. Any other hint is pydantic's, where that is
    installed: a model, a date, Annotated[int, Field(ge=1)]. Raises TypeError for a hint that neither knows, for a
    parameter without a hint, and for one that cannot be passed by name: *args, **kwargs and positional-only ones."""
    hints = hints_of(function)
    fields = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in leave_out:
            continue
        if parameter.kind not in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}:
            raise TypeError(f"a model passes arguments by name, which {parameter} does not take")
        if name not in hints:
            raise TypeError(f"{name} has no type hint")
        fields.append(Field(name, hints[name], parameter.default is _MISSING, parameter.default))
    return _rooted(_object(fields, dict, ()))


def of_output(hint: Any) -> Kind:
    """Describes what an agent replies: a TypedDict, a dataclass or a pydantic model. Raises TypeError for a hint that
    `of_arguments` would not take, and for one whose JSON is not an object."""
    kind = _rooted(_kind(hint, ()))
    if reference := kind.schema.get("$ref"):  # providers require the object itself at the root
        kind = kind._replace(
            schema={**kind.schema["$defs"][reference.rpartition("/")[2]], "$defs": kind.schema["$defs"]}
        )
    if kind.schema.get("type") != "object":
        raise TypeError(f"{_name(hint)} is not an object in JSON: use a dataclass, a TypedDict or a pydantic model")
    return kind


def _rooted(kind: Kind) -> Kind:
    """Moves the definitions in a schema to its root, where references to them look."""
    found: Schema = {}

    def without(schema: Any) -> Any:
        if isinstance(schema, list):
            return [without(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        for name, definition in schema.get("$defs", {}).items():
            if found.setdefault(name, definition) != definition:
                raise TypeError(f"two of its types have the name {name}")
        return {key: without(held) for key, held in schema.items() if key != "$defs"}

    schema = without(kind.schema)
    return kind._replace(schema={**schema, "$defs": found} if found else schema)


def parse(text: str) -> Any:
    """JSON text as Python's values; empty text, which models write for no arguments, as an empty object."""
    try:
        return json.loads(text or "{}", parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Mismatch(f"this is not JSON: {error}") from error


def dump(value: Any) -> str:
    """Writes a value as JSON text: what JSON has, members of an Enum, dataclasses, and what pydantic can write where it
    is installed.

    Raises TypeError or ValueError for anything else, including NaN and the infinities."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    with suppress(ImportError, ValueError):
        from notecase import pydantic_hints  # noqa: PLC0415 - an extra, and slow to import

        if not isinstance(value, Iterator):  # which may have no end
            return pydantic_hints.plain(value)
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _kind(hint: Any, within: tuple[Any, ...]) -> Kind:
    """`within` are the classes that contain the hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        words = " ".join(word for word in inner[1:] if isinstance(word, str))
        further = [one for one in inner[1:] if not isinstance(one, str)]
        kind = _by_pydantic(hint) if further else _kind(inner[0], within)
        return Kind({**kind.schema, "description": words}, kind.read) if words else kind
    if origin in {typing.Required, typing.NotRequired}:
        return _kind(inner[0], within)
    if origin in {typing.Union, types.UnionType}:
        return _any_of([_kind(one, within) for one in inner])
    if origin is typing.Literal:
        return _one_of([(value, value) for value in inner], hint)
    if origin is list or (origin is tuple and inner[1:] == (...,)):
        return _list(_kind(inner[0], within), origin)
    if origin is dict and inner[0] is str:
        return _map(_kind(inner[1], within))
    if hint is Any:
        return Kind({}, lambda value, where: value)
    return _PLAIN[hint] if isinstance(hint, type) and hint in _PLAIN else _class(hint, within)


def _class(hint: Any, within: tuple[Any, ...]) -> Kind:
    if hint in within or hasattr(hint, "__get_pydantic_core_schema__"):
        return _by_pydantic(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of([(member.value, member) for member in hint], hint)
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        fields = [Field(name, hints[name], name in hint.__required_keys__) for name in hints]
        return _object(fields, dict, (*within, hint))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint, include_extras=True)
        return _object(list(_fields(hint, hints)), _constructor(hint), (*within, hint))
    return _by_pydantic(hint)


def _by_pydantic(hint: Any) -> Kind:
    try:
        from notecase import pydantic_hints  # noqa: PLC0415 - an extra, and slow to import

        schema, read = pydantic_hints.describe(hint)
    except (ImportError, TypeError) as error:
        raise TypeError(
            f"{_name(hint)} has no JSON Schema: use str, int, float, bool, None, Any, Literal, an Enum, list[X], "
            'tuple[X, ...], dict[str, X], a TypedDict, a dataclass, Annotated[X, "a description"], or with '
            "notecase[pydantic] installed any type that pydantic has a schema for"
        ) from error

    def read_all(value: Any, where: str) -> Any:
        try:
            return read(value)
        except pydantic_hints.Invalid as error:
            problems = [f"{_place('.'.join(filter(None, (where, place))))}: {why}" for place, why in error.problems]
            raise _mismatch(problems) from error
        except Exception as error:  # of a validator
            raise Mismatch(f"{_place(where)}: {str(error) or type(error).__name__}") from error

    return Kind(schema, read_all)


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _fields(hint: Any, hints: dict[str, Any]) -> Iterable[Field]:
    for field in dataclasses.fields(hint):
        made = field.default_factory is not dataclasses.MISSING
        default = _MISSING if field.default is dataclasses.MISSING else field.default
        if field.init:
            yield Field(field.name, hints[field.name], default is _MISSING and not made, default)


def _constructor(hint: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    def make(members: dict[str, Any]) -> Any:
        try:
            return hint(**members)
        except Exception as error:  # a __post_init__ that checks
            raise Mismatch(str(error) or type(error).__name__) from error

    return make


def _object(fields: Sequence[Field], make: Callable[[dict[str, Any]], Any], within: tuple[Any, ...]) -> Kind:
    kinds = {field.name: _kind(field.hint, within) for field in fields}
    required = [field.name for field in fields if field.required]
    properties = {field.name: {**kinds[field.name].schema, **_default(field)} for field in fields}
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    allowed = f"which may have {', '.join(kinds) or 'none'}"

    def read(value: Any, where: str) -> Any:
        members = _expect(dict, "an object", value, where)
        problems = [f"{_place(where)} lacks {name!r}" for name in required if name not in members]
        known = {}
        for name, held in members.items():
            if name not in kinds:
                problems.append(f"{name!r} is not a property of {_place(where)}, {allowed}")
                continue
            try:
                known[name] = kinds[name].read(held, f"{where}.{name}".lstrip("."))
            except Mismatch as mismatch:
                problems.append(str(mismatch))
        if problems:
            raise _mismatch(problems)
        return make(known)

    return Kind(schema, read)


def _mismatch(problems: Sequence[str]) -> Mismatch:
    more = [f"and {len(problems) - PROBLEMS} more"] if len(problems) > PROBLEMS else []
    return Mismatch("; ".join([*problems[:PROBLEMS], *more]))


def _default(field: Field) -> Schema:
    with suppress(TypeError, ValueError):  # a default that JSON cannot express applies, too
        if field.default is not _MISSING:
            return {"default": json.loads(dump(field.default))}
    return {}


def _list(item: Kind, make: Callable[[list[Any]], Any]) -> Kind:
    def read(value: Any, where: str) -> Any:
        held = _expect(list, "an array", value, where)
        return make([item.read(one, f"{where}[{index}]") for index, one in enumerate(held)])

    return Kind({"type": "array", "items": item.schema}, read)


def _map(item: Kind) -> Kind:
    def read(value: Any, where: str) -> Any:
        held = _expect(dict, "an object", value, where)
        return {name: item.read(one, f"{where}[{name!r}]") for name, one in held.items()}

    return Kind({"type": "object", "additionalProperties": item.schema}, read)


def _any_of(kinds: Sequence[Kind]) -> Kind:
    """The first kind that the value fits; what the last but null says when it fits none."""
    spoken = [kind for kind in kinds if kind is not _PLAIN[types.NoneType]]

    def read(value: Any, where: str) -> Any:
        for kind in kinds:
            with suppress(Mismatch):
                return kind.read(value, where)
        return spoken[-1].read(value, where)

    return Kind({"anyOf": [kind.schema for kind in kinds]}, read)


def _one_of(choices: Sequence[tuple[Any, Any]], hint: Any) -> Kind:
    """One of these values in JSON, each with its Python value."""
    if any(not isinstance(value, str | int | float | None) for value, _ in choices):
        raise TypeError(f"{hint} has values that JSON cannot say")
    values = [value for value, _ in choices]
    schema: Schema = {"enum": values}
    if all(isinstance(value, str) for value in values):
        schema = {"type": "string", **schema}

    def read(value: Any, where: str) -> Any:
        for choice, meant in choices:
            if choice == value and isinstance(choice, bool) == isinstance(value, bool):
                return meant
        raise Mismatch(f"{_place(where)} must be one of {dump(values)}, not {_shown(value)}")

    return Kind(schema, read)


def _expect(kind: type, wanted: str, value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise Mismatch(f"{_place(where)} must be {wanted}, not {_shown(value)}")
    return value


def _text(value: Any, where: str) -> str:
    return str(_expect(str, "a string", value, where))


def _flag(value: Any, where: str) -> bool:
    return bool(_expect(bool, "true or false", value, where))


def _null(value: Any, where: str) -> None:
    _expect(types.NoneType, "null", value, where)


def _integer(value: Any, where: str) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise Mismatch(f"{_place(where)} must be an integer, not {_shown(value)}")
    return int(value)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Mismatch(f"{_place(where)} must be a number, not {_shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise Mismatch(f"{_place(where)} is too large") from error


def _place(where: str) -> str:
    return where or "the object"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)  # 1e999 is an infinity, which JSON does not have
    return text if len(text) <= 80 else f"{text[:80]}…"


_PLAIN = {
    str: Kind({"type": "string"}, _text),
    bool: Kind({"type": "boolean"}, _flag),
    int: Kind({"type": "integer"}, _integer),
    float: Kind({"type": "number"}, _number),
    types.NoneType: Kind({"type": "null"}, _null),
}

"""The schema that a model gets for a function's arguments, and the values that the function receives, or a sentence for
the model."""

import enum
import functools
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict

import pytest
from notecase import CallContext, Tool, ToolFailure, v1
from notecase.hints import Mismatch, of_arguments, parse
from notecase.tools import RESULT_BYTES, as_tools

CONTEXT = CallContext(session="sessions/s", session_uid="u", user="", run="sessions/s/runs/r", call_id="c", attempt=1)


class Unit(enum.Enum):
    GRAM = "g"
    TON = 1000


class Place(TypedDict):
    name: str
    distance: NotRequired[Annotated[float, "in km"]]


@dataclass
class Thing:
    name: str
    weight: float = 1.5
    marks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError("nothing weighs less than nothing")


@dataclass
class Box:
    inside: "Box | None" = None


def taking(hint: Any) -> Callable[..., Any]:
    def function(it: Any) -> Any:
        return it

    function.__annotations__["it"] = hint
    return function


STRING = {"type": "string"}
KINDS: list[tuple[Any, dict[str, Any], str, Any]] = [
    (str, STRING, '"é"', "é"),
    (bool, {"type": "boolean"}, "true", True),
    (int, {"type": "integer"}, "3", 3),
    (int, {"type": "integer"}, "3.0", 3),
    (float, {"type": "number"}, "3", 3.0),
    (None, {"type": "null"}, "null", None),
    (Any, {}, '{"a": [1]}', {"a": [1]}),
    (list[int], {"type": "array", "items": {"type": "integer"}}, "[1, 2]", [1, 2]),
    (tuple[str, ...], {"type": "array", "items": STRING}, '["a"]', ("a",)),
    (dict[str, bool], {"type": "object", "additionalProperties": {"type": "boolean"}}, '{"a": true}', {"a": True}),
    (str | None, {"anyOf": [STRING, {"type": "null"}]}, "null", None),
    (Optional[str], {"anyOf": [STRING, {"type": "null"}]}, '"a"', "a"),  # noqa: UP045
    (int | str, {"anyOf": [{"type": "integer"}, STRING]}, '"1"', "1"),
    (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}, '"b"', "b"),
    (Literal[1, None], {"enum": [1, None]}, "null", None),
    (Unit, {"enum": ["g", 1000]}, "1000", Unit.TON),
    (Annotated[str, "a word"], {"type": "string", "description": "a word"}, '"a"', "a"),
    (
        Place,
        {
            "type": "object",
            "properties": {"name": STRING, "distance": {"type": "number", "description": "in km"}},
            "required": ["name"],
            "additionalProperties": False,
        },
        '{"name": "quay"}',
        {"name": "quay"},
    ),
    (
        Thing,
        {
            "type": "object",
            "properties": {
                "name": STRING,
                "weight": {"type": "number", "default": 1.5},
                "marks": {"type": "array", "items": STRING},
            },
            "required": ["name"],
            "additionalProperties": False,
        },
        '{"name": "bow", "weight": 2}',
        Thing("bow", 2.0, []),
    ),
]


@pytest.mark.parametrize(("hint", "schema", "text", "value"), KINDS, ids=str)
def test_a_hint_is_a_schema_and_reads_its_json(hint: Any, schema: dict[str, Any], text: str, value: Any) -> None:
    """With the type that the hint says: an integer may come as 3.0, and a number that comes as 3 is a float."""
    kind = of_arguments(taking(hint))
    told = {"type": "object", "properties": {"it": schema}, "required": ["it"], "additionalProperties": False}
    assert told == kind.schema
    read = kind.read({"it": json.loads(text)}, "")["it"]
    assert (value, type(value)) == (read, type(read))


MISMATCHES: list[tuple[Any, str, str]] = [
    (str, "1", "it must be a string, not 1"),
    (bool, "1", "it must be true or false, not 1"),
    (int, "1.5", "it must be an integer, not 1.5"),
    (int, "true", "it must be an integer, not true"),
    (int, '"3"', 'it must be an integer, not "3"'),
    (float, "false", "it must be a number, not false"),
    (float, "1" + "0" * 400, "it is too large"),
    (None, "0", "it must be null, not 0"),
    (list[int], '[1, "2"]', 'it[1] must be an integer, not "2"'),
    (list[str], '"abc"', 'it must be an array, not "abc"'),
    (dict[str, int], '{"a": null}', "it['a'] must be an integer, not null"),
    (str | None, "1", "it must be a string, not 1"),
    (int | str, "null", "it must be a string, not null"),
    (Literal[1, 2], "true", "it must be one of [1, 2], not true"),
    (Unit, '"kg"', 'it must be one of ["g", 1000], not "kg"'),
    (Place, "{}", "it lacks 'name'"),
    (Place, '{"name": 1}', "it.name must be a string, not 1"),
    (Place, '{"name": "", "x": 1}', "'x' is not a property of it, which may have name, distance"),
    (Thing, '{"name": "", "weight": -1}', "nothing weighs less than nothing"),
    (str, f"[{'1' * 90}]", f"it must be a string, not [{'1' * 79}…"),
]


@pytest.mark.parametrize(("hint", "text", "message"), MISMATCHES, ids=str)
def test_the_error_says_where_a_value_does_not_fit(hint: Any, text: str, message: str) -> None:
    """So that a model can do better."""
    with pytest.raises(Mismatch) as told:
        of_arguments(taking(hint)).read({"it": json.loads(text)}, "")
    assert message == str(told.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the object must be an object, not []"),
        ('{"it": 1, "that": 2}', "'that' is not a property of the object, which may have it"),
        ('{"that": 2}', "the object lacks 'it'; 'that' is not a property of the object, which may have it"),
        (
            '{"it": "", "a": 1, "b": 1, "c": 1, "d": 1, "e": 1}',
            'it must be an integer, not ""; '
            + "; ".join(f"{name!r} is not a property of the object, which may have it" for name in "abcd")
            + "; and 1 more",
        ),
        ("{}", "the object lacks 'it'"),
    ],
)
def test_the_arguments_are_an_object_of_the_names(text: str, message: str) -> None:
    with pytest.raises(Mismatch) as told:
        of_arguments(taking(int)).read(parse(text), "")
    assert message == str(told.value)


@pytest.mark.parametrize("text", ["{", '{"it": NaN}', "[" * 100_000, '{"it": ' + "1" * 5000 + "}"])
def test_arguments_that_are_not_json_are_reported(text: str) -> None:
    """Whatever a model wrote."""
    with pytest.raises(Mismatch, match="this is not JSON"):
        parse(text)


def test_no_text_means_no_arguments() -> None:
    """Some models write nothing where there is nothing to say."""
    assert parse("") == {}


@pytest.mark.parametrize(
    "hint",
    [type, threading.Lock, list[type], Literal[b"a"], "Missing", Annotated[type, "a class"]],
    ids=str,
)
def test_a_hint_that_json_cannot_say_is_refused_at_once(hint: Any) -> None:
    """When the function is handed in, not when it is called."""
    with pytest.raises(TypeError, match=r"^function cannot be a tool: "):
        Tool(taking(hint))


def test_arguments_that_have_no_name_or_hint_are_refused() -> None:
    def unhinted(it) -> None:  # type: ignore[no-untyped-def]
        raise AssertionError(it)

    def positional(it: int, /) -> None:
        raise AssertionError(it)

    def many(*it: int) -> None:
        raise AssertionError(it)

    for function in (unhinted, positional, many):
        with pytest.raises(TypeError, match=f"^{function.__name__} cannot be a tool: "):
            Tool(function)


def test_a_tool_needs_a_unique_name() -> None:
    def one() -> None:
        """Does nothing."""

    with pytest.raises(TypeError, match="needs a name"):
        Tool(lambda: None)
    with pytest.raises(TypeError, match="needs a name"):
        Tool(functools.partial(one))
    with pytest.raises(TypeError, match="two tools have the name one"):
        as_tools([one, Tool(one)])
    assert list(as_tools([one, Tool(one, name="two")])) == ["one", "two"]


class Scales:
    def weigh(self, thing: Thing, unit: Unit = Unit.GRAM, *, at: type | None = None) -> str:
        raise AssertionError

    def weigh_all(self, things: list[Thing], unit: Unit = Unit.GRAM, times: int = 1) -> list[tuple[str, Unit, int]]:
        """Weighs things.

        One after another."""
        return [(thing.name, unit, times) for thing in things]


async def test_a_tool_is_declared_as_its_function_says() -> None:
    """A method's self is not an argument; a default need not be given, and holds."""
    tool = Tool(Scales().weigh_all, requires_approval=True, approver=v1.Tool.APPROVER_ADMIN, timeout=1.5)
    assert (tool.definition.name, tool.definition.description) == ("weigh_all", "Weighs things.\n\nOne after another.")
    assert (tool.definition.requires_approval, tool.definition.timeout.ToMilliseconds()) == (True, 1500)
    assert v1.Tool.APPROVER_ADMIN == tool.definition.approver
    assert tool.definition.HasField("client")
    schema = json.loads(tool.definition.parameters)
    assert schema["required"] == ["things"]
    assert schema["properties"]["unit"] == {"enum": ["g", 1000], "default": "g"}
    told = await tool.answer(v1.ToolCall(call_id="c", arguments='{"things": [{"name": "bow"}]}'), CONTEXT)
    assert told == v1.ToolResult(call_id="c", result=[v1.Part(text='[["bow", "g", 1]]')])
    with pytest.raises(TypeError, match="weigh cannot be a tool: type has no JSON Schema"):
        Tool(Scales().weigh)


IMAGE = v1.Part(file=v1.FileUri(uri="https://example.org/a.png"))
NOTHING: list[v1.Part] = []


@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        ("as it is", [v1.Part(text="as it is")]),
        (None, [v1.Part(text="null")]),
        ({"é": [1, True]}, [v1.Part(text='{"é": [1, true]}')]),
        (NOTHING, [v1.Part(text="[]")]),
        (Thing("bow"), [v1.Part(text='{"name": "bow", "weight": 1.5, "marks": []}')]),
        (Unit.TON, [v1.Part(text="1000")]),
        (b"\x00", [v1.Part(data=v1.InlineData(data=b"\x00", media_type="application/octet-stream"))]),
        (IMAGE, [IMAGE]),
        ([v1.Part(text="see"), IMAGE], [v1.Part(text="see"), IMAGE]),
    ],
    ids=str,
)
async def test_what_a_function_returns_is_the_result(returned: Any, parts: list[v1.Part]) -> None:
    """Text as it is, parts as they are, everything else as JSON; from a function and from a coroutine alike."""

    def plain() -> Any:
        return returned

    async def later() -> Any:
        return returned

    def wrapped() -> Any:
        return later()

    for function in (plain, later, wrapped):
        assert v1.ToolResult(call_id="c", result=parts) == await Tool(function).answer(
            v1.ToolCall(call_id="c"), CONTEXT
        )


class Unsaid(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no such paper"), "ValueError: no such paper"),
        (Unsaid(), "Unsaid"),
        (KeyError("x" * 9000), f"KeyError: '{'x' * 3989}"),
        (StopIteration(), "RuntimeError: "),
    ],
    ids=["said", "unsaid", "endless", "stop"],
)
async def test_an_exception_is_the_calls_error(error: Exception, told: str, caplog: pytest.LogCaptureFixture) -> None:
    """The model reads its text, and the program's log has the traceback."""

    def broken() -> None:
        raise error

    async def broken_later() -> None:
        raise error

    for function in (broken, broken_later):
        caplog.clear()
        answer = await Tool(function).answer(v1.ToolCall(call_id="c"), CONTEXT)
        assert answer.error.startswith(told)
        assert len(answer.error) <= 4000
        assert not answer.result
        (record,) = caplog.records
        assert record.name == "notecase"
        assert record.exc_info is not None
        facts = [getattr(record, name) for name in ("run", "session", "call_id")]
        assert [CONTEXT.run, CONTEXT.session, "c"] == facts


async def test_of_a_failure_the_model_reads_the_text_alone(caplog: pytest.LogCaptureFixture) -> None:
    def pay() -> None:
        raise ToolFailure("The account is closed.")

    assert "The account is closed." == (await Tool(pay).answer(v1.ToolCall(call_id="c"), CONTEXT)).error
    assert [] == caplog.records


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (float("nan"), "TypeError: the result, of type float, cannot be sent: "),
        (iter([1]), "TypeError: the result, of type list_iterator, cannot be sent: a list_iterator is not JSON"),
        (threading.Lock(), "TypeError: the result, of type lock, cannot be sent: a lock is not JSON"),
        (Thing, "TypeError: the result, of type type, cannot be sent: a type is not JSON"),
    ],
    ids=["nan", "iterator", "lock", "class"],
)
async def test_a_result_that_json_cannot_say_is_an_error(returned: Any, told: str) -> None:
    def odd() -> Any:
        return returned

    assert (await Tool(odd).answer(v1.ToolCall(), CONTEXT)).error.startswith(told)


async def test_a_result_that_is_too_large_is_an_error() -> None:
    """Up to 512 KiB fit, counted as they are sent."""

    def big(size: int) -> str:
        return "." * size

    fits = await Tool(big).answer(v1.ToolCall(arguments=f'{{"size": {RESULT_BYTES - 100}}}'), CONTEXT)
    assert len(fits.result[0].text) == RESULT_BYTES - 100
    answer = await Tool(big).answer(v1.ToolCall(call_id="c", arguments=f'{{"size": {RESULT_BYTES}}}'), CONTEXT)
    assert v1.ToolResult(call_id="c", error="The result is larger than 524288 bytes.") == answer


async def test_arguments_that_do_not_fit_are_an_error_for_the_model() -> None:
    """The function is not called."""

    def never(it: int) -> None:
        raise AssertionError(it)

    answer = await Tool(never).answer(v1.ToolCall(arguments='{"it": "three"}'), CONTEXT)
    assert answer.error == 'The arguments do not fit: it must be an integer, not "three".'

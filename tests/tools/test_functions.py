"""Python functions as tools: what the model gets, how its arguments are read, and how results are returned."""

import asyncio
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import notecase
import pytest
import structlog.testing
from notecase import to_value, v1
from notecase_server.tools.contract import CallContext, Outcome, ToolSettingsError
from notecase_server.tools.functions import PythonTool, load, tool
from notecase_server.tools.outcome import MAX_ERROR, MAX_MEDIA, MAX_RESULT

from tests.tools import desk
from tests.tools.calls import context

TOOLS = load(["tests.tools.desk"])


async def call(name: str, /, **arguments: object) -> Outcome:
    return await TOOLS[name].call(arguments, context())


def text(said: str) -> Outcome:
    return Outcome([v1.Part(text=said)])


def test_the_model_gets_the_docstring_and_a_schema_of_the_annotations() -> None:
    """And nothing else: no context, no titles that repeat a name, no place for arguments that are not there."""
    assert "Looks for a thing.\n\nIn every drawer." == TOOLS["find"].description
    place = {
        "properties": {"name": {"type": "string"}, "floor": {"default": 0, "type": "integer"}},
        "required": ["name"],
        "title": "Place",
        "type": "object",
    }
    expected = {
        "additionalProperties": False,
        "properties": {
            "what": {"type": "string"},
            "place": place,
            "kind": {"default": "key", "enum": ["letter", "key"], "type": "string"},
            "limit": {"default": 3, "description": "How many.", "minimum": 1, "type": "integer"},
        },
        "required": ["what", "place"],
        "type": "object",
    }
    assert expected == json.loads(TOOLS["find"].parameters)
    assert ["fact"] == list(json.loads(TOOLS["remember"].parameters)["properties"])
    empty = {"additionalProperties": False, "properties": {}, "required": [], "type": "object"}
    assert empty == json.loads(TOOLS["block"].parameters)
    assert "Its own words." == TOOLS["odd-names"].description


def test_what_the_agent_says_of_a_function_wins() -> None:
    found = TOOLS["find"]
    assert ("find", found.description, found.parameters) == found.offered("", "", "")[:3]
    assert ("seek", "Seeks.", "{}") == found.offered("seek", "Seeks.", "{}")[:3]


def test_a_decorated_function_is_the_function_itself() -> None:
    assert [desk.Found("key A", desk.Place(name="B"), date(2026, 11, 22))] == desk.find(
        "A", desk.Place(name="B"), limit=1
    )


async def test_arguments_arrive_as_the_types_they_are_annotated_with() -> None:
    """Defaults are filled in; a dataclass, a model and a date in the result become JSON."""
    expected = '[{"what":"letter A","where":{"name":"hall","floor":2},"on":"2026-11-22"}]'
    arguments: dict[str, Any] = {"what": "A", "place": {"name": "hall", "floor": "2"}, "kind": "letter", "limit": 1}
    assert text(expected) == await call("find", **arguments)
    assert 3 == len(json.loads((await call("find", what="A", place={"name": "hall"})).parts[0].text))


async def test_any_parameter_name_is_allowed() -> None:
    """Also those that pydantic's models have methods and settings by."""
    expected = '["a",1,true,"me",0.5]'
    assert text(expected) == await call("odd-names", schema="a", model_config=1, copy=True, self="me", parameter_1=0.5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "the object lacks 'what'; the object lacks 'place'"),
        ({"what": 1, "place": {}}, "what must be a string, not 1; place.name: Field required"),
        ({"what": "", "place": {"name": ""}, "limit": 0}, "limit: Input should be greater than or equal to 1"),
        (
            {"what": "", "place": {"name": ""}, "who": 1},
            "'who' is not a property of the object, which may have what, place, kind, limit",
        ),
        ({"what": "", "place": {"name": ""}, "kind": "x"}, 'kind must be one of ["letter", "key"], not "x"'),
    ],
)
async def test_the_model_reads_in_a_sentence_which_arguments_do_not_fit(arguments: dict[str, Any], told: str) -> None:
    assert Outcome(error=f"The arguments do not fit: {told}.") == await TOOLS["find"].call(arguments, context())


async def test_a_call_reads_the_state_and_collects_operations_on_it() -> None:
    made = context({"facts": to_value(["a"]), "other": to_value(1)})
    assert text("{'facts': ['a']}") == await TOOLS["remember"].call({"fact": "b"}, made)
    expected = [
        v1.StateOp(key="facts", append=to_value("b")),
        v1.StateOp(key="count", increment=1),
        v1.StateOp(key="last", set=to_value({"fact": "b", "attempt": 2})),
        v1.StateOp(key="draft", remove={}),  # type: ignore[arg-type]
    ]
    assert expected == made.ops


async def test_a_function_of_a_client_is_a_tool_unchanged() -> None:
    """Its context is the client's class, which the server's extends."""

    def pay(cents: int, call: notecase.CallContext) -> str:
        return f"{cents} by {call.idempotency_key}, {call.attempt}"

    made = PythonTool(pay)
    assert ["cents"] == list(json.loads(made.parameters)["properties"])
    given = context()
    assert text(f"9 by {given.session_uid}/call-1, 2") == await made.call({"cents": 9}, given)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("none", [v1.Part(text="")]),
        ("text", [v1.Part(text="Grüße")]),
        ("bytes", [v1.Part(data=v1.InlineData(data=b"\x00\x01", media_type="application/octet-stream"))]),
        ("part", [v1.Part(data=v1.InlineData(data=b"\x89PNG", media_type="image/png"))]),
        ("parts", [v1.Part(text="see:"), v1.Part(data=v1.InlineData(data=b"\x89PNG", media_type="image/png"))]),
        ("no parts", [v1.Part(text="[]")]),
        ("json", [v1.Part(text='{"a":[1,2.5,null,true],"b":"ü","c":"_w==","d":"NaN"}')]),
    ],
)
async def test_a_result_becomes_parts(kind: str, parts: list[v1.Part]) -> None:
    assert Outcome(parts) == await call("anything", kind=kind)


@pytest.mark.parametrize("kind", ["object", "mixed", "iterator", "surrogate", "inner surrogate", "reasoning", "circle"])
async def test_a_result_that_is_none_is_an_error_for_the_model_and_a_fact_for_the_log(kind: str) -> None:
    with structlog.testing.capture_logs() as facts:
        outcome = await call("anything", kind=kind)
    assert Outcome(error="The tool gave back something that is neither text nor JSON nor content.") == outcome
    assert [("tool_result_unusable", "anything")] == [(fact["event"], fact["tool"]) for fact in facts]


async def test_a_result_larger_than_the_log_takes_is_an_error() -> None:
    largest = 2 * MAX_RESULT - v1.Part(text="x" * MAX_RESULT).ByteSize()
    assert text("x" * largest) == await call("flood", size=largest)
    told = f"The result has {MAX_RESULT + 1} bytes; at most {MAX_RESULT} are taken. Ask for less."
    assert Outcome(error=told) == await call("flood", size=largest + 1)


async def test_media_may_be_larger_than_text() -> None:
    """They become blobs; a file of text is shown to a model as text, and bounded as such."""
    (part,) = (await call("flood_of_data", size=MAX_MEDIA, media_type="image/png")).parts
    assert MAX_MEDIA == len(part.data.data)
    told = f"The result has {MAX_MEDIA + 1} bytes of media; at most {MAX_MEDIA} are taken. Ask for less."
    assert Outcome(error=told) == await call("flood_of_data", size=MAX_MEDIA + 1, media_type="image/png")
    assert f"at most {MAX_RESULT}" in (await call("flood_of_data", size=MAX_RESULT, media_type="Text/csv")).error


@pytest.mark.parametrize("name", ["fail", "fail_in_thread"])
async def test_the_model_reads_a_failure_and_any_other_exception_is_a_defect(name: str) -> None:
    """Also exceptions that would end the loop, or cancel the call without a request: SystemExit, StopIteration, a
    cancellation."""
    assert Outcome(error="The drawer is locked.") == await call(name, kind="failure")
    assert MAX_ERROR + 1 == len((await call(name, kind="novel")).error)
    assert Outcome(error="The tool failed.") == await call(name, kind="empty")
    assert Outcome(error="No key.\nNo light.") == await call(name, kind="group")
    with pytest.raises(ExceptionGroup):
        await call(name, kind="mixed")
    with pytest.raises(KeyError, match="secret"):
        await call(name, kind="defect")
    for kind in ("exit", "stop", "cancelled"):
        with pytest.raises(RuntimeError):
            await call(name, kind=kind)


async def test_cancelling_a_call_cancels_an_async_tool() -> None:
    calling = asyncio.create_task(call("hold"))
    assert "started" == await asyncio.to_thread(desk.held.get)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert "cancelled" == desk.held.get_nowait()


async def test_plain_functions_run_side_by_side_and_a_cancelled_one_is_left_behind() -> None:
    """More of them than a pool has threads, each with its caller's context variables."""
    token = desk.caller.set("the engine")
    calls = [asyncio.create_task(call("block")) for _ in range(64)]
    desk.caller.reset(token)
    events = [await asyncio.to_thread(desk.blocked.get) for _ in calls]
    calls[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[0]
    for event in events:
        event.set()
    assert [text("called by the engine")] * 63 == await asyncio.gather(*calls[1:])


def test_a_function_that_hangs_does_not_keep_the_process_from_ending() -> None:
    """Nor does what it returns once the loop is gone."""
    script = (
        "import asyncio, threading\n"
        "from tests.tools import desk, test_functions\n"
        "async def main():\n"
        "    calls = [asyncio.create_task(test_functions.call('block')) for _ in range(2)]\n"
        "    first = await asyncio.to_thread(desk.blocked.get)\n"
        "    await asyncio.to_thread(desk.blocked.get)\n"
        "    return first\n"
        "asyncio.run(main()).set()\n"
        "print('ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (0, "ended\n", "") == (done.returncode, done.stdout, done.stderr)


def untyped(x) -> str:  # type: ignore[no-untyped-def]
    return ""


def many(*words: str) -> str:
    return ""


def by_place(word: str, /) -> str:
    return ""


def unknown(word: "Unheard") -> str:  # type: ignore[name-defined]  # noqa: F821
    return ""


def no_schema(word: CallContext | asyncio.Future[int]) -> str:
    return ""


@tool(name="two words")
def named() -> str:
    return ""


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (untyped, "The tool 'untyped' cannot be declared: x has no type hint."),
        (many, r"The tool 'many' cannot be declared: a model passes arguments by name, which \*words: str does not"),
        (by_place, "The tool 'by_place' cannot be declared: a model passes arguments by name, which word: str"),
        (unknown, "The tool 'unknown' cannot be declared: its type hints cannot be read: name 'Unheard'"),
        (no_schema, "The tool 'no_schema' cannot be declared: .*has no JSON Schema: use str"),
        (named, "'two words' is not a name for a tool"),
        (str, "is not a function, so it cannot be a tool"),
    ],
)
def test_a_function_that_no_model_could_call_is_refused_at_the_start(function: Any, told: str) -> None:
    with pytest.raises(ToolSettingsError, match=told):
        PythonTool(function)


def test_modules_that_cannot_be_imported_or_have_no_tools_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_tools.py").write_text("raise OSError('no such table')")
    decorated = "from notecase_server.tools.functions import tool\n@tool\ndef find() -> str: return ''\n"
    (tmp_path / "twin_tools.py").write_text(decorated)
    for modules, told in [
        (["unheard.of"], "No module named 'unheard'; PYTHONPATH lists the directories of modules"),
        (["broken_tools"], "The module 'broken_tools' cannot be imported: OSError: no such table"),
        (["json"], "The module 'json' has no function that is decorated with @tool"),
        (
            ["tests.tools.desk", "twin_tools"],
            "The module 'twin_tools' has a tool 'find', and so has 'tests.tools.desk'",
        ),
    ]:
        with pytest.raises(ToolSettingsError, match=told):
            load(modules)


def test_a_module_that_is_named_twice_has_its_tools_once() -> None:
    assert list(TOOLS) == list(load(["tests.tools.desk", "tests.tools.desk"]))

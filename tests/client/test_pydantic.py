"""Types that pydantic knows are arguments, results and outputs, too; without pydantic they are refused at once."""

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

import pytest
from notecase import Tool, v1
from notecase.hints import Mismatch, of_arguments, of_output
from notecase_server.tools.functions import PythonTool
from pydantic import BaseModel, Field

from tests.client.test_hints import CONTEXT, Box, Thing


class Paper(BaseModel):
    title: str
    on: date


class Drawer(BaseModel):
    papers: list[Paper] = []
    inner: "Drawer | None" = None


@dataclass
class Find:
    paper: Paper
    pages: set[int]


def file(
    paper: Paper,
    drawer: Drawer,
    box: Box,
    copies: Annotated[int, Field(ge=1), "how many"] = 1,
    when: date = date(2026, 1, 2),
    finds: list[Find] | None = None,
) -> Paper:
    """Files a paper."""
    del drawer, box, copies, finds
    return Paper(title=paper.title, on=when)


def test_definitions_are_at_the_root_of_the_schema() -> None:
    """Where references to them look, however deep the type that needs them is."""
    schema = of_arguments(file).schema
    properties = schema["properties"]
    assert {"Paper", "Drawer", "Box"} == set(schema["$defs"])
    assert {"$ref": "#/$defs/Drawer"} == properties["drawer"]
    assert {"type": "integer", "minimum": 1, "description": "how many", "default": 1} == properties["copies"]
    assert {"type": "string", "format": "date", "default": "2026-01-02"} == properties["when"]
    assert 1 == json.dumps(schema).count('$defs": {')


async def test_a_function_receives_models_and_may_return_one() -> None:
    arguments = {"paper": {"title": "Violin", "on": "2026-11-22"}, "drawer": {"inner": {}}, "box": {"inner": {}}}
    arguments["box"] = {"inside": {"inside": None}}
    read = of_arguments(file).read({**arguments, "finds": [{"paper": arguments["paper"], "pages": [2, 2]}]}, "")
    assert Paper(title="Violin", on=date(2026, 11, 22)) == read["paper"]
    assert (Drawer(inner=Drawer()), Box(Box())) == (read["drawer"], read["box"])
    assert [Find(read["paper"], {2})] == read["finds"]
    told = await Tool(file).answer(v1.ToolCall(arguments=json.dumps(arguments)), CONTEXT)
    assert v1.ToolResult(result=[v1.Part(text='{"title": "Violin", "on": "2026-01-02"}')]) == told


async def test_all_mistakes_are_reported_with_their_places() -> None:
    told = await Tool(file).answer(
        v1.ToolCall(arguments='{"paper": {"on": "x"}, "drawer": {}, "copies": 0, "q": 1}'), CONTEXT
    )
    assert told.error.startswith(
        "The arguments do not fit: the object lacks 'box'; paper.title: Field required; paper.on:"
    )
    assert "copies: Input should be greater than or equal to 1" in told.error


def test_client_and_server_declare_a_function_alike() -> None:
    assert PythonTool(file).parameters == Tool(file).definition.parameters


def test_two_types_of_one_name_are_refused() -> None:
    """A reference could mean either."""

    class Node(BaseModel):
        inner: "Node | None" = None

    other: Any = type("Node", (BaseModel,), {"__annotations__": {"more": "Node | None"}, "more": None})
    other.model_rebuild(_types_namespace={"Node": other})

    def twice(one: Any, two: Any) -> None: ...

    Node.model_rebuild(_types_namespace={"Node": Node})
    twice.__annotations__.update(one=Node, two=other)
    with pytest.raises(TypeError, match="two of its types have the name Node"):
        of_arguments(twice)


@pytest.mark.parametrize("hint", [Paper, Drawer, Box, Thing], ids=str)
def test_an_output_is_an_object_at_the_root(hint: Any) -> None:
    """Providers take no other; a type that contains itself is one, too."""
    output = of_output(hint)
    assert ("object", True) == (output.schema["type"], "properties" in output.schema)
    with pytest.raises(Mismatch):
        output.read([], "")


@pytest.mark.parametrize("hint", [list[Paper], str, Paper | None, dict[str, int] | list[int]], ids=str)
def test_an_output_that_is_not_an_object_is_refused(hint: Any) -> None:
    with pytest.raises(TypeError, match="is not an object in JSON: use a dataclass, a TypedDict or a pydantic model"):
        of_output(hint)


WITHOUT = """
import sys
sys.modules["pydantic"] = sys.modules["pydantic_core"] = None
import dataclasses, datetime, notecase
from notecase.hints import dump, of_arguments

@dataclasses.dataclass
class Plain:
    name: str

def taking(it: Plain): ...
def dated(it: datetime.date): ...

print(of_arguments(taking).read({"it": {"name": "bow"}}, ""))
for attempt in (lambda: notecase.Tool(dated), lambda: dump(datetime.date.today())):
    try:
        attempt()
    except TypeError as error:
        print(error)
"""


def test_without_pydantic_dataclasses_work_and_its_types_are_refused_with_a_way_out() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    plain, refused, result = done.stdout.splitlines()
    assert "{'it': Plain(name='bow')}" == plain
    assert refused.startswith("dated cannot be a tool: date has no JSON Schema: use str")
    assert "notecase[pydantic]" in refused
    assert "a date is not JSON" == result


def test_importing_the_client_imports_no_extra() -> None:
    """pydantic would take as long as all the rest together."""
    script = "import sys, notecase; print(sorted({'pydantic', 'pydantic_core'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout


class Strict(BaseModel, strict=True):
    on: date
    kind: Literal["a"] = "a"


async def test_a_strict_model_is_read_as_json_has_it() -> None:
    """JSON has no dates, and pydantic accepts them as text; but no number for one, nor text for a number."""

    def dated(paper: Strict) -> str:
        return str(paper.on)

    answer = await Tool(dated).answer(v1.ToolCall(arguments='{"paper": {"on": "2026-11-22"}}'), CONTEXT)
    assert "2026-11-22" == answer.result[0].text
    answer = await Tool(dated).answer(v1.ToolCall(arguments='{"paper": {"on": 5}}'), CONTEXT)
    assert "The arguments do not fit: paper.on: " in answer.error

"""What becomes of a call by what the model wrote in it."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from notecase import v1
from notecase_server.engine import ledger
from notecase_server.engine.arguments import arguments_of
from notecase_server.errors import NotecaseError
from notecase_server.tools import naming
from notecase_server.tools.contract import Function


@pytest.mark.parametrize(
    "arguments", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}', '{"a": -1e999}', "[]", "{'a': 1}", '{"a":' * 9999]
)
def test_text_that_is_not_json_is_not_arguments(arguments: str) -> None:
    """Not even where Python's own parser takes it: callers in other languages get it as JSON."""
    assert arguments_of(v1.ToolCall(arguments=arguments)) is None


def test_arguments_are_an_object() -> None:
    assert {} == arguments_of(v1.ToolCall())
    assert {"a": [1.5, 2, None]} == arguments_of(v1.ToolCall(arguments='{"a": [1.5, 2, null]}'))


def test_a_name_that_no_tool_has_is_quoted_in_part() -> None:
    (event,) = ledger.triage([v1.ToolCall(tool="f" * 256)], {}, {}, str, lambda _: None)
    assert f"There is no tool '{'f' * 100}…'." == event.tool_finished.error


def functions(number: int, prefix: str = "t") -> Iterator[Function]:
    """Those of an MCP server."""
    for n in range(number):
        yield Function(f"{prefix}{n}", "", "{}", v1.ToolBinding(mcp=v1.McpBinding(server="s", tool=f"t{n}")))


def test_a_declaration_is_digested_once_however_many_tools_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = v1.Tool(description="x" * 60_000, mcp=v1.McpTool(server="s"))
    agent, digest, size = v1.Agent(llm=v1.LlmAgent(tools=[declared])), hashlib.sha256, 0

    def sized(data: bytes) -> Any:
        nonlocal size
        size += len(data)
        return digest(data)

    monkeypatch.setattr(hashlib, "sha256", sized)
    bound = ledger.bind(agent, v1.Run(), [list(functions(100))])
    assert size < 2 * declared.ByteSize()
    assert 100 == len({each.binding.digest for each in bound.values()})


def test_the_tools_of_a_run_are_bounded_together() -> None:
    agent = v1.Agent(llm=v1.LlmAgent(tools=[v1.Tool(name=name, mcp=v1.McpTool(server="s")) for name in "ab"]))
    a, b = list(functions(naming.MOST // 2, "a")), list(functions(naming.MOST // 2 + 1, "b"))
    assert naming.MOST == len(ledger.bind(agent, v1.Run(), [a, b[1:]]))
    with pytest.raises(NotecaseError, match=f"has {naming.MOST + 1} tools"):
        ledger.bind(agent, v1.Run(), [a, b])

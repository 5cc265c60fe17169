"""What becomes of a call by what the model wrote in it."""

import pytest
from notecase import v1
from notecase_server.engine import ledger
from notecase_server.engine.arguments import arguments_of


@pytest.mark.parametrize(
    "arguments", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}', '{"a": -1e999}', "[]", "{'a': 1}", '{"a":' * 9999]
)
def test_what_is_not_json_is_no_arguments(arguments: str) -> None:
    """Not even where Python's own parser takes it: callers in other languages get it as JSON."""
    assert arguments_of(v1.ToolCall(arguments=arguments)) is None


def test_arguments_are_an_object() -> None:
    assert {} == arguments_of(v1.ToolCall())
    assert {"a": [1.5, 2, None]} == arguments_of(v1.ToolCall(arguments='{"a": [1.5, 2, null]}'))


def test_a_name_that_no_tool_has_is_quoted_in_part() -> None:
    (event,) = ledger.triage([v1.ToolCall(tool="f" * 256)], {}, {}, str, lambda _: None)
    assert f"There is no tool '{'f' * 100}…'." == event.tool_finished.error

"""A program's definition of an agent: settings for the server, and functions and types that stay in the program."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from notecase import v1
from notecase.arguments import of_fields
from notecase.hints import Kind, of_output
from notecase.tools import Tool, as_tools, each_of


@dataclass(frozen=True)
class Local:
    """What a client has of an agent that it put: all that the server cannot hold."""

    tools: Mapping[str, Tool] = field(default_factory=dict)
    """Functions by the names under which the agent declares them."""
    output: Kind | None = None
    """Reads the agent's replies."""


def split(
    tools: Iterable[Callable[..., Any] | Tool | v1.Tool | Mapping[str, Any]] | None, output: Any
) -> tuple[list[v1.Tool], Local]:
    """Divides an agent's tools and its output into what its declaration says and what stays here.

    Raises TypeError for a function or an output that has no JSON Schema, ValueError for a mapping with a field that
    `v1.Tool` does not have."""
    given = [of_fields(v1.Tool, one, "tools") if isinstance(one, Mapping) else one for one in each_of(tools)]
    functions = as_tools(one for one in given if not isinstance(one, v1.Tool))
    further = [one for one in given if isinstance(one, v1.Tool)]
    definitions = [*(tool.definition for tool in functions.values()), *further]
    return definitions, Local(functions, None if output is None else of_output(output))

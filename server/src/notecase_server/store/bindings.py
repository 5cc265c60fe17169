"""What a call is bound to: a declaration of its run, and what implements it."""

import hashlib
import re
from collections.abc import Iterator

from notecase import v1

_REFUSED = re.compile(r"[^A-Za-z0-9_-]")


def declared(agent: v1.Agent, run: v1.Run) -> list[v1.Tool]:
    """Returns the tools of a run: the agent's, then the caller's own. `agent` is the revision that the run began
    with."""
    return [*agent.llm.tools, *run.client_tools]


def bound(agent: v1.Agent, run: v1.Run, index: int, implementation: v1.ToolBinding) -> v1.ToolBinding:
    """Returns what calls are bound to that mean the tool declared at `index`, implemented like this."""
    return implemented(declared_as(agent, declared(agent, run)[index], index), index, implementation)


def declared_as(agent: v1.Agent, tool: v1.Tool, index: int) -> bytes:
    """Returns the digest of the declaration at `index`, and of whose it is."""
    whose = b"agent" if index < len(agent.llm.tools) else b"caller"
    return hashlib.sha256(whose + tool.SerializeToString(deterministic=True)).digest()


def implemented(declaration: bytes, index: int, implementation: v1.ToolBinding) -> v1.ToolBinding:
    """Like `bound`, by the digest of the declaration, which may belong to many tools."""
    implemented_by = implementation.SerializeToString(deterministic=True)
    binding = v1.ToolBinding(declaration=index, digest=hashlib.sha256(declaration + implemented_by).digest())
    binding.MergeFrom(implementation)
    return binding


def by_name(agent: v1.Agent, run: v1.Run, name: str) -> v1.ToolBinding | None:
    """Returns what a call from before there were bindings meant, by the name that the model called; None when no tool
    has it. A tool of exactly that name comes first, then the MCP server with the longest prefix that fits. Where the
    declaration does not list the server's tools, its own name is taken to be what follows the prefix."""
    meant = max(_meant(agent, run, name), default=None, key=lambda found: found[0])
    return bound(agent, run, *meant[1:]) if meant else None


def _meant(agent: v1.Agent, run: v1.Run, name: str) -> Iterator[tuple[int, int, v1.ToolBinding]]:
    """How well each tool fits that could be meant, its index, and what implements it."""
    for index, tool in enumerate(declared(agent, run)):
        if not tool.HasField("mcp"):
            if name == (tool.name or tool.server.function):
                function = tool.server.function
                yield len(name) + 1, index, v1.ToolBinding(function=function) if function else v1.ToolBinding()
            continue
        prefix = f"{tool.name}_" if tool.name else ""
        own = [each for each in tool.mcp.tools if _REFUSED.sub("_", prefix + each) == name]
        if name.startswith(prefix) and not tool.mcp.tools and len(name) > len(prefix):
            own.append(name.removeprefix(prefix))
        if own:
            yield len(prefix), index, v1.ToolBinding(mcp=v1.McpBinding(server=tool.mcp.server, tool=own[0]))

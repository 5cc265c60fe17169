"""The names by which a model calls tools. MCP servers use any names, and a model's API accepts few: other names are
changed, with a digest if the change would make two names equal. The tool of a call is recorded with it, so no tool has
to be found by such a name again.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from notecase import v1

LENGTH = 64
"""Characters of a name that models' APIs take."""

OWN_LENGTH = 256
"""Characters of a server's own name of a tool, which every call of it carries: more than anybody would write."""

MOST = 1000
"""Tools of one run, more than any model accepts: each takes some 10 microseconds, during which no other call is
served."""

_DIGEST = 8
"""Hexadecimal digits that keep names apart: few tokens, and enough for the tools of one agent."""

_REFUSED = re.compile(r"[^A-Za-z0-9_-]")
"""What a server may have in a tool's name, and a model's API does not take."""

_BEFORE_FIRST = re.compile(r"\A(?=[0-9-])")
"""Before a character that Gemini does not take at the beginning of a name: kaitranntt/ccs#25."""


def offered(prefix: str, own: Sequence[str]) -> list[str]:
    """Returns a name for each of an MCP server's tools, by their own names: letters, digits, "_" and "-", at most 64,
    with a letter or "_" at the beginning, behind `prefix` and "_" when there is a prefix. Names that differ stay
    different."""
    whole = [f"{prefix}_{name}" if prefix else name for name in own]
    plain = [_BEFORE_FIRST.sub("_", _REFUSED.sub("_", name)) for name in whole]
    count = Counter(plain)
    return [
        name if 0 < len(name) <= LENGTH and (count[name] == 1 or name == given) else _apart(name, given)
        for name, given in zip(plain, whole, strict=True)
    ]


def _apart(name: str, given: str) -> str:
    digest = hashlib.sha256(given.encode(errors="surrogatepass")).hexdigest()[:_DIGEST]
    return f"{name[: LENGTH - _DIGEST - 1]}_{digest}"


def declared(tool: v1.Tool) -> list[str]:
    """Returns the names that a declaration contains: those of an MCP server's tools only if it lists them."""
    return offered(tool.name, list(dict.fromkeys(tool.mcp.tools))) if tool.HasField("mcp") else [tool.name]

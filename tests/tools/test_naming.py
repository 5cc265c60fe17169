"""Names for the tools of MCP servers: what a model's API takes, the same every time, and never one for two tools."""

import re

import pytest
from notecase import v1
from notecase_server.tools.naming import declared, offered

TAKEN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


def test_names_that_fit_stay_as_they_are() -> None:
    assert ["read", "read-all"] == offered("", ["read", "read-all"])
    assert ["files_read", "files_read_all"] == offered("files", ["read", "read.all"])


@pytest.mark.parametrize(
    ("prefix", "own"),
    [
        ("", ["x" * 65]),
        ("", ["x" * 64 + "a", "x" * 64 + "b", "x" * 64]),
        ("p" * 64, ["a", "b"]),
        ("", ["read.all", "read/all", "read_all"]),
        ("", ["読む", "書く"]),
        ("", ["", "_"]),
        ("files", ["", "_"]),
        ("", ["\ud800"]),
        ("", ["3d", "_3d", "-v", "7" * 64]),
    ],
    ids=[
        "long",
        "longer",
        "prefix",
        "changed",
        "other-letters",
        "empty",
        "empty-behind-prefix",
        "half-a-pair",
        "digit",
    ],
)
def test_names_that_do_not_fit_are_changed_and_kept_apart(prefix: str, own: list[str]) -> None:
    names = offered(prefix, own)
    assert len(own) == len(set(names))
    assert [] == [name for name in names if not TAKEN.fullmatch(name)]
    assert dict(zip(own, names, strict=True)) == dict(zip(own[::-1], offered(prefix, own[::-1]), strict=True))
    assert [name for name in own if not prefix and TAKEN.fullmatch(name)] == [
        name for name in names if not prefix and name in own
    ], "a name that fits is never changed for another's sake"


def test_a_declaration_tells_its_names_where_it_lists_them() -> None:
    assert ["pay"] == declared(v1.Tool(name="pay", client=v1.ClientTool()))
    assert ["f_a", "f_b_c"] == declared(v1.Tool(name="f", mcp=v1.McpTool(server="s", tools=["a", "b.c", "a"])))
    assert [] == declared(v1.Tool(name="f", mcp=v1.McpTool(server="s")))

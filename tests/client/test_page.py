"""The snippets of docs/python.md run unchanged and print what it says, and the line counts of its comparison are
right."""

import ast
import asyncio
import io
import re
from functools import partial
from inspect import isawaitable
from pathlib import Path
from typing import Any, NamedTuple

import notecase
import pytest
from notecase import Client, v1

from tests.support.server import running

PAGE = (Path(__file__).parent.parent.parent / "docs" / "python.md").read_text()
GUIDE, COMPARISON = PAGE.split("## Compared with the OpenAI Agents SDK and ADK")


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)]


def is_program(source: str) -> bool:
    """It connects by itself; all other snippets run within a connection."""
    return "asyncio.run(" in source or "notecase.sync" in source


async def run_program(source: str) -> str:
    output = io.StringIO()
    names = {"__name__": "__main__", "print": partial(print, file=output)}
    await asyncio.to_thread(exec, compile(source, "python.md", "exec"), names)
    return output.getvalue()


async def test_every_snippet_prints_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(GUIDE)
    shown = 0
    async with running() as served, Client(served.address) as client:
        monkeypatch.setenv("NOTECASE_ADDRESS", served.address)
        names: dict[str, Any] = {"client": client, "notecase": notecase}
        for (language, source), (following, expected) in zip(found, [*found[1:], Block("", "")], strict=True):
            if language != "python":
                continue
            if is_program(source):
                printed = await run_program(source)
            else:
                output = io.StringIO()
                names["print"] = partial(print, file=output)
                code = compile(source, "python.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                if isawaitable(begun := eval(code, names)):
                    await begun
                printed = output.getvalue()
            assert "text" == following, source
            assert expected == printed
            shown += 1
    assert 26 == shown


def test_the_page_lists_every_kind_of_event_and_every_public_name() -> None:
    kinds = {field.name for field in v1.Event.DESCRIPTOR.oneofs_by_name["payload"].fields}
    rows = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \| ", GUIDE, re.MULTILINE)
    assert kinds == {kind for row in rows for kind in re.findall(r"\w+", row)}
    assert [] == [name for name in notecase.__all__ if not re.search(rf"\b{name}\b", GUIDE)]


def lines(source: str) -> int:
    return sum(1 for line in source.splitlines() if line.strip())


def pairs() -> list[tuple[str, str]]:
    """Each program of others with ours behind it, in order of the page."""
    found = blocks(COMPARISON)
    assert ["py", "python"] * (len(found) // 2) == [block.language for block in found]
    return [(theirs.text, ours.text) for theirs, ours in zip(found[::2], found[1::2], strict=True)]


def test_our_programs_are_not_longer_and_the_table_has_the_right_counts() -> None:
    counted = sorted((lines(theirs), lines(ours)) for theirs, ours in pairs())
    assert [] == [pair for pair in counted if pair[1] > pair[0]]
    told = re.findall(r"^\| [^|]+ \| (\d+) \| (\d+) \|$", COMPARISON, re.MULTILINE)
    assert counted == sorted((int(theirs), int(ours)) for theirs, ours in told)


async def test_our_programs_run_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as served:
        monkeypatch.setenv("NOTECASE_ADDRESS", served.address)
        for _, ours in pairs():
            assert "" != await run_program(ours)

"""The page of limits is whole: every setting that bounds something is on it with its default, no cell is empty, and
each test that it names exists."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

import click
import pytest
from notecase_server.cli.serve import serve
from notecase_server.config import Settings
from notecase_server.rpc.server import FIXED

from tests.promises import ROOT
from tests.test_promises import missing

PAGE = (ROOT / "docs" / "limits.md").read_text()
OPTIONS = {name: option.default for option in serve.params if isinstance(option, click.Option) for name in option.opts}


class Row(NamedTuple):
    cells: tuple[str, ...]

    @property
    def test(self) -> str:
        return self.cells[-1]

    @property
    def settings(self) -> list[str]:
        return re.findall(r"`(--[a-z-]+)`", self.cells[3])


def rows() -> Iterator[Row]:
    """Of the tables that name a test."""
    tested = False
    for line in PAGE.splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split(" | "))
        if line.startswith(("| Limit |", "| Argument |")):
            tested = cells[-1].strip() == "Test"
        elif tested and line.startswith("|") and not line.startswith("| ---"):
            yield Row(cells)


ROWS = list(rows())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.cells[0]}, {row.cells[1]}")
def test_a_row_is_whole_and_its_test_exists(row: Row) -> None:
    assert all(row.cells)
    assert len(row.cells) in {6, 7}
    assert not missing(row.test)
    assert row.settings or "`" in row.cells[3] or row.cells[3] == "fixed"


@pytest.mark.parametrize("row", [row for row in ROWS if len(row.settings) == 1], ids=lambda row: row.settings[0])
def test_the_documented_defaults_of_settings_are_true(row: Row) -> None:
    assert str(OPTIONS[row.settings[0]]) == row.cells[2]


def test_every_setting_that_bounds_something_is_on_the_page() -> None:
    bounding = {f"--{each.name.replace('_', '-')}" for each in fields(Settings) if each.name.startswith("max_")}
    told = {setting for row in ROWS for setting in row.settings}
    assert set() == bounding - told
    assert set() == told - OPTIONS.keys()


def test_every_argument_of_the_channel_is_on_the_page() -> None:
    told = set(re.findall(r"`(grpc\.[a-z0-9_.]+)`", PAGE))
    chosen = {"grpc.max_concurrent_streams", "grpc.max_allowed_incoming_connections"}
    assert told == (FIXED.keys() - {"grpc.so_reuseport"}) | chosen


def test_a_table_without_a_test_for_each_bound_is_found_out() -> None:
    assert len(ROWS) > 40
    assert missing("tests/test_limits.py::test_of_nothing")

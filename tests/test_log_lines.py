"""Log lines for people look as structlog's own renderer makes them."""

import sys
from typing import Any

import pytest
import structlog
from notecase_server.log_lines import PlainRenderer

HEAD = {"timestamp": "2026-11-29T17:55:50.123456Z", "level": "info", "event": "run_finished"}


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"state": "SUCCEEDED", "reason": "", "model_calls": 1, "session": "case"},
        {"b": None, "a": 1.5, "c": [1, "two"], "d": b"bytes"},
        *({"told": text} for text in ("two words", "tab\t", "a=b", "line\n", "back\r", "'", '"', "é", "\x1b[31m")),
        {"event": "an event that is longer than its column is wide", "level": "critical"},
        {"event": "short ", "level": "warning", "last": ""},
        {"logger": "some.module", "seconds": 2},
        {"exception": "Traceback"},
    ],
)
def test_a_line_is_that_of_structlogs_console_renderer(facts: dict[str, Any]) -> None:
    expected = structlog.dev.ConsoleRenderer(colors=False)(None, "info", {**HEAD, **facts})
    assert PlainRenderer()(None, "info", {**HEAD, **facts}) == expected


def test_a_traceback_follows_its_line() -> None:
    try:
        raise ValueError("the disk is full")
    except ValueError:
        line = PlainRenderer()(None, "error", {**HEAD, "exc_info": sys.exc_info()})
    assert line.splitlines()[0].endswith(" run_finished")
    assert line.endswith("ValueError: the disk is full")

"""Log lines for people look as structlog's own renderer makes them."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
from notecase_server.log_lines import PlainRenderer

from tests.support.http2 import (
    ACKNOWLEDGED,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    OPENING,
    frame,
    header_block,
    message,
)
from tests.support.server import Spawned

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


def test_lines_of_libraries_are_objects_as_well() -> None:
    told = (
        "import logging; from notecase_server.config import configure_logging; configure_logging('json', 'info');"
        "logging.getLogger('some.library').warning('two %s', 'words\\nand a line')"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, check=True, text=True)
    line = json.loads(done.stderr)
    assert line.pop("timestamp")
    assert {"event": "two words\nand a line", "logger": "some.library", "level": "warning"} == line


async def test_a_credential_that_is_not_utf_8_is_in_no_log(tmp_path: Path) -> None:
    """grpc decodes all headers before the caller is authenticated, and logs those that it cannot decode."""
    served = await Spawned.start(
        "memory:", tmp_path / "log", "--log-format", "json", env={"NOTECASE_ADMIN_KEY": "k" * 40}, forked=True
    )
    host, _, port = served.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    block = header_block("/notecase.v1.ServerService/GetServerInfo", authorization=b"Bearer nck_mine-\xff")
    writer.write(OPENING + ACKNOWLEDGED)
    writer.write(frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, END_STREAM, 1, message(b"")))
    kind = flags = 0
    while kind != HEADERS or not flags & END_STREAM:
        head = await reader.readexactly(9)
        kind, flags = head[3:5]
        await reader.readexactly(int.from_bytes(head[:3], "big"))
    writer.close()
    assert 0 == await served.stop()
    written = served.log.read_text()
    events = [json.loads(line)["event"] for line in written.splitlines()]
    assert ("rpc_refused" in events, "nck_mine" in written) == (True, False)

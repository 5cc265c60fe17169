"""What is printed: nothing in it commands a terminal or shows a text in another order than it has."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import yaml
from google.protobuf.timestamp_pb2 import Timestamp
from notecase_server.cli import answering, closed_streams, output, screen

from tests.cli.command import COMMAND, environment

STRANGE = "ada\x7f \x9b2J \u202eecila\u2066 \u200f."


def shows(text: str) -> bool:
    return any(one in text for one in STRANGE if not one.isprintable())


def test_data_keeps_its_text_and_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and YAML have escapes for it, also in the arguments of a call that is to be approved."""
    data = {"to": STRANGE, STRANGE: [f"{STRANGE}\nand more", "é\u2028"]}
    for form, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        output.print_data(data, form)
        printed = capsys.readouterr().out
        assert not shows(printed)
        assert data == read(printed)
    arguments = answering.pretty(json.dumps(data, ensure_ascii=False))
    assert not shows(arguments)
    assert data == json.loads(arguments)


def test_text_is_shown_in_the_order_that_it_has() -> None:
    assert "ada\ufffd \ufffd2J \ufffdecila\ufffd ." == screen.harmless(STRANGE)
    assert "שלש" == screen.harmless("\u200fשלש\u200e")


@pytest.fixture
def east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_the_last_moment_is_shown(east: None) -> None:
    """As the end of a key that is meant never to end; where clocks are ahead it is in the year 10000."""
    made = Timestamp()
    made.FromJsonString("9999-12-31T23:59:59Z")
    assert "9999-12-31 23:59" == screen.moment(made)
    made.FromJsonString("2026-11-30T21:00:00Z")
    assert "2026-11-30 23:00" == screen.moment(made)


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_is_the_null_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"sys.{name}", None)
    closed_streams.reopen()
    with getattr(sys, name) as opened:
        assert os.devnull == opened.name


def test_a_command_whose_streams_are_closed_fails_by_its_exit_code() -> None:
    """The first file that it opens does not become its standard output."""
    program = ["sh", "-c", 'exec "$@" <&- >&-', "sh", *COMMAND, "sessions", "delete", "case", "--server", "127.0.0.1:1"]
    done = subprocess.run(program, env=environment(), stderr=subprocess.PIPE, text=True, check=False)
    assert 2 == done.returncode
    assert "There is no terminal to ask for confirmation; add --yes." in done.stderr

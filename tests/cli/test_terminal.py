"""The menu, on a separate pseudo-terminal."""

import os
import pty
import subprocess
import sys

CHOOSE = """
import asyncio, sys
from notecase_server.cli.terminal import choose
print("chose", asyncio.run(choose("Pay?", ["Approve", "Approve all", "Leave"], start=2)))
"""


LINE = """
import asyncio, sys
from notecase_server.cli.terminal import line
print("chose", asyncio.run(line("answer> ", unasked=sys.argv[1] == "unasked")))
"""


def chosen(before: bytes, at_menu: bytes, program: str = CHOOSE, drawn: bytes = b" 3. Leave", unasked: str = "") -> str:
    """Returns what the program says was chosen. Some keys are in the terminal before it has drawn anything, some come
    then."""
    here, there = pty.openpty()
    os.write(here, before)
    env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = subprocess.Popen(
        [sys.executable, "-c", program, unasked], stdin=there, stdout=there, stderr=there, env=env
    )
    try:
        shown = b""
        while drawn not in shown:
            shown += os.read(here, 1 << 16)
        os.write(here, at_menu)
        while b"chose " not in shown or not shown.endswith(b"\n"):
            shown += os.read(here, 1 << 16)
        assert 0 == command.wait()
    finally:
        command.kill()
        os.close(here)
        os.close(there)
    return shown.decode().rpartition("chose ")[2].strip()


def test_keys_that_come_before_the_menu_choose_nothing() -> None:
    """Neither a line that was ended, nor digits after it."""
    assert "2" == chosen(b"1\r2", b"\r")


def test_arrows_and_digits_choose_and_letters_do_not() -> None:
    assert "2" == chosen(b"", b"Approve jk 9\r")
    assert "1" == chosen(b"", b"\x1b[A\r")
    assert "1" == chosen(b"", b"\x1b[A\x1b[A\x1b[A\x1b[B\r")
    assert "0" == chosen(b"", b"1\r")


def test_keys_typed_before_an_unexpected_prompt_do_not_answer_it() -> None:
    """Neither a line that was ended, nor letters after it. A prompt that follows a choice takes them."""
    assert "Vienna" == chosen(b"so then\rwhat about", b"Vienna\r", LINE, b"answer> ", "unasked")
    assert "so then" == chosen(b"so then\r", b"", LINE, b"answer> ")

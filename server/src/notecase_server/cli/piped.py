"""Input from a pipe, in addition to the text on the command line."""

import os
import select
import sys

from notecase_server.cli import screen
from notecase_server.cli.ask import read_text

PATIENCE = 3.0
"""Seconds that standard input may be silent. Under cron, ssh or CI it may be a pipe that nobody writes to or closes."""

NOT_READ = "Standard input was not read. Add - after TEXT to read it to its end, or `< /dev/null` for no input."


def with_input(text: str, patience: float = PATIENCE) -> str:
    """Returns the text with standard input after it, which may be empty, closed or a terminal. Says so where standard
    input is not read: nothing came in time, or it is a file that somebody else has begun to read, such as the lines
    that a loop of the shell goes through."""
    if sys.stdin is None or sys.stdin.isatty():
        return text
    if _begun(sys.stdin.fileno()) or not select.select([sys.stdin], [], [], patience)[0]:
        screen.aside(NOT_READ)
        return text
    return joined(text, read_text("-"))


def joined(text: str, more: str) -> str:
    """Returns both, in paragraphs of their own, or the one that is not blank."""
    return "\n\n".join(one for one in (text, more) if one.strip())


def _begun(descriptor: int) -> bool:
    """Returns whether it is a file whose beginning has been read."""
    try:
        return os.lseek(descriptor, 0, os.SEEK_CUR) > 0
    except OSError:  # a pipe
        return False

"""Input from a pipe, in addition to the text on the command line."""

import os
import select
import sys

from notecase_server.cli import screen
from notecase_server.cli.ask import read_text
from notecase_server.cli.connection import Exit, Refusal

PATIENCE = 3.0
"""Seconds that standard input may be silent. Under ssh or CI it may be a pipe to which nothing is ever written."""

SILENT = (
    f"Standard input gave nothing for {PATIENCE:.0f} seconds and is still open. Add - after TEXT to wait for it, or "
    "`< /dev/null` for no input."
)

NOT_READ = "Standard input was not read. Add - after TEXT to read it to its end, or `< /dev/null` for no input."


def with_input(text: str, patience: float = PATIENCE) -> str:
    """Returns the text with standard input after it, which may be empty, closed or a terminal. A file whose beginning
    another program has read, such as the lines of a loop in the shell, is not read, and standard error says so. Raises
    Refusal if standard input, such as a pipe, neither sends anything nor ends within `patience` seconds: without the
    input, the text may mean something else."""
    if sys.stdin is None or sys.stdin.isatty():
        return text
    if _begun(sys.stdin.fileno()):
        screen.aside(NOT_READ)
        return text
    if not select.select([sys.stdin], [], [], patience)[0]:
        raise Refusal(SILENT, Exit.USAGE)
    return joined(text, read_text("-"))


def joined(text: str, more: str) -> str:
    """Returns both as separate paragraphs, or the one that is not blank."""
    return "\n\n".join(one for one in (text, more) if one.strip())


def _begun(descriptor: int) -> bool:
    """Returns whether it is a file whose beginning has been read."""
    try:
        return os.lseek(descriptor, 0, os.SEEK_CUR) > 0
    except OSError:  # a pipe
        return False

"""Opens the null device for the standard streams that the caller has closed, as `<&-` does; it is to be imported before
anything opens a file, which would take the place of the stream, and before anything is read or written."""

import os
import sys
from typing import TextIO


def reopen() -> None:
    """Replaces the streams that are None, which is what Python makes of closed ones."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # for the process's life


def drop(stream: TextIO) -> None:
    """Lets a stream that could not be written to end in the null device, with what it holds still."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


reopen()

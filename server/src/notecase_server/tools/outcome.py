"""What a tool gave back, as it may enter the log: of bounded size, whatever the tool."""

from collections.abc import Sequence

from notecase import v1

from notecase_server.tools.contract import Outcome

MAX_RESULT = 512 * 1024
"""Bytes of all parts of a result. It is shown to the model with every later call of the session, and 512 KiB of text is
more than most models can read at all."""

MAX_ERROR = 4096
"""Characters of an error. It is meant to be a sentence; what is longer is a dump."""


def succeeded(parts: Sequence[v1.Part]) -> Outcome:
    """The parts as a result, or the error that they are too large."""
    size = sum(part.ByteSize() for part in parts)
    if size > MAX_RESULT:
        return Outcome(error=f"The result has {size} bytes; at most {MAX_RESULT} are taken. Ask for less.")
    return Outcome(parts)


def failed(told: str) -> Outcome:
    """An error for the model, cut where it is too long; never empty, and always text that can be sent."""
    text = told.encode(errors="replace").decode()
    return Outcome(error=(text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}…") or "The tool failed.")

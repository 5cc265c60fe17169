"""Converts a tool's result for the log, with the same size limits for every tool."""

from collections.abc import Sequence

from notecase import v1

from notecase_server.tools.contract import Outcome

MAX_RESULT = 512 * 1024
"""Bytes of a result, not counting its media. It is shown to the model with every later call of the session, and 512 KiB
of text is more than most models can read at all."""

MAX_MEDIA = 8 << 20
"""Bytes of a result's images, audio and documents: they become blobs, and a photograph has some megabytes."""

MAX_ERROR = 4096
"""Characters of an error. It should be a sentence; a longer text is a dump."""


def succeeded(parts: Sequence[v1.Part]) -> Outcome:
    """The parts as a result, or the error that they are too large."""
    media = sum(len(part.data.data) for part in parts if _is_media(part))
    text = sum(part.ByteSize() for part in parts) - media
    if media > MAX_MEDIA:
        return Outcome(error=f"The result has {media} bytes of media; at most {MAX_MEDIA} are taken. Ask for less.")
    if text > MAX_RESULT:
        return Outcome(error=f"The result has {text} bytes; at most {MAX_RESULT} are taken. Ask for less.")
    return Outcome(parts)


def _is_media(part: v1.Part) -> bool:
    """A text file does not count as media: a model reads it as text."""
    return part.HasField("data") and not part.data.media_type.lower().startswith("text/")


def failed(told: str) -> Outcome:
    """An error for the model, cut where it is too long; never empty, and always text that can be sent."""
    text = told.encode(errors="replace").decode()
    return Outcome(error=(text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}…") or "The tool failed.")

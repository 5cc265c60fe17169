"""The process that validates: it reads requests about JSON Schemas from standard input, a line of JSON each, and writes
a line for each answer. Only `schema` starts it. It imports little, so that it starts fast and has no secrets of the
server.
"""

import functools
import signal
import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

import jsonschema_rs
import msgspec

MAX_DEPTH = 16
"""Levels of a reply: as many as a value in state has."""

MAX_BITS = 1023
"""Of a whole number, which is a double where it does not fit into 64 bits."""

LAST_SECONDS = 30
"""After which the system ends the process in the middle of a question: a server that was killed cannot."""

TOLD = 3
"""Problems that are named, of a document that may have thousands."""

TOLD_CHARS = 300
"""Of one problem: a sentence, not the schema that it quotes."""


class Question(msgspec.Struct):
    schema: str
    reply: str | None = None
    """None asks about the schema itself."""
    seconds: float = 2.0
    """Of the processor's time that the answer may take: the system ends the process then."""


def problem(question: Question) -> str:
    """What is wrong with the schema, or with the reply by it; empty when nothing is."""
    try:
        validator = _compiled(question.schema)
    except jsonschema_rs.ValidationError as error:
        return _told([error])
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        return _cut(f"it is not readable JSON: {error}")
    if question.reply is None:
        return ""
    try:
        document = msgspec.json.decode(question.reply)
    except (ValueError, RecursionError) as error:
        return _cut(f"it is not JSON: {error}")
    if strange := _strange(document, MAX_DEPTH):
        return strange
    return _told(islice(validator.iter_errors(document), TOLD))


@functools.lru_cache(maxsize=64)
def _compiled(schema: str) -> jsonschema_rs.Draft202012Validator:
    """Patterns match in linear time, nothing is fetched, and a problem of a document quotes no value of it."""
    decoded = msgspec.json.decode(schema, type=dict[str, Any])
    return jsonschema_rs.Draft202012Validator(
        decoded, offline=True, pattern_options=jsonschema_rs.RegexOptions(), mask="the value"
    )


def _strange(document: Any, levels: int) -> str:
    """What no value in state could hold; empty for what all could."""
    if isinstance(document, int) and document.bit_length() > MAX_BITS:
        return "a number in it is out of range"
    inside = document.values() if isinstance(document, dict) else document if isinstance(document, list) else None
    if inside is None:
        return ""
    if levels == 0:
        return f"it is more than {MAX_DEPTH} levels deep"
    return next((found for one in inside if (found := _strange(one, levels - 1))), "")


def _told(found: Iterable[jsonschema_rs.ValidationError]) -> str:
    return "; ".join(_cut(f"{_pointer(error.instance_path)}{error.message}") for error in found)


def _pointer(path: Iterable[str | int]) -> str:
    pointer = "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)
    return f"at {pointer}: " if pointer else ""


def _cut(text: str) -> str:
    return text if len(text) <= TOLD_CHARS else f"{text[:TOLD_CHARS]}…"


def main() -> None:
    """Answers until its input ends."""
    for line in sys.stdin.buffer:
        signal.alarm(LAST_SECONDS)
        question = msgspec.json.decode(line, type=Question)
        signal.setitimer(signal.ITIMER_PROF, question.seconds)
        sys.stdout.buffer.write(msgspec.json.encode(problem(question)) + b"\n")
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


if __name__ == "__main__":
    main()

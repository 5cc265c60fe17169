"""What the commands print. Text from users, models or state cannot control the terminal.

Standard output has only the result: replies and tables. Everything else goes to standard error.
"""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC
from typing import Any

import click
from google.protobuf.timestamp_pb2 import Timestamp
from notecase import NotecaseError, v1
from rich.cells import cell_len, set_cell_size

from notecase_server.cli.connection import unreachable

PROMPT = "> "
"""The sign before a user's message, typed or shown."""

CONTINUED = " " * len(PROMPT)
"""Stands before its further lines."""

_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that show a text in another order than it has."""

_MARKS = (0x061C, 0x200E, 0x200F)
"""Directional marks of Arabic and Hebrew text, which are invisible."""

_HARMLESS = {
    **{code: "\ufffd" for code in (*range(32), *range(127, 160), *_REORDERING) if chr(code) not in "\n\t"},
    **dict.fromkeys((ord("\r"), *_MARKS), ""),
}
"""Escape and its relatives would move the cursor, rename the window or write into the clipboard."""

_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(127, 160), *_REORDERING, *_MARKS)}
"""What JSON may hold as it is, and a terminal would obey."""


def harmless(text: str) -> str:
    """Returns the text with its line breaks, without characters that control a terminal."""
    return text.translate(_HARMLESS)


def escaped(text: str) -> str:
    """Returns JSON, or quoted text of YAML, with escapes for characters that control a terminal."""
    return text.translate(_ESCAPED)


def as_json(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Returns a value as JSON in which a terminal finds nothing to obey."""
    return escaped(json.dumps(value, ensure_ascii=False, indent=indent, default=default))


def one_line(text: str, most: int = 60) -> str:
    """Returns the words of a text on one line that is at most so many columns wide."""
    line = " ".join(harmless(text[: 8 * most]).split())
    return line if cell_len(line) <= most else f"{set_cell_size(line, most - 1).rstrip()}…"


def aside(text: str) -> None:
    """Prints a line about the conversation that is not part of it."""
    click.secho(folded(text), err=True, dim=True)


def folded(text: str, taken: int = 0) -> str:
    """Returns a text for standard error: at a terminal its lines end between words, so that an id stays whole. `taken`
    columns are left free."""
    if not sys.stderr.isatty():
        return text
    width = max(shutil.get_terminal_size().columns - taken, 1)
    fold = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
    return "\n".join(fold(line) if cell_len(line) > width else line for line in text.split("\n"))


def failure(text: str) -> None:
    """Says what went wrong."""
    click.secho(harmless(text), err=True, fg="red")


_LISTED_BY = {
    "AGENT_NOT_FOUND": "`notecase agents list` lists those that exist.",
    "SESSION_NOT_FOUND": "`notecase sessions list` lists those that exist.",
}
"""The command that shows what could have been named, by the reason of the error."""


def sentence(error: NotecaseError, server: str) -> str:
    """Says what went wrong, in the service's own words where the error is the service's."""
    if error.reason == "UNAUTHENTICATED":
        what = harmless(error.message).partition(";")[0]
        return f"{what}. Give one with --token, with NOTECASE_TOKEN, or with `notecase profiles set`."
    if error.reason == "RUN_ACTIVE" and error.metadata.get("run"):
        run = error.metadata["run"].removeprefix("sessions/").replace("/runs/", "/")
        return (
            f"The session is busy with {error.metadata['run']}. `notecase inbox` lists what runs wait for, "
            f"`notecase approve` and `notecase answer` answer, and `notecase runs cancel {run}` stops it."
        )
    if error.reason == "ROLE_MISSING" and error.metadata.get("role") == "OPERATOR":
        key = "`notecase keys bootstrap --operator` creates an operator's key while the server is stopped."
        return f"{harmless(error.message)} {key}"
    if error.reason:
        return f"{harmless(error.message)} {_LISTED_BY.get(error.reason, '')}".rstrip()
    if error.code.name == "UNAVAILABLE":
        return unreachable(server, one_line(error.message, 400))
    return f"{server} does not answer as a notecase server does ({error.code.name}: {one_line(error.message, 200)})."


def id_of(name: str) -> str:
    """Returns the last part of a resource name, which the commands take."""
    return name.rpartition("/")[2]


def moment(time: Timestamp) -> str:
    """Returns a time in the local time zone, to the minute; the last hours of the year 9999 in UTC."""
    moment = time.ToDatetime(UTC)
    with suppress(OverflowError):
        moment = moment.astimezone()
    return moment.strftime("%Y-%m-%d %H:%M")


def word_of(enum: Any, value: int) -> str:
    """Returns the value of an enum without the enum's name, in lower case, such as "waiting"."""
    name: str = enum.Name(value)
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.DESCRIPTOR.name).upper()
    return name.removeprefix(f"{prefix}_").lower()


def activity(session: v1.Session) -> str:
    return word_of(v1.Session.Activity, session.activity)


def author(found: v1.Message) -> str:
    """Returns a message's author, or else its role."""
    return found.author or word_of(v1.Message.Role, found.role)


def model_of(agent: v1.Agent) -> str:
    """Returns an agent's provider and model if it names them; otherwise the server's defaults apply."""
    return harmless("/".join(filter(None, (agent.llm.provider, agent.llm.model)))) or "default"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line for each row, with columns as wide as their widest cell."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(set_cell_size, row, widths)).rstrip() for row in rows]


def _summed_up(held: bytes | v1.Blob) -> str:
    return attachment(held) if isinstance(held, v1.Blob) else f"{len(held)} bytes"


def note(value: Any, most: int = 200) -> str:
    """Returns a value of state on one line: text as it is, all else as JSON, bytes as their number."""
    if isinstance(value, str | v1.Blob):
        return one_line(value if isinstance(value, str) else attachment(value), most)
    return one_line(as_json(value, default=_summed_up), most)


def attachment(blob: v1.Blob) -> str:
    """Returns a reference to content on one line."""
    name = f"{one_line(blob.filename)}, " if blob.filename else ""
    return f"{name}{one_line(blob.media_type)}, {blob.size_bytes} bytes"


def message(found: v1.Message, most: int | None = None) -> str:
    """Returns a whole message, the text of each part cut to so many characters."""
    lines = [line for part in found.parts for line in (_part(part, most), *map(_dim, sources(part)))]
    if found.status == v1.Message.STATUS_INCOMPLETE:
        lines.append(click.style("(cut off)", dim=True))
    text = "\n".join(lines)
    if found.role == v1.Message.ROLE_USER:
        return click.style(PROMPT, fg="cyan", bold=True) + text.replace("\n", f"\n{CONTINUED}")
    return click.style("system: ", dim=True) + text if found.role == v1.Message.ROLE_SYSTEM else text


def diff(text: str) -> str:
    """Returns a unified diff in its usual colours."""
    colours = {"+": "green", "-": "red", "@": "cyan"}
    return "\n".join(click.style(line, fg=colours.get(line[:1])) for line in harmless(text).split("\n"))


def _dim(text: str) -> str:
    return click.style(text, dim=True)


def sources(part: v1.Part) -> list[str]:
    """Returns a line for each source of a text, numbered as the text may refer to them."""
    named = ((citation.title, citation.uri) for citation in part.citations)
    return [f"[{number}] {one_line(' '.join(filter(None, told)), 200)}" for number, told in enumerate(named, 1)]


def content(part: v1.Part) -> str:
    """Returns content on one line."""
    match part.WhichOneof("kind"):
        case "file":
            return f"[{one_line(part.file.uri, 200)}]"
        case "blob":
            return f"[{attachment(part.blob)}]"
        case _:
            return f"[{one_line(part.data.media_type)}, {len(part.data.data)} bytes]"


def _part(part: v1.Part, most: int | None) -> str:
    match part.WhichOneof("kind"):
        case "reasoning":
            return click.style(_cut(part.reasoning.text, most), dim=True)
        case "refusal":
            return _refusal(_cut(part.refusal, most))
        case "tool_call":
            return click.style(call(part.tool_call), dim=True)
        case "file" | "blob" | "data":
            return _dim(content(part))
        case _:
            return _cut(part.text or part.json, most)


def _cut(text: str, most: int | None) -> str:
    text = harmless(text).rstrip()
    return text if most is None or len(text) <= most else f"{text[:most]}…"


REFUSED = "refused: "
"""Stands before the words in which a model refuses."""


def _refusal(text: str) -> str:
    return click.style(REFUSED, fg="yellow") + text


def call(made: v1.ToolCall) -> str:
    """Returns a tool call and its outcome on one line."""
    told = one_line(made.error or " ".join(part.text or part.json for part in made.result), 120)
    return f"→ {called(made)} {word_of(v1.ToolCall.Outcome, made.outcome)}{': ' if told else ''}{told}"


def called(made: v1.ToolCall) -> str:
    """Returns a tool call without its outcome on one line."""
    return f"{one_line(made.tool)}({one_line(made.arguments, 80)})"


def summarized(made: v1.Summarized) -> str:
    """Returns a summary on one line, with enough of its text to see that it is about this conversation."""
    return f"Summarised for the model: {one_line(made.text, 80)}"

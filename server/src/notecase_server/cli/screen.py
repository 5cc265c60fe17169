"""What the commands show. Text of a user, a model or a note cannot command the terminal.

Standard output carries what was asked for: the agent's words and the tables. Everything else goes to standard error.
"""

import json
from collections.abc import Sequence
from datetime import UTC
from typing import Any

import click
from google.protobuf.timestamp_pb2 import Timestamp
from notecase import NotecaseError, RunStream, v1

PROMPT = "> "
"""Stands before what a user says, typed or shown."""

CONTINUED = " " * len(PROMPT)
"""Stands before its further lines."""

_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"} | {ord("\r"): None}
"""Escape and its relatives would move the cursor, rename the window or write into the clipboard."""


def harmless(text: str) -> str:
    """Returns the text with its lines, without what a terminal would obey."""
    return text.translate(_HARMLESS)


def one_line(text: str, most: int = 60) -> str:
    """Returns the words of a text on one line of at most so many characters."""
    line = " ".join(harmless(text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def aside(text: str) -> None:
    """Says something about the conversation, apart from what is said in it."""
    click.secho(text, err=True, dim=True)


def failure(text: str) -> None:
    """Says what went wrong."""
    click.secho(harmless(text), err=True, fg="red")


def sentence(error: NotecaseError, server: str) -> str:
    """Says what went wrong, in the service's own words where the error is the service's."""
    if error.reason:
        return harmless(error.message)
    if error.code.name == "UNAVAILABLE" and "certificate" in error.message.lower():
        return f"The certificate of {server} is not of an authority that is known here, or not for this name; see --ca."
    if error.code.name == "UNAVAILABLE":
        return f"No server can be reached at {server}. `notecase serve` starts one; see --server, and --ca for TLS."
    return f"{server} does not answer as a notecase server does ({error.code.name}: {one_line(error.message, 200)})."


def id_of(name: str) -> str:
    """Returns the last part of a resource name, which the commands take."""
    return name.rpartition("/")[2]


def moment(time: Timestamp) -> str:
    """Returns a time in the local time zone, to the minute."""
    return time.ToDatetime(UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def activity(session: v1.Session) -> str:
    return v1.Session.Activity.Name(session.activity).removeprefix("ACTIVITY_").lower()


def author(found: v1.Message) -> str:
    """Returns a message's author, or else its role."""
    return found.author or v1.Message.Role.Name(found.role).removeprefix("ROLE_").lower()


def model_of(agent: v1.Agent) -> str:
    """Returns an agent's provider and model as far as it names them; the rest is the server's default."""
    return harmless("/".join(filter(None, (agent.llm.provider, agent.llm.model)))) or "default"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line for each row, with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first, *rest = aligned([header, *rows])
    return "\n".join([click.style(first, dim=True), *rest])


def _summed_up(held: bytes | v1.Blob) -> str:
    return attachment(held) if isinstance(held, v1.Blob) else f"{len(held)} bytes"


def note(value: Any, most: int = 200) -> str:
    """Returns a value of state on one line: text as it is, all else as JSON, bytes as their number."""
    if isinstance(value, str | v1.Blob):
        return one_line(value if isinstance(value, str) else attachment(value), most)
    shown = json.dumps(value, ensure_ascii=False, default=_summed_up)
    return one_line(shown, most)


def attachment(blob: v1.Blob) -> str:
    """Returns a reference to content on one line."""
    name = f"{one_line(blob.filename)}, " if blob.filename else ""
    return f"{name}{one_line(blob.media_type)}, {blob.size_bytes} bytes"


def message(found: v1.Message, most: int | None = None) -> str:
    """Returns a whole message, the text of each part cut to so many characters."""
    lines = [line for part in found.parts for line in (_part(part, most), *map(_dim, _sources(part)))]
    if found.status == v1.Message.STATUS_INCOMPLETE:
        lines.append(click.style("(cut off)", dim=True))
    text = "\n".join(lines)
    if found.role == v1.Message.ROLE_USER:
        return click.style(PROMPT, fg="cyan", bold=True) + text.replace("\n", f"\n{CONTINUED}")
    return click.style("system: ", dim=True) + text if found.role == v1.Message.ROLE_SYSTEM else text


def _dim(text: str) -> str:
    return click.style(text, dim=True)


def _sources(part: v1.Part) -> list[str]:
    """Returns a line for each source of a text, numbered as the text may refer to them."""
    named = ((citation.title, citation.uri) for citation in part.citations)
    return [f"[{number}] {one_line(' '.join(filter(None, told)), 200)}" for number, told in enumerate(named, 1)]


def _content(part: v1.Part) -> str:
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
            return _dim(_content(part))
        case _:
            return _cut(part.text or part.json, most)


def _cut(text: str, most: int | None) -> str:
    text = harmless(text).rstrip()
    return text if most is None or len(text) <= most else f"{text[:most]}…"


def _refusal(text: str) -> str:
    return click.style("refused: ", fg="yellow") + text


def call(made: v1.ToolCall) -> str:
    """Returns a tool call and its outcome on one line."""
    outcome = v1.ToolCall.Outcome.Name(made.outcome).removeprefix("OUTCOME_").lower()
    told = one_line(made.error or " ".join(part.text or part.json for part in made.result), 120)
    return f"→ {one_line(made.tool)}({one_line(made.arguments, 80)}) {outcome}{': ' if told else ''}{told}"


def summarized(made: v1.Summarized) -> str:
    """Returns a summary on one line, with enough of its text to see that it is about this conversation."""
    return f"Summarised for the model: {one_line(made.text, 80)}"


class Reply:
    """A run on the screen while it happens, from the events of its stream.

    What was shown is not taken back: where a model call is repeated, a line says so and the reply begins anew. Without
    a terminal the agent's words alone go to standard output, exactly, with a line break after each message."""

    def __init__(self, stream: RunStream, terminal: bool, echo: bool = False) -> None:
        """With `echo` the user's messages are shown, too; where they have just been typed they are not."""
        self._stream = stream
        self._terminal = terminal
        self._echo = echo
        self._shown: dict[tuple[str, int], int] = {}
        self._block: tuple[str, int] | None = None
        self._waiting = False

    def wait(self) -> None:
        """Shows that a reply is awaited."""
        if self._terminal:
            click.secho("…", dim=True, nl=False)
            self._waiting = True

    def show(self, event: v1.Event) -> None:
        """Shows the next event of the stream, once the stream's view has it."""
        delta, added = event.block_delta, event.message_added
        match event.WhichOneof("payload"):
            case "block_delta":
                if block := self._stream.view.open.get(delta.message, {}).get(delta.block):
                    self._grow((delta.message, delta.block), block.kind, block.text)
            case "message_added":
                self._add(added)
            case "message_discarded":
                if any(name == event.message_discarded.message for name, _ in self._shown):
                    self._aside("The model is asked again; its reply begins anew.")
            case "tool_finished":
                self._aside(call(event.tool_finished))
            case "summarized":
                self._aside(summarized(event.summarized))
            case "run_state_changed":
                self._change(event.run_state_changed)

    def end(self) -> None:
        """Moves the cursor to the beginning of a line; may be called twice."""
        self._awaken()
        if self._block is not None:
            click.echo()
            self._block = None

    def _add(self, added: v1.Message) -> None:
        if added.role != v1.Message.ROLE_ASSISTANT:
            if self._echo:
                self.end()
                click.echo(f"{message(added)}\n")
            return
        for index, part in enumerate(added.parts):
            kind = part.WhichOneof("kind") or ""
            if kind == "tool_call":
                if part.tool_call.outcome != v1.ToolCall.OUTCOME_PENDING:
                    self._aside(call(part.tool_call))
            elif kind in {"blob", "file"}:
                self._aside(_content(part))
            else:
                self._grow((added.name, index), kind, part.reasoning.text or part.refusal or part.text or part.json)
            for source in _sources(part):
                self._aside(source)
        self.end()
        if added.finish_reason == "length":
            self._aside("The model stopped there, having reached its limit of tokens.")

    def _grow(self, block: tuple[str, int], kind: str, text: str) -> None:
        """Shows the part of a block that is not on the screen yet."""
        shown = self._shown.get(block, 0)
        if len(text) <= shown or kind not in {"text", "json", "refusal", "reasoning"}:
            return
        if kind == "reasoning" and not self._terminal:
            return
        if self._block != block:
            self.end()
            self._block = block
        piece = harmless(text[shown:])
        if kind == "refusal" and not shown:
            piece = _refusal(piece)
        click.echo(click.style(piece, dim=True) if kind == "reasoning" else piece, nl=False)
        self._shown[block] = len(text)

    def _change(self, changed: v1.RunStateChanged) -> None:
        if changed.state == v1.Run.STATE_CANCELLED:
            self._aside(f"Cancelled{': ' if changed.reason else '.'}{one_line(changed.reason, 200)}")
        elif changed.state == v1.Run.STATE_RUNNING and changed.reason:
            self._aside(one_line(changed.reason, 200))

    def _aside(self, text: str) -> None:
        self.end()
        aside(text)

    def _awaken(self) -> None:
        if self._waiting:
            click.echo("\r\x1b[K", nl=False)
            self._waiting = False

"""Draws a run at a terminal: Markdown while it streams, tools while they run."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

from markdown_it import MarkdownIt
from notecase import RunStream, v1
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown
from rich.text import Text

from notecase_server.cli import screen
from notecase_server.cli.reply import Reply

REFRESHES = 10
"""How often a second the unfinished part is drawn, however fast it arrives."""

DRAWN = 8192
"""Characters: of a longer block that is being written only the end is drawn, and as it is written."""

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
"""Of the sign that something is going on."""

_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
"""HTML is shown as it is written: rich leaves it out."""


class LiveReply(Reply):
    """A run at a terminal. Blocks of Markdown that are finished stay on the screen; below them the block that is being
    written, and the calls of tools that run, are drawn again as they change."""

    shows_reasoning = True

    def __init__(self, stream: RunStream, echo: bool = False) -> None:
        super().__init__(stream, echo)
        self._console = Console(highlight=False)
        self._live: Live | None = None
        self._kind = ""
        self._tail = ""  # the unfinished rest of the open block
        self._next_split = (
            0  # how long it is to be before it is parsed again: a long block is not parsed for each piece
        )
        self._any = False  # whether something of the open block is finished
        self._calls: dict[str, tuple[v1.ToolCall, float]] = {}

    def start(self) -> None:
        if self._live is None:
            self._live = Live(
                Bottom(self._moving),
                console=self._console,
                refresh_per_second=REFRESHES,
                transient=True,
            )
            self._live.start(refresh=True)

    def end(self) -> None:
        super().end()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        self._close()
        self._console.print(Text(screen.harmless(text), style="dim"))

    def begin_call(self, call: v1.ToolCall) -> None:
        self._calls[call.call_id] = (call, time.monotonic())

    def finish_call(self, call: v1.ToolCall) -> None:
        self._calls.pop(call.call_id, None)
        super().finish_call(call)

    def write_user(self, message: v1.Message) -> None:
        self._console.print(Text.from_ansi(screen.message(message)), "")

    def write(self, kind: str, piece: str) -> None:
        self._kind = kind
        self._tail += piece
        if kind == "text" and "\n" in piece and len(self._tail) >= self._next_split:
            finished, self._tail = split(self._tail)
            self._next_split = len(self._tail) + len(self._tail) // 8
            self._print(finished)

    def close_block(self) -> None:
        tail, self._tail = self._tail, ""  # first, so that it is not drawn below the output
        self._next_split = 0
        self._print(tail)
        if self._kind == "reasoning":
            self._console.print()
        self._any = False

    def _print(self, text: str) -> None:
        if text.strip():
            if self._any:
                self._console.print()
            self._console.print(self._rendered(text), soft_wrap=self._kind == "json")
            self._any = True

    def _rendered(self, text: str) -> RenderableType:
        if self._kind == "text":
            return markdown(text)
        return Text(text.rstrip("\n"), style="dim" if self._kind == "reasoning" else "")

    def _moving(self) -> Iterator[RenderableType]:
        """Yields what has to be drawn repeatedly."""
        if self._tail.strip():
            if self._any:
                yield Text("")
            long = len(self._tail) > DRAWN
            yield Text(self._tail[-DRAWN:]) if long else self._rendered(self._tail)
        for call, begun in list(self._calls.values()):
            took = f"  {time.monotonic() - begun:.0f} s"
            yield _spinner(screen.called(call) + took)
        if not self._tail.strip() and not self._calls:
            yield _spinner("")


def _spinner(text: str) -> RenderableType:
    frame = FRAMES[int(time.monotonic() * REFRESHES) % len(FRAMES)]
    return Text(f"{frame} {text}", style="dim")


class Bottom:
    """Draws what moves, and no more of it than its newest lines that fit on the screen: a terminal cannot take back
    what has left it."""

    def __init__(self, parts: Callable[[], Iterable[RenderableType]]) -> None:
        """`parts` returns the moving parts each time."""
        self._parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [line for part in self._parts() for line in console.render_lines(part, options, pad=False)]
        for number, line in enumerate(lines[-max(console.size.height - 1, 1) :]):
            if number:
                yield Text("")
            yield from line


def split(text: str) -> tuple[str, str]:
    """Returns the blocks of Markdown that are finished, and the last block, which more text may still change."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map]
    if len(starts) < 2:
        return "", text
    lines = re.split("(?<=\n)", text)  # as the parser counts them, not as Unicode does
    return "".join(lines[: starts[-1]]), "".join(lines[starts[-1] :])


class _Left(Heading):
    """A heading as it would be typed: at the left, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Markdown(Markdown):
    elements: ClassVar = {**Markdown.elements, "heading_open": _Left}


def markdown(text: str) -> Markdown:
    """Returns what Markdown says. A line's end stays one, as chats have it, and the address of a link is shown."""
    made = _Markdown("", hyperlinks=False, code_theme="ansi_dark")
    made.parsed = _PARSER.parse(text)
    for token in made.parsed:
        for child in token.children or []:
            if child.type == "softbreak":
                child.type = "hardbreak"
    return made

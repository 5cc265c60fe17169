"""Draws a terminal: reads what `make demo` printed from standard input and writes an SVG, which loads nothing."""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

STYLES = [
    (re.compile(r"^\$ .*"), "bold green"),
    (re.compile(r"^  you  .*"), "bold cyan"),
    (re.compile(r"^  a note .*"), "yellow"),
    (re.compile(r"^ +\[.* out\]$"), "dim"),
    (re.compile(r"^(The server is stopped|It still has).*"), "bold magenta"),
]
"""How a line looks, by its beginning; others are plain."""

FRAME = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-family: sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""Rich's own frame, without its fonts from another host."""


def draw(printed: str) -> str:
    """The terminal as SVG, as wide as its longest line."""
    lines = ["$ make demo", *(re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:7420", line) for line in printed.splitlines())]
    console = Console(record=True, width=max(map(len, lines)) + 1, file=io.StringIO())
    for line in lines:
        style = next((style for pattern, style in STYLES if pattern.match(line)), "")
        console.print(Text(line, style=style))
    return console.export_svg(title="notecase", code_format=FRAME, theme=MONOKAI, unique_id="demo")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(sys.stdin.read()))

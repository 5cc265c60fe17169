"""A plot without a library: one panel below the other, each with its own scale, as SVG."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.targets import digits

WIDTH, HEIGHT, LEFT, TOP, GAP = 720, 120, 60, 30, 50


def svg(minutes: Sequence[float], panels: Sequence[tuple[str, Sequence[float]]]) -> str:
    """The document: the values of each panel, by its title, over the minutes. A panel begins at 0, so that a line that
    is nearly flat looks flat."""
    height = TOP + len(panels) * (HEIGHT + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" font-family="sans-serif"'
        ' font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    end = max(minutes[-1], 1e-9)
    for number, (title, values) in enumerate(panels):
        top = TOP + number * (HEIGHT + GAP)
        bottom, most = top + HEIGHT, max(*values, 1e-9)
        points = " ".join(
            f"{LEFT + WIDTH * at / end:.1f},{bottom - HEIGHT * value / most:.1f}"
            for at, value in zip(minutes, values, strict=True)
        )
        lines += [
            f'<text x="{LEFT}" y="{top - 8}">{escape(title)}</text>',
            f'<path d="M{LEFT} {top}V{bottom}H{LEFT + WIDTH}" fill="none" stroke="#999"/>',
            f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>',
            f'<text x="{LEFT - 6}" y="{top + 8}" text-anchor="end">{digits(most)}</text>',
            f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end">0</text>',
            f'<text x="{LEFT + WIDTH}" y="{bottom + 16}" text-anchor="end">{digits(minutes[-1])} min</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])

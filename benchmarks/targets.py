"""The figures, what they are to be at most, and the table they are shown in."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """One line of the table."""

    name: str
    unit: str
    """Empty for a ratio or a count."""
    target: float | None
    """What the median is to be at most; None for what is there to judge the others by."""


TARGETS: dict[str, Figure] = {
    "token-flat": Figure("CPU per token, 8 streams flat out", "µs", None),
    "token-flat-in-floor": Figure("the same in that of the floor", "", 1.4),
    "token-paced": Figure("CPU per token, 32 streams, one every 10 ms", "µs", None),
    "token-paced-in-floor": Figure("the same in that of the floor", "", 1.6),
    "turn": Figure("CPU per durable turn of one token, 8 at once", "ms", None),
    "turn-in-floor": Figure("the same in that of the floor", "", 2),
    "turn-in-calls": Figure("the same in bare unary calls of the same round", "", None),
    "call": Figure("CPU per bare unary call, 8 at once", "µs", None),
    "postgres-turn": Figure("CPU per durable turn of one token over PostgreSQL", "ms", None),
    "postgres-turn-in-sqlite": Figure("the same in that over SQLite", "", 1.5),
    "postgres-database": Figure("CPU of the database meanwhile, per turn", "ms", None),
    "postgres-bare": Figure("CPU of bare asyncpg to write as many rows in two statements", "ms", None),
    "postgres-rows": Figure("rows that a turn writes", "", None),
    "key-call": Figure("CPU of a call more where callers need a key", "µs", None),
    "key-token": Figure("CPU per token where callers need a key, against none", "", 1.02),
    "guesses-alone": Figure("a neighbour's turn, p99, where nobody guesses keys", "ms", None),
    "guesses-beside": Figure("its p99 with a caller who sends 1,000 wrong keys a second, of that", "", 2),
    "first-token-p50": Figure("added time to first token, p50", "ms", None),
    "first-token-p50-in-floor": Figure("the same in that of the floor", "", 1.5),
    "first-token-p95": Figure("added time to first token, p95", "ms", None),
    "first-token-p95-in-floor": Figure("the same in that of the floor", "", 2),
    "history-window-1000": Figure("CPU per turn, window fixed, 1,000 messages against 10", "", 1.1),
    "history-window-5000": Figure("CPU per turn, window fixed, 5,000 messages against 10", "", 1.1),
    "history-whole-1000": Figure("CPU per turn, all sent, 1,000 messages against 10", "", 1.5),
    "history-whole-5000": Figure("CPU per turn, all sent, 5,000 messages against 10", "", 4),
    "log-state": Figure("CPU to read one key, 100,000 messages against 100", "", 1.3),
    "log-page": Figure("CPU to read one page, 100,000 messages against 100", "", 1.3),
    "log-turn": Figure("CPU per turn, window fixed, 100,000 messages against 100", "", 1.1),
    "fork-short": Figure("CPU to fork a session of 100 events", "ms", None),
    "fork-long": Figure("CPU to fork a session of 100,000 events", "ms", 1000),
    "fork-early": Figure("CPU to fork at event 100 of 100,000, against all of 100", "", 1.5),
    "deletion-answer": Figure("delete a session of 100,000 events", "ms", None),
    "deletion-wait": Figure("longest wait of a write to another session until its rows are gone", "ms", 50),
    "deletion-alone": Figure("the same without the deletion", "ms", None),
    "deletion-more": Figure("how much longer the first is than the second", "ms", 50),
    "fork-wait": Figure("longest wait of a write while 100,000 events of another session are forked", "ms", 50),
    "fork-alone": Figure("the same without the fork", "ms", None),
    "fork-more": Figure("how much longer the first is than the second", "ms", 50),
    "import-wait": Figure("longest wait of a write while 100,000 events are imported", "ms", 50),
    "import-alone": Figure("the same without the import", "ms", None),
    "import-more": Figure("how much longer the first is than the second", "ms", 50),
    "memory-warm": Figure("resident, warm", "MiB", None),
    "memory-over": Figure("the same, over grpc and the openai SDK alone", "MiB", 35),
    "memory-stream": Figure("resident per idle attached stream", "KiB", 30),
    "memory-session": Figure("resident per session of 10 turns", "KiB", 2),
    "content-sent": Figure("CPU per 100 MB uploaded", "s", 1),
    "content-fetched": Figure("CPU per 100 MB downloaded", "s", 0.5),
    "content-memory": Figure("peak with 200 MB uploaded and downloaded", "MiB", 40),
    "errors-32": Figure("errors in turns, 32 at once", "", 0),
    "errors-128": Figure("errors in turns, 128 at once", "", 0),
    "loop-held": Figure("longest callback of the loop, hostile requests", "ms", 20),
    "loop-parser": Figure("the same, where Protobuf's parser alone takes longer", "ms", None),
    "loop-garbage": Figure("longest collection of garbage meanwhile", "ms", None),
    "edge-alone": Figure("a neighbour's turn, p99, alone", "ms", None),
    "edge-beside": Figure("its p99 with the worst bad speaker of HTTP/2, of 2 x alone + 20 ms", "", 1),
    "edge-memory": Figure("memory held after the worst of them, of before", "", 1.1),
    "neighbours-alone": Figure("a neighbour's turn, p99, alone with long sessions", "ms", None),
    "neighbours-beside": Figure("its p99 with the worst who only calls, of 2 x alone + 20 ms", "", 1),
    "start": Figure("start to first answer, empty store", "s", None),
    "start-cpu": Figure("CPU until then", "s", None),
    "start-in-imports": Figure("the same in that of importing grpc and the openai SDK alone", "", 1.2),
}


def table(rounds: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """The lines of a Markdown table: of each figure that was measured the median of the rounds, its spread, and
    whether it is within its target."""
    rows: list[Sequence[str]] = [("", "median", "min to max", "target", "")]
    for key, (name, unit, target) in TARGETS.items():
        values = [measured[key] for measured in rounds if key in measured]
        if not values:
            continue
        median = statistics.median(values)
        verdict = "" if target is None else "pass" if median <= target else "over"
        rows.append(
            (
                name,
                f"{digits(median)} {unit}".rstrip(),
                f"{digits(min(values))} to {digits(max(values))}",
                "" if target is None else f"{target:g}",
                verdict,
            )
        )
    yield from markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        yield f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        if not number:
            yield f"| {' | '.join('-' * width for width in widths)} |"


def digits(value: float) -> str:
    """Three of them that mean something."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"

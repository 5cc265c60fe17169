"""What is watched of a server, and when it counts as flat."""

from collections.abc import Callable, Iterator, Sequence
from statistics import linear_regression
from typing import NamedTuple

from benchmarks.targets import digits, markdown


class Sample(NamedTuple):
    """A server at one moment."""

    seconds: float
    """Since the load began."""
    resident: int
    descriptors: int
    threads: int
    busy: float
    """Of one CPU, since the sample before: 1 is all of it."""
    actions: int
    """Done since the load began."""


class Watched(NamedTuple):
    """One thing that must not grow."""

    name: str
    unit: str
    read: Callable[[Sample], float]
    per_hour: float
    """How much the second half may grow, as growth an hour."""
    noise: float
    """Growth over the second half that counts as chance."""


WATCHED = (
    Watched("resident", "MiB", lambda sample: sample.resident / 2**20, per_hour=16, noise=2),
    Watched("descriptors", "", lambda sample: sample.descriptors, per_hour=8, noise=4),
    Watched("threads", "", lambda sample: sample.threads, per_hour=4, noise=2),
)


class Growth(NamedTuple):
    """How one thing grew over the second half of the samples: the slope of the least squares."""

    watched: Watched
    first: float
    last: float
    most: float
    per_hour: float
    flat: bool


def growth(samples: Sequence[Sample]) -> list[Growth]:
    """Of each thing that is watched. Raises ValueError for fewer than four samples."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        raise ValueError("there are too few samples to tell")
    seconds = [sample.seconds for sample in half]
    found = []
    for watched in WATCHED:
        values = [watched.read(sample) for sample in samples]
        slope = linear_regression(seconds, [watched.read(sample) for sample in half]).slope
        flat = slope * 3600 <= watched.per_hour or slope * (seconds[-1] - seconds[0]) <= watched.noise
        found.append(Growth(watched, values[0], values[-1], max(values), slope * 3600, flat))
    return found


def table(found: Sequence[Growth]) -> Iterator[str]:
    """The lines of a Markdown table."""
    rows: list[Sequence[str]] = [("", "first", "last", "most", "growth an hour", "at most", "")]
    for each in found:
        name = f"{each.watched.name}, {each.watched.unit}".rstrip(", ")
        values = [digits(value) for value in (each.first, each.last, each.most, each.per_hour, each.watched.per_hour)]
        rows.append((name, *values, "flat" if each.flat else "grows"))
    return markdown(rows)

"""Keeps running totals for quotas, so that a write need not count rows: that takes 10 ms for 100,000 of them. A total
is never too low: it was counted once, by a write that ran alone; from then on every addition counts, whether its write
was made or not, and removals do not. Rows are counted again when a total reaches its limit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from notecase_server.store.contract import Quotas
from notecase_server.store.tables import Kept

TALLIED: frozenset[Kept] = frozenset({"sessions", "requests", "uploads", "blob_bytes"})
"""The others are few within what bounds them, and are counted."""


class CountedAloneError(Exception):
    """Rows must be counted, which needs that no other write is under way."""


class Tallies:
    """Those of one server, by kind and tenant."""

    def __init__(self) -> None:
        self._most: dict[tuple[Kept, str], int] = {}

    def below(self, kind: Kept, tenant: str, quotas: Quotas, more: int = 1) -> int | None:
        """Returns a tally that is within its bound with `more`; None where rows must be counted."""
        bounds: Mapping[str, int] = quotas._asdict()
        most = self._most.get((kind, tenant))
        return most if most is not None and most + more <= bounds[kind] else None

    def counted(self, kind: Kept, tenant: str, count: int) -> None:
        """Takes note of how much there is."""
        if kind in TALLIED:
            self._most[kind, tenant] = count

    def added(self, kind: Kept, tenant: str, amount: int = 1) -> None:
        """Records what is about to be added."""
        if (kind, tenant) in self._most:
            self._most[kind, tenant] += amount


@dataclass(slots=True)
class Counts:
    """What is known of how much there is, for one step."""

    quotas: Quotas
    tallies: Tallies
    alone: bool
    """No other write is under way."""
    asked: set[tuple[Kept, str]] = field(default_factory=set)
    """What the step compares with a quota."""

    def add(self, kind: Kept, tenant: str) -> None:
        """Records one more. Raises CountedAloneError when writes of other sessions have reached the bound since
        this step asked for the count."""
        asked = (kind, tenant) in self.asked
        if asked and not self.alone and self.tallies.below(kind, tenant, self.quotas) is None:
            raise CountedAloneError
        self.tallies.added(kind, tenant)

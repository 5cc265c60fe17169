"""What SQLite carries out on the connections of a store, seen by tests."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby


class Trace:
    """The statements of connections, while it is on.

    It is installed once and never removed. Replacing a callback waits for SQLite with the interpreter's lock held, and
    a statement of another thread, such as a checkpoint of the writer, would wait for that lock in the callback.
    """

    def __init__(
        self, connections: Iterable[sqlite3.Connection], statement: Callable[[str], object], step: int = 0
    ) -> None:
        """`statement` is given each statement. With `step`, `steps` counts each so many instructions of SQLite."""
        self._on = False
        self._statement = statement
        self.steps = 0
        for connection in connections:
            connection.set_trace_callback(self._traced)
            if step:
                connection.set_progress_handler(self._progressed, step)

    @contextmanager
    def on(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _traced(self, sql: str) -> None:
        if self._on:
            self._statement(sql)

    def _progressed(self) -> int:
        self.steps += self._on
        return 0


def given(shown: list[str]) -> list[str]:
    """The statements that SQLite was given: it shows one again for each that a trigger carries out meanwhile."""
    return [sql for sql, _ in groupby(shown)]

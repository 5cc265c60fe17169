"""Looks between the transactions of a fork or an import.

    with transactions(store, after=act) as made:
        await store.fork(...)

calls `act` with 1, 2, 3, … when so many are durable, and `before` with the number of the next one; what either raises
is what the store answers. `made` counts them.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from notecase_server.store import copies

STEPS = frozenset(
    {
        *(copies.begin_fork, copies.copy_rows, copies.finish_fork),
        *(copies.begin_restore, copies.write_rows, copies.finish_restore),
    }
)

Act = Callable[[int], Awaitable[None]]


@dataclass
class Made:
    """How many transactions of copies there were."""

    count: int = 0


async def nothing(_: int) -> None:
    """Lets them be."""


@contextmanager
def transactions(store: Any, *, before: Act = nothing, after: Act = nothing) -> Iterator[Made]:
    write, made = store._write, Made()

    async def counted(step: Any, *within: Any, **how: Any) -> Any:
        if getattr(step, "func", None) not in STEPS:
            return await write(step, *within, **how)
        await before(made.count + 1)
        result = await write(step, *within, **how)
        made.count += 1
        await after(made.count)
        return result

    store._write = counted
    try:
        yield made
    finally:
        store._write = write

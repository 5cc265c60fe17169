"""Stops running work by a protocol: one request, one result.

A Halt says what follows after everything open has been ended. The run's worker carries it out in one commit, and
answers the halt with that commit or with a refusal. A refused halt has changed nothing.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from notecase import v1

from notecase_server import errors
from notecase_server.engine.caused import NOBODY, Caused
from notecase_server.engine.rewind import Back
from notecase_server.store.contract import Committed, RunRecord

T = TypeVar("T")


class Replacement(NamedTuple):
    """Describes the run that starts in the commit that ends this one."""

    run: str
    events: Sequence[v1.Event]
    """The events of its start, with the messages."""
    record: RunRecord
    back: Back | None
    """Where the session goes back to before that."""
    if_last_sequence: int | None
    """The sequence at which the log must end before that; None for any."""


@dataclass(slots=True, kw_only=True)
class Halt:
    """Requests that running work stops now: to end the run, or to continue with a user's message instead."""

    said: Sequence[v1.Event] = ()
    """The user's messages: with any, the run goes on with them."""
    by: v1.Tool.Approver.ValueType = v1.Tool.APPROVER_ADMIN
    """As which approver the user counts: what needs another one is not withdrawn by messages."""
    replacement: Replacement | None = None
    state: v1.Run.State.ValueType = v1.Run.STATE_CANCELLED
    """How the run ends, when it does not go on."""
    error: v1.Error | None = None
    reason: str = ""
    cause_id: str = ""
    """Of the event that ends the run."""
    caused: Caused = NOBODY
    """Who asks."""
    done: asyncio.Future[Committed] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """The commit that sealed. NotecaseError RUN_ENDED when the run ended by itself first, Replayed or Duplicate when
    another halt of the same command came before, SERVER_DRAINING when the server stopped first."""

    def refuse(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # no caller waits for the halt of a timer


class Halted(Exception):
    """Raised where a halt has cut running work."""


class Halts:
    """Holds the halts that a worker has not carried out, and the work that they stop."""

    def __init__(self) -> None:
        self.pending: list[Halt] = []
        """In the order of the requests."""
        self._cutting: asyncio.Task[Any] | None = None
        self._cuts = 0
        """How many of its cancellations came from the halt in `cut`."""
        self.stirred = asyncio.Event()
        """Set when there is something new to look at."""

    def add(self, halt: Halt) -> None:
        """Cuts what runs in `cut`; the worker then carries the halt out."""
        self.pending.append(halt)
        self.stirred.set()
        self.interrupt()

    def interrupt(self) -> None:
        """Cuts what runs in `cut` at this moment, without a halt."""
        if self._cutting is not None:
            self._cuts += 1
            self._cutting.cancel()

    def remove(self, halt: Halt) -> None:
        self.pending.remove(halt)

    def refuse_all(self, error: Exception) -> None:
        """Refuses the halts that will not be carried out."""
        for halt in self.pending:
            halt.refuse(error)
        self.pending.clear()

    async def cut(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs work that a halt can cut, in the task that requested it; Halted is then raised. Work that ends as
        cancelled although nothing cancelled it has failed: MODEL_UNAVAILABLE, since only calls to other processes do
        so."""
        if self.pending:
            work.close()
            raise Halted
        task = asyncio.current_task()
        assert task is not None
        asked = task.cancelling()
        self._cutting, self._cuts = task, 0
        try:
            return await work
        except asyncio.CancelledError:
            if task.cancelling() - self._cuts > asked:
                raise
            if self._cuts:
                raise Halted from None
            raise errors.model_unavailable("The model's provider closed the connection.") from None
        finally:
            self._cutting = None
            for _ in range(self._cuts):
                task.uncancel()

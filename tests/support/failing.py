"""A store that fails once: a wrapper around any store that fails a chosen call of a chosen method.

    failing = Failing(store, "commit", Mode.AFTER, nth=2)
    async with running(failing.store) as served:
        ...
        await failing.failed.wait()

A test fails if its Failing has not failed the given number of times (`unfired`). `FAULTS` parametrises one test over
every method and mode, and `faults("commit", "update_state")` over some methods.
"""

import asyncio
import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple, cast

from notecase import v1
from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Store


class Mode(StrEnum):
    """How a call fails."""

    PASSING = "passing"
    """STORE_UNAVAILABLE, before anything is done: a repeat succeeds."""
    FOR_GOOD = "for good"
    """A refusal, before anything is done: a repeat of the same would be refused, too."""
    AFTER = "after"
    """STORE_UNAVAILABLE, after it was done: only its answer was lost."""


class Fault(NamedTuple):
    """One method that fails in one mode."""

    method: str
    mode: Mode

    def __str__(self) -> str:
        return f"{self.method} {self.mode}"


METHODS = tuple(name for name, _ in inspect.getmembers(Store, inspect.iscoroutinefunction) if name != "close")
"""Every call of the contract that may fail."""


def faults(*methods: str) -> list[Fault]:
    """Returns these methods, each in each mode."""
    return [Fault(method, mode) for method in methods for mode in Mode]


FAULTS = faults(*METHODS)


unfired: "set[Failing]" = set()
"""Those of the test under way that have failures left. A fixture of every test asserts at its end that there are
none: a fault that never came has shown nothing."""


def refusal() -> NotecaseError:
    """Makes the refusal of Mode.FOR_GOOD where a test chooses no other."""
    return errors.too_large("The commit", 2, 1)


class Failing:
    """A store that fails at the `nth` call of a method, counted from 1, and at the next `times - 1` calls; with None at
    all that follow."""

    def __init__(
        self,
        store: Store,
        method: str,
        mode: Mode,
        *,
        nth: int = 1,
        times: int | None = 1,
        refuse: Callable[[], BaseException] = refusal,
        counts: Callable[..., bool] = lambda *_, **__: True,
    ) -> None:
        """Counts only the calls for whose arguments `counts` is true, such as the commits of a run. `refuse` makes the
        error of Mode.FOR_GOOD. Raises ValueError for a method that the contract does not have."""
        if method not in METHODS:
            raise ValueError(f"a store has no call {method!r}")
        self.calls = 0
        """Calls that were counted."""
        self.failed = asyncio.Event()
        """Set once it has failed `times` times; without such a bound, once it has failed."""
        self._store = store
        self._fault = Fault(method, mode)
        self._first = nth
        self._last = nth if times is None else nth + times - 1
        self._ever = times is None
        self._refuse = refuse
        self._counts = counts
        unfired.add(self)

    def __str__(self) -> str:
        return f"{self._fault}, {self.calls} calls"

    @property
    def store(self) -> Store:
        """This, as the store that it stands for."""
        return cast(Store, self)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._store, name)
        if name != self._fault.method:
            return member

        async def call(*arguments: Any, **named: Any) -> Any:
            if not self._counts(*arguments, **named):
                return await member(*arguments, **named)
            self.calls += 1
            if self.calls < self._first or (self.calls > self._last and not self._ever):
                return await member(*arguments, **named)
            if self.calls == self._last:
                self.failed.set()
                unfired.discard(self)
            if self._fault.mode is Mode.FOR_GOOD:
                raise self._refuse()
            if self._fault.mode is Mode.AFTER:
                await member(*arguments, **named)
            raise errors.store_unavailable()

        return call


class Unreliable:
    """A store that fails only after `fail` was called, which may happen again. Its user checks whether it has failed:
    with random work the call may never come."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._now: Any = store

    @property
    def store(self) -> Store:
        """This, as the store that it stands for."""
        return cast(Store, self)

    def fail(self, method: str, mode: Mode, *, nth: int = 1, times: int = 1) -> None:
        """From now on fails as Failing does, if the call comes; earlier settings are forgotten."""
        self._now = Failing(self._store, method, mode, nth=nth, times=times)
        unfired.discard(self._now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now, name)


def of_a_run(commit: Any) -> bool:
    """Counts the commits that a run makes; for `counts`."""
    return any(cast(v1.Event, event).run for event in commit.events)

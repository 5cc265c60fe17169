"""Repeats calls that are safe to repeat while the server cannot be reached."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

import grpc

from notecase.arguments import duration, shown
from notecase.errors import NotecaseError
from notecase.view import Gap

T = TypeVar("T")

log = logging.getLogger("notecase")

_TRANSPORT = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
"""What a connection that was reset in the middle of a call looks like, depending on who reset it."""

DRAIN_SECONDS = 60.0
"""How long a server that stops may refuse calls before that counts as failures."""

DOUBLINGS = 1000
"""How often a delay is doubled at most. A float has no room for 1024, and any delay is longer than `max_delay` then."""


@dataclass(frozen=True)
class Retry:
    """How often and how long a client retries a call while the server cannot be reached. Delays are in seconds.

    The defaults outlast a server's restart: 13 to 26 seconds in all, and up to a minute before that while the server
    lets its runs end (SERVER_DRAINING). The logger "notecase" warns once, at the second failure in a row, which comes
    after `first_delay` unless the server asks for more; a connection that is restored at once causes no warning."""

    tries: int = 10
    """Repeats in a row, without an event of the log in between. 0: every failure is raised at once."""
    first_delay: float = 0.1
    """Doubled for each further repeat."""
    max_delay: float = 5.0

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for an invalid number of tries or seconds."""
        if isinstance(self.tries, bool) or not isinstance(self.tries, int):
            raise TypeError(f"tries must be an integer, not {shown(self.tries)}")
        duration("first_delay", self.first_delay)
        duration("max_delay", self.max_delay)
        if min(self.tries, self.first_delay, self.max_delay) < 0:
            raise ValueError("tries, first_delay and max_delay must not be negative")

    @property
    def longest(self) -> float:
        """The seconds that all the delays come to at most."""
        further = max(self.tries - DOUBLINGS, 0)
        return sum(self.delay(failures) for failures in range(self.tries - further)) + further * self.delay(DOUBLINGS)

    def delay(self, failures: int) -> float:
        """Returns the longest delay in seconds after so many earlier failures in a row."""
        return float(min(self.first_delay * 2.0 ** min(failures, DOUBLINGS), self.max_delay))


class Backoff:
    """Counts failures in a row and waits between them."""

    def __init__(self, retry: Retry, renews_token: bool = False, facts: Callable[[], Mapping[str, str]] = dict) -> None:
        """With `renews_token`, a call whose token was refused is repeated once, with the next token. `facts` are the
        further attributes of a log record."""
        self._facts = facts
        self._retry = retry
        self._renews = renews_token
        self.progress()

    def progress(self) -> None:
        """Resets the count after a success."""
        self._failures = 0
        self._repeated = False
        self._warned = False
        self._refused = False
        self._since = monotonic()

    async def wait(self, error: NotecaseError | Gap, *, limited: bool = False) -> None:
        """Waits until the next try is due. Raises `error` when a repeat cannot help, or there were enough. With
        `limited`, a call for which the server has too many others is repeated, too."""
        refused = isinstance(error, NotecaseError) and error.code is grpc.StatusCode.UNAUTHENTICATED
        worth = self._renews and not self._refused if refused else _may_pass(error, limited)
        if self._failures >= self._retry.tries or not worth:
            raise error
        # A server that stops lets its runs go on until its grace is over, and is replaced then.
        draining = isinstance(error, NotecaseError) and error.reason == "SERVER_DRAINING"
        if isinstance(error, NotecaseError) and not refused and self._repeated and not self._warned:
            self._warned = True
            told = error.message.rstrip(".") + "."
            longest = _rounded(self._retry.longest + (DRAIN_SECONDS if draining else 0))
            log.warning("%s Trying again, for at most %s.", told, longest, extra=self._facts())
        self._repeated = True
        self._refused |= refused
        # Spread out, so that the clients of a server that restarts do not come back all at once.
        delay = self._retry.delay(self._failures) * random.uniform(0.5, 1)
        if not (draining and monotonic() - self._since < DRAIN_SECONDS):
            self._failures += 1
        await asyncio.sleep(max(delay, getattr(error, "retry_after", None) or 0))


def _rounded(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:{'.0f' if seconds >= 10 else '.2g'}} s"
    return f"{seconds / 60:.0f} minutes"


async def repeat(retry: Retry, call: Callable[[], Awaitable[T]], *, limited: bool = False) -> T:
    """Makes a call, and repeats it while the connection is broken; see `Backoff.wait`. The call must carry a request_id
    or command_id."""
    backoff = Backoff(retry)
    while True:
        try:
            return await call()
        except NotecaseError as error:
            await backoff.wait(error, limited=limited)


def _may_pass(error: NotecaseError | Gap, limited: bool) -> bool:
    if isinstance(error, Gap) or error.code is grpc.StatusCode.UNAVAILABLE:
        return True
    if error.reason == "WATCHER_TOO_SLOW" or (limited and error.reason == "RATE_LIMITED"):
        return True
    # Errors of the service have a reason; without one the transport failed.
    return not error.reason and error.code in _TRANSPORT

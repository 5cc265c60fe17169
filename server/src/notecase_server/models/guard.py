"""Limits the concurrent calls of a provider, and refuses calls while it fails."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext

import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Delta, Finish, ModelRequest, Provider

log = structlog.get_logger()


class Breaker:
    """A circuit breaker: after some failures in a row that may pass, it refuses calls for a while. Then it lets one
    call through, which closes it when it succeeds and opens it again when it fails."""

    def __init__(self, name: str, failures: int, seconds: float, clock: Callable[[], float]) -> None:
        """Opens after `failures` of them, for `seconds`; `clock` gives seconds, and never goes back."""
        self._name = name
        self._most = failures
        self._seconds = seconds
        self._clock = clock
        self._failures = 0
        self._until: float | None = None
        self._trying = False

    def check(self) -> None:
        """Raises MODEL_UNAVAILABLE while no call may be made."""
        if self._until is None:
            return
        left = self._until - self._clock()
        if left > 0 or self._trying:
            told = f"The provider {self._name!r} failed {self._failures} times in a row; no calls are made for a while."
            refused = errors.model_unavailable(told, retry_after=max(left, 1.0))
            refused.repeats = 0  # a fallback is better than a wait
            raise refused

    def enter(self) -> bool:
        """Begins a call, and returns whether it is the one that tries an open breaker; `tried` follows then. Raises
        MODEL_UNAVAILABLE as `check` does."""
        self.check()
        self._trying = self._until is not None
        return self._trying

    def succeeded(self) -> None:
        """The provider answered, be it that the request is wrong."""
        if self._until is not None:
            log.info("provider_breaker_closed", provider=self._name)
        self._failures, self._until = 0, None

    def failed(self) -> None:
        """A call failed in a way that may pass."""
        self._failures += 1
        if self._failures >= self._most:
            log.warning("provider_breaker_opened", provider=self._name, failures=self._failures, seconds=self._seconds)
            self._until = self._clock() + self._seconds

    def tried(self) -> None:
        """The call that tried the open breaker has ended, in whatever way."""
        self._trying = False


class Guarded:
    """A provider behind a bound and a breaker. A call that waits for its turn is cancelled as one under way is."""

    def __init__(self, provider: Provider, max_concurrent: int, breaker: Breaker | None) -> None:
        """At most `max_concurrent` calls are under way at once, the others in the order in which they came; 0: any
        number."""
        self._provider = provider
        self._breaker = breaker
        self._turns: AbstractAsyncContextManager[object] = (
            asyncio.Semaphore(max_concurrent) if max_concurrent else nullcontext()
        )

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        """See Provider.stream. Raises MODEL_UNAVAILABLE with `retry_after` while the breaker is open, at once."""
        breaker = self._breaker
        if breaker is None:
            async with self._turns, aclosing(self._provider.stream(request)) as stream:
                async for delta in stream:
                    yield delta
            return
        breaker.check()
        async with self._turns:
            trying = breaker.enter()
            try:
                async with aclosing(self._provider.stream(request)) as stream:
                    async for delta in stream:
                        if isinstance(delta, Finish):
                            breaker.succeeded()
                        yield delta
            except NotecaseError as error:
                if error.reason == v1.ERROR_REASON_MODEL_UNAVAILABLE:
                    breaker.failed()
                else:
                    breaker.succeeded()
                raise
            finally:
                if trying:
                    breaker.tried()

    async def close(self) -> None:
        """See Provider.close."""
        await self._provider.close()

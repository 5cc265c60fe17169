"""Calls an agent's model and then its fallbacks, each with retries after transient failures."""

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.engine.halt import Halted, Halts
from notecase_server.engine.run_log import RunLog
from notecase_server.engine.services import NamedProvider, Services
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import ModelRequest

log = structlog.get_logger()

T = TypeVar("T")

DEFAULT_MODEL_CALLS = 10
"""Model calls in a run whose agent sets no limit: enough for a chain of tools, few enough to stop a loop."""


class Budget:
    """Counts the model calls of a run, and keeps what is known about its model."""

    def __init__(self, run: v1.Run, agent: v1.Agent) -> None:
        limit = agent.llm.max_model_calls or DEFAULT_MODEL_CALLS
        self._most = min(limit, run.limits.max_model_calls or limit)
        self._calls = run.usage.model_calls + max(run.attempt - 1, 0)
        self.most_tokens = 0
        """Token limit for the messages, set after the provider rejected a request as too long. 0: none."""
        self.may_summarize = not agent.llm.context.stateless
        self.most_covered = 0
        """Messages that a summary covers at most, set after a request for one was too long. 0: no limit."""

    @property
    def ample(self) -> bool:
        """At least half of the model calls are left, and another one than the reply's."""
        return self.left >= 2 and 2 * self.left >= self._most

    @property
    def left(self) -> int:
        """Model calls that the run may still make."""
        return self._most - self._calls

    def spend(self) -> None:
        """Counts a model call that is about to be made. Raises NotecaseError LIMIT_EXCEEDED when none is left."""
        if self.left <= 0:
            told = f"The run reached its limit of {errors.counted(self._most, 'model call')} without ending."
            raise errors.limit_exceeded("max_model_calls", self._most, told)
        self._calls += 1

    def give_back(self) -> None:
        """Takes back a call that is made once more through no fault of the model."""
        self._calls -= 1


class Source(msgspec.Struct, frozen=True):
    """A model that an agent may be answered by."""

    named: NamedProvider
    fallback: v1.Fallback | None = None
    """Where it takes the place of the agent's own."""

    def fit(self, request: ModelRequest) -> ModelRequest:
        """Returns a request for the agent's model as one for this one."""
        return request if self.fallback is None else request._replace(model=self.fallback.model)

    def own(self, usage: v1.Usage) -> None:
        """Says in a usage that this provider answered."""
        usage.provider = self.named.name


def sources(services: Services, llm: v1.LlmAgent) -> Sequence[Source]:
    """Returns the models in the order in which they are asked; fallbacks whose provider the server does not have are
    left out. Raises MODEL_ERROR where it does not have the agent's own."""
    own = services.providers.get(llm.provider)
    if own is None:
        raise errors.model_error(f"This server has no provider {llm.provider!r}.")
    providers = services.providers
    others = [Source(named, other) for other in llm.fallbacks if (named := providers.get(other.provider)) is not None]
    return [Source(own), *others]


async def ask_at_rest(models: Sequence[Source], once: Callable[[Source], Awaitable[T]]) -> T:
    """Returns the result of `once` for the first model that answers, without a run: retries and fallbacks are as in a
    run. Raises the error of the last model."""
    for number, source in enumerate(models):
        most, seconds = source.named.repeats
        for repeat in itertools.count():
            try:
                return await once(source)
            except NotecaseError as error:
                if (wait := _wait(error, repeat, most, seconds)) is None:
                    if number == len(models) - 1 or error.reason != v1.ERROR_REASON_MODEL_UNAVAILABLE:
                        raise
                    log.warning("model_fell_back", provider=source.named.name, problem=error.message)
                    break
                log.info("model_call_repeated", repeat=repeat + 1, seconds=round(wait, 3))
            seconds -= wait
            await asyncio.sleep(wait)
    raise AssertionError("the last source returns or raises")


def _wait(error: NotecaseError, repeat: int, most: int, seconds: float) -> float | None:
    """Returns how many seconds to wait before a model call that failed is repeated; None when it is not, since what
    went wrong does not pass, or after `most` repeats, or when there are fewer `seconds` left for all of them."""
    passing = most if error.reason == v1.ERROR_REASON_MODEL_UNAVAILABLE else 0
    wait = max(random.uniform(0, 0.5 * 2**repeat), error.retry_after or 0)
    return None if repeat >= (passing if error.repeats is None else error.repeats) or wait > seconds else wait


class Asking:
    """Makes the model calls of one turn of a run."""

    def __init__(self, run_log: RunLog, halts: Halts, budget: Budget) -> None:
        """Raises MODEL_ERROR where the server does not have the agent's provider."""
        self._log = run_log
        self._halts = halts
        self._budget = budget
        self._lease = run_log.services.lease
        self._sources = sources(run_log.services, run_log.agent.llm)

    async def ask(self, once: Callable[[Source], Coroutine[Any, Any, T]]) -> T:
        """Returns the result of `once` for the first model that answers. The next one is called when one has failed
        with MODEL_UNAVAILABLE after all retries and the run may still make a call; a partial reply is discarded. Raises
        Halted, and the error of the last model."""
        for number, source in enumerate(self._sources):
            try:
                return await self._repeated(source, once)
            except NotecaseError as error:
                last = number == len(self._sources) - 1 or error.reason != v1.ERROR_REASON_MODEL_UNAVAILABLE
                if last or self._budget.left + self._came_to_nothing(error) <= 0:
                    raise
                self._log.log.warning("model_fell_back", provider=source.named.name, problem=error.message)
                self._forget(error)
        raise AssertionError("the last source returns or raises")

    async def _repeated(self, source: Source, once: Callable[[Source], Coroutine[Any, Any, T]]) -> T:
        """Calls a model, and retries after transient failures, before its first piece or after it. A try that returned
        nothing does not count as a model call; its usage is counted if the provider reported it."""
        most, seconds = source.named.repeats
        for repeat in itertools.count():
            if self._halts.pending:
                raise Halted
            if not self._lease.holds:
                await self._halts.cut(self._lease.held())
            self._log.spent = None
            try:
                return await self._halts.cut(once(source))
            except NotecaseError as error:
                wait = _wait(error, repeat, most, seconds)
                if error.usage is not None:
                    source.own(error.usage)
                self._log.spent = error.usage or self._log.spent
                await self._log.durably(self._log.used)
                if wait is None:
                    raise
                self._log.log.info("model_call_repeated", repeat=repeat + 1, seconds=round(wait, 3))
                self._forget(error)
                seconds -= wait
            await self._halts.cut(asyncio.sleep(wait))
        raise AssertionError("the last repeat returns or raises")

    def _came_to_nothing(self, error: NotecaseError) -> bool:
        draft = self._log.draft
        return error.usage is None and draft is not None and not draft.blocks

    def _forget(self, error: NotecaseError) -> None:
        """Discards what came of a call that failed, and does not count one of which nothing came."""
        if self._came_to_nothing(error):
            self._budget.give_back()
        self._log.live.discard(self._log.step)

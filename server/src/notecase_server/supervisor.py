"""Owns every task of a server, so that no background work fails unnoticed.

There are three kinds of tasks:

- Work with a caller, who may go away (`whole`). It is completed even then, because what follows from a commit must
  follow it. The caller gets its error; a defect is logged, too.
- A duty (`duty`): something that must happen although no caller waits for it, such as the start of a queued run or a
  deadline. It is retried after temporary failures of the store and after defects. A permanent refusal is passed to the
  duty's `refused`, which records it.
- A service (`service`): a loop that runs as long as the server does. When it fails it is started again.

Every retry waits longer than the one before, is logged and is counted. A duty that fails DUTY_TRIES times with a defect
is passed to `refused` with INTERNAL. A service that fails SERVICE_TRIES times in a row, each time within a minute, is a
defect that stops the process.
"""

import asyncio
import contextvars
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.store.contract import Duplicate, Replayed

T = TypeVar("T")

Act = Callable[[], Awaitable[None]]
Refused = Callable[[NotecaseError], Awaitable[None]]

log = structlog.get_logger()

BACKOFF = (0.1, 10.0)
"""Seconds between tries, at first and at most."""

DUTY_TRIES = 5
"""A defect that shows every time is not mended by trying on; a passing one is gone within these tries' few seconds."""

SERVICE_TRIES = 10
"""A service that cannot live for a minute ten times in a row leaves the server without a part that it needs."""

HEALTHY_SECONDS = 60.0
"""After a service has run for so long, its failures are counted from 0 again."""


def backoff() -> Iterator[float]:
    """Yields the seconds to wait before each further try: doubling from the first of BACKOFF to the second, spread by a
    fifth so that many that failed together do not come back together."""
    wait, longest = BACKOFF
    while True:
        yield wait * random.uniform(0.8, 1.2)
        wait = min(wait * 2, longest)


def is_own_end() -> bool:
    """Whether a CancelledError that is seen here was asked of this task; otherwise something raised it by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


PASSING = frozenset({v1.ERROR_REASON_STORE_UNAVAILABLE, v1.ERROR_REASON_ISSUER_UNAVAILABLE})


def is_passing(error: BaseException) -> bool:
    """Whether the same work may succeed later without anything being changed."""
    return isinstance(error, NotecaseError) and error.reason in PASSING


def wake(waiter: asyncio.Future[None]) -> None:
    """Sets the result of a future unless it is done."""
    if not waiter.done():
        waiter.set_result(None)


async def patiently(act: Callable[[], Awaitable[T]], passes: Callable[[Exception], bool], seconds: float) -> T:
    """Does again what fails passingly, for about so long. Raises the last failure."""
    until = asyncio.get_running_loop().time() + seconds
    for wait in backoff():
        try:
            return await act()
        except Exception as error:
            if not passes(error) or asyncio.get_running_loop().time() + wait > until:
                raise
        await asyncio.sleep(wait)
    raise AssertionError("it is tried without end")


def to_the_end(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Runs work to its end, and returns its result. A SystemExit or KeyboardInterrupt of something else on the loop,
    such as a task that a tool has made, stops the loop and is logged: the loop is run again, and what awaits that
    task gets the error."""
    task = loop.create_task(work)
    while True:
        try:
            return loop.run_until_complete(task)
        except (SystemExit, KeyboardInterrupt):
            if task.done():
                raise
            log.exception("exit_ignored")


class Tasks:
    """Holds tasks that belong to one owner, which closes them. Keeps each from being garbage collected while it runs,
    and logs one that fails even if nothing asks for its result."""

    def __init__(self, owner: str) -> None:
        """`owner` is its name in the log."""
        self.stuck: Counter[str] = Counter()
        """Tasks that ignored their cancellation, by name."""
        self._owner = owner
        self._tasks: set[asyncio.Task[Any]] = set()
        self._left: set[asyncio.Task[Any]] = set()
        """Those of them that are not waited for any more."""

    def start(self, work: Coroutine[Any, Any, T], name: str = "", *, fresh: bool = False) -> asyncio.Task[T]:
        """Begins work whose end the owner awaits or does not depend on. With `fresh` the log's context is empty there:
        the work does not belong to the call that happened to begin it."""
        context = contextvars.Context() if fresh else None
        task = asyncio.get_running_loop().create_task(work, name=name or None, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._ended, context=context)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._left.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not is_answer(error):
            log.error("task_crashed", owner=self._owner, task=task.get_name(), exc_info=error)

    async def close(self, grace: float = 0.0) -> int:
        """Waits for the tasks for up to `grace` seconds and ends those that are left; returns how many those were."""
        late = self._tasks - self._left
        if late and grace > 0:
            _, late = await asyncio.wait(late, timeout=grace)
        await self.end(late)
        return len(late)

    async def end(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """Cancels tasks of this owner and waits for them. A task that ignores that for STUCK_SECONDS is left running:
        it is logged by name and counted, and is not waited for again."""
        late = {*tasks} - self._left
        for task in late:
            task.cancel()
        if late:
            _, stuck = await asyncio.wait(late, timeout=STUCK_SECONDS)
            for task in stuck:
                log.error("task_stuck", owner=self._owner, task=task.get_name())
                self.stuck[task.get_name()] += 1
            self._left |= stuck


STUCK_SECONDS = 1.0
"""How long a cancelled task may take to end before it is left running. A stop must not wait for code that does not
end."""


def is_answer(error: BaseException) -> bool:
    """Returns whether this is an answer to a caller, and not a defect."""
    return isinstance(error, NotecaseError | Replayed | Duplicate)


class Supervisor:
    """Owns everything in the background of one server."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self.broken: asyncio.Event = asyncio.Event()
        """Set when a service has given up: the process is to end."""
        self.restarts: Counter[str] = Counter()
        """How often something was tried again, by name."""
        self._new_id = new_id
        self._work = Tasks("supervisor")
        self._dutiful_tasks = Tasks("duties")
        self._duties: dict[tuple[str, object], asyncio.Task[None]] = {}
        self._again: dict[tuple[str, object], tuple[Act, Refused]] = {}
        self._services = Tasks("services")
        self._draining = False

    async def whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Carries work out to its end although its caller goes away; returns and raises as the work does. Work that is
        cancelled is a NotecaseError to its caller: SERVER_DRAINING by a stop, INTERNAL otherwise."""
        task, ended = self._work.start(work), asyncio.get_running_loop().create_future()
        task.add_done_callback(lambda _: wake(ended))
        try:
            await ended  # as `asyncio.shield` does, in fewer steps: this alone is cancelled with the caller
            return task.result()
        except asyncio.CancelledError:
            if is_own_end():
                raise
            if self._draining:
                raise errors.cut() from None
            request_id = self._new_id()
            log.exception("work_crashed", request_id=request_id, kind="CancelledError")
            raise errors.internal(request_id) from None

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Begins work whose owner watches it; it is held here and ended by `drain`."""
        return self._work.start(work, name)

    async def end(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """Ends what `start` began: see Tasks.end."""
        await self._work.end(tasks)

    @property
    def stuck(self) -> Counter[str]:
        """Tasks of `start` that went on although they were cancelled, by name."""
        return self._work.stuck

    def duty(
        self,
        name: str,
        about: object,
        act: Act,
        refused: Refused,
    ) -> None:
        """Starts work for which no caller waits. At most one duty of a name runs about one subject; when it is
        requested again in the meantime, it runs once more afterwards. `refused` is called with a permanent refusal;
        temporary failures of `refused` are retried, too."""
        place = (name, about)
        if self._draining:
            return
        if place in self._duties:
            self._again[place] = (act, refused)
            return
        task = self._duties[place] = self._dutiful_tasks.start(self._dutiful(name, act, refused), name, fresh=True)
        task.add_done_callback(lambda _: self._done(place))

    def is_at(self, name: str, about: object) -> bool:
        """Returns whether a duty of that name is running for that subject."""
        return (name, about) in self._duties

    def _done(self, place: tuple[str, object]) -> None:
        del self._duties[place]
        if (again := self._again.pop(place, None)) is not None:
            self.duty(*place, *again)

    async def _dutiful(self, name: str, act: Act, refused: Refused) -> None:
        refusal = await self._tried(name, act)
        if refusal is not None and (again := await self._tried(name, lambda: refused(refusal))) is not None:
            log.error("duty_given_up", duty=name, reason=errors.reason_name(again.reason))

    async def _tried(self, name: str, act: Act) -> NotecaseError | None:
        """Acts until it is done; or returns why it cannot be."""
        broke = 0
        for wait in backoff():
            try:
                await act()
            except NotecaseError as error:
                if not is_passing(error):
                    return error
                log.warning("duty_waits", duty=name, reason=errors.reason_name(error.reason), seconds=round(wait, 2))
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and is_own_end():
                    raise
                broke += 1
                request_id = self._new_id()
                log.exception("duty_crashed", duty=name, tries=broke, request_id=request_id, kind=type(error).__name__)
                if broke == DUTY_TRIES:
                    return errors.internal(request_id)
            else:
                return None
            self.restarts[name] += 1
            await asyncio.sleep(wait)
        raise AssertionError("the waits have no end")

    def service(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Keeps a loop running until `drain`."""
        self._services.start(self._kept(name, run), name, fresh=True)

    async def _kept(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        broke, waits = 0, backoff()
        while broke < SERVICE_TRIES:
            begun = loop.time()
            try:
                await run()
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and is_own_end():
                    raise
                if loop.time() - begun >= HEALTHY_SECONDS:
                    broke, waits = 0, backoff()
                broke += not (isinstance(error, NotecaseError) and is_passing(error))
                wait = next(waits)
                log.exception("service_restarted", service=name, failures=broke, seconds=round(wait, 2))
            else:
                wait = next(waits)
                log.error("service_ended", service=name, seconds=round(wait, 2))
                broke += 1
            self.restarts[name] += 1
            await asyncio.sleep(wait)
        log.critical("service_given_up", service=name, failures=broke)
        self.broken.set()

    async def drain(self, grace: float) -> None:
        """Ends services and duties, which the next process takes up again from the rows, and waits for other work for
        up to `grace` seconds."""
        self._draining = True
        await self._services.close()
        await self._dutiful_tasks.close()
        await self._work.close(grace)

"""Follows a run to its end: shows it, and asks the user for the answers that it waits for."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Literal

from notecase import Client, NotecaseError, Retry, RunStream, v1
from notecase.commands import Commands
from notecase.retry import repeat

from notecase_server.cli import keyboard, screen
from notecase_server.cli.connection import connection
from notecase_server.cli.reply import Quiet, Reply
from notecase_server.cli.waits import QUESTION, Wait, caller_of, may_answer, waits_of

TOOL_PATIENCE = 2.0
"""Seconds that a call may wait for the program that has the tool before the user is asked for its result."""

AWAY_SECONDS = 300.0
"""How long a run that has started is attached to again while its server is away, after the client's own tries. A
server that is replaced, or whose store is, may take minutes."""

AGAIN_SECONDS = 2.0
"""Between two of these tries."""

PATIENT = Retry(tries=90)
"""How long an answer is sent again: four to six minutes."""

PIPE_PATIENCE = 10.0
"""Seconds that a run may wait for anything when there is no terminal."""


class Left(Exception):  # nothing went wrong
    """The run waits, and is left waiting; the message says for what and how it is answered."""

    def __init__(self, found: Sequence[tuple[Wait, bool]]) -> None:
        """Each comes with whether the caller may answer it."""
        super().__init__(_hints(found))
        self.waits = [wait for wait, _ in found]


class Follower:
    """One run, shown up to its end. Ctrl-C cancels it; a second one, one before the server has answered at all, or one
    while the run waits, lets go of it."""

    def __init__(
        self,
        client: Client,
        stream: RunStream,
        *,
        echo: bool = False,
        patience: float | None = None,
        quiet: bool = False,
    ) -> None:
        """With `echo`, messages of users are shown, too; with `quiet` not even the reply is. At a terminal the run may
        wait for `patience` seconds (TOOL_PATIENCE if None) for the result of a caller's tool before the user is asked
        for it. Without a terminal it may wait so long (PIPE_PATIENCE if None) for anything."""
        self._client = client
        self._stream = stream
        stream.warn_after = None  # the terminal shows what the run waits for
        self._asks = sys.stdin.isatty() and sys.stdout.isatty()
        usual = TOOL_PATIENCE if self._asks else PIPE_PATIENCE
        self._patience = usual if patience is None else patience
        self._reply = Quiet(stream) if quiet else _reply(stream, echo)
        self._held: list[v1.Event] = []  # received while the user is asked
        self._changed = asyncio.Event()
        self._asking: tuple[Wait, asyncio.Task[bool]] | None = None
        self._sending = False  # the user has answered, and the answer is on its way
        self._seen: dict[str, Literal["answered", "left", "others"]] = {}  # waits, and who answers them
        self._stopping: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None

    async def follow(self) -> bool:
        """Returns True once the run has ended, or False when the user has let go of it or cancelled it. Raises
        NotecaseError also when the run fails, Left when it is left waiting, and KeyboardInterrupt at Ctrl-C without a
        terminal."""
        self._following = asyncio.create_task(self._follow())
        with keyboard.on_interrupt(self._interrupt), keyboard.hushed(self._asks):
            await asyncio.wait([self._following])
        gone = self._following.cancelled()
        if not gone and isinstance(failed := self._following.exception(), OSError):
            raise failed  # nothing can be written any more
        self._reply.end()
        if self._stopping is not None:
            self._stopping.cancel()
        if not gone:
            self._following.result()
        elif self._asks and (left := self._open()):
            raise Left(left)
        elif self._asks:
            screen.aside("Stopped following; what has reached the server continues there.")
        if (self._stopping or gone) and not self._asks:
            raise KeyboardInterrupt
        if gone:
            return False
        if self._stream.result.state == v1.Run.STATE_FAILED:
            raise NotecaseError.from_proto(self._stream.result.error)
        return self._stream.result.state == v1.Run.STATE_SUCCEEDED

    def _interrupt(self) -> None:
        run = self._stream.view.runs.get(self._stream.name)
        waits = run is not None and run.state == v1.Run.STATE_WAITING
        if self._stream.name and not self._stopping and not waits:
            self._stopping = asyncio.create_task(self._stop())
        elif self._following is not None:
            self._following.cancel()

    async def _stop(self) -> None:
        try:
            await self._stream.cancel("Ctrl-C")
        except NotecaseError as error:
            if error.reason != "RUN_ENDED":  # it was faster
                self._reply.note(screen.sentence(error, connection()[0]))

    def _waits(self) -> list[Wait]:
        run = self._stream.view.runs.get(self._stream.name)
        return waits_of(run) if run is not None else []

    async def _follow(self) -> None:
        async with self._stream:
            self._reply.start()
            tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._answer())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            self._resume()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        until = None
        while True:
            try:
                async for event in self._stream:
                    until = None
                    self._take(event)
                return
            except NotecaseError as error:
                until = until or loop.time() + AWAY_SECONDS
                if error.code.name != "UNAVAILABLE" or not self._stream.name:
                    raise
                if loop.time() > until:
                    where = self._stream.session.removeprefix("sessions/")
                    self._reply.note(
                        f"{self._stream.name} continues there; `notecase chat --session {where}` shows it."
                    )
                    raise
                await asyncio.sleep(AGAIN_SECONDS)

    def _take(self, event: v1.Event) -> None:
        if self._asking is None:
            self._reply.show(event)
        else:
            self._held.append(event)
            wait, task = self._asking
            if not self._sending and not task.cancelling() and wait.id not in {one.id for one in self._waits()}:
                task.cancel()
        self._changed.set()

    async def _answer(self) -> None:
        """Asks for everything that the run waits for, one after the other. Raises Left when the user leaves it
        waiting."""
        self._changed.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            while wait := next((one for one in self._waits() if one.id not in self._seen), None):
                if await self._settled_elsewhere(wait):
                    continue
                caller = await repeat(PATIENT, lambda: caller_of(self._client))
                if wait.id not in {one.id for one in self._waits()}:
                    continue  # answered meanwhile
                if not self._asks:
                    raise Left([(one, may_answer(caller, one)) for one in self._waits()])
                if may_answer(caller, wait):
                    await self._ask(wait)
                else:
                    self._seen[wait.id] = "others"
                    self._tell(wait)
            # An answer is on its way until the run no longer waits for it, and may bring the next thing to ask.
            if {"left"} <= {self._seen[one.id] for one in self._waits()} <= {"left", "others"}:
                raise Left(self._open())

    def _open(self) -> list[tuple[Wait, bool]]:
        """Returns the unanswered inputs and calls, each with whether this caller may answer it."""
        seen = [(one, self._seen.get(one.id)) for one in self._waits()]
        return [(one, told != "others") for one, told in seen if told != "answered"]

    async def _settled_elsewhere(self, wait: Wait) -> bool:
        """Waits for a program that has the tool, or without a terminal for anybody. Returns whether it was answered."""
        if self._asks and wait.asked is not None:
            return False
        try:
            async with asyncio.timeout(self._patience):
                while wait.id in {one.id for one in self._waits()}:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.set()
        return True

    async def _ask(self, wait: Wait) -> None:
        from notecase_server.cli import answering  # noqa: PLC0415  # only a terminal needs it

        def sending(now: bool) -> None:
            self._sending = now
            if now:
                keyboard.catch_interrupt(self._interrupt)

        self._reply.end()
        self._sending = False
        task = asyncio.create_task(answering.answer(Commands(self._client.runs, PATIENT), wait, sending))
        self._asking = (wait, task)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:  # the run has ended, perhaps before the question was gone, or its stream is lost
            task.cancel()
            await asyncio.wait([task])
            raise
        finally:
            keyboard.catch_interrupt(self._interrupt)
            if task.cancelled() and wait.id not in {one.id for one in self._waits()}:
                screen.aside("The run no longer waits for this.")
        self._seen[wait.id] = "answered" if task.cancelled() or task.result() else "left"
        self._resume()

    def _resume(self) -> None:
        """Shows what happened while the user was asked."""
        self._asking = None
        self._reply.start()
        held, self._held = self._held, []
        for event in held:
            self._reply.show(event)

    def _tell(self, wait: Wait) -> None:
        """Says that others are waited for."""
        self._reply.note(f"This waits for {wait.who}: {wait.describe()}. Ctrl-C leaves it waiting.")


def _reply(stream: RunStream, echo: bool) -> Reply:
    if not sys.stdout.isatty():
        return Reply(stream, echo)
    from notecase_server.cli.live import LiveReply  # noqa: PLC0415  # only a terminal needs rich's Markdown

    return LiveReply(stream, echo)


def _hints(found: Sequence[tuple[Wait, bool]]) -> str:
    """Returns a sentence for each thing that the run waits for: what it is, the command that answers it, and how many
    there are if several. Each comes with whether the caller may approve it."""
    told = [_hint(wait, mine, f" --id {wait.id}" if len(found) > 1 else "") for wait, mine in found]
    if len(found) > 1:
        told.append(f"{len(found)} things wait; `notecase inbox {_where(found[0][0])}` lists them.")
    return "\n".join(told)


def _where(wait: Wait) -> str:
    return wait.run.removeprefix("sessions/").partition("/")[0]


def _hint(wait: Wait, mine: bool, which: str) -> str:
    where = f"{_where(wait)}{which}"
    if wait.asked is None:
        return f"The run waits for a client tool: {wait.describe()}. Answer with `notecase answer {where} TEXT`."
    if wait.kind == QUESTION:
        return f"The run waits for an answer: {wait.describe()} Answer with `notecase answer {where} TEXT`."
    whose = "your approval" if mine else f"{wait.who} to approve"
    return f"The run waits for {whose}: {wait.describe()}. Use `notecase approve {where}` or `notecase deny {where}`."

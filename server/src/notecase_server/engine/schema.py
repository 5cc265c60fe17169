"""Applies JSON Schemas from untrusted callers to replies, within limits.

A few references to one another make a schema that takes practically forever, and no library limits that. So each check
is done in a process that is killed when it does not answer in time; a defect of the library ends only that process. It
is started when first needed, and kept.
"""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import structlog
from google.protobuf.struct_pb2 import NULL_VALUE
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.supervisor import Tasks, backoff

T = TypeVar("T")

log = structlog.get_logger()

SECONDS = 2.0
"""Of the processor's time, for one answer. 100 KB of JSON take a hundredth of a second."""

START_SECONDS = 30.0
"""For a process to start or to answer on a busy machine: what takes longer is not caused by a schema."""

MAX_WAITING = 64
"""Callers with a schema who may wait. Runs wait in addition; their number has its own limit."""

WORKERS = 2
"""Concurrent processes. A slow schema delays other replies for that time."""

WORKER = "notecase_server.engine.schema_worker"

_INT64 = 1 << 63


class Schemas:
    """What judges schemas and replies. One object serves all runs; used from one event loop only."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._room = asyncio.Semaphore(WORKERS)
        self._waiting = 0
        # Separate threads: in the shared ones a check would wait for unrelated work.
        self._threads = ThreadPoolExecutor(WORKERS + 1, "schemas")
        # The ends of processes: whoever waits for an answer may be cancelled, more than once.
        self._ends = Tasks("schemas")

    async def require(self, field: str, schema: str) -> None:
        """Raises NotecaseError INVALID_FIELD when the text is not a JSON Schema, or is one that cannot be used here;
        RATE_LIMITED when the server cannot check it at present."""
        if schema and (problem := await self._asked({"schema": schema})):
            raise errors.invalid([errors.Violation(field, f"is not a JSON Schema (draft 2020-12): {problem}")])

    async def require_valid(self, field: str, schema: str, text: str) -> None:
        """Raises NotecaseError INVALID_FIELD when the text does not match the schema; RATE_LIMITED when the server
        cannot check it at present."""
        if problem := await self._asked({"schema": schema, "reply": text}):
            raise errors.invalid([errors.Violation(field, f"does not match the schema: {problem}")])

    async def _asked(self, question: Mapping[str, str]) -> str:
        """Returns the answer for a caller, who does not wait behind many others."""
        if self._waiting >= MAX_WAITING:
            raise errors.too_busy("check schemas")
        self._waiting += 1
        try:
            return await self._ask(question)
        finally:
            self._waiting -= 1

    async def problem(self, schema: str, reply: str | None) -> str:
        """Describes the mistakes in a reply (for None: in the schema itself) for its author: in at most about a
        kilobyte, without values. Empty when it is valid. Waits while the server cannot check it."""
        if reply == "":
            return "it is empty"
        question = {"schema": schema} if reply is None else {"schema": schema, "reply": reply}
        for wait in backoff():
            try:
                return await self._ask(question)
            except NotecaseError as error:
                log.warning("schemas_wait", reason=errors.reason_name(error.reason), seconds=round(wait, 2))
            await asyncio.sleep(wait)
        raise AssertionError("the waits have no end")

    async def close(self) -> None:
        """Ends the processes. Idempotent."""
        while self._idle:
            await self._idle.pop().end()
        await self._ends.close(START_SECONDS)
        self._threads.shutdown(wait=False)

    async def _ask(self, question: Mapping[str, str]) -> str:
        async with self._room:
            worker = self._idle.pop() if self._idle else await self._started()
            if worker.dead:  # killed from outside meanwhile
                await worker.end()
                worker = await self._started()
            answer = await worker.ask(question, SECONDS)
            if answer is None:
                log.warning("schema_not_answered", schema_bytes=len(question["schema"]))
                return f"it cannot be checked against the schema within {SECONDS:g} seconds"
            self._idle.append(worker)
            return answer

    async def _started(self) -> "_Worker":
        """Returns a process that has answered once, so that its start does not count as a schema's time. RATE_LIMITED
        when the system cannot start another."""
        make = asyncio.get_running_loop().run_in_executor(self._threads, _Worker, self._threads, self._ends)
        try:
            worker = await asyncio.shield(make)
        except asyncio.CancelledError:  # the process starts all the same
            self._ends.start(_discard(make), "discard")
            raise
        except OSError as error:
            log.error("schema_process_not_started", error=type(error).__name__, number=error.errno)
            raise errors.too_busy("check schemas") from error
        if await worker.ask({"schema": "{}"}, START_SECONDS) is None:
            raise RuntimeError("the process that checks schemas cannot be started")
        return worker


async def _discard(make: "asyncio.Future[_Worker]") -> None:
    await asyncio.wait([make])
    if make.exception() is None:
        await make.result().kill()


class _Worker:
    """One process. Its pipes are waited for in threads: a loop's own way to start a process forks, which a process that
    serves gRPC in other threads must not."""

    def __init__(self, threads: ThreadPoolExecutor, ends: Tasks) -> None:
        """Starts a process, which blocks for as long as that takes. OSError when the system cannot start another."""
        self._threads = threads
        self._ends = ends
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={},  # the server's secrets are in its own
            start_new_session=True,  # Ctrl-C is for the server, which then ends it
        )

    @property
    def dead(self) -> bool:
        return self._process.poll() is not None

    async def ask(self, question: Mapping[str, str], seconds: float) -> str | None:
        """The answer, for which it may work so long. None when it died of the question; NotecaseError RATE_LIMITED when
        it got no turn to answer. It is then at its end, either way."""
        encoded = msgspec.json.encode({**question, "seconds": seconds})
        exchange = self._in_thread(lambda: self._exchange(encoded))
        line, late = b"", False
        try:
            done, _ = await asyncio.wait([exchange], timeout=START_SECONDS)
            line, late = (exchange.result(), False) if done else (b"", True)
        finally:
            if not line:
                await asyncio.shield(self._ends.start(self.kill(exchange), "kill"))
        if late:
            raise errors.too_busy("check schemas")
        return msgspec.json.decode(line, type=str) if line else None

    def _in_thread(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _exchange(self, question: bytes) -> bytes:
        """Its line, or nothing when it dies."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(question + b"\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return b""

    async def kill(self, *exchanges: "asyncio.Future[bytes]") -> None:
        """Ends it at once, even in the middle of an exchange."""
        self._process.kill()
        if exchanges:
            await asyncio.wait(exchanges)
        await self.end()

    async def end(self) -> None:
        """Closes its input, at which it ends, and waits for that."""
        await self._in_thread(self._process.communicate)


def value_of(reply: str) -> v1.Value:
    """A valid reply as state holds it. Whole numbers beyond 64 bits are doubles, as to most readers of JSON."""
    return _value(msgspec.json.decode(reply))


def _value(plain: Any) -> v1.Value:
    match plain:
        case None:
            return v1.Value(null_value=NULL_VALUE)
        case bool():
            return v1.Value(bool_value=plain)
        case int() if -_INT64 <= plain < _INT64:
            return v1.Value(int_value=plain)
        case int() | float():
            return v1.Value(double_value=float(plain))
        case str():
            return v1.Value(string_value=plain)
        case Sequence():
            return v1.Value(list_value=v1.ValueList(values=map(_value, plain)))
        case _:
            return v1.Value(map_value=v1.ValueMap(values={key: _value(held) for key, held in plain.items()}))

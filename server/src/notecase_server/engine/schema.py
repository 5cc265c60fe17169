"""Applies JSON Schemas from untrusted callers to replies, within limits.

A few references to one another make a schema that takes practically forever, and no library limits that. So each check
is done in a process that is killed when it does not answer in time; a defect of the library ends only that process. It
is started when first needed, and kept.
"""

import asyncio
import re
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
from notecase_server.supervisor import backoff

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
        """Returns what is wrong with a reply (for None: with the schema itself) in words for its author: at most about
        a kilobyte, without values. Empty when it is valid. Waits while the server cannot check it."""
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
        self._threads.shutdown(wait=False)

    async def _ask(self, question: Mapping[str, str]) -> str:
        async with self._room:
            worker = self._idle.pop() if self._idle else await self._started()
            if worker.dead:  # killed by somebody meanwhile
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
        try:
            worker = await asyncio.get_running_loop().run_in_executor(self._threads, _Worker, self._threads)
        except OSError as error:
            log.error("schema_process_not_started", error=type(error).__name__, number=error.errno)
            raise errors.too_busy("check schemas") from error
        if await worker.ask({"schema": "{}"}, START_SECONDS) is None:
            raise RuntimeError("the process that checks schemas cannot be started")
        return worker


class _Worker:
    """One process. Its pipes are waited for in threads: a loop's own way to start a process forks, which a process that
    serves gRPC in other threads must not."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        """Starts a process, which blocks for as long as that takes. OSError when the system cannot start another."""
        self._threads = threads
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
                self._process.kill()
                await asyncio.wait([exchange])
                await self.end()
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

    async def end(self) -> None:
        """Closes its input, at which it ends, and waits for that."""
        await self._in_thread(self._process.communicate)


_FENCES = frozenset({"```", "```json", "```json5", "```jsonc"})

_BEGINS_JSON = frozenset('{["-0123456789`')

_AROUND = "` \t\r\n"
"""The characters of a fence and of the space around JSON."""

_HELD_PROSE = 16 << 10
"""Characters before a fence that are waited for, and characters after it that are kept: a sentence or two."""


_BLANK = re.compile(r"\s*")


def _blank_until(text: str, start: int) -> int:
    found = _BLANK.match(text, start)
    return found.end() if found else start


class Unfenced:
    """Removes from a reply's JSON, piece by piece, what models put around it: a fence, "```json" before it and "```"
    after it, and words outside of the fence.

    Text that may belong to the fence is held back until more arrives, so that no text is ever withdrawn, and all of it
    joined is the reply. Words without a fence stay: they are not JSON, which the model is then told."""

    def __init__(self) -> None:
        self.held = 0
        """Characters that were taken and not returned, including those after the closing fence, which are not kept."""
        self._held: list[str] = []
        self._begun = False
        self._fenced = False
        self._closed = False
        self._again = False
        """Another fence has followed the closing one."""
        self._last = ""
        """The last two characters after the closing fence."""

    def feed(self, piece: str) -> str:
        """As much of the reply as is certain."""
        if self._closed:
            self._behind(piece)
            return ""
        if self._begun and not piece.strip(_AROUND):
            ends_fence = self._fenced and "\n```" in "".join(self._held[-3:])[-3:] + piece
            if not ends_fence:
                self._hold(piece)
                return ""
        text = self._taken() + piece
        if not self._begun:
            found = self._begin(text)
            if found is None:
                self._hold(text)
                return ""
            text = found
            self._begun = bool(text) or self._fenced
        if self._fenced:
            # No string of JSON holds a line break, so that this is the fence.
            inner, closed, behind = text.partition("\n```")
            if closed:
                self._closed = True
                self._behind(behind)
                return inner.rstrip()
        sure = text.rstrip(_AROUND)
        self._hold(text[len(sure) :])
        return sure

    def _hold(self, piece: str) -> None:
        if piece:
            self._held.append(piece)
            self.held += len(piece)

    def _behind(self, piece: str) -> None:
        """Takes the text after the closing fence, of which only the beginning is kept."""
        joint = self._last + piece
        self._again = self._again or "```" in joint
        self._last = joint[-2:]
        if self.held < _HELD_PROSE:
            self._held.append(piece[:_HELD_PROSE])
        self.held += len(piece)

    def _begin(self, text: str) -> str | None:
        """Returns the text after the opening fence, or all of it if it begins like JSON. None while that is not
        known."""
        start = _blank_until(text, 0)
        while start < len(text) and text[start] not in _BEGINS_JSON:
            thought = text.find("</think>", start)
            if thought < 0:
                break
            start = _blank_until(text, thought + len("</think>"))  # opened in the prompt, where the template has it
        text = text[start:]
        if not text:
            return ""
        if text[0] == "`":
            return self._behind_fence(text, "")
        if text[0] in _BEGINS_JSON:
            return text
        words, fence, rest = text.partition("\n```")
        if fence:
            return self._behind_fence(fence[1:] + rest, words + "\n")
        return None if len(text) < _HELD_PROSE else text

    def _behind_fence(self, text: str, words: str) -> str | None:
        line, end, rest = text.partition("\n")
        if not end and len(line) <= len("```json5\r"):
            return None
        if line.strip().lower() in _FENCES:
            self._fenced = True
            return rest
        return words + text

    def words(self) -> str:
        """Returns the text that was held back as a possible fence, once a call shows that it is separate text."""
        if self._begun:
            return ""
        words = self._taken()
        self._begun = bool(words.strip())
        return words

    def _taken(self) -> str:
        held = "".join(self._held)
        self._held, self.held = [], 0
        return held

    def end(self) -> str:
        """The rest, once the reply is whole."""
        rest = self._taken().rstrip()
        if self._closed:
            # Words after the fence are left out; with another fence there is more than one reply.
            return f"\n```{rest}" if self._again else ""
        return rest.removesuffix("```").rstrip() if self._fenced else rest


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

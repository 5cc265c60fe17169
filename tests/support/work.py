"""What a server in this process does for one call, counted: the counts are the same on every machine."""

import base64
import hashlib
import sqlite3
import sys
import threading
from asyncio import events
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import msgspec
import pytest
from notecase_server.rpc.caller import caller
from notecase_server.rpc.check import Check
from notecase_server.store.sqlite.tables import SqliteTables

from tests.support.server import Running

COUNTED: Mapping[str, str] = {
    "calls": "function calls within one callback of the loop, at most",
    "bytes": "bytes hashed, read from JSON, or written as JSON or base64 at once on the loop, at most",
    "steps": "steps of the look at requests",
    "violations": "violations found",
    "handovers": "times that the store was asked for something",
    "writes": "those of them that may have changed something",
    "statements": "statements of SQL",
}


class Work(dict[str, int]):
    """The counts, by the keys of COUNTED."""

    def __init__(self, path: str) -> None:
        super().__init__(dict.fromkeys(COUNTED, 0))
        self._method = f"/{path}"
        self._loop = threading.get_ident()

    @property
    def mine(self) -> bool:
        """Whether what is under way here is done for the call, or was begun by it."""
        who = caller.get(None)
        return who is not None and who.method == self._method

    @property
    def others(self) -> bool:
        """Whether it is done for a call of another method. What a worker does for a run is done for none."""
        who = caller.get(None)
        return who is not None and who.method != self._method

    @property
    def on_loop(self) -> bool:
        return threading.get_ident() == self._loop

    def most(self, what: str, number: int) -> None:
        self[what] = max(self[what], number)


_STEPPING: dict[int, Work] = {}
"""The caller for which the store takes a step, by the thread of the step."""


@contextmanager
def counting_statements() -> Iterator[None]:
    """Lets `counted` see the statements of stores that are opened within the block."""

    def seen(execute: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(statement: str, values: Any = ()) -> Any:
            if (work := _STEPPING.get(threading.get_ident())) is not None:
                work["statements"] += 1
            return execute(statement, values)

        return wrapped

    begin = SqliteTables.__init__

    def beginning(tables: SqliteTables, connection: sqlite3.Connection) -> None:
        begin(tables, connection)
        tables._execute, tables._executemany = seen(tables._execute), seen(tables._executemany)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SqliteTables, "__init__", beginning)
        yield


@contextmanager
def counted(served: Running, path: str) -> Iterator[Work]:
    """Counts what the server does for calls of that method until the block is left."""
    work = Work(path)
    with pytest.MonkeyPatch.context() as patch:
        _count_calls(work, patch)
        _count_bytes(work, patch)
        _count_steps(work, patch)
        _count_handovers(work, served.server._store, patch)
        yield work


def instructions(act: Callable[[], object]) -> int:
    """Counts the instructions of Python that a function takes: unlike calls, they show a loop within a loop."""
    count, before = 0, sys.gettrace()

    def traced(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        frame.f_trace_opcodes = True
        return traced

    sys.settrace(traced)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def _count_calls(work: Work, patch: pytest.MonkeyPatch) -> None:
    run = events.Handle._run
    calls = 0

    def called(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    def counting(handle: events.Handle) -> None:
        nonlocal calls
        calls = 0
        sys.setprofile(called)
        try:
            run(handle)
        finally:
            sys.setprofile(None)
        if not handle._context.run(lambda: work.others):  # type: ignore[attr-defined]
            work.most("calls", calls)

    patch.setattr(events.Handle, "_run", counting)


def _count_bytes(work: Work, patch: pytest.MonkeyPatch) -> None:
    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(data: Any = b"", *rest: Any, **named: Any) -> Any:
            if work.on_loop and not work.others:
                work.most("bytes", len(data))
            return function(data, *rest, **named)

        return wrapped

    for module, name in ((hashlib, "sha256"), (base64, "b64encode"), (msgspec.json, "decode")):
        patch.setattr(module, name, counting(getattr(module, name)))
    encode = msgspec.json.encode

    def encoding(value: Any, **options: Any) -> bytes:
        made = encode(value, **options)
        if work.on_loop and not work.others:
            work.most("bytes", len(made))
        return made

    patch.setattr(msgspec.json, "encode", encoding)


def _count_steps(work: Work, patch: pytest.MonkeyPatch) -> None:
    found, sound = Check.__call__, Check.value

    def checked(check: Check, ok: bool, field: str, description: str) -> bool:
        if work.mine:
            work["steps"] += 1
            work["violations"] += not ok
        return found(check, ok, field, description)

    def looked(check: Check, *arguments: Any, **named: Any) -> None:
        before = check.visited
        try:
            sound(check, *arguments, **named)
        finally:
            if work.mine:
                work["steps"] += check.visited - before

    patch.setattr(Check, "__call__", checked)
    patch.setattr(Check, "value", looked)


def _count_handovers(work: Work, store: Any, patch: pytest.MonkeyPatch) -> None:
    def counting(ask: Callable[..., Any], written: int) -> Callable[..., Any]:
        async def wrapped(step: Callable[..., Any], *within: Any, **how: Any) -> Any:
            if not work.mine:
                return await ask(step, *within, **how)
            work["handovers"] += 1
            work["writes"] += written
            return await ask(stepped(step), *within, **how)

        return wrapped

    def stepped(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            _STEPPING[threading.get_ident()] = work
            try:
                return step(*arguments)
            finally:
                del _STEPPING[threading.get_ident()]

        return wrapped

    patch.setattr(store, "_read", counting(store._read, 0))
    patch.setattr(store, "_write", counting(store._write, 1))

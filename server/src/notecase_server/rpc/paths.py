"""Keeps the server alive when the path of a call is not UTF-8.

grpc decodes the path in the task that accepts all calls, and a path that is not UTF-8 ends that task: one such call of
anybody closes the server's port for all. Nothing of a call can be seen or refused before. So in that task alone, what
is not UTF-8 is replaced, and the call ends as one of an unknown method does.
"""

import asyncio
import codecs

_ACCEPTING = "_server_main_loop"
"""The name of the coroutine that accepts calls."""


def tolerate_any_path() -> None:
    """Changes how the process decodes text that is not valid, in grpc's task alone. May be called again."""
    codecs.register_error("strict", _decode)


def _decode(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeDecodeError) and _accepts_calls():
        return codecs.replace_errors(error)
    raise error


def _accepts_calls() -> bool:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # outside of a loop
        return False
    return task is not None and getattr(task.get_coro(), "__name__", "") == _ACCEPTING

"""How the threads of a server share the interpreter."""

import asyncio
import sys
from typing import Any, NoReturn, cast

import pytest
from notecase_server import serve


def test_a_server_switches_threads_more_often_than_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit takes the interpreter again after each statement, while another thread computes."""
    before, default = sys.getswitchinterval(), 0.005
    sys.setswitchinterval(default)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")

    def stopped(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "Runner", stopped)
    try:
        with pytest.raises(KeyboardInterrupt):
            serve.run(cast("Any", None))
        assert sys.getswitchinterval() < default
    finally:
        sys.setswitchinterval(before)

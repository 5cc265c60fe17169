"""Ends a process whose test hangs where its time-out does not help: in code that ignores the exception that the
time-out raises, or in what is cleaned up after it.

The time-out of pytest is raised once for a test. What hangs after that would never end, and nothing would show
where. So each phase of a test has a second limit, kept by a thread that does not need the interpreter. It writes the
tracebacks of all threads to standard error and ends the process; `pytest -n` then names the test, fails it and runs the
others.
"""

import faulthandler
import os
import sys

import pytest

AFTER_TIMEOUT = 360.0
"""Seconds that a phase may take beyond the time-out of its test. A busy machine must not get here: the whole of the
slowest test takes 65 s on one, and the time-out is 240 s."""

_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    assert sys.__stderr__ is not None
    config.stash[_STDERR] = os.dup(sys.__stderr__.fileno())  # not the one that pytest captures


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.cancel_dump_traceback_later()
    os.close(config.stash[_STDERR])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _limit(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _limit(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    _limit(item)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    faulthandler.cancel_dump_traceback_later()


def _limit(item: pytest.Item) -> None:
    """Starts the limit of the next phase. pytest ends it when a debugger is entered."""
    marker = item.get_closest_marker("timeout")
    timeout = marker.args[0] if marker is not None else getattr(item.config, "_env_timeout", 0)
    if timeout:
        faulthandler.dump_traceback_later(timeout + AFTER_TIMEOUT, exit=True, file=item.config.stash[_STDERR])

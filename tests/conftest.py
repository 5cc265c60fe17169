"""What every test may count on: the tools that callers use, and that CI skips nothing in silence."""

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.support import failing

pytest_plugins = ("tests.hanging",)

SEED = "NOTECASE_SEED"
"""The variable with the number by which cases are made up."""

SHUFFLE = "NOTECASE_SHUFFLE"
"""The variable that, when it is set, puts the tests in an order that the seed decides."""

# How long an example takes, or its making, says how busy the machine is; what hangs is the time-out's to find.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# CI looks at the same made-up cases each time, so that what it says is of the change; it looks at others in one run
# more, by a seed. Everywhere else the cases are new ones.
settings.register_profile("ci", derandomize=True, database=None)
if os.environ.get("CI") and not os.environ.get(SEED):
    settings.load_profile("ci")

if not os.environ.get("CI"):
    os.environ.setdefault(SEED, str(random.SystemRandom().randrange(1 << 32)))  # for the processes of xdist as well


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Hands the seed to hypothesis, unless pytest was given another one for it. Takes SIGINT where it is ignored, as in
    a background job of a shell: the programs that tests start and interrupt would ignore it, too, and never end."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if (seed := os.environ.get(SEED)) and config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = seed


def pytest_report_header() -> str:
    seed = os.environ.get(SEED)
    return f"seed: {seed} ({SEED}={seed} makes up the same cases)" if seed else "seed: none, the cases are fixed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffles the tests alike in every process of one run."""
    if os.environ.get(SHUFFLE):
        random.Random(os.environ[SEED]).shuffle(items)


# A command that runs within a test sets up the log. A logger that it made keep that setup would ignore capture_logs in
# the tests after it.
configure_log = structlog.configure


def _configure_for_one_test(**settings: Any) -> None:
    configure_log(**settings | {"cache_logger_on_first_use": False})


structlog.configure = _configure_for_one_test  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _the_log_stays_as_it_was() -> Iterator[None]:
    before = structlog.get_config()
    yield
    configure_log(**before)


@pytest.fixture(autouse=True)
def _every_fault_comes() -> Iterator[None]:
    """Fails a test in which a store should have failed and did not."""
    failing.unfired.clear()
    yield
    assert [] == [str(left) for left in failing.unfired]


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Finds the path of a real tool by its name: the one that `make test` built, or the system's. Skips the test when
    there is none."""

    def find(name: str) -> str:
        beside = Path(sys.executable).parent
        found = shutil.which(name, path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
        if found is None:
            pytest.skip(f"needs {name}, which is not here; make tools builds it where Go is")
        return found

    return find


@pytest.fixture(scope="session")
def grpcurl(tool: Callable[[str], str]) -> str:
    """The path of the real grpcurl."""
    return tool("grpcurl")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker for each processor; two where there is but one, since many tests wait for a process that they start, and
    no more than four, since some take a few hundred MB."""
    return max(2, min(os.cpu_count() or 1, 4))


def forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI a test that did not run proves nothing, so a skip fails there. An expected failure is no skip."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"CI runs every test, and this one was skipped. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    forbid_skip(report)
    return report

"""Runs the tests of tests/e2e with the seeds 1 to 5, each in a different order, while two processes use the CPUs: tests
that depend on the speed of the machine fail here. No test is run twice, and no time-out is longer than usual."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.promises import ROOT

SPINNING = 2

REPORT_LINES = 200
"""Of what pytest says at the end of a run that failed: which tests did, and why."""

SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    pass
"""


def main() -> int:
    """Prints a line for each run, and behind it why tests failed; returns how many runs failed."""
    parser = argparse.ArgumentParser(prog="make test-hard", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("tests", nargs="*", default=["tests/e2e"])
    chosen = parser.parse_args()
    say(f"{', '.join(chosen.tests)} besides {SPINNING} processes that spin")
    with spinning():
        return sum(not passes(seed, chosen.tests) for seed in chosen.seeds)


def passes(seed: int, tests: list[str]) -> bool:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, "NOTECASE_SEED": str(seed), "NOTECASE_SHUFFLE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines() or ["pytest said nothing"]
    say(f"seed {seed}: {lines[-1].strip('= ')} ({time.monotonic() - begun:.0f} s in all)")
    for line in lines[-REPORT_LINES:] if done.returncode else ():
        say(f"  {line}")
    return done.returncode == 0


@contextmanager
def spinning() -> Iterator[None]:
    spinners = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(SPINNING)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main() > 0)

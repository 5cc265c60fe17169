"""Breaks each promise in a copy of the checkout, and expects a test to notice. `make mutants ARGS="rpc/watch"` does so
for those whose file or text has the words."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.promises import ROOT, Mutation, promises

SECONDS = "60"
"""After which a test that a mutation makes hang has failed: what is waited for will not come."""


def main(words: list[str]) -> int:
    """Prints a line for each mutation; returns how many survived."""
    chosen = [
        mutation
        for promise in promises()
        for mutation in promise.mutations
        if not words or any(word in f"{mutation.file} {mutation.text}" for word in words)
    ]
    survived = 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "checkout"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "node_modules")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for mutation in chosen:
            begun = time.monotonic()
            verdict = judge(copy, mutation)
            survived += verdict != "caught"
            line = (mutation.text.strip().splitlines() or [""])[0]
            say(f"{verdict:9} {time.monotonic() - begun:4.0f} s  {mutation.file}: {line}")
    say(f"{len(chosen) - survived} of {len(chosen)} mutations were caught.")
    return survived


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def judge(copy: Path, mutation: Mutation) -> str:
    """Whether a test fails by the mutation: "caught", "SURVIVED", or "BROKEN" when the tests could not be run."""
    file = copy / mutation.file
    source = file.read_text()
    file.write_text(mutation.applied(source))
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-n0", "-x", "-q", "--timeout", SECONDS),
                *("-p", "no:cacheprovider", *mutation.fails),
            ],
            cwd=copy,
            env={**os.environ, "CI": "", "PYTHONPATH": f"{copy / 'client/src'}{os.pathsep}{copy / 'server/src'}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    finally:
        file.write_text(source)
    return {0: "SURVIVED", 1: "caught"}.get(done.returncode, "BROKEN")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)

"""The suite of a store's promises runs on a third party's store, in its directory, and finds what it breaks."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.store import suite

ROOT = Path(__file__).parent.parent.parent

(EXAMPLE,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "stores.md").read_text(), re.DOTALL)
"""The file that docs/stores.md shows."""

STORE = """
from notecase_server.store.memory import MemoryStore

class MyStore(MemoryStore):
    @classmethod
    async def open(cls, path, clock):
        return cls(clock)
"""

FORGETFUL = """
    async def recall_command(self, key, command):
        pass
"""


def passes_the_suite(directory: Path, store: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the suite there, without this repository's settings and conftests, on a store with that source."""
    (directory / "my_store.py").write_text(store)
    (directory / "test_my_store.py").write_text(EXAMPLE)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *options,
            "test_my_store.py",
        ],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_file_that_is_shown_is_short() -> None:
    assert 10 >= sum(bool(line) and "import" not in line for line in EXAMPLE.splitlines())


def test_the_suite_checks_every_promise_on_a_third_partys_store(tmp_path: Path) -> None:
    done = passes_the_suite(tmp_path, STORE)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert 0 == done.returncode, done.stdout
    assert int(passed[1]) >= len(suite.PROMISES) > 150


def test_a_store_that_breaks_a_promise_fails_by_its_name(tmp_path: Path) -> None:
    """Of those about what is repeated, the ones about commands, and no others."""
    done = passes_the_suite(tmp_path, STORE + FORGETFUL, "-k", "recall or repeat or command")
    assert 1 == done.returncode, done.stdout
    failed = set(re.findall(r"FAILED test_my_store\.py::(\w+)", done.stdout))
    assert "test_recall_tells_a_repeat_and_else_nothing" in failed
    assert re.search(r"\d+ passed", done.stdout), done.stdout


def test_no_module_for_every_store_is_left_out() -> None:
    """Those that say so are in the suite, and no others."""
    modules = Path(__file__).parent.glob("test_*.py")
    said = {path.stem.removeprefix("test_") for path in modules if path.read_text().startswith('"""Every store: ')}
    assert said == set(suite.PARTS)

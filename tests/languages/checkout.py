"""Copies of the parts of the checkout that a language needs, built once for all tests and kept from run to run."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent

GENERATED = {"build", "gen", "node_modules", "package-lock.json", "target"}
"""The files of a folder that a build creates there."""


class Language(NamedTuple):
    """`build` are the folders in which a shell command is run, in order."""

    name: str
    tools: tuple[str, ...]
    folders: tuple[str, ...]
    build: tuple[tuple[str, str], ...]


NPM_INSTALL = "npm install --silent --no-package-lock --no-audit --no-fund"

GO = Language(
    "go",
    ("go",),
    ("client/go", "examples/go", "tests/vectors"),
    (("client/go", "go vet ./..."), ("examples/go", "go vet ./... && go build -o build/ . ./tool")),
)
TYPESCRIPT = Language(
    "typescript",
    ("npm",),
    ("proto", "client/typescript", "examples/typescript", "tests/vectors"),
    (
        ("client/typescript", f"{NPM_INSTALL} && npm run --silent build"),
        ("examples/typescript", f"{NPM_INSTALL} && npm run --silent build"),
    ),
)
JAVA = Language(
    "java",
    ("mvn",),
    ("proto", "examples/java"),
    (("examples/java", "mvn --batch-mode --quiet compile exec:help"),),  # which fetches what runs the example, too
)
RUST = Language("rust", ("cargo",), ("proto",), ())


def run(command: str, folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Runs a shell's commands, with this process's environment unless another is given, and returns what they print.
    Fails with all of it when one of them does."""
    # Maven's short lives are not worth the JVM's second compiler.
    quick = {"MAVEN_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**(os.environ if environment is None else environment), **quick},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout.replace("\x1b[0m", "")  # Debian's Maven ends every colour, into a pipe too, though it began none


def built(language: Language, cache: Path) -> Path:
    """Returns a folder with the language's part of the checkout, built, and the same for all tests. Skips the test
    where a tool is missing."""
    missing = [tool for tool in language.tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} on the PATH")
    copy, stamp = cache / language.name, cache / f"{language.name}.sha256"
    with _locked(cache / f"{language.name}.lock"):
        files = _sources(language)
        digest = hashlib.sha256(repr((language, sorted(files.items()))).encode()).hexdigest()
        if stamp.exists() and stamp.read_text() == digest:
            return copy
        stamp.unlink(missing_ok=True)
        shutil.rmtree(copy, ignore_errors=True)
        for path, content in files.items():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes(content)
        for folder, command in language.build:
            run(command, copy / folder)
        stamp.write_text(digest)
    return copy


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes out: tests run side by side."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sources(language: Language) -> dict[Path, bytes]:
    """The files of the language's folders, by their place in the checkout."""
    paths = (path for folder in language.folders for path in sorted((ROOT / folder).rglob("*")) if path.is_file())
    inner = (path.relative_to(ROOT) for path in paths)
    return {path: (ROOT / path).read_bytes() for path in inner if not GENERATED & set(path.parts)}

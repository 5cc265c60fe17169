"""One conversation in every language: stubs by plain protoc from proto/, built, and run against a server."""

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from notecase import v1
from notecase_server.models.openai import OpenAIProvider

from tests.support.openai_server import OpenAIServer, reply
from tests.support.server import running

ROOT = Path(__file__).parent.parent.parent

SAID = "Who saw the violin? 🎻 Wer hörte sie zuletzt, und wo? 🎻"
"""Some of its characters are two of Java's and of TypeScript's."""


class Language(NamedTuple):
    """An example, and how its first lines and docs/languages.md say that it is built and run, only quieter."""

    name: str
    tools: tuple[str, ...]
    build: tuple[str, ...]
    run: str


LANGUAGES = (
    Language("go", ("go", "protoc"), ("go generate", "go vet"), "go run . ADDRESS"),
    Language(
        "typescript",
        ("npm", "protoc"),
        ("npm install --silent --no-package-lock --no-audit --no-fund", "npm run --silent build"),
        "npm start --silent -- ADDRESS",
    ),
    Language(
        "java",
        ("mvn",),
        ("mvn --batch-mode --quiet compile",),
        "mvn --batch-mode --quiet compile exec:java -Dexec.args=ADDRESS",
    ),
)

PATIENCE = 100
"""Seconds for an example that is built. One that hangs is killed before pytest gives up on the test and forgets it."""

GENERATED = {"build", "gen", "node_modules", "package-lock.json", "target"}
"""What stands in an example's folder once somebody has built it there, besides Go's stubs."""


@pytest.fixture
def cache(pytestconfig: pytest.Config) -> Path:
    """A folder that outlives the test run: the first build fetches and compiles for a minute or two."""
    return pytestconfig.cache.mkdir("languages")


@pytest.fixture
def environment(tmp_path: Path) -> Mapping[str, str]:
    """This process's, with the protoc of the stubs' generator on the PATH, where it is installed."""
    environment = dict(os.environ)
    bundled = ROOT / ".venv-proto" / "bin" / "python-grpc-tools-protoc"
    if bundled.exists():
        (tmp_path / "protoc").symlink_to(bundled)
        environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    return environment


def sources(language: Language) -> dict[Path, bytes]:
    """The files of proto/ and of the example, by their place in the checkout."""
    folders = (ROOT / "proto", ROOT / "examples" / language.name)
    paths = [path.relative_to(ROOT) for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    made = [path for path in paths if GENERATED & set(path.parts) or path.name.endswith(".pb.go")]
    return {path: (ROOT / path).read_bytes() for path in paths if path not in made}


def built(language: Language, cache: Path, environment: Mapping[str, str]) -> Path:
    """Builds the example in a copy of its part of the checkout, or finds it built of the same sources. Its folder."""
    files = sources(language)
    digest = hashlib.sha256(repr((language, sorted(files.items()))).encode()).hexdigest()
    copy, stamp = cache / language.name, cache / f"{language.name}.sha256"
    folder = copy / "examples" / language.name
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    stamp.unlink(missing_ok=True)
    shutil.rmtree(copy, ignore_errors=True)
    for path, content in files.items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(content)
    for command in language.build:
        done = subprocess.run(
            command.split(),
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
    stamp.write_text(digest)
    return folder


@asynccontextmanager
async def program(
    command: list[str], folder: Path, environment: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs it while the block is entered; what is left of it then, with all it started, is killed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # As it should be: all of it has ended.
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


async def converses(command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    """Fails unless the example prints the first half of a reply before the model has made the second, then the whole
    reply exactly once, the length of the log, and the reason of the refusal."""
    second_half = asyncio.Event()
    async with OpenAIServer() as model:
        model.script(reply(SAID, chunks=4).held(second_half, after=3))
        # The example asks for the provider that every server has; here it can be held in the middle of its reply.
        providers = {"offline": OpenAIProvider("test-key", model.url, "stub-1")}
        async with running("memory:", providers) as server:
            words = [word.replace("ADDRESS", server.address) for word in command]
            async with asyncio.timeout(PATIENCE), program(words, folder, environment) as process:
                assert process.stdout is not None
                out = b""
                while SAID[: len(SAID) // 2].encode() not in out:
                    piece = await process.stdout.read(1 << 16)
                    if not piece:
                        raise AssertionError(f"ended early: {out!r} {(await process.communicate())[1]!r}")
                    out += piece
                assert SAID.encode() not in out
                second_half.set()
                rest, errors = await process.communicate()
            (session,) = (await server.sessions.ListSessions(v1.ListSessionsRequest())).sessions
    expected = [
        f"Opened {session.name}.",
        SAID,
        f"The log has {session.last_sequence} events.",
        "SESSION_NOT_FOUND: There is no session 'sessions/nobody'.",
    ]
    # Debian's Maven ends every colour, into a pipe too, though it began none.
    assert expected == (out + rest).decode().replace("\x1b[0m", "").splitlines()
    assert process.returncode == 0, errors


@pytest.mark.timeout(600)  # The first build fetches what it needs.
@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
async def test_an_example_converses(language: Language, cache: Path, environment: Mapping[str, str]) -> None:
    missing = [tool for tool in language.tools if shutil.which(tool, path=environment["PATH"]) is None]
    if missing:
        hint = "; make proto brings protoc" if "protoc" in missing else ""
        pytest.skip(f"wants {' and '.join(missing)} on the PATH for examples/{language.name}{hint}")
    folder = built(language, cache, environment)
    await converses(language.run.split(), folder, environment)


async def test_the_example_on_pythons_synchronous_stubs_converses() -> None:
    await converses([sys.executable, "examples/python_sync.py", "ADDRESS"], ROOT, os.environ)

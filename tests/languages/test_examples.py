"""One conversation in every language: built from the checkout, and run against a server."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from notecase import v1
from notecase_server.models.openai import OpenAIProvider

from tests.client.proxy import Proxy
from tests.languages.checkout import GO, JAVA, ROOT, TYPESCRIPT, Language, built, run
from tests.support.openai_server import OpenAIServer, reply
from tests.support.server import running

SAID = "Who saw the violin? 🎻 Wer hörte sie zuletzt, und wo? 🎻"
"""Some of its characters are two of Java's and of TypeScript's."""

COMMANDS = {
    "go": "build/conversation ADDRESS",
    "typescript": "npm start --silent -- ADDRESS",
    "java": "mvn --batch-mode --quiet compile exec:java -Dexec.args=ADDRESS",
}

PATIENCE = 200
"""Seconds for an example that is built. One that hangs is killed before pytest gives up on the test and forgets it."""


@asynccontextmanager
async def program(
    command: list[str], folder: Path, environment: Mapping[str, str] | None = None
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


async def converses(command: list[str], folder: Path, *, cut: bool = False) -> None:
    """Fails unless the example prints the first half of a reply before the model has made the second, then the whole
    reply exactly once, the length of the log, and the reason of the refusal. With `cut` its connection is reset in the
    middle of the reply."""
    second_half = asyncio.Event()
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(OpenAIServer())
        model.script(reply(SAID, chunks=4).held(second_half, after=3))
        # The example asks for the provider that every server has; here it can be held in the middle of its reply.
        providers = {"offline": OpenAIProvider("test-key", model.url, "stub-1")}
        server = await stack.enter_async_context(running("memory:", providers))
        proxy = await stack.enter_async_context(Proxy(server.address))
        words = [word.replace("ADDRESS", proxy.address) for word in command]
        async with asyncio.timeout(PATIENCE), program(words, folder) as process:
            assert process.stdout is not None
            out = b""
            while SAID[: len(SAID) // 2].encode() not in out:
                piece = await process.stdout.read(1 << 16)
                if not piece:
                    raise AssertionError(f"ended early: {out!r} {(await process.communicate())[1]!r}")
                out += piece
            assert SAID.encode() not in out
            if cut:
                proxy.cut()
            second_half.set()
            rest, errors = await process.communicate()
        (session,) = (await server.sessions.ListSessions(v1.ListSessionsRequest())).sessions
        assert cut == (proxy.opened > 1)
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
@pytest.mark.parametrize("language", [GO, TYPESCRIPT, JAVA], ids=lambda language: language.name)
async def test_an_example_converses(language: Language, cache: Path) -> None:
    """Those with a client of ours go on where they were, in the middle of a word, after their connection was reset."""
    folder = built(language, cache) / "examples" / language.name
    await converses(COMMANDS[language.name].split(), folder, cut=language is not JAVA)


async def test_the_example_on_pythons_synchronous_stubs_converses() -> None:
    await converses([sys.executable, "examples/python_sync.py", "ADDRESS"], ROOT)


TOOLS = {"go": "build/tool", "typescript": "node build/tool.js"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("language", [GO, TYPESCRIPT], ids=lambda language: language.name)
async def test_a_tool_of_the_caller_answers_its_run_and_one_that_waited(language: Language, cache: Path) -> None:
    """Once in a run that the program starts, and once in one that has been waiting since before it started."""
    folder = built(language, cache) / "examples" / language.name
    async with running() as server, asyncio.timeout(PATIENCE):
        first = await asyncio.to_thread(run, f"{TOOLS[language.name]} {server.address}", folder)
        async with server.client() as client:
            agent = await client.agents.GetAgent(v1.GetAgentRequest(name="agents/reader"))
            ask = v1.Message(parts=[v1.Part(text='/call search {"what": "bow"}')])
            tool = v1.Tool(name="search", client=v1.ClientTool())
            start = v1.StartRun(new_session=v1.Session(agent=agent.name), messages=[ask], client_tools=[tool])
            started = await client.runs.CreateRun(v1.CreateRunRequest(start=start))
            waiting = await client.runs.WaitRun(v1.WaitRunRequest(name=started.name))
            assert v1.Run.STATE_WAITING == waiting.state
        second = await asyncio.to_thread(run, f"{TOOLS[language.name]} {server.address} {waiting.name}", folder)
    assert "search gave: A violin was seen at the harbour." == first.splitlines()[-1]
    assert "search gave: A bow was seen at the harbour." == second.splitlines()[-1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("language", "folder", "command"),
    [(GO, "client/go", "go test -count 1 ./..."), (TYPESCRIPT, "client/typescript", "npm test")],
    ids=["go", "typescript"],
)
def test_a_client_passes_the_vectors(language: Language, folder: str, command: str, cache: Path) -> None:
    run(command, built(language, cache) / folder)

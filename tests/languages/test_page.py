"""docs/languages.md is true: the commands and files of a section, in order and in an empty folder, make a program that
prints a reply, in plain text and by TLS with a token."""

import asyncio
import os
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from notecase import v1
from notecase_server.auth.files import Files
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.models.openai import OpenAIProvider

from tests.languages.checkout import GO, JAVA, ROOT, RUST, TYPESCRIPT, Language, built, run
from tests.languages.test_examples import PATIENCE, program
from tests.support.authority import Authority
from tests.support.openai_server import OpenAIServer, reply
from tests.support.server import running

PAGE = (ROOT / "docs" / "languages.md").read_text()

HEADINGS = {"go": "Go", "typescript": "TypeScript", "java": "Java", "rust": "Rust"}

LANGUAGES = [GO, TYPESCRIPT, JAVA, *([RUST] if os.environ.get("NOTECASE_RUST") else [])]
"""Rust's first build takes more than a minute of processor time: `make test-rust` asks for it."""

RESUMED = {"go": ("resume/main.go", "go run ./resume"), "typescript": ("resume.ts", "node resume.js")}
"""The program that continues after it was killed, and the command that runs it."""

PREPARED = '(cd "$NOTECASE/client/typescript" && npm install && npm run build)\n'
"""What `built` has done, where other tests use the result meanwhile."""

TOKEN = "a-token-of-the-test"


class Step(NamedTuple):
    """A block of the page: a file where it has a name, else commands."""

    name: str
    text: str


def steps(language: Language) -> Iterator[Step]:
    """The blocks of a language's section."""
    return _steps(HEADINGS[language.name])


def _steps(heading: str) -> Iterator[Step]:
    section = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)
    text = section[section.index(heading) + 1]
    for name, kind, block in re.findall(
        r"(?:^`([^`\n]+)`[^\n]*:\n\n)?^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ):
        assert name or kind == "sh"
        yield Step(name, block)


class ByToken:
    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        known = metadata.get("authorization") == f"Bearer {TOKEN}"
        return Principal("acme", "one", Role.DEVELOPER) if known else None


async def continues(language: Language, folder: Path, environment: dict[str, str]) -> None:
    """Kills the program of the page in the middle of a reply, and runs it again: together they print it once."""
    said = "Zwölf Boxkämpfer jagen Viktor."
    name, command = RESUMED[language.name]
    found = list(_steps("After your process was killed"))
    number = [step.name for step in found].index(name)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(found[number].text)
    assert command == found[number + 1].text.splitlines()[-1]
    for prepare in found[number + 1].text.splitlines()[:-1]:
        await asyncio.to_thread(run, prepare, folder, environment)
    rest = asyncio.Event()
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(OpenAIServer())
        model.script(reply(said, chunks=4).held(rest, after=3))
        providers = {"offline": OpenAIProvider("test-key", model.url, "stub-1")}
        server = await stack.enter_async_context(running("memory:", providers))
        async with server.client() as client:
            agent = v1.Agent(llm=v1.LlmAgent(provider="offline"))
            await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="echo", agent=agent))
        variables = environment | {"NOTECASE_ADDRESS": server.address}
        out = b""
        async with asyncio.timeout(PATIENCE), program(command.split(), folder, variables) as process:
            assert process.stdout is not None
            while len(out) < len(said.encode()) // 2:
                piece = await process.stdout.read(1 << 16)
                assert piece, (out, (await process.communicate())[1])
                out += piece
        rest.set()
        again = await asyncio.to_thread(run, command, folder, variables)
    assert 0 < len(out.decode()) < len(said)
    assert said == out.decode() + again.removesuffix("\n")


async def follow(language: Language, cache: Path, folder: Path) -> None:
    """Does what the section says, and runs its last command again on a server with TLS and a token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NOTECASE_")}
    environment["NOTECASE"] = str(built(language, cache))
    commands = ""
    async with running() as plain:
        for step in steps(language):
            path = folder / (step.name or "commands")
            if step.name:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(step.text)
            elif step.text != PREPARED:
                commands = step.text
                said = await asyncio.to_thread(run, commands, folder, environment | {"NOTECASE_ADDRESS": plain.address})
    assert "Hello." == said.splitlines()[-1]

    if language.name in RESUMED:
        await continues(language, folder, environment)

    authority = Authority()
    cert, key = authority.issue().write(folder)
    (folder / "ca.pem").write_bytes(authority.cert)
    credentials = grpc.ssl_channel_credentials(authority.cert)
    async with running(
        authenticators=[ByToken()], files=Files(), credentials=credentials, tls_cert=cert, tls_key=key
    ) as secure:
        variables = {"NOTECASE_ADDRESS": secure.address, "NOTECASE_CA": "ca.pem", "NOTECASE_TOKEN": TOKEN}
        last = commands.splitlines()[-1]
        said = await asyncio.to_thread(run, last, folder, environment | variables)
        if language in (GO, TYPESCRIPT):
            wrong = variables | {"NOTECASE_TOKEN": "another"}
            refused = (await asyncio.to_thread(run, f"! {last}", folder, environment | wrong)).splitlines()
            assert "UNAUTHENTICATED: " in refused[0]
            assert refused[1:] in ([], ["exit status 1"])  # `go run` adds that line
    assert "Hello." == said.splitlines()[-1]


@pytest.mark.timeout(900)  # The first build fetches what it needs.
@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
async def test_a_section_of_the_page_runs_from_an_empty_folder(language: Language, cache: Path, tmp_path: Path) -> None:
    await follow(language, cache, tmp_path)

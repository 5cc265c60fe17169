"""Each command imports what it needs when it runs, and not what the others need."""

import sys
from pathlib import Path

import pytest
from notecase import v1

from tests.cli.command import spawn
from tests.support.openai_server import OpenAIServer
from tests.support.server import Running

HEAVY = {
    *("aiohttp", "asyncio", "google.protobuf", "grpc", "jsonschema_rs", "liquid", "mcp", "msgspec"),
    *("notecase", "notecase_server.serve", "openai", "prompt_toolkit", "pydantic", "structlog", "uvloop"),
    *("markdown_it", "rich.console", "yaml"),
}
"""Modules that cost a command more to import than all that `--version` needs."""

CLIENT = {"asyncio", "google.protobuf", "grpc", "notecase"}
SERVER = {"msgspec", "notecase_server.serve", "structlog"}


async def imported(*arguments: str, env: dict[str, str] | None = None) -> set[str]:
    """The heavy modules that a command imports, from its start to its end. A server is stopped once it serves."""
    process = await spawn(sys.executable, "-X", "importtime", "-m", "notecase_server", *arguments, env=env)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    if arguments[0] == "serve":
        assert (await process.stdout.readline()).startswith(b"listening on port ")
        process.terminate()
    _, told = await process.communicate()
    lines = told.decode().splitlines()
    assert 0 == process.returncode, [line for line in lines if not line.startswith("import time:")]
    return HEAVY & {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("-h",)])
async def test_the_command_alone_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert set() == await imported(*arguments)


async def test_a_server_imports_no_line_editor_and_no_provider_or_language_that_it_does_not_use() -> None:
    """Its own loop and transport are all that it adds to what it is made of. The language of templates is loaded when
    the first of them comes."""
    found = await imported("serve", "--listen", "127.0.0.1:0", "--store", "memory:")
    assert CLIENT | SERVER | {"uvloop"} == found - {"jsonschema_rs"}


async def test_a_server_with_a_provider_imports_its_library() -> None:
    async with OpenAIServer() as model:
        env = {"OPENAI_BASE_URL": model.url}
        found = await imported("serve", "--listen", "127.0.0.1:0", "--store", "memory:", env=env)
    assert "openai" in found
    assert found.isdisjoint({"mcp", "prompt_toolkit"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("sessions", "list", "-o", "json"),
        ("sessions", "show", "case"),
        ("agents", "show", "detective"),
        ("logs", "case"),
        ("run", "--session", "case", "Hello"),
        ("state", "get", "case"),
        ("state", "put", "case", "n", "1"),
        ("sessions", "export", "case", "FILE"),
    ],
    ids=" ".join,
)
async def test_a_command_that_asks_a_server_imports_the_client_alone(
    served: Running, agent: v1.Agent, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    session = v1.Session(agent=agent.name)
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
    words = (str(tmp_path / "file") if word == "FILE" else word for word in arguments)
    assert CLIENT == await imported(*words, env={"NOTECASE_ADDRESS": served.address})


async def test_health_needs_no_client(served: Running) -> None:
    found = await imported("health", "--server", served.address)
    assert {"asyncio", "google.protobuf", "grpc"} == found


async def test_only_a_conversation_imports_the_line_editor(served: Running, agent: v1.Agent) -> None:
    found = await imported("chat", "--server", served.address)
    assert CLIENT | {"prompt_toolkit"} == found


async def test_a_backup_imports_no_line_editor_and_no_provider(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    await imported("serve", "--listen", "127.0.0.1:0", "--store", store)
    found = await imported("backup", "--store", store, str(tmp_path / "copy"))
    assert found.isdisjoint({"openai", "mcp", "prompt_toolkit", "uvloop"})

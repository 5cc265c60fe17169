"""`notecase serve` and `notecase health`: what an operator reads when something is set wrong."""

import asyncio
import json
import re
import signal
import sys
from pathlib import Path

import click
import pytest
from notecase_server.cli import COMMANDS, main
from notecase_server.cli.serve import serve
from notecase_server.models.offline import OfflineProvider
from structlog.testing import capture_logs

from tests.cli.command import notecase
from tests.support import http2
from tests.support.server import Running, Spawned, running

NOBODY = "127.0.0.1:1"
"""An address where nothing listens."""


async def test_help_explains_every_option_and_its_variable() -> None:
    done = await notecase("serve", "--help")
    assert 0 == done.code
    options = {option.opts[0]: option.envvar for option in serve.params}
    assert options == {option: f"NOTECASE_{option[2:].upper().replace('-', '_')}" for option in options}
    text = " ".join(done.out.split())
    for option, variable in options.items():
        assert re.search(rf"{option} .*\[env var: {variable}\b", text)
    assert "OPENAI_API_KEY" in text


async def test_the_commands_are_listed_with_the_first_sentence_of_their_help() -> None:
    """As click would list them if it imported them all."""
    done = await notecase("--help")
    assert 0 == done.code
    expected = re.sub(r"\n {6,}", " ", done.out.partition("Commands:\n")[2])
    listed = dict(re.findall(r"^  (\w+) +(\w.*\.)$", expected, re.MULTILINE))
    assert list(COMMANDS) == list(listed)
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in listed}
    assert {name: command.get_short_help_str(100) for name, command in commands.items() if command} == listed
    assert {name: command.name for name, command in commands.items() if command} == {name: name for name in listed}


async def test_the_error_of_an_unknown_command_names_a_similar_one() -> None:
    done = await notecase("sesions")
    assert (2, "") == (done.code, done.out)
    assert "'sesions'" in done.err
    assert "sessions" in done.err


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:0", "192.0.2.1:7420", "example.org:7420", "localhost.example:7420", "127.example:1", "[::]:7420"],
)
async def test_an_address_that_other_machines_can_reach_needs_insecure(listen: str) -> None:
    done = await notecase("serve", "--listen", listen, "--store", "memory:")
    assert 1 == done.code
    assert done.err.startswith(f"Error: --listen: {listen} can be reached from other machines")
    assert "--insecure" in done.err


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:", "127.0.0.1:http", ""])
async def test_an_address_without_a_port_is_refused(listen: str) -> None:
    """gRPC would serve on port 443."""
    done = await notecase("serve", "--listen", listen, "--store", "memory:")
    assert 2 == done.code
    assert "write HOST:PORT" in done.err


@pytest.mark.parametrize("store", ["sqlite:", "memory:more", "notecase.db"])
async def test_the_error_of_an_invalid_store_url_shows_valid_ones(store: str) -> None:
    done = await notecase("serve", "--listen", "127.0.0.1:0", "--store", store)
    assert (
        1,
        f"Error: '{store}' is not a store; write memory:, sqlite:PATH or postgresql://USER@HOST/DATABASE.\n",
    ) == (
        done.code,
        done.err,
    )


async def test_a_store_that_another_server_owns_is_refused(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    owner = await Spawned.start(store, tmp_path / "log")
    (tmp_path / "other.db").hardlink_to(tmp_path / "notecase.db")
    for url in (store, f"sqlite:{tmp_path / 'other.db'}"):
        done = await notecase("serve", "--listen", "127.0.0.1:0", "--store", url)
        assert (1, True) == (done.code, "is in use" in done.err)
    assert 0 == await owner.stop()


async def test_a_taken_port_is_reported_in_a_sentence(served: Running) -> None:
    done = await notecase("serve", "--listen", served.address, "--store", "memory:")
    assert 1 == done.code
    expected = "(Address already in use); another server may use it."
    assert f"Error: --listen: cannot listen on {served.address} {expected}\n" == done.err


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("nobody.invalid:0", "nobody.invalid:0 ("),
        ("192.0.2.1:0", "192.0.2.1:0 (Cannot assign requested address): this machine does not have that address."),
    ],
)
async def test_an_address_that_cannot_be_listened_on_is_reported_in_one_line(listen: str, expected: str) -> None:
    """gRPC would write a line, too, and its error says to set a variable of its own."""
    done = await notecase("serve", "--listen", listen, "--store", "memory:", "--insecure")
    assert (1, 1, False) == (done.code, done.err.count("\n"), "GRPC_VERBOSITY" in done.err)
    assert done.err.startswith(f"Error: --listen: cannot listen on {expected}")


async def test_the_log_names_the_providers_the_default_one_first() -> None:
    """A misspelt OPENAI_API_KEY leaves the offline model alone, which otherwise only its replies show."""
    offline = OfflineProvider()
    with capture_logs() as lines:
        async with running(providers={"main": offline, "offline": offline}):
            pass
    assert ["main, offline"] == [line["providers"] for line in lines if line["event"] == "server_started"]


COMMAND = (sys.executable, "-m", "notecase_server", "serve", "--listen", "127.0.0.1:0", "--store", "memory:")


@pytest.mark.parametrize("lost", ["stdout", "stderr"])
async def test_a_server_serves_where_its_output_or_its_log_cannot_be_written(lost: str) -> None:
    """As on a full disk, or in a pipe whose reader has gone: the store may be elsewhere."""
    with Path("/dev/full").open("w") as full:  # noqa: ASYNC230
        streams = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE, lost: full}
        server = await asyncio.create_subprocess_exec(*COMMAND, "--log-format", "json", **streams)  # type: ignore[arg-type]
    said = server.stderr if lost == "stdout" else server.stdout
    assert said is not None
    line = await said.readline()
    port = json.loads(line)["port"] if lost == "stdout" else int(line.split()[-1])
    done = await notecase("health", "--server", f"127.0.0.1:{port}")
    assert (0, "SERVING\n") == (done.code, done.out)
    server.send_signal(signal.SIGTERM)
    assert b"Traceback" not in await said.read()
    assert 0 == await server.wait()


async def test_the_end_of_its_terminal_stops_a_server_as_sigterm_does_unless_that_is_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the server inherits: the tests may run under nohup
    try:
        server = await Spawned.start("memory:", tmp_path / "log")
    finally:
        signal.signal(signal.SIGHUP, before)
    server.process.send_signal(signal.SIGHUP)
    await server._gone()
    assert (0, True) == (server.process.returncode, "server_stopped" in (tmp_path / "log").read_text())
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    kept = await asyncio.create_subprocess_exec("nohup", *COMMAND, stdin=null, stdout=pipe, stderr=null)
    assert kept.stdout is not None
    assert (await kept.stdout.readline()).startswith(b"listening on port ")
    status = Path(f"/proc/{kept.pid}/status").read_text()
    assert int(re.findall(r"SigIgn:\t(\w+)", status)[0], 16) & 1 << signal.SIGHUP - 1
    kept.terminate()
    assert 0 == await kept.wait()


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("OPENAI_BASE_URL", "ftp://models.example", "the base URL must begin with http:// or https://"),
        ("OPENAI_BASE_URL", "https://name:secret-1@models.example", "the base URL must not contain credentials"),
        ("OPENAI_BASE_URL", "https://:secret-1@models.example", "the base URL must not contain credentials"),
        ("OPENAI_API_KEY", "secret-1 and more", "the API key contains a space"),
        ("NOTECASE_PROVIDER_PROFILE", "mistrall", "'mistrall' is not a profile ("),
        ("NOTECASE_PROVIDER_PROFILE", '{"text": "lists"}', "the profile cannot be used: Invalid enum value 'lists'"),
        (
            "NOTECASE_PROVIDER_PROFILE",
            '{"txt": "secret-1"}',
            "the profile cannot be used: Object contains unknown field `txt`",
        ),
    ],
)
async def test_a_provider_that_cannot_work_is_reported_before_the_server_serves(
    variable: str, value: str, expected: str
) -> None:
    """And its key or URL is not."""
    done = await notecase(
        "serve", "--listen", "127.0.0.1:0", "--store", "memory:", env={"OPENAI_API_KEY": "k", variable: value}
    )
    assert 1 == done.code
    assert "" == done.out
    assert f"Error: The openai provider cannot be used: {expected}" in done.err
    assert "secret-1" not in done.err


async def test_health_is_an_exit_code(served: Running) -> None:
    done = await notecase("health", "-o", "json", "--server", served.address)
    assert (0, '{\n  "status": "SERVING"\n}\n') == (done.code, done.out)
    done = await notecase("health", env={"NOTECASE_ADDRESS": served.address})
    assert (0, "SERVING\n") == (done.code, done.out)
    done = await notecase("health", "--server", NOBODY)
    assert (4, True) == (done.code, done.err.startswith(f"Error: No server can be reached at {NOBODY}: "))


async def test_a_server_that_does_not_serve_is_alive(served: Running) -> None:
    await served.server._health.tell(False)
    done = await notecase("health", "--server", served.address)
    assert (1, "NOT_SERVING\n") == (done.code, done.out)
    done = await notecase("health", "--liveness", "--server", served.address)
    assert (0, "SERVING\n") == (done.code, done.out)


async def test_a_port_is_part_of_where_to_listen() -> None:
    done = await notecase("serve", "--port", "8080")
    assert (2, True) == (done.code, "There is no --port; use --listen HOST:PORT." in done.err)


async def test_headers_that_cannot_be_parsed_write_nothing_to_the_log(tmp_path: Path) -> None:
    """The core's own lines would, for anybody who calls, in any number, and they are not JSON."""
    server = await Spawned.start("memory:", tmp_path / "log", "--log-format", "json")
    path = "/notecase.v1.ServerService/GetServerInfo"
    for odd in ({"grpc-timeout": b"soon"}, {"grpc-encoding": b"none"}, {"x-bin": b"!"}):
        assert b"grpc-status\x0213" in await http2.trailers(server.address, http2.header_block(path, **odd))
    assert 0 == await server.stop()
    assert [] == [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("{")]

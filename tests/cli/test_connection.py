"""How commands reach a server beyond this machine: by TLS, and with a token."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from notecase import Client, NotecaseError, Retry, v1
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.cli.connection import unreachable

from tests.cli.command import environment, notecase, spawn
from tests.support.authority import Authority
from tests.support.server import running


class ByToken:
    """Accepts only callers with this token."""

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        known = metadata.get("authorization") == "Bearer secret-1"
        return Principal("default", "one", Role.ADMIN) if known else None


class Place(NamedTuple):
    address: str
    ca: str


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """A server with TLS that knows one token."""
    authority = Authority()
    cert, key = authority.issue().write(tmp_path)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.cert)
    channel = grpc.ssl_channel_credentials(authority.cert)
    async with running(authenticators=[ByToken()], credentials=channel, tls_cert=cert, tls_key=key) as served:
        yield Place(served.address, str(ca))


async def test_a_command_takes_the_server_and_its_token(place: Place) -> None:
    put = ("state", "put", "app", "case", "7")
    done = await notecase(*put, "--server", place.address, "--ca", place.ca, "--token", "secret-1")
    assert (0, "") == (done.code, done.err)
    variables = {"NOTECASE_ADDRESS": place.address, "NOTECASE_CA": place.ca, "NOTECASE_TOKEN": "secret-1"}
    done = await notecase("state", "get", "app", env=variables)
    assert (0, "") == (done.code, done.err)
    assert "case" in done.out
    done = await notecase("health", env=variables)
    assert (0, "SERVING\n") == (done.code, done.out)


async def test_a_command_without_a_valid_token_says_so(place: Place) -> None:
    for token in ((), ("--token", "secret-2")):
        done = await notecase("sessions", "list", "--server", place.address, "--ca", place.ca, *token)
        assert 1 == done.code
        assert done.err.startswith("Error: This call has no credential")
        for way in ("--token", "NOTECASE_TOKEN", "`notecase profiles set`"):
            assert way in done.err
        assert "metadata" not in done.err
        assert "secret-2" not in done.err


async def test_a_server_with_an_unknown_ca_is_reported(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    other.write_bytes(Authority().cert)
    done = await notecase("sessions", "list", "--server", place.address, "--ca", str(other))
    assert 4 == done.code
    assert f"Error: No server can be reached at {place.address}: Tls handshake failed" in done.err
    assert "For a server with TLS, set --ca or NOTECASE_CA, and use a host name that is in its certificate." in done.err


@pytest.mark.parametrize("command", [("sessions", "list"), ("health",)], ids=" ".join)
async def test_the_reason_for_a_failed_connection_is_printed(place: Place, command: tuple[str, ...]) -> None:
    """Plain text to a server with TLS, TLS to one without, and no server."""
    done = await notecase(*command, "--server", place.address)
    assert (4, True) == (done.code, "For a server with TLS, set --ca or NOTECASE_CA" in done.err)
    async with running() as plain:
        done = await notecase(*command, "--server", plain.address, "--ca", place.ca)
        assert (4, True) == (done.code, "The server has no TLS" in done.err)
    done = await notecase(*command, "--server", "127.0.0.1:1")
    assert (4, True) == (done.code, "Connection refused. Start one with `notecase serve`" in done.err)


async def test_a_server_of_another_kind_has_an_error_of_another_kind() -> None:
    """From gRPC's own words and from the client's."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        done = await notecase("health", "--server", f"127.0.0.1:{port}")
        async with Client(f"127.0.0.1:{port}", retry=Retry(tries=0)) as client:
            with pytest.raises(NotecaseError) as refused:
                await client.get_state("app")
    assert (4, True) == (done.code, f"127.0.0.1:{port} is not a gRPC server" in done.err)
    assert "The server at a:1 is not a gRPC server" in unreachable("a:1", refused.value.message)


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:7420", "a:1,b:2", "host", ":7420", "a b:1"])
async def test_what_is_not_an_address_is_refused(wrong: str) -> None:
    for command in (("sessions", "list"), ("health",)):
        done = await notecase(*command, env={"NOTECASE_ADDRESS": wrong})
        assert (2, True) == (done.code, f"{wrong!r} is not an address; write HOST:PORT" in done.err)


async def test_text_that_cannot_be_sent_is_reported_before_anything_is_sent(tmp_path: Path) -> None:
    none = str(tmp_path / "none.pem")
    unread = f"Error: The CA certificates of --ca, NOTECASE_CA or the profile cannot be read: {none}: No such file or "
    for arguments, env, expected in (
        (("sessions", "list", "--ca", none), {}, unread),
        (("sessions", "list"), {"NOTECASE_CA": none}, unread),
        (("health",), {"NOTECASE_CA": none}, unread),
        (("sessions", "list", "--token", "two words"), {}, "the token is empty or contains a space"),
        (
            ("sessions", "list", "--server", "192.0.2.1:7420", "--plaintext"),
            {"NOTECASE_TOKEN": "secret-1"},
            "NOTECASE_TOKEN would be sent to 192.0.2.1:7420 in plain text",
        ),
    ):
        done = await notecase(*arguments, env=env)
        assert 2 == done.code
        assert expected in done.err
        assert "words" not in done.err
        assert "secret-1" not in done.err


async def test_a_file_of_authorities_without_any_is_reported(tmp_path: Path) -> None:
    """gRPC wrote four lines of its core, and no server could be reached."""
    (tmp_path / "ca.pem").write_text("not PEM")
    for command in (("health",), ("keys", "list")):
        done = await notecase(*command, "--ca", str(tmp_path / "ca.pem"))
        assert (2, 1, True) == (done.code, done.err.count("\n"), "it has no certificate in PEM." in done.err)


async def test_authorities_may_come_from_a_pipe(place: Place) -> None:
    """As in `--ca <(program)`: they can be read once."""
    command = " ".join((sys.executable, "-m", "notecase_server", "state", "put", "app", "case", "7"))
    words = f"{command} --server {place.address} --token secret-1 --ca <(cat {place.ca})"
    process = await spawn("bash", "-c", words)
    assert (b"1\n", b"") == await process.communicate()
    assert 0 == process.returncode


@pytest.mark.parametrize("lost", ["disk", "pipe"])
async def test_a_reply_that_cannot_be_written_ends_the_command_without_a_traceback(lost: str) -> None:
    """A full disk, which is named, and a pipe whose reader has gone."""
    if lost == "disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    async with running() as served:
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent())))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "notecase_server", "run", "/say Here.", "--server", served.address),
            env=environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(out)
        _, err = await process.communicate()
    expected = ["Error: The output cannot be written: No space left on device."] if lost == "disk" else []
    assert (1, expected) == (process.returncode, err.decode().splitlines()[1:])  # the first names the session


@pytest.mark.parametrize("words", [("--help",), ("profiles", "list")])
async def test_output_on_a_full_disk_is_reported_without_a_traceback(words: tuple[str, ...]) -> None:
    command = " ".join((sys.executable, "-m", "notecase_server", *words))
    process = await asyncio.create_subprocess_shell(f"{command} > /dev/full", stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()
    assert (1, b"Error: The output cannot be written: No space left on device.\n") == (process.returncode, err)


@pytest.mark.parametrize(
    "words",
    [
        ("logs", "s", "--after"),
        ("sessions", "fork", "s", "--at"),
        ("sessions", "rewind", "s", "--to"),
        ("sessions", "list", "--limit"),
        ("state", "put", "s", "k", "1", "--if-version"),
    ],
    ids=lambda words: words[-1],
)
async def test_a_number_that_no_request_can_have_is_refused(words: tuple[str, ...]) -> None:
    """Otherwise the command would end in a traceback."""
    done = await notecase(*words, str(1 << 63))
    assert (2, True) == (done.code, "9223372036854775808 is too large." in done.err)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "-"),
        ("messages", "append", "s", "-"),
        ("agents", "apply", "-f", "-"),
        ("agents", "apply", "-f", "/dev/zero"),
        ("profiles", "set", "p", "--token", "-"),
    ],
    ids=" ".join,
)
def test_no_more_text_is_read_than_a_request_can_have(words: tuple[str, ...], tmp_path: Path) -> None:
    """Otherwise the command would fill the machine's memory, with a device or with a program that never ends."""
    env = environment({"XDG_CONFIG_HOME": str(tmp_path)})
    with Path("/dev/zero").open("rb") as endless:
        command = (sys.executable, "-m", "notecase_server", *words)
        done = subprocess.run(command, env=env, stdin=endless, stderr=subprocess.PIPE, text=True, check=False)
    assert (2, True) == (done.returncode, "has more than 33554432 characters" in done.stderr)

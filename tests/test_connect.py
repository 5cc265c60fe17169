"""The pages on TLS and credentials tell the truth: their programs are run, and their files are read."""

import asyncio
import os
import re
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from cryptography import x509
from notecase import v1
from notecase_server.auth.files import Files
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.auth.settings import read_client_principals, read_issuers
from notecase_server.cli.serve import serve
from notecase_server.config import Settings
from notecase_server.serve import make_authenticators
from notecase_server.supervisor import Tasks

from tests.support.authority import Authority
from tests.support.server import running

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


class ByToken:
    """Accepts only callers with this token."""

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        known = metadata.get("authorization") == "Bearer secret-1"
        return Principal("acme", "one", Role.DEVELOPER) if known else None


class Place(NamedTuple):
    address: str
    mtls: str

    def here(self, text: str) -> str:
        """The text of a page, with this server's addresses."""
        return text.replace("notecase.example:7420", self.address).replace("notecase.example:7421", self.mtls)


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    """A server with TLS and client certificates; the files that the page names are in this directory."""
    monkeypatch.chdir(tmp_path)
    authority, files, fetches = Authority(), Files(), Tasks("test")
    cert, key = authority.issue().write(tmp_path)
    authority.issue([x509.UniformResourceIdentifier("spiffe://acme.example/ci")]).write(tmp_path, "client")
    for name in ("ca.pem", "clients.pem"):
        (tmp_path / name).write_bytes(authority.cert)
    table = tmp_path / "principals.toml"
    table.write_text('["uri:spiffe://acme.example/ci"]\ntenant = "acme"\nrole = "developer"\n')
    settings: dict[str, Any] = {
        "tls_cert": cert,
        "tls_key": key,
        "tls_client_ca": tmp_path / "clients.pem",
        "listen_mtls": "127.0.0.1:0",
        "client_principals": table,
    }
    judges = [ByToken(), *make_authenticators(Settings(listen="", **settings), files, fetches)]
    channel = grpc.ssl_channel_credentials(authority.cert)
    async with running(authenticators=judges, files=files, credentials=channel, **settings) as served:
        yield Place(served.address, f"127.0.0.1:{served.server.mtls_port}")
    await fetches.close()


async def test_the_programs_in_python_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    fetched: list[float] = []

    async def fetch_token() -> tuple[str, float]:
        fetched.append(time.time())
        return "secret-1", time.time() + 3600

    names: dict[str, Any] = {"TOKEN": "secret-1", "fetch_token": fetch_token, "time": time, "grpc": grpc, "Path": Path}
    for block in blocks("connect.md", "python"):
        exec(place.here(block), names)
    await names["main"]()
    await names["with_certificate"]()
    names["TOKEN"] = names["Renewing"]()
    await names["main"]()
    await names["main"]()
    assert 4 == capsys.readouterr().out.count('store: "memory"')
    assert 1 == len(fetched)


async def test_grpcurl_calls_with_a_token_and_with_a_certificate(place: Place, grpcurl: str) -> None:
    (command,) = blocks("connect.md", "sh")
    by_certificate = command.replace('-H "authorization: Bearer $NOTECASE_TOKEN"', "-cert client.pem -key client.key")
    environment = {**os.environ, "NOTECASE_TOKEN": "secret-1", "PATH": f"{Path(grpcurl).parent}:{os.environ['PATH']}"}
    for words in (place.here(command), by_certificate.replace("notecase.example:7420", place.mtls)):
        shell = await asyncio.create_subprocess_shell(
            words, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await shell.communicate()
        assert (0, b"") == (shell.returncode, err)
        assert '"store": "memory"' in out.decode()


def test_the_files_of_an_operator_are_read(tmp_path: Path) -> None:
    principals, issuers, _ = blocks("operate.md", "toml")
    path = tmp_path / "file.toml"
    path.write_text(principals)
    assert [Role.DEVELOPER, Role.USER, Role.OPERATOR] == [one.role for one in read_client_principals(path).values()]
    path.write_text(issuers)
    assert ["https://login.example/realms/acme", "https://ci.example"] == [one.issuer for one in read_issuers(path)]


def test_the_options_of_an_operator_exist() -> None:
    known = {option for parameter in serve.params for option in parameter.opts}
    commands = [line for block in blocks("operate.md", "sh") for line in block.replace("\\\n", "").splitlines()]
    told = {
        option for line in commands if line.startswith("notecase serve") for option in re.findall(r"--[a-z-]+", line)
    }
    assert {"--tls-cert", "--listen-mtls", "--behind-tls-proxy", "--issuers"} <= told
    assert set() == told - known


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl on the PATH")
async def test_an_operators_own_ca_signs_a_certificate_that_callers_trust(tmp_path: Path) -> None:
    (commands,) = [block for block in blocks("operate.md", "sh") if "ca.key" in block]
    openssl = await asyncio.create_subprocess_exec(
        *("bash", "-euc", commands), cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said = (await openssl.communicate())[0].decode()
    assert 0 == openssl.returncode, said
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    authorities = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
    async with running(credentials=authorities, tls_cert=cert, tls_key=key) as served:
        assert "memory" == (await served.info.GetServerInfo(v1.GetServerInfoRequest())).store

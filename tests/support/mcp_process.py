"""The MCP server of tests/support/mcp_server.py as what a notecase server connects to: a command, or a URL."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

from notecase_server.tools.mcp_settings import McpServerSettings

ROOT = Path(__file__).parents[2]
MODULE = ("-m", "tests.support.mcp_server")


def stdio(**more: object) -> McpServerSettings:
    """The command; it has time to start on a machine on which its imports take a minute."""
    command = {"command": sys.executable, "args": (*MODULE, "stdio"), "cwd": str(ROOT)}
    given = {**command, "connect_timeout": 120.0, **more}
    return McpServerSettings(**given)  # type: ignore[arg-type]


TRANSPORTS = ["stdio", "stdio 2026-07-28", "http", "http 2026-07-28"]


def over(transport: str, served: "Http") -> McpServerSettings:
    """One of TRANSPORTS: a separate process, or the URL of a running server; with a version of the protocol if it is to
    be used."""
    kind, _, version = transport.partition(" ")
    protocol: Literal["2026-07-28"] | None = "2026-07-28" if version else None
    return stdio(protocol=protocol) if kind == "stdio" else McpServerSettings(url=served.url, protocol=protocol)


class Http:
    """The server over HTTP, as a process that can be killed and started again at the same address."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self._port = "0"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *MODULE, "http", "--port", self._port, *self._options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        self._port = self.url.rpartition(":")[2].partition("/")[0]

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

"""The MCP server of tests/support/mcp_server.py as what a notecase server connects to: a command, or a URL."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

from notecase_server.tools.mcp_settings import McpServerSettings

from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
MODULE = ("-m", "tests.support.mcp_server")


PATIENCE = 120.0
"""Seconds to connect: the time of a machine on which the imports of a program take a minute."""


def stdio(**more: object) -> McpServerSettings:
    """The command."""
    command = {"command": sys.executable, "args": (*MODULE, "stdio"), "cwd": str(ROOT)}
    given = {**command, "connect_timeout": PATIENCE, **more}
    return McpServerSettings(**given)  # type: ignore[arg-type]


def at(url: str, **more: object) -> McpServerSettings:
    """A URL."""
    return McpServerSettings(**{"url": url, "connect_timeout": PATIENCE, **more})  # type: ignore[arg-type]


TRANSPORTS = ["stdio", "stdio 2026-07-28", "http", "http 2026-07-28"]


def over(transport: str, served: "Http") -> McpServerSettings:
    """One of TRANSPORTS: a separate process, or the URL of a running server; with a version of the protocol if it is to
    be used."""
    kind, _, version = transport.partition(" ")
    protocol: Literal["2026-07-28"] | None = "2026-07-28" if version else None
    return stdio(protocol=protocol) if kind == "stdio" else at(served.url, protocol=protocol)


class Http:
    """The server over HTTP, as a process that can be killed and started again at the same address."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self._port = str(free_port())
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

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

"""Reads the operator's list of MCP servers. A file with a mistake is refused as a whole, with a sentence.

The format is the one that most MCP clients share, as JSON or TOML:

    {"mcpServers": {"files": {"command": "files-mcp", "args": ["--root", "."], "env": {"TOKEN": "…"}},
                    "search": {"url": "https://mcp.example.org/mcp", "headers": {"Authorization": "Bearer TOKEN"}}}}

Members that other clients add and this server does not know are refused: ignoring one such as `disabled` would change
what a model can do.
"""

import codecs
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from notecase_server.tools.contract import ToolSettingsError

MOST_SECONDS = 10**9

_VARIABLE = re.compile(r"\$\{[A-Za-z_][\w:.-]*\}")
"""How other clients refer to a variable, which they replace by its value."""


class McpServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """One server: a command that speaks on its standard input and output, or a URL that speaks streamable HTTP."""

    type: Literal["stdio", "http", "streamable-http", "streamableHttp"] | None = None
    """For other clients; here `command` or `url` says it."""
    command: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    """The variables of the process, in addition to a few of this server's that any program needs (PATH, HOME, USER and
    the like). It gets no others, so that it does not see the keys of this server."""
    cwd: str | None = None
    stderr: str | None = None
    """A file to which the standard error of the process is appended. By default it is dropped, because it may quote
    contents that no log of this server may have."""
    url: str | None = None
    headers: dict[str, str] = {}
    """Sent with every request."""
    protocol: Literal["2026-07-28"] | None = None
    """Speaks this version where the server has it. Unset, the versions before it come first: in this one a running tool
    cannot send a question to its user, but only answer its call with one. In turn it needs no sessions."""
    connect_timeout: float = 10.0
    """Seconds for starting the process or connecting to the URL, and for the handshake."""
    timeout: float = 300.0
    """Seconds for one call, whatever a tool's own `timeout` says; while its tool waits for a user's answer, they do not
    count."""

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ValueError("a server has a `command`, or a `url`, and not both")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError("`url` begins with http:// or https://")
        if not all(text.isascii() and text.isprintable() for pair in self.headers.items() for text in pair):
            raise ValueError("a header contains a line break or a character outside ASCII")
        other = ("headers",) if self.command else ("args", "env", "cwd", "stderr")
        if stray := [name for name in other if getattr(self, name)]:
            raise ValueError(
                f"`{stray[0]}` has no meaning for a server with a `{'command' if self.command else 'url'}`"
            )
        if not all(0 < seconds <= MOST_SECONDS for seconds in (self.connect_timeout, self.timeout)):
            raise ValueError(f"time-outs are seconds above 0 and at most {MOST_SECONDS:,}")


def reference_problem(url: str | None, headers: Mapping[str, str], env: Mapping[str, str]) -> str:
    """Says in a sentence which of these refers to a variable, as their author wrote them: values that were read from
    variables may have any text. Empty if none does."""
    for name, values in (("url", [url or ""]), ("headers", headers.values()), ("env", env.values())):
        if named := next((found for value in values if (found := _VARIABLE.search(value))), None):
            return (
                f"`{name}` contains {named[0]}; variables are not replaced here (the tables [mcp.NAME] of the "
                "configuration file have header_env and pass_env for them)"
            )
    return ""


def program_problem(server: McpServerSettings) -> str:
    """Says in a sentence why a server's program cannot be started: it, or its directory, does not exist. Empty for one
    that can, and for a server with a URL."""
    if not server.command:
        return ""
    if server.cwd and not Path(server.cwd).is_dir():
        return f"There is no directory {server.cwd} to start it in."
    in_directory = os.path.dirname(server.command)  # as the system does: "./x" has one, and "x" has none
    command = os.path.join(server.cwd or "", server.command) if in_directory else server.command
    if shutil.which(command, path=server.env.get("PATH")) is None:
        return f"There is no program {server.command}" + ("." if in_directory else " on the PATH.")
    return ""


class _File(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    mcp_servers: dict[str, McpServerSettings]


def read_mcp_servers(path: Path) -> dict[str, McpServerSettings]:
    """The servers of a file by name; it is TOML when its name ends so, and JSON otherwise. Raises ToolSettingsError."""
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        read = msgspec.toml.decode if path.suffix == ".toml" else msgspec.json.decode
        servers = read(content, type=_File).mcp_servers
    except OSError as error:
        raise ToolSettingsError(f"The MCP servers' file {path} cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ToolSettingsError(f"The MCP servers' file {path} is wrong: {error}.") from error
    for name, server in servers.items():
        if problem := reference_problem(server.url, server.headers, server.env):
            raise ToolSettingsError(f"The MCP servers' file {path} is wrong: {problem} - at {name!r}.")
    return servers

"""Checks whether the parts that a server's settings refer to exist, without serving."""

from collections.abc import Collection, Iterator
from contextlib import suppress

from notecase_server.auth.settings import IssuerSettings, read_issuers
from notecase_server.auth.tables import Mistake, SettingsError
from notecase_server.config import Settings
from notecase_server.serve_stores import password_problem, url_problem
from notecase_server.tools.contract import ToolSettingsError
from notecase_server.tools.mcp_settings import program_problem
from notecase_server.tools.toolbox import make_toolbox


def missing_parts(settings: Settings, listed: Collection[str]) -> list[Mistake]:
    """Returns the mistakes in the modules of tools, which are imported, in the files of issuers' keys and of the
    store's password, in the programs of MCP servers, and in the store's URL, and says whether the store's driver is
    missing. Connects to nothing and starts nothing. `listed` has the names of the MCP servers that are not from a
    separate file."""
    tries = [*((module,) for module in settings.tools), settings.tools]
    found = [Mistake("--tools", text) for text in dict.fromkeys(filter(None, map(_tools_problem, tries)))]
    found += _jwks_mistakes("issuer", settings.listed_issuers)
    with suppress(SettingsError):  # `settings_mistakes` returns these
        found += _jwks_mistakes("--issuers issuer", read_issuers(settings.issuers) if settings.issuers else ())
    for name, server in settings.mcp_servers.items():
        if problem := program_problem(server):
            place = f"mcp.{name}" if name in listed else f"--mcp-config mcpServers.{name}"
            found.append(Mistake(f"{place}.command", problem))
    if problem := url_problem(settings.store):
        found.append(Mistake("--store", problem))
    if (file := settings.store_password_file) is not None and (problem := password_problem(file)):
        found.append(Mistake("--store-password-file", problem))
    return found


def _tools_problem(modules: Collection[str]) -> str:
    try:
        make_toolbox(tuple(modules), {})
    except ToolSettingsError as error:
        return str(error)
    return ""


def _jwks_mistakes(place: str, issuers: Collection[IssuerSettings]) -> Iterator[Mistake]:
    for number, issuer in enumerate(issuers):
        if issuer.jwks_file is not None:
            from notecase_server.auth.jwks import file_problem  # noqa: PLC0415  # imports cryptography

            if problem := file_problem(issuer.jwks_file):
                yield Mistake(f"{place}[{number}].jwks_file", problem)

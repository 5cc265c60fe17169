"""The structure of the code: which modules may import which, where each kind of code belongs, how long modules may be,
and that the distributions declare their dependencies."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import packages_distributions
from inspect import getmembers, iscoroutinefunction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import notecase_server
import pytest
from notecase_server.store import contract
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "server" / "src" / "notecase_server"
CLIENT = ROOT / "client" / "src" / "notecase"
STUBS = CLIENT / "v1"


class Room(NamedTuple):
    """A room is a module with everything below it, and the modules next to it whose names continue its name with an
    underscore, except those that have their own row. `may_import` lists rooms; a room may always import itself, and the
    version."""

    may_import: set[str]
    because: str


ROOMS: dict[str, Room] = {
    "__init__": Room(set(), "The root holds the version, and importing it costs nothing."),
    "errors": Room(set(), "Every module raises them, so they import nothing."),
    "limit": Room(set(), "All waits use the same time limit."),
    "allocator": Room(set(), "The C library's memory belongs to the whole process."),
    "names": Room({"errors", "store.contract"}, "Resource names are converted to keys in one place."),
    "log_lines": Room(set(), "Log lines have one format, whatever they are about."),
    "loopback": Room(set(), "Server and client use the same rule for loopback addresses."),
    "config": Room(
        {"auth", "errors", "log_lines", "loopback", "tools.mcp"},
        "Settings are read once and passed in.",
    ),
    "supervisor": Room({"errors", "store.contract"}, "All background tasks have the same owner."),
    "store.contract": Room({"errors"}, "A contract imports none of its implementations."),
    "store.fold": Room({"errors", "store.contract"}, "The fold is the same for every store."),
    "store.bindings": Room(set(), "Engine and stores use the same rule for what a call is bound to."),
    "store.earlier": Room({"store.bindings", "store.fold"}, "Old formats are converted in one place."),
    "store.answers": Room({"names", "store.contract"}, "Responses are made from the written rows in one place."),
    "store": Room(
        {"errors", "names", "store.answers", "store.bindings", "store.contract", "store.fold"},
        "Code that stores share imports none of them.",
    ),
    "store.memory": Room({"errors", "store", "store.contract", "store.sqlite"}, "It is a SQLite store without a file."),
    "store.sqlite": Room(
        {"errors", "store", "store.contract", "store.earlier", "store.fold", "supervisor"},
        "A store does not depend on another one.",
    ),
    "store.postgres": Room(
        {"errors", "store", "store.contract", "store.fold", "supervisor"}, "A store does not depend on another one."
    ),
    "models": Room({"errors"}, "A package of packages; each new module needs its own row."),
    "models.contract": Room({"errors"}, "A contract imports none of its implementations."),
    "models.answers": Room({"errors", "models.contract"}, "The words of providers are interpreted in one place."),
    "models.provider_data": Room(
        {"models.contract", "models.answers"}, "Data for the provider is taken out of a reply in one place."
    ),
    "models.chat_stream": Room(
        {"errors", "models.contract", "models.answers", "models.provider_data"},
        "Reading a format does not need a provider.",
    ),
    "models.profiles": Room(set(), "Profiles are data, without code that calls anything."),
    "models.pieces": Room(set(), "Sending bytes does not depend on their content."),
    "models.proxies": Room(set(), "Proxies depend only on the environment."),
    "models.endpoint": Room({"models.proxies"}, "Settings are checked before a provider is loaded."),
    "models.wire": Room({"errors", "limit", "models.pieces"}, "A connection does not depend on the model."),
    "models.request": Room(
        {"errors", "models.contract", "models.pieces", "models.profiles"}, "Writing a format does not need a provider."
    ),
    "models.openai": Room(
        {"errors", "limit", "models.contract", "models.answers", "models.chat_stream"}
        | {"models.endpoint", "models.pieces", "models.profiles", "models.request", "models.wire"},
        "A provider does not depend on another one.",
    ),
    "models.deferred": Room({"errors", "models.contract"}, "Deferred loading is the same for every provider."),
    "models.guard": Room({"errors", "models.contract"}, "Limits are the same for every provider."),
    "models.offline": Room(
        {"errors", "models.contract", "models.answers"}, "A provider does not depend on another one."
    ),
    "tools": Room({"errors"}, "A package of packages; each new module needs its own row."),
    "tools.contract": Room(
        {"client", "errors"}, "A contract imports none of its implementations; tools use plain values."
    ),
    "tools.clock": Room(set(), "All waits pause the clock in the same way."),
    "tools.naming": Room(set(), "Names of tools follow one rule, wherever they are declared."),
    "tools.outcome": Room({"tools.contract"}, "Results have the same limits for every kind of tool."),
    "tools.functions": Room(
        {"client", "tools.contract", "tools.outcome"},
        "Functions do not depend on remote tools, and are declared with the client's code.",
    ),
    "tools.mcp": Room(
        {"errors", "supervisor", "tools.clock", "tools.contract", "tools.naming", "tools.outcome"},
        "Remote tools do not depend on functions.",
    ),
    "tools.toolbox": Room(
        {"errors", "tools.contract", "tools.functions", "tools.mcp"}, "It composes functions and remote tools."
    ),
    "engine": Room(
        {"errors", "names", "store.bindings", "store.contract", "store.earlier", "store.fold", "models.contract"}
        | {"supervisor", "tools.clock", "tools.contract", "tools.naming"},
        "Runs do not depend on the store, the provider or the transport.",
    ),
    "auth": Room(
        {"errors", "names", "store.contract", "supervisor"},
        "Authentication does not depend on the request.",
    ),
    "rpc": Room(
        {
            "auth",
            "errors",
            "limit",
            "names",
            "engine",
            "supervisor",
            "store.answers",
            "store.contract",
            "store.fold",
            "tools.contract",
            "tools.naming",
        },
        "Services call the engine, and the store's contract for reads.",
    ),
    "serve": Room({"*"}, "It composes the server, so it may import everything."),
    "testing": Room(
        {"config", "models.contract", "models.offline", "serve", "tools.toolbox"},
        "It composes a server for tests, as `serve` does for operation.",
    ),
    "cli": Room({"client", "loopback"}, "A command is a client: it knows only the server's address."),
    "cli.store_config": Room({"auth", "cli"}, "The store's URL may be in the server's configuration file."),
    "cli.keys": Room(
        {"cli", "cli.store_config", "client", "config", "serve", "store.contract"},
        "The first key is created without a server.",
    ),
    "cli.serve": Room(
        {"auth", "cli", "serve", "config", "store.contract", "tools.contract", "tools.mcp"},
        "This command starts a server and does not need the client.",
    ),
    "cli.config": Room({"auth", "cli", "cli.serve", "config"}, "A file is checked with the code of `serve`."),
    "cli.providers": Room(
        {"auth", "cli", "cli.serve", "config", "errors", "models.contract", "serve"},
        "A provider is tested with the server's code, without a server.",
    ),
    "cli.backup": Room(
        {"cli", "cli.store_config", "serve", "store.contract"},
        "The store is copied with the code that composes a server.",
    ),
    **{
        name: Room(
            {"cli", "cli.store_config", "config", "serve", "store.contract"},
            "As cli.backup, with the log of the store.",
        )
        for name in ("cli.copy", "cli.migrate", "cli.store")
    },
    "__main__": Room({"cli"}, "Runs the command with `python -m`."),
}


class Line(NamedTuple):
    """`lives_in` lists modules, each with everything below it."""

    lives_in: set[str]
    because: str


LINES: dict[str, Line] = {
    "*.StatusCode": Line({"rpc.interceptor"}, "Failures are turned into statuses in one place."),
    "*.abort": Line(
        {"rpc.interceptor", "tools.mcp_pipes"},
        "Calls are aborted in one place, other modules raise errors. The other aborts the input of a program.",
    ),
    "grpc*": Line({"rpc", "auth.tls", "cli.health"}, "Only the services and the health check use the transport."),
    "cryptography": Line({"auth.tls"}, "Certificates are read in one place."),
    "jwt": Line({"auth.jwks", "auth.tokens"}, "Tokens are verified in one place."),
    "openai": Line({"models.openai"}, "A provider's library is used only behind the contract."),
    "aiohttp": Line(
        {"models.wire", "auth.jwks"}, "Models and issuers' keys are requested over one kind of connection."
    ),
    "httpx2": Line(
        {"models.endpoint", "models.openai", "models.proxies", "models.wire", "tools.mcp"},
        "URLs and certificates are interpreted as by the openai SDK; MCP's library sends with it.",
    ),
    "mcp": Line({"tools.mcp"}, "A protocol's library is used only behind the contract."),
    "pydantic": Line({"tools.functions"}, "Operators' types are interpreted in one place."),
    "sqlite3": Line({"store.sqlite"}, "SQL belongs in its store."),
    "asyncpg": Line({"store.postgres"}, "SQL belongs in its store."),
    "greenlet": Line({"store.postgres"}, "Only a step on a database switches greenlets."),
    "notecase_server.store.contract.Store": Line(
        {"serve", "store", "rpc.server"},
        "Only composition names the whole store; other modules name the parts that they use.",
    ),
    "jsonschema_rs": Line({"engine.schema"}, "Untrusted schemas are applied in one place, in a separate process."),
    "liquid": Line({"engine.template"}, "Untrusted templates are rendered in one place, within limits."),
    "click": Line({"cli"}, "Only commands read the command line."),
    "prompt_toolkit": Line({"cli.terminal"}, "Only the chat edits lines."),
    "rich": Line({"cli.live", "cli.output", "cli.screen"}, "Few modules draw on the terminal."),
    "yaml": Line({"cli.manifest", "cli.output"}, "YAML is read in one place and printed in one."),
    "uvloop": Line({"cli.serve", "serve"}, "Only the composition chooses the event loop."),
    "os.environ*": Line({"config", "cli.grpc_log"}, "Settings are read in one place."),
    "os.getenv*": Line({"config"}, "As os.environ."),
    "uuid": Line({"serve", "cli"}, "Ids are passed in, so that tests are exact."),
    "uuid_utils": Line({"serve", "cli"}, "As uuid."),
    "time.time": Line({"serve", "cli"}, "The clock is passed in, so that tests are exact."),
    "time.time_ns": Line({"serve", "cli"}, "As time.time."),
    "datetime.*now": Line({"serve", "cli"}, "As time.time."),
    "datetime.*today": Line({"serve", "cli"}, "As time.time."),
    "*.GetCurrentTime": Line({"serve", "cli"}, "A Timestamp reads the clock, too."),
}


class Uses(NamedTuple):
    """The names in one module: its imports, and every dotted name with imported names replaced by their origins. A name
    that begins with a local variable begins with a dot."""

    imports: set[str]
    names: set[str]


def uses(source: str, module: str = "", is_package: bool = False) -> Uses:
    """Reads a module; `module` is its dotted name, which relative imports start from."""
    tree = ast.parse(source)
    imports: set[str] = set()
    spelt: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.add(alias.name)
                top = alias.name.partition(".")[0]
                spelt[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            steps = module.split(".")
            above = steps[: len(steps) - node.level + is_package] if node.level else []
            origin = ".".join([*above, node.module] if node.module else above)
            for alias in node.names:
                imports.add(f"{origin}.{alias.name}")
                spelt[alias.asname or alias.name] = f"{origin}.{alias.name}"
    names = {dotted(node, spelt) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    return Uses(imports, names | imports)


def dotted(node: ast.expr, spelt: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, spelt)}.{node.attr}"
    return spelt.get(node.id, "") if isinstance(node, ast.Name) else ""


def belongs(module: str, room: str) -> bool:
    return module == room or module.startswith((f"{room}.", f"{room}_"))


def room_of(name: str) -> str:
    """Returns the room of a module of the server, or of a name in one; empty if there is none."""
    return max((room for room in ROOMS if belongs(name, room)), key=len, default="")


def forbidden_imports(module: str, used: Uses) -> Iterator[str]:
    """Yields the imports of a module of the server that ROOMS does not allow. Every module may import `notecase.v1`,
    but not the client."""
    room = room_of(module)
    allowed = ROOMS[room].may_import | {room}
    for name in sorted(used.imports):
        package, _, inner = name.partition(".")
        if package == "notecase_server" and inner and inner != "__version__":
            target = room_of(inner) or inner
        elif package == "notecase" and not belongs(inner, "v1"):
            target = "client"
        else:
            continue
        if target not in allowed and "*" not in allowed:
            yield f"{module} -> {target} ({name}). {ROOMS[room].because}"


def misplaced_lines(module: str, used: Uses) -> Iterator[str]:
    """Yields the names in a module of the server that LINES allows only elsewhere."""
    for pattern, line in LINES.items():
        if any(belongs(module, room) for room in line.lives_in):
            continue
        for name in sorted(used.names):
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*"):
                yield f"{module}: {name} belongs in {' or '.join(sorted(line.lives_in))}. {line.because}"


def modules(package: Path) -> dict[str, Uses]:
    """Returns every module of a package by its dotted name within it; the package itself is `__init__`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        inner = ".".join(parts[:-1] if is_package else parts) or "__init__"
        found[inner] = uses(path.read_text(), f"{package.name}.{inner}".removesuffix(".__init__"), is_package)
    return found


def test_every_module_of_the_server_has_a_room() -> None:
    assert [] == [name for name in modules(SERVER) if not room_of(name)]


def test_modules_import_only_what_their_room_may() -> None:
    assert [] == [wrong for name, used in modules(SERVER).items() for wrong in forbidden_imports(name, used)]


def test_each_kind_of_code_is_where_it_belongs() -> None:
    assert [] == [wrong for name, used in modules(SERVER).items() for wrong in misplaced_lines(name, used)]


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("store.postgres", "from notecase_server.store.sqlite import tables", "store.sqlite"),
        ("store.postgres.tables", "from ..sqlite.store import SqliteStore", "store.sqlite"),
        ("store.tables", "import notecase_server.store.memory as other", "store.memory"),
        ("models.offline", "from notecase_server.models.openai import OpenAIProvider", "models.openai"),
        ("engine.turn", "from ..rpc import watch", "rpc"),
        ("engine.turn", "from notecase_server.models import offline", "models.offline"),
        ("engine.turn", "from notecase_server.config import Settings", "config"),
        ("rpc.server", "from notecase_server import serve", "serve"),
        ("rpc.run", "from notecase import Client", "client"),
        ("cli.sessions", "from notecase_server.serve import now", "serve"),
        ("cli.serve", "from notecase import Client", "client"),
        ("rpc.run", "import notecase_server.unheard_of", "unheard_of"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, named: str) -> None:
    found = list(forbidden_imports(module, uses(source, f"notecase_server.{module}")))
    assert [f"{module} -> {named}"] == [wrong.partition(" (")[0] for wrong in found]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rpc.agents", "import grpc\ncode = grpc.StatusCode.INTERNAL"),
        ("rpc.agents", "from grpc import StatusCode as Code"),
        ("rpc.run", "from notecase_server.rpc.interceptor import abort"),
        ("rpc.run", "async def run(self, context):\n    await self.context.abort(1, '')"),
        ("engine.turn", "import grpc.aio"),
        ("serve", "from grpc_health.v1 import health"),
        ("models.chat_stream", "from openai import AsyncOpenAI"),
        ("store.memory", "import sqlite3 as db"),
        ("store.sqlite", "from asyncpg import Connection"),
        ("rpc.validate", "from liquid import Environment"),
        ("store.sqlite.file", "import os\nhome = os.environ['HOME']"),
        ("cli", "from os import getenv"),
        ("cli.chat", "from prompt_toolkit import PromptSession"),
        ("cli.run", "from rich.markdown import Markdown"),
        ("cli.agents", "import yaml"),
        ("engine.runs", "import uuid_utils.compat"),
        ("engine.runs", "from time import time as now\nnow()"),
        ("store.sqlite", "import time\nclock = time.time_ns"),
        ("engine.summary", "from notecase_server.store.contract import Store"),
        ("rpc.desk", "from notecase_server.store import contract\ndef look(store: contract.Store): pass"),
        ("engine.runs", "import datetime\ndatetime.datetime.now()"),
        ("engine.runs", "from datetime import date\ndate.today()"),
        ("store.fold", "def stamp(event):\n    event.create_time.GetCurrentTime()"),
    ],
)
def test_misplaced_code_is_found(module: str, source: str) -> None:
    assert list(misplaced_lines(module, uses(source, f"notecase_server.{module}")))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.runs", "import asyncio\nasyncio.get_running_loop().time()"),
        ("engine.runs", "import time\ntime.monotonic()"),
        ("engine.runs", "def run(self, uuid, openai):\n    return uuid.hex + openai.key"),
        ("engine.runs", "from notecase_server import __version__, errors\nfrom notecase import v1"),
        ("store.sqlite.file", "import sqlite3\nfrom .tables import SqliteTables"),
        ("models.openai", "import openai"),
        ("serve", "from notecase_server.models.openai import OpenAIProvider"),
        ("serve", "from notecase_server.store.contract import Store"),
        ("engine.summary", "from notecase_server.store.contract import RunStore, StoreOpenError"),
    ],
)
def test_code_in_its_place_is_accepted(module: str, source: str) -> None:
    used = uses(source, f"notecase_server.{module}")
    assert [] == [*forbidden_imports(module, used), *misplaced_lines(module, used)]


PART_CALLS = 12
"""The most methods in one part of a store."""


def test_a_store_combines_small_parts() -> None:
    """Each part has few methods, and no method is in two parts."""
    parts = [part for part in contract.Store.__bases__ if part is not Protocol]
    calls = [[name for name, member in vars(part).items() if iscoroutinefunction(member)] for part in parts]
    assert [] == [part.__name__ for part, some in zip(parts, calls, strict=True) if not 0 < len(some) <= PART_CALLS]
    assert [] == [name for name, often in Counter(chain(*calls)).items() if often > 1]
    assert {name for name, _ in getmembers(contract.Store, iscoroutinefunction)} == set(chain(*calls))


SMALL = ("cli", "engine", "rpc.interceptor", "supervisor")
"""Rooms to which the limits below apply."""

EXCEPTIONS = {
    "engine.template": "Everything about untrusted templates: the filters and limits belong together.",
    "engine.session.LiveSession": "The data that a session's workers and watchers share.",
}
"""Modules and classes that may be larger, with the reason: at most two."""

MODULE_LINES = 350
FUNCTION_LINES = 60
MUTABLE_FIELDS = 12


def oversized(name: str, source: str) -> Iterator[str]:
    """Yields what exceeds a limit in a module: the module itself, functions without their decorators, and classes by
    the fields of `self` that their methods assign."""
    if (lines := len(source.splitlines())) > MODULE_LINES:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{name}.{node.name}: {lines} lines"
        elif isinstance(node, ast.ClassDef):
            inside = [one for one in ast.walk(node) if isinstance(one, ast.Attribute)]
            stored = [one for one in inside if isinstance(one.ctx, ast.Store) and isinstance(one.value, ast.Name)]
            fields = {one.attr for one in stored if isinstance(one.value, ast.Name) and one.value.id == "self"}
            if len(fields) > MUTABLE_FIELDS:
                yield f"{name}.{node.name}: {len(fields)} fields"


def test_modules_functions_and_classes_are_small() -> None:
    found: list[str] = []
    for path in sorted(SERVER.rglob("*.py")):
        name = ".".join(path.relative_to(SERVER).with_suffix("").parts).removesuffix(".__init__")
        if any(belongs(name, room) for room in SMALL):
            found.extend(oversized(name, path.read_text()))
    assert list(EXCEPTIONS) == sorted({too_large.partition(":")[0] for too_large in found}, reverse=True)
    assert len(EXCEPTIONS) <= 2


def test_every_task_has_an_owner() -> None:
    """Only the supervisor and the commands of the terminal create tasks."""
    begun = re.compile(r"\b(create_task|ensure_future)\(")
    found = {path.relative_to(SERVER).as_posix() for path in SERVER.rglob("*.py") if begun.search(path.read_text())}
    assert {name for name in found if not name.startswith("cli/")} == {"supervisor.py"}


def test_large_modules_functions_and_classes_are_found() -> None:
    long = "def long():\n" + "    pass\n" * 60
    wide = "class Wide:\n    def __init__(self):\n" + "".join(f"        self.a{n} = {n}\n" for n in range(13))
    assert ["m.long: 61 lines", "m.Wide: 13 fields"] == list(oversized("m", long + wide))
    assert ["m: 351 lines"] == list(oversized("m", "pass\n" * 351))


PROVIDERS = {"google.protobuf": "protobuf", "google.rpc": "googleapis-common-protos"}
"""The distributions that share an import name, by package."""


def project(folder: str) -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())
    return settings


def requirements(texts: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(one.name): one for one in map(Requirement, texts)}


def declared(folder: str) -> dict[str, Requirement]:
    """Returns the requirements of a distribution, including its extra for PostgreSQL."""
    settings = project(folder)["project"]
    extra = settings.get("optional-dependencies", {}).get("postgres", ())
    return requirements([*settings["dependencies"], *extra])


def needed(package: Path) -> set[str]:
    """Returns the distributions that a package's modules import from, except itself and Python's library."""
    installed = packages_distributions()
    found = set()
    for used in modules(package).values():
        for name in used.imports:
            top = name.partition(".")[0]
            if top in {package.name, ""} or top in sys.stdlib_module_names:
                continue
            shared = ".".join(name.split(".")[:2])
            found.add(PROVIDERS.get(shared) or canonicalize_name(installed.get(top, [top])[0]))
    return found


def test_the_client_needs_its_three_packages_and_nothing_else() -> None:
    assert {"grpcio", "protobuf", "grpcio-status"} == set(declared("client"))
    # google.rpc's messages are grpcio-status's own arguments and results, and come with it.
    # typing_extensions is imported for type checkers alone, which bring it: `if TYPE_CHECKING`.
    assert needed(CLIENT) <= set(declared("client")) | {"googleapis-common-protos", "pydantic", "typing-extensions"}
    assert ["reply"] == [name for name, used in modules(CLIENT).items() if "typing_extensions.TypeVar" in used.imports]
    assert "if TYPE_CHECKING:\n    from typing_extensions import TypeVar\n" in (CLIENT / "reply.py").read_text()
    assert {"pydantic": ["pydantic>=2.14,<3"]} == project("client")["project"]["optional-dependencies"]
    assert ["pydantic_hints"] == [
        name for name, used in modules(CLIENT).items() if "pydantic.TypeAdapter" in used.imports
    ]


def test_the_server_declares_what_it_imports() -> None:
    assert set() == needed(SERVER) - set(declared("server"))


def test_both_distributions_are_released_together() -> None:
    assert f"notecase=={notecase_server.__version__}" == str(declared("server")["notecase"])
    client, server = (project(folder)["tool"]["hatch"]["version"]["path"] for folder in ("client", "server"))
    assert (ROOT / "client" / client).resolve() == (ROOT / "server" / server).resolve()


def test_each_distribution_carries_the_licence() -> None:
    """It is a copy: a link would be broken in a source distribution."""
    for folder in ("client", "server"):
        assert not (ROOT / folder / "LICENSE").is_symlink()
        assert (ROOT / "LICENSE").read_text() == (ROOT / folder / "LICENSE").read_text()


def test_every_requirement_has_a_pin_that_fits() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = requirements([line for line in lines if not line.startswith("#")])
    assert {"=="} == {one.operator for pin in pins.values() for one in pin.specifier}
    wanted = [declared("client"), declared("server"), requirements(project(".")["dependency-groups"]["dev"])]
    unfit = []
    for name, requirement in (item for group in wanted for item in group.items() if item[0] != "notecase"):
        version = next((one.version for one in pins[name].specifier), "") if name in pins else ""
        if not version or not requirement.specifier.contains(version):
            unfit.append(f"{requirement}: {version or 'no pin'}")
    assert [] == unfit


def test_the_floors_of_the_client_are_what_the_stubs_demand() -> None:
    """With older versions the stubs cannot be imported; a higher minimum would exclude installations needlessly."""
    services = [path.read_text() for path in STUBS.glob("*_pb2_grpc.py")]
    messages = [path.read_text() for path in STUBS.glob("*_pb2.py")]
    grpcio = {found for text in services for found in re.findall(r"GRPC_GENERATED_VERSION = '([\d.]+)'", text)}
    called = r"ValidateProtobufRuntimeVersion\(\s*\S+,\s*(\d+),\s*(\d+),\s*(\d+),"
    protobuf = {".".join(found) for text in messages for found in re.findall(called, text)}
    floors = {
        name: {one.version for one in requirement.specifier if one.operator == ">="}
        for name, requirement in declared("client").items()
    }
    assert {"grpcio": grpcio, "protobuf": protobuf, "grpcio-status": grpcio} == floors
    # The runtime promises to take stubs of its own major and of the one before.
    (demanded,) = map(Version, protobuf)
    assert not declared("client")["protobuf"].specifier.contains(f"{demanded.major + 2}.0.0")
    assert declared("client")["protobuf"].specifier.contains(f"{demanded.major + 1}.999.0")


def test_every_proto_has_its_stubs_and_the_package_exports_them() -> None:
    """`make proto-check`, which has the generator, compares the contents of the stubs."""
    protos = {path.stem: path.read_text() for path in (ROOT / "proto" / "notecase" / "v1").glob("*.proto")}
    services = {name for name, text in protos.items() if re.search(r"^service ", text, re.MULTILINE)}
    stems = {f"{name}_pb2" for name in protos} | {f"{name}_pb2_grpc" for name in services}
    assert {f"{stem}{end}" for stem in stems for end in (".py", ".pyi")} == {
        path.name for path in STUBS.glob("*_pb2*.py*")
    }
    assert {f"notecase.v1.{stem}.*" for stem in stems} == uses((STUBS / "__init__.py").read_text()).imports


ELSEWHERE = [
    ".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("proxy", "golang"), ("npmjs", "org"))
]
"""Package registries: no file names one, so that users can choose theirs."""

OPTIONS = ["-".join(parts) for parts in (("index", "url"), ("find", "links"), ("trusted", "host"))]


TEXT = {"", ".cfg", ".in", ".json", ".md", ".proto", ".py", ".pyi", ".sh", ".sql", ".toml", ".txt", ".yaml", ".yml"}
MADE_HERE = {"gen", "node_modules", "target", "__pycache__", "build", "dist"}


def files() -> Iterator[Path]:
    """Yields the text files of the checkout, without generated files and those of git."""
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if name not in MADE_HERE and (name == ".ci" or not name.startswith("."))]
        names[:] = [name for name in names if name != ".git"]  # a file where the checkout is a linked worktree
        yield from (Path(folder, name) for name in names if Path(name).suffix in TEXT)


def test_no_file_names_a_registry_or_a_place_on_one_machine() -> None:
    word = re.compile("|".join(map(re.escape, [*ELSEWHERE, *OPTIONS])) + r"|(?<![\w./$])/(?:work|tmp|root|home)/")
    found = [f"{path.relative_to(ROOT)}: {hit[0]}" for path in files() for hit in word.finditer(path.read_text())]
    assert [] == found


SKIPPING = """
import pytest
def test_runs(): pass
def test_skips(): pytest.skip('no tool')
@pytest.mark.xfail
def test_is_expected_to_fail(): assert False
@pytest.mark.skip
def test_is_marked(): pass
"""

SKIPPED = "import pytest; pytest.skip('no tool', allow_module_level=True)"


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("source", "ci", "outcome"),
    [
        (SKIPPING, "true", "1 failed, 1 passed, 1 xfailed, 1 error"),
        (SKIPPING, "", "1 passed, 2 skipped, 1 xfailed"),
        (SKIPPED, "true", "1 error"),
        (SKIPPED, "", "1 skipped"),
    ],
    ids=["tests in CI", "tests", "a module in CI", "a module"],
)
def test_a_skip_fails_in_ci_and_an_expected_failure_does_not(
    tmp_path: Path, source: str, ci: str, outcome: str, workers: str
) -> None:
    """In one process, and with workers that report to another one."""
    (tmp_path / "test_some.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", os.devnull, "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "-p", "xdist", "-n", workers, "--dist", "worksteal", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout.splitlines()[-1]
    assert (done.returncode in {1, 2}) == bool(ci)


HANGING = """
import threading, pytest
from tests import hanging

@pytest.fixture
def stuck():
    yield
    threading.Event().wait()

def test_runs(): pass

@pytest.mark.timeout(200)
def test_hangs(stuck):
    hanging.AFTER_TIMEOUT = 1 - 200
    assert False

def test_runs_later(): pass
"""


def test_a_test_that_hangs_in_its_teardown_is_named_and_failed_and_others_run(tmp_path: Path) -> None:
    """Also after it failed, which ends pytest's own limit of this kind."""
    (tmp_path / "test_some.py").write_text(HANGING)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", os.devnull, "--rootdir", str(tmp_path)]
    plugins = ["-p", "xdist", "-p", "pytest_timeout", "-p", "no:cacheprovider", "-n", "1"]
    done = subprocess.run(
        [*command, *plugins, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (1, True) == (done.returncode, "crashed while running 'test_some.py::test_hangs'" in done.stdout)
    assert "2 failed, 2 passed" in done.stdout.splitlines()[-1]
    assert "Timeout (0:00:01)!" in done.stderr

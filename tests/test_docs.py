"""The README and the pages of docs/ are true: their calls and programs run against a real server, the calls print what
the pages show, and every link leads somewhere."""

import ast
import asyncio
import json
import re
import shlex
import sys
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, generate_tokens
from typing import Any

import click
import msgspec
import pytest
from notecase import v1
from notecase_server.cli import main
from notecase_server.errors import CATALOG
from notecase_server.rpc.agents import AGENT_FILTER
from notecase_server.rpc.audit import FILTER as AUDIT_FILTER
from notecase_server.rpc.filter import parse
from notecase_server.rpc.runs import RUN_FILTER
from notecase_server.rpc.sessions import SESSION_FILTER
from notecase_server.tools.mcp_settings import read_mcp_servers
from notecase_server.tools.toolbox import make_toolbox

from docs.tools import errors
from tests.cli.test_docs import commands
from tests.support.server import running

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CLIENTS = [ROOT / "client" / "go" / "README.md", ROOT / "client" / "typescript" / "README.md"]
CHANGING = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+Z|[0-9a-f]{8}-[0-9a-f]{4}-[47][0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{13}-(?=\d)"
    r'|(?<=")[0-9a-f]{8}-(?=\d+")|(?<="next_page_token": ")[^"]+|(?<=": ")\d+(\.\d+)?s'
    r'|(?<="log_bytes": ")\d+'
)
"""Times, the server's ids, the part of an etag that is a time or of a uid, page tokens, durations, and the size of a
log, in which there are times."""


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def calls() -> list[tuple[str, str]]:
    """The commands of docs/calls.md with the output under each, in order."""
    found = []
    for block in blocks("docs/calls.md", "console"):
        for call in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = call.partition("\n")
            found.append((command, output))
    return found


def told(output: str) -> list[Any]:
    """Returns the content of an output without what differs between runs: ids, times, and how the events fell into
    batches."""
    try:
        documents = list(_documents(CHANGING.sub("", output)))
    except ValueError:
        return [line.split() for line in CHANGING.sub("", output).splitlines()]
    said = [document for document in documents if "batch" not in document]
    events = [event for document in documents for event in document.get("batch", {}).get("events", [])]
    return said + [event for event in events if "sequence" in event]


def _found(text: str) -> list[str]:
    """Returns values that later calls may name."""
    return [found.group() for found in CHANGING.finditer(text) if not found.group().isdigit()]


def _documents(text: str) -> list[Any]:
    decoder, found, at = json.JSONDecoder(), [], 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        document, at = decoder.raw_decode(text, at)
        found.append(document)
    return found


async def test_every_call_prints_what_the_page_shows(grpcurl: str) -> None:
    ids: dict[str, str] = {}
    async with running(max_runs=1000) as served:
        for command, printed in calls():
            words = [ids.get(word, word) for word in shlex.split(command)]
            for old, new in ids.items():
                words = [word.replace(old, new) for word in words]
            assert words[0] == "grpcurl"
            words = [grpcurl, *(word.replace("localhost:7420", served.address) for word in words[1:])]
            process = await asyncio.create_subprocess_exec(
                *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            output = (await process.communicate())[0].decode()
            assert told(output) == told(printed), command
            ids.update(zip(_found(printed), _found(output), strict=False))


def test_the_events_of_the_page_are_logged_with_their_levels() -> None:
    """A line for each call of the log in the source; `exception` has the level error."""
    logged = dict[str, str]()
    for path in (ROOT / "server" / "src").rglob("*.py"):
        for level, event in re.findall(r'log\.(info|warning|error|exception|critical)\(\s*"(\w+)"', path.read_text()):
            logged[event] = level.replace("exception", "error")
    page = (ROOT / "docs" / "operate.md").read_text().partition("## Monitoring")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (\w+) \|", page, re.MULTILINE)
    told = {event: level for events, level in rows for event in re.findall(r"`(\w+)`", events)}
    assert len(told) > 40
    assert told == {event: logged.get(event) for event in told}


def test_every_method_of_the_contract_is_shown() -> None:
    shown = {command.split()[-1].partition(".v1.")[2] for command, _ in calls()}
    methods = {
        f"{service}/{method}"
        for module in ("agent", "blob", "message", "run", "server", "session", "state")
        for service, described in _services(module)
        for method in described
    }
    assert methods - shown == set()


def _services(module: str) -> list[tuple[str, list[str]]]:
    descriptor = getattr(v1, f"{module}_pb2").DESCRIPTOR
    return [(name, list(service.methods_by_name)) for name, service in descriptor.services_by_name.items()]


async def execute(program: str, page: str, address: str) -> None:
    """Runs the `main` of a page's program, which is printed with the address of a fresh server."""
    source = re.sub(r"^asyncio\.run\(main\(\)\).*\n", "", program, flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(source.replace("127.0.0.1:7420", address), page, "exec"), names)
    await names["main"]()


async def test_the_mcp_server_of_the_guide_is_called(tmp_path: Path) -> None:
    (program,) = [one for one in blocks("docs/guide.md", "python") if one.startswith("# clock_mcp.py")]
    (tmp_path / "clock_mcp.py").write_text(program)
    (listed,) = blocks("docs/guide.md", "json")
    (tmp_path / "servers.json").write_text(listed)
    clock = read_mcp_servers(tmp_path / "servers.json")["clock"]
    here = msgspec.structs.replace(clock, command=sys.executable, cwd=str(tmp_path), connect_timeout=300.0)
    async with running(toolbox=make_toolbox((), {"clock": here})) as served, served.client() as client:
        await client.put_agent("keeper", tools=[{"name": "clock", "mcp": {"server": "clock"}}])
        reply = await client.invoke("/call clock_now", agent="keeper")
    assert re.search(r"clock_now gave: \d{4}-\d\d-\d\dT[\d:]+\+00:00", reply.text)


async def test_the_template_of_the_guide_reads_each_scope() -> None:
    (source,) = blocks("docs/guide.md", "liquid")
    async with running() as served, served.client() as client:
        await client.put_agent("detective", source)
        await client.put_state("app", "policy", "Be brief.")
        session = await client.create_session("detective", state={"case": "The violin", "clues": ["a bow", "a key"]})
        reply = await client.invoke("Hello.", session=session)
    told = "The case: The violin. The client is your client.\nHouse rules: Be brief.\n- a bow\n- a key"
    assert told in reply.text


async def test_the_filters_of_the_guide_are_taken_and_its_fields_are_those_that_exist() -> None:
    page = (ROOT / "docs" / "guide.md").read_text().partition("## Lists and filters")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| `List(\w+)` \| (.+) \|$", page, re.MULTILINE)
    fields = {kind: set(re.findall(r"`([\w.]+)`", told)) for kind, told in shown}
    known = {"Sessions": SESSION_FILTER, "Runs": RUN_FILTER, "Agents": AGENT_FILTER, "AuditEntries": AUDIT_FILTER}
    assert fields == {kind: {name.replace("labels", "labels.KEY") for name in taken} for kind, taken in known.items()}
    (examples,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    for example in examples.splitlines():
        assert parse(example, SESSION_FILTER)


async def test_the_python_of_the_first_steps_runs(capfd: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("docs/start.md", "python")
    async with running() as served:
        await execute(program, "docs/start.md", served.address)
    assert "Last seen: the harbour." in capfd.readouterr().out


async def test_the_readmes_python_runs_on_a_fresh_server(capfd: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("README.md", "python")
    async with running() as served:
        code = compile(program.replace("127.0.0.1:7420", served.address), "README.md", "exec")
        await asyncio.to_thread(exec, code, {})
    assert "Seen: the harbour." in capfd.readouterr().out


async def test_the_readmes_call_runs_on_a_fresh_server(grpcurl: str) -> None:
    _, shell = blocks("README.md", "sh")
    words = shlex.split(shell.replace("\\\n", ""))
    async with running() as served:
        arguments = [word.replace("localhost:7420", served.address) for word in words[1:]]
        process = await asyncio.create_subprocess_exec(grpcurl, *arguments, stdout=asyncio.subprocess.PIPE)
        answer = json.loads((await process.communicate())[0])
    assert "agents/pirate" == answer["name"]


def test_the_readmes_first_screen_fits_a_screen() -> None:
    """What it is, the picture, how to start it, a call and a program."""
    first = (ROOT / "README.md").read_text().split("\n## ")[0]
    assert first.count("\n") <= 40
    assert len([line for line in blocks("README.md", "python")[0].splitlines() if line]) <= 8
    assert all(wanted in first for wanted in ("](docs/demo.svg)", "make serve", "grpcurl", "```python"))


LINK = re.compile(r"\]\(([^()\s]+)\)")
"""The target of a link or an image."""


def prose(page: Path) -> str:
    """Returns the page without its code."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = [re.sub(LINK, "", found) for found in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *CLIENTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        path, _, anchor = target.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        found = page.parent / path if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_index() -> None:
    """Those of docs/ in docs/index.md, and the index in the README."""
    listed = set(LINK.findall((ROOT / "docs/index.md").read_text()))
    assert {page.name for page in PAGES if page.parent == ROOT / "docs"} - listed == {"index.md"}
    assert "docs/index.md" in LINK.findall((ROOT / "README.md").read_text())


def test_the_page_of_errors_is_made_from_the_contract_and_the_catalog() -> None:
    """`make errors` writes it: every reason, with its code and its meaning."""
    assert errors.page() == errors.PAGE.read_text()
    named = {v1.ErrorReason.Name(reason).removeprefix("ERROR_REASON_") for reason in CATALOG}
    assert named == set(re.findall(r"^\| ([A-Z_]+) \|", errors.page(), re.MULTILINE))


DIALECT = re.compile(
    r"\b((?:is|are|was|be) told|tells? of|anew|beside|goes by|has to do with|is no key|is let in|whoever|for ever)\b",
    re.IGNORECASE,
)
"""Turns of earlier texts that a technical writer would not use: "is reported", "again", "next to" are plainer."""


def test_pages_protos_and_help_texts_are_plain_english() -> None:
    texts = {str(page.relative_to(ROOT)): prose(page) for page in PAGES}
    for proto in (ROOT / "proto").rglob("*.proto"):
        texts[proto.name] = " ".join(re.findall(r"// (.*)", proto.read_text()))
    for words, command in commands(main):
        options = [one.help or "" for one in command.params if isinstance(one, click.Option)]
        texts[f"notecase {words}"] = "\n".join([command.help or "", *options])
    assert {} == {name: found for name, text in texts.items() if (found := DIALECT.findall(text))}


def words(source: str) -> str:
    """Returns the docstrings and comments of a module, and the names that it defines, as words."""
    comments = [token.string for token in generate_tokens(StringIO(source).readline) if token.type == COMMENT]
    found = list[str]()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                found.append(" ".join(text.split()))
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.append(name.replace("_", " "))
    return "\n".join([*comments, *found])


@pytest.mark.parametrize("folder", ["client/src", "benchmarks", "examples", "docs", "tests"])
def test_docstrings_comments_and_names_are_plain_english(folder: str) -> None:
    sources = [path for path in (ROOT / folder).rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc"))]
    found = {str(path.relative_to(ROOT)): DIALECT.findall(words(path.read_text())) for path in sources}
    assert {} == {path: said for path, said in found.items() if said}


def test_the_picture_loads_nothing() -> None:
    """Viewers of the README fetch no font for it: its only address is the name of SVG itself."""
    picture = (ROOT / "docs/demo.svg").read_text()
    assert ["http://www.w3.org/2000/svg"] == re.findall(r"https?://[^\s\"')]+", picture)
    assert "@font-face" not in picture
    assert "make&#160;demo" in picture

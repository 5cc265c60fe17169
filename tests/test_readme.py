"""The README tells the truth: its calls are made against a real server, and what they print is what it prints."""

import asyncio
import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from notecase import v1

from tests.support.server import running

README = (Path(__file__).parent.parent / "README.md").read_text()
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
CHANGING = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+Z|[0-9a-f]{8}-[0-9a-f]{4}-[47][0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{13}-(?=\d)"
    r'|(?<=")[0-9a-f]{8}-(?=\d+")|(?<="next_page_token": ")[^"]+|(?<=": ")\d+(\.\d+)?s'
    r'|(?<="log_bytes": ")\d+'
)
"""Times, the server's ids, the part of an etag that is a time or of a uid, page tokens, durations, and the size of a
log, in which there are times."""


def calls() -> list[tuple[str, str]]:
    """The commands of all console blocks with the output under each, in order."""
    found = []
    for block in CONSOLE:
        for call in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = call.partition("\n")
            found.append((command, output))
    return found


def told(output: str) -> list[Any]:
    """What an output says, without what no two runs have alike: ids, times, and how the events fell into batches."""
    try:
        documents = list(_documents(CHANGING.sub("", output)))
    except ValueError:
        return [line.split() for line in CHANGING.sub("", output).splitlines()]
    said = [document for document in documents if "batch" not in document]
    events = [event for document in documents for event in document.get("batch", {}).get("events", [])]
    return said + [event for event in events if "sequence" in event]


def _found(text: str) -> list[str]:
    """What may be named in later calls, too."""
    return [found.group() for found in CHANGING.finditer(text) if not found.group().isdigit()]


def _documents(text: str) -> list[Any]:
    decoder, found, at = json.JSONDecoder(), [], 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        document, at = decoder.raw_decode(text, at)
        found.append(document)
    return found


async def test_every_call_of_the_readme_prints_what_it_says(grpcurl: str) -> None:
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


async def test_the_readmes_python_runs(capfd: pytest.CaptureFixture[str]) -> None:
    """As printed, but for the address."""
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    async with running() as served:
        source = program.replace("127.0.0.1:7420", served.address).replace("asyncio.run(main())\n", "")
        names: dict[str, Any] = {}
        exec(compile(textwrap.dedent(source), "README.md", "exec"), names)
        await names["main"]()
    assert "Last seen: the harbour." in capfd.readouterr().out

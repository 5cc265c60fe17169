"""What is packed has one version, and readme files whose programs run; `make dist` builds and checks the packages."""

import asyncio
import json
import re
from pathlib import Path

import notecase_server
import pytest

from tests.support.server import running

ROOT = Path(__file__).parent.parent


async def test_the_program_in_the_clients_readme_runs(capfd: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "client" / "README.md").read_text(), re.DOTALL)
    async with running() as served:
        await asyncio.to_thread(exec, program.replace("127.0.0.1:7420", served.address), {})
    assert "Hello." in capfd.readouterr().out


def test_the_package_for_typescript_has_the_version_of_the_others() -> None:
    package = json.loads((ROOT / "client" / "typescript" / "package.json").read_text())
    assert notecase_server.__version__ == package["version"]


def test_the_package_for_typescript_shows_every_proto() -> None:
    shown = re.findall(r'"\./gen/notecase/v1/(\w+)_pb\.js"', (ROOT / "client/typescript/src/v1.ts").read_text())
    assert sorted(path.stem for path in (ROOT / "proto/notecase/v1").glob("*.proto")) == shown

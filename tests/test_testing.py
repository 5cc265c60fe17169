"""docs/testing.md: its programs and tests run unchanged, and it lists all directives of the offline model."""

import asyncio
import re
import sys
from pathlib import Path

import notecase
import pytest
from notecase import NotecaseError
from notecase_server.models.offline import HELP
from notecase_server.testing import serve

PAGE = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
FILES = dict(re.findall(r"^```python\n# ([\w.]+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


async def test_the_tests_of_the_page_pass(tmp_path: Path) -> None:
    """Those of FastAPI need a package that is not here, and are only compiled."""
    assert {"detective.py", "conftest.py", "test_detective.py", "app.py", "test_app.py"} == set(FILES)
    for name, text in FILES.items():
        if "fastapi" in text:
            compile(text, name, "exec")
        else:
            (tmp_path / name).write_text(text)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = (await process.communicate())[0].decode()
    assert 0 == process.returncode, output
    assert "3 passed" in output


def test_the_page_lists_every_directive() -> None:
    assert set(re.findall(r"^/(\w+)", HELP, re.MULTILINE)) == set(re.findall(r"^\| `/(\w+)", PAGE, re.MULTILINE))


async def test_a_server_has_the_provider_that_agents_name_and_ends_with_its_block() -> None:
    with serve(provider="openai") as server:
        async with notecase.Client(server.address, retry=notecase.Retry(tries=0)) as client:
            await client.put_agent("greeter", "You greet.", provider="openai", model="gpt-5")
            server.replies = ["/say One.", "/say Two."]
            said = [(await client.invoke("Hello", agent="greeter")).text for _ in range(3)]
    assert (["One.", "Two."], True) == (said[:2], "You said: Hello" in said[2])
    async with notecase.Client(server.address, retry=notecase.Retry(tries=0)) as client:
        with pytest.raises(NotecaseError, match="cannot be reached"):
            await client.get_state("app")

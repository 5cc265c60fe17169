"""All tools of a server together: what an operator configures, and what a server without tools is spared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.tools.contract import ASK_USER, Outcome, ToolSettingsError
from notecase_server.tools.mcp_settings import McpServerSettings, read_mcp_servers
from notecase_server.tools.toolbox import make_toolbox

from tests.tools.calls import context

ROOT = Path(__file__).parent.parent.parent


def function(name: str) -> v1.Tool:
    return v1.Tool(server=v1.ServerTool(function=name))


async def test_a_toolbox_lists_its_functions_and_servers_and_connects_to_none() -> None:
    never = McpServerSettings(command="a-command-that-is-not-there")
    box = make_toolbox(["tests.tools.desk"], {"b": never, "a": never})
    assert [ASK_USER, "find"] == [name for name in box.functions if name in {ASK_USER, "find"}]
    assert sorted(box.functions) == box.functions
    assert ["a", "b"] == box.mcp_servers
    (found,) = await box.resolve(function("remember"))
    assert "Keeps a fact." == found.description
    assert Outcome([v1.Part(text="{}")]) == await box.call(found.implementation, {"fact": "b"}, context())
    await box.close()
    await box.close()


async def test_asking_the_user_is_always_there_and_never_called() -> None:
    box = make_toolbox([], {})
    assert [ASK_USER] == box.functions
    (asking,) = await box.resolve(function(ASK_USER))
    assert ASK_USER == asking.name
    assert {"type": "object", "required": ["question"], "additionalProperties": False}.items() <= json.loads(
        asking.parameters
    ).items()
    with pytest.raises(ValueError, match="answered by a person"):
        await box.call(asking.implementation, {"question": "Where?"}, context())
    (own,) = await box.resolve(
        v1.Tool(name="consult", description="Asks the chief.", server=v1.ServerTool(function=ASK_USER))
    )
    assert ("consult", "Asks the chief.", asking.parameters) == own[:3]


async def test_what_is_not_there_is_a_tool_error_by_name() -> None:
    box = make_toolbox([], {})
    for tool, told in [
        (function("absent"), "This server has no function 'absent'."),
        (v1.Tool(mcp=v1.McpTool(server="absent")), "This server has no MCP server 'absent'."),
    ]:
        with pytest.raises(NotecaseError) as refused:
            await box.resolve(tool)
        assert (v1.ERROR_REASON_TOOL_ERROR, told) == (refused.value.reason, refused.value.message)
    for binding, told in [
        (v1.ToolBinding(function="absent"), "This server has no function 'absent'."),
        (v1.ToolBinding(mcp=v1.McpBinding(server="absent", tool="t")), "This server has no MCP server 'absent'."),
    ]:
        with pytest.raises(NotecaseError) as refused:
            await box.call(binding, {}, context())
        assert (v1.ERROR_REASON_TOOL_ERROR, told) == (refused.value.reason, refused.value.message)
    with pytest.raises(ValueError, match="client"):
        await box.resolve(v1.Tool(client=v1.ClientTool()))
    with pytest.raises(ValueError, match="caller"):
        await box.call(v1.ToolBinding(), {}, context())


async def test_an_installed_package_brings_its_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point names a module, or one function, decorated or not."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "brought_tools.py").write_text(
        "from notecase_server.tools.functions import tool\n"
        "@tool\n"
        "def decorated() -> str: return 'a'\n"
        "def bare(x: int) -> int: return x + 1\n"
    )
    metadata = tmp_path / "brought-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    entries = metadata / "entry_points.txt"
    entries.write_text("[notecase.tools]\nall = brought_tools\none = brought_tools:bare\n")
    box = make_toolbox([], {})
    assert [ASK_USER, "bare", "decorated"] == box.functions
    (bare,) = await box.resolve(function("bare"))
    assert Outcome([v1.Part(text="3")]) == await box.call(bare.implementation, {"x": 2}, context())
    entries.write_text("[notecase.tools]\ngone = brought_tools:gone\n")
    with pytest.raises(ToolSettingsError, match=r"The entry point 'gone' .* cannot be imported: AttributeError"):
        make_toolbox([], {})


def test_the_name_of_the_question_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "asking_tools.py").write_text(
        "from notecase_server.tools.functions import tool\n@tool\ndef ask_user() -> str: return ''\n"
    )
    with pytest.raises(ToolSettingsError, match="'ask_user' is taken"):
        make_toolbox(["asking_tools"], {})


@pytest.mark.parametrize(
    ("made", "loaded"),
    [
        ("[], {}", []),
        ("['tests.tools.desk'], {}", ["pydantic"]),
        ("[], {'a': McpServerSettings(command='a')}", ["mcp", "pydantic"]),
    ],
)
def test_a_server_imports_what_its_tools_need_and_no_more(made: str, loaded: list[str]) -> None:
    """MCP's library takes more than a second to import."""
    script = (
        "import sys\n"
        "from notecase_server.tools.toolbox import make_toolbox, McpServerSettings\n"
        f"make_toolbox({made})\n"
        "print([name for name in ('mcp', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{loaded}\n" == done.stdout


def test_servers_are_read_from_json_and_toml(tmp_path: Path) -> None:
    (tmp_path / "mcp.json").write_text(
        '{"mcpServers": {"files": {"type": "stdio", "command": "files-mcp", "args": ["-v"], "env": {"TOKEN": "t"}},'
        ' "search": {"url": "https://example.org/mcp", "headers": {"Authorization": "Bearer b"}, "timeout": 5}}}'
    )
    (tmp_path / "mcp.toml").write_text(
        '[mcpServers.files]\ntype = "stdio"\ncommand = "files-mcp"\nargs = ["-v"]\nenv = { TOKEN = "t" }\n'
        '[mcpServers.search]\nurl = "https://example.org/mcp"\nheaders = { Authorization = "Bearer b" }\ntimeout = 5\n'
    )
    files = McpServerSettings(type="stdio", command="files-mcp", args=("-v",), env={"TOKEN": "t"})
    search = McpServerSettings(url="https://example.org/mcp", headers={"Authorization": "Bearer b"}, timeout=5)
    assert {"files": files, "search": search} == read_mcp_servers(tmp_path / "mcp.json")
    assert {"files": files, "search": search} == read_mcp_servers(tmp_path / "mcp.toml")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "wrong: Input data was truncated."),
        ("{", "wrong: Input data was truncated."),
        ("{}", "wrong: Object missing required field `mcpServers`."),
        ('{"mcpServers": {"a": 1}}', r"wrong: Expected `object`, got `int` - at `\$.mcpServers\[...\]`."),
        ('{"mcpServers": {"a": {}}}', "wrong: a server has a `command`, or a `url`, and not both"),
        ('{"mcpServers": {"a": {"command": "a", "url": "http://b"}}}', "a `command`, or a `url`, and not both"),
        ('{"mcpServers": {"a": {"command": "a", "disabled": true}}}', "contains unknown field `disabled`"),
        ('{"mcpServers": {"a": {"command": "a", "headers": {"b": "c"}}}}', "`headers` has no meaning"),
        ('{"mcpServers": {"a": {"url": "http://b", "env": {"b": "c"}}}}', "`env` has no meaning"),
        ('{"mcpServers": {"a": {"url": "file:///b"}}}', "`url` begins with http:// or https://"),
        (
            '{"mcpServers": {"a": {"url": "https://${HOST}/b"}}}',
            r"`url` contains \$\{HOST\}; variables are not",
        ),
        (
            '{"mcpServers": {"a": {"url": "https://b", "headers": {"Authorization": "Bearer ${env:T}"}}}}',
            r"`headers` contains \$\{env:T\}; variables are not",
        ),
        ('{"mcpServers": {"a": {"command": "b", "env": {"T": "${T}"}}}}', r"`env` contains \$\{T\}; variables are not"),
        ('{"mcpServers": {"a": {"url": "https://b", "headers": {"Authorization": "Bearer …"}}}}', "outside ASCII"),
        ('{"mcpServers": {"a": {"url": "https://b", "headers": {"X-Team": "a\\nb"}}}}', "contains a line break"),
        ('{"mcpServers": {"a": {"command": "a", "timeout": 0}}}', "time-outs are seconds above 0"),
        ('{"mcpServers": {"a": {"command": "a", "timeout": 1e10}}}', "time-outs are seconds above 0 and at most"),
        ('{"mcpServers": {"a": {"type": "sse", "url": "http://b"}}}', "Invalid enum value 'sse'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_a_sentence(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(content)
    with pytest.raises(ToolSettingsError, match=told):
        read_mcp_servers(path)


def test_a_file_that_is_missing_or_not_text_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ToolSettingsError, match="cannot be read: No such file or directory"):
        read_mcp_servers(tmp_path / "absent.json")
    path = tmp_path / "mcp.toml"
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ToolSettingsError, match=r"mcp\.toml is wrong"):
        read_mcp_servers(path)

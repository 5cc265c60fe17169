"""A reply at a terminal: Markdown as it comes, wide characters, a narrow window, tools while they run."""

import asyncio
import io

import pytest
from notecase import v1
from notecase_server.cli.live import Bottom, split
from rich.console import Console
from rich.text import Text

from tests.cli.command import COMMAND, notecase, spawn, terminal
from tests.support.server import Running

PASTED = "\x1b[200~{}\x1b[201~\r"


def says(*lines: str) -> str:
    """What has the offline model say these lines."""
    return PASTED.format("\n".join(f"/say {line}" for line in lines))


async def test_markdown_is_drawn_in_a_narrow_window_with_wide_characters(served: Running, agent: v1.Agent) -> None:
    """No line is wider than the window, a wide character counts twice, and other text than Markdown is not changed."""
    reply = (
        "# The case",
        "",
        "Some **bold** text, a [link](https://example.org/x)",
        "and a line.",
        "",
        "- 一二三四五六七八九十一二三四五六七八九十",
        "- 🎻 gone",
        "",
        "```python",
        "def f(x):",
        "return f",
        "```",
        "",
        "| 名 | n |",
        "|---|---|",
        "| 你好 | 2 |",
        "",
        "<b>raw</b> &#27;[2J done.",
    )
    async with terminal("chat", "--new", "--server", served.address, columns=30) as screen:
        await screen.until("> ")
        await screen.type(says(*reply))
        await screen.until("[2J done.")
        await screen.until("\n> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    shown = screen.window[screen.window.index("The case") :]
    assert [
        "The case",
        "Some bold text, a link",
        "(https://example.org/x)",
        "and a line.",
        " • 一二三四五六七八九十一二三",
        "   四五六七八九十",
        " • 🎻 gone",
        " def f(x):",
        " return f",
        " 名    n",
        " ───────",
        " 你好  2",
        "<b>raw</b> \ufffd[2J done.",
    ] == shown[:13]


async def test_a_reply_longer_than_the_window_is_on_paper_once(served: Running, agent: v1.Agent) -> None:
    """One paragraph of 60 lines in a window of 12: nothing that was drawn while it streamed is left."""
    async with terminal("chat", "--new", "--server", served.address, columns=30, lines=12) as screen:
        await screen.until("> ")
        await screen.type("/pause 1 /chunks 400\r")
        await screen.until(" 399 400 ")
        await screen.until("\n> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    paper = screen.paper[next(at for at, line in enumerate(screen.paper) if line.startswith("1 2 3 ")) :]
    assert list(map(str, range(1, 401))) == " ".join(paper).partition(" > ")[0].split()


def test_of_what_is_longer_than_the_window_the_newest_lines_are_drawn() -> None:
    console = Console(width=20, height=5, file=io.StringIO())
    with console.capture() as drawn:
        console.print(Bottom(lambda: [Text("\n".join(map(str, range(10)))), Text("tool")]))
    assert ["7", "8", "9", "tool"] == drawn.get().split()


async def test_a_tool_is_shown_while_it_runs(served: Running) -> None:
    """With its arguments, until its outcome takes their place."""
    tools = [v1.Tool(name="search", client=v1.ClientTool())]
    agent = v1.Agent(llm=v1.LlmAgent(tools=tools))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def search(query: str) -> str:
        asked.set()
        await go_on.wait()
        return "found it"

    async with served.client() as client:
        await client.create_session("agents/clerk", session_id="case")
    async with (
        terminal(
            "run", '/call search {"query": "violin"}', "--session", "case", "--wait", "200", env=there(served)
        ) as screen,
        served.client() as client,
    ):
        await screen.until('search({"query": "violin"})')
        await screen.seen('search({"query": "violin"})')
        async with client.attach("sessions/case", tools=[search]) as stream:
            go_on.set()
            async for _ in stream:
                pass
        assert 0 == await screen.ended()
    assert any("search(" in line and "succeeded: found it" in line for line in screen.window)
    assert not any(line.startswith(tuple("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")) for line in screen.window)


def there(served: Running) -> dict[str, str]:
    return {"NOTECASE_ADDRESS": served.address}


async def test_a_pipe_has_no_escape_codes_and_the_reply_exactly(served: Running, agent: v1.Agent) -> None:
    done = await notecase("run", "/say # Title\n/say **bold** 你好 🎻", env=there(served))
    assert (0, "# Title\n**bold** 你好 🎻\n") == (done.code, done.out)
    for command in ("sessions list", "agents show detective", "inbox", "messages list"):
        session = done.err.split()[0] if command.startswith("messages") else ""
        told = await notecase(*command.split(), *filter(None, [session]), env=there(served))
        assert 0 == told.code
        assert "\x1b" not in told.out + told.err


async def test_ctrl_c_in_a_pipe_cancels_what_is_run(served: Running, agent: v1.Agent) -> None:
    process = await spawn(*COMMAND, "run", "/pause 50 /chunks 10000", env=there(served))
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    await process.stdout.readuntil(b" 3 ")
    process.send_signal(2)
    _, err = await process.communicate()
    assert 130 == process.returncode
    assert "Cancelled: Ctrl-C" in err.decode()


async def test_a_run_that_fails_has_an_exit_code_and_a_sentence(served: Running, agent: v1.Agent) -> None:
    done = await notecase("run", "/fail error", env=there(served))
    assert (1, "") == (done.code, done.out)
    assert "The offline model was asked to fail." in done.err


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("One.\n\nTwo", "One.\n\n"),
        ("One", ""),
        ("One\u2028still.\n\nTwo", "One\u2028still.\n\n"),
        ("- a\n- b\n", ""),
        ("- a\n\ntext", "- a\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n```\nafter", "```\na\n```\n"),
        ("| a |\n|---|\n| 1 |", ""),
    ],
)
def test_only_blocks_that_no_further_text_changes_are_finished(text: str, finished: str) -> None:
    assert (finished, text[len(finished) :]) == split(text)

"""The examples run unchanged with the offline model, and print what they promise."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

SHOWN = {
    "detective": ["Last seen: the harbour, at dusk.", "stopped and started again", "It still has sessions/violin"],
    "tools": ["(search runs here: violin)", "search gave: [", "weigh gave: 0.5 kg"],
    "approval": ["books/runs/rent waits: ", "Still waiting: sessions/books/runs/rent", "(paid 80000 to the landlord)"],
    "history_tutor": [
        "lesson 1 about Rome",
        "starts again",
        "4 messages were said",
        "lesson 2 about Rome",
        "7 messages.",
    ],
    "writing_team": [
        "in state, as draft",
        "in state, as review",
        "in state, as final",
        "Code: def total(",
        "Review: The list within",
    ],
    "plan": [
        "plan.pdf, 4",
        "You showed me: application/pdf",
        "in a fork",
        "You showed me",
        "This request had 1 message.",
    ],
    "resume": ["The first client leaves in mid-sentence.", "3 message_added", "1 2 3 4 5"],
}


@pytest.mark.parametrize("example", SHOWN)
async def test_an_example_shows_what_it_says(example: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLES / f"{example}.py")),
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    at = 0
    for words in SHOWN[example]:
        found = output.find(words, at)
        assert found >= 0, f"{words!r} does not come next in {output}"
        at = found


INTERRUPTED = """
import asyncio, pathlib, sys, serving

async def main():
    async with serving.server(pathlib.Path(sys.argv[1]) / "notecase.db"):
        serving.say("ready")
        await asyncio.Event().wait()

serving.run(main())
"""


async def test_ctrl_c_ends_an_example_without_a_traceback(tmp_path: Path) -> None:
    """In a terminal it reaches the example's server at the same time."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", INTERRUPTED, str(tmp_path)),
        cwd=EXAMPLES,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert b"ready\n" == await process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, err = await process.communicate()
    assert (130, b"") == (process.returncode, err)


def test_every_example_ends_so() -> None:
    for example in SHOWN:
        source = (EXAMPLES / f"{example}.py").read_text()
        assert "serving.run(" in source
        assert "asyncio.run(" not in source

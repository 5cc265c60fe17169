"""The program of an MCP server as a process: what is left when it has ended."""

import asyncio
import os
import signal
import sys
from contextlib import suppress

import anyio
import pytest
from notecase_server.tools import mcp_pipes
from notecase_server.tools.mcp_pipes import _Program
from notecase_server.tools.mcp_settings import McpServerSettings

from tests.support.polling import until

LEAVES_A_CHILD = """
import subprocess
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
"""


async def test_the_input_of_a_program_is_closed_although_a_child_that_is_left_holds_it() -> None:
    """What is still to be written would otherwise wait, with its socket, until the child ends."""
    settings = McpServerSettings(command=sys.executable, args=("-c", LEAVES_A_CHILD))
    program = await _Program.start(settings, sys.stderr)
    child = int(await program.output.readline())
    try:
        sent = program.input.get_extra_info("socket")
        program.input.write(bytes(5 << 20))
        assert 0 == await program.end()
        await until(lambda: sent.fileno() < 0)
        assert not program.input.transport.get_write_buffer_size()
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


async def test_a_program_that_ends_while_nobody_looks_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that stands still for longer than a program is given to end."""
    program = await _Program.start(McpServerSettings(command="cat"), sys.stderr)

    async def pause(seconds: float) -> None:
        program.signal(signal.SIGKILL)
        os.waitid(os.P_PID, program.process.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222  (all stands still)
        await asyncio.Event().wait()

    monkeypatch.setattr(anyio, "sleep", pause)
    monkeypatch.setattr(mcp_pipes, "EXIT_SECONDS", 0.01)
    assert await program.ended()
    await program.end()

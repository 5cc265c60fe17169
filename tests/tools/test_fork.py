"""A server with calls starts programs: none of them dies on the way to its own code."""

import os
import subprocess
import sys

import pytest

STARTS = """
import asyncio, sys
{imports}
import uvloop
from notecase import Client, v1
from notecase_server.testing import serve
from notecase_server.tools.mcp_pipes import program
from notecase_server.tools.mcp_settings import McpServerSettings

async def forked(ends):
    process = await asyncio.create_subprocess_exec("true", stdin=asyncio.subprocess.PIPE)
    ends.append(await process.wait())

async def of_mcp(ends):
    async with program("t", McpServerSettings(command="true"), sys.stderr, ends.append):
        pass

async def main(address):
    ends = []
    async with Client(address) as client:
        async def call():
            while True:
                await client.server.GetServerInfo(v1.GetServerInfoRequest())
        calls = [asyncio.create_task(call()) for _ in range(4)]
        for _ in range(40):
            await {started}(ends)
        for one in calls:
            one.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    print('ends:', sorted(set(ends)))

with serve() as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main(server.address))
"""


@pytest.mark.parametrize(
    ("imports", "started"),
    [("import notecase_server.cli", "forked"), ("import notecase", "of_mcp")],
    ids=["by a tool, of a server that the command runs", "by MCP, of a server that a program runs"],
)
def test_programs_start_while_there_are_calls(imports: str, started: str) -> None:
    """Where gRPC's handlers for forks run, a fifth of them crash: 40 starts without a crash would be chance in some
    thousand cases. The command turns them off before gRPC is imported, and programs of MCP servers never run them."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}  # the command sets it
    code = STARTS.replace("{imports}", imports).replace("{started}", started)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (0, True) == (done.returncode, "ends: [0]" in done.stdout), (done.stdout, done.stderr[-2000:])

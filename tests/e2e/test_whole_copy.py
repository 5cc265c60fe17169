"""A store with much in it is copied to PostgreSQL and back: the same rows, in bounded memory, and what waited goes on.

`make test-copy` makes it 1 GiB and prints what the copies took; NOTECASE_COPY_MIB is the size."""

import hashlib
import os
import random
import re
import subprocess
import sys
import time
from asyncio import to_thread
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from notecase import v1
from notecase_server.models.contract import Provider
from notecase_server.models.offline import OfflineProvider
from notecase_server.models.openai import OpenAIProvider
from notecase_server.store.contract import Scope
from notecase_server.store.sqlite.store import SqliteStore

from tests.e2e.driving import said
from tests.store import build
from tests.store.filled import fill
from tests.support import postgres
from tests.support.openai_server import OpenAIServer, reply, tool_calls
from tests.support.server import running

MIB = int(os.environ.get("NOTECASE_COPY_MIB", "3"))
"""About how large the store is."""

MESSAGES, MESSAGE, BLOB, KEYS, VALUE = 200, 4000, 180_000, 16, 1000
"""What each of its sessions has, which is 1 MiB: messages of so many characters, content of so many bytes, and keys of
state."""

PEAK_MIB = 200
"""What a process that copies may need at most, however large the store is."""

COPY = """
import resource, sys
from notecase_server.cli import main
try:
    main()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(f"CPU {used.ru_utime + used.ru_stime:.1f} s, peak {peak} KiB", file=sys.stderr)
"""


async def make(path: Path) -> None:
    """Fills every table; makes one session for each MiB, the same ones each time."""
    await fill(path)
    chance = random.Random(MIB)
    store = await SqliteStore.open(str(path), build.ManualClock())
    for number in range(MIB):
        key = build.session_key("acme", f"large-{number}")
        await build.create(store, key, agent="agents/sherlock", labels={"number": f"{number}"})
        for first in range(0, MESSAGES, 50):
            messages = (build.said(f"m{first + at}", chance.randbytes(MESSAGE // 2).hex()) for at in range(50))
            await build.add(store, *messages, key=key, once=build.once(f"{number} {first}", build.NOTHING))
        puts = (build.put(f"k{at}", chance.randbytes(VALUE // 2).hex()) for at in range(KEYS))
        await build.add(store, build.changed(*puts), key=key)
        await store.update_state(Scope("acme", "user", f"u{number}"), [build.put("k", number)])
        data = chance.randbytes(BLOB)
        await store.put_blob("acme", "", hashlib.sha256(data).hexdigest(), data)
        if number % 50 == 0:
            asks = (build.called("q", "r1", "c1"), build.asked("i1", "c1", "r1"))
            await build.start(store, "r1", *asks, key=key)
    await store.close()


class Copied(NamedTuple):
    """What `notecase copy` printed, and took."""

    digests: str
    seconds: float
    cpu: float
    peak_mib: float


def copy(source: str, target: str) -> Copied:
    begun = time.monotonic()
    words = ("copy", "--from", source, "--to", target)
    env = {name: value for name, value in os.environ.items() if not name.startswith("NOTECASE_")}
    done = subprocess.run([sys.executable, "-c", COPY, *words], check=False, capture_output=True, text=True, env=env)
    assert 0 == done.returncode, done.stderr
    used = re.search(r"CPU ([\d.]+) s, peak (\d+) KiB", done.stderr)
    assert used is not None
    return Copied(done.stdout, time.monotonic() - begun, float(used[1]), int(used[2]) / 1024)


@pytest.fixture
async def database() -> AsyncIterator[str]:
    """A store on a separate server that waits for the disk, if measurements are requested."""
    if "NOTECASE_COPY_MIB" not in os.environ:
        yield await postgres.shared().new_database()
        return
    server = postgres.Postgres(postgres.DURABLE)
    yield await server.new_database()
    server.remove()


def providers(model: OpenAIServer) -> dict[str, Provider]:
    """What a server takes with it when it stops."""
    return {"offline": OfflineProvider(), "scripted": OpenAIProvider("key", model.url, "m")}


async def test_a_large_store_is_copied_to_postgresql_and_back(
    database: str, model: OpenAIServer, tmp_path: Path
) -> None:
    """Every table has the same digest. A run that waited for a caller's tool before is answered after, in both
    copies."""
    here, back = tmp_path / "here.db", tmp_path / "back.db"
    await make(here)
    model.script(tool_calls(("weigh", "{}")), reply("Light."), reply("Light."))
    name = "sessions/waits/runs/r"
    async with running(f"sqlite:{here}", providers(model)) as server:
        weigh = v1.Tool(name="weigh", client=v1.ClientTool())
        agent = v1.Agent(llm=v1.LlmAgent(provider="scripted", tools=[weigh]))
        await server.agents.CreateAgent(v1.CreateAgentRequest(agent_id="weigher", agent=agent))
        case = v1.Session(agent="agents/weigher")
        await server.sessions.CreateSession(v1.CreateSessionRequest(session_id="waits", session=case))
        start = v1.StartRun(session="sessions/waits", run_id="r", messages=[said("Go")])
        waits = (await server.runs.Invoke(v1.InvokeRequest(start=start))).run
        assert v1.Run.STATE_WAITING == waits.state
    size = here.stat().st_size / 2**20
    assert size >= MIB
    there = await to_thread(copy, f"sqlite:{here}", database)
    again = await to_thread(copy, database, f"sqlite:{back}")
    for words, took in (("to PostgreSQL", there), ("back", again)):
        sys.stdout.write(
            f"{size:.0f} MiB {words}: {took.seconds:.0f} s, CPU {took.cpu:.0f} s, peak {took.peak_mib:.0f} MiB\n"
        )
    sys.stdout.write(there.digests)
    assert there.digests == again.digests
    assert max(there.peak_mib, again.peak_mib) < PEAK_MIB
    for store in (database, f"sqlite:{back}"):
        async with running(store, providers(model)) as server:
            run = await server.runs.GetRun(v1.GetRunRequest(name=name))
            (call,) = run.pending_calls
            result = v1.ToolResult(call_id=call.call_id, result=[v1.Part(text="3 ounces")])
            command = v1.SendCommandRequest(
                session="sessions/waits", command=v1.RunRequest(command_id="c", tool_result=result)
            )
            await server.runs.SendCommand(command)
            ended = await server.runs.WaitRun(v1.WaitRunRequest(name=name))
            assert v1.Run.STATE_SUCCEEDED == ended.state

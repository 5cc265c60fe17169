"""What a turn of one token costs the store, counted: the counts are the same on every machine."""

import asyncio
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from notecase import v1
from notecase_server import serve
from notecase_server.auth.principal import AuthContext, Authenticator, Metadata, Principal, Role
from notecase_server.engine import upkeep
from notecase_server.store.sqlite import writer as sqlite_writer
from notecase_server.store.sqlite.store import SqliteStore

from tests.e2e.driving import OnStream, events_of, kinds, said
from tests.support.server import ByTenant, Running, running
from tests.support.tracing import Trace, given

HANDOVERS, STATEMENTS, PAGES = 2, 12, 8
"""Of a turn in a new session that is all there is: how often the store is asked, statements of SQL with those that
begin and end transactions, and pages of the write-ahead log."""


@contextmanager
def asked(store: SqliteStore) -> Iterator[list[str]]:
    """Collects the calls of the store."""
    seen: list[str] = []
    ask = store._ask

    async def counted(jobs: Any, *given: Any, **more: Any) -> Any:
        seen.append("write" if jobs is store._writes else "read")
        return await ask(jobs, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_ask", counted)
        yield seen


def pages(path: Path) -> int:
    """Counts the pages that the write-ahead log has."""
    log = Path(f"{path}-wal").read_bytes()
    if not log:
        return 0
    size: int = struct.unpack(">I", log[8:12])[0]
    return (len(log) - 32) // (24 + size)


class Somebody:
    """Knows every caller as the same one, who has a credential."""

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal:
        return Principal("default", "keys/somebody", Role.ADMIN)


@pytest.mark.parametrize("known", [ByTenant(), Somebody()], ids=["nobody", "somebody"])
async def test_a_turn_asks_little_of_the_store(
    known: Authenticator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((serve, "EXPIRY_SECONDS"), (serve, "PROBE_SECONDS"), (upkeep, "REPAIR_SECONDS")):
        monkeypatch.setattr(module, name, 3600.0)  # work outside of the turn is not counted
    monkeypatch.setattr(sqlite_writer, "CHECKPOINT_WRITES", 1000)  # after one the log would begin again
    scrubbed, scrub = asyncio.Event(), SqliteStore.scrub

    async def told(store: SqliteStore) -> bool:
        done = await scrub(store)
        scrubbed.set()
        return done

    monkeypatch.setattr(SqliteStore, "scrub", told)
    path = tmp_path / "store.db"
    async with running(f"sqlite:{path}", authenticators=[known]) as served:
        store = served.server._store
        assert isinstance(store, SqliteStore)
        agent = v1.Agent(llm=v1.LlmAgent(model="offline/echo", instruction="Answer briefly."))
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        await served.sessions.CreateSession(
            v1.CreateSessionRequest(session_id="case", session=v1.Session(agent="agents/clerk"))
        )
        await scrubbed.wait()  # that cuts the log
        shown: list[str] = []
        trace = Trace((store._connections.writer, *store._connections.readers), shown.append)
        turns = [await turn(served, store, path, trace, shown) for _ in range(5)]
    handovers, statements, written = zip(*turns, strict=True)
    # What a server does by itself may fall into one of them, and a page of an index may be split in two.
    assert (min(handovers), min(statements)) == (HANDOVERS, STATEMENTS), turns
    assert median(written) == PAGES, turns


async def turn(served: Running, store: SqliteStore, path: Path, trace: Trace, shown: list[str]) -> tuple[int, int, int]:
    before = pages(path)
    shown.clear()
    with asked(store) as handovers, trace.on():
        start = v1.StartRun(session="sessions/case", messages=[said("Hi")])
        async for frame in OnStream().start(served, start):
            if "run_state_changed" in kinds(events_of([frame])):
                break
    return len(handovers), len(given(shown)), pages(path) - before

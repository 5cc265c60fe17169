"""A store behind this system's PgBouncer, in transaction mode: `make test-postgresql` runs this where there is one."""

from pathlib import Path

import pytest

from tests.cli.command import notecase
from tests.store.filled import fill
from tests.support import pgbouncer, postgres
from tests.support.server import Spawned

HOW = {
    True: ("prepared=True",),
    False: ("statements_not_prepared", "A pooler is in between that keeps no prepared statements", "prepared=False"),
}
"""What the log says of how statements are made, by whether the pooler keeps prepared ones."""


@pytest.fixture
async def store() -> str:
    return pgbouncer.shared().url(await postgres.shared().new_database())


async def test_a_conversation_is_served_through_a_pooler_and_the_log_says_how(store: str, tmp_path: Path) -> None:
    """A server that is started afterwards has it."""
    log = tmp_path / "log"
    first = await Spawned.start(store, log, "--store-lease", "3", forked=True)
    for words in ("agents create clerk", "sessions create --id case --agent clerk", "run --session case Hello"):
        done = await notecase(*words.split(), "--server", first.address)
        assert 0 == done.code, done.err
    refused = await notecase("migrate", "--store", store)
    assert "The store is in use: " in refused.err
    assert 0 == await first.stop()
    second = await Spawned.start(store, log, forked=True)
    listed = await notecase("messages", "list", "case", "--server", second.address)
    assert 0 == await second.stop()
    assert "Hello" in listed.out
    lines = log.read_text()
    assert all(2 <= lines.count(words) for words in HOW[pgbouncer.shared().keeps_statements])
    assert "error" not in lines


async def test_a_store_is_copied_through_a_pooler_and_back(store: str, tmp_path: Path) -> None:
    """Twice, by processes that use the same connections of the pooler one after the other."""
    await fill(tmp_path / "store.db")
    digests = set[str]()
    for number, target in enumerate((store, pgbouncer.shared().url(await postgres.shared().new_database()))):
        there = await notecase("copy", "--from", f"sqlite:{tmp_path / 'store.db'}", "--to", target)
        back = await notecase("copy", "--from", target, "--to", f"sqlite:{tmp_path / f'{number}.db'}")
        assert (0, 0) == (there.code, back.code), there.err + back.err
        digests |= {there.out, back.out}
    renewed = await notecase("store", "renew", "--store", store)
    assert 0 == renewed.code, renewed.err
    again = await notecase("copy", "--from", store, "--to", f"sqlite:{tmp_path / 'renewed.db'}")
    assert 0 == again.code, again.err
    assert 1 == len(digests)

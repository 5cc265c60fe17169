"""A short fuzz of every method, over each store: by a fixed seed, and by the seed of this run of the tests, which is
printed. `make fuzz` goes on for as long as one likes."""

import os
from pathlib import Path

import pytest

from tests.fuzz.play import Fuzz, Left, fuzzed_server, store_of

WARM, REQUESTS = 80, 250


@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_nothing_that_can_be_sent_is_answered_with_a_defect_or_leaves_something_behind(
    store: str, tmp_path: Path
) -> None:
    for seed in (1, int(os.environ.get("NOTECASE_SEED", "2"))):
        async with fuzzed_server("memory:" if store == "memory" else store_of(tmp_path)) as served:
            play = Fuzz(served, seed)
            await play.play(WARM)  # what is made once is no growth
            before = Left.now()
            await play.play(REQUESTS)
            assert play.sent.total() > REQUESTS
            assert [] == [str(finding) for finding in play.findings], f"seed {seed}"
            # A store in memory keeps what it remembers in objects.
            assert {} == (await Left.settled(before) if store == "sqlite" else {}), f"seed {seed}"

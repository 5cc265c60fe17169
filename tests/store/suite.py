"""What every store is held to, for test modules of other stores: see docs/stores.md.

`from tests.store.suite import *` brings every such test into a module, which defines the fixture `open_store`.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.store.fixtures import INSIDE, Open, clock, store

__all__ = ["Open", "clock", "store"]

PARTS = (
    "agents",
    "answers",
    "audit",
    "calls",
    "commit_ids",
    "content",
    "fold",
    "identity",
    "keys",
    "lists",
    "log",
    "past",
    "principals",
    "retention",
    "roster",
    "runs",
    "state",
    "summaries",
    "tenancy",
    "tenants",
)
"""The modules of tests/store that ask about every store."""


def promises() -> dict[str, Callable[..., Any]]:
    """Collects the tests that are given a store, by name, without those that look into it. Raises ValueError
    for a name that two of them have."""
    found: dict[str, Callable[..., Any]] = {}
    for module in (importlib.import_module(f"tests.store.test_{part}") for part in PARTS):
        for name, test in vars(module).items():
            if not name.startswith("test_") or not {"store", "open_store"} & set(inspect.signature(test).parameters):
                continue
            if test in INSIDE:
                continue
            if name in found:
                raise ValueError(f"{name} is in {module.__name__} and in another module")
            found[name] = pytest.mark.asyncio(test) if inspect.iscoroutinefunction(test) else test
    return found


pytest.register_assert_rewrite(*(f"tests.store.test_{part}" for part in PARTS))
PROMISES = promises()
globals().update(PROMISES)
__all__ += list(PROMISES)

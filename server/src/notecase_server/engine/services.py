"""Holds what all runs of a process share."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from notecase_server.engine.content import Contents
from notecase_server.engine.places import Places
from notecase_server.engine.schema import Schemas
from notecase_server.models.contract import Provider, Repeats
from notecase_server.store.contract import (
    AgentStore,
    Clock,
    History,
    Lease,
    RequestStore,
    RunStore,
    StateStore,
    Unshared,
)
from notecase_server.supervisor import Supervisor
from notecase_server.tools.contract import Toolbox


class WorkStore(History, RequestStore, RunStore, StateStore, AgentStore, Protocol):
    """Holds what workers read; their writes go through the live session."""


class NamedProvider(NamedTuple):
    """A provider that the operator has named."""

    name: str
    provider: Provider
    repeats: Repeats = Repeats()


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Holds what works on runs needs; nothing in it is replaced while the process lives."""

    store: WorkStore
    providers: Mapping[str, NamedProvider]
    """By name, the default one under "" as well."""
    toolbox: Toolbox
    contents: Contents
    schemas: Schemas
    supervisor: Supervisor
    places: Places
    new_id: Callable[[], str]
    clock: Clock
    lease: Lease = field(default_factory=Unshared)
    """Asked before each call of a model or a tool."""
    suspects: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a run is active whose last two processes died. Only one such run is active at a time, so that a run
    that kills its process does not affect the others."""

"""Looks up the ids that the Tab key offers. Asks the server, briefly, and offers none where it cannot."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem
from notecase import Client, text_of, v1

from notecase_server.cli import profiles_file, screen
from notecase_server.cli.ask import name_of
from notecase_server.cli.connection import connection

SECONDS = 1.0
"""How long the server may take: a user waits at a prompt."""

READ = 1000
"""How many resources are searched for ids that begin as typed: the newest ones, or the first by name."""

OFFERED = 50

PLAIN = re.compile(r"[A-Za-z0-9._-]+")
"""Ids that a shell takes as they are. A server's words do not get onto a command line otherwise."""

Found = AsyncIterator[tuple[str, str]]
"""Ids, each with a description that shells show next to it."""


def offered(context: click.Context, collection: str, incomplete: str) -> list[CompletionItem]:
    """Returns the ids that begin with the typed text. `collection` is the resources' collection, such as "sessions".
    Raises nothing: an error must not disturb the prompt."""
    logging.disable()  # the client logs that a server is away
    root = "sessions/" if collection in {"runs", "messages", "states"} else f"{collection}/"
    prefix = root if incomplete.startswith(root) else ""
    typed = incomplete.removeprefix(prefix)
    try:
        with context.scope(cleanup=False):
            server, given = connection()
        if isinstance(given.get("token"), profiles_file.Printed):
            return []  # its command may ask for a password
        found = asyncio.run(_ask(server, given, collection, typed, context.params.get("tenant") or ""))
    except Exception:  # noqa: BLE001
        return []
    return [CompletionItem(f"{prefix}{name}", help=text) for name, text in found]


async def _ask(
    server: str, given: Mapping[str, Any], collection: str, typed: str, tenant: str
) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    async with asyncio.timeout(SECONDS), Client(server, **given) as client:
        async for name, text in _LOOKS[collection](client, typed, tenant):
            if name.startswith(typed):
                found.append((name, text))
            if len(found) == OFFERED:
                break
    return found


async def _sessions(client: Client, typed: str, tenant: str) -> Found:
    async for one in _page(client.sessions.ListSessions, v1.ListSessionsRequest()):
        yield screen.id_of(one.name), screen.one_line(one.display_name)


async def _agents(client: Client, typed: str, tenant: str) -> Found:
    async for one in _page(client.agents.ListAgents, v1.ListAgentsRequest()):
        yield screen.id_of(one.name), screen.one_line(one.display_name)


async def _keys(client: Client, typed: str, tenant: str) -> Found:
    request = v1.ListKeysRequest(tenant=name_of("tenants", tenant) if tenant else "")
    async for one in _page(client.keys.ListKeys, request):
        yield screen.id_of(one.name), screen.one_line(one.display_name)


async def _tenants(client: Client, typed: str, tenant: str) -> Found:
    async for one in _page(client.tenants.ListTenants, v1.ListTenantsRequest()):
        yield screen.id_of(one.name), screen.one_line(one.display_name)


async def _runs(client: Client, typed: str, tenant: str) -> Found:
    """Returns sessions, whose ids mean their newest runs, and the runs of one session: SESSION/RUN."""
    sessions = [one async for one in _sessions(client, typed, tenant)]
    for one in sessions:
        yield one
    if session := _only(sessions, typed):
        async for run in _page(client.runs.ListRuns, v1.ListRunsRequest(parent=f"sessions/{session}")):
            yield f"{session}/{screen.id_of(run.name)}", screen.word_of(v1.Run.State, run.state)


async def _messages(client: Client, typed: str, tenant: str) -> Found:
    """The messages of one session, SESSION/MESSAGE; until it is known which, sessions."""
    sessions = [one async for one in _sessions(client, typed, tenant)]
    session = _only(sessions, typed)
    if not session:
        for one in sessions:
            yield one
        return
    request = v1.ListMessagesRequest(parent=f"sessions/{session}", order_by="sequence desc")
    async for message in _page(client.messages.ListMessages, request):
        yield (
            f"{session}/{screen.id_of(message.name)}",
            screen.one_line(f"{screen.author(message)}: {text_of(message)}"),
        )


async def _owners(client: Client, typed: str, tenant: str) -> Found:
    yield "app", "the state of everybody"
    async for one in _sessions(client, typed, tenant):
        yield one


def _only(sessions: list[tuple[str, str]], typed: str) -> str:
    """Returns the session before the slash, or the only one that begins as typed; empty where there is neither."""
    session, slash, _ = typed.partition("/")
    matching = [session] if slash else [name for name, _ in sessions if name.startswith(typed)]
    return matching[0] if len(matching) == 1 else ""


async def _page(method: Callable[[Any], Awaitable[Any]], request: Any) -> AsyncIterator[Any]:
    """Yields the resources of one page whose ids a shell takes as they are."""
    request.page_size = READ
    for field, held in (await method(request)).ListFields():
        if field.message_type is not None:
            for one in held:
                if PLAIN.fullmatch(screen.id_of(one.name)):
                    yield one


_LOOKS: Mapping[str, Callable[[Client, str, str], Found]] = {
    "agents": _agents,
    "keys": _keys,
    "messages": _messages,
    "runs": _runs,
    "sessions": _sessions,
    "states": _owners,
    "tenants": _tenants,
}

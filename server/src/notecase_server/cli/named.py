"""Finds sessions and runs by their names, their ids, or the beginnings of their ids."""

import re
from collections.abc import Sequence

from notecase import Client, NotecaseError, v1

from notecase_server.cli import screen
from notecase_server.cli.ask import name_of, run_of
from notecase_server.cli.connection import Exit, Refusal

READ = 1000
"""Among how many, the newest ones, an id that begins as typed is looked for."""

LISTED = 9
"""How many candidates are named where several begin as typed."""

_WHOLE = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}")
"""Ids that the service or its clients make; nothing begins with them but themselves."""


def is_made(id_: str) -> bool:
    """Returns whether the service or its client made an id, rather than a caller."""
    return _WHOLE.fullmatch(id_) is not None


async def session(client: Client, given: str) -> str:
    """Returns the name of the session that is given by its name, its id, or a beginning of it that no other session
    has. Raises Refusal where several have it, and NotecaseError SESSION_NOT_FOUND where none has."""
    name = name_of("sessions", given)
    if given in {name, ""} or is_made(given):  # every id begins with an empty text, as an unset variable is
        return name
    try:
        return (await client.sessions.GetSession(v1.GetSessionRequest(name=name))).name
    except NotecaseError as error:
        if error.reason not in {"SESSION_NOT_FOUND", "INVALID_FIELD"}:
            raise
        held = (await client.sessions.ListSessions(v1.ListSessionsRequest(page_size=READ))).sessions
        found = [(one.name, one.display_name) for one in held if screen.id_of(one.name).startswith(given)]
        return _only(found, given, error)


async def run(client: Client, given: str) -> tuple[str, str]:
    """Returns the names of a session and of its run, which are given as in `run_of` or by beginnings of their ids; the
    run's is empty where only a session is given. Raises as `session` does, and RUN_NOT_FOUND."""
    parent, name = run_of(given)
    parent = parent if given.startswith("sessions/") else await session(client, screen.id_of(parent))
    if not name:
        return parent, ""
    which = screen.id_of(name)
    name = f"{parent}/runs/{which}"
    if is_made(which):
        return parent, name
    try:
        return parent, (await client.runs.GetRun(v1.GetRunRequest(name=name))).name
    except NotecaseError as error:
        if error.reason not in {"RUN_NOT_FOUND", "INVALID_FIELD"}:
            raise
        held = (await client.runs.ListRuns(v1.ListRunsRequest(parent=parent, page_size=READ))).runs
        found = [
            (one.name, screen.word_of(v1.Run.State, one.state))
            for one in held
            if screen.id_of(one.name).startswith(which)
        ]
        return parent, _only(found, which, error)


async def owner(client: Client, given: str) -> str:
    """Returns the owner of a state: app, users/ID, or a session as in `session`, each also with its /state."""
    found = given.removesuffix("/state")
    return found if found == "app" or found.startswith("users/") else await session(client, found)


def _only(found: Sequence[tuple[str, str]], typed: str, missing: NotecaseError) -> str:
    if not found:
        raise missing
    if len(found) == 1:
        return found[0][0]
    lines = screen.aligned([(f"  {screen.id_of(name)}", screen.one_line(told)) for name, told in found[:LISTED]])
    if len(found) > LISTED:
        lines.append(f"  and {len(found) - LISTED} more")
    raise Refusal("\n".join([f"Several ids begin with {typed!r}:", *lines]), Exit.USAGE)

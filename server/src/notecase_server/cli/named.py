"""Finds sessions and runs by their names, their ids, or the beginnings of ids that the service or its clients made.

All such ids have one of two lengths, so a complete id is never taken for a beginning. An id that a caller chose must be
given in full: `order-1` may be the beginning of `order-12`, and a command must not change that session instead."""

import re
from collections.abc import Iterable

from notecase import Client, NotecaseError, v1

from notecase_server.cli import screen
from notecase_server.cli.ask import name_of, run_of
from notecase_server.cli.connection import Exit, Refusal

READ = 1000
"""The most sessions, or runs of a session, among which one is found by the beginning of its id. If there are more, a
beginning that is unique among those read may not be unique."""

LISTED = 9
"""How many candidates are named where several begin as typed."""

_WHOLE = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}")
"""Ids that the service or its clients make; nothing begins with them but themselves."""

_BEGINNING = re.compile(r"[0-9a-f][0-9a-f-]{5,}")
"""What is looked up as the beginning of such an id; fewer than 6 characters may be a mistake."""


def is_made(id_: str) -> bool:
    """Returns whether the service or its client made an id, rather than a caller."""
    return _WHOLE.fullmatch(id_) is not None


async def session(client: Client, given: str) -> str:
    """Returns the name of a session that is given by its name, its id, or the beginning of its id. Raises Refusal if
    several ids begin with it, or if there are too many sessions to be sure, and NotecaseError SESSION_NOT_FOUND."""
    name = name_of("sessions", given)
    if given in {name, ""} or is_made(given):  # every id begins with an empty text, as an unset variable is
        return name
    try:
        return (await client.sessions.GetSession(v1.GetSessionRequest(name=name))).name
    except NotecaseError as error:
        if error.reason not in {"SESSION_NOT_FOUND", "INVALID_FIELD"} or not _BEGINNING.fullmatch(given):
            raise
        page = await client.sessions.ListSessions(v1.ListSessionsRequest(page_size=READ))
        found = _begun(given, ((one.name, one.display_name) for one in page.sessions), page.next_page_token, "sessions")
        if not found:
            raise
        return found


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
        if error.reason not in {"RUN_NOT_FOUND", "INVALID_FIELD"} or not _BEGINNING.fullmatch(which):
            raise
        page = await client.runs.ListRuns(v1.ListRunsRequest(parent=parent, page_size=READ))
        states = ((one.name, screen.word_of(v1.Run.State, one.state)) for one in page.runs)
        found = _begun(which, states, page.next_page_token, f"runs in {parent}")
        if not found:
            raise
        return parent, found


async def owner(client: Client, given: str) -> str:
    """Returns the owner of a state: app, users/ID, or a session as in `session`, each also with its /state."""
    found = given.removesuffix("/state")
    return found if found == "app" or found.startswith("users/") else await session(client, found)


def _begun(typed: str, held: Iterable[tuple[str, str]], more: str, what: str) -> str:
    """Returns the only name whose id was made and begins as typed; empty if there is none. `held` has names with a
    description of each; `more` is not empty if there are others. Raises Refusal if several begin so, or may."""
    if more:
        many = f"There are too many {what} to find one by the beginning of its id, {typed!r}; give the complete id."
        raise Refusal(screen.one_line(many, 400), Exit.USAGE)
    found = [one for one in held if is_made(screen.id_of(one[0])) and screen.id_of(one[0]).startswith(typed)]
    if len(found) < 2:
        return found[0][0] if found else ""
    lines = screen.aligned([(f"  {screen.id_of(name)}", screen.one_line(told)) for name, told in found[:LISTED]])
    if len(found) > LISTED:
        lines.append(f"  and {len(found) - LISTED} more")
    raise Refusal("\n".join([f"Several ids begin with {typed!r}:", *lines]), Exit.USAGE)

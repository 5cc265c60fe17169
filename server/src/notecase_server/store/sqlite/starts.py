"""Keeps in memory what a start reads: sessions as their last commits left them, and agents.

One process owns the file, and one thread writes to it and reports the outcomes of the writes in the order in which they
were made. So the rows kept here are those of the file when the last write returned. A commit changes the row of its own
session and no agent; any other write may change more, and all rows are forgotten with it.
"""

from collections import OrderedDict

from notecase import v1

MOST_SESSIONS = 1000
"""Sessions that are kept: those that were committed to last."""

MOST_BYTES = 4 << 10
"""A session with a larger row is read each time."""

MOST_AGENTS = 100
AGENT_BYTES = 64 << 10


class Starts:
    """Holds the rows of one file, as bytes: a message takes several times as much. Used from one event loop only."""

    def __init__(self) -> None:
        self.forgotten = 0
        """Counts how often all rows were forgotten. An agent that was read before the last time must not be kept."""
        self._sessions: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._agents: dict[tuple[str, str], bytes] = {}

    def find(self, tenant: str, session: str, agent: str) -> tuple[v1.Session, v1.Agent] | None:
        """Returns both, as Store.read_start; None when one of them is not kept."""
        kept = self._sessions.get((tenant, session))
        if kept is None:
            return None
        row = v1.Session.FromString(kept)
        found = self._agents.get((tenant, agent or row.agent))
        return None if found is None else (row, v1.Agent.FromString(found))

    def committed(self, tenant: str, session: str, row: v1.Session | None) -> None:
        """Replaces the row of a session after a commit; None forgets it, where the outcome has no row. The row of a
        session that is not idle is not kept: its run may end in a commit that others have read and that was not
        reported here yet."""
        self._sessions.pop((tenant, session), None)
        if row is None or row.active_run or row.queued_commands or len(kept := row.SerializeToString()) > MOST_BYTES:
            return
        self._sessions[tenant, session] = kept
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)

    def keep(self, tenant: str, name: str, agent: v1.Agent, read: int) -> None:
        """Keeps an agent under the name by which it was read. `read` is what `forgotten` was before the read."""
        if read != self.forgotten or len(kept := agent.SerializeToString()) > AGENT_BYTES:
            return
        if len(self._agents) >= MOST_AGENTS:
            self._agents.clear()
        self._agents[tenant, name] = kept

    def forget(self) -> None:
        """Forgets all rows, after a write that was not a commit and changed a row: a sweep may have found nothing."""
        self.forgotten += 1
        self._sessions.clear()
        self._agents.clear()

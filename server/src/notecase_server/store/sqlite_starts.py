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
    """Holds the rows of one file. Used from one event loop only."""

    def __init__(self) -> None:
        self.forgotten = 0
        """Counts how often all rows were forgotten. An agent that was read before the last time must not be kept."""
        self._sessions: OrderedDict[tuple[str, str], v1.Session] = OrderedDict()
        self._agents: dict[tuple[str, str], v1.Agent] = {}

    def find(self, tenant: str, session: str, agent: str) -> tuple[v1.Session, v1.Agent] | None:
        """Returns copies of both, as Store.read_start; None when one of them is not kept, or when the session was not
        idle: its run may have ended in a commit that others have read and that was not reported here yet."""
        row = self._sessions.get((tenant, session))
        if row is not None and (row.active_run or row.queued_commands):
            return None
        found = self._agents.get((tenant, agent or row.agent)) if row is not None else None
        if row is None or found is None:
            return None
        copies = v1.Session(), v1.Agent()
        copies[0].CopyFrom(row)
        copies[1].CopyFrom(found)
        return copies

    def committed(self, tenant: str, session: str, row: v1.Session | None) -> None:
        """Replaces the row of a session after a commit; None forgets it, where the outcome has no row."""
        self._sessions.pop((tenant, session), None)
        if row is None or row.ByteSize() > MOST_BYTES:
            return
        kept = self._sessions[tenant, session] = v1.Session()
        kept.CopyFrom(row)
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)

    def keep(self, tenant: str, name: str, agent: v1.Agent, read: int) -> None:
        """Keeps an agent under the name by which it was read. `read` is what `forgotten` was before the read."""
        if read != self.forgotten or agent.ByteSize() > AGENT_BYTES:
            return
        if len(self._agents) >= MOST_AGENTS:
            self._agents.clear()
        kept = self._agents[tenant, name] = v1.Agent()
        kept.CopyFrom(agent)

    def forget(self) -> None:
        """Forgets all rows, after a write that was not a commit."""
        self.forgotten += 1
        self._sessions.clear()
        self._agents.clear()

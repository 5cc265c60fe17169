"""What a start reads, kept while nothing else is written: sessions as their last commits left them, and agents.

It is right for one reason: one process owns the file, and one thread writes to it and tells what became of each write
in the order in which it was made. So this is the file as it was when the last write returned. A commit changes its own
session and nothing else of this; whatever any other write may have changed, all is forgotten with it.
"""

from collections import OrderedDict

from notecase import v1

MOST_SESSIONS = 1000
"""The newest of them; the others are read."""

MOST_BYTES = 4 << 10
"""A larger session is read each time."""

MOST_AGENTS = 100
AGENT_BYTES = 64 << 10


class Starts:
    """Those of one file. Used from one event loop only."""

    def __init__(self) -> None:
        self.forgotten = 0
        """How often all was forgotten. What was read before the last time is not to be kept."""
        self._sessions: OrderedDict[tuple[str, str], v1.Session] = OrderedDict()
        self._agents: dict[tuple[str, str], v1.Agent] = {}

    def find(self, tenant: str, session: str, agent: str) -> tuple[v1.Session, v1.Agent] | None:
        """Returns copies of both, as Store.read_start; None when one of them is not kept."""
        row = self._sessions.get((tenant, session))
        found = self._agents.get((tenant, agent or row.agent)) if row is not None else None
        if row is None or found is None:
            return None
        copies = v1.Session(), v1.Agent()
        copies[0].CopyFrom(row)
        copies[1].CopyFrom(found)
        return copies

    def committed(self, tenant: str, session: str, row: v1.Session | None) -> None:
        """Takes in what a commit has made of a session; None where that is not known."""
        self._sessions.pop((tenant, session), None)
        if row is None or row.ByteSize() > MOST_BYTES:
            return
        kept = self._sessions[tenant, session] = v1.Session()
        kept.CopyFrom(row)
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)

    def keep(self, tenant: str, name: str, agent: v1.Agent, read: int) -> None:
        """Keeps an agent by the name that it was asked for, read when `forgotten` was `read`."""
        if read != self.forgotten or agent.ByteSize() > AGENT_BYTES:
            return
        if len(self._agents) >= MOST_AGENTS:
            self._agents.clear()
        kept = self._agents[tenant, name] = v1.Agent()
        kept.CopyFrom(agent)

    def forget(self) -> None:
        """Forgets all: something was written that is no commit."""
        self.forgotten += 1
        self._sessions.clear()
        self._agents.clear()

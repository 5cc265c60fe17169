"""Connects the modules that make up the runs of one process."""

import asyncio

from notecase_server.engine.admission import Admission
from notecase_server.engine.at_rest import AtRest
from notecase_server.engine.commands import Commands
from notecase_server.engine.queue import Queue
from notecase_server.engine.roster import Roster
from notecase_server.engine.services import Services
from notecase_server.engine.sessions import Sessions
from notecase_server.engine.upkeep import Upkeep

POLL_SECONDS = 5.0
"""How often what waits looks into the store although no bell rang: a lost hint costs this much time, and nothing
else."""


class Runs:
    """Callers use `admission`, `commands` and `at_rest`; the server uses the rest."""

    def __init__(self, sessions: Sessions, services: Services, poll_seconds: float = POLL_SECONDS) -> None:
        self._services = services
        self.roster = Roster(sessions, services)
        self.admission = Admission(sessions, services, self.roster)
        self.commands = Commands(sessions, services, self.roster, poll_seconds)
        self.at_rest = AtRest(sessions, services, self.admission)
        queue = Queue(sessions, services, self.roster)
        self.upkeep = Upkeep(sessions, services, self.roster, self.admission, queue, self.commands, poll_seconds)

    async def drain(self, grace: float) -> None:
        """Accepts nothing new, waits up to `grace` seconds for running replies, calls and other work, and then stops
        the rest. A run that has not ended stays in the store as it is, for the next process to take over."""
        now = asyncio.get_running_loop().time
        until = now() + grace
        await self.roster.drain(grace)
        await self._services.supervisor.drain(max(until - now(), 0))

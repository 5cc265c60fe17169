"""Says what a write was caused by."""

from typing import NamedTuple

from notecase_server.store.contract import AuditRow, CommandId, Once


class Caused(NamedTuple):
    """The cause of a write: its id in the log, and its record for repeats."""

    cause_id: str = ""
    once: Once | None = None
    command: CommandId | None = None
    principal: str = ""
    """Whose request it is: see Commit.principal."""
    audit: AuditRow | None = None
    """To be written with it: see Commit.audit."""


NOBODY = Caused()
"""What no caller has asked for."""

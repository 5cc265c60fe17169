"""Writes refusals to the audit: those for a missing role one by one up to a limit, calls without a credential as a
number."""

import asyncio
from collections import Counter

import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.auth.principal import Principal
from notecase_server.auth.principals import Principals
from notecase_server.errors import NotecaseError
from notecase_server.rpc.caller import NOBODY, caller
from notecase_server.store.contract import AuditRow, AuditStore

log = structlog.get_logger()

KEPT_A_MINUTE = 10
"""Refusals of one principal in a minute that have an entry each; those beyond have one together."""

LOGGED_A_MINUTE = 100
"""Calls in a minute that are refused for the same reason before their caller is known, and have a line each in the
log."""

WRITE_SECONDS = 1.0
"""How long a refusal waits for its entry. A process that is killed loses the refusals of that time."""

MINUTE = 60
"""After so many writes the counts are written, too, and set back to 0."""

MOST_PRINCIPALS = 10_000
"""Of one minute; refusals of others have one entry together."""

MOST_WAITING = 10_000
"""Entries that wait for a store that is away; further ones are lost, and the log says how many."""

BATCH = 100
"""Entries that one transaction writes."""

ROLE_MISSING = errors.reason_name(v1.ERROR_REASON_ROLE_MISSING)
UNAUTHENTICATED = errors.reason_name(v1.ERROR_REASON_UNAUTHENTICATED)


class Refusals:
    """The refusals of one server that are not in its store yet. An entry may be written twice where an answer of the
    store was lost."""

    def __init__(self, store: AuditStore, principals: Principals) -> None:
        self._store = store
        self._principals = principals
        self._waiting: list[tuple[Principal, v1.AuditEntry]] = []
        self._minute = Counter[Principal]()
        """Refusals of this minute for a missing role."""
        self._unknown = Counter[str]()
        """Refusals of this minute without a known caller, by reason."""
        self._lost = 0

    def note(self, error: NotecaseError) -> None:
        """Logs why the current call was refused, and collects the refusal for the audit. Beyond LOGGED_A_MINUTE, calls
        whose caller is not known are only counted, since anybody can make any number of them."""
        who, reason = caller.get(), errors.reason_name(error.reason)
        if who.principal is NOBODY or reason == UNAUTHENTICATED:
            self._unknown[reason] += 1
            if self._unknown[reason] > LOGGED_A_MINUTE:
                return
        cause = {"cause": error.cause} if error.cause else {}
        log.info("rpc_refused", reason=reason, problem=error.message[:300], **cause)
        if error.reason == v1.ERROR_REASON_ROLE_MISSING and who.principal.subject:
            known = who.principal in self._minute or len(self._minute) < MOST_PRINCIPALS
            principal = who.principal if known else NOBODY
            self._minute[principal] += 1
            if known and self._minute[principal] <= KEPT_A_MINUTE:
                method = who.method.removeprefix("/")
                self._add(principal, _entry(ROLE_MISSING, 1, method=method, request_id=who.request_id))

    def _add(self, principal: Principal, entry: v1.AuditEntry) -> None:
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append((principal, entry))
        else:
            self._lost += 1

    def count(self) -> None:
        """Adds an entry for each count, and sets the counts back to 0."""
        for principal, refused in self._minute.items():
            beyond = refused if principal is NOBODY else refused - KEPT_A_MINUTE
            if beyond > 0:
                self._add(principal, _entry(ROLE_MISSING, beyond))
        self._minute.clear()
        for reason, calls in self._unknown.items():
            if calls > LOGGED_A_MINUTE:
                log.warning("calls_unauthenticated", reason=reason, calls=calls)
        if calls := self._unknown[UNAUTHENTICATED]:
            self._add(NOBODY, _entry(UNAUTHENTICATED, calls))
        self._unknown.clear()

    async def write(self) -> None:
        """Writes the entries that wait. Raises NotecaseError STORE_UNAVAILABLE; then the others wait on."""
        while batch := self._waiting[:BATCH]:
            rows = []
            for principal, entry in batch:
                entry.principal = await self._principals.name(principal, principal.tenant)
                rows.append(AuditRow(principal.tenant, entry))
            await self._store.add_audit(rows)
            del self._waiting[: len(batch)]
        if self._lost:
            log.error("refusals_lost", refusals=self._lost)
            self._lost = 0

    async def keep_writing(self) -> None:
        """Writes the collected entries every WRITE_SECONDS, without end."""
        while True:
            for _ in range(MINUTE):
                await asyncio.sleep(WRITE_SECONDS)
                await self._attempt()
            self.count()

    async def close(self) -> None:
        """Writes all that was noted and counted, if the store takes it."""
        self.count()
        await self._attempt()

    async def _attempt(self) -> None:
        try:
            await self.write()
        except NotecaseError as error:
            log.warning("refusals_wait", refusals=len(self._waiting), reason=errors.reason_name(error.reason))


def _entry(outcome: str, calls: int, method: str = "", request_id: str = "") -> v1.AuditEntry:
    return v1.AuditEntry(method=method, outcome=outcome, request_id=request_id, call_count=calls)

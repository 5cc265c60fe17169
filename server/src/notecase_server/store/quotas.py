"""What an operator lets be kept, looked at before a write: see Quotas. A bound that is not set costs nothing; one that
is asks the tables how much there is."""

from notecase import v1

from notecase_server import errors
from notecase_server.store.contract import Commit, Once, Quotas, Scope
from notecase_server.store.sql.tables import Tables

BEGINS = frozenset({"message_added", "run_started", "command_queued", "state_changed"})
"""Events by which a caller's commit adds to what is kept. A commit with a rewind takes something back, and is let
through."""


def require_session(tables: Tables, tenant: str) -> None:
    """Another session. Raises NotecaseError QUOTA_EXCEEDED, as the others do."""
    if (most := tables.quotas.sessions) and tables.kept("sessions", tenant) >= most:
        raise errors.quota_exceeded("session", most, "in a tenant")


def require_log(quotas: Quotas, commit: Commit, session: v1.Session) -> None:
    """More in a session's log, unless it is a run's, which is to come to its end."""
    if commit.if_epoch is not None or not (quotas.events or quotas.log_bytes):
        return
    kinds = {event.WhichOneof("payload") for event in commit.events}
    if "rewound" in kinds or not kinds & BEGINS:
        return
    if quotas.events and session.last_sequence >= quotas.events:
        raise errors.quota_exceeded("event", quotas.events, "in the log of a session")
    if quotas.log_bytes and session.log_bytes >= quotas.log_bytes:
        raise errors.quota_exceeded("byte", quotas.log_bytes, "in the log of a session")


def require_keys(tables: Tables, scope: Scope, more: int) -> None:
    """More keys of a state, where `more` is above 0."""
    most = tables.quotas.state_keys
    if most and more > 0 and tables.kept("keys", scope.tenant, scope.kind, scope.id) + more > most:
        raise errors.quota_exceeded("key", most, "in a state")


def require_agent(tables: Tables, tenant: str, agent_id: str, *, new: bool) -> None:
    """Another revision of an agent, which may be its first."""
    if (most := tables.quotas.agents) and new and tables.kept("agents", tenant) >= most:
        raise errors.quota_exceeded("agent", most, "in a tenant")
    if (most := tables.quotas.revisions) and tables.kept("revisions", tenant, agent_id) >= most:
        raise errors.quota_exceeded("revision", most, "of an agent")


def require_content(tables: Tables, tenant: str, more: int = 0) -> None:
    """More content; `more` bytes of it, if the number is known before they come."""
    if not (most := tables.quotas.blob_bytes):
        return
    least = max(more, 1)
    there = tables.kept("blob_bytes", tenant, more=least)
    if there + least > most:
        uploading = tables.kept("upload_bytes", tenant)
        raise errors.content_quota_exceeded(most, there - uploading, uploading, more)


def require_upload(tables: Tables, tenant: str) -> None:
    """Another upload."""
    if (most := tables.quotas.uploads) and tables.kept("uploads", tenant) >= most:
        raise errors.quota_exceeded("upload", most, "under way or remembered in a tenant")


def require_record(tables: Tables, once: Once | None) -> None:
    """Another remembered request."""
    if (most := tables.quotas.requests) and once is not None and tables.kept("requests", once.tenant) >= most:
        raise errors.quota_exceeded("request", most, "remembered in a tenant for a day")

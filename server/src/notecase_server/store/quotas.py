"""What an operator lets be kept, looked at before a write: see Quotas. A bound that is not set costs nothing; one that
is asks the tables how much there is."""

from notecase import v1

from notecase_server import errors
from notecase_server.store.contract import Commit, Once, Quotas, Scope
from notecase_server.store.tables import Tables

BEGINS = frozenset({"message_added", "run_started", "command_queued", "state_changed"})
"""Events by which a caller's commit adds to what is kept. A commit with a rewind takes something back, and is let
through."""


def require_session(tables: Tables, quotas: Quotas, tenant: str) -> None:
    """Another session. Raises NotecaseError QUOTA_EXCEEDED, as the others do."""
    if quotas.sessions and tables.kept("sessions", tenant) >= quotas.sessions:
        raise errors.quota_exceeded("session", quotas.sessions, "in a tenant")


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


def require_keys(tables: Tables, quotas: Quotas, scope: Scope, more: int) -> None:
    """More keys of a state, where `more` is above 0."""
    if (
        quotas.state_keys
        and more > 0
        and tables.kept("keys", scope.tenant, scope.kind, scope.id) + more > quotas.state_keys
    ):
        raise errors.quota_exceeded("key", quotas.state_keys, "in a state")


def require_agent(tables: Tables, quotas: Quotas, tenant: str, agent_id: str, *, new: bool) -> None:
    """Another revision of an agent, which may be its first."""
    if quotas.agents and new and tables.kept("agents", tenant) >= quotas.agents:
        raise errors.quota_exceeded("agent", quotas.agents, "in a tenant")
    if quotas.revisions and tables.kept("revisions", tenant, agent_id) >= quotas.revisions:
        raise errors.quota_exceeded("revision", quotas.revisions, "of an agent")


def require_content(tables: Tables, quotas: Quotas, tenant: str, more: int = 0) -> None:
    """More content; `more` bytes of it, if the number is known before they come."""
    if not quotas.blob_bytes:
        return
    least = max(more, 1)
    there = tables.kept("blob_bytes", tenant, more=least)
    if there + least > quotas.blob_bytes:
        uploading = tables.kept("upload_bytes", tenant)
        raise errors.content_quota_exceeded(quotas.blob_bytes, there - uploading, uploading, more)


def require_upload(tables: Tables, quotas: Quotas, tenant: str) -> None:
    """Another upload."""
    if quotas.uploads and tables.kept("uploads", tenant) >= quotas.uploads:
        raise errors.quota_exceeded("upload", quotas.uploads, "under way or remembered in a tenant")


def require_record(tables: Tables, quotas: Quotas, once: Once | None) -> None:
    """Another remembered request."""
    if quotas.requests and once is not None and tables.kept("requests", once.tenant) >= quotas.requests:
        raise errors.quota_exceeded("request", quotas.requests, "remembered in a tenant for a day")

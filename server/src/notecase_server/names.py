"""Resource names: from text to ids at the edge, and from the stored form to text on reading.

A stored row names its runs and messages by bare ids and its states by "", "user" or "app"; the functions that render
give them their whole names, in place, in a message that the caller owns.
"""

import re
from typing import NamedTuple

from notecase import v1

from notecase_server.store.contract import Scope

ID = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
"""An id that a caller may choose."""
SESSION = re.compile(f"sessions/({ID.pattern})")
AGENT = re.compile(f"agents/({ID.pattern})(?:@([1-9][0-9]{{0,17}}))?")
RUN = re.compile(f"{SESSION.pattern}/runs/({ID.pattern})")
MESSAGE = re.compile(f"{SESSION.pattern}/messages/({ID.pattern})")
USER = re.compile(r"[A-Za-z0-9._~@|:+=-]{1,128}")
"""Users come from identity providers, whose ids have capitals, pipes and at-signs."""

KEY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""The id of a key or a principal, a UUID."""

BLOB = re.compile(r"blobs/[0-9a-f]{64}")

ID_SHAPE = "1 to 63 lower-case letters, digits and inner '.', '_' or '-'"

ID_RULE = f"must be {ID_SHAPE}"

USER_SHAPE = "1 to 128 letters, digits and . _ ~ @ | : + = -"

UUID_SHAPE = "a UUID in lower case"


class AgentName(NamedTuple):
    """`agents/{agent}` or `agents/{agent}@{revision}`; revision 0 means the newest."""

    agent: str
    revision: int


class RunName(NamedTuple):
    session: str
    run: str


class MessageName(NamedTuple):
    session: str
    message: str


def is_id(text: str) -> bool:
    return ID.fullmatch(text) is not None


def parse_agent(name: str) -> AgentName | None:
    found = AGENT.fullmatch(name)
    return AgentName(found[1], int(found[2] or 0)) if found else None


def parse_session(name: str) -> str | None:
    """The {session} of `sessions/{session}`."""
    found = SESSION.fullmatch(name)
    return found[1] if found else None


def parse_key(name: str) -> str | None:
    """The {key} of `keys/{key}`."""
    collection, _, key = name.partition("/")
    return key if collection == "keys" and KEY.fullmatch(key) else None


def parse_principal(name: str) -> str | None:
    """The {principal} of `principals/{principal}`."""
    collection, _, principal = name.partition("/")
    return principal if collection == "principals" and KEY.fullmatch(principal) else None


def parse_tenant(name: str) -> str | None:
    """The {tenant} of `tenants/{tenant}`."""
    collection, _, tenant = name.partition("/")
    return tenant if collection == "tenants" and is_id(tenant) else None


def parse_user(name: str) -> str | None:
    """The {user} of `users/{user}`."""
    collection, _, user = name.partition("/")
    return user if collection == "users" and USER.fullmatch(user) else None


def parse_run(name: str) -> RunName | None:
    found = RUN.fullmatch(name)
    return RunName(found[1], found[2]) if found else None


def parse_message(name: str) -> MessageName | None:
    found = MESSAGE.fullmatch(name)
    return MessageName(found[1], found[2]) if found else None


def parse_state(tenant: str, name: str) -> Scope | None:
    """`sessions/{session}/state`, `users/{user}/state` or `app/state`. That of a session has its
    name where the uid belongs."""
    owner, _, last = name.rpartition("/")
    if last != "state":
        return None
    if owner == "app":
        return Scope(tenant, "app", "")
    if session := parse_session(owner):
        return Scope(tenant, "session", session)
    if user := parse_user(owner):
        return Scope(tenant, "user", user)
    return None


def parse_blob(name: str) -> str | None:
    """The {sha256} of `blobs/{sha256}`."""
    return name.removeprefix("blobs/") if BLOB.fullmatch(name) else None


def tenant(tenant_id: str) -> str:
    return f"tenants/{tenant_id}"


def key(key_id: str) -> str:
    return f"keys/{key_id}"


def principal(principal_id: str) -> str:
    return f"principals/{principal_id}"


def blob(sha256: str) -> str:
    return f"blobs/{sha256}"


def session(session_id: str) -> str:
    return f"sessions/{session_id}"


def run(session_id: str, run_id: str) -> str:
    return f"sessions/{session_id}/runs/{run_id}"


def message(session_id: str, message_id: str) -> str:
    return f"sessions/{session_id}/messages/{message_id}"


def state(scope: Scope) -> str:
    owner = "app" if scope.kind == "app" else f"{scope.kind}s/{scope.id}"
    return f"{owner}/state"


def render_session(row: v1.Session) -> v1.Session:
    session_id = row.name
    row.name = session(session_id)
    if row.active_run:
        row.active_run = run(session_id, row.active_run)
    if row.parent_session:
        row.parent_session = session(row.parent_session)
    for queued in row.queued_commands:
        queued.run = run(session_id, queued.run)
    return row


def render_message(session_id: str, row: v1.Message) -> v1.Message:
    row.name = f"sessions/{session_id}/messages/{row.name}"
    if row.run:
        row.run = f"sessions/{session_id}/runs/{row.run}"
    return row


def render_run(session_id: str, row: v1.Run) -> v1.Run:
    row.name = f"sessions/{session_id}/runs/{row.name}"
    if row.HasField("reply"):
        render_message(session_id, row.reply)
    return row


def render_event(session_id: str, user: str, row: v1.Event) -> v1.Event:
    """`user` is the session's, as `users/{user}`."""
    if row.run:
        row.run = f"sessions/{session_id}/runs/{row.run}"
    match row.WhichOneof("payload"):
        case "message_added":
            render_message(session_id, row.message_added)
        case "state_changed":
            owner = {"": session(session_id), "user": user, "app": "app"}[row.state_changed.state]
            row.state_changed.state = f"{owner}/state"
        case "rewound" if row.rewound.run:
            row.rewound.run = run(session_id, row.rewound.run)
    return row

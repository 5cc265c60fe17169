"""Defines every failure that a caller can receive: one exception with a stable reason and a message without internals.

`CATALOG` maps each reason to its google.rpc code and, where a retry can help, to the time to wait. The functions below
are the only way to make a failure, so each message is written once.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from google.rpc import code_pb2
from notecase import v1


class Kind(NamedTuple):
    """What all failures of one reason share."""

    code: int
    """A google.rpc.Code."""
    retry_after: float | None = None
    """Seconds, where a retry helps."""


class Violation(NamedTuple):
    """One field that is wrong, and what would be right."""

    field: str
    description: str


class Resource(NamedTuple):
    """What a failure is about."""

    kind: str
    name: str


CATALOG: Mapping[v1.ErrorReason.ValueType, Kind] = {
    v1.ERROR_REASON_INVALID_FIELD: Kind(code_pb2.INVALID_ARGUMENT),
    v1.ERROR_REASON_AGENT_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
    v1.ERROR_REASON_SESSION_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
    v1.ERROR_REASON_RUN_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
    v1.ERROR_REASON_MESSAGE_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
    v1.ERROR_REASON_BLOB_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
    v1.ERROR_REASON_STATE_KEY_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
    v1.ERROR_REASON_ALREADY_EXISTS: Kind(code_pb2.ALREADY_EXISTS),
    v1.ERROR_REASON_REQUEST_ID_REUSED: Kind(code_pb2.ALREADY_EXISTS),
    v1.ERROR_REASON_ETAG_MISMATCH: Kind(code_pb2.ABORTED),
    v1.ERROR_REASON_SEQUENCE_MISMATCH: Kind(code_pb2.ABORTED),
    v1.ERROR_REASON_STATE_VERSION_MISMATCH: Kind(code_pb2.ABORTED),
    v1.ERROR_REASON_RUN_ACTIVE: Kind(code_pb2.FAILED_PRECONDITION),
    v1.ERROR_REASON_RUN_ENDED: Kind(code_pb2.FAILED_PRECONDITION),
    v1.ERROR_REASON_RUN_CANCELLED_BEFORE_START: Kind(code_pb2.CANCELLED),
    v1.ERROR_REASON_INPUT_NOT_PENDING: Kind(code_pb2.FAILED_PRECONDITION),
    v1.ERROR_REASON_CALL_NOT_PENDING: Kind(code_pb2.FAILED_PRECONDITION),
    v1.ERROR_REASON_PAGE_TOKEN_INVALID: Kind(code_pb2.INVALID_ARGUMENT),
    v1.ERROR_REASON_PAYLOAD_TOO_LARGE: Kind(code_pb2.RESOURCE_EXHAUSTED),
    v1.ERROR_REASON_BLOB_CORRUPT: Kind(code_pb2.INVALID_ARGUMENT),
    v1.ERROR_REASON_UPLOAD_OFFSET_MISMATCH: Kind(code_pb2.ABORTED),
    v1.ERROR_REASON_QUEUE_FULL: Kind(code_pb2.RESOURCE_EXHAUSTED, retry_after=1.0),
    v1.ERROR_REASON_RATE_LIMITED: Kind(code_pb2.RESOURCE_EXHAUSTED, retry_after=1.0),
    v1.ERROR_REASON_QUOTA_EXCEEDED: Kind(code_pb2.RESOURCE_EXHAUSTED, retry_after=60.0),
    v1.ERROR_REASON_LIMIT_EXCEEDED: Kind(code_pb2.RESOURCE_EXHAUSTED),
    v1.ERROR_REASON_SERVER_DRAINING: Kind(code_pb2.UNAVAILABLE, retry_after=1.0),
    v1.ERROR_REASON_STORE_UNAVAILABLE: Kind(code_pb2.UNAVAILABLE, retry_after=1.0),
    v1.ERROR_REASON_ISSUER_UNAVAILABLE: Kind(code_pb2.UNAVAILABLE, retry_after=1.0),
    v1.ERROR_REASON_OWNER_LOST: Kind(code_pb2.UNAVAILABLE, retry_after=1.0),
    v1.ERROR_REASON_MODEL_ERROR: Kind(code_pb2.FAILED_PRECONDITION),
    v1.ERROR_REASON_MODEL_UNAVAILABLE: Kind(code_pb2.UNAVAILABLE),
    v1.ERROR_REASON_TOOL_ERROR: Kind(code_pb2.UNAVAILABLE),
    v1.ERROR_REASON_TEMPLATE_ERROR: Kind(code_pb2.INVALID_ARGUMENT),
    v1.ERROR_REASON_INTERNAL: Kind(code_pb2.INTERNAL),
    v1.ERROR_REASON_STATE_TYPE_MISMATCH: Kind(code_pb2.FAILED_PRECONDITION),
    v1.ERROR_REASON_SEQUENCE_AHEAD: Kind(code_pb2.OUT_OF_RANGE),
    v1.ERROR_REASON_CONTENT_UNSUPPORTED: Kind(code_pb2.INVALID_ARGUMENT),
    v1.ERROR_REASON_IMPORT_INVALID: Kind(code_pb2.INVALID_ARGUMENT),
    v1.ERROR_REASON_WATCHER_TOO_SLOW: Kind(code_pb2.RESOURCE_EXHAUSTED, retry_after=1.0),
    v1.ERROR_REASON_OUTPUT_INVALID: Kind(code_pb2.FAILED_PRECONDITION),
    v1.ERROR_REASON_UNAUTHENTICATED: Kind(code_pb2.UNAUTHENTICATED),
    v1.ERROR_REASON_ROLE_MISSING: Kind(code_pb2.PERMISSION_DENIED),
    v1.ERROR_REASON_KEY_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
    v1.ERROR_REASON_USER_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
    v1.ERROR_REASON_TENANT_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
    v1.ERROR_REASON_TENANT_SUSPENDED: Kind(code_pb2.PERMISSION_DENIED),
    v1.ERROR_REASON_PRINCIPAL_NOT_FOUND: Kind(code_pb2.NOT_FOUND),
}


class NotecaseError(Exception):
    """A failure that is sent to the caller in full."""

    def __init__(
        self,
        reason: v1.ErrorReason.ValueType,
        message: str,
        *,
        metadata: Mapping[str, object] | None = None,
        violations: Iterable[Violation] = (),
        resource: Resource | None = None,
        quota: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        kind = CATALOG[reason]
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.violations = tuple(violations)
        self.resource = resource
        self.quota = quota
        self.code = kind.code
        self.retry_after = kind.retry_after if retry_after is None else retry_after
        self.repeats: int | None = None
        """How often a repeat of the model call that failed so is worth it; None leaves that to its reason."""
        self.of_request = False
        """The provider may have refused something in the request of the model call; without it, it may be accepted."""
        self.usage: v1.Usage | None = None
        """What the failed model call consumed, as far as its provider reported it."""
        self.cause = ""
        """Why, for the server's log alone: no client receives it."""

    def to_proto(self) -> v1.Error:
        """The same facts as data, for a failed run or a refused command."""
        error = v1.Error(code=self.code, reason=self.reason, message=self.message, metadata=self.metadata)
        for violation in self.violations:
            error.metadata[violation.field] = violation.description
        return error


def counted(number: float, noun: str) -> str:
    """The number with its noun, whose plural ends in "s": `1 byte`, `2 bytes`."""
    return f"{number:g} {noun}" if number == 1 else f"{number:.15g} {noun}s"


def reason_name(reason: v1.ErrorReason.ValueType) -> str:
    """The reason as ErrorInfo carries it: "RUN_ACTIVE"."""
    return v1.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")


_NOUNS = {
    "agent": "an agent",
    "session": "a session",
    "run": "a run",
    "message": "a message",
    "blob": "a blob",
    "upload": "an upload",
    "tenant": "a tenant",
    "principal": "a principal",
}
"""Each kind with its article."""

_NOT_FOUND = {
    "agent": v1.ERROR_REASON_AGENT_NOT_FOUND,
    "session": v1.ERROR_REASON_SESSION_NOT_FOUND,
    "run": v1.ERROR_REASON_RUN_NOT_FOUND,
    "message": v1.ERROR_REASON_MESSAGE_NOT_FOUND,
    "blob": v1.ERROR_REASON_BLOB_NOT_FOUND,
    "upload": v1.ERROR_REASON_BLOB_NOT_FOUND,
    "key": v1.ERROR_REASON_KEY_NOT_FOUND,
    "user": v1.ERROR_REASON_USER_NOT_FOUND,
    "tenant": v1.ERROR_REASON_TENANT_NOT_FOUND,
    "principal": v1.ERROR_REASON_PRINCIPAL_NOT_FOUND,
}


def invalid(violations: Iterable[Violation]) -> NotecaseError:
    """Fields are missing or malformed: all of them at once."""
    found = tuple(violations)
    told = "; ".join(f"{v.field}: {v.description}" for v in found[:3])
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return NotecaseError(v1.ERROR_REASON_INVALID_FIELD, f"{told}{more}.", violations=found)


def unauthenticated(cause: str = "") -> NotecaseError:
    """A credential that is bad, expired or revoked. Only the server's log says which, as `cause`."""
    error = NotecaseError(
        v1.ERROR_REASON_UNAUTHENTICATED,
        "The credential of this call is invalid, expired or revoked; send another one.",
    )
    error.cause = cause
    return error


def no_credential() -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_UNAUTHENTICATED,
        "This call has no credential that this server accepts; send one as metadata: authorization: Bearer KEY.",
    )


def several_credentials() -> NotecaseError:
    return NotecaseError(v1.ERROR_REASON_UNAUTHENTICATED, "This call has more than one credential; send only one.")


def role_missing(role: str, fields: Iterable[str] = ()) -> NotecaseError:
    """`role` is the least that is needed, such as "DEVELOPER"; `fields` are those that it is needed for, none when it
    is needed for the call."""
    needs = f"needs the role {role.lower()}"
    found = [Violation(field, needs) for field in fields]
    told = ", ".join(violation.field for violation in found[:3]) or "This call"
    return NotecaseError(
        v1.ERROR_REASON_ROLE_MISSING,
        f"{told}: {needs}." if found else f"{told} {needs}, which its caller does not have.",
        metadata={"role": role},
        violations=found,
    )


def tenant_needed(role: str) -> NotecaseError:
    """As `role_missing`, for an operator, who has no tenant and therefore none of the rights of its roles."""
    return NotecaseError(
        v1.ERROR_REASON_ROLE_MISSING,
        f"This call needs a credential of a tenant with at least the role {role.lower()}; an operator has no tenant.",
        metadata={"role": role},
    )


def issuer_unavailable() -> NotecaseError:
    """The token cannot be verified without keys of its issuer."""
    return NotecaseError(
        v1.ERROR_REASON_ISSUER_UNAVAILABLE,
        "The token cannot be verified because its issuer's keys cannot be fetched at present; try again shortly.",
    )


def tenant_suspended() -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_TENANT_SUSPENDED, "The operator of this server does not allow calls of this tenant at present."
    )


def bound_to_user(role: str, fields: Iterable[str] = ()) -> NotecaseError:
    """As `role_missing`, for a caller that is bound to a user and therefore lacks the right, whatever its role."""
    needs = f"needs a credential that is not bound to a user and has at least the role {role.lower()}"
    found = [Violation(field, needs) for field in fields]
    named = ", ".join(violation.field for violation in found[:3])
    message = f"{named}: {needs}." if named else f"This call {needs}."
    return NotecaseError(v1.ERROR_REASON_ROLE_MISSING, message, metadata={"role": role}, violations=found)


def not_found(kind: str, name: str) -> NotecaseError:
    """`kind` is "agent", "session", "run", "message", "blob", "upload", "key", "user", "tenant" or "principal"; `name`
    its whole resource name."""
    return NotecaseError(_NOT_FOUND[kind], f"There is no {kind} {name!r}.", resource=Resource(kind, name))


def no_run(session: str) -> NotecaseError:
    """A command needs an active run and names none. `session` is the session's full name."""
    return NotecaseError(
        v1.ERROR_REASON_RUN_NOT_FOUND,
        f"{session} has no run under way; start one, or name the run that you mean.",
        resource=Resource("session", session),
    )


def already_exists(kind: str, name: str) -> NotecaseError:
    """`kind` and `name` as for `not_found`."""
    return NotecaseError(
        v1.ERROR_REASON_ALREADY_EXISTS,
        f"There is already {_NOUNS[kind]} {name!r}; choose another id.",
        resource=Resource(kind, name),
    )


def state_key_not_found(state: str, key: str) -> NotecaseError:
    """`state` is the name of the state, such as sessions/{session}/state."""
    return NotecaseError(
        v1.ERROR_REASON_STATE_KEY_NOT_FOUND,
        f"{state} has no key {key!r}.",
        metadata={"key": key},
        resource=Resource("state", state),
    )


def blob_corrupt(problem: str) -> NotecaseError:
    """`problem` is a sentence without its subject and its stop, such as "has 3 bytes, not 4"."""
    return NotecaseError(v1.ERROR_REASON_BLOB_CORRUPT, f"The content {problem}.")


def blob_cut(committed_bytes: int, size: int, resumable: bool) -> NotecaseError:
    """The stream ended before the content did. `size` is the announced size, or 0."""
    end = f"ends at byte {committed_bytes} {f'of {size}' if size else 'without a sign that it is complete'}"
    return NotecaseError(
        v1.ERROR_REASON_BLOB_CORRUPT,
        f"The content {end}; send {'the rest' if resumable else 'it again'}.",
        metadata={"committed_bytes": committed_bytes} if resumable else {},
    )


def upload_offset_mismatch(upload_id: str, committed_bytes: int) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_UPLOAD_OFFSET_MISMATCH,
        f"The upload {upload_id!r} continues at byte {committed_bytes}; send the rest from there.",
        metadata={"committed_bytes": committed_bytes},
    )


def reused(field: str, value: str) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_REQUEST_ID_REUSED,
        f"The {field} {value!r} was used before with another body; a new request needs a new {field}.",
        metadata={field: value},
    )


def etag_mismatch(name: str, etag: str) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_ETAG_MISMATCH,
        f"{name} changed since you read it; read it again and repeat the change.",
        metadata={"etag": etag},
    )


def sequence_mismatch(last_sequence: int) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_SEQUENCE_MISMATCH,
        f"The session's log has grown to sequence {last_sequence}; read the new events and repeat the call.",
        metadata={"last_sequence": last_sequence},
    )


def version_mismatch(what: str, version: int) -> NotecaseError:
    """`version` 0 says that the key does not exist."""
    now = f"its version is {version}" if version else "it does not exist"
    return NotecaseError(
        v1.ERROR_REASON_STATE_VERSION_MISMATCH,
        f"{what} changed since you read it: {now}; read it again and repeat the change.",
        metadata={"version": version},
    )


def type_mismatch(key: str, problem: str) -> NotecaseError:
    return NotecaseError(v1.ERROR_REASON_STATE_TYPE_MISMATCH, f"State key {key!r}: {problem}.", metadata={"key": key})


def run_active(run: str) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_RUN_ACTIVE,
        f"The session is busy with {run}; wait for its end (WaitRun) or cancel it (CancelRun).",
        metadata={"run": run},
    )


def run_ended(run: str, state: v1.Run.State.ValueType) -> NotecaseError:
    told = v1.Run.State.Name(state).removeprefix("STATE_")
    return NotecaseError(v1.ERROR_REASON_RUN_ENDED, f"{run} has ended ({told}).", metadata={"run": run, "state": told})


def cancelled_before_start(run: str) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_RUN_CANCELLED_BEFORE_START,
        f"{run} was cancelled before it started; start a new run.",
        metadata={"run": run},
    )


def call_not_pending(call_id: str) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_CALL_NOT_PENDING,
        f"No call {call_id!r} waits for a result here: it has an outcome, is not a client tool's, or belongs to "
        "another session.",
        metadata={"call_id": call_id},
    )


def input_not_pending(input_id: str) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_INPUT_NOT_PENDING,
        f"No input {input_id!r} waits for an answer here: it was answered or withdrawn, or belongs to another session.",
        metadata={"input_id": input_id},
    )


def queue_full(limit: int) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_QUEUE_FULL,
        f"This session's queue is full: it holds {counted(limit, 'command')}; try again later.",
        metadata={"limit": limit},
        quota=f"queued commands of a session: {limit}",
    )


def tool_error(message: str) -> NotecaseError:
    """A tool that a run needs is not available. A call that fails is data for the model instead."""
    return NotecaseError(v1.ERROR_REASON_TOOL_ERROR, message)


def watcher_too_slow(seconds: float) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_WATCHER_TOO_SLOW,
        f"The client read nothing from this stream for {counted(seconds, 'second')}; attach again after the last "
        "sequence you received.",
        quota=f"a stream without reads: {counted(seconds, 'second')}",
    )


def page_token_invalid() -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_PAGE_TOKEN_INVALID,
        "The page_token is not from this list with these arguments; start again without it.",
        violations=[Violation("page_token", "not valid here")],
    )


def too_large(what: str, size: int, limit: int, advice: str = "") -> NotecaseError:
    """`advice` is a sentence about what to send instead."""
    return NotecaseError(
        v1.ERROR_REASON_PAYLOAD_TOO_LARGE,
        f"{what} has {counted(size, 'byte')}; the server accepts at most {limit}. {advice}".rstrip(),
        metadata={"size": size, "limit": limit},
        quota=f"{what}: at most {counted(limit, 'byte')}",
    )


def too_many(noun: str, limit: int, where: str = "") -> NotecaseError:
    """What the process can carry at once; `where` is "" for all of it."""
    return NotecaseError(
        v1.ERROR_REASON_RATE_LIMITED,
        f"The server has reached its limit of {counted(limit, noun)} at once{where}; try again shortly.",
        metadata={"limit": limit},
        quota=f"{noun}s at once{where}: {limit}",
    )


def too_much_requested(limit: int, where: str = "") -> NotecaseError:
    """The requests under way have too many bytes together; `where` is "" for the whole server."""
    return NotecaseError(
        v1.ERROR_REASON_RATE_LIMITED,
        f"The requests that the server is working on{where} have {limit} bytes already; try again shortly.",
        metadata={"limit": limit},
        quota=f"bytes of requests at once{where}: {limit}",
    )


def unread_answers() -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_RATE_LIMITED,
        "This connection has too many unread bytes of answers; read them and try again.",
        quota="answers of a connection that are not read",
    )


def unread_stream() -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_WATCHER_TOO_SLOW,
        "The connection of this stream has too many unread bytes; attach again after the last sequence you received.",
        quota="frames of a connection that are not read",
    )


def quota_exceeded(noun: str, limit: int, where: str) -> NotecaseError:
    """The operator's limit on stored data is reached, until something is deleted or the limit is raised."""
    return NotecaseError(
        v1.ERROR_REASON_QUOTA_EXCEEDED,
        f"The operator of this server allows {counted(limit, noun)} {where}, and there are as many already; delete "
        "some, or ask the operator for more.",
        metadata={"limit": limit},
        quota=f"{noun}s {where}: {limit}",
    )


def content_quota_exceeded(limit: int, stored: int, uploading: int, more: int) -> NotecaseError:
    """As `quota_exceeded`, for the bytes of a tenant's content; `more` is 0 if it is unknown."""
    needed = f", and this needs {more} more" if more else ""
    return NotecaseError(
        v1.ERROR_REASON_QUOTA_EXCEEDED,
        f"The operator of this server allows {counted(limit, 'byte')} of content in a tenant: {stored} are stored and "
        f"{uploading} belong to unfinished uploads{needed}.",
        metadata={"limit": limit},
        quota=f"bytes of content in a tenant: {limit}",
    )


def too_busy(what: str) -> NotecaseError:
    """The server has no room at present, through no fault of this call. `what` is what it cannot do."""
    return NotecaseError(v1.ERROR_REASON_RATE_LIMITED, f"The server is too busy to {what}; try again shortly.")


def limit_exceeded(limit: str, value: int, message: str) -> NotecaseError:
    return NotecaseError(v1.ERROR_REASON_LIMIT_EXCEEDED, message, metadata={"limit": limit, "value": value})


def unserved_peer() -> NotecaseError:
    return NotecaseError(v1.ERROR_REASON_UNAUTHENTICATED, "This server accepts calls only through its proxy.")


def draining() -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_SERVER_DRAINING, "The server is stopping and accepts nothing new; try again shortly."
    )


def cut() -> NotecaseError:
    """The server stopped before the call was done, and it is not known how much of it was carried out."""
    return NotecaseError(
        v1.ERROR_REASON_SERVER_DRAINING, "The server is stopping and has cut this call off; repeat it shortly."
    )


UNCHANGED = "this call changed nothing."

UNKNOWN = "it is not known whether this call was carried out. Repeat it with the same id."


def store_unavailable(full: bool = False) -> NotecaseError:
    """The store's own words are only in the server's log. `full` says that its disk is full."""
    problem = "The disk of the store is full" if full else "The store is unavailable at present"
    return NotecaseError(v1.ERROR_REASON_STORE_UNAVAILABLE, f"{problem}; {UNCHANGED}")


def on_standby() -> NotecaseError:
    """Another server owns the store, and this one waits for it."""
    return NotecaseError(
        v1.ERROR_REASON_STORE_UNAVAILABLE,
        f"This server is on standby: another one owns the store. Call that one; {UNCHANGED}",
    )


@contextmanager
def unsure() -> Iterator[None]:
    """Marks a STORE_UNAVAILABLE in the block as one after which it is not known what was written: the answer of a write
    was lost, or the write is one of several."""
    try:
        yield
    except NotecaseError as error:
        if error.reason != v1.ERROR_REASON_STORE_UNAVAILABLE:
            raise
        raise NotecaseError(error.reason, error.message.replace(UNCHANGED, UNKNOWN)) from None


def owner_died(session: str, deaths: int) -> NotecaseError:
    """Every process that worked on the run died."""
    told = (
        f"The server's process died {deaths} times in a row during this run of sessions/{session}, without progress"
        " in between."
    )
    return NotecaseError(v1.ERROR_REASON_OWNER_LOST, told, metadata={"deaths": deaths})


def worker_lost(session: str) -> NotecaseError:
    """The worker of a run was lost before it carried out a command."""
    return NotecaseError(
        v1.ERROR_REASON_OWNER_LOST,
        f"The run of sessions/{session} lost its worker and is being restarted; try again.",
        metadata={"session": session},
    )


def owner_lost(session: str) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_OWNER_LOST,
        f"Another process runs sessions/{session} now; attach again.",
        metadata={"session": session},
    )


def model_error(message: str, **metadata: object) -> NotecaseError:
    """The provider refused the request, or answered with something that is not a reply. A retry would end the same
    way."""
    return NotecaseError(v1.ERROR_REASON_MODEL_ERROR, message, metadata=metadata)


def model_unavailable(message: str, retry_after: float | None = None, **metadata: object) -> NotecaseError:
    """The provider cannot be reached or is overloaded; a repeat may succeed."""
    return NotecaseError(v1.ERROR_REASON_MODEL_UNAVAILABLE, message, metadata=metadata, retry_after=retry_after)


def template_error(message: str, field: str = "agent.llm.instruction") -> NotecaseError:
    violations = [Violation(field, message.removesuffix("."))]  # `invalid` ends its sentence itself
    return NotecaseError(v1.ERROR_REASON_TEMPLATE_ERROR, message, violations=violations)


def sequence_ahead(asked: int, last_sequence: int) -> NotecaseError:
    return NotecaseError(
        v1.ERROR_REASON_SEQUENCE_AHEAD,
        f"Sequence {asked} is after the end of the log, whose last sequence is {last_sequence}.",
        metadata={"last_sequence": last_sequence},
    )


def import_invalid(problem: str) -> NotecaseError:
    return NotecaseError(v1.ERROR_REASON_IMPORT_INVALID, f"The file {problem}; nothing was imported.")


def content_unsupported(message: str) -> NotecaseError:
    return NotecaseError(v1.ERROR_REASON_CONTENT_UNSUPPORTED, message)


def output_invalid(problem: str, finish_reason: str) -> NotecaseError:
    """The reply does not match the agent's output_schema. `problem` says where, and quotes no value of the reply."""
    return NotecaseError(
        v1.ERROR_REASON_OUTPUT_INVALID,
        f"The model's reply does not match the agent's output_schema: {problem}.",
        metadata={"problem": problem, "finish_reason": finish_reason},
    )


def internal(request_id: str) -> NotecaseError:
    """A defect: its words stay in the log, where the request id finds them."""
    return NotecaseError(
        v1.ERROR_REASON_INTERNAL,
        f"An internal error occurred; look for request id {request_id} in the server's log.",
        metadata={"request_id": request_id},
    )

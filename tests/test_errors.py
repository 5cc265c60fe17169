"""The error catalog is total: what the contract names, what the catalog holds and what the server raises are one
set."""

import ast
import base64
import re
from pathlib import Path

import pytest
from google.rpc import code_pb2, error_details_pb2
from notecase import v1
from notecase_server import errors
from notecase_server.rpc.status import to_status

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "server/src/notecase_server"
NAMED = set(v1.ErrorReason.values()) - {v1.ERROR_REASON_UNSPECIFIED}


def test_every_reason_of_the_contract_is_in_the_catalog() -> None:
    assert set(errors.CATALOG) == NAMED


def test_every_reason_is_made_by_a_function_that_the_server_calls() -> None:
    """A reason that is never raised does not belong in the contract."""
    tree = ast.parse((SERVER / "errors.py").read_text())
    makers: dict[str, set[str]] = {}
    shared = {
        name: found
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and (found := set(re.findall(r"ERROR_REASON_\w+", ast.unparse(node.value))))
        for name in [node.targets[0].id]
    }
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            source = ast.unparse(node)
            reasons = set(re.findall(r"ERROR_REASON_\w+", source))
            reasons.update(*(found for name, found in shared.items() if re.search(rf"\b{name}\b", source)))
            makers[node.name] = reasons
    called = "\n".join(path.read_text() for path in SERVER.rglob("*.py") if path.name != "errors.py")
    raised = {reason for maker, reasons in makers.items() if f"errors.{maker}(" in called for reason in reasons}
    assert {v1.ErrorReason.Value(reason) for reason in raised} == NAMED


def test_the_contracts_comments_name_the_code_that_is_sent() -> None:
    """A client's author reads the proto; what it says of each reason is what arrives."""
    proto = (ROOT / "proto/notecase/v1/content.proto").read_text()
    told = re.findall(r"// (.*)\n(?:  // .*\n)*  (ERROR_REASON_\w+) =", proto)
    checked = 0
    for comment, reason in told:
        code = comment.split()[0].strip(":,")
        if code in {*code_pb2.Code.keys()}:
            assert errors.CATALOG[v1.ErrorReason.Value(reason)].code == code_pb2.Code.Value(code), reason
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("reason", sorted(NAMED))
def test_every_failure_travels_as_a_standard_status(reason: v1.ErrorReason.ValueType) -> None:
    """ErrorInfo first, with the domain and the reason without its prefix; RetryInfo where a retry helps."""
    status = to_status(errors.NotecaseError(reason, "A sentence.", metadata={"key": 1}))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, f"ERROR_REASON_{info.reason}") == ("notecase.dev", v1.ErrorReason.Name(reason))
    assert dict(info.metadata) == {"key": "1"}
    retries = [detail for detail in status.details if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
    assert len(retries) == (errors.CATALOG[reason].retry_after is not None)


LONG = "\U0001f600" * 1000


@pytest.mark.parametrize("text", [LONG, "%" * 1000, "\n" * 1000, "é%x" * 300, "x" * 1000])
def test_a_status_fits_into_trailers_whatever_its_words(text: str) -> None:
    """Of which clients accept 8 KiB: the message quoted, and the details in base64."""
    violations = [errors.Violation(text, text)] * 100
    resource = errors.Resource("session", text)
    metadata = {"one": text, "two": text}
    error = errors.NotecaseError(
        v1.ERROR_REASON_INVALID_FIELD, text, metadata=metadata, violations=violations, resource=resource
    )
    status = to_status(error)
    quoted = "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}" for byte in status.message.encode()
    )
    assert 900 < len(quoted) <= 1000
    assert 4000 < len(base64.b64encode(status.SerializeToString())) < 6500


KINDS = ("agent", "session", "run", "message", "blob", "upload", "tenant")


def sentences() -> list[str]:
    """What every function of the catalog says, of every kind of resource and of none, one and several of a thing."""
    told = [make(kind, "x") for make in (errors.not_found, errors.already_exists) for kind in KINDS]
    for number in (0, 1, 2, 5_000_000):
        told += [errors.too_large("The message", number, number), errors.too_many("run", number)]
        told += [errors.too_many("call", number, " on one connection")]
        told += [errors.quota_exceeded("session", number, "in a tenant")]
        told += [errors.queue_full(number), errors.watcher_too_slow(number), errors.sequence_ahead(number, number)]
        told += [errors.blob_cut(number, number, resumable) for resumable in (True, False)]
        told += [errors.version_mismatch("The state", number), errors.sequence_mismatch(number)]
        told += [errors.upload_offset_mismatch("x", number)]
        told += [errors.invalid([errors.Violation("field", "is missing")] * number)] if number < 10 else []
    told += [errors.reused(field, "x") for field in ("request_id", "command_id", "run_id", "upload_id")]
    told += [make("x") for make in (errors.call_not_pending, errors.input_not_pending, errors.run_active)]
    told += [make("sessions/x") for make in (errors.no_run, errors.cancelled_before_start, errors.internal)]
    told += [errors.etag_mismatch("agents/x", "1"), errors.state_key_not_found("app/state", "x")]
    told += [errors.run_ended("sessions/x/runs/y", v1.Run.STATE_FAILED), errors.owner_lost("x")]
    told += [errors.unauthenticated(), errors.no_credential(), errors.several_credentials()]
    told += [errors.role_missing("DEVELOPER", fields) for fields in ((), ["labels"], ["a", "b", "c", "d"])]
    told += [errors.bound_to_user("USER", fields) for fields in ((), ["input"])]
    told += [errors.tenant_suspended(), errors.not_found("key", "x"), errors.not_found("user", "x")]
    told += [errors.unread_answers(), errors.unread_stream()]
    told += [errors.page_token_invalid(), errors.draining(), errors.store_unavailable(), errors.issuer_unavailable()]
    told += [errors.on_standby(), errors.tenant_needed("VIEWER")]
    return [text for error in told for text in (error.message, error.quota) if text]


def test_what_the_catalog_says_is_english() -> None:
    """An article fits its noun, a number its plural, and a message is a whole sentence."""
    said = sentences()
    assert not [text for text in said if re.search(r"\b(a [aeio]|a upload|an [^aeiou])", text)]
    assert not [text for text in said if re.search(r"\b1 \w+s\b(?! )|\b1 (bytes|runs|seconds|commands)", text)]
    assert not [text for text in said if re.search(r"\b([02-9]|\d{2,}) (byte|run|second|command)\b", text)]
    assert {
        "There is already an agent 'x'; choose another id.",
        "There is already an upload 'x'; choose another id.",
    } <= {*said}
    assert "This call needs a credential that is not bound to a user and has at least the role user." in said
    messages = [text for text in said if not text.endswith((" bytes", " byte")) and ": " not in text[:30]]
    assert not [text for text in messages if "  " in text or text.endswith(("..", " ."))]

"""Writes docs/errors.md from the comments of proto/notecase/v1/content.proto and the server's catalog of errors."""

import re
from pathlib import Path

from google.rpc import code_pb2
from notecase import v1
from notecase_server.errors import CATALOG, Kind

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "errors.md"
PROTO = ROOT / "proto" / "notecase" / "v1" / "content.proto"

HEAD = """\
# Errors

<!-- Written by `make errors`. -->

A failed call has one of gRPC's status codes, a message for people, and details for programs:

| Detail | Contents | Sent |
| --- | --- | --- |
| `google.rpc.ErrorInfo` | `domain`: `notecase.dev`; `reason`: a name of the tables below; `metadata` | always |
| `google.rpc.BadRequest` | all invalid or forbidden fields, each with the reason | if fields are wrong |
| `google.rpc.ResourceInfo` | the type and the name of a resource | if a resource does not exist, or its name is taken |
| `google.rpc.QuotaFailure` | what is limited, and the limit | with RESOURCE_EXHAUSTED |
| `google.rpc.RetryInfo` | how long to wait before a retry | if a table below has a time |

Programs should check `domain` and then `reason`; messages may change. When a run fails or a command on a stream is
refused, the same information is data (`Error`), and the stream continues. The Python client raises `NotecaseError`
with `code`, `reason`, `metadata` and `violations`.

It is safe to send a write again with the same `request_id`, `command_id` or `run_id`: it takes effect once.
"""

ADVICE = {
    "INVALID_ARGUMENT": "The request is wrong. Correct it; a retry without changes fails again.",
    "NOT_FOUND": "It does not exist, or belongs to another tenant or user.",
    "ALREADY_EXISTS": "Choose another id, or use the existing resource.",
    "ABORTED": "Another writer was first. Read again and repeat the call if it still makes sense.",
    "FAILED_PRECONDITION": "The request does not fit the current state. The reason names what must change first.",
    "OUT_OF_RANGE": "The position does not exist yet.",
    "RESOURCE_EXHAUSTED": "A limit was reached. [Limits](limits.md) lists them with their settings.",
    "UNAVAILABLE": "Try again, with backoff.",
    "CANCELLED": "The caller cancelled it.",
    "UNAUTHENTICATED": "Send another credential. [Connect](connect.md) shows how.",
    "PERMISSION_DENIED": "The caller's role is not enough. [Operate](operate.md#roles) lists what each role may do.",
    "INTERNAL": "Report it with the request id.",
}
"""What to do about each code, in the order of the page."""


def comments() -> dict[str, str]:
    """The comment of each reason, by its name without the prefix, without the code that it begins with."""
    found = re.findall(r"((?:  // .*\n)+)  ERROR_REASON_(\w+) =", PROTO.read_text())
    joined = {name: " ".join(line.strip(" /") for line in lines.splitlines()) for lines, name in found}
    return {name: text.partition(": ")[2] for name, text in joined.items()}


def row(name: str, kind: Kind, comment: str) -> str:
    wait = f"after {kind.retry_after:g} s" if kind.retry_after is not None else ""
    sentence = re.sub(r"\b([a-z]+(?:_[a-z]+)+|metadata\.\w+)\b", r"`\1`", comment[0].upper() + comment[1:])
    return f"| {name} | {sentence} | {wait} |"


def page() -> str:
    """The whole page: a table of reasons for each code."""
    told, parts = comments(), [HEAD]
    for code, advice in ADVICE.items():
        rows = [
            row(name, kind, told[name])
            for reason, kind in sorted(CATALOG.items())
            if kind.code == code_pb2.Code.Value(code)
            for name in [v1.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")]
        ]
        parts.append(
            "\n".join(
                [f"## {code}", "", advice, "", "| Reason | Meaning | RetryInfo |", "| --- | --- | --- |", *rows, ""]
            )
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())

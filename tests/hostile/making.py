"""How the frames of hostile requests are made."""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from notecase import v1

from tests.hostile.row import MIB

INT32_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1

CASE = "sessions/case"
ALBUM = "sessions/album"
"""Refers to three blobs of CONTENT bytes."""
BIG = "sessions/big"
"""Has pages of state and of messages that are full."""
PARTS = "sessions/parts"
"""Has 20 messages of as many parts as a message may have."""
LONG = "sessions/long"
"""Has 6 MB of messages, each character of which takes two bytes."""
ADA = "users/ada"
"""The user of every session with a watcher."""
CLERK = "agents/clerk"
"""Answered by the built-in offline model, as are the next two."""
LOOPER = "agents/looper"
"""Its template takes more work than a render may take, and its runs fail."""
NESTED = "agents/nested"
"""Its template takes nearly as much as it may, and comes to nothing."""
EYES = "agents/eyes"
"""Answered by the provider `openai`, as are the next two."""
BRIEF = "agents/brief"
"""As EYES, and shows its model few tokens of a session."""
ARMED = "agents/armed"
"""Declares as many tools as fit into an agent."""

CONTENT = 8 * MIB
"""Bytes of a blob in the scene: three of them are nearly what one model call may carry."""

LOOPS = "{% for a in wide %}{% for b in wide %}{% assign c = a | append: b %}{% endfor %}{% endfor %}{{ seed }}"
NESTED_LOOPS = "{% for a in (1..120) %}{% for b in (1..120) %}{% if a == b %}{% endif %}{% endfor %}{% endfor %}"


def wire(number: int, body: bytes) -> bytes:
    """A field of bytes as protobuf writes it."""
    return varint(number << 3 | 2) + varint(len(body)) + body


def varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def new_id() -> str:
    """For a request that is to be a new one each time."""
    return os.urandom(8).hex()


# Values and state.


def text(plain: str) -> v1.Value:
    return v1.Value(string_value=plain)


def integer(number: int) -> v1.Value:
    return v1.Value(int_value=number)


def wide_list(count: int, item: v1.Value | None = None) -> v1.Value:
    return v1.Value(list_value=v1.ValueList(values=[item or integer(1)] * count))


def wide_map(count: int, item: v1.Value | None = None) -> v1.Value:
    each = item or integer(1)
    return v1.Value(map_value=v1.ValueMap(values={f"k{number}": each for number in range(count)}))


def empties(count: int) -> bytes:
    """A value that is a list of so many values without a kind, as bytes: two each."""
    return wire(7, b"\x0a\x00" * count)


def deep(levels: int) -> v1.Value:
    """That many lists within each other."""
    made = integer(1)
    for _ in range(levels):
        made = v1.Value(list_value=v1.ValueList(values=[made]))
    return made


def endless(levels: int) -> bytes:
    """The same as bytes, for what no parser reads and no library writes."""
    made = b""
    for _ in range(levels):
        made = wire(7, wire(1, made))
    return made


SEED = {"seed": text("x" * 1000), "wide": wide_map(200)}
"""What the templates read."""


def put(value: v1.Value, key: str = "k", name: str = f"{CASE}/state", **fields: Any) -> v1.PutStateRequest:
    return v1.PutStateRequest(name=name, key=key, value=value, **fields)


def update(ops: Iterable[v1.StateOp], name: str = f"{CASE}/state") -> v1.UpdateStateRequest:
    return v1.UpdateStateRequest(name=name, ops=ops)


# Messages and content.


def said(plain: str) -> v1.Message:
    return v1.Message(parts=[v1.Part(text=plain)])


def parts(count: int, part: v1.Part | None = None) -> v1.Message:
    return v1.Message(parts=[part or v1.Part(text="x")] * count)


def labelled(count: int) -> v1.Message:
    return v1.Message(parts=[v1.Part(text="x")], labels={f"l{number}": "x" * 100 for number in range(count)})


def file(length: int) -> v1.Part:
    """A file by its address, with texts of about that many characters of two bytes each."""
    text = "é" * (length // 2)
    return v1.Part(file=v1.FileUri(uri=f"https://example.org/{text}", media_type="image/png", filename=text))


def inline(data: bytes) -> v1.Part:
    return v1.Part(data=v1.InlineData(data=data, media_type="image/png"))


def append(messages: Iterable[v1.Message], parent: str = CASE, **fields: Any) -> v1.AppendMessagesRequest:
    return v1.AppendMessagesRequest(parent=parent, messages=messages, **fields)


def upload(data: bytes, piece: int = MIB) -> list[v1.UploadBlobRequest]:
    named = v1.Blob(media_type="image/png", size_bytes=len(data))
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)]
    return [v1.UploadBlobRequest(blob=named if not at else None, chunk=part) for at, part in enumerate(pieces)]


def picture(number: int) -> bytes:
    """The bytes of a blob, the same in every process."""
    block = hashlib.sha512(str(number).encode()).digest()
    return (block * (CONTENT // len(block) + 1))[:CONTENT]


def picture_name(number: int) -> str:
    return f"blobs/{hashlib.sha256(picture(number)).hexdigest()}"


# Agents, sessions, runs.


def template(source: str) -> v1.CreateAgentRequest:
    return agent(instruction=source)


def agent(**fields: Any) -> v1.CreateAgentRequest:
    return v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(provider="offline", **fields)))


def tools(count: int, size: int = 0) -> list[v1.Tool]:
    """So many tools of the caller's, each with parameters of about `size` bytes."""
    parameters = large_object(size) if size else ""
    return [v1.Tool(name=f"tool_{n}", client=v1.ClientTool(), parameters=parameters) for n in range(count)]


def large_object(size: int) -> str:
    """A JSON object of about so many bytes, with as many lists as go into it."""
    return '{"a":[' + "[]," * ((size - 12) // 3) + "[]]}"


def doubling_references(levels: int) -> str:
    """A JSON Schema in which each definition asks the next one twice."""
    asks = {f"d{level}": {"allOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(levels)}
    return json.dumps({"$defs": asks | {f"d{levels}": {}}, "$ref": "#/$defs/d0"})


def new_session(**fields: Any) -> v1.CreateSessionRequest:
    return v1.CreateSessionRequest(session=v1.Session(**fields))


def invoke(by: str = CLERK, **fields: Any) -> v1.InvokeRequest:
    fields = {"new_session": v1.Session(agent=by, user=ADA), "messages": [said("Good evening.")], **fields}
    return v1.InvokeRequest(start=v1.StartRun(**fields))


def imported(body: bytes, piece: int = MIB) -> list[v1.ImportSessionRequest]:
    header = v1.ImportSessionRequest(header=v1.ImportHeader(session_id=f"imported-{new_id()}"))
    return [header, *(v1.ImportSessionRequest(chunk=body[at : at + piece]) for at in range(0, len(body), piece))]


def export_of(events: Iterable[v1.Event]) -> bytes:
    """A file in the format of export.proto, whole by its digest, whatever its events say."""
    records = [v1.ExportRecord(header=v1.ExportHeader()), *(v1.ExportRecord(event=event) for event in events)]
    framed = (varint(len(body)) + body for body in (record.SerializeToString() for record in records))
    body = b"notecase\x02" + b"".join(framed) + b"\0"
    return body + hashlib.sha256(body).digest()


def changed(value: v1.Value) -> v1.Event:
    """The first entry of a log, which sets a key."""
    ops = [v1.StateOp(key="k", set=value)]
    return v1.Event(sequence=1, create_time=Timestamp(seconds=1), state_changed=v1.StateChanged(version=1, ops=ops))


def spoken(number: int) -> v1.Event:
    """An entry of a log."""
    message = v1.Message(name=f"m{number}", role=v1.Message.ROLE_USER, author="users/ada", sequence=number)
    message.update_sequence = number
    message.status = v1.Message.STATUS_COMPLETED
    message.parts.add(text="x")
    message.create_time.FromSeconds(1)
    return v1.Event(sequence=number, create_time=message.create_time, message_added=message)

"""Every kind of value, with its extremes, over the real channel: a value that is read, sent to watchers or read after a
restart equals the stored one exactly, and so does its JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from notecase import v1

from tests.e2e.driving import fields_of, log_of, reason_of
from tests.support.server import Running, running
from tests.support.values import KEYS, VALUES, exactly

OWNERS = ("sessions/case", "users/ada", "app")
PUT = VALUES | {key: v1.Value(string_value=key) for key in KEYS}
"""Each value under its name, and each key with itself."""


async def put_all(served: Running) -> None:
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"))
    ops = [v1.StateOp(key=key, set=value) for key, value in PUT.items()]
    for owner in OWNERS:
        answer = await served.state.UpdateState(v1.UpdateStateRequest(name=f"{owner}/state", ops=ops))
        check({key: entry.value for key, entry in answer.entries.items()})


def check(values: Mapping[str, v1.Value]) -> None:
    """Fails unless these are the values that were put, to the bit."""
    assert {key: exactly(value) for key, value in PUT.items()} == {key: exactly(held) for key, held in values.items()}


async def read_all(served: Running) -> None:
    for owner in OWNERS:
        state = await served.state.GetState(v1.GetStateRequest(name=f"{owner}/state", page_size=1000))
        check({key: entry.value for key, entry in state.entries.items()})
        named = await served.state.GetState(v1.GetStateRequest(name=f"{owner}/state", keys=[*PUT, "absent"]))
        assert exactly(state) == exactly(named)
    (event,) = await log_of(served, "sessions/case")
    check({op.key: op.set for op in event.state_changed.ops})


async def test_values_that_were_put_are_read_and_sent_to_watchers(store_url: str) -> None:
    """In all three scopes; a key that holds an empty map is there, and one that was never put is not."""
    async with running(store_url) as served:
        await put_all(served)
        await read_all(served)


async def test_what_was_put_is_read_by_the_next_server(tmp_path: Path) -> None:
    for step in (put_all, read_all):
        async with running(f"sqlite:{tmp_path / 'notecase.db'}") as served:
            await step(served)


async def test_a_state_survives_json(store_url: str) -> None:
    """By protobuf's own mapping, in both spellings of its fields: 64-bit integers are strings there, bytes base64."""
    async with running(store_url) as served:
        await put_all(served)
        state = await served.state.GetState(v1.GetStateRequest(name="app/state", page_size=1000))
    for proto_names in (True, False):
        text = json_format.MessageToJson(state, preserving_proto_field_name=proto_names)
        assert exactly(state) == exactly(json_format.Parse(text, v1.State()))
    held = {key: entry["value"] for key, entry in json.loads(text)["entries"].items()}
    assert {"intValue": "9007199254740993"} == held["beyond 2^53"]
    assert {"doubleValue": -0.0} == held["minus zero"]
    assert {"mapValue": {}} == held["empty map"]
    assert {"nullValue": None} == held["null"]
    assert {"boolValue": False} == held["false"]


def endless(levels: int) -> bytes:
    """A PutStateRequest of app/state with lists in lists, written by hand: protobuf's Python does not write them."""

    def field(number: int, content: bytes) -> bytes:
        size, length = bytearray(), len(content)
        while length > 0x7F:
            size.append(length & 0x7F | 0x80)
            length >>= 7
        return bytes([number << 3 | 2, *size, length]) + content

    value = v1.Value(int_value=1).SerializeToString()
    list_value, values = v1.Value.LIST_VALUE_FIELD_NUMBER, v1.ValueList.VALUES_FIELD_NUMBER
    for _ in range(levels):
        value = field(list_value, field(values, value))
    head = v1.PutStateRequest(name="app/state", key="k").SerializeToString()
    return head + field(v1.PutStateRequest.VALUE_FIELD_NUMBER, value)


def test_what_is_written_by_hand_is_what_protobuf_writes() -> None:
    value = v1.Value(int_value=1)
    for _ in range(16):
        value = v1.Value(list_value=v1.ValueList(values=[value]))
    assert v1.PutStateRequest(name="app/state", key="k", value=value) == v1.PutStateRequest.FromString(endless(16))


@pytest.mark.parametrize(("levels", "field"), [(17, "value" + "[0]" * 16), (10_000, "request")])
async def test_lists_in_lists_beyond_the_deepest_are_refused(store_url: str, levels: int, field: str) -> None:
    """By the name of the level that is too deep; where the message cannot even be read, by why that may be. The server
    goes on."""
    async with running(store_url) as served:
        channel: Any = served.channel
        put = channel.unary_unary("/notecase.v1.StateService/PutState")
        await put(endless(16))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await put(endless(levels))
        assert grpc.StatusCode.INVALID_ARGUMENT == refused.value.code()
        assert "INVALID_FIELD" == reason_of(refused.value)
        assert {field} == fields_of(refused.value)
        assert "nesting" in (refused.value.details() or "") or levels == 17
        state = await served.state.GetState(v1.GetStateRequest(name="app/state"))
        assert 1 == state.version

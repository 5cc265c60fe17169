"""Converts Python's values to the API's and back without a loss: `from_value(to_value(x))` equals `x`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from google.protobuf.struct_pb2 import NULL_VALUE

from notecase import v1
from notecase.arguments import made, shown

Plain: TypeAlias = "bool | int | float | str | bytes | v1.Blob | Sequence[Plain] | Mapping[str, Plain] | None"
"""The values that state can hold. Integers have 64 bits; any sequence comes back as a list, any mapping as a dict. A
`v1.Blob` refers to content that was uploaded."""


class Entry(NamedTuple):
    """One entry of a state."""

    value: Any
    """As Python's own."""
    version: int
    """Grows with each change of the key; for `if_version`."""


def to_value(plain: Plain) -> v1.Value:
    """Returns a new `v1.Value` that shares nothing with `plain`.

    Raises OverflowError for an integer beyond 64 bits and TypeError for a value that state cannot hold, such as a
    mapping with keys that are not strings. The server refuses NaN, the infinities and more than 16 levels."""
    match plain:
        case None:
            return v1.Value(null_value=NULL_VALUE)
        case bool():
            return v1.Value(bool_value=plain)
        case int():
            if not -(1 << 63) <= plain < 1 << 63:
                raise OverflowError(f"{plain} does not fit into 64 bits; state can hold it as a string")
            return v1.Value(int_value=plain)
        case float():
            return v1.Value(double_value=plain)
        case str():
            return v1.Value(string_value=plain)
        case bytes() | bytearray() | memoryview():
            return v1.Value(bytes_value=bytes(plain))
        case v1.Blob():
            if not plain.name.startswith("blobs/"):
                raise TypeError("a blob in state must be uploaded first; this one has no name")
            return v1.Value(blob_value=plain)
        case Sequence():
            return v1.Value(list_value=v1.ValueList(values=map(to_value, plain)))
        case Mapping():
            for key in plain:
                if not isinstance(key, str):
                    raise TypeError(f"the keys of a map in state must be strings, not {type(key).__name__}")
            return v1.Value(map_value=v1.ValueMap(values={key: to_value(held) for key, held in plain.items()}))
        case _:
            raise TypeError(f"state cannot hold a {type(plain).__name__}")


def to_values(plain: Mapping[str, Plain] | None, argument: str = "state") -> dict[str, v1.Value]:
    """Converts the value of each key with `to_value`. Raises what that raises, with the key of `argument`."""
    if plain is not None and not isinstance(plain, Mapping):
        raise TypeError(f"{argument} must be a mapping of keys to values, not {shown(plain)}")
    values = {}
    for key, held in (plain or {}).items():
        if not isinstance(key, str):
            raise TypeError(f"the keys of {argument} must be strings, not {shown(key)}")
        try:
            values[key] = to_value(held)
        except (TypeError, OverflowError) as error:
            raise type(error)(f"{argument}[{key!r}]: {error}") from error
    return values


def from_value(value: v1.Value) -> Any:
    """Returns the Python value, which shares nothing with `value`. It is None for a `v1.Value` that is not set, or
    whose kind this version of the client does not know."""
    match value.WhichOneof("kind"):
        case None | "null_value":
            return None
        case "list_value":
            return [from_value(held) for held in value.list_value.values]
        case "map_value":
            return {key: from_value(held) for key, held in value.map_value.values.items()}
        case "blob_value":
            blob = v1.Blob()
            blob.CopyFrom(value.blob_value)
            return blob
        case kind:
            return getattr(value, kind)


def to_message(said: str | v1.Message) -> v1.Message:
    """Returns a user's message with this text, or the given message. Raises TypeError for anything else."""
    if isinstance(said, v1.Message):
        return said
    if not isinstance(said, str):
        history = isinstance(said, Mapping | Sequence) and not isinstance(said, bytes)
        hint = "; say only what is new: the session has what was said before" if history else ""
        raise TypeError(f"what the user says must be a string or a v1.Message, not {shown(said)}{hint}")
    return v1.Message(role=v1.Message.ROLE_USER, parts=[made(v1.Part, text=said)])


def text_of(message: v1.Message) -> str:
    """Returns the text and json parts of a message, joined; empty when it has none."""
    return "".join(part.text or part.json for part in message.parts)


def state_of(run: v1.Run) -> str:
    """Returns a run's state in a word: "queued", "running", "waiting", "succeeded", "failed" or "cancelled"."""
    return v1.Run.State.Name(run.state).removeprefix("STATE_").lower()

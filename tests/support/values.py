"""Values of state at the edges of every kind, and keys that are hard to carry."""

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import NULL_VALUE
from notecase import v1

INT64_MAX = (1 << 63) - 1


def nested(levels: int) -> v1.Value:
    """Lists and maps in turn, that many levels in all with what is at the bottom."""
    made = v1.Value(string_value="bottom")
    for level in range(levels - 1):
        if level % 2:
            made = v1.Value(list_value=v1.ValueList(values=[made]))
        else:
            made = v1.Value(map_value=v1.ValueMap(values={"k": made}))
    return made


VALUES = {
    "null": v1.Value(null_value=NULL_VALUE),
    "true": v1.Value(bool_value=True),
    "false": v1.Value(bool_value=False),
    "zero": v1.Value(int_value=0),
    "int64 max": v1.Value(int_value=INT64_MAX),
    "int64 min": v1.Value(int_value=-INT64_MAX - 1),
    "beyond 2^53": v1.Value(int_value=(1 << 53) + 1),
    "double": v1.Value(double_value=0.1),
    "smallest double": v1.Value(double_value=5e-324),
    "largest double": v1.Value(double_value=1.7976931348623157e308),
    "whole double": v1.Value(double_value=1.0),
    "minus zero": v1.Value(double_value=-0.0),
    "empty text": v1.Value(string_value=""),
    "text": v1.Value(string_value="A\u0000B é 犬 🔎 \u2028"),
    "empty bytes": v1.Value(bytes_value=b""),
    "bytes": v1.Value(bytes_value=bytes(range(256))),
    "empty list": v1.Value(list_value=v1.ValueList()),
    "list": v1.Value(list_value=v1.ValueList(values=[v1.Value(int_value=1), v1.Value(null_value=NULL_VALUE)])),
    "empty map": v1.Value(map_value=v1.ValueMap()),
    "map": v1.Value(
        map_value=v1.ValueMap(
            values={
                "": v1.Value(string_value=""),
                "k\u0000": v1.Value(int_value=1),
                "empty": v1.Value(map_value=v1.ValueMap()),
            }
        )
    ),
    "deepest": nested(17),
}
"""All that a caller may put, by what is at their edge."""

KEYS = ["k\u0000y", "%_'\"", "犬", "x" * 256, " ", "\\", "k/../k"]


def exactly(message: Message) -> bytes:
    """Its content down to the sign of a zero, which == does not see."""
    return message.SerializeToString(deterministic=True)

"""Turns values of state into plain ones, and into JSON."""

import json
from collections.abc import Callable

from notecase import v1


def json_of(value: v1.Value) -> str:
    """Returns a value as JSON text, bytes by their number and a blob by its name. A large one takes a while."""
    return json.dumps(plain(value, _named), ensure_ascii=False)


def plain(value: v1.Value, content: Callable[[v1.Value], str]) -> object:
    """Returns a value as None, a bool, number, text, list or dict. Bytes and blobs become what `content` returns for
    them."""
    match value.WhichOneof("kind"):
        case "list_value":
            return [plain(item, content) for item in value.list_value.values]
        case "map_value":
            return {key: plain(item, content) for key, item in value.map_value.values.items()}
        case "bytes_value" | "blob_value":
            return content(value)
        case None | "null_value":
            return None
        case kind:
            held: object = getattr(value, kind)
            return held


def _named(value: v1.Value) -> str:
    return value.blob_value.name if value.HasField("blob_value") else f"{len(value.bytes_value)} bytes"

"""Says a value of state in the words of JSON."""

import json

from notecase import v1


def json_of(value: v1.Value) -> str:
    """Returns a value as JSON text. A large one takes a while."""
    return json.dumps(_shown(value), ensure_ascii=False)


def _shown(value: v1.Value) -> object:
    """A value as JSON can say it: bytes by their number, a blob by its name."""
    match value.WhichOneof("kind"):
        case "list_value":
            return [_shown(item) for item in value.list_value.values]
        case "map_value":
            return {key: _shown(item) for key, item in value.map_value.values.items()}
        case "bytes_value":
            return f"{len(value.bytes_value)} bytes"
        case "blob_value":
            return value.blob_value.name
        case None | "null_value":
            return None
        case kind:
            plain: object = getattr(value, kind)
            return plain

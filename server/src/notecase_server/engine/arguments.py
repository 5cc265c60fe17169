"""Reads the arguments that a model gave to a call."""

import json
import math
from typing import Any

from notecase import v1


def arguments_of(call: v1.ToolCall) -> dict[str, Any] | None:
    """Returns the call's arguments, or None when they are not a JSON object, as RFC 8259 has it and with numbers that a
    double holds. Empty text counts as an empty object."""
    try:
        decoded = json.loads(call.arguments or "{}", parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, dict) else None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return number

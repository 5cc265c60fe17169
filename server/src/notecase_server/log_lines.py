"""Renders log lines for people."""

from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger

_RARE = frozenset({"exc_info", "exception", "stack", "logger", "logger_name"})
"""Keys that `structlog.dev.ConsoleRenderer` renders in its own way."""

_LEVEL, _EVENT = 9, 30
"""Widths to which ConsoleRenderer pads a level and an event."""

_QUOTED = frozenset(" \t=\r\n\"'")


class PlainRenderer:
    """Renders a line as ConsoleRenderer does without colors. ConsoleRenderer takes a tenth of a millisecond for each
    line, a thirtieth of a short turn; it still renders the lines with a traceback."""

    def __init__(self) -> None:
        self._whole = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)

    def __call__(self, logger: WrappedLogger, name: str, event_dict: EventDict) -> str:
        if not _RARE.isdisjoint(event_dict):
            return self._whole(logger, name, event_dict)
        head = f"{event_dict.pop('timestamp')} [{event_dict.pop('level'):{_LEVEL}}] {event_dict.pop('event'):{_EVENT}}"
        values = [f"{key}={_shown(event_dict[key])}" for key in sorted(event_dict)]
        return " ".join((head, *values)).rstrip(" ")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and _QUOTED.isdisjoint(value) else repr(value)

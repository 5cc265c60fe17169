"""Instructions: most are plain text. The template language is loaded with the first template, since it has a hundred
modules and takes 5 MiB."""

import asyncio
import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

from notecase_server import errors

if TYPE_CHECKING:
    from notecase_server.engine.template import Template

MAX_BYTES = 64 << 10
"""Of an instruction: some thirty pages, more than a model follows."""


LONG = f"The template is longer than {MAX_BYTES} bytes."


class _Language:
    module: Any = None
    """`engine.template`, once it is loaded."""


async def parsed(source: str, field: str = "agent.llm.instruction") -> "Template | None":
    """Returns the template of an instruction; None for plain text, which is its own result. Long work is done in a
    thread. Raises NotecaseError TEMPLATE_ERROR, which names `field` and the position, when `source` is not a valid
    template or exceeds a limit."""
    if "{" not in source:
        if is_long(source):
            raise errors.template_error(LONG, field)
        return None
    if _Language.module is None:
        _Language.module = await asyncio.to_thread(_load)
    found: Template = await _Language.module.parsed(source, field)
    return found


def is_long(source: str) -> bool:
    """Returns whether it is more than MAX_BYTES, in UTF-8."""
    return 4 * len(source) > MAX_BYTES and len(source.encode()) > MAX_BYTES


def _load() -> Any:
    loaded = import_module("notecase_server.engine.template")
    gc.freeze()  # loaded modules stay, so that collections of garbage need not visit them
    return loaded

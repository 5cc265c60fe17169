"""The Python client of notecase: `Client` for programs with asyncio, `notecase.sync.Client` for those without, and `v1`
with all messages and stubs of the API."""

from notecase import v1
from notecase.client import Client, RunWaiting
from notecase.commands import Commands
from notecase.connection import Token
from notecase.context import CallContext
from notecase.errors import NotecaseError, Resource, Violation
from notecase.reply import Reply
from notecase.retry import Retry
from notecase.stream import RunStream
from notecase.tools import Tool, ToolFailure
from notecase.values import Entry, Plain, from_value, state_of, text_of, to_message, to_value
from notecase.view import Block, Gap, SessionView

__all__ = [
    "Block",
    "CallContext",
    "Client",
    "Commands",
    "Entry",
    "Gap",
    "NotecaseError",
    "Plain",
    "Reply",
    "Resource",
    "Retry",
    "RunStream",
    "RunWaiting",
    "SessionView",
    "Token",
    "Tool",
    "ToolFailure",
    "Violation",
    "from_value",
    "state_of",
    "text_of",
    "to_message",
    "to_value",
    "v1",
]

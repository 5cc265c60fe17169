"""The context of a call for a tool's function."""

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from notecase.hints import hints_of


@dataclass(slots=True, kw_only=True)
class CallContext:
    """The call that a function answers. A parameter annotated `CallContext` receives it, and the model does not see
    that parameter:

        def pay(cents: int, call: notecase.CallContext) -> str:
            return bank.transfer(cents, key=call.idempotency_key)
    """

    session: str
    """sessions/{session}"""
    session_uid: str
    """Session.uid. Unlike the name it is never another session's, nor another tenant's."""
    user: str
    """users/{user}, or empty for a session without one."""
    run: str
    """sessions/{session}/runs/{run}"""
    call_id: str
    attempt: int
    """1, and one more each time that the call is dispatched again."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Raises TypeError: a model must not write a context, in whatever type it is contained."""
        raise TypeError(f"{cls.__name__} has no JSON Schema; annotate the parameter {cls.__name__} to receive it")

    @property
    def idempotency_key(self) -> str:
        """{session_uid}/{call_id}: the same on every attempt of this call, in every process, and different for every
        other call. Use it to make an outside effect only once."""
        return f"{self.session_uid}/{self.call_id}"


def context_parameters(function: Callable[..., Any], context: type[CallContext]) -> list[str]:
    """Returns the names of the parameters that receive a `context`: those annotated with its class or one that it
    extends, also with `| None` and in `Annotated`. Raises TypeError for hints that cannot be read, and for the class of
    another place."""
    found = []
    for name, hint in hints_of(function).items():
        bare = _unwrapped(hint)
        if name == "return" or not (isinstance(bare, type) and issubclass(bare, CallContext)):
            continue
        if not issubclass(context, bare):
            raise TypeError(f"{name} is the context of a tool in the server; a tool here takes notecase.CallContext")
        found.append(name)
    return found


def _unwrapped(hint: Any) -> Any:
    """Returns a hint without `Annotated` and `| None`, and the value of a `type` alias."""
    hint = getattr(hint, "__value__", hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _unwrapped(inner[0])
    if origin in {typing.Union, types.UnionType}:
        rest = [one for one in inner if one is not types.NoneType]
        return _unwrapped(rest[0]) if len(rest) == 1 else hint
    return hint

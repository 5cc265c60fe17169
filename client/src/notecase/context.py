"""What a tool's function may learn of the call that it answers."""

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

    @property
    def idempotency_key(self) -> str:
        """{session_uid}/{call_id}: the same on every attempt of this call, in every process, and never that of another
        call. An outside effect is made once by it."""
        return f"{self.session_uid}/{self.call_id}"


def context_parameters(function: Callable[..., Any], context: type[CallContext]) -> list[str]:
    """Returns the names of the parameters that receive a `context`: those annotated with its class or one that it
    extends, also with `| None`. Raises TypeError for hints that cannot be read, and for the class of another place."""
    found = []
    for name, hint in hints_of(function).items():
        alone = [each for each in typing.get_args(hint) if each is not types.NoneType] if _is_union(hint) else [hint]
        if name == "return" or not (isinstance(alone[0], type) and issubclass(alone[0], CallContext)) or alone[1:]:
            continue
        if not issubclass(context, alone[0]):
            raise TypeError(f"{name} is the context of a tool in the server; a tool here takes notecase.CallContext")
        found.append(name)
    return found


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in {typing.Union, types.UnionType}

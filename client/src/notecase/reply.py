"""The reply of a run, as `Client.invoke` returns it."""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic

import grpc

from notecase import v1
from notecase.errors import NotecaseError
from notecase.hints import Kind, parse
from notecase.values import text_of

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Parsed = TypeVar("Parsed", default=Any)
else:
    from typing import TypeVar

    Parsed = TypeVar("Parsed")


class Reply(Generic[Parsed]):
    """The reply of a run that succeeded: `print(reply.text)`. For type checkers `parsed` has the type that was given as
    `output`, or Any if none was given."""

    def __init__(self, run: v1.Run, output: Kind | None = None) -> None:
        """`output` reads `parsed`. Raises NotecaseError with the run's error when it failed, and with code CANCELLED
        when it was cancelled."""
        raise_unsuccessful(run)
        self.run = run
        """The run as it ended, with its usage."""
        self._output = output

    @property
    def message(self) -> v1.Message:
        """The reply with all its parts."""
        return self.run.reply

    @property
    def text(self) -> str:
        """The text and json parts of the reply, joined; empty when it has none."""
        return text_of(self.run.reply)

    @property
    def refusal(self) -> str:
        """The text with which the model refused to answer, which is not in `text`; empty without a refusal."""
        return "".join(part.refusal for part in self.run.reply.parts)

    @cached_property
    def parsed(self) -> Parsed:
        """The reply's JSON: as the `output` type if one was given, otherwise as dicts and lists; None for a reply
        without JSON if no type was given.

        Raises ValueError for a reply that does not match the type, such as a refusal."""
        found = [part.json for part in self.run.reply.parts if part.HasField("json")]
        if self._output is None:
            return parse(found[0]) if found else None  # type: ignore[return-value]
        if not found:
            raise ValueError(f"the reply is not JSON: {(self.refusal or self.text)!r}")
        read: Parsed = self._output.read(parse(found[0]), "")
        return read

    @property
    def session(self) -> str:
        """The session, sessions/{session}, in which to continue the conversation."""
        return "/".join(self.run.name.split("/")[:2])

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        refusal = f", refusal={self.refusal!r}" if self.refusal else ""
        return f"Reply({self.text!r}{refusal}, run={self.run.name!r})"


def raise_unsuccessful(run: v1.Run) -> None:
    """Raises NotecaseError with the error of a run that failed, and with code CANCELLED for one that was cancelled."""
    if run.state == v1.Run.STATE_FAILED:
        raise NotecaseError.from_proto(run.error)
    if run.state == v1.Run.STATE_CANCELLED:
        raise NotecaseError(grpc.StatusCode.CANCELLED, "", f"{run.name} was cancelled.")

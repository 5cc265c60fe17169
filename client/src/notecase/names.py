"""Converts a caller's names of resources and choices to those of the API."""

from typing import Any, Literal, Protocol, TypeAlias, cast

from notecase import v1
from notecase.arguments import shown

OnBusy: TypeAlias = "Literal['reject', 'queue', 'interrupt', 'rollback'] | v1.StartRun.OnBusy.ValueType"
When: TypeAlias = "Literal['steer', 'follow_up', 'interrupt'] | v1.UserInput.When.ValueType"
Remember: TypeAlias = "Literal['once', 'run', 'session'] | v1.InputResponse.Remember.ValueType"
Approver: TypeAlias = "Literal['user', 'developer', 'admin'] | v1.Tool.Approver.ValueType"


class Named(Protocol):
    """A resource: a session, an agent, a run."""

    name: str


def name_of(resource: "str | Named | None", collection: str = "", argument: str = "") -> str:
    """Returns the name of a resource, a name as it is, or that of an id in a collection: agents/detective for
    "detective"; empty for None. Raises TypeError, which names the argument: by default the collection's singular."""
    name = "" if resource is None else resource if isinstance(resource, str) else getattr(resource, "name", None)
    if not isinstance(name, str):
        takes = "an id, a name, or what the service returned for it"
        raise TypeError(f"{argument or collection.removesuffix('s')} must be {takes}, not {shown(resource)}")
    return f"{collection}/{name}" if collection and name and "/" not in name else name


def quoted(text: str) -> str:
    """Returns any text as a value in a filter."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def choice(enum: Any, given: str | int | None, argument: str) -> Any:
    """Returns the value of one of the API's enums: "follow_up" for WHEN_FOLLOW_UP; a value as it is.

    Raises TypeError or ValueError, which names the argument and lists the choices."""
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        return given
    prefix = cast("str", enum.Name(0)).removesuffix("UNSPECIFIED")
    choices = {name.removeprefix(prefix).lower(): value for name, value in enum.items() if value}
    if not isinstance(given, str) or given not in choices:
        raised = ValueError if isinstance(given, str) else TypeError
        raise raised(f"{argument}: {given!r} is not one of {', '.join(map(repr, choices))}")
    return choices[given]

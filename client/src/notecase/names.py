"""What a caller writes for a resource or a choice, as the API has it."""

from typing import Any, Literal, Protocol, TypeAlias, cast

from notecase import v1

OnBusy: TypeAlias = "Literal['reject', 'queue', 'interrupt', 'rollback'] | v1.StartRun.OnBusy.ValueType"
When: TypeAlias = "Literal['steer', 'follow_up', 'interrupt'] | v1.UserInput.When.ValueType"
Remember: TypeAlias = "Literal['once', 'run', 'session'] | v1.InputResponse.Remember.ValueType"
Approver: TypeAlias = "Literal['user', 'developer', 'admin'] | v1.Tool.Approver.ValueType"


class Named(Protocol):
    """A resource: a session, an agent, a run."""

    name: str


def name_of(resource: "str | Named", collection: str = "") -> str:
    """Returns the name of a resource, a name as it is, or that of an id in a collection: agents/detective for
    "detective"."""
    name = resource if isinstance(resource, str) else resource.name
    return f"{collection}/{name}" if collection and name and "/" not in name else name


def choice(enum: Any, given: str | int) -> Any:
    """Returns the value of one of the API's enums: "follow_up" for WHEN_FOLLOW_UP; a value as it is.

    Raises ValueError, which lists the choices."""
    if not isinstance(given, str):
        return given
    prefix = cast("str", enum.Name(0)).removesuffix("UNSPECIFIED")
    choices = {name.removeprefix(prefix).lower(): value for name, value in enum.items() if value}
    if given not in choices:
        raise ValueError(f"{given!r} is not one of {', '.join(map(repr, choices))}")
    return choices[given]

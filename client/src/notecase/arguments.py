"""Makes the API's messages of a caller's arguments. Invalid ones are refused before anything is sent, with the name of
the argument."""

from collections.abc import Mapping, MutableMapping, MutableSequence
from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

_WORDS = {
    FieldDescriptor.CPPTYPE_STRING: "a string",
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
    FieldDescriptor.CPPTYPE_INT32: "an integer of 32 bits",
    FieldDescriptor.CPPTYPE_INT64: "an integer of 64 bits",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
}


def made(kind: type[M], /, prefix: str = "", **fields: Any) -> M:
    """Makes a message of its fields; None means a field that is not set. Raises TypeError or ValueError, which names
    the field after `prefix` and its type; for text that UTF-8 cannot encode, the ValueError is a UnicodeError."""
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError) as error:
                raise _unfit(error, kind, name, prefix, value) from error
        raise


def of_fields(kind: type[M], given: Mapping[str, Any], argument: str = "") -> M:
    """Makes a message of its fields by name; durations may be numbers of seconds. Raises as `made` does, and ValueError
    for a field that does not exist."""
    fields = kind.DESCRIPTOR.fields_by_name
    if unknown := [name for name in given if name not in fields]:
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}; it has {', '.join(fields)}")
    prefix = f"{argument}." if argument else ""
    durations = {
        name: duration(f"{prefix}{name}", value)
        for name, value in given.items()
        if fields[name].message_type is Duration.DESCRIPTOR and isinstance(value, int | float | str)
    }
    return made(kind, prefix, **{**given, **durations})


def message(kind: type[M], given: M | Mapping[str, Any] | None, argument: str) -> M | None:
    """Returns a message as it is, or makes it of its fields by name. Raises as `of_fields` does."""
    if given is None or isinstance(given, kind):
        return given
    if isinstance(given, Mapping):
        return of_fields(kind, given, argument)
    raise TypeError(f"{argument} must be a v1.{kind.__name__} or a mapping of its fields, not {shown(given)}")


def duration(argument: str, seconds: Any) -> Duration | None:
    """Makes a duration of a number of seconds. Raises TypeError or ValueError, which names the argument."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float | timedelta):
        raise TypeError(f"{argument} must be a number of seconds, not {shown(seconds)}")
    if isinstance(seconds, timedelta):
        seconds = seconds.total_seconds()
    if not abs(seconds) < 1e11:  # NaN neither
        raise ValueError(f"{argument} must be a number of seconds, not {seconds}")
    made = Duration()
    made.FromMilliseconds(round(seconds * 1000))
    return made


def shown(value: Any) -> str:
    """Describes a caller's argument and its type for an error message."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:60] + '…'} ({type(value).__name__})"


def _unfit(error: Exception, kind: type[Message], name: str, prefix: str, value: Any) -> Exception:
    if isinstance(error, UnicodeEncodeError):
        return UnicodeError(f"{prefix}{name} has characters that UTF-8 cannot encode: {error.reason}")
    field: Any = kind.DESCRIPTOR.fields_by_name[name]
    empty = getattr(kind(), name)
    wanted = _word(field)
    if isinstance(empty, MutableMapping):
        wanted = f"a mapping of strings to values, each {_word(field.message_type.fields_by_name['value'])}"
    elif isinstance(empty, MutableSequence):
        wanted = f"a list, each entry {wanted}"
    raised = TypeError if isinstance(error, TypeError) else ValueError
    return raised(f"{prefix}{name} must be {wanted}, not {shown(value)}")


def _word(field: Any) -> str:
    if field.message_type is not None:
        return f"a v1.{field.message_type.name}" if field.message_type.file.package == "notecase.v1" else "a timedelta"
    if field.enum_type is not None:
        return f"a value of {field.enum_type.name}"
    return _WORDS[field.cpp_type]

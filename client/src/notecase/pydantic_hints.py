"""Asks pydantic for the JSON Schema of a hint, and reads values by it. Needs notecase[pydantic] to be imported."""

import json
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

_ANY: TypeAdapter[Any] = TypeAdapter(Any)


class Invalid(ValueError):
    """pydantic refused a value."""

    def __init__(self, error: ValidationError) -> None:
        super().__init__(str(error))
        found = error.errors(include_url=False, include_context=False, include_input=False)
        self.problems = [(".".join(map(str, one["loc"])), one["msg"]) for one in found]
        """Returns for each mistake its place within the value, and a description."""


class _Schema(GenerateJsonSchema):
    """Leaves out the titles of fields, which repeat their names: a model is billed for every word."""

    ignored_warning_kinds = {*GenerateJsonSchema.ignored_warning_kinds, "non-serializable-default"}  # noqa: RUF012

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def describe(hint: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """Returns a hint's JSON Schema, and a function that reads a JSON value by it and raises Invalid.

    Raises TypeError for a hint that pydantic has no schema for."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
        schema = adapter.json_schema(schema_generator=_Schema)
    except (PydanticUserError, NameError) as error:
        raise TypeError(str(error)) from error

    def read(value: Any) -> Any:
        try:
            return adapter.validate_json(json.dumps(value))  # where a date is text, in a strict model too
        except ValidationError as error:
            raise Invalid(error) from error

    return schema, read


def plain(value: Any) -> Any:
    """Converts a value to what JSON has. Raises ValueError for a value that pydantic cannot write."""
    return _ANY.dump_python(value, mode="json")

"""Reads agents from YAML or JSON files, and reports all mistakes at once, each with its line."""

import json
from collections.abc import Iterator
from difflib import get_close_matches, unified_diff
from typing import Any, Literal, NamedTuple

import yaml
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from notecase import v1

from notecase_server.cli import output

OUTPUT_ONLY: tuple[Literal["revision", "create_time", "update_time", "etag"], ...] = (
    "revision",
    "create_time",
    "update_time",
    "etag",
)
"""Fields that a file may hold, since `agents show` prints them, and that are not compared or sent."""

JSON_TEXTS = {
    "notecase.v1.Tool.parameters",
    "notecase.v1.LlmAgent.output_schema",
    "notecase.v1.Generation.extra",
}
"""Fields of JSON text, which a file may also hold as YAML."""

_PLAIN_TAGS = tuple(
    f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "map", "null", "seq", "str", "time")
)
"""Those of values that are written without a tag."""

_WELL_KNOWN = "google.protobuf."


class Mistake(NamedTuple):
    """One thing that is wrong in a file."""

    file: str
    line: int
    """0 where it is not known."""
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


class Mistakes(Exception):
    """Everything that is wrong in some files."""

    def __init__(self, found: list[Mistake]) -> None:
        super().__init__("\n".join(map(str, found)))


class Declared(NamedTuple):
    """An agent as a file says it."""

    agent: v1.Agent
    """Without the fields of OUTPUT_ONLY."""
    file: str
    lines: dict[str, int]
    """The line of each field, by its path, such as "llm.tools[0].name"; of the agent itself by ""."""

    def at(self, path: str, text: str) -> Mistake:
        """Returns the mistake at a path of this agent, such as "agent.llm.tools[0].name"."""
        path = path.removeprefix("agent.").removeprefix("agent")
        known = path
        while known and known not in self.lines:
            known = known[: max(known.rfind("."), known.rfind("["), 0)]
        where = f"{self.agent.name}{'.' if path else ''}{path}"
        return Mistake(self.file, self.lines.get(known, 0), f"{where}: {text}")


def read(file: str, text: str) -> list[Declared]:
    """Returns the agents of a file: of each of its documents, which are agents or lists of them. Raises Mistakes."""
    reader = _Reader(file)
    try:
        documents = list(yaml.compose_all(_spaced(text), Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise Mistakes([Mistake(file, line, f"This is not YAML: {error.problem}.")]) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise Mistakes([Mistake(file, 0, f"This is not YAML: {str(error).splitlines()[0]}.")]) from None
    found = [agent for document in documents if document is not None for agent in reader.agents(document)]
    names = [one.agent.name for one in found]
    for one in found:
        if one.agent.name and names.count(one.agent.name) > 1:
            reader.mistakes.append(one.at("", "this agent is declared more than once."))
    if not found and not reader.mistakes:
        reader.mistakes.append(Mistake(file, 0, "The file holds no agent."))
    if reader.mistakes:
        raise Mistakes(sorted(reader.mistakes, key=lambda one: one.line))
    return found


def data_of(agent: v1.Agent) -> dict[str, Any]:
    """Returns an agent in the form of its JSON, with JSON texts as values."""
    data: dict[str, Any] = output.as_data(agent)
    llm = data.get("llm", {})
    _unfold(llm, "output_schema")
    _unfold(llm.get("generation", {}), "extra")
    for tool in llm.get("tools", ()):
        _unfold(tool, "parameters")
    return data


def written(agent: v1.Agent) -> str:
    """Returns an agent as a file says it: YAML without the fields of OUTPUT_ONLY."""
    return output.as_yaml({name: held for name, held in data_of(agent).items() if name not in OUTPUT_ONLY})


def difference(before: v1.Agent | None, after: v1.Agent | None, names: tuple[str, str]) -> str:
    """Returns a unified diff of two agents as files; empty when they are equal."""
    old, new = (written(one).splitlines() if one is not None else [] for one in (before, after))
    return "\n".join(unified_diff(old, new, *names, lineterm=""))


def _unfold(holder: dict[str, Any], name: str) -> None:
    if name in holder:
        try:
            held = json.loads(holder[name])
        except (ValueError, RecursionError):
            return
        holder[name] = held


def _spaced(text: str) -> str:
    """Returns JSON without tabs, which YAML does not take for indentation; all other text as it is."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text.replace("\t", " ")


class _Reader:
    """Turns the nodes of one file into agents."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.mistakes: list[Mistake] = []
        self._lines: dict[str, int] = {}
        self._merged: dict[int, yaml.Node] = {}

    def agents(self, document: yaml.Node) -> Iterator[Declared]:
        """Yields the agents of a document, as far as they can be read."""
        for node in document.value if isinstance(document, yaml.SequenceNode) else [document]:
            if isinstance(node, yaml.MappingNode):
                yield self._agent(node)
            else:
                self._wrong(node, "An agent is a mapping with a name.")

    def _agent(self, node: yaml.MappingNode) -> Declared:
        self._lines = {"": node.start_mark.line + 1}
        agent = v1.Agent()
        self._fill(agent, node, "")
        if not agent.name:
            self._wrong(node, "name: every agent needs one.")
        elif not agent.name.startswith("agents/"):
            agent.name = f"agents/{agent.name}"
        for field in OUTPUT_ONLY:
            agent.ClearField(field)
        return Declared(agent, self.file, self._lines)

    def _wrong(self, node: yaml.Node, text: str) -> None:
        self.mistakes.append(Mistake(self.file, node.start_mark.line + 1, text))

    def _fill(self, message: Message, node: yaml.MappingNode, path: str) -> None:
        """Sets the fields of a message from a mapping."""
        fields = message.DESCRIPTOR.fields_by_name
        chosen: dict[str, str] = {}
        for key, held in self._members(node, path):
            here = f"{path}.{key}".lstrip(".")
            self._lines[here] = held.start_mark.line + 1
            field = fields.get(key)
            if field is None:
                self._wrong(held, f"{here}: {_unknown(key, message.DESCRIPTOR)}")
            elif not held.tag.startswith(_PLAIN_TAGS):
                self._wrong(held, f"{here}: the tag {held.tag} means nothing here.")
            elif held.tag != "tag:yaml.org,2002:null":
                group = field.containing_oneof
                if group is not None and chosen.setdefault(group.name, key) != key and not _optional(field):
                    self._wrong(held, f"{here}: {chosen[group.name]} is set already; only one of them can be.")
                self._set(message, field, held, here)

    def _members(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[str, yaml.Node]]:
        """Yields the members of a mapping, with those that it merges."""
        own = [str(key.value) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if id(node) not in self._merged:  # an aliased node comes here more than once
            self._merged[id(node)] = node
            for name in dict.fromkeys(name for name in own if own.count(name) > 1):
                self._wrong(node, f"{f'{path}.{name}'.lstrip('.')}: it is given more than once.")
            try:
                yaml.SafeLoader("").flatten_mapping(node)
            except yaml.MarkedYAMLError as error:
                self._wrong(node, f"{path or 'This'}: {error.problem}.")
        yield from {str(key.value): held for key, held in node.value}.items()

    def _set(self, message: Any, field: Any, node: yaml.Node, path: str) -> None:
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            if isinstance(node, yaml.MappingNode):
                for key, held in self._members(node, path):
                    self._lines[f"{path}.{key}"] = held.start_mark.line + 1
                    self._leaf(message, field, {key: self._plain(held, field)}, held, f"{path}.{key}")
            else:
                self._wrong(node, f"{path}: a mapping of names to texts is needed.")
        elif field.is_repeated:
            if not isinstance(node, yaml.SequenceNode):
                self._wrong(node, f"{path}: a list is needed.")
                return
            for index, one in enumerate(node.value):
                here = f"{path}[{index}]"
                self._lines[here] = one.start_mark.line + 1
                if kind is None:
                    self._leaf(message, field, [self._plain(one, field)], one, here)
                else:
                    self._nested(getattr(message, field.name).add(), one, here)
        elif kind is not None and not kind.full_name.startswith(_WELL_KNOWN):
            nested = getattr(message, field.name)
            nested.SetInParent()
            self._nested(nested, node, path)
        elif field.full_name in JSON_TEXTS and not isinstance(node, yaml.ScalarNode):
            self._leaf(message, field, self._as_json(node, path), node, path)
        else:
            self._leaf(message, field, self._plain(node, field), node, path)

    def _nested(self, message: Message, node: yaml.Node, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            self._fill(message, node, path)
        else:
            known = ", ".join(message.DESCRIPTOR.fields_by_name)
            self._wrong(node, f"{path}: a mapping is needed, with some of: {known or 'nothing'}.")

    def _leaf(self, message: Message, field: Any, value: Any, node: yaml.Node, path: str) -> None:
        """Sets one plain value, read as protobuf's JSON has it."""
        made = type(message)()
        try:
            json_format.ParseDict({field.name: value}, made)
        except json_format.ParseError as error:
            self._wrong(node, f"{path}: {_needed(field, error)}")
        else:
            message.MergeFrom(made)

    def _plain(self, node: yaml.Node, field: Any) -> Any:
        """Returns the value of a node. For a text field it is the text as written, even `no` and `1.0`."""
        kind = field.message_type.fields_by_name["value"] if field.message_type and _is_map(field) else field
        texts = kind.cpp_type in {FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE}
        if isinstance(node, yaml.ScalarNode) and texts:
            return _whole(node.value)
        return self._construct(node)

    def _as_json(self, node: yaml.Node, path: str) -> str:
        try:
            return json.dumps(self._construct(node), ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            self._wrong(node, f"{path}: this is not JSON: {error}.")
            return ""

    def _construct(self, node: yaml.Node) -> Any:
        try:
            return yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            self._wrong(node, str(error).splitlines()[0])
            return None


def _optional(field: Any) -> bool:
    """Returns whether the oneof of a field exists only to record that the field is set."""
    return field.containing_oneof is not None and field.containing_oneof.name == f"_{field.name}"


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _whole(text: str) -> str:
    """Returns the text with the halves of a character that JSON escapes separately joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unknown(key: str, descriptor: Any) -> str:
    known = list(descriptor.fields_by_name)
    if close := get_close_matches(key, known, 1):
        return f"there is no such field; {close[0]!r} may be meant."
    return f"there is no such field; those of {descriptor.name} are: {', '.join(known) or 'none'}."


def _needed(field: Any, error: Exception) -> str:
    if field.enum_type is not None:
        return f"one of these is needed: {', '.join(field.enum_type.values_by_name)}."
    if field.message_type is not None and field.message_type.full_name == "google.protobuf.Duration":
        return "a time in seconds is needed, such as 30s."
    names = {
        FieldDescriptor.CPPTYPE_BOOL: "true or false",
        FieldDescriptor.CPPTYPE_DOUBLE: "a number",
        FieldDescriptor.CPPTYPE_INT32: "a whole number of at most 32 bits",
        FieldDescriptor.CPPTYPE_INT64: "a whole number of at most 64 bits",
        FieldDescriptor.CPPTYPE_STRING: "a text",
    }
    return f"{names[field.cpp_type]} is needed." if field.cpp_type in names else str(error)

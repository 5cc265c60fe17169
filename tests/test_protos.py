"""The contract keeps its own rules: no number is used twice, and a method says whether it changes anything."""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from google.protobuf import descriptor_pb2
from notecase import v1

PROTOS = sorted((Path(__file__).parent.parent / "proto" / "notecase" / "v1").glob("*.proto"))

WORD = re.compile(r"//(?P<comment>[^\n]*)|\"(?:[^\"\\]|\\.)*\"|(?P<word>[\w.]+)|(?P<sign>[{}=;,\[\]<>()-])")


class Numbers(NamedTuple):
    """The numbers of one message or enum: in use, reserved because they were dropped, and set aside by a comment."""

    first: int
    used: set[int]
    reserved: set[int]
    set_aside: set[int]

    def gaps(self) -> list[int]:
        """The numbers below the highest one that nothing accounts for."""
        known = self.used | self.reserved | self.set_aside
        return [number for number in range(self.first, max(known, default=0)) if number not in known]

    def twice(self) -> list[int]:
        """The numbers that are in use and given away, or given away in both ways."""
        return sorted(self.used & self.reserved | self.used & self.set_aside | self.reserved & self.set_aside)


def spans(text: str) -> set[int]:
    """The numbers in such as `3, 5 to 8`."""
    found = re.findall(r"\b(\d+)(?: to (\d+))?", text)
    return {number for first, last in found for number in range(int(first), int(last or first) + 1)}


def numbers_in(source: str) -> dict[str, Numbers]:
    """The numbers of all messages and enums of a proto file, by name. A comment in a message that begins with
    `Set aside:` is about the message; numbers are read up to its first full stop."""
    found: dict[str, Numbers] = {}
    opened: list[str] = []  # blocks around this place; those that are not messages or enums by an empty name
    statement: list[str] = []
    comment = ""
    for token in re.finditer(WORD, source):
        if token["comment"] is not None:
            comment = f"{comment} {token['comment'].strip()}".strip()
            continue
        owner = next((name for name in reversed(opened) if name), "")
        if comment.startswith("Set aside:") and owner:
            found[owner].set_aside.update(spans(comment.split(".")[0]))
        comment = ""
        sign = token["sign"]
        if sign == "{":
            named = statement[0] in {"message", "enum"}
            opened.append(f"{owner}.{statement[1]}".lstrip(".") if named else "")
            if named:
                found[opened[-1]] = Numbers(int(statement[0] == "message"), set(), set(), set())
            statement = []
        elif sign == "}":
            opened.pop()
            statement = []
        elif sign == ";":
            if owner and statement[0] == "reserved":
                found[owner].reserved.update(spans(" ".join(statement)))
            elif owner and statement[0] != "option" and "=" in statement:
                found[owner].used.add(int(statement[statement.index("=") + 1]))
            statement = []
        else:
            statement.append(token[0])
    return found


def all_numbers() -> dict[str, Numbers]:
    return {name: numbers for path in PROTOS for name, numbers in numbers_in(path.read_text()).items()}


def described() -> Iterator[tuple[str, set[int], set[int]]]:
    """The messages and enums as protobuf has them: their numbers, and those that are reserved."""

    def walk(scope: str, messages: object, enums: object) -> Iterator[tuple[str, set[int], set[int]]]:
        for message in messages:  # type: ignore[attr-defined]
            if message.options.map_entry:
                continue
            name = f"{scope}.{message.name}".lstrip(".")
            reserved = {number for span in message.reserved_range for number in range(span.start, span.end)}
            yield name, {field.number for field in message.field}, reserved
            yield from walk(name, message.nested_type, message.enum_type)
        for enum in enums:  # type: ignore[attr-defined]
            reserved = {number for span in enum.reserved_range for number in range(span.start, span.end + 1)}
            yield f"{scope}.{enum.name}".lstrip("."), {value.number for value in enum.value}, reserved

    for file in files():
        yield from walk("", file.message_type, file.enum_type)


def files() -> list[descriptor_pb2.FileDescriptorProto]:
    names = [f"{v1.__name__}.{path.stem}_pb2" for path in PROTOS]
    found = [import_module(name).DESCRIPTOR for name in names]
    return [descriptor_pb2.FileDescriptorProto.FromString(file.serialized_pb) for file in found]


def test_the_numbers_are_read_as_protobuf_reads_them() -> None:
    expected = {name: (used, reserved) for name, used, reserved in described()}
    assert expected == {name: (numbers.used, numbers.reserved) for name, numbers in all_numbers().items()}


def test_every_gap_in_the_numbers_is_reserved_or_set_aside() -> None:
    """A number that was dropped and is used again would be read by older clients as what it was."""
    assert {} == {name: gaps for name, numbers in all_numbers().items() if (gaps := numbers.gaps())}


def test_no_number_is_in_use_and_given_away() -> None:
    assert {} == {name: twice for name, numbers in all_numbers().items() if (twice := numbers.twice())}


def test_a_gap_and_a_number_given_twice_are_found() -> None:
    """The rules above can fail: in an inner enum, behind a oneof, and over a set-aside span of several lines."""
    source = """
    message Outer {
      reserved 2, 9 to 10;
      // Set aside: 4 and 6 to 7 for
      // what comes. And 5 is not.
      string a = 1;
      oneof kind { string b = 3 [deprecated = true]; string c = 12; }
      enum Inner { reserved 1; INNER_UNSPECIFIED = 0; INNER_B = 3; }
      map<string, int32> d = 4;
    }
    """
    found = numbers_in(source)
    assert ([5, 8, 11], [4]) == (found["Outer"].gaps(), found["Outer"].twice())
    assert ([2], []) == (found["Outer.Inner"].gaps(), found["Outer.Inner"].twice())


READS = re.compile(r"(Get|List|Watch|Wait|Export|Download)[A-Z]")


@pytest.mark.parametrize("file", files(), ids=lambda file: file.name.rpartition("/")[2])
def test_reads_and_only_reads_say_that_they_change_nothing(file: descriptor_pb2.FileDescriptorProto) -> None:
    """A proxy or a client may repeat a read, and Connect sends it as a GET."""
    methods = [method for service in file.service for method in service.method]
    no_side_effects = descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS
    marked = {method.name for method in methods if method.options.idempotency_level == no_side_effects}
    assert {method.name for method in methods if READS.match(method.name)} == marked
    unmarked = [method for method in methods if method.name not in marked]
    assert {descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN} >= {each.options.idempotency_level for each in unmarked}


@pytest.mark.parametrize("file", files(), ids=lambda file: file.name.rpartition("/")[2])
def test_each_language_has_its_package(file: descriptor_pb2.FileDescriptorProto) -> None:
    options = file.options
    assert ("notecase.dev/api/notecase/v1;notecasev1", "dev.notecase.v1", "Notecase.V1", True) == (
        options.go_package,
        options.java_package,
        options.csharp_namespace,
        options.java_multiple_files,
    )

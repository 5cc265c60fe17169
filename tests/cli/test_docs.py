"""docs/cli.md names every command with each of its options, and none that does not exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
from notecase_server.cli import main
from notecase_server.cli.connection import Exit

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()

SHARED = {"--server", "--token", "--ca", "--plaintext", "--profile", "-o", "--output", "--limit", "--yes", "--wait"}
"""Options that the page explains once."""

ELSEWHERE = {"serve"}
"""Commands whose options another page lists."""


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by its words."""
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from commands(found, (*path, name))


def rows() -> dict[str, str]:
    """The line of each command in the page's tables, by the command's words."""
    found = re.findall(r"^\| `((?:[a-z]+ ?)+)[^`]*` \|.*$", PAGE, re.MULTILINE)
    lines = [line for line in PAGE.splitlines() if re.match(r"\| `[a-z]", line)]
    assert len(found) == len(lines)
    return {words.strip(): line for words, line in zip(found, lines, strict=True) if not words.startswith("-")}


def options(command: click.Command) -> set[str]:
    return {
        name for one in command.params if isinstance(one, click.Option) for name in (*one.opts, *one.secondary_opts)
    }


def test_exactly_the_existing_commands_and_options_are_documented() -> None:
    told, known = rows(), dict(commands(main))
    assert set(known) == set(told)
    for words, command in known.items():
        named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", told[words]))
        own = options(command) - SHARED
        if words not in ELSEWHERE:
            assert (words, set()) == (words, own - named)
        assert (words, set()) == (words, named - options(command) - SHARED)


def test_the_documented_shared_options_exist() -> None:
    used = {name for _, command in commands(main) for name in options(command)}
    assert SHARED <= used
    for name in SHARED:
        assert f"`{name}" in PAGE


def test_every_command_that_reads_has_the_three_forms() -> None:
    for words, command in commands(main):
        if words.split()[-1] in {"list", "show", "get", "inbox"} and words != "completion show":
            (form,) = [one for one in command.params if "-o" in one.opts]
            assert (words, ["table", "json", "yaml"]) == (words, list(getattr(form.type, "choices", [])))


def test_every_exit_code_is_documented() -> None:
    told = re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)
    assert [str(code.value) for code in Exit] == told


def test_every_command_has_a_help_of_whole_sentences() -> None:
    for words, command in commands(main):
        assert (words, True) == (words, bool(command.help))
        assert (words, ".") == (words, (command.help or "").strip()[-1])
        for one in command.params:
            if isinstance(one, click.Option):
                assert (words, one.name, True) == (words, one.name, bool(one.help))

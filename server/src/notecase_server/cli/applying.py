"""Makes the server's agents match files, and compares the two."""

import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import click
from notecase import Client, NotecaseError, v1

from notecase_server.cli import manifest, screen
from notecase_server.cli.ask import limited, read_text
from notecase_server.cli.connection import Exit, Refusal


def read_files(files: Sequence[str]) -> list[manifest.Declared]:
    """Returns the agents of all files; - is standard input. Raises Refusal with everything that is wrong in them."""
    found: list[manifest.Declared] = []
    wrong: list[str] = []
    for file in files:
        try:
            found += manifest.read("standard input" if file == "-" else file, _text(file))
        except manifest.Mistakes as mistakes:
            wrong.append(str(mistakes))
        except OSError as error:
            wrong.append(f"{file}: {error.strerror}.")
        except UnicodeDecodeError:
            wrong.append(f"{file}: This is not UTF-8.")
    where = {one.agent.name: one for one in found}
    wrong += [
        str(one.at("", "another file has an agent of this name.")) for one in found if where[one.agent.name] != one
    ]
    if wrong:
        raise Refusal(screen.harmless("the files are wrong:\n" + "\n".join(wrong)), Exit.USAGE)
    return found


def _text(file: str) -> str:
    if file == "-":
        return read_text("-")
    with Path(file).open(encoding="utf-8-sig") as opened:
        return limited(opened)


async def apply(client: Client, declared: Sequence[manifest.Declared], dry_run: bool) -> Exit:
    """Applies the agents one after the other and prints the result of each; with `dry_run` only how they would change.
    Agents that the server refuses are reported at the end."""
    refused: list[manifest.Mistake] = []
    for one in declared:
        name = one.agent.name
        before = await _find(client, name)
        diff = _difference(before, one)
        if before is not None and not diff:
            click.echo(f"{name} unchanged at revision {before.revision}")
        elif dry_run:
            click.echo(screen.diff(diff))
        else:
            try:
                after = await _put(client, one.agent)
                told = f"changed to revision {after.revision}" if before is not None else "created"
                click.echo(f"{name} {told}")
            except NotecaseError as error:
                if not error.reason:
                    raise
                refused += _mistakes(one, error)
    for mistake in refused:
        screen.failure(str(mistake))
    return Exit.FAILED if refused else Exit.OK


async def compare(client: Client, names: Sequence[str], declared: Sequence[manifest.Declared]) -> Exit:
    """Prints how two agents of the server differ, or the server's from those declared."""
    if names:
        old, new = [await client.agents.GetAgent(v1.GetAgentRequest(name=name)) for name in names]
        diffs = [manifest.difference(old, new, (_label(old), _label(new)))]
    else:
        diffs = [_difference(await _find(client, one.agent.name), one) for one in declared]
    for diff in filter(None, diffs):
        click.echo(screen.diff(diff))
    return Exit.DIFFERENT if any(diffs) else Exit.OK


async def edit(client: Client, name: str) -> Exit:
    """Lets the user edit an agent, and applies the result if the agent has not changed in the meantime."""
    before = await client.agents.GetAgent(v1.GetAgentRequest(name=name))
    if not sys.stdin.isatty() and not _has_editor():
        raise click.UsageError("`agents edit` needs a terminal, or an EDITOR; use `agents apply` with a file.")
    text = manifest.written(before)
    while True:
        edited = click.edit(text, extension=".yaml")
        if edited is None or edited == text:
            screen.aside("Nothing was changed.")
            return Exit.OK
        try:
            declared = manifest.read(name, edited)
            if [one.agent.name for one in declared] != [name]:
                raise manifest.Mistakes([manifest.Mistake(name, 0, "The file must hold exactly this agent.")])
            declared[0].agent.etag = before.etag
            after = await _put(client, declared[0].agent)
            click.echo(f"{name} changed to revision {after.revision}")
            return Exit.OK
        except manifest.Mistakes as mistakes:
            screen.failure(str(mistakes))
        except NotecaseError as error:
            if error.reason == "ETAG_MISMATCH" or not error.reason:
                _keep(name, edited)
                raise
            for mistake in _mistakes(declared[0], error):
                screen.failure(str(mistake))
        text = edited
        if not sys.stdin.isatty() or not click.confirm("Edit it again?", default=True, err=True):
            _keep(name, edited)
            return Exit.FAILED


def _keep(name: str, edited: str) -> None:
    """Writes the edited text to a file, and prints how to apply it."""
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"{screen.id_of(name)}-", suffix=".yaml", delete=False, encoding="utf-8"
    ) as file:
        file.write(edited)
    screen.aside(f"The edited text is in {file.name}; `notecase agents apply {file.name}` applies it.")


def _has_editor() -> bool:
    """Returns whether the user names an editor, which may be a program that edits by itself."""
    return any(os.path.expandvars(one) not in {"", one} for one in ("$VISUAL", "$EDITOR"))


def _difference(before: v1.Agent | None, one: manifest.Declared) -> str:
    return manifest.difference(before, one.agent, (_label(before) if before else "nothing", one.file))


def _label(agent: v1.Agent) -> str:
    return f"{agent.name}@{agent.revision}"


async def _find(client: Client, name: str) -> v1.Agent | None:
    try:
        return await client.agents.GetAgent(v1.GetAgentRequest(name=name))
    except NotecaseError as error:
        if error.reason != "AGENT_NOT_FOUND":
            raise
        return None


async def _put(client: Client, agent: v1.Agent) -> v1.Agent:
    request = v1.UpdateAgentRequest(agent=agent, allow_missing=True, request_id=uuid.uuid4().hex)
    request.update_mask.paths.append("*")
    return await client.agents.UpdateAgent(request)


def _mistakes(one: manifest.Declared, error: NotecaseError) -> list[manifest.Mistake]:
    """Returns the server's complaints about an agent, each by its line."""
    if error.violations:
        return [one.at(violation.field, violation.description) for violation in error.violations]
    return [one.at("", error.message)]

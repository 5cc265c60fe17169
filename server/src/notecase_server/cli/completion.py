"""`notecase completion`: the Tab key of shells."""

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

VARIABLE = "_NOTECASE_COMPLETE"
"""The variable by which a shell asks the command for completions; click reads it."""

SHELLS = ("bash", "zsh", "fish")


@click.group()
def completion() -> None:
    """Complete commands, options and ids with the Tab key, in bash, zsh and fish."""


@completion.command("install")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def install(shell: str | None) -> None:
    """Install the completion for SHELL, or for the one that you use.

    New shells have it from then on. May be run again, also after an update.
    """
    shell = shell or Path(os.path.expandvars("$SHELL")).name
    if shell not in SHELLS:
        raise click.UsageError(f"Say which shell: {', '.join(SHELLS)}.")
    home = Path.home()
    if shell == "fish":
        script = home / ".config" / "fish" / "completions" / "notecase.fish"
        _write(script, source(shell))
        click.echo(f"{script} is written.")
        return
    script = home / ".local" / "share" / "notecase" / f"completion.{shell}"
    _write(script, source(shell))
    settings, line = home / f".{shell}rc", f'source "{script}"  # completion of notecase'
    held = settings.read_text() if settings.exists() else ""
    if line not in held:
        if shell == "zsh" and "compinit" not in held:
            line = f"autoload -Uz compinit && compinit\n{line}"
        with settings.open("a") as opened:
            opened.write(f"{'' if held.endswith(chr(10)) or not held else chr(10)}{line}\n")
    click.echo(f"{script} is written, and {settings} reads it.")


@completion.command("show")
@click.argument("shell", type=click.Choice(SHELLS))
def show(shell: str) -> None:
    """Print the script that a shell reads."""
    click.echo(source(shell))


def source(shell: str) -> str:
    """Returns the script that a shell reads."""
    found = get_completion_class(shell)
    assert found is not None, shell
    return found(click.Group("notecase"), {}, "notecase", VARIABLE).source()


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}.") from None

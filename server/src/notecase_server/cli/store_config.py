"""The option by which commands that open a store take it from a server's configuration file."""

from pathlib import Path

import click


def _load_store(context: click.Context, option: click.Parameter, value: Path | None) -> None:
    """Takes the store of a configuration file as the default of the command's options. The rest of the file is not
    checked: its secrets are those of the server. Raises ClickException."""
    if value is None:
        return
    from notecase_server.auth.tables import SettingsError, load  # noqa: PLC0415  # most commands need no such file

    try:
        top = load(value, "--config", toml=True)
        table = top.inner("store", top.take("store", dict) or {})
        found = {
            "store": table.text("url", needed=False),
            "store_password_file": table.text("password_file", needed=False),
        }
        top.raise_mistakes()
    except SettingsError as error:
        raise click.ClickException(f"{value} cannot be used:\n{error}") from None
    context.default_map = {name: text for name, text in found.items() if text}


CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="NOTECASE_CONFIG",
    show_envvar=True,
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_load_store,
    help="A server's configuration file; its `store.url` and `store.password_file` are used unless the options or "
    "their variables are set.",
)
"""For commands that open a store and use nothing else of the file."""

"""`notecase backup`."""

from pathlib import Path

import click

import notecase_server.cli.bare_structlog  # noqa: F401  # before others import structlog
from notecase_server.cli.options import STORE
from notecase_server.cli.store_config import CONFIG
from notecase_server.serve_stores import backup as copy
from notecase_server.store.contract import StoreOpenError


@click.command()
@CONFIG
@STORE
@click.option("--force", is_flag=True, help="Replace DEST where it exists.")
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path, dir_okay=False))
def backup(store: str, force: bool, destination: Path) -> None:
    """Copy a store to the file DEST, while a server goes on with it.

    The copy is the store as it is at one moment, and a store itself: `notecase serve --store sqlite:DEST`. It holds
    everything, also what is deleted from the store later on.
    """
    try:
        copy(store, destination, force)
    except StoreOpenError as error:
        raise click.ClickException(str(error)) from None

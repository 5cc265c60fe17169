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
@click.option("--force", is_flag=True, help="Replace DEST if it exists.")
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path, dir_okay=False))
def backup(store: str, force: bool, destination: Path) -> None:
    """Copy a store to the file DEST while its server keeps running.

    The copy is a consistent snapshot and itself a store: `notecase serve --store sqlite:DEST`. It keeps data that is
    later deleted from the original.
    """
    try:
        copy(store, destination, force)
    except StoreOpenError as error:
        raise click.ClickException(str(error)) from None

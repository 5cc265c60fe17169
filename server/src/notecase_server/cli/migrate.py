"""`notecase migrate`."""

import asyncio
from pathlib import Path

import click

from notecase_server import serve_stores
from notecase_server.cli.options import PASSWORD_FILE, STORE
from notecase_server.cli.store_config import CONFIG
from notecase_server.config import configure_logging
from notecase_server.serve_stores import Database
from notecase_server.store.contract import StoreOpenError


@click.command()
@CONFIG
@STORE
@PASSWORD_FILE
def migrate(store: str, store_password_file: Path | None) -> None:
    """Upgrade the tables of a PostgreSQL store.

    No server may own the store. In an empty database, the tables are created. `notecase serve` does the same when it
    starts, unless --no-migrate is set. A SQLite file is upgraded when it is opened.
    """
    configure_logging("console", "info")
    try:
        former, schema = asyncio.run(serve_stores.migrate(store, Database(password_file=store_password_file)))
    except StoreOpenError as error:
        raise click.ClickException(str(error)) from None
    if not former:
        click.echo(f"created the tables, schema {schema}")
    elif former < schema:
        click.echo(f"upgraded the tables from schema {former} to {schema}")
    else:
        click.echo(f"up to date, schema {former}")

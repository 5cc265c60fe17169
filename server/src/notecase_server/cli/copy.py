"""`notecase copy`."""

import asyncio
import time

import click

from notecase_server import serve_stores
from notecase_server.cli.screen import aside
from notecase_server.config import configure_logging
from notecase_server.store.contract import StoreOpenError

PROGRESS_SECONDS = 2.0


@click.command()
@click.option("--from", "source", required=True, metavar="URL", help="The store to copy, such as sqlite:PATH.")
@click.option("--to", "target", required=True, metavar="URL", help="Where to copy it; must be empty or not exist.")
def copy(source: str, target: str) -> None:
    """Copy a whole store into an empty store.

    The password of a PostgreSQL store is taken from PGPASSWORD, a password file (~/.pgpass, passfile) or the URL.

    Both stores must be closed; the source is not changed. Repeat the command to continue an interrupted copy. At the
    end it compares all rows of both stores and prints the SHA-256 of each table; before that, no server opens the copy.
    """
    configure_logging("console", "info")
    shown = [time.monotonic()]

    def show(table: str, rows: int) -> None:
        if time.monotonic() - shown[0] >= PROGRESS_SECONDS:
            shown[0] = time.monotonic()
            aside(f"{table}: compared" if rows < 0 else f"{table}: {rows:,} rows copied")

    try:
        digests = asyncio.run(serve_stores.copy(source, target, show))
    except StoreOpenError as error:
        raise click.ClickException(str(error)) from None
    for table, digest in digests.items():
        click.echo(f"{digest}  {table}")

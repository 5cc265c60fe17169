"""`notecase store`: commands for a whole store that no server has open."""

import asyncio
import uuid
from pathlib import Path

import click

from notecase_server import serve_stores
from notecase_server.cli.options import PASSWORD_FILE, STORE
from notecase_server.cli.store_config import CONFIG
from notecase_server.config import configure_logging
from notecase_server.serve_stores import Database
from notecase_server.store.contract import StoreOpenError


@click.group()
def store() -> None:
    """Change a store while no server uses it."""


@store.command()
@CONFIG
@STORE
@PASSWORD_FILE
def renew(store: str, store_password_file: Path | None) -> None:
    """Give every session a new uid, after restoring a backup.

    A client that resumes after a sequence from before the restore (`if_session_uid`) is then refused with
    SESSION_NOT_FOUND instead of continuing in a different history.
    """
    configure_logging("console", "info")
    try:
        sessions = asyncio.run(
            serve_stores.renew(store, lambda: str(uuid.uuid4()), Database(password_file=store_password_file))
        )
    except StoreOpenError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"sessions with a new uid: {sessions}")

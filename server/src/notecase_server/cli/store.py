"""`notecase store`: what is done to a whole store that no server has open."""

import uuid

import click

from notecase_server import serve_stores
from notecase_server.cli.options import STORE
from notecase_server.store.contract import StoreOpenError


@click.group()
def store() -> None:
    """Change a store that no server has open."""


@store.command()
@STORE
def renew(store: str) -> None:
    """Give every session another uid, after a backup was put back.

    A client that goes on after a sequence it saw before (`if_session_uid`) is then refused with SESSION_NOT_FOUND,
    where it would otherwise go on in another history. Page tokens from before are refused as well.
    """
    try:
        sessions = serve_stores.renew(store, lambda: str(uuid.uuid4()))
    except StoreOpenError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"sessions with another uid: {sessions}")

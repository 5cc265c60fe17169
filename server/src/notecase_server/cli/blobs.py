"""`notecase blobs`: files that messages and state refer to."""

import click
from notecase import Client, v1

from notecase_server.cli import attaching, output, screen, transfer
from notecase_server.cli.ask import ask, name_of
from notecase_server.cli.options import FORCE, OUTPUT, SERVER

BLOB = click.argument("blob", metavar="BLOB")


@click.group()
def blobs() -> None:
    """Upload, show and download content. BLOB is its SHA-256, or blobs/SHA-256."""


@blobs.command("upload")
@click.argument("file", metavar="FILE")
@click.option("--type", "media_type", default="", show_default=False, metavar="TYPE", help="Such as application/pdf.")
@SERVER
def upload_blob(file: str, media_type: str) -> None:
    """Store a file, or for - standard input, and print its name.

    Its media type is that of its name, or text/plain for other text, unless --type says. What no message or state
    refers to is removed after a day or so.
    """

    async def send(client: Client) -> None:
        found = await attaching.upload(client, file, media_type, "with --type")
        click.echo(found.name)

    ask(send)


@blobs.command("show")
@BLOB
@OUTPUT
@SERVER
def show_blob(blob: str, form: str) -> None:
    """Print how large a blob is."""

    async def look(client: Client) -> None:
        found = await client.blobs.GetBlob(v1.GetBlobRequest(name=name_of("blobs", blob)))
        output.print_one(found, form, _show)

    ask(look)


@blobs.command("download")
@BLOB
@click.argument("file", metavar="FILE")
@FORCE
@SERVER
def download_blob(blob: str, file: str, force: bool) -> None:
    """Write the content of a blob to a file, or for - to standard output."""

    async def save(client: Client) -> None:
        with transfer.destination(file, force) as write:
            async for piece in client.download(name_of("blobs", blob)):
                write(piece)

    ask(save)


def _show(found: v1.Blob) -> None:
    output.print_settings(
        found.name, {"size": f"{found.size_bytes} bytes", "media type": screen.one_line(found.media_type)}
    )

"""`notecase blobs`: files that messages and state refer to."""

import click
from notecase import Client, v1

from notecase_server.cli import attaching, output, screen, transfer
from notecase_server.cli.ask import ask, name_of
from notecase_server.cli.options import FORCE, OUTPUT, SERVER

BLOB = click.argument("blob", metavar="BLOB")


@click.group()
def blobs() -> None:
    """Upload, show and download files. BLOB is a file's SHA-256, or blobs/SHA-256."""


@blobs.command("upload")
@click.argument("file", metavar="FILE")
@click.option(
    "--type",
    "media_type",
    default="",
    show_default=False,
    metavar="TYPE",
    help="The media type, such as application/pdf.",
)
@SERVER
def upload_blob(file: str, media_type: str) -> None:
    """Store a file, or standard input with -, and print the blob's name.

    The media type follows from the file's name, or is text/plain for other text, unless --type sets it. Content that no
    message or state refers to is deleted after about a day.
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
    """Print a blob's size."""

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
    """Write the content of a blob to a file, or to standard output with -."""

    async def save(client: Client) -> None:
        with transfer.destination(file, force) as write:
            async for piece in client.download(name_of("blobs", blob)):
                write(piece)

    ask(save)


def _show(found: v1.Blob) -> None:
    output.print_settings(
        found.name, {"size": f"{found.size_bytes} bytes", "media type": screen.one_line(found.media_type)}
    )

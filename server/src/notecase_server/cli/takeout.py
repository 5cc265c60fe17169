"""Writes an exported tenant to a directory."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import click
from google.protobuf.json_format import MessageToDict
from notecase import Client, NotecaseError, v1
from notecase.retry import Backoff, Retry

NAME = re.compile(r"(sessions|blobs)/[a-z0-9][a-z0-9._-]*")


async def save(client: Client, tenant: str, directory: Path) -> None:
    """Makes the directory once all of the tenant (`tenants/{tenant}`) was read; a stream that is cut is gone on with.

    Raises NotecaseError, OSError, and ClickException for a server that sends what no export has."""
    backoff = Backoff(Retry())
    with _whole(directory) as files:
        while True:
            request = v1.ExportTenantRequest(name=tenant, page_token=files.page_token)
            files.rewind()
            try:
                async for record in client.tenants.ExportTenant(request):
                    files.write(record)
                    if record.page_token:
                        backoff.progress()
            except NotecaseError as error:
                await backoff.wait(error)
            else:
                break


@contextmanager
def _whole(directory: Path) -> Iterator["_Files"]:
    """Opens the files of a new directory that becomes `directory` once the block has ended well."""
    part = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        with closing(_Files(part)) as files:
            yield files
        os.sync()
        part.replace(directory)
    except BaseException:
        shutil.rmtree(part)
        raise


class _Files:
    """The files of an export: `index.jsonl` has a line for each record but chunks, `sessions` and `blobs` what these
    are of."""

    def __init__(self, directory: Path) -> None:
        self.page_token = ""
        """Of the newest record at which a stream can begin again."""
        self._directory = directory
        for name in ("sessions", "blobs"):
            (directory / name).mkdir()
        self._index: IO[bytes] = (directory / "index.jsonl").open("wb")
        self._file: IO[bytes] | None = None
        self._safe = 0
        """Bytes of the index before the line of that record."""

    def rewind(self) -> None:
        """Removes the records that a stream from `page_token` sends again."""
        self._index.seek(self._safe)
        self._index.truncate()

    def write(self, record: v1.ExportTenantResponse) -> None:
        kind = record.WhichOneof("record")
        if kind == "chunk":
            if self._file is None:
                raise click.ClickException("The server sent a later part of a file before its beginning.")
            self._file.write(record.chunk)
            return
        self._end_file()
        if record.page_token:
            self.page_token, self._safe = record.page_token, self._index.tell()
        elif kind == "tenant" and self.page_token:
            return  # the first line of the index is there
        if kind in {"session", "blob"}:
            self._file = self._path((record.session if kind == "session" else record.blob).name).open("wb")
        elif kind == "dropped":
            self._path(record.dropped).unlink(missing_ok=True)
        record.ClearField("page_token")
        self._index.write(json.dumps(MessageToDict(record), ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        self._end_file()
        self._index.close()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, name: str) -> Path:
        """Returns where a session or content lies. What a server sends never leads out of the directory."""
        if NAME.fullmatch(name) is None:
            raise click.ClickException("The server sent a session or content with an invalid name.")
        return self._directory / (f"{name}.notecase" if name.startswith("sessions/") else name)

"""A database, or the write-ahead log of a server, on a separate small disk.

    async with small_disk(server) as disk:
        url = disk.url
        await disk.fill()
        ...
        await disk.free()

The disk is a file system in memory. Where this user may not mount one, a trigger raises the error that PostgreSQL
raises on a full disk.
"""

import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg

from tests.support.postgres import SETTINGS, Postgres

MEGABYTES = 24

FILLER = "CREATE TABLE filler (content text); ALTER TABLE filler ALTER content SET STORAGE PLAIN"

FILL = "INSERT INTO filler SELECT repeat('x', 7000) FROM generate_series(1, $1)"
"""So many pages."""

REFUSE = """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = 'disk_full'; END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON events EXECUTE FUNCTION refuse()"""


class Disk:
    """It has room at first."""

    def __init__(self, url: str, admin: Any, is_real: bool) -> None:
        self.url = url
        self._admin = admin
        self._is_real = is_real

    async def fill(self) -> None:
        """Fills it to the last page. A row still has room where its table has."""
        if not self._is_real:
            await self._admin.execute(REFUSE)
            return
        await self._admin.execute(FILLER)
        for pages in (100, 1):
            with suppress(asyncpg.DiskFullError):
                while True:
                    await self._admin.execute(FILL, pages)

    async def free(self) -> None:
        """Makes room again."""
        await self._admin.execute("DROP TABLE filler" if self._is_real else "DROP FUNCTION refuse CASCADE")


@asynccontextmanager
async def small_disk(server: Postgres) -> AsyncIterator[Disk]:
    """Yields an empty database on such a disk."""
    with _mounted(server.uid) as folder:
        url = await server.new_database()
        admin = await asyncpg.connect(server.url())
        try:
            if folder is not None:
                space, database = folder.name, url.partition("?")[0].rpartition("/")[2]
                await admin.execute(f"CREATE TABLESPACE {space} LOCATION '{folder}'")
                await admin.execute(f"ALTER DATABASE {database} SET TABLESPACE {space}")
            within = await asyncpg.connect(url)
            try:
                yield Disk(url, within, folder is not None)
            finally:
                await within.close()
            if folder is not None:
                await admin.execute(f"DROP DATABASE {database} WITH (FORCE)")
                await admin.execute(f"DROP TABLESPACE {space}")
        finally:
            await admin.close()


class Log:
    """The write-ahead log of a server, which has room for a few megabytes of commits at first."""

    def __init__(self, server: Postgres, folder: Path | None) -> None:
        self.server = server
        self._folder = folder

    def break_off(self) -> None:
        """Ends the server as a full log would, where there is no real one."""
        if self._folder is None:
            self.server.stop("immediate")

    def free(self) -> None:
        """Makes room again; the server is back soon."""
        if self._folder is None:
            self.server.start()
        else:
            subprocess.run(["mount", "-o", f"remount,size={4 * MEGABYTES}m", self._folder], check=True)

    @property
    def was_full(self) -> bool:
        return self._folder is None or "PANIC" in (self.server.directory / "data" / "log").read_text()


@contextmanager
def small_log() -> Iterator[Log]:
    """Yields the log of a new server on such a disk. PostgreSQL ends all connections when it finds no room for its log,
    and starts again. Where this user may not mount a disk it is stopped instead."""
    server = Postgres({**SETTINGS, "synchronous_commit": "on"})  # what was answered outlives the server
    try:
        with _mounted(server.uid) as folder:
            if folder is not None:
                server.stop("fast")
                log = server.directory / "data" / "pg_wal"
                subprocess.run(["cp", "-a", f"{log}/.", folder], check=True)
                shutil.rmtree(log)
                log.symlink_to(folder)
                server.start()
            yield Log(server, folder)
            server.stop("immediate")
    finally:
        server.remove()


@contextmanager
def _mounted(uid: int) -> Iterator[Path | None]:
    """Yields the folder of a small file system of that user; None where none may be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="notecase_disk_"))
    options = f"size={MEGABYTES}m,mode=700,uid={uid}"
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        done = None
    try:
        yield None if done is None else folder
    finally:
        if done is not None:
            subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()

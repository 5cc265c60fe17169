"""A real PgBouncer for tests, in transaction mode before the PostgreSQL of this process.

    url = pgbouncer.shared().url(url)

Its connections to a database are fewer than those that a store opens, and go to whichever transaction comes next.
"""

import atexit
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from tests.support import postgres

PROGRAM = "NOTECASE_PGBOUNCER"
"""The variable that names the program, where tests are to go through one."""

SETTINGS = """
[databases]
* = host={server} user=postgres

[pgbouncer]
unix_socket_dir = {folder}
listen_addr =
listen_port = 5432
auth_type = any
pool_mode = transaction
default_pool_size = 4
server_idle_timeout = 5
max_client_conn = 200
log_connections = 0
log_disconnections = 0
{more}
"""

KEEPS = (1, 21)
"""The version from which on it can keep prepared statements."""

STARTS_WITHIN = 60
"""Seconds in which it must listen, on the busiest machine."""


class PgBouncer:
    """A pooler that listens on a socket in a separate folder."""

    def __init__(self, program: str, server: Path) -> None:
        """Starts it before the server whose socket is in the folder `server`."""
        said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
        found = re.search(r"PgBouncer (\d+)\.(\d+)", said)
        assert found is not None, said
        self.keeps_statements = (int(found[1]), int(found[2])) >= KEEPS
        self._folder = Path(tempfile.mkdtemp(prefix="notecase-pgbouncer-"))
        self._folder.chmod(0o777)  # it may run as another user, since it refuses to be root
        settings, log = self._folder / "pgbouncer.ini", self._folder / "log"
        more = "max_prepared_statements = 200" if self.keeps_statements else ""
        settings.write_text(SETTINGS.format(server=server, folder=self._folder, more=more))
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [program, str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user="nobody" if os.geteuid() == 0 else None,
            )
        deadline = time.monotonic() + STARTS_WITHIN
        while not self._listens():
            assert self._process.poll() is None, log.read_text()
            if time.monotonic() > deadline:
                self._process.kill()
                raise TimeoutError(f"PgBouncer does not listen after {STARTS_WITHIN} s: {log.read_text()}")
            time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
            client.connect(str(self._folder / ".s.PGSQL.5432"))
            return True
        return False

    def url(self, url: str) -> str:
        """Returns the URL of the same database by way of the pooler."""
        return urlsplit(url)._replace(query=f"host={self._folder}").geturl()

    def remove(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder)


@cache
def _shared(process: int) -> PgBouncer:
    pooler = PgBouncer(os.environ[PROGRAM], postgres.shared().directory)
    atexit.register(_remove, pooler, process)
    return pooler


def _remove(pooler: PgBouncer, process: int) -> None:
    """Removes it where it was started; a process that was forked leaves it."""
    if os.getpid() == process:
        pooler.remove()


def shared() -> PgBouncer:
    """Returns the pooler of this process, which is started at the first call."""
    return _shared(os.getpid())

"""`notecase` as a process that stops itself, as a SIGSTOP or a machine that sleeps would, at one point of a write to
PostgreSQL: once a file named FREEZE exists, which it removes.

With `--at transaction` as first arguments that is inside of the transaction of the next write that is no commit, before
its COMMIT; with `--at commit` between the reading and the writing of the next commit.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from notecase_server import cli
from notecase_server.store.postgres.commit import CommitTables
from notecase_server.store.postgres.store import PostgresStore

from tests.support.polling import until
from tests.support.server import Spawned

FREEZE = "FREEZING_FILE"


def _freeze() -> None:
    file = Path(os.environ[FREEZE])
    if file.exists():
        file.unlink()
        os.kill(os.getpid(), signal.SIGSTOP)


def _in_transaction() -> None:
    transact: Any = PostgresStore._transact

    async def frozen(self: PostgresStore, step: Callable[[Any, int], Any], *others: Any) -> Any:
        def stopping(tables: Any, now: int) -> Any:
            result = step(tables, now)
            _freeze()
            return result

        return await transact(self, stopping, *others)

    PostgresStore._transact = frozen  # type: ignore[assignment, method-assign]


def _in_commit() -> None:
    flush = CommitTables.flush

    def frozen(self: CommitTables) -> None:
        _freeze()
        flush(self)

    CommitTables.flush = frozen  # type: ignore[method-assign]


POINTS = {"transaction": _in_transaction, "commit": _in_commit}


class Freezing(Spawned):
    """Such a server."""

    file: Path

    @classmethod
    async def launch(cls, at: str, store: str, directory: Path, *arguments: str, **env: str) -> Self:
        """Returns once it serves; its log is in the directory."""
        words = ("--at", at, "serve", "--listen", "127.0.0.1:0", "--store", store, *arguments)
        file = directory / "freeze"
        made = await cls.fork(__name__, words, {FREEZE: str(file), **env}, directory / "log")
        made.file = file
        return made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Whatever a test came to, the process does not outlive it."""
        await self.kill()

    async def frozen(self) -> None:
        """Returns once it has stopped itself."""
        await until(lambda: _state(self.process.pid) == "T")

    async def end(self) -> int:
        """Returns the exit code once it has ended by itself."""
        await self._gone()
        assert self.process.returncode is not None
        return self.process.returncode

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def main() -> None:
    _, point = sys.argv[1:3]
    POINTS[point]()
    del sys.argv[1:3]
    cli.main()

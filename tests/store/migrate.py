"""A process that opens a store and prints each line that it logs, going on when it is given a line.

`python migrate.py PATH ROWS` logs how far a migration is each time that so many rows are done.
"""

import asyncio
import sys
from collections.abc import MutableMapping
from typing import Any, NoReturn

import structlog
from notecase_server.store.sqlite import migration as sqlite_migration
from notecase_server.store.sqlite.store import SqliteStore


def stop(_: object, __: str, facts: MutableMapping[str, Any]) -> NoReturn:
    print(*facts.values(), flush=True)  # noqa: T201
    sys.stdin.readline()
    raise structlog.DropEvent


async def main(path: str, rows: int) -> None:
    sqlite_migration.PROGRESS_ROWS = rows
    structlog.configure(processors=[stop])
    store = await SqliteStore.open(path, lambda: 0)
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))

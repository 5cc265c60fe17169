"""Copies a whole store into an empty one of any kind, table by table in the order of the keys.

A copy that was interrupted goes on behind the last row that it has. At the end the rows of both are compared by a
digest of each table, and only then can the copy be served.
"""

import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.rows import TABLES, Row, StoreRows, Table

BATCH_ROWS = 5000
BATCH_BYTES = 8 << 20
"""What is loaded in one transaction at most, or one row that is larger."""

Progress = Callable[[str, int], None]
"""Gets the name of a table and how many of its rows this process has copied; -1 once the copy's rows are found the same
as the source's."""


async def copy_store(source: StoreRows, target: StoreRows, progress: Progress) -> dict[str, str]:
    """Copies all rows, and returns the digest of each table by its name.

    Raises StoreOpenError when the target is not empty and not an unfinished copy of this source, when the two differ at
    the end, and for all that a store refuses."""
    head = await source.head()
    await target.begin_copy(hashlib.sha256(head.secret).digest())
    for table in TABLES:
        await _copy_table(source, target, table, progress)
    digests = {}
    for table in TABLES:
        expected = await digest(source, table)
        if expected != await digest(target, table):
            text = f"The copy's {table.name} differ from those of the source, which may have been served since the copy"
            raise StoreOpenError(f"{text} was begun. Delete the copy and start again.")
        digests[table.name] = expected
        progress(table.name, -1)
    await target.finish_copy(head)
    return digests


async def digest(store: StoreRows, table: Table) -> str:
    """Returns the SHA-256 of a table's rows in the order of their keys, each as MessagePack; in hexadecimal."""
    found, encode = hashlib.sha256(), msgspec.msgpack.Encoder().encode
    async for row in store.rows(table):
        found.update(encode(row))
    return found.hexdigest()


async def _copy_table(source: StoreRows, target: StoreRows, table: Table, progress: Progress) -> None:
    last, count = await target.last_key(table), 0
    async with aclosing(_batches(source.rows(table, last))) as batches:
        async for batch in batches:
            await target.load(table, batch)
            count += len(batch)
            progress(table.name, count)


async def _batches(rows: AsyncGenerator[Row, None]) -> AsyncGenerator[list[Row], None]:
    batch, size = list[Row](), 0
    async with aclosing(rows):
        async for row in rows:
            batch.append(row)
            size += sum(len(value) for value in row if isinstance(value, str | bytes))
            if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch

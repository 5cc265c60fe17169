"""Opens a store as a user for whom file modes apply, and prints why it was refused."""

import asyncio
import ctypes
import os
import struct
import sys

from notecase_server.store.contract import StoreOpenError
from notecase_server.store.sqlite.store import SqliteStore

CAPABILITY_VERSION_3 = 0x20080522


def drop_capabilities() -> None:
    """Gives up what lets root ignore permissions; for anybody else there is nothing to give up."""
    if os.geteuid() == 0:
        header, nothing = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
        if ctypes.CDLL(None, use_errno=True).capset(header, nothing) != 0:
            raise OSError(ctypes.get_errno(), "capset")


async def main(path: str) -> None:
    drop_capabilities()
    try:
        store = await SqliteStore.open(path, lambda: 0)
    except StoreOpenError as error:
        print(error)  # noqa: T201
    else:
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

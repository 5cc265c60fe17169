"""A process that owns a store and commits to it until it is killed: one line of output for each commit that returned.

`python acknowledge.py PATH hold` opens the store, says so, and waits instead.
"""

import asyncio
import sys
import time
from itertools import count

from notecase import v1
from notecase_server.store.contract import Commit
from notecase_server.store.sqlite.store import SqliteStore

from tests.store.build import session_key


async def main(path: str, hold: bool) -> None:
    store = await SqliteStore.open(path, lambda: time.time_ns() // 1000)
    print("open", flush=True)  # noqa: T201
    if hold:
        await asyncio.Event().wait()
    await asyncio.gather(*(append(store, f"s{number}") for number in range(4)))


async def append(store: SqliteStore, session: str) -> None:
    key = session_key("acme", session)
    known = await store.get_session(key)
    for number in count(known.last_sequence + 1 if known else 1, 2):
        commit = Commit(
            key=key,
            create=v1.Session() if number == 1 else None,
            events=[
                v1.Event(message_added=v1.Message(name=f"m{number}")),
                v1.Event(state_changed=v1.StateChanged(ops=[v1.StateOp(key="n", set=v1.Value(int_value=number + 1))])),
            ],
        )
        committed = await store.commit(commit)
        print(session, committed.session.last_sequence, flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:] == ["hold"]))

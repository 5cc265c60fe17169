"""The heaps of the C library, counted by itself in a separate process."""

import asyncio
import re
import subprocess
import sys
from typing import Any, NoReturn, cast

import pytest
from notecase_server import allocator, serve
from notecase_server.allocator import ARENAS

THREADS = 12

PROGRAM = f"""
import ctypes, sys, threading
from notecase_server import allocator

allocator.share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
together = threading.Barrier({THREADS})

def allocate():
    together.wait()
    libc.malloc(ctypes.c_size_t(1 << 16))
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range({THREADS})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
stream = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, stream)
libc.fclose(stream)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_info is glibc's")
def test_threads_share_a_few_heaps() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert len(re.findall(r'<heap nr="\d+">', done.stdout)) == ARENAS


def test_a_server_shares_them_unless_its_operator_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = list[str]()

    def stopped(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(allocator, "share_arenas", lambda: shared.append("shared"))
    monkeypatch.setattr(asyncio, "Runner", stopped)
    for given in ("", "5"):
        monkeypatch.setenv("MALLOC_ARENA_MAX", given)
        with pytest.raises(KeyboardInterrupt):
            serve.run(cast("Any", None))
    assert shared == ["shared"]

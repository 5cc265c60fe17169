"""The heaps of the C library, counted by itself in a process of their own."""

import re
import subprocess
import sys

import pytest

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
@pytest.mark.parametrize(("environment", "most"), [({}, 2), ({"MALLOC_ARENA_MAX": "5"}, 5)])
def test_threads_share_a_few_heaps(environment: dict[str, str], most: int) -> None:
    """As many as an operator says, where one does."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    heaps = re.findall(r'<heap nr="\d+">', done.stdout)
    assert len(heaps) == most

"""Ports for servers that start again on the port that they had."""

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """Finds a port at which nothing listens, below those that Linux gives away (from 32768 on): it stays free while its
    server is down."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as taken, suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port

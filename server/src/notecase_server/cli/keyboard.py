"""Handles the keyboard during a reply: Ctrl-C, and keys that must not be shown."""

import asyncio
import contextlib
import signal
import sys
import termios
from collections.abc import Callable, Iterator


def catch_interrupt(act: Callable[[], None]) -> None:
    """Calls `act` at Ctrl-C from now on. A prompt takes Ctrl-C for itself, so this is to be called again after one."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, act)


@contextlib.contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` at Ctrl-C during the block; afterwards Ctrl-C ends the command again."""
    catch_interrupt(act)
    try:
        yield
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def hushed(terminal: bool) -> Iterator[None]:
    """Hides the keys pressed during the block, so that they do not show in the middle of a reply; the next prompt gets
    them."""
    if not terminal:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = before.copy()
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

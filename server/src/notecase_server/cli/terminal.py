"""The terminal of a conversation: its line editor, its menus, and Ctrl-C while a reply comes."""

import asyncio
import contextlib
import signal
import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts.choice_input import ChoiceInput

from notecase_server.cli import screen


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


def prompt(said: Iterable[str], sign: str = screen.PROMPT) -> PromptSession[str]:
    """Makes an editor for a line, or for several when they are pasted or made with Alt-Enter. The arrow keys recall
    what was `said`, given newest first. Its prompts raise EOFError at Ctrl-C and Ctrl-D."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        [("bold ansicyan", sign)],
        prompt_continuation=screen.CONTINUED,
        history=InMemoryHistory(list(said)[::-1]),
        key_bindings=keys,
        enable_suspend=True,
        interrupt_exception=EOFError,
    )


async def line(sign: str, default: str = "") -> str:
    """Returns what the user types after the sign, or makes of the default. Raises EOFError at Ctrl-C and Ctrl-D."""
    typed = await prompt([], sign).prompt_async(default=default)
    return typed.strip().encode(errors="replace").decode()


async def choose(question: str, labels: Sequence[str]) -> int:
    """Returns the index of the label chosen with the arrow keys or its number. Raises EOFError at Ctrl-C and Ctrl-D."""
    keys = KeyBindings()

    @keys.add("c-d")
    def _(event: KeyPressEvent) -> None:
        event.app.exit(exception=EOFError())

    menu = ChoiceInput(
        message=question, options=list(enumerate(labels)), interrupt_exception=EOFError, key_bindings=keys
    )
    return await menu.prompt_async()

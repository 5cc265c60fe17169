"""The terminal of a conversation: its line editor and its menus."""

from collections.abc import Iterable, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts.choice_input import ChoiceInput

from notecase_server.cli import screen


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

"""The terminal of a conversation: its line editor and its menus."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.typeahead import clear_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout import FormattedTextControl, Layout, Window

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


async def typed(editor: PromptSession[str], default: str, until: Coroutine[Any, Any, bool] | None) -> str | None:
    """Returns the text that the user types into the editor, or makes of the default. When `until` returns True first,
    erases the prompt and returns None; `editor.default_buffer.text` is then the text typed so far. Raises EOFError."""
    if until is None:
        return await editor.prompt_async(default=default)

    async def give_way() -> None:
        app = editor.app
        if await until and app.future is not None and not app.future.done():
            app.erase_when_done = True
            app.exit()

    waiting = asyncio.create_task(give_way())
    try:
        return await editor.prompt_async(default=default)
    finally:
        editor.app.erase_when_done = False
        waiting.cancel()
        await asyncio.wait([waiting])
        until.close()


async def line(sign: str, default: str = "", unasked: bool = False) -> str:
    """Returns the text that the user types after the sign, or makes of the default. If the user did not request this
    prompt (`unasked`), keys pressed before it is drawn have no effect. Raises EOFError at Ctrl-C and Ctrl-D."""
    editor = prompt([], sign)
    if unasked:
        _drop_earlier(editor.app)
    text = await editor.prompt_async(default=default)
    return text.strip().encode(errors="replace").decode()


def _drop_earlier(app: Application[Any]) -> None:
    """Drops the keys that are pressed before the application is drawn: they were not meant for it."""
    drawn = False

    def drop(_: Application[Any]) -> None:
        nonlocal drawn
        while not drawn and (pressed := app.input.read_keys()):
            # The terminal itself answers where its cursor is; without that answer a menu is not placed.
            app.key_processor.feed_multiple([key for key in pressed if key.key is Keys.CPRResponse])
            app.key_processor.process_keys()
        drawn = True

    clear_typeahead(app.input)
    app.before_render += drop


async def choose(question: str, labels: Sequence[str], start: int = 0) -> int:
    """Returns the index of the label chosen with the arrow keys or its number, and Enter; it begins at `start`. Other
    keys do nothing, and neither do keys that were pressed before the menu was drawn.

    Raises EOFError at Ctrl-C and Ctrl-D."""
    at = start
    keys = KeyBindings()

    def shown() -> StyleAndTextTuples:
        lines: StyleAndTextTuples = [("", f" {question}\n")] if question else []
        for index, label in enumerate(labels):
            sign, style = (">", "bold") if index == at else (" ", "")
            lines.append((style, f"   {sign} {index + 1:2d}. {label}"))
            lines.append(("", "\n"))
        return lines[:-1]

    @keys.add("up")
    @keys.add("down")
    def _(event: KeyPressEvent) -> None:
        nonlocal at
        step = -1 if event.key_sequence[0].key is Keys.Up else 1
        at = min(max(at + step, 0), len(labels) - 1)

    @keys.add(Keys.Any)
    def _(event: KeyPressEvent) -> None:
        nonlocal at
        if event.data in map(str, range(1, min(len(labels), 9) + 1)):
            at = int(event.data) - 1

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.app.exit(result=at)

    @keys.add("c-c")
    @keys.add("c-d")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        event.app.exit(exception=EOFError())

    control = FormattedTextControl(shown, focusable=True, show_cursor=False)
    layout = Layout(Window(control, wrap_lines=True, dont_extend_height=True))
    menu = Application[int](layout=layout, key_bindings=keys)
    _drop_earlier(menu)
    return await menu.run_async()

"""Prints a run as its events arrive: in a pipe only the reply, and at a terminal everything."""

import click
from notecase import RunStream, v1

from notecase_server.cli import screen

WORDS = {"text", "json", "refusal", "reasoning"}
"""The kinds of blocks that are shown as they come."""


class Reply:
    """A run in a pipe. The reply goes to standard output, unchanged, with a line break after each message; everything
    else goes to standard error. Printed text stays: when a model call is repeated, a line says so and the reply starts
    again."""

    def __init__(self, stream: RunStream, echo: bool = False) -> None:
        """With `echo` the user's messages are shown, too; where they have just been typed they are not."""
        self._stream = stream
        self._echo = echo
        self._shown: dict[tuple[str, int], int] = {}
        self._block: tuple[str, int] | None = None

    def start(self) -> None:
        """Shows that a reply is awaited. May be called again after `end`."""

    def end(self) -> None:
        """Ends the current output, so that others can write. May be called twice."""
        self._close()

    def show(self, event: v1.Event) -> None:
        """Shows the next event of the stream, once the stream's view has it."""
        delta, added = event.block_delta, event.message_added
        match event.WhichOneof("payload"):
            case "block_delta":
                if block := self._stream.view.open.get(delta.message, {}).get(delta.block):
                    self._grow((delta.message, delta.block), block.kind, block.text)
            case "message_added":
                self._add(added)
            case "message_discarded":
                if any(name == event.message_discarded.message for name, _ in self._shown):
                    self.note("The model call is repeated; the reply starts over.")
            case "tool_started":
                self.begin_call(event.tool_started)
            case "tool_finished":
                self.finish_call(event.tool_finished)
            case "summarized":
                self.note(screen.summarized(event.summarized))
            case "tools_unavailable":
                server = screen.one_line(event.tools_unavailable.server)
                self.note(f"The tools of {server} are unavailable: {event.tools_unavailable.error.message}")
            case "run_state_changed":
                self._change(event.run_state_changed)

    def note(self, text: str) -> None:
        """Prints a line about the conversation, outside of it."""
        self._close()
        screen.aside(screen.harmless(text))

    def begin_call(self, call: v1.ToolCall) -> None:
        """A call of a tool was dispatched."""

    def finish_call(self, call: v1.ToolCall) -> None:
        """A call of a tool has its outcome."""
        self.note(screen.call(call))

    def write_user(self, message: v1.Message) -> None:
        """Prints a message of a user or of the system."""
        click.echo(f"{screen.message(message)}\n")

    def write(self, kind: str, piece: str) -> None:
        """Writes a further piece of the open block."""
        if kind != "reasoning":
            click.echo(piece, nl=False)

    def close_block(self) -> None:
        """Ends the open block."""
        click.echo()

    def _close(self) -> None:
        if self._block is not None:
            self._block = None
            self.close_block()

    def _add(self, added: v1.Message) -> None:
        if added.role != v1.Message.ROLE_ASSISTANT:
            if self._echo:
                self._close()
                self.write_user(added)
            return
        for index, part in enumerate(added.parts):
            kind = part.WhichOneof("kind") or ""
            if kind == "tool_call":
                if part.tool_call.outcome not in {v1.ToolCall.OUTCOME_PENDING, v1.ToolCall.OUTCOME_RUNNING}:
                    self.finish_call(part.tool_call)
            elif kind in {"blob", "file"}:
                self.note(screen.content(part))
            else:
                self._grow((added.name, index), kind, part.reasoning.text or part.refusal or part.text or part.json)
            for source in screen.sources(part):
                self.note(source)
        self._close()
        if added.finish_reason == "length":
            self.note("The model stopped at its token limit.")

    def _grow(self, block: tuple[str, int], kind: str, text: str) -> None:
        """Shows the part of a block that is not on the screen yet."""
        shown = self._shown.get(block, 0)
        if len(text) <= shown or kind not in WORDS:
            return
        self._shown[block] = len(text)
        if kind == "reasoning" and not self.shows_reasoning:
            return
        if self._block != block:
            self._close()
            self._block = block
        piece = screen.harmless(text[shown:])
        self.write(kind, f"{screen.REFUSED}{piece}" if kind == "refusal" and not shown else piece)

    shows_reasoning = False
    """Whether the model's reasoning is shown, too."""

    def _change(self, changed: v1.RunStateChanged) -> None:
        if changed.state == v1.Run.STATE_CANCELLED:
            self.note(f"Cancelled{': ' if changed.reason else '.'}{screen.one_line(changed.reason, 200)}")
        elif changed.state == v1.Run.STATE_RUNNING and changed.reason:
            self.note(screen.one_line(changed.reason, 200))


class Quiet(Reply):
    """A run of which only the end is printed, not the reply."""

    def write(self, kind: str, piece: str) -> None:
        pass

    def close_block(self) -> None:
        pass

"""A conversation at the terminal or through a pipe. The session is stored, even if the command is killed."""

import contextlib
import difflib
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable

import click
from notecase import Client, NotecaseError, RunStream, text_of, v1
from notecase.names import quoted

from notecase_server.cli import approvals, attaching, named, notes, screen, terminal
from notecase_server.cli.ask import MOST_TEXT, name_of
from notecase_server.cli.connection import Exit, Refusal, connection
from notecase_server.cli.follow import Follower, Left
from notecase_server.cli.left import LeftRun

HELP = """\
/notes            shows the session's state
/note KEY VALUE   sets a key of it: to JSON if VALUE is JSON, else to text
/attach FILE      attaches a file to your next message
/approvals        shows which tools need no approval any more, and takes that back
/quit             exits, like Ctrl-C and Ctrl-D
Everything else is sent to the agent, also commands after a space: ` /help` asks the model.
Ctrl-C stops a reply, Alt-Enter starts a new line."""

COMMANDS = ("/help", "/notes", "/note", "/attach", "/approvals", "/quit")

INSTRUCTION = "You are a helpful assistant. Answer briefly."
"""The instruction of the agent that is made when there is none and the user gives it none."""

OFFERED = 9
"""How many choices a menu has at most: as many as there are digits to choose by."""

SHOWN = 6
"""How many messages of a resumed session are shown, as a reminder."""

SHOWN_CHARACTERS = 600
"""How much of each of them is shown, so that they fit on one screen."""


async def converse(client: Client, agent: str, session: str, new: bool, patience: float | None) -> int:
    """Talks until the user leaves or the input ends, and returns the exit code: 1 when a message from a pipe had no
    reply, since no user saw the reason. `agent` and `session` are ids or names, or empty; see the command's help. A run
    may wait for `patience` seconds; see Follower. Raises Refusal when it waits longer and there is no terminal, and
    NotecaseError when no conversation can begin."""
    # asyncio's own handler would wait for the task to yield, which a read from a pipe does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chat = _Chat(client, patience)
    try:
        await chat.open(agent, session, new)
    except EOFError:
        return 0
    return await chat.talk()


class _Chat:
    """One conversation. Its session is made with the first thing that is said, so that looking in leaves nothing."""

    def __init__(self, client: Client, patience: float | None) -> None:
        self._client = client
        self._patience = patience
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._session = ""
        self._agent = ""  # empty: the session's own
        self._said: list[str] = []
        self._attached: list[v1.Blob] = []
        self._failed = False
        self._left: LeftRun | None = None

    async def open(self, agent: str, session: str, new: bool) -> None:
        """Finds the session and the agent. Raises EOFError when the user would rather leave."""
        if agent:
            self._agent = name_of("agents", agent)
            await self._client.agents.GetAgent(v1.GetAgentRequest(name=self._agent))
        if session and not new:
            await self._resume(await named.session(self._client, session))
        elif self._terminal and not new and (picked := await self._pick_session()):
            await self._resume(picked)
        else:
            self._agent = self._agent or await self._pick_agent()
            if session:
                await self._create(session_id=screen.id_of(session))
            self._tell(f"{self._agent} answers. /help lists the commands.\n")

    async def talk(self) -> int:
        """Hears and answers; see `converse`."""
        async for text in self._heard():
            if text == "/quit":
                break
            await self._attempt(self._heed(text))
            self._tell("")
        if self._session:
            self._tell(f"`notecase chat --session {screen.id_of(self._session)}` continues this conversation.")
        return 1 if self._failed and not self._terminal else 0

    async def _heard(self) -> AsyncIterator[str]:
        """Yields the user's messages without blank ones."""
        if not self._terminal:
            # Nothing else goes on between replies, so the loop may as well wait.
            while line := sys.stdin.readline(MOST_TEXT + 1):
                if len(line) > MOST_TEXT:
                    problem = f"A line of standard input has more than {MOST_TEXT} characters."
                    raise Refusal(problem, Exit.USAGE)
                if line.strip():
                    yield line.rstrip()
            return
        prompt, draft = terminal.prompt(self._said), ""
        while True:
            try:
                text = await terminal.typed(prompt, draft, self._left.settled() if self._left else None)
            except EOFError:
                return
            draft = prompt.default_buffer.text if text is None else ""
            if text is None:
                await self._attempt(self._catch_up())
            elif text.strip():
                yield text.rstrip().encode(errors="replace").decode()

    async def _attempt(self, deed: Awaitable[None]) -> None:
        """Prints the service's errors in its own sentences. Raises NotecaseError when the server is lost and there is
        no terminal, since no user could repeat the message."""
        try:
            await deed
        except NotecaseError as error:
            if not error.reason and not self._terminal:
                raise
            self._fail(screen.sentence(error, connection()[0]))

    async def _heed(self, text: str) -> None:
        command, _, rest = text.partition(" ")
        if text == "/help":
            screen.aside(HELP)
        elif text == "/notes":
            await self._show_notes()
        elif text == "/approvals":
            await approvals.review(self._client, self._session)
        elif command == "/note":
            await self._put_note(rest)
        elif command == "/attach":
            await self._attach(rest.strip())
        elif self._terminal and (near := difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.7)):
            await self._ask_if_meant(text, near[0])
        else:
            await self._say(text)

    async def _ask_if_meant(self, text: str, command: str) -> None:
        """Says what looks like a mistyped command only if the user agrees."""
        labels = ["Send it to the agent", "Do nothing; the up arrow recalls your text"]
        question = f"{screen.one_line(text, 40)} is not a command; {command} is."
        with contextlib.suppress(EOFError):
            if await terminal.choose(question, labels, start=1) == 0:
                await self._say(text)

    async def _say(self, text: str) -> None:
        if not self._session:
            await self._create(screen.one_line(text))
        if self._left and await self._left.goes_on():
            await self._catch_up()
        self._tell("")
        parts = [v1.Part(text=text), *(v1.Part(blob=blob) for blob in self._attached)]
        stream = self._client.run(v1.Message(parts=parts), session=self._session, agent=self._agent)
        try:
            await self._follow(stream)
        except NotecaseError as busy:
            if busy.reason == "AGENT_NOT_FOUND" and not self._agent:
                self._fail(f"{screen.sentence(busy, '')} `notecase chat --agent` chooses another.")
                return
            if busy.reason != "RUN_ACTIVE" or not self._terminal:
                raise
            screen.aside("The session is busy with this run. When it has ended, the up arrow recalls your text.\n")
            await self._follow(self._client.attach(busy.metadata["run"]), echo=True)
        finally:
            if stream.name:  # the session has the message, whatever became of its run
                self._attached.clear()

    async def _catch_up(self) -> None:
        """Shows what happened in the run that was left waiting."""
        if self._left:
            await self._follow(self._left.stream(), echo=True)
            self._tell("")

    async def _attach(self, path: str) -> None:
        if not path:
            self._fail("Attach a file with /attach FILE.")
            return
        if path == "-":
            path = "./-"  # standard input has the conversation
        try:
            blob = await attaching.upload(self._client, *attaching.split(_at_home(path)))
        except Refusal as refusal:
            self._fail(refusal.message)
        else:
            self._attached.append(blob)
            screen.aside(f"{screen.attachment(blob)} is attached to your next message.")

    async def _show_notes(self) -> None:
        held = await self._client.get_state(self._session) if self._session else {}
        for key, value in sorted(held.items()):
            click.echo(f"{screen.one_line(key)} = {screen.note(value)}")
        if not held:
            screen.aside(notes.NOTHING)

    async def _put_note(self, note: str) -> None:
        key, _, given = note.strip().partition(" ")
        if not given:
            self._fail("Set a note with /note KEY VALUE.")
            return
        if not self._session:
            await self._create()
        try:
            value = notes.parse(given.strip())
            await self._client.put_state(self._session, key, value)
        except notes.CANNOT:
            self._fail(notes.CANNOT_HOLD)
        else:
            screen.aside(f"{screen.one_line(key)} = {screen.note(value)}")

    async def _create(self, display_name: str = "", session_id: str = "") -> None:
        """Creates the session, named after its first words so that it is found again in a list."""
        agent = self._agent.partition("@")[0]
        made = await self._client.create_session(agent, session_id=session_id, display_name=display_name)
        self._session = made.name
        if not self._terminal:
            screen.aside(f"{made.name} with {self._agent}")

    async def _resume(self, name: str) -> None:
        session = await self._client.sessions.GetSession(v1.GetSessionRequest(name=name))
        self._session = session.name
        if not session.agent and not self._agent:
            self._agent = await self._pick_agent()
        if not self._terminal:
            return
        title = screen.one_line(session.display_name) or session.name
        self._tell(f"{title}: {self._agent or session.agent} answers. /help lists the commands.\n")
        await self._show_history(session)
        if session.active_run:
            await self._attempt(self._follow(self._client.attach(session.active_run), echo=True))
            self._tell("")

    async def _show_history(self, session: v1.Session) -> None:
        """Shows the last messages, except those of the active run, which its stream shows. The arrow keys recall what
        the user said in that page."""
        request = v1.ListMessagesRequest(parent=session.name, order_by="sequence desc")
        page = (await self._client.messages.ListMessages(request)).messages
        past = [message for message in page if not message.run or message.run != session.active_run]
        for message in reversed(past[:SHOWN]):
            click.echo(f"{screen.message(message, SHOWN_CHARACTERS)}\n")
        self._said = [text_of(message) for message in page if message.role == v1.Message.ROLE_USER]

    async def _pick_session(self) -> str:
        """Returns the name of the session to resume; empty for a new one."""
        agent = self._agent.partition("@")[0]
        request = v1.ListSessionsRequest(page_size=OFFERED - 1, filter=f"agent = {quoted(agent)}" if agent else "")
        found = (await self._client.sessions.ListSessions(request)).sessions
        if not found:
            return ""
        rows = [
            (
                screen.one_line(one.display_name, 40) or screen.id_of(one.name),
                screen.id_of(one.agent),
                screen.moment(one.update_time),
                "waits" if one.activity == v1.Session.ACTIVITY_WAITING else "",
            )
            for one in found
        ]
        picked = await terminal.choose("Which session?", ["A new one", *screen.aligned(rows)])
        return found[picked - 1].name if picked else ""

    async def _pick_agent(self) -> str:
        """Returns the name of the only agent, or of the one that the user chooses or creates. Raises ClickException
        without a terminal."""
        found = (await self._client.agents.ListAgents(v1.ListAgentsRequest(page_size=OFFERED))).agents
        if len(found) == 1:
            return found[0].name
        if found and self._terminal:
            rows = [(screen.id_of(one.name), screen.one_line(one.display_name, 40)) for one in found]
            return found[await terminal.choose("Which agent?", screen.aligned(rows))].name
        if found:
            ids = ", ".join(screen.id_of(one.name) for one in found)
            raise click.ClickException(f"There are several agents ({ids}); choose one with --agent.")
        if not self._terminal:
            raise click.ClickException("There is no agent yet; create one with `notecase agents create`.")
        return await self._make_agent()

    async def _make_agent(self) -> str:
        click.echo(
            f"There is no agent yet. What should a new one do? Describe it in one line,\nor press Enter for: "
            f"{INSTRUCTION}\n"
        )
        instruction = (await terminal.prompt([]).prompt_async()).strip() or INSTRUCTION
        agent = v1.Agent(display_name="Assistant", llm=v1.LlmAgent(instruction=instruction))
        request = v1.CreateAgentRequest(agent_id="assistant", agent=agent, request_id=uuid.uuid4().hex)
        made = await self._client.agents.CreateAgent(request)
        self._tell("")
        return made.name

    async def _follow(self, stream: RunStream, echo: bool = False) -> None:
        """Shows a run up to its end, or until the user leaves it waiting. Raises NotecaseError, also when the run
        fails, and Refusal when it waits and there is no terminal."""
        self._left = None
        try:
            await Follower(self._client, stream, echo=echo, patience=self._patience).follow()
        except Left as left:
            if not self._terminal:
                raise Refusal(str(left), Exit.WAITING) from None
            screen.aside(str(left))
            self._left = LeftRun(self._client, left.waits, stream.last_sequence)

    def _fail(self, text: str) -> None:
        screen.failure(text)
        self._failed = True

    def _tell(self, text: str) -> None:
        """Says something that helps only at a terminal."""
        if self._terminal:
            screen.aside(text)


def _at_home(path: str) -> str:
    """Expands `~`, since no shell does so for text typed at a prompt."""
    return os.path.expanduser(path)

"""What a run waits for, and who may answer it."""

from collections.abc import Iterable
from typing import NamedTuple

from notecase import Client, NotecaseError, v1

from notecase_server.cli import screen
from notecase_server.cli.connection import Exit, Refusal

APPROVAL = v1.InputRequest.KIND_APPROVAL
QUESTION = v1.InputRequest.KIND_QUESTION
INTERRUPTED = v1.InputRequest.KIND_INTERRUPTED_CALL

_RANKS = {
    v1.Tool.APPROVER_USER: 0,
    v1.Tool.APPROVER_UNSPECIFIED: 1,
    v1.Tool.APPROVER_DEVELOPER: 2,
    v1.Tool.APPROVER_ADMIN: 3,
}

_WHO = {
    v1.Tool.APPROVER_USER: "a user",
    v1.Tool.APPROVER_UNSPECIFIED: "a caller that is not bound to a user",
    v1.Tool.APPROVER_DEVELOPER: "a developer or an admin",
    v1.Tool.APPROVER_ADMIN: "an admin",
}


_PHRASES = {
    APPROVAL: "an approval",
    QUESTION: "a question",
    INTERRUPTED: "an interrupted call",
    v1.InputRequest.KIND_UNSPECIFIED: "a caller's tool",
}

_COMMANDS = {APPROVAL: "`notecase approve` or `notecase deny`", INTERRUPTED: "`notecase approve`"}
"""What answers each kind; `notecase answer` the others."""


class Wait(NamedTuple):
    """One thing that a run waits for: an input of a person, or the result of a caller's tool."""

    run: str
    """sessions/{session}/runs/{run}"""
    asked: v1.InputRequest | None
    """None for a caller's tool."""
    call: v1.ToolCall
    """The call that is asked about or was dispatched; empty for a question of the model."""

    @property
    def id(self) -> str:
        """The input_id, or the call_id of a caller's tool."""
        return self.asked.input_id if self.asked else self.call.call_id

    @property
    def kind(self) -> v1.InputRequest.Kind.ValueType:
        """Unspecified for a caller's tool."""
        return self.asked.kind if self.asked else v1.InputRequest.KIND_UNSPECIFIED

    @property
    def kind_word(self) -> str:
        return screen.word_of(v1.InputRequest.Kind, self.kind).replace("_", " ") if self.asked else "tool"

    @property
    def phrase(self) -> str:
        """What kind of thing it is, with its article."""
        return _PHRASES[self.kind]

    @property
    def of_tool(self) -> bool:
        """Whether it is a question of a running tool."""
        return self.kind == QUESTION and self.call.outcome == v1.ToolCall.OUTCOME_RUNNING

    @property
    def who(self) -> str:
        """The least caller that may answer."""
        return "" if self.asked is None or self.kind == QUESTION else _WHO.get(self.asked.approver, "another caller")

    @property
    def question(self) -> str:
        """What a question asks; a model may leave its words out."""
        prompt = self.asked.prompt if self.asked else ""
        return prompt if prompt.strip() else "The model asks a question without text."

    def describe(self, most: int = 200) -> str:
        """Returns what the run waits for, on one line."""
        if self.asked is not None and self.kind == QUESTION:
            return screen.one_line(self.question, most)
        return screen.one_line(screen.called(self.call), most)


def waits_of(run: v1.Run) -> list[Wait]:
    """Returns what a run waits for: first approvals and questions, then calls of callers' tools."""
    asked = [Wait(run.name, one, one.call) for one in run.pending_inputs]
    return [*asked, *(Wait(run.name, None, call) for call in run.pending_calls)]


async def caller_of(client: Client) -> v1.ServerInfo.Caller | None:
    """Returns the role and the user of this command's credential; None on a server without credentials."""
    info = await client.server.GetServerInfo(v1.GetServerInfoRequest())
    return info.caller if info.HasField("caller") else None


def may_answer(caller: v1.ServerInfo.Caller | None, wait: Wait) -> bool:
    """Returns whether the service would take an answer of that caller."""
    if caller is None or wait.asked is None or wait.kind == QUESTION:
        return True
    if caller.user:
        counts = v1.Tool.APPROVER_USER
    elif caller.role == v1.Key.ROLE_ADMIN:
        counts = v1.Tool.APPROVER_ADMIN
    elif caller.role == v1.Key.ROLE_DEVELOPER:
        counts = v1.Tool.APPROVER_DEVELOPER
    else:
        counts = v1.Tool.APPROVER_UNSPECIFIED
    return _RANKS.get(wait.asked.approver, len(_RANKS)) <= _RANKS[counts]


async def find(client: Client, session: str, run: str, wanted: str, kinds: Iterable[int]) -> Wait:
    """Returns the input or call of these kinds whose id begins with `wanted`, or the only one. Without a run, looks in
    the session's active run. Raises Refusal when there is none, and when there are several and none is named."""
    if not run:
        found = await client.sessions.GetSession(v1.GetSessionRequest(name=session))
        run = found.active_run
    waits = waits_of(await client.runs.GetRun(v1.GetRunRequest(name=run))) if run else []
    meant = [wait for wait in waits if wait.id == wanted] or [wait for wait in waits if wait.id.startswith(wanted)]
    matching = [wait for wait in meant if wait.kind in kinds]
    if len(matching) == 1:
        return matching[0]
    if meant and not matching:
        other = meant[0]
        use = _COMMANDS.get(other.kind, "`notecase answer`")
        raise Refusal(f"{run} waits for {other.phrase}; use {use}.", Exit.FAILED)
    if not matching:
        what = f"Nothing waits with the id {wanted!r}" if wanted else "Nothing waits"
        raise Refusal(f"{what} in {run or session}; see `notecase inbox`.", Exit.FAILED)
    ids = "\n".join(f"  {wait.id}  {wait.kind_word}  {wait.describe(60)}" for wait in matching)
    raise Refusal(f"Several wait in {run}; choose one with --id:\n{ids}", Exit.USAGE)


def too_late(error: NotecaseError) -> bool:
    """Returns whether an answer came after another one, or after the end of its run."""
    return error.reason in {"INPUT_NOT_PENDING", "CALL_NOT_PENDING", "RUN_ENDED", "REQUEST_ID_REUSED"}

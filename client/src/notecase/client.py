"""The client of a notecase server: all calls as typed stubs, and the common ones as methods."""

import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from notecase import v1
from notecase.agents import Local, split
from notecase.arguments import duration, made, message, shown
from notecase.calls import Turns
from notecase.commands import Commands
from notecase.connection import Connection, Token
from notecase.errors import as_written
from notecase.hints import dump, of_output
from notecase.names import Named, OnBusy, choice, name_of
from notecase.pages import Listing, each
from notecase.reply import Parsed, Reply
from notecase.retry import Retry, repeat
from notecase.sessions import Sessions
from notecase.stream import RunStream
from notecase.tools import Tool, as_tools
from notecase.values import Plain, to_message, to_values
from notecase.waits import sentence, unanswered

if TYPE_CHECKING:
    from notecase.content import Contents


DURABLE = v1.WatchOptions(durable_only=True)


class RunWaiting(Exception):
    """Raised by `Client.invoke` when its run waits for a person, or for a tool in another process.

    It is not a `NotecaseError`: the run has not failed. It continues once it is answered, and `attach(error.run)`
    follows it to its reply."""

    def __init__(self, run: v1.Run, waits: dict[str, str] | None = None) -> None:
        """`waits` describes what the run waits for, by input_id or call_id; by default everything that it waits for."""
        super().__init__(run, waits)
        self._waits = unanswered(run, ()) if waits is None else waits
        self.run = run
        """The run as it was then, with its `pending_inputs` and `pending_calls`."""

    def __str__(self) -> str:
        return sentence(self.run, self._waits)


class Client(Commands, Sessions):
    """A client of one server, for the event loop in which it makes its first call:

        async with Client("127.0.0.1:7420") as client:
            reply = await client.invoke("Where is the violin?", agent="detective")

    The methods make the common calls. Each sends a request_id, a command_id or a run_id, so that a repeat has no second
    effect, and is retried as `retry` says while the connection is broken or the server is unavailable; use
    `asyncio.timeout` to limit its time. The methods of `Commands` send commands to a run, for example
    `client.approve(run, run.pending_inputs[0].input_id)`. Agents, sessions and users are named by their id
    ("detective"), by their name ("agents/detective"), or by the message that the service returned for them.

    `agents`, `sessions`, `state`, `messages`, `runs`, `blobs`, `keys`, `audit`, `tenants` and `server` are generated
    stubs. Each call takes its `v1` request and optionally `timeout=` (seconds) or `metadata=`, raises `NotecaseError`,
    and is not retried. Its result is awaited or iterated like grpc's own calls, but is not an instance of their
    classes.

    `token` is sent with every call: a key, or the token of an identity provider. A function is called for it before
    each call; it may be asynchronous, and should return the same token until that expires. A stream whose token has
    expired continues with the next one.

    Connections to this machine use TLS only if `ca` is given: a file of CA certificates in PEM, or its bytes.
    Connections to other machines use TLS with `ca` or with grpc's default CA certificates; `plaintext` turns TLS off,
    and the `token` is then sent unencrypted. `credentials` are grpc's own and replace all of this, for example with a
    client certificate: `grpc.ssl_channel_credentials(ca, key, certificate)`.

    `target` is HOST:PORT, or HOST for port 7420. The defaults of `target`, `token` and `ca` are the variables
    NOTECASE_ADDRESS, NOTECASE_TOKEN and NOTECASE_CA, and then 127.0.0.1:7420. `options` are grpc channel options and
    override the client's own.

    Raises ValueError for a target that is not an address and for a token that cannot be sent, OSError for a file of
    `ca` that cannot be read.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: Token | None = None,
        ca: str | PathLike[str] | bytes | None = None,
        plaintext: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
        retry: Retry | None = None,
    ) -> None:
        self._connection = Connection(
            target, token=token, ca=ca, plaintext=plaintext, credentials=credentials, options=options
        )
        self._retry = _policy(retry)
        channel = self._connection.channel
        self.agents = v1.AgentServiceStub(channel)
        self.sessions = v1.SessionServiceStub(channel)
        self.state = v1.StateServiceStub(channel)
        self.messages = v1.MessageServiceStub(channel)
        self.runs = v1.RunServiceStub(channel)
        self.server = v1.ServerServiceStub(channel)
        self.blobs = v1.BlobServiceStub(channel)
        self.keys = v1.KeyServiceStub(channel)
        self.audit = v1.AuditServiceStub(channel)
        self.tenants = v1.TenantServiceStub(channel)
        self._turns = Turns()
        self._local: dict[str, Local] = {}
        self._declared: dict[str, frozenset[str]] = {}  # functions by agents/{agent}@{revision}
        super().__init__(self.runs, self._retry)

    @cached_property
    def _contents(self) -> "Contents":
        from notecase.content import Contents  # noqa: PLC0415 - most programs need none, and it takes 3 ms

        return Contents(self.blobs, self._retry)

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return self._connection.address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection and every call on it. Runs continue in the server. May be called twice."""
        await self._connection.close()

    async def put_agent(
        self,
        agent: str,
        instruction: str = "",
        *,
        tools: Iterable[Callable[..., Any] | Tool | v1.Tool | Mapping[str, Any]] | None = None,
        output: Any = None,
        model: str = "",
        provider: str = "",
        generation: v1.Generation | Mapping[str, Any] | None = None,
        context: v1.Context | Mapping[str, Any] | None = None,
        max_model_calls: int = 0,
        fallbacks: Iterable[v1.Fallback] = (),
        output_key: str = "",
        display_name: str = "",
        description: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> v1.Agent:
        """Creates an agent, or its next revision when something differs.

            def search(what: str) -> list[str]:
                \"""Searches yesterday's papers.\"""

            await client.put_agent("detective", "You are a detective.", tools=[search])

        Functions in `tools` are declared by the agent, and this client executes their calls in every run that it starts
        with the agent: see `Tool`. A `v1.Tool`, or a mapping of its fields, declares what the server runs: `{"name":
        "ask", "server": {"function": "ask_user"}}`. `output` is a dataclass, a TypedDict or a pydantic model: replies
        are JSON of that type, which `Reply.parsed` returns in this client. `generation` and `context` may be mappings
        of their fields: `generation={"temperature": 0.2}`. `instruction` is a template over state; for this and the
        rest see `v1.LlmAgent` and `v1.Agent`.

        Raises TypeError for a function or an output that has no JSON Schema, ValueError for a mapping with a field that
        does not exist, and NotecaseError TEMPLATE_ERROR or INVALID_FIELD when the server refuses the agent."""
        definitions, local = split(tools, output)
        llm = made(
            v1.LlmAgent,
            model=model,
            instruction=instruction,
            tools=definitions,
            generation=message(v1.Generation, generation, "generation"),
            context=message(v1.Context, context, "context"),
            output_schema=dump(local.output.schema) if local.output else "",
            max_model_calls=max_model_calls,
            provider=provider,
            fallbacks=fallbacks,
        )
        request = v1.UpdateAgentRequest(
            agent=made(
                v1.Agent,
                name=name_of(agent, "agents"),
                display_name=display_name,
                description=description,
                llm=llm,
                output_key=output_key,
                labels=labels,
            ),
            update_mask=FieldMask(paths=["*"]),
            allow_missing=True,
            request_id=uuid.uuid4().hex,
        )
        with as_written("agent.llm.", "agent."):
            put = await repeat(self._retry, lambda: self.agents.UpdateAgent(request))
        self._local[put.name] = local
        self._declared[f"{put.name}@{put.revision}"] = frozenset(local.tools)
        return put

    async def upload(
        self, content: bytes | str | PathLike[str], media_type: str = "", *, filename: str = "", upload_id: str = ""
    ) -> v1.Blob:
        """Uploads bytes, or a file given by its path, and returns the blob, to which messages and state can refer.

            plan = await client.upload("plan.pdf")
            await client.put_state(session, "plan", plan)
            ask = v1.Message(parts=[v1.Part(text="What is this?"), v1.Part(blob=plan)])
            await client.invoke(ask, session=session)

        For a file, the name is the default `filename`, and the default media type is guessed from it; UTF-8 text,
        including source code, is text/plain unless its name indicates another type of text. The content is read and
        sent in chunks, and after a broken connection only the missing ones are sent. If you choose the `upload_id`,
        another process can continue the upload.

        Raises OSError for a file that cannot be read, ValueError when the media type is neither given nor known, and
        NotecaseError PAYLOAD_TOO_LARGE, or UPLOAD_OFFSET_MISMATCH when somebody else uploads under the same id."""
        return await self._contents.upload(content, media_type, filename=filename, upload_id=upload_id)

    def download(self, blob: str | v1.Blob, offset: int = 0, limit: int = 0) -> AsyncIterator[bytes]:
        """Yields the content of a blob, given as a `v1.Blob` or by name, in chunks of at most 2 MiB: from `offset` on,
        and at most `limit` bytes unless it is 0. After a broken connection it continues where it stopped.

            async for piece in client.download(blob):
                file.write(piece)

        Raises NotecaseError BLOB_NOT_FOUND, and BLOB_CORRUPT after the last chunk if the whole content does not have
        the SHA-256 in its name."""
        return self._contents.download(blob, offset, limit)

    def run(
        self,
        *said: str | v1.Message,
        agent: str | v1.Agent | None = None,
        session: str | v1.Session | None = None,
        state: Mapping[str, Plain] | None = None,
        tools: Iterable[Callable[..., Any] | Tool] | None = None,
        output: type[Parsed] | None = None,
        model: str | None = None,
        instruction: str | None = None,
        generation: v1.Generation | Mapping[str, Any] | None = None,
        on_busy: OnBusy = "reject",
        limits: v1.Limits | Mapping[str, Any] | None = None,
        cancel_after: float | None = None,
        rewind_to: int | None = None,
        run_id: str = "",
        options: v1.WatchOptions | None = None,
    ) -> RunStream[Parsed]:
        """Starts a run when entered, and follows it to its end.

            async with client.run("Where is the violin?", agent="detective") as run:
                async for text in run.text():
                    print(text, end="")

        `said` is the user's input, as texts or messages; it may be left out if the session's history ends with
        something to answer. Without `session` a new one is created for `agent`; with it, `agent` may differ from the
        session's own. `state` is set in the session in the same commit. With the same `session` and `run_id`, a start
        that another process repeats is the same run, and one that differs raises REQUEST_ID_REUSED. A `run_id` without
        `session` does not make a start repeatable, because each start then creates a session.

        `tools` are functions that the model may call in this run in addition to its agent's. They are executed here
        while the stream is iterated, and so are those of `put_agent`: see `Tool`. `output` is the type of
        `RunStream.parsed`, for an agent with an output that another program has put. `model`, `instruction` and
        `generation` replace the agent's in this run.

        `on_busy` says what to do when the session has a run: "reject", "queue", "interrupt" or "rollback"; `limits`
        limits this run. With `cancel_after` the run is cancelled when no stream has been attached to it for that many
        seconds. `rewind_to` rewinds the session to that sequence in the same commit: without `said` to generate a reply
        again, with it to edit the user's input.

        Raises ValueError without agent and session and for a field of `generation` or `limits` that does not exist,
        TypeError for a function that cannot be a tool. Entering raises NotecaseError: RUN_ACTIVE when the session has a
        run, AGENT_NOT_FOUND, SESSION_NOT_FOUND and so on."""
        agent, session = name_of(agent, "agents"), name_of(session, "sessions")
        if not agent and not session:
            raise ValueError("who should answer? Name an agent, a session, or both: agent=…, session=…")
        functions = as_tools(tools)
        base = agent.partition("@")[0]
        declared = self._declared.get(agent, self._local.get(base, Local()).tools)
        start = made(
            v1.StartRun,
            session=session,
            agent=agent,
            state=to_values(state),
            run_id=run_id or uuid.uuid4().hex,
            messages=[to_message(one) for one in said],
            client_tools=[one.definition for name, one in functions.items() if one.declare and name not in declared],
            on_busy=choice(v1.StartRun.OnBusy, on_busy, "on_busy"),
            limits=message(v1.Limits, limits, "limits"),
            options=options,
            rewind_to_sequence=rewind_to,
        )
        settings = made(
            v1.RunSettings,
            model=model,
            instruction=instruction,
            generation=message(v1.Generation, generation, "generation"),
        )
        if settings.ListFields():
            start.settings.CopyFrom(settings)
        if cancel_after is not None:
            start.disconnect.CopyFrom(v1.Disconnect(cancel_after=duration("cancel_after", cancel_after)))
        if not session:  # named here, so that a repeat finds it
            start.new_session.name = f"sessions/{uuid.uuid4().hex}"
            start.new_session.agent = base
        first = v1.RunRequest(command_id=uuid.uuid4().hex, start=start)
        return self._follow(first, functions.values(), output, self._local)

    def attach(
        self,
        name: str | Named,
        after_sequence: int | None = None,
        *,
        tools: Iterable[Callable[..., Any] | Tool] | None = None,
        output: type[Parsed] | None = None,
        options: v1.WatchOptions | None = None,
    ) -> RunStream[Parsed]:
        """Follows an existing run (sessions/{session}/runs/{run}) or session, when entered.

        Events begin after `after_sequence`, 0 for the whole log; without it, at the run's first event or at the
        session's newest. In a session without an active run the stream ends at the newest event, unless `options` has
        keep_open. Pending and later calls of the given `tools` are executed here; attaching declares no tools. `output`
        is the type of `RunStream.parsed`.

        Raises TypeError for a function that cannot be a tool. Entering raises NotecaseError: SEQUENCE_AHEAD,
        SESSION_NOT_FOUND, RUN_NOT_FOUND."""
        attach = made(
            v1.AttachRun, name=name_of(name, "sessions", "name"), after_sequence=after_sequence, options=options
        )
        return self._follow(v1.RunRequest(attach=attach), tools, output)

    async def invoke(
        self,
        *said: str | v1.Message,
        agent: str | v1.Agent | None = None,
        session: str | v1.Session | None = None,
        state: Mapping[str, Plain] | None = None,
        tools: Iterable[Callable[..., Any] | Tool] | None = None,
        output: type[Parsed] | None = None,
        model: str | None = None,
        instruction: str | None = None,
        generation: v1.Generation | Mapping[str, Any] | None = None,
        on_busy: OnBusy = "reject",
        limits: v1.Limits | Mapping[str, Any] | None = None,
        cancel_after: float | None = None,
        rewind_to: int | None = None,
        run_id: str = "",
    ) -> Reply[Parsed]:
        """Runs an agent to the end and returns the reply. The arguments are those of `run`.

            reply = await client.invoke("Where is the violin?", agent="detective")
            print(reply.text)
            await client.invoke("And the bow?", session=reply.session)

        Raises what `run` and entering it raise, NotecaseError with the run's error when it fails and with code
        CANCELLED when it is cancelled, and RunWaiting when it waits for a person or for a tool that is not here.
        Cancelling this call, for example by `asyncio.timeout`, does not cancel the run; `limits` and `cancel_after` end
        one. In `notecase.sync`, Ctrl-C cancels it."""
        stream = self.run(
            *said,
            agent=agent,
            session=session,
            state=state,
            tools=tools,
            output=output,
            model=model,
            instruction=instruction,
            generation=generation,
            on_busy=on_busy,
            limits=limits,
            cancel_after=cancel_after,
            rewind_to=rewind_to,
            run_id=run_id,
            options=DURABLE,
        )
        return await self._reply_of(stream)

    async def _reply_of(self, stream: RunStream[Parsed]) -> Reply[Parsed]:
        async with stream as run:
            async for _ in run:
                if run.waits_for_others:
                    # The events may be old, where the run existed before, and may not show all that it waits for.
                    found = await self._get_run(run.name)
                    if waits := run.unanswered(found):
                        raise RunWaiting(found, waits)
        return run.reply

    def list_agents(self) -> Listing[v1.Agent]:
        """Iterates over the agents at their newest revision, by name: `async for agent in client.list_agents()`. Pages
        are fetched as needed."""
        return each(self._retry, self.agents.ListAgents, v1.ListAgentsRequest())

    def _follow(
        self,
        first: v1.RunRequest,
        tools: Iterable[Callable[..., Any] | Tool] | None,
        output: type[Parsed] | None,
        local: Mapping[str, Local] | None = None,
    ) -> RunStream[Parsed]:
        return RunStream(
            self.runs,
            first,
            self._retry,
            tools=tools,
            output=None if output is None else of_output(output),
            local=local,
            turns=self._turns,
            renews_token=self._connection.renews_token,
        )

    async def _get_run(self, name: str) -> v1.Run:
        return await repeat(self._retry, lambda: self.runs.GetRun(v1.GetRunRequest(name=name)))


def _policy(retry: Retry | None) -> Retry:
    if retry is not None and not isinstance(retry, Retry):
        raise TypeError(f"retry must be a notecase.Retry, for example Retry(tries=3), not {shown(retry)}")
    return retry or Retry()

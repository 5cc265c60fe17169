"""Makes one turn of a model: builds the request, and calls the model until there is a reply. Each turn has a new
ModelTurn; the Budget is that of all turns of a run in this process.
"""

import asyncio
import operator
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from notecase import v1

from notecase_server import errors
from notecase_server.engine import context, ledger, results, summary
from notecase_server.engine.asking import Asking, Budget, Source
from notecase_server.engine.context import Newest
from notecase_server.engine.draft import Draft
from notecase_server.engine.halt import Halts
from notecase_server.engine.ledger import Bound
from notecase_server.engine.results import READ_RESULT, Results
from notecase_server.engine.run_log import LOST, RunLog, taken
from notecase_server.engine.schema import value_of
from notecase_server.engine.tokens import tokens_of
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Finish, Media, ModelRequest, Used, looked_at
from notecase_server.models.contract import Tool as ModelTool
from notecase_server.store import bindings
from notecase_server.tools.contract import Function, Incomplete, Outcome, Toolbox

OUTPUT_REPEATS = 1
"""How often the model is called again after a reply that does not match the agent's output_schema: with a description
of the problem it either succeeds at once, or not at all."""

AT_ONCE = 64 << 10
"""Characters of JSON that are parsed at once, in a few milliseconds; longer JSON is parsed in a thread."""


class Reply(msgspec.Struct, frozen=True):
    """What a turn came to."""

    message: v1.Message
    finish: Finish
    bound: Mapping[str, Bound]
    """What its calls can be bound to."""
    read: Mapping[str, Outcome]
    """What the engine itself answers, by call: see Results.read."""

    async def output(self, agent: v1.Agent) -> v1.Event | None:
        """Returns the event that stores the reply in state under the agent's output_key: its text, or the value of its
        JSON. None if the agent has no output_key, and for a reply that calls tools or is empty."""
        key, parts = agent.output_key, self.message.parts
        if not key or any(part.HasField("tool_call") for part in parts):
            return None
        if agent.llm.output_schema:
            text = next((part.json for part in parts if part.HasField("json")), "")
            if not text:
                return None
            return await asyncio.to_thread(_parsed, key, text) if len(text) > AT_ONCE else _parsed(key, text)
        text = "".join(part.text for part in parts)
        return _stored(key, v1.Value(string_value=text)) if text else None


def _parsed(key: str, text: str) -> v1.Event:
    return _stored(key, value_of(text))


def _stored(key: str, value: v1.Value) -> v1.Event:
    return v1.Event(state_changed=v1.StateChanged(ops=[v1.StateOp(key=key, set=value)]))


class ModelTurn:
    """Asks the model of a run for one reply. The draft is left open until the reply is on record."""

    def __init__(
        self, run_log: RunLog, halts: Halts, budget: Budget, bound: Mapping[str, Bound], newest: Newest | None = None
    ) -> None:
        """`newest` is what the commit before has read for this turn. Raises MODEL_ERROR where the server does not have
        the agent's provider."""
        self._log = run_log
        self._newest = newest
        self._services = run_log.services
        self._halts = halts
        self._budget = budget
        self._bound = bound
        self._llm = run_log.agent.llm
        self._asking = Asking(run_log, halts, budget)
        self._shortened = False
        """The request was made shorter, after one that was too long."""

    async def reply(self) -> Reply:
        """Returns the model's reply. Raises Halted, and NotecaseError for a model that fails, a limit that is reached,
        a request that is too long even when shortened, and OUTPUT_INVALID."""
        settings = self._llm.context.summary
        keep, batch = settings.keep_recent or summary.KEEP_RECENT, settings.batch or summary.BATCH
        while True:
            if self._log.said:
                await self._log.durably(lambda: taken(self._log.queued(v1.UserInput.WHEN_STEER)))
            self._check_tokens()
            due = self._llm.context.HasField("summary") and not self._shortened
            if due and await self._summarize(keep, batch):
                continue
            request = await self._request()
            try:
                finish = await self._asking.ask(partial(self._read, request))
                if request.output_schema:
                    finish = await self._checked(request, finish)
            except NotecaseError as error:
                begun = self._log.draft is not None and self._log.draft.blocks
                if not summary.too_long(error) or begun:
                    raise
                await self._shorten(request, error)
                continue
            draft = self._draft
            message = draft.message(self._log.run.agent, v1.Message.STATUS_COMPLETED)
            message.finish_reason = finish.reason
            message.usage.CopyFrom(finish.usage)
            read = await self._read_results(message) if results.TOOL in request.tools else {}
            return Reply(message, finish, self._bound, read)

    @property
    def _draft(self) -> Draft:
        draft = self._log.draft
        assert draft is not None, "a reply was just written"
        return draft

    def _check_tokens(self) -> None:
        usage, limit = self._log.run.usage, self._log.run.limits.max_total_tokens
        total = usage.input_tokens + usage.output_tokens
        if limit and total >= limit:
            told = f"The run used {errors.counted(total, 'token')}; its limit is {limit}."
            raise errors.limit_exceeded("max_total_tokens", limit, told)

    async def _request(self) -> ModelRequest:
        llm = self._llm
        content = await self._log.patiently(self._content)
        messages = content.messages
        tools = [ModelTool(tool.name, tool.description, tool.parameters) for tool in self._bound.values()]
        if READ_RESULT not in self._bound and content.texts is None:
            most = content.size, self._budget.most_tokens
            shown = await self._log.patiently(lambda: self._results.shown(messages, *most))
            if shown is not messages:
                tools.append(results.TOOL)
                messages = shown
        said = (llm.model, content.instruction, messages, llm.generation, tools, self._load, llm.output_schema)
        return ModelRequest(*said, content.texts, size=content.size)

    def _content(self) -> Coroutine[Any, Any, context.Content]:
        newest, live = self._newest, self._log.live
        page = newest.page if newest is not None and newest.head == live.head else None
        bounds = (self._log.session.summary_sequence, self._budget.most_tokens)
        return context.build(self._services.store, live, self._log.run.name, self._log.agent, *bounds, page)

    async def _load(self, blob: v1.Blob) -> bytes:
        return await self._log.patiently(partial(self._services.contents.load, self._log.live.key.tenant, blob))

    @property
    def _results(self) -> Results:
        return Results(self._services.store, self._services.contents, self._log.live.key)

    async def _read_results(self, message: v1.Message) -> Mapping[str, Outcome]:
        calls = [part.tool_call for part in message.parts if part.tool_call.tool == READ_RESULT]
        return await self._log.patiently(lambda: self._results.read(calls, message.ByteSize()))

    # ---- asking

    async def _read(self, request: ModelRequest, source: Source) -> Finish:
        """Leaves one reply in the draft."""
        self._budget.spend()
        live, new_id = self._log.live, self._services.new_id
        draft = Draft(new_id(), self._log.run.name, new_id, as_json=bool(request.output_schema))
        live.begin(self._log.step, draft)
        async with aclosing(source.named.provider.stream(source.fit(request))) as stream:
            async for delta in stream:
                if isinstance(delta, Used):
                    source.own(delta.usage)
                    self._log.spend(delta.usage)
                    continue
                if isinstance(delta, Media):
                    await self._keep(delta, draft)
                    continue
                if isinstance(delta, Finish):
                    source.own(delta.usage)
                    self._log.spend(delta.usage)
                    if draft.finish(delta):
                        live.written(first=False)
                    return delta
                begun = draft.feed(delta)
                live.written(begun)
                if begun:  # watchers receive it before what follows, which may be the reply's commit
                    await asyncio.sleep(0)
        raise errors.model_unavailable("The model's reply ended before it was complete.")

    async def _keep(self, made: Media, draft: Draft) -> None:
        """Stores an image or a clip; the commit of the reply then refers to it. Raises LIMIT_EXCEEDED and
        PAYLOAD_TOO_LARGE."""
        draft.make_room(len(made.data))
        contents, tenant = self._services.contents, self._log.live.key.tenant
        if len(made.data) > contents.limits.blob:
            raise errors.too_large("The content from the model", len(made.data), contents.limits.blob)
        blob = await self._log.patiently(lambda: contents.put(tenant, *made, of_run=True))
        draft.place(v1.Part(blob=blob))

    # ---- what is asked for by a schema

    async def _checked(self, request: ModelRequest, finish: Finish) -> Finish:
        """Leaves a reply that is valid by the agent's output_schema in the draft, at the second try if need be; calls
        of tools and refusals are not such replies. Raises OUTPUT_INVALID."""
        repeat = 0
        while (reply := self._draft.json) is not None:
            problem = await self._halts.cut(self._services.schemas.problem(request.output_schema, reply))
            if not problem:
                break
            self._log.log.info("reply_invalid", problem=problem, finish_reason=finish.reason)
            message = self._draft.message(self._log.run.agent, v1.Message.STATUS_INCOMPLETE)
            await self._log.durably(self._log.used)
            # What was cut off at a limit would be cut off there again.
            if repeat == OUTPUT_REPEATS or finish.cut:
                raise errors.output_invalid(problem, finish.reason)
            repeat += 1
            self._check_tokens()
            self._log.live.discard(self._log.step)
            complaint = _complaint(problem, request.output_schema)
            asked = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text=complaint)])
            messages, size = [*request.messages, message, asked], request.size + message.ByteSize()
            again = request._replace(messages=messages, texts=None, size=size)
            finish = await self._asking.ask(partial(self._read, again))
        return finish

    # ---- making room

    async def _shorten(self, request: ModelRequest, error: NotecaseError) -> None:
        """Makes the next request shorter than one that was too long: by a summary, once, and else by leaving out half
        of it. Raises its error where nothing of it can be spared."""
        self._log.live.discard(self._log.step)
        if self._budget.left <= 0:
            raise error
        again, self._shortened = self._shortened, True
        self._log.log.info("request_too_long", messages=len(request.messages))
        messages, size = request.messages, request.size
        self._budget.most_tokens = await looked_at(messages, size, partial(tokens_of, messages)) // 2
        if not again and await self._summarize(keep=1, batch=1):
            return
        if await looked_at(messages, size, partial(operator.eq, (await self._request()).messages, messages)):
            raise error

    async def _summarize(self, keep: int, batch: int) -> bool:
        """Commits a summary of what is older than the newest `keep` messages, if that is `batch` messages or more and
        the reply's own call is still left. Where that is more than the model takes, it covers fewer of them. False when
        none is made: the run goes on without, since nothing is lost."""
        budget, store, key = self._budget, self._services.store, self._log.live.key
        if not budget.may_summarize or budget.left < 2 or (budget.most_covered and not budget.ample):
            return False
        bounds = (self._log.session.summary_sequence, keep, batch, budget.most_covered)
        plan = await self._log.patiently(lambda: summary.plan(store, self._services.contents, key, *bounds))
        if plan is None or self._halts.pending:
            return False
        self._budget.spend()
        try:
            made = await self._asking.ask(partial(self._write, await plan.request(self._llm)))
        except NotecaseError as error:
            if summary.too_long(error) and budget.ample and (shorter := plan.shorter()) is not None:
                budget.most_covered = len(shorter.messages)
                return await self._summarize(keep, batch)
            self._budget.may_summarize = False
            reason = errors.reason_name(error.reason)
            self._log.log.warning("summary_failed", reason=reason, message=error.message)
            failed = v1.Event(summary_failed=v1.SummaryFailed(error=error.to_proto()))
            await self._log.durably(lambda: [failed])
            return False
        try:
            await self._log.durably(lambda: plan.events(*made))
        except NotecaseError as error:
            if error.reason != v1.ERROR_REASON_SEQUENCE_MISMATCH:
                raise
            await self._log.durably(self._log.used)
            session = await self._log.patiently(lambda: store.get_session(key))  # a caller had it summarised meanwhile
            self._log.session = session or v1.Session()
        return True

    async def _write(self, request: ModelRequest, source: Source) -> tuple[str, v1.Usage]:
        def used(usage: v1.Usage) -> None:
            source.own(usage)
            self._log.spend(usage)

        return await summary.write(source.named.provider, source.fit(request), used)


class Tools:
    """Finds what a run's model may call, by name: at first, and once an MCP server says that its tools have changed."""

    def __init__(self, run_log: RunLog, halts: Halts) -> None:
        self._log = run_log
        self._halts = halts
        self._toolbox = run_log.services.toolbox
        self._bound: Mapping[str, Bound] | None = None
        self._found: dict[int, Sequence[Function]] = {}
        self._changes = 0

    async def bound(self) -> Mapping[str, Bound]:
        """Raises as `bind`, the first time; what cannot be found again later stays as it was."""
        changes = self._toolbox.changes(tool.mcp.server for tool in bindings.declared(self._log.agent, self._log.run))
        if self._bound is None or changes != self._changes:
            try:
                self._bound = await bind(self._log, self._halts, self._found)
            except NotecaseError as error:
                if self._bound is None or error.reason in LOST:
                    raise
                self._log.log.warning("tools_not_renewed", problem=error.message)
            self._changes = changes
        return self._bound


async def bind(
    run_log: RunLog, halts: Halts, found: dict[int, Sequence[Function]] | None = None
) -> Mapping[str, Bound]:
    """Returns what the model may call, by name. MCP servers are all asked at the same time, which a halt cuts: Halted.
    What one cannot give is put on record and left out, unless the agent requires it or it was `found` before, by its
    place among the tools. TOOL_ERROR when what is required cannot be had, or two tools have one name."""
    found, tools = {} if found is None else found, bindings.declared(run_log.agent, run_log.run)
    remote = [tool for tool in tools if tool.HasField("mcp")]
    answers = iter(await halts.cut(_resolved(run_log.services.toolbox, remote)) if remote else ())
    for place, tool in enumerate(tools):
        if tool.HasField("client"):
            found[place] = [ledger.called_by_caller(tool)]
        elif not tool.HasField("mcp"):
            found[place] = await run_log.services.toolbox.resolve(tool)
        elif not isinstance(answer := next(answers), BaseException):
            found[place] = answer
        elif isinstance(answer, NotecaseError) and place in found and not isinstance(answer, Incomplete):
            run_log.log.warning("tools_not_renewed", problem=answer.message)
        elif isinstance(answer, NotecaseError) and not tool.mcp.required:
            found[place] = answer.functions if isinstance(answer, Incomplete) else []
            event = v1.Event(tools_unavailable=v1.ToolsUnavailable(server=tool.mcp.server, error=answer.to_proto()))
            await run_log.durably(lambda event=event: [event])  # type: ignore[misc]
        else:
            raise answer
    return ledger.bind(run_log.agent, run_log.run, [*found.values()]) if tools else {}


async def _resolved(toolbox: Toolbox, tools: Sequence[v1.Tool]) -> Sequence[Sequence[Function] | BaseException]:
    return await asyncio.gather(*map(toolbox.resolve, tools), return_exceptions=True)


def _complaint(problem: str, schema: str) -> str:
    """The message to a model about an invalid reply. It has the schema, since not every provider has passed it on."""
    wanted = "Reply again, only with JSON that matches this JSON Schema:"
    return f"That reply is not valid: {problem}.\n{wanted}\n{schema}"

"""One run at work: build the context, call the model, commit what it made, see to its calls, and again until the run
ends.

What is durable is decided by commits alone. Between two of them the worker can be lost at any moment, and the next one,
here or after a restart, goes on from the last: it looks at the rows, not at what this object remembers. Whoever commits
for a run holds its session's lock, and decides what to commit while holding it.
"""

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import structlog
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine import context, ledger, summary
from notecase_server.engine.content import Contents
from notecase_server.engine.ledger import Bound
from notecase_server.engine.rewind import Rewind
from notecase_server.engine.schema import Schemas, Unfenced, value_of
from notecase_server.engine.session import Block, LiveSession, OpenMessage
from notecase_server.engine.tokens import Gauge
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import (
    Call,
    Finish,
    ModelRequest,
    Provider,
    Reasoning,
    Refusal,
    Repeats,
    Returned,
    Text,
)
from notecase_server.models.contract import Tool as ModelTool
from notecase_server.store.contract import (
    PAGE_BYTES,
    Clock,
    CommandId,
    Commit,
    Committed,
    Duplicate,
    Once,
    Replayed,
    RunRecord,
    Store,
)
from notecase_server.store.fold import ENDED, open_calls, ops_fit
from notecase_server.tools.contract import CallContext, Outcome, Toolbox

T = TypeVar("T")

log = structlog.get_logger()

RUNNING, WAITING = v1.Run.STATE_RUNNING, v1.Run.STATE_WAITING

DEFAULT_MODEL_CALLS = 10
"""Model calls in a run whose agent sets no limit: enough for a chain of tools, few enough to stop a loop."""

MAX_REPLY_BYTES = PAGE_BYTES - (64 << 10)
"""A reply with its frame fits into one page."""

BLOCK_BYTES = 256
"""What a part needs beside its text: ids, names and frames, rounded up."""

OUTPUT_REPEATS = 1
"""How often a reply that is not what the agent's output_schema asks for is asked for again: a model that was told what
is wrong either knows better at once, or not at all."""

STORE_PATIENCE = (0.1, 10.0)
"""Seconds between tries of a commit that the store cannot take, at first and at most. A run waits as long as it takes:
what it has is worth more than its place, and its end must be on record."""

LOST = frozenset({v1.ERROR_REASON_OWNER_LOST, v1.ERROR_REASON_SESSION_NOT_FOUND})
"""The run is no longer this worker's: it stops at once and commits nothing more."""


@dataclass(slots=True, kw_only=True)
class Halt:
    """A request to stop what is under way now: to end the run, or to go on with what a user says instead."""

    events: Sequence[v1.Event] = ()
    """What follows the sealing: the user's messages, or the start of another run, or nothing when the run ends."""
    rewind: "Callable[[], Awaitable[Rewind]] | None" = None
    """Makes what goes between the end and `events`: the session goes back, and `events` start another run."""
    start: RunRecord | None = None
    """With the start of another run."""
    then: Callable[[Committed], None] = lambda _: None
    """What follows the commit at once, before anybody else decides about the session."""
    state: v1.Run.State.ValueType = v1.Run.STATE_CANCELLED
    """The end, when the run does not go on with the user's messages."""
    error: v1.Error | None = None
    reason: str = ""
    cause_id: str = ""
    once: Once | None = None
    command: CommandId | None = None
    done: "asyncio.Future[Committed]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """The commit that sealed; NotecaseError RUN_ENDED when the run ended by itself first, Replayed or Duplicate when
    another Halt of the same command came before."""

    def refuse(self, error: Exception) -> None:
        self.done.set_exception(error)
        self.done.exception()  # nobody waits for what a clock asked


class _HaltedError(Exception):
    """What was under way was cut because of a Halt."""


class Services(NamedTuple):
    """What all workers of a process share."""

    store: Store
    providers: Mapping[str, Provider]
    """By name, the default one under "" as well."""
    toolbox: Toolbox
    contents: Contents
    schemas: Schemas
    new_id: Callable[[], str]
    clock: Clock
    repeats: Repeats = Repeats()
    """Of a model call that failed in a way that may pass."""


class Worker:
    """One run in one process. `work` makes it go on; the other methods may be called beside it."""

    def __init__(
        self,
        live: LiveSession,
        services: Services,
        session: v1.Session,
        run: v1.Run,
        agent: v1.Agent,
        epoch: int,
        message: v1.Message | None = None,
        said: Sequence[v1.Event] = (),
    ) -> None:
        """`session` and `run` as stored; the run's row becomes the worker's own. `message` is the reply whose calls are
        under way, if there is one, and `said` the command_queued events of what waits to be taken up."""
        self.live = live
        self.run = run
        self.agent = agent
        self.message = message
        self.lost = False
        """The run is no longer this worker's."""
        self._services = services
        self._store = services.store
        self._new_id = services.new_id
        self.epoch = epoch
        self._said = list(said)
        self._remembered: dict[str, bool] = {}
        self._bound: dict[str, Bound] | None = None
        self._model_calls = run.usage.model_calls + max(run.attempt - 1, 0)
        self._generating: asyncio.Task[Any] | None = None
        self._calls: dict[str, asyncio.Task[tuple[Outcome, list[v1.StateOp]]]] = {}
        self._halts: list[Halt] = []
        self._may_summarize = not agent.llm.context.stateless
        self._shortened = False
        """The request under way is a second one, after one that was too long."""
        self._most_tokens = 0
        """Of the messages shown, once a request was too long."""
        self._stirred = asyncio.Event()
        self._draining = False
        self._log = log.bind(session=live.key.session, run=run.name)
        self._know(session, ())

    @property
    def ended(self) -> bool:
        return self.run.state in ENDED

    def _open(self) -> list[v1.ToolCall]:
        return open_calls(self.message) if self.message is not None else []

    def _know(self, session: v1.Session, events: Sequence[v1.Event]) -> None:
        waiting = {queued.sequence for queued in session.queued_commands if queued.run == self.run.name}
        self._said = [event for event in (*self._said, *events) if event.sequence in waiting]
        self._remembered = {**session.remembered, **self.run.remembered}
        self._summary = session.summary_sequence

    # ---- what others ask of it

    def halt(self, halt: Halt) -> None:
        """Cuts what is under way; `work` then seals it."""
        self._halts.append(halt)
        self._stirred.set()
        if self._generating is not None:
            self._generating.cancel()

    def drain(self) -> None:
        """Asks the worker to leave the run as it is at its next commit."""
        self._draining = True
        self._stirred.set()

    @property
    def waits_for_queue(self) -> bool:
        """Only people are waited for, and somebody has spoken."""
        return bool(self._said) and not self.run.pending_calls and bool(self.run.pending_inputs)

    def is_client(self, tool: str) -> bool:
        """Whether the caller runs the tool of that name."""
        return ledger.policy(self.agent, self.run, tool).HasField("client")

    def call(self, call_id: str) -> v1.ToolCall:
        """An open call; NotecaseError CALL_NOT_PENDING."""
        for call in self._open():
            if call.call_id == call_id:
                return call
        raise errors.call_not_pending(call_id)

    def ending(self, cancel: v1.CancelCommand) -> list[v1.Event]:
        """The events by which the run ends after its turn: at once, when nothing of the turn is left."""
        queued = v1.Event()
        queued.command_queued.cancel.CopyFrom(cancel)
        events = [queued, *ledger.withdrawn(self.run, self.message, cancel.reason)]
        if self.run.state == WAITING and not ledger.left_open(self.message, events):
            events.append(self._ending(v1.Run.STATE_CANCELLED, reason=cancel.reason))
        return events

    def deadline(self) -> int | None:
        """When the run, waiting, is next to be looked at by `expired`, in microseconds; None for never."""
        return min((at for at, _ in self._deadlines()), default=None)

    def expired(self) -> list[v1.Event]:
        """What becomes of requests and calls that were left unanswered too long."""
        now = self._services.clock()
        return [event for at, events in self._deadlines() if at <= now for event in events]

    def _deadlines(self) -> Iterator[tuple[int, list[v1.Event]]]:
        for request in self.run.pending_inputs:
            if request.HasField("expire_time"):
                nobody = v1.InputResponse(
                    input_id=request.input_id, decision=ledger.DENY, reason="Nobody answered in time."
                )
                call = self.call(request.call.call_id)
                yield request.expire_time.ToMicroseconds(), ledger.answered(request, nobody, call, client=False)
        for call in self.run.pending_calls:
            tool, limits = ledger.policy(self.agent, self.run, call.tool), self.run.limits
            times = [tool.timeout.ToMicroseconds()] if tool.HasField("timeout") else []
            times += [limits.input_timeout.ToMicroseconds()] if limits.HasField("input_timeout") else []
            if times:
                late = ledger.finished(call, Outcome(error="The caller gave no result in time."))
                yield call.start_time.ToMicroseconds() + min(times), [late]

    async def take_over(self) -> None:
        """Commits that this process goes on with the run, and what becomes of calls that had started in the one before.
        The caller holds the session's lock."""
        change = v1.RunStateChanged(
            state=RUNNING,
            attempt=self.run.attempt + 1,
            reason="The server stopped; the run goes on from its last commit.",
        )
        asked = {request.call.call_id for request in self.run.pending_inputs}
        lost = [
            call
            for call in self._open()
            if call.outcome == v1.ToolCall.OUTCOME_RUNNING and not call.client_executed and call.call_id not in asked
        ]
        policy = partial(ledger.policy, self.agent, self.run)
        events = ledger.interrupted(lost, policy, self._new_id, self._expire)
        await self._commit([v1.Event(run_state_changed=change), *events])
        self._model_calls += 1
        self._log.info("run_taken_over", attempt=self.run.attempt)

    async def commit(
        self, events: Sequence[v1.Event], cause_id: str = "", once: Once | None = None, command: CommandId | None = None
    ) -> Committed:
        """Commits events of this run on behalf of a command, with what they lead to: the run waits, or goes on. The
        caller holds the session's lock."""
        for event in events:
            event.cause_id = event.cause_id or cause_id
        return await self._commit([*events, *self._consequence(events)], once, command)

    # ---- the work

    async def work(self) -> None:
        """Returns when the run has ended, waits, was left to a successor, or belongs to another owner."""
        timeout = self.run.limits.timeout
        alarm = None
        if self.run.limits.HasField("timeout"):
            left = timeout.ToMicroseconds() - self.run.running_duration.ToMicroseconds()
            loop = asyncio.get_running_loop()
            alarm = loop.call_later(max(left, 0) / 1e6, self._out_of_time)
        try:
            while not self.ended and (self._halts or (self.run.state == RUNNING and not self._may_leave)):
                await self._step()
        except NotecaseError as error:
            if error.reason not in LOST:
                raise
            self.lost = True
            self._log.info("run_left", reason=errors.reason_name(error.reason))
        finally:
            if alarm is not None:
                alarm.cancel()
            self.live.open = None
            for call in self._calls.values():
                call.cancel()
            self._refuse_halts()

    @property
    def _may_leave(self) -> bool:
        """Calls under way are not left behind: somebody would have to say what became of them."""
        return self._draining and self.message is None

    def _out_of_time(self) -> None:
        seconds = self.run.limits.timeout.ToMicroseconds() / 1e6
        error = errors.limit_exceeded("timeout", round(seconds), f"The run took longer than its {seconds:g} seconds.")
        self.halt(Halt(state=v1.Run.STATE_FAILED, error=error.to_proto()))

    def _refuse_halts(self) -> None:
        name = names.run(self.live.key.session, self.run.name)
        for halt in self._halts:
            halt.refuse(errors.run_ended(name, self.run.state) if self.ended else errors.draining())
        self._halts.clear()

    async def _step(self) -> None:
        try:
            if self._halts:
                await self._seal(self._halts[0])
            elif self.message is not None:
                await self._tend()
            elif self.run.ending:
                await self._end(v1.Run.STATE_CANCELLED)
            else:
                await self._turn()
        except _HaltedError:
            return
        except NotecaseError as error:
            if error.reason in LOST:
                raise
            await self._end(v1.Run.STATE_FAILED, error.to_proto())
        except Exception:  # noqa: BLE001  (whatever broke, the run's end must be on record)
            request_id = structlog.contextvars.get_contextvars().get("request_id") or self.run.name
            self._log.exception("run_crashed", request_id=request_id)
            await self._end(v1.Run.STATE_FAILED, errors.internal(request_id).to_proto())

    async def _turn(self) -> None:
        await self._durably(lambda: self.taken(self.inputs(v1.UserInput.WHEN_STEER)))
        self._check_limits()
        provider = self._services.providers.get(self.agent.llm.provider)
        if provider is None:
            raise errors.model_error(f"This server has no provider {self.agent.llm.provider!r}.")
        bound = await self._bind()
        settings = self.agent.llm.context.summary
        keep, batch = settings.keep_recent or summary.KEEP_RECENT, settings.batch or summary.BATCH
        due = self.agent.llm.context.HasField("summary") and not self._shortened
        if due and await self._summarize(provider, keep, batch):
            return
        request = await self._request()
        tools = [ModelTool(tool.name, tool.description, tool.parameters) for tool in bound.values()]
        load = partial(self._services.contents.load, self.live.key.tenant)
        request = request._replace(tools=tools, output_schema=self.agent.llm.output_schema, load=load)
        try:
            finish = await self._generate(provider, request)
            if request.output_schema:
                finish = await self._checked(provider, request, finish)
        except NotecaseError as error:
            if not summary.too_long(error) or (self.live.open is not None and self.live.open.blocks):
                raise
            await self._shorten(provider, request, error)
            return
        self._shortened = False
        opened = self.live.open
        assert opened is not None
        message = self._message(opened, v1.Message.STATUS_COMPLETED)
        message.finish_reason = finish.reason
        message.usage.CopyFrom(finish.usage)
        await self._durably(lambda: self._replied(message, finish, bound))

    def _replied(self, message: v1.Message, finish: Finish, bound: Mapping[str, Bound]) -> list[v1.Event]:
        """The reply, and what it leads to: calls are dispatched, what was queued is taken up, or the run ends."""
        calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
        message.status = v1.Message.STATUS_IN_PROGRESS if calls else v1.Message.STATUS_COMPLETED
        events = [v1.Event(message_added=message), v1.Event(usage=finish.usage)]
        if self.agent.output_key and (note := self._note(message)):
            put = v1.StateOp(key=self.agent.output_key, set=note)
            events.append(v1.Event(state_changed=v1.StateChanged(ops=[put])))
        limit = self.run.limits.max_tool_calls
        if limit and self.run.tool_calls + len(calls) > limit:
            error = errors.limit_exceeded(
                "max_tool_calls", limit, f"The run may call tools {limit} times, and wants more."
            )
            events += [ledger.cancelled(call, error.message) for call in calls]
            return [*events, self._ending(v1.Run.STATE_FAILED, error.to_proto())]
        if calls and finish.cut:
            why = f"The reply was cut off ({finish.reason}), so that no call in it was run; call again, with less."
            return [*events, *(ledger.finished(call, Outcome(error=why)) for call in calls)]
        if calls:
            made = ledger.triage(calls, bound, self._remembered, self._new_id, self._expire)
            if self.run.ending:  # nobody is asked any more
                asked = [event.input_requested.call for event in made if event.HasField("input_requested")]
                made = [event for event in made if not event.HasField("input_requested")]
                made += [ledger.cancelled(call, "The run is to end.") for call in asked]
            return events + made
        if self._said and not self.run.ending:
            return events + self.taken(self.inputs(v1.UserInput.WHEN_FOLLOW_UP))
        return [*events, self._ending(v1.Run.STATE_SUCCEEDED)]

    def _note(self, message: v1.Message) -> v1.Value | None:
        """A reply as it is put under the agent's output_key: its text, or what its JSON says."""
        if self.agent.llm.output_schema:
            return next((value_of(part.json) for part in message.parts if part.HasField("json")), None)
        text = "".join(part.text for part in message.parts)
        return v1.Value(string_value=text) if text else None

    async def _checked(self, provider: Provider, request: ModelRequest, finish: Finish) -> Finish:
        """Leaves a reply that is valid by the agent's output_schema in the open message, at the second try if need be;
        calls of tools and refusals are no such reply. Raises OUTPUT_INVALID."""
        for repeat in range(OUTPUT_REPEATS + 1):
            opened = self.live.open
            assert opened is not None
            if any(block.kind in {"arguments", "refusal"} for block in opened.blocks):
                break
            reply = "".join(block.data.decode() for block in opened.blocks if block.kind == "json")
            problem = await self._services.schemas.problem(request.output_schema, reply)
            if not problem:
                break
            self._log.info("reply_invalid", problem=problem, finish_reason=finish.reason)
            message = self._message(opened, v1.Message.STATUS_INCOMPLETE)
            await self._durably(partial(_used, finish.usage))
            # What was cut off at a limit would be cut off there again.
            if repeat == OUTPUT_REPEATS or finish.cut:
                raise errors.output_invalid(problem, finish.reason)
            self._check_limits()
            self.live.discard()
            asked = v1.Message(
                role=v1.Message.ROLE_USER, parts=[v1.Part(text=_complaint(problem, request.output_schema))]
            )
            finish = await self._generate(provider, request._replace(messages=[*request.messages, message, asked]))
        return finish

    def _check_limits(self) -> None:
        usage, limits = self.run.usage, self.run.limits
        total = usage.input_tokens + usage.output_tokens
        if limits.max_total_tokens and total >= limits.max_total_tokens:
            told = f"The run used {total} tokens, of {limits.max_total_tokens} that it may."
            raise errors.limit_exceeded("max_total_tokens", limits.max_total_tokens, told)

    async def _bind(self) -> dict[str, Bound]:
        """The names the model may call. The first of a name wins."""
        if self._bound is None:
            bound: dict[str, Bound] = {}
            for tool in ledger.declared(self.agent, self.run):
                if tool.HasField("client"):
                    bound.setdefault(tool.name, Bound(tool, tool.name, tool.description, tool.parameters))
                    continue
                for found in await self._services.toolbox.resolve(tool):
                    target = Bound(tool, found.name, found.description, found.parameters, found)
                    bound.setdefault(found.name, target)
            self._bound = bound
        return self._bound

    # ---- the model

    async def _request(self) -> ModelRequest:
        where = (self._store, self.live.key, self.live.user, self.run.name)
        return await context.build(*where, self.agent, self._summary, self._most_tokens)

    async def _generate(self, provider: Provider, request: ModelRequest) -> Finish:
        """Leaves one reply in the live session's open message."""

        async def ask() -> Finish:
            self._count_model_call()
            return await self._read(provider, request, self.live.begin(self._new_id()))

        return await self._repeated(ask)

    async def _repeated(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Asks a model, and again while what went wrong may pass, before its first piece or after it. A try from which
        nothing came does not count as a model call; what one took, as far as its provider told, is counted."""
        most, seconds = self._services.repeats
        for repeat in itertools.count():
            if self._halts:
                raise _HaltedError
            try:
                return await self._halting(ask())
            except NotecaseError as error:
                passing = most if error.reason == v1.ERROR_REASON_MODEL_UNAVAILABLE else 0
                wait = max(random.uniform(0, 0.5 * 2**repeat), error.retry_after or 0)
                if error.usage is not None:
                    await self._durably(partial(_used, error.usage))
                if repeat >= (passing if error.repeats is None else error.repeats) or wait > seconds:
                    raise
                self._log.info("model_call_repeated", repeat=repeat + 1, seconds=round(wait, 3))
                if error.usage is None and self.live.open is not None and not self.live.open.blocks:
                    self._model_calls -= 1
                self.live.discard()
                seconds -= wait
            await self._halting(asyncio.sleep(wait))
        raise AssertionError("the last repeat returns or raises")

    async def _halting(self, call: Coroutine[Any, Any, T]) -> T:
        """Waits for a call of the model, which a halt cuts."""
        self._generating = asyncio.create_task(call)
        try:
            done: T = await self._generating
        except asyncio.CancelledError:
            if not self._halts:
                raise
            raise _HaltedError from None
        finally:
            self._generating = None
        return done

    async def _summarize(self, provider: Provider, keep: int, batch: int) -> bool:
        """Commits a summary of what is older than the newest `keep` messages, if that is `batch` messages or more and
        the reply's own call is still left. False when none is made: the run goes on without, since nothing is lost."""
        if not self._may_summarize or self._most_calls - self._model_calls < 2:
            return False
        plan = await summary.plan(self._store, self.live.key, self._summary, keep, batch)
        if plan is None or self._halts:
            return False
        self._count_model_call()
        try:
            made = await self._repeated(partial(summary.write, provider, plan.request(self.agent.llm)))
        except NotecaseError as error:
            self._may_summarize = False
            self._log.warning("summary_failed", reason=errors.reason_name(error.reason), message=error.message)
            return False
        try:
            await self._durably(lambda: plan.events(*made))
        except NotecaseError as error:
            if error.reason != v1.ERROR_REASON_SEQUENCE_MISMATCH:
                raise
            session = await self._store.get_session(self.live.key)  # a caller had it summarised meanwhile
            self._summary = session.summary_sequence if session else 0
        return True

    async def _shorten(self, provider: Provider, request: ModelRequest, error: NotecaseError) -> None:
        """Makes the next request shorter than one that was too long. Raises its error where that was a second try, or
        nothing of it can be spared."""
        self.live.discard()
        if self._shortened or self._model_calls >= self._most_calls:
            raise error
        self._shortened = True
        self._log.info("request_too_long", messages=len(request.messages))
        self._most_tokens = sum(map(Gauge(request.messages).tokens, request.messages)) // 2
        if await self._summarize(provider, keep=1, batch=1):
            return
        if len((await self._request()).messages) == len(request.messages):
            raise error

    @property
    def _most_calls(self) -> int:
        limit = self.agent.llm.max_model_calls or DEFAULT_MODEL_CALLS
        return min(limit, self.run.limits.max_model_calls or limit)

    def _count_model_call(self) -> None:
        limit = self._most_calls
        if self._model_calls >= limit:
            raise errors.limit_exceeded(
                "max_model_calls", limit, f"The run made {limit} model calls, all that it may, without an end."
            )
        self._model_calls += 1

    async def _read(self, provider: Provider, request: ModelRequest, opened: OpenMessage) -> Finish:
        calls: dict[int, Block] = {}
        size = 0
        unfenced = Unfenced() if request.output_schema else None
        async with aclosing(provider.stream(request)) as stream:
            async for delta in stream:
                match delta:
                    case Finish():
                        if unfenced is not None and (rest := unfenced.end()):
                            self.live.add(_json(opened), rest)
                        return delta
                    case Returned(key, data):
                        _returned(opened, None if key is None else calls.get(key), data)
                        size += data.ByteSize()
                        continue
                    case Call(key, tool, text):
                        block = calls.get(key)
                        if block is None:
                            if unfenced is not None and (words := unfenced.words()):
                                size += self.live.add(_json(opened), words)
                            block = calls[key] = _begin(opened, Block("arguments", self._new_id()))
                        block.tool += tool
                    case Text(text) if unfenced is not None:
                        if not (text := unfenced.feed(text)):
                            continue
                        block = _json(opened)
                    case Text(text):
                        block = _current(opened, "text")
                    case Reasoning(text):
                        block = _current(opened, "reasoning")
                    case Refusal(text):
                        block = _current(opened, "refusal")
                size += self.live.add(block, text)
                if size + BLOCK_BYTES * len(opened.blocks) > MAX_REPLY_BYTES:
                    raise errors.limit_exceeded(
                        "reply_bytes", MAX_REPLY_BYTES, f"The model's reply is longer than {MAX_REPLY_BYTES} bytes."
                    )
        raise errors.model_unavailable("The model's reply ended before it was whole.")

    def _message(self, opened: OpenMessage, status: v1.Message.Status.ValueType) -> v1.Message:
        message = v1.Message(
            name=opened.name, role=v1.Message.ROLE_ASSISTANT, author=self.run.agent, status=status, run=self.run.name
        )
        calls = any(block.kind == "arguments" for block in opened.blocks)
        for block in opened.blocks:
            text = block.data.decode()
            part = message.parts.add()
            if block.kind == "text" or (block.kind == "json" and calls):
                part.text = text
            elif block.kind == "json":
                part.json = text
            elif block.kind == "reasoning":
                part.reasoning.text = text
                if block.provider_data is not None:
                    part.reasoning.provider_data.CopyFrom(block.provider_data)
            elif block.kind == "refusal":
                part.refusal = text
            else:
                call = part.tool_call
                call.call_id, call.tool, call.arguments = block.call_id, block.tool, text
                call.outcome = v1.ToolCall.OUTCOME_PENDING
                if block.provider_data is not None:
                    call.provider_data.CopyFrom(block.provider_data)
        return message

    # ---- calls

    async def _tend(self) -> None:
        """Runs the calls that are the server's, and commits each outcome as it comes."""
        asked = {request.call.call_id for request in self.run.pending_inputs}
        for call in self._open():
            mine = call.outcome == v1.ToolCall.OUTCOME_RUNNING and not call.client_executed
            if mine and call.call_id not in self._calls and call.call_id not in asked:
                self._calls[call.call_id] = asyncio.create_task(self._execute(call))
        if not self._calls:
            # Nothing of it is the server's any more: the run waits, unless somebody gives the last result just now.
            await self._durably(list)
            return
        self._stirred.clear()
        stirred = asyncio.create_task(self._stirred.wait())
        await asyncio.wait([stirred, *self._calls.values()], return_when=asyncio.FIRST_COMPLETED)
        stirred.cancel()
        if not self._halts:
            await self._keep_finished()

    def stop_call(self, call_id: str) -> None:
        """Stops what of a call runs here, once its end is on record."""
        task = self._calls.pop(call_id, None)
        if task is not None:
            task.cancel()

    async def _keep(self, call_id: str, outcome: Outcome, ops: Sequence[v1.StateOp]) -> None:
        """Commits a result with the state it changed; what the state or the session does not take fails the call, and
        not the run."""
        try:
            parts = await self._patiently(lambda: self._services.contents.parts(self.live.key, outcome.parts))
            await self._durably(partial(self._outcome, call_id, outcome._replace(parts=parts), ops))
        except NotecaseError as refused:
            if outcome.error or refused.reason in LOST:
                raise
            await self._durably(partial(self._outcome, call_id, Outcome(error=refused.message), ()))

    def _outcome(self, call_id: str, outcome: Outcome, ops: Sequence[v1.StateOp]) -> list[v1.Event]:
        """A result with the state it changed. Nothing when somebody gave the call an end before."""
        for call in self._open():
            if call.call_id == call_id:
                kept = self.fitting(outcome)
                changed = [v1.Event(state_changed=v1.StateChanged(ops=ops))] if ops and not kept.error else []
                return [ledger.finished(call, kept), *changed]
        return []

    def fitting(self, outcome: Outcome) -> Outcome:
        """The outcome, if its message still fits into a page with it."""
        size = sum(part.ByteSize() for part in outcome.parts) + (self.message.ByteSize() if self.message else 0)
        if size > PAGE_BYTES - (16 << 10):
            return Outcome(error=f"The results of this reply's calls are together larger than {PAGE_BYTES} bytes.")
        return outcome

    async def _execute(self, call: v1.ToolCall) -> tuple[Outcome, list[v1.StateOp]]:
        """Runs one call. A tool that is broken is a failed call: the model is told that much, the log the rest."""
        key = self.live.key
        where = CallContext(
            session=names.session(key.session),
            user=self.live.user,
            run=names.run(key.session, self.run.name),
            call_id=call.call_id,
            idempotency_key=f"{key.session}/{call.call_id}",
            attempt=call.attempt,
            get_state=self._get_state,
        )
        tool = ledger.policy(self.agent, self.run, call.tool)
        seconds = tool.timeout.ToMicroseconds() / 1e6 if tool.HasField("timeout") else None
        clock = asyncio.timeout(seconds)
        try:
            target = (await self._bind()).get(call.tool)
            if target is None or target.function is None:
                return Outcome(error=f"There is no tool {call.tool!r}."), []
            async with clock:
                outcome = await target.function.call(ledger.arguments_of(call) or {}, where)
        except NotecaseError as error:
            return Outcome(error=error.message), []
        except Exception:  # noqa: BLE001  (a tool's defect is its own)
            if clock.expired():
                return Outcome(error=f"The tool took longer than {seconds:g} seconds."), []
            self._log.exception("tool_crashed", tool=call.tool, call_id=call.call_id)
            return Outcome(error="The tool failed."), []
        size = sum(op.ByteSize() for op in where.ops)
        if size > PAGE_BYTES:
            return Outcome(error=f"The tool changed {size} bytes of state; at most {PAGE_BYTES} are taken."), []
        if not ops_fit(where.ops):
            return Outcome(error="The tool put something into state that no state can hold."), []
        return outcome, where.ops

    async def _get_state(self, *keys: str) -> dict[str, v1.Value]:
        scope = names.parse_state(self.live.key.tenant, f"sessions/{self.live.key.session}/state")
        assert scope is not None
        state = await self._store.get_state(scope, keys)
        return {key: entry.value for key, entry in state.entries.items()}

    def _expire(self, request: v1.InputRequest) -> None:
        if self.run.limits.HasField("input_timeout"):
            at = self._services.clock() + self.run.limits.input_timeout.ToMicroseconds()
            request.expire_time.FromMicroseconds(at)

    # ---- what users say meanwhile

    def inputs(self, latest: v1.UserInput.When.ValueType) -> list[v1.Event]:
        """The command_queued events of what users said, in order: what steers, and with WHEN_FOLLOW_UP all of it."""
        late = v1.UserInput.WHEN_FOLLOW_UP
        return [event for event in self._said if latest == late or event.command_queued.input.when != late]

    def taken(self, queued: Sequence[v1.Event]) -> list[v1.Event]:
        """What was said becomes messages, under the command's id."""
        return [
            v1.Event(cause_id=event.cause_id, message_added=message)
            for event in queued
            for message in event.command_queued.input.messages
        ]

    # ---- ends

    async def _seal(self, halt: Halt) -> None:
        """Stops everything under way in one commit, and ends the run or goes on with what the user says. A halt that is
        refused has changed nothing: calls stay under way, and the model is asked once more."""

        back: Rewind | None = None

        def decide() -> list[v1.Event]:
            events = [*self._cut(), *ledger.sealed(self.run, self.message, halt.reason)]
            if halt.events and halt.start is None:
                return [*events, *halt.events]
            events.append(self._ending(halt.state, halt.error, halt.reason, halt.cause_id))
            return [*self._own(events), *(back.events if back else ()), *halt.events]

        try:
            await self._keep_finished()
            while True:
                back = await halt.rewind() if halt.rewind is not None else None
                try:
                    committed = await self._durably(decide, halt, back.head if back else None)
                    break
                except NotecaseError as error:
                    if back is None or error.reason != v1.ERROR_REASON_SEQUENCE_MISMATCH:
                        raise
        except (NotecaseError, Replayed, Duplicate) as refused:
            halt.refuse(refused)
            if isinstance(refused, NotecaseError) and refused.reason in LOST:
                raise
            if self.live.open is not None:  # the model is asked again, which is not to count twice
                self.live.discard()
                self._model_calls -= 1
        else:
            assert committed is not None
            for call_id in list(self._calls):
                self.stop_call(call_id)
            halt.then(committed)
            halt.done.set_result(committed)
        finally:
            if halt.done.done():  # otherwise whoever waits for it is told when the work ends
                self._halts.remove(halt)

    async def _keep_finished(self) -> None:
        """Commits the results that are there: what came before a halt is kept."""
        for call_id in [call_id for call_id, task in self._calls.items() if task.done()]:
            task = self._calls.pop(call_id, None)
            if task is not None and not task.cancelled():  # nobody gave the call another end meanwhile
                await self._keep(call_id, *task.result())

    def _cut(self) -> list[v1.Event]:
        """The reply being made, as far as it came; its calls were never whole."""
        opened = self.live.open
        if opened is None or not any(block.data for block in opened.blocks):
            self.live.discard()
            return []
        message = self._message(opened, v1.Message.STATUS_INCOMPLETE)
        for part in message.parts:
            if part.HasField("tool_call"):
                part.tool_call.outcome = v1.ToolCall.OUTCOME_CANCELLED
                part.tool_call.error = "The run stopped before the call was whole."
        return [v1.Event(message_added=message)]

    async def _end(self, state: v1.Run.State.ValueType, error: v1.Error | None = None) -> None:
        await self._durably(
            lambda: [
                *self._cut(),
                *ledger.sealed(self.run, self.message, "The run ended."),
                self._ending(state, error),
            ]
        )

    def _ending(
        self, state: v1.Run.State.ValueType, error: v1.Error | None = None, reason: str = "", cause_id: str = ""
    ) -> v1.Event:
        dropped = [event.cause_id for event in self._said]
        change = v1.RunStateChanged(state=state, error=error, reason=reason, dropped_commands=dropped)
        return v1.Event(cause_id=cause_id, run_state_changed=change)

    # ---- commits

    def _consequence(self, events: Sequence[v1.Event]) -> list[v1.Event]:
        """Whether the run waits or goes on once these events are committed."""
        if any(event.HasField("run_state_changed") for event in events) or self.ended:
            return []
        left = ledger.left_open(self.message, events)
        asked = {request.call.call_id for request in self.run.pending_inputs}
        asked |= {event.input_requested.call.call_id for event in events if event.HasField("input_requested")}
        asked -= {
            request.call.call_id
            for request in self.run.pending_inputs
            for event in events
            if event.input_resolved.response.input_id == request.input_id
        }
        mine = [
            call
            for call in left
            if call.outcome == v1.ToolCall.OUTCOME_RUNNING and not call.client_executed and call.call_id not in asked
        ]
        wanted = WAITING if left and not mine else RUNNING
        if wanted == self.run.state:
            return []
        return [v1.Event(run_state_changed=v1.RunStateChanged(state=wanted))]

    async def _durably(
        self, decide: Callable[[], list[v1.Event]], halt: Halt | None = None, if_last_sequence: int | None = None
    ) -> Committed | None:
        """Commits what `decide` says under the session's lock, with its consequence; None when that is nothing. Waits
        for a store that is away, and lets others decide meanwhile. With `if_last_sequence` not all events are the
        run's, and `decide` says which."""

        async def commit() -> Committed | None:
            async with self.live.lock:
                events = decide()
                events += self._consequence(events)
                if not events:
                    return None
                if halt is None:
                    return await self._commit(events)
                return await self._commit(events, halt.once, halt.command, if_last_sequence, halt.start)

        return await self._patiently(commit)

    async def _patiently(self, act: Callable[[], Awaitable[T]]) -> T:
        """Does something again for as long as the store is away."""
        wait, longest = STORE_PATIENCE
        while True:
            try:
                return await act()
            except NotecaseError as error:
                if error.reason != v1.ERROR_REASON_STORE_UNAVAILABLE:
                    raise
                self._log.warning("run_waits_for_store", seconds=wait)
            await asyncio.sleep(wait)
            wait = min(wait * 2, longest)

    def _own(self, events: Sequence[v1.Event]) -> Sequence[v1.Event]:
        """Makes events this run's that are no other's."""
        for event in events:
            if not event.run:
                event.run = self.run.name
                if event.HasField("message_added"):
                    event.message_added.run = self.run.name
        return events

    async def _commit(
        self,
        events: Sequence[v1.Event],
        once: Once | None = None,
        command: CommandId | None = None,
        if_last_sequence: int | None = None,
        start: RunRecord | None = None,
    ) -> Committed:
        if if_last_sequence is None:
            self._own(events)
        committed = await self.live.commit(
            Commit(
                key=self.live.key,
                once=once,
                command=command,
                if_epoch=self.epoch,
                claim=start is not None,
                if_last_sequence=if_last_sequence,
                events=events,
                start=start,
            )
        )
        self.run.CopyFrom(committed.runs.get(self.run.name, self.run))
        self._know(committed.session, committed.events)
        for message in committed.messages.values():
            if open_calls(message):
                self.message = message
            elif self.message is not None and self.message.name == message.name:
                self.message = None
        self._stirred.set()
        if self.ended:
            self._log.info(
                "run_finished",
                state=v1.Run.State.Name(self.run.state).removeprefix("STATE_"),
                reason=errors.reason_name(self.run.error.reason) if self.run.HasField("error") else "",
                model_calls=self.run.usage.model_calls,
                tool_calls=self.run.tool_calls,
                input_tokens=self.run.usage.input_tokens,
                output_tokens=self.run.usage.output_tokens,
            )
        return committed


def _begin(opened: OpenMessage, block: Block) -> Block:
    opened.blocks.append(block)
    return block


def _returned(opened: OpenMessage, call: Block | None, data: v1.ProviderData) -> None:
    """Keeps what the provider gets back with its call, or with the newest reasoning; reasoning that it showed nothing
    of becomes an empty part."""
    blocks = [call] if call else [block for block in opened.blocks if block.kind == "reasoning"]
    (blocks[-1] if blocks else _begin(opened, Block("reasoning"))).provider_data = data


def _used(usage: v1.Usage) -> list[v1.Event]:
    return [v1.Event(usage=usage)]


def _json(opened: OpenMessage) -> Block:
    """The block of a reply that is JSON: one, whatever is thought in between."""
    found = (block for block in opened.blocks if block.kind == "json")
    return next(found, None) or _begin(opened, Block("json"))


def _complaint(problem: str, schema: str) -> str:
    """What a model is told of a reply that is not valid. With the schema: not every provider has shown it."""
    wanted = "Reply again, with nothing but JSON that is valid by this JSON Schema:"
    return f"That reply is not valid: {problem}.\n{wanted}\n{schema}"


def _current(opened: OpenMessage, kind: Literal["text", "reasoning", "refusal"]) -> Block:
    """The block that text of this kind goes on: the newest, if it is of the kind."""
    if opened.blocks and opened.blocks[-1].kind == kind:
        return opened.blocks[-1]
    return _begin(opened, Block(kind))

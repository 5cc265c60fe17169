"""One run at work: build the context, call the model, commit what it made, and again until the run ends.

What is durable is decided by commits alone. Between two of them the worker can be lost at any moment, and the next one,
here or after a restart, goes on from the last: it looks at the log, not at what this object remembers.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Literal, NamedTuple

import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.engine import context
from notecase_server.engine.session import Block, LiveSession, OpenMessage
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Call, Finish, ModelRequest, Provider, Reasoning, Refusal, Text
from notecase_server.store.contract import PAGE_BYTES, CommandId, Commit, Committed, Once, Store
from notecase_server.store.fold import ENDED

log = structlog.get_logger()

DEFAULT_MODEL_CALLS = 10
"""Model calls in a run whose agent sets no limit: enough for a chain of tools, few enough to stop a loop."""

MAX_REPLY_BYTES = PAGE_BYTES - (64 << 10)
"""A reply with its frame fits into one page."""

BLOCK_BYTES = 256
"""What a part needs beside its text: ids, names and frames, rounded up."""

MODEL_REPEATS = 2
"""How often a reply cut in mid-stream is asked for again. Before the first piece retries are the provider's
business."""

STORE_PATIENCE = (0.1, 10.0)
"""Seconds between tries of a commit that the store cannot take, at first and at most. A run waits as long as it takes:
what it has is worth more than its place, and its end must be on record."""


class Stop(NamedTuple):
    """Why a run is to stop now, and what makes the request idempotent."""

    reason: str
    cause_id: str
    once: Once | None
    command: CommandId | None
    sealed: "asyncio.Future[Committed]"
    """The commit that sealed the run, or NotecaseError RUN_ENDED when it ended by itself first."""


class _StoppedError(Exception):
    """The model call was cut because the run is to stop."""


class Worker:
    """Runs one run in one task. Made by Runs."""

    def __init__(
        self,
        live: LiveSession,
        store: Store,
        run: v1.Run,
        agent: v1.Agent,
        epoch: int,
        provider: Provider | None,
        new_id: Callable[[], str],
    ) -> None:
        self.live = live
        self.run = run
        self.last: Committed | None = None
        """The commit that ended the run, once it has ended."""
        self._store = store
        self._agent = agent
        self._epoch = epoch
        self._provider = provider
        self._new_id = new_id
        self._model_calls = run.usage.model_calls + run.attempt - 1
        self._generating: asyncio.Task[Finish] | None = None
        self._stop: Stop | None = None
        self._draining = False
        self._log = log.bind(session=live.key.session, run=run.name)

    def stop(self, stop: Stop) -> bool:
        """Asks the run to stop now. False when somebody did before."""
        if self._stop is not None:
            return False
        self._stop = stop
        if self._generating is not None:
            self._generating.cancel()
        return True

    def drain(self) -> None:
        """Asks the worker to leave the run as it is at its next commit."""
        self._draining = True

    async def work(self) -> None:
        """Returns when the run has ended, was left to a successor, or belongs to another owner."""
        try:
            while self.last is None and not self._draining:
                await self._step()
        except NotecaseError as error:
            if error.reason not in {v1.ERROR_REASON_OWNER_LOST, v1.ERROR_REASON_SESSION_NOT_FOUND}:
                raise
            self._log.info("run_left", reason=errors.reason_name(error.reason))
        finally:
            self.live.open = None
            if self._stop is not None and not self._stop.sealed.done():
                name = f"sessions/{self.live.key.session}/runs/{self.run.name}"
                self._stop.sealed.set_exception(
                    errors.run_ended(name, self.last.runs[self.run.name].state) if self.last else errors.draining()
                )

    async def _step(self) -> None:
        try:
            await self._turn()
        except _StoppedError:
            await self._end(v1.Run.STATE_CANCELLED)
        except NotecaseError as error:
            if error.reason in {v1.ERROR_REASON_OWNER_LOST, v1.ERROR_REASON_SESSION_NOT_FOUND}:
                raise
            await self._end(v1.Run.STATE_FAILED, error.to_proto())
        except Exception:  # noqa: BLE001  (whatever broke, the run's end must be on record)
            request_id = structlog.contextvars.get_contextvars().get("request_id") or self.run.name
            self._log.exception("run_crashed", request_id=request_id)
            await self._end(v1.Run.STATE_FAILED, errors.internal(request_id).to_proto())

    async def _turn(self) -> None:
        if self._stop is not None:
            raise _StoppedError
        if self._provider is None:
            raise errors.model_error(f"This server has no provider {self._agent.llm.provider!r}.")
        request = await context.build(self._store, self.live.key, self.live.user, self.run.name, self._agent)
        finish = await self._generate(self._provider, request)
        opened = self.live.open
        assert opened is not None
        await self._commit_reply(opened, finish)

    async def _generate(self, provider: Provider, request: ModelRequest) -> Finish:
        """One reply, left in the live session's open message; asked for again when it is cut in mid-stream."""
        for repeat in range(MODEL_REPEATS + 1):
            self._count_model_call()
            opened = self.live.begin(self._new_id())
            self._generating = asyncio.create_task(self._read(provider, request, opened))
            try:
                return await self._generating
            except asyncio.CancelledError:
                if self._stop is None:
                    raise
                raise _StoppedError from None
            except NotecaseError as error:
                cut = error.reason == v1.ERROR_REASON_MODEL_UNAVAILABLE and opened.blocks
                if not cut or repeat == MODEL_REPEATS:
                    raise
                self._log.info("model_call_repeated", repeat=repeat + 1)
                self.live.discard()
            finally:
                self._generating = None
            await asyncio.sleep(random.uniform(0, 0.5 * 2**repeat))
            if self._stop is not None:
                raise _StoppedError
        raise AssertionError("the last repeat returns or raises")

    def _count_model_call(self) -> None:
        limit = self._agent.llm.max_model_calls or DEFAULT_MODEL_CALLS
        if self._model_calls >= limit:
            raise errors.limit_exceeded(
                "max_model_calls",
                limit,
                f"The run made {limit} model calls, all that its agent allows, without an end.",
            )
        self._model_calls += 1

    async def _read(self, provider: Provider, request: ModelRequest, opened: OpenMessage) -> Finish:
        calls: dict[int, Block] = {}
        size = 0
        async with aclosing(provider.stream(request)) as stream:
            async for delta in stream:
                match delta:
                    case Finish():
                        return delta
                    case Call(key, tool, text):
                        block = calls.get(key)
                        if block is None:
                            block = calls[key] = _begin(opened, Block("arguments", self._new_id()))
                        block.tool += tool
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

    async def _commit_reply(self, opened: OpenMessage, finish: Finish) -> None:
        message = self._message(opened, v1.Message.STATUS_COMPLETED)
        message.finish_reason = finish.reason
        message.usage.CopyFrom(finish.usage)
        calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
        if calls:
            message.status = v1.Message.STATUS_IN_PROGRESS
        events = [v1.Event(message_added=message), v1.Event(usage=finish.usage)]
        text = "".join(part.text for part in message.parts)
        if self._agent.output_key and text:
            put = v1.StateOp(key=self._agent.output_key, set=v1.Value(string_value=text))
            events.append(v1.Event(state_changed=v1.StateChanged(ops=[put])))
        for call in calls:
            unknown = v1.ToolCall(call_id=call.call_id, tool=call.tool, arguments=call.arguments)
            unknown.outcome = v1.ToolCall.OUTCOME_FAILED
            unknown.error = f"There is no tool {call.tool!r}."
            events.append(v1.Event(tool_finished=unknown))
        if not calls:
            events.append(v1.Event(run_state_changed=v1.RunStateChanged(state=v1.Run.STATE_SUCCEEDED)))
        await self._commit(events)

    def _message(self, opened: OpenMessage, status: v1.Message.Status.ValueType) -> v1.Message:
        message = v1.Message(
            name=opened.name, role=v1.Message.ROLE_ASSISTANT, author=self.run.agent, status=status, run=self.run.name
        )
        for block in opened.blocks:
            text = block.data.decode()
            part = message.parts.add()
            if block.kind == "text":
                part.text = text
            elif block.kind == "reasoning":
                part.reasoning.text = text
            elif block.kind == "refusal":
                part.refusal = text
            else:
                part.tool_call.CopyFrom(
                    v1.ToolCall(
                        call_id=block.call_id, tool=block.tool, arguments=text, outcome=v1.ToolCall.OUTCOME_PENDING
                    )
                )
        return message

    async def _end(self, state: v1.Run.State.ValueType, error: v1.Error | None = None) -> None:
        """Seals what is open and ends the run, in one commit."""
        events = []
        opened = self.live.open
        if opened is not None and any(block.data for block in opened.blocks):
            cut = self._message(opened, v1.Message.STATUS_INCOMPLETE)
            for part in cut.parts:
                if part.HasField("tool_call"):
                    part.tool_call.outcome = v1.ToolCall.OUTCOME_CANCELLED
                    part.tool_call.error = "The run stopped before the call was whole."
            events.append(v1.Event(message_added=cut))
        else:
            self.live.open = None
        ended = v1.RunStateChanged(state=state, error=error)
        stop = self._stop if state == v1.Run.STATE_CANCELLED else None
        if stop is not None:
            ended.reason = stop.reason
        events.append(v1.Event(run_state_changed=ended, cause_id=stop.cause_id if stop else ""))
        committed = await self._commit(events, stop)
        if stop is not None:
            stop.sealed.set_result(committed)

    async def _commit(self, events: Sequence[v1.Event], stop: Stop | None = None) -> Committed:
        for event in events:
            event.run = self.run.name
        commit = Commit(
            key=self.live.key,
            once=stop.once if stop else None,
            command=stop.command if stop else None,
            if_epoch=self._epoch,
            events=events,
        )
        wait, longest = STORE_PATIENCE
        while True:
            try:
                committed = await self.live.commit(commit)
                break
            except NotecaseError as error:
                if error.reason != v1.ERROR_REASON_STORE_UNAVAILABLE:
                    raise
                self._log.warning("run_waits_for_store", seconds=wait)
                await asyncio.sleep(wait)
                wait = min(wait * 2, longest)
        row = committed.runs[self.run.name]
        if row.state in ENDED:
            self.last = committed
            self._log.info(
                "run_finished",
                state=v1.Run.State.Name(row.state).removeprefix("STATE_"),
                reason=errors.reason_name(row.error.reason) if row.HasField("error") else "",
                model_calls=row.usage.model_calls,
                input_tokens=row.usage.input_tokens,
                output_tokens=row.usage.output_tokens,
            )
        return committed


def _begin(opened: OpenMessage, block: Block) -> Block:
    opened.blocks.append(block)
    return block


def _current(opened: OpenMessage, kind: Literal["text", "reasoning", "refusal"]) -> Block:
    """The block that text of this kind goes on: the newest, if it is of the kind."""
    if opened.blocks and opened.blocks[-1].kind == kind:
        return opened.blocks[-1]
    return _begin(opened, Block(kind))

"""AgentService: parse, call, render."""

import sys
from collections.abc import Container, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from google.protobuf.empty_pb2 import Empty
from notecase import v1

from notecase_server import errors
from notecase_server.engine import instructions
from notecase_server.errors import NotecaseError
from notecase_server.rpc import filter as filters
from notecase_server.rpc import validate
from notecase_server.rpc.caller import caller
from notecase_server.rpc.check import MAX_SCHEMA_BYTES, Check
from notecase_server.rpc.desk import NOTHING, Desk, checked, listed, masked, merge, named, once
from notecase_server.store.contract import AgentStore, Answer

AGENT_FILTER: Mapping[str, filters.FieldKind] = {
    "display_name": "text",
    "create_time": "time",
    "update_time": "time",
    "labels": "labels",
}
EDIT_TRIES = 20
"""How often an update without an etag is merged again after a concurrent update."""

AGENT_FIELDS = ("display_name", "description", "llm", "output_key", "labels")


class Agents(v1.AgentServiceServicer):
    def __init__(self, desk: Desk, store: AgentStore) -> None:
        self.desk = desk
        self.store = store

    async def CreateAgent(self, request: v1.CreateAgentRequest, context: Any) -> v1.Agent:
        check = checked(request)
        check.chosen_id("agent_id", request.agent_id)
        validate.agent(check, request.agent, self.desk.providers, self.desk.toolbox)
        await self._judge(check, request.agent)
        check.done()
        agent_id = request.agent_id or self.desk.new_id()
        create = partial(self.store.create_agent, caller.get().tenant, agent_id, request.agent)
        return await self.desk.surely(await once(request, Answer("agent")), Answer("agent"), create)

    async def GetAgent(self, request: v1.GetAgentRequest, context: Any) -> v1.Agent:
        agent_id, revision = named(request, Check.agent)
        agent = await self.store.get_agent(caller.get().tenant, agent_id, revision)
        if agent is None:
            raise errors.not_found("agent", request.name)
        return agent

    async def ListAgents(self, request: v1.ListAgentsRequest, context: Any) -> v1.ListAgentsResponse:
        about = ("agents", caller.get().tenant, request.filter)
        query = listed(Check(), self.desk.pages, request, *about, fields=AGENT_FILTER)
        page = await self.store.list_agents(caller.get().tenant, query)
        return v1.ListAgentsResponse(agents=page.rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def ListAgentRevisions(
        self, request: v1.ListAgentRevisionsRequest, context: Any
    ) -> v1.ListAgentRevisionsResponse:
        check = Check()
        agent_id, _ = check.agent("name", request.name)
        about = ("revisions", caller.get().tenant, request.name)
        query = listed(check, self.desk.pages, request, *about)
        page = await self.store.list_agent_revisions(caller.get().tenant, agent_id, query)
        if not page.rows and query.after is None:
            raise errors.not_found("agent", request.name)
        return v1.ListAgentRevisionsResponse(agents=page.rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def UpdateAgent(self, request: v1.UpdateAgentRequest, context: Any) -> v1.Agent:
        check = checked(request)
        agent_id, revision = check.agent("agent.name", request.agent.name)
        check(revision == 0, "agent.name", "names a revision; an update creates the next one")
        mask = masked(check, request.update_mask, request.agent, AGENT_FIELDS)
        validate.few_of_agent(check, request.agent, mask.paths)
        changed = {"llm", "llm.instruction", "llm.output_schema"}.intersection(mask.paths)
        if changed:
            await self._judge(check, request.agent, changed)
        tenant, etag = caller.get().tenant, request.agent.etag
        repeat = self.desk.sessions.record(await once(request, Answer("agent")), tenant, Answer("agent"))
        for tries_left in reversed(range(EDIT_TRIES)):
            newest = await self.store.get_agent(tenant, agent_id) if agent_id else None
            if not check.violations:
                await self.desk.requests.recall(repeat)
            stale = bool(etag) and etag != (newest.etag if newest is not None else "")
            edited = v1.Agent() if newest is None else deepcopy(newest)
            merge(mask, request.agent, edited)
            body = self._judged(edited)  # fields outside of the mask are not applied, and are not checked
            paths = [f"agent.{path}" for path in mask.paths]
            whole = agent_id and not stale and (newest is not None or request.allow_missing)
            before = self._judged(newest) if whole and newest is not None and body.violations else None
            check.within(body, ["agent"] if whole else paths, paths, before)
            check.done()
            if newest is None and not request.allow_missing:
                raise errors.not_found("agent", request.agent.name)
            if stale:
                raise errors.etag_mismatch(request.agent.name, newest.etag if newest is not None else "")
            try:
                edit = partial(self.store.edit_agent, tenant, agent_id, edited, newest.revision if newest else 0)
                return await self.desk.sessions.surely(repeat, edit)
            except NotecaseError as error:  # another update came between
                if error.reason != v1.ERROR_REASON_ETAG_MISMATCH or not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    def _judged(self, agent: v1.Agent) -> Check:
        """Checks a whole agent."""
        check = Check(most=sys.maxsize)
        validate.agent(check, agent, self.desk.providers, self.desk.toolbox)
        return check

    async def _judge(self, check: Check, agent: v1.Agent, paths: Container[str] = ("llm",)) -> None:
        """Checks the fields that the paths name and whose check needs a thread or a process."""
        if "llm" in paths or "llm.instruction" in paths:
            with check.taking():
                await instructions.parsed(agent.llm.instruction)
        if ("llm" in paths or "llm.output_schema" in paths) and len(agent.llm.output_schema) <= MAX_SCHEMA_BYTES:
            with check.taking():
                await self.desk.schemas.require("agent.llm.output_schema", agent.llm.output_schema)

    async def DeleteAgent(self, request: v1.DeleteAgentRequest, context: Any) -> Empty:
        check = checked(request)
        agent_id, revision = check.agent("name", request.name)
        check(revision == 0, "name", "names a revision; only whole agents can be deleted")
        check.done()
        delete = partial(self.store.delete_agent, caller.get().tenant, agent_id, request.etag)
        await self.desk.surely(await once(request, NOTHING), NOTHING, delete)
        return Empty()

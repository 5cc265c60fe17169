"""RunService: parse, call, render. Streams are in `run`."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from notecase import v1

from notecase_server import errors, names
from notecase_server.auth import rights
from notecase_server.errors import NotecaseError
from notecase_server.names import RunName
from notecase_server.rpc import filter as filters
from notecase_server.rpc import validate
from notecase_server.rpc.caller import caller
from notecase_server.rpc.check import Check
from notecase_server.rpc.desk import Desk, caused_by, checked, listed, named
from notecase_server.rpc.run import claimed
from notecase_server.store import answers
from notecase_server.store.contract import ANSWER_BYTES, Answer, Page, Replayed, RunStore

RUN_FILTER: Mapping[str, filters.FieldKind] = {
    "state": filters.EnumField(v1.Run.State, "STATE_"),
    "agent": "text",
    "create_time": "time",
    "labels": "labels",
}


class RunsService(v1.RunServiceServicer):
    def __init__(self, desk: Desk, store: RunStore) -> None:
        self.desk = desk
        self.store = store
        self.runs = desk.runs

    def Run(self, request: AsyncIterator[v1.RunRequest], context: Any) -> Any:
        return self.desk.streams.run(caller.get().principal.tenant, request, context.write)

    def WatchEvents(self, request: v1.WatchEventsRequest, context: Any) -> Any:
        after = request.after_sequence if request.HasField("after_sequence") else None
        return self.desk.streams.watch(
            caller.get().tenant, request.name, after, request.options, request.if_session_uid, context.write
        )

    async def Invoke(self, request: v1.InvokeRequest, context: Any) -> v1.InvokeResponse:
        check = checked(request)
        validate.start(check, "start", request.start)
        timeout = check.seconds("timeout", request)
        await check.settled()
        try:
            who, caused = caller.get(), await caused_by(request, Answer("started"))
            started = await self.runs.admission.start(who.tenant, claimed(request.start, who.user), caused, who.user)
            key, run_id = started.key, started.run.name
        except Replayed as replayed:
            session, run_id = names.parse_run(v1.Run.FromString(replayed.response).name) or RunName("", "")
            key = await self.desk.session(session)
        row = names.render_run(key.session, await self.runs.commands.wait(key, run_id, timeout))
        answer = v1.InvokeResponse(run=row, reply=row.reply if row.HasField("reply") else None)
        if answer.ByteSize() > ANSWER_BYTES:
            answer.run.ClearField("reply")
        return answer

    async def CreateRun(self, request: v1.CreateRunRequest, context: Any) -> v1.Run:
        check = checked(request)
        validate.start(check, "start", request.start)
        await check.settled()
        who, caused = caller.get(), await caused_by(request, Answer("started"))
        started = await self.runs.admission.start(who.tenant, claimed(request.start, who.user), caused, who.user)
        return names.render_run(started.key.session, started.run)

    async def GetRun(self, request: v1.GetRunRequest, context: Any) -> v1.Run:
        session, run = named(request, Check.run)
        row = await self.store.get_run(await self.desk.session(session), run)
        if row is None:
            raise errors.not_found("run", request.name)
        return names.render_run(session, row[0])

    async def ListRuns(self, request: v1.ListRunsRequest, context: Any) -> v1.ListRunsResponse:
        check, tenant = Check(), caller.get().tenant
        key = None
        if request.parent != "sessions/-":
            key = await self.desk.parent(check, check.session("parent", request.parent))
        about = ("runs", tenant, key.uid if key else "-", request.filter)
        query = listed(check, self.desk.pages, request, *about, fields=RUN_FILTER)
        page: Page[v1.Run] = await self.store.list_runs(tenant, key, query, caller.get().user)
        rows = []
        for row in page.rows:
            found = names.parse_run(row.name)
            assert found is not None
            row.name = found.run
            rows.append(names.render_run(found.session, row))
        return v1.ListRunsResponse(runs=rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def WaitRun(self, request: v1.WaitRunRequest, context: Any) -> v1.Run:
        check = Check()
        session, run = check.run("name", request.name)
        timeout = check.seconds("timeout", request)
        check.done()
        row = await self.runs.commands.wait(await self.desk.session(session), run, timeout, request.after_sequence)
        return names.render_run(session, row)

    async def CancelRun(self, request: v1.CancelRunRequest, context: Any) -> v1.Run:
        check = checked(request)
        session, run = check.run("name", request.name)
        validate.cancel(check, "cancel", request.cancel)
        check.done()
        answer = Answer("run", run)
        caused = await caused_by(request, answer)
        key = await self.desk.session(session, caused.once)
        approver = rights.approver(caller.get().principal)
        try:
            done = await self.runs.commands.cancel(key, run, request.cancel, caused, approver)
        except NotecaseError as error:
            if error.reason != v1.ERROR_REASON_RUN_NOT_FOUND or not request.allow_missing:
                raise
            done = await self.runs.commands.cancel_unstarted(key, run, request.cancel, caused, approver)
        ended: v1.Run = answers.of(answer, done)
        return ended

    async def SendCommand(self, request: v1.SendCommandRequest, context: Any) -> v1.SendCommandResponse:
        check = Check()
        session = check.session("session", request.session)
        run = check.run("run", request.run) if request.run else RunName(session, "")
        if request.run and run.session and session:
            check(run.session == session, "run", "is a run of another session")
        check.uid("if_session_uid", request.if_session_uid)
        self.desk.streams.check(check, session, request.command)
        await check.settled()
        key = await self.desk.session(session, if_uid=request.if_session_uid)
        return v1.SendCommandResponse(result=await self.desk.streams.command(key, request.command, run.run))

"""MessageService: parse, call, render."""

import asyncio
from typing import Any

from notecase import v1

from notecase_server import errors, names
from notecase_server.engine.content import MAX_APPENDED_BYTES
from notecase_server.engine.opening import incoming
from notecase_server.rpc import validate
from notecase_server.rpc.caller import caller, frame_bytes
from notecase_server.rpc.check import Check
from notecase_server.rpc.desk import LARGE_BYTES, LARGE_PAGE, Desk, checked, listed, named, once
from notecase_server.store import answers
from notecase_server.store.contract import Answer, Commit, History


class Messages(v1.MessageServiceServicer):
    def __init__(self, desk: Desk, store: History) -> None:
        self.desk = desk
        self.store = store

    async def ListMessages(self, request: v1.ListMessagesRequest, context: Any) -> v1.ListMessagesResponse:
        check = Check()
        session = check.session("parent", request.parent)
        known = request.order_by in {"", "sequence", "sequence asc", "sequence desc"}
        check(known, "order_by", 'must be "sequence" or "sequence desc"')
        key = await self.desk.parent(check, session)
        about = ("messages", key.tenant, key.uid, request.order_by, str(request.show_superseded))
        query = listed(check, self.desk.pages, request, *about)
        newest_first = request.order_by == "sequence desc"
        async with self.desk.patiently(heavy=query.limit > LARGE_PAGE):
            page = await self.store.list_messages(key, query, newest_first, superseded=request.show_superseded)
        rows = [names.render_message(key.session, row) for row in page.rows]
        return v1.ListMessagesResponse(messages=rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def GetMessage(self, request: v1.GetMessageRequest, context: Any) -> v1.Message:
        session, message = named(request, Check.message)
        row = await self.store.get_message(await self.desk.session(session), message)
        if row is None:
            raise errors.not_found("message", request.name)
        return names.render_message(session, row)

    async def AppendMessages(self, request: v1.AppendMessagesRequest, context: Any) -> v1.AppendMessagesResponse:
        check = checked(request)
        parent = check.session("parent", request.parent)
        check(len(request.messages) > 0, "messages", "is empty")
        roles = [v1.Message.ROLE_USER, v1.Message.ROLE_ASSISTANT, v1.Message.ROLE_SYSTEM]
        validate.messages(check, "messages", request.messages, roles)
        await check.settled()
        answer = Answer("messages")
        repeat = await once(request, answer)
        key = await self.desk.session(parent, repeat)
        _, session = await self.desk.sessions.watched(key)
        large = frame_bytes.get() > LARGE_BYTES
        async with self.desk.patiently(heavy=large):  # before the messages are copied
            kept = await self.desk.contents.kept(key, request.messages, most=MAX_APPENDED_BYTES)
            said = incoming(self.desk.new_id, kept, session.user)
            events = [v1.Event(cause_id=request.request_id, message_added=message) for message in said]
            expected = request.if_last_sequence if request.HasField("if_last_sequence") else None
            principal = caller.get().principal_name
            commit = Commit(key=key, once=repeat, if_last_sequence=expected, events=events, principal=principal)
            done = await self.desk.sessions.commit(commit)
        if large:
            await asyncio.sleep(0)
        made: v1.AppendMessagesResponse = answers.of(answer, done)
        return made

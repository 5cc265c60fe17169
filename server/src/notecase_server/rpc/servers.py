"""ServerService: parse, call, render."""

from typing import Any

from notecase import v1

from notecase_server.rpc.caller import caller
from notecase_server.rpc.desk import Desk
from notecase_server.rpc.frames import MAX_MESSAGE_BYTES
from notecase_server.rpc.pages import MAX_PAGE_SIZE


class Servers(v1.ServerServiceServicer):
    def __init__(self, desk: Desk, store: str) -> None:
        """`store` is the store's kind."""
        self.desk = desk
        self.store = store

    async def GetServerInfo(self, request: v1.GetServerInfoRequest, context: Any) -> v1.ServerInfo:
        who = caller.get()
        role = v1.Key.Role.Value(f"ROLE_{who.principal.role.name}")
        return v1.ServerInfo(
            caller=v1.ServerInfo.Caller(role=role, user=who.user) if who.principal.subject else None,
            version=self.desk.version,
            store=self.store,
            providers=self.desk.providers,
            functions=self.desk.toolbox.functions,
            mcp_servers=self.desk.toolbox.mcp_servers,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_page_size=MAX_PAGE_SIZE,
            max_runs=self.desk.max_runs,
            max_blob_bytes=self.desk.contents.limits.blob,
            max_session_bytes=self.desk.contents.limits.session,
        )

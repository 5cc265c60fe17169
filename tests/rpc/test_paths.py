"""A call whose path is not text ends alone."""

from uuid import uuid4

from notecase import v1
from notecase_server.rpc.peers import Peers
from notecase_server.rpc.standby import build_standby

from tests.support import http2
from tests.support.server import running

NOT_UTF8 = http2.header_block("/xx/Xx").replace(b"/xx/Xx", b"/\xff\xfe/Xx")
UNKNOWN_METHOD = b"grpc-status\x0212"


async def test_a_path_that_is_not_utf8_ends_its_own_call_and_no_server() -> None:
    """It ended the task of grpc that accepts calls, and with it the server."""
    async with running() as served:
        assert UNKNOWN_METHOD in await http2.trailers(served.address, NOT_UTF8)
        await served.info.GetServerInfo(v1.GetServerInfoRequest())


async def test_a_server_on_standby_stays_there_too() -> None:
    server = await build_standby(Peers(), lambda: uuid4().hex)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    for _ in range(2):
        assert b"grpc-status\x0214" in await http2.trailers(f"127.0.0.1:{port}", NOT_UTF8)
    await server.stop(None)

"""An address is judged before anything is sent to it, and a server that is away is named at once."""

import asyncio
import logging

import grpc
import pytest
from notecase import Client, NotecaseError, Retry, connection, v1
from notecase.address import with_port

INFO = v1.GetServerInfoRequest()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("127.0.0.1:7421", "127.0.0.1:7421"),
        ("127.0.0.1", "127.0.0.1:7420"),
        ("agents.example.org", "agents.example.org:7420"),
        ("::1", "[::1]:7420"),
        ("[::1]", "[::1]:7420"),
        ("[::1]:7421", "[::1]:7421"),
        ("unix:/run/notecase.sock", "unix:/run/notecase.sock"),
        ("dns:///agents.example.org:7421", "dns:///agents.example.org:7421"),
    ],
)
def test_an_address_without_a_port_has_port_7420(given: str, taken: str) -> None:
    """Where gRPC would take 443."""
    assert taken == with_port(given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "the address is empty; leave it out for 127.0.0.1:7420"),
        (" ", "the address is empty; leave it out for 127.0.0.1:7420"),
        (
            "http://localhost:7421/v1",
            "'http://localhost:7421/v1' is a URL; an address has no 'http' and no path, for example 'localhost:7421'",
        ),
        ("localhost:99999", "'localhost:99999' has port '99999'; a port is a number from 1 to 65535"),
        ("localhost:0", "'localhost:0' has port '0'; a port is a number from 1 to 65535"),
        ("localhost:grpc", "'localhost:grpc' has port 'grpc'; a port is a number from 1 to 65535"),
        ("localhost:", "'localhost:' is not an address; write HOST:PORT, for example '127.0.0.1:7420'"),
        (":7420", "':7420' is not an address; write HOST:PORT, for example '127.0.0.1:7420'"),
        ("local host:7420", "'local host:7420' is not an address; write HOST:PORT, for example '127.0.0.1:7420'"),
        ("localhost/v1", "'localhost/v1' is not an address; write HOST:PORT, for example '127.0.0.1:7420'"),
        ("[::1:7420", "'[::1:7420' is not an address; write HOST:PORT, for example '127.0.0.1:7420'"),
        ("[name]:7420", "'[name]:7420' is not an address; write HOST:PORT, for example '127.0.0.1:7420'"),
    ],
)
async def test_what_is_not_an_address_is_refused_as_it_was_written(
    given: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"address|port") as refused:
        Client(given)
    assert told == str(refused.value)
    monkeypatch.setenv("NOTECASE_ADDRESS", given)
    if given:  # a variable that is empty counts as absent
        with pytest.raises(ValueError, match=r"address|port"):
            Client()


async def test_a_server_that_is_away_is_logged_at_the_second_try(caplog: pytest.LogCaptureFixture) -> None:
    """Which comes after a tenth of a second: with its address, the cause, and how long it will be tried."""
    why = "127.0.0.1:1 cannot be reached: Failed to connect to remote host: Connection refused"
    async with Client("127.0.0.1:1", retry=Retry(tries=2, first_delay=0.01)) as client:
        with pytest.raises(NotecaseError) as away:
            await client.put_state("app", "key", 1)
    assert (grpc.StatusCode.UNAVAILABLE, why) == (away.value.code, away.value.message)
    assert [("WARNING", f"{why}. Trying again, for at most 0.03 s.")] == [
        (record.levelname, record.getMessage()) for record in caplog.records if record.name == "notecase"
    ]


async def test_a_server_that_is_silent_is_logged_while_grpc_still_waits(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts the connection and says nothing; gRPC gives up after 20 s."""
    monkeypatch.setattr(connection, "TOLD_AFTER", 0.01)
    logged = asyncio.Event()

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.set()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await logged.wait()
        writer.close()

    handler = Listening()
    connection.log.addHandler(handler)
    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as silent:
        address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        async with Client(address, retry=Retry(tries=0)) as client:
            call = asyncio.ensure_future(client.get_state("app"))
            await logged.wait()
            assert f"{address} has not answered for 0.01 s; still connecting." in caplog.text
            call.cancel()
            await asyncio.wait([call])
    connection.log.removeHandler(handler)


@pytest.mark.parametrize(
    ("says", "why"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "it speaks HTTP/1"), (b"220 mail ready\r\n", "it does not speak HTTP/2")],
    ids=["http", "another"],
)
async def test_a_server_of_another_kind_has_an_error_of_another_kind(says: bytes, why: str) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, Client(address, retry=Retry(tries=0)) as client:
        with pytest.raises(NotecaseError, match=f"{address} is not a gRPC server: {why}"):
            await client.get_state("app")

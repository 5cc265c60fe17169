"""What else calls a gRPC server by its own description: evans at a terminal, grpcui in a browser, ghz for load."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest
from google.protobuf.descriptor_pool import Default
from notecase import v1

from tests.support.server import Running, running

Find = Callable[[str], str]

SERVICES = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    *(
        f"notecase.v1.{name}Service"
        for name in ("Agent", "Audit", "Blob", "Key", "Message", "Run", "Server", "Session", "State", "Tenant")
    ),
]


@pytest.fixture
async def served() -> AsyncIterator[Running]:
    async with running("memory:") as server:
        yield server


async def output(*words: str, typed: str = "") -> str:
    """What a command that succeeds prints."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate(typed.encode())
    assert (0, "") == (process.returncode, errors.decode()), out.decode()
    return out.decode()


def evans(tool: Find, address: str) -> list[str]:
    host, _, port = address.rpartition(":")
    return [tool("evans"), "--host", host, "--port", port, "--reflection", "cli"]


async def test_evans_lists_and_describes_all(tool: Find, served: Running) -> None:
    """Services, the methods of one by `package.service.method`, and messages."""
    command = evans(tool, served.address)
    assert SERVICES == (await output(*command, "list")).split()
    methods = [f"notecase.v1.StateService.{name}" for name in ("GetState", "PutState", "UpdateState")]
    assert methods == (await output(*command, "list", "notecase.v1.StateService")).split()
    for symbol, kind in [*((name, "service") for name in SERVICES), ("notecase.v1.Session", "message")]:
        described = await output(*command, "desc", symbol)
        assert described.startswith(f"{symbol}:\n{kind} {symbol.rpartition('.')[2]} {{\n")


async def test_evans_calls(tool: Find, served: Running) -> None:
    request = {"name": "app/state", "key": "k", "value": {"int_value": "9007199254740993"}}
    command = [*evans(tool, served.address), "call", "notecase.v1.StateService.PutState"]
    assert {"int_value": "9007199254740993"} == json.loads(await output(*command, typed=json.dumps(request)))["value"]
    state = await served.state.GetState(v1.GetStateRequest(name="app/state"))
    assert 9007199254740993 == state.entries["k"].value.int_value


@pytest.mark.parametrize("method", ["PutState", "UpdateState"])
@pytest.mark.parametrize("separator", ["/", "."])
async def test_ghz_finds_a_method_by_either_spelling(tool: Find, served: Running, separator: str, method: str) -> None:
    request = {
        "PutState": {"name": "app/state", "key": "k", "value": {"int_value": 1}},
        "UpdateState": {"name": "app/state", "ops": [{"key": "k", "set": {"int_value": 1}}]},
    }[method]
    call = f"notecase.v1.StateService{separator}{method}"
    options = ("--insecure", "--total=20", "--concurrency=2", "--format=json", f"--data={json.dumps(request)}")
    report = json.loads(await output(tool("ghz"), *options, f"--call={call}", served.address))
    assert (20, {"OK": 20}) == (report["count"], report["statusCodeDistribution"])
    assert 20 == (await served.state.GetState(v1.GetStateRequest(name="app/state"))).version


@asynccontextmanager
async def opened(grpcui: str, address: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A browser's requests to a separate grpcui, on a port that the system chose."""
    process = await asyncio.create_subprocess_exec(
        *(grpcui, "-plaintext", "-port=0", "-open-browser=false", address),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        told = (await process.stdout.readline()).decode()
        page = re.search(r"http://127\.0\.0\.1:\d+/", told)
        assert page, told
        jar = aiohttp.CookieJar(unsafe=True)  # cookies of an address without a name
        async with aiohttp.ClientSession(page[0], cookie_jar=jar, raise_for_status=True) as browser:
            yield browser
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_grpcui_opens_and_calls(tool: Find, served: Running) -> None:
    """The page has every service but reflection, which grpcui hides; each method has a form; and a call is made."""
    async with opened(tool("grpcui"), served.address) as browser:
        async with browser.get("") as response:
            page = await response.text()
            token = response.cookies["_grpcui_csrf_token"].value
        shown = [name for name in SERVICES if "reflection" not in name]
        assert shown == [name for name in SERVICES if f'value="{name}"' in page]
        for service in ("Agent", "Blob", "Message", "Run", "Server", "Session", "State"):
            descriptor = Default().FindServiceByName(f"notecase.v1.{service}Service")
            for method in descriptor.methods:
                async with browser.get("metadata", params={"method": method.full_name}) as response:
                    form = await response.json(content_type=None)
                assert method.input_type.full_name == form["requestType"]
        body = {"metadata": [], "data": [{"name": "app/state", "key": "k", "value": {"int_value": "7"}}]}
        invoke = browser.post(
            "invoke/notecase.v1.StateService.PutState", json=body, headers={"x-grpcui-csrf-token": token}
        )
        async with invoke as response:
            result = await response.json(content_type=None)
    assert result["error"] is None, result
    assert 7 == (await served.state.GetState(v1.GetStateRequest(name="app/state"))).entries["k"].value.int_value

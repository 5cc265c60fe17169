"""A provider is loaded while the server serves, and calls that come earlier wait for it."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest
from notecase import v1
from notecase_server import serve
from notecase_server.config import ProviderSettings, Settings
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Delta, Finish, ModelRequest, Provider
from notecase_server.models.deferred import Deferred
from notecase_server.serve import ProviderSettingsError, make_providers

REQUEST = ModelRequest("m", "", (), v1.Generation())


class Quick:
    """A provider that answers with nothing but its end."""

    def __init__(self) -> None:
        self.closed = False

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        yield Finish("stop", v1.Usage(model=request.model, model_calls=1))

    async def close(self) -> None:
        self.closed = True


async def asked(provider: Provider) -> list[str]:
    async with aclosing(provider.stream(REQUEST)) as stream:
        return [piece.usage.model async for piece in stream if isinstance(piece, Finish)]


def loading(gate: asyncio.Event, made: Quick | Exception) -> "asyncio.Task[Provider]":
    async def load() -> Provider:
        await gate.wait()
        if isinstance(made, Exception):
            raise made
        return made

    return asyncio.create_task(load())


async def test_calls_wait_until_the_provider_is_there() -> None:
    gate, quick = asyncio.Event(), Quick()
    provider = Deferred("big", loading(gate, quick))
    async with asyncio.TaskGroup() as group:
        early = [group.create_task(asked(provider)) for _ in range(2)]
        await asyncio.sleep(0)
        gate.set()
    assert [["m"], ["m"]] == [call.result() for call in early]
    assert ["m"] == await asked(provider)
    await provider.close()
    assert quick.closed


async def test_a_cancelled_call_leaves_the_provider_to_others() -> None:
    gate = asyncio.Event()
    provider = Deferred("big", loading(gate, Quick()))
    cut = asyncio.create_task(asked(provider))
    await asyncio.sleep(0)
    cut.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cut
    gate.set()
    assert ["m"] == await asked(provider)


async def test_what_cannot_be_loaded_is_an_error_of_every_call() -> None:
    gate = asyncio.Event()
    provider = Deferred("big", loading(gate, OSError("no certificates")))
    early = asyncio.create_task(asked(provider))
    gate.set()
    for call in (early, asked(provider)):
        with pytest.raises(NotecaseError) as error:
            await call
        assert v1.ERROR_REASON_MODEL_ERROR == error.value.reason
        assert "certificates" not in error.value.message
    await provider.close()


async def test_the_settings_are_judged_before_anything_is_loaded() -> None:
    bad = ProviderSettings(name="big", kind="openai", api_key="two words", base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ProviderSettingsError, match="The big provider cannot be used: the API key contains a space"):
        make_providers(Settings(listen="", providers=(bad,)), lambda make: pytest.fail("It is loaded."))


def test_providers_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made in a thread, and msgspec crashes when two threads use one of its types for the first time."""
    held = list[bool]()

    def made(given: ProviderSettings) -> Quick:
        held.append(serve.MAKING.locked())
        return Quick()

    monkeypatch.setattr(serve, "make_provider", made)
    makes = list[Callable[[], Provider]]()
    given = [ProviderSettings(name=name, kind="openai", api_key="k", base_url="http://127.0.0.1:1/v1") for name in "ab"]
    make_providers(Settings(listen="", providers=tuple(given)), makes.append)  # type: ignore[arg-type]
    for make in makes:
        make()
    assert [True, True] == held
    assert not serve.MAKING.locked()


def test_a_server_imports_no_library_of_a_provider_before_it_serves() -> None:
    program = """
import asyncio, sys
from notecase_server.cli.serve import serve
from notecase_server.config import ProviderSettings, Settings
from notecase_server.serve import make_providers
given = ProviderSettings(name="big", kind="openai", api_key="k", base_url="http://127.0.0.1:1/v1")
makes = []
make_providers(Settings(listen="", providers=(given,)), makes.append)
print(sorted({"aiohttp", "openai"} & set(sys.modules)))
makes[0]()
print(sorted({"aiohttp", "openai"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ["[]", "['aiohttp', 'openai']"] == done.stdout.splitlines()

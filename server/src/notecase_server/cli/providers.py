"""`notecase providers`: tests model providers."""

import asyncio
import time
from contextlib import aclosing
from pathlib import Path

import click
from notecase import v1

from notecase_server.auth.tables import SettingsError
from notecase_server.cli.serve import serve
from notecase_server.cli.serve_settings import providers as settings_of
from notecase_server.config import ProviderSettings, configure_logging
from notecase_server.errors import NotecaseError, reason_name
from notecase_server.models.contract import Finish, ModelRequest
from notecase_server.serve import ProviderSettingsError, make_provider

QUESTION = "Reply with the word ready, and nothing else."


@click.group()
def providers() -> None:
    """Test model providers."""


@providers.command()
@click.argument("name")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="NOTECASE_CONFIG",
    show_envvar=True,
    metavar="FILE",
    help="The configuration file with the provider; by default OPENAI_API_KEY and OPENAI_BASE_URL set it.",
)
def test(name: str, config: Path | None) -> None:
    """Ask the provider NAME one short question, and print the result.

    The exit code is 1 if the provider fails. The question is an ordinary call, which the provider may charge for; it is
    not retried.
    """
    configure_logging("console", "warning")
    try:
        known = {one.name: one for one in settings_of(serve, config)}
    except SettingsError as error:
        raise click.ClickException(f"{config} cannot be used:\n{error}") from None
    if name not in known:
        advice = "" if config else " Set OPENAI_API_KEY or OPENAI_BASE_URL, or name a configuration file with --config."
        raise click.ClickException(f"There is no provider {name!r}, only {' and '.join(known)}.{advice}")
    try:
        asyncio.run(_ask(known[name]))
    except ProviderSettingsError as error:
        raise click.ClickException(str(error)) from None
    except NotecaseError as error:
        raise click.ClickException(f"{reason_name(error.reason)}: {error.message}") from None


async def _ask(given: ProviderSettings) -> None:
    provider = make_provider(given)
    asked = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text=QUESTION)])
    request = ModelRequest("", "", [asked], v1.Generation())
    begun, first = time.monotonic(), 0.0
    try:
        async with aclosing(provider.stream(request)) as stream:
            async for delta in stream:
                first = first or time.monotonic() - begun
                if isinstance(delta, Finish):
                    used = delta.usage
                    click.echo(f"model: {used.model}\nfirst token: {first * 1000:.0f} ms")
                    click.echo(f"usage: {used.input_tokens} input tokens, {used.output_tokens} output tokens")
    finally:
        await provider.close()

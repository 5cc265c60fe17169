"""Makes the settings of a server of the options of `serve`, of its configuration file and of the environment."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import structlog
from click.core import ParameterSource

from notecase_server.auth.tables import Mistake, SettingsError
from notecase_server.cli.options import DEFAULT_ADDRESS
from notecase_server.config import (
    OFFLINE,
    ProviderSettings,
    Settings,
    admin_key_from_environment,
    providers_from_environment,
)
from notecase_server.config_file import KEYS, PROVIDER_DEFAULTS, ConfigFile, by_key, is_exposed, read_config
from notecase_server.serve import ProviderSettingsError, check_provider, settings_mistakes
from notecase_server.serve_check import missing_parts
from notecase_server.tools.contract import ToolSettingsError
from notecase_server.tools.mcp_settings import read_mcp_servers

_NAMES = {each.name for each in fields(Settings)}

_FOUND = "notecase.config"

log = structlog.get_logger()


def load(context: click.Context, option: click.Parameter, value: Path | None) -> None:
    """Reads the configuration file before the other options, whose defaults it then says. Raises ClickException with
    all that is wrong with it."""
    if value is None:
        return
    try:
        found = read_config(value, lambda name, given: complaint(context.command, name, given))
        if found.mistakes:
            raise SettingsError(found.mistakes)
    except SettingsError as error:
        raise click.ClickException(f"{value} cannot be used:\n{error}") from None
    context.default_map = dict(found.options)
    context.meta[_FOUND] = found


def settings(values: Mapping[str, Any]) -> Settings:
    """Returns the settings of the command that runs, by the values of its options. Raises ToolSettingsError for the
    file of MCP servers, and SettingsError."""
    found = click.get_current_context().meta.get(_FOUND, ConfigFile())
    made = _settings(values, found)
    for path in exposed(made, found):
        log.warning("secret_exposed", file=str(path), problem="Other users of this machine can read it.")
    if overridden := _overridden(values, found):
        log.warning("config_overridden", keys=overridden)
    if mistakes := settings_mistakes(made):
        raise SettingsError(mistakes)
    return made


def exposed(made: Settings, found: ConfigFile) -> list[Path]:
    """Returns the files with secrets that all users of this machine can read."""
    files = (made.tls_key, made.store_password_file)
    return [*found.exposed, *(path for path in files if path is not None and is_exposed(path))]


def _overridden(values: Mapping[str, Any], found: ConfigFile) -> list[str]:
    """Returns the keys of the file to which an option or its variable gives another value, each with what does so."""
    context = click.get_current_context()
    told = []
    for option in context.command.params:
        if not isinstance(option, click.Option) or option.name not in found.options:
            continue
        by = {ParameterSource.COMMANDLINE: option.opts[0], ParameterSource.ENVIRONMENT: str(option.envvar)}
        name = by.get(context.get_parameter_source(option.name) or ParameterSource.DEFAULT)
        if name and values[option.name] != option.process_value(context, found.options[option.name]):
            told.append(f"{KEYS[option.name]} by {name}")
    return told


def overriding_variables(command: click.Command, found: ConfigFile) -> dict[str, str]:
    """Returns the variables that are set and take precedence over keys of the file, by key."""
    context = click.Context(command)
    return {
        KEYS[option.name]: str(option.envvar)
        for option in command.params
        if isinstance(option, click.Option)
        and option.name in found.options
        and option.resolve_envvar_value(context) is not None
    }


class Checked(NamedTuple):
    """What a configuration file says by itself, without options and their variables."""

    settings: Settings
    file: ConfigFile
    mistakes: tuple[Mistake, ...]
    """All mistakes that keep a server from starting, each by its key."""


def check(command: click.Command, path: Path) -> Checked:
    """Reads a configuration file for `command`, which is `serve`. Raises SettingsError where it cannot be read."""
    found = read_config(path, lambda name, given: complaint(command, name, given))
    context = click.Context(command)
    values: dict[str, Any] = {"listen": DEFAULT_ADDRESS}
    for option in command.params:
        if option.name in found.options:
            values[option.name] = option.process_value(context, found.options[option.name])
    mistakes = list(found.mistakes)
    wrong = {mistake.setting for mistake in mistakes}
    try:
        made = _settings(values, found)
    except ToolSettingsError as error:
        mistakes.append(Mistake("server.mcp_config", str(error)))
        made = _settings({**values, "mcp_config": None}, found)
    mistakes += [one for one in map(by_key, settings_mistakes(made)) if one.setting not in wrong]
    for number, provider in enumerate(made.providers if found.providers else ()):
        try:
            check_provider(provider)
        except ProviderSettingsError as error:
            mistakes.append(Mistake(f"provider[{number}]", str(error)))
    return Checked(made, found, tuple(mistakes))


def check_parts(checked: Checked) -> list[Mistake]:
    """Looks for the parts that the file refers to, each by its key: see `missing_parts`."""
    return [by_key(one) for one in missing_parts(checked.settings, checked.file.mcp_servers)]


def providers(command: click.Command, path: Path | None) -> tuple[ProviderSettings, ...]:
    """Returns the providers of a configuration file, or of the environment where there is none. Raises SettingsError
    for whatever is wrong with the file."""
    if path is None:
        return providers_from_environment() or (OFFLINE,)
    found = check(command, path)
    if found.mistakes:
        raise SettingsError(found.mistakes)
    return found.settings.providers or (OFFLINE,)


def complaint(command: click.Command, name: str, value: object) -> str:
    """Returns the mistake in a file's value for an option, or ""."""
    option = next(one for one in command.params if one.name == name)
    assert isinstance(option, click.Option)
    if option.is_flag:
        kind, right = "true or false", isinstance(value, bool)
    elif option.multiple:
        kind, right = "a list of strings", isinstance(value, list) and all(isinstance(one, str) for one in value)
    elif isinstance(option.type, click.IntRange):
        kind, right = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(option.type, click.FloatRange):
        kind, right = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    else:
        kind, right = "a string", isinstance(value, str)
    if not right:
        return f"This must be {kind}."
    try:
        option.process_value(click.Context(command), value)
    except click.BadParameter as error:
        return error.message
    return ""


def _settings(values: Mapping[str, Any], found: ConfigFile) -> Settings:
    mcp_config = values.get("mcp_config")
    defaults = {name: values[name] for name in PROVIDER_DEFAULTS if name in values}
    providers = tuple(ProviderSettings(**{**defaults, **given}) for given in found.providers)
    if not providers:
        providers = tuple(_with(provider, defaults) for provider in providers_from_environment())
    return Settings(
        admin_key=admin_key_from_environment(),
        providers=providers,
        listed_issuers=found.issuers,
        listed_principals=found.principals,
        mcp_servers={**found.mcp_servers, **(read_mcp_servers(mcp_config) if mcp_config else {})},
        **{name: given for name, given in values.items() if name in _NAMES},
    )


def _with(provider: ProviderSettings, defaults: Mapping[str, Any]) -> ProviderSettings:
    return replace(provider, **defaults) if provider.kind == "openai" else provider

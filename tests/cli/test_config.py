"""`--config`, `notecase config check` and `notecase providers test`: one file says it all, and nothing wrong in it is
passed over."""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from cryptography import x509
from notecase import Client, v1
from notecase_server.cli import main
from notecase_server.cli.providers import _ask
from notecase_server.cli.serve import serve
from notecase_server.cli.serve_settings import providers as settings_of
from notecase_server.config_file import KEYS
from notecase_server.errors import NotecaseError

from tests.cli.command import COMMAND, Done, notecase, spawn
from tests.promises import ROOT
from tests.support.authority import Authority
from tests.support.issuer import SigningKey
from tests.support.openai_server import OpenAIServer, error, reply
from tests.support.server import Spawned

PAGE = (ROOT / "docs" / "operate.md").read_text().partition("## The configuration file")[2]

SECRETS = {"MAIN_KEY": "k-1", "MAIN_ORGANISATION": "o-1", "FILES_TOKEN": "t-1", "SEARCH_AUTHORIZATION": "Bearer b-1"}

TOOLS = '''from notecase_server.tools.functions import tool


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b
'''

OPTIONS = {option.name for option in serve.params if option.name != "config"}

WRONG = """
[server]
listn = "127.0.0.1:0"
grace = "2"
tools = "one"
log_level = "loud"
[limits]
max_runs = 0
max_calls = true
[tls]
cert = "missing.pem"
[provider_defaults]
retry_time = -1
[[provider]]
name = "main"
key = "secret-1"
key_env = "MISSING"
first_timeout = 0
max_concurrent = 1.5
headers = {authorization = "Bearer secret-1"}
header_env = {X-Other = "MISSING"}
[[provider]]
name = "main"
kind = "opnai"
base_url = "ftp://models.example"
[[issuer]]
issuer = "https://ci.example"
audience = "notecase"
algorithms = ["ES256"]
jwks_file = "keys.json"
tenant = "acme"
rolle = "user"
[[client_principal]]
name = "acme"
role = "chief"
tenant = "acme"
[mcp.files]
comand = "files-mcp"
[mcp.search]
url = "https://mcp.example/mcp"
pass_env = "MISSING"
[extra]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "notecase.toml"
    path.write_text(text)
    return path


async def checked(path: Path, env: Mapping[str, str]) -> Done:
    """`config check` in a process that begins with this environment, from which modules are imported."""
    process = await spawn(*COMMAND, "config", "check", str(path), env=env)
    out, err = await process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


def given(path: Path, *arguments: str) -> dict[str, Any]:
    """The options of `serve` with that file."""
    return serve.make_context("serve", ["--config", str(path), *arguments]).params


def test_every_option_has_a_key_that_the_page_tells() -> None:
    assert OPTIONS == set(KEYS)
    assert len(KEYS) == len(set(KEYS.values()))
    expected = re.sub(r"`\.(\w+)`", r"`provider_defaults.\1`", PAGE)
    assert set() == {key for key in KEYS.values() if f"`{key}`" not in expected and not key.startswith("limits.max_")}


def value_for(option: click.Option) -> tuple[str, object]:
    """A value that is not the option's default, as TOML has it, and as the command gets it."""
    if option.is_flag:
        return "true", True
    if option.multiple:
        return '["one", "two"]', ("one", "two")
    if isinstance(option.type, click.Choice):
        return f'"{option.type.choices[-1]}"', option.type.choices[-1]
    if isinstance(option.type, click.IntRange):
        return "77", 77
    if isinstance(option.type, click.FloatRange):
        return "7", 7.0
    if option.name in {"listen", "listen_mtls"}:
        return '"127.0.0.1:7"', "127.0.0.1:7"
    if isinstance(option.type, click.Path):
        return '"settings.toml"', Path("settings.toml")
    return '"text"', "text"


@pytest.mark.parametrize("name", sorted(KEYS))
def test_a_key_says_what_its_option_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.toml").write_text("")
    option = next(one for one in serve.params if one.name == name)
    assert isinstance(option, click.Option)
    text, value = value_for(option)
    section, _, key = KEYS[name].partition(".")
    assert value == given(written(tmp_path, f"[{section}]\n{key} = {text}\n"))[name]


TOO_MUCH = {
    "max_calls": ["3000000000", "9223372036854775807"],
    "max_blob_bytes": [str(1 << 60)],
    "audit_days": ["999999999"],
    "store_connections": ["1000000"],
    "max_retries": ["2000"],
    **{key: ["inf", "nan", "1e300"] for key in ("grace", "store_lease", "idle_timeout", "retry_time")},
    "listen": ["127.0.0.1:99999", "127.0.0.1:065536", "unix:/run/notecase.sock", "dns:localhost"],
    "listen_mtls": ["127.0.0.1:65536"],
}
"""Values that would break the server later, of options by name."""


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in TOO_MUCH.items() for value in values])
def test_a_value_that_no_server_could_work_with_is_refused(tmp_path: Path, name: str, value: str) -> None:
    """As an option, and in the file."""
    with pytest.raises(click.BadParameter):
        serve.make_context("serve", [f"--{name.replace('_', '-')}", value])
    section, _, key = KEYS[name].partition(".")
    text = f'"{value}"' if "listen" in name else value
    with pytest.raises(click.ClickException) as found:
        given(written(tmp_path, f"[{section}]\n{key} = {text}\n"))
    assert f"{KEYS[name]}: " in found.value.message


@pytest.mark.parametrize("number", ["inf", "nan", "1e300"])
@pytest.mark.parametrize("table", ["provider", "mcp"])
def test_a_time_that_never_ends_is_refused_in_tables_as_well(tmp_path: Path, table: str, number: str) -> None:
    text = (
        "[mcp.one]\nurl = 'http://127.0.0.1:1/mcp'\ntimeout = "
        if table == "mcp"
        else ("[[provider]]\nname = 'one'\nkind = 'offline'\nidle_timeout = ")
    )
    with pytest.raises(click.ClickException) as found:
        given(written(tmp_path, f"{text}{number}\n"))
    assert "timeout: This must be a number above 0 and at most 1,000,000,000." in found.value.message


def test_options_and_variables_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "[limits]\nmax_runs = 5\nmax_calls = 6\nmax_imports = 7\n")
    monkeypatch.setenv("NOTECASE_MAX_CALLS", "60")
    found = given(path, "--max-runs", "50")
    assert [50, 60, 7] == [found[name] for name in ("max_runs", "max_calls", "max_imports")]


async def test_what_overrides_the_file_is_named(tmp_path: Path) -> None:
    """The variables of a unit or an image used to win silently over the file. One with the same value is not named."""
    path = written(tmp_path, '[store]\nurl = "sqlite:file.db"\n[limits]\nmax_runs = 5\nmax_calls = 6\n')
    variables = {"NOTECASE_STORE": "memory:", "NOTECASE_MAX_CALLS": "6"}
    more = ("--max-runs", "7", "--log-format", "json", "--listen", "127.0.0.1:0")
    begun = await notecase("serve", "--config", str(path), *more, "--tls-cert", "missing.pem", env=variables)
    assert 1 == begun.code, "it ends once the settings are known"
    (line,) = [json.loads(line) for line in begun.err.splitlines() if "config_overridden" in line]
    assert {"store.url by NOTECASE_STORE", "limits.max_runs by --max-runs"} == set(line["keys"])
    assert "warning" == line["level"]
    done = await notecase("config", "check", str(path), env=variables)
    assert (0, f"{path} is valid.\n") == (done.code, done.out)
    assert [
        "Warning: NOTECASE_STORE is set, and takes precedence over store.url.",
        "Warning: NOTECASE_MAX_CALLS is set, and takes precedence over limits.max_calls.",
    ] == done.err.splitlines()


async def test_secrets_that_other_users_can_read_are_named(tmp_path: Path) -> None:
    """The key of TLS and the store's password, too."""
    cert, key = Authority().issue([x509.DNSName("localhost")]).write(tmp_path)
    password = tmp_path / "password"
    password.write_text("secret-1")
    path = written(
        tmp_path, f'[tls]\ncert = "{cert}"\nkey = "{key}"\n[store]\nurl = "memory:"\npassword_file = "{password}"\n'
    )
    for file in (key, password):
        file.chmod(0o640)
    assert "" == (await notecase("config", "check", str(path))).err
    for file in (key, password):
        file.chmod(0o644)
    done = await notecase("config", "check", str(path))
    assert [f"Warning: other users of this machine can read {file}." for file in (key, password)] == (
        done.err.splitlines()
    )
    log = tmp_path / "log"
    served = await Spawned.start("memory:", log, "--config", str(path))
    assert 0 == await served.stop()
    assert 2 == log.read_text().count("secret_exposed")


@pytest.mark.parametrize("url", ["mysql://db.example/notecase", "notecase.db", "sqlite:", "memory:x"])
def test_a_url_that_no_store_has_is_a_mistake(tmp_path: Path, url: str) -> None:
    """It was valid for the check, and `serve` refused it."""
    path = written(tmp_path, f'[store]\nurl = "{url}"\n')
    checked = CliRunner().invoke(main, ["config", "check", str(path)])
    expected = f"{url!r} is not a store; write memory:, sqlite:PATH or postgresql://USER@HOST/DATABASE.\n"
    assert (1, f"store.url: {expected}") == (checked.exit_code, checked.stdout)
    done = CliRunner().invoke(main, ["serve", "--listen", "127.0.0.1:0", "--store", url])
    assert (1, f"Error: {expected}") == (done.exit_code, done.stderr)


def test_the_driver_of_the_store_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: `serve` ended with a traceback."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    url = "postgresql://notecase@db.example/notecase"
    expected = "A PostgreSQL store needs a driver that is not installed: install notecase-server[postgres]."
    path = written(tmp_path, f'[store]\nurl = "{url}"\n')
    checked = CliRunner().invoke(main, ["config", "check", str(path)])
    assert (1, f"store.url: {expected}\n") == (checked.exit_code, checked.stdout)
    for command in (["serve", "--listen", "127.0.0.1:0"], ["migrate"], ["store", "renew"]):
        done = CliRunner().invoke(main, [*command, "--store", url])
        assert (1, f"Error: {expected}\n") == (done.exit_code, done.stderr)


async def test_all_mistakes_are_reported_at_once_without_secrets(tmp_path: Path) -> None:
    path = written(tmp_path, WRONG)
    done = await notecase("config", "check", str(path))
    known = "audit, auth, client_principal, issuer, limits, mcp, provider, provider_defaults, server, store, tls"
    assert [
        "server.grace: This must be a number.",
        "server.tools: This must be a list of strings.",
        "server.log_level: 'loud' is not one of 'debug', 'info', 'warning', 'error'.",
        "server.listn: There is no such key; the nearest is listen.",
        "limits.max_runs: 0 is not in the range 1<=x<=1000000000.",
        "limits.max_calls: This must be a whole number.",
        "provider_defaults.retry_time: -1.0 is not in the range 0<=x<=1000000000.",
        "provider[0].key_env: The variable MISSING is not set.",
        "provider[0].headers.authorization: This is a secret: put it in a variable, and name that in header_env.",
        "provider[0].header_env.X-Other: The variable MISSING is not set.",
        "provider[0].first_timeout: This must be a number above 0 and at most 1,000,000,000.",
        "provider[0].max_concurrent: This must be a whole number of at least 0 and at most 1,000,000,000.",
        "provider[0].key: There is no such key; the nearest is key_env.",
        "provider[1].kind: This must be openai or offline.",
        "provider[1].name: main is in the file twice.",
        "mcp.files.comand: There is no such key; the nearest is command.",
        "mcp.files.command: a server has a `command`, or a `url`, and not both.",
        "mcp.search.pass_env: The variable MISSING is not set.",
        "mcp.search.url: `env` has no meaning for a server with a `url`.",
        "issuer[0].rolle: There is no such key; the nearest is role.",
        "issuer[0].role: Give role or role_claim.",
        "client_principal[0].name: A name must begin with uri:, dns: or email:.",
        f"extra: There is no such key; there are {known}.",
        "tls.key: tls.cert needs its key; set this.",
        "provider[1]: The main provider cannot be used: the base URL must begin with http:// or https:// and name a "
        "host.",
        "issuer[0].jwks_file: keys.json cannot be read: No such file or directory.",
    ] == done.out.splitlines()
    assert 1 == done.code
    assert "secret-1" not in done.out + done.err
    begun = await notecase("serve", "--config", str(path))
    assert (1, "") == (begun.code, begun.out)
    assert begun.err.startswith(f"Error: {path} cannot be used:\nserver.grace: This must be a number.\n")
    assert "secret-1" not in begun.err


def test_a_value_from_a_variable_may_have_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`${NAME}` is refused only where it is written, since a secret may have it, which no message may show."""
    monkeypatch.setenv("TOKEN", "s3${cret}")
    texts = (
        '[mcp.one]\ncommand = "true"\npass_env = "TOKEN"\n',
        '[mcp.two]\nurl = "https://mcp.example/mcp"\nheader_env = {X-Token = "TOKEN"}\n',
        '[mcp.three]\nurl = "https://mcp.example/mcp"\nheaders = {X-Token = "${TOKEN}"}\n',
    )
    path = written(tmp_path, "".join(texts[:2]))
    checked = CliRunner().invoke(main, ["config", "check", str(path)])
    assert (0, f"{path} is valid.\n") == (checked.exit_code, checked.stdout)
    path = written(tmp_path, "".join(texts))
    checked = CliRunner().invoke(main, ["config", "check", str(path)])
    assert 1 == checked.exit_code
    assert checked.stdout.startswith("mcp.three.url: `headers` contains ${TOKEN}; variables are not replaced here")


@pytest.mark.parametrize("text", ["[server", "= 1", None])
async def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "notecase.toml" if text is None else written(tmp_path, text)
    for command in (("config", "check"), ("serve", "--config"), ("providers", "test", "main", "--config")):
        done = await notecase(*command, str(path))
        assert (1, "") == (done.code, done.out)
        assert f"{path} {'cannot be read' if text is None else 'is not TOML'}" in done.err


async def test_a_file_is_utf_8_whatever_the_locale_and_may_begin_with_a_mark(tmp_path: Path) -> None:
    """As Notepad saves it, and with a language that is not set."""
    file = tmp_path / "notecase.toml"
    file.write_text('[mcp."é"]\nurl = "https://mcp.example/mcp"\n', encoding="utf-8-sig")
    done = await notecase(
        "config", "check", str(file), env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    )
    assert (0, f"{file} is valid.\n") == (done.code, done.out)


async def test_a_password_that_cannot_be_read_is_reported_by_the_check(tmp_path: Path) -> None:
    file = tmp_path / "notecase.toml"
    file.write_text('[store]\nurl = "postgresql://me@db/notecase"\npassword_file = "/nonexistent"\n')
    done = await notecase("config", "check", str(file))
    expected = "store.password_file: /nonexistent, the file with the store's password, cannot be read.\n"
    assert (1, expected) == (done.code, done.out)


async def test_the_whole_example_of_the_page_is_fine(tmp_path: Path) -> None:
    authority = Authority()
    authority.issue([x509.DNSName("localhost")]).write(tmp_path)
    (tmp_path / "clients.pem").write_bytes(authority.cert)
    (tmp_path / "ci-keys.json").write_text(json.dumps({"keys": [SigningKey("ci").jwk()]}))
    (tmp_path / "my_tools.py").write_text(TOOLS)
    program = tmp_path / "files-mcp"
    program.touch(0o755)
    places = {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    path = written(tmp_path, example.replace("/etc/notecase", str(tmp_path)))
    done = await checked(path, {**SECRETS, **places})
    assert (0, f"{path} is valid.\n", "") == (done.code, done.out, done.err)
    missing = await checked(path, places)
    assert [f"The variable {name} is not set." for name in SECRETS] == [
        line.partition(": ")[2] for line in missing.out.splitlines()
    ]


PARTS = """
[server]
tools = ["broken_tools", "no_tools"]
mcp_config = "mcp.json"
[[issuer]]
issuer = "https://ci.example"
audience = "notecase"
algorithms = ["ES256"]
jwks_file = "keys.json"
tenant = "acme"
role = "user"
[mcp.files]
command = "no-such-program"
[mcp.more]
command = "./files-mcp"
cwd = "tools"
[mcp.search]
url = "https://mcp.example/mcp"
"""


async def test_the_check_reports_missing_parts_and_a_provider_is_tested_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_tools.py").write_text("raise ValueError('no database')")
    (tmp_path / "keys.json").write_text('{"keys": []}')
    (tmp_path / "mcp.json").write_text('{"mcpServers": {"other": {"command": "/no/such"}}}')
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "files-mcp").touch(0o755)
    path = written(tmp_path, PARTS)
    done = await checked(path, {"PYTHONPATH": str(tmp_path)})
    assert [
        "server.tools: The module 'broken_tools' cannot be imported: ValueError: no database",
        "server.tools: The module 'no_tools' cannot be imported: ModuleNotFoundError: No module named 'no_tools'; "
        "PYTHONPATH lists the directories of modules",
        "issuer[0].jwks_file: keys.json cannot be used: there is no JSON Web Key Set with a public key for signatures.",
        "mcp.files.command: There is no program no-such-program on the PATH.",
        "server.mcp_config mcpServers.other.command: There is no program /no/such.",
    ] == done.out.splitlines()
    assert (1, "") == (done.code, done.err)
    assert 0 == (await notecase("providers", "test", "offline", "--config", str(path))).code


async def test_a_server_says_at_its_start_that_the_keys_of_an_issuer_are_missing(tmp_path: Path) -> None:
    """And serves: the file may come later."""
    issuer = PARTS[PARTS.index("[[issuer]]") : PARTS.index("[mcp.files]")].replace("keys.json", "/no/keys.json")
    path = written(tmp_path, issuer)
    served = await Spawned.start("memory:", tmp_path / "log", "--config", str(path))
    assert 0 == await served.stop()
    log = (tmp_path / "log").read_text()
    assert "issuer_keys_unavailable" in log
    assert "/no/keys.json cannot be read: No such file or directory." in log


async def test_a_server_serves_what_its_file_says(tmp_path: Path) -> None:
    """Its providers and no others, each with its own key and headers, and what other users can read is warned about."""
    key = tmp_path / "key"
    key.write_text("file-key-1\n")
    key.chmod(0o644)
    async with OpenAIServer(lambda body: reply(str(body["model"]))) as models:
        path = written(
            tmp_path,
            f"""
            [limits]
            max_runs = 12
            [[provider]]
            name = "first"
            base_url = "{models.url}"
            key_file = "{key}"
            model = "one"
            headers = {{X-Priority = "low"}}
            max_concurrent = 1
            [[provider]]
            name = "second"
            base_url = "{models.url}"
            key_env = "SECOND"
            model = "two"
            header_env = {{X-Organisation = "ORGANISATION"}}
            """,
        )
        environment = {"SECOND": "variable-key-1", "ORGANISATION": "acme", "OPENAI_API_KEY": "unused"}
        log = tmp_path / "log"
        served = await Spawned.start("memory:", log, "--config", str(path), env=environment)
        async with Client(served.address) as client:
            info = await client.server.GetServerInfo(v1.GetServerInfoRequest())
            assert (["first", "second"], 12) == (list(info.providers), info.max_runs)
            replies = [await said(client, provider) for provider in ("", "second")]
        assert 0 == await served.stop()
    assert ["one", "two"] == replies
    sent = [received.headers for received in models.received]
    assert ["Bearer file-key-1", "Bearer variable-key-1"] == [headers["Authorization"] for headers in sent]
    assert [("low", None), (None, "acme")] == [
        (headers.get("X-Priority"), headers.get("X-Organisation")) for headers in sent
    ]
    assert 1 == log.read_text().count("secret_exposed")
    assert "file-key-1" not in log.read_text()


async def said(client: Client, provider: str) -> str:
    """What the model of an agent of that provider says."""
    return "".join(part.text for part in (await invoked(client, provider)).reply.parts)


async def invoked(client: Client, provider: str = "") -> v1.Run:
    """A run of an agent of that provider, once it has ended."""
    agent = await client.agents.CreateAgent(v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(provider=provider))))
    start = v1.StartRun(agent=agent.name, messages=[v1.Message(parts=[v1.Part(text="Hello.")])])
    return (await client.runs.Invoke(v1.InvokeRequest(start=start))).run


async def test_a_provider_of_the_file_is_left_alone_while_it_is_down(tmp_path: Path) -> None:
    async with OpenAIServer(lambda body: error(503, "later")) as models:
        path = written(
            tmp_path,
            f"""
            [[provider]]
            name = "main"
            base_url = "{models.url}"
            max_retries = 0
            breaker_failures = 2
            breaker_seconds = 3600
            """,
        )
        served = await Spawned.start("memory:", tmp_path / "log", "--config", str(path))
        async with Client(served.address) as client:
            errors = [(await invoked(client)).error for _ in range(3)]
        assert 0 == await served.stop()
    assert 3 * [v1.ERROR_REASON_MODEL_UNAVAILABLE] == [one.reason for one in errors]
    assert [False, False, True] == ["no calls are made" in one.message for one in errors]
    assert 2 == len(models.received)


ASKED: Sequence[tuple[object, int, str]] = [
    (reply("ready"), 0, r"model: stub-1\nfirst token: \d+ ms\nusage: \d+ input tokens, \d+ output tokens\n"),
    (error(401, "who is that"), 1, "Error: MODEL_ERROR: .*\n"),
    (error(503, "later"), 1, "Error: MODEL_UNAVAILABLE: .*\n"),
]


@pytest.mark.parametrize(("answer", "code", "expected"), ASKED, ids=["a reply", "a wrong key", "away"])
async def test_a_provider_is_tried_out_with_one_question(tmp_path: Path, answer: Any, code: int, expected: str) -> None:
    async with OpenAIServer() as models:
        models.script(answer)
        path = written(tmp_path, f'[[provider]]\nname = "main"\nbase_url = "{models.url}"\nmodel = "stub"\n')
        done = await notecase("providers", "test", "main", "--config", str(path))
    assert code == done.code
    assert re.fullmatch(expected, done.err if code else done.out)
    assert 1 == len(models.received)


@pytest.mark.parametrize(
    ("settings", "environment", "source"),
    [
        (None, {"OPENAI_API_KEY": "wrong-key-1"}, "OPENAI_API_KEY"),
        (None, {}, "OPENAI_API_KEY, which is not set"),
        ('key_env = "SECOND"', {"SECOND": "wrong-key-1"}, "SECOND, which is key_env of the provider 'openai'"),
        ('key_file = "PATH/key"', {}, "key_file of the provider 'openai'"),
        ("", {}, "the provider 'openai', which has neither key_env nor key_file"),
    ],
    ids=["variable", "no variable", "key_env", "key_file", "no key"],
)
async def test_the_error_for_a_wrong_key_names_the_setting_that_has_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: str | None,
    environment: dict[str, str],
    source: str,
) -> None:
    (tmp_path / "key").write_text("wrong-key-1")
    async with OpenAIServer(lambda _: error(401, "who is that")) as models:
        for name, value in ({"OPENAI_API_KEY": ""} | environment | {"OPENAI_BASE_URL": models.url}).items():
            monkeypatch.setenv(name, value)
        table = f'[[provider]]\nname = "openai"\nbase_url = "{models.url}"\n{settings}\n'
        path = None if settings is None else written(tmp_path, table.replace("PATH", str(tmp_path)))
        given = next(one for one in settings_of(serve, path) if one.name == "openai")
        with pytest.raises(NotecaseError) as caught:
            await _ask(given)
    expected = f"The model provider refused the server's credential (status 401); check {source}."
    assert expected == caught.value.message


@pytest.mark.parametrize("of_file", [False, True], ids=["variable", "file"])
async def test_the_error_for_a_default_model_that_is_not_there_names_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_file: bool
) -> None:
    async with OpenAIServer(lambda _: error(404, "model 'gpt-4.1-mini' not found")) as models:
        monkeypatch.setenv("OPENAI_BASE_URL", models.url)
        table = f'[[provider]]\nname = "openai"\nbase_url = "{models.url}"\n'
        path = written(tmp_path, table) if of_file else None
        given = next(one for one in settings_of(serve, path) if one.name == "openai")
        with pytest.raises(NotecaseError) as caught:
            await _ask(given)
    source = "OPENAI_MODEL" if path is None else "model of the provider 'openai'"
    assert caught.value.message.endswith(f" not found (the agent names no model; the default is {source})")


async def test_the_error_of_an_unknown_provider_lists_those_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, '[[provider]]\nname = "main"\nkind = "offline"\n')
    done = await notecase("providers", "test", "mian", env={"NOTECASE_CONFIG": str(path)})
    assert (1, "Error: There is no provider 'mian', only main.\n") == (done.code, done.err)
    done = await notecase("providers", "test", "openai")
    assert (1, True) == (
        done.code,
        done.err.startswith("Error: There is no provider 'openai', only offline. Set OPENAI_"),
    )
    done = await notecase("providers", "test", "offline")
    assert (0, "model: offline") == (done.code, done.out.splitlines()[0])

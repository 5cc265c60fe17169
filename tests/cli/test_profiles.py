"""Profiles: named servers, with tokens that are sent only to them, in a file that other users cannot read."""

import base64
import json
import os
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import click
import pytest
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.cli import profiles_file
from notecase_server.cli.connection import connection
from notecase_server.cli.options import Given
from notecase_server.cli.profiles_file import Printed, Profile, Profiles

from tests.cli.command import notecase
from tests.support.server import Running, running


class ByToken:
    """Knows two tokens, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        word = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        self.given.append(word)
        return Principal("default", word, Role.ADMIN) if word in {"one", "two"} else None


@pytest.fixture
def words() -> ByToken:
    return ByToken()


@pytest.fixture
async def guarded(words: ByToken) -> AsyncIterator[Running]:
    async with running(authenticators=[words]) as served:
        yield served


async def test_a_profile_says_where_the_server_is_and_how_it_is_called(
    guarded: Running, words: ByToken, tmp_path: Path
) -> None:
    """Options and variables win over it, and it wins over no profile at all."""
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    done = await notecase("profiles", "set", "here", "--server", guarded.address, "--token", "-", said="one\n", env=env)
    assert (0, "", "") == tuple(done)
    file = tmp_path / "notecase" / "profiles.json"
    assert 0o600 == stat.S_IMODE(file.stat().st_mode)
    assert 0 == (await notecase("agents", "list", env=env)).code  # the first profile is used from then on
    assert "one" == words.given[-1]
    assert 0 == (await notecase("agents", "list", env={**env, "NOTECASE_TOKEN": "two"})).code
    assert "two" == words.given[-1]
    (tmp_path / "token").write_text("two\n")
    (tmp_path / "token").chmod(0o600)
    for way in (("--token-file", str(tmp_path / "token")), ("--token-command", f"cat {tmp_path}/token")):
        assert 0 == (await notecase("profiles", "set", "other", "--server", guarded.address, *way, env=env)).code
        assert 0 == (await notecase("agents", "list", "--profile", "other", env=env)).code
        assert "two" == words.given[-1]
    named = {**env, "NOTECASE_PROFILE": "other"}
    words.given.clear()
    assert 0 == (await notecase("agents", "list", env=named)).code
    assert 0 == (await notecase("agents", "list", "--profile", "here", env=named)).code
    other = {**env, "NOTECASE_ADDRESS": "127.0.0.1:1", "NOTECASE_TOKEN": "three", "NOTECASE_PROFILE": "none"}
    assert 0 == (await notecase("agents", "list", "--profile", "here", env=other)).code
    assert ["two", "one", "one"] == words.given
    table = (await notecase("profiles", "list", env=named)).out
    assert ["*", "other"] == table.splitlines()[2].split()[:2]
    done = await notecase("profiles", "list", "-o", "json", env=env)
    assert [("here", True, "kept"), ("other", False, f"command cat {tmp_path}/token")] == [
        (one["name"], one["current"], one["token"]) for one in json.loads(done.out)
    ]
    assert 0 == (await notecase("profiles", "use", "other", env=env)).code
    table = (await notecase("profiles", "list", env=env)).out
    assert ["*", "other", guarded.address] == table.splitlines()[2].split()[:3]
    assert 0 == (await notecase("profiles", "delete", "other", env=env)).code
    done = await notecase("agents", "list", "--profile", "other", env=env)
    assert (2, True) == (done.code, "There is no profile 'other'" in done.err)


async def test_a_profiles_token_goes_to_its_own_server_only(guarded: Running, words: ByToken, tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    await notecase("profiles", "set", "elsewhere", "--server", "127.0.0.1:1", "--token", "one", env=env)
    for arguments, variables in (
        (("--server", guarded.address), env),
        ((), {**env, "NOTECASE_ADDRESS": guarded.address}),
        (("--server", guarded.address, "--profile", "elsewhere"), env),
    ):
        done = await notecase("agents", "list", *arguments, env=variables)
        assert (1, True) == (done.code, "has no credential" in done.err)
    assert {""} == set(words.given)


async def test_a_file_with_a_token_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    """A file without a token may be readable by others; an invalid file is reported."""
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    await notecase("profiles", "set", "a", "--server", "127.0.0.1:1", "--token", "one", env=env)
    file = tmp_path / "notecase" / "profiles.json"
    file.chmod(0o640)
    done = await notecase("agents", "list", env=env)
    assert (2, True) == (done.code, f"run `chmod 600 {file}`" in done.err)
    assert 0 == (await notecase("profiles", "set", "a", "--token-file", "token", env=env)).code
    file.chmod(0o644)
    done = await notecase("agents", "list", env=env)
    assert (1, True) == (done.code, f"The token cannot be read from {Path.cwd() / 'token'}" in done.err)
    number, words = '{"profiles": {"a": {"address": 5}}}', '{"profiles": {"a": {"address": "a:1", "plaintext": "no"}}}'
    for text in ('{"profiles": {"a": {"adress": "x"}}}', number, words, "[" * 100_000):
        file.write_text(text)
        done = await notecase("agents", "list", env=env)
        assert (2, True) == (done.code, "is not a profiles file" in done.err)


async def test_a_token_file_is_found_from_any_directory_and_read_by_its_owner_alone(
    guarded: Running, words: ByToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    file = tmp_path / "admin.key"
    file.write_text("one\n")
    file.chmod(0o644)
    monkeypatch.chdir(tmp_path)
    profile = ("profiles", "set", "here", "--server", guarded.address, "--token-file", "admin.key", "--ca", "ca.pem")
    done = await notecase(*profile, env=env)
    assert (2, True) == (done.code, f"run `chmod 600 {file}`" in done.err)
    file.chmod(0o600)
    assert 0 == (await notecase(*profile, "--plaintext", env=env)).code
    monkeypatch.chdir("/")
    (shown,) = json.loads((await notecase("profiles", "list", "-o", "json", env=env)).out)
    assert (f"file {file}", str(tmp_path / "ca.pem")) == (shown["token"], shown["ca"])
    assert 0 == (await notecase("agents", "list", env=env)).code
    assert "one" == words.given[-1]
    file.chmod(0o640)
    done = await notecase("agents", "list", env=env)
    assert (1, True) == (done.code, f"run `chmod 600 {file}`" in done.err)


def test_a_printed_token_is_used_until_shortly_before_it_expires(tmp_path: Path) -> None:
    """One of an identity provider says when that is; another is used for a while."""

    def of(claims: str) -> str:
        return f"e30.{base64.urlsafe_b64encode(claims.encode()).decode().rstrip('=')}.c2ln"

    def token(expires: float) -> str:
        return of(json.dumps({"exp": time.time() + expires}))

    odd = [(of(claims), True) for claims in (f'{{"exp": {"9" * 400}}}', "[" * 40_000)]
    file = tmp_path / "token"
    for first, used in ((token(5), False), (token(3600), True), ("one", True), ("a.b.c", True), *odd):
        printed = Printed(f"cat {file}")
        file.write_text(first)
        assert first == printed()
        file.write_text("next")
        assert (first if used else "next") == printed()
    with pytest.raises(click.ClickException, match="The command for the token failed"):
        Printed(r"printf '\377'")()


def test_certificates_that_are_given_are_not_passed_over_for_plain_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token of a profile without TLS does not go out in the clear where the command line asks for TLS."""
    ca = str(tmp_path / "ca.pem")
    Path(ca).write_text("-----BEGIN CERTIFICATE-----")
    profile = Profile("lab.example:7420", token="one", plaintext=True)
    monkeypatch.setattr(profiles_file, "read", lambda: Profiles({"lab": profile}, "lab"))
    for given, tls in (
        (Given({"profile": "lab", "ca": ca}, {}), True),
        (Given({"ca": ca}, {}), True),
        (Given({}, {"ca": ca}), True),
        (Given({"plaintext": True}, {"ca": ca}), False),
        (Given({"profile": "lab"}, {"ca": ca}), False),
        (Given({}, {}), False),
    ):
        with click.Context(click.Command("list")) as context:
            context.meta["notecase.connection"] = given
            assert (profile.address, {"token": "one", **({"ca": ca} if tls else {"plaintext": True})}) == connection()


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("yes", "it printed more than 65536 bytes"),
        ("true", "it did not print one word of ASCII"),
        ("echo a secret", "it did not print one word of ASCII"),
        ("echo word; exit 3", "returned non-zero exit status 3"),
        ("exec sleep 60", "timed out after 0.2 seconds"),
    ],
    ids=["endless", "silent", "words", "failed", "slow"],
)
def test_a_command_that_prints_no_token_says_so(command: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles_file, "COMMAND_SECONDS", 0.2 if "sleep" in command else 60)
    with pytest.raises(click.ClickException, match=problem) as refused:
        Printed(command)()
    assert "secret" not in refused.value.message


def test_a_command_has_ended_when_its_shell_has(tmp_path: Path) -> None:
    """A program that it started in the background may keep the output open."""
    os.mkfifo(tmp_path / "open")
    assert "word" == Printed(f"echo word; cat {tmp_path / 'open'} &")()
    os.close(os.open(tmp_path / "open", os.O_WRONLY))


def test_a_file_that_is_too_large_for_a_token_is_not_read_to_its_end() -> None:
    with pytest.raises(click.ClickException, match="more than 65536 characters"):
        Profile("127.0.0.1:1", token_file="/dev/zero").arguments()["token"]()

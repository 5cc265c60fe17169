"""Tokens of identity providers: signed by real keys, which are fetched over HTTP from a server of the test's."""

import asyncio
import hmac
import json
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from notecase import v1
from notecase_server.auth import jwks, tokens
from notecase_server.auth.principal import Principal, Role
from notecase_server.auth.settings import IssuerSettings
from notecase_server.auth.tokens import Tokens
from notecase_server.errors import NotecaseError
from notecase_server.supervisor import Tasks
from structlog.testing import capture_logs

from tests.support.issuer import KeyServer, SigningKey

ISSUER = "https://login.example/acme"
NOW = 1_800_000_000
KEY = SigningKey("first")
RSA_KEY = SigningKey("rsa", "RS256")


class Setting:
    """An issuer whose keys are served, and the authenticator of its tokens, with clocks that the test advances."""

    def __init__(self, server: KeyServer) -> None:
        self.server = server
        self.now = float(NOW)
        self.tasks = Tasks("test")
        self.unavailable: list[str] = []
        """Returns the log lines about keys that could not be fetched, and checks that tokens were refused."""
        self.judge()

    def judge(self, **others: Any) -> None:
        """Starts again with more settings of the issuer."""
        given = {"tenant": "acme", "role": Role.USER, "jwks_url": self.server.url, "algorithms": ("ES256", "RS256")}
        settings = IssuerSettings(**{"issuer": ISSUER, "audiences": ("notecase",), **given, **others})
        self.tokens = Tokens([settings], self.tasks, lambda: round(self.now * 1e6), lambda: self.now)

    async def ask(self, authorization: str) -> Principal | None:
        return await self.tokens.principal({"authorization": authorization}, dict)

    async def of(self, token: str) -> Principal | None:
        return await self.ask(f"Bearer {token}")

    async def refuses(self, token: str) -> str:
        """Returns the cause that the log gives; the caller does not get it."""
        with capture_logs() as lines, pytest.raises(NotecaseError) as refused:
            await self.of(token)
        assert v1.ERROR_REASON_UNAUTHENTICATED == refused.value.reason
        assert "The credential of this call is invalid" in refused.value.message
        self.unavailable += [line["problem"] for line in lines if line["event"] == "issuer_keys_unavailable"]
        assert refused.value.cause not in refused.value.message
        return refused.value.cause.removeprefix("The token is not valid: ").removesuffix(".")

    async def cannot_verify(self, token: str) -> None:
        """Nobody knows whether the token is valid, and its caller hears that it may be later."""
        with capture_logs() as lines, pytest.raises(NotecaseError) as refused:
            await self.of(token)
        assert v1.ERROR_REASON_ISSUER_UNAVAILABLE == refused.value.reason
        self.unavailable += [line["problem"] for line in lines if line["event"] == "issuer_keys_unavailable"]


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    async with KeyServer(KEY, RSA_KEY) as server:
        found = Setting(server)
        yield found
        await found.tasks.close()


def claims(**others: Any) -> dict[str, Any]:
    """Those of a token that is valid; None leaves one out."""
    given = {"iss": ISSUER, "aud": "notecase", "sub": "ada", "iat": NOW, "exp": NOW + 300, **others}
    return {name: value for name, value in given.items() if value is not None}


def subject(name: str = "ada") -> str:
    return f"{ISSUER}#{name}"


async def test_a_token_makes_the_principal_that_its_issuer_vouches_for(setting: Setting) -> None:
    for key in (KEY, RSA_KEY):
        for audience in ("notecase", ["other", "notecase"]):
            token = key.sign(claims(aud=audience))
            assert Principal("acme", subject(), Role.USER) == await setting.ask(f"bearer  {token}")
    assert 1 == setting.server.fetches


@pytest.mark.parametrize(
    ("settings", "told", "principal"),
    [
        ({"tenant": "", "tenant_claim": ("org",)}, {"org": "umbrella"}, Principal("umbrella", subject(), Role.USER)),
        ({"user": "", "user_claim": ("sub",)}, {}, Principal("acme", subject(), Role.USER, "ada")),
        ({"user": "bob"}, {}, Principal("acme", subject(), Role.USER, "bob")),
        ({"role": None, "role_claim": ("role",)}, {"role": "admin"}, Principal("acme", subject(), Role.ADMIN)),
        (
            {"role": None, "role_claim": ("realm", "roles"), "roles": {"ops": Role.ADMIN, "all": Role.VIEWER}},
            {"realm": {"roles": ["all", 7, "admin", "ops"]}},
            Principal("acme", subject(), Role.ADMIN),
        ),
        (
            {"role": None, "role_claim": ("https://example/role",), "roles": {"platform": Role.OPERATOR}},
            {"https://example/role": "platform"},
            Principal("", subject(), Role.OPERATOR),
        ),
        ({"subject_claim": ("azp",)}, {"azp": "ci", "sub": None}, Principal("acme", subject("ci"), Role.USER)),
    ],
    ids=["tenant", "user", "a fixed user", "role", "roles within", "operator", "subject"],
)
async def test_claims_say_who_calls(
    setting: Setting, settings: Mapping[str, Any], told: Mapping[str, Any], principal: Principal
) -> None:
    setting.judge(**settings)
    assert principal == await setting.of(KEY.sign(claims(**told)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tenant": "", "tenant_claim": ("org",)}, {}),
        ({"tenant": "", "tenant_claim": ("org",)}, {"org": ["acme"]}),
        ({"tenant": "", "tenant_claim": ("org",)}, {"org": "Acme"}),
        ({"tenant": "", "tenant_claim": ("org",)}, {"org": ""}),
        ({"user_claim": ("email",)}, {}),
        ({"user_claim": ("email",)}, {"email": "a da"}),
        ({"user_claim": ("email",)}, {"email": ""}),
        ({"user_claim": ("email",)}, {"email": "a" * 129}),
        ({"role": None, "role_claim": ("role",)}, {}),
        ({"role": None, "role_claim": ("role",)}, {"role": "owner"}),
        ({"role": None, "role_claim": ("role",)}, {"role": "operator"}),
        ({"role": None, "role_claim": ("role",)}, {"role": {"admin": True}}),
        ({"role": None, "role_claim": ("a", "b")}, {"a": ["b"]}),
        ({"role": None, "role_claim": ("role",), "roles": {"ops": Role.ADMIN}}, {"role": "admin"}),
        (
            {"role": None, "role_claim": ("role",), "roles": {"a": Role.ADMIN, "o": Role.OPERATOR}},
            {"role": ["a", "o"]},
        ),
        ({}, {"sub": ""}),
        ({}, {"sub": "a" * 256}),
        ({}, {"sub": "a\nb"}),
    ],
)
async def test_a_token_whose_claims_do_not_say_who_calls_is_refused(
    setting: Setting, settings: Mapping[str, Any], told: Mapping[str, Any]
) -> None:
    """And never taken for a caller with fewer bounds, such as one that is bound to no user."""
    setting.judge(**settings)
    assert "it names" in (problem := await setting.refuses(KEY.sign(claims(**told)))) or "cannot be one" in problem


def encoded(value: Mapping[str, Any] | bytes) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def by_public_key() -> str:
    """A token whose HMAC has the public key as its secret, which everybody knows."""
    secret = KEY.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = f"{encoded({'alg': 'HS256', 'typ': 'JWT', 'kid': KEY.id})}.{encoded(claims())}"
    return f"{signed}.{encoded(hmac.digest(secret, signed.encode(), 'sha256'))}"


def with_one_bit_changed() -> str:
    signed, _, signature = KEY.sign(claims()).rpartition(".")
    first = {"A": "B"}.get(signature[0], "A")
    return f"{signed}.{first}{signature[1:]}"


def for_another() -> str:
    """The claims are another token's, the signature is this one's."""
    header, _, signature = KEY.sign(claims()).split(".")
    return f"{header}.{encoded(claims(sub='eve'))}.{signature}"


FORGED: Mapping[str, Callable[[], str]] = {
    "alg none": lambda: f"{encoded({'alg': 'none'})}.{encoded(claims())}.",
    "alg none with an id": lambda: f"{encoded({'alg': 'none', 'kid': KEY.id})}.{encoded(claims())}.AAAA",
    "no alg": lambda: f"{encoded({'kid': KEY.id})}.{encoded(claims())}.AAAA",
    "a list as alg": lambda: f"{encoded({'alg': ['ES256'], 'kid': KEY.id})}.{encoded(claims())}.AAAA",
    "HS256 by the public key": by_public_key,
    "an algorithm that is not listed": lambda: SigningKey(KEY.id, "EdDSA").sign(claims()),
    "the algorithm of another key": lambda: RSA_KEY.sign(claims(), kid=KEY.id),
    "another key of the same id": lambda: SigningKey(KEY.id).sign(claims()),
    "an unknown key": lambda: SigningKey("unknown").sign(claims()),
    "no key's id": lambda: f"{encoded({'alg': 'ES256'})}.{encoded(claims())}.AAAA",
    "a number as the key's id": lambda: f"{encoded({'alg': 'ES256', 'kid': 7})}.{encoded(claims())}.AAAA",
    "a bit changed": with_one_bit_changed,
    "other claims": for_another,
    "no signature": lambda: KEY.sign(claims()).rpartition(".")[0] + ".",
    "an extension that must be known": lambda: KEY.sign(claims(), crit=["exp"], exp=1),
    "another issuer": lambda: KEY.sign(claims(iss="https://login.example")),
    "a list as issuer": lambda: f"{encoded({'alg': 'ES256', 'kid': KEY.id})}.{encoded(claims(iss=[ISSUER]))}.AAAA",
    "no issuer": lambda: KEY.sign(claims(iss=None)),
    "another audience": lambda: KEY.sign(claims(aud="notecase-admin")),
    "no audience": lambda: KEY.sign(claims(aud=None)),
    "an empty audience": lambda: KEY.sign(claims(aud=[])),
    "no end": lambda: KEY.sign(claims(exp=None)),
    "a text as end": lambda: KEY.sign(claims(exp=str(NOW + 300))),
    "true as end": lambda: KEY.sign(claims(exp=True)),
    "an endless end": lambda: KEY.sign(claims(exp=1e999)),
    "no number as end": lambda: KEY.sign(claims(exp=float("nan"))),
    "an end in a million years": lambda: KEY.sign(claims(exp=NOW * 1_000_000)),
    "no number as begin": lambda: KEY.sign(claims(nbf=float("nan"))),
    "8 KB of claims": lambda: KEY.sign(claims(groups=["a" * 63] * 128)),
    "a deep claim": lambda: f"{encoded({'alg': 'ES256'})}.{encoded(b'[' * 5000)}.AAAA",
    "no claims": lambda: f"{encoded({'alg': 'ES256'})}.{encoded(b'[]')}.AAAA",
    "no JSON": lambda: "eyJoZWFkZXI.Y2xhaW1z.AAAA",
    "no base64": lambda: "eyJ.b.c",
    "nothing": lambda: "ey..",
    "no ASCII": lambda: "eyä.ö.ü",
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
async def test_a_token_that_its_issuer_did_not_make_so_is_refused(setting: Setting, forged: Callable[[], str]) -> None:
    assert await setting.refuses(forged())
    assert Principal("acme", subject(), Role.USER) == await setting.of(KEY.sign(claims()))


@pytest.mark.parametrize(
    "authorization", ["", "Basic YTpi", "Bearer", "Bearer nck_7f_secret", "Bearer eyJ.b", "eyJ.b.c"]
)
async def test_what_is_not_a_token_is_left_to_others(setting: Setting, authorization: str) -> None:
    assert await setting.ask(authorization) is None
    assert await setting.tokens.principal({}, dict) is None
    assert 0 == setting.server.fetches


@pytest.mark.parametrize("apart", [-59, 59])
async def test_clocks_may_be_a_minute_apart(setting: Setting, apart: int) -> None:
    """The issuer's is behind, and the token ended by it; or ahead, and the token has not begun."""
    setting.now = NOW + apart
    assert await setting.of(KEY.sign(claims(exp=NOW, iat=NOW, nbf=NOW)))


@pytest.mark.parametrize(
    ("apart", "told"), [(61, {"exp": NOW}), (-61, {"iat": NOW}), (-61, {"nbf": NOW}), (0, {"nbf": NOW + 10**8})]
)
async def test_a_token_has_its_time(setting: Setting, apart: int, told: Mapping[str, int]) -> None:
    setting.now = NOW + apart
    problem = await setting.refuses(KEY.sign(claims(**{"iat": None, **told})))
    assert "it has expired" == problem if "exp" in told else "it is not valid yet" == problem


async def test_a_token_that_was_verified_is_refused_once_it_has_ended(setting: Setting) -> None:
    token = KEY.sign(claims())
    assert await setting.of(token)
    setting.now += 299
    assert await setting.of(token)
    assert 1 == len(setting.tokens._verified)
    setting.now += 2
    assert await setting.of(token), "by the leeway"
    assert 0 == len(setting.tokens._verified)
    setting.now += 60
    assert "it has expired" == await setting.refuses(token)


async def test_the_tokens_that_are_remembered_are_bounded(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED", 3)
    for name in "abcde":
        assert await setting.of(KEY.sign(claims(sub=name)))
    assert 3 == len(setting.tokens._verified)


async def test_keys_that_are_new_are_known_at_once_and_withdrawn_ones_within_minutes(setting: Setting) -> None:
    old = KEY.sign(claims(exp=NOW + 3600))
    assert await setting.of(old)
    second = SigningKey("second")
    setting.server.keys.append(second.jwk())
    assert await setting.of(second.sign(claims()))
    assert await setting.of(old)
    assert 2 == setting.server.fetches
    setting.server.keys = [second.jwk()]
    assert await setting.of(old), "the keys are fresh"
    setting.now += jwks.FRESH_SECONDS + 1
    assert "its issuer has no such key, or could not be asked" == await setting.refuses(old)
    assert await setting.of(second.sign(claims(exp=NOW + 3600)))


async def test_a_key_that_is_replaced_under_its_id_counts_no_more(setting: Setting) -> None:
    token = KEY.sign(claims(exp=NOW + 3600))
    assert await setting.of(token)
    setting.server.keys = [SigningKey(KEY.id).jwk()]
    setting.now += jwks.FRESH_SECONDS + 1
    assert "not its issuer's" in await setting.refuses(token)


async def test_unknown_keys_are_fetched_once_in_thirty_seconds(setting: Setting) -> None:
    assert await setting.of(KEY.sign(claims()))
    for number in range(50):
        await setting.refuses(SigningKey(f"unknown-{number}").sign(claims()))
    assert 2 == setting.server.fetches
    setting.now += 31
    await setting.refuses(SigningKey("unknown").sign(claims()))
    assert 3 == setting.server.fetches


async def test_many_who_need_the_keys_wait_for_one_fetch(setting: Setting) -> None:
    """Also when the one who began it goes away."""
    first = asyncio.create_task(setting.of(KEY.sign(claims())))
    await asyncio.sleep(0)
    others = [asyncio.create_task(setting.of(KEY.sign(claims(sub=str(number))))) for number in range(50)]
    await asyncio.sleep(0)
    first.cancel()
    assert [subject(str(number)) for number in range(50)] == [
        found.subject for found in await asyncio.gather(*others) if found is not None
    ]
    assert 1 == setting.server.fetches


async def test_keys_count_on_for_a_day_while_their_place_is_away(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = KEY.sign(claims(exp=NOW + 10**6))
    assert await setting.of(token)
    setting.server.status = 503
    setting.now += jwks.FRESH_SECONDS + 1
    with capture_logs() as lines, monkeypatch.context() as patched:
        assert await setting.of(token)
        patched.setattr(tokens, "VERIFIER", None)  # each token costs its signature once
        for _ in range(10):
            assert await setting.of(token)
    assert ["issuer_keys_unavailable"] == [line["event"] for line in lines]
    assert 2 == setting.server.fetches
    setting.now += jwks.PATIENCE_SECONDS + 1
    assert await setting.of(token)
    setting.now = NOW + jwks.KEPT_SECONDS + 1
    await setting.cannot_verify(token)
    setting.server.status = 200
    await setting.cannot_verify(token)
    setting.now += jwks.FIRST_SECONDS + 1
    assert await setting.of(token)


async def test_no_caller_waits_for_a_slow_fetch_while_there_are_keys(setting: Setting) -> None:
    token = KEY.sign(claims(exp=NOW + 10**6))
    assert await setting.of(token)
    setting.server.status = 503
    setting.now += jwks.FRESH_SECONDS + 1
    assert await setting.of(token)
    setting.server.hold = asyncio.Event()
    setting.now += jwks.PATIENCE_SECONDS + 1
    assert await setting.of(token)
    setting.server.hold.set()


def large() -> bytes:
    return json.dumps({"keys": [KEY.jwk()], "padding": "a" * jwks.MOST_BYTES}).encode()


@pytest.mark.parametrize(
    ("served", "problem"),
    [
        ({"content": large()}, "there are more than 262144 bytes"),
        ({"content": b"[" * 200_000}, "recursion"),
        ({"content": b"<html>"}, "Expecting value"),
        ({"content": b"[]"}, "there is no JSON Web Key Set"),
        ({"content": b'{"keys": 7}'}, "there is no JSON Web Key Set"),
        ({"keys": []}, "there is no JSON Web Key Set"),
        ({"keys": [KEY.jwk(use="enc")]}, "there is no JSON Web Key Set"),
        ({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "first"}]}, "there is no JSON Web Key Set"),
        ({"keys": [7, {}, {"kty": "RSA"}, {"kty": "EC", "alg": ["ES256"]}]}, "there is no JSON Web Key Set"),
        ({"status": 500}, "the status is 500"),
        ({"status": 302, "headers": {"location": "/keys?again"}}, "the status is 302"),
        ({"hold": True}, "TimeoutError"),
        ({"endless": True}, "there are more than 262144 bytes"),
    ],
    ids=[
        "large",
        "deep",
        "HTML",
        "list",
        "number",
        "none",
        "encryption",
        "secret",
        "broken",
        "500",
        "302",
        "slow",
        "endless",
    ],
)
async def test_keys_that_cannot_be_fetched_leave_the_caller_unknown(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, served: Mapping[str, Any], problem: str
) -> None:
    """Within bounds, and until they can."""
    monkeypatch.setattr(jwks, "FETCH_SECONDS", 0.1 if "hold" in served else 60.0)
    before = vars(setting.server).copy()
    for name, value in served.items():
        setattr(setting.server, name, asyncio.Event() if name == "hold" else value)
    await setting.cannot_verify(KEY.sign(claims()))
    (told,) = setting.unavailable
    assert problem in told
    assert 1 == setting.server.fetches
    vars(setting.server).update(before)
    monkeypatch.setattr(jwks, "FETCH_SECONDS", 60.0)
    setting.now += jwks.FIRST_SECONDS + 1
    assert await setting.of(KEY.sign(claims()))


async def test_keys_that_are_unavailable_at_the_start_are_fetched_every_second(setting: Setting) -> None:
    setting.server.status = 503
    for _ in range(10):
        await setting.cannot_verify(KEY.sign(claims()))
    assert 1 == setting.server.fetches
    setting.server.status = 200
    setting.now += 1.1
    assert await setting.of(KEY.sign(claims()))


async def test_an_issuers_own_configuration_says_where_its_keys_are(setting: Setting) -> None:
    setting.server.issuer = issuer = f"{setting.server.base}/realms/acme"
    for name in (issuer, f"{issuer}/"):
        setting.server.issuer = name
        setting.judge(issuer=name, jwks_url="")
        assert Principal("acme", f"{name}#ada", Role.USER) == await setting.of(KEY.sign(claims(iss=name)))
    assert 2 == setting.server.fetches


@pytest.mark.parametrize(
    ("served", "problem"),
    [
        ({"issuer": "https://other.example"}, "names another issuer"),
        ({"configuration": b"[]"}, "names another issuer"),
        ({"configuration": b"<html>"}, "Expecting value"),
        ({"configuration": b"[" * 200_000}, "recursion"),
        ({"configuration": b" " * 300_000}, "more than 262144 bytes"),
        ({"configuration": b"", "status": 500}, "the status is 500"),
        ({"jwks_uri": None}, "no jwks_uri that begins with https://"),
        ({"jwks_uri": 7}, "no jwks_uri that begins with https://"),
        ({"jwks_uri": "file:///etc/passwd"}, "no jwks_uri that begins with https://"),
        ({"jwks_uri": "http://192.0.2.1/keys"}, "no jwks_uri that begins with https://"),
    ],
    ids=["another's", "list", "HTML", "deep", "large", "500", "none", "number", "file", "plain text"],
)
async def test_a_configuration_that_is_not_right_gives_no_keys(
    setting: Setting, served: Mapping[str, Any], problem: str
) -> None:
    """And is fetched again."""
    issuer = setting.server.issuer = f"{setting.server.base}/realms/acme"
    before = vars(setting.server).copy()
    vars(setting.server).update(served)
    setting.judge(issuer=issuer, jwks_url="")
    await setting.cannot_verify(KEY.sign(claims(iss=issuer)))
    (told,) = setting.unavailable
    assert problem in told
    assert 0 == setting.server.fetches
    vars(setting.server).update(before)
    setting.now += jwks.FIRST_SECONDS + 1
    assert await setting.of(KEY.sign(claims(iss=issuer)))


async def test_an_issuer_elsewhere_cannot_send_the_server_to_plain_text_on_this_machine(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    async def fetch(url: str) -> bytes:
        fetched.append(url)
        return json.dumps({"issuer": ISSUER, "jwks_uri": setting.server.url}).encode()

    monkeypatch.setattr(jwks, "_fetch", fetch)
    setting.judge(jwks_url="")
    await setting.cannot_verify(KEY.sign(claims()))
    assert [f"{ISSUER}/.well-known/openid-configuration"] == fetched


def alike(*keys: SigningKey) -> list[dict[str, Any]]:
    """The keys under one id."""
    return [key.jwk(kid="same") for key in keys]


def unnamed(*keys: SigningKey) -> list[dict[str, Any]]:
    return [{name: value for name, value in key.jwk().items() if name != "kid"} for key in keys]


NEW, OTHER_CURVE = SigningKey("new"), SigningKey("other", "ES384")


@pytest.mark.parametrize(
    ("keys", "signers", "key_id"),
    [
        (alike(RSA_KEY, KEY), [RSA_KEY, KEY], "same"),
        (alike(KEY, NEW), [KEY, NEW], "same"),
        (unnamed(KEY, NEW), [KEY, NEW], ""),
        (unnamed(OTHER_CURVE, RSA_KEY, KEY), [RSA_KEY, KEY], ""),
        ([RSA_KEY.jwk(), KEY.jwk(), NEW.jwk()], [RSA_KEY, KEY, NEW], ""),
        ([KEY.jwk(use=None, alg=None)], [KEY], KEY.id),
        ([NEW.jwk(use=["sig"]), OTHER_CURVE.jwk(use={}), KEY.jwk()], [KEY], KEY.id),
        ([RSA_KEY.jwk(alg="PS256"), RSA_KEY.jwk(alg="RS256")], [RSA_KEY], RSA_KEY.id),
    ],
    ids=[
        "one id for two kinds",
        "one id",
        "no ids",
        "no ids, other curve",
        "no id in the token",
        "nulls",
        "odd uses",
        "twice",
    ],
)
async def test_every_key_that_may_be_meant_is_tried(
    setting: Setting, keys: list[Any], signers: list[SigningKey], key_id: str
) -> None:
    setting.server.keys = keys
    for key in signers:
        assert await setting.of(key.sign(claims(), kid=key_id))
    stranger = SigningKey("stranger", signers[0].algorithm)
    assert "not its issuer's" in await setting.refuses(stranger.sign(claims(), kid=key_id))
    assert "InvalidAudienceError" in await setting.refuses(signers[0].sign(claims(aud="other"), kid=key_id))


async def test_few_keys_are_tried(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MOST_TRIED", 1)
    setting.server.keys = unnamed(NEW, KEY)
    assert "not its issuer's" in await setting.refuses(KEY.sign(claims(), kid=""))


async def test_a_key_is_for_the_algorithm_that_its_issuer_names(setting: Setting) -> None:
    setting.server.keys = [RSA_KEY.jwk(alg="RS512")]
    assert "its key is for another algorithm" == await setting.refuses(RSA_KEY.sign(claims()))


async def test_keys_come_from_a_file_too(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    setting.judge(jwks_url="", jwks_file=path)
    await setting.cannot_verify(KEY.sign(claims()))
    path.write_text(json.dumps({"keys": [KEY.jwk()]}))
    setting.now += jwks.FIRST_SECONDS + 1
    assert await setting.of(KEY.sign(claims()))
    path.write_bytes(large())
    setting.now += jwks.FRESH_SECONDS + 1
    assert await setting.of(KEY.sign(claims(exp=NOW + 10**6)))
    assert 0 == setting.server.fetches

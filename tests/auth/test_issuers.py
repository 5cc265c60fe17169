"""The file of identity providers: what it says, and everything that is wrong with it at once."""

from pathlib import Path

import pytest
from notecase_server.auth.principal import Role
from notecase_server.auth.settings import IssuerSettings, read_issuers
from notecase_server.auth.tables import SettingsError

RIGHT = """
[[issuer]]
issuer = "https://login.example/realms/acme"
audience = "notecase"
algorithms = ["RS256", "ES256"]
jwks_url = "https://login.example/realms/acme/keys"
tenant = "acme"
role_claim = ["realm_access", "roles"]
roles = {notecase-admin = "admin", staff = "user"}
user_claim = "sub"

[[issuer]]
issuer = "https://accounts.example"
audience = ["notecase", "notecase-ci"]
algorithms = "EdDSA"
jwks_file = "keys.json"
tenant_claim = "org"
role = "developer"
user = "users/ci"
subject_claim = "client_id"

[[issuer]]
issuer = "http://localhost:8080"
audience = "notecase"
algorithms = ["ES256"]
jwks_url = "http://localhost:8080/keys"
role = "operator"
"""

WRONG = """
[[issuer]]
issuer = ""
audience = []
algorithms = ["RS256", "HS256", "none"]
jwks_url = "http://login.example/keys"
jwks_file = "keys.json"
tenant = "acme"
tenant_claim = "org"
role = "user"
role_claim = "role"
user = "ada"
rolls = {a = "admin"}

[[issuer]]
issuer = "https://a.example"
audience = "notecase"
algorithms = 7
tenant = ""
roles = {a = "owner", b = 7}

[[issuer]]
issuer = "https://a.example"
audience = ["notecase", ""]
algorithms = ["ES256"]
jwks_url = "https://a.example/keys"
role = "operator"
tenant = "acme"

[[issuer]]
issuer = "login.example"
audience = "notecase"
algorithms = ["ES256"]
role = "operator"
"""


def test_a_file_says_which_issuers_there_are(tmp_path: Path) -> None:
    path = tmp_path / "issuers.toml"
    path.write_text(RIGHT)
    assert (
        IssuerSettings(
            issuer="https://login.example/realms/acme",
            audiences=("notecase",),
            algorithms=("RS256", "ES256"),
            jwks_url="https://login.example/realms/acme/keys",
            tenant="acme",
            role_claim=("realm_access", "roles"),
            roles={"notecase-admin": Role.ADMIN, "staff": Role.USER},
            user_claim=("sub",),
        ),
        IssuerSettings(
            issuer="https://accounts.example",
            audiences=("notecase", "notecase-ci"),
            algorithms=("EdDSA",),
            jwks_file=Path("keys.json"),
            tenant_claim=("org",),
            role=Role.DEVELOPER,
            user="ci",
            subject_claim=("client_id",),
        ),
        IssuerSettings(
            issuer="http://localhost:8080",
            audiences=("notecase",),
            algorithms=("ES256",),
            jwks_url="http://localhost:8080/keys",
            role=Role.OPERATOR,
        ),
    ) == read_issuers(path)


def test_all_mistakes_in_the_file_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "issuers.toml"
    path.write_text(WRONG)
    with pytest.raises(SettingsError) as found:
        read_issuers(path)
    told = [(mistake.setting.removeprefix("--issuers issuer"), mistake.text) for mistake in found.value.mistakes]
    known = "ES256, ES384, ES512, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512"
    a_role = "A role must be one of viewer, user, developer, admin, operator."
    assert [
        ("[0].issuer", "This is empty."),
        ("[0].audience", "This must be a string, or a list of strings."),
        ("[0].user", "A user must be users/ and an id."),
        ("[0].rolls", "There is no such key; the nearest is roles."),
        ("[0].algorithms", f"HS256 is none of {known}."),
        ("[0].algorithms", f"none is none of {known}."),
        ("[0].jwks_url", "Give jwks_url or jwks_file, and not both."),
        ("[0].jwks_url", "This must begin with https://, or with http:// on this machine only."),
        ("[0].tenant", "Give tenant or tenant_claim, not both."),
        ("[0].role", "Give role or role_claim, not both."),
        ("[1].algorithms", "This must be a string, or a list of strings."),
        ("[1].tenant", "This is empty."),
        ("[1].roles.a", a_role),
        ("[1].roles.b", a_role),
        ("[1].role", "Give role or role_claim."),
        ("[2].audience", "This must be a string, or a list of strings."),
        ("[2].role", "An operator has no tenant and no user."),
        ("[2].issuer", "https://a.example is in the file twice."),
        ("[3].issuer", "Without jwks_url this must begin with https://, or with http:// on this machine only."),
    ] == told


@pytest.mark.parametrize("content", ["", "issuer = 7", "issuer = [7]", "issuers = []"])
def test_a_file_without_issuers_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "issuers.toml"
    path.write_text(content)
    with pytest.raises(SettingsError):
        read_issuers(path)

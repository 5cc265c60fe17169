"""TLS on real sockets: who connects, and what becomes of a server's certificate that changes while it serves."""

import asyncio
import codecs
import ssl
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_key
from notecase import v1
from notecase_server.auth.files import Watched
from notecase_server.auth.tables import SettingsError
from notecase_server.auth.tls import credentials, read_identity
from notecase_server.serve import now
from structlog.testing import capture_logs

from tests.support.authority import Authority, Pair
from tests.support.polling import until
from tests.support.server import running

INFO = v1.GetServerInfoRequest()

READ_AGAIN = "files_reloaded"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> dict[str, Any]:
    """The settings of TLS."""
    cert, key = authority.issue().write(tmp_path)
    (tmp_path / "ca.pem").write_bytes(authority.cert)
    return {"tls_cert": cert, "tls_key": key}


async def served_certificate(port: int) -> x509.Certificate:
    """Returns the certificate that a new connection gets."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(shown)


def certificate(pair: Pair) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pair.cert)


async def test_a_server_with_a_certificate_is_called_by_clients_with_its_ca(
    authority: Authority, files: Mapping[str, Any]
) -> None:
    async with running(credentials=grpc.ssl_channel_credentials(authority.cert), **files) as served:
        assert "memory" == (await served.info.GetServerInfo(INFO)).store
        for stranger in (grpc.ssl_channel_credentials(Authority().cert), None):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await info(served.address, stranger)
            assert grpc.StatusCode.UNAVAILABLE is refused.value.code()


async def info(address: str, channel: grpc.ChannelCredentials | None) -> v1.ServerInfo:
    own = (("grpc.use_local_subchannel_pool", 1),)
    opened = grpc.aio.secure_channel(address, channel, own) if channel else grpc.aio.insecure_channel(address, own)
    async with opened:
        return await v1.ServerServiceStub(opened).GetServerInfo(INFO)


async def test_a_certificate_that_changes_is_served_without_a_restart(
    authority: Authority, files: Mapping[str, Any], tmp_path: Path
) -> None:
    """To new connections; those that are open go on."""
    async with running(credentials=grpc.ssl_channel_credentials(authority.cert), **files) as served:
        await served.info.GetServerInfo(INFO)
        renewed = authority.issue()
        renewed.write(tmp_path)

        async def changed() -> bool:
            return await served_certificate(served.server.port) == certificate(renewed)

        await until(changed)
        await served.info.GetServerInfo(INFO)
        assert "memory" == (await info(served.address, grpc.ssl_channel_credentials(authority.cert))).store


async def test_a_broken_certificate_leaves_the_old_one_and_is_logged_once(
    authority: Authority, files: Mapping[str, Any], tmp_path: Path
) -> None:
    cert, key = files["tls_cert"], files["tls_key"]
    identity = Watched([cert, key], lambda: read_identity(cert, key, None, now))
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", credentials(identity))
    await server.start()
    try:
        before = await served_certificate(port)
        with capture_logs() as lines:
            cert.write_bytes(authority.issue().cert)  # of another key
            identity.look()
            identity.look()
            assert before == await served_certificate(port)
            key.unlink()
            identity.look()
            identity.look()
            assert before == await served_certificate(port)
            renewed = authority.issue()
            renewed.write(tmp_path)
            identity.look()
            assert certificate(renewed) == await served_certificate(port)
        assert ["files_refused", "files_refused", READ_AGAIN] == [line["event"] for line in lines]
        assert [f"{key} is not the key of the first certificate in {cert}."] == lines[0]["problems"]
        assert [f"{key} cannot be read: No such file or directory."] == lines[1]["problems"]
    finally:
        await server.stop(None)


def test_all_files_of_tls_that_cannot_be_used_are_reported_at_once(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue().write(tmp_path)
    secret = load_key(key.read_bytes(), None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    key.write_bytes(secret)
    cert.write_text("no certificate")
    with pytest.raises(SettingsError) as found:
        read_identity(cert, key, tmp_path / "none.pem", now)
    assert [
        ("--tls-cert", f"{cert} does not hold certificates in PEM."),
        ("--tls-key", f"{key} is encrypted; give a key that is not."),
        ("--tls-client-ca", f"{tmp_path / 'none.pem'} cannot be read: No such file or directory."),
    ] == list(found.value.mistakes)
    key.write_text("no key")
    with pytest.raises(SettingsError) as found:
        read_identity(cert, key, None, now)
    assert ("--tls-key", f"{key} does not hold a private key in PEM.") == found.value.mistakes[1]


@pytest.mark.parametrize("key", [ed448.Ed448PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())])
def test_a_key_that_grpc_does_not_know_is_refused(tmp_path: Path, authority: Authority, key: Any) -> None:
    """The server says so itself, since gRPC only says that it cannot bind to the address."""
    files = authority.issue(key=key).write(tmp_path)
    with pytest.raises(SettingsError, match="is of a kind that gRPC does not know"):
        read_identity(*files, None, now)


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
    ],
)
async def test_a_key_of_a_known_kind_is_served(tmp_path: Path, authority: Authority, key: Any) -> None:
    pair = authority.issue(key=key)
    files = pair.write(tmp_path)
    server = grpc.aio.server()
    identity = Watched(files, lambda: read_identity(*files, None, now))
    port = server.add_secure_port("127.0.0.1:0", credentials(identity))
    await server.start()
    assert certificate(pair) == await served_certificate(port)
    await server.stop(None)


async def test_files_that_begin_with_a_mark_are_served(
    tmp_path: Path, authority: Authority, files: Mapping[str, Any]
) -> None:
    """As some editors save them: gRPC refuses such a file, and every new connection once it was read again."""
    for path in (files["tls_cert"], files["tls_key"]):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    async with running(credentials=grpc.ssl_channel_credentials(authority.cert), **files) as served:
        assert "memory" == (await served.info.GetServerInfo(INFO)).store


def test_a_certificate_that_has_expired_is_taken_with_a_warning(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue(lasts=-timedelta(days=1)).write(tmp_path)
    with capture_logs() as lines:
        assert cert.read_bytes() == read_identity(cert, key, None, now).chain
    assert [("certificate_expired", str(cert))] == [(line["event"], line["file"]) for line in lines]

"""A certificate authority of a test's own."""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)

HERE = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
"""The names of a server on this machine."""


class Pair(NamedTuple):
    """A certificate and its key, as PEM."""

    cert: bytes
    key: bytes

    def write(self, folder: Path, name: str = "server") -> tuple[Path, Path]:
        """Writes both as files, the key last; returns their paths."""
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(self.cert)
        key.touch(0o600)
        key.write_bytes(self.key)
        return cert, key


class Authority:
    """Signs certificates."""

    def __init__(self, name: str = "a test's authority") -> None:
        self._name = _named(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(self._name, self._name, self._key, datetime.now(UTC) + 9 * DAY)
        self._cert = builder.add_extension(x509.BasicConstraints(True, None), critical=True).sign(
            self._key, hashes.SHA256()
        )

    @property
    def cert(self) -> bytes:
        """Its own certificate, as PEM."""
        return self._cert.public_bytes(Encoding.PEM)

    def issue(
        self,
        names: Sequence[x509.GeneralName] = HERE,
        *,
        lasts: timedelta = DAY,
        key: CertificateIssuerPrivateKeyTypes | None = None,
    ) -> Pair:
        """Makes a certificate for these names, and for a key that is new unless one is given."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_named("one"), self._name, key, datetime.now(UTC) + lasts)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        cert = builder.sign(self._key, hashes.SHA256())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Pair(cert.public_bytes(Encoding.PEM), pem)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: CertificateIssuerPrivateKeyTypes, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - 9 * DAY)
        .not_valid_after(until)
    )

"""The server's certificate, and the credentials of its ports, which follow the files when they change."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from notecase_server.auth.files import Watched
from notecase_server.auth.tables import Mistake, SettingsError

T = TypeVar("T")

log = structlog.get_logger()

CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
"""Those that gRPC's TLS knows."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The contents of the TLS files, as PEM: a key, its certificate with the chain to a CA, and the CAs of clients."""

    key: bytes
    chain: bytes
    client_ca: bytes | None


def read_identity(cert: Path, key: Path, client_ca: Path | None, clock: Callable[[], int]) -> Identity:
    """Reads the files. A certificate that has expired by `clock`, which returns microseconds since 1970, is used with a
    warning in the log. Raises SettingsError for files that cannot be read or do not belong together."""
    mistakes: list[Mistake] = []
    chain = _parsed("--tls-cert", cert, x509.load_pem_x509_certificates, mistakes)
    private = _parsed("--tls-key", key, lambda pem: load_pem_private_key(pem, None), mistakes)
    if private and not _is_known(private):
        mistakes.append(Mistake("--tls-key", f"{key} is of a kind that gRPC does not know; give RSA, EC or Ed25519."))
    authorities = None
    if client_ca is not None:
        authorities = _parsed("--tls-client-ca", client_ca, x509.load_pem_x509_certificates, mistakes)
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if chain and private and chain[0].public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        mistakes.append(Mistake("--tls-key", f"{key} is not the key of the first certificate in {cert}."))
    if mistakes or not chain or not private:
        raise SettingsError(mistakes)
    expires = chain[0].not_valid_after_utc
    if expires.timestamp() * 1e6 <= clock():
        log.warning("certificate_expired", file=str(cert), expires=expires.isoformat())
    # Written anew: gRPC's parser refuses files that this one takes, such as one that begins with a byte order mark.
    key_pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity(key_pem, _pem(chain), None if authorities is None else _pem(authorities))


def _pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def expires(certificate: bytes) -> float:
    """Returns until when a certificate in PEM is valid, in microseconds since 1970. Raises ValueError."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc.timestamp() * 1e6


def _is_known(key: PrivateKeyTypes) -> bool:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return isinstance(key.curve, CURVES)
    return isinstance(key, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey)


def _parsed(option: str, path: Path, parse: Callable[[bytes], T], mistakes: list[Mistake]) -> T | None:
    """Returns the content of a PEM file, or collects the mistake."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror}."
    except TypeError:
        text = f"{path} is encrypted; give a key that is not."
    except (ValueError, UnsupportedAlgorithm):
        text = f"{path} does not hold {'a private key' if option == '--tls-key' else 'certificates'} in PEM."
    mistakes.append(Mistake(option, text))
    return None


def credentials(identity: Watched[Identity], *, require_client: bool = False) -> grpc.ServerCredentials:
    """Makes the credentials of one port. A connection that is made after a change gets the new identity; open ones are
    not affected. With `require_client` only clients with a certificate that `client_ca` signed connect."""
    given = identity.value

    def configuration(of: Identity) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(of.key, of.chain)], of.client_ca if require_client else None)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        if identity.value is given:
            return None
        given = identity.value
        return configuration(given)

    # The types do not know that None means no change.
    return grpc.dynamic_ssl_server_credentials(configuration(given), changed, require_client)  # type: ignore[arg-type]

"""An authority of a test's own and the certificates that it signs, as files a cluster is started with.

In: a folder and names. Out: paths in PEM.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Who somebody is, and who says so."""

    authority: Path
    certificate: Path
    key: Path

    @property
    def dask_options(self) -> tuple[str, ...]:
        """Of ``dask scheduler`` and ``dask worker``."""
        return ("--tls-ca-file", str(self.authority), "--tls-cert", str(self.certificate), "--tls-key", str(self.key))

    @property
    def options(self) -> tuple[str, ...]:
        """Of ``kdpipe cache-teacher``."""
        return ("--tls-ca", str(self.authority), "--tls-cert", str(self.certificate), "--tls-key", str(self.key))


class Authority:
    """A certificate that signs itself and others."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, _named(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.path = folder / f"{name}.pem"
        self._write(self.path, self._name, self._key.public_key(), is_authority=True)

    def certify(self, name: str) -> Certificate:
        """A new key, and its certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        paths = Certificate(
            authority=self.path, certificate=self._folder / f"{name}.pem", key=self._folder / f"{name}.key"
        )
        kind = serialization.PrivateFormat.PKCS8
        paths.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))
        self._write(paths.certificate, _named(name), key.public_key(), is_authority=False)
        return paths

    def _write(self, path: Path, name: x509.Name, key: ec.EllipticCurvePublicKey, *, is_authority: bool) -> None:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        signed = builder.sign(self._key, hashes.SHA256())
        path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

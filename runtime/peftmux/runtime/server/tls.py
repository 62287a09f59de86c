"""Server credentials from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With `client_ca` every client must show a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """OSError where a file cannot be read."""
        client_ca = None if self.client_ca is None else self.client_ca.read_bytes()
        pairs = [(self.key.read_bytes(), self.cert.read_bytes())]
        return grpc.ssl_server_credentials(pairs, client_ca, require_client_auth=client_ca is not None)

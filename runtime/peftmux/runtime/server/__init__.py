"""The gRPC server: proto <-> domain, errors -> status, health, metrics. Protobuf and gRPC end here."""

from peftmux.runtime.server.app import Server, ServerConfig, ServerMetrics
from peftmux.runtime.server.auth import Tokens
from peftmux.runtime.server.tls import TlsFiles

__all__ = ["Server", "ServerConfig", "ServerMetrics", "TlsFiles", "Tokens"]

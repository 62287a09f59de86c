"""How the commands that ask a server reach it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peftmux.cli import values
from peftmux.cli.errors import CommandError
from peftmux.cli.settings import Settings

if TYPE_CHECKING:
    from peftmux.client import Client


def add_connection(settings: Settings) -> None:
    settings.add(
        "--server", metavar="HOST:PORT", type=values.address, default="127.0.0.1:50051", help="the server to ask"
    )
    settings.add("--token", metavar="TOKEN", help="bearer token; PEFTMUX_TOKEN keeps it out of the process list")
    settings.add("--tls", action="store_true", default=False, help="use TLS with the system's certificates")
    settings.add("--tls-ca-cert-path", metavar="FILE", type=values.existing_file, help="use TLS, trusting this one")
    settings.add("--tls-cert-path", metavar="FILE", type=values.existing_file, help="this client's certificate")
    settings.add("--tls-key-path", metavar="FILE", type=values.existing_file, help="its private key")
    settings.together("--tls-cert-path", "--tls-key-path")
    settings.add("--timeout", metavar="S", type=values.seconds, help="seconds for the call")


def add_adapter(settings: Settings, help: str) -> None:
    """The name of one that the server has loaded, as `adapter_name`: PEFTMUX_ADAPTER is what the server loads."""
    settings.add("--adapter", dest="adapter_name", metavar="NAME", help=f"NAME or NAME@REVISION{help}")


@contextmanager
def connected(args: argparse.Namespace) -> Iterator[Client]:
    """A client; whatever the server refuses becomes a CommandError that says why."""
    from peftmux.client import Client, RpcError, Tls

    tls = None
    if args.tls or args.tls_ca_cert_path is not None or args.tls_cert_path is not None:
        tls = Tls(args.tls_ca_cert_path, args.tls_cert_path, args.tls_key_path)
    with Client(args.server, token=args.token, tls=tls, timeout=args.timeout) as client:
        try:
            yield client
        except RpcError as error:
            raise CommandError(_explain(error, args.server)) from error


def _explain(error: Exception, server: str) -> str:
    from peftmux.client import RpcError, Unavailable

    assert isinstance(error, RpcError)
    if isinstance(error, Unavailable) and not error.reason:
        return f"no server answers at {server}: {error.message}"
    return f"{error.reason or error.code}: {error.message}"

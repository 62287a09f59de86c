"""`peftmux serve MODEL`: an engine and its server until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from peftmux.cli import values
from peftmux.cli.errors import CommandError
from peftmux.cli.settings import Settings, parse

if TYPE_CHECKING:
    from peftmux.runtime.engine.api import ModelInfo
    from peftmux.runtime.engine.factory import EngineConfig
    from peftmux.runtime.server import Server, ServerConfig

logger = logging.getLogger("peftmux.serve")

_LAST_SECONDS = 1.9
"""After the grace, for the last statuses to go out; a hung process is ended then."""


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT, then end the process with status 0; returns (or raises) only before that."""
    parser, settings = build_parser()
    args = parse(parser, settings, argv, os.environ)
    if args.model is None:
        parser.error("expected MODEL (a folder or a hub id), got none")
    if args.watch_adapters and args.adapters is None:
        parser.error("expected --adapters DIR with --watch-adapters, got none")
    if args.tls_client_ca_cert_path is not None and args.tls_cert_path is None:
        parser.error("expected --tls-cert-path and --tls-key-path with --tls-client-ca-cert-path, got neither")
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    asyncio.run(_serve(args))
    _leave()


def _leave() -> NoReturn:
    """End at once: the drain has left nothing open, and taking torch's modules apart would add seconds to the grace."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def build_parser() -> tuple[argparse.ArgumentParser, Settings]:
    parser = argparse.ArgumentParser(
        prog="peftmux serve",
        description="Serve a base model and any number of its adapters over gRPC, in one continuous batch.",
        epilog="Each option may also come from the environment (--max-rows: PEFTMUX_MAX_ROWS) or from --config FILE; "
        "a flag wins over the environment, and the environment over the file. Sizes: 2GiB, 500MB, 1073741824.",
    )
    settings = Settings(parser)
    settings.add("model", nargs="?", metavar="MODEL", help="folder or hub id of the base model")
    _add_adapters(settings)
    _add_addresses(settings)
    _add_engine(settings)
    return parser, settings


def _add_adapters(settings: Settings) -> None:
    settings.add(
        "--adapters", metavar="DIR", type=values.folder, help="the adapter root: LoadAdapter takes paths under it"
    )
    settings.add(
        "--watch-adapters",
        action="store_true",
        default=False,
        help="load what appears in the adapter root, replace what changes, unload what goes",
    )
    settings.add(
        "--watch-seconds", metavar="S", type=values.interval, default=1.0, help="between two looks at the adapter root"
    )
    settings.add(
        "--adapter",
        metavar="NAME=PATH",
        action="append",
        type=values.named_path,
        default=[],
        help="load this adapter at start (may be repeated)",
    )
    settings.add(
        "--lora-modules",
        metavar="NAME=PATH",
        nargs="+",
        action="extend",
        type=values.named_path,
        default=[],
        help="as --adapter, in vLLM's spelling",
    )
    settings.add("--adapter-memory", metavar="SIZE", type=values.size, help="memory for adapters on the device")
    settings.add(
        "--max-loras", metavar="N", type=values.positive, help="reported to routers as max_lora; memory is the limit"
    )
    settings.add("--max-lora-rank", metavar="N", type=values.positive, help="accepted; any rank is served as it is")
    settings.add("--max-cpu-loras", metavar="N", type=values.positive, help="accepted; memory is the limit")


def _add_addresses(settings: Settings) -> None:
    settings.add(
        "--grpc", metavar="HOST:PORT", type=values.address, default="127.0.0.1:50051", help="where to serve; 0 is free"
    )
    settings.add(
        "--metrics",
        metavar="HOST:PORT",
        type=values.address_or_off,
        default="127.0.0.1:9464",
        help="where Prometheus may ask, or 'off'",
    )
    settings.add(
        "--grace-seconds",
        metavar="S",
        type=values.seconds,
        default=30.0,
        help="what running requests have to finish in after SIGTERM",
    )
    for name, text in (
        ("--tls-cert-path", "server certificate chain, PEM"),
        ("--tls-key-path", "its private key, PEM"),
        ("--tls-client-ca-cert-path", "clients must show a certificate signed by this one, PEM"),
        ("--auth-tokens", "bearer tokens that may call, one a line; without it anyone may"),
    ):
        settings.add(name, metavar="FILE", type=values.existing_file, help=text)
    settings.together("--tls-cert-path", "--tls-key-path")
    settings.add(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="what goes to stderr"
    )


def _add_engine(settings: Settings) -> None:
    settings.add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs")
    settings.add(
        "--dtype", choices=values.DTYPES, default="auto", help="type of weights and cache; auto is the model's own"
    )
    settings.add(
        "--quantization",
        choices=values.QUANTISATIONS,
        default=None,
        help="quantise the base's linear layers while loading (fp8 by torchao, the others by bitsandbytes); "
        "checkpoints that are need no flag",
    )
    settings.add("--max-batch-tokens", metavar="N", type=values.positive, help="tokens of one step, all rows together")
    settings.add("--max-rows", metavar="N", type=values.positive, default=256, help="requests in a batch")
    settings.add("--max-queued-requests", metavar="N", type=values.positive, default=256, help="requests that may wait")
    settings.add("--kv-cache-memory", metavar="SIZE", type=values.size, help="memory for the paged cache")
    settings.add("--block-size", metavar="N", type=values.positive, default=16, help="tokens of a cache block")
    settings.add(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse the cache of prompts that begin alike",
    )
    settings.add("--context-length", metavar="N", type=values.positive, help="serve a shorter context than the model's")
    settings.add("--num-threads", metavar="N", type=values.positive, help="CPU threads of the model")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    from peftmux.runtime.engine.factory import EngineConfig

    return EngineConfig(
        model=args.model,
        adapters_root=args.adapters,
        watch_seconds=args.watch_seconds if args.watch_adapters else None,
        adapters=(*args.adapter, *args.lora_modules),
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        max_batch_tokens=args.max_batch_tokens,
        max_rows=args.max_rows,
        max_queued_requests=args.max_queued_requests,
        kv_cache_memory=args.kv_cache_memory,
        adapter_memory=args.adapter_memory,
        block_size=args.block_size,
        prefix_caching=args.prefix_caching,
        num_threads=args.num_threads,
        context_length=args.context_length,
    )


def server_config(args: argparse.Namespace) -> ServerConfig:
    """CommandError for a tokens file without tokens."""
    from peftmux.runtime.server import ServerConfig, TlsFiles, Tokens

    tls = None
    if args.tls_cert_path is not None:
        tls = TlsFiles(args.tls_cert_path, args.tls_key_path, args.tls_client_ca_cert_path)
    try:
        tokens = None if args.auth_tokens is None else Tokens.read(Path(args.auth_tokens))
    except ValueError as error:
        raise CommandError(str(error)) from error
    return ServerConfig(
        grpc=args.grpc,
        metrics=args.metrics,
        grace_seconds=args.grace_seconds,
        tls=tls,
        tokens=tokens,
        max_loras=args.max_loras,
    )


async def _serve(args: argparse.Namespace) -> None:
    from peftmux.adapters.errors import AdapterError
    from peftmux.runtime.engine.factory import start_engine
    from peftmux.runtime.errors import RuntimeFailure
    from peftmux.runtime.server import Server, ServerMetrics

    config = server_config(args)
    if config.tokens is not None and config.tls is None:
        logger.warning("bearer tokens travel in the clear: no --tls-cert-path")
    metrics = ServerMetrics()
    # as process 1 of a container the default handler would not act, and nothing is there to drain yet
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, os._exit, 128 + signal.SIGTERM)
    try:
        engine = await start_engine(engine_config(args), metrics.engine)
    except (RuntimeFailure, AdapterError) as error:
        raise CommandError(str(error)) from error
    server = Server(engine, metrics, config)
    try:
        await server.run(
            lambda started: print(_ready(started, engine.info), flush=True),
            lambda: _leave_within(config.grace_seconds + _LAST_SECONDS),
        )
    except OSError as error:
        await engine.drain(0.0)
        raise CommandError(str(error)) from error


def _leave_within(seconds: float) -> None:
    """Whatever hangs while leaving, the process is gone by then: what manages it counts on that."""

    def leave() -> None:
        logger.error("still here %g s after SIGTERM: leaving at once", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


def _ready(server: Server, model: ModelInfo) -> str:
    metrics = f", metrics http://{server.metrics_address}/metrics" if server.metrics_address else ""
    what = f"{model.name} ({model.architecture}, {model.dtype} on {model.device})"
    return f"peftmux ready: grpc {server.grpc_address}{metrics}, model {what}"

"""What `peftmux serve` makes of its options."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftmux.cli import serve
from peftmux.cli.errors import CommandError
from peftmux.cli.settings import parse
from peftmux.runtime.engine.factory import EngineConfig
from peftmux.runtime.server import ServerConfig


def args(*argv: str):
    return parse(*serve.build_parser(), ["model", *argv], {})


def test_the_defaults_are_the_engines_and_the_servers():
    assert serve.engine_config(args()) == EngineConfig(model="model")
    assert serve.server_config(args()) == ServerConfig()


def test_engine_options_arrive(tmp_path):
    argv = f"""--adapters {tmp_path} --adapter a=x --adapter b=y --lora-modules c=z d=w --device cpu --dtype bfloat16
        --max-batch-tokens 64 --max-rows 8 --max-queued-requests 9 --kv-cache-memory 1GiB --adapter-memory 2MiB
        --block-size 32 --no-prefix-caching --watch-adapters --watch-seconds 0.5 --num-threads 2 --context-length 100"""
    assert serve.engine_config(args(*argv.split())) == EngineConfig(
        model="model",
        adapters_root=str(tmp_path),
        adapters=(("a", "x"), ("b", "y"), ("c", "z"), ("d", "w")),
        watch_seconds=0.5,
        device="cpu",
        dtype="bfloat16",
        max_batch_tokens=64,
        max_rows=8,
        max_queued_requests=9,
        kv_cache_memory=2**30,
        adapter_memory=2**21,
        block_size=32,
        prefix_caching=False,
        num_threads=2,
        context_length=100,
    )


def test_server_options_arrive(tmp_path):
    for name in ("cert", "key", "ca", "tokens"):
        (tmp_path / name).write_text("x")
    argv = f"""--grpc 0.0.0.0:1 --metrics off --grace-seconds 2.5 --max-loras 4 --max-lora-rank 64 --max-cpu-loras 9
        --tls-cert-path {tmp_path}/cert --tls-key-path {tmp_path}/key --tls-client-ca-cert-path {tmp_path}/ca
        --auth-tokens {tmp_path}/tokens"""
    config = serve.server_config(args(*argv.split()))
    assert (config.grpc, config.metrics, config.grace_seconds, config.max_loras) == ("0.0.0.0:1", None, 2.5, 4)
    assert config.tls is not None
    assert (config.tls.cert, config.tls.key, config.tls.client_ca) == tuple(tmp_path / n for n in ("cert", "key", "ca"))
    assert config.tokens is not None
    config.tokens.check("Bearer x")


def test_a_tokens_file_without_tokens_is_said(tmp_path):
    empty = Path(tmp_path / "tokens")
    empty.write_text("\n")
    with pytest.raises(CommandError, match="at least one token"):
        serve.server_config(args("--auth-tokens", str(empty)))


def test_watching_needs_a_folder(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        serve.main(["model", "--watch-adapters"])
    assert "expected --adapters DIR with --watch-adapters, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        args("--watch-seconds", "0")
    assert "expected a number of seconds > 0, got '0'" in capsys.readouterr().err

"""How the process starts wrong and how it leaves."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from peftmux.cli.main import main
from peftmux.client import Client, RpcError, Unavailable
from tests.serving.conftest import FIXTURES, Running, Start


def test_sigterm_finishes_the_short_and_ends_the_long(start: Start):
    server = start("--grace-seconds", "1.5")
    with Client(server.grpc, timeout=60, retries=0) as client:
        long, short = (client.stream("w1 w2", ignore_eos=True, max_tokens=count) for count in (90_000, 40))
        next(long)
        next(short)
        results: dict[str, object] = {}

        def read(name: str, stream) -> None:
            try:
                results[name] = sum(len(chunk.token_ids) for chunk in stream)
            except RpcError as error:
                results[name] = error

        readers = [threading.Thread(target=read, args=pair) for pair in (("long", long), ("short", short))]
        for reader in readers:
            reader.start()
        started = time.monotonic()
        assert server.leave(1.5 + 2) == 0
        assert time.monotonic() - started < 1.5 + 2
        for reader in readers:
            reader.join(5)
    assert isinstance(results["short"], int)
    assert results["short"] > 0
    assert isinstance(results["long"], Unavailable)
    assert results["long"].reason == "DRAINING"
    assert results["long"].retry_after is not None
    assert "Traceback" not in "".join(server.errors)


def test_a_second_interrupt_does_not_wait(start: Start):
    server = start("--grace-seconds", "60")
    with Client(server.grpc, timeout=60, retries=0) as client:
        stream = client.stream("w1 w2", ignore_eos=True)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 130
        with pytest.raises(Unavailable):
            list(stream)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/none/such"], "cannot load the base model '/none/such'"),
        (["BASE", "--adapter", "x=miss"], "MISS"),
        (["BASE", "--adapter", "x=/none/such"], "no adapter folder"),
        (["BASE", "--grpc", "TAKEN"], "cannot listen on"),
        (["BASE", "--metrics", "TAKEN"], "for metrics"),
        (["BASE", "--kv-cache-memory", "1k"], "KV cache memory"),
    ],
    ids=["model", "kind", "missing", "port", "metrics", "memory"],
)
def test_a_start_that_fails_is_one_line(server: Running, arguments, message, capsys):
    root = FIXTURES / "peft" / "llama"
    places = {"BASE": str(FIXTURES / "base" / "llama"), "TAKEN": server.grpc, "x=miss": f"x={root / 'miss'}"}
    fixed = ["--grpc", "127.0.0.1:0", "--metrics", "off", "--kv-cache-memory", "4MiB"]
    assert main(["serve", *fixed, *(places.get(argument, argument) for argument in arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("peftmux serve: ")
    assert "Traceback" not in err

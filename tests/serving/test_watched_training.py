"""Training ends in a hot-loaded adapter: `peftmux train --publish` into the folder that a running server watches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from peftmux.client import AdapterState, Client, NotFound
from peftmux.trainer.cli import main as train
from tests.serving.conftest import Running, Start

WORDS = [f"w{i}" for i in range(4, 60)]
PROMPT = "w5 w9 w17"


def rows(path: Path, answer: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{a} {b}", "completion": f" {answer}"}) + "\n" for a, b in PAIRS))
    return path


PAIRS = list(zip(WORDS, reversed(WORDS), strict=True))


def soon(condition: Callable[[], bool], server: Running) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "".join(server.errors)
        time.sleep(0.05)


def state(client: Client, name: str) -> AdapterState | None:
    try:
        return client.get_adapter(name).state
    except NotFound:
        return None


def serves(client: Client, kind: str) -> bool:
    return [adapter.kind for adapter in client.list_adapters()] == [kind]


def test_training_ends_in_a_served_adapter(start: Start, long_base: Path, tmp_path: Path) -> None:
    root = tmp_path / "served"
    root.mkdir()
    server = start("--adapters", str(root), "--watch-adapters", "--watch-seconds", "0.1")
    words = ["--model", str(long_base), "--publish", str(root), "--learning-rate", "0.05", "--seed", "1"]
    words += ["--max-steps", "40", "--per-device-train-batch-size", "8", "--dtype", "float32", "--overwrite"]
    with Client(server.grpc, timeout=60) as client:
        assert client.list_adapters() == ()
        for method, answer in (("lora", "w70"), ("dora", "w80")):  # the second replaces the first
            data, out = rows(tmp_path / "rows.jsonl", answer), tmp_path / "mine"
            assert train([method, "--data", str(data), "--out", str(out), *words]) == 0
            soon(partial(serves, client, method), server)
            assert client.generate(PROMPT, adapter="mine", max_tokens=1, temperature=0.0).text.strip() == answer
        (root / "broken").mkdir()
        (root / "broken" / "adapter_config.json").write_text("{")
        soon(lambda: state(client, "broken") is AdapterState.FAILED, server)
        assert server.scrape()["peftmux_adapter_load_failures_total"] == 1
        assert "adapter broken not loaded" in "".join(server.errors)
        (root / "mine").rename(root / ".away")
        soon(lambda: state(client, "mine") is None, server)
    assert server.leave(10) == 0

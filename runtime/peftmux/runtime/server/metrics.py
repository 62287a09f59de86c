"""Prometheus metrics of what the engine reports, and of the RPCs. `scrape.py` adds what is read at scrape time."""

from __future__ import annotations

import threading
from collections import defaultdict

from prometheus_client import CollectorRegistry, Counter, Histogram

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_LOAD = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
OTHER = "other"
"""The label of all adapters past the bound."""


class AdapterTokens:
    """Tokens by (adapter, kind) for at most `bound` adapters at a time, the others together as "other".

    A slot is given to the first that come and comes back when its adapter is gone (`keep`); its count then joins
    "other", so that no series ever goes down. Written by the engine's thread, read at scrape time.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._counts: dict[str, dict[str, int]] = {}
        self._other: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def add(self, adapter: str, **tokens: int) -> None:
        with self._lock:
            if adapter not in self._counts and len(self._counts) < self._bound:
                self._counts[adapter] = defaultdict(int)
            counts = self._counts.get(adapter, self._other)
            for kind, count in tokens.items():
                counts[kind] += count

    def keep(self, names: set[str]) -> None:
        """Give back the slots of adapters that are not in `names`."""
        with self._lock:
            for name in self._counts.keys() - names:
                for kind, count in self._counts.pop(name).items():
                    self._other[kind] += count

    def samples(self) -> list[tuple[str, str, int]]:
        """(adapter, kind, tokens), "other" last."""
        with self._lock:
            rows = [*self._counts.items(), *([(OTHER, self._other)] if self._other else [])]
            return [(name, kind, count) for name, counts in rows for kind, count in counts.items()]


class EngineMetrics:
    """Implements `peftmux.runtime.engine.observer.EngineObserver`: a few dictionary and lock operations a call."""

    def __init__(self, registry: CollectorRegistry, adapter_labels: int) -> None:
        self.adapter_tokens = AdapterTokens(adapter_labels)
        self._prompt = Counter("peftmux_prompt_tokens", "Prompt tokens of finished requests.", registry=registry)
        self._generation = Counter(
            "peftmux_generation_tokens", "Generated tokens of finished requests.", registry=registry
        )
        self._success = Counter(
            "peftmux_request_success", "Requests that ended, by reason.", ["finished_reason"], registry=registry
        )
        self._first = _seconds("time_to_first_token", "From arrival to the first token.", _LATENCY, registry)
        self._inter = _seconds("inter_token_latency", "Between two tokens of a request.", _STEP, registry)
        self._whole = _seconds("e2e_request_latency", "From arrival to the last token.", _LATENCY, registry)
        self._queue = _seconds("queue_time", "From arrival to the first step with the request.", _LATENCY, registry)
        self._load = _seconds("adapter_load", "From the call to a served adapter.", _LOAD, registry)
        self._refused = Counter(
            "peftmux_adapter_load_failures", "Loads that failed, watched folders included.", registry=registry
        )
        self._graphs = Counter(
            "peftmux_decode_graph_failures",
            "Captures of decode steps that failed: none is used then.",
            registry=registry,
        )
        self._step = _seconds("step", "One step of the engine.", _STEP, registry)
        self._batch = Histogram("peftmux_batch_tokens", "Tokens in a step.", buckets=_TOKENS, registry=registry)

    def step(self, seconds: float, tokens: int) -> None:
        self._step.observe(seconds)
        self._batch.observe(tokens)

    def scheduled(self, queue_seconds: float) -> None:
        self._queue.observe(queue_seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter.observe(seconds)

    def finished(self, reason: str, seconds: float, adapter: str, prompt_tokens: int, generated_tokens: int) -> None:
        self._success.labels(reason).inc()
        self._whole.observe(seconds)
        self._prompt.inc(prompt_tokens)
        self._generation.inc(generated_tokens)
        if adapter:
            name = adapter.partition("@")[0]
            self.adapter_tokens.add(name, prompt=prompt_tokens, generation=generated_tokens)

    def adapter_loaded(self, seconds: float) -> None:
        self._load.observe(seconds)

    def adapter_refused(self) -> None:
        self._refused.inc()

    def graphs_failed(self) -> None:
        self._graphs.inc()


class RpcMetrics:
    """grpc_server_* for the methods that were registered; unknown methods would be unbounded labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        self._started = Counter("grpc_server_started", "RPCs begun.", labels, registry=registry)
        self._handled = Counter("grpc_server_handled", "RPCs ended.", [*labels, "grpc_code"], registry=registry)
        self._seconds = Histogram(
            "grpc_server_handling_seconds", "Time to answer.", labels, buckets=_LATENCY, registry=registry
        )
        self._kinds: dict[tuple[str, str], str] = {}

    def register(self, kind: str, service: str, method: str) -> None:
        self._kinds[service, method] = kind
        self._started.labels(kind, service, method)
        self._seconds.labels(kind, service, method)

    def started(self, service: str, method: str) -> None:
        self._started.labels(self._kinds[service, method], service, method).inc()

    def handled(self, service: str, method: str, code: str, seconds: float) -> None:
        kind = self._kinds[service, method]
        self._handled.labels(kind, service, method, code).inc()
        self._seconds.labels(kind, service, method).observe(seconds)

    def denied(self, service: str, method: str, code: str) -> None:
        """Count an RPC that was refused before its handler ran, where the method is known."""
        if (service, method) in self._kinds:
            self.started(service, method)
            self.handled(service, method, code, 0.0)


def _seconds(name: str, text: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"peftmux_{name}_seconds", f"{text} Seconds.", buckets=buckets, registry=registry)

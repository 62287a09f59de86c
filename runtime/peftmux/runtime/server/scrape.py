"""Metrics read from the engine's state when they are asked for, and the port that serves all of them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peftmux.runtime.engine.api import AdapterInfo, AdapterState, EngineStats, ResidencyLevel
from peftmux.runtime.server.metrics import OTHER, AdapterTokens

logger = logging.getLogger(__name__)

_LEVELS = [ResidencyLevel.DEVICE, ResidencyLevel.HOST, ResidencyLevel.DISK]


class EngineCollector(Collector):
    """Gauges from one snapshot of the engine.

    `snapshot` is called from the metrics port's thread and brings the snapshot from the engine's own loop. While it
    cannot, the engine's gauges are absent rather than stale.
    """

    def __init__(
        self, snapshot: Callable[[], EngineStats], tokens: AdapterTokens, adapter_labels: int, max_loras: int | None
    ) -> None:
        self._snapshot = snapshot
        self._tokens = tokens
        self._adapter_labels = adapter_labels
        self._max_loras = max_loras

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time: registering must not need a running engine."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._snapshot()
        except (FutureTimeout, RuntimeError):
            logger.warning("metrics: the engine's loop did not answer; its gauges are left out of this scrape")
            return
        self._tokens.keep({info.name for info in stats.adapters})
        yield from _gauges(stats)
        yield self._adapter_loaded(stats)
        yield self._adapter_tokens()
        yield self._running(stats)
        yield self._lora_info(stats)

    def _adapter_loaded(self, stats: EngineStats) -> Metric:
        family = GaugeMetricFamily(
            "peftmux_adapter_loaded", "Adapters that can be asked for.", labels=["adapter", "level", "pinned"]
        )
        served = sorted((info for info in stats.adapters if info.residency), key=_busiest_first)
        for info in served[: self._adapter_labels]:
            family.add_metric([info.name, *_place(info)], 1)
        for place, count in Counter(map(_place, served[self._adapter_labels :])).items():
            family.add_metric([OTHER, *place], count)
        return family

    def _adapter_tokens(self) -> Metric:
        family = CounterMetricFamily(
            "peftmux_adapter_tokens", "Tokens of finished requests by adapter.", labels=["adapter", "kind"]
        )
        for name, kind, count in self._tokens.samples():
            family.add_metric([name, kind], count)
        return family

    def _running(self, stats: EngineStats) -> Metric:
        family = GaugeMetricFamily(
            "peftmux_adapter_requests_running", "Requests in the batch, '' being the base's.", labels=["adapter"]
        )
        busiest = sorted(stats.running_by_adapter.items(), key=lambda item: (-item[1], item[0]))
        for name, count in busiest[: self._adapter_labels]:
            family.add_metric([name], count)
        if rest := sum(count for _, count in busiest[self._adapter_labels :]):
            family.add_metric([OTHER], rest)
        return family

    def _lora_info(self, stats: EngineStats) -> Metric:
        """One row, as routers read it from vLLM: every adapter on the device, also while idle.

        Without --max-loras there is no fixed number of places (memory decides, idle adapters give way), which a
        router must see as room for one more.
        """
        resident = sorted(
            info.name
            for info in stats.adapters
            if info.state is AdapterState.READY and info.residency is ResidencyLevel.DEVICE
        )
        waiting = sorted(name for name, count in stats.waiting_by_adapter.items() if name and count)
        maximum = len(resident) + 1 if self._max_loras is None else self._max_loras
        labels = {
            "max_lora": str(maximum),
            "running_lora_adapters": ",".join(resident),
            "waiting_lora_adapters": ",".join(waiting),
        }
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters on this server.", labels=list(labels))
        family.add_metric(list(labels.values()), time.time())
        return family


def _gauges(stats: EngineStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("peftmux_requests_running", "Requests in the batch.", stats.running)
    yield GaugeMetricFamily("peftmux_requests_waiting", "Requests in the queue.", stats.waiting)
    yield GaugeMetricFamily("peftmux_kv_cache_usage_ratio", "Share of the cache in use.", stats.kv_cache_usage)
    yield GaugeMetricFamily("vllm:num_requests_running", "Requests in the batch.", stats.running)
    yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting)
    yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the cache in use, 0 to 1.", stats.kv_cache_usage)


def _busiest_first(info: AdapterInfo) -> tuple[int, int, str]:
    assert info.residency is not None
    return (-info.requests_in_flight, _LEVELS.index(info.residency), info.name)


def _place(info: AdapterInfo) -> tuple[str, str]:
    assert info.residency is not None
    return info.residency.value, str(info.pinned).lower()


class MetricsPort:
    """Serves a registry over HTTP from a thread of its own until `close`."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        server, self._thread = start_http_server(port, host, registry)
        self._server: WSGIServer = server
        self.address = f"{host}:{server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

"""Lint, Kubernetes' own strict schemas, and what the values schema refuses."""

from __future__ import annotations

from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

OLDEST_KUBERNETES = "1.30"
KUBERNETES = [OLDEST_KUBERNETES, "1.33", "1.37"]


def test_chart_lints_without_a_warning(repository, values):
    report = helm_python.lint(repository / "deploy" / "chart", values, strict=True, kube_version="v1.33.0")
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] >= 2] == []


def test_oldest_kubernetes_is_the_charts(chart):
    assert chart.metadata["kubeVersion"] == f">={OLDEST_KUBERNETES}.0-0"


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_pass_the_strict_schemas(render, values, version):
    manifests = render(values)
    assert {"Deployment", "Service"} <= set(manifests)
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_strict_schemas_refuse_an_unknown_field(render, minimal):
    deployment = render(minimal)["Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)


def test_chart_version_is_the_projects(chart, repository):
    project = (repository / "pyproject.toml").read_text()
    assert f'version = "{chart.metadata["appVersion"]}"' in project


def test_every_default_is_in_the_schema(chart):
    assert chart.schema is not None
    assert set(chart.values) <= set(chart.schema["properties"])


REFUSED: dict[str, tuple[str, str]] = {
    "no model": ("model: {name: ''}", "model"),
    "misspelt key": ("replicaCount: 2", "replicaCount"),
    "misspelt nested key": ("shutdown: {graceSeconds: 3}", "graceSeconds"),
    "port in use by root": ("ports: {grpc: 443}", "grpc"),
    "port as text": ("ports: {metrics: '9464'}", "metrics"),
    "no grace": ("shutdown: {grace: 0}", "grace"),
    "unknown device": ("device: tpu", "device"),
    "a GPU for the CPU": ("{device: cpu, gpu: {count: 1}}", "count"),
    "cuda without a GPU": ("{device: cuda, gpu: {count: 0}}", "count"),
    "half a GPU": ("gpu: {count: 0.5}", "count"),
    "a moving image tag": ("image: {tag: latest}", "tag"),
    "tag inside the repository": ("image: {repository: 'team/peftmux:1'}", "repository"),
    "a roll-out that cannot move": ("rollout: {maxSurge: 0, maxUnavailable: 0}", "not"),
    "adapter path out of the root": ("adapters: {preload: {a: ../secret}}", "preload"),
    "absolute adapter path": ("adapters: {preload: {a: /etc}}", "preload"),
    "adapter name": ("adapters: {preload: {'a,b': x}}", "a,b"),
    "a flag that the chart sets": ("extraArgs: ['--grpc=0.0.0.0:1']", "extraArgs"),
    "TLS, which the probes lack": ("extraArgs: [--tls-cert-path, /x]", "extraArgs"),
    "a bare number as size": ("cacheSize: 20", "cacheSize"),
    "a label that selects": ("podLabels: {app.kubernetes.io/name: other}", "app.kubernetes.io/name"),
    "service type": ("service: {type: ExternalName}", "type"),
}


def refusal(chart: Any, values: dict[str, Any]) -> str:
    """What the schema says against these values over the defaults; nothing where it takes them."""
    try:
        chart.validate_schema(chart.merge_values(values))
    except helm_python.HelmValuesError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_schema_refuses(chart, minimal, case):
    text, named = REFUSED[case]
    assert named in refusal(chart, {**minimal, **yaml.safe_load(text)})


def test_schema_takes_the_defaults_with_a_model_and_not_without(chart, minimal):
    assert refusal(chart, minimal) == ""
    assert "model" in refusal(chart, {})

"""The chart, and a function that renders it as Kubernetes would receive it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "deploy" / "chart"
VALUES = {path.stem: path for path in sorted((Path(__file__).parent / "values").glob("*.yaml"))}

Manifests = dict[str, dict[str, Any]]
Render = Callable[[dict[str, Any]], Manifests]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(CHART) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def render(chart: helm_python.Chart) -> Render:
    """values -> {kind: manifest}, after the schema has passed them."""

    def rendered(values: dict[str, Any]) -> Manifests:
        chart.validate_schema(chart.merge_values(values))
        files = chart.render(values, name="demo", namespace="serving", is_install=True)
        documents = [yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")]
        return {document["kind"]: document for document in documents if document}

    return rendered


@pytest.fixture(scope="session", params=sorted(VALUES))
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each values file of this folder in turn."""
    loaded: dict[str, Any] = yaml.safe_load(VALUES[request.param].read_text())
    return loaded


@pytest.fixture(scope="session")
def minimal() -> dict[str, Any]:
    return {"model": {"name": "org/base-model"}}

"""The container's arguments, given to the real parser of `peftmux serve`."""

from __future__ import annotations

import pytest

from peftmux.cli.serve import build_parser, server_config
from peftmux.cli.settings import parse


@pytest.fixture
def pod(render, values):
    return render(values)["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def parsed(pod, tmp_path):
    """The namespace; paths inside the container become paths here, since the parser looks."""
    (container,) = pod["containers"]
    command, *arguments = container["args"]
    assert command == "serve"
    (tmp_path / "adapters").mkdir()
    (tmp_path / "tokens").write_text("one-token-of-some-length\n")
    here = {"/adapters": str(tmp_path / "adapters"), "/run/secrets/peftmux/tokens": str(tmp_path / "tokens")}
    return parse(*build_parser(), [here.get(argument, argument) for argument in arguments], {})


def test_serve_takes_the_containers_arguments(parsed, pod, values):
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert parsed.model == values["model"]["name"]
    assert parsed.grpc == f"0.0.0.0:{ports['grpc']}"
    assert parsed.metrics == f"0.0.0.0:{ports['metrics']}"
    assert parsed.device == values.get("device", "auto")
    preload = values.get("adapters", {}).get("preload", {})
    assert parsed.adapter == [(name, f"/adapters/{path}") for name, path in sorted(preload.items())]
    assert pod["terminationGracePeriodSeconds"] > parsed.grace_seconds


def test_tokens_are_read_where_the_secret_is_mounted(parsed, pod, values):
    config = server_config(parsed)
    mounts = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/run/secrets/peftmux"]
    if "auth" in values:
        assert config.tokens is not None
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == mounts[0]["name"])
        assert volume["secret"]["secretName"] == values["auth"]["existingSecret"]
    else:
        assert config.tokens is None
        assert mounts == []


def test_without_tls_as_the_probes_need_it(parsed):
    assert server_config(parsed).tls is None


def test_defaults_are_the_commands_own(chart):
    """Where the chart says nothing else, a pod listens where `peftmux serve` would and drains as long."""
    own = parse(*build_parser(), ["model"], {})
    assert chart.values["ports"] == {name: int(getattr(own, name).rpartition(":")[2]) for name in ("grpc", "metrics")}
    assert chart.values["shutdown"]["grace"] == own.grace_seconds
    assert chart.values["device"] == own.device


def test_flags_that_the_chart_sets_are_flags_of_serve(chart, minimal):
    parser, _ = build_parser()
    schema = chart.schema["properties"]["extraArgs"]["items"]["not"]["pattern"]
    named = schema.removeprefix("^--(").removesuffix(")(=|$)").split("|")
    known = parser.format_help()
    assert [name for name in named if f"--{name.split('[')[0]}" not in known] == []

"""What the rendered Deployment and Service promise: probes, time to stop, least privilege, places to write."""

from __future__ import annotations

import copy
import itertools

import pytest

WRITABLE = {"/cache", "/tmp", "/dev/shm"}


@pytest.fixture
def pod(render, values):
    return render(values)["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    (only,) = pod["containers"]
    return only


def flag(container, name):
    return container["args"][container["args"].index(name) + 1]


def test_probes_ask_grpc_health_on_the_serving_port(container):
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert set(ports) == {"grpc", "metrics"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": ports["grpc"]}
    assert flag(container, "--grpc") == f"0.0.0.0:{ports['grpc']}"
    assert flag(container, "--metrics") == f"0.0.0.0:{ports['metrics']}"


def test_startup_may_take_its_time(container, values):
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= values.get("startupTimeout", 600)


def test_pod_outlives_its_grace(pod, container):
    pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert pod["terminationGracePeriodSeconds"] > int(flag(container, "--grace-seconds")) + pause


def test_least_privilege(pod, container):
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


def test_only_the_known_places_are_writable(pod, container, values):
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert all("emptyDir" in volumes[mounts[path]["name"]] for path in WRITABLE)
    assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    adapters = values.get("adapters", {})
    adapters_writable = not adapters.get("existingClaim") or adapters.get("readOnly") is False
    assert writable == WRITABLE | ({"/adapters"} if adapters_writable else set())


def test_service_reaches_the_pod(render, values):
    manifests = render(values)
    template, service = manifests["Deployment"]["spec"]["template"], manifests["Service"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert manifests["Deployment"]["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert [port["name"] for port in service["spec"]["ports"]] == ["grpc", "metrics"]
    targets = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == targets


def test_service_variables_cannot_become_settings(pod):
    """Kubernetes would set PEFTMUX_PORT and the like from a Service named peftmux."""
    assert pod["enableServiceLinks"] is False


def test_service_account_exists_or_is_the_default(render, values):
    manifests = render(values)
    named = manifests["Deployment"]["spec"]["template"]["spec"]["serviceAccountName"]
    if values.get("serviceAccount", {}).get("create", True):
        assert manifests["ServiceAccount"]["metadata"]["name"] == named
        assert manifests["ServiceAccount"]["automountServiceAccountToken"] is False
    else:
        assert "ServiceAccount" not in manifests
        assert named == "default"


@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (0, 1), ("25%", 0)])
def test_rollout_keeps_serving(render, minimal, surge, unavailable):
    values = {**minimal, "rollout": {"maxSurge": surge, "maxUnavailable": unavailable}}
    update = render(values)["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert update == {"maxSurge": surge, "maxUnavailable": unavailable}


def test_gpu_count_is_a_limit_beside_the_others(render, minimal):
    values = {**minimal, "gpu": {"count": 2, "resourceName": "amd.com/gpu"}}
    resources = render(values)["Deployment"]["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "16Gi", "amd.com/gpu": "2"}
    assert resources["requests"] == {"cpu": "2", "memory": "4Gi"}


def test_rendering_does_not_depend_on_the_order_before(render, minimal):
    """Templates must not write into the values they were given."""
    gpu = {**minimal, "gpu": {"count": 1}}
    first, _, again = (copy.deepcopy(render(values)) for values in (minimal, gpu, minimal))
    assert first == again


def test_adapters_are_preloaded_in_a_stable_order(render, minimal):
    values = {**minimal, "adapters": {"preload": {"team/b": "b-v2", "a": "a"}}}
    args = render(values)["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
    pairs = [value for name, value in itertools.pairwise(args) if name == "--adapter"]
    assert pairs == ["a=/adapters/a", "team/b=/adapters/b-v2"]


def test_notes_say_what_to_mind(chart, minimal):
    several = {**minimal, "replicas": 2, "service": {"type": "LoadBalancer"}}
    notes = chart.render(several, name="demo", namespace="serving")["peftmux/templates/NOTES.txt"]
    assert "emptyDir" in notes
    assert "2 replicas" in notes
    assert "in clear text" in notes
    assert "namespace serving" in notes

"""The Dockerfile against repository and chart: what it copies exists, what it installs is pinned, the chart fits it."""

from __future__ import annotations

import re
import tomllib

import pytest


@pytest.fixture(scope="module")
def stages(repository):
    """[(image, [(instruction, arguments), ...]), ...], build arguments filled in with their defaults."""
    text = (repository / "deploy" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    instructions = [line.split(maxsplit=1) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]
    arguments = dict(rest.split("=", 1) for name, rest in instructions if name == "ARG")
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for name, rest in instructions:
        if name == "FROM":
            found.append((re.sub(r"\$\{(\w+)\}", lambda m: arguments[m.group(1)], rest), []))
        elif found:
            found[-1][1].append((name, " ".join(rest.split())))
    return found


@pytest.fixture(scope="module")
def final(stages):
    return stages[-1][1]


def of(instructions, wanted):
    return [rest for name, rest in instructions if name == wanted]


def test_two_stages_on_one_pinned_image(stages):
    images = [image.split()[0] for image, _ in stages]
    assert len(stages) == 2
    assert len(set(images)) == 1
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z]+-[a-z]+", images[0]), images[0]


def test_image_python_is_one_the_project_allows(stages, repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    low = tuple(int(part) for part in project["requires-python"].removeprefix(">=").split("."))
    ((major, minor),) = re.findall(r":(\d+)\.(\d+)\.", stages[0][0])
    assert (int(major), int(minor)) >= low


def test_copied_sources_exist_and_reach_the_build(stages, repository):
    """.dockerignore leaves everything out but what it names, so both must agree."""
    rules = [line for line in (repository / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for _, instructions in stages
        for rest in of(instructions, "COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert [source for source in copied if not (repository / source).exists()] == []


def test_build_has_what_the_wheel_needs(stages, repository):
    wheel = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = {source for rest in of(stages[0][1], "COPY") for source in rest.split()[:-1]}
    assert set(wheel["sources"]) <= copied


def test_stages_agree_on_what_is_handed_over(stages, final):
    (handed,) = [rest.split() for rest in of(final, "COPY")]
    assert handed[0] == "--from=build"
    assert stages[0][0].endswith(" AS build")
    assert handed[1] == handed[2], "a virtual environment works only where it was made"
    assert f"python -m venv {handed[1]}" in of(stages[0][1], "RUN")
    assert any(f"PATH={handed[1]}/bin:" in rest for rest in of(final, "ENV"))


def test_every_install_is_pinned_and_leaves_no_cache(stages):
    pip = [rest for _, instructions in stages for rest in of(instructions, "RUN") if "pip install" in rest]
    assert pip
    assert all("-c constraints.txt" in rest for rest in pip)
    assert any("PIP_NO_CACHE_DIR=1" in rest for rest in of(stages[0][1], "ENV"))
    apt = [rest for _, instructions in stages for rest in of(instructions, "RUN") if "apt-get install" in rest]
    assert all("--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest for rest in apt)


def test_no_setup_is_done_as_root_after_the_user(final):
    names = [name for name, _ in final]
    assert "RUN" not in names[names.index("USER") :]
    assert "COPY" not in names[names.index("USER") :]


def test_user_is_the_charts_and_not_root(final, render, minimal):
    (user,) = of(final, "USER")
    uid, gid = (int(part) for part in user.split(":"))
    assert uid > 0
    context = render(minimal)["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    assert (uid, gid) == (context["runAsUser"], context["runAsGroup"])
    assert any(f"--uid {uid} " in rest for rest in of(final, "RUN"))


def test_ports_are_the_charts(final, chart):
    (exposed,) = of(final, "EXPOSE")
    assert {int(port) for port in exposed.split()} == set(chart.values["ports"].values())


def test_caches_go_where_the_chart_lets_them(final, render, minimal):
    (container,) = render(minimal)["Deployment"]["spec"]["template"]["spec"]["containers"]
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    variables = dict(pair.split("=", 1) for rest in of(final, "ENV") for pair in rest.split())
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR"):
        assert any(variables[name].startswith(path) for path in writable), name


def test_entry_point_is_the_projects_command(final, repository):
    (entry,) = of(final, "ENTRYPOINT")
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert entry == '["peftmux"]'
    assert "peftmux" in project["scripts"]
    assert of(final, "STOPSIGNAL") == ["SIGTERM"]


def test_modules_run_in_the_build_exist(stages, repository):
    modules = re.findall(r"python -m (peftmux[\w.]+)", " ".join(of(stages[0][1], "RUN")))
    assert modules
    for module in modules:
        path = module.replace(".", "/") + ".py"
        assert any((repository / root / path).is_file() for root in ("runtime", "kernels", "trainer")), module

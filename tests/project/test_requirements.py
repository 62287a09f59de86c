"""What the code imports, pyproject.toml requires, and constraints.txt pins."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# Imported where it is installed, with a message where it is not.
OPTIONAL = {"bitsandbytes", "pillow", "pyarrow", "torchao"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(*extras: str) -> dict[str, Requirement]:
    """Requirements of the project with these extras, by canonical name."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonical(requirement.name): requirement for requirement in map(Requirement, lines)}


def imported(*roots: str) -> dict[str, str]:
    """Top-level name of every import that is neither ours nor Python's -> a file that has it."""
    found: dict[str, str] = {}
    for root in roots:
        for path in (REPOSITORY / root / "peftmux").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    names = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                found |= {name: str(path.relative_to(REPOSITORY)) for name in names}
    ours = {"peftmux", *sys.stdlib_module_names}
    return {name: path for name, path in found.items() if name.split(".")[0] not in ours}


def undeclared(imports: dict[str, str], requirements: dict[str, Requirement]) -> list[str]:
    distributions = importlib.metadata.packages_distributions()
    missing = []
    for name, path in imports.items():
        top = name.split(".")[0]
        candidates = {canonical(distribution) for distribution in distributions.get(top, [top])}
        if not candidates & set(requirements) and not candidates & OPTIONAL:
            missing.append(f"{path} imports {name}")
    return missing


def test_runtime_imports_are_required():
    assert undeclared(imported("runtime", "kernels", "protos"), required()) == []


@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [("linux", "x86_64", True), ("linux", "aarch64", False), ("darwin", "arm64", False), ("win32", "AMD64", False)],
)
def test_triton_is_required_where_its_kernels_are_compiled(system, machine, wanted):
    """Elsewhere torch's own build brings it, or there is none: the other forms of the operators run."""
    triton = required()["triton"]
    assert triton.marker is not None
    assert triton.marker.evaluate({"sys_platform": system, "platform_machine": machine}) is wanted
    assert all(triton.specifier.contains(release) for release in ("3.6.0", "3.7.1", "3.9.0"))


def test_trainer_imports_are_required():
    assert undeclared(imported("trainer"), required("train")) == []


def test_an_undeclared_import_is_found():
    assert undeclared({"pytest": "some.py"}, required()) == ["some.py imports pytest"]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"expected one exact version, got {line!r}"
            assert canonical(requirement.name) not in found, f"{requirement.name} is pinned twice"
            found[canonical(requirement.name)] = specifier.version
    return found


@pytest.mark.parametrize("name", sorted(required(*PROJECT["optional-dependencies"])))
def test_requirement_is_pinned_within_its_bounds(name):
    requirement = required(*PROJECT["optional-dependencies"])[name]
    assert requirement.specifier.contains(pins()[name]), f"{requirement} does not allow {pins()[name]}"


def test_nothing_is_pinned_that_nothing_requires():
    """huggingface-hub is transformers' and the hub's commands move with it."""
    assert set(pins()) - set(required(*PROJECT["optional-dependencies"])) <= {"huggingface-hub"}

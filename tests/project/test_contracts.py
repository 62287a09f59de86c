"""The import contracts hold, and each of them fails when somebody breaks it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = ("runtime", "kernels", "trainer", "protos")
CONTRACTS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]

# contract -> a file that may not have it, and the import that breaks the contract.
VIOLATIONS = {
    "packages": ("runtime/peftmux/runtime/errors.py", "import peftmux.trainer"),
    "runtime": ("runtime/peftmux/runtime/scheduler/plan.py", "import peftmux.runtime.engine.api"),
    "trainer": ("trainer/peftmux/trainer/methods/lora.py", "import peftmux.trainer.run.loop"),
    "wire": ("runtime/peftmux/runtime/engine/api.py", "from google.protobuf import message"),
    "policy": ("runtime/peftmux/runtime/params.py", "import numpy"),
    "metrics": ("runtime/peftmux/runtime/engine/observer.py", "import prometheus_client"),
}

# The copy must be linted, not this checkout or another one that this interpreter has on its path.
LINT = """
import sys
from pathlib import Path
others = {p for p in sys.path if "site-packages" not in p and Path(p, "peftmux").is_dir()}
sys.path = [*sys.argv[1].split(":"), *(p for p in sys.path if p not in others)]
from importlinter.cli import lint_imports
sys.exit(lint_imports(no_cache=True, no_logo=True, limit_to_contracts=tuple(sys.argv[2:])))
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    copy = tmp_path_factory.mktemp("repository")
    for root in ROOTS:
        shutil.copytree(
            REPOSITORY / root, copy / root, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
        )
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    return copy


def lint(copy, *contracts):
    roots = ":".join(str(copy / root) for root in ROOTS)
    command = [sys.executable, "-c", LINT, roots, *contracts]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120, check=False)


def test_contracts_hold(copied):
    result = lint(copied)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(CONTRACTS)} kept, 0 broken" in result.stdout


def test_every_contract_has_a_violation_here():
    assert {contract["id"] for contract in CONTRACTS} == set(VIOLATIONS)


@pytest.mark.parametrize("contract", sorted(VIOLATIONS))
def test_violation_breaks_the_contract(copied, contract):
    name, statement = VIOLATIONS[contract]
    file = copied / name
    good = file.read_text()
    file.write_text(f"{good}\n{statement}\n")
    try:
        result = lint(copied, contract)
    finally:
        file.write_text(good)
    assert result.returncode == 1
    assert "0 kept, 1 broken" in result.stdout
    assert name.split("/peftmux/")[1].removesuffix(".py").replace("/", ".") in result.stdout

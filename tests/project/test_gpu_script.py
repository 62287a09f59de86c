"""benchmarks/gpu.py on a machine without a GPU: its exit codes, and that nothing passes by not running."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    specification = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["benchmarks_gpu"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def suite(gpu, tmp_path, monkeypatch):
    """A repository of one test file."""

    def written(body: str) -> Path:
        (tmp_path / "tests").mkdir()
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\nan_option_of_no_plugin = 1\n")
        (tmp_path / "tests" / "test_some.py").write_text(f"import pytest\n{body}\n")
        monkeypatch.setattr(gpu, "REPOSITORY", tmp_path)
        return Path(tmp_path)

    return written


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_device_is_said_at_once(tmp_path):
    command = [sys.executable, str(SCRIPT), "--results", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 3
    assert "no CUDA device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_named(gpu, monkeypatch, capsys):
    monkeypatch.setitem(gpu.REQUIRED, "no_such_module.inner", "no-such-distribution")
    assert gpu.main([]) == 2
    assert "no-such-distribution" in capsys.readouterr().err


def test_only_files_with_gpu_tests_are_collected(gpu, tmp_path):
    (tmp_path / "test_cpu.py").write_text("import not_installed")
    (tmp_path / "test_both.py").write_text("@pytest.mark.gpu\ndef test(): ...")
    assert gpu.gpu_test_files(tmp_path) == [tmp_path / "test_both.py"]


def test_settings_of_absent_plugins_do_not_stop_the_tests(gpu, suite):
    folder = suite("@pytest.mark.gpu\ndef test_one(): pass\ndef test_not_for_the_gpu(): assert False")
    outcome = gpu.run_tests(folder, 60)
    assert outcome.status == "passed"
    assert outcome.counts == {"tests": 1, "failures": 0, "errors": 0, "skipped": 0}


def test_failing_test_fails_the_run(gpu, suite):
    outcome = gpu.run_tests(suite("@pytest.mark.gpu\ndef test_one(): assert False"), 60)
    assert (outcome.status, outcome.counts["failures"]) == ("failed", 1)


def test_all_skipped_is_no_pass(gpu, suite):
    folder = suite("@pytest.mark.gpu\n@pytest.mark.skip\ndef test_one(): pass")
    outcome = gpu.run_tests(folder, 60)
    assert (outcome.status, outcome.note) == ("failed", "every test was skipped")


def test_without_pytest_the_tests_are_not_run_and_that_is_an_error(gpu, suite, monkeypatch, capsys):
    folder = suite("@pytest.mark.gpu\ndef test_one(): pass")
    monkeypatch.setitem(gpu.TESTING, "no_such_plugin", "no-such-plugin")
    monkeypatch.setattr(gpu, "device_name", lambda: "A Device (v1)")
    monkeypatch.setattr(gpu, "run_benchmark", lambda *_: gpu.Outcome("passed", 1.0))
    assert gpu.main(["--results", str(folder)]) == 2
    assert "not installed: no-such-plugin" in capsys.readouterr().out
    result = json.loads((folder / "a-device-v1" / "run.json").read_text())
    assert (result["tests"]["status"], result["benchmark"]["status"]) == ("not run", "passed")
    assert result["torch"] == torch.__version__


def test_too_slow_is_stopped_with_its_children(gpu, tmp_path):
    marker = tmp_path / "still-running"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = gpu.run([sys.executable, "-c", parent], 1)
    assert outcome.status == "timed out"
    time.sleep(3)
    assert not marker.exists()


def test_benchmark_without_figures_is_a_failure(gpu, tmp_path, monkeypatch):
    (tmp_path / "bench.json").write_text("{}")
    monkeypatch.setattr(gpu, "run", lambda *_: gpu.Outcome("passed", 1.0))
    assert gpu.run_benchmark(tmp_path, 60, []).status == "failed"


@pytest.mark.parametrize(("name", "expected"), [("NVIDIA H200", "nvidia-h200"), ("Tesla T4 (16GB)", "tesla-t4-16gb")])
def test_device_folder_name(gpu, name, expected):
    assert gpu.slug(name) == expected

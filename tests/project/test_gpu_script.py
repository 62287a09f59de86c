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
    (tmp_path / "test_text.py").write_text("BODY = '@pytest.mark.gpu'\ndef test(): ...  # pytest.mark.gpu")
    assert gpu.gpu_test_files(tmp_path) == [tmp_path / "test_both.py"]


def test_settings_of_absent_plugins_do_not_stop_the_tests(gpu, suite):
    folder = suite("@pytest.mark.gpu\ndef test_one(): pass\ndef test_not_for_the_gpu(): assert False")
    outcome = gpu.run_tests(folder, False, 60)
    assert outcome.status == "passed"
    assert outcome.counts == {"tests": 1, "failures": 0, "errors": 0, "skipped": 0}


def test_failing_test_fails_the_run(gpu, suite):
    outcome = gpu.run_tests(suite("@pytest.mark.gpu\ndef test_one(): assert False"), False, 60)
    assert (outcome.status, outcome.counts["failures"]) == ("failed", 1)


def test_all_skipped_is_no_pass(gpu, suite):
    folder = suite("@pytest.mark.gpu\n@pytest.mark.skip\ndef test_one(): pass")
    outcome = gpu.run_tests(folder, False, 60)
    assert (outcome.status, outcome.note) == ("failed", "every test was skipped")
    assert gpu.run_tests(folder, True, 60).status == "passed"


PLAIN = """
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(False, reason="no")]

@pytest.fixture(scope="module")
def seen():
    made = []
    yield made
    assert made == [1, 2]

@pytest.fixture
def twice(value):
    return 2 * value

@pytest.mark.parametrize("value", [1, pytest.param(2, id="two")])
def test_one(value, twice, seen, tmp_path):
    seen.append(value)
    assert twice == 2 * value and tmp_path.is_dir()

@pytest.mark.parametrize(("a", "b"), [(1, 1.0000001), (2, 2)])
@pytest.mark.parametrize("c", [0])
def test_close(a, b, c):
    assert b == pytest.approx(a)
    with pytest.raises(ZeroDivisionError, match="zero"):
        a / c

def test_lists(of_the_folder):
    assert of_the_folder == pytest.approx([1, -2.0000001])
    assert of_the_folder != pytest.approx([1, -2.1])
    assert of_the_folder != pytest.approx([1])
    assert of_the_folder == pytest.approx([1.05, -2.05], abs=0.1)

def test_patched(monkeypatch):
    import json
    before = json.dumps
    monkeypatch.setattr(json, "dumps", None)
    assert json.dumps is None
    monkeypatch.undo()
    assert json.dumps is before
    monkeypatch.setattr(json, "loads", None)

def test_undone():
    import json
    assert json.loads("1") == 1

@pytest.mark.skipif(True, reason="never")
def test_never():
    raise AssertionError
"""


CONFTEST = """
import pytest

@pytest.fixture(scope="session")
def of_the_folder():
    return [1, -2]
"""


def test_without_pytest_the_tests_run_all_the_same(gpu, suite, monkeypatch):
    found = gpu._found
    monkeypatch.setattr(gpu, "_found", lambda module: module != "pytest" and found(module))
    folder = suite(PLAIN)
    (folder / "tests" / "conftest.py").write_text(CONFTEST)
    monkeypatch.setattr(gpu, "ROOTS", (str(SCRIPT.parents[1]),))
    outcome = gpu.run_tests(folder, False, 60)
    assert (outcome.status, outcome.counts) == ("passed", {"tests": 8, "failures": 0, "errors": 0, "skipped": 1})


def test_without_pytest_the_repository_s_own_gpu_tests_are_found_and_their_fixtures_made(gpu, monkeypatch, tmp_path):
    """All of them skip themselves without a device, so here every fixture they name is looked for."""
    files = gpu.gpu_test_files(gpu.REPOSITORY / "tests")
    assert Path(__file__) not in files
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    outcome = gpu.run([sys.executable, str(probe), *map(str, files)], 120)
    assert outcome.status == "passed"


PROBE = """
import inspect, pathlib, sys
from benchmarks import plain_tests
sys.modules["pytest"] = plain_tests.stand_in()
seen = 0
for path in map(pathlib.Path, sys.argv[1:]):
    module = plain_tests.load(path, path.stem)
    file = plain_tests.File(module, path)
    for name, test in vars(module).items():
        if name.startswith("test_") and inspect.isfunction(test):
            given = [m.args[0] for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
            given = {n.strip() for names in given for n in (names.split(",") if isinstance(names, str) else names)}
            for wanted in inspect.signature(test).parameters.keys() - given - {"tmp_path", "monkeypatch"}:
                file._fixture(wanted)
                seen += 1
assert seen
"""


FAILING = """
@pytest.mark.gpu
def test_one(): assert False
@pytest.mark.gpu
def test_two(unknown): pass
def test_not_for_the_gpu(): assert False
"""


def test_without_pytest_a_failing_test_fails_the_run(gpu, suite, monkeypatch):
    monkeypatch.setattr(gpu, "_found", lambda module: module != "pytest")
    folder = suite(FAILING)
    monkeypatch.setattr(gpu, "ROOTS", (str(SCRIPT.parents[1]),))
    outcome = gpu.run_tests(folder, False, 60)
    assert (outcome.status, outcome.counts["failures"]) == ("failed", 2)


def test_the_budget_is_shared_out_and_what_is_left_goes_on(gpu):
    given = {}

    def part(name, weight):
        def run(seconds):
            given[name] = round(seconds)
            return gpu.Outcome("passed")

        return gpu.Part(name, weight, run)

    gpu.run_parts([part("first", 3), part("second", 1), part("last", 2)], 60)
    assert given == {"first": 30, "second": 20, "last": 60}
    given.clear()
    assert gpu.run_parts([part("first", 1)], 0)["first"].note == "cut by the budget"
    assert given == {}


def test_the_whole_flow_dry(gpu, tmp_path):
    """Everything but the opponents' kernels, on the CPU; the parts that are not there yet say so."""
    command = [sys.executable, str(SCRIPT), "--dry", "--budget", "200", "--results", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    run = json.loads((tmp_path / "dry-run" / "run.json").read_text())
    assert run["tests"]["status"] == run["engine"]["status"] == "passed"
    assert run["tests"]["counts"]["errors"] == 0
    engine = json.loads((tmp_path / "dry-run" / "engine.json").read_text())
    mixed = next(value for name, value in engine["results"].items() if "bottleneck" in name)
    assert mixed["ms_step"] > 0
    summary = (tmp_path / "dry-run" / "summary.md").read_text()
    assert "| engine | passed |" in summary
    assert "| decode 4 rows, 4 x lora |" in summary


def test_opponents_reach_the_benchmarks(gpu, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "run", lambda command, seconds: seen.append(command) or gpu.Outcome("failed"))
    options = gpu.parse(["--opponent", "one=a/b", "--opponent", "two=c"])
    gpu.run_script("engine", tmp_path, options, 10)
    assert seen[0][-4:] == ["--opponent", "one=a/b", "--opponent", "two=c"]


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
    assert gpu.run_serving(tmp_path, gpu.parse([]), 60).status == "failed"


def test_serving_benchmark_is_left_out_where_grpc_is_not_complete(gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.SERVING, "no_such_module", "no-such-distribution")
    outcome = gpu.run_serving(tmp_path, gpu.parse([]), 60)
    assert (outcome.status, outcome.bad) == ("not run", False)
    assert "no-such-distribution" in outcome.note


@pytest.mark.parametrize(("name", "expected"), [("NVIDIA H200", "nvidia-h200"), ("Tesla T4 (16GB)", "tesla-t4-16gb")])
def test_device_folder_name(gpu, name, expected):
    assert gpu.slug(name) == expected

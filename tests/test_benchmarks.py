"""Each benchmark runs with ``--smoke``: all its code on the smallest of inputs, whatever time it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.name[0] != "_")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_runs(path, tmp_path):
    if path.stem == "dataset":
        pytest.importorskip("zarr")
    command = [sys.executable, str(path), "--smoke"]
    got = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert got.returncode == 0, got.stderr
    assert got.stdout


def test_runner_keeps_results_and_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "imports", "--smoke", "--json", str(tmp_path)]
    for said in ("| `import pullback` |", "done before"):
        got = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert got.returncode == 0, got.stderr
        assert said in got.stdout
    record = json.loads((tmp_path / "imports.json").read_text())
    assert record["benchmark"] == "imports"
    assert record["machine"]["versions"]["torch"]
    assert record["results"]["pullback"]["seconds"]


def test_runner_names_its_benchmarks():
    command = [sys.executable, "-m", "benchmarks", "nonesuch"]
    got = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert got.returncode != 0
    assert "no benchmark 'nonesuch'" in got.stderr
    assert "targets-resnet50" in got.stderr

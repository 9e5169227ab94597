"""Each benchmark runs with ``--smoke``: all its code on the smallest of inputs, whatever time it takes."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted(path for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py") if path.name[0] != "_")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_runs(path, tmp_path):
    command = [sys.executable, str(path), "--smoke"]
    got = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert got.returncode == 0, got.stderr
    assert got.stdout

"""The benchmarks explain themselves, and the one that the others build on runs to its end on a tiny model."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(
    path for path in (*FOLDER.glob("*.py"), *FOLDER.glob("gpu/*.py")) if 'if __name__ == "__main__"' in path.read_text()
)
TIMEOUT_S = 200

Simulate = Callable[..., dict[str, Any]]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a script in this process, which has torch loaded already."""

    def run_script(script: Path, *arguments: str) -> None:
        monkeypatch.setenv("GOMP_SPINCOUNT", "20000")
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
        runpy.run_path(str(script), run_name="__main__")

    return run_script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_benchmark_explains_itself(
    script: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(script, "--help")
    assert ended.value.code == 0
    assert f"python benchmarks/{script.relative_to(FOLDER)}" in capsys.readouterr().out


def test_clients_in_processes_are_compared_with_a_local_batch() -> None:
    flags = ("--shape", "tiny", "--clients", "2", "--tokens", "6", "--samples", "2", "--dtype", "float32")
    command = [sys.executable, str(FOLDER / "serve_load.py"), *flags]
    environment = {**os.environ, "GOMP_SPINCOUNT": "20000"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert row["clients"] == 2 and row["num_requests"] == 4 and row["errors"] == []
    assert row["ratio"] > 0 and len(row["samples"]["swarm"]) == len(row["samples"]["local"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_without_a_gpu_its_benchmarks_say_that_they_did_not_run(
    run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(FOLDER / "gpu" / "decode.py")
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "did not run" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["ran"] is False


@pytest.mark.parametrize("quantization", ["none", "int4"])
@pytest.mark.parametrize("script", ["decode.py", "prefill.py"])
def test_gpu_benchmarks_work_up_to_the_device(
    script: str, quantization: str, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = (
        ("--batch-sizes", "1,2", "--context", "16", "--steps", "2") if script == "decode.py" else ("--lengths", "40")
    )
    flags = ("--device", "cpu", "--shape", "tiny", "--samples", "1", "--quantization", quantization)
    run_here(FOLDER / "gpu" / script, *flags, *sizes, "--executions", "graphs,modules,single")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ran"] and report["device_name"] == "cpu" and report["quantization"] == quantization
    assert {row["execution"] for row in report["rows"]} == {"graphs", "modules", "single"}
    assert all(row["tokens_per_s"]["median"] > 0 for row in report["rows"])


@pytest.fixture
def simulate(run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Simulate:
    """Run benchmarks/placement.py; the row of each rule."""

    def run_placement(*arguments: str) -> dict[str, Any]:
        run_here(FOLDER / "placement.py", *arguments)
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        return {row["rule"]: row for row in rows}

    return run_placement


def test_servers_spread_better_and_move_less_than_by_the_published_rule(
    simulate: Simulate,
) -> None:
    """A crowd comes and goes, neighbours leave together; everything follows from the seed."""
    rows = simulate("--scenario", "trouble", "--servers", "200", "--hours", "6")
    ours, published = rows["ours"], rows["petals 0.75"]
    assert ours["of_optimum"] > published["of_optimum"] + 0.01
    assert 0 < ours["moves"] < published["moves"]


def test_a_gap_is_filled_within_one_announce_period_and_the_time_to_load(
    simulate: Simulate,
) -> None:
    ours = simulate("--scenario", "gap", "--servers", "100", "--hours", "4", "--rules", "ours")["ours"]
    assert ours["gaps"] == 1 and ours["longest_gap_before_loading_s"] <= 15.0


def test_servers_come_to_rest_wherever_they_begin(simulate: Simulate) -> None:
    for number in ("10", "100", "300"):
        ours = simulate("--scenario", "still", "--servers", number, "--rules", "ours")["ours"]
        assert ours["moves"] > 0 and ours["returns"] == 0 and ours["last_move_h"] < 1.0
